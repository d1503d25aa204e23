"""The embedded default: short synthesised music with captions, and an analyser that hears whether audio follows its caption.

A toy clip is 1.6 seconds of a solo instrument over optional drums. Five attributes are named in its caption and can be
recovered by signal analysis; the tune is free (it is what makes it music and not a table lookup):

    instrument   flute | chip | pluck | bell | organ       chance 1/5
    tempo        slow (94 bpm) | medium (150) | fast (250)        1/3
    root         C, C sharp, ... B (major triad and octave)      1/12
    register     low (root in MIDI 48..59) | middle | high        1/3
    drums        no | kick | snare | both                         1/4

Rhythm stands on a grid: every beat is a whole number of 20 ms, the frame of a 50 Hz codec, so that a note met again gives
nearly the same codes. Even beats play the root, odd ones the third, the fifth or the octave, and a note lasts for half of
its beat: where it ends already tells the tempo.

    beat (medium)   0         20        40        60        frames of 20 ms
    tune            root----  fifth---  root----  third---
    drums           kick      snare     kick      snare

One combination of the five values in ten is held out of training (`split="heldout"`), to see whether a model composes
attributes or recalls clips. There are 2,160 of them, for a reason: with a third as many, a model learns by heart which
ones there are, and plays one of those when it is asked for another. Everything is a function of (seed, epoch, index): data are
fresh in every epoch and cost no disk.

Legend: B clips, N samples (16 kHz), F analysis frames.
    python toy.py                    prints captions with the analyser's accuracies on clean clips
    python toy.py clip.wav ...       writes what the analyser hears in audio files
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SAMPLE_RATE = 16_000                                                 # Hz
CLIP_SECONDS = 1.6
INSTRUMENTS = ("flute", "chip", "pluck", "bell", "organ")
BEAT_FRAMES = {"slow": 32, "medium": 20, "fast": 12}                 # a beat in frames of 20 ms: 94, 150, 250 bpm
GRID = 320                                                           # samples in 20 ms
LEAST = GRID * max(BEAT_FRAMES.values())                             # samples: a beat of the slowest tempo, to hear which it is
NOTES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")
ROOT_MIDI = {"low": 48, "middle": 60, "high": 72}                    # MIDI number of C in each register
VALUES = {"instrument": INSTRUMENTS, "tempo": tuple(BEAT_FRAMES), "root": NOTES, "register": tuple(ROOT_MIDI),
          "drums": ("no", "kick", "snare", "both")}
CHANCE = {name: 1 / len(values) for name, values in VALUES.items()}
NONE = "none of these"
ANALYSER_FILE = Path(__file__).parent / "assets" / "toy_analyser.npz"

WORDS = {                                                            # caption words of each value
    "flute": ("flute", "whistle", "soft flute"), "chip": ("chip lead", "8-bit synth", "square wave"),
    "pluck": ("plucked string", "guitar", "harp"), "bell": ("bell", "chimes", "glockenspiel"),
    "organ": ("organ", "church organ", "pipe organ"),
    "slow": ("slow", "calm", "unhurried"), "medium": ("medium", "moderate", "walking"),
    "fast": ("fast", "quick", "lively"),
    "low": ("low", "deep", "dark"), "middle": ("middle", "mid-range", "tenor"), "high": ("high", "bright", "shrill"),
    "no": ("without drums", "with no percussion", "unaccompanied"),
    "kick": ("with a kick drum", "over a kick", "with bass drum"),
    "snare": ("with a snare drum", "over a snare", "with side drum"),
    "both": ("with drums", "over a drum beat", "with kick and snare"),
}
TEMPLATES = ("a {tempo} {register} {instrument} tune in {root} major {drums}",
             "{register} {instrument} playing in {root}, {tempo}, {drums}",
             "{tempo} music {drums}: {register} {instrument} in the key of {root}",
             "{instrument} melody, {register} register, {tempo} tempo, {root} major, {drums}")


@dataclass(frozen=True)
class Clip:
    """What a toy clip plays: one value of each attribute, and the tune in semitones over the root, one a beat."""
    instrument: str
    tempo: str
    root: str
    register: str
    drums: str
    tune: tuple

    def attributes(self) -> dict:
        """The captioned attributes as {name: value}."""
        return {name: getattr(self, name) for name in VALUES}


@dataclass(frozen=True)
class Sample:
    """A rendered clip: wav float32 [N] in [-1, 1] at 16 kHz, its caption, and what it plays."""
    wav: np.ndarray
    text: str
    clip: Clip


# ---------------------------------------------------------------------------------------------------------------------
# synthesis


@functools.lru_cache(maxsize=512)
def note(instrument: str, midi: int) -> np.ndarray:
    """One note of 0.8 s [N] at an RMS of about 0.13; phases start at zero, so that a note always sounds the same."""
    t = np.arange(int(0.8 * SAMPLE_RATE)) / SAMPLE_RATE
    f = 440.0 * 2 ** ((midi - 69) / 12)
    partials = {                                                     # (ratio to f, amplitude, decay 1/s) below 7.6 kHz
        "flute": [(1, 1.0, 0), (2, 0.12, 0), (3, 0.03, 0)],
        "chip": [(k, k ** -0.6, 0) for k in range(1, 40, 2)],
        "pluck": [(k, 1 / k, 3.0 + 1.5 * k) for k in range(1, 24)],
        "bell": [(1, 1.0, 7.0), (2.76, 0.6, 9.0), (5.40, 0.35, 12.0)],
        "organ": [(1, 1.0, 0), (2, 0.9, 0), (4, 0.8, 0), (8, 0.5, 0)],
    }[instrument]
    phase = 2 * np.pi * f * t
    if instrument == "flute":
        phase = phase + 0.25 * np.sin(2 * np.pi * 5.0 * t)           # vibrato
    wav = sum(a * np.sin(ratio * phase) * np.exp(-decay * t) for ratio, a, decay in partials if ratio * f < 7600)
    attack_seconds = {"flute": 0.06, "organ": 0.02}.get(instrument, 0.003)
    wav *= np.minimum(1, t / attack_seconds)
    if instrument == "organ":
        wav *= 1 - 0.35 * (0.5 - 0.5 * np.cos(2 * np.pi * 6.25 * t))  # tremolo: eight frames a turn
    level = np.sqrt(np.mean(wav[: int(0.3 * SAMPLE_RATE)] ** 2))
    return (0.13 * wav / level).astype(np.float32)


@functools.lru_cache(maxsize=2)
def drum(name: str) -> np.ndarray:
    """A kick or a snare of 0.24 s [N]."""
    t = np.arange(int(0.24 * SAMPLE_RATE)) / SAMPLE_RATE
    if name == "kick":
        wav = 0.55 * np.sin(2 * np.pi * (50 * t + 4 * (1 - np.exp(-25 * t)))) * np.exp(-14 * t)
    else:                                                            # bright noise, always the same
        wav = np.diff(np.random.default_rng(0).standard_normal(len(t) + 1)) * 0.13 * np.exp(-22 * t)
    return (wav * np.minimum(1, (t[-1] - t) / 0.03)).astype(np.float32)


def render(clip: Clip, seconds: float = CLIP_SECONDS) -> np.ndarray:
    """Audio of a clip, float32 [N] at 16 kHz; a tune shorter than the clip starts again."""
    N = int(seconds * SAMPLE_RATE)
    wav = np.zeros(N, np.float32)
    beat = BEAT_FRAMES[clip.tempo] * GRID                            # samples
    held = beat // 2
    fade = np.minimum(1, np.arange(held)[::-1] / (0.01 * SAMPLE_RATE)).astype(np.float32)
    root = ROOT_MIDI[clip.register] + NOTES.index(clip.root)
    for i, start in enumerate(range(0, N, beat)):
        tone = note(clip.instrument, root + clip.tune[i % len(clip.tune)])[:held] * fade
        tone = tone[: N - start]
        wav[start:start + len(tone)] += tone
        hit = "kick" if i % 2 == 0 else "snare"
        if clip.drums in (hit, "both"):
            struck = drum(hit)[: N - start]
            wav[start:start + len(struck)] += struck
    return wav


@functools.lru_cache(maxsize=1)
def combinations() -> dict:
    """All 2,160 combinations of attribute values as {"train": [dict], "heldout": [dict]}: one in ten is held out."""
    every = [{}]
    for name, values in VALUES.items():
        every = [{**c, name: v} for c in every for v in values]
    order = np.random.default_rng(20230608).permutation(len(every))  # fixed: the split never moves
    cut = len(every) // 10
    return {"heldout": [every[i] for i in order[:cut]], "train": [every[i] for i in order[cut:]]}


def caption(clip: Clip, rng: np.random.Generator) -> str:
    """A caption that names every attribute, in one of several wordings."""
    words = {name: rng.choice(WORDS.get(value, (value,))) for name, value in clip.attributes().items()}
    return str(rng.choice(TEMPLATES)).format(**words)


SPLITS = ("train", "valid", "heldout")


def draw(seed: int, epoch: int, index: int, split: str = "train") -> tuple:
    """What clip number `index` of an epoch plays, and its caption, without rendering it.

    train and valid share the combinations of values but no random stream; heldout has combinations neither ever has.
    Errors: ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose from {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, SPLITS.index(split), epoch, index))
    choices = combinations()["heldout" if split == "heldout" else "train"]
    tune = tuple(int(rng.choice((4, 7, 12))) if beat % 2 else 0 for beat in range(8))
    clip = Clip(**choices[rng.integers(len(choices))], tune=tune)
    return clip, caption(clip, rng)


def sample(seed: int, epoch: int, index: int, split: str = "train") -> Sample:
    """Clip number `index` of an epoch, rendered. Source: see `draw`."""
    clip, text = draw(seed, epoch, index, split)
    return Sample(render(clip), text, clip)


# ---------------------------------------------------------------------------------------------------------------------
# analysis


def _pitch(wav: torch.Tensor) -> tuple:
    """Pitch of each frame: (MIDI numbers [B,F], weights [B,F]). The lowest spectral peak at least half the strongest."""
    n_fft = 2048
    spec = torch.stft(wav, n_fft, GRID, window=torch.hann_window(n_fft), return_complex=True).abs()     # [B, bins, F]
    low, high = (int(hz * n_fft / SAMPLE_RATE) for hz in (120, 2100))
    s = spec[:, low:high]
    peak = (s > spec[:, low - 1:high - 1]) & (s >= spec[:, low + 1:high + 1])
    loud = s > 0.5 * (s * peak).amax(1, keepdim=True)
    first = (peak & loud).float().argmax(1, keepdim=True) + low                                         # [B, 1, F]
    a, b, c = (spec.gather(1, first + d)[:, 0].clamp_min(1e-9).log() for d in (-1, 0, 1))
    offset = (a - c) / (2 * (a - 2 * b + c)).clamp(max=-1e-6)                                           # parabola
    hz = (first[:, 0] + offset.clamp(-0.5, 0.5)) * SAMPLE_RATE / n_fft
    return 69 + 12 * (hz / 440).log2(), b.exp()                                                         # [B, F] x 2


def _root_and_register(midi: torch.Tensor, weight: torch.Tensor) -> tuple:
    """Scores of the twelve roots [B,12] (a share of 0..1) and the register as a MIDI number [B]."""
    weight = weight.sqrt() * (weight > 0.1 * weight.amax(1, keepdim=True))
    chroma = torch.zeros(len(midi), 12).scatter_add_(1, midi.round().long() % 12, weight)
    chroma = chroma / chroma.sum(1, keepdim=True).clamp_min(1e-9)
    expected = torch.zeros(12)
    expected[[0, 4, 7]] = torch.tensor([0.7, 0.15, 0.15])            # even beats and octaves, thirds, fifths
    likely = (expected + 0.01).log()
    scores = torch.stack([chroma @ likely.roll(r) for r in range(12)], 1).exp()                         # [B, 12]
    order = midi.sort(1)
    share = weight.gather(1, order.indices).cumsum(1) / weight.sum(1, keepdim=True).clamp_min(1e-9)
    lower = order.values.gather(1, (share < 0.3).sum(1, keepdim=True).clamp(max=midi.shape[1] - 1))
    return scores, lower[:, 0]


@functools.lru_cache(maxsize=4)
def _combs(frames: int) -> tuple:
    """Onset patterns of the three tempi at every phase: (normalised combs [P, frames], which tempo [P])."""
    rows, which = [], []
    for i, beat in enumerate(BEAT_FRAMES.values()):
        period = 2 * beat                                            # in 10 ms
        for phase in range(period):
            row = torch.zeros(frames + 4)
            for d, height in ((-1, 0.5), (0, 1.0), (1, 0.5)):
                row[torch.arange(phase + 2, frames + 2, period) + d] += height
            rows.append(row[2:-2])
            which.append(i)
    combs = torch.stack(rows)
    combs = combs - combs.mean(1, keepdim=True)
    return combs / combs.norm(dim=1, keepdim=True).clamp_min(1e-9), torch.tensor(which)


def _tempo_scores(wav: torch.Tensor) -> torch.Tensor:
    """Correlation of the onset envelope with each tempo's best comb: [B, 3]."""
    padded = torch.nn.functional.pad(wav, (512, 0))                  # an onset at 0 s is one too
    spec = torch.stft(padded, 512, 160, window=torch.hann_window(512), center=False, return_complex=True).abs()
    flux = (spec[..., 2:] - spec[..., :-2]).clamp_min(0).square().sum(1)                                # [B, F]
    flux = flux - flux.mean(1, keepdim=True)
    combs, which = _combs(flux.shape[1])
    corr = flux @ combs.T / flux.norm(dim=1, keepdim=True).clamp_min(1e-9)                              # [B, P]
    return torch.stack([corr[:, which == i].amax(1) for i in range(len(BEAT_FRAMES))], 1)


@functools.lru_cache(maxsize=1)
def _mel_bands() -> torch.Tensor:
    import torchaudio
    return torchaudio.functional.melscale_fbanks(513, 40.0, 8000.0, 32, SAMPLE_RATE).T                  # [32, 513]


FLOOR_DB = -35.0                                                      # what lies deeper is codec noise, not timbre
HARMONICS = (0.5, 1.5, 2, 2.5, 2.76, 3, 4, 5, 5.4, 6, 7, 8)          # ratios to the pitch; the odd ones out are a bell's


def _timbre(wav: torch.Tensor, midi: torch.Tensor) -> torch.Tensor:
    """Features of sound colour [B, 32 + 12 + 5 + 6]: mean mel spectrum, partials over the pitch, shape of the decay; dB."""
    spec = torch.stft(wav, 1024, GRID, window=torch.hann_window(1024), return_complex=True).abs() ** 2  # [B, 513, F]
    F = min(spec.shape[-1], midi.shape[1])
    spec, hz = spec[..., :F], 440 * 2 ** ((midi[:, :F] - 69) / 12)

    def db(x):
        return 10 * x.clamp_min(1e-7).log10()

    mel = db((_mel_bands() @ spec).mean(2))                                                             # [B, 32]
    mel = (mel - mel.amax(1, keepdim=True)).clamp_min(FLOOR_DB)
    bins = (hz[:, None] * torch.tensor(HARMONICS)[:, None] * 1024 / SAMPLE_RATE).round().long().clamp(0, 512)
    base = spec.gather(1, (hz[:, None] * 1024 / SAMPLE_RATE).round().long().clamp(0, 512))              # [B, 1, F]
    energy = spec[:, 7:300].sum(1)                                                                      # 110..4,700 Hz
    loud = (energy > 0.1 * energy.amax(1, keepdim=True)).float()[:, None]
    partials = ((db(spec.gather(1, bins)) - db(base)).clamp(FLOOR_DB, 20) * loud).sum(2) / loud.sum(2).clamp_min(1)
    quantiles = torch.tensor((0.1, 0.3, 0.5, 0.7, 0.9))
    shape = db(energy.quantile(quantiles, 1).T / energy.amax(1, keepdim=True).clamp_min(1e-9)).clamp_min(FLOOR_DB)
    edges = torch.stack([spec[:, :7].sum(1), spec[:, 330:].sum(1)], 1)                                  # kick, snare
    drums = db(edges.quantile(torch.tensor((0.5, 0.8, 0.97)), 2) / energy.mean(1)[:, None].clamp_min(1e-9))
    return torch.cat([mel, partials, shape, drums.transpose(0, 1).flatten(1).clamp_min(FLOOR_DB)], 1)


def degrade(wav: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Audio [B,N] with noise that follows its spectrum, as a low-rate codec leaves it: 0 to 60 % in amplitude a clip."""
    window = torch.hann_window(512)
    spec = torch.stft(wav, 512, 128, window=window, return_complex=True)                                # [B, 257, F]
    near = torch.nn.functional.avg_pool2d(spec.abs()[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    strength = 0.6 * torch.rand(len(wav), 1, 1, generator=generator)
    noise = torch.complex(*torch.randn(2, *spec.shape, generator=generator)) / 2 ** 0.5
    return torch.istft(spec + strength * near * noise, 512, 128, window=window, length=wav.shape[-1])


def _discriminant(x: torch.Tensor, y: torch.Tensor, classes: int) -> tuple:
    """Linear discriminant with 5 % shrinkage: (class means [C,D], whitening [D,D], distance that 99.9 % stay within)."""
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])                                    # [C, D]
    centred = (x - means[y]).double()
    cov = centred.T @ centred / len(x)
    cov = 0.95 * cov + 0.05 * cov.diagonal().mean() * torch.eye(cov.shape[0])
    whiten = torch.linalg.inv(torch.linalg.cholesky(cov)).T.float()
    inside = ((x - means[y]) @ whiten).norm(dim=1).quantile(0.999)
    return means, whiten, inside


class Analyser:
    """Hears a toy clip: `analyser(wav [B,N] or [N], 16 kHz)` gives a list of {attribute: value or "none of these"}.

    Pitch, root, register and tempo are closed rules. Instrument and drums are linear discriminants on spectral features,
    one for each register (and drums), fitted on rendered clips with and without codec-like noise: seconds, closed form.
    A sound further from every class than 99.9 % of the fitted clips is none of these; so is silence (RMS under 0.005).
    """

    def __init__(self, heads: dict | None = None):
        if heads is None:
            with np.load(ANALYSER_FILE) as stored:
                heads = {k: torch.from_numpy(stored[k]) for k in stored.files}
        self.heads = heads

    @classmethod
    @torch.no_grad()
    def fit(cls, through, clips: int = 20_000, seed: int = 7) -> "Analyser":
        """Fits the heads on `clips` clips of the training combinations: a third clean, a third degraded, a third after
        `through`, a function [B,N] -> [B,N] such as a codec's round trip."""
        generator = torch.Generator().manual_seed(seed)
        features, midis, labels = [], [], []
        for i, start in enumerate(range(0, clips, 32)):              # in small pieces: large ones thrash the memory
            samples = [sample(seed, 10**6, i) for i in range(start, min(start + 32, clips))]
            wav = torch.from_numpy(np.stack([s.wav for s in samples]))
            wav = (wav, degrade(wav, generator), through(wav))[i % 3]
            wav = 0.13 * wav / wav.square().mean(1, keepdim=True).sqrt()
            midi, weight = _pitch(wav)
            features.append(_timbre(wav, midi))
            midis.append(_root_and_register(midi, weight)[1])
            labels += [s.clip for s in samples]
        x = torch.cat(features)
        register, drums, kind = (torch.tensor([VALUES[name].index(getattr(c, name)) for c in labels])
                                 for name in ("register", "drums", "instrument"))
        heads = {}
        for r in range(len(VALUES["register"])):
            _store(heads, f"drums{r}", _discriminant(x[register == r], drums[register == r], len(VALUES["drums"])))
            for d in range(len(VALUES["drums"])):
                here = (register == r) & (drums == d)
                _store(heads, f"instrument{r}{d}", _discriminant(x[here], kind[here], len(INSTRUMENTS)))
        return cls(heads)

    def save(self, path: Path = ANALYSER_FILE) -> None:
        """Writes the heads as plain arrays."""
        np.savez_compressed(path, **{k: v.numpy() for k, v in self.heads.items()})

    def _distances(self, name: str, x: torch.Tensor) -> tuple:
        white = x @ self.heads[f"{name}.whiten"]
        return torch.cdist(white, self.heads[f"{name}.means"] @ self.heads[f"{name}.whiten"]), \
            self.heads[f"{name}.inside"]

    @torch.no_grad()
    def __call__(self, wav) -> list:
        wav = torch.as_tensor(np.asarray(wav), dtype=torch.float32)
        wav = wav[None] if wav.dim() == 1 else wav
        assert wav.dim() == 2 and wav.shape[1] >= LEAST, f"the analyser takes [B, N >= {LEAST}] at 16 kHz, not {wav.shape}"
        return [heard for part in wav.split(32) for heard in self._hear(part)]

    def _hear(self, wav: torch.Tensor) -> list:
        rms = wav.square().mean(1).sqrt()
        wav = 0.13 * wav / rms.clamp_min(1e-6)[:, None]
        midi, weight = _pitch(wav)
        roots, register = _root_and_register(midi, weight)
        tempi = _tempo_scores(wav)
        x = _timbre(wav, midi)
        heard = []
        for b in range(len(wav)):
            if rms[b] < 5e-3 or not torch.isfinite(wav[b]).all():
                heard.append(dict.fromkeys(VALUES, NONE))
                continue
            r = sum(float(register[b].round()) >= midi for midi in ROOT_MIDI.values()) - 1
            d, drums_within = self._distances(f"drums{max(r, 0)}", x[b:b + 1])
            drums = int(d.argmin())
            i, within = self._distances(f"instrument{max(r, 0)}{drums}", x[b:b + 1])
            heard.append({
                "instrument": INSTRUMENTS[int(i.argmin())] if i.min() <= 1.5 * within else NONE,
                "tempo": tuple(BEAT_FRAMES)[int(tempi[b].argmax())] if tempi[b].max() > 0.35 else NONE,
                "root": NOTES[int(roots[b].argmax())] if roots[b].max() > 0.2 else NONE,
                "register": VALUES["register"][r] if r >= 0 and register[b] < 97 else NONE,
                "drums": VALUES["drums"][drums] if d.min() <= 1.5 * drums_within else NONE})
        return heard


def _store(heads: dict, name: str, discriminant: tuple) -> None:
    for key, value in zip(("means", "whiten", "inside"), discriminant):
        heads[f"{name}.{key}"] = value


@torch.no_grad()
def tune_accuracy(wav: torch.Tensor, clip: Clip) -> float:
    """Share of the beats of a clip on which audio [N] at 16 kHz sounds the pitch class of its tune, in any octave.

    A beat is heard over its held half, as the median of its frames; a silent one is wrong."""
    midi, weight = (x[0] for x in _pitch(wav[None].float()))                                            # [F]
    loud = weight > 0.1 * weight.max()
    beat, root, right = BEAT_FRAMES[clip.tempo], NOTES.index(clip.root), []
    for i, start in enumerate(range(0, len(wav) // GRID, beat)):
        held = slice(start, start + beat // 2)
        sounding = midi[held][loud[held]]
        asked = (root + clip.tune[i % len(clip.tune)]) % 12
        right.append(len(sounding) > 0 and int(sounding.median().round()) % 12 == asked)
    return float(np.mean(right))


def accuracy(heard: list, asked: list) -> dict:
    """Share of clips in which each attribute was heard as asked: {attribute: 0..1}; "none of these" is wrong."""
    assert len(heard) == len(asked) > 0, f"{len(heard)} clips heard, {len(asked)} asked"
    return {name: float(np.mean([h[name] == a[name] for h, a in zip(heard, asked)])) for name in VALUES}


def confusion(heard: list, asked: list, name: str) -> str:
    """A table of what was heard (across) for what was asked (down) of one attribute."""
    columns = VALUES[name] + (NONE,)
    width = max(len(v) for v in columns) + 1
    lines = [f"{name:<{width}}" + "".join(f"{c:>{width}}" for c in columns)]
    for value in VALUES[name]:
        row = [h[name] for h, a in zip(heard, asked) if a[name] == value]
        lines.append(f"{value:<{width}}" + "".join(f"{row.count(c):>{width}}" for c in columns))
    return "\n".join(lines)


def read_mono(path: str) -> torch.Tensor:
    """An audio file as [1, N] at 16 kHz. Errors: ValueError naming the file."""
    import soundfile
    import torchaudio
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        raise ValueError(f"{path}: not readable as audio ({error})") from None
    if rate < 1000 or math.lcm(rate, SAMPLE_RATE) // math.gcd(rate, SAMPLE_RATE) > 30_000_000:      # filter coefficients
        raise ValueError(f"{path}: absurd sample rate: {rate} Hz cannot be resampled to {SAMPLE_RATE} Hz")
    mono = torchaudio.functional.resample(torch.from_numpy(wav.mean(1)), rate, SAMPLE_RATE)
    if len(mono) < LEAST:
        raise ValueError(f"{path}: {len(mono) / SAMPLE_RATE:g} s; at least {LEAST / SAMPLE_RATE:g} s can be heard")
    return mono[None]


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Toy music and its analyser.")
    parser.add_argument("files", nargs="*", help="audio files to hear")
    parser.add_argument("--clips", type=int, default=500, help="clean clips to measure the analyser on")
    args = parser.parse_args(argv)
    analyser = Analyser()
    try:
        for path in args.files:
            print(path, analyser(read_mono(path))[0])
        if args.clips < 1:
            raise ValueError(f"--clips {args.clips}: at least 1")
    except ValueError as error:
        print(f"toy.py: {error}", file=sys.stderr)
        return 2
    if args.files:
        return 0
    samples = [sample(1, 0, i, "valid") for i in range(args.clips)]
    for s in samples[:5]:
        print(f"  {s.text}")
    heard = analyser(np.stack([s.wav for s in samples]))
    asked = [s.clip.attributes() for s in samples]
    print(f"the analyser on {args.clips} clean clips: " +
          ", ".join(f"{k} {v:.3f} (chance {CHANCE[k]:.3f})" for k, v in accuracy(heard, asked).items()))
    print(confusion(heard, asked, "instrument"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
