"""Every kind of bad input and how it ends. Nobody sees a traceback, and no file that was there before is touched:

    REFUSED    exit code 2 and one line on stderr that names the value and says what is allowed or what to do
    SKIPPED    a bad file among good ones: left out, named once and counted; the rest goes on
    FINE       odd, but no mistake: works

A case is a command line, run in this process in an empty folder. @NAME is a file or folder that MATERIAL makes there first,
@music+A+B a folder of good songs with A and B beside them, $NAME one of TEXTS; then come the words its message must hold.

    python tests/test_bad_input.py [WORD]        prints the table: case | how it ended, for the cases that hold WORD
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import conditioning
import data
from support import common, flags
import generate
from evaluate import analyser, metrics
import tokenizer
import train

PROGRAMS = dict(train=train, data=data, tokenizer=tokenizer, generate=generate, metrics=metrics,
                conditioning=conditioning, analyser=analyser)
FIRST = {                                                            # flags put before those of a case
    "train": "--codec toy --segment_seconds 1 --size debug --batch_size 2 --epochs 1 --updates_per_epoch 1 --valid_samples 2 "
             "--eval_samples 2 --generate_samples 0 --workers 0 --device cpu --out out",
    "generate": "--seconds 0.1 --device cpu --out out"}
RATE = 16_000
TEXTS = {"long": "word " * 100_000, "nul": "slow\0organ", "emoji": "\U0001f3b5 organ", "rtl": "\u05e9\u05dc\u05d5\u05dd organ",
         "blank": " \t\n ", "surrogate": "organ \udcff", "empty": ""}


# ---------------------------------------------------------------------------------------------------------------------
# audio, captions, manifests: NAME -> bytes of a file


def audio(samples=0.3, rate=RATE, kind="WAV", subtype=None, channels=1) -> bytes:
    """A file of one second whose samples are all `samples` (None: noise), as bytes."""
    wav = np.random.default_rng(0).uniform(-0.3, 0.3, (rate, channels)) if samples is None else np.full((rate, channels), samples)
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
    "good.wav": GOOD, "zero.wav": b"", "head.wav": GOOD[:30], "half.wav": GOOD[:5000], "text.wav": b"no audio at all " * 20,
    "mp3.wav": audio(None, kind="MP3"), "none.wav": GOOD[:40] + bytes(4), "noise.wav": np.random.default_rng(0).bytes(9999),
    "long.wav": patched(GOOD, 40, b"\xff\xff\xff\x7f"), "long.flac": patched(audio(kind="FLAC"), 22, b"\xff\xff\xff\xff"),
    "endless.flac": patched(patched(audio(kind="FLAC"), 21, b"\xff"), 22, b"\xff\xff\xff\xff"),
    "rate0.wav": wav_rate(0), "rate3.wav": wav_rate(3), "rate4e9.wav": wav_rate(4_000_000_000), "prime.wav": wav_rate(999_983),
    "nan.wav": audio(np.nan, subtype="FLOAT"), "inf.wav": audio(np.inf, subtype="FLOAT"),
    "loud.wav": audio(1e30, subtype="FLOAT"), "one.wav": patched(patched(GOOD, 40, b"\2\0\0\0"), 4, b"\x26\0\0\0")[:46],
    "silent.wav": audio(0.0), "u8.wav": audio(None, subtype="PCM_U8"), "pcm24.wav": audio(None, subtype="PCM_24"),
    "double.wav": audio(None, subtype="DOUBLE"), "seven.wav": audio(None, channels=7), "cover.jpg": b"\xff\xd8", "locked.wav": GOOD,
    "broken.json": b'{"description": ', "list.json": b"[1, 2]", "deep.json": b"[" * 100_000, "garbage.json": b"\xff\xfe\0\1" * 99,
    "huge.json": b'{"bpm": 1' + b"0" * 400 + b"}", "types.json": b'{"description": {"a": 1}, "bpm": [], "moods": 3.5, "key": true}',
    "nan.json": b'{"bpm": NaN, "title": "x"}', "twice.json": b'{"title": "a", "title": "b"}',
    "surrogate.json": b'{"description": "organ \\ud800"}', "nul.json": b'{"description": "slow\\u0000organ"}',
    "words.json": json.dumps({"description": TEXTS["long"]}).encode(),
    "words.txt": TEXTS["long"].encode(), "blank.txt": b" \n\t ", "binary.txt": bytes(range(256)), "empty.txt": b"",
    "long.txt": b"slow organ " * 800,
    "rtl.txt": TEXTS["rtl"].encode(), "emoji.txt": TEXTS["emoji"].encode(), "latin.txt": b"caf\xe9", "nul.txt": b"slow\0organ",
    "best.pt": b"", "pickle.pt": EVIL, "pickle_zip.pt": EVIL_ZIP, "cut.pt": tokenizer.TOY_FILE.read_bytes()[:3000], "zero.pt": b"",
    "empty.jsonl": b"", "no_gz.jsonl.gz": b"this is no gz", "cut.jsonl.gz": gzip.compress(rows("good.wav") * 999)[:60],
    "away.jsonl": rows("good.wav", "../.."), "folder.jsonl": rows("good.wav", "."), "gone.jsonl": rows("good.wav", "gone.wav"),
    "double.jsonl": rows("good.wav", "good.wav"), "broken.jsonl": rows("good.wav") + b"{broken\n",
    "huge.jsonl": rows("good.wav", duration=10 ** 400, sample_rate=RATE), "bom.jsonl": b"\xef\xbb\xbf" + rows("good.wav"),
    "gone_only.jsonl": rows("gone.wav"), "odd.jsonl": rows("good.wav", "a\0b.wav", "\ud800.wav", 5, None, []),
    "rate_lies.jsonl": rows("song0.wav", "prime.wav", duration=1.0, sample_rate=RATE),
    "lies.jsonl": rows("good.wav", duration=500.0, sample_rate=RATE),
    "wrong_types.jsonl": rows("good.wav", duration="long", sample_rate=[1]),
}


# ---------------------------------------------------------------------------------------------------------------------
# runs, codecs, caches: NAME -> function that makes it at a path


def plain(raw: bytes) -> dict:
    """What a torch file holds."""
    return torch.load(io.BytesIO(raw), weights_only=True)


def stored(content) -> bytes:
    """A torch file."""
    file = io.BytesIO()
    torch.save(content, file)
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


DAMAGES = {                                                          # of best.pt
    "empty": lambda raw: b"", "cut": lambda raw: raw[:len(raw) // 2], "text": lambda raw: b"no model" * 99, "pickle": lambda raw: EVIL,
    "pickle_zip": lambda raw: EVIL_ZIP, "list": lambda raw: stored([1, 2]), "other_format": with_other(format="nanomusicgen-0"),
    "no_model": without("model"), "no_args": without("args"), "no_assets": without("assets"), "no_codec": without("codec"),
    "shapes": with_other(model=lambda m: {k: v[..., :-1] for k, v in m.items()}),
    "bad_pieces": with_other(assets={"text": torch.zeros(99, dtype=torch.uint8)}),
    "bad_config": with_other(model_config=lambda c: c | {"num_layers": "two"}),
    "bad_sampling": with_other(sampling={"temperature": -1}), "bad_window": with_other(segment_frames=0),
    "other_card": with_other(model_config=lambda c: c | {"card": 512},
                             model=lambda m: {k: torch.cat([v, v]) if k.startswith("linears") else torch.cat([v, v[:-1]])
                                              if k.startswith("emb.") else v for k, v in m.items()}),
}


LAST_DAMAGES = {name: DAMAGES[name] for name in ("empty", "cut", "text", "pickle", "pickle_zip", "list", "other_format", "no_args",
                                                 "no_assets", "bad_pieces")} | {
    "no_tensors": without("tensors"), "flipped": lambda raw: patched(raw, len(raw) // 2, bytes([raw[len(raw) // 2] ^ 1])),
    "shapes": with_other(tensors=lambda m: {k: v[..., :-1] if v.dim() else v for k, v in m.items()}),
    "names": with_other(names=lambda names: names + ["optimizer/exp_avg/nothing"])}


def codec_with(change):
    """A codec file: the embedded one, changed."""
    return lambda path, shared: path.write_bytes(stored(change(plain(tokenizer.TOY_FILE.read_bytes()))))


def half_the_codebooks(codec: dict) -> dict:
    """The same codec with K = 2."""
    codec["config"]["rvq"]["n_q"] = 2
    codec["state"] = {k: v for k, v in codec["state"].items() if not k.startswith(("quantizer.vq.layers.2", "quantizer.vq.layers.3"))}
    return codec


def half_the_codes(codec: dict) -> dict:
    """The same codec with 128 codes."""
    codec["config"]["rvq"]["bins"] = 128
    codec["state"] = {k: v[:128] if k.startswith("quantizer") else v for k, v in codec["state"].items()}
    return codec


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


def in_json(change):
    """Damage of a JSON file: `change` gets its content."""
    return lambda raw: json.dumps(change(json.loads(raw))).encode()


def npy(array) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def links(path: Path, shared: Path) -> None:
    """Good songs, a link to their folder, one to nothing, one to itself and one to a song."""
    music(path)
    (path / "loop").symlink_to(path)
    for name, target in (("dangling.wav", "nowhere.wav"), ("self.wav", "self.wav"), ("twin.wav", "song0.wav")):
        (path / name).symlink_to(target)


def music(path: Path, *names: str) -> Path:
    """Two good songs with captions, and files of FILES beside them."""
    path.mkdir()
    for i in range(2):
        (path / f"song{i}.wav").write_bytes(audio(None, rate=RATE))
        (path / f"song{i}.txt").write_text(f"a slow song, number {i}, with organ and bells")
    for name in names:
        (path / name).write_bytes(FILES[name])
        if name.endswith((".json", ".txt")):                         # captions of a song of that name
            (path / name).with_suffix(".wav").write_bytes(audio(0.1))
    return path


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


def nothing(path: Path, shared: Path) -> None:
    """An empty folder."""
    path.mkdir()


MATERIAL = {
    "empty_folder": nothing, "links": links, "no_best": nothing, "only_bad": lone("zero.wav", "text.wav", "cover.jpg"),
    "no_audio": lone("empty.txt", "cover.jpg"), "no_captions": lone("good.wav"),
    "odd_names": lambda p, s: (p.mkdir(), (p / "\u00b2.wav").touch(), (p / "notes.txt").touch()),
    "blank_captions": captioned("blank.txt"), "long_caption": captioned("long.txt"),
    "tune": copied("tune", "last*"), "cache_no_chroma": cache_with("shard_00000.chroma.npy", lambda raw: None),
    "cache_cut_chroma": cache_with("shard_00000.chroma.npy", lambda raw: raw[:-9]),
    "run": copied("run"), "model": copied("run", "last*"), "mute": copied("mute", "last*"), "cache": copied("cache"),
    "no_log": run_with("log.jsonl", lambda raw: b"no log at all\n"),
    **{f"best_{name}": run_with("best.pt", damage) for name, damage in DAMAGES.items()},
    **{f"last_{name}": run_with("last.pt", damage) for name, damage in LAST_DAMAGES.items()},
    "codec_other": codec_with(lambda c: c | {"state": {k: v * 2 for k, v in c["state"].items()}}),
    "codec_K2": codec_with(half_the_codebooks), "codec_card128": codec_with(half_the_codes),
    "codec_format": codec_with(lambda c: c | {"format": "other"}), "codec_list": codec_with(lambda c: [1]),
    "codec_no_config": codec_with(lambda c: {k: v for k, v in c.items() if k != "config"}),
    "codec_no_state": codec_with(lambda c: {k: v for k, v in c.items() if k != "state"}),
    "codec_bad_config": codec_with(lambda c: c | {"config": {"sample_rate": "fast", "rvq": {"n_q": 4}, "seanet": {}}}),
    "codec_bad_state": codec_with(lambda c: c | {"state": {"x": 1}}),
    "codec_shapes": codec_with(lambda c: c | {"state": {k: v[..., :-1] for k, v in c["state"].items()}}),
    "cache_K2": lambda p, s: data.main(["cache", str(s / "music"), "--codec", "toy", "--num_codebooks", "2", "--out", str(p)]),
    "cache_stereo": lambda p, s: data.main(["cache", str(s / "music"), "--channels", "2", "--out", str(p)]),
    "cache_no_shard": cache_with("shard_00000.npy", lambda raw: None), "cache_no_entries": cache_with("shard_00000.json", lambda raw: None),
    "cache_cut": cache_with("shard_00000.npy", lambda raw: raw[:-9]), "cache_pickle": cache_with("shard_00000.npy", lambda raw: EVIL),
    "cache_objects": cache_with("shard_00000.npy", lambda raw: npy(np.array([Evil()], dtype=object))),
    "cache_text": cache_with("cache.json", lambda raw: b"no json"), "cache_list": cache_with("cache.json", lambda raw: b"[]"),
    "cache_no_codec": cache_with("cache.json", in_json(lambda s: {k: v for k, v in s.items() if k != "fingerprint"})),
    "cache_no_shards": cache_with("cache.json", in_json(lambda s: s | {"shards": 0})),
    "cache_times": cache_with("shard_00000.json", in_json(lambda e: [x | {"seconds": "long"} for x in e])),
    "cache_places": cache_with("shard_00000.json", in_json(lambda e: [x | {"offset": x["offset"] - 10 ** 6} for x in e[:-1]] + e[-1:])),
    "cache_meta": cache_with("shard_00000.json", in_json(lambda e: [x | {"meta": [1]} for x in e])),
    "cache_floats": cache_with("shard_00000.npy", lambda raw: npy(np.load(io.BytesIO(raw)).astype(np.float32))),
    "cache_codes": cache_with("shard_00000.npy", lambda raw: npy(np.load(io.BytesIO(raw)) + 1000)),
}
# a checkpoint of `tokenizer.py fit` stands beside its --out
FIT_FILES = {"fit_pickle": EVIL, "fit_cut": b"PK\3\4 cut", "fit_keys": stored({"format": "nanomusicgen codec fit 1", "step": 3}),
             "fit_args": stored({"format": "nanomusicgen codec fit 1", "step": 3, "args": []})}
MATERIAL |= {name: lambda p, s, content=content: Path(f"{p}.fit").write_bytes(content) for name, content in FIT_FILES.items()}


def prepare(shared: Path) -> Path:
    """The tiny runs, with and without text, the songs and their token cache that cases copy and damage."""
    music(shared / "music")
    with contextlib.redirect_stdout(io.StringIO()):
        for out, *flags in (("run",), ("mute", "--no_text"), ("tune", "--conditions", "melody", "style")):
            assert train.main([*FIRST["train"].split(), "--out", str(shared / out), *flags]) == 0
        assert data.main(["cache", str(shared / "music"), "--codec", "toy", "--out", str(shared / "cache")]) == 0
    return shared


# ---------------------------------------------------------------------------------------------------------------------
# the cases: what they are -> (command, what the line says ...)


REFUSED = {
    # train.py: flags
    "train: a flag that does not exist": ("train --sise tiny", "--sise"),
    "train: a size that does not exist": ("train --size huge", "--size huge", "tiny"),
    "train: a pattern that does not exist": ("train --pattern zigzag", "'zigzag'", "delay"),
    "train: a word for a number": ("train --epochs many", "--epochs", "'many'"),
    "train: a fraction for a whole number": ("train --batch_size 2.5", "--batch_size", "'2.5'"),
    "train: three channels": ("train --channels 3", "--channels", "1, 2"),
    "train: two channels of a mono cache": ("train --channels 2 --cache @cache", "holds 4 codebooks", "channels 1", "use that codec"),
    "train: one channel of a stereo cache": ("train --cache @cache_stereo", "holds 8 codebooks", "channels 2", "use that codec"),
    "train: two channels in a folder of one": ("train --out @run --channels 2 --epochs 2", "--channels 1 there, 2 now", "another --out"),
    "train: too many codebooks of two channels": ("train --channels 2 --num_codebooks 8", "num_codebooks 8", "1 to 4"),
    "train: start from nothing": ("train --init_from no/such", "no/such", "give the folder of a run"),
    "train: start from another size": ("train --init_from @model --size tiny", "dim 64 there, 192 here", "it was trained with"),
    "train: stereo start from another size": ("train --init_from @model --channels 2 --size tiny", "dim 64 there, 192 here"),
    "train: start from fewer conditions": ("train --init_from @mute", "cross_attention False there", "it was trained with"),
    "train: start from other codebooks": ("train --init_from @model --num_codebooks 2", "codes 4 of toy", "codes 2 of toy"),
    **{f"train: start from a best.pt {what}": (f"train --init_from @best_{name}", f"best_{name}", says) for name, what, says in (
        ("cut", "cut", "not a model"), ("pickle", "is a pickle", "not a model"), ("no_model", "without weights", "not a model"),
        ("no_codec", "without codec", "not a model"), ("no_assets", "without vocabulary", "not a model"),
        ("shapes", "of other shapes", "are not what this model has: conditioner"), ("bad_pieces", "with a broken vocabulary", "not a model"),
        ("bad_config", "with a broken config", "layers two there"))},
    "train: no epochs": ("train --epochs 0", "--epochs 0", "at least 1"),
    "train: negative updates": ("train --updates_per_epoch -1", "--updates_per_epoch -1", "at least 1"),
    "train: batch of none": ("train --batch_size 0", "--batch_size 0", "at least 1"),
    "train: batch not divisible": ("train --batch_size 4 --micro_batch_size 3", "--micro_batch_size 3", "1, 2, 4"),
    "train: learning rate nan": ("train --lr nan", "--lr nan", "more than 0"),
    "train: learning rate negative": ("train --lr -0.001", "--lr -0.001", "more than 0"),
    "train: text learning rate zero": ("train --text_lr 0", "--text_lr 0", "more than 0"),
    "train: probability over 1": ("train --cfg_dropout 1.5", "--cfg_dropout 1.5", "between 0 and 1"),
    "train: probability negative": ("train --word_dropout -0.1", "--word_dropout -0.1", "between 0 and 1"),
    "train: probability nan": ("train --merge_text_p nan", "--merge_text_p nan", "between 0 and 1"),
    "train: dropout over 1": ("train --dropout 2", "--dropout 2", "between 0 and 1"),
    "train: weight decay nan": ("train --weight_decay nan", "--weight_decay nan", "at least 0"),
    "train: negative workers": ("train --workers -1", "--workers -1", "at least 0"),
    "train: negative seed": ("train --seed -1", "--seed -1", "at least 0"),
    "train: top_p over 1": ("train --top_p 2", "top_p 2", "between 0 and 1"),
    "train: negative temperature": ("train --temperature -1", "temperature -1", "between 0 and 100"),
    "train: negative top_k": ("train --top_k -5", "top_k -5", "between 0 and"),
    "train: guidance nan": ("train --cfg nan", "cfg nan", "between"),
    "train: float16 on a CPU": ("train --dtype float16", "float16", "bfloat16"),
    "train: unknown device": ("train --device banana", "banana", "cpu, cuda"),
    "train: device with a bad number": ("train --device cpu:x", "cpu:x", "cpu, cuda"),
    "train: seed too large": ("train --seed 99999999999999999999999", "--seed 999"),
    "train: learning rate inf": ("train --lr inf", "--lr inf", "less than 10000"),
    "train: segment huge": ("train --segment_seconds 1e9", "--segment_seconds 1000000000", "less than 10000"),
    "train: segment far below a sample": ("train --segment_seconds 1e-9", "--segment_seconds 1e-09"),
    "train: segment of one frame": ("train --segment_seconds 0.02", "--segment_seconds 0.02"),
    "train: offload without shards": ("train --cpu_offload", "--cpu_offload", "--parallel fsdp"),
    "train: time-out of nothing": ("train --timeout 0", "--timeout 0.0", "more than 0"),
    "train: negative minutes": ("train --save_minutes -1", "--save_minutes -1.0", "at least 0"),
    "train: a plan for no GPU": ("train --dry_run --plan_gpus 0", "--plan_gpus 0", "at least 1"),
    "train: ZeRO-1": ("train --zero 1", "--zero", "2, 3"),
    "train: log.jsonl of something else": ("train --out @no_log --epochs 2", "log.jsonl"),
    **{f"train: last.pt {what}": (f"train --out @last_{name} --epochs 2", f"last_{name}") for name, what in (
        ("empty", "empty"), ("cut", "cut"), ("flipped", "with a bit flipped"), ("text", "is text"), ("pickle", "is a pickle"),
        ("pickle_zip", "is a pickle in a zip"), ("list", "is a list"), ("other_format", "of another format"),
        ("no_tensors", "without weights"), ("no_args", "without flags"), ("no_assets", "without vocabulary"),
        ("shapes", "of other shapes"), ("names", "with tensors of nothing"), ("bad_pieces", "with a broken vocabulary"))},
    "train: no GPU": ("train --device cuda", "--device cuda", "--device cpu"),
    "train: fuse without method": ("train --fuse text", "--fuse text", "text=cross"),
    "train: fuse of an unknown method": ("train --fuse text=nowhere", "text=nowhere", "cross, prepend, sum"),
    "train: fuse of an unknown condition": ("train --fuse melody=cross", "'melody'", "text"),
    "train: fuse with two signs": ("train --fuse text=cross=sum", "text=cross=sum", "NAME=METHOD"),
    "train: segment nan": ("train --segment_seconds nan", "--segment_seconds nan", "more than 0"),
    "train: segment zero": ("train --segment_seconds 0", "--segment_seconds 0", "more than 0"),
    "train: share of a segment over 1": ("train --min_segment_ratio 1.5", "--min_segment_ratio 1.5", "between 0 and 1"),
    "train: share of a segment zero": ("train --min_segment_ratio 0", "--min_segment_ratio 0", "more than 0"),
    "train: no codebooks": ("train --num_codebooks 0", "num_codebooks 0", "1 to 4"),
    "train: too many codebooks": ("train --num_codebooks 99", "num_codebooks 99", "1 to 4"),
    "train: vocabulary of one piece": ("train --text_vocab 1", "text_vocab 1", "characters"),
    "train: vocabulary smaller than the alphabet": ("train --text_vocab 9", "text_vocab 9", "characters"),
    "train: a condition that does not exist": ("train --conditions smell", "'smell'", "melody"),
    "train: probability of losing the melody over 1": ("train --melody_dropout 1.5", "--melody_dropout 1.5", "between 0 and 1"),
    "train: style longer than the segment": ("train --conditions style --style_seconds 0.5 3", "--style_seconds 0.5 3", "less than the segment"),
    "train: style from long to short": ("train --conditions style --style_seconds 0.5 0.2", "--style_seconds 0.5 0.2", "not less"),
    "train: style of nan": ("train --conditions style --style_seconds nan 0.2", "--style_seconds nan 0.2", "more than 0"),
    "train: no levels": ("train --conditions style --style_levels 0", "--style_levels 0", "at least 1"),
    "train: stems without demucs": ("train --conditions melody --melody_stems", "--melody_stems", "pip install demucs"),
    "train: melody from a cache without": ("train --cache @cache_no_chroma --conditions melody", "cache_no_chroma", "no chroma", "data.py cache"),
    "train: melody from a damaged cache": ("train --cache @cache_cut_chroma --conditions melody", "cache_cut_chroma", "damaged"),
    # train.py: what it reads
    "train: dataset missing": ("train --dataset no/such", "'no/such'", "give a folder"),
    "train: dataset is a song": ("train --dataset @good.wav", "good.wav", "give a folder"),
    "train: dataset folder empty": ("train --dataset @empty_folder", "empty_folder", "found nothing"),
    "train: folder without audio": ("train --dataset @no_audio", "not audio by its name", "cover.jpg"),
    "train: folder of bad audio only": ("train --dataset @only_bad", "zero bytes", "text.wav"),
    "train: folder without captions": ("train --dataset @no_captions", "no captions", "--no_text"),
    "train: captions of white space": ("train --dataset @blank_captions", "no captions", "--no_text"),
    "train: valid fraction over 1": ("train --dataset @music --valid 7", "--valid 7", "between 0 and 1"),
    "train: valid fraction nan": ("train --dataset @music --valid nan", "--valid nan", "between 0 and 1"),
    "train: valid folder missing": ("train --dataset @music --valid no/such", "'no/such'", "give a folder"),
    "train: valid is the dataset": ("train --dataset @music --valid @music", "--valid", "nothing is left"),
    "train: cache missing": ("train --cache no/such", "'no/such'", "data.py cache"),
    "train: cache is a folder of songs": ("train --cache @music", "no token cache", "data.py cache"),
    "train: cache without a shard": ("train --cache @cache_no_shard", "cache_no_shard", "run the same"),
    "train: cache without entries": ("train --cache @cache_no_entries", "cache_no_entries", "run the same"),
    "train: cache with a cut shard": ("train --cache @cache_cut", "cache_cut", "run the same"),
    "train: cache with a pickle for a shard": ("train --cache @cache_pickle", "cache_pickle", "run the same"),
    "train: cache with pickled objects in a shard": ("train --cache @cache_objects", "cache_objects", "run the same"),
    "train: cache.json is text": ("train --cache @cache_text", "cache_text", "run the same"),
    "train: cache.json is a list": ("train --cache @cache_list", "cache_list", "run the same"),
    "train: cache.json names no codec": ("train --cache @cache_no_codec", "cache_no_codec", "run the same"),
    "train: cache of no shards": ("train --cache @cache_no_shards", "cache_no_shards", "run the same"),
    "train: cache with words for seconds": ("train --cache @cache_times", "cache_times", "run the same"),
    "train: cache with places outside its shard": ("train --cache @cache_places", "cache_places", "run the same"),
    "train: cache with a list for metadata": ("train --cache @cache_meta", "cache_meta", "run the same"),
    "train: cache of floats": ("train --cache @cache_floats", "cache_floats", "run the same"),
    "train: cache with codes over card": ("train --cache @cache_codes", "cannot be read", "0 to 255"),
    "train: cache of another codec": ("train --cache @cache --codec @codec_other", "fingerprint", "use that codec"),
    "train: cache of fewer codebooks": ("train --cache @cache_K2", "holds 2 codebooks", "not 4"),
    "train: cache of more codes": ("train --cache @cache --codec @codec_card128", "fingerprint", "use that codec"),
    "train: codec missing": ("train --codec no_such.pt", "no_such.pt", "no such file"),
    "train: codec unknown": ("train --codec mystery", "'mystery'", "toy, encodec_24khz"),
    "train: codec of 48 kHz": ("train --codec encodec_48khz", "encodec_48khz", "use encodec_24khz"),
    "train: codec empty": ("train --codec @zero.pt", "zero.pt", "damaged"),
    "train: codec is a pickle": ("train --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "train: codec is a pickle in a zip": ("train --codec @pickle_zip.pt", "pickle_zip.pt", "not a codec file"),
    "train: codec of fewer codebooks than asked": ("train --codec @codec_K2 --num_codebooks 4", "num_codebooks 4", "1 to 2"),
    # train.py: the run folder
    "train: out is a file": ("train --out @good.wav", "good.wav", "cannot be written"),
    "train: out below a file": ("train --out @good.wav/run", "good.wav/run", "cannot be written"),
    "train: run folder read-only": ("train --out @run --epochs 2", "run", "cannot be written"),
    "train: resume never, over a run": ("train --out @run --resume never", "--resume never", "another --out"),
    "train: checkpoint of another size": ("train --out @run --size tiny", "--size debug there, tiny now", "another --out"),
    "train: checkpoint of other flags": ("train --out @run --lr 0.5 --no_text", "--lr 0.008 there, 0.5 now", "--no_text False there"),
    # data.py
    "data: no command": ("data", "command"),
    "data: unknown command": ("data frobnicate", "'frobnicate'", "check"),
    "data check: missing": ("data check no/such", "'no/such'", "give a folder"),
    "data check: folder empty": ("data check @empty_folder", "empty_folder", "found nothing"),
    "data check: folder of bad audio only": ("data check @only_bad", "only_bad", "1 zero bytes", "give a folder"),
    "data check: valid fraction out of range": ("data check @music --valid 1.5", "--valid 1.5", "between 0 and 1"),
    "data check: manifest empty": ("data check @empty.jsonl", "empty.jsonl", "found nothing"),
    "data check: manifest of missing files only": ("data check @gone_only.jsonl", "1 missing", "gone.wav"),
    "data check: manifest .gz that is no gz": ("data check @no_gz.jsonl.gz", "no_gz.jsonl.gz", "cannot be read as a manifest"),
    "data check: manifest .gz cut off": ("data check @cut.jsonl.gz", "cut.jsonl.gz", "cannot be read as a manifest"),
    "data cache: into a folder of something else": ("data cache @music --out @run", "holds something else", "give a new"),
    "data cache: into its own dataset": ("data cache @music --out @music", "holds something else", "give a new"),
    "data cache: into a cache of other songs": ("data cache toy --clips 3 --out @cache", "another dataset", "another --out"),
    "data cache: into a cache whose cache.json is text": ("data cache @music --out @cache_text", "cache.json", "delete"),
    "data cache: into a cache whose cache.json is a list": ("data cache @music --out @cache_list", "another dataset", "delete"),
    "data cache: out is a file": ("data cache @music --out @good.wav", "--out", "good.wav", "folder"),
    "data cache: out below a file": ("data cache @music --out @good.wav/cache", "good.wav/cache"),
    "data cache: no clips": ("data cache toy --clips 0 --out out", "--clips 0", "at least 1"),
    "data cache: unknown device": ("data cache @music --out out --device banana", "banana", "cpu, cuda"),
    "data cache: three channels": ("data cache @music --out out --channels 3", "--channels", "1, 2"),
    "data cache: two channels into a mono cache": ("data cache @music --out @cache --channels 2", "channels, fingerprint, K", "another --out"),
    "data cache: too many codebooks": ("data cache @music --out out --num_codebooks 99", "num_codebooks 99", "1 to 4"),
    "data cache: codec unknown": ("data cache @music --out out --codec mystery", "'mystery'", "toy, encodec_24khz"),
    # tokenizer.py
    "tokenizer: no file": ("tokenizer", "input"),
    "tokenizer: file missing": ("tokenizer gone.wav out.wav", "gone.wav", "no such file"),
    "tokenizer: zero bytes": ("tokenizer @zero.wav out.wav", "zero.wav", "not readable as audio"),
    "tokenizer: text named .wav": ("tokenizer @text.wav out.wav", "text.wav", "not readable as audio"),
    "tokenizer: noise named .wav": ("tokenizer @noise.wav out.wav", "noise.wav", "not readable as audio"),
    "tokenizer: wav of a header alone": ("tokenizer @none.wav out.wav", "none.wav", "no audio"),
    "tokenizer: flac that claims 50 days": ("tokenizer @endless.flac out.wav", "endless.flac", "not readable as audio"),
    "tokenizer: a sample rate of 3 Hz": ("tokenizer @rate3.wav out.wav", "rate3.wav", "3 Hz"),
    "tokenizer: a rate that cannot be resampled": ("tokenizer @prime.wav out.wav", "prime.wav", "999983 Hz"),
    "tokenizer: samples not finite": ("tokenizer @nan.wav out.wav", "nan.wav", "not finite"),
    "tokenizer: output is the input": ("tokenizer @good.wav good.wav", "good.wav", "another"),
    "tokenizer: output of an unknown kind": ("tokenizer @good.wav out.xyz", "out.xyz", ".wav, .flac"),
    "tokenizer: output into a missing folder": ("tokenizer @good.wav no/such/out.wav", "no/such/out.wav", "cannot be written"),
    "tokenizer: codec is a pickle": ("tokenizer @good.wav out.wav --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "tokenizer: codec is a pickle in a zip": ("tokenizer @good.wav out.wav --codec @pickle_zip.pt", "pickle_zip.pt", "not a codec file"),
    "tokenizer: codec cut": ("tokenizer @good.wav out.wav --codec @cut.pt", "cut.pt", "damaged"),
    "tokenizer: codec is a folder": ("tokenizer @good.wav out.wav --codec @empty_folder", "empty_folder", "no codec in this folder"),
    "tokenizer: codec is a list": ("tokenizer @good.wav out.wav --codec @codec_list", "codec_list", "not a codec file"),
    "tokenizer: codec of another format": ("tokenizer @good.wav out.wav --codec @codec_format", "codec_format", "'other'"),
    "tokenizer: codec without config": ("tokenizer @good.wav out.wav --codec @codec_no_config", "codec_no_config", "damaged"),
    "tokenizer: codec without weights": ("tokenizer @good.wav out.wav --codec @codec_no_state", "codec_no_state", "damaged"),
    "tokenizer: codec with a broken config": ("tokenizer @good.wav out.wav --codec @codec_bad_config", "codec_bad_config", "damaged"),
    "tokenizer: codec with numbers for weights": ("tokenizer @good.wav out.wav --codec @codec_bad_state", "codec_bad_state", "damaged"),
    "tokenizer: codec of other shapes": ("tokenizer @good.wav out.wav --codec @codec_shapes", "codec_shapes", "do not fit"),
    "tokenizer: codec is a run": ("tokenizer @good.wav out.wav --codec @run/best.pt", "best.pt", "not a codec file"),
    "tokenizer: no codebooks": ("tokenizer @good.wav out.wav --num_codebooks 0", "num_codebooks 0", "1 to 4"),
    "tokenizer: three channels": ("tokenizer @good.wav out.wav --channels 3", "--channels", "1, 2"),
    "tokenizer: unknown device": ("tokenizer @good.wav out.wav --device banana", "banana", "cpu, cuda"),
    "tokenizer: no GPU": ("tokenizer @good.wav out.wav --device cuda", "--device cuda", "--device cpu"),
    "tokenizer fit: no dataset": ("tokenizer fit --out c.pt", "--dataset"),
    "tokenizer fit: unknown flag": ("tokenizer fit --dataset toy --out c.pt --stepps 3", "--stepps"),
    "tokenizer fit: no steps": ("tokenizer fit --dataset toy --out c.pt --steps 0", "--steps 0", "at least 1"),
    "tokenizer fit: learning rate nan": ("tokenizer fit --dataset toy --out c.pt --lr nan", "--lr nan", "more than 0"),
    "tokenizer fit: learning rate inf": ("tokenizer fit --dataset toy --out c.pt --lr inf", "--lr inf", "more than 0"),
    "tokenizer fit: commitment nan": ("tokenizer fit --dataset toy --out c.pt --commitment nan", "--commitment nan", "at least 0"),
    "tokenizer fit: segment nan": ("tokenizer fit --dataset toy --out c.pt --segment_seconds nan", "--segment_seconds nan"),
    "tokenizer fit: segment inf": ("tokenizer fit --dataset toy --out c.pt --segment_seconds inf", "--segment_seconds inf"),
    "tokenizer fit: segment longer than a clip": ("tokenizer fit --dataset toy --out c.pt --segment_seconds 9", "--segment_seconds 9",
                                                  "1.6 s"),
    "tokenizer fit: one code": ("tokenizer fit --dataset toy --out c.pt --card 1", "--card 1", "at least 2"),
    "tokenizer fit: more codes than latents": ("tokenizer fit --dataset toy --out c.pt --card 60000", "--card 60000", "16000"),
    "tokenizer fit: stride zero": ("tokenizer fit --dataset toy --out c.pt --ratios 0 16", "--ratios 0 16", "at least 1"),
    "tokenizer fit: more compression than channels": ("tokenizer fit --dataset toy --out c.pt --residual_layers 1 --compress 64",
                                                      "--compress 64", "16"),
    "tokenizer fit: negative residual layers": ("tokenizer fit --dataset toy --out c.pt --residual_layers -1", "--residual_layers -1"),
    "tokenizer fit: negative seed": ("tokenizer fit --dataset toy --out c.pt --seed -1", "--seed -1", "at least 0"),
    "tokenizer fit: autoencoder share nan": ("tokenizer fit --dataset toy --out c.pt --autoencoder_share nan", "--autoencoder_share nan"),
    "tokenizer fit: unknown device": ("tokenizer fit --dataset toy --out c.pt --device banana", "banana", "cpu"),
    "tokenizer fit: dataset missing": ("tokenizer fit --dataset no/such --out c.pt", "no/such", "no such folder"),
    "tokenizer fit: dataset without audio": ("tokenizer fit --dataset @no_audio --out c.pt", "no_audio", ".wav"),
    "tokenizer fit: out is there": ("tokenizer fit --dataset toy --out @good.wav", "good.wav", "exists already"),
    "tokenizer fit: out in a missing folder": ("tokenizer fit --dataset toy --out no/such/c.pt", "no/such", "no folder"),
    "tokenizer fit: checkpoint is a pickle": ("tokenizer fit --dataset toy --out @fit_pickle", "fit_pickle.fit", "not a checkpoint"),
    "tokenizer fit: checkpoint cut": ("tokenizer fit --dataset toy --out @fit_cut", "fit_cut.fit", "damaged"),
    "tokenizer fit: checkpoint without flags": ("tokenizer fit --dataset toy --out @fit_keys", "fit_keys.fit", "damaged"),
    "tokenizer fit: checkpoint with a list for flags": ("tokenizer fit --dataset toy --out @fit_args", "fit_args.fit", "damaged"),
    # generate.py: flags
    "generate: no run": ("generate --prompt x", "--run"),
    "generate: unknown flag": ("generate --run @model --prompt x --length 3", "--length"),
    "generate: run missing": ("generate --run no/such --prompt x", "no/such", "give the folder of a run"),
    "generate: run without best.pt": ("generate --run @no_best --prompt x", "no_best", "no best.pt"),
    "generate: nothing to generate": ("generate --run @model", "nothing to generate", "--prompt"),
    "generate: no samples": ("generate --run @model --prompt x --n 0", "--n 0", "at least 1"),
    "generate: negative samples": ("generate --run @model --prompt x --n -3", "--n -3", "at least 1"),
    "generate: seconds zero": ("generate --run @model --prompt x --seconds 0", "--seconds 0", "more than 0"),
    "generate: seconds nan": ("generate --run @model --prompt x --seconds nan", "--seconds nan", "more than 0"),
    "generate: seconds inf": ("generate --run @model --prompt x --seconds inf", "--seconds inf", "at most 3600"),
    "generate: seconds huge": ("generate --run @model --prompt x --seconds 99999", "--seconds 99999", "at most 3600"),
    "generate: stride zero": ("generate --run @model --prompt x --seconds 2 --stride 0", "--stride 0", "less than the window"),
    "generate: stride nan": ("generate --run @model --prompt x --seconds 2 --stride nan", "--stride nan", "less than the window"),
    "generate: stride inf": ("generate --run @model --prompt x --seconds 2 --stride inf", "--stride inf", "less than the window"),
    "generate: stride of the window": ("generate --run @model --prompt x --seconds 2 --stride 1", "--stride 1", "than the window of 1 s"),
    "generate: stride longer than the window": ("generate --run @model --prompt x --stride 99", "--stride 99", "window of 1 s"),
    "generate: negative temperature": ("generate --run @model --prompt x --temperature -1", "temperature -1", "between 0 and 100"),
    "generate: top_p over 1": ("generate --run @model --prompt x --top_p 2", "top_p 2", "between 0 and 1"),
    "generate: top_k negative": ("generate --run @model --prompt x --top_k -1", "top_k -1", "between 0 and"),
    "generate: guidance nan": ("generate --run @model --prompt x --cfg nan", "cfg nan", "between"),
    "generate: seed too large": ("generate --run @model --prompt x --seed 99999999999999999999999", "--seed 999", "between 0 and"),
    "generate: unknown device": ("generate --run @model --prompt x --device banana", "banana", "cpu, cuda"),
    "generate: device with a bad number": ("generate --run @model --prompt x --device cpu:x", "cpu:x", "cpu, cuda"),
    "generate: no GPU": ("generate --run @model --prompt x --device cuda", "--device cuda", "--device cpu"),
    "generate: device of no use": ("generate --run @model --prompt x --device meta", "meta", "cpu, cuda"),
    "generate: codec of another fingerprint": ("generate --run @model --prompt x --codec @codec_other", "codec_other", "give that codec"),
    "generate: codec of fewer codebooks": ("generate --run @model --prompt x --codec @codec_K2", "num_codebooks 4", "1 to 2"),
    "generate: codec missing": ("generate --run @model --prompt x --codec gone.pt", "gone.pt", "no such file"),
    "generate: codec is a pickle": ("generate --run @model --prompt x --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "generate: out is a file": ("generate --run @model --prompt x --out @good.wav", "--out", "good.wav", "cannot be written"),
    "generate: out below a file": ("generate --run @model --prompt x --out @good.wav/more", "good.wav/more", "cannot be written"),
    "generate: out read-only": ("generate --run @model --prompt x --out @empty_folder", "empty_folder", "cannot be written"),
    # generate.py: what it reads
    "generate: text for a model without": ("generate --run @mute --prompt x", "without text", "--unconditional"),
    "generate: prompt of white space": ("generate --run @model --prompt $blank", "--prompt", "no text", "--unconditional"),
    "generate: prompt empty": ("generate --run @model --prompt $empty", "--prompt", "no text", "--unconditional"),
    "generate: prompts file missing": ("generate --run @model --prompts gone.txt", "gone.txt", "No such file"),
    "generate: prompts file empty": ("generate --run @model --prompts @empty.txt", "empty.txt", "no text"),
    "generate: prompts file binary": ("generate --run @model --prompts @binary.txt", "binary.txt", "utf-8"),
    "generate: prompts is a folder": ("generate --run @model --prompts @empty_folder", "empty_folder", "directory"),
    "generate: continue a missing file": ("generate --run @model --unconditional --continue gone.wav",
                                          "--continue gone.wav", "no such file"),
    "generate: continue zero bytes": ("generate --run @model --unconditional --continue @zero.wav", "zero.wav", "not readable as audio"),
    "generate: continue a header alone": ("generate --run @model --unconditional --continue @none.wav", "none.wav", "no audio"),
    "generate: continue samples not finite": ("generate --run @model --unconditional --continue @nan.wav", "nan.wav", "not finite"),
    "generate: continue text named .wav": ("generate --run @model --unconditional --continue @text.wav", "text.wav", "not readable"),
    "generate: continue longer than seconds": ("generate --run @model --unconditional --continue @good.wav --seconds 1", "1.00 s",
                                               "--seconds must be longer"),
    **{f"generate: best.pt {what}": (f"generate --run @best_{name} --prompt x", f"best_{name}", says) for name, what, says in (
        ("empty", "empty", "not a model"), ("cut", "cut", "not a model"), ("text", "is text", "not a model"),
        ("pickle", "is a pickle", "not a model"), ("pickle_zip", "is a pickle in a zip", "not a model"),
        ("list", "is a list", "not a model"), ("other_format", "of another format", "not a model"),
        ("no_model", "without weights", "not a model"),
        ("no_codec", "without codec", "not a model"), ("no_assets", "without vocabulary", "not a model"),
        ("shapes", "of other shapes", "not a model"), ("bad_pieces", "with a broken vocabulary", "not a model"),
        ("bad_config", "with a broken config", "not a model"), ("bad_sampling", "with bad sampling", "not a model"),
        ("bad_window", "with a window of nothing", "not a model"), ("other_card", "of more codes than the codec", "256"))},
    # metrics.py, conditioning.py, analyser.py
    "metrics: run missing": ("metrics --run no/such", "no/such", "no best.pt"),
    "metrics: run is a pickle": ("metrics --run @best_pickle", "best_pickle", "not a model"),
    "metrics: run without text": ("metrics --run @mute --n 1", "without text"),
    "metrics: no clips": ("metrics --run @model --n 0", "--n 0", "at least 1"),
    "metrics: no clips of a codec": ("metrics --n 0", "--n 0", "at least 1"),
    "metrics: negative seed": ("metrics --n 1 --seed -1", "--seed -1", "at least 0"),
    "metrics: top_p over 1": ("metrics --run @model --top_p 0.5 2", "top_p 2", "between 0 and 1"),
    "metrics: temperature is a word": ("metrics --run @model --temperature hot", "--temperature", "'hot'"),
    "metrics: unknown split": ("metrics --run @model --split test", "'test'", "heldout"),
    "metrics: codec unknown": ("metrics --codec mystery", "'mystery'", "toy, encodec_24khz"),
    "metrics: codec is a pickle": ("metrics --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "generate: melody for a model without": ("generate --run @model --prompt x --melody @good.wav", "--melody", "good.wav", "without melody"),
    "generate: style for a model without": ("generate --run @model --prompt x --style @good.wav", "--style", "good.wav", "without style"),
    "generate: text for a model of melodies": ("generate --run @tune --prompt x", "without text", "--unconditional"),
    "generate: melody missing": ("generate --run @tune --melody gone.wav", "--melody gone.wav", "no such file"),
    "generate: melody silent": ("generate --run @tune --melody @silent.wav", "--melody", "silent.wav", "it is silent"),
    "generate: melody of one sample": ("generate --run @tune --melody @one.wav", "--melody", "one.wav", "at least 0.512 s"),
    "generate: melody is text": ("generate --run @tune --melody @text.wav", "--melody", "text.wav", "not readable as audio"),
    "generate: style of one sample": ("generate --run @tune --style @one.wav", "--style", "one.wav", "at least"),
    "generate: three styles for two melodies": ("generate --run @tune --melody a b --style a b c", "2 of melody, 3 samples", "as many"),
    "generate: stems without demucs": ("generate --run @tune --melody @good.wav --melody_stems", "--melody_stems", "pip install demucs"),
    "generate: double guidance nan": ("generate --run @tune --melody @good.wav --cfg_style nan", "cfg_style nan", "between"),
    "data cache: stems without demucs": ("data cache @music --out out --melody_stems", "--melody_stems", "pip install demucs"),
    "conditioning: nothing": ("conditioning --run @tune", "--melody", "--style"),
    "conditioning: style without a run": ("conditioning --style @good.wav", "--run"),
    "conditioning: style of a run without": ("conditioning --style @good.wav --run @model", "model", "without style"),
    "conditioning: melody missing": ("conditioning --melody gone.wav", "gone.wav", "not readable as audio"),
    "conditioning: no text": ("conditioning", "text"),
    "conditioning: run missing": ("conditioning organ --run no/such", "no/such", "give the folder of a run"),
    "conditioning: run is a pickle": ("conditioning organ --run @best_pickle", "best_pickle", "not a model"),
    "conditioning: run cut": ("conditioning organ --run @best_cut", "best_cut", "not a model"),
    "conditioning: run without text": ("conditioning organ --run @mute", "mute", "without text"),
    "conditioning: broken vocabulary": ("conditioning organ --run @best_bad_pieces", "best_bad_pieces", "not a model"),
    "analyser: file missing": ("analyser gone.wav", "gone.wav", "no such file"),
    "analyser: text named .wav": ("analyser @text.wav", "text.wav", "not readable as audio"),
    "analyser: samples not finite": ("analyser @nan.wav", "nan.wav", "not finite"),
    "analyser: one sample": ("analyser @one.wav", "one.wav", "at least 0.64 s"),
    "analyser: a rate that cannot be resampled": ("analyser @prime.wav", "prime.wav", "999983 Hz"),
    "analyser: a sample rate of 3 Hz": ("analyser @rate3.wav", "rate3.wav", "3 Hz"),
    "analyser: no clips": ("analyser --clips 0", "--clips 0", "at least 1"),
}

SKIPPED = {                                                          # in what is printed, the last @NAME stands once
    **{f"data check: {what}": (f"data check @music+{name}", "1 skipped", reason) for name, what, reason in (
        ("zero.wav", "zero bytes", "zero bytes"), ("head.wav", "wav cut in its header", "not readable as audio"),
        ("text.wav", "text named .wav", "not readable as audio"), ("noise.wav", "noise named .wav", "not readable as audio"),
        ("none.wav", "wav of a header alone", "absurd header"), ("endless.flac", "flac that claims 50 days", "absurd header"),
        ("rate0.wav", "a sample rate of 0 Hz", "not readable as audio"), ("rate3.wav", "a sample rate of 3 Hz", "absurd header"),
        ("rate4e9.wav", "a sample rate of 4e9 Hz", "not readable as audio"), ("cover.jpg", "a picture", "not audio by its name"),
        ("locked.wav", "a file that may not be read", "not readable as audio"))},
    **{f"data check: {what}": (f"data check @music+{name}.json", "1 with a problem", f"{name}.wav") for name, what in (
        ("broken", "JSON cut off"), ("list", "JSON is a list"), ("deep", "JSON of 100,000 brackets"), ("garbage", "JSON is binary"),
        ("huge", "JSON with a number of 400 digits"), ("types", "JSON of wrong types"), ("words", "JSON caption of 100,000 words"))},
    "data check: caption of 100,000 words": ("data check @music+words.txt", "1 with a problem", "words.wav"),
    "data check: links in a circle, to nothing, to a song": ("data check @links", "3 skipped", "2 missing", "dangling.wav", "self.wav",
                                                              "1 same file twice", "twin.wav"),
    **{f"data check: manifest {what}": (f"data check @music+good.wav+{name}.jsonl/{name}.jsonl", "1 skipped", reason)
       for name, what, reason in (
        ("away", "with a path to ../..", "not audio by its name"), ("folder", "with a folder", "not audio by its name"),
        ("gone", "with a missing file", "gone.wav"), ("double", "with a file twice", "same file twice"),
        ("broken", "with a line that is no JSON", "manifest line"))},
    "data check: manifest with paths that are none": ("data check @music+good.wav+odd.jsonl/odd.jsonl", "5 skipped", "3 manifest line",
                                                      "2 missing"),
    "data check: manifest that lies about seconds": ("data check @music+good.wav+lies.jsonl/lies.jsonl", "1 with a problem",
                                                     "duration differs"),
    "data check: manifest with a number of 400 digits": ("data check @music+good.wav+huge.jsonl/huge.jsonl", "1 with a problem",
                                                         "duration differs"),
    "data cache: samples not finite": ("data cache @music+nan.wav --out out", "1 cannot be encoded", "nan.wav"),
    "data cache: infinite samples": ("data cache @music+inf.wav --out out", "1 cannot be encoded", "inf.wav"),
    "data cache: samples of 1e30": ("data cache @music+loud.wav --out out", "1 cannot be encoded", "loud.wav"),
    "data cache: a rate that cannot be resampled": ("data cache @music+prime.wav --out out", "1 cannot be encoded", "prime.wav"),
    "data cache: manifest that lies about the rate": ("data cache @music+prime.wav+rate_lies.jsonl/rate_lies.jsonl --out out",
                                                      "1 cannot be encoded", "prime.wav"),
    "data cache: flac that claims 6 days": ("data cache @music+long.flac --out out", "1 cannot be encoded", "long.flac"),
    "train: zero bytes among songs": ("train --dataset @music+zero.wav", "1 zero bytes", "zero.wav"),
    "train: samples not finite among songs": ("train --dataset @music+nan.wav --valid_samples 6 --batch_size 6", "not finite", "nan.wav"),
    "tokenizer fit: zero bytes among songs": (
        "tokenizer fit --dataset @music+zero.wav --out c.pt --steps 3 --segment_seconds 0.3 --batch_size 4 --dim 8 --filters 2 --card 8",
        "skipped", "zero.wav"),
    "tokenizer fit: samples not finite among songs": (
        "tokenizer fit --dataset @music+nan.wav --out c.pt --steps 3 --segment_seconds 0.3 --batch_size 4 --dim 8 --filters 2 --card 8",
        "skipped", "nan.wav"),
}

FINE = {                                                             # the words stand in what is printed
    **{f"data cache: {what}": (f"data cache @music+{name} --out out", "3 files") for name, what in (
        ("silent.wav", "silence"), ("one.wav", "one sample"), ("half.wav", "wav cut in its samples"), ("mp3.wav", "MP3 named .wav"),
        ("long.wav", "wav that claims 18 hours"), ("u8.wav", "8 bits"), ("pcm24.wav", "24 bits"), ("double.wav", "64-bit floats"),
        ("seven.wav", "7 channels"))},
    **{f"data check: {what}": (f"data check @music+{name}", "0 with a problem", "files        3,") for name, what in (
        ("nan.json", "JSON with NaN"), ("twice.json", "JSON with a name twice"), ("surrogate.json", "JSON with half a character"),
        ("nul.json", "JSON with NUL"), ("blank.txt", "caption of white space"), ("binary.txt", "caption is binary"),
        ("rtl.txt", "caption from right to left"), ("emoji.txt", "caption of emoji"), ("latin.txt", "caption in Latin-1"),
        ("nul.txt", "caption with NUL"), ("empty.txt", "caption of zero bytes"))},
    "data check: manifest with a byte order mark": ("data check @music+good.wav+bom.jsonl/bom.jsonl", "0 skipped"),
    "data check: manifest of wrong types": ("data check @music+good.wav+wrong_types.jsonl/wrong_types.jsonl", "0 skipped"),
    "train: songs of one and of seven channels in stereo": ("train --dataset @music+seven.wav --channels 2", "finished"),
    "train: odd captions": ("train --dataset @music+surrogate.json+nul.txt+emoji.txt+rtl.txt+binary.txt+words.txt", "finished"),
    "train: one caption of 1,600 words": ("train --dataset @long_caption", "finished"),
    "train: odd audio": ("train --dataset @music+silent.wav+one.wav+seven.wav+u8.wav+double.wav+pcm24.wav", "finished"),
    "tokenizer: silence": ("tokenizer @silent.wav out.wav", "SI-SNR"), "tokenizer: one sample": ("tokenizer @one.wav out.wav", "SI-SNR"),
    "tokenizer: 7 channels in stereo": ("tokenizer @seven.wav out.wav --channels 2", "SI-SNR"),
    "tokenizer: one sample in stereo": ("tokenizer @one.wav out.wav --channels 2", "codes [1, 8, 1]"),
    "tokenizer: 7 channels": ("tokenizer @seven.wav out.wav", "SI-SNR"),
    "tokenizer: 64-bit floats": ("tokenizer @double.wav out.wav", "SI-SNR"),
    "generate: prompt of 100,000 words": ("generate --run @model --prompt $long", "wrote"),
    "generate: prompt with NUL": ("generate --run @model --prompt $nul", "wrote"),
    "generate: prompt of emoji": ("generate --run @model --prompt $emoji", "wrote"),
    "generate: prompt from right to left": ("generate --run @model --prompt $rtl", "wrote"),
    "generate: prompt that is no UTF-8": ("generate --run @model --prompt $surrogate", "wrote"),
    "generate: continue one sample": ("generate --run @model --unconditional --continue @one.wav", "wrote"),
    "generate: continue 7 channels": ("generate --run @model --unconditional --continue @seven.wav --seconds 1.1", "wrote"),
    "generate: continue silence": ("generate --run @model --unconditional --continue @silent.wav --seconds 1.1", "wrote"),
    "generate: names in the folder that are no numbers": ("generate --run @model --unconditional --out @odd_names", "wrote"),
    "generate: a melody and a style": ("generate --run @tune --melody @good.wav --style @good.wav --cfg 2", "wrote"),
    "generate: a melody that begins again": ("generate --run @tune --melody @good.wav --seconds 2.5", "wrote"),
    "generate: style of silence": ("generate --run @tune --style @silent.wav", "wrote"),
    "train: an old cache with text alone": ("train --cache @cache_no_chroma", "finished"),
    "conditioning: text with NUL": ("conditioning $nul --run @model", "pieces"),
    "conditioning: text that is no UTF-8": ("conditioning $surrogate --run @model", "pieces"),
    "conditioning: text of nothing": ("conditioning $empty --run @model", "pieces"),
    "analyser: silence": ("analyser @silent.wav", analyser.NONE),
    "analyser: 7 channels": ("analyser @seven.wav", "instrument"),
}


def locked(patch) -> None:
    """As if a song were another user's: root may read everything."""
    original = soundfile.info

    def info(path):
        if "locked" in path:
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    patch.setattr(soundfile, "info", info)


def read_only(patch) -> None:
    """As if nothing could be written: root may write everywhere."""
    patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)


PATCHES = {"data check: a file that may not be read": locked, "train: run folder read-only": read_only,
           "generate: out read-only": read_only}


# ---------------------------------------------------------------------------------------------------------------------
# running a case


def made(name: str, place: Path, shared: Path) -> str:
    """Makes a MATERIAL, a file of FILES or a folder of songs in `place`; returns its path, with what follows a slash."""
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


def listing(place: Path) -> dict:
    """Every file below: {name: sha256}; a link counts by where it points."""
    return {str(p.relative_to(place)): os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(place.rglob("*")) if p.is_symlink() or p.is_file()}


def run(name: str, command: str, place: Path, shared: Path) -> tuple:
    """(exit code, stdout, stderr, files before, files after) of a case, run within the folder `place`."""
    program, *words = shlex.split(command)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned, \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(place)
        patch.delenv("DEBUG", raising=False)
        patch.setattr(sys, "argv", [f"{program}.py"])
        patch.setattr(flags, "machine_flops", lambda args: 1e9)   # measuring it takes seconds
        with contextlib.redirect_stdout(io.StringIO()):
            argv = [made(w[1:], place, shared) if w[0] == "@" else TEXTS[w[1:]] if w[0] == "$" else w for w in words]
        PATCHES.get(name, lambda patch: None)(patch)
        before = listing(place)
        try:
            code = PROGRAMS[program].main([*FIRST.get(program, "").split(), *argv])
        except SystemExit as stopped:                                # of argparse
            code = stopped.code
        for each in warned:                                          # what a user sees as lines on stderr
            print(warnings.formatwarning(each.message, each.category, each.filename, each.lineno), file=err)
    out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode(), before, listing(place)


def the_line(err: str) -> str:
    """The only line of stderr; before it stands at most what argparse says on usage."""
    lines = err.splitlines()
    while lines and lines[0].startswith(("usage:", " ")):
        lines.pop(0)
    assert len(lines) == 1, f"{len(lines)} lines: {err[-500:]}"
    return lines[0]


def check_refused(ending: tuple, command: str, *says: str) -> str:
    """Exit code 2, one line of a size to read, every file as before; none new, but for a run that began. Returns the line."""
    code, _, err, before, after = ending
    line = the_line(err)
    module = PROGRAMS[command.split()[0]].__name__                   # evaluate.metrics says "evaluate.metrics: ..."
    names = (f"{command.split()[0]}.py", f"{module}:", f"python -m {module}: error")
    assert code == 2 and line.startswith(names) and len(line) < 1000, (code, line)
    assert all(word in line for word in says), f"{says} not all in: {line}"
    assert before.items() <= after.items(), f"changed: {set(before.items()) - set(after.items())}"
    assert after.keys() - before.keys() <= {"out/config.json", "out/.lock"}, f"written: {after.keys() - before.keys()}"
    return line


def check_fine(ending: tuple, command: str, *says: str) -> str:
    """Exit code 0, the words printed, every file as before; new ones may stand beside. Returns the line with the first word."""
    code, out, err, before, after = ending
    assert code == 0, (code, err)
    assert all(word in out + err for word in says), f"{says} not all in: {out}{err}"
    assert before.items() <= after.items(), f"changed: {set(before.items()) - set(after.items())}"
    return next(line for line in (err + out).splitlines() if says[0] in line)


def check_skipped(ending: tuple, command: str, *says: str) -> str:
    """As fine; and what was skipped (the last word) is named once. Returns the line that names it."""
    check_fine(ending, command, *says)
    lines = [line for line in (ending[2] + ending[1]).splitlines() if says[-1] in line]
    assert len(lines) == 1, lines
    return lines[0]


CASES = {name: (check, *case) for check, cases in ((check_refused, REFUSED), (check_skipped, SKIPPED), (check_fine, FINE))
         for name, case in cases.items()}


@pytest.fixture(scope="module")
def shared():
    with tempfile.TemporaryDirectory() as folder:
        yield prepare(Path(folder))


@pytest.mark.parametrize("name", CASES)
def test_case(name, shared):
    check, command, *says = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        ending = run(name, command, Path(place), shared)
    assert "owned" not in ending[-1], "a foreign pickle was run"
    check(ending, command, *says)


def test_the_pickles_are_real(tmp_path, monkeypatch):
    """Loaded carelessly, each of them makes the file that no case may leave behind."""
    monkeypatch.chdir(tmp_path)
    for load in (lambda: pickle.loads(EVIL), lambda: torch.load(io.BytesIO(EVIL_ZIP), weights_only=False)):
        load()
        (tmp_path / "owned").unlink()


def main(word: str = "") -> int:
    """Prints how each case that holds `word` ends. Exit code 1 if one ends otherwise than it should."""
    wrong, names = 0, [name for name in CASES if word in name]
    width = max(map(len, names), default=0)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        shared.mkdir()
        prepare(shared)
        for i, name in enumerate(names):
            check, command, *says = CASES[name]
            place = Path(folder, str(i))
            place.mkdir()
            try:
                ending = run(name, command, place, shared)
                shown = f"{ending[0]}  {check(ending, command, *says)}"
            except Exception as error:                               # a traceback, or another ending than the table's
                wrong += 1
                shown = f"WRONG  {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name:<{width}} | {shown.replace(f'{place}/', '')}", flush=True)
    print(f"{len(names)} cases, {wrong} of them end otherwise than they should")
    return int(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
