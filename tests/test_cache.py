"""A token cache follows its dataset: each edit ends in the tokens of a fresh cache, and encodes what changed.

Interrupted, killed and shared among ranks it ends in the same. Offline, no GPU."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import tokenizer
from support import encode
from support.cache import open_cache, read_index, read_rows
from support.encode import make_cache
from support.scan import split_by_hash

ROOT = Path(__file__).parent.parent
RATE, HOP = 16_000, 320


class FrameMeans:
    """A codec in which a frame's codes are its mean, coarse and fine: quick, and each frame by itself."""
    name, sample_rate, channels, hop, K, card, fingerprint = "means", RATE, 1, HOP, 2, 256, "of frames"
    frame_rate = RATE / HOP

    def encode(self, wav):
        wav = wav[:, 0]
        frames = np.pad(wav.numpy(), ((0, 0), (0, -wav.shape[-1] % HOP))).reshape(len(wav), -1, HOP).mean(2)
        levels = ((frames + 1) * 2 ** 15).astype(np.int64)
        return torch.from_numpy(np.stack([levels // 256, levels % 256], 1))


def write(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = np.random.default_rng(seed).uniform(-0.9, 0.9, round(seconds * RATE / HOP))
    soundfile.write(path, notes.repeat(HOP).astype(np.float32), RATE, subtype="FLOAT")
    path.with_suffix(".txt").write_text(f"song {seed}")


@pytest.fixture
def music(tmp_path):
    """Eight songs of 1 to 1.7 s, in two folders."""
    for i in range(8):
        write(tmp_path / "music" / "ab"[i % 2] / f"song{i}.wav", 1 + i / 10, i)
    return tmp_path / "music"


@pytest.fixture
def encoded(monkeypatch):
    """Names of the files that have been encoded; a shard is of 2.5 s."""
    names, encode_file = [], encode.encode_file

    def noted(entry, *more):
        names.append(entry.key)
        return encode_file(entry, *more)

    monkeypatch.setattr(encode, "encode_file", noted)
    monkeypatch.setattr(encode, "SHARD_SECONDS", 2.5)
    return names


def make(music, out, **more):
    make_cache(str(music), str(out), FrameMeans(), **more)


def content(out):
    """{name: codes, length, metadata} of a cache, in its order; paths are left out."""
    entries = read_index(str(out))[1]
    return {e.key: (read_rows(str(out), e.shard, "npy", e.offset, e.frames, 2).tolist(), e.seconds, e.meta,
                    e.caption, e.weight, e.error) for e in entries}


def assert_like_fresh(music, out, tmp_path):
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    make(music, tmp_path / "fresh")
    old, new = content(tmp_path / "fresh"), content(out)
    assert list(old) == list(new) and old == new
    listed = [row for path in sorted(out.glob("shard_*.json")) for row in json.loads(path.read_text())]
    named = {e.shard for e in read_index(str(out))[1]}
    assert {row["key"]: row["meta"] for row in listed if row["shard"] in named} == {
        name: values[2] for name, values in new.items()}


def set_tag(music):
    (music / "b" / "song1.json").write_text('{"bpm": 90}')


def replace_audio(music):
    time = os.stat(music / "a" / "song2.wav").st_mtime
    write(music / "a" / "song2.wav", 1.2, seed=100)  # of the same length
    os.utime(music / "a" / "song2.wav", (time + 1, time + 1))


def tag_inside(music):
    path = music / "a" / "song2.wav"
    wav, rate = soundfile.read(path, dtype="float32")
    with soundfile.SoundFile(path, "w", rate, 1, "FLOAT") as file:
        file.title = "a title"
        file.write(wav)


def tag_and_rename(music):
    tag_inside(music)
    for suffix in (".wav", ".txt"):
        (music / "a" / f"song2{suffix}").rename(music / f"another name{suffix}")


def exchange(music):
    (music / "a" / "song0.wav").rename(music / "old.wav")
    (music / "a" / "song2.wav").rename(music / "a" / "song0.wav")
    (music / "old.wav").rename(music / "a" / "song2.wav")


def rename(music):
    for suffix in (".wav", ".txt"):
        (music / "a" / f"song4{suffix}").rename(music / f"another name{suffix}")


def touch_and_copy(music):
    for path in music.rglob("*.wav"):
        os.utime(path, (1e9, 1e9))
    shutil.copytree(music / "a", music / "c")


def put_odd_files(music):
    (music / "a" / "cut.wav").write_bytes((music / "a" / "song0.wav").read_bytes()[:200])
    soundfile.write(music / "a" / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")


EDITS = {  # name: (edit, the files that it has encoded, what is said)
    "none": (lambda music: None, [], "8 as before"),
    "caption": (lambda music: (music / "a" / "song0.txt").write_text("another"), [],
                "1 with other captions or tags, 7 as before"),
    "caption gone": (lambda music: (music / "a" / "song0.txt").unlink(), [],
                     "1 with other captions or tags, 7 as before"),
    "tag": (set_tag, [], "1 with other captions or tags, 7 as before"),
    "tag in the file": (tag_inside, [], "1 with other captions or tags, 7 as before"),
    "tag in the file and renamed": (tag_and_rename, [], "7 as before, 1 renamed or copied"),
    "names exchanged": (exchange, [], "2 with other audio, 6 as before"),
    "audio": (replace_audio, ["a/song2.wav"], "1 with other audio, 7 as before"),
    "added": (lambda music: write(music / "a" / "song9.wav", 1.0, 9), ["a/song9.wav"], "8 as before, 1 new"),
    "removed": (lambda music: (music / "b" / "song3.wav").unlink(), [], "7 as before, 1 dropped"),
    "renamed": (rename, [], "7 as before, 1 renamed or copied"),
    "touched and copied": (touch_and_copy, [], "8 as before, 4 renamed or copied"),
    "odd files": (put_odd_files, ["a/cut.wav", "a/nan.wav"],
                  "8 as before, 1 new, 1 that cannot be encoded"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_ends_like_a_fresh_cache(name, music, encoded, tmp_path, capsys):
    edit, changed, said = EDITS[name]
    make(music, tmp_path / "c")
    assert sorted(encoded) == sorted(content(tmp_path / "c")) and len(encoded) == 8
    assert "files: 8 new; encoded 8, 0.00 h of audio" in capsys.readouterr().out
    edit(music)
    encoded.clear()
    make(music, tmp_path / "c")
    out = capsys.readouterr().out
    counted = re.search("files: (.*); encoded (\\d)", out)
    assert sorted(encoded) == changed and sorted(counted[1].split(", ")) == sorted(said.split(", ")), out
    assert int(counted[2]) == len(changed) - (name == "odd files")
    assert_like_fresh(music, tmp_path / "c", tmp_path)


def test_another_file_of_the_same_size_and_time(music, encoded, tmp_path, capsys):
    """As archives have them, which set all times to one: files exchange names, or are written over."""
    def write_alike(number, seed):
        write(music / "a" / f"song{number}.wav", 1.0, seed)
        os.utime(music / "a" / f"song{number}.wav", (1e9, 1e9))

    for number in (0, 2, 4):
        write_alike(number, number)
    make(music, tmp_path / "c")
    encoded.clear()
    exchange(music)
    write_alike(4, 50)
    make(music, tmp_path / "c")
    assert encoded == ["a/song4.wav"] and "files: 3 with other audio, 5 as" in capsys.readouterr().out
    assert_like_fresh(music, tmp_path / "c", tmp_path)
    encoded.clear()
    make(music, tmp_path / "c")
    assert not encoded and "files: 8 as before" in capsys.readouterr().out


def test_a_tag_in_one_of_two_copies(music, encoded, tmp_path, capsys):
    shutil.copy(music / "a" / "song2.wav", music / "copy.wav")
    make(music, tmp_path / "c")
    encoded.clear()
    tag_inside(music)
    make(music, tmp_path / "c")
    assert not encoded and "1 with other captions or tags; encoded 0" in capsys.readouterr().out
    assert_like_fresh(music, tmp_path / "c", tmp_path)


def test_what_was_gone_for_a_while_is_not_encoded_again(music, encoded, tmp_path, monkeypatch, capsys):
    """Such as a disk that was not there: its codes stay as long as others of their shard are in use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # shards in their order
    make(music, tmp_path / "c")
    away = [music / "a" / "song2.wav", music / "b" / "song3.wav"]
    for path in away:
        path.rename(tmp_path / path.name)
    encoded.clear()
    for _ in range(3):
        make(music, tmp_path / "c")
    assert_like_fresh(music, tmp_path / "c", tmp_path)
    for path in away:
        (tmp_path / path.name).rename(path)
    encoded.clear()
    make(music, tmp_path / "c")
    assert not encoded and "files: 6 as before, 2 new; encoded 0" in capsys.readouterr().out
    assert_like_fresh(music, tmp_path / "c", tmp_path)


def test_a_moved_manifest_of_absolute_paths(music, encoded, tmp_path, capsys):
    def write_manifest(folder):
        paths = sorted(folder.rglob("*.wav"))
        lines = [json.dumps({"path": str(path)}) for path in paths]
        (folder / "data.jsonl").write_text("\n".join(lines))

    write_manifest(music)
    make(music, tmp_path / "c")
    encoded.clear()
    moved = music.rename(tmp_path / "elsewhere")
    write_manifest(moved)
    make(moved, tmp_path / "c")
    assert not encoded and "files: 8 renamed or copied; encoded 0" in capsys.readouterr().out
    shutil.copytree(moved / "a", tmp_path / "part" / "a")
    with pytest.raises(ValueError, match="nor most of its audio under other names"):
        make(tmp_path / "part", tmp_path / "c")


def test_a_moved_folder_is_the_same_one_and_another_is_refused(music, encoded, tmp_path, monkeypatch):
    make(music, tmp_path / "c")
    moved = music.rename(tmp_path / "elsewhere")
    encoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(encode, "digest_of_file", lambda path: pytest.fail(f"{path} is read"))
        make(moved, tmp_path / "c")
    assert not encoded and read_index(str(tmp_path / "c"))[1][0].path.startswith(str(moved))
    write(tmp_path / "other" / "a" / "song0.wav", 1.0, 50)
    before = content(tmp_path / "c")
    shutil.copy(moved / "a" / "song0.wav", tmp_path / "other" / "by another name.wav")
    with pytest.raises(ValueError, match="a cache with another dataset, .*elsewhere: none of its"):
        make(tmp_path / "other", tmp_path / "c")
    assert not encoded and content(tmp_path / "c") == before


def test_shards_are_of_minutes_and_garbage_goes(music, encoded, tmp_path, monkeypatch):
    out = tmp_path / "c"
    shards = lambda: {path.name for path in out.glob("shard_*.npy")}
    make(music, out)
    first = shards()
    assert 3 <= len(first) <= 6 and encode.SHARD_SECONDS == 2.5
    dataset = data.CacheDataset(str(out), FrameMeans(), 0.5, 0, split="train", valid=0.1)
    drawn = [dataset.example(0, i).codes.tolist() for i in range(30)]
    for i in range(1, 8):
        (music / "ab"[i % 2] / f"song{i}.wav").unlink()
    make(music, out)
    assert shards() == first  # for what has read the cache before
    assert [dataset.example(0, i).codes.tolist() for i in range(30)] == drawn
    make(music, out)
    assert len(shards()) == 1
    for i in range(1, 8):  # each in a shard of its own
        encoded.clear()
        write(music / f"new{i}.wav", 0.3, i)
        make(music, out)
        assert encoded == [f"new{i}.wav"] and len(shards()) <= encode.MAX_THIN + 7
    make(music, out)
    assert len({e.shard for e in read_index(str(out))[1]}) <= encode.MAX_THIN
    assert_like_fresh(music, out, tmp_path)


# -------------------------------------------------------------------------------------------- interruptions
def end_at(monkeypatch, place, end):
    """Lets `end` happen in the fifth file, between a shard's arrays and its entries, or before cache.json."""
    calls = []

    def wrap(name, counts):
        function = getattr(encode, name)

        def wrapped(*args, **more):
            calls.append(counts(args[0]))
            if sum(calls) == (5 if name == "encode_file" else 2):
                end()
            return function(*args, **more)

        monkeypatch.setattr(encode, name, wrapped)

    if place == "file":
        wrap("encode_file", lambda entry: True)
    elif place == "shard":
        wrap("write_json", lambda path: path.name.startswith("shard"))
    else:
        wrap("write_json", lambda path: path.name == "cache.json")


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("place", ["file", "shard", "index"])
def test_an_interruption_costs_a_shard(place, killed, music, encoded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # one thread
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        end_at(patch, place, (lambda: os._exit(9)) if killed else interrupt)
        if not killed:
            with pytest.raises(KeyboardInterrupt):
                make(music, out)
        elif child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        else:
            make(music, out)
            os._exit(0)
    said = re.search(r"unfinished: (\d) of 8 files to encode are stored", capsys.readouterr().out)
    assert (said is None) == (killed or place == "index")
    with pytest.raises(ValueError, match="unfinished"):
        read_index(str(out))
    encoded.clear()
    make(music, out)
    stored = {"file": 2, "shard": 3, "index": 8}[place]  # at least: the next file may be through, too
    missing = len(set(encoded))  # a thread of the stopped command may end a file that then counts twice
    assert stored <= 8 - missing <= stored + 3, encoded
    assert said is None or int(said[1]) == 8 - missing
    assert_like_fresh(music, out, tmp_path)
    assert not list(out.glob("*.tmp"))


def test_an_interrupted_update_leaves_the_cache_as_it_was(music, encoded, tmp_path, monkeypatch, capsys):
    make(music, tmp_path / "c")
    before = content(tmp_path / "c")
    for i in range(20, 26):
        write(music / f"new{i}.wav", 1.0, i)
    (music / "a" / "song0.txt").write_text("another")
    with monkeypatch.context() as patch:
        end_at(patch, "file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(music, tmp_path / "c")
    assert "the cache is as it was" in capsys.readouterr().out
    assert content(tmp_path / "c") == before
    make(music, tmp_path / "c")
    assert_like_fresh(music, tmp_path / "c", tmp_path)


def test_a_damaged_shard_is_encoded_again(music, encoded, tmp_path, capsys):
    make(music, tmp_path / "c")
    lost = tmp_path / "c" / "shard_00001.npy"
    lost.write_bytes(lost.read_bytes()[:-3])
    with pytest.raises(ValueError, match="run the same .* again"):
        read_index(str(tmp_path / "c"))
    encoded.clear()
    make(music, tmp_path / "c")
    assert 1 <= len(encoded) <= 3
    count, said = len(encoded), capsys.readouterr().out
    assert re.search(f"files: .*{count} encoded again.*; encoded {count},", said)
    assert_like_fresh(music, tmp_path / "c", tmp_path)


# ------------------------------------------------------------------------------------------------ processes
def test_two_ranks_share_the_files(music, tmp_path):
    """Two ranks of the command, by torchrun's variables: both encode, and it ends in the same cache."""
    command = [sys.executable, str(ROOT / "data.py"), "cache", str(music), "--out", str(tmp_path / "c")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        environment = dict(os.environ, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                           MASTER_ADDR="localhost", MASTER_PORT=port)
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "files: 8 new; encoded 8" in said[0] and not said[1]
    entries = read_index(str(tmp_path / "c"))[1]
    assert len({e.shard for e in entries}) == 2
    make_cache(str(music), str(tmp_path / "alone"), tokenizer.load_codec("toy"))
    alone = {e.key: read_rows(str(tmp_path / "alone"), e.shard, "npy", e.offset, e.frames, 4)
             for e in read_index(str(tmp_path / "alone"))[1]}
    assert all(np.array_equal(read_rows(str(tmp_path / "c"), e.shard, "npy", e.offset, e.frames, 4),
                              alone[e.key]) for e in entries)


def test_two_writers_never_meet(music, tmp_path, encoded, monkeypatch, capsys):
    """A second command is refused; a rank that outlives its own takes no shard's number from the next."""
    make(music, tmp_path / "c")
    code = f"import fcntl; f = open({str(tmp_path / 'c' / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True); input()"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen(command, **pipes)
    assert other.stdout.readline() == "1\n"
    with pytest.raises(ValueError, match="in use by another process"):
        make(music, tmp_path / "c")
    other.communicate("\n", timeout=20)
    # A command that ends while another begins on the same new folder
    begun = encode.output_folder
    with monkeypatch.context() as patch:
        patch.setattr(encode, "output_folder", lambda out: (patch.undo(), make(music, out), begun(out)))
        make(music, tmp_path / "new")
    assert "files: 8 as before; encoded 0" in capsys.readouterr().out
    claimed = [encode.claim_number(str(tmp_path / "c"), 0) for _ in range(3)]
    shards = len(list((tmp_path / "c").glob("shard_*.json")))
    assert claimed == [shards, shards + 1, shards + 2]


# ------------------------------------------------------------------------------------------- what is stored
def test_the_length_stored_is_what_was_decoded(music, tmp_path, encoded):
    """A manifest's claims of 10 s and of half a second are corrected, a rounded number is not.

    Another false claim may come from another reader of headers: then the file is encoded again."""
    for claim, changed in ((10.0, 3), (10.0, 0), (7.0, 1), (1.0, 0)):
        lines = [{"path": f"a/song{i}.wav", "duration": seconds, "sample_rate": RATE}
                 for i, seconds in ((0, claim), (2, 0.5), (4, 1.41))]
        (music / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
        encoded.clear()
        make(music, tmp_path / "c")
        lengths = [(e.seconds, e.frames) for e in read_index(str(tmp_path / "c"))[1]]
        assert lengths == [(1.0, 50), (1.2, 60), (1.41, 70)] and len(encoded) == changed


def test_an_old_cache_is_read_and_brought_up_to_date(music, encoded, tmp_path):
    """Its entries lie with the shards and say nothing of the files: they are believed if those are older."""
    out = tmp_path / "c"
    make(music, out)
    settings, entries = read_index(str(out))
    shards = sorted({e.shard for e in entries})
    for number in shards:
        rows = json.loads((out / f"shard_{number:05d}.json").read_text())
        for row in rows:
            del row["size"], row["modified"], row["digest"], row["silent"], row["weight"]
        (out / f"shard_{number:05d}.json").write_text(json.dumps(rows))
    (out / "cache.json").write_text(json.dumps(settings | {"shards": len(shards), "files": 8, "list": "0"}))
    assert sorted(content(out)) == sorted(e.key for e in entries)
    held_out = {e.key for e in split_by_hash(entries, 0.4, hash_alone=True)[1]}
    assert held_out != {e.key for e in split_by_hash(entries, 0.4)[1]}
    later = os.stat(out / "shard_00000.json").st_mtime + 100
    os.utime(music / "a" / "song0.wav", (later, later))
    (music / "b" / "song1.txt").write_text("another")
    write(music / "more.wav", 1.0, 30)
    encoded.clear()
    make(music, out)
    assert sorted(encoded) == ["a/song0.wav", "more.wav"]
    valid = open_cache(str(out), FrameMeans(), 0.4, {})[1]  # its runs keep their validation files
    assert {e.key for e in valid} - {"more.wav"} == held_out
    assert_like_fresh(music, out, tmp_path)
