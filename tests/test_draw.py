"""Which files are drawn and how often: the order of before, --sample_by, weights, --min_seconds. Offline."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import data
from support.scan import Entry

CODEC = SimpleNamespace(sample_rate=16_000, channels=1, hop=320)


def dataset(seconds, weights=None, **more):
    weights = weights or [None] * len(seconds)
    entries = [Entry(f"{i}.wav", f"{i}.wav", s, weight=w) for i, (s, w) in enumerate(zip(seconds, weights))]
    return data.SegmentDataset(entries, CODEC, 3.0, 5, **more)


def draws(drawn, examples, epoch=0):
    """How often each file is drawn in an epoch of so many examples."""
    names = Counter(next(drawn.candidates(epoch, index))[0].key for index in range(examples))
    return [names[f"{i}.wav"] for i in range(max(int(name[:-4]) for name in names) + 1)]


def test_the_order_of_before():
    """Files and places of the first draws and their replacements, as runs of before these flags have them."""
    seen = []
    for shuffle in (True, False):
        drawn = dataset([0.5 + i for i in range(7)], shuffle=shuffle)
        for epoch in range(2):
            for index in range(20):
                candidates = drawn.candidates(epoch, index)
                seen += [(entry.key, frame) for entry, frame in (next(candidates) for _ in range(3))]
    found = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    assert found == "1b25513952fb249f54ace569f2d6fda9e7e90e7136cf4be37f33cd8c294b0597"
    equal, plain = dataset([1, 2, 3], [2.0] * 3), dataset([1, 2, 3])
    for index in range(9):
        assert next(equal.candidates(0, index))[1] == next(plain.candidates(0, index))[1]


@pytest.mark.parametrize("seconds, weights, by, expected", [
    ([10, 30, 20, 20], None, "duration", [1 / 8, 3 / 8, 2 / 8, 2 / 8]),
    ([10, 30, 20, 20], [1, 3, 0, None], "file", [1 / 5, 3 / 5, 0, 1 / 5]),
    ([10, 30, 20, 20], [4, 0, 1, 1], "duration", [1 / 2, 0, 1 / 4, 1 / 4]),
])
def test_files_are_drawn_by_their_shares(seconds, weights, by, expected):
    for passes in (1, 50):
        drawn = dataset(seconds, weights, sample_by=by)
        counts = draws(drawn, 4 * passes)
        counts += [0] * (4 - len(counts))
        bound = 1.001 if passes == 1 else 14  # in a pass each as often as its share says, to within one
        assert all(abs(count - 4 * passes * share) <= bound for count, share in zip(counts, expected))
    assert all(count == 0 for count, share in zip(counts, expected) if share == 0)
    replacements = Counter()
    for index in range(60):
        candidates = drawn.candidates(0, index)
        replacements.update(next(candidates)[0].key for _ in range(6))
    for i, share in enumerate(expected):
        assert abs(replacements[f"{i}.wav"] / 360 - share) < 0.1


def test_what_is_drawn_does_not_depend_on_what_was_asked_before():
    a, b = (dataset([1, 9, 5, 2, 4], sample_by="duration") for _ in range(2))
    order = [(epoch, index) for epoch in range(2) for index in range(12)]
    first = {place: next(a.candidates(*place)) for place in order}
    assert all(next(b.candidates(*place)) == first[place] for place in reversed(order))
    assert draws(a, 12, epoch=0) != draws(a, 5, epoch=1)


def test_short_files_are_left_out_on_request():
    assert [e.seconds for e in dataset([1, 9, 5], min_seconds=5).files] == [9, 5]
    for seconds in (10, float("nan"), -1):
        with pytest.raises(ValueError, match=f"--min_seconds {seconds}"):
            dataset([1, 9, 5], min_seconds=seconds)
    with pytest.raises(ValueError, match="--sample_by banana: choose file or duration"):
        dataset([1, 9], sample_by="banana")
    with pytest.raises(ValueError, match="all 2 files .* have weight 0"):
        dataset([1, 9], [0, 0.0])


def test_check_says_how_often_short_files_are_drawn(tmp_path, capsys):
    for i, seconds in enumerate([0.1] * 6 + [5.9] * 2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(round(seconds * 8000)), 8000)
    assert data.main(["check", str(tmp_path), "--valid", "0.01", "--segment_seconds", "2"]) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("draws"))
    assert line.split()[1] == "71.43" and "the 5 files" in line and "duration 4.07 %" in line, line


def test_weights_of_a_manifest(tmp_path):
    lines = []
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(16_000), 16_000)
        weight = [0.0, 1.0, 3.0][i % 3]
        lines.append(json.dumps(dict(path=f"{i}.wav", duration=1.0, sample_rate=16_000, weight=weight)))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    train = data.open_dataset(str(tmp_path), 0.01, segment_seconds=1.0, codec=CODEC)
    weights = {entry.key: entry.weight for entry in train.files}
    drawn = Counter(weights[next(train.candidates(0, i))[0].key] for i in range(100))
    assert drawn[0.0] == 0 and drawn[3.0] > 1.2 * drawn[1.0]
