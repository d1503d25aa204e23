"""What the music is conditioned on: text, all conditions together, what training drops, where each enters.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.3 and 2.4. A sample's conditions are a plain dict {name: value},
with None for what it lacks. A condition turns the values of a batch into embeddings of the language model's
width (support/condition.py says what a condition is, support/melody.py and support/style.py are the others),
and a fusing method says how they enter:

    text      "a slow waltz" ─sentencepiece─► ids [B, L] ─encoder as T5's─► [B, L, E] ─projection─► [B, L, D]

    cross     the transformer attends to them                                    (text; on toy: cross+sum)
    prepend   they stand in front of the codes                                   (melody and style)
    sum       their sum over sqrt(L) is added to the input of every step         (several at once: cross+sum)

    [{name: value}] ─drop─► ─prepare (host)─► ids, masks ─forward─► {name: (emb [B, L, D], mask [B, L])}
    ─fuse─► Conditions

The text encoder is small and learns with the model, from random weights; the paper's T5 is pretrained and
frozen, as it is here with published weights (--init_from) or --freeze_text_encoder.

Classifier-free guidance (Ho & Salimans 2022) needs a model that also knows the unconditional distribution. So
in training all conditions of a sample are dropped together with probability `cfg_dropout`, and each alone
with its own. Each sample has a generator of its own, from (seed, step, index of the sample in its epoch): the
same for any number of ranks and micro-batches, and after a restart.

Legend: B batch, K codebooks, T frames, L condition tokens, E width of the text encoder, D width of the
language model.
    python conditioning.py "a slow waltz" [--run runs/NAME]       prints pieces and ids
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Conditions
from support import common
from support.common import random_generator
from support.condition import Condition, zero_padded
from support.flag import Flag
from support.kernels import Linear
from support.melody import Melody
from support.style import Style
from support.vocabulary import (BYTES, EOS, NO_CAPTIONS, PAD, caption_notes, clean_text, fit_sentencepiece,
                                reading_notes, vocabulary_size)

METHODS = ("cross", "prepend", "sum")
METADATA = ("key", "bpm", "genre", "moods", "keywords", "instrument")          # may be merged into the text
CONDITION_DROP_STREAM = 11                    # random numbers of the dropouts; a condition has its own stream


# --------------------------------------------------------------------------------------------------
# text on the host: metadata, word dropout


def full_text(meta: dict) -> str | None:
    """The text of a clip outside training: its description, or all its metadata where it has none."""
    return meta.get("description") or ". ".join(metadata_texts(meta)) or None


def merge_metadata(meta: dict, rng: np.random.Generator, merge_text_p: float = 0.25, drop_desc_p: float = 0.5,
                   keep_other_p: float = 0.5) -> str | None:
    """The text of a clip in training. None if nothing is left.

    With `merge_text_p`, metadata fields (each kept with `keep_other_p`, shuffled) are appended to the
    description, which is then dropped with `drop_desc_p`. Source: the reference's music dataset; its
    `drop_other_p` was really the probability of keeping."""
    description = meta.get("description")
    if rng.random() >= merge_text_p:
        return full_text(meta)
    kept = [text for text in metadata_texts(meta) if rng.random() < keep_other_p]
    rng.shuffle(kept)
    if rng.random() < drop_desc_p:
        description = None
    texts = [(description or "").rstrip("."), ". ".join(kept)]
    return ". ".join(text for text in texts if text) or None


def metadata_texts(meta: dict) -> list:
    """The fields that may be merged into the text, each as "genre: rock"."""
    texts = []
    for name in METADATA:
        value = meta.get(name)
        if value:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            texts.append(f"{name}: {shown}")
    return texts


def drop_words(text: str | None, p: float, rng: np.random.Generator) -> str | None:
    """Drops each word of a text with probability p; None stays None."""
    if not text or p == 0:
        return text
    words = text.split()
    return " ".join(w for w, keep in zip(words, rng.random(len(words)) >= p) if keep)


# --------------------------------------------------------------------------------------------------
# the text encoder, in the shape of T5 (Raffel et al. 2020)


@dataclass
class TextConfig:
    """Shape of the text's conditioner."""
    vocab: int = 0                             # pieces, known once the sentencepiece model is
    dim: int = 128                             # E
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    hidden: int = 512
    buckets: int = 32                          # of relative positions
    max_distance: int = 128
    max_tokens: int = 256                      # longer texts are cut there
    frozen: bool = False                       # the encoder stays as published, or as it began


class RMSNorm(nn.Module):
    """Scale by the root mean square, in float32; no mean is taken away and there is no bias."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


class TextLayer(nn.Module):
    """Pre-norm block: self-attention (without 1/sqrt(d), as T5: the weights' start has it), ReLU
    feed-forward."""

    def __init__(self, c: TextConfig):
        super().__init__()
        inner = c.heads * c.head_dim
        self.heads = c.heads
        self.norm1, self.norm2 = RMSNorm(c.dim), RMSNorm(c.dim)
        self.q, self.k, self.v = (Linear(c.dim, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, c.dim, bias=False)
        self.wi = Linear(c.dim, c.hidden, bias=False)
        self.wo = Linear(c.hidden, c.dim, bias=False)
        nn.init.normal_(self.q.weight, std=(c.dim * c.head_dim) ** -0.5)
        for linear in (self.k, self.v, self.o, self.wi, self.wo):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)    # [B, H, L, E/H]
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return x + self.wo(F.relu(self.wi(self.norm2(x))))                                         # [B, L, E]


class TextEncoder(nn.Module):
    """ids [B,L], mask [B,L] -> [B,L,E]. All layers share relative position buckets; no biases."""

    def __init__(self, c: TextConfig):
        super().__init__()
        assert c.max_distance > c.buckets // 4, f"{c.buckets} buckets of {c.max_distance} positions"
        self.buckets, self.max_distance = c.buckets, c.max_distance
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.relative_bias = nn.Embedding(c.buckets, c.heads)
        nn.init.normal_(self.relative_bias.weight, std=c.dim ** -0.5)
        self.layers = nn.ModuleList(TextLayer(c) for _ in range(c.layers))
        self.final_norm = RMSNorm(c.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bucket = relative_buckets(ids.shape[1], self.buckets, self.max_distance, ids.device)          # [L, L]
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]                                # [1, H, L, L]
        visible = mask | ~mask.any(1, keepdim=True)               # an empty row sees itself: no empty softmax
        bias = bias.float().masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min)
        x = self.embed(ids)                                                                        # [B, L, E]
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


def relative_buckets(L: int, buckets: int, max_distance: int, device) -> Tensor:
    """T5's bucket of each (query, key) [L,L]: half a direction, exact up to a quarter, then logarithmic."""
    positions = torch.arange(L, device=device)
    distance = positions[None] - positions[:, None]                                              # key - query
    half, exact = buckets // 2, buckets // 4
    d = distance.abs()
    log_ratio = torch.log(d.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = exact + (log_ratio * (half - exact)).long()
    return torch.where(d < exact, d, far.clamp(max=half - 1)) + half * (distance > 0)


class Text(Condition):
    """Text to embeddings of the language model's width. A null text and padding give exact zeros."""
    name = "text"
    plural = "captions"
    label = "Prompt (empty: none)"
    widget = "text"
    metavar = "TEXT"
    Config = TextConfig
    rng_stream = 12
    default_method = {"toy": "cross+sum", "audio": "cross"}
    is_text = True
    learns_at_text_lr = True
    flags = (
        Flag("no_text", "without text: alone, an unconditional model", bool, False, before=False),
        Flag("freeze_text_encoder", "leave the text encoder as it is (default: yes for published weights)",
             bool),
        Flag("text_vocab", "most pieces of the vocabulary fitted to the captions, beside the 256 bytes",
             int, 2000, range="million"),
        Flag("word_dropout", "probability that a word of a caption is dropped",
             float, toy=0.0, audio=0.3, range="share", overfit=0.0),
        Flag("merge_text_p", "probability that metadata is merged into the caption",
             float, toy=0.0, audio=0.25, range="share", overfit=0.0),
        Flag("drop_desc_p", "then: probability that the description is dropped", float, 0.5, range="share"),
        Flag("keep_other_p", "then: probability that a metadata field is kept", float, 0.5, range="share"),
    )

    def __init__(self, config: TextConfig, dim: int, asset: bytes):
        """asset: the serialized sentencepiece model."""
        super().__init__(config, dim)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=asset)
        pieces = self.processor.vocab_size()   # T5 has more rows than pieces
        assert config.vocab >= pieces, f"{config.vocab} pieces configured, the model has {pieces}"
        self.encoder = TextEncoder(config).requires_grad_(not config.frozen)
        self.output_proj = Linear(config.dim, dim)

    @classmethod
    def is_active(cls, args) -> bool:
        """Unless --no_text takes it away."""
        return cls.name in args.conditions and not args.no_text

    @classmethod
    def fill_flags(cls, args, fill, start: TextConfig | None) -> None:
        """The encoder of published weights stays frozen."""
        if start is not None:
            fill("freeze_text_encoder", start.frozen, f"as in {args.init_from}")
        fill("freeze_text_encoder", False)

    @classmethod
    def check_sets(cls, args, train_set, valid_set) -> None:
        """One caption at least, also with the vocabulary of other weights. (The toy set has no files.)"""
        if train_set.files and not any(full_text(entry.meta) for entry in train_set.files):
            raise ValueError(NO_CAPTIONS)

    @classmethod
    def make_asset(cls, args, train_set) -> bytes:
        """The vocabulary, fitted to the captions of the training set, metadata merged in both ways."""
        texts = []
        for meta in train_set.metadata():
            texts += [full_text(meta) or "", full_text({**meta, "description": None}) or ""]
        return fit_sentencepiece(texts, args.text_vocab)

    @classmethod
    def make_config(cls, args, codec, size: dict, asset: bytes, stored: dict | None) -> TextConfig:
        """As in the model it starts from (T5 has another shape than ours), else ours."""
        shape = stored or dict(vocab=vocabulary_size(asset))
        return TextConfig(**{**shape, "frozen": args.freeze_text_encoder})

    @classmethod
    def notes(cls, args, config: TextConfig, asset: bytes, train_set) -> list:
        """A vocabulary may come out smaller than asked; captions may hold more than it can say."""
        texts = [full_text(meta) or "" for meta in train_set.metadata()]
        lines = caption_notes(asset, texts, config.max_tokens)
        if config.vocab < args.text_vocab + BYTES:
            lines.append(f"text: {config.vocab} pieces, not {args.text_vocab + BYTES}: the captions hold no "
                         "more")
        return lines

    def from_example(self, example, codes: Tensor, args, codec, rng) -> tuple:
        """The caption; in training with metadata merged in and words dropped."""
        if rng is None:
            return full_text(example.meta), None
        text = merge_metadata(example.meta, rng, args.merge_text_p, args.drop_desc_p, args.keep_other_p)
        return drop_words(text, args.word_dropout, rng), None

    def from_user(self, given, codec) -> str | None:
        """The text itself."""
        return clean_text(given) or None

    def remarks(self, value: str) -> list:
        """What of the text the model does not read."""
        notes = reading_notes(self.processor, value, self.config.max_tokens)
        return [f"text {value[:40]!r}: {note}" for note in notes]

    def from_toy(self, clip, text: str, wav: Tensor) -> str:
        """The caption of the clip."""
        return text

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Texts or None -> (ids [B, L] long, mask [B, L] bool); a null text is one padded token."""
        texts = [clean_text(v) for v in values]
        rows = [self.processor.encode(t)[: self.config.max_tokens - 1] + [EOS] if t else [] for t in texts]
        L = max(1, max(map(len, rows)))
        ids = torch.full((len(rows), L), PAD)
        mask = torch.zeros(len(rows), L, dtype=torch.bool)
        for row, i, m in zip(rows, ids, mask):
            i[:len(row)], m[:len(row)] = torch.tensor(row, dtype=torch.long), True
        return ids, mask

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L], mask [B, L] -> (emb [B, L, D], mask)."""
        with torch.autocast(ids.device.type, enabled=False):      # float32: T5's activations overflow float16
            emb = self.output_proj(self.encoder(ids, mask))                                     # [B, L, D]
        return zero_padded(emb, mask)


# --------------------------------------------------------------------------------------------------
# all conditions together

# Every condition there is; append a new one. Where several are prepended they stand in reverse order
# (flags.fuse_methods): the new one comes first and moves none of the others away from the codes.
CONDITIONS = {c.name: c for c in (Text, Melody, Style)}


class ConditionerConfig:
    """Which conditions a model has, how each enters (`fuse`, in the order of fusing), and the shape of each.

    Files hold it flat, see `to_dict`: {"fuse": {"text": "cross"}, "text_dim": 128, ..}.
    ConditionerConfig(**flat) reads that back."""

    def __init__(self, fuse: dict | None = None, **flat):
        self.fuse = {"text": "cross"} if fuse is None else fuse
        self.shapes = {}
        for name, method in self.fuse.items():
            if name not in CONDITIONS:
                raise ValueError(f"condition {name!r}: choose from {', '.join(CONDITIONS)}")
            if not method or not set(method.split("+")) <= set(METHODS):
                raise ValueError(f"fuse {name}={method}: choose from {', '.join(METHODS)}, or several "
                                 "joined by +")
            Config = CONDITIONS[name].Config
            given = {f.name: flat[f"{name}_{f.name}"] for f in fields(Config) if f"{name}_{f.name}" in flat}
            self.shapes[name] = Config(**given)
        known = {f"{name}_{f.name}" for name, c in CONDITIONS.items() for f in fields(c.Config)}
        if unknown := sorted(flat.keys() - known):
            raise TypeError(f"no condition has {unknown[0]}")

    def __getitem__(self, name: str):
        """The `Config` of a condition."""
        return self.shapes[name]

    def to_dict(self) -> dict:
        """As plain data, for files."""
        flat = {f"{name}_{k}": v for name, shape in self.shapes.items() for k, v in asdict(shape).items()}
        return {"fuse": self.fuse, **flat}


class Conditioner(nn.Module):
    """The conditions of a model by name, and how each enters it."""

    def __init__(self, config: ConditionerConfig, dim: int, assets: dict):
        """dim: the width D; assets: {name: bytes} what a condition needs beside its weights."""
        super().__init__()
        self.config, self.assets = config, assets
        self.parts = nn.ModuleDict({name: CONDITIONS[name](shape, dim, assets.get(name))
                                    for name, shape in config.shapes.items()})

    def example_values(self, examples: list, codes: Tensor, frame_mask: Tensor, args, codec, step):
        """(values [{name: value or None}] of training examples, frames that count in the loss, bool [B, T]).

        codes [B, K, T] of the examples; frame_mask [B, T], True where there is audio. In update `step` the
        values are random (merged metadata, the place of an excerpt) and dropped at random. With None nothing
        is random and nothing dropped."""
        values, loss_mask = [], frame_mask.clone()
        for i, example in enumerate(examples):
            # its value of each condition, and the excerpt that a condition has read
            sample, excerpts = {}, {}
            for name, part in self.parts.items():
                rng = None
                if step is not None:
                    rng = random_generator(args.seed, part.rng_stream, step, example.index)
                sample[name], excerpts[name] = part.from_example(example, codes[i], args, codec, rng)
            # dropped at random, for guidance
            if step is not None:
                rng = random_generator(args.seed, CONDITION_DROP_STREAM, step, example.index)
                alone = {name: getattr(args, f"{name}_dropout") for name in sample}
                sample = drop_conditions(sample, rng, args.cfg_dropout, alone)
            # an excerpt that is an input is no target: the model would learn to copy it
            for name, excerpt in excerpts.items():
                if excerpt is not None and sample[name] is not None:
                    start, stop = excerpt
                    loss_mask[i, start:stop] = False
            values.append(sample)
        return values, loss_mask

    def prepare(self, values: list, device="cpu") -> dict:
        """Host side of a batch: [{name: value or None}] -> {name: tuple of tensors on `device`}.

        Kept apart from `forward`, so that nothing in a training step waits for the host."""
        inputs = {}
        for name, part in self.parts.items():
            tensors = part.prepare([v.get(name) for v in values])
            inputs[name] = tuple(t.to(device, non_blocking=True) for t in tensors)
        return inputs

    def forward(self, inputs: dict) -> Conditions:
        """Prepared inputs -> fused `Conditions`."""
        return fuse({name: part(*inputs[name]) for name, part in self.parts.items()}, self.config.fuse)

    def end_update(self, reduce, keep: bool) -> None:
        """Ends an update for what learns without gradients, see `Condition.end_update`."""
        for part in self.parts.values():
            part.end_update(reduce, keep)


def text_of(values: dict) -> str | None:
    """The text among the conditions of a sample, if there is one."""
    return next((value for name, value in values.items() if CONDITIONS[name].is_text), None)


def drop_conditions(values: dict, rng: np.random.Generator, cfg_dropout: float, alone: dict) -> dict:
    """Nulls all conditions of a sample with `cfg_dropout`, and each one by itself with alone[name].

    There is one draw for each of CONDITIONS, used or not: so another probability, or a new condition at
    the end, leaves the other draws as they are."""
    everything, *each = rng.random(1 + len(CONDITIONS))
    if everything < cfg_dropout:
        return dict.fromkeys(values)
    draws = dict(zip(CONDITIONS, each))
    return {name: None if draws[name] < alone.get(name, 0.0) else value for name, value in values.items()}


def fuse(encoded: dict, methods: dict) -> Conditions:
    """{name: (emb [B, L, D], mask [B, L])} -> Conditions, each by its method, in the order given."""
    def concatenate(method):
        chosen = [encoded[name] for name in encoded if method in methods[name].split("+")]
        if not chosen:
            return None, None
        return torch.cat([emb for emb, _ in chosen], 1), torch.cat([mask for _, mask in chosen], 1)

    cross, cross_mask = concatenate("cross")
    prefix, prefix_mask = concatenate("prepend")
    sums = []
    for name, (emb, mask) in encoded.items():
        if "sum" in methods[name].split("+"):
            tokens = mask.sum(1).clamp_min(1)                                                   # [B]
            total = (emb * mask[..., None]).sum(1, keepdim=True)                                # [B, 1, D]
            sums.append(total / tokens.sqrt()[:, None, None])
    return Conditions(cross, cross_mask, prefix, prefix_mask, sum(sums) if sums else None)


# --------------------------------------------------------------------------------------------------
# the command


def vocabulary_of_run(run: str) -> tuple[bytes, int]:
    """The vocabulary of a run, a serialized sentencepiece model, and how many pieces it reads of a text.

    Errors: ValueError."""
    path = Path(run, "best.pt")
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a run that has finished an epoch")
    data = common.read_torch_dict(path, common.MODEL_FILE)
    assets = data.get("assets") or ()
    if "text" not in assets:
        raise ValueError(f"{run}: a model trained without text has no vocabulary")
    try:
        pieces = common.tensor_to_bytes(assets["text"])
        vocabulary_size(pieces)
        config = data.get("conditioner_config") or {}
        return pieces, int(config.get("text_max_tokens", TextConfig.max_tokens))
    except Exception as error:                                       # a foreign file can fail in any way
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{run}: not {common.MODEL_FILE}, or damaged ({problem})") from None


@common.command("conditioning.py")
def main(argv: list | None = None) -> None:
    """Prints a text's pieces and ids, in the vocabulary of a run or in one fitted to toy captions."""
    parser = argparse.ArgumentParser(description="Shows how a text becomes pieces and ids.")
    parser.add_argument("text")
    parser.add_argument("--run", help="run whose vocabulary to use; without it one is fitted to toy captions")
    args = parser.parse_args(argv)
    if args.run:
        pieces, max_tokens = vocabulary_of_run(args.run)
    else:
        import toy
        pieces = fit_sentencepiece(toy.draw_clip(0, 0, i)[1] for i in range(2000))
        max_tokens = TextConfig.max_tokens
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    print(f"{processor.vocab_size()} pieces in the vocabulary")
    ids = processor.encode(clean_text(args.text))[:max_tokens - 1] + [EOS]
    print(*map(processor.id_to_piece, ids))
    print(*ids)
    for note in reading_notes(processor, args.text, max_tokens):
        print(f"conditioning.py: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
