"""The order of examples, bad files, captions, manifests, splits, workers, token cache. Offline, no GPU."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
import tokenizer
from support import audio, encode
from support.cache import read_index
from support.captions import MAX_TEXT
from support.encode import make_cache
from support.scan import Entry, scan_dataset, skip_lines, split_by_hash

RATE, HOP = 16_000, 320
MONO = SimpleNamespace(sample_rate=RATE, channels=1, hop=HOP)  # all of a codec that live audio asks for
torch.set_num_threads(1)  # small tensors: more only disturb


def write(path, seconds, rate=RATE, channels=1, seed=0, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)
    soundfile.write(str(path), wav, rate, subtype=subtype)
    return path


def folder(path, count=6, seconds=3.0):
    for i in range(count):
        write(path / f"song{i}.wav", seconds + 0.1 * i, seed=i)
    return path


def live(root, seconds=1.0, seed=0, **more):
    return data.AudioDataset(scan_dataset(str(root)).entries, MONO, seconds, seed, **more)


@pytest.fixture(scope="module")
def codec():
    """A codec with random weights: the graph of the real one (convolutions, LSTM, quantizer), small."""
    torch.manual_seed(0)
    seanet = dict(channels=1, dimension=16, n_filters=4, ratios=[8, 5, 4, 2], lstm=2, norm="none",
                  causal=False, true_skip=True)
    encoder, decoder = tokenizer.SEANetEncoder(**seanet), tokenizer.SEANetDecoder(**seanet)
    quantizer = tokenizer.ResidualVectorQuantizer(dimension=16, n_q=4, bins=64, kmeans_init=False)
    for p in encoder.parameters():
        p.data.mul_(1.5)  # else nearly nothing reaches the quantizer
    z = encoder(torch.randn(1, 1, 16_000) / 4).detach()[0].T  # [T, 16]
    for q, layer in enumerate(quantizer.vq.layers):
        layer._codebook.embed.copy_((z.mean(0) * (q == 0) + z.std(0) * torch.randn(64, 16)) / 2 ** q)
    return tokenizer.Codec("test", RATE, encoder, quantizer, decoder)


def replaced(**more):
    return SimpleNamespace(**(vars(MONO) | more))


def same(a, b):
    plain = [(x.path, x.frames, x.start_seconds, x.index, x.meta) for x in (a, b)]
    pairs = (a.wav, b.wav), (a.codes, b.codes)
    return plain[0] == plain[1] and all(x is y is None or np.array_equal(x, y) for x, y in pairs)


def cli(*args):
    command = [sys.executable, str(ROOT / "data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# -------------------------------------------------------------------------------------- the order of examples
def test_seed_epoch_index_decide_everything(tmp_path):
    folder(tmp_path)
    a, b = live(tmp_path), live(tmp_path)
    order = [(e, i) for e in range(2) for i in range(13)]
    first = {key: a.example(*key) for key in order}
    assert all(same(first[key], b.example(*key)) for key in reversed(order))  # whatever was asked before
    starts = {(x.path, x.start_seconds) for x in first.values()}
    assert len(starts) > 20  # epochs and indices differ
    other = live(tmp_path, seed=1)
    assert any(not same(first[key], other.example(*key)) for key in order)
    for turn in range(2):  # a pass holds all once
        assert {first[0, i].path for i in range(6 * turn, 6 * turn + 6)} == {e.path for e in a.files}
    orders = {tuple(a.example(e, i).path for i in range(6)) for e in range(5)}
    assert len(orders) > 1  # and epochs shuffle anew
    fixed = live(tmp_path, shuffle=False)
    assert all(same(fixed.example(0, i), fixed.example(5, i)) for i in range(8))


def test_no_global_generator_is_used(tmp_path):
    folder(tmp_path, 2)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(data.batches(live(tmp_path), 0, 0, 2, 2))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_ranks_workers_and_resume_give_the_same_examples(tmp_path):
    folder(tmp_path, 4)
    whole = list(data.batches(live(tmp_path), 1, 0, 4, 6))
    assert [[x.index for x in batch] for batch in whole] == [list(range(6 * u, 6 * u + 6)) for u in range(4)]
    for batch, again in zip(whole, data.batches(live(tmp_path), 1, 0, 4, 6, workers=2)):
        assert len(batch) == len(again) and all(map(same, batch, again))
    resumed = list(data.batches(live(tmp_path), 1, 2, 4, 6))
    assert len(resumed) == 2 and all(same(a, b) for u, v in zip(whole[2:], resumed) for a, b in zip(u, v))
    ranks = [list(data.batches(live(tmp_path), 1, 0, 4, 6, rank=r, world_size=3)) for r in range(3)]
    for u in range(4):
        assert all(map(same, whole[u], sum((ranks[r][u] for r in range(3)), [])))
    with pytest.raises(ValueError, match="batch_size 6: a multiple of the 4 ranks"):
        next(data.batches(live(tmp_path), 0, 0, 1, 6, world_size=4))


def test_starts_keep_min_segment_ratio_and_fall_on_frames(tmp_path):
    write(tmp_path / "a.wav", 2.0)
    for ratio, latest in ((0.8, 1.2), (0.5, 1.5), (1.0, 1.0)):
        starts = [live(tmp_path, min_segment_ratio=ratio).example(0, i).start_seconds for i in range(60)]
        assert 0 <= min(starts) < 0.2 and latest - 0.2 < max(starts) <= latest
        assert all(abs(s * RATE / HOP - round(s * RATE / HOP)) < 1e-9 for s in starts)
        later = [live(tmp_path, min_segment_ratio=ratio).example(1, i).start_seconds for i in range(60)]
        assert sum(x != y for x, y in zip(starts, later)) > 40


def test_padding_and_frames(tmp_path):
    write(tmp_path / "a.wav", 0.5 + 1 / RATE)
    x = live(tmp_path).example(0, 0)
    assert x.wav.shape == (1, RATE) and (x.frames, x.segment_frames) == (26, 50)  # 8001 samples, 320 a frame
    assert x.wav[0, 8000] != 0 and not x.wav[0, 8001:].any()
    write(tmp_path / "b" / "one.wav", 1 / RATE)
    assert live(tmp_path / "b").example(0, 0).frames == 1
    batch = data.collate([x, replace(x, frames=50)])
    assert batch.wav.shape == (2, 1, RATE) and batch.codes is None
    assert batch.frame_mask.tolist() == [[t < 26 for t in range(50)], [True] * 50]


def test_stereo_and_other_rates(tmp_path):
    write(tmp_path / "a.wav", 1.5, rate=44_100, channels=2)
    entries = scan_dataset(str(tmp_path)).entries
    for channels in (1, 2):
        x = data.AudioDataset(entries, replaced(channels=channels), 1.0, 0).example(0, 0)
        assert x.wav.shape == (channels, RATE) and x.frames == 50
    write(tmp_path / "p" / "prime.wav", 0.1, rate=999_983)
    with pytest.raises(ValueError, match="absurd sample rate"):
        live(tmp_path / "p").example(0, 0)


def test_toy_dataset():
    train = data.ToyDataset(0, "train", MONO)
    valid = data.ToyDataset(0, "valid", replaced(sample_rate=RATE * 3 // 2, channels=2, hop=480), 1.0)
    x = train.example(1, 3)
    assert same(x, data.ToyDataset(0, "train", MONO).example(1, 3)) and not same(x, train.example(2, 3))
    assert x.wav.shape == (1, 25_600) and x.frames == x.segment_frames == 80
    assert isinstance(x.meta["description"], str) and x.meta["toy"]["root"]
    y = valid.example(0, 0)
    assert y.wav.shape == (2, 24_000) and y.frames == 50 and same(y, valid.example(9, 0))


# -------------------------------------------------------------------------------------------------- bad files
def test_bad_files_at_the_scan_are_named(tmp_path):
    folder(tmp_path, 2)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "renamed.mp3").write_text("this is no audio")
    (tmp_path / "cover.jpg").write_bytes(b"x")
    (tmp_path / "folder.wav").mkdir()
    write(tmp_path / "slow.wav", 0.5).write_bytes(header_with_rate(tmp_path / "slow.wav", 7))
    write(tmp_path / "none.wav", 0)
    os.symlink("nowhere.wav", tmp_path / "broken.wav")
    os.symlink("song0.wav", tmp_path / "twin.wav")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink("self", tmp_path / "self")
    found = scan_dataset(str(tmp_path))
    assert [e.key for e in found.entries] == ["song0.wav", "song1.wav"]
    reasons = {Path(path).name: reason for path, reason in found.skipped.items()}
    expected = {"empty.wav": "zero bytes", "renamed.mp3": "not readable",
                "cover.jpg": "not audio by its name", "slow.wav": "absurd header",
                "none.wav": "absurd header", "broken.wav": "missing",
                "twin.wav (again)": "same file twice: song0.wav"}
    for name, reason in expected.items():
        assert reason in reasons[name], (name, reasons)


def header_with_rate(path, rate):
    raw = bytearray(path.read_bytes())
    raw[24:28] = rate.to_bytes(4, "little")
    return bytes(raw)


def test_a_file_that_cannot_be_read_is_replaced_named_once_and_counted(tmp_path, capfd):
    folder(tmp_path, 5)
    write(tmp_path / "nan.wav", 3.0, subtype="FLOAT")
    wav = np.full(48_000, np.nan, np.float32)
    soundfile.write(str(tmp_path / "nan.wav"), wav, RATE, subtype="FLOAT")
    broken, bad = live(tmp_path), str(tmp_path / "nan.wav")
    plain = [x for batch in data.batches(broken, 0, 0, 3, 6) for x in batch]
    assert all(x.path != bad and np.isfinite(x.wav).all() for x in plain) and len(plain) == 18
    assert sum((x.skipped for x in plain), [])[0][0] == bad and list(broken.skipped) == [bad]
    assert capfd.readouterr().err.count("nan.wav") == 1
    by_workers = live(tmp_path)
    again = [x for batch in data.batches(by_workers, 0, 0, 3, 6, workers=2) for x in batch]
    assert all(map(same, plain, again)) and list(by_workers.skipped) == [bad]
    assert capfd.readouterr().err.count("nan.wav") == 1
    for path in tmp_path.glob("*.wav"):
        path.write_bytes(b"RIFF")
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"^11 files in a row .* '.*\.wav'.*data\.py check"):
            list(data.batches(broken, 0, 0, 1, 2, workers=workers))


@pytest.mark.parametrize("what", ["missing", "no audio", "a file", "bad gz"])
def test_datasets_that_are_none(tmp_path, capsys, what):
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "cover.jpg").write_text("x")
    (tmp_path / "m.jsonl.gz").write_bytes(b"no gz")
    name, message = {"missing": ("no/such", "is not there.*toy"),
                     "no audio": (".", r"no usable audio.*1 not audio by its name.*cover.jpg"),
                     "a file": ("x.txt", "is a file of another kind"),
                     "bad gz": ("m.jsonl.gz", "cannot be read as a manifest")}[what]
    assert data.main(["check", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("data.py: ")
    with pytest.raises(ValueError, match=message):
        scan_dataset(str(tmp_path / name))


# ------------------------------------------------------------------------------------- captions and manifests
def test_sidecars(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.wav", 1.0)
    (tmp_path / "a.json").write_text(json.dumps({"description": " A  song\n", "key": "C Major", "bpm": "120",
                                                 "genre": " Rock ", "title": " T ",
                                                 "moods": "Happy, dark  big", "keywords": ["New Age", ""],
                                                 "instrument": "None", "artist": ""}))
    (tmp_path / "b.txt").write_text("\ufeff slow\x00 waltz \n", encoding="utf-8")
    (tmp_path / "c.json").write_text('{"bpm": 90, "key": "c, g"}')
    (tmp_path / "c.txt").write_text("from the text")
    a, b, c, d = scan_dataset(str(tmp_path)).entries
    assert (a.caption, a.meta) == ("json", {
        "description": "A song", "title": "T", "key": "c major", "genre": "rock",
        "moods": ["happy", "dark", "big"], "keywords": ["new age"], "bpm": 120.0})
    assert (b.caption, b.meta) == ("txt", {"description": "slow waltz"})
    assert (c.caption, c.meta) == ("txt", {"description": "from the text", "bpm": 90.0})
    assert (d.caption, d.meta) == ("none", {"description": None})
    assert live(tmp_path, shuffle=False).describe().count("json 1, none 1, txt 2") == 1


HOSTILE = {"not json": b"{", "empty": b"", "array": b"[1, 2]", "number": b"3", "null": b"null",
           "infinity": b'{"bpm": 1e999, "genre": "x"}', "nested": b"[" * 100_000,
           "deep value": b'{"genre": {"a": {"b": []}}}',
           "booleans": b'{"bpm": true, "description": false, "moods": true}',
           "huge int": b'{"bpm": 1' + b"0" * 5000 + b"}",
           "big int": b'{"bpm": 1' + b"0" * 400 + b"}", "bytes": b'{"title": "\xff\xfe"}',
           "lists of lists": b'{"moods": [[1], {"a": 2}]}',
           "negative bpm": b'{"bpm": -3}', "words": b'{"bpm": "fast"}',
           "object in a text": b'{"description": {"en": "x"}}',
           "larger than allowed": b'{"title": "' + b"x" * 2 ** 21 + b'"}',
           "long": b'{"description": "' + b"word " * 100_000 + b'"}'}
CLEAN = {"surrogate": (b'{"title": "\\ud800x"}', {"title": "?x"}),
         "nul": (b'{"title": "a\\u0000b"}', {"title": "ab"}),
         "nan": (b'{"bpm": NaN, "title": NaN, "genre": -Infinity}', {}),
         "number": (b'{"title": 1999, "genre": ["Rock", "Pop"]}', {"title": "1999", "genre": "rock, pop"}),
         "emoji, right to left": ('{"title": "\U0001f3b5 \u05e9\u05dc\u05d5\u05dd"}'.encode(),
                                  {"title": "\U0001f3b5 \u05e9\u05dc\u05d5\u05dd"})}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_a_counted_problem(tmp_path, name):
    write(tmp_path / "a.wav", 0.1)
    (tmp_path / "a.json").write_bytes(HOSTILE[name])
    found = scan_dataset(str(tmp_path))
    assert list(found.problems) == [str(tmp_path / "a.wav")] and len(found.entries) == 1
    json.dumps(found.entries[0].meta, allow_nan=False)
    assert all(len(v) <= MAX_TEXT for v in found.entries[0].meta.values() if isinstance(v, str))


@pytest.mark.parametrize("name", CLEAN)
def test_odd_json_is_cleaned(tmp_path, name):
    write(tmp_path / "a.wav", 0.1)
    (tmp_path / "a.json").write_bytes(CLEAN[name][0])
    found = scan_dataset(str(tmp_path))
    assert found.entries[0].meta == {"description": None} | CLEAN[name][1] and not found.problems


@pytest.mark.parametrize("packed", [False, True])
def test_audiocraft_manifest_as_it_is(tmp_path, monkeypatch, packed):
    folder(tmp_path / "set" / "audio", 3)
    write(tmp_path / "elsewhere.wav", 1.0)
    write(tmp_path / "cwd" / "here.wav", 1.0)
    (tmp_path / "set" / "audio" / "song1.json").write_text('{"description": "one"}')
    line = {"duration": 3.0, "sample_rate": RATE, "amplitude": None, "weight": None, "info_path": None}
    rows = [line | {"path": "audio/song1.wav"}, line | {"path": "audio/song0.wav"},
            line | {"path": "audio/song1.wav"}, line | {"path": "gone.wav"}, line | {"path": "audio"},
            line | {"path": "/etc/passwd"},
            line | {"path": str(tmp_path / "elsewhere.wav"), "duration": 1.0},
            line | {"path": "here.wav", "duration": None},
            line | {"path": "audio/song2.wav", "duration": "NaN"}, line | {"path": "all.zip:song.wav"},
            {"duration": 3}, line | {"path": "a\0.wav"}]
    text = "\n".join([json.dumps(r) for r in rows] + ["{broken", "[1]", "", "[" * 100_000]).encode()
    path = tmp_path / "set" / ("data.jsonl.gz" if packed else "data.jsonl")
    path.write_bytes(gzip.compress(text) if packed else text)
    monkeypatch.chdir(tmp_path / "cwd")
    for dataset in (path, path.parent):
        found = scan_dataset(str(dataset))
        assert {Path(e.path).name: round(e.seconds, 1) for e in found.entries} == {
            "song0.wav": 3.0, "song1.wav": 3.0, "song2.wav": 3.2, "elsewhere.wav": 1.0, "here.wav": 1.0}
        assert {e.meta["description"] for e in found.entries} == {"one", None}
        kinds = " | ".join(skip_lines(found.skipped))
        assert len(found.skipped) == 10 and "1 manifest line without" in kinds, kinds
        assert "1 same file twice" in kinds and "3 missing" in kinds and "2 not audio" in kinds, kinds
    lies = [p for p in scan_dataset(str(path), headers=True).problems.values() if "duration differs" in p]
    assert not lies


def test_a_manifest_that_lies_about_the_duration(tmp_path):
    write(tmp_path / "a.wav", 1.0)
    line = {"path": "a.wav", "duration": 500.0, "sample_rate": RATE}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    assert "duration differs" in str(scan_dataset(str(tmp_path), headers=True).problems)
    with pytest.raises(ValueError, match="no audio at"):
        live(tmp_path).example(0, 0)


# ------------------------------------------------------------------------------------------------------ split
def entries(names):
    return [Entry(f"/m/{n}", n, 1.0) for n in names]


def test_hash_split_is_stable_when_files_are_added():
    few, many = entries(f"{i}.wav" for i in range(200)), entries(f"{i}.wav" for i in range(1000))
    parts = [[{e.key for e in part} for part in split_by_hash(e, 0.1)[:2]] for e in (few, many)]
    assert parts[0][0] <= parts[1][0] and parts[0][1] <= parts[1][1]
    assert not parts[1][0] & parts[1][1] and 70 < len(parts[1][1]) < 130
    for count in range(2, 8):
        for fraction in (1e-9, 1 - 1e-9):
            train, valid, note = split_by_hash(entries(f"{i}.wav" for i in range(count)), fraction)
            assert train and valid and len(train) + len(valid) == count and not note
    train, valid, note = split_by_hash(entries(["a.wav"]), 0.05)
    assert train == valid and note == "the only file is both train and valid"


def test_valid_by_folder_is_taken_out_of_train(tmp_path, codec):
    folder(tmp_path / "held", 2)
    folder(tmp_path / "rest", 3)
    held = str(tmp_path / "held")
    train, valid = (data.open_dataset(str(tmp_path), held, split, 1.0, codec) for split in ("train", "valid"))
    assert len(train.files) == 3 and len(valid.files) == 2
    assert "2 files of --valid taken out" in train.describe()
    for bad, message in ((1.5, "between 0 and 1"), ("0", "between 0 and 1"), ("nan", "between 0 and 1"),
                         ("no/such", "is not there"),
                         (str(tmp_path), "nothing is left to train on")):
        with pytest.raises(ValueError, match=message):
            data.open_dataset(str(tmp_path), bad, "train", 1.0, codec)


@pytest.mark.parametrize("more", [{"segment_seconds": 0.0}, {"segment_seconds": float("nan")},
                                  {"min_segment_ratio": 0}, {"min_segment_ratio": 1.1}])
def test_bad_settings(tmp_path, codec, more):
    folder(tmp_path, 2)
    with pytest.raises(ValueError, match=list(more)[0]):
        data.open_dataset(**{"dataset": str(tmp_path), "segment_seconds": 1.0, "codec": codec, **more})


# ------------------------------------------------------------------------------------------------------ cache
def test_cache_gives_the_segments_and_codes_of_live_training(tmp_path, codec):
    music = folder(tmp_path / "music", 4, 4.0)
    write(music / "long.wav", 27.3, rate=24_000, channels=2)  # three windows, resampled
    soundfile.write(str(music / "nan.wav"), np.full(48_000, np.nan, np.float32), RATE, subtype="FLOAT")
    (music / "song1.txt").write_text("one")
    make_cache(str(music), str(tmp_path / "cache"), codec)
    for split in ("train", "valid"):
        direct = data.open_dataset(str(music), 0.3, split, 2.0, codec)
        cached = data.open_dataset(str(music), 0.3, split, 2.0, codec, cache=str(tmp_path / "cache"))
        pairs = [(direct.example(e, i), cached.example(e, i)) for e in range(2) for i in range(8)]
        assert all(same(replace(a, wav=None), replace(b, codes=None)) for a, b in pairs)
        assert all([path for path, _ in a.skipped] == [path for path, _ in b.skipped] for a, b in pairs)
        assert all(b.codes.shape == (4, 100) and not b.codes[:, b.frames:].any() for a, b in pairs)
        equal = []
        for a, b in pairs:
            codes = codec.encode(torch.from_numpy(a.wav)[None])[0].numpy()
            equal.append((codes == b.codes)[:, 25:min(a.frames, 75)].ravel())
        # half a second from the cut the convolutions and the LSTM have forgotten it
        assert np.concatenate(equal).mean() > 0.99
    batch = data.collate(next(data.batches(cached, 0, 0, 1, 4, workers=1)))
    assert batch.wav is None and batch.codes.shape == (4, 4, 100) and batch.codes.dtype == torch.int64


def test_windows_give_the_codes_of_the_whole_file(tmp_path, codec):
    lengths = (27.3, RATE), (24.0, 44_100), (20.0, RATE), (22.0, RATE), (12.01, 48_000), (0.01, RATE)
    for seconds, rate in lengths:
        path = write(tmp_path / "a.wav", seconds, rate)
        whole = codec.encode(audio.read_audio(path, sample_rate=RATE, channels=1)[None])[0].T.numpy()
        parts = encode.encode_file(Entry(str(path), "a", seconds, rate), codec, "cpu", {})[0]
        assert parts.shape == whole.shape
        assert (parts == whole).mean() > 0.999, (seconds, rate, (parts == whole).mean())


def test_cache_of_another_codec_is_refused(tmp_path, codec):
    folder(tmp_path / "m", 2, 1.0)
    make_cache(str(tmp_path / "m"), str(tmp_path / "c"), codec)

    def opened(name, rate=RATE, K=None):
        other = tokenizer.Codec(name, rate, codec.encoder, codec.quantizer, codec.decoder, K)
        return data.open_dataset("m", 0.5, "train", 1.0, other, cache=str(tmp_path / "c"))

    assert opened("fewer", K=2).example(0, 0).codes.shape == (2, 50)  # fewer codebooks are fine
    with pytest.raises(ValueError, match="holds 4 codebooks of codec test .*, not 6 of more"):
        opened("more", K=6)
    with pytest.raises(ValueError, match="of codec test .*, not 4 of slow"):
        opened("slow", rate=8000)
    weight = next(codec.encoder.parameters())
    weight.data.add_(1)
    try:
        with pytest.raises(ValueError, match="of codec test .*, not 4 of trained"):
            opened("trained")
    finally:
        weight.data.sub_(1)


def test_damaged_caches_and_bad_output_folders(tmp_path, codec):
    folder(tmp_path / "m", 2, 1.0)
    for name in ("shard_00000.npy", "cache.json"):
        make_cache(str(tmp_path / "m"), str(tmp_path / name), codec)
        path = tmp_path / name / name
        for content in (path.read_bytes()[:-2], b"", b"[]", b"{}", b'[{"a": 1}]', b'{"shards": "x"}'):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="unfinished or damaged"):
                read_index(str(tmp_path / name))
    with pytest.raises(ValueError, match="no token cache in .*make one with"):
        read_index(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds something else"):
        make_cache(str(tmp_path / "m"), str(tmp_path / "m"), codec)
    (tmp_path / "n").mkdir()
    soundfile.write(str(tmp_path / "n" / "nan.wav"), np.full(99, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match="none of the 1 files"):
        make_cache(str(tmp_path / "n"), str(tmp_path / "d"), codec)


def test_toy_clips_need_no_cache(tmp_path, codec, capsys):
    assert data.main(["cache", "toy", "--out", str(tmp_path / "toy")]) == 2
    assert not (tmp_path / "toy").exists()
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "toy clips are made fresh and need no token cache" in err
    folder(tmp_path / "m", 3, 1.0)
    make_cache(str(tmp_path / "m"), str(tmp_path / "c"), codec)
    path = tmp_path / "c" / "cache.json"  # of when toy clips were put into caches
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "toy"}))
    refusal = "holds toy clips, which are made fresh and need no cache: give --dataset toy without --cache"
    with pytest.raises(ValueError, match=refusal):
        data.open_dataset("toy", 0.05, "train", 1.6, codec, cache=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="a cache with another dataset"):
        make_cache(str(tmp_path / "m"), str(tmp_path / "c"), codec)


def test_cache_with_a_valid_folder(tmp_path, codec):
    folder(tmp_path / "t", 3, 1.0)
    folder(tmp_path / "v", 2, 1.0)
    make_cache(str(tmp_path / "t"), str(tmp_path / "c"), codec, valid=str(tmp_path / "v"))
    for split, name in (("train", "t"), ("valid", "v")):
        cached = data.open_dataset(str(tmp_path / "t"), str(tmp_path / "v"), split, 1.0, codec,
                                   cache=str(tmp_path / "c"))
        direct = data.open_dataset(str(tmp_path / "t"), str(tmp_path / "v"), split, 1.0, codec)
        for i in range(5):
            a, b = direct.example(0, i), cached.example(0, i)
            assert (a.path, a.start_seconds, a.frames) == (b.path, b.start_seconds, b.frames)
            assert f"/{name}/" in a.path


class Level:
    """A feature of another kind than the chroma: the mean level of every tenth of a second."""
    name, condition, columns, dtype, cache_flags, settings = "level", "loudness", 1, np.float32, "", {}

    def hop_length(self, sample_rate):
        return sample_rate // 10

    def count_frames(self, samples, sample_rate):
        return samples // self.hop_length(sample_rate)

    def load(self):
        pass

    def mismatch(self, settings):
        return None

    def of_segment(self, wav, sample_rate):
        hop = self.hop_length(sample_rate)
        mono = wav.mean(0)[:len(wav[0]) // hop * hop]
        return mono.view(-1, hop).abs().mean(1, keepdim=True).numpy()

    def of_window(self, wav, first_sample, start, stop, sample_rate):
        stop = None if stop is None else stop - first_sample
        return self.of_segment(wav[:, start - first_sample:stop], sample_rate)


def test_any_feature_is_computed_live_and_from_the_cache(tmp_path, codec):
    music, out = str(folder(tmp_path / "music", 2, 23.0)), str(tmp_path / "c")  # three windows
    features, more = {"level": Level()}, dict(min_segment_ratio=1.0)
    make_cache(music, out, codec, features=features)
    live = data.open_dataset(music, 0.5, "train", 22.0, codec, features=features, **more)
    cached = data.open_dataset(music, 0.5, "train", 22.0, codec, features=features, cache=out, **more)
    for i in range(4):
        a, b = live.example(0, i), cached.example(0, i)
        first = round(10 * a.start_seconds)  # tenth of a second of the file
        whole = Level().of_segment(audio.read_audio(a.path, channels=1), RATE)
        assert a.features["level"].shape == b.features["level"].shape == (220, 1)
        assert np.allclose(b.features["level"], whole[first:first + 220])
    with pytest.raises(ValueError, match="holds no level, which loudness needs: make another"):
        make_cache(music, str(tmp_path / "d"), codec)
        data.open_dataset(music, 0.5, "train", 22.0, codec, features=features, cache=str(tmp_path / "d"))


# --------------------------------------------------------------------------------------------------- commands
def test_check_command(tmp_path, capsys):
    folder(tmp_path, 4)
    write(tmp_path / "two.flac", 1.0, rate=44_100, channels=2)
    (tmp_path / "song0.txt").write_text("caption")
    (tmp_path / "song1.json").write_text('{"description": "x", "bpm": 100}')
    (tmp_path / "song2.json").write_text("{")
    (tmp_path / "zero.mp3").touch()
    done = cli("check", tmp_path, "--valid", "0.2")
    assert done.returncode == 0 and not done.stderr, done
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "5, 0.004 hours; 1 skipped, 1 with a problem" in lines["files"]
    assert "16000 (4), 44100 (1)" in lines["sample"] and "1 (4), 2 (1)" in lines["channels"]
    assert "none (3), txt (1), json (1)" in lines["captions"]
    assert "description 2, " in lines["fields"] and "bpm 1" in lines["fields"]
    assert "longest 3.3" in lines["duration"]
    assert int(lines["train"].split()[1]) + int(lines["valid"].split()[1]) == 5
    assert "1 zero bytes" in lines["skipped"] and "zero.mp3" in lines["skipped"]
    assert "song2.wav" in lines["problem"]
    for args in (["check", tmp_path, "--valid", "7"],
                 ["cache", tmp_path, "--codec", "no_such", "--out", tmp_path / "c"],
                 ["cache", tmp_path / "zero.mp3", "--codec", "toy", "--out", tmp_path / "c"]):
        assert data.main(list(map(str, args))) == 2 and not (tmp_path / "c").exists()
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        data.main(["frobnicate"])
