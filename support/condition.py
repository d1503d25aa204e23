"""What a condition is: what text, melody and style implement, and what everything else loops over.

A condition is one class in one file. It says which flags it has, what its value is for a training example and
for what a user gives at generation, and how a batch of values becomes embeddings of the language model's
width D:

    example ─from_example─► value ─┐
                                   ├─ prepare (host) ─► inputs ─ forward (device) ─► emb [B,L,D], mask [B,L]
    user's  ─from_user────► value ─┘

To add one: write a subclass, import it in conditioning.py and append it to CONDITIONS there. The shortest to
copy is the tempo as a number in tests/test_new_condition.py; support/melody.py reads audio. train.py,
generate.py, data.py, the evaluation, the page and the flags find it in CONDITIONS; none of them names a
condition.

Legend: B batch, K codebooks, T frames, L condition tokens, D width of the language model, C channels, N
samples.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from support import audio


@dataclass
class NoConfig:
    """The shape of a condition that has nothing to choose."""


class Condition(nn.Module):
    """What music is conditioned on. Subclasses set the class attributes and override what differs."""

    name: str                         # in flags, logs and checkpoints; no underscore
    plural: str                       # "captions", for lines of the evaluation
    label: str                        # of its field on the page of generate.py --serve
    widget = "audio"                  # of that field: text, audio or number
    metavar = "AUDIO"                 # of its flag of generate.py
    Config: type = NoConfig           # dataclass of plain data; checkpoints hold its fields as NAME_FIELD
    rng_stream: int                   # of its random numbers in training, see common.random_generator
    default_method: str | dict = "prepend"     # how it enters, for all datasets or {"toy": .., "audio": ..}
    flags: tuple = ()                 # of train.py, each a Flag
    generate_flags: tuple = ()        # of generate.py, beside the one that gives its value
    cache_flags: tuple = ()           # of data.py cache: which its `features` need
    is_text = False   # --prompt gives it, double guidance pushes it, captions on the toy set are judged by it
    learns_at_text_lr = False         # its parameters learn at --text_lr, not at --lr
    reads_codes = False               # of the music: a mono model of it does not start a stereo one
    sounds_like_chroma = False       # the evaluation compares the chroma of clips, because it asks for a tune

    def __init__(self, config, dim: int, asset: bytes | None = None):
        """config: a `Config`; dim: the width D; asset: what `make_asset` gave, stored beside the weights."""
        super().__init__()
        self.config = config

    # ----- flags of train.py

    @classmethod
    def is_active(cls, args: argparse.Namespace) -> bool:
        """Whether the flags ask to train on it."""
        return cls.name in args.conditions

    @classmethod
    def fill_flags(cls, args: argparse.Namespace, fill: Callable, start) -> None:
        """Fills in flags left out, by fill(name, value, reason). start: `Config` of --init_from or None."""

    @classmethod
    def check_flags(cls, args: argparse.Namespace) -> None:
        """Errors: ValueError for flags that contradict each other. Called whether it is active or not."""

    @classmethod
    def check_sets(cls, args: argparse.Namespace, train_set, valid_set) -> None:
        """Errors: ValueError where the sets have nothing to learn it from. Called where it is active."""

    # ----- making one

    @classmethod
    def make_asset(cls, args: argparse.Namespace, train_set) -> bytes | None:
        """What it needs beside weights and learns from the data before training, such as a vocabulary."""
        return None

    @classmethod
    def make_config(cls, args, codec, size: dict, asset: bytes | None, stored: dict | None):
        """Its `Config` from the flags. size: {"dim", "num_layers", ..} of the language model; stored: fields
        of the model it starts from."""
        return cls.Config()

    @classmethod
    def notes(cls, args: argparse.Namespace, config, asset: bytes | None, train_set) -> list:
        """Lines to print at the start about its `Config`, and on what it does not read of the data."""
        return []

    @classmethod
    def features(cls, args: argparse.Namespace) -> dict:
        """{name: Feature} of the audio, which the data set computes, or takes from its cache."""
        return {}

    # ----- its value

    def from_example(self, example, codes: Tensor, args, codec, rng: np.random.Generator | None) -> tuple:
        """(value of a data.Example or None, frames (start, stop) that the loss must leave out or None).

        codes [K, T] of the example, on the device. rng: of this sample and step; None outside training, where
        nothing is random and nothing is dropped."""
        raise NotImplementedError

    def from_user(self, given, codec):
        """The value of what a user gave: a string, or in Python also audio [C, N] or a number.

        Errors: ValueError saying what is wrong with it."""
        raise NotImplementedError

    def remarks(self, value) -> list:
        """Lines for whoever gave a value: what of it the model does not follow."""
        return []

    def from_toy(self, clip, text: str, wav: Tensor):
        """What a user would give to get this toy clip (wav [C, N]); None if a clip has no such thing."""
        return None

    def at_window(self, value, start_frame: int):
        """The value for a window of a long piece that begins at a frame of codes."""
        return value

    def use_flags(self, args: argparse.Namespace) -> None:
        """Takes the `generate_flags` given to generate.py. Errors: ValueError."""

    # ----- in the model

    def prepare(self, values: list) -> tuple:
        """B values, None for a null one -> the tensors that `forward` takes, on the host."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """-> (emb [B, L, D], mask [B, L] bool). A null value gives exact zeros, and so does padding."""
        raise NotImplementedError

    def end_update(self, reduce: Callable, keep: bool) -> None:
        """After each update: moves what learns without gradients. reduce(x): sum over ranks, in place.

        keep: False if the update was skipped. All ranks call it."""


def given_audio(given, codec) -> Tensor:
    """Audio [C, N] at the codec's rate of what a user gave: a path, or such audio. Errors: ValueError."""
    if isinstance(given, Tensor):
        return given
    if not Path(given).is_file():
        raise ValueError("no such file")
    try:
        return audio.read_audio(given, sample_rate=codec.sample_rate, channels=codec.channels)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{given}: ")) from None


def zero_padded(emb: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(emb [B, L, D], mask [B, L]) with exact zeros where the mask is False: what `forward` must return."""
    return emb * mask[..., None], mask
