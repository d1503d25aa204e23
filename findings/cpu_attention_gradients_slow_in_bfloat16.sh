#!/usr/bin/env bash
# torch 2.11.0, x86 processor: the gradients of scaled_dot_product_attention in bfloat16 take several times as long as
# in float32 where the keys are few.
#
# Seen (torch==2.11.0, CPython 3.11, one thread, a processor with avx512_bf16, [16, 3, 84, 64] queries): of 18 keys
# the backward pass takes 9 to 13 ms in bfloat16 and 1.2 ms in float32; of 84 keys 10.7 and 4.5; of 504 keys (4 clips,
# 8 heads) they are nearly alike, 70 and 67. The forward pass takes 1.0 to 1.3 times as long. In an update of a small
# model under bfloat16 autocast these gradients took 30 % of the time, all matrix products 37 %. Attention in float32
# between casts is about as fast as float32 throughout.
#
# Run: bash findings/cpu_attention_gradients_slow_in_bfloat16.sh     (installs into a temporary folder; fails if changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.11.0" numpy
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())


def milliseconds(keys: int, dtype: torch.dtype) -> float:
    """Of one backward pass, the fastest of 25."""
    q, k, v = (torch.randn(16, 3, n, 64, dtype=dtype).requires_grad_() for n in (84, keys, keys))
    y = F.scaled_dot_product_attention(q, k, v)
    slope, times = torch.randn_like(y), []
    for _ in range(25):
        began = time.perf_counter()
        torch.autograd.grad(y, (q, k, v), slope, retain_graph=True)
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


for keys in (18, 84):
    low, full = milliseconds(keys, torch.bfloat16), milliseconds(keys, torch.float32)
    print(f"{keys} keys: {low:.1f} ms in bfloat16, {full:.1f} ms in float32")
    if keys == 18:
        assert low > 2 * full, "this finding is out of date"
PYTHON
