"""Hears what toy music plays: whether audio follows its caption, by signal analysis that knows nothing of the
model.

    wav [B,N] ─┬─► pitch of each frame [B,F] ─► root, register             rules
               ├─► onsets against combs ──────► tempo                      a rule
               └─► timbre [B,D] ──────────────► drums, then instrument     fitted linear discriminants

A sound that is none it knows is "none of these", and so counts as wrong: an attribute is never heard by
guessing.

Legend: B clips, C channels, N samples (16 kHz), F analysis frames, D features, P combs, V values of an
attribute.
    python -m evaluate.analyser                  how often it is right on clean clips
    python -m evaluate.analyser clip.wav ...     what it hears in audio files
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

import toy
from support import audio, common
from support.bounds import check_flag_number
from toy import BEAT_FRAMES, GRID, INSTRUMENTS, NOTES, ROOT_MIDI, SAMPLE_RATE, VALUES, Clip

NONE = "none of these"
HEARD_VALUES = {name: (*values, NONE) for name, values in VALUES.items()}     # what may be heard
CHANCE = {name: 1 / len(values) for name, values in VALUES.items()}
MIN_SAMPLES = GRID * max(BEAT_FRAMES.values())   # a beat of the slowest tempo: what is shorter has no tempo
HEADS_FILE = Path(__file__).parent.parent / "assets" / "toy_analyser.npz"
RMS = 0.13                                       # loudness that clips are brought to
SILENCE_RMS = 5e-3                               # what is less loud is silence
FLOOR_DB = -35.0                                 # what lies deeper is codec noise, not timbre
HARMONICS = (0.5, 1.5, 2, 2.5, 2.76, 3, 4, 5, 5.4, 6, 7, 8)  # ratios to the pitch; some are a bell's


# ------------------------------------------------------------------------------------------------------------
# features


def _pitch(wav: Tensor) -> tuple[Tensor, Tensor]:
    """Pitch of each frame of [B,N]: (MIDI numbers [B,F], weights [B,F]).

    It is the lowest spectral peak at least half as high as the strongest."""
    n_fft = 2048
    window = torch.hann_window(n_fft)
    spec = torch.stft(wav, n_fft, GRID, window=window, return_complex=True).abs()               # [B, bins, F]
    low, high = (int(hz * n_fft / SAMPLE_RATE) for hz in (120, 2100))
    s = spec[:, low:high]
    peak = (s > spec[:, low - 1:high - 1]) & (s >= spec[:, low + 1:high + 1])
    loud = s > 0.5 * (s * peak).amax(1, keepdim=True)
    first = (peak & loud).float().argmax(1, keepdim=True) + low                                  # [B, 1, F]
    # a parabola through the logarithms of the peak and its neighbors finds the pitch between the bins
    a, b, c = (spec.gather(1, first + d)[:, 0].clamp_min(1e-9).log() for d in (-1, 0, 1))
    offset = (a - c) / (2 * (a - 2 * b + c)).clamp(max=-1e-6)
    hz = (first[:, 0] + offset.clamp(-0.5, 0.5)) * SAMPLE_RATE / n_fft
    return 69 + 12 * (hz / 440).log2(), b.exp()                                                  # [B, F] x 2


def _root_and_register(midi: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the twelve roots [B,12] (a share of 0..1) and the register as a MIDI number [B]."""
    weight = weight.sqrt() * (weight > 0.1 * weight.amax(1, keepdim=True))
    chroma = torch.zeros(len(midi), 12).scatter_add_(1, midi.round().long() % 12, weight)        # [B, 12]
    chroma = chroma / chroma.sum(1, keepdim=True).clamp_min(1e-9)
    expected = torch.zeros(12)
    expected[[0, 4, 7]] = torch.tensor([0.7, 0.15, 0.15])        # even beats and octaves, thirds, fifths
    likely = (expected + 0.01).log()
    scores = torch.stack([chroma @ likely.roll(r) for r in range(12)], 1).exp()                  # [B, 12]
    # the register: 30 % of the weight lies at lower pitches
    order = midi.sort(1)
    share = weight.gather(1, order.indices).cumsum(1) / weight.sum(1, keepdim=True).clamp_min(1e-9)
    lower = order.values.gather(1, (share < 0.3).sum(1, keepdim=True).clamp(max=midi.shape[1] - 1))
    return scores, lower[:, 0]


@functools.lru_cache(maxsize=4)
def _combs(frames: int) -> tuple[Tensor, Tensor]:
    """Onset patterns of the three tempi at every phase: (normalized combs [P, frames], which tempo [P])."""
    rows, which = [], []
    for i, beat in enumerate(BEAT_FRAMES.values()):
        period = 2 * beat                                        # in 10 ms
        for phase in range(period):
            row = torch.zeros(frames + 4)
            for d, height in ((-1, 0.5), (0, 1.0), (1, 0.5)):
                row[torch.arange(phase + 2, frames + 2, period) + d] += height
            rows.append(row[2:-2])
            which.append(i)
    combs = torch.stack(rows)                                                                    # [P, frames]
    combs = combs - combs.mean(1, keepdim=True)
    return combs / combs.norm(dim=1, keepdim=True).clamp_min(1e-9), torch.tensor(which)


def _tempo_scores(wav: Tensor) -> Tensor:
    """Correlation of the onset envelope of [B,N] with each tempo's best comb: [B, 3]."""
    padded = F.pad(wav, (512, 0))                                # an onset at 0 s is one too
    window = torch.hann_window(512)
    spec = torch.stft(padded, 512, 160, window=window, center=False, return_complex=True).abs()  # [B, 257, F]
    flux = (spec[..., 2:] - spec[..., :-2]).clamp_min(0).square().sum(1)                         # [B, F]
    flux = flux - flux.mean(1, keepdim=True)
    combs, which = _combs(flux.shape[1])
    corr = flux @ combs.T / flux.norm(dim=1, keepdim=True).clamp_min(1e-9)                       # [B, P]
    return torch.stack([corr[:, which == i].amax(1) for i in range(len(BEAT_FRAMES))], 1)


@functools.lru_cache(maxsize=1)
def _mel_bands() -> Tensor:
    return torchaudio.functional.melscale_fbanks(513, 40.0, 8000.0, 32, SAMPLE_RATE).T           # [32, 513]


def _db(power: Tensor) -> Tensor:
    return 10 * power.clamp_min(1e-7).log10()


def _timbre(wav: Tensor, midi: Tensor) -> Tensor:
    """Features of the sound color of [B,N], in dB: [B, 32 + 12 + 5 + 6], from the pitch [B,F] of each frame.

    The mean mel spectrum, the partials over the pitch, the shape of the decay, and what drums add at the
    edges."""
    window = torch.hann_window(1024)
    spec = torch.stft(wav, 1024, GRID, window=window, return_complex=True).abs() ** 2            # [B, 513, F]
    frames = min(spec.shape[-1], midi.shape[1])
    spec, hz = spec[..., :frames], 440 * 2 ** ((midi[:, :frames] - 69) / 12)

    mel = _db((_mel_bands() @ spec).mean(2))                                                     # [B, 32]
    mel = (mel - mel.amax(1, keepdim=True)).clamp_min(FLOOR_DB)

    pitch = hz[:, None]                                                                          # [B, 1, F]
    bins = (pitch * torch.tensor(HARMONICS)[:, None] * 1024 / SAMPLE_RATE).round().long().clamp(0, 512)
    base = spec.gather(1, (pitch * 1024 / SAMPLE_RATE).round().long().clamp(0, 512))             # [B, 1, F]
    energy = spec[:, 7:300].sum(1)                               # 110..4,700 Hz                   [B, F]
    loud = (energy > 0.1 * energy.amax(1, keepdim=True)).float()[:, None]                        # [B, 1, F]
    partials = (_db(spec.gather(1, bins)) - _db(base)).clamp(FLOOR_DB, 20) * loud                # [B, 12, F]
    partials = partials.sum(2) / loud.sum(2).clamp_min(1)                                        # [B, 12]

    quantiles = energy.quantile(torch.tensor((0.1, 0.3, 0.5, 0.7, 0.9)), 1).T                    # [B, 5]
    decay = _db(quantiles / energy.amax(1, keepdim=True).clamp_min(1e-9)).clamp_min(FLOOR_DB)

    edges = torch.stack([spec[:, :7].sum(1), spec[:, 330:].sum(1)], 1)       # kick, snare         [B, 2, F]
    drums = edges.quantile(torch.tensor((0.5, 0.8, 0.97)), 2)                                    # [3, B, 2]
    drums = _db(drums / energy.mean(1)[:, None].clamp_min(1e-9)).transpose(0, 1).flatten(1)      # [B, 6]
    return torch.cat([mel, partials, decay, drums.clamp_min(FLOOR_DB)], 1)


# ------------------------------------------------------------------------------------------------------------
# the analyser


def degrade(wav: Tensor, generator: torch.Generator) -> Tensor:
    """Audio [B,N] with noise that follows its spectrum, as a low-rate codec leaves it: 0 to 60 % in
    amplitude."""
    window = torch.hann_window(512)
    spec = torch.stft(wav, 512, 128, window=window, return_complex=True)                         # [B, 257, F]
    near = F.avg_pool2d(spec.abs()[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    strength = 0.6 * torch.rand(len(wav), 1, 1, generator=generator)
    noise = torch.complex(*torch.randn(2, *spec.shape, generator=generator)) / 2 ** 0.5
    return torch.istft(spec + strength * near * noise, 512, 128, window=window, length=wav.shape[-1])


def _discriminant(x: Tensor, y: Tensor, classes: int) -> dict:
    """A head: the linear discriminant, with 5 % shrinkage, of features x [n,D] for classes y [n].

    {"means" [V,D] of the classes, "whiten" [D,D], "inside": the distance that 99.9 % stay within}"""
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])                             # [V, D]
    centered = (x - means[y]).double()
    cov = centered.T @ centered / len(x)
    cov = 0.95 * cov + 0.05 * cov.diagonal().mean() * torch.eye(cov.shape[0])
    whiten = torch.linalg.inv(torch.linalg.cholesky(cov)).T.float()
    inside = ((x - means[y]) @ whiten).norm(dim=1).quantile(0.999)
    return dict(means=means, whiten=whiten, inside=inside)


class Analyser:
    """Hears a toy clip: `analyser(wav [B,N] or [N], 16 kHz)` gives a list of {attribute: value or NONE}.

    The heads tell drums and instrument by the timbre. There is one for the drums in each register, and one
    for the instrument in each register with each kind of drums. A sound further from every class than half as
    far again as 99.9 % of the fitted clips is none of these; so is silence."""

    def __init__(self, heads: dict | None = None):
        """heads: {"NAME.means" | "NAME.whiten" | "NAME.inside": tensor}; those in assets/ if not given."""
        if heads is None:
            with np.load(HEADS_FILE) as stored:
                heads = {k: torch.from_numpy(stored[k]) for k in stored.files}
        self.heads = heads

    @classmethod
    @torch.no_grad()
    def fit(cls, through: Callable, clips: int = 20_000, seed: int = 7) -> "Analyser":
        """Fits the heads on clips of the training combinations: a third clean, a third degraded, a third
        after `through`, a function [B,N] -> [B,N] such as a codec's round trip. Closed form; seconds."""
        generator = torch.Generator().manual_seed(seed)
        features, labels = [], []
        for i, start in enumerate(range(0, clips, 32)):          # small pieces: large ones thrash memory
            made = [toy.make_clip(seed, 10**6, index, anywhere=True)
                    for index in range(start, min(start + 32, clips))]
            wav = torch.from_numpy(np.stack([m.wav for m in made]))
            wav = (wav, degrade(wav, generator), through(wav))[i % 3]
            wav = RMS * wav / wav.square().mean(1, keepdim=True).sqrt()
            midi, _ = _pitch(wav)
            features.append(_timbre(wav, midi))
            labels += [m.clip for m in made]
        x = torch.cat(features)                                                                  # [clips, D]

        def classes(name: str) -> Tensor:
            return torch.tensor([VALUES[name].index(getattr(clip, name)) for clip in labels])    # [clips]

        register, drums, instrument = classes("register"), classes("drums"), classes("instrument")
        heads = {}
        for r in range(len(VALUES["register"])):
            here = register == r
            heads[f"drums{r}"] = _discriminant(x[here], drums[here], len(VALUES["drums"]))
            for d in range(len(VALUES["drums"])):
                here = (register == r) & (drums == d)
                heads[f"instrument{r}{d}"] = _discriminant(x[here], instrument[here], len(INSTRUMENTS))
        return cls({f"{name}.{part}": value for name, head in heads.items() for part, value in head.items()})

    def save(self, path: Path = HEADS_FILE) -> None:
        """Writes the heads as plain arrays."""
        arrays = {k: v.numpy() for k, v in self.heads.items()}
        common.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    def _distances(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far features [1,D] are from each class of a head: [1,V]; and how far they may be."""
        whiten = self.heads[f"{name}.whiten"]
        far = torch.cdist(x @ whiten, self.heads[f"{name}.means"] @ whiten)
        return far, 1.5 * self.heads[f"{name}.inside"]

    @torch.no_grad()
    def __call__(self, wav) -> list:
        wav = torch.as_tensor(np.asarray(wav), dtype=torch.float32)
        wav = wav[None] if wav.dim() == 1 else wav
        assert wav.dim() == 2 and wav.shape[1] >= MIN_SAMPLES, \
            f"the analyser takes [B, N >= {MIN_SAMPLES}] at 16 kHz, not {wav.shape}"
        return [heard for part in wav.split(32) for heard in self._hear(part)]

    def _hear(self, wav: Tensor) -> list:
        rms = wav.square().mean(1).sqrt()
        wav = RMS * wav / rms.clamp_min(1e-6)[:, None]
        midi, weight = _pitch(wav)
        roots, lower = _root_and_register(midi, weight)
        tempi = _tempo_scores(wav)
        x = _timbre(wav, midi)
        result = []
        for b in range(len(wav)):
            heard = dict.fromkeys(VALUES, NONE)
            result.append(heard)
            if rms[b] < SILENCE_RMS or not torch.isfinite(wav[b]).all():
                continue
            if tempi[b].max() > 0.35:
                heard["tempo"] = VALUES["tempo"][int(tempi[b].argmax())]
            if roots[b].max() > 0.2:
                heard["root"] = NOTES[int(roots[b].argmax())]
            register = sum(float(lower[b].round()) >= low for low in ROOT_MIDI.values()) - 1
            if register >= 0 and lower[b] < 97:                  # no note of a tune is higher than 95
                heard["register"] = VALUES["register"][register]
            register = max(register, 0)
            far, most = self._distances(f"drums{register}", x[b:b + 1])
            drums = int(far.argmin())
            if far.min() <= most:
                heard["drums"] = VALUES["drums"][drums]
            far, most = self._distances(f"instrument{register}{drums}", x[b:b + 1])
            if far.min() <= most:
                heard["instrument"] = INSTRUMENTS[int(far.argmin())]
        return result


def hear(wav: Tensor, sample_rate: int) -> list:
    """What the analyser hears in clips [B,C,N] of any rate: a list of {attribute: value or NONE}.

    A clip too short for it is none of the sounds it knows."""
    mono = audio.resample(wav.float().cpu().mean(1), sample_rate, SAMPLE_RATE)   # [B, N]
    if mono.shape[1] < MIN_SAMPLES:
        return [dict.fromkeys(VALUES, NONE) for _ in mono]
    return Analyser()(mono)


@torch.no_grad()
def tune_accuracy(wav: Tensor, clip: Clip) -> float:
    """Share of the beats of a clip on which audio [N] at 16 kHz sounds the pitch class of its tune, in any
    octave.

    A beat is heard over the half in which its note is held, as the median of its frames; a silent one is
    wrong."""
    midi, weight = (x[0] for x in _pitch(wav[None].float()))                                     # [F] x 2
    loud = weight > 0.1 * weight.max()
    beat, root = BEAT_FRAMES[clip.tempo], NOTES.index(clip.root)
    right = []
    for i, start in enumerate(range(0, len(wav) // GRID, beat)):
        held = slice(start, start + beat // 2)
        sounding = midi[held][loud[held]]
        asked = (root + clip.tune[i % len(clip.tune)]) % 12
        right.append(len(sounding) > 0 and int(sounding.median().round()) % 12 == asked)
    return float(np.mean(right))


def accuracy(heard: list, asked: list) -> dict:
    """Share of clips in which each attribute was heard as asked: {attribute: 0..1}; NONE is wrong."""
    assert len(heard) == len(asked) > 0, f"{len(heard)} clips heard, {len(asked)} asked"
    return {name: float(np.mean([h[name] == a[name] for h, a in zip(heard, asked)])) for name in VALUES}


def confusion_table(heard: list, asked: list, name: str) -> str:
    """Lines on what was heard (across) for what was asked (down) of one attribute."""
    columns = HEARD_VALUES[name]
    width = max(map(len, columns)) + 1
    lines = [f"{name:<{width}}" + "".join(f"{c:>{width}}" for c in columns)]
    for value in VALUES[name]:
        row = [h[name] for h, a in zip(heard, asked) if a[name] == value]
        lines.append(f"{value:<{width}}" + "".join(f"{row.count(c):>{width}}" for c in columns))
    return "\n".join(lines)


def _read_clip(path: str) -> Tensor:
    """An audio file as [1, N] at 16 kHz. Errors: ValueError naming the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    wav = audio.read_audio(path, sample_rate=SAMPLE_RATE, channels=1)                        # [1, N]
    if wav.shape[1] < MIN_SAMPLES:
        seconds, least = wav.shape[1] / SAMPLE_RATE, MIN_SAMPLES / SAMPLE_RATE
        raise ValueError(f"{path}: {seconds:g} s; at least {least:g} s can be heard")
    return wav


@common.command("evaluate.analyser", "--clips")
def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluate.analyser", description="Hears toy music.")
    parser.add_argument("files", nargs="*", help="audio files to hear")
    parser.add_argument("--clips", type=int, default=500, help="clean clips to measure its accuracy on")
    args = parser.parse_args(argv)
    analyser = Analyser()
    for path in args.files:
        print(path, analyser(_read_clip(path))[0])
    check_flag_number("clips", args.clips, 1, 10_000)
    if args.files:
        return 0
    made = [toy.make_clip(1, 0, i, "valid") for i in range(args.clips)]
    for m in made[:5]:
        print(f"  {m.text}")
    heard = analyser(np.stack([m.wav for m in made]))
    asked = [m.clip.attributes() for m in made]
    scores = [f"{k} {v:.3f} (chance {CHANCE[k]:.3f})" for k, v in accuracy(heard, asked).items()]
    print(f"the analyser on {args.clips} clean clips: {', '.join(scores)}")
    print(confusion_table(heard, asked, "instrument"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
