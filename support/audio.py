"""Audio files: what is in one, reading a part of it at a sample rate and with so many channels, writing one.

The one reader of the project. libsndfile opens the files, torchaudio resamples.
Legend: C channels, N samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torchaudio

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SAMPLE_RATES = (1_000, 1_000_000)              # Hz, the lowest and highest that we believe
MAX_PEAK = 100.0                               # float files may exceed 1; 40 dB over full scale is no audio
MAX_RESAMPLER = 30_000_000                     # filter coefficients: prime rates would need gigabytes
MP3_LEAD = 16 * 1152                           # samples: an MP3 frame leans on those before it, so that what
                                               # is decoded right after a seek is wrong


@dataclass(frozen=True)
class AudioInfo:
    """Length and format of an audio file."""
    seconds: float
    sample_rate: int                           # Hz
    channels: int


def audio_info(path) -> AudioInfo:
    """Length and format of an audio file, from its header. Errors: ValueError naming the file."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(_unreadable(path, error)) from None
    return AudioInfo(info.frames / info.samplerate, info.samplerate, info.channels)


def read_audio(path, start_seconds=0.0, seconds=None, sample_rate=None, channels=None) -> torch.Tensor:
    """Audio of a file as float32 [C, N] from `start_seconds` on.

    seconds: how much, less at the file's end (None: to its end). sample_rate (Hz) resamples.
    channels: 1 is the mean of all; mono is copied to fill more; surplus ones go.
    Errors: ValueError naming the file, also where what it holds is no audio."""
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            check_rate(path, rate, sample_rate or rate)
            start = min(round(start_seconds * rate), file.frames)
            lead = min(start, MP3_LEAD) if file.format == "MP3" else 0
            file.seek(start - lead)
            frames = -1 if seconds is None else lead + round(seconds * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)[lead:]     # [N, C]
    except (soundfile.SoundFileError, OSError, MemoryError) as error:          # a header may claim any length
        raise ValueError(_unreadable(path, error)) from None
    wav = torch.from_numpy(samples.T)                                               # [C, N]
    if wav.numel() and not wav.abs().max() <= MAX_PEAK:                             # also refuses NaN
        raise ValueError(f"{path}: samples not finite or beyond {MAX_PEAK:g}")
    if channels == 1:
        wav = wav.mean(0, keepdim=True)                                             # [1, N]
    elif channels is not None and len(wav) == 1:
        wav = wav.expand(channels, -1)                                              # [C, N]
    elif channels is not None:
        if len(wav) < channels:
            raise ValueError(f"{path}: has {len(wav)} channels, {channels} are wanted")
        wav = wav[:channels]
    if sample_rate is not None and sample_rate != rate and wav.shape[1]:
        wav = torchaudio.functional.resample(wav, rate, sample_rate)
    return wav.contiguous()


def check_rate(path, rate: int, wanted: int) -> None:
    """Refuses a sample rate (Hz) that is no audio's, or that takes gigabytes to resample to the `wanted` one.

    Errors: ValueError naming the file."""
    coefficients = math.lcm(rate, wanted) // math.gcd(rate, wanted)
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1] or coefficients > MAX_RESAMPLER:
        raise ValueError(f"{path}: absurd sample rate: {rate} Hz cannot be resampled to {wanted} Hz")


def write_audio(path, wav: torch.Tensor, sample_rate: int) -> None:
    """Writes wav [C, N], clipped to [-1, 1]; the suffix is the format, in 16 bits where it has a choice.

    Errors: ValueError for a suffix that we cannot write, and where the disk refuses."""
    assert wav.dim() == 2, f"write_audio takes [C, N], not {tuple(wav.shape)}"
    suffix = Path(path).suffix.lower()
    if suffix not in AUDIO_SUFFIXES:
        kind = suffix or "a file without suffix"
        raise ValueError(f"{path}: cannot write {kind}: use {', '.join(AUDIO_SUFFIXES)}")
    samples = wav.detach().float().cpu().clamp(-1, 1).T.numpy()                     # [N, C]
    subtype = "PCM_16" if suffix in (".wav", ".flac") else None
    try:
        with soundfile.SoundFile(str(path), "w", sample_rate, samples.shape[1], subtype) as file:
            # libsndfile crashes on a long OGG in one piece
            for start in range(0, len(samples), sample_rate):
                file.write(samples[start:start + sample_rate])
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None


def _unreadable(path, error: Exception) -> str:
    return f"{path}: not readable as audio ({error if Path(path).exists() else 'no such file'})"
