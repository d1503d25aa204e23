#!/usr/bin/env bash
# torch 2.11.0, x86 processor: torch.ops.onednn.qlinear_pointwise takes hundreds of times as long for int8 rows as for
# the same rows in uint8 with a zero point of 128.
#
# This is the operator that Inductor's quantization on x86 compiles to; symmetric activations come as int8. Seen
# (torch==2.11.0, CPython 3.11, one thread, a processor with AVX-512 and VNNI, a weight of 2,048 x 512, other work beside
# it): 49 ms in int8 and 0.11 ms in uint8 for one row, 81 and 0.05 for two, 651 and 0.11 for sixteen. Left alone one row
# in int8 took 12 ms, and each further one 12 more. With AVX2 alone it is 2 to 3 ms for one to 16 rows, five to eight
# times as long as in uint8. The results are equal. No warning is given.
#
# Run: bash findings/onednn_linear_of_signed_rows_is_slow.sh     (installs into a temporary folder; fails if changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.11.0" numpy
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
weight = torch.randint(-127, 128, (2048, 512), dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight, None)
scales, zeros = torch.full((2048,), 0.01), torch.zeros(2048, dtype=torch.int64)


def product(rows: torch.Tensor, zero: int) -> torch.Tensor:
    """Rows [N, 512] times the weight, both in steps of 0.01 -> float32 [N, 2048]."""
    return torch.ops.onednn.qlinear_pointwise(
        rows, 0.01, zero, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def milliseconds(rows: torch.Tensor, zero: int) -> float:
    """The fastest of seven."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        product(rows, zero)
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


for count in (1, 2, 16):
    signed = torch.randint(-127, 128, (count, 512), dtype=torch.int8)
    unsigned = (signed.to(torch.int16) + 128).to(torch.uint8)
    assert torch.allclose(product(signed, 0), product(unsigned, 128), rtol=1e-4, atol=1e-4)
    slow, fast = milliseconds(signed, 0), milliseconds(unsigned, 128)
    print(f"{count} rows: {slow:.1f} ms in int8, {fast:.3f} ms in uint8")
    assert slow > (10 if torch.cpu._is_vnni_supported() else 3) * fast, "this finding is out of date"
PYTHON
