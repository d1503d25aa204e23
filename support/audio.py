"""Audio files: what is in one, reading a part of it at a sample rate and with so many channels, writing one.

The one reader, resampler and writer of the project. support/decode.py opens the files.
Legend: C channels, N samples.
"""

import functools
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F

from support import common
from support.decode import open_audio, open_sndfile
from support.headers import file_state

WRITTEN_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SAMPLE_RATES = (1_000, 1_000_000)              # Hz, the lowest and highest that we believe
MAX_PEAK = 100.0                               # float files may exceed 1; 40 dB over full scale is no audio
FULL_SCALE = 2 ** 15                           # of 16 bits
MAX_RESAMPLER = 16_000_000                     # filter coefficients: far prime rates would need gigabytes
ZEROS = 64                                     # of the resampler's sinc on each side: how steep it is
CUTOFF = 0.95                                  # of the lower Nyquist frequency, where it is 6 dB down
KAISER_BETA = 10.06                            # of its window: 100 dB in the stop band
BLOCK = 96                                     # output samples of one matrix product, about
SILENT_PEAK = 1e-4                             # 80 dB below full scale
CANCELS = 0.01                                 # channels whose mean is 40 dB below them


@dataclass(frozen=True)
class AudioInfo:
    """Length and format of an audio file."""
    seconds: float
    sample_rate: int                           # Hz
    channels: int
    problem: str | None = None                 # such as that it is cut off
    tags: dict = field(default_factory=dict)   # name -> text, as the decoder gives them


def audio_info(path) -> AudioInfo:
    """Length and format of an audio file, from its header. Errors: ValueError naming the file."""
    try:
        with open_audio(path) as file:
            seconds = file.frames / file.sample_rate
            return AudioInfo(seconds, file.sample_rate, file.channels, file.problem, file.tags())
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(_unreadable(path, error)) from None


def read_audio(path, start_seconds=0.0, seconds=None, sample_rate=None, channels=None) -> torch.Tensor:
    """Audio of a file as float32 [C, N] from `start_seconds` on: the same samples as in the whole file.

    seconds: how much, less at the file's end (None: to its end). sample_rate (Hz) resamples.
    channels: 1 is the mean of all, of channels that cancel throughout the file the strongest; mono is copied
    to fill more; surplus ones go.
    Errors: ValueError naming the file, also where what it holds is no audio."""
    try:
        with open_audio(path) as file:
            rate = file.sample_rate
            wanted = sample_rate or rate
            check_rate(path, rate, wanted)
            # The part in samples at the wanted rate, and what the resampler needs around it
            start = round(start_seconds * wanted)
            stop = None if seconds is None else start + round(seconds * wanted)
            first, last = _input_of(start, stop, rate, wanted)
            samples = file.read(first, last)                                        # [N, C]
            problem, missing = file.problem, file.frames - first - len(samples)
    except (soundfile.SoundFileError, OSError, MemoryError) as error:          # a header may claim any length
        raise ValueError(_unreadable(path, error)) from None
    if seconds is None and missing > rate / 10:
        problem = f"only its first {(first + len(samples)) / rate:.2f} s can be read"
    if seconds is None and problem:
        common.say_once(f"{path}: {problem}")
    wav = torch.from_numpy(samples.T)                                               # [C, N]
    peak = _peak(wav)
    if not peak <= MAX_PEAK:                                                        # also refuses NaN
        raise ValueError(f"{path}: samples not finite or beyond {MAX_PEAK:g}")
    if channels == 1 and len(wav) > 1:
        mean = wav.mean(0, keepdim=True)                                            # [1, N]
        strongest = cancelling_channel(path) if _may_cancel(_peak(mean), peak) else None
        wav = mean if strongest is None else wav[strongest:strongest + 1]
    elif channels is not None and len(wav) == 1:
        wav = wav.expand(channels, -1)                                              # [C, N]
    elif channels is not None:
        if len(wav) < channels:
            raise ValueError(f"{path}: has {len(wav)} channels, {channels} are wanted")
        wav = wav[:channels]
    before = start - first * wanted // rate
    wav = resample(wav, rate, wanted)[:, before:]
    return wav[:, :None if stop is None else stop - start].contiguous()


def cancelling_channel(path) -> int | None:
    """The strongest channel of a file whose channels cancel throughout, so that their mean is 40 dB below
    them; None for all others. Errors: ValueError naming the file."""
    return _cancelling_channel(*file_state(os.fspath(path)))


@functools.lru_cache(maxsize=10_000)
def _cancelling_channel(path: str, size: int, mtime: int) -> int | None:
    peak, mean_peak, energy, first = 0.0, 0.0, 0.0, 0
    try:
        with open_audio(path) as file:
            while file.channels > 1:
                wav = torch.from_numpy(file.read(first, first + file.sample_rate).T)    # [C, N]
                if wav.shape[1] == 0:
                    break
                peak, mean_peak = max(peak, _peak(wav)), max(mean_peak, _peak(wav.mean(0)))
                if not _may_cancel(mean_peak, peak):                    # as a rule in the first second
                    return None
                energy = energy + wav.double().square().sum(1)                          # [C]
                first += wav.shape[1]
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(_unreadable(path, error)) from None
    return int(energy.argmax()) if mean_peak < CANCELS * peak else None


def _may_cancel(mean_peak: float, peak: float) -> bool:
    """Whether a part's mean is so low that its file's channels may cancel; true of any part, if they do."""
    return mean_peak < CANCELS * max(1.0, peak)


def _peak(wav: torch.Tensor) -> float:
    """The largest magnitude, NaN if any sample is; 0 of nothing."""
    if wav.numel() == 0:
        return 0.0
    low, high = wav.aminmax()
    return float(torch.maximum(-low, high))


def resample(wav: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """wav [..., N] from one sample rate (Hz) to another: [..., ceil(N * new_rate / rate)] float32.

    With f the lower of both Nyquist frequencies, it is flat within 0.001 dB up to 0.9 f, and what would fold
    from above f or be mirrored there is 100 dB down. Beyond the ends of wav is silence.

    It is a sinc under a Kaiser window: output n is a sum over the inputs around n * rate / new_rate. A block
    of outputs is a product with one matrix, which comes again every `period` inputs. (torchaudio's default
    filter lets tones just above f through at -11 dB.)"""
    if rate == new_rate or wav.shape[-1] == 0:
        return wav
    N = wav.shape[-1]
    period, blocks = _resampler(rate, new_rate)
    periods = math.ceil(N / period)
    before = -blocks[0][0]
    after = max(first + len(matrix) for first, matrix in blocks) - period
    padded = F.pad(wav.float(), (before, periods * period - N + max(0, after)))
    parts = []
    for first, matrix in blocks:
        begin = before + first
        inputs = padded[..., begin:begin + (periods - 1) * period + len(matrix)]
        windows = inputs.unfold(-1, len(matrix), period)                           # [..., periods, inputs]
        parts.append(windows @ matrix.to(wav.device))                              # [..., periods, outputs]
    return torch.cat(parts, -1).flatten(-2)[..., :-(-N * new_rate // rate)]


@functools.lru_cache(maxsize=4)
def _resampler(rate: int, new_rate: int) -> tuple[int, list]:
    """(period, [(first input, matrix [inputs, outputs])]): the filter for every output of a period."""
    divisor = math.gcd(rate, new_rate)
    outputs = new_rate // divisor * math.ceil(BLOCK * divisor / new_rate)
    cutoff = CUTOFF * min(1, new_rate / rate)                       # of the input's Nyquist frequency
    reach = ZEROS / cutoff                                          # inputs on each side
    beta = torch.tensor(KAISER_BETA, dtype=torch.float64)
    blocks = []
    for part in torch.arange(outputs, dtype=torch.float64).chunk(math.ceil(outputs / BLOCK)):
        centers = part * rate / new_rate
        first, last = math.ceil(centers[0] - reach), math.floor(centers[-1] + reach)
        distance = torch.arange(first, last + 1)[:, None] - centers                # [inputs, outputs]
        inside = (1 - (distance / reach).square()).clamp_min(0)
        window = torch.special.i0(beta * inside.sqrt()) / torch.special.i0(beta) * (inside > 0)
        blocks.append((first, (cutoff * torch.sinc(cutoff * distance) * window).float()))
    return outputs * rate // new_rate, blocks


def _input_of(start: int, stop: int | None, rate: int, new_rate: int) -> tuple[int, int | None]:
    """Which input samples make outputs start..stop-1 of a file; the first lies at a whole output."""
    if rate == new_rate:
        return start, stop
    reach = math.ceil(ZEROS / CUTOFF * max(1, rate / new_rate))
    step = rate // math.gcd(rate, new_rate)
    first = max(0, start * rate // new_rate - reach) // step * step
    return first, None if stop is None else math.ceil(stop * rate / new_rate) + reach


def check_rate(path, rate: int, wanted: int) -> None:
    """Refuses a sample rate (Hz) that is no audio's, or that takes gigabytes to resample to the `wanted` one.

    Errors: ValueError naming the file."""
    # a column of the resampler's matrices for each output of a period
    coefficients = 2 * ZEROS / CUTOFF * max(1, rate / wanted) + BLOCK * rate / wanted
    coefficients *= wanted // math.gcd(rate, wanted) if rate != wanted else 0
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1] or coefficients > MAX_RESAMPLER:
        raise ValueError(f"{path}: absurd sample rate: {rate} Hz cannot be resampled to {wanted} Hz")


def encode_audio(wav: torch.Tensor, sample_rate: int, kind: str, subtype: str | None = None, **more) -> bytes:
    """The bytes of an audio file of wav [C, N]; more: as of soundfile.SoundFile. Errors: its own.

    Into memory, because libsndfile does not say why a disk refuses; and by a file descriptor. Into a Python
    object it would write through calls of Python, and a signal that raises in there is lost and leaves
    libsndfile's memory corrupt (soundfile 0.14.0)."""
    samples = wav.T.numpy()                                                         # [N, C]
    in_memory = hasattr(os, "memfd_create")                                         # on Linux
    with open(os.memfd_create("audio"), "w+b") if in_memory else tempfile.TemporaryFile() as file:
        with open_sndfile(file.fileno(), "w", sample_rate, samples.shape[1], subtype, format=kind,
                          closefd=False, **more) as encoder:
            # libsndfile crashes on a long OGG in one piece
            for start in range(0, len(samples), sample_rate):
                encoder.write(samples[start:start + sample_rate])
        file.seek(0)
        return file.read()


def check_samples(path, wav: torch.Tensor) -> float:
    """The peak of samples to write. Errors: ValueError naming the file where they are not finite."""
    peak = _peak(wav)
    if not math.isfinite(peak):
        raise ValueError(f"{path}: not written: samples that are not finite")
    return peak


def say_clipped(path, peak: float) -> None:
    """Says on stderr if what was written with such a peak is clipped."""
    if peak > 1 + 1 / FULL_SCALE:
        print(f"{path}: clipped at full scale, its peak was {peak:.2f} times that", file=sys.stderr)


def to_16_bits(wav: torch.Tensor) -> torch.Tensor:
    """int16 of samples in [-1, 1]; rounded, which libsndfile does not, and clipped."""
    return (wav * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).short()


def write_audio(path, wav: torch.Tensor, sample_rate: int) -> None:
    """Writes wav [C, N]; the suffix is the format, in 16 bits where it has a choice.

    What is beyond [-1, 1] is clipped, and said. The file is there in full or not at all. Errors: ValueError
    for a suffix that we cannot write and for samples that are not finite; OSError where the disk refuses."""
    assert wav.dim() == 2, f"write_audio takes [C, N], not {tuple(wav.shape)}"
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN_SUFFIXES:
        kind = suffix or "a file without suffix"
        raise ValueError(f"{path}: cannot write {kind}: use {', '.join(WRITTEN_SUFFIXES)}")
    wav = wav.detach().float().cpu()
    say_clipped(path, check_samples(path, wav))
    if suffix in (".wav", ".flac"):
        subtype, wav = "PCM_16", to_16_bits(wav)
    else:
        subtype, wav = None, wav.clamp(-1, 1)
    try:
        content = encode_audio(wav, sample_rate, suffix[1:], subtype)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None
    common.write_atomically(path, lambda file: file.write(content))


def write_clip(path: Path, wav: torch.Tensor, sample_rate: int, record: dict) -> None:
    """`write_audio`, and beside it what is known of the clip as .json: both or none. Errors: as there."""
    write_audio(path, wav, sample_rate)
    try:
        common.write_json(path.with_suffix(".json"), record)
    except BaseException:
        path.unlink()
        raise


def _unreadable(path, error: Exception) -> str:
    return f"{path}: not readable as audio ({error if Path(path).exists() else 'no such file'})"
