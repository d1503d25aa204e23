"""What the music is conditioned on: text, melody and style, the dropouts of training, and where each enters.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.3 and 2.4; style: Rouard et al. 2024 (arXiv:2407.12563). A sample's conditions are
a plain dict with None for what it lacks; a conditioner turns the values of a batch into embeddings of the language model's
width, and a fusing method says how they enter it:

    text      "a slow waltz"        sentencepiece ─► encoder in the shape of T5 ─────────────────────────────────► [B,L,D]
    melody    chroma [F,12]         its strongest class ─► projection ───────────────────────────────────────────► [B,F,D]
    style     codes [n,T'] of an    embeddings ─► transformer ─► normalise ─► quantise ─► every n-th ─► projection ► [B,L,D]
              excerpt of the track

    cross     the transformer attends to them                    (text, the default)
    prepend   they stand in front of the codes                   (melody and style)
    sum       their sum over sqrt(L) is added to the input of every step       (several at once: cross+sum)

    attributes [dict] ─drop─► ─prepare (host)─► ids, masks ─forward─► {name: (emb [B,L,D], mask [B,L])} ─fuse─► Conditions

Classifier-free guidance (Ho & Salimans 2022) needs a model that also knows the unconditional distribution: in training all
conditions of a sample are dropped together with probability `cfg_dropout`, and each alone with its own. One draw a sample,
from (seed, step, sample index): the same for any number of ranks and micro-batches, and after a restart.

Legend: B batch, L condition tokens, D width of the language model, E width of an encoder, F chroma frames.
    python conditioning.py "a slow waltz" [--run runs/NAME]       prints pieces and ids
    python conditioning.py --melody in.wav                        draws its chroma
    python conditioning.py --style in.wav --run runs/NAME         what the bottleneck leaves of an excerpt
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

from support import chroma as melodies
from support import audio, common
import tokenizer
from support.kernels import Linear
from model import Conditions, ModelConfig, Transformer, init_transformer, sinusoid

PAD, EOS, UNK = 0, 1, 2                                              # sentencepiece ids, T5's
FUSES = ("cross", "prepend", "sum")
METADATA = ("key", "bpm", "genre", "moods", "keywords", "instrument")  # fields that may be merged into the text
MAX_TEXT = 10_000                                                    # characters of a text that are read
DROP_STREAM, TEXT_STREAM, STYLE_STREAM = 11, 12, 14                  # names of random streams, see `generator`; 13 is train's


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
    text_frozen: bool = False                                        # the encoder is T5's as published, or as it began
    melody_frames: int = 235                                         # chroma frames of a segment (30 s)
    melody_rate: float = 0.15625                                     # chroma frames a code frame (50 Hz)
    melody_argmax: bool = True                                       # the strongest class alone, not all twelve
    melody_null_bin0: bool = False                                   # the public weights' null: class 0 all along, attended to
    melody_stems: bool = False                                       # trained on melodies without drums and bass
    style_codebooks: int = 3                                         # the first of the codec's that are read
    style_card: int = 2048                                           # codes in each of them
    style_dim: int = 512
    style_layers: int = 8
    style_heads: int = 8
    style_levels: int = 3                                            # of the quantiser that is the bottleneck
    style_bins: int = 1024                                           # vectors in each level
    style_every: int = 15                                            # one of so many frames is kept
    style_norm: bool = True                                          # latents are normalised before the bottleneck; audiocraft's are not
    style_frames: int = 150                                          # frames of an excerpt outside training (3 s)

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

    Every condition there could be has its own draw, so that neither a probability nor a condition more changes the others'."""
    everything, *each = rng.random(1 + len(CONDITIONERS))
    draws = dict(zip(CONDITIONERS, each))
    return {name: None if everything < cfg_dropout or draws[name] < attribute_dropout.get(name, 0.0) else value
            for name, value in attributes.items()}


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
        self.q, self.k, self.v = (Linear(c.text_dim, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, c.text_dim, bias=False)
        self.wi = Linear(c.text_dim, c.text_hidden, bias=False)
        self.wo = Linear(c.text_hidden, c.text_dim, bias=False)
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
        assert c.text_vocab >= self.processor.vocab_size(), f"{c.text_vocab} pieces configured, the model has " \
            f"{self.processor.vocab_size()}"                         # T5 has more rows than pieces
        self.encoder = TextEncoder(c)
        self.output_proj = Linear(c.text_dim, dim)

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


# ---------------------------------------------------------------------------------------------------------------------
# melody


class MelodyConditioner(nn.Module):
    """Chroma to embeddings, a frame a token. A null melody gives exact zeros, and so does what lies after its end."""

    def __init__(self, c: ConditionerConfig, dim: int, asset: None = None):
        super().__init__()
        self.config = c
        self.output_proj = Linear(12, dim)
        nn.init.normal_(self.output_proj.weight)                     # a class is a vector, as large as nn.Embedding makes them

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Chroma [F',12] or None each -> (chroma [B,F,12], mask [B,F] bool): cut to a segment's F frames, or padded."""
        c = self.config
        chroma, mask = torch.zeros(len(values), c.melody_frames, 12), torch.zeros(len(values), c.melody_frames, dtype=torch.bool)
        for i, value in enumerate(values):
            if value is not None:
                frames = min(len(value), c.melody_frames)
                chroma[i, :frames], mask[i, :frames] = torch.as_tensor(value[:frames]).float(), True
        if c.melody_argmax:
            chroma = melodies.strongest(chroma)
        if c.melody_null_bin0:                                       # the argmax of nothing is the first
            chroma[..., 0] += chroma.sum(-1) == 0
            mask[:] = True
        return chroma, mask

    def forward(self, chroma: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.output_proj(chroma) * mask[..., None], mask                                         # [B, F, D]


def melody_window(chroma: Tensor, first: int, frames: int) -> Tensor:
    """`frames` of a melody [F',12] from frame `first` on; it begins again after its end: [frames,12]."""
    return chroma[(first + torch.arange(frames)) % len(chroma)]


# ---------------------------------------------------------------------------------------------------------------------
# style


def excerpt(frames: int, low: int, high: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """(start, stop) of an excerpt of a track of so many frames: low..high of them at a random place, or, without a generator,
    the mean of both in the middle. A track that is shorter is taken whole."""
    length = (low + high) // 2 if rng is None else int(rng.integers(low, high + 1))
    spare = max(0, frames - length)
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return start, start + min(length, frames)


class Bottleneck(nn.Module):
    """Normalises latents and rounds them to the sum of one vector of each level: what is left is a style, not a copy.

    Batch normalisation without scale and shift, then residual vector quantisation with averaged codebooks (Rouard et al. 2024
    sec. 3). Both read their statistics as they stood before an update and collect sums meanwhile; `learn` takes the sums of
    all micro-batches and ranks in once a step. So no layout of a batch changes a number, and nothing waits for other ranks in
    the forward pass. Masked frames (null samples, padding) count for nothing."""

    DECAY = 0.99                                                     # of the averages, bias-corrected as train.Ema
    DEAD = 0.02                                                      # a vector with fewer frames an update moves elsewhere

    def __init__(self, dim: int, levels: int, bins: int):
        super().__init__()
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("vectors", torch.randn(levels, bins, dim, generator=fixed, device="cpu"))              # [Q, V, E]
        self.register_buffer("sizes", torch.zeros(levels, bins))     # frames an update that fall to a vector
        self.collected = None                                        # no buffer: DDP and checkpoints leave it alone

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,L,E], mask [B,L] -> quantised [B,L,E]; the gradient passes as if nothing had been rounded."""
        z = self.normalise(x)
        residual, real = z.detach().flatten(0, 1), mask.flatten()[:, None].float()                      # [B*L, E], [B*L, 1]
        counts, sums = [], []
        for vectors in self.vectors:
            index = common.nearest_vectors(residual, vectors)                                         # [B*L]
            if self.training:
                chosen = F.one_hot(index, len(vectors)) * real                                          # [B*L, V]
                counts.append(chosen.sum(0))
                sums.append(chosen.T @ residual)                                                        # [V, E]
            residual = residual - vectors[index]
        if self.training:
            flat = x.detach().flatten(0, 1) * real
            new = torch.cat([real.sum(0), flat.sum(0), flat.square().sum(0), *counts, *(s.flatten() for s in sums)])
            self.collected = new if self.collected is None else self.collected + new
        return z - residual.view_as(z)

    def normalise(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 in each of E, by the statistics so far."""
        return (x - self.mean) * (self.var + 1e-5).rsqrt()

    def codes(self, x: Tensor) -> Tensor:
        """Which vector of each level: x [L,E] -> [Q,L]."""
        residual, found = self.normalise(x), []
        for vectors in self.vectors:
            found.append(common.nearest_vectors(residual, vectors))
            residual = residual - vectors[found[-1]]
        return torch.stack(found)

    @torch.no_grad()
    def learn(self, reduce, keep: bool) -> None:
        """Moves the statistics by what was collected since the last time; all ranks call it. reduce: sum over ranks, in place.
        Without `keep` (an update that was skipped) what was collected is forgotten."""
        collected, self.collected = self.collected, None
        if collected is None or not keep:
            return
        E, V = len(self.mean), self.sizes.numel()
        frames, x, squares, counts, sums = reduce(collected).split([1, E, E, V, V * E])
        some = (frames[0] > 0).float()                               # else all samples were null: nothing moves
        mean = x / frames.clamp_min(1)
        before = self.count.clone()
        self.count.lerp_(self.count * self.DECAY + 1, some)
        weight = some / self.count.clamp_min(1)
        self.mean.lerp_(mean, weight.clamp_min(0.1) * some)          # follows faster: the codebooks lean on it
        self.var.lerp_((squares / frames.clamp_min(1) - mean.square()).clamp_min(0), weight.clamp_min(0.1) * some)
        weight = some * (before > 0) / before.clamp_min(1)           # not at first, before there was a scale
        totals = (self.vectors * self.sizes[..., None]).lerp_(sums.view_as(self.vectors), weight)
        self.sizes.lerp_(counts.view_as(self.sizes), weight)
        alive = self.sizes[..., None] > 1e-4
        self.vectors.copy_(torch.where(alive, totals / self.sizes[..., None].clamp_min(1e-4), self.vectors))
        self.revive(weight > 0)

    def revive(self, ready: Tensor) -> None:
        """The least used vector, if dead, moves beside the most used one and takes half of its frames; so the second, and so on
        (Linde, Buzo & Gray 1980 grow a codebook so). Nothing is random, so nothing depends on ranks or restarts."""
        order = self.sizes.argsort(dim=1, stable=True)                                                    # [Q, V]
        half = order.shape[1] // 2
        for vectors, sizes, row in zip(self.vectors, self.sizes, order):
            dead, used = row[:half], row.flip(0)[:half]
            moves = (sizes[dead] < self.DEAD) & (sizes[used] > 4 * self.DEAD) & ready                   # [V/2]
            beside = vectors[used] + 0.01 * vectors[dead]            # off by a little of where it was
            vectors[dead] = torch.where(moves[:, None], beside, vectors[dead])
            halves = torch.where(moves, sizes[used] / 2, sizes[used])
            sizes[dead] = torch.where(moves, halves, sizes[dead])
            sizes[used] = halves


class StyleConditioner(nn.Module):
    """The codes of an excerpt to a few embeddings, through a bottleneck. A null style gives exact zeros."""

    def __init__(self, c: ConditionerConfig, dim: int, asset: None = None):
        super().__init__()
        self.config, E = c, c.style_dim
        self.emb = nn.ModuleList(nn.Embedding(c.style_card, E) for _ in range(c.style_codebooks))
        self.transformer = Transformer(ModelConfig(dim=E, num_layers=c.style_layers, num_heads=c.style_heads, cross_attention=False))
        init_transformer(self.transformer)
        self.bottleneck = Bottleneck(E, c.style_levels, c.style_bins)
        self.output_proj = Linear(E, dim)

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Codes [K,T'] or None each -> (codes [B,n,L], mask [B,L] bool), where the values lie. A null one is one padded frame."""
        c = self.config
        lengths = [0 if v is None else v.shape[1] for v in values]
        L, device = max(1, *lengths), next((v.device for v in values if v is not None), None)
        nothing = torch.zeros(c.style_codebooks, L, dtype=torch.long, device=device)
        codes = torch.stack([nothing if v is None else F.pad(v[:c.style_codebooks], (0, L - v.shape[1])) for v in values])
        return codes, torch.arange(L) < torch.tensor(lengths)[:, None]

    def encode(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Latents before the bottleneck: codes [B,n,L] -> [B,L,E]. Not causal; padding is hidden."""
        x = sum(table(row) for table, row in zip(self.emb, codes.unbind(1)))                            # [B, L, E]
        x = x + sinusoid(torch.arange(x.shape[1], device=x.device), x.shape[2])
        visible = mask[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)        # [B, 1, L, L]
        x = self.transformer(x, visible, None, None)
        return F.layer_norm(x, x.shape[-1:]) if self.config.style_norm else x            # nothing else would keep it from growing

    def forward(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(codes.device.type, enabled=False):       # float32, as the reference: rounding is a choice
            x = self.bottleneck(self.encode(codes, mask), mask)                                         # [B, L, E]
            every = self.config.style_every
            return self.output_proj(x[:, ::every]) * mask[:, ::every, None], mask[:, ::every]           # [B, L/every, D]


CONDITIONERS = {"text": TextConditioner, "melody": MelodyConditioner, "style": StyleConditioner}


# ---------------------------------------------------------------------------------------------------------------------
# all conditioners together


class Conditioner(nn.Module):
    """The conditioners of a model by name, and how each enters it.

    assets: {name: bytes} what a conditioner needs beside its weights (text: the sentencepiece model)."""

    def __init__(self, config: ConditionerConfig, dim: int, assets: dict):
        super().__init__()
        self.config, self.assets = config, assets
        self.parts = nn.ModuleDict({name: CONDITIONERS[name](config, dim, assets.get(name)) for name in config.fuse})

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

    def learn(self, reduce, keep: bool) -> None:
        """Ends an update for what learns without gradients, see `Bottleneck.learn`."""
        if "style" in self.parts:
            self.parts["style"].bottleneck.learn(reduce, keep)


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
                        attribute_dropout: dict, word_dropout: float, merge: dict, given: dict | None = None) -> dict:
    """The conditions of one training sample after merging, word dropout and condition dropout.

    Depends on (seed, step, index) alone. merge: the three probabilities of `merge_metadata`; given: what is not text."""
    rng = generator(seed, TEXT_STREAM, step, index)
    attributes = {"text": drop_words(merge_metadata(meta, rng, **merge), word_dropout, rng), **(given or {})}
    attributes = {name: attributes.get(name) for name in names}
    return drop_conditions(attributes, generator(seed, DROP_STREAM, step, index), cfg_dropout, attribute_dropout)


def read_run(run: str) -> dict:
    """The content of a run's best.pt. Errors: ValueError says what is missing or wrong."""
    from pathlib import Path
    path = Path(run, "best.pt")
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a run that has finished an epoch")
    return common.read_torch_dict(path, "a model of this project")


def read_pieces(run: str) -> bytes:
    """The vocabulary of a run, a serialised sentencepiece model. Errors: ValueError says what is missing or wrong."""
    stored = read_run(run)
    if "text" not in (stored.get("assets") or ()):
        raise ValueError(f"{run}: a model trained without text has no vocabulary")
    try:
        pieces = unpack(stored["assets"]["text"])
        vocabulary_size(pieces)
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{run}: not a model of this project, or damaged ({' '.join(str(error).split())[:200]})") from None
    return pieces


def show_text(text: str, run: str | None) -> None:
    """Prints a text's pieces and ids, in the vocabulary of a run or in one fitted to toy captions."""
    if run:
        pieces = read_pieces(run)
    else:
        import toy
        pieces = fit_sentencepiece(toy.draw_clip(0, 0, i)[1] for i in range(2000))
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    print(f"{processor.vocab_size()} pieces in the vocabulary")
    print(" ".join(processor.encode(clean_text(text), out_type=str) + ["</s>"]))
    print(*processor.encode(clean_text(text)), EOS)


@torch.no_grad()
def show_style(path: str, run: str) -> None:
    """Prints what a run's bottleneck leaves of the middle of an audio file: a number a level and kept frame."""
    stored = read_run(run)
    try:
        config = ConditionerConfig(**(stored["conditioner_config"] or {"fuse": {}}))
        codec, D, prefix = stored["codec"], stored["model_config"]["dim"], "conditioner.parts.style."
        state = {k.removeprefix(prefix): v for k, v in stored["model"].items() if k.startswith(prefix)}
        part = StyleConditioner(config, D).eval()
        part.load_state_dict(state or part.state_dict())
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{run}: not a model of this project, or damaged ({common.describe_error(error)})") from None
    if "style" not in config.fuse:
        raise ValueError(f"{run}: this model was trained without style")
    codec = tokenizer.load_codec(codec["name"], codec.get("levels", codec["K"]), channels=codec.get("channels", 1))
    codes = codec.encode(audio.read_audio(path, 0.0, None, codec.sample_rate, codec.channels)[None])[0]                 # [K, T']
    start, stop = excerpt(codes.shape[1], config.style_frames, config.style_frames)
    kept = part.bottleneck.codes(part.encode(*part.prepare([codes[:, start:stop]]))[0])[:, ::config.style_every]
    print(f"{stop - start} frames from frame {start} on ({(stop - start) / codec.frame_rate:g} s) -> {kept.shape[1]} tokens of "
          f"{config.style_levels} codes, each one of {config.style_bins}:")
    for level, row in enumerate(kept.tolist(), 1):
        print(f"level {level} |" + "".join(f"{code:>5}" for code in row))


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Shows how a text becomes pieces and ids, and audio a melody or a style.")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--melody", metavar="AUDIO", help="draw its chroma")
    parser.add_argument("--style", metavar="AUDIO", help="what the bottleneck of --run leaves of it")
    parser.add_argument("--run", help="run folder whose vocabulary to use; without it one is fitted to toy captions")
    args = parser.parse_args(argv)
    if args.text is None and not args.melody and not args.style:
        parser.error("give a text, --melody AUDIO or --style AUDIO")
    if args.style and not args.run:
        parser.error("--style shows what a trained model makes of it: give --run")
    try:
        if args.text is not None:
            show_text(args.text, args.run)
        if args.melody:
            melodies.print_chroma(args.melody)
        if args.style:
            show_style(args.style, args.run)
    except ValueError as error:
        print(f"conditioning.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
