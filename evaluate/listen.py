"""Samples on the disk, to listen to: as loud as each other, and named alike in every epoch.

    run/samples/epoch_0003/000_unprompted.wav      from the conditions of validation clip 0 alone
                           000_prompted.wav        the same, continuing the first quarter of that clip
                           000_unconditional.wav   from nothing
                reference/000_reference.wav        clip 0 itself
                          000_codec.wav            through the codec and back, the best a model can do

Beside each lies a json with what is known of it. Loudness is -14 LUFS by ITU-R BS.1770-4, less where a peak
would pass -1 dB of full scale or where there is next to nothing to hear.

Legend: C channels, N samples, F frames.
"""

import math
import re
from pathlib import Path

import torch
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
MAX_GAIN_DB = 30.0                                       # what would need more is near silence
BLOCK_SECONDS, HOP_SECONDS = 0.4, 0.1                    # of BS.1770's blocks
OFFSET_DB = 0.691                                        # so that 997 Hz at full scale are -3.01 LUFS
CHANNEL_WEIGHTS = (1.0, 1.0, 1.0, 1.41, 1.41)            # left, right, center, surround


def k_weighting(sample_rate: int) -> list:
    """[(numerator, denominator)] of BS.1770-4's shelf, which lifts treble, and of its high pass.

    The standard gives coefficients at 48 kHz alone. These are the analog filters behind them, by the bilinear
    transform: the standard's at 48 kHz, and as loud at other rates (Hz)."""
    # A shelf of 4 dB at 1,682 Hz
    w, q = math.tan(math.pi * 1681.974450955533 / sample_rate), 0.7071752369554196
    top, middle = 10 ** (3.99984385397 / 20), 10 ** (3.99984385397 / 20 * 0.499666774155)
    shelf = ([top + middle * w / q + w * w, 2 * (w * w - top), top - middle * w / q + w * w],
             [1 + w / q + w * w, 2 * (w * w - 1), 1 - w / q + w * w])
    # A high pass at 38 Hz; far above, the standard's has not quite gain 1
    w, q, gain = math.tan(math.pi * 38.13547087602444 / sample_rate), 0.5003270373238773, 1.0049948987146884
    high_pass = [gain, -2 * gain, gain], [1 + w / q + w * w, 2 * (w * w - 1), 1 - w / q + w * w]
    return [shelf, high_pass]


def measure_loudness(wav: Tensor, sample_rate: int) -> float:
    """Loudness of wav [C,N] in LUFS by ITU-R BS.1770-4; -inf where nothing passes the gate of -70 LUFS.

    What is shorter than a block of 0.4 s is one block. (torchaudio.functional.loudness clips to full scale
    between its filters, and finds loud audio quieter than it is.)"""
    C, N = wav.shape
    if N == 0:
        return -math.inf
    # A recursive filter as a product of spectra: it dies away within the second of silence that is added
    n = N + sample_rate
    spectrum = torch.fft.rfft(wav.detach().cpu().double(), n)                             # [C, bins]
    for coefficients in k_weighting(sample_rate):
        numerator, denominator = torch.fft.rfft(torch.tensor(coefficients, dtype=torch.double), n)
        spectrum = spectrum * (numerator / denominator)
    heard = torch.fft.irfft(spectrum, n)[:, :N]                                           # [C, N]
    # The mean power of blocks, over those that pass an absolute and a relative gate
    block, hop = min(N, round(BLOCK_SECONDS * sample_rate)), round(HOP_SECONDS * sample_rate)
    blocks = heard.square().unfold(1, block, hop).mean(2)                                 # [C, blocks]
    power = torch.tensor(CHANNEL_WEIGHTS[:C], dtype=torch.float64) @ blocks               # [blocks]
    power = power[power > 10 ** ((OFFSET_DB - 70) / 10)]
    if len(power) == 0:
        return -math.inf
    return 10 * math.log10(power[power > power.mean() / 10].mean()) - OFFSET_DB


def normalize_loudness(wav: Tensor, sample_rate: int) -> tuple[Tensor, float]:
    """wav [C,N] at -14 LUFS, quieter where its peak would pass -1 dB; and the gain in dB.

    Near silence, which would need more than 30 dB, is left alone."""
    gain = LUFS - measure_loudness(wav, sample_rate)
    if not gain <= MAX_GAIN_DB:
        return wav, 0.0
    gain = min(gain, PEAK_DB - 20 * math.log10(float(wav.abs().max())))
    return wav * 10 ** (gain / 20), gain


def describe_loudness(wav: Tensor, sample_rate: int) -> str:
    """How loud a sample [C,N] is, and what kept it from -14 LUFS."""
    loudness = measure_loudness(wav, sample_rate)
    text = f"{loudness:.1f} LUFS (ITU-R BS.1770-4)"
    if loudness < LUFS - MAX_GAIN_DB:
        return f"{text}: near silence, left as it is"
    if loudness < LUFS - 0.05:
        return f"{text}: louder, its peak would pass {PEAK_DB:g} dB"
    return text


def write_sample(folder: Path, name: str, wav: Tensor, sample_rate: int, record: dict) -> None:
    """Writes a sample [C,N], loudness-normalized, as NAME.wav, and what is known of it as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    wav, gain = normalize_loudness(wav, sample_rate)
    record = dict(record, loudness=describe_loudness(wav, sample_rate), gain_db=round(gain, 2))
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
