"""Audio and captions -> training examples, in an order that (seed, epoch, index) alone decides.

    folder | manifest ─scan, split─► entries ─► AudioDataset ──┐
                                └─token cache─► CacheDataset ──┼─► batches ─► [Example] ─collate─► Batch
    toy.py ────────────────────────────────► ToyDataset ───────┘

`index` is the number of an example within its epoch: update u is made of examples u * batch_size to
(u + 1) * batch_size - 1, whatever the ranks, workers and restarts. A file that cannot be read is skipped,
named once and counted. Features, {name: what computes it}, are what conditions need of audio beside codes.

Legend: B batch, K codebooks, T frames of a segment, F frames of a feature, C channels, N samples.
    python data.py check DATASET [--valid 0.05]             what was found, what was skipped and why
    python data.py cache DATASET --codec CODEC --out DIR    encode everything once, to train on codes alone
    python data.py import SHARDS .. --out FOLDER            parquet and tar shards -> a folder of audio
"""

import argparse
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer
import toy
from conditioning import CONDITIONS
from support import audio
from support.cache import CachedEntry, open_cache, read_rows
from support.captions import READ_ERRORS, caption_at
from support.common import command, output_name, random_generator, tell
from support.draw import SAMPLE_BY, cumulative_shares, draw_by_shares, long_enough
from support.scan import (MAX_SECONDS, SHARD_SUFFIXES, Entry, Scan, print_report, scan_dataset,
                          split_entries)
from support.signals import end_with_parent, signals_wait
from support.unpack import import_shards
from support.verify import decode_dataset

FILES, SEGMENT = 1, 2  # streams of random numbers: each has its own generator
MAX_TRIES = 10  # files drawn in place of an unreadable one before giving up


@dataclass
class Example:
    """One training example on the host. `frames` of its T are real; the loss leaves out what follows.

    Arrays, because tensors that come from a worker each hold a file open."""
    frames: int
    segment_frames: int  # T
    meta: dict  # description and metadata (captions.FIELDS, those present), toy: the clip as well
    path: str
    start_seconds: float
    index: int
    wav: np.ndarray | None = None  # [C, N] float32, zeros after the end of the file; None from a cache
    codes: np.ndarray | None = None  # [K, T] int64, zeros after the end; from a cache only
    features: dict = field(default_factory=dict)  # name -> [F, columns] float32, as long as there is audio
    skipped: list = field(default_factory=list)  # (path, reason) of the files that failed before this one


@dataclass
class Batch:
    """Examples stacked: audio, or codes where they come from a cache."""
    wav: Tensor | None  # [B, C, N] float32
    codes: Tensor | None  # [B, K, T] int64
    frame_mask: Tensor  # [B, T] bool, True where audio is

    def encode(self, codec, device) -> tuple[Tensor, Tensor]:
        """(codes [B, K, T], frame mask [B, T]) on the device; audio goes through the codec."""
        if self.codes is None:
            codes = codec.encode(self.wav.to(device, non_blocking=True))
        else:
            codes = self.codes.to(device, torch.long, non_blocking=True)
        return codes, self.frame_mask.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------
# datasets


@functools.lru_cache(maxsize=4)
def file_order(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    """The order of the files in pass number `turn` over them within an epoch."""
    return random_generator(seed, FILES, epoch, turn).permutation(count)


class SegmentDataset:
    """Random segments of files: what live audio and the cache share, so that both see the same segments.

    Each pass over the files has its own order (support/draw.py: whom it draws), each segment a uniform start
    in [0, duration - segment * min_segment_ratio], rounded down to a codec frame. Without `shuffle` the epoch
    counts for nothing: always the same segments. `codec` is anything with a sample_rate, channels and hop."""
    def __init__(self, entries: list, codec, segment_seconds: float, seed: int, *,
                 min_segment_ratio: float = 0.8, min_seconds: float = 0.0, sample_by: str = "file",
                 shuffle: bool = True, note: str = "", features: dict | None = None):
        self.files, self.segment_seconds, self.seed = long_enough(entries, min_seconds), segment_seconds, seed
        self.shares = cumulative_shares(self.files, sample_by)
        self.sample_rate, self.channels, self.hop = codec.sample_rate, codec.channels, codec.hop
        self.min_segment_ratio, self.shuffle, self.note = min_segment_ratio, shuffle, note
        self.features = features or {}
        self.skipped = {}  # path -> reason, filled by `batches`
        self.samples = max(1, round(segment_seconds * self.sample_rate))  # N
        self.segment_frames = math.ceil(self.samples / self.hop)  # T

    def candidates(self, epoch: int, index: int) -> Iterator[tuple[Entry, int]]:
        """(file, first frame) of this example, then of its replacements: an endless sequence."""
        epoch, count = epoch if self.shuffle else 0, len(self.files)
        rng = random_generator(self.seed, SEGMENT, epoch, index)
        turn, place = divmod(index, count)
        drawn = file_order(self.seed, epoch, turn, count)[place]
        while True:
            entry = self.files[drawn if self.shares is None else draw_by_shares(self.shares, drawn, rng)]
            latest = max(0.0, entry.seconds - self.segment_seconds * self.min_segment_ratio)
            yield entry, int(rng.random() * latest * self.sample_rate / self.hop)
            drawn = rng.integers(count)

    def example(self, epoch: int, index: int) -> Example:
        """The example of (seed, epoch, index). Errors: ValueError after MAX_TRIES unreadable replacements."""
        failed = []
        for entry, start_frame in itertools.islice(self.candidates(epoch, index), MAX_TRIES + 1):
            try:
                content = self.read(entry, start_frame)
            except READ_ERRORS as error:
                failed.append((entry.path, f"cannot be read: {str(error).removeprefix(f'{entry.path}: ')}"))
                continue
            start_seconds = start_frame * self.hop / self.sample_rate
            meta = caption_at(entry.meta, start_seconds, self.segment_seconds)
            return Example(segment_frames=self.segment_frames, meta=meta, path=entry.path, index=index,
                           start_seconds=start_seconds, skipped=failed, **content)
        path, reason = failed[-1]
        raise ValueError(f"{len(failed)} files in a row cannot be read, the last {path!r}: {reason}. "
                         "`python data.py check FOLDER` names all that have a problem")

    def content_of_audio(self, wav: Tensor) -> dict:
        """Audio [C, n], cut or padded to a segment, its frames and its features, as fields of an Example."""
        kept = wav[:, :self.samples]
        padded = F.pad(kept, (0, self.samples - kept.shape[-1]))  # [C, N]
        frames = math.ceil(kept.shape[-1] / self.hop)
        features = {name: each.of_segment(kept, self.sample_rate) for name, each in self.features.items()}
        return {"wav": padded.numpy(), "frames": frames, "features": features}

    def metadata(self, limit: int = 20_000) -> list:
        """Descriptions and metadata fields of the first files: conditions learn from them before training."""
        return [entry.meta for entry in self.files[:limit]]

    def longest_seconds(self) -> float:
        """Length of the longest file."""
        return max(entry.seconds for entry in self.files)

    def describe(self) -> str:
        """One line for the log."""
        hours = sum(entry.seconds for entry in self.files) / 3600
        captions = Counter(entry.caption for entry in self.files)
        captions = ", ".join(f"{kind} {count}" for kind, count in sorted(captions.items()))
        segments = f"segments of {self.segment_seconds:g} s = {self.segment_frames} frames"
        line = f"{len(self.files)} files, {hours:.2f} h; {segments}; captions {captions}"
        return f"{line}; {self.note}" if self.note else line


class AudioDataset(SegmentDataset):
    """Segments read from audio files, resampled and mixed to what the codec takes."""
    def read(self, entry: Entry, start_frame: int) -> dict:
        """The segment from a frame on, as fields of an Example. Errors: ValueError saying what is wrong."""
        start_seconds = start_frame * self.hop / self.sample_rate
        return self.content_of_audio(entry.read(start_seconds, self.samples / self.sample_rate, self))


class CacheDataset(SegmentDataset):
    """The same segments out of a token cache, made by this codec with at least its number of codebooks."""
    def __init__(self, folder: str, codec, segment_seconds: float, seed: int, *, split: str,
                 valid: str | float, features: dict | None = None, **drawing):
        train_entries, valid_entries, note, self.stored_K = open_cache(folder, codec, valid, features or {})
        super().__init__(train_entries if split == "train" else valid_entries, codec, segment_seconds, seed,
                         shuffle=split == "train", note=note, features=features, **drawing)
        self.folder, self.K, self.card = folder, codec.K, codec.card

    def read(self, entry: CachedEntry, start_frame: int) -> dict:
        """The segment from a frame on, as fields of an Example. Errors: ValueError where it has no codes."""
        frames = min(self.segment_frames, entry.frames - start_frame)
        if frames <= 0:
            raise ValueError(entry.error or f"no audio at frame {start_frame}: it has {entry.frames}")
        first = entry.offset + start_frame
        rows = read_rows(self.folder, entry.shard, "npy", first, frames, self.stored_K)
        codes = np.zeros((self.K, self.segment_frames), np.int64)  # [K, T]
        codes[:, :frames] = rows[:, :self.K].T
        if codes.max() >= self.card:
            raise ValueError(f"the cache is damaged: a code {codes.max()}, "
                             f"the codec has 0 to {self.card - 1}")
        features = {name: self.read_feature(name, entry, start_frame) for name in self.features}
        return {"codes": codes, "frames": frames, "features": features}

    def read_feature(self, name: str, entry: CachedEntry, start_frame: int) -> np.ndarray:
        """A feature [F, columns] of the segment from a frame of codes on, from its own nearest frame on.

        Live features are of the segment alone, mirrored at its edges. These are of the whole file: they may
        lie half a frame off, and have heard what is beyond the edges."""
        feature, (offset, stored) = self.features[name], entry.features.get(name, (0, 0))
        first = round(start_frame * self.hop / feature.hop_length(self.sample_rate))
        count = min(feature.count_frames(self.samples, self.sample_rate), stored - first)
        if count <= 0:
            raise ValueError(f"no {name} at frame {first}: it has {stored}")
        return read_rows(self.folder, entry.shard, f"{name}.npy", offset + first, count, feature.columns,
                         feature.dtype).astype(np.float32)


class ToyDataset(SegmentDataset):
    """Synthesized clips with captions: new in every epoch in train, always the same in valid and heldout."""
    def __init__(self, seed: int, split: str, codec, segment_seconds: float = toy.CLIP_SECONDS,
                 features: dict | None = None):
        super().__init__([], codec, segment_seconds, seed, features=features)
        self.split = split

    def example(self, epoch: int, index: int) -> Example:
        """The clip of (seed, epoch, index)."""
        training = self.split == "train"
        made = toy.make_clip(self.seed, epoch if training else 0, index, self.split, anywhere=training)
        wav = torch.from_numpy(toy.pan(made.wav, made.clip, self.channels))  # [C, n]
        wav = audio.resample(wav, toy.SAMPLE_RATE, self.sample_rate)
        meta = {"description": made.text, "toy": asdict(made.clip)}
        start_seconds = made.clip.start * toy.GRID / toy.SAMPLE_RATE
        return Example(segment_frames=self.segment_frames, meta=meta, path=f"toy:{self.split}/{index}",
                       index=index, start_seconds=start_seconds, **self.content_of_audio(wav))

    def metadata(self, limit: int = 4000) -> list:
        """Captions of the first clips."""
        return [{"description": toy.draw_clip(self.seed, 0, i)[1]} for i in range(limit)]

    def longest_seconds(self) -> float:
        """Every clip's length."""
        return toy.CLIP_SECONDS

    def describe(self) -> str:
        """One line for the log."""
        fresh = "new clips every epoch" if self.split == "train" else "fixed clips"
        segments = f"segments of {self.segment_seconds:g} s = {self.segment_frames} frames"
        return f"toy {self.split}: {fresh}; {segments}"


def open_dataset(dataset: str | Scan = "toy", valid: str | float = 0.05, split: str = "train",
                 segment_seconds: float = toy.CLIP_SECONDS, codec=None, *, seed: int = 0,
                 min_segment_ratio: float = 0.8, cache: str | None = None, features: dict | None = None,
                 **drawing):
    """The train or valid split of toy, a folder, a manifest (a Scan of it, to scan once for both) or a cache.

    codec says what audio to make (sample_rate, channels, hop), or is the one that made the cache. features:
    such as {"chroma": Chroma()}; drawing: min_seconds, sample_by. Errors: ValueError naming flag or file."""
    assert split in ("train", "valid"), split
    if not 0 < segment_seconds <= MAX_SECONDS:
        raise ValueError(f"--segment_seconds {segment_seconds}: more than 0, at most {MAX_SECONDS:g}")
    if not 0 < min_segment_ratio <= 1:
        raise ValueError(f"--min_segment_ratio {min_segment_ratio}: more than 0, at most 1")
    if cache is not None:
        return CacheDataset(cache, codec, segment_seconds, seed, split=split, valid=valid,
                            min_segment_ratio=min_segment_ratio, features=features, **drawing)
    if dataset == "toy":
        return ToyDataset(seed, split, codec, segment_seconds, features)
    found = dataset if isinstance(dataset, Scan) else scan_dataset(dataset)
    train_entries, valid_entries, note = found.parts or split_entries(found.entries, valid)
    if found.skipped:
        note = "; ".join(filter(None, [f"{len(found.skipped)} skipped", note]))
    return AudioDataset(train_entries if split == "train" else valid_entries, codec, segment_seconds, seed,
                        min_segment_ratio=min_segment_ratio, shuffle=split == "train", note=note,
                        features=features, **drawing)


# ------------------------------------------------------------------------------------------------------------
# batches


def load_examples(dataset, epoch: int, count: int, first: int) -> list[Example] | ValueError:
    """Examples first..first+count-1, or an error as a value: a worker would wrap its traceback around it."""
    try:
        return [dataset.example(epoch, index) for index in range(first, first + count)]
    except ValueError as error:
        return error


def batches(dataset, epoch: int, start: int, stop: int, batch_size: int, *, rank: int = 0,
            world_size: int = 1, workers: int = 0) -> Iterator[list[Example]]:
    """This rank's examples of updates start..stop-1 of an epoch; the same for any ranks, workers and start.

    Errors: ValueError, also where too many files in a row cannot be read."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size {batch_size}: a multiple of the {world_size} ranks")
    share = batch_size // world_size  # of each update, a rank's examples
    # The loader's items are first indices, one an update; collate_fn, in a worker, reads the examples
    firsts = range(start * batch_size + rank * share, stop * batch_size, batch_size)
    loader = torch.utils.data.DataLoader(
        firsts, batch_size=None, num_workers=workers, worker_init_fn=end_with_parent,
        collate_fn=functools.partial(load_examples, dataset, epoch, share),
        generator=torch.Generator())  # without, it draws from the global generator
    with signals_wait():
        loaded = iter(loader)    # starts the workers
    for examples in loaded:
        if isinstance(examples, ValueError):
            raise examples
        for path, reason in itertools.chain(*(example.skipped for example in examples)):
            if path not in dataset.skipped:
                tell(f"skipped {ascii(path)}: {reason}", file=sys.stderr)
            dataset.skipped[path] = reason
        yield examples


def collate(examples: list[Example]) -> Batch:
    """Stacks examples of one dataset."""
    frames = torch.tensor([example.frames for example in examples])
    mask = torch.arange(examples[0].segment_frames) < frames[:, None]  # [B, T]
    stacked = {}
    for name in ("wav", "codes"):
        arrays = [getattr(example, name) for example in examples]
        stacked[name] = None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
    return Batch(**stacked, frame_mask=mask)


# ------------------------------------------------------------------------------------------------------------
# commands


@command("data.py")
def main(argv: list | None = None) -> int:
    """Says what is in a dataset, makes a token cache of it, or unpacks shards into a folder of audio."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what was found, what was skipped and why")
    cache = commands.add_parser("cache", help="encode everything once")
    for sub in (check, cache):
        sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        sub.add_argument("dataset", help="toy, a folder of audio, or an audiocraft manifest .jsonl[.gz]")
        sub.add_argument("--valid", default="0.05", help="a folder, a manifest or a fraction of the files")
        sub.add_argument("--captions", help="a table of captions that does not lie beside or above the audio")
        sub.add_argument("--caption_column", help="its column of captions, or that of the tables found")
    check.add_argument("--segment_seconds", type=float, default=30.0, help="as in training, seconds")
    check.add_argument("--min_seconds", type=float, default=0.0, help="as in training, seconds")
    check.add_argument("--sample_by", default="file", choices=SAMPLE_BY, help="as in training")
    check.add_argument("--decode", action="store_true", help="read every file to its end: headers lie")
    cache.add_argument("--codec", default="toy", help="toy, encodec_24khz or the path of a codec")
    cache.add_argument("--num_codebooks", type=int, help="of a channel, to keep; None: the codec's number")
    cache.add_argument("--channels", type=int, default=1, choices=(1, 2), help="2: stereo, codes of each")
    cache.add_argument("--out", type=output_name, required=True, help="folder of the cache")
    cache.add_argument("--device", default="cpu", help="where the codec runs")
    for condition in CONDITIONS.values():
        for flag in condition.cache_flags:
            flag.add_to(cache)
    unpack = commands.add_parser("import", help="unpack shards into a folder of audio with captions")
    unpack.add_argument("shards", nargs="+", help=f"files {' '.join(SHARD_SUFFIXES)}, or folders of them")
    unpack.add_argument("--out", type=output_name, required=True, help="folder of audio to make")
    unpack.add_argument("--caption_column", help="of parquet files, where none of its names is known")
    args = parser.parse_args(argv)
    if args.command == "import":
        import_shards(args.shards, args.out, args.caption_column)
        return 0
    scanning = dict(captions=args.captions, caption_column=args.caption_column)
    if args.command == "check" and args.dataset == "toy":
        for name, value in vars(args).items():
            if name not in ("command", "dataset") and value != check.get_default(name):
                raise ValueError(f"--{name} {value}: the toy has no files; leave it out")
        caption = toy.draw_clip(0, 0, 0)[1]
        print(f"toy: clips of {toy.CLIP_SECONDS:g} s, new ones every epoch, such as {caption!r}")
    elif args.command == "check":
        found = scan_dataset(args.dataset, headers=True, **scanning)
        if args.decode:
            decode_dataset(found)
        parts = split_entries(found.entries, args.valid, **scanning)
        print_report(args.dataset, found, parts, args.min_seconds, args.segment_seconds, args.sample_by)
    else:
        from support.encode import make_cache_on_ranks  # torch.distributed, which it needs, is slow to load
        load = functools.partial(tokenizer.load_codec, args.codec, args.num_codebooks, channels=args.channels)
        features = {}
        for condition in CONDITIONS.values():
            features |= condition.features(args)
        make_cache_on_ranks(args.device, load, args.dataset, args.out, args.valid, features, **scanning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
