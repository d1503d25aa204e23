"""The language model of MusicGen: a decoder-only transformer over the K parallel code streams of a neural codec.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.1 to 2.3. K embedding tables are summed into one vector a step, a pre-norm
transformer with causal self-attention (and cross-attention to the text) reads them, K linear heads predict the next codes.
Parameter names are those of the public checkpoints (emb, transformer.layers, out_norm, linears).

    codes [B,K,T] ─pattern─► seq [B,K,S] ─sum of K embeddings─► x [B,S,D] ─► transformer ─► K heads ─► logits [B,K,S,card]
                                             + prefix [B,P,D] in front, + cross [B,L,D] to attend to, + summed [B,1,D]

The conditions come in from outside: this file knows what a `Conditions` is, not where it comes from; a conditioner (see
conditioning.py) is handed to the constructor so that one forward computes the loss, which is what DDP and FSDP wrap.

Legend: B batch, K codebooks, T frames, S sequence steps, L condition tokens, P prefix tokens, D width, H heads.
    python model.py          prints parameters and FLOPs of every size
"""

import argparse
import math
import os
import shutil
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import patterns
from support.kernels import UNPACKED, Linear, Packs, gradient, linear

IGNORE = -100                                                        # a target that is no target (F.cross_entropy's default)
LOGITS = 1 << 21                                                     # that the loss has at a time: 8 MiB
SIZES = {                                                            # Copet et al. 2023 sec. 3.1: small 300M, medium 1.5B, large 3.3B
    "debug": dict(dim=64, num_layers=2, num_heads=2),
    "tiny": dict(dim=192, num_layers=4, num_heads=3),
    "base": dict(dim=512, num_layers=8, num_heads=8),
    "small": dict(dim=1024, num_layers=24, num_heads=16),
    "medium": dict(dim=1536, num_layers=48, num_heads=24),
    "large": dict(dim=2048, num_layers=48, num_heads=32),
}


@dataclass
class ModelConfig:
    """Everything that gives the language model its shape; plain data, stored in every checkpoint."""
    K: int = 4                                                       # codebooks
    card: int = 2048                                                 # codes in a codebook; `card` itself is the special token
    dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    hidden_scale: int = 4                                            # feed-forward width over D
    dropout: float = 0.0
    cross_attention: bool = True
    emb_std: float | None = None                                     # of the code embeddings at the start; None: 1/sqrt(D)
    mask_padding: bool = True                                        # False: attend to padded text, as the public weights do
    pattern: str = "delay"                                           # delay | parallel | unrolled
    delays: list | None = None                                       # frames each codebook lags; None: 0, 1, .. K-1
    flattening: list | None = None                                   # unrolled: inner step of each codebook

    def layout(self, T: int) -> patterns.Pattern:
        """The codebook pattern over T frames."""
        delays = None if self.delays is None else tuple(self.delays)
        flattening = None if self.flattening is None else tuple(self.flattening)
        return patterns.make_pattern(self.pattern, T, self.K, delays, flattening)


@dataclass
class Conditions:
    """What the transformer is conditioned on, already in its width D. Absent ones are None.

    A mask is True at real positions; an absent mask means that all are. Rows of `cross` that are null are exact zeros:
    with bias-free projections their keys and values are zero, and so is what cross-attention adds.
    """
    cross: Tensor | None = None                                      # [B, L, D]
    cross_mask: Tensor | None = None                                 # [B, L] bool
    prefix: Tensor | None = None                                     # [B, P, D]
    prefix_mask: Tensor | None = None                                # [B, P] bool
    summed: Tensor | None = None                                     # [B, 1, D]


class Cache:
    """Keys and values of what was already read, filled from the left, one per sequence batch: `MusicGen.hidden` begins it, `next` goes on.

    There is room for S_max steps, of which attention reads those that are filled. How many those are is the size of `filled`: what is
    compiled for tensors of a changing size stays compiled. Cross-attention keys and values are computed once, with the first steps.

    A CUDA graph knows no changing size: with `fixed`, attention reads all the room behind a mask, and room that is full is doubled,
    at the price of another graph."""
    GRAPHED = ("cuda",)                                              # devices on which a compiled step is such a graph
    LEAST = 256                                                      # steps that a fixed one has room for at first

    def __init__(self, config: ModelConfig, B: int, S_max: int, device, dtype=torch.float32, compiled: bool = False):
        self.compiled, self.fixed = compiled, compiled and torch.device(device).type in self.GRAPHED
        room = self.LEAST if self.fixed else S_max + compiled        # never quite full: what is contiguous would be compiled once more
        shape = (2, B, config.num_heads, room, config.dim // config.num_heads)
        new = torch.zeros if self.fixed else torch.empty             # what is masked must be finite
        self.kv = [new(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.cross = [None] * config.num_layers                      # keys and values [2, B, H, L, D/H] each
        self.packs = Packs() if B > UNPACKED and not compiled else None                  # weights as a CPU reads them fastest
        self.length = 0                                              # steps read, the prefix counted in
        self.position = torch.zeros(1, dtype=torch.long, device=device)                  # the same, where a compiled step sees it
        self.filled = None                                           # [length + S] while S steps are being read
        self.begun = self.marked = False
        self.origin, self.prefix_mask = 0, None                      # what position 0 is the place of, mask [B, P]
        self.source_mask = self.summed = None                        # [B, 1, 1, L], [B, 1, D]

    def make_room(self, S: int) -> None:
        """Sees to it that S more steps fit."""
        room, needed = self.kv[0].shape[3], self.length + S
        while self.fixed and room < needed:
            room *= 2
        assert needed <= room, f"step {needed} of a cache of {room}"
        if room > self.kv[0].shape[3]:
            self.kv, self.marked = [F.pad(kv, (0, 0, 0, room - kv.shape[3])) for kv in self.kv], False
        self.filled = torch.empty(needed, dtype=torch.bool)          # of which nobody reads more than the size
        if self.compiled and self.begun:
            self.mark()

    def mark(self) -> None:
        """Tells the compiler what a step's tensors are: of changing size, or in a place that stays, for a CUDA graph to read them there."""
        if not self.fixed:
            for x, size in ((self.filled, 0), *((kv, 3) for kv in self.kv)):
                torch._dynamo.mark_dynamic(x, size)
        elif not self.marked:
            self.marked = True
            for x in (*self.kv, *(x for x in self.cross if x is not None)):
                torch._dynamo.mark_static_address(x, guard=False)

    def advance(self, S: int) -> None:
        """S steps were read."""
        self.length, self.begun = self.length + S, True
        self.position += S

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Stores keys and values of new steps [2,B,H,S,D/H] and returns those of all [2,B,H,length+S,D/H], or of all the room."""
        if self.fixed and self.begun:
            return self.kv[layer].index_copy_(3, self.position, kv.to(self.kv[layer].dtype))
        end = self.filled.shape[0]
        self.kv[layer][:, :, :, end - kv.shape[3]:end] = kv
        return self.kv[layer][:, :, :, :end]

    def mask(self) -> Tensor | None:
        """What the next step sees, [B or 1,1,1,length+1] or [..,room] bool; None if that is all."""
        if not self.fixed and self.prefix_mask is None:
            return None
        columns = self.kv[0].shape[3] if self.fixed else self.filled.shape[0]
        seen = (torch.arange(columns, device=self.position.device) <= self.position)[None, None, None]
        if self.prefix_mask is None:
            return seen
        return seen & F.pad(self.prefix_mask, (0, columns - self.prefix_mask.shape[1]), value=True)[:, None, None]


def sinusoid(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Position vectors [..., dim] of positions [...]: cosines first, exponent i/(half-1); always float32."""
    half = dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    phase = positions[..., None].float() / max_period ** exponent
    return torch.cat([phase.cos(), phase.sin()], -1)


def mix(x: Tensor) -> Tensor:
    """Scrambles int32 numbers: xor-shift and multiply, twice (the constants are Wellons' "lowbias32")."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


def dropout(x: Tensor, p: float, keys: Tensor | None, site: int) -> Tensor:
    """Zeroes elements of x [B,S,D] with probability p and scales the others by 1/(1-p); keys [B] or [B,S] int32, one a sample or step.

    What is dropped is a hash of (key, site, place): no generator's state, so it does not depend on the ranks and
    micro-batches a batch was split into, nor on a restart, and recomputing a layer drops the same. No keys, no dropout."""
    if keys is None or p == 0:
        return x
    inside = x.shape[keys.dim():]                                                                        # [S, D] or [D]
    place = torch.arange(inside.numel(), device=x.device, dtype=torch.int32).view(inside)
    start = mix(keys + (site * 0x9E3779B1 & 0x7FFFFFFF)).view(*keys.shape, *[1] * len(inside))
    kept = (mix(place + start) & 0xFFFFFF) >= int(p * (1 << 24))                                         # [B, S, D]
    return x * kept / (1 - p)


class LowRank(nn.Module):
    """What fine-tuning adds to a matrix W [out, in] that stays as it is: SCALE * B A, of rank R (Hu et al. 2021, arXiv:2106.09685).

    B begins at zero, and the model as it was."""
    SCALE = 2.0                                                      # alpha over the rank, as is usual

    def __init__(self, fan_in: int, fan_out: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, fan_in)), nn.Parameter(torch.zeros(fan_out, rank))
        trunc_normal(self.A, fan_in ** -0.5)

    def forward(self, x: Tensor, rows: slice | None) -> Tensor:
        return self.SCALE * linear(linear(x, self.A), self.B if rows is None else self.B[rows])


def project(x: Tensor, weight: Tensor, lora: LowRank | None, rows: slice | None = None, packs: Packs | None = None) -> Tensor:
    """x [..,in] times those rows of a matrix [out,in], and what fine-tuning adds to them, if anything."""
    y = linear(x, weight if rows is None else weight[rows], packs)
    return y if lora is None else y + lora(x, rows)


def again(function, *inputs):
    """function(*inputs), of which training keeps the inputs alone and computes the rest again in the backward pass, up to the last
    that this needs: for a product of something cheap, the cheap part. No generator's state is kept: what is dropped is a hash."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a single step, q [B,H,1,D/H] to k, v [B,H,S,D/H], as sums, of which the compiler makes loops of its own on a CPU: for
    so little work PyTorch's operator takes longer to call than to run."""
    scores = (q * k).sum(-1) * q.shape[-1] ** -0.5                                                      # [B, H, S]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
    return (scores.softmax(-1)[..., None] * v).sum(2, keepdim=True)                                     # [B, H, 1, D/H]


class Attention(nn.Module):
    """Multi-head attention with one packed projection: rows q | k | v of in_proj_weight [3D, D], no biases."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        assert dim % num_heads == 0, f"width {dim} does not divide into {num_heads} heads"
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = Linear(dim, dim, bias=False)
        self.in_proj_lora = self.out_proj_lora = None                # see `add_lora`

    def split(self, x: Tensor, parts: int) -> Tensor:
        """[B,S,parts*D] -> [parts,B,H,S,D/H]."""
        B, S, _ = x.shape
        return x.view(B, S, parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, packs: Packs | None) -> Tensor:
        if torch.compiler.is_compiling() and q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[2] == 1:
            x = attend_one(q, k, v, mask)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return project(x.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj_lora, packs=packs)     # [B, S, D]

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Causal self-attention over x [B,S,D]; mask [B,1,S,S'] bool or None for plain causal."""
        packs = None if cache is None else cache.packs
        qkv = self.split(project(x, self.in_proj_weight, self.in_proj_lora, packs=packs), 3)            # [3, B, H, S, D/H]
        q, k, v = qkv if cache is None else (qkv[0], *cache.append(layer, qkv[1:]))
        return self.attend(q, k, v, mask, mask is None and (cache is None or not cache.begun), packs)

    def keys_values(self, source: Tensor) -> Tensor:
        """Keys and values of a condition [B,L,D], for `cross`."""
        D = source.shape[-1]
        return self.split(project(source, self.in_proj_weight, self.in_proj_lora, slice(D, None)), 2)   # [2, B, H, L, D/H]

    def cross(self, x: Tensor, keys_values: Tensor, mask: Tensor | None, packs: Packs | None = None) -> Tensor:
        """Attention of x [B,S,D] to a condition; mask [B,1,1,L] bool or None."""
        q, = self.split(project(x, self.in_proj_weight, self.in_proj_lora, slice(x.shape[-1]), packs), 1)
        return self.attend(q, *keys_values, mask, False, packs)


class LayerNorm(nn.LayerNorm):
    """In the type of the activations, whatever that of the weights: sharded layers are gathered in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Layer(nn.Module):
    """Pre-norm block: self-attention, cross-attention, feed-forward with exact GELU; linears without biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.dim, config.dim * config.hidden_scale
        self.p = config.dropout
        self.self_attn = Attention(D, config.num_heads)
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.linear1, self.linear2 = Linear(D, hidden, bias=False), Linear(hidden, D, bias=False)
        self.linear1_lora = self.linear2_lora = None                 # see `add_lora`
        if config.cross_attention:
            self.cross_attention = Attention(D, config.num_heads)
            self.norm_cross = LayerNorm(D)

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None, source_mask: Tensor | None,
                cache: Cache | None = None, index: int = 0, keys: Tensor | None = None) -> Tensor:
        packs = None if cache is None else cache.packs
        x = x + dropout(self.self_attn(self.norm1(x), mask, cache, index), self.p, keys, 4 * index)     # [B, S, D]
        if source is not None or (cache is not None and cache.cross[index] is not None):
            keys_values = cache.cross[index] if cache is not None else None
            if keys_values is None:
                keys_values = self.cross_attention.keys_values(source)
                if cache is not None:
                    cache.cross[index] = keys_values
            attended = self.cross_attention.cross(self.norm_cross(x), keys_values, source_mask, packs)
            x = x + dropout(attended, self.p, keys, 4 * index + 1)
        hidden = project(self.norm2(x), self.linear1.weight, self.linear1_lora, packs=packs)            # [B, S, 4D]
        return x + dropout(again(self.contract, hidden, keys, index, packs), self.p, keys, 4 * index + 3)

    def contract(self, hidden: Tensor, keys: Tensor | None, index: int, packs: Packs | None) -> Tensor:
        """The second half of the feed-forward: [B,S,4D] -> [B,S,D]."""
        active = dropout(F.gelu(hidden), self.p, keys, 4 * index + 2)
        return project(active, self.linear2.weight, self.linear2_lora, packs=packs)


class Transformer(nn.Module):
    """The stack of layers. `checkpointing` recomputes each layer in the backward pass instead of keeping its activations."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.checkpointing = False

    def forward(self, x, mask, source, source_mask, cache=None, keys=None):
        for i, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = again(layer, x, mask, source, source_mask, None, i, keys)
            else:
                x = layer(x, mask, source, source_mask, cache, i, keys)
        return x


@torch.no_grad()
def trunc_normal(weight: Tensor, std: float) -> None:
    """Fills a tensor from a normal distribution cut at three standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def init_transformer(transformer: Transformer) -> None:
    """std = 1/sqrt(fan_in) over sqrt(2(l+1)) for the matrices of layer l (from 0)."""
    for l, layer in enumerate(transformer.layers):
        for weight in layer.parameters():
            if weight.dim() == 2:
                trunc_normal(weight, weight.shape[1] ** -0.5 / math.sqrt(2 * (l + 1)))


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a codebook, float32 []: x [N,D], weight [card,D], target [N] with IGNORE where none is.

    The gradients are computed in the forward pass, a few rows at a time, while the logits of those rows are at hand: all logits never
    exist at once, nor are any computed twice. With p the softmax of the logits z,

        dloss/dz = p - [is the target]        dx = dloss/dz W        dW = (dloss/dz)^T x

    learning: whether gradients will be asked for. They are kept in float32 and scaled in the backward pass, as loss scaling needs."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, learning: bool) -> Tensor:
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if learning and ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if learning and ctx.needs_input_grad[1] else None
        rows = max(1, LOGITS // len(weight))
        for start in range(0, len(x), rows):
            part, goal = x[start:start + rows], target[start:start + rows, None]
            logits = linear(part, weight)                                                               # [rows, card]
            log_p = logits.float().log_softmax(-1)
            loss += F.nll_loss(log_p, goal[:, 0], ignore_index=IGNORE, reduction="sum")
            if learning:
                slope = log_p.exp_().scatter_add_(1, goal.clamp_min(0), log_p.new_full(goal.shape, -1.0))
                slope = slope.mul_(goal != IGNORE).to(logits.dtype)
                if dx is not None:
                    dx[start:start + rows] = linear(slope, weight.T)
                if dW is not None:
                    dW += gradient(slope, part)
        ctx.save_for_backward(dx, dW)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        dx, dW = ctx.saved_tensors
        return None if dx is None else scale.to(dx.dtype) * dx, None if dW is None else (scale * dW).to(ctx.dtype), None, None


class MusicGen(nn.Module):
    """The language model with its conditioner. `forward` is the loss; `logits` and `hidden` serve generation and tests.

    conditioner: a module whose call turns prepared inputs into `Conditions`, or None for an unconditional model."""
    compiled = False                                                 # whether `step` is: see `compile_step`

    def __init__(self, config: ModelConfig, conditioner: nn.Module | None = None):
        super().__init__()
        self.config = config
        K, D, card = config.K, config.dim, config.card
        self.special = card                                          # can be read, never predicted
        self.emb = nn.ModuleList(nn.Embedding(card + 1, D) for _ in range(K))
        self.transformer = Transformer(config)
        self.out_norm = LayerNorm(D)
        self.linears = nn.ModuleList(Linear(D, card, bias=False) for _ in range(K))
        self.conditioner = conditioner
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal; std = 1/sqrt(fan_in), see `init_transformer`.

        Source: SPEC L5 of the reference; its packed q/k/v escape the scheme there and follow it here. Its embeddings, at
        1/sqrt(D), are ten times smaller than the position vectors they are added to; `emb_std` can make them as large,
        which a short run gains much from."""
        for table in self.emb:
            trunc_normal(table.weight, self.config.emb_std or self.config.dim ** -0.5)
        for head in self.linears:
            trunc_normal(head.weight, self.config.dim ** -0.5)
        init_transformer(self.transformer)

    def embed(self, seq: Tensor) -> Tensor:
        """seq [B,K,S] -> [B,S,D]."""
        return sum(table(codes) for table, codes in zip(self.emb, seq.unbind(1)))

    def hidden(self, seq: Tensor, conditions: Conditions | None = None, cache: Cache | None = None,
               keys: Tensor | None = None) -> Tensor:
        """Codes in the pattern, seq [B,K,S] -> [B,S,D], normalised, ready for the heads.

        An empty cache then holds what `next` goes on from. keys [B] int32: see `dropout`; without them nothing is dropped."""
        B, K, S = seq.shape
        assert K == self.config.K, f"{K} codebooks, the model has {self.config.K}"
        assert cache is None or not cache.begun, "a cache that holds steps: `next` goes on with it"
        c = conditions or Conditions()
        x, source_mask = self.embed(seq), self._cross_mask(c.cross_mask)                                # [B, S, D]
        if c.summed is not None:
            x = x + c.summed
        P, prefix_mask = 0, None
        if c.prefix is not None:
            x = torch.cat([c.prefix.to(x.dtype), x], 1)                                                 # [B, P+S, D]
            P, prefix_mask = c.prefix.shape[1], c.prefix_mask if self.config.mask_padding else None
        if cache is not None:
            if source_mask is not None and source_mask.all():
                source_mask = None                                   # found out once, spared at every step
            cache.source_mask, cache.summed = source_mask, c.summed
            cache.origin, cache.prefix_mask = (P, prefix_mask) if prefix_mask is not None else (0, None)
            cache.make_room(P + S)
        positions = self._positions(P, S, prefix_mask, x.device)
        x = x + sinusoid(positions, self.config.dim)
        if keys is not None and prefix_mask is not None:             # how a batch pads its prefixes must not count
            keys = mix(keys[:, None] + positions.int())                                                 # [B, S]
        x = self.transformer(x, self._self_mask(P + S, prefix_mask), c.cross, source_mask, cache, keys)
        if cache is not None:
            cache.advance(P + S)
        return self.out_norm(x[:, P:])                                                                  # [B, S, D]

    def heads(self, x: Tensor, which: list | None = None, packs: Packs | None = None) -> Tensor:
        """x [..,D] of `hidden` -> logits [B,k,..,card] of the k codebooks asked for (None: of all)."""
        asked = self.linears if which is None else [self.linears[k] for k in which]
        return torch.stack([linear(x, head.weight, packs) for head in asked], 1)

    def next(self, codes: Tensor, cache: Cache, which: list | None = None) -> Tensor:
        """One more step on what a cache holds, with the conditions of its beginning: codes [B,K,1] -> logits [B,k,1,card], see `heads`."""
        cache.make_room(1)
        if self.compiled:                                            # for all codebooks, whichever are asked for: one thing to compile
            logits = self.step(codes, cache)
            logits = logits if which is None else logits[:, which]
        else:
            logits = self.step(codes, cache, which)
        cache.advance(1)
        return logits

    def step(self, codes: Tensor, cache: Cache, which: list | None = None) -> Tensor:
        """The part of `next` that can be compiled: the cache's own numbers stay as they are."""
        x = self.embed(codes)                                                                           # [B, 1, D]
        if cache.summed is not None:
            x = x + cache.summed
        x = x + sinusoid(cache.position[None] - cache.origin, self.config.dim)
        return self.heads(self.out_norm(self.transformer(x, cache.mask(), None, cache.source_mask, cache)), which, cache.packs)

    def compile_step(self) -> None:
        """Compiles `step`, again for another number of rows. On a CPU weights become constants, stored once more in the order in which
        products read them, so they must stay as they are. On a GPU it is a CUDA graph, another when the room of its cache is doubled.

        Errors: see `require_compiler`."""
        require_compiler()
        if self.emb[0].weight.is_cuda:
            self.step, self.compiled = torch.compile(self.step, mode="reduce-overhead", fullgraph=True), True
            return
        import torch._inductor.config                                # a second or two, for nobody else
        constant = torch._inductor.config.patch(freezing=True, max_autotune_gemm=True, max_autotune_gemm_backends="CPP")
        self.step, self.compiled = constant(torch.compile(self.step, fullgraph=True)), True

    @staticmethod
    def _positions(P: int, S: int, prefix_mask: Tensor | None, device) -> Tensor:
        """Positions [1,P+S] or [B,P+S]. With a mask the codes begin at 0, whatever stands before them, at -1, -2, ..: neither a
        batch's padding nor a condition more or less moves them. Without, the prefix begins at 0, as in the public weights."""
        if prefix_mask is None:
            return torch.arange(P + S, device=device)[None]
        real = F.pad(prefix_mask, (0, S), value=True)                                                   # [B, P+S]
        return real.cumsum(1) - 1 - prefix_mask.sum(1, keepdim=True)

    @staticmethod
    def _self_mask(S: int, prefix_mask: Tensor | None) -> Tensor | None:
        """Causal mask [B,1,S,S] over prefix and codes that hides masked prefix tokens; None where plain causal attention will do."""
        if prefix_mask is None:
            return None
        rows = torch.arange(S, device=prefix_mask.device)[:, None]
        columns = rows.T
        visible = F.pad(prefix_mask, (0, S - prefix_mask.shape[1]), value=True)[:, None, None]          # [B, 1, 1, S]
        return ((columns <= rows) & visible) | (columns == rows)     # a token always sees itself: no empty softmax

    def _cross_mask(self, mask: Tensor | None) -> Tensor | None:
        """[B,L] -> [B,1,1,L]; a row without any token attends to its zeros, which gives exactly zero."""
        if mask is None or not self.config.mask_padding:
            return None
        return (mask | ~mask.any(1, keepdim=True))[:, None, None]

    def logits(self, seq: Tensor, conditions: Conditions | None = None) -> Tensor:
        """seq [B,K,S] -> logits [B,K,S,card]: at step s of codebook k for what stands at step s+1."""
        return self.heads(self.hidden(seq, conditions))                                                 # [B, K, S, card]

    def predict(self, codes: Tensor, conditions: Conditions | None = None) -> tuple[Tensor, Tensor]:
        """The paper's view: codes [B,K,T] -> logits [B,K,T,card] (NaN where nothing predicts them) and mask [K,T]."""
        pattern = self.config.layout(codes.shape[2])
        return pattern.revert_logits(self.logits(pattern.build(codes, self.special), conditions))

    def forward(self, codes: Tensor, frame_mask: Tensor | None = None, inputs=None, keys: Tensor | None = None,
                loss_mask: Tensor | None = None) -> Tensor:
        """Cross-entropy summed over the valid targets of each codebook: [K] float32, to be divided by `count_targets`.

        codes [B,K,T]; frame_mask [B,T] False where a clip is padding (read as the special token, masked from the loss);
        inputs: what the conditioner's `prepare` gave; keys [B] int32: dropout's, one a sample; loss_mask [B,T] False where frames
        are read but not learnt, within frame_mask. The targets are shifted to the sequence: no logits are gathered."""
        conditions = self.conditioner(inputs) if self.conditioner is not None else None
        pattern = self.config.layout(codes.shape[2])
        targets = pattern.targets(codes, frame_mask if loss_mask is None else loss_mask, IGNORE)        # [B, K, S-1]
        if frame_mask is not None:
            codes = codes.masked_fill(~frame_mask[:, None], self.special)
        x = self.hidden(pattern.build(codes, self.special)[..., :-1], conditions, keys=keys)            # [B, S-1, D]
        x, learning = x.flatten(0, 1), torch.is_grad_enabled()
        return torch.stack([HeadLoss.apply(x, head.weight, target.flatten(), learning)
                            for head, target in zip(self.linears, targets.unbind(1))])                  # [K]

    def count_targets(self, frame_mask: Tensor) -> Tensor:
        """Number of supervised codes of each codebook [K] for frames [B,T]."""
        supervised = self.config.layout(frame_mask.shape[1]).supervised.to(frame_mask.device)           # [K, T]
        return (frame_mask[:, None] & supervised).sum((0, 2))


def require_compiler() -> None:
    """Errors: ValueError where the C++ compiler that torch.compile calls is missing."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise ValueError("--compile needs a C++ compiler: neither g++ nor clang++ is here")


def add_lora(model: MusicGen, rank: int) -> None:
    """Freezes a model and gives every matrix of its layers a trainable addition of so low a rank: in place."""
    model.requires_grad_(False)
    for layer in model.transformer.layers:
        for module in layer.modules():
            if isinstance(module, Attention):
                out, D = module.in_proj_weight.shape
                module.in_proj_lora, module.out_proj_lora = LowRank(D, out, rank), LowRank(D, D, rank)
        for name in ("linear1", "linear2"):
            out, fan_in = getattr(layer, name).weight.shape
            setattr(layer, f"{name}_lora", LowRank(fan_in, out, rank))


def merge_lora(weights: dict) -> dict:
    """The weights {name: tensor} of the plain model that computes the same: what was added is added, its names are gone."""
    merged = {name: x for name, x in weights.items() if "_lora." not in name}
    for name in weights:
        if name.endswith("_lora.A"):
            stem = name.removesuffix("_lora.A")
            matrix = f"{stem}_weight" if f"{stem}_weight" in merged else f"{stem}.weight"
            merged[matrix] = merged[matrix] + LowRank.SCALE * weights[f"{stem}_lora.B"] @ weights[name]
    return merged


def decay_groups(model: nn.Module, weight_decay: float) -> list:
    """Optimiser groups: weight decay on matrices only, not on norms, biases and tables of embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    matrix = [p for p in params if p.dim() >= 2 and id(p) not in tables]
    rest = [p for p in params if p.dim() < 2 or id(p) in tables]
    return [dict(params=matrix, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def flops_per_step(config: ModelConfig, S: int, L: int = 0) -> int:
    """Forward FLOPs of one sequence of S steps with L condition tokens: 2 a multiply-add. Backward costs twice as much.

    Source: the count of PaLM (Chowdhery et al. 2022, appendix B), with attention at its full S x S."""
    D, layers = config.dim, config.num_layers
    attention = 8 * D * D * S + 4 * S * S * D                        # q, k, v, out; scores and values
    cross = (4 * D * D * S + 4 * D * D * L + 4 * S * L * D) if config.cross_attention else 0
    feed_forward = 4 * D * D * config.hidden_scale * S
    return layers * (attention + cross + feed_forward) + 2 * D * config.card * config.K * S


def count_parameters(config: ModelConfig, lora: int = 0) -> int:
    """Parameters of the language model without its conditioner, or those that low-rank fine-tuning trains; nothing is allocated."""
    with torch.device("meta"):
        model = MusicGen(config)
        if lora:
            add_lora(model, lora)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters and FLOPs of every size.")
    parser.add_argument("--T", type=int, default=1500, help="frames (30 s at 50 Hz)")
    args = parser.parse_args()
    print(f"{'size':<8}{'D':>6}{'layers':>8}{'heads':>7}{'parameters':>13}{'no cross':>12}{'GFLOP forward, T=' + str(args.T):>26}")
    for name, shape in SIZES.items():
        config = ModelConfig(**shape)
        plain = count_parameters(ModelConfig(**shape, cross_attention=False))
        print(f"{name:<8}{config.dim:>6}{config.num_layers:>8}{config.num_heads:>7}{count_parameters(config) / 1e6:>12.1f}M"
              f"{plain / 1e6:>11.1f}M{flops_per_step(config, args.T, 16) / 1e9:>26.1f}")


if __name__ == "__main__":
    main()
