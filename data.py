"""Audio and captions -> training examples, in an order that (seed, epoch, index) alone decides.

    folder | manifest ─scan─► entries ─split─► AudioDataset ─┐
                                 └─cache (codec)─► CacheDataset ─┼─► batches ─► [Example] ─collate─► Batch
    toy.py ──────────────────────────────────► ToyDataset ───┘

A dataset is anything with `example(epoch, index) -> Example`, `describe()`, `files` and `skipped`. A file that cannot
be read is skipped, named once and counted. Letters: B batch, K codebooks, T frames of a segment, C channels, N samples.

    python data.py check DATASET [--valid 0.05]                 what was found, what was skipped and why
    python data.py cache DATASET --codec CODEC --out DIR        encode everything once, to train without audio or codec
"""
import argparse
import copy
import gzip
import hashlib
import json
import math
import os
import stat
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from tqdm import tqdm

import tokenizer
import toy

FILES, SEGMENT = 1, 2                       # streams of random numbers: each has its own generator
MAX_TRIES = 10                              # files drawn in place of an unreadable one before giving up
MAX_TEXT = 10_000                           # characters kept of a text
MAX_LIST = 100                              # items kept of a list
MAX_SIDECAR_BYTES = 2 ** 20                 # a caption file larger than this is a mistake
RATES = (1_000, 1_000_000)                  # sample rates believed, Hz
MAX_PEAK = 100.0                            # float files may exceed 1; beyond this (40 dB) it is no audio
MAX_RESAMPLER = 30_000_000                  # coefficients of a resampling filter: prime rates would need gigabytes
MAX_SECONDS = 1e6                           # 11 days: a longer duration in a header is a broken header
CONTEXT_SECONDS, WINDOW_SECONDS = 2, 10     # cache: a window is encoded with this much audio on both sides
READ_ERRORS = (ValueError, OSError, RuntimeError)        # soundfile's own error is a RuntimeError
TEXTS, LOWER_TEXTS = ("title", "artist", "description"), ("key", "genre", "name", "instrument")
LISTS = ("moods", "keywords")
FIELDS = (*TEXTS, *LOWER_TEXTS, *LISTS, "bpm")
CONTROLS = {c: None for c in range(160) if unicodedata.category(chr(c)) == "Cc" and not chr(c).isspace()}


@dataclass
class Entry:
    """One file of a dataset. `key` is its path within the dataset: what is sorted and hashed."""
    path: str
    key: str
    seconds: float
    sample_rate: int | None = None
    channels: int | None = None
    meta: dict = field(default_factory=dict)
    caption: str = "none"                   # where the description came from: json, txt, toy or none
    split: str | None = None                # in a cache: "train" or "valid" where the split is by folder, else None
    shard: int = 0                          # in a cache: which shard, the first frame in it, how many frames
    offset: int = 0
    frames: int = 0
    error: str | None = None                # in a cache: why the file could not be encoded


@dataclass
class Scan:
    """What was found in a dataset: files to use, files skipped and sidecars with a problem (path -> reason)."""
    root: str
    entries: list
    skipped: dict
    problems: dict


@dataclass
class Example:
    """One training example on the host; `frames` of its T are real, the padding after them is masked from the loss."""
    wav: Tensor | None                      # [C, N] float32, zeros after the end of the file; None from a cache
    codes: Tensor | None                    # [K, T] int64, zeros after the end; from a cache only
    frames: int
    segment_frames: int                     # T
    meta: dict                              # description and metadata (FIELDS, those present), toy: the clip as well
    path: str
    start_seconds: float
    index: int
    skipped: list = field(default_factory=list)          # (path, reason) of the files that failed before this one


@dataclass
class Batch:
    """Examples stacked: wav [B, C, N] float32 or codes [B, K, T] int64, frame_mask [B, T] True where audio is."""
    wav: Tensor | None
    codes: Tensor | None
    frame_mask: Tensor
    metas: list
    indices: list


# ---------------------------------------------------------------------------------------------- captions and metadata
def clean_text(value) -> str | None:
    """Any JSON value -> one line of valid Unicode without control characters, None if empty; else ValueError."""
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value[:MAX_LIST]):
        value = ", ".join(str(v) for v in value[:MAX_LIST])
    if value is None:
        return None
    if isinstance(value, (bool, dict, list)) or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"no text: {type(value).__name__}")
    text = str(value).translate(CONTROLS).encode("utf-8", "replace").decode("utf-8")      # lone surrogates become "?"
    text = " ".join(text.split())
    return None if text in ("", "None") else text


def clean_list(value) -> list | None:
    """A list, or a string split at commas and spaces -> lower-case strings, None if empty."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"no list: {type(value).__name__}")
    items = [clean_text(v) for v in value[:MAX_LIST]]
    return [v[:MAX_TEXT].lower() for v in items if v] or None


def clean_bpm(value) -> float | None:
    """Beats per minute from a number or a string, None if empty."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "None")):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"no number: {type(value).__name__}")
    try:
        bpm = float(value)
    except (ValueError, OverflowError):
        raise ValueError("not a number") from None
    if not 0 < bpm < 10_000:
        raise ValueError("out of range")
    return bpm


def clean_meta(raw: dict) -> tuple[dict, list]:
    """audiocraft's metadata fields, cleaned -> (the fields that hold something, problems). Never raises."""
    meta, problems = {}, []
    for name in FIELDS:
        try:
            clean = clean_bpm if name == "bpm" else clean_list if name in LISTS else clean_text
            value = clean(raw.get(name))
        except ValueError as e:
            problems.append(f"{name} left out: {e}")
            continue
        if isinstance(value, str) and len(value) > MAX_TEXT:
            problems.append(f"{name} cut at {MAX_TEXT} characters: it has {len(value)}")
            value = value[:MAX_TEXT]
        if isinstance(value, str) and name in LOWER_TEXTS:
            value = value.lower()
        if value is not None and not (name == "key" and "," in value):       # "C, G": two keys are none
            meta[name] = value
    return meta, problems


def read_small(path: str) -> bytes:
    """A file of at most MAX_SIDECAR_BYTES; ValueError if it is larger."""
    with open(path, "rb") as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise ValueError(f"larger than {MAX_SIDECAR_BYTES} bytes")
    return data


def read_sidecar(path: str, info_path: str | None = None) -> tuple[dict, str, list]:
    """Metadata of song.json or info_path, else the caption of song.txt -> (meta, "json" | "txt" | "none", problems)"""
    raw, source, problems = {}, "none", []
    stem = os.path.splitext(path)[0]
    json_path, txt_path = info_path or stem + ".json", stem + ".txt"
    if os.path.isfile(json_path):
        try:
            raw = json.loads(read_small(json_path).decode("utf-8-sig"))
            if not isinstance(raw, dict):
                raise ValueError(f"not a JSON object but {type(raw).__name__}")
        except (ValueError, OSError, RecursionError) as e:
            problems.append(f"json not used: {e}")
            raw = {}
    meta, found = clean_meta(raw)
    if "description" in meta:
        source = "json"
    elif os.path.isfile(txt_path):
        try:
            text, notes = clean_meta({"description": read_small(txt_path).decode("utf-8-sig", "replace")})
            found, source = found + notes, "txt" if text else "none"
            meta |= text
        except (ValueError, OSError) as e:
            problems.append(f"txt not used: {e}")
    return {"description": None} | meta, source, problems + found


# ------------------------------------------------------------------------------------------------- folders, manifests
def list_folder(root: str) -> tuple[list, dict]:
    """Audio files under root, links followed, sorted -> ([(path, key, {})], skipped). Loops of links end."""
    found, skipped, seen = [], {}, set()
    unreadable = lambda e: skipped.update({e.filename: "unreadable folder"})
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        for name in names:
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if suffix in tokenizer.AUDIO_SUFFIXES:
                found.append((path, Path(os.path.relpath(path, root)).as_posix(), {}))
            elif suffix not in (".json", ".txt"):
                skipped[path] = f"not audio by its name ({suffix or 'no suffix'})"
    return sorted(found, key=lambda row: row[1]), skipped


def manifest_line(line: bytes, folder: str) -> tuple[str, str, dict]:
    """One line of an audiocraft manifest -> (path, key, the line's fields). ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"] or "\0" in row["path"]:
        raise ValueError("no path")
    inside = os.path.join(folder, row["path"])                               # an absolute path stays itself
    path = inside if os.path.exists(inside) else os.path.abspath(row["path"])
    relative = os.path.relpath(path, folder)
    return path, row["path"] if relative.startswith("..") else Path(relative).as_posix(), row


def list_manifest(manifest: str) -> tuple[list, dict]:
    """The entries of data.jsonl[.gz], sorted -> ([(path, key, fields)], skipped)."""
    found, skipped = [], {}
    opener = gzip.open if manifest.endswith(".gz") else open
    try:
        with opener(manifest, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        found.append(manifest_line(line, os.path.dirname(manifest)))
                except ValueError as e:
                    skipped[f"{manifest}:{number}"] = f"manifest line: {e}"
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{manifest} cannot be read as a manifest: {e}") from None
    return sorted(found, key=lambda row: row[1]), skipped


def number_or_none(value) -> float | None:
    """A finite JSON number as float, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value,
                                                                              bool) and abs(value) < 1e300 else None


def probe(path: str, key: str, row: dict, headers: bool) -> tuple[Entry, list]:
    """Header and sidecar of one file -> (entry, problems). A manifest's numbers are believed unless `headers`."""
    if os.path.splitext(path)[1].lower() not in tokenizer.AUDIO_SUFFIXES:
        raise ValueError("not audio by its name" if ":" not in path else "not audio by its name (inside an archive)")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if status.st_size == 0:
        raise ValueError("zero bytes")
    problems, channels = [], None
    seconds, sample_rate = number_or_none(row.get("duration")), number_or_none(row.get("sample_rate"))
    if headers or seconds is None or sample_rate is None:
        info = tokenizer.audio_info(path)
        if seconds is not None and abs(seconds - info.seconds) > 0.5:
            problems.append(f"duration differs: {seconds:.2f} s in the manifest, {info.seconds:.2f} s in the file")
        seconds, sample_rate, channels = seconds or info.seconds, info.sample_rate, info.channels
    if not 0 < seconds < MAX_SECONDS:
        raise ValueError(f"absurd duration: {seconds} s")
    if not RATES[0] <= sample_rate <= RATES[1]:
        raise ValueError(f"absurd sample rate: {sample_rate} Hz")
    info_path = row.get("info_path") if isinstance(row.get("info_path"), str) and "\0" not in row["info_path"] else None
    if info_path:
        beside = path[:-len(row["path"])] + info_path if path.endswith(row["path"]) else info_path
        info_path = beside if os.path.isfile(beside) else info_path
    meta, caption, notes = read_sidecar(path, info_path if info_path and os.path.isfile(info_path) else None)
    return Entry(path, key, seconds, int(sample_rate), channels, meta, caption), problems + notes


def scan(dataset: str, headers: bool = False) -> Scan:
    """A folder, a manifest or a folder that holds data.jsonl[.gz] -> what is in it. Reads headers and sidecars."""
    root = os.path.abspath(dataset)
    inside = [p for p in (os.path.join(root, "data.jsonl"), os.path.join(root, "data.jsonl.gz")) if os.path.isfile(p)]
    if os.path.isdir(root) and not inside:
        candidates, skipped = list_folder(root)
    elif inside or (os.path.isfile(root) and root.endswith((".jsonl", ".jsonl.gz"))):
        candidates, skipped = list_manifest(inside[0] if inside else root)
    else:
        raise ValueError(f"dataset {dataset!r} is not there: give a folder of audio, a manifest .jsonl[.gz], or toy")

    def attempt(candidate):
        try:
            return probe(*candidate, headers)
        except READ_ERRORS as e:
            return "missing" if isinstance(e, FileNotFoundError) else str(e) or type(e).__name__

    entries, problems, first = [], {}, {}
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        results = tqdm(pool.map(attempt, candidates), total=len(candidates), desc="scanning", leave=False,
                       disable=not sys.stderr.isatty())
        for (path, key, _), result in zip(candidates, results):
            same = first.setdefault(os.path.realpath(path), key)
            if isinstance(result, str):
                skipped[path] = result
            elif same != key or (entries and entries[-1].key == key):       # sorted: the same line twice is adjacent
                skipped[f"{path} (again)"] = f"same file twice: {same}"
            else:
                entries.append(result[0])
                problems |= {path: "; ".join(result[1])} if result[1] else {}
    if not entries:
        raise ValueError(f"no usable audio in {dataset!r}: looked for {' '.join(tokenizer.AUDIO_SUFFIXES)}, found "
                         f"{'; '.join(skip_lines(skipped)) or 'nothing'}; give a folder or manifest of readable audio")
    return Scan(root, entries, skipped, problems)


def skip_lines(skipped: dict) -> list[str]:
    """{path: reason} -> one line a kind of reason, with its count and the first names."""
    groups = {}
    for path, reason in skipped.items():
        groups.setdefault(reason.split(":")[0], []).append(path)
    return [f"{len(paths)} {kind} ({', '.join(map(ascii, paths[:3]))}{', ...' if len(paths) > 3 else ''})"
            for kind, paths in sorted(groups.items(), key=lambda group: -len(group[1]))]


# -------------------------------------------------------------------------------------------------------------- split
def split_by_hash(entries: list, fraction: float) -> tuple[list, list, str]:
    """(train, valid, note): a file is in valid where the hash of its key is under the fraction, come what may."""
    place = {e.key: int.from_bytes(hashlib.sha256(os.fsencode(e.key)).digest()[:8], "big") / 2 ** 64 for e in entries}
    if len(entries) == 1:
        return entries, entries, "the only file is both train and valid"
    ordered = sorted(entries, key=lambda e: place[e.key])
    count = min(max(1, sum(p < fraction for p in place.values())), len(entries) - 1)
    valid = {e.key for e in ordered[:count]}
    return [e for e in entries if e.key not in valid], [e for e in entries if e.key in valid], ""


def valid_fraction(valid) -> float | None:
    """--valid as a fraction, None where it names a folder or a manifest. ValueError if outside (0, 1)."""
    try:
        fraction = float(valid)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(f"--valid {valid}: a fraction lies between 0 and 1, else give a folder or a manifest")
    return fraction


def split_entries(found: Scan, valid: str | float = 0.05) -> tuple[list, list, str]:
    """(train, valid, note). Files of a --valid folder that also lie in the dataset are taken out of train."""
    fraction = valid_fraction(valid)
    if fraction is not None:
        return split_by_hash(found.entries, fraction)
    held = scan(str(valid)).entries
    paths = {os.path.realpath(e.path) for e in held}
    train = [e for e in found.entries if os.path.realpath(e.path) not in paths]
    if not train:
        raise ValueError(f"--valid {str(valid)!r} holds every file of {found.root!r}: nothing is left to train on")
    taken = len(found.entries) - len(train)
    return train, held, f"{taken} files of --valid taken out of train" if taken else ""


# ----------------------------------------------------------------------------------------------------------- datasets
class Segments:
    """Random segments of files: what live audio and the cache share, so that both see the same segments.

    Files come by a new permutation for each pass over them, the start uniformly from
    [0, duration - segment * min_segment_ratio], rounded down to a codec frame. Without `shuffle` the epoch counts for
    nothing: the same segments every time.
    """
    def __init__(self, entries, segment_seconds, sample_rate, hop, seed, min_segment_ratio=0.8, shuffle=True):
        if not 0 < segment_seconds < MAX_SECONDS:
            raise ValueError(f"segment_seconds {segment_seconds}: seconds above 0")
        if not 0 < min_segment_ratio <= 1:
            raise ValueError(f"min_segment_ratio {min_segment_ratio}: above 0, at most 1")
        if seed < 0:
            raise ValueError(f"seed {seed}: 0 or more")
        self.files, self.segment_seconds, self.sample_rate, self.hop = entries, segment_seconds, sample_rate, hop
        self.seed, self.min_segment_ratio, self.shuffle = seed, min_segment_ratio, shuffle
        self.samples = max(1, round(segment_seconds * sample_rate))                       # N
        self.segment_frames = math.ceil(self.samples / hop)                               # T
        self.skipped, self.note, self._order = {}, "", (None, None)

    def draws(self, epoch: int, index: int) -> Iterator[tuple[Entry, int]]:
        """(file, first frame) of this example, then of its replacements: an endless sequence."""
        epoch, count = epoch if self.shuffle else 0, len(self.files)
        turn = (epoch, index // count)
        if self._order[0] != turn:
            self._order = turn, np.random.default_rng((self.seed, FILES, *turn)).permutation(count)
        rng = np.random.default_rng((self.seed, SEGMENT, epoch, index))
        entry = self.files[self._order[1][index % count]]
        while True:
            latest = max(0.0, entry.seconds - self.segment_seconds * self.min_segment_ratio)
            yield entry, int(rng.random() * latest * self.sample_rate / self.hop)
            entry = self.files[rng.integers(count)]

    def example(self, epoch: int, index: int) -> Example:
        """The example of (seed, epoch, index). ValueError after MAX_TRIES unreadable files in a row."""
        failed = []
        for (entry, start), _ in zip(self.draws(epoch, index), range(MAX_TRIES + 1)):
            try:
                wav, codes, frames = self.read(entry, start)
            except READ_ERRORS as e:
                failed.append((entry.path, f"cannot be read: {e}"))
                self.report(*failed[-1])
                continue
            seconds = start * self.hop / self.sample_rate
            return Example(wav, codes, frames, self.segment_frames, entry.meta, entry.path, seconds, index, failed)
        raise ValueError(f"{MAX_TRIES + 1} files in a row cannot be read, the last {failed[-1][0]!r}: {failed[-1][1]}")

    def report(self, path: str, reason: str) -> None:
        """Count a skipped file, and name it once (in the main process: workers send theirs with the example)."""
        if path not in self.skipped and torch.utils.data.get_worker_info() is None:
            print(f"skipped {ascii(path)}: {reason}", file=sys.stderr, flush=True)
        self.skipped.setdefault(path, reason)

    def describe(self) -> str:
        """One line for the log."""
        hours, captions = sum(e.seconds for e in self.files) / 3600, Counter(e.caption for e in self.files)
        parts = [f"{len(self.files)} files, {hours:.2f} h",
                 f"segments of {self.segment_seconds:g} s = {self.segment_frames} frames",
                 "captions " + ", ".join(f"{kind} {count}" for kind, count in sorted(captions.items()))]
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        return "; ".join(parts + ([self.note] if self.note else []))


class AudioDataset(Segments):
    """Segments read from audio files, resampled and mixed to what the codec takes."""
    def __init__(self, entries, segment_seconds, sample_rate, channels, hop, seed, min_segment_ratio=0.8, shuffle=True):
        super().__init__(entries, segment_seconds, sample_rate, hop, seed, min_segment_ratio, shuffle)
        self.channels = channels

    def read(self, entry: Entry, start_frame: int) -> tuple[Tensor, None, int]:
        """(wav [C, N], None, frames that hold audio). ValueError naming what is wrong."""
        start = start_frame * self.hop / self.sample_rate
        wav = read_checked(entry, start, self.samples / self.sample_rate, self.sample_rate, self.channels)
        wav, frames = fit(wav, self.samples, self.hop)                                    # [C, N]
        return wav, None, frames


class CacheDataset(Segments):
    """The same segments out of a token cache: no audio, no codec.

    `codec`, if given, must be the one that made the cache, with at most its number of codebooks: else ValueError.
    `valid` is the fraction to hold out by hash; a cache made with `--valid FOLDER` or of toy clips has its own split.
    """
    def __init__(self, folder, split, segment_seconds, seed, min_segment_ratio=0.8, valid=0.05, codec=None,
                 shuffle=True):
        index = read_index(folder)
        if codec is not None:
            check_codec(folder, index, codec)
        self.folder, self.K, self.cached_K = str(folder), codec.K if codec is not None else index["K"], index["K"]
        entries, note = cache_split(index["entries"], folder, valid, split)
        whole = index["dataset"] == "toy"                       # a toy clip is one phrase: from its beginning, as live
        super().__init__(entries, segment_seconds, index["sample_rate"], index["hop"], seed,
                         1.0 if whole else min_segment_ratio, shuffle)
        self.note, self._shards = note, {}

    def __getstate__(self):
        return self.__dict__ | {"_shards": {}}                  # a memory map would be pickled as all its content

    def read(self, entry: Entry, start_frame: int) -> tuple[None, Tensor, int]:
        """(None, codes [K, T], frames that hold audio). ValueError where the file could not be encoded."""
        if entry.error or start_frame >= entry.frames:
            raise ValueError(entry.error or f"no audio at frame {start_frame}: it has {entry.frames}")
        if entry.shard not in self._shards:
            path = os.path.join(self.folder, shard_name(entry.shard))
            self._shards[entry.shard] = np.memmap(path, np.uint16, "r").reshape(-1, self.cached_K)
        frames = min(self.segment_frames, entry.frames - start_frame)
        first = entry.offset + start_frame
        rows = self._shards[entry.shard][first:first + frames, :self.K].astype(np.int64)  # [frames, K]
        return None, F.pad(torch.from_numpy(rows).T, (0, self.segment_frames - frames)), frames           # codes [K, T]

    def describe(self) -> str:
        """One line for the log."""
        return f"token cache {self.folder}: {super().describe()}"


class ToyDataset:
    """Synthesised clips with captions: fresh in every epoch in train, the same every time in valid and heldout."""
    def __init__(self, seed, split, sample_rate=toy.SAMPLE_RATE, channels=1, hop=320, segment_seconds=toy.CLIP_SECONDS):
        if split not in toy.SPLITS:
            raise ValueError(f"split {split!r}: one of {', '.join(toy.SPLITS)}")
        self.seed, self.split, self.sample_rate, self.channels, self.hop = seed, split, sample_rate, channels, hop
        self.samples = max(1, round(segment_seconds * sample_rate))                       # N
        self.segment_frames, self.files, self.skipped = math.ceil(self.samples / hop), [], {}

    def example(self, epoch: int, index: int) -> Example:
        """The clip of (seed, epoch, index)."""
        epoch = epoch if self.split == "train" else 0
        wav, meta = toy_clip(self.seed, epoch, index, self.split, self.sample_rate, self.channels)
        wav, frames = fit(wav, self.samples, self.hop)                                    # [C, N]
        return Example(wav, None, frames, self.segment_frames, meta, f"toy:{self.split}/{index}", 0.0, index)

    def describe(self) -> str:
        """One line for the log."""
        fresh = "new clips every epoch" if self.split == "train" else "fixed clips"
        return (f"toy {self.split}: {fresh} of {toy.CLIP_SECONDS:g} s; segments of "
                f"{self.samples / self.sample_rate:g} s = {self.segment_frames} frames")


def toy_clip(seed, epoch, index, split, sample_rate, channels) -> tuple[Tensor, dict]:
    """A synthesised clip [C, N] at the codec's rate, and its caption and values."""
    made = toy.sample(seed, epoch, index, split)
    wav = torchaudio.functional.resample(torch.from_numpy(made.wav)[None], toy.SAMPLE_RATE, sample_rate)
    return wav.expand(channels, -1), {"description": made.text, "toy": asdict(made.clip)}


def read_checked(entry: Entry, start_seconds, seconds, sample_rate, channels) -> Tensor:
    """read_audio [C, n], refused (ValueError) where there is nothing or where the values are no audio."""
    rate = entry.sample_rate or sample_rate
    if rate * sample_rate // math.gcd(rate, sample_rate) ** 2 > MAX_RESAMPLER:
        raise ValueError(f"absurd sample rate: {rate} Hz has next to no common measure with {sample_rate} Hz")
    wav = tokenizer.read_audio(entry.path, start_seconds, seconds, sample_rate, channels)
    if wav.shape[-1] == 0:
        raise ValueError(f"no audio at {start_seconds:.2f} s")
    if not wav.isfinite().all() or wav.abs().max() > MAX_PEAK:
        raise ValueError(f"samples not finite or beyond {MAX_PEAK:g}")
    return wav


def fit(wav: Tensor, samples: int, hop: int) -> tuple[Tensor, int]:
    """Cut or pad [C, n] to [C, samples] -> (wav, number of frames that hold audio)."""
    kept = min(wav.shape[-1], samples)
    return F.pad(wav[:, :kept], (0, samples - kept)).contiguous(), math.ceil(kept / hop)


def open_dataset(dataset: str | Scan = "toy", valid: str | float = 0.05, split: str = "train",
                 segment_seconds: float = toy.CLIP_SECONDS, codec=None, seed: int = 0, min_segment_ratio: float = 0.8,
                 cache: str | None = None):
    """The train or valid split of toy, a folder, a manifest (or a Scan of one, to scan once for both) or a token cache.

    `codec` says what audio to make (sample_rate, channels, hop); with `cache` optional, and must be the cache's own.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split {split!r}: train or valid")
    shuffle = split == "train"
    if cache is not None:
        return CacheDataset(cache, split, segment_seconds, seed, min_segment_ratio, valid, codec, shuffle)
    if dataset == "toy":
        return ToyDataset(seed, split, codec.sample_rate, codec.channels, codec.hop, segment_seconds)
    found = dataset if isinstance(dataset, Scan) else scan(dataset)
    train, held, note = split_entries(found, valid)
    made = AudioDataset(train if shuffle else held, segment_seconds, codec.sample_rate, codec.channels, codec.hop, seed,
                        min_segment_ratio, shuffle)
    made.note, made.skipped = note, dict(found.skipped) if shuffle else {}
    return made


# ------------------------------------------------------------------------------------------------------------ batches
class Indexed(torch.utils.data.Dataset):
    """One epoch as DataLoader wants it. Errors and numpy arrays go through its pipe: tensors would hold files open."""
    def __init__(self, dataset, epoch):
        self.dataset, self.epoch = dataset, epoch

    def __getitem__(self, index: int):
        try:
            example = self.dataset.example(self.epoch, index)
        except ValueError as e:
            return e
        return replace(example, **{k: v.numpy() for k in ("wav", "codes") if (v := getattr(example, k)) is not None})


def batches(dataset, epoch: int, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
            workers: int = 0) -> Iterator[list[Example]]:
    """This rank's examples of updates start..stop-1 of an epoch.

    Update u is made of indices [u * batch_size, (u + 1) * batch_size), of which each rank takes its part. Neither
    ranks, workers nor where it starts changes an example. ValueError if batch_size is no multiple of world.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size {batch_size}: a multiple of the {world} ranks")
    share = batch_size // world
    first = [update * batch_size + rank * share for update in range(start, stop)]
    loader = torch.utils.data.DataLoader(
        Indexed(dataset, epoch), batch_sampler=[range(i, i + share) for i in first], num_workers=workers,
                                         collate_fn=list,
        worker_init_fn=one_thread, generator=torch.Generator())              # else it draws from the global generator
    return deliver(dataset, loader)


def deliver(dataset, loader) -> Iterator[list[Example]]:
    """The batches of a DataLoader over `Indexed`; its workers end with it."""
    rows = iter(loader)
    try:
        for items in rows:
            yield [receive(dataset, item) for item in items]
    finally:
        del rows                                # ends the workers now, not whenever the garbage is collected


def one_thread(worker: int) -> None:
    """Start of a worker: more threads in each would only fight for the cores."""
    torch.set_num_threads(1)


def receive(dataset, item) -> Example:
    """What came out of a worker: raise its error, report what it skipped, back to tensors."""
    if isinstance(item, ValueError):
        raise item
    for path, reason in item.skipped:
        dataset.report(path, reason)
    return replace(item, **{k: torch.from_numpy(v) for k in ("wav", "codes") if (v := getattr(item, k)) is not None})


def collate(examples: list[Example]) -> Batch:
    """Stack examples of one dataset."""
    def stack(name):
        return None if getattr(examples[0], name) is None else torch.stack([getattr(e, name) for e in examples])

    frames = torch.tensor([e.frames for e in examples])
    mask = torch.arange(examples[0].segment_frames) < frames[:, None]                     # [B, T]
    return Batch(stack("wav"), stack("codes"), mask, [e.meta for e in examples], [e.index for e in examples])


# -------------------------------------------------------------------------------------------------------- token cache
def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard_{number:05d}.bin"


def read_index(folder) -> dict:
    """index.json of a finished cache, its shards' sizes checked. ValueError if it is none."""
    path = os.path.join(folder, "index.json")
    if not os.path.isfile(path):
        begun = os.path.isdir(f"{folder}.partial")
        raise ValueError(f"no token cache in {str(folder)!r}: " + (
            "it is unfinished, run the same `python data.py cache` command again" if begun else
            "make one with `python data.py cache DATASET --codec CODEC --out DIR`"))
    known = {f.name for f in fields(Entry)}
    try:
        index = json.loads(Path(path).read_bytes())
        index["entries"] = [Entry(**{k: v for k, v in e.items() if k in known}) for e in index["entries"]]
        sizes = {shard_name(i): frames * index["K"] * 2 for i, frames in enumerate(index["shards"])}
        wrong = [name for name, size in sizes.items() if os.path.getsize(os.path.join(folder, name)) != size]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise ValueError(f"{path} is not the index of a whole token cache: {e!r}") from None
    if wrong:
        raise ValueError(f"token cache {str(folder)!r} is damaged: {wrong[0]} has the wrong size; make the cache again")
    return index


def check_codec(folder, index: dict, codec) -> None:
    """ValueError if the cache was not made by this codec, or holds fewer codebooks than it uses."""
    alike = copy.copy(codec)
    alike.K = index["K"]                                        # the fingerprint covers K: compare at the cache's own
    for name, mine in (("card", codec.card), ("hop", codec.hop), ("sample_rate", codec.sample_rate),
                       ("fingerprint", alike.fingerprint if codec.K <= index["K"] else index["fingerprint"])):
        if mine != index[name]:
            raise ValueError(f"token cache {str(folder)!r} was made by codec {index['codec']} "
                             f"({name} {str(index[name])[:12]}), not by {codec.name} ({name} {str(mine)[:12]}): "
                             "make a cache with this codec, or use that one")
    if codec.K > index["K"]:
        raise ValueError(f"token cache {str(folder)!r} of codec {index['codec']} holds {index['K']} codebooks, "
                         f"codec {codec.name} is to use {codec.K}: use fewer codebooks or make a cache with more")


def cache_split(entries: list, folder, valid, split: str) -> tuple[list, str]:
    """The entries of one split: as the cache says where it was made with two folders, else by hash as live."""
    if any(e.split for e in entries):
        return [e for e in entries if e.split == split], ""
    if valid_fraction(valid) is None:
        raise ValueError(f"token cache {str(folder)!r} holds no --valid files: make it with "
                         f"`data.py cache ... --valid {valid}`, or give a fraction")
    train, held, note = split_by_hash(entries, valid_fraction(valid))
    return (train if split == "train" else held), note


def windows(entry: Entry, codec) -> Iterator[tuple[Tensor, int, int]]:
    """A file in pieces that fit in memory -> (wav [C, n], first frame to keep, frames to keep).

    Every piece has CONTEXT_SECONDS of real audio on both sides (less at the ends of the file): enough for the
    codec's convolutions and LSTM to forget the cut. Pieces start where a sample of the file, one of the codec
    and a frame coincide: at whole seconds for 50 or 75 Hz codecs.
    """
    unit = codec.hop // math.gcd(codec.hop, codec.sample_rate)                              # seconds
    context, window = (unit * math.ceil(s / unit) for s in (CONTEXT_SECONDS, WINDOW_SECONDS))
    per_second = codec.sample_rate / codec.hop
    start, more = 0, True
    while more:
        left = context if start else 0
        seconds = left + window + context
        wav = read_checked(entry, start - left, seconds, codec.sample_rate, codec.channels)                 # [C, n]
        skip, keep = round(left * per_second), round(window * per_second)
        frames = math.ceil(wav.shape[-1] / codec.hop) - skip
        more = frames > keep
        yield wav, skip, min(frames, keep)
        start += window


def toy_windows(seed: int):
    """Like `windows` for entries of toy clips, whose key is split/index."""
    def read(entry: Entry, codec) -> Iterator[tuple[Tensor, int, int]]:
        split, index = entry.key.split("/")
        wav, entry.meta = toy_clip(seed, 0, int(index), split, codec.sample_rate, codec.channels)
        yield wav, 0, math.ceil(wav.shape[-1] / codec.hop)
    return read


def encode_pieces(pieces: list, codec, device) -> list[np.ndarray]:
    """Pieces of `windows` -> codes [frames, K] uint16 of each; pieces of one length share a call of the codec."""
    out, by_length = [None] * len(pieces), {}
    for i, (wav, _, _) in enumerate(pieces):
        by_length.setdefault(wav.shape[-1], []).append(i)
    for group in by_length.values():
        codes = codec.encode(torch.stack([pieces[i][0] for i in group]).to(device)).cpu()  # [B, K, T]
        for i, code in zip(group, codes):
            _, skip, keep = pieces[i]
            out[i] = code[:, skip:skip + keep].T.numpy().astype(np.uint16)                 # [frames, K]
    return out


def encode_entries(entries: Iterable[Entry], read, codec, batch_seconds: float, device) -> Iterator[list]:
    """Groups of (entry, codes [frames, K], or None with entry.error set), in order; batch_seconds of audio at once."""
    waiting, pieces, parts, seconds = [], [], {}, 0.0

    def flush():
        done = encode_pieces([p[1:] for p in pieces], codec, device) if pieces else []
        for (key, *_), codes in zip(pieces, done):
            parts.setdefault(key, []).append(codes)
        pieces.clear()

    for entry in entries:
        waiting.append(entry)
        try:
            for piece in read(entry, codec):
                pieces.append((entry.key, *piece))
                seconds += piece[0].shape[-1] / codec.sample_rate
                if seconds >= batch_seconds:
                    flush()
                    seconds = 0.0
        except READ_ERRORS as e:
            entry.error, parts[entry.key] = str(e), []
            pieces = [p for p in pieces if p[0] != entry.key]
        if not pieces:
            yield [(e, np.concatenate(parts[e.key]) if not e.error else None) for e in waiting]
            waiting, parts = [], {}
    if waiting:
        flush()
        yield [(e, np.concatenate(parts[e.key]) if not e.error else None) for e in waiting]


class CacheWriter:
    """Shards and progress.jsonl in DIR.partial: codes reach the disk before the line that says so, so that a run cut
    off anywhere goes on after the last such line."""
    def __init__(self, folder: str, settings: dict):
        self.folder, self.K, self.shard_frames = folder, settings["K"], settings["shard_tokens"] // settings["K"]
        os.makedirs(folder, exist_ok=True)
        self.progress = open(os.path.join(folder, "progress.jsonl"), "a+b")
        self.done, good = [], 0
        self.progress.seek(0)
        for number, line in enumerate(self.progress):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:                                     # torn by the interruption
                break
            if number == 0 and row != settings:
                differ = ", ".join(k for k in settings if settings[k] != row.get(k))
                raise ValueError(f"{folder} was begun with another {differ}: give another --out, or delete it")
            if number:
                self.done.append(Entry(**row))
            good += len(line)
        self.progress.truncate(good)
        if not good:
            self._lines(settings)
        self.shards = [0]
        for entry in self.done:
            self._place(entry)
        for number, frames in enumerate(self.shards):           # drop codes that no line vouches for
            with open(os.path.join(folder, shard_name(number)), "ab") as file:
                if file.tell() < frames * self.K * 2:
                    raise ValueError(f"{file.name} is shorter than its progress says: delete {folder} and begin again")
                file.truncate(frames * self.K * 2)

    def _lines(self, *rows: dict) -> None:
        self.progress.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self.progress.flush()
        os.fsync(self.progress.fileno())

    def _place(self, entry: Entry) -> None:
        """Where the next file goes: a new shard if this one is full. A file never spans two."""
        if self.shards[-1] and self.shards[-1] + entry.frames > self.shard_frames:
            self.shards.append(0)
        entry.shard, entry.offset = len(self.shards) - 1, self.shards[-1]
        self.shards[-1] += entry.frames

    def add(self, group: list) -> None:
        """Store (entry, codes) pairs: codes first, then the lines."""
        content = {}
        for entry, codes in group:
            entry.frames = 0 if codes is None else len(codes)
            self._place(entry)
            content[entry.shard] = content.get(entry.shard, b"") + (b"" if codes is None else codes.tobytes())
        for shard, codes in content.items():
            with open(os.path.join(self.folder, shard_name(shard)), "ab") as file:
                file.write(codes)
                file.flush()
                os.fsync(file.fileno())
        self._lines(*(asdict(entry) for entry, _ in group))
        self.done += [entry for entry, _ in group]

    def finish(self, out: str, settings: dict) -> None:
        """Write the index and give the folder its name."""
        self.progress.close()
        with open(os.path.join(self.folder, "index.json"), "w") as file:
            json.dump(settings | {"shards": self.shards, "entries": [asdict(e) for e in self.done]}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.folder, out)


def cache_entries(dataset: str, valid, clips: int) -> tuple[list, dict]:
    """(entries to encode, skipped). Toy: `clips` train clips of epoch 0 and a tenth as many valid ones."""
    if dataset == "toy":
        counts = {"train": clips, "valid": max(1, clips // 10)}
        return [Entry(f"toy:{s}/{i}", f"{s}/{i}", toy.CLIP_SECONDS, toy.SAMPLE_RATE, 1, {}, "toy", s)
                for s, count in counts.items() for i in range(count)], {}
    found = scan(dataset)
    if valid is None or valid_fraction(valid) is not None:
        return found.entries, found.skipped
    train, held, _ = split_entries(found, valid)
    keyed = [replace(e, split="valid", key=f"valid:{e.key}") for e in held]    # the two folders may hold the same names
    return [replace(e, split="train") for e in train] + keyed, found.skipped


def cache(dataset: str, out: str, codec, valid=None, batch_seconds=120.0, shard_tokens=2 ** 28, clips=2000, seed=0,
          device="cpu") -> dict:
    """Encode every file of a dataset once -> the settings of the cache in `out`. Run again, it goes on."""
    for name, value in (("batch_seconds", batch_seconds), ("shard_tokens", shard_tokens), ("clips", clips)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value}: above 0")
    if codec.card > 2 ** 16:
        raise ValueError(f"codec {codec.name} has {codec.card} codes: 16 bits hold 65536")
    out = os.path.abspath(out)
    finished = os.path.isfile(os.path.join(out, "index.json"))
    if os.path.exists(out) and not finished and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"--out {out} holds something else: give a new or an empty folder")
    entries, skipped = cache_entries(dataset, valid, clips)
    listed = hashlib.sha256(json.dumps([(e.key, e.seconds, e.split) for e in entries]).encode()).hexdigest()
    settings = {"version": 1, "dataset": dataset if dataset == "toy" else os.path.abspath(dataset), "codec": codec.name,
                "fingerprint": codec.fingerprint, "K": codec.K, "card": codec.card, "sample_rate": codec.sample_rate,
                "hop": codec.hop, "frame_rate": codec.frame_rate, "channels": codec.channels, "files": len(entries),
                "list": listed, "shard_tokens": int(shard_tokens), "seed": seed if dataset == "toy" else None}
    for line in skip_lines(skipped):
        print(f"skipped {line}")
    if finished:
        index = read_index(out)
        differ = ", ".join(k for k in settings if settings[k] != index.get(k))
        if differ:
            raise ValueError(f"{out} holds a finished cache with another {differ}: give another --out, or delete it")
        print(f"{out} is finished already: {len(entries)} files, {sum(index['shards'])} frames")
        return settings
    writer = CacheWriter(out + ".partial", settings)
    done = len(writer.done)
    if done:
        print(f"going on after {done} of {len(entries)} files")
    todo = encode_entries(entries[done:], toy_windows(seed) if dataset == "toy" else windows, codec, batch_seconds,
                          device)
    begun = printed = time.monotonic()
    bar = tqdm(total=len(entries), initial=done, unit="file", desc="encoding", disable=not sys.stderr.isatty())
    for group in todo:
        writer.add(group)
        bar.update(len(group))
        if not sys.stderr.isatty() and time.monotonic() - printed > 10:
            printed = time.monotonic()
            print(f"encoded {len(writer.done)} of {len(entries)} files, {printed - begun:.0f} s", flush=True)
    bar.close()
    for line in skip_lines({e.path: f"cannot be encoded: {e.error}" for e in writer.done if e.error}):
        print(f"skipped {line}")
    if not any(e.frames for e in writer.done):
        raise ValueError(f"none of the {len(entries)} files of {dataset!r} can be encoded: {writer.done[0].error}")
    writer.finish(out, settings)
    print(f"{out}: {len(entries)} files, {sum(writer.shards)} frames of {codec.K} codebooks at "
          f"{codec.frame_rate:g} Hz, {sum(writer.shards) * codec.K * 2 / 1e6:.1f} MB")
    return settings


# ----------------------------------------------------------------------------------------------------------- commands
def check(dataset: str, valid) -> None:
    """Print what a dataset holds and what is wrong with it."""
    if dataset == "toy":
        print(f"toy: synthesised clips of {toy.CLIP_SECONDS:g} s at {toy.SAMPLE_RATE} Hz, new ones every epoch, "
              f"such as {toy.sample(0, 0, 0, 'train').text!r}")
        return
    found = scan(dataset, headers=True)
    entries, seconds = found.entries, np.array([e.seconds for e in found.entries])
    train, held, note = split_entries(found, valid)

    def counts(values):
        return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(8))

    print(f"dataset      {found.root}")
    print(f"files        {len(entries)}, {seconds.sum() / 3600:.3f} hours; {len(found.skipped)} skipped, "
          f"{len(found.problems)} with a problem")
    print(f"sample rate  {counts(e.sample_rate for e in entries)} Hz")
    print(f"channels     {counts(e.channels for e in entries)}")
    print("duration     " + ", ".join(f"{n} {s:.1f}" for n, s in zip(
        ("shortest", "5%", "median", "95%", "longest"), np.quantile(seconds, (0, .05, .5, .95, 1)))) + " s")
    captions = Counter(e.caption for e in entries)
    print("captions     " + ", ".join(f"{kind} {captions[kind]}" for kind in ("json", "txt", "none")))
    print("fields       " + ", ".join(f"{name} {sum(e.meta.get(name) is not None for e in entries)}"
                                      for name in FIELDS))
    for name, part in (("train", train), ("valid", held)):
        hours = sum(e.seconds for e in part) / 3600
        print(f"{name}        {len(part)} files, {hours:.3f} hours" + (f" ({note})" if note else ""))
    for kind, what in (("skipped", found.skipped), ("problem", found.problems)):
        for line in skip_lines(what):
            print(f"{kind}      {line}")


def parse(argv=None):
    """The command line -> Namespace."""
    parser = argparse.ArgumentParser(prog="data.py", description="What is in a dataset, and the token cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("check", "say what was found, what was skipped and why"), ("cache", "encode everything once")):
        command = commands.add_parser(name, help=what, description=what,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("dataset", help="toy, a folder of audio, or an audiocraft manifest .jsonl or .jsonl.gz")
        command.add_argument("--valid", default="0.05",
                             help="validation data: a folder, a manifest or a fraction of the files")
    command.add_argument("--codec", default="toy", help="toy, encodec_24khz or the path of a codec")
    command.add_argument("--num_codebooks", type=int,
                         help="how many codebooks to keep (default: the codec's own number)")
    command.add_argument("--out", required=True, help="folder of the cache")
    command.add_argument("--channels", type=int, help="must be what the codec takes (default: that)")
    command.add_argument("--device", default="cpu", help="where the codec runs")
    command.add_argument("--batch_seconds", type=float, default=120.0, help="seconds of audio encoded at once")
    command.add_argument("--shard_tokens", type=int, default=2 ** 28, help="tokens a shard file, 2 bytes each")
    command.add_argument("--clips", type=int, default=2000, help="toy only: how many training clips")
    command.add_argument("--seed", type=int, default=0, help="toy only: seed of the clips")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run a command -> exit code: 0, 2 for a mistake of the user, 130 if interrupted."""
    args = parse(argv)
    try:
        if args.command == "check":
            check(args.dataset, args.valid)
            return 0
        codec = tokenizer.load_codec(args.codec, args.num_codebooks, args.device)
        if args.channels not in (None, codec.channels):
            raise ValueError(f"--channels {args.channels}: codec {codec.name} takes {codec.channels}")
        cache(args.dataset, args.out, codec, args.valid, args.batch_seconds, args.shard_tokens, args.clips, args.seed,
              args.device)
    except (ValueError, OSError) as e:
        print(f"data.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
