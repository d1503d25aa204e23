"""The precision that a run gets where --dtype is not given."""

import pytest
import torch

from support import flags
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


def test_a_run_goes_on_in_its_own(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main([*FEW, "--out", str(out)]) == 0
    monkeypatch.setattr(flags, "fastest_dtype", lambda *_: "bfloat16")
    assert main([*FEW, "--epochs", "2", "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("as the run in")]
    assert any("--dtype float32" in line for line in said)
    assert saved(out)["args"]["dtype"] == "float32"
