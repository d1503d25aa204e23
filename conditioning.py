"""What the music is conditioned on: text through an encoder of our own, the dropouts of training, and where it enters.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.3 and 2.4. A sample's conditions are a plain dict, {"text": "a slow waltz"},
with None for what it lacks; a conditioner turns the values of a batch into embeddings of the language model's width,
and a fusing method says how they enter it:

    cross     the transformer attends to them                    (text, the default)
    prepend   they stand in front of the codes                   (melody and style in the paper)
    sum       their sum over sqrt(L) is added to the input of every step       (several at once: cross+sum)

    attributes [dict] ─drop─► ─prepare (host)─► ids, masks ─forward─► {name: (emb [B,L,D], mask [B,L])} ─fuse─► Conditions

Classifier-free guidance (Ho & Salimans 2022) needs a model that also knows the unconditional distribution: in training all
conditions of a sample are dropped together with probability `cfg_dropout`, and each alone with its own. One draw a sample,
from (seed, step, sample index): the same for any number of ranks and micro-batches, and after a restart.

Legend: B batch, L condition tokens, D width of the language model, E width of the text encoder.
    python conditioning.py "a slow waltz" [--run runs/NAME]       prints pieces and ids
"""

import argparse
import io
import math
import sys
from dataclasses import dataclass, field

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Conditions

PAD, EOS, UNK = 0, 1, 2                                              # sentencepiece ids, T5's
FUSES = ("cross", "prepend", "sum")
METADATA = ("key", "bpm", "genre", "moods", "keywords", "instrument")  # fields that may be merged into the text
MAX_TEXT = 10_000                                                    # characters of a text that are read
DROP_STREAM, TEXT_STREAM = 11, 12                                    # names of random streams, see `generator`


@dataclass
class ConditionerConfig:
    """Shape of the conditioners; plain data, stored in every checkpoint. `fuse` names the active ones and how they enter."""
    fuse: dict = field(default_factory=lambda: {"text": "cross"})
    text_vocab: int = 0                                              # pieces, known once the sentencepiece model is
    text_dim: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_head_dim: int = 32
    text_hidden: int = 512
    text_buckets: int = 32                                           # relative position buckets
    text_max_distance: int = 128
    text_max_tokens: int = 256                                       # longer texts are cut there

    def __post_init__(self):
        for name, method in self.fuse.items():
            if name not in CONDITIONERS:
                raise ValueError(f"condition {name!r}: choose from {', '.join(CONDITIONERS)}")
            if not method or not set(method.split("+")) <= set(FUSES):
                raise ValueError(f"fuse {name}={method}: choose from {', '.join(FUSES)}, or several joined by +")


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a function of its key alone, such as (seed, stream, step, sample index)."""
    return np.random.default_rng(key)


# ---------------------------------------------------------------------------------------------------------------------
# text on the host: metadata, word dropout, sentencepiece


def describe(meta: dict) -> str | None:
    """The text of a clip outside training: its description, or all its metadata where it has none."""
    return meta.get("description") or _join(_metadata(meta)) or None


def merge_metadata(meta: dict, rng: np.random.Generator, merge_text_p: float = 0.25, drop_desc_p: float = 0.5,
                   keep_other_p: float = 0.5) -> str | None:
    """The text of a clip in training: with `merge_text_p`, metadata fields (each kept with `keep_other_p`, shuffled) are
    appended to the description, which is then dropped with `drop_desc_p`. None if nothing is left.

    Source: the reference's music dataset; its `drop_other_p` was really the probability of keeping."""
    description = meta.get("description")
    if rng.random() >= merge_text_p:
        return description if description else describe(meta)
    fields = [f for f in _metadata(meta) if rng.random() < keep_other_p]
    rng.shuffle(fields)
    if rng.random() < drop_desc_p:
        description = None
    return ". ".join(t for t in ((description or "").rstrip("."), _join(fields)) if t) or None


def _metadata(meta: dict) -> list:
    def show(value):
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [f"{name}: {show(meta[name])}" for name in METADATA if meta.get(name)]


def _join(fields: list) -> str:
    return ". ".join(fields)


def drop_words(text: str | None, p: float, rng: np.random.Generator) -> str | None:
    """Drops each word of a text with probability p; None stays None."""
    if not text or p == 0:
        return text
    words = text.split()
    return " ".join(w for w, keep in zip(words, rng.random(len(words)) >= p) if keep)


def drop_conditions(attributes: dict, rng: np.random.Generator, cfg_dropout: float, attribute_dropout: dict) -> dict:
    """Nulls all conditions of a sample with `cfg_dropout`, and each one alone with attribute_dropout[name].

    Always as many draws as there are conditions and one, so that no probability changes what another one draws."""
    everything, *each = rng.random(1 + len(attributes))
    return {name: None if everything < cfg_dropout or u < attribute_dropout.get(name, 0.0) else value
            for u, (name, value) in zip(each, attributes.items())}


def fit_sentencepiece(captions, vocab: int = 2000) -> bytes:
    """Trains a sentencepiece BPE model on captions and returns it serialised (ids: 0 pad, 1 end, 2 unknown).

    The vocabulary may come out smaller than asked where the captions do not hold that many pieces.
    Errors: ValueError if there is no text, or more characters in it than pieces are allowed."""
    texts = [t for t in (clean_text(c) for c in captions) if t]
    if not texts:
        raise ValueError("no captions to fit the text encoder's vocabulary on: add captions (a .txt or .json beside each "
                         "audio file) or train without text (--no_text)")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=vocab, model_type="bpe", hard_vocab_limit=False,
            pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, num_threads=1, minloglevel=2,
            max_sentence_length=4 * MAX_TEXT)                        # bytes; its own 4,192 drop a longer caption unsaid
    except (RuntimeError, ValueError):                               # every character needs a piece of its own
        characters = len(set("".join(texts)))
        raise ValueError(f"text_vocab {vocab}: the captions hold {characters} different characters, give at least "
                         f"{characters + 4} and at most a million") from None
    return out.getvalue()


def pack(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor [n], as files keep them: they hold plain tensors and plain data only."""
    return torch.tensor(list(content), dtype=torch.uint8)


def unpack(tensor: Tensor) -> bytes:
    """What `pack` was given."""
    return bytes(tensor.tolist())


def vocabulary_size(pieces: bytes) -> int:
    """Number of pieces of a serialised sentencepiece model."""
    return sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()


def clean_text(text: str | None) -> str:
    """One line of text without control characters; at most MAX_TEXT characters."""
    if not text:
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:MAX_TEXT]).split())


# ---------------------------------------------------------------------------------------------------------------------
# text encoder, in the shape of T5 (Raffel et al. 2020)


class RMSNorm(nn.Module):
    """Scale by the root mean square, in float32; no mean is taken away and there is no bias."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


class TextLayer(nn.Module):
    """Pre-norm block of self-attention (no 1/sqrt(d), as T5: it is in the initialisation) and a ReLU feed-forward."""

    def __init__(self, c: ConditionerConfig):
        super().__init__()
        inner = c.text_heads * c.text_head_dim
        self.heads = c.text_heads
        self.norm1, self.norm2 = RMSNorm(c.text_dim), RMSNorm(c.text_dim)
        self.q, self.k, self.v = (nn.Linear(c.text_dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.text_dim, bias=False)
        self.wi = nn.Linear(c.text_dim, c.text_hidden, bias=False)
        self.wo = nn.Linear(c.text_hidden, c.text_dim, bias=False)
        nn.init.normal_(self.q.weight, std=(c.text_dim * c.text_head_dim) ** -0.5)
        for linear in (self.k, self.v, self.o, self.wi, self.wo):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)             # [B, H, L, E/H]
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return x + self.wo(F.relu(self.wi(self.norm2(x))))                                              # [B, L, E]


class TextEncoder(nn.Module):
    """ids [B,L], mask [B,L] -> [B,L,E]. Relative position buckets, shared by all layers; no biases anywhere."""

    def __init__(self, c: ConditionerConfig):
        super().__init__()
        self.buckets, self.max_distance = c.text_buckets, c.text_max_distance
        self.embed = nn.Embedding(c.text_vocab, c.text_dim)
        self.relative_bias = nn.Embedding(c.text_buckets, c.text_heads)
        nn.init.normal_(self.relative_bias.weight, std=c.text_dim ** -0.5)
        self.layers = nn.ModuleList(TextLayer(c) for _ in range(c.text_layers))
        self.final_norm = RMSNorm(c.text_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bucket = relative_buckets(ids.shape[1], self.buckets, self.max_distance, ids.device)            # [L, L]
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]                                        # [1, H, L, L]
        visible = mask | ~mask.any(1, keepdim=True)                  # an empty row sees itself: no empty softmax
        bias = bias.float().masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min)
        x = self.embed(ids)                                                                             # [B, L, E]
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


def relative_buckets(L: int, buckets: int, max_distance: int, device) -> Tensor:
    """T5's bucket of each pair (query, key) [L,L]: half for each direction, exact up to a quarter, then logarithmic."""
    positions = torch.arange(L, device=device)
    distance = positions[None] - positions[:, None]                                                     # key - query
    half, exact = buckets // 2, buckets // 4
    d = distance.abs()
    far = exact + (torch.log(d.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return torch.where(d < exact, d, far.clamp(max=half - 1)) + half * (distance > 0)


class TextConditioner(nn.Module):
    """Text to embeddings of the language model's width. A null text gives exact zeros, and so does padding."""

    def __init__(self, c: ConditionerConfig, dim: int, pieces: bytes):
        super().__init__()
        self.pieces = pieces                                         # the serialised sentencepiece model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
        self.max_tokens = c.text_max_tokens
        assert c.text_vocab == self.processor.vocab_size(), f"{c.text_vocab} pieces configured, the model has " \
            f"{self.processor.vocab_size()}"
        self.encoder = TextEncoder(c)
        self.output_proj = nn.Linear(c.text_dim, dim)

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Texts or None -> (ids [B,L] long, mask [B,L] bool) on the host; a null text is one padded token."""
        texts = [clean_text(v) for v in values]
        rows = [self.processor.encode(t)[: self.max_tokens - 1] + [EOS] if t else [] for t in texts]
        L = max(1, max(map(len, rows)))
        ids = torch.full((len(rows), L), PAD)
        mask = torch.zeros(len(rows), L, dtype=torch.bool)
        for row, i, m in zip(rows, ids, mask):
            i[:len(row)], m[:len(row)] = torch.tensor(row, dtype=torch.long), True
        return ids, mask

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(ids.device.type, enabled=False):         # float32: T5's activations overflow float16
            emb = self.output_proj(self.encoder(ids, mask))                                             # [B, L, D]
        return emb * mask[..., None], mask


CONDITIONERS = {"text": TextConditioner}                             # melody and style will stand beside it


# ---------------------------------------------------------------------------------------------------------------------
# all conditioners together


class Conditioner(nn.Module):
    """The conditioners of a model by name, and how each enters it.

    assets: {name: bytes} what a conditioner needs beside its weights (text: the sentencepiece model)."""

    def __init__(self, config: ConditionerConfig, dim: int, assets: dict):
        super().__init__()
        self.config, self.assets = config, assets
        self.parts = nn.ModuleDict({name: CONDITIONERS[name](config, dim, assets[name]) for name in config.fuse})

    @property
    def names(self) -> list:
        """Names of the active conditions, in the order of fusing."""
        return list(self.parts)

    def prepare(self, attributes: list, device="cpu") -> dict:
        """Host side of a batch: list of {name: value or None} -> {name: tuple of tensors on `device`}.

        Kept apart from `forward`, so that nothing in a training step waits for the host."""
        return {name: tuple(t.to(device, non_blocking=True) for t in part.prepare([a.get(name) for a in attributes]))
                for name, part in self.parts.items()}

    def forward(self, inputs: dict) -> Conditions:
        """Prepared inputs -> fused `Conditions`."""
        return fuse({name: part(*inputs[name]) for name, part in self.parts.items()}, self.config.fuse)


def fuse(encoded: dict, methods: dict) -> Conditions:
    """{name: (emb [B,L,D], mask [B,L])} -> Conditions, each by its method; several of one kind stand in their order."""
    def together(method):
        chosen = [encoded[name] for name in encoded if method in methods[name].split("+")]
        return (torch.cat([e for e, _ in chosen], 1), torch.cat([m for _, m in chosen], 1)) if chosen else (None, None)

    cross, cross_mask = together("cross")
    prefix, prefix_mask = together("prepend")
    sums = [(emb * mask[..., None]).sum(1, keepdim=True) / mask.sum(1).clamp_min(1).sqrt()[:, None, None]
            for name, (emb, mask) in encoded.items() if "sum" in methods[name].split("+")]                      # [B, 1, D]
    return Conditions(cross, cross_mask, prefix, prefix_mask, sum(sums) if sums else None)


def training_attributes(meta: dict, names: list, seed: int, step: int, index: int, cfg_dropout: float,
                        attribute_dropout: dict, word_dropout: float, merge: dict) -> dict:
    """The conditions of one training sample after merging, word dropout and condition dropout.

    Depends on (seed, step, index) alone. merge: the three probabilities of `merge_metadata`."""
    rng = generator(seed, TEXT_STREAM, step, index)
    attributes = {"text": drop_words(merge_metadata(meta, rng, **merge), word_dropout, rng)}
    attributes = {name: attributes.get(name) for name in names}
    return drop_conditions(attributes, generator(seed, DROP_STREAM, step, index), cfg_dropout, attribute_dropout)


def read_pieces(run: str) -> bytes:
    """The vocabulary of a run, a serialised sentencepiece model. Errors: ValueError says what is missing or wrong."""
    from pathlib import Path

    import tokenizer
    path = Path(run, "best.pt")
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a run that has finished an epoch")
    stored = tokenizer.load_file(path, "a model of this project")
    if not stored.get("assets"):
        raise ValueError(f"{path}: a model trained without text has no vocabulary")
    try:
        pieces = unpack(stored["assets"]["text"])
        vocabulary_size(pieces)
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{path}: not a model of this project, or damaged ({tokenizer.reason(error)})") from None
    return pieces


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Shows how a text becomes pieces and ids.")
    parser.add_argument("text")
    parser.add_argument("--run", help="run folder whose vocabulary to use; without it one is fitted to toy captions")
    args = parser.parse_args(argv)
    if args.run:
        try:
            pieces = read_pieces(args.run)
        except ValueError as error:
            print(f"conditioning.py: {error}", file=sys.stderr)
            return 2
    else:
        import toy
        pieces = fit_sentencepiece(toy.draw(0, 0, i)[1] for i in range(2000))
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    print(f"{processor.vocab_size()} pieces in the vocabulary")
    print(" ".join(processor.encode(clean_text(args.text), out_type=str) + ["</s>"]))
    print(*processor.encode(clean_text(args.text)), EOS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
