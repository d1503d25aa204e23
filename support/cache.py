"""The token cache: every file of a dataset encoded once, so that training touches neither audio nor codec.

    DIR/cache.json               settings: dataset, codec, how many shards; written first
        shard_00000.npy          codes [frames, K] uint16, file after file, of about an hour of audio
        shard_00000.chroma.npy   their chroma [frames, 12] float16, 187 bytes a second; old caches lack it
        shard_00000.json         their entries, written last

An interrupted cache goes on after its last whole shard. A feature (support/chroma.py has the only one) is
what a condition needs of the audio beside the codes.

Legend: K codebooks, T frames, C channels, N samples.
"""

import copy
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.common import output_folder, write_atomically, write_json
from support.scan import MAX_SECONDS, READ_ERRORS, Entry, scan_dataset, skip_lines
from support.scan import split_by_hash, split_entries, valid_fraction

SHARD_SECONDS = 3600  # audio in a shard: what an interruption costs at most
WINDOW_SECONDS = 10  # of a file that are encoded at once
SILENT_PEAK = 1e-4  # 80 dB below full scale
CONTEXT_SECONDS = 2  # of audio on both sides: the codec's convolutions and LSTM forget the cut by then


@dataclass
class CachedEntry(Entry):
    """A file of a cache."""
    shard: int = 0
    offset: int = 0  # of its first frame in the shard
    frames: int = 0
    features: dict = field(default_factory=dict)  # name -> (offset of its first frame there, how many)
    silent: bool = False  # in what the codec takes
    error: str | None = None  # why it could not be encoded

    def to_row(self) -> dict:
        """Plain data for the shard's JSON."""
        row = asdict(self)
        error = row.pop("error")
        for name, (offset, frames) in row.pop("features").items():
            row |= {f"{name}_offset": offset, f"{name}_frames": frames}
        return row | {"error": error}

    @classmethod
    def of_row(cls, row: dict) -> "CachedEntry":
        """Reverses `to_row`. Errors: TypeError, KeyError if it is not one."""
        row, features = dict(row), {}
        for key in [key for key in row if key.endswith("_frames")]:
            name = key.removesuffix("_frames")
            features[name] = row.pop(f"{name}_offset"), row.pop(key)
        return cls(**row, features=features)


def shard_path(folder: str, number: int, suffix: str) -> Path:
    """A file of a shard. suffix: npy, json, or that of a feature such as chroma.npy."""
    return Path(folder, f"shard_{number:05d}.{suffix}")


# ------------------------------------------------------------------------------------------------------------
# reading


def read_index(folder: str) -> tuple[dict, list[CachedEntry]]:
    """(settings, entries) of a finished cache. Errors: ValueError if it is none, or one of toy clips."""
    if not Path(folder, "cache.json").is_file():
        raise ValueError(f"no token cache in {folder!r}: make one with `python data.py cache`")
    entries = []
    try:
        settings = dict(json.loads(Path(folder, "cache.json").read_bytes()))
        if missing := {"shards", "K", "dataset", "codec", "fingerprint"} - settings.keys():
            raise ValueError(f"cache.json lacks {', '.join(sorted(missing))}")
        for number in range(settings["shards"]):
            rows = json.loads(shard_path(folder, number, "json").read_bytes())
            shard = [CachedEntry.of_row(row) for row in rows]
            check_codes(np.load(shard_path(folder, number, "npy"), mmap_mode="r"), shard, settings["K"])
            entries += shard
        if not entries:
            raise ValueError("no files")
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"token cache {folder!r} is unfinished or damaged ({error!r}): "
                         "run the same `python data.py cache` again, or delete it") from None
    if settings["dataset"] == "toy":
        raise ValueError(f"token cache {folder!r} holds toy clips, which are made fresh and need no cache: "
                         "give --dataset toy without --cache")
    return settings, entries


def check_codes(codes: np.ndarray, entries: list[CachedEntry], K: int) -> None:
    """Errors: ValueError, TypeError for codes [frames, K] of a shard that are not those of its entries."""
    last = entries[-1]
    if codes.dtype != np.uint16 or codes.shape != (last.offset + last.frames, K):
        raise ValueError(f"codes of {codes.dtype} {codes.shape}")
    for e in entries:
        inside = 0 <= e.offset <= e.offset + e.frames <= len(codes)
        if not (inside and 0 < e.seconds < MAX_SECONDS and isinstance(e.meta, dict)):
            kind = type(e.meta).__name__
            raise ValueError(f"{e.frames} frames at {e.offset}, {e.seconds} s, a {kind} of metadata")


def check_codec(folder: str, settings: dict, codec) -> None:
    """Errors: ValueError unless the cache was made by this codec with at least its number of codebooks."""
    alike = copy.copy(codec)
    alike.K = settings["K"]  # a fingerprint covers K: compare at the cache's own
    if codec.K <= settings["K"] and alike.fingerprint == settings["fingerprint"]:
        return
    channels, fingerprint = settings.get("channels", 1), settings["fingerprint"][:12]
    raise ValueError(
        f"token cache {folder!r} holds {settings['K']} codebooks of codec {settings['codec']} "
        f"(channels {channels}, fingerprint {fingerprint}), not {codec.K} of {codec.name} "
        f"(channels {codec.channels}, {alike.fingerprint[:12]}): use that codec and --channels, "
        "or make a cache with these")


def check_feature(folder: str, settings: dict, entries: list[CachedEntry], feature) -> None:
    """Errors: ValueError for a cache that cannot give this feature."""
    cache, again = f"token cache {folder!r}", f"make another with `python data.py cache{feature.cache_flags}`"
    if mismatch := feature.mismatch(settings):
        raise ValueError(f"{cache} holds {mismatch}, or {again}")
    for number in range(settings["shards"]):
        path = shard_path(folder, number, f"{feature.name}.npy")
        if not path.is_file():
            raise ValueError(f"{cache} holds no {feature.name}, which {feature.condition} needs: {again}")
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{cache} is damaged ({path.name}: {error}): {again}") from None
        last = max(sum(e.features.get(feature.name, (0, 0))) for e in entries if e.shard == number)
        if rows.dtype != feature.dtype or rows.shape != (last, feature.columns):
            raise ValueError(f"{cache} is damaged ({path.name}: {rows.dtype} {rows.shape}): {again}")


def open_cache(folder: str, codec, valid: str | float, features: dict) -> tuple[list, list, str]:
    """(train, valid, note) of a finished cache made by this codec, with these features. Else a ValueError."""
    settings, entries = read_index(folder)
    for feature in features.values():
        check_feature(folder, settings, entries, feature)
    check_codec(folder, settings, codec)
    note = f"from token cache {folder}"
    if any(entry.split for entry in entries):  # made of two folders
        return *([e for e in entries if e.split == name] for name in ("train", "valid")), note
    if (fraction := valid_fraction(valid)) is None:
        raise ValueError(f"token cache {folder!r} was made without --valid {valid}: give a fraction")
    train_entries, valid_entries, more = split_by_hash(entries, fraction)
    return train_entries, valid_entries, f"{note}; {more}" if more else note


def read_rows(folder: str, shard: int, suffix: str, first: int, count: int) -> np.ndarray:
    """Rows first..first+count-1 of a shard's array: codes [count, K] ("npy"), or a feature ("chroma.npy")."""
    return np.load(shard_path(folder, shard, suffix), mmap_mode="r")[first:first + count]


# ------------------------------------------------------------------------------------------------------------
# writing


def encode_file(entry: Entry, codec, device, features: dict) -> tuple[np.ndarray, dict, bool]:
    """All codes [frames, K] uint16 of a file, {name: array} of its features, and whether it is silent.

    A file is encoded in windows that fit in memory, with real audio around each. They start where a sample of
    the file, one of the codec and a frame coincide: at whole seconds for codecs of 50 or 75 Hz. One window at
    a time, because reading is what holds up a GPU. Errors: ValueError, OSError where it cannot be read."""
    rate, hop = codec.sample_rate, codec.hop
    unit = hop // math.gcd(hop, rate)  # seconds
    context = unit * math.ceil(CONTEXT_SECONDS / unit)
    window = unit * math.ceil(WINDOW_SECONDS / unit)
    codes, arrays = [], {name: [] for name in features}
    start, ended, silent = 0, False, True
    while not ended:
        left = min(start, context)
        wav = entry.read(start - left, left + window + context, codec)  # [C, n]
        silent &= float(wav.abs().max()) < SILENT_PEAK
        window_codes = codec.encode(wav[None].to(device))[0].T.cpu().numpy()  # [T, K]
        first, stop = left * rate // hop, (left + window) * rate // hop
        codes.append(window_codes[first:stop])
        ended = len(window_codes) <= stop
        end = None if ended else (start + window) * rate  # samples
        for name, feature in features.items():
            arrays[name].append(feature.of_window(wav, (start - left) * rate, start * rate, end, rate))
        start += window
    for name, feature in features.items():
        arrays[name] = np.concatenate(arrays[name]).astype(feature.dtype)
    return np.concatenate(codes).astype(np.uint16), arrays, silent


def write_shard(out: str, number: int, entries: list[Entry], codec, device, features: dict) -> None:
    """Encodes the files of a shard and writes it. One that cannot be encoded is listed without codes."""
    nothing = {name: np.zeros((0, feature.columns), feature.dtype) for name, feature in features.items()}
    codes, arrays = [np.zeros((0, codec.K), np.uint16)], {name: [none] for name, none in nothing.items()}
    offset, offsets, rows = 0, dict.fromkeys(features, 0), []
    hidden = not sys.stderr.isatty()
    for entry in tqdm(entries, f"shard {number + 1}", unit="file", leave=False, disable=hidden):
        cached, found = CachedEntry(**vars(entry), shard=number, offset=offset), nothing
        try:
            file_codes, found, cached.silent = encode_file(entry, codec, device, features)
            codes.append(file_codes)
            cached.frames = len(file_codes)
            offset += cached.frames
        except READ_ERRORS as error:
            cached.error = str(error)
        for name, array in found.items():
            arrays[name].append(array)
            cached.features[name] = offsets[name], len(array)
            offsets[name] += len(array)
        rows.append(cached.to_row())
    write_array(shard_path(out, number, "npy"), np.concatenate(codes))
    for name, parts in arrays.items():
        write_array(shard_path(out, number, f"{name}.npy"), np.concatenate(parts))
    write_json(shard_path(out, number, "json"), rows, indent=None)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file whole or not at all."""
    write_atomically(path, lambda file: np.save(file, array))


def begin_cache(out: str, settings: dict) -> None:
    """Begins the cache in `out`, or goes on with it. Errors: ValueError if that holds something else."""
    path = Path(out, "cache.json")
    if path.is_file():
        try:
            begun = {"channels": 1} | dict(json.loads(path.read_bytes()))  # older caches are mono
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged: delete {out}, or give another --out") from None
        if begun != settings:
            differ = ", ".join(name for name in settings if settings[name] != begun.get(name))
            raise ValueError(f"{out} holds a cache with another {differ}: give another --out, or delete it")
    elif os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"--out {out} holds something else: give a new or an empty folder")
    output_folder(out)
    write_json(path, settings, indent=None)


def make_cache(dataset: str, out: str, codec, valid: str | float = 0.05, device="cpu",
               features: dict | None = None, **scanning) -> None:
    """Encodes every file of a dataset once, into the folder `out`, and says so. Run again, it goes on.

    features: name -> what computes it; scanning: see `scan_dataset`. Errors: ValueError if `out` is in use
    or no file readable."""
    # What there is to encode, and whether it can be
    if dataset == "toy":
        raise ValueError("toy clips are made fresh and need no token cache: "
                         "train with --dataset toy, without --cache")
    if codec.card > 2 ** 16:
        raise ValueError(f"codec {codec.name} has {codec.card} codes, a cache holds 16 bits: "
                         f"take one of at most {2 ** 16}")
    features = features or {}
    for feature in features.values():
        feature.load()  # may be missing
    found = scan_dataset(dataset, **scanning)
    for line in found.notes:
        print(f"note {line}")
    for line in skip_lines(found.skipped):
        print(f"skipped {line}")
    entries = found.entries
    if valid_fraction(valid) is None:  # the cache says which file is of which folder
        train_entries, valid_entries, _ = split_entries(entries, valid, **scanning)
        entries = [replace(e, split="train") for e in train_entries]
        for e in valid_entries:  # both folders may hold the same names
            entries.append(replace(e, split="valid", key=f"valid:{e.key}"))

    # About an hour of audio a shard
    seconds, shards = 0.0, {}
    for entry in entries:
        seconds += entry.seconds
        shards.setdefault(seconds // SHARD_SECONDS, []).append(entry)

    # Begin, or go on after the last whole shard
    listed = json.dumps([(e.key, e.seconds, e.split) for e in entries]).encode()
    settings = {
        "dataset": os.path.abspath(dataset), "codec": codec.name, "channels": codec.channels,
        "fingerprint": codec.fingerprint, "K": codec.K, "files": len(entries),
        "list": hashlib.sha256(listed).hexdigest(), "shards": len(shards)}
    for feature in features.values():
        settings |= feature.settings
    begin_cache(out, settings)
    try:
        for number, shard in enumerate(shards.values()):
            if not shard_path(out, number, "json").is_file():
                write_shard(out, number, shard, codec, device, features)
                print(f"encoded shard {number + 1} of {len(shards)}: {len(shard)} files", flush=True)
    except BaseException:
        print(f"{out} is unfinished: the same command goes on from here", flush=True)
        raise

    # What came of it
    done = read_index(out)[1]
    for line in skip_lines({e.path: f"cannot be encoded: {e.error}" for e in done if e.error}):
        print(f"skipped {line}")
    mixed = " after mixing to mono" if codec.channels == 1 else ""
    for line in skip_lines({e.path: f"silent{mixed}" for e in done if e.silent}):
        print(f"problem {line}")
    frames = sum(e.frames for e in done)
    if frames == 0:
        raise ValueError(f"none of the {len(entries)} files of {dataset!r} can be encoded: {done[0].error}")
    print(f"{out}: {len(entries)} files, {frames} frames of {codec.K} codebooks at {codec.frame_rate:g} Hz, "
          f"{frames * codec.K * 2 / 1e6:.1f} MB")
