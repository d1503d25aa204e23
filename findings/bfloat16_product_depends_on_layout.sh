#!/usr/bin/env bash
# torch 2.11.0, x86 processor without AVX-512: a product of bfloat16 takes seven times as long where the second matrix
# lies row by row (x @ w) as where its transpose does (x @ w.T), and then 60 times as long as in float32.
#
# A linear layer computes the second form forward, and the first in its backward pass, for the gradient of its input.
# So training by autocast loses far more than a look at the forward pass, or at generation, lets one expect. The results
# are equal but for rounding. No warning is given, and torch.backends.mkldnn.is_available() is true.
#
# Seen (torch==2.11.0, CPython 3.11, one thread, AVX2 alone, other work beside it; 256 x 512 times 512 x 512):
#     x @ w.T    1.9 ms in float32,  15 ms in bfloat16
#     x @ w      1.7 ms in float32, 101 ms in bfloat16
# ONEDNN_MAX_CPU_ISA=AVX2 below keeps oneDNN from its kernels for AVX-512, so that other processors show the same. On
# this one it changed nothing; on a processor with AVX-512 it was not tried.
#
# Run: bash findings/bfloat16_product_depends_on_layout.sh       (installs into a temporary folder; fails if changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.11.0" numpy
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
x, w = torch.randn(256, 512), torch.randn(512, 512)


def milliseconds(call) -> float:
    """The fastest of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


taken = {}
for dtype in (torch.float32, torch.bfloat16):
    a, b = x.to(dtype), w.to(dtype)
    transposed = b.T.contiguous()                       # lies so that transposed.T is b
    assert torch.allclose(a @ b, a @ transposed.T, rtol=0.02, atol=0.5)
    taken[dtype] = milliseconds(lambda: a @ b), milliseconds(lambda: a @ transposed.T)
    print(f"{dtype}: x @ w {taken[dtype][0]:.1f} ms, x @ w.T {taken[dtype][1]:.1f} ms")
by_rows, by_columns = taken[torch.bfloat16]
assert by_rows > 3 * by_columns and by_rows > 20 * taken[torch.float32][0], "this finding is out of date"
PYTHON
