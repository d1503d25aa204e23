"""Samples on the disk, to listen to: as loud as each other, and named alike in every epoch.

    run/samples/epoch_0003/000_unprompted.wav      from the conditions of validation clip 0 alone
                           000_prompted.wav        the same, continuing the first quarter of that clip
                           000_unconditional.wav   from nothing
                reference/000_reference.wav        clip 0 itself
                          000_codec.wav            through the codec and back, the best a model can do

Beside each lies a json with what is known of it. Loudness is -14 LUFS by ITU-R BS.1770-4, less where a peak
would pass -1 dB of full scale.

Legend: C channels, N samples, F frames.
"""

import math
import re
from pathlib import Path

import torchaudio
from torch import Tensor
from torch.nn import functional as F

from support import audio, quality

SAMPLE_KINDS = {
    "unprompted": "from the conditions of the clip",
    "prompted": "the same, continuing the clip's first quarter (up to the line)",
    "unconditional": "from nothing",
}
REFERENCE_KINDS = {"reference": "reference", "codec": "reference through the codec"}
REFERENCE_FOLDER = "reference"
LUFS = -14.0                                             # target loudness, as the reference system's
PEAK_DB = -1.0                                           # highest peak, of full scale
LOUDNESS_SECONDS = 0.4                                   # a block of BS.1770: what is shorter has no loudness


def normalize_loudness(wav: Tensor, sample_rate: int) -> tuple[Tensor, float]:
    """wav [C,N] at -14 LUFS (ITU-R BS.1770-4), quieter where its peak would pass -1 dB; and the gain in dB.

    What is shorter than 0.4 s or silent has no loudness, and is left alone."""
    peak = float(wav.abs().max()) if wav.numel() else 0.0
    if wav.shape[1] < LOUDNESS_SECONDS * sample_rate or peak < 1e-4:
        return wav, 0.0
    loudness = float(torchaudio.functional.loudness(wav.float(), sample_rate))
    if not loudness > -70:                               # the standard's gate; nan where nothing came through
        return wav, 0.0
    gain = min(LUFS - loudness, PEAK_DB - 20 * math.log10(peak))
    return wav * 10 ** (gain / 20), gain


def write_sample(folder: Path, name: str, wav: Tensor, sample_rate: int, record: dict) -> None:
    """Writes a sample [C,N], loudness-normalized, as NAME.wav, and what is known of it as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    wav, gain = normalize_loudness(wav, sample_rate)
    loudness = f"{LUFS:g} LUFS (ITU-R BS.1770-4), peak at most {PEAK_DB:g} dB"
    record = dict(record, loudness=loudness, gain_db=round(gain, 2))
    audio.write_clip(folder / f"{name}.wav", wav, sample_rate, record)


def find_samples(out: Path) -> dict:
    """{folder name: {(clip number, kind): path of its wav}} of a run's samples."""
    found = {}
    for path in sorted(out.glob("samples/*/*.wav")):
        if match := re.fullmatch(r"(\d+)_(\w+)", path.stem):
            found.setdefault(path.parent.name, {})[int(match[1]), match[2]] = path
    return found


def spectrogram(wav: Tensor, sample_rate: int, columns: int = 160,
                mark_seconds: float | None = None) -> Tensor:
    """Levels [64, columns] in 0..1 of 64 mel bands of [C,N], the highest on top, over the 60 dB below full
    scale.

    At `mark_seconds` stands a line."""
    mono = F.pad(wav.float().mean(0), (0, max(0, 1024 - wav.shape[1])))                           # [N]
    mel = quality.MelSpectrum(sample_rate, 1024, 64)(mono[None])                                # [1, 64, F]
    level = 1 + mel.clamp(1e-3, 1).log10() / 3
    level = F.interpolate(level, columns, mode="linear")[0].flip(0)                          # [64, columns]
    if mark_seconds:
        level[:, min(columns - 1, int(columns * mark_seconds * sample_rate / wav.shape[1]))] = 1
    return level
