"""Making a token cache, and bringing it up to date: what is encoded, by whom, and what is written when.

                         ┌─ its audio is stored: codes as they are, today's captions and tags ─┐
    dataset ─scan─► file ┤                                                                     ├► cache.json
                         └─ new, or other audio ─► a rank ─► a thread ─► shards, their entries ┘

A file is known again by its name, size and time of change, else by its bytes: moved, renamed and copied files
are not encoded again. Each rank writes shards of its own under numbers that nobody has taken. At the end
rank 0 swaps cache.json in, and removes the shards that neither it nor the one before it names: what trains
from the cache may still read those. An interrupted command leaves whole shards, which the next one finds.

Legend: K codebooks, T frames, C channels.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import audio
from support.cache import CachedEntry, by_shard, check_entries, count_rows, read_rows, read_settings
from support.cache import shard_path
from support.captions import READ_ERRORS
from support.checkpoint import lock_folder
from support.common import check_device, count_cores, describe_error, output_folder
from support.common import write_atomically, write_json
from support.distributed import Ranks, exit_process, join_process_group
from support.pieces import CONTEXT_SECONDS
from support.scan import THREADS, Entry, scan_dataset, skip_lines, split_entries, valid_fraction

SHARD_SECONDS = 600  # audio in a shard: what an interruption costs at most
WINDOW_SECONDS = 10  # of a file that are encoded at once
MAX_READERS = 8  # threads of a rank with a GPU: so many keep it busy
MAX_THIN = 4  # shards less than half full: of more, what is in use is copied into new ones
PATIENCE_MINUTES = 60 * 24 * 7  # that a rank which has done its share waits for the others
TELL_SECONDS = 10  # between two lines of progress
DAMAGE = (OSError, ValueError, LookupError, TypeError)  # of a shard: its files are encoded again
NOT_COMPARED = ("dataset", "codec", "entries", "files", "list", "shards")  # in cache.json, also an old one
TO_ENCODE = -1  # shard of an entry that has none yet


@dataclass
class Update:
    """What is to be done, as rank 0 has found it."""
    rows: list  # an entry for each file, in order; those without codes wait in `shares`
    shares: list  # [entries to encode or to copy] of each rank
    before: list  # entries of the cache as it was
    settings: dict
    first: int  # number from which on shards are new
    lock: int | None


# ------------------------------------------------------------------------------------------------------------
# one file


def encode_file(entry: Entry, codec, device, features: dict,
                stop: threading.Event | None = None) -> tuple[np.ndarray, dict, bool]:
    """All codes [frames, K] uint16 of a file, {name: array} of its features, and whether it is silent.

    A file is encoded in windows that fit in memory, with real audio around each. They start where a sample of
    the file, one of the codec and a frame coincide: at whole seconds for codecs of 50 or 75 Hz. stop: given
    up when it is set. Errors: ValueError, OSError where it cannot be read."""
    rate, hop = codec.sample_rate, codec.hop
    unit = hop // math.gcd(hop, rate)  # seconds
    context = unit * math.ceil(CONTEXT_SECONDS / unit)
    window = unit * math.ceil(WINDOW_SECONDS / unit)
    codes, arrays = [], {name: [] for name in features}
    start, ended, silent = 0, False, True
    while not ended:
        if stop is not None and stop.is_set():
            raise RuntimeError("given up")
        left = min(start, context)
        wav = entry.read(start - left, left + window + context, codec)  # [C, n]
        silent &= float(wav.abs().max()) < audio.SILENT_PEAK
        window_codes = codec.encode(wav[None].to(device))[0].T.cpu().numpy()  # [T, K]
        first, last = left * rate // hop, (left + window) * rate // hop
        codes.append(window_codes[first:last])
        ended = len(window_codes) <= last
        end = None if ended else (start + window) * rate  # samples
        for name, feature in features.items():
            arrays[name].append(feature.of_window(wav, (start - left) * rate, start * rate, end, rate))
        start += window
    for name, feature in features.items():
        arrays[name] = np.concatenate(arrays[name]).astype(feature.dtype)
    return np.concatenate(codes).astype(np.uint16), arrays, silent


def decoded_seconds(said: float, frames: int, frame_rate: float) -> float:
    """The length of a file by what was decoded of it, where its header or manifest is wrong about it."""
    decoded = frames / frame_rate
    # the last frame is part empty, and manifests are rounded
    rounding = max(1 / frame_rate, min(0.5, decoded / 10))
    return said if abs(said - decoded) <= rounding else decoded


def digest_of_file(path: str) -> str:
    """The bytes of a file in 32 hexadecimal digits (BLAKE2b)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()


def arrays_of_entry(row: CachedEntry, out: str, codec, device, features: dict,
                    stop: threading.Event) -> tuple[CachedEntry, np.ndarray, dict]:
    """(entry, codes, {name: array}) of a file: encoded, or copied from the shard that has them.

    One that cannot be encoded has no frames, and says why."""
    if row.shard != TO_ENCODE:
        codes = read_rows(out, row.shard, "npy", row.offset, row.frames, codec.K)
        arrays = {}
        for name in row.features.keys() & features.keys():
            columns, dtype = features[name].columns, features[name].dtype
            arrays[name] = read_rows(out, row.shard, f"{name}.npy", *row.features[name], columns, dtype)
        return row, codes, arrays
    try:
        digest = digest_of_file(row.path)
        codes, arrays, silent = encode_file(row, codec, device, features, stop)
    except READ_ERRORS as error:
        return replace(row, error=str(error)), np.zeros((0, codec.K), np.uint16), {}
    seconds = decoded_seconds(row.seconds, len(codes), codec.frame_rate)
    return replace(row, digest=digest, seconds=seconds, silent=silent), codes, arrays


# ------------------------------------------------------------------------------------------------------------
# what is stored, and what has to be done


def stored_entries(out: str, settings: dict, codec, features: dict) -> tuple[list, list]:
    """(entries of cache.json, all entries whose codes are there): also those of interrupted commands."""
    rows = [CachedEntry.of_row(row) for row in settings.get("entries", [])]
    finished = {row.shard for row in rows}  # shards of finished commands
    for path in sorted(Path(out).glob("shard_*.json")):
        if shard_number(path) not in finished:
            with contextlib.suppress(*DAMAGE):
                rows += [CachedEntry.of_row(row) for row in json.loads(path.read_bytes())]
    finished |= set(range(settings.get("shards", 0)))  # an old cache
    usable = []
    for number, shard in by_shard(rows).items():
        with contextlib.suppress(*DAMAGE):
            check_entries(shard, count_rows(shard_path(out, number, "npy"), np.uint16, codec.K))
            for name, feature in features.items():
                last = max((sum(row.features[name]) for row in shard if name in row.features), default=0)
                path = shard_path(out, number, f"{name}.npy")
                if last and count_rows(path, feature.dtype, feature.columns) < last:
                    raise ValueError("a feature is cut")
            if any(row.size is None for row in shard):  # of an old cache, which does not say of what it is
                newest = os.stat(shard_path(out, number, "json")).st_mtime_ns
                shard = [replace(row, modified=newest) if row.size is None else row for row in shard]
            usable += [row for row in shard if row.error is None]
    return [row for row in rows if row.shard in finished], usable


def shard_number(path: Path) -> int:
    """The number in the name of a shard's file."""
    return int(path.name.split(".")[0].removeprefix("shard_"))


def match_entries(entries: list, usable: list, frame_rate: float) -> list[CachedEntry]:
    """An entry of a cache for each of the dataset's: with the codes that are stored of it, or TO_ENCODE."""
    by_key = {row.key: row for row in usable}
    by_digest = {row.digest: row for row in usable if row.digest is not None}
    sizes = {row.size for row in usable}

    def match(entry: Entry) -> CachedEntry:
        try:
            state = os.stat(entry.path)
            size, modified = state.st_size, state.st_mtime_ns
            row = by_key.get(entry.key)
            if row is not None and row.size is None:
                same = row.seconds == entry.seconds and modified <= row.modified
            else:
                same = row is not None and (row.size, row.modified) == (size, modified)
            if not same:
                row = by_digest.get(digest_of_file(entry.path)) if size in sizes else None
        except OSError:  # gone since the scan: encoding it will say so
            row, size, modified = None, None, None
        of_file = dict(size=size, modified=modified, said=entry.seconds)
        if row is not None:
            seconds = decoded_seconds(entry.seconds, row.frames, frame_rate)
        # Its header is read otherwise than before, and is not what was decoded: more may be readable today
        if row is None or entry.seconds not in (seconds, row.said):
            return CachedEntry(**vars(entry), shard=TO_ENCODE, **of_file)
        today = {each.name: getattr(entry, each.name) for each in fields(Entry)}
        return replace(row, **today | of_file | {"seconds": seconds})

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(match, entries))


def thin_shards(out: str, rows: list, codec) -> set:
    """Numbers of shards that are less than half full, or half in use; none if they are few."""
    thin = set()
    for number, shard in by_shard([row for row in rows if row.shard != TO_ENCODE]).items():
        stored = count_rows(shard_path(out, number, "npy"), np.uint16, codec.K)
        if sum(row.frames for row in shard) < max(stored, SHARD_SECONDS * codec.frame_rate) / 2:
            thin.add(number)
    return thin if len(thin) > MAX_THIN else set()


def begin_update(dataset: str, out: str, codec, valid: str | float, features: dict, ranks: int,
                 scanning: dict) -> Update:
    """Begins a cache in `out`, or finds out what has to be done to the one that is there.

    Errors: ValueError if `out` is in use or holds something else, or no file is readable."""
    # What the dataset has
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

    # A new folder, or a cache of this codec
    settings = {"dataset": os.path.abspath(dataset), "codec": codec.name, "channels": codec.channels,
                "fingerprint": codec.fingerprint, "K": codec.K}
    for feature in features.values():
        settings |= feature.settings
    path, begun = Path(out, "cache.json"), {}
    if path.is_file():
        begun = read_begun(out, settings)
        if "shards" in begun or begun.get("hash_alone"):
            settings["hash_alone"] = True  # an old cache: its runs keep their validation files
    elif os.path.exists(out) and not (os.path.isdir(out) and set(os.listdir(out)) <= {"cache.json.tmp"}):
        raise ValueError(f"--out {out} holds something else: give a new or an empty folder")
    output_folder(out)
    if not begun:
        write_json(path, settings, indent=None)
    lock = lock_folder(Path(out))
    try:
        # What is stored already
        before, usable = stored_entries(out, begun, codec, features)
        rows = match_entries(entries, usable, codec.frame_rate)
        stored = {row.key: row.size for row in [*before, *usable]}  # None: an old cache does not say
        known = any(row.shard != TO_ENCODE or stored[row.key] is None for row in rows if row.key in stored)
        moved = bool(begun) and begun["dataset"] != settings["dataset"]
        if moved and (begun["dataset"] == "toy" or stored and not known):
            raise ValueError(f"{out} holds a cache with another dataset, {begun['dataset']}: none of its "
                             f"files is in {dataset}; give another --out, or delete it")
        thin = thin_shards(out, rows, codec)
        # The longest list is never longer than the others by more than a file
        shares, seconds = [[] for _ in range(ranks)], [0.0] * ranks
        for row in rows:
            if row.shard == TO_ENCODE or row.shard in thin:
                rank = seconds.index(min(seconds))
                shares[rank].append(row)
                seconds[rank] += row.seconds
        taken = [shard_number(path) for path in Path(out).glob("shard_*")]
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    return Update(rows, shares, before, settings, max(taken, default=-1) + 1, lock)


def read_begun(out: str, settings: dict) -> dict:
    """The settings and entries of the cache in `out`. Errors: ValueError where it is no cache with these."""
    try:
        begun = read_settings(out)
        begun["fingerprint"], begun["dataset"]
    except DAMAGE:
        raise ValueError(f"{out}/cache.json is damaged: delete {out}, or give another --out") from None
    names = [name for name in begun | settings if name not in NOT_COMPARED]
    if differ := [name for name in names if settings.get(name) != begun.get(name)]:
        raise ValueError(f"{out} holds a cache with another {', '.join(differ)}: "
                         "give another --out, or delete it")
    return begun


# ------------------------------------------------------------------------------------------------------------
# encoding


def map_in_threads(function: Callable, items: list, threads: int) -> Iterator:
    """function(item) of each item, as soon as it is there, from threads that each compute on one core."""
    items, waiting = iter(items), set()
    main_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        while True:
            for item in itertools.islice(items, threads + 1 - len(waiting)):
                waiting.add(pool.submit(function, item))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(main_threads)  # the pool has set the default of new threads to 1


def encode_share(rows: list, first: int, out: str, codec, device, features: dict, tells: bool) -> list[int]:
    """Encodes or copies files into new shards, numbered from `first` on -> the numbers of those shards.

    tells: whether this rank prints how far it is."""
    threads = max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if torch.device(device).type != "cpu":
        threads = min(threads, MAX_READERS)
    stop, numbers, shard = threading.Event(), [], []
    began = last = time.monotonic()
    files = seconds = in_shard = 0
    work = functools.partial(arrays_of_entry, out=out, codec=codec, device=device, features=features,
                             stop=stop)
    results = map_in_threads(work, rows, threads)
    hidden = not (tells and sys.stderr.isatty())
    try:
        for result in tqdm(results, "encoding", len(rows), unit="file", leave=False, disable=hidden):
            shard.append(result)
            files += 1
            in_shard += len(result[1]) / codec.frame_rate
            if in_shard >= SHARD_SECONDS or files == len(rows):
                first = claim_number(out, first)
                write_shard(out, first, shard, codec, features)
                numbers.append(first)
                seconds += in_shard
                shard, in_shard = [], 0
                if tells and time.monotonic() - last > TELL_SECONDS:
                    last = time.monotonic()
                    rate = rate_text(seconds, last - began)
                    print(f"encoded {files} of {len(rows)} files{rate}", flush=True)
    finally:
        stop.set()
    return numbers


def rate_text(seconds: float, took: float) -> str:
    """Of so many seconds of audio, encoded in so many seconds."""
    return f", {seconds / 3600:.2f} h of audio, {seconds / 60 / max(took, 1e-3):.2f} h a minute"


def claim_number(out: str, number: int) -> int:
    """The next free number of a shard, from `number` on: until it is written, a file holds it.

    So no two processes write the same one, even if one has outlived the command that it belongs to."""
    while True:
        claim = shard_path(out, number, "npy.tmp")  # what write_atomically fills
        with contextlib.suppress(FileExistsError):
            claim.touch(exist_ok=False)
            if not shard_path(out, number, "npy").exists():
                return number
            claim.unlink()
        number += 1


def write_shard(out: str, number: int, results: list, codec, features: dict) -> None:
    """Writes a shard of [(entry, codes, {name: array})]: its arrays, then its entries."""
    codes = [np.zeros((0, codec.K), np.uint16)]
    arrays = {name: [np.zeros((0, each.columns), each.dtype)] for name, each in features.items()}
    offset, offsets, rows = 0, dict.fromkeys(features, 0), []
    for row, file_codes, found in results:
        places = {name: (offsets[name], len(array)) for name, array in found.items()}
        rows.append(replace(row, shard=number, offset=offset, frames=len(file_codes), features=places))
        codes.append(file_codes)
        offset += len(file_codes)
        for name, array in found.items():
            arrays[name].append(array)
            offsets[name] += len(array)
    write_array(shard_path(out, number, "npy"), np.concatenate(codes))
    for name, parts in arrays.items():
        write_array(shard_path(out, number, f"{name}.npy"), np.concatenate(parts))
    write_json(shard_path(out, number, "json"), [row.to_row() for row in rows], indent=None)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file whole or not at all."""
    write_atomically(path, lambda file: np.save(file, array))


# ------------------------------------------------------------------------------------------------------------
# the command


def make_cache_on_ranks(device: str, load_codec: Callable, dataset: str, out: str, valid: str,
                        features: dict, **scanning) -> None:
    """`make_cache` by the ranks of torchrun, if there are any, each on its device. Errors: as there."""
    ranks = join_process_group(check_device(device), PATIENCE_MINUTES)
    codec = load_codec(device=ranks.device)
    make_cache(dataset, out, codec, valid, ranks.device, features, ranks, **scanning)
    if ranks.world_size > 1:
        exit_process(0)


def make_cache(dataset: str, out: str, codec, valid: str | float = 0.05, device="cpu",
               features: dict | None = None, ranks: Ranks | None = None, **scanning) -> None:
    """Makes a token cache of a dataset in the folder `out`, or brings it up to date, and says what it did.

    features: name -> what computes it. ranks: processes that share the files and a disk. scanning: see
    `scan_dataset`. Errors: ValueError if `out` is in use or no file readable."""
    if dataset == "toy":
        raise ValueError("toy clips are made fresh and need no token cache: "
                         "train with --dataset toy, without --cache")
    if codec.card > 2 ** 16:
        raise ValueError(f"codec {codec.name} has {codec.card} codes, a cache holds 16 bits: "
                         f"take one of at most {2 ** 16}")
    features = features or {}
    for feature in features.values():
        feature.load()  # may be missing
    ranks = ranks or Ranks(0, 1, torch.device(device))

    # Rank 0 finds out what has to be done, all ranks do it
    update, error = None, None
    if ranks.is_main:
        try:
            update = begin_update(dataset, out, codec, valid, features, ranks.world_size, scanning)
        except (ValueError, OSError) as problem:
            error = problem
    shares, first, error = ranks.broadcast((update and update.shares, update and update.first, error))
    if error is not None and ranks.is_main:
        raise error
    if error is not None:
        exit_process(2)  # rank 0 says why
    began = time.monotonic()
    try:
        results = encode_all(update, shares[ranks.rank], first, out, codec, device, features, ranks)
        if ranks.is_main:
            rows = finish_update(update, out, dataset, results)
            took = time.monotonic() - began
            describe_update(update, rows, out, codec, took)
    finally:
        if ranks.is_main and update.lock is not None:
            os.close(update.lock)


def encode_all(update: Update | None, share: list, first: int, out: str, codec, device, features: dict,
               ranks: Ranks) -> list[int]:
    """Encodes this rank's share -> numbers of the new shards of all ranks. Where it ends early, rank 0 (which
    has the update) says how much is stored. Errors: those of any rank."""
    try:
        numbers, error = [], None
        try:
            numbers = encode_share(share, first, out, codec, device, features, ranks.is_main)
        except Exception as problem:  # the others are told when they are done
            error = problem
        results = ranks.gather((numbers, error and f"rank {ranks.rank}: {describe_error(error)}"))
        if error is not None:
            raise error
        for problem in filter(None, (text for _, text in results) if ranks.is_main else ()):
            raise ValueError(problem)
    except BaseException:
        if update is not None:
            say_unfinished(update, out)
        raise
    return [number for numbers, _ in results for number in numbers]


def finish_update(update: Update, out: str, dataset: str, numbers: list) -> list[CachedEntry]:
    """Swaps in cache.json, and removes the shards that neither it nor the one before names -> its entries.

    Errors: ValueError where there is nothing in it."""
    written = {row.key: row for number in numbers for row in read_shard(out, number)}
    rows = [written.get(row.key, row) for row in update.rows]
    if lost := [row.key for row in rows if row.shard == TO_ENCODE]:
        raise ValueError(f"{out} lacks what another rank wrote ({len(lost)} files, such as {lost[0]!r}): "
                         "--out must lie on a disk that all machines share")
    if not any(row.frames for row in rows):
        raise ValueError(f"none of the {len(rows)} files of {dataset!r} can be encoded: {rows[0].error}")
    content = update.settings | {"entries": [row.to_row() for row in rows]}
    write_json(Path(out, "cache.json"), content, indent=None)
    for number, shard in by_shard(rows).items():  # for whoever looks into them
        path, lines = shard_path(out, number, "json"), [row.to_row() for row in shard]
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_bytes()) == lines:
                continue
        write_json(path, lines, indent=None)
    named = {row.shard for row in [*update.before, *rows]}
    for path in Path(out).glob("shard_*"):
        if shard_number(path) not in named or path.suffix == ".tmp":
            with contextlib.suppress(OSError):
                path.unlink()
    return rows


def read_shard(out: str, number: int) -> list[CachedEntry]:
    """The entries of what was encoded into a shard; none if it is not there."""
    path = shard_path(out, number, "json")
    return [CachedEntry.of_row(row) for row in json.loads(path.read_bytes())] if path.is_file() else []


def say_unfinished(update: Update, out: str) -> None:
    """Says how much of the work is stored when a command ends before its time."""
    wanted = {row.key for row in update.rows if row.shard == TO_ENCODE}
    numbers = {shard_number(path) for path in Path(out).glob("shard_*.json")}
    rows = [row for number in numbers if number >= update.first for row in read_shard(out, number)]
    stored = wanted & {row.key for row in rows if row.error is None}
    as_before = "; until it is through, the cache is as it was" if update.before else ""
    print(f"{out} is unfinished: {len(stored)} of {len(wanted)} files to encode are stored, "
          f"the same command goes on from here{as_before}", flush=True)


def count_changes(update: Update, rows: list) -> Counter:
    """How many files of a cache are new, changed, gone or as before."""
    before = {row.key: row for row in update.before}
    digests = {row.digest for row in update.before} - {None}
    counts, renamed = Counter(), set()
    for planned, row in zip(update.rows, rows):
        old = before.get(row.key)
        if row.error is not None:
            counts["that cannot be encoded"] += 1
        elif old is None and planned.digest in digests:
            counts["renamed or copied"] += 1
            renamed.add(planned.digest)
        elif old is None or old.error is not None:
            counts["new"] += 1
        elif planned.shard == TO_ENCODE or row.digest != old.digest:
            counts["with other audio"] += 1
        elif (row.meta, row.weight) != (old.meta, old.weight):
            counts["with other captions or tags"] += 1
        else:
            counts["as before"] += 1
    gone = before.keys() - {row.key for row in rows}
    counts["dropped"] = sum(before[key].digest not in renamed for key in gone)
    return counts


def describe_update(update: Update, rows: list, out: str, codec, took: float) -> None:
    """Prints what was done to a cache, and what is in it."""
    for line in skip_lines({row.path: f"cannot be encoded: {row.error}" for row in rows if row.error}):
        print(f"skipped {line}")
    mixed = " after mixing to mono" if codec.channels == 1 else ""
    for line in skip_lines({row.path: f"silent{mixed}" for row in rows if row.silent}):
        print(f"problem {line}")
    changes = ", ".join(f"{count} {kind}" for kind, count in count_changes(update, rows).items() if count)
    encoded = [row for planned, row in zip(update.rows, rows) if planned.shard == TO_ENCODE and row.frames]
    seconds = sum(row.frames for row in encoded) / codec.frame_rate
    print(f"files: {changes}; encoded {len(encoded)}{rate_text(seconds, took) if encoded else ''}")
    frames = sum(row.frames for row in rows)
    print(f"{out}: {len(rows)} files, {frames} frames of {codec.K} codebooks at {codec.frame_rate:g} Hz, "
          f"{frames * codec.K * 2 / 1e6:.1f} MB")
