"""What bad input is made of: damaged files of every kind, and runs, codecs and token caches with damage.

FILES are the bytes of single files. MATERIAL makes what takes more: a folder, a run, a cache. The command
lines of test_bad_train.py, test_bad_data.py and test_bad_generate.py name them, and `make_material` makes
them.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch

import data
import tokenizer
import train
from support import common

TINY_TRAINING = (
    "--codec toy --segment_seconds 1 --size debug --batch_size 2 --epochs 1 --updates_per_epoch 1 "
    "--valid_samples 2 --eval_samples 2 --generate_samples 0 --workers 0 --device cpu --out out").split()
RATE = 16_000    # Hz
TEXTS = {
    "long": "word " * 100_000,
    "nul": "slow\0organ",
    "emoji": "\U0001f3b5 organ",
    "rtl": "\u05e9\u05dc\u05d5\u05dd organ",
    "blank": " \t\n ",
    "surrogate": "organ \udcff",
    "empty": "",
}


# ------------------------------------------------------------------------------------------------------------
# audio, captions, manifests: NAME -> bytes of a file


def audio(samples=0.3, rate=RATE, kind="WAV", subtype=None, channels=1) -> bytes:
    """A file of one second whose samples are all `samples` (None: noise), as bytes."""
    if samples is None:
        wav = np.random.default_rng(0).uniform(-0.3, 0.3, (rate, channels))
    else:
        wav = np.full((rate, channels), samples)
    file = io.BytesIO()
    soundfile.write(file, wav, rate, format=kind, subtype=subtype)
    return file.getvalue()


def patched(raw: bytes, at: int, new: bytes) -> bytes:
    """Bytes with others written over them."""
    return raw[:at] + new + raw[at + len(new):]


def wav_rate(rate: int) -> bytes:
    """A wav whose header claims a sample rate."""
    return patched(audio(), 24, rate.to_bytes(4, "little"))


def rows(*paths, **more) -> bytes:
    """Lines of a manifest."""
    return "".join(json.dumps({"path": path} | more) + "\n" for path in paths).encode()


class Evil:
    """A pickle that makes a file when it is loaded: whoever loads it runs what its sender likes."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def evil_zip() -> bytes:
    """The same inside a file that torch.save made, with the keys that are asked for first."""
    file = io.BytesIO()
    torch.save(dict(format=common.FORMAT, args={}, model=Evil(), step=0), file)
    return file.getvalue()


GOOD = audio(None)
EVIL, EVIL_ZIP = pickle.dumps(Evil()), evil_zip()
FILES = {
    # audio
    "good.wav": GOOD,
    "zero.wav": b"",
    "head.wav": GOOD[:30],
    "half.wav": GOOD[:5000],
    "text.wav": b"no audio at all " * 20,
    "mp3.wav": audio(None, kind="MP3"),
    "none.wav": GOOD[:40] + bytes(4),
    "noise.wav": np.random.default_rng(0).bytes(9999),
    "long.wav": patched(GOOD, 40, b"\xff\xff\xff\x7f"),
    "long.flac": patched(audio(kind="FLAC"), 22, b"\xff\xff\xff\xff"),
    "endless.flac": patched(patched(audio(kind="FLAC"), 21, b"\xff"), 22, b"\xff\xff\xff\xff"),
    "rate0.wav": wav_rate(0),
    "rate3.wav": wav_rate(3),
    "rate4e9.wav": wav_rate(4_000_000_000),
    "prime.wav": wav_rate(999_983),
    "nan.wav": audio(np.nan, subtype="FLOAT"),
    "inf.wav": audio(np.inf, subtype="FLOAT"),
    "loud.wav": audio(1e30, subtype="FLOAT"),
    "one.wav": patched(patched(GOOD, 40, b"\2\0\0\0"), 4, b"\x26\0\0\0")[:46],
    "silent.wav": audio(0.0),
    "short.wav": GOOD[:44 + RATE * 3 // 10 * 2],         # 0.3 s; its header claims a second
    "u8.wav": audio(None, subtype="PCM_U8"),
    "pcm24.wav": audio(None, subtype="PCM_24"),
    "double.wav": audio(None, subtype="DOUBLE"),
    "seven.wav": audio(None, channels=7),
    "cover.jpg": b"\xff\xd8",
    "locked.wav": GOOD,
    # metadata
    "broken.json": b'{"description": ',
    "list.json": b"[1, 2]",
    "deep.json": b"[" * 100_000,
    "garbage.json": b"\xff\xfe\0\1" * 99,
    "huge.json": b'{"bpm": 1' + b"0" * 400 + b"}",
    "types.json": b'{"description": {"a": 1}, "bpm": [], "moods": 3.5, "key": true}',
    "nan.json": b'{"bpm": NaN, "title": "x"}',
    "twice.json": b'{"title": "a", "title": "b"}',
    "surrogate.json": b'{"description": "organ \\ud800"}',
    "nul.json": b'{"description": "slow\\u0000organ"}',
    "words.json": json.dumps({"description": TEXTS["long"]}).encode(),
    # captions
    "words.txt": TEXTS["long"].encode(),
    "blank.txt": b" \n\t ",
    "binary.txt": bytes(range(256)),
    "empty.txt": b"",
    "long.txt": b"slow organ " * 800,
    "rtl.txt": TEXTS["rtl"].encode(),
    "emoji.txt": TEXTS["emoji"].encode(),
    "latin.txt": b"caf\xe9",
    "nul.txt": b"slow\0organ",
    # models
    "best.pt": b"",
    "pickle.pt": EVIL,
    "pickle_zip.pt": EVIL_ZIP,
    "cut.pt": tokenizer.TOY_FILE.read_bytes()[:3000],
    "zero.pt": b"",
    # manifests
    "empty.jsonl": b"",
    "no_gz.jsonl.gz": b"this is no gz",
    "cut.jsonl.gz": gzip.compress(rows("good.wav") * 999)[:60],
    "away.jsonl": rows("good.wav", "../.."),
    "folder.jsonl": rows("good.wav", "."),
    "gone.jsonl": rows("good.wav", "gone.wav"),
    "double.jsonl": rows("good.wav", "good.wav"),
    "broken.jsonl": rows("good.wav") + b"{broken\n",
    "huge.jsonl": rows("good.wav", duration=10 ** 400, sample_rate=RATE),
    "bom.jsonl": b"\xef\xbb\xbf" + rows("good.wav"),
    "gone_only.jsonl": rows("gone.wav"),
    "odd.jsonl": rows("good.wav", "a\0b.wav", "\ud800.wav", 5, None, []),
    "rate_lies.jsonl": rows("song0.wav", "prime.wav", duration=1.0, sample_rate=RATE),
    "lies.jsonl": rows("good.wav", duration=500.0, sample_rate=RATE),
    "wrong_types.jsonl": rows("good.wav", duration="long", sample_rate=[1]),
}


# ------------------------------------------------------------------------------------------------------------
# damage of a file: bytes -> bytes


def plain(raw: bytes) -> dict:
    """What a torch file holds."""
    return torch.load(io.BytesIO(raw), weights_only=True)


def stored(content) -> bytes:
    """A torch file."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def npy(array) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def without(key: str):
    """A torch file without one key."""
    return lambda raw: stored({k: v for k, v in plain(raw).items() if k != key})


def with_other(**changes):
    """A torch file with other values; a function is given the old one."""
    def change(raw):
        content = plain(raw)
        return stored(content | {k: v(content[k]) if callable(v) else v for k, v in changes.items()})
    return change


def in_json(change):
    """Damage of a JSON file: `change` gets its content."""
    return lambda raw: json.dumps(change(json.loads(raw))).encode()


def in_npy(change):
    """Damage of a .npy file: `change` gets its array."""
    return lambda raw: npy(change(np.load(io.BytesIO(raw))))


def twice_the_codes(weights: dict) -> dict:
    """Weights of a model for twice as many codes: every head and embedding once more."""
    changed = {}
    for name, x in weights.items():
        if name.startswith("linears"):
            x = torch.cat([x, x])
        elif name.startswith("emb."):
            x = torch.cat([x, x[:-1]])    # the special token stays one
        changed[name] = x
    return changed


DAMAGES = {    # of best.pt
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:len(raw) // 2],
    "text": lambda raw: b"no model" * 99,
    "pickle": lambda raw: EVIL,
    "pickle_zip": lambda raw: EVIL_ZIP,
    "list": lambda raw: stored([1, 2]),
    "other_format": with_other(format="nanomusicgen-0"),
    "no_model": without("model"),
    "no_args": without("args"),
    "no_assets": without("assets"),
    "no_codec": without("codec"),
    "shapes": with_other(model=lambda m: {k: v[..., :-1] for k, v in m.items()}),
    "bad_pieces": with_other(assets={"text": torch.zeros(99, dtype=torch.uint8)}),
    "bad_config": with_other(model_config=lambda c: c | {"num_layers": "two"}),
    "bad_sampling": with_other(sampling={"temperature": -1}),
    "bad_window": with_other(segment_frames=0),
    "top_p": with_other(sampling={"top_p": 0.9}),
    "other_card": with_other(model_config=lambda c: c | {"card": 512}, model=twice_the_codes),
}
SAME_DAMAGES = (
    "empty", "cut", "text", "pickle", "pickle_zip", "list", "other_format", "no_args", "no_assets",
    "bad_pieces")
LAST_DAMAGES = {name: DAMAGES[name] for name in SAME_DAMAGES} | {    # of last.pt
    "no_tensors": without("tensors"),
    "flipped": lambda raw: patched(raw, len(raw) // 2, bytes([raw[len(raw) // 2] ^ 1])),
    "shapes": with_other(tensors=lambda m: {k: v[..., :-1] if v.dim() else v for k, v in m.items()}),
    "names": with_other(names=lambda names: names + ["optimizer/exp_avg/nothing"]),
}


def half_the_codebooks(codec: dict) -> dict:
    """The same codec with K = 2."""
    codec["config"]["rvq"]["n_q"] = 2
    gone = ("quantizer.vq.layers.2", "quantizer.vq.layers.3")
    codec["state"] = {k: v for k, v in codec["state"].items() if not k.startswith(gone)}
    return codec


def half_the_codes(codec: dict) -> dict:
    """The same codec with 128 codes."""
    codec["config"]["rvq"]["bins"] = 128
    codec["state"] = {k: v[:128] if k.startswith("quantizer") else v for k, v in codec["state"].items()}
    return codec


# ------------------------------------------------------------------------------------------------------------
# folders, runs, codecs, caches: functions that make them at a path. shared: the folder that `prepare` made


def prepare(shared: Path) -> Path:
    """The tiny runs, with and without text, the songs and their token cache that cases copy and damage."""
    music(shared / "music")
    with contextlib.redirect_stdout(io.StringIO()):
        for out, *flags in (("run",), ("mute", "--no_text"), ("tune", "--conditions", "melody", "style")):
            assert train.main([*TINY_TRAINING, "--out", str(shared / out), *flags]) == 0
        cache = ["cache", str(shared / "music"), "--codec", "toy", "--out", str(shared / "cache")]
        assert data.main(cache) == 0
    return shared


def music(path: Path, *names: str) -> Path:
    """Two good songs with captions, and files of FILES beside them."""
    path.mkdir()
    for i in range(2):
        (path / f"song{i}.wav").write_bytes(audio(None, rate=RATE))
        (path / f"song{i}.txt").write_text(f"a slow song, number {i}, with organ and bells")
    for name in names:
        (path / name).write_bytes(FILES[name])
        if name.endswith((".json", ".txt")):    # captions of a song of that name
            (path / name).with_suffix(".wav").write_bytes(audio(0.1))
    return path


def nothing(path: Path, shared: Path) -> None:
    """An empty folder."""
    path.mkdir()


def links(path: Path, shared: Path) -> None:
    """Good songs, a link to their folder, one to nothing, one to itself and one to a song."""
    music(path)
    (path / "loop").symlink_to(path)
    (path / "dangling.wav").symlink_to("nowhere.wav")
    (path / "self.wav").symlink_to("self.wav")
    (path / "twin.wav").symlink_to("song0.wav")


def odd_names(path: Path, shared: Path) -> None:
    """Files whose names are no numbers, although one looks like it."""
    path.mkdir()
    (path / "\u00b2.wav").touch()
    (path / "notes.txt").touch()


def lone(*names: str):
    """A folder of these files alone."""
    def make(path, shared):
        path.mkdir()
        for name in names:
            (path / name).write_bytes(FILES[name])
    return make


def captioned(name: str):
    """A folder of one song, whose caption is a file of FILES."""
    def make(path, shared):
        path.mkdir()
        (path / "song.wav").write_bytes(GOOD)
        (path / "song.txt").write_bytes(FILES[name])
    return make


def copied(name: str, *but: str):
    """A copy of what `prepare` made, without the large files that the case does not read."""
    return lambda path, shared: shutil.copytree(shared / name, path, ignore=shutil.ignore_patterns(*but))


def run_with(name: str, damage):
    """A finished run whose file `name` is damaged."""
    def make(path, shared):
        copied("run", "last*" if name == "best.pt" else "last.prev.pt")(path, shared)
        (path / name).write_bytes(damage((path / name).read_bytes()))
    return make


def cache_with(name: str, damage):
    """A token cache whose file `name` is damaged (None: gone)."""
    def make(path, shared):
        shutil.copytree(shared / "cache", path)
        content = damage((path / name).read_bytes())
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
    return make


def in_entries(change):
    """Damage to the entries of a cache.json."""
    return in_json(lambda content: content | {"entries": change(content["entries"])})


def new_cache(*flags: str):
    """A token cache made with other flags."""
    return lambda path, shared: data.main(["cache", str(shared / "music"), *flags, "--out", str(path)])


def codec_with(change):
    """A codec file: the embedded one, changed."""
    return lambda path, shared: path.write_bytes(stored(change(plain(tokenizer.TOY_FILE.read_bytes()))))


def fit_checkpoint(content: bytes):
    """A checkpoint of fitting a codec. It stands beside --out, which is the path."""
    return lambda path, shared: Path(f"{path}.fit").write_bytes(content)


BAD_CODEC_CONFIG = {"sample_rate": "fast", "rvq": {"n_q": 4}, "seanet": {}}
FIT_FORMAT = "nanomusicgen codec fit 1"
MATERIAL = {
    # folders
    "empty_folder": nothing,
    "no_best": nothing,
    "links": links,
    "odd_names": odd_names,
    "only_bad": lone("zero.wav", "text.wav", "cover.jpg"),
    "no_audio": lone("empty.txt", "cover.jpg"),
    "no_captions": lone("good.wav"),
    "only_nan": lone("nan.wav"),
    "only_short": lone("short.wav"),
    "blank_captions": captioned("blank.txt"),
    "long_caption": captioned("long.txt"),
    # runs
    "run": copied("run"),
    "model": copied("run", "last*"),
    "mute": copied("mute", "last*"),
    "cross": run_with("best.pt", with_other(conditioner_config=lambda c: c | {"fuse": {"text": "cross"}})),
    "tune": copied("tune", "last*"),
    "no_log": run_with("log.jsonl", lambda raw: b"no log at all\n"),
    **{f"best_{name}": run_with("best.pt", damage) for name, damage in DAMAGES.items()},
    **{f"last_{name}": run_with("last.pt", damage) for name, damage in LAST_DAMAGES.items()},
    # codecs
    "codec_other": codec_with(lambda c: c | {"state": {k: v * 2 for k, v in c["state"].items()}}),
    "codec_K2": codec_with(half_the_codebooks),
    "codec_card128": codec_with(half_the_codes),
    "codec_format": codec_with(lambda c: c | {"format": "other"}),
    "codec_list": codec_with(lambda c: [1]),
    "codec_no_config": codec_with(lambda c: {k: v for k, v in c.items() if k != "config"}),
    "codec_no_state": codec_with(lambda c: {k: v for k, v in c.items() if k != "state"}),
    "codec_bad_config": codec_with(lambda c: c | {"config": BAD_CODEC_CONFIG}),
    "codec_bad_state": codec_with(lambda c: c | {"state": {"x": 1}}),
    "codec_shapes": codec_with(lambda c: c | {"state": {k: v[..., :-1] for k, v in c["state"].items()}}),
    "fit_pickle": fit_checkpoint(EVIL),
    "fit_cut": fit_checkpoint(b"PK\3\4 cut"),
    "fit_keys": fit_checkpoint(stored({"format": FIT_FORMAT, "step": 3})),
    "fit_args": fit_checkpoint(stored({"format": FIT_FORMAT, "step": 3, "args": []})),
    # token caches
    "cache": copied("cache"),
    "cache_K2": new_cache("--codec", "toy", "--num_codebooks", "2"),
    "cache_stereo": new_cache("--channels", "2"),
    "cache_no_chroma": cache_with("shard_00000.chroma.npy", lambda raw: None),
    "cache_cut_chroma": cache_with("shard_00000.chroma.npy", lambda raw: raw[:-9]),
    "cache_no_shard": cache_with("shard_00000.npy", lambda raw: None),
    "cache_no_entries": cache_with("cache.json", in_json(
        lambda content: {k: v for k, v in content.items() if k != "entries"})),
    "cache_cut": cache_with("shard_00000.npy", lambda raw: raw[:-9]),
    "cache_pickle": cache_with("shard_00000.npy", lambda raw: EVIL),
    "cache_objects": cache_with("shard_00000.npy", lambda raw: npy(np.array([Evil()], dtype=object))),
    "cache_text": cache_with("cache.json", lambda raw: b"no json"),
    "cache_list": cache_with("cache.json", lambda raw: b"[]"),
    "cache_no_codec": cache_with("cache.json", in_json(
        lambda content: {k: v for k, v in content.items() if k != "fingerprint"})),
    "cache_no_shards": cache_with("cache.json", in_json(lambda content: content | {"entries": []})),
    "cache_toy": cache_with("cache.json", in_json(lambda content: content | {"dataset": "toy"})),
    "cache_times": cache_with("cache.json", in_entries(
        lambda entries: [entry | {"seconds": "long"} for entry in entries])),
    "cache_places": cache_with("cache.json", in_entries(
        lambda entries: [e | {"offset": e["offset"] - 10 ** 6} for e in entries[:-1]] + entries[-1:])),
    "cache_meta": cache_with("cache.json", in_entries(
        lambda entries: [entry | {"meta": [1]} for entry in entries])),
    "cache_floats": cache_with("shard_00000.npy", in_npy(lambda codes: codes.astype(np.float32))),
    "cache_codes": cache_with("shard_00000.npy", in_npy(lambda codes: codes + 1000)),
}


def make_material(name: str, place: Path, shared: Path) -> str:
    """Makes a MATERIAL, a file of FILES or a folder of songs in `place` -> path and what follows a /."""
    name, _, rest = name.partition("/")
    path = place / name.split("+")[0]
    if not path.exists():
        if path.name == "music":
            music(path, *name.split("+")[1:])
        elif name in FILES:
            path.write_bytes(FILES[name])
        else:
            MATERIAL[name](path, shared)
    return f"{path}/{rest}" if rest else str(path)
