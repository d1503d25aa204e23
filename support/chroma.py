"""The melody of a waveform: which of the twelve pitch classes sounds, eight times a second.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.3: music is conditioned on the strongest class of each frame of a
chromagram, which keeps a tune and forgets its instruments. `Chroma` is what the data sets are asked for.

    wav [N] ─STFT, power─► [bins, F] ─filterbank─► [12, F] ─each frame over its maximum─► chroma [F, 12]

Legend: C channels, N samples, F chroma frames (7.8 a second), 12 classes from C to B.
    python -m support.chroma in.wav          draws it
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import audio
from support.common import command

CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
HOP_SECONDS = 0.128  # 4,096 samples at 32 kHz; a window is four of them
SILENCE = 1e-6  # power of a frame: a tone 94 dB below full scale


def hop_length(sample_rate: int) -> int:
    """Samples from one frame to the next; a window, and the FFT, has four times as many."""
    return round(HOP_SECONDS * sample_rate)


def count_frames(samples: int, sample_rate: int) -> int:
    """Chroma frames of so many samples: 235 for 30 s at 32 kHz. Less than a window is padded to one."""
    hop = hop_length(sample_rate)
    return 1 + max(samples, 4 * hop) // hop


@functools.lru_cache(maxsize=4)
def filterbank(sample_rate: int, n_fft: int) -> Tensor:
    """Weights [12, n_fft/2+1] of an FFT's bins in the pitch classes: Gaussian bumps around each class.

    They are a semitone or a bin wide. Each bin's weights have norm 1; then octaves count less the further
    they lie from 440 Hz (2 octaves: 1/sqrt(e)).

    The numbers are those of librosa.filters.chroma(sr, n_fft, tuning=0)."""
    hertz = torch.arange(1, n_fft, dtype=torch.float64) * sample_rate / n_fft
    pitch = 12 * torch.log2(hertz / 27.5)  # semitones over the lowest A
    pitch = torch.cat([pitch[:1] - 18, pitch])  # bin 0: an octave and a half below bin 1
    width = torch.cat([pitch.diff().clamp_min(1), pitch.new_ones(1)])
    distance = (pitch - torch.arange(12)[:, None] + 6) % 12 - 6  # [12, n_fft]
    weights = F.normalize(torch.exp(-0.5 * (2 * distance / width) ** 2), dim=0)
    weights = weights * torch.exp(-0.5 * ((pitch / 12 - 5) / 2) ** 2)
    return weights.roll(-3, 0)[:, :n_fft // 2 + 1].float()  # from C, not from A


def chromagram(wav: Tensor, sample_rate: int) -> Tensor:
    """wav [N] or [C,N] (mixed to mono) -> chroma [F, 12] float32: a frame's maximum is 1, that of silence 0.

    Frame f is centered on sample f * hop; beyond the ends the waveform is mirrored."""
    mono = wav if wav.dim() == 1 else wav.mean(0)
    hop = hop_length(sample_rate)
    n_fft = 4 * hop
    if (lacking := n_fft - len(mono)) > 0:
        mono = F.pad(mono, (lacking // 2, lacking - lacking // 2))
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(mono, n_fft, hop, window=window, return_complex=True)
    power = spectrum.abs().square() / window.square().sum()  # [bins, F]
    energy = filterbank(sample_rate, n_fft) @ power  # [12, F]
    maximum = energy.amax(0)
    return (energy / maximum.clamp_min(SILENCE) * (maximum >= SILENCE)).T.contiguous()  # [F, 12]


def strongest(x: Tensor) -> Tensor:
    """chroma [...,12] -> one-hot of the strongest class; silence stays zero (its argmax would be a C)."""
    return F.one_hot(x.argmax(-1), 12).to(x.dtype) * (x.amax(-1, keepdim=True) > 0)


def similarity(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two chromas [F,12]: the mean over the frames that the shorter has.

    A silent frame is unlike any other and like another silent one."""
    frames = min(len(a), len(b))
    a, b = a[:frames], b[:frames]
    both_silent = (a.amax(1) == 0) & (b.amax(1) == 0)
    return float((F.cosine_similarity(a, b, dim=1) + both_silent).mean())


def part_of_file(wav: Tensor, first_sample: int, start: int, stop: int | None, sample_rate: int) -> Tensor:
    """The frames of a long file centered at samples start..stop-1 (None: to the end), from a piece of it.

    wav [C,n] begins at `first_sample` of the file and holds half a window more than start..stop on each side,
    where there is so much: then the frames are those of the whole file."""
    hop = hop_length(sample_rate)
    skipped = -first_sample % hop  # frames stand on a grid over the whole file
    first = (first_sample + skipped) // hop  # frame 0 of the piece within the file
    if skipped >= wav.shape[-1]:
        return torch.zeros(0, 12)
    frames = chromagram(wav[:, skipped:], sample_rate)[:1 + (wav.shape[-1] - skipped) // hop]
    end = None if stop is None else math.ceil(stop / hop) - first
    return frames[math.ceil(start / hop) - first:end]


def load_separator():
    """Demucs' model and the function that applies it. Errors: ValueError says how to get it."""
    try:
        from demucs.apply import apply_model
        from demucs.pretrained import get_model
    except ImportError:
        raise ValueError("--melody_stems needs the demucs package: pip install demucs "
                         "(or leave the flag out)") from None
    return apply_model, _pretrained(get_model)


@functools.lru_cache(maxsize=1)
def _pretrained(get_model):
    try:
        return get_model("htdemucs").eval()
    except Exception as error:  # no network, no disk: it has no error of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"--melody_stems: demucs cannot load its weights ({reason})") from None


@torch.no_grad()
def without_rhythm(wav: Tensor, sample_rate: int) -> Tensor:
    """wav [C,N] -> its vocals and other instruments, mono [N]: without drums and bass, which hide a melody.

    No random shifts, unlike demucs' default: the same audio gives the same melody."""
    apply_model, model = load_separator()
    stereo = wav[:2] if len(wav) > 1 else wav.expand(2, -1)
    stereo = audio.resample(stereo, sample_rate, model.samplerate)  # [2, n]
    scale = stereo.std().clamp_min(1e-8)
    stems = apply_model(model, stereo[None] / scale, shifts=0)[0] * scale  # [stems, 2, n]
    kept = sum(stems[model.sources.index(name)] for name in ("vocals", "other")).mean(0)  # [n]
    return audio.resample(kept, model.samplerate, sample_rate)[:wav.shape[-1]]


def melody_chroma(wav: Tensor, sample_rate: int, stems: bool = False) -> Tensor:
    """wav [C,N] -> chroma [F, 12]; stems: without its drums and bass. Errors: ValueError without demucs."""
    return chromagram(without_rhythm(wav, sample_rate) if stems else wav, sample_rate)


@dataclass(frozen=True)
class Chroma:
    """The chroma of a clip's audio as a feature: what a data set gives a condition beside codes and captions.

    Its members are all that data.py and support/cache.py know of a feature; another one would have the same.
    stems: of the audio without drums and bass, which demucs takes out."""
    stems: bool = False

    name = "chroma"  # in Example.features, and of its file in a token cache
    condition = "melody"  # that asks for it
    columns, dtype = 12, np.float16  # of that file
    hop_length = staticmethod(hop_length)  # samples from frame to frame, of (sample_rate)
    count_frames = staticmethod(count_frames)  # of (samples, sample_rate)

    def load(self) -> None:
        """Loads what it needs beyond this project. Errors: ValueError says how to get it."""
        if self.stems:
            load_separator()

    def of_segment(self, wav: Tensor, sample_rate: int) -> np.ndarray:
        """wav [C,n] -> [F, 12] float32."""
        return melody_chroma(wav, sample_rate, self.stems).numpy()

    def of_window(self, wav: Tensor, first_sample: int, start: int, stop: int | None,
                  sample_rate: int) -> np.ndarray:
        """The frames [F, 12] of a long file centered at samples start..stop-1: see `part_of_file`."""
        if self.stems:
            wav = without_rhythm(wav, sample_rate)[None]
        return part_of_file(wav, first_sample, start, stop, sample_rate).numpy()

    # ----- in a token cache

    @property
    def settings(self) -> dict:
        """What a token cache made with it says of it."""
        return {"melody_stems": True} if self.stems else {}

    @property
    def cache_flags(self) -> str:
        """The flags of `data.py cache` that make a cache with it."""
        return " --melody_stems" if self.stems else ""

    def mismatch(self, settings: dict) -> str | None:
        """What a token cache of other settings holds, and which flag fits it; None if it holds this."""
        if bool(settings.get("melody_stems")) == self.stems:
            return None
        if self.stems:
            return "melodies with drums and bass: leave out --melody_stems"
        return "melodies without drums and bass: give --melody_stems"


def draw_chroma(x: Tensor, columns: int = 96) -> str:
    """chroma [F, 12] as a grid of 12 rows, B on top, a column a frame or several: darker is stronger."""
    each = math.ceil(len(x) / columns)
    x = F.avg_pool1d(x.T[None], each, ceil_mode=True)[0]  # [12, columns]
    shades = " .:-=+*#%@"
    rows = []
    for name, row in zip(reversed(CLASSES), x.flip(0).tolist()):
        rows.append(f"{name:>2} |" + "".join(shades[min(9, int(v * 10))] for v in row))
    return "\n".join(rows + [f"   +{'-' * x.shape[1]}  a column is {each * HOP_SECONDS:g} s"])


def print_chroma(path: str) -> None:
    """Prints the chroma of an audio file. Errors: ValueError naming the file."""
    print(draw_chroma(chromagram(audio.read_audio(path), audio.audio_info(path).sample_rate)))


@command("support.chroma")
def main(argv: list | None = None) -> None:
    """Draws the chroma of an audio file."""
    parser = argparse.ArgumentParser(prog="python -m support.chroma", description=main.__doc__)
    parser.add_argument("audio")
    print_chroma(parser.parse_args(argv).audio)


if __name__ == "__main__":
    sys.exit(main())
