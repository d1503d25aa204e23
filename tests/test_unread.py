"""Flags that nothing reads: what a run does that was begun with one. What is refused: test_bad_train.py."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]
from conditioning import CONDITIONS
from support import flags, sets, unread


def fill(*argv: str) -> list:
    """The lines of `fill_flags` for a command line."""
    return flags.fill_flags(flags.build_parser().parse_args([*argv, "--device", "cpu"]), 1)


def test_a_run_that_was_begun_with_it_goes_on(tmp_path):
    """With exactly that value, and a line; a new run, or another value, is refused."""
    asked = ("--out", str(tmp_path), "--valid", "0.1", "--no-melody_argmax")
    with pytest.raises(ValueError, match="--valid 0.1: the toy has no files; leave it out"):
        fill(*asked)
    args = vars(flags.build_parser().parse_args(asked))
    torch.save(dict(args=args), tmp_path / "last.pt")
    lines = fill(*asked)
    assert lines[0] == "--valid 0.1 has no effect: the toy has no files; the run was begun with it"
    assert lines[1].startswith("--no-melody_argmax has no effect: the model has no melody")
    assert not any("has no effect" in line for line in fill("--out", str(tmp_path)))
    with pytest.raises(ValueError, match="--valid 0.2"):
        fill("--out", str(tmp_path), "--valid", "0.2")


def test_what_switches_a_condition_off_is_read():
    fill("--no_text")
    fill("--conditions", "melody", "--no_text")
    fill("--conditions", "melody", "style", "--melody_dropout", "0.1", "--style_levels", "2")


def test_a_cache_with_its_own_validation_files_says_so(monkeypatch):
    """They are those of the folder that it was made with; a line, because it may be the one that is given. So
    does a cache of another dataset, which may have moved."""
    entry, said = SimpleNamespace(split="train", meta={"description": "x"}), []
    found = SimpleNamespace(files=[entry], describe=str)
    monkeypatch.setattr(sets.data, "open_dataset", lambda *_, **__: found)
    monkeypatch.setattr(sets, "dataset_of", lambda folder: os.path.abspath("music"))
    ranks = SimpleNamespace(print=lambda *lines: said.extend(lines))
    argv = ["--cache", "codes", "--valid", "0.3", "--dataset", "./music"]
    args = flags.build_parser().parse_args(argv)
    sets.open_sets(args, "music", None, ranks)
    assert said[2] == "--valid 0.3 has no effect: token cache codes was made with its own"
    entry.split, said[:] = None, []
    sets.open_sets(args, "music", None, ranks)
    assert len(said) == 2
    args.dataset = "others"
    sets.open_sets(args, "others", None, ranks)
    assert len(said) == 5 and os.path.abspath("music") in said[4] and "--dataset others" in said[4]


def test_the_names_are_those_of_flags():
    every = flags.flags_by_name()
    assert not {*unread.IN_TRAINING, *sum(unread.OF_OTHERS.values(), ())} - every.keys()
    both = {f"{name}_dropout" for name in CONDITIONS} | {*unread.IN_TRAINING}
    said = {flag.name for group in ("optimization", "run") for flag in flags.GROUPS[group]}
    read = {"batch_size", "micro_batch_size", "overfit_one_batch", "out", "seed", "valid_samples", "weights",
            "eval_samples", "generate_samples", *unread.OF_SAMPLING, "updates_per_epoch", "only"}
    assert said <= both | read, f"read by a stage alone, or not? {said - both - read}"
