"""The sets of a run: who scans, which split a run keeps, what is said of captions. Offline, no GPU."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import train
from conditioning import full_text
from support import sets
from support.distributed import Ranks
from test_captions import songs

CODEC = SimpleNamespace(sample_rate=1000, channels=1, hop=10)


def flags(folder, **more):
    argv = ["--dataset", str(folder), "--segment_seconds", "0.1", "--out", str(folder.parent / "run")]
    args = train.build_parser().parse_args(argv)
    train.fill_flags(args, 1)
    vars(args).update(more)
    return args


class Alone(Ranks):
    """A rank without others, and what it has said to them."""
    def __init__(self, rank=0, heard=()):
        super().__init__(rank, 1, None)
        self.said, self.heard = [], list(heard)

    def broadcast(self, value):
        self.said.append(value)
        return value if self.is_main else self.heard.pop(0)


def test_rank_0_alone_reads_the_disk(tmp_path, monkeypatch):
    music = songs(tmp_path / "music", *(f"{i}.wav" for i in range(5)))
    main, args = Alone(), flags(music)
    monkeypatch.setattr(sets, "BEAT_SECONDS", -1)  # the others must hear something before they give up
    found = sets.find_data(args, main)
    assert main.said[-1] is found and len(main.said) > 2 and set(main.said[:-1]) == {sets.NOT_YET}
    train_set, valid_set = sets.open_sets(args, found, CODEC, main)
    assert len(train_set.files) == 4 and len(valid_set.files) == 1
    monkeypatch.setattr(os, "scandir", None)
    other = Alone(1, [sets.NOT_YET, sets.NOT_YET, found])
    assert sets.find_data(args, other) is found
    for error in (ValueError("no usable audio"), OSError("disk")):  # rank 0's mistake is everybody's
        with pytest.raises(type(error), match=str(error)):
            sets.find_data(args, Alone(1, [error]))


def test_a_run_keeps_the_split_that_it_was_begun_with(tmp_path):
    """Runs of before few files were split near the fraction go on with the same files held out."""
    names = next(names for names in ([f"{c}{i}.wav" for i in range(3)] for c in "abcdefghijklmnop")
                 if sum(place_of(name) < 0.34 for name in names) == 2)
    music, run = songs(tmp_path / "music", *names), tmp_path / "run"
    run.mkdir()

    def held_out():
        args = flags(music, valid="0.34")
        found = sets.find_data(args, Alone())
        (run / "config.json").write_text(json.dumps({"args": vars(args)}))  # as train.py does
        return [entry.key for entry in found.parts[1]]

    assert len(held_out()) == 1 and len(held_out()) == 1
    (run / "config.json").write_text(json.dumps({"args": {"valid": "0.34"}}))
    before = held_out()
    assert len(before) == 2 and held_out() == before


def place_of(name):
    """The hash of a name as a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64


@pytest.mark.parametrize("captions, wanted", [(0, None), (1, "4 of 5 files"), (2, "3 of 5 files"), (3, None)])
def test_few_captions_are_a_warning(tmp_path, capsys, captions, wanted):
    music = songs(tmp_path / "music", *(f"{i}.wav" for i in range(5)))
    args = flags(music, valid=str(songs(tmp_path / "valid", "v.wav")))
    for i in range(captions):
        (music / f"{i}.txt").write_text("a waltz")
    sets.open_sets(args, sets.find_data(args, Alone()), CODEC, Alone())
    out = capsys.readouterr().out
    assert ("warning" in out) == (wanted is not None) and (wanted or "") in out
    args.no_text = True
    sets.open_sets(args, sets.find_data(args, Alone()), CODEC, Alone())
    assert "warning" not in capsys.readouterr().out


def test_captions_that_are_all_held_out(tmp_path):
    music = songs(tmp_path / "music", "a.wav", "b.wav")
    (songs(tmp_path / "valid", "v.wav") / "v.txt").write_text("a waltz")
    args = flags(music, valid=str(tmp_path / "valid"))
    found = sets.open_sets(args, sets.find_data(args, Alone()), CODEC, Alone())
    assert not any(full_text(entry.meta) for entry in found[0].files)
    with pytest.raises(ValueError, match="the 1 files that have one are held out.*--valid.*--no_text"):
        sets.check_sets(args, *found)


def test_a_table_of_captions_is_asked_of_files_only(tmp_path):
    for more in (["--dataset", "toy"], ["--dataset", "music", "--cache", "codes"]):
        args = train.build_parser().parse_args(["--captions", "t.csv", "--out", str(tmp_path), *more])
        with pytest.raises(ValueError, match="--captions t.csv: .*leave it out"):
            train.fill_flags(args, 1)
