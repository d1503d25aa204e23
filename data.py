"""Audio and captions -> training examples, in an order that (seed, epoch, index) alone decides.

    folder | manifest ─scan─► entries ─split─► AudioDataset ─────┐
                                 └─cache (codec)─► CacheDataset ─┼─► batches ─► [Example] ─collate─► Batch
    toy.py ──────────────────────────────────► ToyDataset ───────┘

With `melody`, an example has the chroma of its audio as well (chroma.py), from a cache as from files.
A dataset has `example(epoch, index) -> Example`, `files` and `describe()`. A file that cannot be read is skipped, named
once and counted. Letters: B batch, K codebooks, T frames of a segment, C channels, N samples.

    python data.py check DATASET [--valid 0.05]                 what was found, what was skipped and why
    python data.py cache DATASET --codec CODEC --out DIR        encode everything once, to train without audio or codec
"""
import argparse
import copy
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from tqdm import tqdm

from support import audio, chroma
import tokenizer
import toy

FILES, SEGMENT = 1, 2                       # streams of random numbers: each has its own generator
MAX_TRIES = 10                              # files drawn in place of an unreadable one before giving up
MAX_TEXT = 10_000                           # characters: a longer text is no caption
MAX_SECONDS = 1e6                           # 11 days: a longer duration in a header is a broken header
CONTEXT_SECONDS, WINDOW_SECONDS = 2, 10     # cache: a window is encoded with this much audio on both sides
SHARD_SECONDS = 3600                        # cache: audio in a shard, what an interruption costs at most
READ_ERRORS = (ValueError, OSError)         # of a file that is skipped; others, such as a full GPU, end the program
LOWER_TEXTS, LISTS = ("key", "genre", "name", "instrument"), ("moods", "keywords")
FIELDS = ("title", "artist", "description", *LOWER_TEXTS, *LISTS, "bpm")


@dataclass
class Entry:
    """One file of a dataset. `key` is its name within the dataset: what is sorted and hashed."""
    path: str
    key: str
    seconds: float
    sample_rate: int | None = None
    channels: int | None = None             # None: the manifest does not say
    meta: dict = field(default_factory=dict)
    caption: str = "none"                   # where the description came from: json, txt, toy or none
    split: str | None = None                # in a cache: "train" or "valid" where the split is not by hash
    shard: int = 0                          # in a cache: which shard, the first frame in it, how many frames
    offset: int = 0
    frames: int = 0
    chroma_offset: int = 0                  # in a cache: the same of its chroma
    chroma_frames: int = 0
    error: str | None = None                # in a cache: why the file could not be encoded


@dataclass
class Scan:
    """What was found in a dataset: files to use, files skipped and files used with a problem (path -> reason)."""
    entries: list
    skipped: dict
    problems: dict


@dataclass
class Example:
    """One training example on the host; `frames` of its T are real, the padding after them is masked from the loss.

    Arrays, because tensors that come from a worker each hold a file open."""
    wav: np.ndarray | None                  # [C, N] float32, zeros after the end of the file; None from a cache
    codes: np.ndarray | None                # [K, T] int64, zeros after the end; from a cache only
    frames: int
    segment_frames: int                     # T
    meta: dict                              # description and metadata (FIELDS, those present), toy: the clip as well
    path: str
    start_seconds: float
    index: int
    chroma: np.ndarray | None = None        # [F, 12] float32, as many frames as there is audio; where melody is asked for
    skipped: list = field(default_factory=list)          # (path, reason) of the files that failed before this one


@dataclass
class Batch:
    """Examples stacked: wav [B, C, N] float32 or codes [B, K, T] int64, frame_mask [B, T] True where audio is."""
    wav: Tensor | None
    codes: Tensor | None
    frame_mask: Tensor


# ---------------------------------------------------------------------------------------------- captions and metadata
def parse_object(raw: bytes) -> dict:
    """A JSON object, NaN and infinities as None. ValueError for anything else, however hostile."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def clean(name: str, value) -> str | float | list | None:
    """One metadata field as audiocraft reads it: a line of text, a number (bpm) or strings (LISTS); None if empty.

    Errors: ValueError, TypeError, OverflowError for a value of another kind."""
    if value in (None, "", "None"):
        return None
    if name == "bpm" and not isinstance(value, bool):
        if not 0 < float(value) < 10_000:
            raise ValueError("out of range")
        return float(value)
    if name in LISTS and isinstance(value, str):
        value = value.replace(",", " ").split()
    items = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in items):
        raise ValueError("not a text")
    plain = [re.sub(r"[\0-\x08\x0e-\x1b\x7f-\x9f]", "", str(v)) for v in items]           # without control characters
    texts = [" ".join(t.encode("utf-8", "replace").decode().split()) for t in plain]      # lone surrogates become "?"
    if name in LISTS:
        return [t.lower() for t in texts if t] or None
    text = ", ".join(t for t in texts if t)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters, {MAX_TEXT} are allowed")
    if name == "key" and "," in text:
        return None                                                                       # two keys are none
    return (text.lower() if name in LOWER_TEXTS else text) or None


def clean_meta(raw: dict) -> tuple[dict, list]:
    """audiocraft's metadata fields, cleaned -> (those that hold something, problems)."""
    meta, problems = {}, []
    for name in FIELDS:
        try:
            meta[name] = clean(name, raw.get(name))
        except (ValueError, TypeError, OverflowError) as e:
            problems.append(f"{name} left out: {e}")
    return {name: value for name, value in meta.items() if value is not None}, problems


def read_sidecar(path: str) -> tuple[dict, str, list]:
    """Metadata of song.json, else the caption of song.txt -> (meta, "json" | "txt" | "none", problems)."""
    meta, source, problems = {"description": None}, "none", []
    for kind in ("json", "txt"):
        sidecar = Path(path).with_suffix(f".{kind}")
        if meta["description"] or not sidecar.is_file():
            continue
        try:
            raw = sidecar.read_bytes()
            row = parse_object(raw) if kind == "json" else {"description": raw.decode("utf-8-sig", "replace")}
        except (ValueError, OSError) as e:
            problems.append(f"{kind} not used: {e}")
            continue
        found, notes = clean_meta(row)
        meta |= found
        problems += notes
        source = kind if meta["description"] else "none"
    return meta, source, problems


# ------------------------------------------------------------------------------------------------- folders, manifests
def list_folder(root: str) -> tuple[list, dict]:
    """Files under root but captions, links followed, sorted -> ([(path, key, {})], skipped)."""
    rows, skipped, seen = [], {}, set()
    unreadable = lambda e: skipped.update({e.filename: "unreadable folder"})
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders.sort()
        if os.path.realpath(folder) in seen:                                              # links that form a loop
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        paths = [os.path.join(folder, name) for name in names if not name.lower().endswith((".json", ".txt"))]
        rows += [(path, os.path.relpath(path, root), {}) for path in paths]
    return sorted(rows, key=lambda row: row[1]), skipped


def list_manifest(manifest: str) -> tuple[list, dict]:
    """The lines of audiocraft's data.jsonl[.gz], sorted -> ([(path, key, the line's fields)], skipped).

    A path is relative to the manifest's folder, else to the working directory; what the line says of it is its key."""
    rows, skipped = [], {}
    try:
        with (gzip.open if manifest.endswith(".gz") else open)(manifest, "rb") as file:
            for number, line in ((i, line) for i, line in enumerate(file, 1) if line.strip()):
                try:
                    row = parse_object(line)
                    inside = os.path.join(os.path.dirname(manifest), row["path"])         # an absolute path stays itself
                except (ValueError, KeyError, TypeError) as e:
                    skipped[f"{manifest}:{number}"] = f"manifest line: {e!r}"
                    continue
                path = inside if os.path.exists(inside) else os.path.abspath(row["path"])
                rows.append((path, row["path"], row))
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{manifest} cannot be read as a manifest: {e}") from None
    return sorted(rows, key=lambda row: row[1]), skipped


def probe(path: str, key: str, row: dict, headers: bool) -> tuple[Entry, list]:
    """Header and sidecar of one file -> (entry, problems). A manifest's numbers are believed unless `headers`."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in audio.AUDIO_SUFFIXES:
        raise ValueError(f"not audio by its name: {suffix or 'no suffix'}")
    if not os.path.isfile(path):
        raise ValueError("not a file" if os.path.exists(path) else "missing")
    if os.path.getsize(path) == 0:
        raise ValueError("zero bytes")
    meta, caption, problems = read_sidecar(path)
    seconds, sample_rate, channels = row.get("duration"), row.get("sample_rate"), None
    if headers or not isinstance(seconds, (int, float)) or not isinstance(sample_rate, (int, float)):
        info = audio.audio_info(path)
        if isinstance(seconds, (int, float)) and not info.seconds - 0.5 <= seconds <= info.seconds + 0.5:
            problems.append(f"duration differs: {str(seconds)[:20]} s in the manifest, {info.seconds:.2f} s in the file")
        seconds, sample_rate, channels = info.seconds, info.sample_rate, info.channels
    if not (0 < seconds < MAX_SECONDS and audio.SAMPLE_RATES[0] <= sample_rate <= audio.SAMPLE_RATES[1]):
        raise ValueError(f"absurd header: {seconds} s at {sample_rate} Hz")
    return Entry(path, key, float(seconds), int(sample_rate), channels, meta, caption), problems


def scan(dataset: str, headers: bool = False) -> Scan:
    """A folder, a manifest or a folder that holds data.jsonl[.gz] -> what is in it. Reads headers and sidecars."""
    root = os.path.abspath(dataset)
    manifests = [p for p in (root, f"{root}/data.jsonl", f"{root}/data.jsonl.gz")
                 if p.endswith((".jsonl", ".jsonl.gz")) and os.path.isfile(p)]
    if not manifests and not os.path.isdir(root):
        raise ValueError(f"dataset {dataset!r} is not there: give a folder of audio, a manifest .jsonl[.gz], or toy")
    rows, skipped = list_manifest(manifests[0]) if manifests else list_folder(root)

    def attempt(row):
        try:
            return probe(*row, headers)
        except READ_ERRORS as e:
            return str(e).removeprefix(f"{row[0]}: ")

    entries, problems, first = [], {}, {}
    with ThreadPoolExecutor(16) as pool:                        # the time goes into waiting for the disk
        results = tqdm(pool.map(attempt, rows), "scanning", len(rows), leave=False, disable=not sys.stderr.isatty())
        for (path, key, _), result in zip(rows, results):
            if isinstance(result, str):
                skipped[path] = result
            elif (same := first.setdefault(os.path.realpath(path), result[0])) is not result[0]:
                skipped[f"{path} (again)"] = f"same file twice: {same.key}"
            else:
                entries.append(result[0])
                problems |= {path: "; ".join(result[1])} if result[1] else {}
    if not entries:
        raise ValueError(f"no usable audio in {dataset!r}: looked for {' '.join(audio.AUDIO_SUFFIXES)}, found "
                         f"{'; '.join(skip_lines(skipped)) or 'nothing'}; give a folder or manifest of readable audio")
    return Scan(entries, skipped, problems)


def skip_lines(skipped: dict) -> list[str]:
    """{path: reason} -> one line a kind of reason, with its count and the first names."""
    groups = {}
    for path, reason in skipped.items():
        groups.setdefault(re.split(r"[:(]", reason)[0].strip(), []).append(path)
    return [f"{len(paths)} {kind} ({', '.join(map(ascii, paths[:3]))}{', ...' if len(paths) > 3 else ''})"
            for kind, paths in sorted(groups.items(), key=lambda group: -len(group[1]))]


# -------------------------------------------------------------------------------------------------------------- split
def split_by_hash(entries: list, fraction: float) -> tuple[list, list, str]:
    """(train, valid, note): a file is in valid where the hash of its key is under the fraction, come what may."""
    if len(entries) == 1:
        return entries, entries, "the only file is both train and valid"
    place = {e.key: int.from_bytes(hashlib.sha256(os.fsencode(e.key)).digest()[:8], "big") / 2 ** 64 for e in entries}
    ordered = sorted(entries, key=lambda e: place[e.key])
    count = min(max(1, sum(p < fraction for p in place.values())), len(entries) - 1)
    return ordered[count:], ordered[:count], ""


def valid_fraction(valid) -> float | None:
    """--valid as a fraction, None where it names a folder or a manifest. ValueError if outside (0, 1)."""
    try:
        fraction = float(valid)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise ValueError(f"--valid {valid}: a fraction lies between 0 and 1, else give a folder or a manifest")
    return fraction


def split_entries(entries: list, valid: str | float = 0.05) -> tuple[list, list, str]:
    """(train, valid, note). Files of a --valid folder that also lie in the dataset are taken out of train."""
    if (fraction := valid_fraction(valid)) is not None:
        return split_by_hash(entries, fraction)
    held = scan(valid).entries
    paths = {os.path.realpath(e.path) for e in held}
    train = [e for e in entries if os.path.realpath(e.path) not in paths]
    if not train:
        raise ValueError(f"--valid {valid!r} holds every file of the dataset: nothing is left to train on")
    taken = len(entries) - len(train)
    return train, held, f"{taken} files of --valid taken out of train" if taken else ""


# ----------------------------------------------------------------------------------------------------------- datasets
@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    """The order of the files in pass number `turn` over them within an epoch."""
    return np.random.default_rng((seed, FILES, epoch, turn)).permutation(count)


class Segments:
    """Random segments of files: what live audio and the cache share, so that both see the same segments.

    Files come by a new permutation for each pass over them, the start uniformly from
    [0, duration - segment * min_segment_ratio], rounded down to a codec frame. Without `shuffle` the epoch counts for
    nothing: the same segments every time. `codec` is anything with a sample_rate, channels and hop.
    """
    def __init__(self, entries, codec, segment_seconds, seed, min_segment_ratio=0.8, shuffle=True, note="", melody=False,
                 stems=False):
        self.files, self.segment_seconds, self.seed = entries, segment_seconds, seed
        self.sample_rate, self.channels, self.hop = codec.sample_rate, codec.channels, codec.hop
        self.min_segment_ratio, self.shuffle, self.note, self.skipped = min_segment_ratio, shuffle, note, {}
        self.melody, self.stems = melody, stems                 # whether examples have a chroma; without drums and bass
        self.samples = max(1, round(segment_seconds * self.sample_rate))                  # N
        self.segment_frames = math.ceil(self.samples / self.hop)                          # T

    def draws(self, epoch: int, index: int) -> Iterator[tuple[Entry, int]]:
        """(file, first frame) of this example, then of its replacements: an endless sequence."""
        epoch, count = epoch if self.shuffle else 0, len(self.files)
        rng = np.random.default_rng((self.seed, SEGMENT, epoch, index))
        entry = self.files[permutation(self.seed, epoch, index // count, count)[index % count]]
        while True:
            latest = max(0.0, entry.seconds - self.segment_seconds * self.min_segment_ratio)
            yield entry, int(rng.random() * latest * self.sample_rate / self.hop)
            entry = self.files[rng.integers(count)]

    def example(self, epoch: int, index: int) -> Example:
        """The example of (seed, epoch, index). ValueError after MAX_TRIES unreadable replacements."""
        failed = []
        for (entry, start), _ in zip(self.draws(epoch, index), range(MAX_TRIES + 1)):
            seconds = start * self.hop / self.sample_rate
            try:
                wav, codes, frames, tune = self.read(entry, start)
                return Example(wav, codes, frames, self.segment_frames, entry.meta, entry.path, seconds, index, tune, failed)
            except READ_ERRORS as e:
                failed.append((entry.path, f"cannot be read: {str(e).removeprefix(f'{entry.path}: ')}"))
        raise ValueError(f"{MAX_TRIES + 1} files in a row cannot be read, the last {failed[-1][0]!r}: {failed[-1][1]}")

    def fit(self, wav: Tensor) -> tuple[np.ndarray, int]:
        """Cut or pad [C, n] to a segment [C, N] -> (wav, frames that hold audio)."""
        kept = min(wav.shape[-1], self.samples)
        return F.pad(wav[:, :kept], (0, self.samples - kept)).numpy(), math.ceil(kept / self.hop)

    def tune(self, wav: Tensor) -> np.ndarray | None:
        """The chroma [F, 12] of a segment's audio [C, n] up to its end, if melody is asked for."""
        return chroma.melody(wav[:, :self.samples], self.sample_rate, self.stems).numpy() if self.melody else None

    def describe(self) -> str:
        """One line for the log."""
        hours, captions = sum(e.seconds for e in self.files) / 3600, Counter(e.caption for e in self.files)
        return "; ".join(filter(None, [
            f"{len(self.files)} files, {hours:.2f} h",
            f"segments of {self.segment_seconds:g} s = {self.segment_frames} frames",
            "captions " + ", ".join(f"{kind} {count}" for kind, count in sorted(captions.items())), self.note]))


class AudioDataset(Segments):
    """Segments read from audio files, resampled and mixed to what the codec takes."""
    def read(self, entry: Entry, start_frame: int) -> tuple[np.ndarray, None, int, np.ndarray | None]:
        """(wav [C, N], None, frames that hold audio, chroma). ValueError naming what is wrong."""
        wav = read_checked(entry, start_frame * self.hop / self.sample_rate, self.samples / self.sample_rate, self)
        fitted, frames = self.fit(wav)                                                    # [C, N]
        return fitted, None, frames, self.tune(wav)


class CacheDataset(Segments):
    """The same segments out of a token cache, made by this codec with at least its number of codebooks."""
    def __init__(self, folder, codec, segment_seconds, seed, min_segment_ratio, split, valid, melody=False, stems=False):
        settings, entries = read_index(folder)
        if melody:
            check_chroma(folder, settings, entries, stems)
        self.folder, self.K, self.card = folder, codec.K, codec.card
        alike = copy.copy(codec)
        alike.K = settings["K"]                                 # a fingerprint covers K: compare at the cache's own
        if codec.K > settings["K"] or alike.fingerprint != settings["fingerprint"]:
            raise ValueError(f"token cache {folder!r} holds {settings['K']} codebooks of codec {settings['codec']} (channels "
                             f"{settings.get('channels', 1)}, fingerprint {settings['fingerprint'][:12]}), not {codec.K} of "
                             f"{codec.name} (channels {codec.channels}, {alike.fingerprint[:12]}): use that codec and "
                             "--channels, or make a cache with these")
        if any(e.split for e in entries):                       # made of two folders, or of toy clips
            parts, note = [[e for e in entries if e.split == name] for name in ("train", "valid")], ""
        elif (fraction := valid_fraction(valid)) is not None:
            *parts, note = split_by_hash(entries, fraction)
        else:
            raise ValueError(f"token cache {folder!r} was made without --valid {valid}: give a fraction")
        if settings["dataset"] == "toy":                        # a toy clip is one phrase: from its beginning, as live
            min_segment_ratio = 1.0
        super().__init__(parts[split == "valid"], codec, segment_seconds, seed, min_segment_ratio, split == "train",
                         "; ".join(filter(None, [f"from token cache {folder}", note])), melody, stems)

    def read(self, entry: Entry, start_frame: int) -> tuple[None, np.ndarray, int, np.ndarray | None]:
        """(None, codes [K, T], frames that hold audio, chroma). ValueError where the file could not be encoded."""
        frames = min(self.segment_frames, entry.frames - start_frame)
        if frames <= 0:
            raise ValueError(entry.error or f"no audio at frame {start_frame}: it has {entry.frames}")
        first = entry.offset + start_frame
        shard = np.load(shard_path(self.folder, entry.shard, "npy"), mmap_mode="r")       # [frames, K], not read yet
        codes = np.zeros((self.K, self.segment_frames), np.int64)                         # [K, T]
        codes[:, :frames] = shard[first:first + frames, :self.K].T
        if codes.max() >= self.card:
            raise ValueError(f"the cache is damaged: a code {codes.max()}, the codec has 0 to {self.card - 1}")
        return None, codes, frames, self.cached_tune(entry, start_frame) if self.melody else None

    def cached_tune(self, entry: Entry, start_frame: int) -> np.ndarray:
        """The chroma [F, 12] of the segment that begins at a frame of codes, from the nearest chroma frame on.

        The one from live audio differs: its frames begin with the segment (here up to 64 ms beside it), and its first and last
        two mirror the segment's edges, where these have heard what comes before and after."""
        first = round(start_frame * self.hop / chroma.hop_length(self.sample_rate))
        count = min(chroma.count_frames(self.samples, self.sample_rate), entry.chroma_frames - first)
        if count <= 0:
            raise ValueError(f"no chroma at frame {first}: it has {entry.chroma_frames}")
        shard = np.load(shard_path(self.folder, entry.shard, "chroma.npy"), mmap_mode="r")               # [frames, 12]
        return shard[entry.chroma_offset + first:][:count].astype(np.float32)


class ToyDataset(Segments):
    """Synthesised clips with captions: fresh in every epoch in train, the same every time in valid and heldout."""
    def __init__(self, seed, split, codec, segment_seconds=toy.CLIP_SECONDS, melody=False, stems=False):
        super().__init__([], codec, segment_seconds, seed, melody=melody, stems=stems)
        self.split = split

    def example(self, epoch: int, index: int) -> Example:
        """The clip of (seed, epoch, index)."""
        made = toy.make_clip(self.seed, epoch if self.split == "train" else 0, index, self.split)
        wav = torch.from_numpy(toy.pan(made.wav, made.clip, self.channels))                   # [C, n]
        wav = torchaudio.functional.resample(wav, toy.SAMPLE_RATE, self.sample_rate)
        fitted, frames = self.fit(wav)                                                    # [C, N]
        meta = {"description": made.text, "toy": asdict(made.clip)}
        return Example(fitted, None, frames, self.segment_frames, meta, f"toy:{self.split}/{index}", 0.0, index, self.tune(wav))

    def describe(self) -> str:
        """One line for the log."""
        fresh = "new clips every epoch" if self.split == "train" else "fixed clips"
        return f"toy {self.split}: {fresh}; segments of {self.segment_seconds:g} s = {self.segment_frames} frames"


def read_checked(entry: Entry, start_seconds: float, seconds: float, codec) -> Tensor:
    """Audio [C, n] as the codec takes it, refused (ValueError) where there is none."""
    wav = audio.read_audio(entry.path, start_seconds, seconds, codec.sample_rate, codec.channels)     # [C, n]
    if wav.shape[-1] == 0:
        raise ValueError(f"no audio at {start_seconds:.2f} s")
    return wav


def open_dataset(dataset: str | Scan = "toy", valid: str | float = 0.05, split: str = "train",
                 segment_seconds: float = toy.CLIP_SECONDS, codec=None, seed: int = 0, min_segment_ratio: float = 0.8,
                 cache: str | None = None, melody: bool = False, stems: bool = False):
    """The train or valid split of toy, a folder, a manifest (or a Scan of one, to scan once for both) or a token cache.

    `codec` says what audio to make (sample_rate, channels, hop), or is the one that made the cache. `melody`: examples have
    the chroma of their audio, with `stems` that of its vocals and other instruments without drums and bass (demucs)."""
    assert split in ("train", "valid"), split
    for name, value, high in (("segment_seconds", segment_seconds, MAX_SECONDS), ("min_segment_ratio", min_segment_ratio, 1)):
        if not 0 < value <= high:
            raise ValueError(f"--{name} {value}: more than 0, at most {high:g}")
    if cache is not None:
        return CacheDataset(cache, codec, segment_seconds, seed, min_segment_ratio, split, valid, melody, stems)
    if dataset == "toy":
        return ToyDataset(seed, split, codec, segment_seconds, melody, stems)
    found = dataset if isinstance(dataset, Scan) else scan(dataset)
    train, held, note = split_entries(found.entries, valid)
    note = "; ".join(filter(None, [f"{len(found.skipped)} skipped" if found.skipped else "", note]))
    return AudioDataset(train if split == "train" else held, codec, segment_seconds, seed, min_segment_ratio,
                        split == "train", note, melody, stems)


# ------------------------------------------------------------------------------------------------------------ batches
def fetch(dataset, epoch: int, share: int, first: int) -> list[Example] | ValueError:
    """A rank's share of one update; an error as a value, because a worker would wrap its own traceback around it."""
    try:
        return [dataset.example(epoch, index) for index in range(first, first + share)]
    except ValueError as e:
        return e


def leave_signals(worker: int) -> None:
    """In a loading process: a signal to the whole group (as torchrun sends it) is the main process's business, which finishes
    its update with what is loaded here and then ends this process; without a parent it ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(dataset, epoch: int, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
            workers: int = 0) -> Iterator[list[Example]]:
    """This rank's examples of updates start..stop-1 of an epoch; no example depends on ranks, workers or the start.

    Update u is made of indices [u * batch_size, (u + 1) * batch_size), of which each rank takes its part."""
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size {batch_size}: a multiple of the {world} ranks")
    share = batch_size // world
    loader = torch.utils.data.DataLoader(
        [update * batch_size + rank * share for update in range(start, stop)], batch_size=None, num_workers=workers,
        collate_fn=functools.partial(fetch, dataset, epoch, share), worker_init_fn=leave_signals,
        generator=torch.Generator())                            # without, it draws from the global generator
    for examples in loader:
        if isinstance(examples, ValueError):
            raise examples
        for path, reason in (skip for example in examples for skip in example.skipped):
            if path not in dataset.skipped:
                print(f"skipped {ascii(path)}: {reason}", file=sys.stderr, flush=True)
            dataset.skipped[path] = reason
        yield examples


def collate(examples: list[Example]) -> Batch:
    """Stack examples of one dataset."""
    stack = lambda arrays: None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
    frames = torch.tensor([e.frames for e in examples])
    mask = torch.arange(examples[0].segment_frames) < frames[:, None]                     # [B, T]
    return Batch(stack([e.wav for e in examples]), stack([e.codes for e in examples]), mask)


# -------------------------------------------------------------------------------------------------------- token cache
# DIR/cache.json, and of every shard (about an hour of audio) shard_00000.npy: codes [frames, K] uint16 of file after file,
# shard_00000.chroma.npy: their chroma [frames, 12] float16 (187 bytes a second; caches of before it had come lack it), and,
# written after both, shard_00000.json: their entries. An interrupted cache goes on after its last whole shard.
def shard_path(folder: str, number: int, suffix: str) -> Path:
    """A file of a shard."""
    return Path(folder, f"shard_{number:05d}.{suffix}")


def read_index(folder: str) -> tuple[dict, list[Entry]]:
    """(settings, entries) of a finished cache. ValueError if it is none."""
    if not Path(folder, "cache.json").is_file():
        raise ValueError(f"no token cache in {folder!r}: make one with `python data.py cache`")
    try:
        settings, entries = json.loads(Path(folder, "cache.json").read_bytes()), []
        shards, K, *_ = (settings[name] for name in ("shards", "K", "dataset", "codec", "fingerprint"))
        for number in range(shards):
            part = [Entry(**row) for row in json.loads(shard_path(folder, number, "json").read_bytes())]
            check_shard(part, np.load(shard_path(folder, number, "npy"), mmap_mode="r"), K)
            entries += part
        if not entries:
            raise ValueError("no files")
    except (OSError, EOFError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"token cache {folder!r} is unfinished or damaged ({e!r}): run the same `python data.py cache` "
                         "again, or delete it") from None
    return settings, entries


def check_shard(part: list[Entry], codes: np.ndarray, K: int) -> None:
    """Refuses (ValueError, TypeError) codes [frames, K] that are not those of the entries."""
    if codes.dtype != np.uint16 or codes.shape != (part[-1].offset + part[-1].frames, K):
        raise ValueError(f"codes of {codes.dtype} {codes.shape}")
    for e in part:
        inside = 0 <= e.offset <= e.offset + e.frames <= len(codes)
        if not (inside and 0 < e.seconds < MAX_SECONDS and isinstance(e.meta, dict)):
            raise ValueError(f"{e.frames} frames at {e.offset}, {e.seconds} s, a {type(e.meta).__name__} of metadata")


def check_chroma(folder: str, settings: dict, entries: list[Entry], stems: bool) -> None:
    """Refuses (ValueError) a cache that cannot give the melodies asked for."""
    again = f"make another with `python data.py cache{' --melody_stems' if stems else ''}`"
    if bool(settings.get("melody_stems")) != stems:
        raise ValueError(f"token cache {folder!r} holds melodies {'with' if stems else 'without'} drums and bass: "
                         f"{'leave out' if stems else 'give'} --melody_stems, or {again}")
    for number in range(settings["shards"]):
        path = shard_path(folder, number, "chroma.npy")
        if not path.is_file():
            raise ValueError(f"token cache {folder!r} holds no chroma, which melody needs: {again}")
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as e:
            raise ValueError(f"token cache {folder!r} is damaged ({path.name}: {e}): {again}") from None
        last = max(e.chroma_offset + e.chroma_frames for e in entries if e.shard == number)
        if rows.dtype != np.float16 or rows.shape != (last, 12):
            raise ValueError(f"token cache {folder!r} is damaged ({path.name}: {rows.dtype} {rows.shape}): {again}")


def write_whole(path: Path, content: np.ndarray | dict | list) -> None:
    """Write an array as .npy, else JSON, so that a crash leaves the whole file or none."""
    with open(f"{path}.part", "wb") as file:
        np.save(file, content) if isinstance(content, np.ndarray) else file.write(json.dumps(content).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def encode_entry(entry: Entry, codec, device, stems: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """All codes [frames, K] uint16 and chroma [frames, 12] float16 of a file, or of a toy clip, which gets its caption here.

    A file is encoded in windows that fit in memory, with CONTEXT_SECONDS of real audio on both sides: enough for the
    codec's convolutions and LSTM to forget the cut. They start where a sample of the file, one of the codec and a frame
    coincide: at whole seconds for 50 or 75 Hz codecs. One at a time, because reading is what holds up a GPU.
    """
    if entry.caption == "toy":
        made = ToyDataset(0, entry.split, codec, melody=True, stems=stems).example(0, int(entry.key.split("/")[1]))
        entry.meta = made.meta
        codes = codec.encode(torch.from_numpy(made.wav[None]).to(device))[0].T.cpu()      # [frames, K]
        return codes.numpy().astype(np.uint16), made.chroma.astype(np.float16)
    unit, rate = codec.hop // math.gcd(codec.hop, codec.sample_rate), codec.sample_rate   # seconds, Hz
    context, window = (unit * math.ceil(s / unit) for s in (CONTEXT_SECONDS, WINDOW_SECONDS))
    parts, tunes, start, ended = [], [], 0, False
    while not ended:
        left = min(start, context)
        wav = read_checked(entry, start - left, left + window + context, codec)           # [C, n]
        codes = codec.encode(wav[None].to(device))[0].T.cpu()                             # [T, K]
        first, stop = (seconds * rate // codec.hop for seconds in (left, left + window))
        ended = len(codes) <= stop
        parts.append(codes[first:stop])
        heard = chroma.without_rhythm(wav, rate)[None] if stems else wav
        tunes.append(chroma.part_of_file(heard, (start - left) * rate, start * rate, None if ended else (start + window) * rate, rate))
        start += window
    return torch.cat(parts).numpy().astype(np.uint16), torch.cat(tunes).numpy().astype(np.float16)


def encode_shard(entries: list, number: int, codec, device, out: str, stems: bool = False) -> None:
    """Write the three files of a shard; a file that cannot be encoded is kept without codes, with its error."""
    codes, tunes = [np.zeros((0, codec.K), np.uint16)], [np.zeros((0, 12), np.float16)]
    offset, chroma_offset = 0, 0
    for entry in tqdm(entries, f"shard {number + 1}", unit="file", leave=False, disable=not sys.stderr.isatty()):
        try:
            each, tune = encode_entry(entry, codec, device, stems)                        # [frames, K], [frames, 12]
            codes.append(each)
            tunes.append(tune)
            entry.frames, entry.chroma_frames = len(each), len(tune)
        except READ_ERRORS as e:
            entry.error = str(e)
        entry.shard, entry.offset, entry.chroma_offset = number, offset, chroma_offset
        offset, chroma_offset = offset + entry.frames, chroma_offset + entry.chroma_frames
    write_whole(shard_path(out, number, "npy"), np.concatenate(codes))
    write_whole(shard_path(out, number, "chroma.npy"), np.concatenate(tunes))
    write_whole(shard_path(out, number, "json"), [asdict(entry) for entry in entries])


def cache_entries(dataset: str, valid, clips: int) -> tuple[list, dict]:
    """(entries to encode, skipped). Toy: `clips` train clips of seed 0, epoch 0 and a tenth as many valid ones."""
    if dataset == "toy":
        counts = {"train": clips, "valid": max(1, clips // 10)}
        return [Entry(f"toy:{split}/{i}", f"{split}/{i}", toy.CLIP_SECONDS, caption="toy", split=split)
                for split, count in counts.items() for i in range(count)], {}
    found = scan(dataset)
    if valid_fraction(valid) is not None:
        return found.entries, found.skipped
    train, held, _ = split_entries(found.entries, valid)
    keyed = [replace(e, split="valid", key=f"valid:{e.key}") for e in held]    # the two folders may hold the same names
    return [replace(e, split="train") for e in train] + keyed, found.skipped


def begin(out: str, settings: dict) -> None:
    """Begin the cache in `out`, or go on with it. ValueError if that holds something else."""
    path = Path(out, "cache.json")
    if path.is_file():
        try:
            begun = {"channels": 1} | dict(json.loads(path.read_bytes()))                 # older caches are mono
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged: delete {out}, or give another --out") from None
        if begun != settings:
            differ = ", ".join(name for name in settings if settings[name] != begun.get(name))
            raise ValueError(f"{out} holds a cache with another {differ}: give another --out, or delete it")
    elif os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"--out {out} holds something else: give a new or an empty folder")
    try:
        os.makedirs(out, exist_ok=True)
        write_whole(path, settings)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written to ({e})") from None


def cache(dataset: str, out: str, codec, valid=0.05, clips: int = 2000, device="cpu", stems: bool = False) -> None:
    """Encode every file of a dataset once, into the folder `out`. Run again, it goes on. stems: see `open_dataset`."""
    if stems:
        chroma.load_separator()                                 # before the work: it may be missing
    if codec.card > 2 ** 16:
        raise ValueError(f"codec {codec.name} has {codec.card} codes, a cache holds 16 bits: take one of at most {2 ** 16}")
    entries, skipped = cache_entries(dataset, valid, clips)
    for line in skip_lines(skipped):
        print(f"skipped {line}")
    ends = itertools.accumulate(e.seconds for e in entries)     # seconds
    shards = [list(group) for _, group in itertools.groupby(entries, lambda e: next(ends) // SHARD_SECONDS)]
    listed = hashlib.sha256(json.dumps([(e.key, e.seconds, e.split) for e in entries]).encode()).hexdigest()
    begin(out, {"dataset": dataset if dataset == "toy" else os.path.abspath(dataset), "codec": codec.name,
                "channels": codec.channels, "fingerprint": codec.fingerprint, "K": codec.K, "files": len(entries), "list": listed,
                "shards": len(shards), **({"melody_stems": True} if stems else {})})
    for number, shard in enumerate(shards):
        if not shard_path(out, number, "json").is_file():
            encode_shard(shard, number, codec, device, out, stems)
            print(f"encoded shard {number + 1} of {len(shards)}: {len(shard)} files", flush=True)
    done = read_index(out)[1]
    for line in skip_lines({e.path: f"cannot be encoded: {e.error}" for e in done if e.error}):
        print(f"skipped {line}")
    frames = sum(e.frames for e in done)
    if frames == 0:
        raise ValueError(f"none of the {len(entries)} files of {dataset!r} can be encoded: {done[0].error}")
    print(f"{out}: {len(entries)} files, {frames} frames of {codec.K} codebooks at {codec.frame_rate:g} Hz, "
          f"{frames * codec.K * 2 / 1e6:.1f} MB")


# ----------------------------------------------------------------------------------------------------------- commands
def check(dataset: str, valid) -> None:
    """Print what a dataset holds and what is wrong with it."""
    if dataset == "toy":
        print(f"toy: clips of {toy.CLIP_SECONDS:g} s, new ones every epoch, such as {toy.draw_clip(0, 0, 0)[1]!r}")
        return
    found = scan(dataset, headers=True)
    entries, seconds = found.entries, np.array([e.seconds for e in found.entries])
    train, held, note = split_entries(entries, valid)

    def counts(values):
        return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(8))

    shares = zip(("shortest", "5%", "median", "95%", "longest"), np.quantile(seconds, (0, .05, .5, .95, 1)))
    print(f"dataset      {os.path.abspath(dataset)}")
    print(f"files        {len(entries)}, {seconds.sum() / 3600:.3f} hours; {len(found.skipped)} skipped, "
          f"{len(found.problems)} with a problem")
    print(f"sample rate  {counts(e.sample_rate for e in entries)} Hz")
    print(f"channels     {counts(e.channels for e in entries)}")
    print(f"duration     {', '.join(f'{name} {s:.1f}' for name, s in shares)} s")
    print(f"captions     {counts(e.caption for e in entries)}")
    print(f"fields       {', '.join(f'{name} {sum(e.meta.get(name) is not None for e in entries)}' for name in FIELDS)}")
    for name, part in (("train", train), ("valid", held)):
        hours = sum(e.seconds for e in part) / 3600
        print(f"{name}        {len(part)} files, {hours:.3f} hours" + (f" ({note})" if note else ""))
    for kind, what in (("skipped", found.skipped), ("problem", found.problems)):
        for line in skip_lines(what):
            print(f"{kind}      {line}")


def main(argv=None) -> int:
    """Run a command -> exit code: 0, 2 for a mistake of the user, 130 if interrupted."""
    parser = argparse.ArgumentParser(description="What is in a dataset, and the token cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("check", "say what was found, what was skipped and why"), ("cache", "encode everything once")):
        command = commands.add_parser(name, help=what, description=what,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("dataset", help="toy, a folder of audio, or an audiocraft manifest .jsonl or .jsonl.gz")
        command.add_argument("--valid", default="0.05", help="a folder, a manifest or a fraction of the files")
    command.add_argument("--codec", default="toy", help="toy, encodec_24khz or the path of a codec")
    command.add_argument("--num_codebooks", type=int, help="how many codebooks of a channel to keep; None: the codec's own number")
    command.add_argument("--channels", type=int, default=1, choices=(1, 2), help="2: stereo, each channel with codebooks of its own")
    command.add_argument("--out", required=True, help="folder of the cache")
    command.add_argument("--device", default="cpu", help="where the codec runs")
    command.add_argument("--melody_stems", action="store_true", help="melodies without drums and bass (needs demucs)")
    command.add_argument("--clips", type=int, default=2000, help="toy only: how many training clips")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            check(args.dataset, args.valid)
        else:
            if args.clips < 1:
                raise ValueError(f"--clips {args.clips}: at least 1")
            codec = tokenizer.load_codec(args.codec, args.num_codebooks, args.device, args.channels)
            cache(args.dataset, args.out, codec, args.valid, args.clips, args.device, args.melody_stems)
    except (ValueError, OSError) as e:
        print(f"data.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
