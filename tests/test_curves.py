"""tools/curves.py: losses by time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from support.cache import CachedEntry
from tools import curves


@pytest.fixture
def runs(tmp_path):
    """Two runs of four epochs of ten updates, of 6 and of 12 s an update; the second learns faster."""
    for name, seconds, losses in (("slow", 12, (5, 3, 2, 1.5)), ("quick", 6, (5, 4, 3, 2.5))):
        (tmp_path / name).mkdir()
        lines = []
        for epoch, ce in enumerate(losses, 1):
            for step in (10 * epoch - 5, 10 * epoch):
                lines.append(dict(kind="step", stage="train", epoch=epoch, step=step, ce=9, seconds=seconds))
            valid = dict(ce=ce, ce_q1=ce, seconds=1000)
            lines.append(dict(kind="stage", stage="valid", epoch=epoch, step=10 * epoch) | valid)
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_losses_by_time(runs, capsys):
    assert curves.main([str(runs / "quick"), str(runs / "slow"), "--minutes", "3.5", "8", "99"]) == 0
    quick, slow = capsys.readouterr().out.split(f"{runs / 'slow'}: ")
    assert "40 updates, 4.0 minutes" in quick and slow.startswith("40 updates, 8.0 minutes")
    assert "after 3.5 min: update      30  ce 3.0000  q1 3.000" in quick
    assert "after 8 min: not trained so long" in quick
    assert "after 3.5 min: update      10  ce 5.0000" in slow and "after 8 min: update      40" in slow
    assert "after 99 min: not trained so long" in slow
    assert "ce 2.5000 or less: update 40, 4.0 min" in quick
    assert "ce 2.5000 or less: update 30, 6.0 min" in slow


def test_what_a_run_never_reaches(runs, capsys):
    assert curves.main([str(runs / "quick"), "--loss", "1"]) == 0
    assert "ce 1.0000 or less: never" in capsys.readouterr().out


def test_the_loss_by_frequencies(runs, capsys, monkeypatch):
    """Two codebooks: the first of one code in training; the second as in training, half and half."""
    folder = runs / "cache"
    folder.mkdir()
    np.save(folder / "shard_00000.npy", np.array([[0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 1]], np.uint16))
    entries = [CachedEntry("a", "a", 1.0, 16_000, 1, {}, "none", split, None, 0, first, count)
               for split, first, count in (("train", 0, 4), ("valid", 4, 2))]
    monkeypatch.setattr(curves, "read_index", lambda folder: (dict(K=2), entries))
    assert curves.frequency_losses(str(folder), "0.05") == pytest.approx([math.log(6), math.log(2)])
    assert curves.main([str(runs / "quick"), "--cache", str(folder)]) == 0
    assert "occurs: ce 1.2425  q1 1.792  q2 0.693" in capsys.readouterr().out
    del entries[1]
    assert curves.main([str(runs / "quick"), "--cache", str(folder)]) == 2
    assert "one of its two sets is empty" in capsys.readouterr().err


def test_an_ordinary_cache_is_split_by_the_run(runs, capsys):
    """By its --valid, as training does; what is no cache is one line."""
    old = str(Path(__file__).parent / "old_cache")
    (runs / "quick" / "config.json").write_text('{"args": {"valid": "0.5"}}')
    assert curves.main([str(runs / "quick"), "--cache", old]) == 0
    assert "occurs: ce " in capsys.readouterr().out
    (runs / "cache.json").write_text('{"x": 1}')
    for folder in (runs, runs / "nowhere"):
        assert curves.main([str(runs / "quick"), "--cache", str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err


def test_bad_input(runs, capsys):
    (runs / "begun").mkdir()
    (runs / "begun" / "log.jsonl").write_text("")
    for args, said in ((["nowhere"], "no log.jsonl"), ([str(runs / "begun")], "no validation"),
                       ([str(runs / "slow"), "--minutes", "0"], "--minutes 0: more than 0")):
        assert curves.main(args) == 2
        assert said in capsys.readouterr().err
