"""Conditioning on a style: the codes of an excerpt, through a bottleneck that leaves too little to copy.

Rouard et al. 2024 (arXiv:2407.12563). In training the excerpt is a random part of the segment itself, and the
loss leaves it out: the model has read it and would learn to copy. At generation it is the middle of a file.

    codes [n, T'] ─sum of embeddings─► transformer ─► normalize ─► quantize ─► every k-th frame ─► projection
    ─► emb [B, L, D]

Legend: B batch, K codebooks, T' frames of the excerpt, E width of this encoder, D width of the language
model, Q levels of the quantizer, V vectors in each.
    python -m support.style in.wav --run runs/NAME          prints what the bottleneck leaves of an excerpt
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenizer
from model import ModelConfig, Transformer, init_transformer, sinusoid
from support import common
from support.bounds import check_fields, check_finite
from support.common import nearest_vectors
from support.condition import Condition, given_audio, zero_padded
from support.flag import Flag
from support.kernels import Linear


@dataclass
class StyleConfig:
    """Shape of the style's conditioner."""
    codebooks: int = 3                # the first of the codec's, which are read
    card: int = 2048                  # codes in each of them
    dim: int = 512
    layers: int = 8
    heads: int = 8
    levels: int = 3                   # of the quantizer that is the bottleneck
    bins: int = 1024                  # vectors in each level
    every: int = 15                   # one of so many frames is kept
    norm: bool = True                 # latents are normalized before the bottleneck; audiocraft's are not
    frames: int = 150                 # frames of an excerpt outside training: 3 s


def excerpt_place(frames: int, low: int, high: int, rng: np.random.Generator | None = None) -> tuple:
    """(start, stop) of an excerpt of a track of so many frames: low..high of them at a random place.

    Without a generator it is the mean of both, in the middle. A track that is shorter is taken whole."""
    length = (low + high) // 2 if rng is None else int(rng.integers(low, high + 1))
    spare = max(0, frames - length)
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return start, start + min(length, frames)


def excerpt_frames(args: argparse.Namespace, codec) -> tuple[int, int]:
    """Least and most frames of an excerpt in training, from --style_seconds."""
    low, high = (max(1, round(seconds * codec.frame_rate)) for seconds in args.style_seconds)
    return low, high


class Bottleneck(nn.Module):
    """Normalizes latents and rounds them to the sum of one vector of each level: what is left is a style, not
    a copy.

    Batch normalization without scale and shift, then residual vector quantization with averaged codebooks
    (Rouard et al. 2024 sec. 3). Both use their statistics as they stood before an update, and collect sums
    meanwhile; `end_update` takes in the sums of all micro-batches and ranks once a step. So no layout of a
    batch changes a number, and no rank waits for another in the forward pass. Masked frames (null samples,
    padding) count for nothing."""

    DECAY = 0.99                                 # of the averages, bias-corrected as those of train.Ema
    DEAD = 0.02                                  # a vector with fewer frames an update moves elsewhere

    def __init__(self, dim: int, levels: int, bins: int):
        super().__init__()
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        # without storage where the module has none: then the vectors come from a file
        where = "meta" if torch.get_default_device().type == "meta" else "cpu"
        vectors = torch.empty(levels, bins, dim, device=where)
        if where == "cpu":
            vectors.normal_(generator=fixed)
        self.register_buffer("vectors", vectors)                                                   # [Q, V, E]
        self.register_buffer("sizes", torch.zeros(levels, bins))     # frames an update that fall to a vector
        self.collected = None                    # no buffer: DDP and checkpoints leave it alone

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, E], mask [B, L] -> quantized [B, L, E]; the gradient passes straight through."""
        z = self.normalize(x)
        residual = z.detach().flatten(0, 1)                                                         # [B*L, E]
        real = mask.flatten()[:, None].float()                                                      # [B*L, 1]
        counts, sums = [], []
        for vectors in self.vectors:
            index = nearest_vectors(residual, vectors)                                                 # [B*L]
            if self.training:
                chosen = F.one_hot(index, len(vectors)) * real                                      # [B*L, V]
                counts.append(chosen.sum(0))
                sums.append(chosen.T @ residual)                                                      # [V, E]
            residual = residual - vectors[index]
        if self.training:
            flat = x.detach().flatten(0, 1) * real
            moments = [real.sum(0), flat.sum(0), flat.square().sum(0)]
            new = torch.cat([*moments, *counts, *(s.flatten() for s in sums)])
            self.collected = new if self.collected is None else self.collected + new
        return z - residual.view_as(z)

    def normalize(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 in each of E, by the statistics so far."""
        return (x - self.mean) * (self.var + 1e-5).rsqrt()

    def codes(self, x: Tensor) -> Tensor:
        """The nearest vector of each level: x [L, E] -> [Q, L]."""
        residual, found = self.normalize(x), []
        for vectors in self.vectors:
            found.append(nearest_vectors(residual, vectors))
            residual = residual - vectors[found[-1]]
        return torch.stack(found)

    @torch.no_grad()
    def end_update(self, reduce, keep: bool) -> None:
        """Moves the statistics by what was collected since the last update. See `Condition.end_update`."""
        collected, self.collected = self.collected, None
        if collected is None or not keep:
            return
        E, V = len(self.mean), self.sizes.numel()
        frames, x, squares, counts, sums = reduce(collected).split([1, E, E, V, V * E])

        # mean and variance of the latents
        some = (frames[0] > 0).float()           # else all samples were null: nothing moves
        mean = x / frames.clamp_min(1)
        before = self.count.clone()
        self.count.lerp_(self.count * self.DECAY + 1, some)
        weight = some / self.count.clamp_min(1)
        self.mean.lerp_(mean, weight.clamp_min(0.1) * some)         # follows faster: the codebooks lean on it
        var = (squares / frames.clamp_min(1) - mean.square()).clamp_min(0)
        self.var.lerp_(var, weight.clamp_min(0.1) * some)

        # the codebooks: not at the first update, before there was a scale
        weight = some * (before > 0) / before.clamp_min(1)
        totals = (self.vectors * self.sizes[..., None]).lerp_(sums.view_as(self.vectors), weight)
        self.sizes.lerp_(counts.view_as(self.sizes), weight)
        alive = self.sizes[..., None] > 1e-4
        self.vectors.copy_(torch.where(alive, totals / self.sizes[..., None].clamp_min(1e-4), self.vectors))
        self.revive(weight > 0)

    def revive(self, ready: Tensor) -> None:
        """The least used vector, if dead, moves beside the most used and takes half its frames; and so on.

        Linde, Buzo & Gray 1980 grow a codebook so. Nothing is random, so nothing depends on ranks or
        restarts."""
        order = self.sizes.argsort(dim=1, stable=True)                                                # [Q, V]
        half = order.shape[1] // 2
        for vectors, sizes, row in zip(self.vectors, self.sizes, order):
            dead, used = row[:half], row.flip(0)[:half]
            moves = (sizes[dead] < self.DEAD) & (sizes[used] > 4 * self.DEAD) & ready                  # [V/2]
            beside = vectors[used] + 0.01 * vectors[dead]            # off by a little of where it was
            vectors[dead] = torch.where(moves[:, None], beside, vectors[dead])
            halves = torch.where(moves, sizes[used] / 2, sizes[used])
            sizes[dead] = torch.where(moves, halves, sizes[dead])
            sizes[used] = halves


class Style(Condition):
    """The codes of an excerpt to a few embeddings, through a bottleneck. A null style gives exact zeros."""
    name = "style"
    plural = "styles"
    label = "Style to take"
    Config = StyleConfig
    rng_stream = 14
    learns_at_text_lr = True
    reads_codes = True
    flags = (
        Flag("style_seconds", "length of a style excerpt, seconds",
             float, nargs=2, metavar=("LOW", "HIGH")),
        Flag("style_levels", "levels of the quantizer that a style is rounded by", int, 3, range=(1, 256)),
    )

    def __init__(self, config: StyleConfig, dim: int, asset: None = None):
        super().__init__(config, dim)
        c, E = config, config.dim
        self.emb = nn.ModuleList(nn.Embedding(c.card, E) for _ in range(c.codebooks))
        shape = ModelConfig(dim=E, num_layers=c.layers, num_heads=c.heads, cross_attention=False)
        self.transformer = Transformer(shape)
        init_transformer(self.transformer)
        self.bottleneck = Bottleneck(E, c.levels, c.bins)
        self.output_proj = Linear(E, dim)

    @classmethod
    def fill_flags(cls, args, fill, start: StyleConfig | None) -> None:
        """An excerpt must leave something of its segment to be learned."""
        if cls.is_active(args) and args.segment_seconds < 9:
            seconds = [args.segment_seconds / 4, args.segment_seconds / 2]
            fill("style_seconds", seconds, "a quarter to a half of a short segment")
        fill("style_seconds", [1.5, 4.5], "as published" if cls.is_active(args) else None)

    @classmethod
    def check_flags(cls, args) -> None:
        """Excerpts are shorter than a segment."""
        low, high = args.style_seconds
        if cls.is_active(args) and not 0 < low <= high < args.segment_seconds:
            raise ValueError(f"--style_seconds {low:g} {high:g}: more than 0, the second not less than "
                             "the first, "
                             f"both less than the segment of {args.segment_seconds:g} s")

    @classmethod
    def check_sets(cls, args, train_set, valid_set) -> None:
        """The loss leaves an excerpt out, and of a clip that is no longer than it nothing would be left."""
        low, high = args.style_seconds
        sets = dict(training=(train_set, low), validation=(valid_set, (low + high) / 2))
        for name, (clips, seconds) in sets.items():
            if (longest := clips.longest_seconds()) <= seconds:
                raise ValueError(f"the longest {name} clip has {longest:.3g} s, no more than a style excerpt "
                                 f"of {seconds:.3g} s, which the loss leaves out: give longer clips or a "
                                 "shorter --style_seconds")

    @classmethod
    def make_config(cls, args, codec, size: dict, asset: None, stored: dict | None) -> StyleConfig:
        """By the codec, the excerpt's length and the model's size."""
        low, high = excerpt_frames(args, codec)
        width = min(512, size["dim"])
        return StyleConfig(
            codebooks=min(3, codec.K), card=codec.card,
            dim=width, heads=max(1, width // 64), layers=min(8, size["num_layers"] // 2),
            levels=args.style_levels,
            # so many vectors that some frames of every update fall to each
            bins=min(1024, max(16, args.batch_size * (low + high) // 4)),
            # 5 tokens a second, and at least 4 of a short excerpt
            every=max(1, min(round(codec.frame_rate / 5), low // 4)),
            frames=(low + high) // 2)

    def from_example(self, example, codes: Tensor, args, codec, rng) -> tuple:
        """The codes [K, T'] of an excerpt of the segment, and its place, which the loss leaves out."""
        start, stop = excerpt_place(example.frames, *excerpt_frames(args, codec), rng)
        return codes[:, start:stop].clone(), (start, stop)

    def from_user(self, given, codec) -> Tensor:
        """The codes [K, T'] of the middle of a track. Errors: ValueError if it is too short."""
        wav, c, hop = given_audio(given, codec), self.config, codec.hop
        frames = wav.shape[-1] // hop
        if frames < c.every:
            raise ValueError(f"a style lasts at least {c.every / codec.frame_rate:g} s, this has "
                             f"{wav.shape[-1] / codec.sample_rate:.2f} s")
        around = c.frames + 2 * math.ceil(codec.frame_rate)          # a second on both sides, for the codec
        start, stop = excerpt_place(frames, around, around)
        device = self.output_proj.weight.device
        codes = codec.encode(wav[None, :, start * hop:stop * hop].to(device))[0]                    # [K, T'']
        start, stop = excerpt_place(codes.shape[1], c.frames, c.frames)
        return codes[:, start:stop]

    def from_toy(self, clip, text: str, wav: Tensor) -> Tensor:
        """The audio of the clip."""
        return wav

    def prepare(self, values: list) -> tuple[Tensor, Tensor]:
        """Codes [K, T'] or None each -> (codes [B, n, L], mask [B, L] bool), where the values lie.

        A null one is one padded frame."""
        c = self.config
        lengths = [0 if v is None else v.shape[1] for v in values]
        L = max(1, *lengths)
        device = next((v.device for v in values if v is not None), None)
        nothing = torch.zeros(c.codebooks, L, dtype=torch.long, device=device)
        rows = [nothing if v is None else F.pad(v[:c.codebooks], (0, L - v.shape[1])) for v in values]
        return torch.stack(rows), torch.arange(L) < torch.tensor(lengths)[:, None]

    def encode(self, codes: Tensor, mask: Tensor) -> Tensor:
        """Latents before the bottleneck: codes [B, n, L] -> [B, L, E]. Not causal; padding is hidden."""
        x = sum(table(row) for table, row in zip(self.emb, codes.unbind(1)))                       # [B, L, E]
        L, E = x.shape[1:]
        x = x + sinusoid(torch.arange(L, device=x.device), E)
        visible = mask[:, None, None] | torch.eye(L, dtype=torch.bool, device=x.device)         # [B, 1, L, L]
        x = self.transformer(x, visible, None, None)
        if self.config.norm:                                         # nothing else keeps it from growing
            x = F.layer_norm(x, x.shape[-1:])
        return x

    def forward(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """codes [B, n, L], mask [B, L] -> (emb [B, L/every, D], mask [B, L/every])."""
        every = self.config.every
        # float32, as the reference: rounding to a vector is a choice, which bfloat16 would make otherwise
        with torch.autocast(codes.device.type, enabled=False):
            x = self.bottleneck(self.encode(codes, mask), mask)                                    # [B, L, E]
            return zero_padded(self.output_proj(x[:, ::every]), mask[:, ::every])

    def end_update(self, reduce, keep: bool) -> None:
        """The bottleneck takes in the statistics of the update."""
        self.bottleneck.end_update(reduce, keep)


@torch.no_grad()
def print_style(path: str, run: str) -> None:
    """Prints what a run's bottleneck leaves of the middle of an audio file: a number a level and kept frame.

    Errors: ValueError for a file or a run that cannot be read."""
    stored = common.read_torch_dict(Path(run, "best.pt"), common.MODEL_FILE)
    try:
        flat = stored["conditioner_config"] or {"fuse": {}}
        if "style" not in flat["fuse"]:
            raise ValueError(f"{run}: this model was trained without style")
        fields = {k.removeprefix("style_"): v for k, v in flat.items() if k.startswith("style_")}
        check_fields(run, flat | stored["model_config"])
        prefix = "conditioner.parts.style."
        weights = {k.removeprefix(prefix): v for k, v in stored["model"].items() if k.startswith(prefix)}
        check_finite(run, weights)
        with torch.device("meta"):                   # without storage: it takes the tensors of the file
            part = Style(StyleConfig(**fields), stored["model_config"]["dim"]).eval()
        part.load_state_dict(weights, assign=True)
        c = stored["codec"]
        codec = tokenizer.load_codec(c["name"], c.get("levels", c["K"]), channels=c.get("channels", 1))
    except ValueError:
        raise
    except Exception as error:                                       # a foreign file can fail in any way
        problem = common.describe_error(error)
        raise ValueError(f"{run}: not {common.MODEL_FILE}, or damaged ({problem})") from None
    codes = codec.encode(given_audio(path, codec)[None])[0]                                          # [K, T']
    c = part.config
    start, stop = excerpt_place(codes.shape[1], c.frames, c.frames)
    latents = part.encode(*part.prepare([codes[:, start:stop]]))[0]                                  # [T', E]
    kept = part.bottleneck.codes(latents)[:, ::c.every]   # [Q, L]
    seconds = (stop - start) / codec.frame_rate
    print(f"{stop - start} frames from frame {start} on ({seconds:g} s) -> {kept.shape[1]} tokens of "
          f"{c.levels} codes, each one of {c.bins}:")
    for level, row in enumerate(kept.tolist(), 1):
        print(f"level {level} |" + "".join(f"{code:>5}" for code in row))


@common.command("support.style")
def main(argv: list | None = None) -> None:
    """The command at the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m support.style",
                                     description="Prints what a run's bottleneck leaves of an excerpt.")
    parser.add_argument("audio")
    parser.add_argument("--run", required=True, help="folder of a run that was trained with a style")
    args = parser.parse_args(argv)
    print_style(args.audio, args.run)


if __name__ == "__main__":
    sys.exit(main())
