"""What changed since a token cache was made: which stored codes are those of which file of today.

    a file today ─ its name, size and times ─ the same: its codes are those that are stored of it
                   its bytes, of whatever name and time    its samples, of other tags
                        └ moved, renamed, copied                └ only encode.py reads them

What is stored: the entries of cache.json, those that it lists as dropped as long as their shards are there,
and those in the lists of shards that interrupted commands left.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from support.cache import CachedEntry, by_shard, check_entries, count_rows, shard_path
from support.scan import THREADS, Entry

DAMAGE = (OSError, ValueError, LookupError, TypeError)  # of a shard: its files are encoded again
TO_ENCODE = -1  # shard of an entry that has none yet


def shard_number(path: Path) -> int:
    """The number in the name of a shard's file."""
    return int(path.name.split(".")[0].removeprefix("shard_"))


def digest_of_file(path: str) -> str:
    """The bytes of a file in 32 hexadecimal digits (BLAKE2b)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()


def decoded_seconds(said: float, frames: int, frame_rate: float) -> float:
    """The length of a file by what was decoded of it, where its header or manifest is wrong about it."""
    decoded = frames / frame_rate
    # the last frame is part empty, and manifests are rounded
    rounding = max(1 / frame_rate, min(0.5, decoded / 10))
    return said if abs(said - decoded) <= rounding else decoded


# ------------------------------------------------------------------------------------------------------------
# what is stored


def stored_entries(out: str, settings: dict, codec, features: dict) -> tuple[list, list]:
    """(entries of cache.json, all entries whose codes are there), of which later ones are newer.

    settings: what cache.json holds."""
    before = [CachedEntry.of_plain(plain) for plain in settings.get("entries", [])]
    entries = [CachedEntry.of_plain(plain) for plain in settings.get("dropped", [])] + before
    finished = {entry.shard for entry in before}  # shards of finished commands
    for path in sorted(Path(out).glob("shard_*.json")):
        if shard_number(path) not in finished:
            with contextlib.suppress(*DAMAGE):
                entries += [CachedEntry.of_plain(plain) for plain in json.loads(path.read_bytes())]
    old_shards = set(range(settings.get("shards", 0)))  # an old cache has its entries in its shards' lists
    usable = []
    for number, in_shard in by_shard(entries).items():
        with contextlib.suppress(*DAMAGE):
            check_entries(in_shard, count_rows(shard_path(out, number, "npy"), np.uint16, codec.K))
            for name, feature in features.items():
                last = max((sum(e.features[name]) for e in in_shard if name in e.features), default=0)
                path = shard_path(out, number, f"{name}.npy")
                if last and count_rows(path, feature.dtype, feature.columns) < last:
                    raise ValueError("a feature is cut")
            if any(e.size is None for e in in_shard):  # of an old cache, which does not say of what it is
                newest = os.stat(shard_path(out, number, "json")).st_mtime_ns
                in_shard = [replace(e, modified=newest) if e.size is None else e for e in in_shard]
            usable += [e for e in in_shard if e.error is None]
    return before + [e for e in entries if e.shard in old_shards], usable


# ------------------------------------------------------------------------------------------------------------
# which codes are of which file


def with_codes(entry: CachedEntry, stored: CachedEntry, digest: str | None, frame_rate: float) -> CachedEntry:
    """An entry of today, with the codes that are stored of the same audio."""
    seconds = decoded_seconds(entry.seconds, stored.frames, frame_rate)
    places = {name: getattr(stored, name) for name in ("shard", "offset", "frames", "features")}
    return replace(entry, **places, seconds=seconds, silent=stored.silent, sound=stored.sound, digest=digest)


def match_entries(found: list, usable: list, frame_rate: float) -> list[CachedEntry]:
    """An entry of a cache for each of the dataset's: with the codes that are stored of it, or TO_ENCODE."""
    by_state = {(e.key, e.size, e.modified): e for e in usable}
    by_digest = {e.digest: e for e in usable if e.digest is not None}
    of_old_cache = {e.key: e for e in usable if e.size is None}
    sizes = {e.size for e in usable}

    def match(file: Entry) -> CachedEntry:
        entry, stored, digest = CachedEntry(**vars(file), shard=TO_ENCODE, said=file.seconds), None, None
        try:
            status = os.stat(file.path)
            entry.size, entry.modified, entry.changed = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            stored = by_state.get((file.key, entry.size, entry.modified))
            if stored is None and (old := of_old_cache.get(file.key)) is not None:
                same = old.seconds == file.seconds and entry.modified <= old.modified
                stored = old if same else None
            # Files may exchange their names, and be written with the time of another
            if stored is None or stored.changed not in (None, entry.changed):
                digest = digest_of_file(file.path) if entry.size in sizes else None
                stored = by_digest.get(digest)
        except OSError:  # gone since the scan: encoding it will say so
            return entry
        if stored is None:
            return entry
        matched = with_codes(entry, stored, stored.digest, frame_rate)
        # Its header is read otherwise than before, and is not what was decoded: more may be readable today
        return matched if file.seconds in (matched.seconds, stored.said) else entry

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(match, found))


def stored_sounds(entries: list, usable: list) -> dict[float, dict]:
    """{seconds: {digest of the samples: what is stored of them}} of files that are no longer as they were, if
    one that is to be encoded is as long: it may differ in its tags alone."""
    kept = {(e.key, e.digest) for e in entries if e.shard != TO_ENCODE}
    sounds = {e.seconds: {} for e in entries if e.shard == TO_ENCODE}
    for stored in usable:
        if None not in (stored.digest, stored.sound) and (stored.key, stored.digest) not in kept:
            for seconds in sounds.keys() & {stored.said, stored.seconds}:
                sounds[seconds][stored.sound] = stored
    return {seconds: found for seconds, found in sounds.items() if found}


def is_same_dataset(entries: list, before: list, usable: list) -> bool:
    """Whether a dataset that lies elsewhere than before is the one of the cache: it has a file of the same
    name and audio, or most of the audio under other names."""
    sizes = {e.key: e.size for e in [*before, *usable]}  # None: an old cache does not say
    if not sizes or any(e.shard != TO_ENCODE or sizes[e.key] is None for e in entries if e.key in sizes):
        return True
    return 2 * sum(e.shard != TO_ENCODE for e in entries) > len(before or usable)


# ------------------------------------------------------------------------------------------------------------
# what is said of it


def count_changes(planned: list, entries: list, before: list) -> Counter:
    """How many files of a cache are new, changed, gone or as before. planned: its entries before encoding."""
    olds = {e.key: e for e in before}
    known = {name for e in before for name in (e.digest, e.sound)} - {None}  # audio
    counts, renamed = Counter(), set()
    for plan, entry in zip(planned, entries):
        old = olds.get(entry.key)
        if entry.error is not None:
            counts["that cannot be encoded"] += 1
        elif old is None and known & {entry.digest, entry.sound}:
            counts["renamed or copied"] += 1
            renamed |= {entry.digest, entry.sound}
        elif old is None or old.error is not None:
            counts["new"] += 1
        elif entry.digest != old.digest and (old.sound is None or entry.sound != old.sound):
            counts["with other audio"] += 1
        elif plan.shard == TO_ENCODE and entry.digest == old.digest:
            counts["encoded again"] += 1
        elif (entry.meta, entry.weight) != (old.meta, old.weight):
            counts["with other captions or tags"] += 1
        else:
            counts["as before"] += 1
    renamed.discard(None)
    gone = olds.keys() - {e.key for e in entries}
    counts["dropped"] = sum(not renamed & {olds[key].digest, olds[key].sound} for key in gone)
    return counts
