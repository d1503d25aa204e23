"""Making a token cache, and bringing it up to date: what is encoded, by whom, and what is written when.

                         ┌─ its audio is stored: codes as they are, today's captions and tags ─┐
    dataset ─scan─► file ┤                                                                     ├► cache.json
                         └─ new, or other audio ─► a rank ─► a thread ─► shards, their entries ┘

Which files are known again, moved and renamed ones, too: changes.py. Each rank writes shards of its own under
numbers that nobody has taken. At the end rank 0 swaps cache.json in, and removes the shards that neither it
nor the one before it names: what trains from the cache may still read those. An interrupted command leaves
whole shards, which the next one finds.

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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support import audio
from support.cache import CachedEntry, by_shard, count_rows, read_rows, read_settings, shard_path
from support.captions import READ_ERRORS
from support.changes import (DAMAGE, TO_ENCODE, count_changes, decoded_seconds, digest_of_file,
                             is_same_dataset, match_entries, shard_number, stored_entries, stored_sounds,
                             with_codes)
from support.checkpoint import lock_folder
from support.common import check_device, count_cores, describe_error, output_folder
from support.common import write_atomically, write_json
from support.distributed import Ranks, exit_process, join_process_group
from support.pieces import CONTEXT_SECONDS
from support.scan import Entry, scan_dataset, skip_lines, split_entries, valid_fraction

SHARD_SECONDS = 600  # audio in a shard: what an interruption costs at most
WINDOW_SECONDS = 10  # of a file that are encoded at once
MAX_READERS = 8  # threads of a rank with a GPU: so many keep it busy
MAX_THIN = 4  # shards less than half full: of more, what is in use is copied into new ones
BEGUN = {"cache.json.tmp", ".lock"}  # in the folder of a command that was killed at once
PATIENCE_MINUTES = 60 * 24 * 7  # that a rank which has done its share waits for the others
TELL_SECONDS = 10  # between two lines of progress
NOT_COMPARED = ("dataset", "codec", "entries", "dropped",  # in cache.json
                "files", "list", "shards")  # in that of an old cache


@dataclass
class Update:
    """What is to be done, as rank 0 has found it."""
    entries: list  # one for each file, in order; those without codes wait in `shares`
    shares: list  # [entries to encode or to copy] of each rank
    before: list  # entries of the cache as it was
    usable: list  # all entries whose codes are stored
    sounds: dict  # what may have got other tags, see `stored_sounds`
    settings: dict
    first: int  # number from which on shards are new
    lock: int | None


class FileCodes(NamedTuple):
    """What is written of a file. One that cannot be encoded has no frames, and its entry says why."""
    entry: CachedEntry
    codes: np.ndarray  # [frames, K] uint16
    arrays: dict  # name of a feature -> [F, columns]
    encoded: bool  # not copied from another shard


# ------------------------------------------------------------------------------------------------------------
# one file


class Window(NamedTuple):
    """A part of a file, with real audio around it."""
    wav: Tensor  # [C, N], less at the end of the file
    start: int  # seconds from the beginning of the file
    before: int  # seconds of wav that lie before the start
    seconds: int  # of the part alone; the last one holds all that follows
    is_last: bool


def read_windows(entry: Entry, codec, stop: threading.Event | None) -> Iterator[Window]:
    """A file in windows that fit in memory. They start where a sample of the file, one of the codec and a
    frame coincide: at whole seconds for codecs of 50 or 75 Hz.

    stop: given up when it is set. Errors: ValueError, OSError where it cannot be read."""
    unit = codec.hop // math.gcd(codec.hop, codec.sample_rate)  # seconds
    context = unit * math.ceil(CONTEXT_SECONDS / unit)
    seconds = unit * math.ceil(WINDOW_SECONDS / unit)
    start, is_last = 0, False
    while not is_last:
        if stop is not None and stop.is_set():
            raise RuntimeError("given up")
        before = min(start, context)
        wav = entry.read(start - before, before + seconds + context, codec)  # [C, N]
        is_last = wav.shape[-1] <= (before + seconds) * codec.sample_rate
        yield Window(wav, start, before, seconds, is_last)
        start += seconds


def new_digest():
    """What makes 32 hexadecimal digits (BLAKE2b) of the samples of a file, as the codec takes them."""
    return hashlib.blake2b(digest_size=16)


def digest_of_sound(entry: Entry, codec, stop: threading.Event) -> str:
    """The samples of a file in 32 hexadecimal digits, whatever its tags. Errors: as `read_windows`."""
    digest = new_digest()
    for window in read_windows(entry, codec, stop):
        digest.update(window.wav.contiguous().numpy())
    return digest.hexdigest()


def encode_file(entry: Entry, codec, device, features: dict,
                stop: threading.Event | None = None) -> tuple[np.ndarray, dict, bool, str]:
    """All codes [frames, K] uint16 of a file, {name: array} of its features, whether it is silent, and the
    digest of its samples. Errors: as `read_windows`."""
    codes, arrays = [], {name: [] for name in features}
    rate, silent, digest = codec.sample_rate, True, new_digest()
    for wav, start, before, seconds, is_last in read_windows(entry, codec, stop):
        digest.update(wav.contiguous().numpy())
        silent &= float(wav.abs().max()) < audio.SILENT_PEAK
        window_codes = codec.encode(wav[None].to(device))[0].T.cpu().numpy()  # [T, K]
        first, last = before * rate // codec.hop, (before + seconds) * rate // codec.hop
        codes.append(window_codes[first:last])
        end = None if is_last else (start + seconds) * rate  # samples
        for name, feature in features.items():
            arrays[name].append(feature.of_window(wav, (start - before) * rate, start * rate, end, rate))
    for name, feature in features.items():
        arrays[name] = np.concatenate(arrays[name]).astype(feature.dtype)
    return np.concatenate(codes).astype(np.uint16), arrays, silent, digest.hexdigest()


def codes_of_entry(entry: CachedEntry, out: str, codec, device, features: dict, sounds: dict,
                   stop: threading.Event) -> FileCodes:
    """Encodes a file, or copies what is stored of its audio. sounds: see `stored_sounds`."""
    if entry.shard == TO_ENCODE:
        try:
            digest = digest_of_file(entry.path)
            stored, alike = None, sounds.get(entry.seconds)
            if alike is not None:
                stored = alike.get(digest_of_sound(entry, codec, stop))
            if stored is None:
                codes, arrays, silent, sound = encode_file(entry, codec, device, features, stop)
        except READ_ERRORS as error:
            return FileCodes(replace(entry, error=str(error)), np.zeros((0, codec.K), np.uint16), {}, False)
        if stored is None:
            seconds = decoded_seconds(entry.seconds, len(codes), codec.frame_rate)
            entry = replace(entry, digest=digest, sound=sound, seconds=seconds, silent=silent)
            return FileCodes(entry, codes, arrays, True)
        entry = with_codes(entry, stored, digest, codec.frame_rate)
    codes = read_rows(out, entry.shard, "npy", entry.offset, entry.frames, codec.K)
    arrays = {}
    for name in entry.features.keys() & features.keys():
        columns, dtype = features[name].columns, features[name].dtype
        arrays[name] = read_rows(out, entry.shard, f"{name}.npy", *entry.features[name], columns, dtype)
    return FileCodes(entry, codes, arrays, False)


# ------------------------------------------------------------------------------------------------------------
# what has to be done


def thin_shards(out: str, entries: list, codec) -> set:
    """Numbers of shards that are less than half full, or half in use; none if they are few."""
    thin = set()
    for number, in_shard in by_shard([e for e in entries if e.shard != TO_ENCODE]).items():
        stored = count_rows(shard_path(out, number, "npy"), np.uint16, codec.K)
        if sum(e.frames for e in in_shard) < max(stored, SHARD_SECONDS * codec.frame_rate) / 2:
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
    files = found.entries
    if valid_fraction(valid) is None:  # the cache says which file is of which folder
        train_files, valid_files, _ = split_entries(files, valid, **scanning)
        files = [replace(file, split="train") for file in train_files]
        for file in valid_files:  # both folders may hold the same names
            files.append(replace(file, split="valid", key=f"valid:{file.key}"))
    elif float(valid) != 0.05:  # what data.py gives where nothing is said
        print(f"note --valid {valid} has no effect: a cache holds all files; give the fraction in training")

    # A new folder, or a cache of this codec, that no other process writes to
    settings = {"dataset": os.path.abspath(dataset), "codec": codec.name, "channels": codec.channels,
                "fingerprint": codec.fingerprint, "K": codec.K}
    for feature in features.values():
        settings |= feature.settings
    path = Path(out, "cache.json")
    if path.is_file():
        read_begun(out, settings)
    elif os.path.exists(out) and not (os.path.isdir(out) and set(os.listdir(out)) <= BEGUN):
        raise ValueError(f"--out {out} holds something else: give a new or an empty folder")
    output_folder(out)
    lock = lock_folder(Path(out))
    try:
        if path.is_file():
            begun = read_begun(out, settings)
        else:
            begun = {}
            write_json(path, settings, indent=None)
        if "shards" in begun or begun.get("hash_alone"):
            settings["hash_alone"] = True  # an old cache: its runs keep their validation files

        # What is stored already
        before, usable = stored_entries(out, begun, codec, features)
        entries = match_entries(files, usable, codec.frame_rate)
        moved = bool(begun) and begun["dataset"] != settings["dataset"]
        if moved and (begun["dataset"] == "toy" or not is_same_dataset(entries, before, usable)):
            raise ValueError(f"{out} holds a cache with another dataset, {begun['dataset']}: none of its "
                             f"files is in {dataset}, nor most of its audio under other names; give another "
                             "--out, or delete it")
        thin = thin_shards(out, entries, codec)
        # The longest list is never longer than the others by more than a file
        shares, seconds = [[] for _ in range(ranks)], [0.0] * ranks
        for entry in entries:
            if entry.shard == TO_ENCODE or entry.shard in thin:
                rank = seconds.index(min(seconds))
                shares[rank].append(entry)
                seconds[rank] += entry.seconds
        taken = [shard_number(path) for path in Path(out).glob("shard_*")]
    except BaseException:
        if not path.is_file():  # nothing has begun
            Path(out, ".lock").unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
        raise
    return Update(entries, shares, before, usable, stored_sounds(entries, usable), settings,
                  max(taken, default=-1) + 1, lock)


def read_begun(out: str, settings: dict) -> dict:
    """The settings and entries of the cache in `out`. Errors: ValueError where it is no cache with these."""
    try:
        begun = read_settings(out)
        begun["fingerprint"], begun["dataset"]
    except DAMAGE:
        raise ValueError(f"{out}/cache.json is damaged: delete {out}, or give another --out") from None
    names = [name for name in begun | settings if name not in NOT_COMPARED]
    if differ := [name for name in names if settings.get(name) != begun.get(name)]:
        there, here = (", ".join(str(of.get(name))[:12] for name in differ) for of in (begun, settings))
        raise ValueError(f"{out} holds a cache with another {', '.join(differ)} ({there}, not {here}): "
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


@dataclass
class Share:
    """What a rank has done of an update."""
    numbers: list = field(default_factory=list)  # of the shards that it wrote
    encoded: int = 0  # files
    seconds: float = 0.0  # of their audio


def encode_share(entries: list, first: int, out: str, codec, device, features: dict, sounds: dict,
                 tells: bool) -> Share:
    """Encodes or copies files into new shards, numbered from `first` on.

    sounds: see `stored_sounds`; tells: whether this rank prints how far it is."""
    threads = max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if torch.device(device).type != "cpu":
        threads = min(threads, MAX_READERS)
    stop, share, waiting = threading.Event(), Share(), []
    began = last = time.monotonic()
    files = seconds = 0
    work = functools.partial(codes_of_entry, out=out, codec=codec, device=device, features=features,
                             sounds=sounds, stop=stop)
    results = map_in_threads(work, entries, threads)
    hidden = not (tells and sys.stderr.isatty())
    try:
        for file in tqdm(results, "encoding", len(entries), unit="file", leave=False, disable=hidden):
            waiting.append(file)
            files += 1
            seconds += len(file.codes) / codec.frame_rate
            if seconds >= SHARD_SECONDS or files == len(entries):
                first = claim_number(out, first)
                write_shard(out, first, waiting, codec, features)
                share.numbers.append(first)
                encoded = [len(each.codes) for each in waiting if each.encoded]
                share.encoded += len(encoded)
                share.seconds += sum(encoded) / codec.frame_rate
                waiting, seconds = [], 0
                if tells and time.monotonic() - last > TELL_SECONDS:
                    last = time.monotonic()
                    rate = rate_text(share.seconds, last - began)
                    print(f"{files} of {len(entries)} files are through{rate}", flush=True)
    finally:
        stop.set()
    return share


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


def write_shard(out: str, number: int, files: list[FileCodes], codec, features: dict) -> None:
    """Writes a shard: its arrays, then its entries."""
    codes = [np.zeros((0, codec.K), np.uint16)]
    arrays = {name: [np.zeros((0, each.columns), each.dtype)] for name, each in features.items()}
    offset, offsets, entries = 0, dict.fromkeys(features, 0), []
    for file in files:
        places = {name: (offsets[name], len(array)) for name, array in file.arrays.items()}
        entries.append(replace(file.entry, shard=number, offset=offset, frames=len(file.codes),
                               features=places))
        codes.append(file.codes)
        offset += len(file.codes)
        for name, array in file.arrays.items():
            arrays[name].append(array)
            offsets[name] += len(array)
    write_array(shard_path(out, number, "npy"), np.concatenate(codes))
    for name, parts in arrays.items():
        write_array(shard_path(out, number, f"{name}.npy"), np.concatenate(parts))
    write_json(shard_path(out, number, "json"), [entry.to_plain() for entry in entries], indent=None)


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
    todo = update and (update.shares, update.first, update.sounds)
    todo, error = ranks.broadcast((todo, error))
    if error is not None and ranks.is_main:
        raise error
    if error is not None:
        exit_process(2)  # rank 0 says why
    shares, first, sounds = todo
    began = time.monotonic()
    try:
        work = functools.partial(encode_share, shares[ranks.rank], first, out, codec, device, features,
                                 sounds, ranks.is_main)
        done = on_all_ranks(work, update, out, ranks)
        if ranks.is_main:
            numbers = [number for share in done for number in share.numbers]
            entries = finish_update(update, out, dataset, numbers)
            describe_update(update, entries, done, out, codec, time.monotonic() - began)
    finally:
        if ranks.is_main and update.lock is not None:
            os.close(update.lock)


def on_all_ranks(work: Callable[[], Share], update: Update | None, out: str, ranks: Ranks) -> list[Share]:
    """What each rank has done. Where it ends early, rank 0 (which has the update) says how much is stored.

    Errors: those of any rank."""
    try:
        share, error = None, None
        try:
            share = work()
        except Exception as problem:  # the others are told when they are done
            error = problem
        results = ranks.gather((share, error and f"rank {ranks.rank}: {describe_error(error)}"))
        if error is not None:
            raise error
        for problem in filter(None, (text for _, text in results) if ranks.is_main else ()):
            raise ValueError(problem)
    except BaseException:
        if update is not None:
            say_unfinished(update, out)
        raise
    return [share for share, _ in results]


def finish_update(update: Update, out: str, dataset: str, numbers: list) -> list[CachedEntry]:
    """Swaps in cache.json, and removes the shards that neither it nor the one before names -> its entries.

    numbers: of the new shards. Errors: ValueError where there is nothing in it."""
    written = {entry.key: entry for number in numbers for entry in read_list(out, number)}
    entries = [written.get(entry.key, entry) for entry in update.entries]
    if lost := [entry.key for entry in entries if entry.shard == TO_ENCODE]:
        raise ValueError(f"{out} lacks what another rank wrote ({len(lost)} files, such as {lost[0]!r}): "
                         "--out must lie on a disk that all machines share")
    if not any(entry.frames for entry in entries):
        raise ValueError(f"none of the {len(entries)} files of {dataset!r} can be encoded: "
                         f"{entries[0].error}")
    named = {entry.shard for entry in [*update.before, *entries]}
    # What is gone today, such as a disk that is not there, may be back tomorrow
    digests = {entry.digest for entry in entries} | {None}
    dropped = [entry for entry in update.usable if entry.shard in named and entry.digest not in digests]
    dropped = {entry.digest: entry.to_plain() for entry in dropped}
    content = update.settings | {"entries": [entry.to_plain() for entry in entries]}
    content |= {"dropped": list(dropped.values())} if dropped else {}
    write_json(Path(out, "cache.json"), content, indent=None)
    for number, in_shard in by_shard(entries).items():  # for whoever looks into them
        path, plain = shard_path(out, number, "json"), [entry.to_plain() for entry in in_shard]
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_bytes()) == plain:
                continue
        write_json(path, plain, indent=None)
    for path in Path(out).glob("shard_*"):
        if shard_number(path) not in named or path.suffix == ".tmp":
            with contextlib.suppress(OSError):
                path.unlink()
    return entries


def read_list(out: str, number: int) -> list[CachedEntry]:
    """The entries of what was encoded into a shard; none if it is not there."""
    path = shard_path(out, number, "json")
    return [CachedEntry.of_plain(each) for each in json.loads(path.read_bytes())] if path.is_file() else []


def say_unfinished(update: Update, out: str) -> None:
    """Says how much of the work is stored when a command ends before its time."""
    wanted = {entry.key for entry in update.entries if entry.shard == TO_ENCODE}
    numbers = {shard_number(path) for path in Path(out).glob("shard_*.json")}
    written = [entry for number in numbers if number >= update.first for entry in read_list(out, number)]
    stored = wanted & {entry.key for entry in written if entry.error is None}
    as_before = "; until it is through, the cache is as it was" if update.before else ""
    print(f"{out} is unfinished: {len(stored)} of {len(wanted)} files to encode are stored, "
          f"the same command goes on from here{as_before}", flush=True)


def describe_update(update: Update, entries: list, done: list[Share], out: str, codec, took: float) -> None:
    """Prints what was done to a cache, and what is in it."""
    for line in skip_lines({e.path: f"cannot be encoded: {e.error}" for e in entries if e.error}):
        print(f"skipped {line}")
    mixed = " after mixing to mono" if codec.channels == 1 else ""
    for line in skip_lines({e.path: f"silent{mixed}" for e in entries if e.silent}):
        print(f"problem {line}")
    counts = count_changes(update.entries, entries, update.before)
    changes = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    encoded = sum(share.encoded for share in done)
    rate = rate_text(sum(share.seconds for share in done), took) if encoded else ""
    print(f"files: {changes}; encoded {encoded}{rate}")
    frames = sum(entry.frames for entry in entries)
    print(f"{out}: {len(entries)} files, {frames} frames of {codec.K} codebooks at {codec.frame_rate:g} Hz, "
          f"{frames * codec.K * 2 / 1e6:.1f} MB")
