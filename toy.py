"""The embedded default: short synthesized music with captions.

A toy clip is 1.6 seconds of a solo instrument over optional drums. Five attributes are named in its caption,
and signal analysis can hear them again (evaluate/analyser.py). The tune is free: it makes this music and not
a table lookup.

    instrument   flute | chip | pluck | bell | organ                       chance 1/5
    tempo        slow (94 bpm) | medium (150) | fast (250)                        1/3
    root         C, C sharp, ... B (major triad and octave)                       1/12
    register     low (root in MIDI 48..59) | middle | high                        1/3
    drums        no | kick | snare | both                                         1/4

Rhythm stands on a grid: a beat is a whole number of 20 ms, the frame of a 50 Hz codec, so the same note gives
nearly the same codes wherever it stands. Even beats play the root, odd ones the third, the fifth or the
octave. A note lasts for half of its beat, so where it ends already tells the tempo.

    beat (medium)   0         20        40        60        frames of 20 ms
    tune            root----  fifth---  root----  third---
    drums           kick      snare     kick      snare

One combination of the five values in ten is held out of training (split "heldout"). It shows whether a model
composes attributes or recalls clips. There are 2,160 combinations for a reason: with a third as many, a model
learned by heart which ones exist, and played one of those when asked for another. A clip is a function of
(seed, epoch, index): data are fresh in every epoch and take no disk.

Two of three clips of training begin anywhere in their piece. Long music is generated in windows, which begin
anywhere too: a model that knows the beat by its place in the clip alone would lose it there.

Legend: C channels, N samples (16 kHz).
    python toy.py                    prints captions, and what each clip plays
"""

import argparse
import functools
import sys
from dataclasses import dataclass, replace

import numpy as np

from support import common

SAMPLE_RATE = 16_000                                    # Hz
CLIP_SECONDS = 1.6
GRID = 320                                              # samples in 20 ms
SPLITS = ("train", "valid", "heldout")
START_STREAM = 16                                       # of random numbers: where a clip begins

INSTRUMENTS = ("flute", "chip", "pluck", "bell", "organ")
BEAT_FRAMES = {"slow": 32, "medium": 20, "fast": 12}    # a beat in frames of 20 ms: 94, 150, 250 bpm
NOTES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")
ROOT_MIDI = {"low": 48, "middle": 60, "high": 72}       # MIDI number of C in each register
VALUES = {
    "instrument": INSTRUMENTS,
    "tempo": tuple(BEAT_FRAMES),
    "root": NOTES,
    "register": tuple(ROOT_MIDI),
    "drums": ("no", "kick", "snare", "both"),
}

WORDS = {                                               # caption words of each value; a root is its own word
    "flute": ("flute", "whistle", "soft flute"),
    "chip": ("chip lead", "8-bit synth", "square wave"),
    "pluck": ("plucked string", "guitar", "harp"),
    "bell": ("bell", "chimes", "glockenspiel"),
    "organ": ("organ", "church organ", "pipe organ"),
    "slow": ("slow", "calm", "unhurried", "94 BPM"),
    "medium": ("medium", "moderate", "walking", "150 BPM"),
    "fast": ("fast", "quick", "lively", "250 BPM"),
    "low": ("low", "deep", "dark"),
    "middle": ("middle", "mid-range", "tenor"),
    "high": ("high", "bright", "shrill"),
    "no": ("without drums", "with no percussion", "unaccompanied"),
    "kick": ("with a kick drum", "over a kick", "with bass drum"),
    "snare": ("with a snare drum", "over a snare", "with side drum"),
    "both": ("with drums", "over a drum beat", "with kick and snare"),
}
TEMPLATES = (
    "a {tempo} {register} {instrument} tune in {root} major {drums}",
    "{register} {instrument} playing in {root}, {tempo}, {drums}",
    "{tempo} music {drums}: {register} {instrument} in the key of {root}",
    "{instrument} melody, {register} register, {tempo} tempo, {root} major, {drums}",
)
CASES = (str, str.lower, str.upper, str.title, lambda text: text[0].upper() + text[1:])


@dataclass(frozen=True)
class Clip:
    """What a toy clip plays: a value of each attribute; the tune in semitones over the root, one a beat;
    the frame of the piece at which it begins."""
    instrument: str
    tempo: str
    root: str
    register: str
    drums: str
    tune: tuple
    start: int = 0

    def attributes(self) -> dict:
        """The captioned attributes as {name: value}."""
        return {name: getattr(self, name) for name in VALUES}


@dataclass(frozen=True)
class RenderedClip:
    """A clip to train on: wav float32 [N] in [-1, 1] at 16 kHz, its caption, and what it plays."""
    wav: np.ndarray
    text: str
    clip: Clip


# ------------------------------------------------------------------------------------------------------------
# which clip


@functools.lru_cache(maxsize=1)
def combinations() -> dict:
    """All 2,160 combinations of values as {"train": [dict], "heldout": [dict]}: one in ten is held out."""
    every = [{}]
    for name, values in VALUES.items():
        every = [{**c, name: v} for c in every for v in values]
    order = np.random.default_rng(20230608).permutation(len(every))  # fixed: the split never moves
    cut = len(every) // 10
    return {"heldout": [every[i] for i in order[:cut]], "train": [every[i] for i in order[cut:]]}


def caption(clip: Clip, rng: np.random.Generator) -> str:
    """A caption that names every attribute, in one of several wordings, and in any case, as people type."""
    words = {name: rng.choice(WORDS.get(value, (value,))) for name, value in clip.attributes().items()}
    text = str(rng.choice(TEMPLATES)).format(**words)
    return CASES[rng.integers(len(CASES))](text)


def draw_clip(seed: int, epoch: int, index: int, split: str = "train") -> tuple[Clip, str]:
    """What clip number `index` of an epoch plays, and its caption, without rendering it.

    train and valid share combinations but no random stream; heldout has combinations that neither ever has.
    Errors: ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: choose from {', '.join(SPLITS)}")
    rng = common.random_generator(seed, SPLITS.index(split), epoch, index)
    choices = combinations()["heldout" if split == "heldout" else "train"]
    tune = tuple(int(rng.choice((4, 7, 12))) if beat % 2 else 0 for beat in range(8))
    clip = Clip(**choices[rng.integers(len(choices))], tune=tune)
    return clip, caption(clip, rng)


# ------------------------------------------------------------------------------------------------------------
# how it sounds


@functools.lru_cache(maxsize=512)
def note(instrument: str, midi: int) -> np.ndarray:
    """A note of 0.8 s [N] at an RMS of about 0.13. Phases start at zero: it always sounds the same.

    Attacks take a frame at most, so that it can be heard in which frame a note begins."""
    t = np.arange(int(0.8 * SAMPLE_RATE)) / SAMPLE_RATE
    f = 440.0 * 2 ** ((midi - 69) / 12)
    partials = {                                        # (ratio to f, amplitude, decay 1/s)
        "flute": [(1, 1.0, 0), (2, 0.12, 0), (3, 0.03, 0)],
        "chip": [(k, k ** -0.6, 0) for k in range(1, 40, 2)],
        "pluck": [(k, 1 / k, 3.0 + 1.5 * k) for k in range(1, 24)],
        "bell": [(1, 1.0, 7.0), (2.76, 0.6, 9.0), (5.40, 0.35, 12.0)],
        "organ": [(1, 1.0, 0), (2, 0.9, 0), (4, 0.8, 0), (8, 0.5, 0)],
    }[instrument]
    partials = [partial for partial in partials if partial[0] * f < 7600]         # below half the sample rate
    phase = 2 * np.pi * f * t
    if instrument == "flute":
        phase = phase + 0.25 * np.sin(2 * np.pi * 5.0 * t)           # vibrato
    wav = sum(a * np.sin(ratio * phase) * np.exp(-decay * t) for ratio, a, decay in partials)
    attack_seconds = 0.02 if instrument in ("flute", "organ") else 0.003
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
    else:                                               # bright noise, always the same
        wav = np.diff(np.random.default_rng(0).standard_normal(len(t) + 1)) * 0.13 * np.exp(-22 * t)
    return (wav * np.minimum(1, (t[-1] - t) / 0.03)).astype(np.float32)


def render(clip: Clip, seconds: float = CLIP_SECONDS) -> np.ndarray:
    """Audio of a clip, float32 [N] at 16 kHz; a tune shorter than the clip starts again."""
    skipped = clip.start * GRID                         # samples
    N = skipped + int(seconds * SAMPLE_RATE)
    wav = np.zeros(N, np.float32)
    beat = BEAT_FRAMES[clip.tempo] * GRID               # samples
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
    return wav[skipped:]


def pan(wav: np.ndarray, clip: Clip, channels: int) -> np.ndarray:
    """A clip's mono audio [N] as [C,N]. In stereo the tune stands to the left and the drums to the right,
    each twice as loud (6 dB) on its side as on the other; the mean of both is the mono audio."""
    if channels == 1:
        return wav[None]                                                                  # [1, N]
    tune = render(replace(clip, drums="no"), len(wav) / SAMPLE_RATE)                      # [N]
    drums = wav - tune                                                                    # [N]
    return np.stack([4 * tune + 2 * drums, 2 * tune + 4 * drums]) / 3                     # [2, N]


def make_clip(seed: int, epoch: int, index: int, split: str = "train", anywhere=False) -> RenderedClip:
    """Clip number `index` of an epoch, rendered; if `anywhere`, two of three from any frame of their piece
    on. Errors: see `draw_clip`."""
    clip, text = draw_clip(seed, epoch, index, split)
    if anywhere and index % 3:
        rng = common.random_generator(seed, START_STREAM, SPLITS.index(split), epoch, index)
        clip = replace(clip, start=int(rng.integers(len(clip.tune) * BEAT_FRAMES[clip.tempo])))
    return RenderedClip(render(clip), text, clip)


@common.command("toy.py")
def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Captions of toy music.", allow_abbrev=False)
    parser.add_argument("--n", type=int, default=5, help="how many")
    args = parser.parse_args(argv)
    for index in range(args.n):
        clip, text = draw_clip(1, 0, index, "valid")
        print(f"{text}\n    {', '.join(clip.attributes().values())}; semitones {clip.tune}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
