"""What is in a dataset: audio of a folder or a manifest, captions beside it, what cannot be used and why.

    folder | manifest ─► rows (path, key, what the manifest says) ─► header and sidecar of each file ─► Scan

A caption is the text of song.txt, or the "description" in song.json, beside song.mp3. Manifests and the
fields of song.json are those of audiocraft. Nobody can vouch for files that people collect: a bad file is
skipped, a bad field is left out, each with its reason, and the rest goes on.
"""

import gzip
import hashlib
import os
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from tqdm import tqdm

from support import audio
from support.captions import FIELDS, READ_ERRORS, parse_object, read_sidecar

MAX_SECONDS = 1e6  # 11 days: a longer duration in a header is a broken header
THREADS = 16  # the time goes into waiting for the disk


@dataclass
class Entry:
    """One file of a dataset. `key` is its name within the dataset: what is sorted and hashed."""
    path: str
    key: str
    seconds: float
    sample_rate: int | None = None  # Hz
    channels: int | None = None  # None: the manifest does not say
    meta: dict = field(default_factory=dict)  # description and metadata (FIELDS, those present)
    caption: str = "none"  # where the description came from: json, txt or none
    split: str | None = None  # "train" or "valid" where a folder decided, not the hash

    def read(self, start_seconds: float, seconds: float, codec) -> Tensor:
        """Audio [C, n] as the codec takes it, less at the end. Errors: ValueError where there is none."""
        wav = audio.read_audio(self.path, start_seconds, seconds, codec.sample_rate, codec.channels)
        if wav.shape[-1] == 0:
            raise ValueError(f"no audio at {start_seconds:.2f} s")
        return wav


@dataclass
class Scan:
    """What was found: files to use, and {path: reason} of files skipped and of files used with a problem."""
    entries: list
    skipped: dict
    problems: dict


# ------------------------------------------------------------------------------------------------------------
# folders and manifests


def list_folder(root: str) -> tuple[list, dict]:
    """Files under root but captions, links followed, sorted -> ([(path, key, {})], skipped)."""
    rows, skipped, seen = [], {}, set()

    def note_unreadable(error: OSError) -> None:
        skipped[error.filename] = "unreadable folder"

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=note_unreadable):
        subfolders.sort()
        if os.path.realpath(folder) in seen:  # links that form a loop
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in names:
            if not name.lower().endswith((".json", ".txt")):
                path = os.path.join(folder, name)
                rows.append((path, os.path.relpath(path, root), {}))
    return sorted(rows, key=lambda row: row[1]), skipped


def list_manifest(manifest: str) -> tuple[list, dict]:
    """The lines of audiocraft's data.jsonl[.gz], sorted -> ([(path, key, the line's fields)], skipped).

    A path is relative to the manifest's folder, else to the working directory; unresolved, it is the key."""
    rows, skipped = [], {}
    try:
        with (gzip.open if manifest.endswith(".gz") else open)(manifest, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_object(line)
                    path = os.path.join(os.path.dirname(manifest), row["path"])  # absolute: stays itself
                except (ValueError, KeyError, TypeError) as error:
                    skipped[f"{manifest}:{number}"] = f"manifest line: {error!r}"
                    continue
                if not os.path.exists(path):
                    path = os.path.abspath(row["path"])
                rows.append((path, row["path"], row))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{manifest} cannot be read as a manifest: {error}") from None
    return sorted(rows, key=lambda row: row[1]), skipped


def cancels_in_mono(path: str, seconds: float) -> bool:
    """Whether the channels in the middle of a file are opposite, so that their mean is 40 dB below them."""
    wav = audio.read_audio(path, max(0.0, seconds / 2 - 0.5), 1.0)  # [C, N]
    return wav.numel() > 0 and bool(wav.mean(0).abs().max() < 0.01 * wav.abs().max())


def probe_file(path: str, key: str, row: dict, headers: bool) -> tuple[Entry, list]:
    """Header and sidecar of a file -> (entry, problems). A manifest's numbers are believed unless `headers`.

    Errors: ValueError, OSError for a file that cannot be used."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in audio.AUDIO_SUFFIXES:
        raise ValueError(f"not audio by its name: {suffix or 'no suffix'}")
    if not os.path.isfile(path):
        raise ValueError("not a file" if os.path.exists(path) else "missing")
    if os.path.getsize(path) == 0:
        raise ValueError("zero bytes")
    meta, caption, problems = read_sidecar(path)
    seconds, sample_rate, channels = row.get("duration"), row.get("sample_rate"), None
    said = isinstance(seconds, (int, float))
    if headers or not said or not isinstance(sample_rate, (int, float)):
        info = audio.audio_info(path)
        if said and not info.seconds - 0.5 <= seconds <= info.seconds + 0.5:
            manifest = f"{str(seconds)[:20]} s in the manifest"
            problems.append(f"duration differs: {manifest}, {info.seconds:.2f} s in the file")
        seconds, sample_rate, channels = info.seconds, info.sample_rate, info.channels
        if headers and channels > 1 and cancels_in_mono(path, seconds):
            problems.append("silent after mixing to mono (its channels cancel)")
    if not (0 < seconds < MAX_SECONDS and audio.SAMPLE_RATES[0] <= sample_rate <= audio.SAMPLE_RATES[1]):
        raise ValueError(f"absurd header: {seconds} s at {sample_rate} Hz")
    return Entry(path, key, float(seconds), int(sample_rate), channels, meta, caption), problems


def scan_dataset(dataset: str, headers: bool = False) -> Scan:
    """What is in a folder, a manifest or a folder that holds data.jsonl[.gz], from headers and sidecars.

    headers: those of a manifest's files too, whose durations and rates are believed otherwise.
    Errors: ValueError where there is no dataset, or no audio in it that can be used."""
    # A manifest, or the files of a folder
    root = os.path.abspath(dataset)
    candidates = [root, f"{root}/data.jsonl", f"{root}/data.jsonl.gz"]
    manifests = [p for p in candidates if p.endswith((".jsonl", ".jsonl.gz")) and os.path.isfile(p)]
    if not manifests and not os.path.isdir(root):
        raise ValueError(f"dataset {dataset!r} is not there: "
                         "give a folder of audio, a manifest .jsonl[.gz], or toy")
    rows, skipped = list_manifest(manifests[0]) if manifests else list_folder(root)

    # Each file's header and sidecar
    def probe_or_reason(row: tuple) -> tuple[Entry, list] | str:
        try:
            return probe_file(*row, headers)
        except READ_ERRORS as error:
            return str(error).removeprefix(f"{row[0]}: ")

    entries, problems, first_seen = [], {}, {}
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(probe_or_reason, rows)
        results = tqdm(results, "scanning", len(rows), leave=False, disable=not sys.stderr.isatty())
        for (path, _, _), result in zip(rows, results):
            if isinstance(result, str):
                skipped[path] = result
                continue
            entry, notes = result
            same = first_seen.setdefault(os.path.realpath(path), entry)
            if same is not entry:
                skipped[f"{path} (again)"] = f"same file twice: {same.key}"
                continue
            entries.append(entry)
            if notes:
                problems[path] = "; ".join(notes)
    if not entries:
        found = "; ".join(skip_lines(skipped)) or "nothing"
        raise ValueError(f"no usable audio in {dataset!r}: looked for {' '.join(audio.AUDIO_SUFFIXES)}, "
                         f"found {found}; give a folder or manifest of readable audio")
    return Scan(entries, skipped, problems)


# ------------------------------------------------------------------------------------------------------------
# split into train and valid


def split_by_hash(entries: list, fraction: float) -> tuple[list, list, str]:
    """(train, valid, note): a file is in valid where its key's hash is under the fraction, come what may."""
    if len(entries) == 1:
        return entries, entries, "the only file is both train and valid"
    place = {}
    for entry in entries:
        digest = hashlib.sha256(os.fsencode(entry.key)).digest()
        place[entry.key] = int.from_bytes(digest[:8], "big") / 2 ** 64
    ordered = sorted(entries, key=lambda entry: place[entry.key])
    count = sum(p < fraction for p in place.values())
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


def split_entries(entries: list, valid: str | float = 0.05) -> tuple[list, list, str]:
    """(train, valid, note). Files of a --valid folder that also lie in the dataset are taken out of train."""
    if (fraction := valid_fraction(valid)) is not None:
        return split_by_hash(entries, fraction)
    valid_entries = scan_dataset(valid).entries
    paths = {os.path.realpath(entry.path) for entry in valid_entries}
    train_entries = [entry for entry in entries if os.path.realpath(entry.path) not in paths]
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
        lines.append(f"{len(paths)} {kind} ({names})")
    return lines


def print_report(dataset: str, found: Scan, train: list, valid: list, note: str) -> None:
    """Prints what a dataset holds, what is wrong with it, and how many files are in train and in valid."""
    def counts(name: str) -> str:
        common = Counter(getattr(entry, name) for entry in found.entries).most_common(8)
        return ", ".join(f"{value} ({count})" for value, count in common)

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
    for name, part in (("train", train), ("valid", valid)):
        hours = sum(entry.seconds for entry in part) / 3600
        print(f"{name}        {len(part)} files, {hours:.3f} hours" + (f" ({note})" if note else ""))
    for kind, reasons in (("skipped", found.skipped), ("problem", found.problems)):
        for line in skip_lines(reasons):
            print(f"{kind}      {line}")
