"""Runs of few updates: warm-up and average fit them; what is given stays; a run keeps what it began with."""

import dataclasses

import pytest

from support import common
from support import flags as all_flags
from support.flags import build_parser, fill_flags, flags_by_name
from test_train import lines, saved
from train import main

NAMES = ("warmup_steps", "ema_every", "ema_decay")


def filled(tmp_path, *flags):
    """The three values, and what was printed of them."""
    args = build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path / "new"), *flags])
    notes = [line for line in fill_flags(args, 1) if line.startswith("for a run of")]
    return tuple(getattr(args, name) for name in NAMES), notes


@pytest.mark.parametrize("dataset, updates, wanted", [
    ("music", 50_000, (1000, 10, 0.99)),
    ("music", 5_000, (500, 5, 0.99)),
    ("music", 60, (6, 1, 0.833)),
    ("music", 8, (0, 1, 0.5)),
    ("toy", 2_400, (20, 1, 0.99)),
    ("toy", 60, (6, 1, 0.833)),
])
def test_warm_up_and_average_fit_the_run(dataset, updates, wanted, tmp_path):
    length = ["--epochs", "1", "--updates_per_epoch", str(updates)]
    found, notes = filled(tmp_path, "--dataset", dataset, *length)
    usual = dict(music=(1000, 10, 0.99), toy=(20, 1, 0.99))[dataset]
    assert found == wanted
    changed = [f"--{name} {x}" for name, x, y in zip(NAMES, wanted, usual) if x != y]
    assert notes == ([" ".join([f"for a run of {updates} updates:", *changed])] if changed else [])


def test_what_is_given_stays(tmp_path):
    short = ["--dataset", "music", "--epochs", "2", "--updates_per_epoch", "30"]
    given = ["--warmup_steps", "50", "--ema_every", "10", "--ema_decay", "0.9"]
    assert filled(tmp_path, *short, *given) == ((50, 10, 0.9), [])
    assert filled(tmp_path, *short, "--ema_every", "2")[0] == (6, 2, 0.667)
    assert filled(tmp_path, "--overfit_one_batch")[0] == (20, 1, 0.95)


FEW = ("--size debug --batch_size 2 --updates_per_epoch 8 --epochs 1 --valid_samples 4 --eval_samples 1 "
       "--lr 0.01 --generate_samples 0 --log_every 1 --device cpu --segment_seconds 0.4").split()


def test_a_run_of_few_updates_learns_and_goes_on_with_what_it_had(tmp_path, capsys):
    out = ["--out", str(tmp_path / "new")]
    assert main([*FEW, *out]) == 0
    assert "for a run of 8 updates: --warmup_steps 0 --ema_decay 0.5" in capsys.readouterr().out
    assert lines(tmp_path / "new")[0]["lr"] == 0.01

    # as runs began before this: now they go on, also when they are made longer
    had = ["--warmup_steps", "4", "--ema_decay", "0.99"]
    out = ["--out", str(tmp_path / "old")]
    assert main([*FEW, *had, *out]) == 0
    assert main([*FEW, "--epochs", "2", *out]) == 0
    assert "--warmup_steps 4 --ema_decay 0.99" in capsys.readouterr().out
    assert saved(tmp_path / "old")["step"] == 16


@pytest.mark.parametrize("cores, wanted", [(2, 2), (64, 4)])
def test_no_more_loading_processes_than_cores(cores, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "count_cores", lambda: cores)
    args = build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path / "a"), "--dataset", "music"])
    notes = fill_flags(args, 1)
    assert args.workers == wanted and ("one a core: --workers 2" in notes) == (cores == 2)


def test_a_run_goes_on_to_the_end_that_it_had(tmp_path, monkeypatch):
    """Also where the default has changed since."""
    few = [*" ".join(FEW).replace("--epochs 1", "").split(), "--out", str(tmp_path / "run")]
    for epochs in (1, 2):
        flags = flags_by_name()
        flags["epochs"] = dataclasses.replace(flags["epochs"], toy=epochs)
        monkeypatch.setattr(all_flags, "flags_by_name", lambda: flags)
        assert main(few) == 0
    assert saved(tmp_path / "run")["epoch"] == 1
