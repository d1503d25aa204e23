"""The precision that a run gets where --dtype is not given."""

import pytest

from support import flags, kernels
from test_short_runs import FEW
from test_train import saved
from train import main


@pytest.mark.parametrize("onednn, multiplies, width, wanted", [
    (True, True, 192, "bfloat16"),
    (True, True, 64, "float32"),
    (True, False, 192, "float32"),
    (False, True, 192, "float32"),
])
def test_by_processor_and_width(onednn, multiplies, width, wanted, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_ONEDNN", onednn)
    monkeypatch.setattr(kernels, "HAS_BFLOAT16", multiplies)
    assert flags.fastest_dtype("cpu", width) == wanted


@pytest.mark.parametrize("multiplies, argv, warned", [
    (False, ["--dtype", "bfloat16"], True), (True, ["--dtype", "bfloat16"], False), (False, [], False),
    (False, ["--dtype", "bfloat16", "--plan_gpus", "8"], False),
])
def test_a_type_that_the_processor_does_not_multiply(multiplies, argv, warned, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "HAS_BFLOAT16", multiplies)
    assert main([*FEW, "--dry_run", *argv]) == 0
    assert ("--dtype bfloat16: this processor lacks it" in capsys.readouterr().out) == warned


def test_a_run_goes_on_in_its_own(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main([*FEW, "--out", str(out)]) == 0
    monkeypatch.setattr(flags, "fastest_dtype", lambda *_: "bfloat16")
    assert main([*FEW, "--epochs", "2", "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("as the run in")]
    assert any("--dtype float32" in line for line in said)
    assert saved(out)["args"]["dtype"] == "float32"
