"""Defaults of small models on real music: who gets them, and that runs begun without them go on."""

from pathlib import Path

import pytest

from support import flags as all_flags
from support.flags import build_parser, fill_flags
from test_captions import songs
from test_train import saved
from train import main

NAMES = ("optimizer", "lr", "muon_lr", "text_lr", "emb_std", "top_k")
SMALL = ("muon", 2e-3, 0.01, 1e-3, 1.0, 0)
LARGE = ("adamw", 1e-4, None, 1e-4, None, 250)


@pytest.mark.parametrize("given, wanted", [
    ("--size base", SMALL),
    ("--size 256x4x4", SMALL),
    ("--size 514x2x2", LARGE),
    ("", LARGE),
    ("--size base --optimizer adamw", ("adamw", 2e-3, None, 1e-3, 1.0, 0)),
    ("--size base --lr 0.003", ("adamw", 0.003, None, 1e-3, 1.0, 0)),
    ("--size base --lr 0.003 --optimizer muon", ("muon", 0.003, 0.01, 1e-3, 1.0, 0)),
    ("--size base --emb_std 0.5", ("muon", 2e-3, 0.01, 1e-3, 0.5, 0)),
    ("--size base --top_k 9", (*SMALL[:-1], 9)),
    ("--size small --optimizer muon", ("muon", 1e-4, 1e-4, 1e-4, None, 250)),
])
def test_small_models_and_no_others(given, wanted, tmp_path):
    args = build_parser().parse_args(["--dataset", "music", "--out", str(tmp_path / "new"), *given.split()])
    notes = fill_flags(args, 1)
    assert tuple(getattr(args, name) for name in NAMES) == wanted
    assert any("--emb_std 1.0" in n and "512 or less in width" in n for n in notes) == (wanted[4] == 1)


def test_a_start_from_other_weights(tmp_path):
    """It learns at the rates of a model that has learned; how it is sampled depends on its width alone."""
    begin = Path(__file__).parent / "old_run"
    args = build_parser().parse_args(
        ["--dataset", "music", "--out", str(tmp_path / "new"), "--init_from", str(begin)])
    fill_flags(args, 1)
    assert tuple(getattr(args, name) for name in NAMES) == (*LARGE[:-1], 0)


def test_a_run_begun_without_them_goes_on(tmp_path, monkeypatch, capsys):
    music = songs(tmp_path / "music", *(f"{i}.wav" for i in range(5)))
    few = ("--size debug --codec toy --no_text --segment_seconds 0.4 --batch_size 2 --updates_per_epoch 2 "
           "--valid_samples 2 --eval_samples 1 --evaluate_every 0 --generate_every 0 --workers 0").split()
    run = [*few, "--device", "cpu", "--dataset", str(music), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(all_flags, "SMALL_WIDTH", 0)
    assert main([*run, "--epochs", "1"]) == 0
    monkeypatch.undo()
    assert main([*run, "--epochs", "2"]) == 0
    assert "--optimizer adamw" in capsys.readouterr().out
    kept = saved(tmp_path / "run")
    assert kept["step"] == 4 and tuple(kept["args"][name] for name in NAMES) == LARGE
    assert main([*run, "--epochs", "1", "--out", str(tmp_path / "new")]) == 0
    assert tuple(saved(tmp_path / "new")["args"][name] for name in NAMES) == SMALL
