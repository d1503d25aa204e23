"""From flags to a run: data sets, the model with its conditioner, average and optimiser; new, or from weights that are there.

`build` draws new weights from the seed, the same on every rank, or takes those that --init_from names (`read_start`, `load_start`):
a run of this project or a published model, in mono also for a stereo run (`both_channels`).

Legend: K codebooks.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from support import chroma, common
import conditioning
from interop import load
import data
from support import distributed
import toy
from support.checkpoint import checkpoint_errors
from support.signals import Stop
from conditioning import Conditioner, ConditionerConfig
from support.flags import fuses, parse_size, style_frames
from model import ModelConfig, MusicGen, decay_groups
from support.lora import add_lora
from support.distributed import Ranks
from support.run import Ema, Run
from support.scan import Scan, skip_lines


def open_data(args: argparse.Namespace, found, codec, ranks: Ranks) -> list:
    """The training and validation sets, with a line on each. found: the dataset's name or what scanning it gave."""
    features = {"chroma": chroma.Chroma(args.melody_stems)} if "melody" in args.conditions else {}
    sets = [data.open_dataset(found, args.valid, split, args.segment_seconds, codec, seed=args.seed,
                              min_segment_ratio=args.min_segment_ratio, cache=args.cache, features=features)
            for split in ("train", "valid")]
    if isinstance(found, Scan):
        for line in skip_lines(found.skipped):
            ranks.print(f"skipped: {line}")
    for split, each in zip(("train", "valid"), sets):
        ranks.print(f"{split}: {each.describe()}")
    return sets


def sample_captions(args: argparse.Namespace, train_set, limit: int = 20_000) -> list:
    """Captions of the training set to fit the vocabulary on, metadata merged in both ways."""
    if args.dataset == "toy" and args.cache is None:
        return [toy.draw_clip(args.seed, 0, i)[1] for i in range(4000)]
    texts = []
    for entry in train_set.files[:limit]:
        texts += [conditioning.describe(entry.meta) or "", conditioning.describe({**entry.meta, "description": None}) or ""]
    return texts


def model_config(args: argparse.Namespace, codec) -> ModelConfig:
    """The language model's shape from the flags and the codec."""
    cross = any("cross" in method for method in fuses(args).values())
    level = [k // codec.streams for k in range(codec.K)] if codec.streams > 1 else None      # 0 0 1 1 ..: left and right at once
    return ModelConfig(K=codec.K, card=codec.card, dropout=args.dropout, cross_attention=cross, pattern=args.pattern,
                       emb_std=args.emb_std, delays=level if args.pattern == "delay" else None,
                       flattening=level if args.pattern == "unrolled" else None, mask_padding=args.mask_padding, **parse_size(args.size))


def condition_shapes(args: argparse.Namespace, codec) -> dict:
    """What the melody's and the style's conditioners look like: by the segment, the codec and the model's size."""
    size, (low, high) = parse_size(args.size), style_frames(args, codec)
    bins = min(1024, max(16, args.batch_size * (low + high) // 4))  # some frames of every update fall to each
    hop, width = chroma.hop_length(codec.sample_rate), min(512, size["dim"])
    return dict(melody_frames=chroma.count_frames(round(args.segment_seconds * codec.sample_rate), codec.sample_rate),
                melody_rate=codec.hop / hop, melody_argmax=args.melody_argmax, melody_stems=args.melody_stems,
                melody_null_bin0=not args.mask_padding,              # both as the published weights have it, or neither
                style_codebooks=min(3, codec.K), style_card=codec.card, style_dim=width, style_heads=max(1, width // 64),
                style_layers=min(8, size["num_layers"] // 2), style_levels=args.style_levels, style_bins=bins,
                style_every=max(1, min(round(codec.frame_rate / 5), low // 4)),        # 5 a second; of a short excerpt at least 4
                style_frames=(low + high) // 2)


def build_conditioner(args: argparse.Namespace, train_set, codec, ranks: Ranks, saved: dict | None) -> Conditioner | None:
    """The conditioner, with the text's vocabulary and encoder as in the checkpoint or start (`saved`), or new ones, fitted to the captions
    of the training set, where it has none."""
    if not (methods := fuses(args)):
        return None
    shape, assets = condition_shapes(args, codec), {}
    if "text" in methods:
        known = saved is not None and "text" in saved["assets"]
        if known:                                                    # captions may have changed since
            with checkpoint_errors(Path(args.out)):
                pieces = conditioning.unpack(saved["assets"]["text"])
                conditioning.vocabulary_size(pieces)
        else:
            pieces = conditioning.fit_sentencepiece(sample_captions(args, train_set), args.text_vocab)
        assets["text"], shape["text_vocab"] = pieces, conditioning.vocabulary_size(pieces)
        if known and (stored := saved.get("conditioner_config")):    # T5 has another shape than ours, and more rows than pieces
            shape |= {name: value for name, value in stored.items() if name.startswith("text_")}
        elif shape["text_vocab"] < args.text_vocab:
            ranks.print(f"text: {shape['text_vocab']} pieces, not {args.text_vocab}: the captions hold no more")
        shape["text_frozen"] = args.freeze_text_encoder
    return Conditioner(ConditionerConfig(fuse=methods, **shape), parse_size(args.size)["dim"], assets)


def optimizer_groups(model: MusicGen, args: argparse.Namespace) -> list:
    """Groups of the optimiser: decayed and not, the encoders of text and style at their own learning rate (`lr_scale` times it)."""
    parts = model.conditioner.parts if model.conditioner is not None else {}
    text = {id(p) for name in ("text", "style") if name in parts for p in parts[name].parameters()}
    groups = []
    for group in decay_groups(model, args.weight_decay):
        for scale, inside in ((1.0, False), (args.text_lr / args.lr, True)):
            params = [p for p in group["params"] if (id(p) in text) == inside]
            groups += [{**group, "params": params, "lr_scale": scale}] if params else []
    return groups


def build(args: argparse.Namespace, ranks: Ranks, codec, found, out: Path, saved: dict | None, stop: Stop,
          start: dict | None = None) -> Run:
    """Allocates model, average and optimiser. Every rank draws the same initial weights from the seed.

    found: the dataset's name or what scanning it gave; saved: the checkpoint that `restore` will go on from; start: what
    `read_start` gave."""
    train_set, valid_set = open_data(args, found, codec, ranks)
    torch.manual_seed(args.seed)
    config, dtype = model_config(args, codec), getattr(torch, args.dtype)
    sharded = args.parallel == "fsdp" and ranks.world_size > 1
    with torch.device("cpu" if start is None or start["added"] else "meta"):       # no storage where it takes all tensors of another
        model = MusicGen(config, build_conditioner(args, train_set, codec, ranks, saved or start))
    if start is not None:
        load_start(model, start, args.init_from)
    if args.freeze_text_encoder:
        model.conditioner.parts["text"].encoder.requires_grad_(False)
    if args.lora:
        add_lora(model, args.lora)
    model = model if sharded else model.to(ranks.device)             # sharding moves a layer at a time
    model.transformer.checkpointing = args.checkpointing
    ema = Ema(model, args.ema_decay, share=not sharded)
    if args.compile:
        for layer in model.transformer.layers:
            layer.compile()
    if sharded:
        distributed.shard_model(model, ranks, dtype, args.zero, args.cpu_offload)
        distributed.shard_model(ema.model, ranks, dtype, 3, args.cpu_offload)  # no backward pass will let go of what it gathers
    wrapped = distributed.wrap_ddp(model, ranks, args.parallel)
    optimizer = torch.optim.AdamW(optimizer_groups(model, args), args.lr, (args.beta1, args.beta2), fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16")
    sums = torch.zeros(2, 2, config.K, device=ranks.device, dtype=torch.float64)
    return Run(args, ranks, codec, train_set, valid_set, model, wrapped, ema, optimizer, scaler, out, stop, [], sums)


# ---------------------------------------------------------------------------------------------------------------------
# a start from the weights of another run


def read_start(args: argparse.Namespace, config: ModelConfig, codec) -> dict | None:
    """Weights ("model") and vocabulary ("assets") of the run that --init_from names, for a model of `config` over `codec`.

    A run over one channel of a codec that interleaves two starts them both ("copies" is 2): see `both_channels`. Conditions that it does
    not have ("added") begin anew. Errors: ValueError naming what differs, there and here."""
    if args.init_from is None:
        return None
    start = load.read_model(args.init_from)
    try:
        theirs = fixed_shape(ModelConfig(**start["model_config"]), (start["conditioner_config"] or {}).get("fuse"))
        stored = dict(channels=1) | start["codec"]                   # older files: mono
        their_codes = "codes {K} of {name} (channels {channels}, {fingerprint:.12})".format(**stored)
        weights, assets = start["model"], start["assets"]
        if "text" in (theirs["conditions"] or ()):
            conditioning.vocabulary_size(conditioning.unpack(assets["text"]))
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{args.init_from}: not {common.MODEL_FILE}, or damaged ({common.describe_error(error)})") from None
    mine, given = fixed_shape(config, fuses(args) or None), theirs["conditions"] or {}
    added = [name for name in fuses(args) if name not in given]
    if added and not args.lora:                                      # which trains nothing but its additions
        theirs["conditions"] = {**given, **{name: fuses(args)[name] for name in added}}
    differ = [f"{k} {theirs[k]} there, {v} here" for k, v in mine.items() if theirs[k] != v]
    one = codec.with_channels(codec.channels // codec.streams)                  # the same codec over one of its interleaved channels
    copies = {one.fingerprint: codec.streams, codec.fingerprint: 1}.get(stored["fingerprint"])
    if copies is None:
        differ.append(f"{their_codes} there, codes {codec.K} of {codec.name} (channels {codec.channels}, "
                      f"{codec.fingerprint:.12}) here")
    if (copies or 1) > 1 and "style" in fuses(args):
        differ.append("a style read from one channel there, from two here")
    if differ:
        raise ValueError(f"--init_from {args.init_from} does not fit: {'; '.join(differ)}. Give the flags it was trained with")
    return dict(model=weights, assets=assets, copies=copies, conditioner_config=start["conditioner_config"], added=added)


def load_start(model: MusicGen, start: dict, where: str) -> None:
    """Fills a new model with the weights of `read_start`. Errors: ValueError where a name or a shape is another."""
    try:
        weights = both_channels(start["model"], start["copies"])
        found = {name: list(x.shape) for name, x in weights.items()}
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"--init_from {where}: its weights are damaged ({common.describe_error(error)})") from None
    new = tuple(f"conditioner.parts.{name}." for name in start["added"])
    wanted = {name: list(x.shape) for name, x in model.state_dict().items() if not name.startswith(new)}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise ValueError(f"--init_from {where}: weights are not what this model has: {wrong[0]} is {found.get(wrong[0])} there, "
                         f"{wanted.get(wrong[0])} here ({len(wrong)} differ)")
    model.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False, assign=True)


def fixed_shape(config: ModelConfig, fuse: dict | None) -> dict:
    """What a model cannot start from another without. Codebooks and their delays are compared by the codec."""
    free = ("K", "delays", "flattening", "dropout", "emb_std")
    return {k: v for k, v in asdict(config).items() if k not in free} | dict(conditions=fuse)


def both_channels(weights: dict, copies: int) -> dict:
    """Weights of a mono model for interleaved channels: each embedding and head `copies` times, the rest as it is.

    audiocraft (docs/MUSICGEN.md) copies the embeddings as they are. But those of a step are summed: they are halved here, so
    that the model reads two equal channels exactly as it read one (toy: ce 0.325 as before, 0.598 where they are not halved)."""
    spread = {}
    for name, x in weights.items():
        part, _, rest = name.partition(".")
        if part in ("emb", "linears"):
            k, _, leaf = rest.partition(".")
            spread |= {f"{part}.{int(k) * copies + c}.{leaf}": x / copies if part == "emb" else x.clone() for c in range(copies)}
        else:
            spread[name] = x
    return spread
