"""The precision that a run gets where --dtype is not given."""

import pytest
import torch

from support import flags, kernels
from test_short_runs import FEW
from test_train import saved
from train import main


@pytest.mark.parametrize("processor, width, wanted", [
    (dict(avx512_bf16=True), 192, "bfloat16"),
    (dict(avx512_bf16=True), 64, "float32"),
    (dict(avx512_bf16=False), 192, "float32"),
    (dict(), 192, "float32"),
])
def test_by_processor_and_width(processor, width, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert flags.fastest_dtype("cpu", width) == wanted


@pytest.mark.parametrize("slow, argv, warned", [
    (True, ["--dtype", "bfloat16"], True), (False, ["--dtype", "bfloat16"], False), (True, [], False),
    (True, ["--dtype", "bfloat16", "--plan_gpus", "8"], False),
])
def test_a_type_that_the_processor_is_slow_in(slow, argv, warned, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "SLOW_BFLOAT16", slow)
    assert main([*FEW, "--dry_run", "--device", "cpu", *argv]) == 0
    assert ("--dtype bfloat16: without AVX-512" in capsys.readouterr().out) == warned


def test_a_run_goes_on_in_its_own(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main([*FEW, "--out", str(out)]) == 0
    monkeypatch.setattr(flags, "fastest_dtype", lambda *_: "bfloat16")
    assert main([*FEW, "--epochs", "2", "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("as the run in")]
    assert any("--dtype float32" in line for line in said)
    assert saved(out)["args"]["dtype"] == "float32"
