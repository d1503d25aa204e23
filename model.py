"""The language model of MusicGen: a decoder-only transformer over the K parallel code streams of a codec.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.2 to 2.4. K embedding tables are summed into one vector a step, a
pre-norm transformer with causal self-attention (and cross-attention to the text) reads them, K linear heads
predict the next codes. Parameters are named as in the public checkpoints.

    codes [B,K,T] ─pattern─► seq [B,K,S] ─sum of K embeddings─► x [B,S,D] ─transformer, K heads─► [B,K,S,card]
                              + prefix [B,P,D] in front, + cross [B,L,D] to attend to, + summed [B,1,D]

This file knows what `Conditions` are, not where they come from: conditioning.py makes them. The conditioner
is part of the model all the same, so that one forward computes the loss: this is what DDP and FSDP wrap.
What makes the model fast stands in support/kernels.py and support/compiled.py, low-rank fine-tuning in
support/lora.py.

Legend: B batch, K codebooks, T frames, S sequence steps, L condition tokens, P prefix tokens, D width,
H heads.
    python model.py          prints parameters and FLOPs of every size
"""

import argparse
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patterns
from support.bounds import check_flag_number
from support.common import command
from support.kernels import IGNORE, Dropout, LayerNorm, Linear, attention, hash_int32, head_loss, linear
from support.kernels import recompute
from support.lora import add_lora, lora_linear

SIZES = {   # Copet et al. 2023 sec. 3.1: small 300M, medium 1.5B, large 3.3B
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
    K: int = 4                                    # codebooks
    card: int = 2048                              # codes in a codebook; `card` itself is the special token
    dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    hidden_scale: int = 4                         # feed-forward width over D
    dropout: float = 0.0
    cross_attention: bool = True
    emb_std: float | None = None                  # of the code embeddings at the start; None: 1/sqrt(D)
    mask_padding: bool = True                     # False: attend to padded text, as the public weights do
    pattern: str = "delay"                        # delay | parallel | unrolled
    delays: list | None = None                    # frames each codebook lags; None: 0, 1, .. K-1
    flattening: list | None = None                # unrolled: inner step of each codebook

    def layout(self, T: int) -> patterns.Pattern:
        """The codebook pattern over T frames."""
        delays = None if self.delays is None else tuple(self.delays)
        flattening = None if self.flattening is None else tuple(self.flattening)
        return patterns.make_pattern(self.pattern, T, self.K, delays, flattening)


@dataclass
class Conditions:
    """What the transformer is conditioned on, already in its width D. Absent ones are None.

    A mask is True at real positions; without a mask, all are. Null rows of `cross` are exact zeros: without
    biases their keys and values are zero too, and so is what cross-attention adds."""
    cross: Tensor | None = None                   # [B, L, D]
    cross_mask: Tensor | None = None              # [B, L] bool
    prefix: Tensor | None = None                  # [B, P, D]
    prefix_mask: Tensor | None = None             # [B, P] bool
    summed: Tensor | None = None                  # [B, 1, D]


class Cache:
    """Keys and values of the steps that were read, of one batch: `hidden` begins it, `decode_step` goes on.

    There is room for S_max steps, the prefix counted in."""

    def __init__(self, config: ModelConfig, B: int, S_max: int, device, dtype=torch.float32):
        shape = (2, B, config.num_heads, S_max, config.dim // config.num_heads)
        self.kv = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.length = 0                           # steps read
        self.position = torch.zeros(1, dtype=torch.long, device=device)      # the same number on the device
        # What further steps need of the conditions.
        self.cross_kv = [None] * config.num_layers        # keys and values [2, B, H, L, D/H], computed once
        self.cross_mask = self.summed = None              # [B, 1, 1, L] bool, [B, 1, D]
        self.prefix_mask, self.origin = None, 0           # [B, P] bool, the step at position 0

    def end(self, S: int) -> int:
        """The number of steps when S more are read."""
        return self.length + S

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """Stores keys and values of S new steps [2,B,H,S,D/H] -> those of all steps [2,B,H,length+S,D/H]."""
        S, room = kv.shape[3], self.kv[layer].shape[3]
        end = self.end(S)
        assert end <= room, f"step {end} of a cache of {room}"
        self.kv[layer][:, :, :, end - S:end] = kv
        return self.kv[layer][:, :, :, :end].to(kv.dtype)

    def mask(self) -> Tensor | None:
        """What the next step may look at, [B,1,1,length+1] bool; None: at everything."""
        if self.prefix_mask is None:
            return None
        codes = self.end(1) - self.prefix_mask.shape[1]
        return F.pad(self.prefix_mask, (0, codes), value=True)[:, None, None]

    def advance(self, S: int) -> None:
        """Counts S steps as read, after the last layer."""
        self.length += S
        self.position += S


def sinusoid(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Position vectors [..., dim] of positions [...]: cosines first, exponent i/(half-1); always float32."""
    half = dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    phase = positions[..., None].float() / max_period ** exponent
    return torch.cat([phase.cos(), phase.sin()], -1)


class Attention(nn.Module):
    """Multi-head attention without biases. in_proj_weight [3D,D] holds the projections: rows q | k | v."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        assert dim % num_heads == 0, f"width {dim} does not divide into {num_heads} heads"
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = Linear(dim, dim, bias=False)
        self.in_proj_lora = self.out_proj_lora = None     # see `add_lora`

    def project(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """x [B,S,D] through those rows of the projection (None: all) -> [1, 2 or 3,B,H,S,D/H]."""
        B, S, D = x.shape
        y = lora_linear(x, self.in_proj_weight, self.in_proj_lora, rows)
        return y.view(B, S, -1, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """q [B,H,S,D/H] to k, v [B,H,S',D/H] -> [B,S,D]."""
        x = attention(q, k, v, mask, is_causal)                                       # [B, H, S, D/H]
        return lora_linear(x.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj_lora)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """Causal self-attention over x [B,S,D]; mask [B,1,S,S'] bool or None for plain causal."""
        qkv = self.project(x)                                                         # [3, B, H, S, D/H]
        q, k, v = qkv
        if cache is not None:
            k, v = cache.append(layer, qkv[1:])                                       # [B, H, S', D/H]
        is_causal = mask is None and q.shape[2] == k.shape[2]     # a single further step sees all before it
        return self.attend(q, k, v, mask, is_causal)

    def keys_values(self, cross: Tensor) -> Tensor:
        """Keys and values [2,B,H,L,D/H] of a condition [B,L,D], for `cross`: computed once a sequence."""
        return self.project(cross, slice(cross.shape[2], None))

    def cross(self, x: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x [B,S,D] to a condition; mask [B,1,1,L] bool or None."""
        q, = self.project(x, slice(x.shape[2]))
        return self.attend(q, *keys_values, mask, False)


class Layer(nn.Module):
    """Pre-norm block: self-attention, cross-attention, feed-forward with exact GELU; no biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.dim, config.dim * config.hidden_scale
        self.self_attn = Attention(D, config.num_heads)
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.linear1, self.linear2 = Linear(D, hidden, bias=False), Linear(hidden, D, bias=False)
        self.linear1_lora = self.linear2_lora = None      # see `add_lora`
        if config.cross_attention:
            self.cross_attention = Attention(D, config.num_heads)
            self.norm_cross = LayerNorm(D)

    def forward(self, x: Tensor, mask: Tensor | None, cross: Tensor | None, cross_mask: Tensor | None,
                cache: Cache | None, index: int, dropout: Dropout) -> Tensor:
        """x [B,S,D] -> [B,S,D]. mask [B,1,S,S'], cross [B,L,D], cross_mask [B,1,1,L]: see `Attention`.

        index: of this layer. dropout: called with the number of the place in the layer."""
        # Self-attention.
        x = x + dropout(self.self_attn(self.norm1(x), mask, cache, index), 0)         # [B, S, D]

        # Cross-attention. Its keys and values are the same at every step: the cache keeps them.
        keys_values = None if cache is None else cache.cross_kv[index]                # [2, B, H, L, D/H]
        if keys_values is None and cross is not None:
            keys_values = self.cross_attention.keys_values(cross)
            if cache is not None:
                cache.cross_kv[index] = keys_values = keys_values.contiguous()     # read at every step
        if keys_values is not None:
            attended = self.cross_attention.cross(self.norm_cross(x), keys_values, cross_mask)    # [B, S, D]
            x = x + dropout(attended, 1)

        # Feed-forward. Training keeps the first of its two wide tensors and computes the second again.
        def activate_and_contract(hidden: Tensor) -> Tensor:
            return lora_linear(dropout(F.gelu(hidden), 2), self.linear2.weight, self.linear2_lora)

        hidden = lora_linear(self.norm2(x), self.linear1.weight, self.linear1_lora)   # [B, S, 4D]
        return x + dropout(recompute(activate_and_contract, hidden), 3)               # [B, S, D]


class Transformer(nn.Module):
    """The stack of layers. checkpointing: the backward pass recomputes whole layers, to save memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.dim % 2 == 0, f"width {config.dim}: even, for the position vectors"
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.dropout = config.dropout
        self.checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None, cross: Tensor | None, cross_mask: Tensor | None,
                cache: Cache | None = None, dropout_keys: Tensor | None = None) -> Tensor:
        """x [B,S,D] -> [B,S,D]. dropout_keys [B] or [B,S] int32: see `Dropout`; the rest as in `Layer`."""
        for i, layer in enumerate(self.layers):
            dropout = Dropout(self.dropout, dropout_keys, i)
            if self.checkpointing and self.training:
                x = recompute(layer, x, mask, cross, cross_mask, None, i, dropout)
            else:
                x = layer(x, mask, cross, cross_mask, cache, i, dropout)
        return x


def trunc_normal(weight: Tensor, std: float) -> None:
    """Fills a tensor from a normal distribution cut at three standard deviations."""
    if not weight.is_meta:                        # without storage there is nothing to fill
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def init_transformer(transformer: Transformer) -> None:
    """std = 1/sqrt(fan_in) over sqrt(2(l+1)) for the matrices of layer l (from 0)."""
    for l, layer in enumerate(transformer.layers):
        for weight in layer.parameters():
            if weight.dim() == 2:
                trunc_normal(weight, weight.shape[1] ** -0.5 / math.sqrt(2 * (l + 1)))


class MusicGen(nn.Module):
    """The language model with its conditioner. `forward` is the loss; generation uses the other methods.

    conditioner: a module that turns prepared inputs into `Conditions`; None for an unconditional model."""
    compiled = False                              # these change when support/compiled.py compiles `step`
    cache_class = Cache
    kv_dtype = None                               # of the cache's keys and values; None: the activations'

    def __init__(self, config: ModelConfig, conditioner: nn.Module | None = None):
        super().__init__()
        self.config = config
        K, D, card = config.K, config.dim, config.card
        self.special = card                       # can be read, never predicted
        self.emb = nn.ModuleList(nn.Embedding(card + 1, D) for _ in range(K))
        self.transformer = Transformer(config)
        self.out_norm = LayerNorm(D)
        self.linears = nn.ModuleList(Linear(D, card, bias=False) for _ in range(K))
        self.conditioner = conditioner
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal; std = 1/sqrt(fan_in), in the layers see `init_transformer`.

        Source: audiocraft's scheme, which its packed q, k and v escape by accident; here they follow it.
        Embeddings of 1/sqrt(D) are small beside the position vectors added to them (RMS 0.7): the wider the
        smaller. `emb_std` can make them as large, from which a short run gains much."""
        for table in self.emb:
            trunc_normal(table.weight, self.config.emb_std or self.config.dim ** -0.5)
        for head in self.linears:
            trunc_normal(head.weight, self.config.dim ** -0.5)
        init_transformer(self.transformer)

    def embed(self, seq: Tensor) -> Tensor:
        """seq [B,K,S] -> [B,S,D]."""
        return sum(table(codes) for table, codes in zip(self.emb, seq.unbind(1)))

    def hidden(self, seq: Tensor, conditions: Conditions | None = None, cache: Cache | None = None,
               dropout_keys: Tensor | None = None) -> Tensor:
        """Codes in the pattern, seq [B,K,S] -> [B,S,D], normalized, ready for the heads.

        cache: an empty one, which `decode_step` then goes on with. dropout_keys [B] int32: one a sample;
        without them nothing is dropped."""
        B, K, S = seq.shape
        assert K == self.config.K, f"{K} codebooks, the model has {self.config.K}"
        assert cache is None or cache.length == 0, f"the cache holds {cache.length} steps: see `decode_step`"
        c = conditions or Conditions()

        # The input: one vector a step, what is added to each, and the prefix in front.
        x = self.embed(seq)                                                           # [B, S, D]
        if c.summed is not None:
            x = x + c.summed
        P, prefix_mask = 0, None
        if c.prefix is not None:
            P, prefix_mask = c.prefix.shape[1], c.prefix_mask if self.config.mask_padding else None
            x = torch.cat([c.prefix.to(x.dtype), x], 1)                               # [B, P+S, D]

        # Positions. With a mask the codes begin at 0 and n prefix tokens stand at -n..-1 before them: padding
        # does not move the codes. Without a mask the prefix begins at 0, as in the public weights.
        steps = torch.arange(P + S, device=x.device)
        positions = steps[None]                                                       # [1, P+S]
        if prefix_mask is not None:
            real = F.pad(prefix_mask, (0, S), value=True)                             # [B, P+S]
            positions = real.cumsum(1) - 1 - prefix_mask.sum(1, keepdim=True)         # [B, P+S]
        x = x + sinusoid(positions, self.config.dim)

        # Self-attention is causal and skips padding, but a token always sees itself: no softmax is empty.
        mask = None
        if prefix_mask is not None:
            rows, columns = steps[:, None], steps
            mask = ((columns <= rows) & real[:, None, None]) | (columns == rows)      # [B, 1, P+S, P+S]

        # Cross-attention skips padding. A row without any token attends to its zeros, which gives zero.
        cross_mask = None
        if c.cross_mask is not None and self.config.mask_padding:
            empty = ~c.cross_mask.any(1, keepdim=True)                                # [B, 1]
            cross_mask = (c.cross_mask | empty)[:, None, None]                        # [B, 1, 1, L]

        # Dropout. With a padded prefix a step's key depends on its position, which padding does not move.
        if dropout_keys is not None and prefix_mask is not None:
            dropout_keys = hash_int32(dropout_keys[:, None] + positions.int())                      # [B, P+S]

        # What further steps need of the conditions.
        if cache is not None:
            if cross_mask is not None and cross_mask.all():
                cross_mask = None                 # it hides nothing
            cache.cross_mask, cache.summed, cache.prefix_mask = cross_mask, c.summed, prefix_mask
            cache.origin = 0 if prefix_mask is None else P

        x = self.transformer(x, mask, c.cross, cross_mask, cache, dropout_keys)               # [B, P+S, D]
        if cache is not None:
            cache.advance(P + S)
        return self.out_norm(x[:, P:])                                                # [B, S, D]

    def heads(self, x: Tensor, which: range | None = None) -> Tensor:
        """x [B,S,D] of `hidden` -> logits [B,k,S,card] of the k codebooks asked for (None: of all)."""
        asked = self.linears if which is None else [self.linears[k] for k in which]
        return torch.stack([linear(x, head.weight) for head in asked], 1)

    def decode_step(self, codes: Tensor, cache: Cache, which: range | None = None) -> Tensor:
        """The step after those in the cache: codes [B,K,1] -> logits [B,k,1,card]; which: see `heads`."""
        logits = self.step(codes, cache, which)
        cache.advance(1)
        return logits

    def step(self, codes: Tensor, cache: Cache, which: range | None = None) -> Tensor:
        """The part of `decode_step` that can be compiled."""
        x = self.embed(codes)                                                         # [B, 1, D]
        if cache.summed is not None:
            x = x + cache.summed
        x = x + sinusoid(cache.position[None] - cache.origin, self.config.dim)
        x = self.transformer(x, cache.mask(), None, cache.cross_mask, cache)
        return self.heads(self.out_norm(x), which)                                    # [B, k, 1, card]

    def logits(self, seq: Tensor, conditions: Conditions | None = None) -> Tensor:
        """seq [B,K,S] -> logits [B,K,S,card]: at step s of codebook k for what stands at step s+1."""
        return self.heads(self.hidden(seq, conditions))

    def predict(self, codes: Tensor, conditions: Conditions | None = None) -> tuple[Tensor, Tensor]:
        """codes [B,K,T] -> logits [B,K,T,card] by frame, NaN where nothing predicts it, and mask [K,T]."""
        pattern = self.config.layout(codes.shape[2])
        return pattern.revert_logits(self.logits(pattern.build(codes, self.special), conditions))

    def forward(self, codes: Tensor, frame_mask: Tensor | None = None, inputs=None,
                dropout_keys: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """The loss: cross-entropy summed over the valid targets of each codebook, [K] float32.

        To be divided by `count_targets`. codes [B,K,T]. frame_mask [B,T]: False at padding, which is read as
        the special token and not predicted. loss_mask [B,T], within frame_mask: False at frames that are read
        but not predicted. inputs: from the conditioner's `prepare`. dropout_keys [B] int32: see `hidden`."""
        # The conditions.
        conditions = self.conditioner(inputs) if self.conditioner is not None else None

        # The pattern. Targets move to the steps that predict them: cheaper than moving logits to the frames.
        pattern = self.config.layout(codes.shape[2])
        predicted = frame_mask if loss_mask is None else loss_mask
        targets = pattern.targets(codes, predicted, IGNORE)                           # [B, K, S-1]
        if frame_mask is not None:
            codes = codes.masked_fill(~frame_mask[:, None], self.special)
        seq = pattern.build(codes, self.special)[..., :-1]                            # [B, K, S-1]

        # The transformer, once for all codebooks; then a head and a loss for each.
        x = self.hidden(seq, conditions, dropout_keys=dropout_keys).flatten(0, 1)               # [B*(S-1), D]
        pairs = zip(self.linears, targets.unbind(1))
        return torch.stack([head_loss(x, head.weight, target.flatten()) for head, target in pairs])    # [K]

    def count_targets(self, loss_mask: Tensor) -> Tensor:
        """Number of targets of each codebook [K], where loss_mask [B,T] is True."""
        supervised = self.config.layout(loss_mask.shape[1]).to(loss_mask.device).supervised       # [K, T]
        return (loss_mask[:, None] & supervised).sum((0, 2))


def decay_groups(model: nn.Module, weight_decay: float) -> list:
    """Optimizer groups: weight decay on matrices only, not on norms, biases and tables of embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    matrix = [p for p in params if p.dim() >= 2 and id(p) not in tables]
    rest = [p for p in params if p.dim() < 2 or id(p) in tables]
    return [dict(params=matrix, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]


def forward_flops(config: ModelConfig, S: int, L: int = 0) -> int:
    """Forward FLOPs of one sequence of S steps with L condition tokens. Backward costs twice as much.

    A multiply-add is 2. Source: PaLM (Chowdhery et al. 2022, appendix B), attention at its full S x S."""
    D, layers = config.dim, config.num_layers
    attention = 8 * D * D * S + 4 * S * S * D     # q, k, v, out; scores and values
    cross = (4 * D * D * S + 4 * D * D * L + 4 * S * L * D) if config.cross_attention else 0
    feed_forward = 4 * D * D * config.hidden_scale * S
    return layers * (attention + cross + feed_forward) + 2 * D * config.card * config.K * S


def count_parameters(config: ModelConfig, lora: int = 0) -> int:
    """Parameters without the conditioner's, or those that fine-tuning of rank `lora` trains.

    Nothing is allocated."""
    with torch.device("meta"):
        model = MusicGen(config)
        if lora:
            add_lora(model, lora)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)


@command("model.py")
def main(argv: list | None = None) -> None:
    """Prints a table of the named sizes."""
    parser = argparse.ArgumentParser(description="Parameters and FLOPs of every size.", allow_abbrev=False)
    parser.add_argument("--T", type=int, default=1500, help="frames (default 1500: 30 s at 50 Hz)")
    args = parser.parse_args(argv)
    check_flag_number("T", args.T, 1, 10 ** 9)
    flops_title = f"GFLOP forward, T={args.T}"
    print(f"{'size':<8}{'D':>6}{'layers':>8}{'heads':>7}{'parameters':>13}{'no cross':>12}{flops_title:>26}")
    for name, shape in SIZES.items():
        config = ModelConfig(**shape)
        full = count_parameters(config) / 1e6
        plain = count_parameters(ModelConfig(**shape, cross_attention=False)) / 1e6
        flops = forward_flops(config, args.T, 16) / 1e9
        print(f"{name:<8}{config.dim:>6}{config.num_layers:>8}{config.num_heads:>7}"
              f"{full:>12.1f}M{plain:>11.1f}M{flops:>26.1f}")


if __name__ == "__main__":
    sys.exit(main())
