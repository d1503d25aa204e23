"""What is in a dataset: audio of a folder or a manifest, its captions, what cannot be used and why.

    folder | manifest ─► rows (path, key, what the manifest says)
        ─► captions of tables (tables.py) ─► header and sidecars of each file (captions.py) ─► Scan

Nobody can vouch for files that people collect: a bad file is skipped, a bad field is left out, each with its
reason, and the rest goes on. Collections are large: a folder is listed once, a file asked for once, and only
some hundreds of files are under way at a time.
"""

import functools
import gc
import gzip
import hashlib
import os
import re
import stat
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from support import audio, common, decode, tags
from support.captions import (FIELDS, NO_META, READ_ERRORS, find_sidecars, index_sidecars, is_sidecar,
                              parse_object, read_captions, split_zip_path)
from support.draw import describe_draws, long_enough
from support.tables import add_tables, is_table

MAX_SECONDS = 1e6  # 11 days: a longer duration in a header is a broken header
MOST_SUFFIXES = 12  # that are named, of what is not audio
THREADS = 16  # where the time goes into waiting for the disk; else they only wait for each other
FILES_AT_ONCE = 64  # files that a thread takes at once
WAITS = 3  # times as long as computing takes
SHARD_SUFFIXES = (".parquet", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".arrow")  # for unpack.py
PACKED = "packed, which `python data.py import FILE --out FOLDER` unpacks"
RECORD = ".imported.json"  # in a folder that support/unpack.py made: which shard it is of
TRASH = ("#recycle", "@eadir", "@recycle", "$recycle.bin", "__macosx", "lost+found")  # beside hidden names
PATH_FIELDS = ("file_name", "audio_filepath", "audio_path", "audio", "file", "filename")


@dataclass
class Entry:
    """One file of a dataset. `key` is its name within the dataset: what is sorted and hashed."""
    path: str
    key: str
    seconds: float
    sample_rate: int | None = None  # Hz
    channels: int | None = None  # None: the manifest does not say
    meta: dict = field(default_factory=dict)  # description and metadata (FIELDS, those present)
    caption: str = "none"  # where the description came from: json, txt, manifest, csv .., tags or none
    split: str | None = None  # "train" or "valid" where a folder decided, not the hash
    weight: float | None = None  # how often it is drawn beside others, where the manifest says so

    def read(self, start_seconds: float, seconds: float, codec) -> Tensor:
        """Audio [C, n] as the codec takes it, less at the end. Errors: ValueError where there is none."""
        wav = audio.read_audio(self.path, start_seconds, seconds, codec.sample_rate, codec.channels)
        if wav.shape[-1] == 0:
            raise ValueError(f"no audio at {start_seconds:.2f} s")
        return wav


@dataclass
class Scan:
    """What was found: files to use, and {path: reason} of files skipped and of files used with a problem.

    notes: lines on tables, fields and texts that were seen, and whether they are used. parts: (train, valid,
    note) of `split_entries`, once it was asked."""
    entries: list
    skipped: dict
    problems: dict
    notes: list = field(default_factory=list)
    parts: tuple | None = None


class Listing(NamedTuple):
    """The names in a folder. files: {name: whether it is a symbolic link}; sidecars: see `index_sidecars`."""
    real: str  # the folder's path without symbolic links
    folders: list
    files: dict
    sidecars: dict


# ------------------------------------------------------------------------------------------------------------
# folders and manifests


def list_names(folder: str) -> Listing:
    """What is in a folder, without asking for each file. Errors: OSError, ValueError where it is none."""
    folders, files = [], {}
    with os.scandir(folder) as found:
        for item in found:
            try:
                is_folder = item.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_folder:
                folders.append(item.name)
            else:
                files[item.name] = item.is_symlink()
    return Listing(os.path.realpath(folder), sorted(folders), files, index_sidecars(files))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is what a system keeps of removed files and of previews."""
    return name.startswith(".") or name.lower() in TRASH


def list_folder(root: str, listing: Callable, alive: Callable) -> tuple[list, dict, list, list]:
    """Files under root, links followed -> ([(path, key, {})], skipped, tables, texts that belong to none)."""
    rows, skipped, tables, lone, seen, waiting = [], {}, [], [], set(), [root]
    while waiting:
        folder = waiting.pop()
        alive()
        try:
            real, folders, files, sidecars = listing(folder)
        except OSError:
            skipped[folder] = "unreadable folder"
            continue
        if real in seen:  # links that form a loop
            continue
        seen.add(real)
        waiting += [os.path.join(folder, name) for name in reversed(folders) if not is_hidden(name)]
        for hidden in filter(is_hidden, folders):
            for inner, _, names in os.walk(os.path.join(folder, hidden)):
                skipped |= {os.path.join(inner, name): "hidden or in a trash folder" for name in names}
        stems = {os.path.splitext(name)[0] for name in files if not is_sidecar(name)} | files.keys()
        for name in files:
            path = os.path.join(folder, name)
            if name == RECORD:
                continue
            if is_hidden(name):
                skipped[path] = "hidden or in a trash folder"
            elif is_table(name):
                tables.append(path)
            elif not is_sidecar(name):
                rows.append((path, path[len(root):].lstrip("/"), {}))
            elif os.path.splitext(name)[0] not in stems:
                (tables if name.lower().endswith(".json") else lone).append(path)
    return rows, skipped, tables, lone


def list_manifest(manifest: str, listing: Callable, alive: Callable) -> tuple[list, dict]:
    """The lines of a manifest, such as audiocraft's data.jsonl[.gz] -> ([(path, key, its fields)], skipped).

    A path is relative to the manifest's folder, else to the working directory; unresolved, it is the key."""
    lines, skipped, here = [], {}, os.path.dirname(manifest)
    try:
        with (gzip.open if manifest.endswith(".gz") else open)(manifest, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                alive()
                try:
                    said = parse_object(line)
                    name = said.pop("path", None)
                    for other in PATH_FIELDS:
                        name = said.pop(other, None) if name is None else name
                    if name is None:
                        fields = ", ".join(map(ascii, said))[:100] or "no fields"
                        raise ValueError(f'without "path", with {fields}')
                    if not isinstance(name, str):
                        raise ValueError("whose path is no text")
                except ValueError as error:
                    skipped[f"{manifest}:{number}"] = f"manifest line {error}"
                    continue
                # "meta" and "from" are what a table says: those of a line are fields that nobody reads
                lines.append((name, {f"manifest's {key}" if key in ("meta", "from") else key: value
                                     for key, value in said.items() if value is not None}))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{manifest} cannot be read as a manifest: {error}") from None
    lines.sort(key=lambda line: line[0])  # folder by folder
    rows = []
    for name, said in lines:
        alive()
        path = os.path.join(here, name)  # absolute: stays itself
        if not is_listed(path, listing) and is_listed(os.path.abspath(name), listing):
            path = os.path.abspath(name)
        if isinstance(info := said.get("info_path"), str):  # FILE.json, or FILE.zip:NAME
            beside = os.path.join(here, info)
            is_beside = is_listed(split_zip_path(beside)[0], listing)
            said["info_path"] = beside if is_beside else os.path.abspath(info)
        rows.append((path, name, said))
    return rows, skipped


def is_listed(path: str, listing: Callable) -> bool:
    """Whether there is a file or folder of this name, from the listing of its folder."""
    folder, _, name = path.rpartition("/")
    try:
        found = listing(folder or "/")
    except (OSError, ValueError):
        return False
    return name in found.files or name in found.folders


def probe_file(path: str, key: str, said: dict, headers: bool) -> tuple[Entry, list]:
    """The header of a file -> (entry, problems). A manifest's numbers are believed unless `headers`.

    Errors: ValueError, OSError for a file that cannot be used."""
    suffix = os.path.splitext(path)[1].lower()
    if path.lower().endswith(SHARD_SUFFIXES):
        raise ValueError(f"{PACKED}: {suffix}")
    if suffix not in decode.AUDIO_SUFFIXES:
        raise ValueError(f"not audio by its name: {suffix or 'no suffix'}")
    if suffix in decode.AV_SUFFIXES and not common.has_package("av"):
        raise ValueError(f"{decode.NEEDS_AV}: {suffix}")
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter for a zero within the name
        raise ValueError("missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if status.st_size == 0:
        raise ValueError("zero bytes")
    meta, problems = NO_META, []
    seconds, sample_rate, channels = said.get("duration"), said.get("sample_rate"), None
    has_duration = isinstance(seconds, (int, float))
    believed = has_duration and isinstance(sample_rate, (int, float))
    if headers or not believed:
        info = audio.audio_info(path)
        if not believed:
            found, problems = tags.read_tags(path, info.tags)
            meta = NO_META | found if found else NO_META
        if has_duration and not info.seconds - 0.5 <= seconds <= info.seconds + 0.5:
            manifest = f"{str(seconds)[:20]} s in the manifest"
            problems.append(f"duration differs: {manifest}, {info.seconds:.2f} s in the file")
        seconds, sample_rate, channels = info.seconds, info.sample_rate, info.channels
        if info.problem:
            problems.append(info.problem)
        if headers and audio.cancelling_channel(path) is not None:
            problems.append("channels cancel, as mono the strongest is taken")
    if not (0 < seconds < MAX_SECONDS and audio.SAMPLE_RATES[0] <= sample_rate <= audio.SAMPLE_RATES[1]):
        raise ValueError(f"absurd header: {seconds} s at {sample_rate} Hz")
    caption = "tags" if meta["description"] else "none"
    return Entry(path, key, float(seconds), int(sample_rate), channels, meta, caption), problems


def make_entry(path: str, key: str, said: dict, sidecars: tuple, headers: bool) -> tuple:
    """(entry, problems, fields not used) of a file, or the reason why it cannot be used.

    Where several say the same, the sidecar wins, then what the manifest or a table says, then tags."""
    try:
        entry, problems = probe_file(path, key, said, headers)
        meta, caption, notes, unused = read_captions(said, sidecars)
    except READ_ERRORS as error:
        return str(error).removeprefix(f"{path}: ")
    if caption != "none":
        entry.caption = caption
    if meta:
        entry.meta = {**entry.meta, **meta}
    if (weight := said.get("weight")) is not None:
        try:
            entry.weight = check_weight(weight)
        except ValueError as error:
            notes.append(str(error))
    return entry, problems + notes, unused


def check_weight(weight) -> float:
    """A manifest's weight. Errors: ValueError unless it is a number from 0 on."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e9:
        raise ValueError(f"weight left out: {str(weight)[:20]}")
    return float(weight)


def make_entries(rows: list, listing: Callable, headers: bool, alive: Callable) -> Iterator[tuple]:
    """(path, its path without links, what `make_entry` gives) of rows, taken from their end.

    Files in memory or on a fast disk are read one after the other, in half the time that threads would take,
    of which one at a time can compute. Threads take over where most of the time is spent waiting."""
    def blocks() -> Iterator[list]:
        while rows:
            block = []
            for path, key, said in reversed(rows[-FILES_AT_ONCE:]):
                real, sidecars = resolve_file(path, said, listing)
                block.append((path, key, said, sidecars, headers, real))
            del rows[-FILES_AT_ONCE:]
            yield block

    def make_block(block: list) -> list:
        return [(row[0], row[-1], make_entry(*row[:-1])) for row in block]

    with ThreadPoolExecutor(THREADS) as pool:
        waiting, elapsed, computed = deque(), 0.0, 0.0
        for block in blocks():
            alive()
            if elapsed < 0.5 or elapsed < WAITS * computed:
                begun, begun_cpu = time.perf_counter(), time.thread_time()
                made = make_block(block)
                elapsed += time.perf_counter() - begun
                computed += time.thread_time() - begun_cpu
                yield from made
                continue
            waiting.append(pool.submit(make_block, block))
            if len(waiting) > 2 * THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def resolve_file(path: str, said: dict, listing: Callable) -> tuple[str, tuple]:
    """(the path without symbolic links, the sidecars of a file). A link's own come before its target's."""
    folder, _, name = path.rpartition("/")
    try:
        found = listing(folder or "/")
    except (OSError, ValueError):
        return path, ()
    sidecars = find_sidecars(folder, name, found.sidecars)
    real = path if found.real == folder else os.path.join(found.real, name)
    if found.files.get(name):
        real = os.path.realpath(path)
        if real != path:
            target, name = os.path.split(real)
            try:
                sidecars += find_sidecars(target, name, listing(target).sidecars)
            except OSError:
                pass
    return real, sidecars


def without_garbage_collection(function: Callable) -> Callable:
    """Decorates what makes a million objects that all stay: looking for garbage among them costs time."""
    @functools.wraps(function)
    def run(*args, **more):
        was_on = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **more)
        finally:
            if was_on:
                gc.enable()
    return run


@without_garbage_collection
def scan_dataset(dataset: str, headers: bool = False, captions: str | None = None,
                 caption_column: str | None = None, must_match: bool = True,
                 alive: Callable = lambda: None, argument: str = "dataset") -> Scan:
    """What is in a folder, a manifest or a folder that holds data.jsonl[.gz], from headers and captions.

    headers: those of a manifest's files too, whose durations and rates are believed otherwise. captions: a
    table beside those that are found; caption_column: which column of tables to take; must_match: whether
    both must be of use to these files. alive: called often, so that other ranks can be told to wait.
    argument: what to call the dataset where it is none.
    Errors: ValueError where there is no dataset, or no audio in it that can be used."""
    # A manifest, or the files of a folder
    root = os.path.abspath(dataset)
    listing = functools.lru_cache(maxsize=64)(list_names)
    candidates = [root, f"{root}/data.jsonl", f"{root}/data.jsonl.gz"]
    manifests = [p for p in candidates if p.endswith((".jsonl", ".jsonl.gz")) and os.path.isfile(p)]
    if not manifests and not os.path.isdir(root):
        raise ValueError(f"{argument} {not_a_dataset(dataset, argument)}")
    if manifests:
        (rows, skipped), tables, lone = list_manifest(manifests[0], listing, alive), [], []
    else:
        rows, skipped, tables, lone = list_folder(root, listing, alive)
    rows.sort(key=lambda row: row[1], reverse=True)  # they are taken from the end
    folder = os.path.dirname(root) if manifests == [root] else root
    notes = add_tables(rows, tables, lone, folder, captions, caption_column, must_match)

    # Each file's header and sidecars. Of several links to a file the file itself is taken
    entries, problems, places, unused, total = [], {}, {}, Counter(), len(rows)
    results = make_entries(rows, listing, headers, alive)
    hidden = not sys.stderr.isatty()
    for path, real, result in tqdm(results, "scanning", total, leave=False, disable=hidden):
        if isinstance(result, str):
            skipped[path] = result
            continue
        entry, reasons, fields = result
        unused.update(fields)
        if reasons:
            problems[path] = "; ".join(reasons)
        place = places.setdefault(real, len(entries))
        if place == len(entries):
            entries.append(entry)
            continue
        same = entries[place]
        if path == real != same.path:
            entries[place], entry, same = entry, same, entry
        if same.meta["description"] is None and entry.meta["description"] is not None:
            same.meta, same.caption = entry.meta, entry.caption
        skipped[f"{entry.path} (again)"] = f"same file twice: {same.key}"
    if not entries:
        found = "; ".join(skip_lines(skipped) + notes) or "nothing"
        suffixes = " ".join(decode.SNDFILE_SUFFIXES)
        raise ValueError(f"no usable audio in {dataset!r}: found {found}; give a folder or manifest of "
                         f"readable audio ({suffixes}, others with `pip install av`)")
    entries.sort(key=lambda entry: entry.key)
    if unused:
        notes.append("fields not used: " + ", ".join(f"{k} ({n})" for k, n in unused.most_common(12)))
    if lone:
        notes.append(f"{len(lone)} texts belong to no audio file of their name "
                     f"({', '.join(ascii(os.path.relpath(path, folder)) for path in sorted(lone)[:3])})")
    tagged = sum(entry.channels is not None and entry.path.lower().endswith(tags.TAGGED) for entry in entries)
    if tagged and not common.has_package("mutagen"):
        notes.append(f"tags of {tagged} files read in part: `pip install mutagen` reads them all")
    return Scan(entries, skipped, problems, notes)


def not_a_dataset(dataset: str, argument: str) -> str:
    """Why a path is no dataset, and what to give instead."""
    other = "toy" if argument == "dataset" else "a fraction"
    name, kind = dataset.lower(), f"give a folder of audio, a manifest .jsonl[.gz], or {other}"
    if not os.path.exists(dataset):
        return f"{dataset!r} is not there: {kind}"
    if name.endswith((".csv", ".tsv", ".json")):
        return (f"{dataset!r} is a table: give the folder of its audio; the table is found where it "
                f"lies beside or above the audio, else give it as --captions {dataset}")
    if name.endswith(SHARD_SUFFIXES):
        return (f"{dataset!r} is packed: unpack it with `python data.py import {dataset} --out "
                "FOLDER` and give that folder")
    if name.endswith((".zip", ".7z", ".rar", ".gz")):
        return f"{dataset!r} is an archive: unpack it and give the folder"
    if name.endswith(decode.AUDIO_SUFFIXES):
        return f"{dataset!r} is one audio file: give the folder it lies in"
    return f"{dataset!r} is a file of another kind: {kind}"


# ------------------------------------------------------------------------------------------------------------
# split into train and valid


def split_by_hash(entries: list, fraction: float, hash_alone: bool = False) -> tuple[list, list, str]:
    """(train, valid, note): a file is in valid where its key's hash is under the fraction.

    Of few files that may be far from the number asked for. It is then kept within a third of that, and the
    lowest hashes are taken. hash_alone: without this, for runs that began before there was such a rule."""
    if len(entries) == 1:
        return entries, entries, "the only file is both train and valid"
    places = {}
    for entry in entries:
        digest = hashlib.sha256(os.fsencode(entry.key)).digest()
        places[entry.key] = int.from_bytes(digest[:8], "big") / 2 ** 64
    ordered = sorted(entries, key=lambda entry: places[entry.key])
    count = sum(place < fraction for place in places.values())
    if not hash_alone:
        wanted = round(fraction * len(entries))
        count = min(max(count, wanted - wanted // 3), wanted + wanted // 3)
    count = min(max(1, count), len(entries) - 1)  # each gets at least one
    return ordered[count:], ordered[:count], ""


def valid_fraction(valid) -> float | None:
    """--valid as a fraction, None if it names a folder or a manifest. Errors: ValueError outside (0, 1)."""
    try:
        fraction = float(valid)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(f"--valid {valid}: a fraction lies between 0 and 1, "
                         "else give a folder or a manifest")
    return fraction


def split_entries(entries: list, valid: str | float = 0.05, hash_alone: bool = False,
                  **scanning) -> tuple[list, list, str]:
    """(train, valid, note). Files of a --valid folder that also lie in the dataset are taken out of train.

    scanning: arguments of `scan_dataset` for such a folder."""
    if (fraction := valid_fraction(valid)) is not None:
        return split_by_hash(entries, fraction, hash_alone)
    real_folder = functools.lru_cache(maxsize=64)(os.path.realpath)

    def real_path(entry: Entry) -> str:
        folder, name = os.path.split(entry.path)
        return os.path.realpath(entry.path) if os.path.islink(entry.path) else f"{real_folder(folder)}/{name}"

    valid_entries = scan_dataset(valid, must_match=False, argument="--valid", **scanning).entries
    paths = set(map(real_path, valid_entries))
    train_entries = [entry for entry in entries if real_path(entry) not in paths]
    if not train_entries:
        raise ValueError(f"--valid {valid!r} holds every file of the dataset: nothing is left to train on")
    taken = len(entries) - len(train_entries)
    return train_entries, valid_entries, f"{taken} files of --valid taken out of train" if taken else ""


# ------------------------------------------------------------------------------------------------------------
# what is said of a scan


def skip_lines(skipped: dict) -> list[str]:
    """{path: reason} -> one line a kind of reason, with its count and some names; the most frequent first."""
    groups = {}
    for path, reason in skipped.items():
        kind = re.split(r"[:(]", reason)[0].strip()
        groups.setdefault(kind, []).append(path)
    lines = []
    for kind, paths in sorted(groups.items(), key=lambda group: -len(group[1])):
        names = ", ".join(map(ascii, paths[:3])) + (", ..." if len(paths) > 3 else "")
        suffixes = ""
        if kind in ("not audio by its name", decode.NEEDS_AV, PACKED):
            found = Counter(skipped[path].partition(": ")[2] for path in paths).most_common()
            suffixes = ": " + ", ".join(f"{suffix} {count:,}" for suffix, count in found[:MOST_SUFFIXES])
            suffixes += f", {len(found) - MOST_SUFFIXES} more" if len(found) > MOST_SUFFIXES else ""
        lines.append(f"{len(paths)} {kind}{suffixes} ({names})")
    return lines


def print_report(dataset: str, found: Scan, parts: tuple, min_seconds: float, segment_seconds: float,
                 sample_by: str) -> None:
    """Prints what a dataset holds, what is wrong with it, and what is drawn from it with these flags.

    parts: of `split_entries`. Errors: ValueError where one of them has no file that is long enough."""
    def counts(name: str) -> str:
        most = Counter(getattr(entry, name) for entry in found.entries).most_common(8)
        return ", ".join(f"{value} ({count})" for value, count in most)

    seconds = np.array([entry.seconds for entry in found.entries])
    names = ("shortest", "5%", "median", "95%", "longest")
    quantiles = zip(names, np.quantile(seconds, (0, 0.05, 0.5, 0.95, 1)))
    given = {name: sum(entry.meta.get(name) is not None for entry in found.entries) for name in FIELDS}
    print(f"dataset      {os.path.abspath(dataset)}")
    print(f"files        {len(seconds)}, {seconds.sum() / 3600:.3f} hours; {len(found.skipped)} skipped, "
          f"{len(found.problems)} with a problem")
    print(f"sample rate  {counts('sample_rate')} Hz")
    print(f"channels     {counts('channels')}")
    print(f"duration     {', '.join(f'{name} {s:.1f}' for name, s in quantiles)} s")
    print(f"captions     {counts('caption')}")
    print(f"fields       {', '.join(f'{name} {count}' for name, count in given.items())}")
    *parts, note = parts
    train, valid = (long_enough(part, min_seconds) for part in parts)
    for name, part in (("train", train), ("valid", valid)):
        hours = sum(entry.seconds for entry in part) / 3600
        print(f"{name}        {len(part)} files, {hours:.3f} hours" + (f" ({note})" if note else ""))
    for line in found.notes:
        print(f"note         {line}")
    for kind, reasons in (("skipped", found.skipped), ("problem", found.problems)):
        for line in skip_lines(reasons):
            print(f"{kind}      {line}")
    print(f"draws        {describe_draws(train, segment_seconds, sample_by)}")
