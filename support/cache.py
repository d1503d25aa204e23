"""The token cache: every file of a dataset encoded once, so that training touches neither audio nor codec.

    DIR/cache.json               the settings and an entry for every file: swapped in last, in one piece
        shard_00000.npy          codes [frames, K] uint16, file after file, of ten minutes of audio or a file
        shard_00000.chroma.npy   their chroma [frames, 12] float16, 187 bytes a second; old caches lack it
        shard_00000.json         the entries of what was encoded into it, written after its arrays

The arrays of a shard are never changed, and its list follows cache.json. What trains reads no other list, so
it sees a cache as it was or as it is after an update, and nothing between. support/encode.py makes and
updates caches. Old caches have their entries in the shards' lists and none in cache.json. A feature
(support/chroma.py has the only one) is what a condition needs of the audio beside the codes.

Legend: K codebooks, T frames.
"""

import copy
import functools
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from support.scan import MAX_SECONDS, Entry, split_by_hash, valid_fraction


@dataclass
class CachedEntry(Entry):
    """A file of a cache."""
    shard: int = 0
    offset: int = 0  # of its first frame in the shard
    frames: int = 0
    features: dict = field(default_factory=dict)  # name -> (offset of its first frame there, how many)
    silent: bool = False  # in what the codec takes
    error: str | None = None  # why it could not be encoded
    # of the file when it was encoded, to know it again by; old caches do not say
    size: int | None = None  # bytes
    modified: int | None = None  # nanoseconds, as the system counts
    changed: int | None = None  # likewise: its content, its name or its rights, which no program sets back
    said: float | None = None  # its length in seconds, by its header or manifest
    digest: str | None = None  # of its bytes
    sound: str | None = None  # digest of its samples, as the codec takes them

    def to_plain(self) -> dict:
        """Plain data for JSON."""
        plain = asdict(self)
        error = plain.pop("error")
        for name, (offset, frames) in plain.pop("features").items():
            plain |= {f"{name}_offset": offset, f"{name}_frames": frames}
        return plain | {"error": error}

    @classmethod
    def of_plain(cls, plain: dict) -> "CachedEntry":
        """Reverses `to_plain`. Errors: TypeError, KeyError if it is not one."""
        plain, features = dict(plain), {}
        for key in [key for key in plain if key.endswith("_frames")]:
            name = key.removesuffix("_frames")
            features[name] = plain.pop(f"{name}_offset"), plain.pop(key)
        return cls(**plain, features=features)


def shard_path(folder: str, number: int, suffix: str) -> Path:
    """A file of a shard. suffix: npy, json, or that of a feature such as chroma.npy."""
    return Path(folder, f"shard_{number:05d}.{suffix}")


# ------------------------------------------------------------------------------------------------------------
# reading


def read_index(folder: str) -> tuple[dict, list[CachedEntry]]:
    """(settings, entries) of a finished cache. Errors: ValueError if it is none, or one of toy clips."""
    if not Path(folder, "cache.json").is_file():
        raise ValueError(f"no token cache in {folder!r}: make one with `python data.py cache`")
    try:
        settings = read_settings(folder)
        if missing := {"K", "dataset", "codec", "fingerprint"} - settings.keys():
            raise ValueError(f"cache.json lacks {', '.join(sorted(missing))}")
        if "shards" in settings:  # an old cache
            paths = [shard_path(folder, number, "json") for number in range(settings["shards"])]
            settings["entries"] = [plain for path in paths for plain in json.loads(path.read_bytes())]
        entries = [CachedEntry.of_plain(plain) for plain in settings.pop("entries")]
        for number, in_shard in by_shard(entries).items():
            check_entries(in_shard, count_rows(shard_path(folder, number, "npy"), np.uint16, settings["K"]))
        if not entries:
            raise ValueError("no files")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"token cache {folder!r} is unfinished or damaged ({error!r}): "
                         "run the same `python data.py cache` again, or delete it") from None
    if settings["dataset"] == "toy":
        raise ValueError(f"token cache {folder!r} holds toy clips, which are made fresh and need no cache: "
                         "give --dataset toy without --cache")
    return settings, entries


def read_settings(folder: str) -> dict:
    """What cache.json holds, with "entries" if it is finished; an old one has how many "shards" instead.

    Errors: OSError, ValueError, TypeError where it is none."""
    return {"channels": 1} | dict(json.loads(Path(folder, "cache.json").read_bytes()))  # old ones are mono


def by_shard(entries: list[CachedEntry]) -> dict:
    """{number of a shard: its entries}."""
    shards = {}
    for entry in entries:
        shards.setdefault(entry.shard, []).append(entry)
    return shards


def check_entries(entries: list[CachedEntry], frames: int) -> None:
    """Errors: ValueError, TypeError for entries of a shard that are not those of its `frames` codes."""
    for e in entries:
        inside = 0 <= e.offset <= e.offset + e.frames <= frames
        if not (inside and 0 < e.seconds < MAX_SECONDS and isinstance(e.meta, dict)):
            kind = type(e.meta).__name__
            raise ValueError(f"{e.frames} frames at {e.offset} of {frames}, {e.seconds} s, "
                             f"a {kind} of metadata")


def count_rows(path: Path, dtype, columns: int) -> int:
    """Rows of a shard's array, from its header and its size. Errors: OSError, ValueError if it is another."""
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name}: another version of .npy")
        shape, by_column, found = np.lib.format.read_array_header_1_0(file)
        size = file.tell() + math.prod(shape) * found.itemsize
        if found != dtype or by_column or shape[1:] != (columns,) or size != os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path.name}: {found} {shape}")
    return shape[0]


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
    for number, in_shard in by_shard(entries).items():
        path = shard_path(folder, number, f"{feature.name}.npy")
        places = [e.features.get(feature.name) for e in in_shard if e.frames]
        if None in places or not path.is_file():
            raise ValueError(f"{cache} holds no {feature.name}, which {feature.condition} needs: {again}")
        try:
            rows = count_rows(path, feature.dtype, feature.columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"{cache} is damaged ({path.name}: {error}): {again}") from None
        if (last := max(map(sum, places), default=0)) > rows:
            raise ValueError(f"{cache} is damaged ({path.name}: {rows} rows, {last} are needed): {again}")


def _index_once(folder: str) -> tuple[dict, list[CachedEntry]]:
    """`read_index`, read once as long as the cache stays as it is."""
    path = Path(folder, "cache.json")
    return _index_at(folder, os.stat(path).st_mtime_ns if path.is_file() else None)


def dataset_of(folder: str) -> str | None:
    """The dataset that a finished cache was made of, an absolute path; None where it does not say."""
    return _index_once(folder)[0].get("dataset")


@functools.lru_cache(maxsize=1)
def _index_at(folder: str, changed: int | None) -> tuple[dict, list[CachedEntry]]:
    """`read_index`. changed: when cache.json was, in nanoseconds."""
    return read_index(folder)


def open_cache(folder: str, codec, valid: str | float, features: dict) -> tuple[list, list, str, int]:
    """(train, valid, note, its K) of a finished cache made by this codec, with these features.

    Errors: ValueError for any other."""
    settings, entries = _index_once(folder)
    for feature in features.values():
        check_feature(folder, settings, entries, feature)
    check_codec(folder, settings, codec)
    train_entries, valid_entries, more = split_cache(folder, settings, entries, valid)
    note = f"from token cache {folder}"
    return train_entries, valid_entries, f"{note}; {more}" if more else note, settings["K"]


def split_cache(folder: str, settings: dict, entries: list, valid: str | float) -> tuple[list, list, str]:
    """(train, valid, note) of a cache's entries: as it was made, else by a fraction. Errors: ValueError."""
    if any(entry.split for entry in entries):  # made of two folders
        return *([e for e in entries if e.split == name] for name in ("train", "valid")), ""
    if (fraction := valid_fraction(valid)) is None:
        raise ValueError(f"token cache {folder!r} was made without --valid {valid}: give a fraction")
    hash_alone = "shards" in settings or settings.get("hash_alone", False)  # begun as an old cache
    return split_by_hash(entries, fraction, hash_alone)


def read_rows(folder: str, shard: int, suffix: str, first: int, count: int, columns: int,
              dtype=np.uint16) -> np.ndarray:
    """Rows first..first+count-1 of a shard's array: codes [count, K] ("npy"), or a feature ("chroma.npy").

    Its file is opened for each call, and no more of it read than that: np.load does more and takes longer."""
    with open(shard_path(folder, shard, suffix), "rb", buffering=0) as file:
        header = int.from_bytes(file.read(10)[8:], "little")  # bytes that follow, of an .npy file
        file.seek(10 + header + first * columns * np.dtype(dtype).itemsize)
        rows = np.fromfile(file, dtype, count * columns)
    return rows.reshape(count, columns)
