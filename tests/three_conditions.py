"""What the tests of melody, style and all conditions together share: a tiny model, and values to give it."""

import math

import torch

import conditioning
from conditioning import Conditioner, ConditionerConfig
from model import ModelConfig, MusicGen

CLASSES = torch.eye(12)    # the chroma of each pitch class
PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)
SHAPE = dict(
    text_vocab=conditioning.vocabulary_size(PIECES), text_dim=16, text_hidden=32,
    melody_frames=6, melody_rate=0.5,
    style_codebooks=2, style_card=13, style_dim=32, style_layers=2, style_heads=2,
    style_levels=2, style_bins=8, style_every=2, style_frames=6)
ALL = {"melody": "prepend", "style": "prepend", "text": "cross"}


def tiny(fuse=ALL, **changes) -> MusicGen:
    """A model with the conditions of `fuse`; changes: flat names of a ConditionerConfig."""
    torch.manual_seed(1)
    config = ConditionerConfig(fuse=fuse, **{**SHAPE, **changes})
    conditioner = Conditioner(config, 32, {"text": PIECES})
    shape = ModelConfig(K=3, card=13, dim=32, num_layers=2, num_heads=2, emb_std=1.0)
    return MusicGen(shape, conditioner).eval()


def tone(midi: int, rate: int = 32_000, seconds: float = 2.0) -> torch.Tensor:
    """A sine of a MIDI pitch [N]."""
    hertz = 440 * 2 ** ((midi - 69) / 12)
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def style_codes(seed: int, length: int = 6) -> torch.Tensor:
    """Codes of an excerpt [3, length], as the model above takes them."""
    return torch.randint(13, (3, length), generator=torch.Generator().manual_seed(seed))
