"""What is heard in a clip of any music: onsets a second, loudness, spectral centroid.

    onsets       a note or a beat begins: peaks of the spectral flux, picked much as in Dixon 2006, "Onset
                 detection revisited" (DAFx), of levels in dB of mel bands, much as in Boeck et al. 2012,
                 "Evaluating the online capabilities of onset detection methods" (ISMIR)
    loudness     LUFS by ITU-R BS.1770-4 of the mono mix (listen.py); silence counts as its gate, -70
    centroid     Hz: the mean frequency of the power spectrum of the whole clip, which is the mean of its
                 moments' centroids weighted by their power: what is loud counts, so bass draws it down

A clip is mixed to mono and resampled to one rate, a codec's, before anything is measured: what a model could
not make is then not heard in real music either.

Legend: C channels, N samples, M mel bands, F frames.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluate import listen
from support import audio, quality

FRAMES_PER_SECOND = 100
WINDOW_SECONDS, FLUX_BANDS, FLUX_DB = 0.04, 32, 60.0     # of the flux: down to 60 dB below the clip's peak
RISE_DB = 1.5                                            # over the mean around, for an onset
AROUND, APART = 10, 3                                    # frames on each side: of the mean, of a peak
GATE_LUFS = -70.0
FIGURES = dict(onsets="onsets a second", loudness="loudness, LUFS", centroid="spectral centroid, Hz")


def spectral_flux(mono: Tensor, sample_rate: int) -> Tensor:
    """Mean rise in dB of the levels of 32 mel bands of [N] from the frame before: [F], 100 a second.

    Levels are relative to the highest of the clip, so its loudness changes nothing."""
    hop = round(WINDOW_SECONDS / 4 * sample_rate)
    mono = F.pad(mono, (0, max(0, 4 * hop - len(mono))))
    # without the two frames at each end that reach beyond it
    mel = quality.MelSpectrum(sample_rate, 4 * hop, FLUX_BANDS)(mono[None])[0, :, 2:-2]             # [M, F]
    level = 20 * (mel / mel.max()).log10().clamp_min(-FLUX_DB / 20)                                 # [M, F]
    return F.pad((level[:, 1:] - level[:, :-1]).clamp_min(0).mean(0), (1, 0))                       # [F]


def count_onsets(mono: Tensor, sample_rate: int) -> int:
    """Peaks of the flux of [N]: no frame within 30 ms is higher, and 1.5 dB over the mean of 100 ms on each
    side.

    A clip may begin in the middle of a note: what sounds from its first frame on is no onset."""
    flux = spectral_flux(mono, sample_rate)[None]                                                # [1, F]
    highest = F.max_pool1d(flux, 2 * APART + 1, 1, APART)
    mean = F.avg_pool1d(flux, 2 * AROUND + 1, 1, AROUND, count_include_pad=False)
    return int(((flux == highest) & (flux >= mean + RISE_DB)).sum())


def spectral_centroid(mono: Tensor, sample_rate: int) -> float:
    """Mean frequency in Hz of the power spectrum of [N], without its mean."""
    power = torch.fft.rfft(mono.double() - mono.double().mean()).abs().square()                     # [bins]
    hertz = torch.arange(len(power)) * sample_rate / len(mono)
    return float((power * hertz).sum() / power.sum())


def measure_sound(wav: Tensor, sample_rate: int, rate: int) -> dict:
    """{name: figure} of a clip [C,N], heard at `rate`; names as in FIGURES. Silence has no centroid: NaN."""
    mono = audio.resample(wav.float().mean(0).cpu(), sample_rate, rate)                             # [N]
    loudness = max(GATE_LUFS, listen.measure_loudness(mono[None], rate))
    if (mono - mono.mean()).abs().max() <= audio.SILENT_PEAK:
        return dict(onsets=0.0, loudness=loudness, centroid=math.nan)
    return dict(onsets=count_onsets(mono, rate) * rate / len(mono), loudness=loudness,
                centroid=spectral_centroid(mono, rate))


def sound_table(heard: dict) -> str:
    """Mean and standard deviation over clips as lines to print. heard: {set: [`measure_sound` of a clip]}."""
    lines = [f"{'what is heard (mean, deviation)':<34}" + "".join(f"{kind:>18}" for kind in heard)]
    for name, title in FIGURES.items():
        line = f"  {title:<32}"
        for clips in heard.values():
            known = torch.tensor([clip[name] for clip in clips if not math.isnan(clip[name])])
            cell = f"{known.mean():.4g} ±{known.std(correction=0):>6.3g}" if len(known) else "-"
            line += f"{cell:>18}"
        lines.append(line)
    return "\n".join(lines)
