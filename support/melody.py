"""Conditioning on a melody: the strongest pitch class of each chroma frame, a token in front of the codes.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.3. The chroma keeps a tune and forgets its instruments
(chroma.py). In training it is that of the segment itself, at generation that of a file. Music longer than a
window reads the melody on from where each window begins, and from its start again after its end.

    wav [C, N] ─chroma─► [F, 12] ─strongest class─► one-hot [F, 12] ─projection─► emb [B, F, D]

Legend: B batch, F chroma frames (7.8 a second), D width of the language model, C channels, N samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support import chroma
from support.condition import Condition, given_audio, zero_padded
from support.flag import Flag
from support.kernels import Linear


@dataclass
class MelodyConfig:
    """Shape of the melody's conditioner."""
    frames: int = 235                 # chroma frames of a segment: 30 s
    rate: float = 0.15625             # chroma frames a code frame: 7.8 Hz over 50 Hz
    argmax: bool = True               # the strongest class alone, not all twelve
    null_bin0: bool = False           # the public weights' null: class 0 all along, attended to
    stems: bool = False               # trained on melodies without drums and bass


class Melody(Condition):
    """Chroma to embeddings, a frame a token. A null melody gives exact zeros, as does what follows its
    end."""
    name = "melody"
    plural = "melodies"
    label = "Melody to follow"
    Config = MelodyConfig
    rng_stream = 15
    sounds_like_chroma = True
    flags = (
        Flag("melody_argmax", "melody: a frame's strongest class alone", bool, True),
        Flag("melody_stems", "melody without drums and bass (needs demucs)", bool, False),
    )
    cache_flags = (
        Flag("melody_stems", "melodies without drums and bass (needs demucs)", bool, False),
    )
    generate_flags = (
        Flag("melody_stems", "without its drums and bass (needs demucs; as trained, if trained so)",
             bool, False),
    )

    def __init__(self, config: MelodyConfig, dim: int, asset: None = None):
        super().__init__(config, dim)
        self.output_proj = Linear(12, dim)
        nn.init.normal_(self.output_proj.weight)    # a class is a vector, as large as nn.Embedding makes them

    @classmethod
    def check_flags(cls, args) -> None:
        """Demucs is there if it is needed."""
        if args.melody_stems and cls.is_active(args):
            chroma.load_separator()

    @classmethod
    def make_config(cls, args, codec, size: dict, asset: None, stored: dict | None) -> MelodyConfig:
        """By the length of a segment and the codec's rate."""
        samples = round(args.segment_seconds * codec.sample_rate)
        return MelodyConfig(
            frames=chroma.count_frames(samples, codec.sample_rate),
            rate=codec.hop / chroma.hop_length(codec.sample_rate),
            argmax=args.melody_argmax,
            null_bin0=not args.mask_padding,         # both as the published weights have it, or neither
            stems=args.melody_stems)

    @classmethod
    def features(cls, args) -> dict:
        """The chroma of the audio."""
        return {"chroma": chroma.Chroma(args.melody_stems)}

    def from_example(self, example, codes: Tensor, args, codec, rng) -> tuple:
        """The chroma [F, 12] of the segment's own audio."""
        return example.features["chroma"], None

    def from_user(self, given, codec) -> Tensor:
        """The chroma [F, 12] of a file or of audio [C, N]. Errors: ValueError if too short or silent."""
        wav, rate = given_audio(given, codec), codec.sample_rate
        if wav.shape[-1] < 4 * chroma.hop_length(rate):
            raise ValueError(f"a melody lasts at least {4 * chroma.HOP_SECONDS:g} s, this has "
                             f"{wav.shape[-1] / rate:.2f} s")
        found = chroma.melody_chroma(wav.cpu(), rate, self.config.stems)
        if not found.any():
            raise ValueError("it is silent: no melody in it")
        return found

    def from_toy(self, clip, text: str, wav: Tensor) -> Tensor:
        """The audio of the clip."""
        return wav

    def at_window(self, value, start_frame: int) -> Tensor:
        """A segment's frames of the melody from a frame of codes on."""
        first = round(start_frame * self.config.rate)
        return melody_window(torch.as_tensor(value), first, self.config.frames)

    def use_flags(self, args) -> None:
        """--melody_stems takes drums and bass out, whatever the model was trained on."""
        if args.melody_stems:
            chroma.load_separator()
            self.config.stems = True

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Chroma [F', 12] or None each -> (chroma [B, F, 12], mask [B, F]), cut or padded to F frames."""
        c, B = self.config, len(values)
        x, mask = torch.zeros(B, c.frames, 12), torch.zeros(B, c.frames, dtype=torch.bool)
        for i, value in enumerate(values):
            if value is not None:
                frames = min(len(value), c.frames)
                x[i, :frames] = torch.as_tensor(value[:frames]).float()
                mask[i, :frames] = True
        if c.argmax:
            x = chroma.strongest(x)
        if c.null_bin0:                              # the argmax of nothing is the first class
            x[..., 0] += x.sum(-1) == 0
            mask[:] = True
        return x, mask

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """chroma [B, F, 12], mask [B, F] -> (emb [B, F, D], mask)."""
        return zero_padded(self.output_proj(x), mask)


def melody_window(melody: Tensor, first: int, frames: int) -> Tensor:
    """`frames` of a melody [F', 12] from frame `first` on; it begins again after its end: [frames, 12]."""
    return melody[(first + torch.arange(frames)) % len(melody)]
