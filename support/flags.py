"""The flags of train.py: what they are, what follows from them, what contradicts, and what they would take.

`build_parser` has them in groups. A flag left out is filled in by `derive`: from the data (PRESETS), from --init_from, from the machine;
it returns lines that say what it chose and why. `check` refuses what cannot be. `estimate` says memory and time before anything is
allocated. The result is an argparse.Namespace, stored as a plain dict in config.json and in every checkpoint.

Legend: K codebooks, T frames, S sequence steps, B batch, D width.
    python train.py --help            the flags
    python train.py --dry_run         what was chosen, and the estimate
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support import chroma, common
import conditioning
from interop import load
import generate
import toy
from conditioning import ConditionerConfig
from support.kernels import LOGITS_AT_ONCE, linear
from model import SIZES, ModelConfig, count_parameters, flops_per_step
from support.compiled import require_compiler

PRESETS = {                                                          # defaults that depend on what is trained on
    "toy": dict(size="tiny", fuse=["text=cross+sum"], codec="toy", segment_seconds=toy.CLIP_SECONDS, batch_size=16, epochs=12,
                updates_per_epoch=100, lr=8e-3, text_lr=1.5e-3, warmup_steps=20, ema_every=1, emb_std=1.0, cfg_dropout=0.1,
                word_dropout=0.0, merge_text_p=0.0, valid_samples=128, cfg=1.0, temperature=0.3, top_k=50,
                evaluate_every=0, generate_every=6),
    "audio": dict(size="small", fuse=["text=cross"], codec="encodec_24khz", segment_seconds=30.0, batch_size=32, epochs=100,
                  updates_per_epoch=500, lr=1e-4, text_lr=1e-4, warmup_steps=1000, ema_every=10, cfg_dropout=0.3,
                  word_dropout=0.3, merge_text_p=0.25, valid_samples=512, cfg=3.0, temperature=1.0, top_k=250,
                  evaluate_every=25, generate_every=25),
}
SHAPE = ("dim", "num_layers", "num_heads", "hidden_scale")           # of a model, as --size gives it
NEUTRAL = {"out", "device", "workers", "resume", "init_from", "dry_run", "log_every", "evaluate_every", "generate_every", "compile",
           "micro_batch_size", "parallel", "zero", "cpu_offload", "sharded_checkpoint", "save_minutes", "timeout", "checkpointing",
           "epochs", "eval_samples", "generate_samples", "plan_gpus", "plan_tflops", "only", "tensorboard"}  # may change on resume
HERE_ONLY = {"device", "dtype", "workers", "micro_batch_size", "parallel", "zero", "cpu_offload", "compile", "checkpointing", "out",
             "resume", "init_from", "lora", "dry_run", "only", "tensorboard", "plan_gpus", "plan_tflops"}   # not taken from a run by --only
ONLY = ("valid", "evaluate", "generate")


def build_parser() -> argparse.ArgumentParser:
    """The flags, in groups. A default of None is filled in by `derive`, which prints what it chose."""
    parser = argparse.ArgumentParser(description="Train a MusicGen.", allow_abbrev=False)
    new = parser.add_argument_group
    g = new("data")
    g.add_argument("--dataset", default="toy", help="toy, a folder of audio, or a manifest .jsonl[.gz]")
    g.add_argument("--valid", default="0.05", help="folder, manifest, or the fraction of --dataset kept for validation")
    g.add_argument("--cache", default=None, help="token cache made by data.py cache; audio and codec are then not touched")
    g.add_argument("--codec", default=None, help="toy, encodec_24khz or the path of a codec (default: by dataset)")
    g.add_argument("--num_codebooks", type=int, default=None, help="the first so many codebooks of a channel (default: all)")
    g.add_argument("--channels", type=int, default=1, choices=(1, 2), help="2: stereo, each channel with codebooks of its own")
    g.add_argument("--segment_seconds", type=float, default=None, help="length of a training segment, seconds")
    g.add_argument("--min_segment_ratio", type=float, default=0.8, help="least share of a segment that lies inside its file")
    g.add_argument("--workers", type=int, default=None, help="processes that load data (default: 0 for toy, else 4)")
    g = new("model")
    g.add_argument("--size", default=None, help=f"{', '.join(SIZES)}, or WIDTHxLAYERSxHEADS, such as 320x6x5")
    g.add_argument("--pattern", default="delay", choices=("delay", "parallel", "unrolled"), help="codebook pattern")
    g.add_argument("--dropout", type=float, default=0.0, help="dropout in the transformer")
    g.add_argument("--lora", type=int, default=None, metavar="R",
                   help="train additions of rank R to the matrices of --init_from, and nothing else")
    g.add_argument("--emb_std", type=float, default=None, help="initial spread of the code embeddings (audio: 1/sqrt(width))")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations in backward: less memory, 4/3 the work")
    g = new("conditions")
    g.add_argument("--conditions", nargs="+", default=["text"], choices=conditioning.CONDITIONERS, help="what music is conditioned on")
    g.add_argument("--no_text", action="store_true", help="without text: alone, an unconditional model")
    g.add_argument("--fuse", nargs="+", default=None, help="how a condition enters: NAME=cross|prepend|sum, several joined by +")
    g.add_argument("--mask_padding", action=argparse.BooleanOptionalAction, default=None,
                   help="whether padded text is hidden (default: yes, or as --init_from has it)")
    g.add_argument("--freeze_text_encoder", action=argparse.BooleanOptionalAction, default=None,
                   help="leave the text encoder as it is (default: yes for published weights, else no)")
    g.add_argument("--text_vocab", type=int, default=2000, help="most pieces of the vocabulary fitted to the captions")
    g.add_argument("--cfg_dropout", type=float, default=None, help="probability that a sample loses all its conditions")
    for name in conditioning.CONDITIONERS:
        g.add_argument(f"--{name}_dropout", type=float, default=0.0, help=f"probability that a sample loses its {name} alone")
    g.add_argument("--melody_argmax", action=argparse.BooleanOptionalAction, default=True, help="melody: a frame's strongest class alone")
    g.add_argument("--melody_stems", action="store_true", help="melody without drums and bass (needs demucs)")
    g.add_argument("--style_seconds", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"), help="length of a style excerpt, seconds")
    g.add_argument("--style_levels", type=int, default=3, help="levels of the quantiser that a style is rounded by")
    g.add_argument("--word_dropout", type=float, default=None, help="probability that a word of a caption is dropped")
    g.add_argument("--merge_text_p", type=float, default=None, help="probability that metadata is merged into the caption")
    g.add_argument("--drop_desc_p", type=float, default=0.5, help="then: probability that the description is dropped")
    g.add_argument("--keep_other_p", type=float, default=0.5, help="then: probability that a metadata field is kept")
    g = new("optimisation")
    g.add_argument("--epochs", type=int, default=None, help="epochs; an epoch ends with validation and a checkpoint")
    g.add_argument("--updates_per_epoch", type=int, default=None, help="optimiser steps an epoch")
    g.add_argument("--batch_size", type=int, default=None, help="samples an update, over all ranks and micro-batches")
    g.add_argument("--micro_batch_size", type=int, default=None, help="samples a rank sends through at once (default: all)")
    g.add_argument("--lr", type=float, default=None, help="peak learning rate (AdamW)")
    g.add_argument("--text_lr", type=float, default=None, help="peak learning rate of the text and style encoders")
    g.add_argument("--warmup_steps", type=int, default=None, help="linear warm-up, then cosine to --lr_min_ratio of the peak")
    g.add_argument("--lr_min_ratio", type=float, default=0.0, help="final learning rate over the peak")
    g.add_argument("--beta1", type=float, default=0.9, help="AdamW's decay of the mean gradient")
    g.add_argument("--beta2", type=float, default=0.95, help="AdamW's decay of the squared gradient")
    g.add_argument("--weight_decay", type=float, default=0.1, help="on matrices only")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm; 0 is off")
    g.add_argument("--max_skipped", type=int, default=20, help="stop after so many updates in a row with gradients not finite")
    g.add_argument("--ema_decay", type=float, default=0.99, help="of the averaged weights, bias-corrected")
    g.add_argument("--ema_every", type=int, default=None, help="average every so many updates")
    g.add_argument("--overfit_one_batch", action="store_true", help="the same batch in every update, no dropout: must reach ce 0")
    g = new("machine")
    g.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    g.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="of autocast (default: by device)")
    g.add_argument("--compile", action="store_true", help="torch.compile the layers; needs a C++ compiler")
    g.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"), help="several ranks: whole models, or shards (FSDP2)")
    g.add_argument("--zero", type=int, default=3, choices=(2, 3), help="fsdp: 3 gathers a layer twice a step, 2 keeps it gathered")
    g.add_argument("--cpu_offload", action="store_true", help="fsdp: shards and the optimiser live in the host's memory")
    g.add_argument("--timeout", type=float, default=10.0, help="minutes a rank waits for the others before the job fails")
    g = new("run")
    g.add_argument("--out", default=None, help="run folder (default: runs/ and the name of the dataset)")
    g.add_argument("--seed", type=int, default=0, help="of weights, data, dropouts and samples")
    g.add_argument("--init_from", default=None, 
                   help="run folder, best.pt or published weights to start from; mono weights also start a stereo run")
    g.add_argument("--resume", default="auto", choices=("auto", "never"), help="auto: go on from the folder's checkpoint")
    g.add_argument("--save_minutes", type=float, default=10.0, help="checkpoint within an epoch; 0: after every update")
    g.add_argument("--sharded_checkpoint", action="store_true", help="all ranks write their shards, nothing is gathered")
    g.add_argument("--log_every", type=int, default=None, help="updates between log lines (default: a tenth of an epoch)")
    g.add_argument("--valid_samples", type=int, default=None, help="segments in validation")
    g.add_argument("--evaluate_every", type=int, default=None, help="epochs between evaluations; 0: only at the end")
    g.add_argument("--generate_every", type=int, default=None, help="epochs between samples; 0: only at the end")
    g.add_argument("--eval_samples", type=int, default=128, help="clips generated for evaluation (toy: of each kind)")
    g.add_argument("--generate_samples", type=int, default=4, help="samples written by the generate stage")
    g.add_argument("--cfg", type=float, default=None, help="guidance coefficient of evaluate and generate; stored with the model")
    g.add_argument("--temperature", type=float, default=None, help="sampling temperature; 0 takes the likeliest code; stored likewise")
    g.add_argument("--top_k", type=int, default=None, help="sampling from the k likeliest codes; 0 is all; stored likewise")
    g.add_argument("--top_p", type=float, default=0.0, help="sampling from the likeliest codes of this mass; 0 is off; stored likewise")
    g.add_argument("--only", default=None, choices=ONLY, help="a stage alone, of the run in --out, with its flags and best weights")
    g.add_argument("--tensorboard", action="store_true", help="also write scalars, sound and spectrograms for TensorBoard")
    g.add_argument("--dry_run", action="store_true", help="print the estimate of memory and time, then stop")
    g.add_argument("--plan_gpus", type=int, nargs="+", default=None, help="dry run: for so many GPUs instead of this machine")
    g.add_argument("--plan_tflops", type=float, default=990.0, help="dry run: peak of one of them (default: H100, bfloat16)")
    return parser


def derive(args: argparse.Namespace, world: int) -> list:
    """Fills in the flags left out, in place, and returns lines that say what was chosen, by reason."""
    notes = {}

    def fill(name, value, reason):
        if getattr(args, name) is None:
            setattr(args, name, value)
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            notes[reason] = f"{notes.get(reason, f'{reason}:')} --{name} {shown}"

    kind = "toy" if args.dataset == "toy" else "audio"
    if args.overfit_one_batch:
        for name, value in dict(epochs=1, updates_per_epoch=200, batch_size=4 * world, lr=1e-3, text_lr=1e-3,
                                warmup_steps=20, cfg_dropout=0.0, word_dropout=0.0, merge_text_p=0.0, evaluate_every=0,
                                valid_samples=4 * world).items():
            fill(name, value, "overfitting one batch")
    for name, value in start_defaults(args).items():
        if args.init_from:
            fill(name, value, f"as in {args.init_from}")
        elif getattr(args, name) is None:                            # nothing to say of it
            setattr(args, name, value)
    for name, value in PRESETS[kind].items():
        if name != "fuse" or "text" in args.conditions:              # it is about text
            fill(name, value, f"default for {kind}")
    args.fuse = args.fuse or []
    if "style" in args.conditions:                                   # it must leave something to be learnt
        short = args.segment_seconds < 9
        fill("style_seconds", [args.segment_seconds / 4, args.segment_seconds / 2] if short else [1.5, 4.5],
             "a quarter to a half of a short segment" if short else "as published")
    args.style_seconds = args.style_seconds or [1.5, 4.5]
    fill("device", "cuda" if torch.cuda.is_available() else "cpu", "what there is")
    on_cuda = common.check_device(args.device).type == "cuda"
    fill("dtype", "bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32", f"best on {args.device}")
    fill("workers", 0 if kind == "toy" else 4, "synthesis is nearly free" if kind == "toy" else "audio is read from disk")
    fill("micro_batch_size", max(1, args.batch_size // world), "the rank's whole share")
    fill("log_every", max(1, args.updates_per_epoch // 10), "a tenth of an epoch")
    fill("out", f"runs/{Path(args.cache or args.dataset).resolve().stem if kind != 'toy' else 'toy'}", "by dataset")
    return list(notes.values())


def start_defaults(args: argparse.Namespace) -> dict:
    """Flags that follow from what --init_from names: its size, and how its conditions enter; published weights also bring their codec."""
    found = load.peek(args.init_from) if args.init_from else None
    if found is None:
        return dict(mask_padding=True, freeze_text_encoder=False)
    config, conditioner, published = found
    shape = {name: getattr(config, name) for name in SHAPE}
    named = next((name for name in SIZES if parse_size(name) == shape), "x".join(map(str, shape.values())).removesuffix("x4"))
    flags = dict(mask_padding=config.mask_padding, freeze_text_encoder=bool(conditioner and conditioner.text_frozen), size=named,
                 fuse=[f"{k}={v}" for k, v in (conditioner.fuse if conditioner else {}).items() if k in args.conditions])
    if published is None:
        return flags
    return flags | dict(codec=str(load.locate(args.init_from)), num_codebooks=config.K // published.channels)


def parse_size(size: str) -> dict:
    """What --size says of a model's shape: a name, or WIDTHxLAYERSxHEADS[xHIDDEN], the feed-forward HIDDEN (else 4) times as wide.

    Errors: ValueError for anything else."""
    if size in SIZES:
        return SIZES[size] | dict(hidden_scale=4)
    numbers = [int(n) if n.isdecimal() else 0 for n in size.split("x")]
    shape = dict(zip(SHAPE, numbers + [4] * (len(numbers) == 3)))
    if len(shape) != 4 or len(numbers) > 4 or min(numbers) < 1 or shape["dim"] % shape["num_heads"] or shape["dim"] % 2:
        raise ValueError(f"--size {size}: {', '.join(SIZES)}, or WIDTHxLAYERSxHEADS, such as 320x6x5: even, and a multiple of the heads")
    return shape


def check(args: argparse.Namespace, world: int) -> None:
    """Refuses flags that contradict each other or lie outside their range. Errors: ValueError with the way out."""
    for name in ("cfg_dropout", "text_dropout", "melody_dropout", "style_dropout", "word_dropout", "merge_text_p", "drop_desc_p",
                 "keep_other_p", "dropout", "ema_decay", "beta1", "beta2", "top_p", "lr_min_ratio", "min_segment_ratio"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise ValueError(f"--{name} {value}: it lies between 0 and 1")
    for name in ("epochs", "updates_per_epoch", "batch_size", "micro_batch_size", "ema_every", "log_every", "valid_samples",
                 "max_skipped", "text_vocab", "eval_samples", "style_levels"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "workers", "evaluate_every", "generate_every", "seed",
                 "generate_samples", "save_minutes"):
        if not (value := getattr(args, name)) >= 0:
            raise ValueError(f"--{name} {value}: at least 0")
    for name in ("lr", "text_lr", "segment_seconds", "timeout", "plan_tflops"):
        if not 0 < (value := getattr(args, name)) < 1e4:
            raise ValueError(f"--{name} {value}: more than 0, less than 10000")
    if args.seed >= 2 ** 31:
        raise ValueError(f"--seed {args.seed}: less than 2^31")
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} is over all ranks and does not divide by {world}: "
                         f"take {args.batch_size // world * world or world}")
    share = args.batch_size // world
    if share % args.micro_batch_size:
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} does not divide a rank's {share} samples: take one of "
                         f"{', '.join(str(d) for d in range(1, share + 1) if share % d == 0)}")
    if args.dtype == "float16" and torch.device(args.device).type == "cpu":
        raise ValueError("--dtype float16 needs a GPU: take float32 or bfloat16")
    if args.dropout == 1:
        raise ValueError("--dropout 1.0: less than 1")
    if args.lora is not None and args.lora < 1:
        raise ValueError(f"--lora {args.lora}: at least 1")
    if args.lora and not args.init_from:
        raise ValueError(f"--lora {args.lora}: it adds to weights that are there: give them by --init_from")
    if args.cpu_offload and args.parallel != "fsdp":
        raise ValueError("--cpu_offload moves shards: give --parallel fsdp with it")
    if args.compile:
        require_compiler()
    if any(n < 1 for n in args.plan_gpus or ()):
        raise ValueError(f"--plan_gpus {min(args.plan_gpus)}: at least 1")
    if args.emb_std is not None and not 0 < args.emb_std < 100:
        raise ValueError(f"--emb_std {args.emb_std}: more than 0")
    generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)
    low, high = args.style_seconds
    if "style" in args.conditions and not 0 < low <= high < args.segment_seconds:
        raise ValueError(f"--style_seconds {low:g} {high:g}: more than 0, the second not less than the first, both less than the segment "
                         f"of {args.segment_seconds:g} s")
    parse_size(args.size)
    ConditionerConfig(fuse=fuses(args))
    if args.freeze_text_encoder and "text" not in fuses(args):
        raise ValueError("--freeze_text_encoder: there is none without text; leave one of both out")
    if args.melody_stems and "melody" in args.conditions:
        chroma.load_separator()


def fuses(args: argparse.Namespace) -> dict:
    """{name: method} of the conditions trained on, in the order in which they stand before the codes: the melody next to them,
    always as far from them, or with a text between as the reference has it."""
    asked = parse_fuse(args.fuse)
    if odd := [name for name in asked if name not in args.conditions]:
        raise ValueError(f"--fuse {odd[0]}={asked[odd[0]]}: {odd[0]!r} is not among the --conditions {' '.join(args.conditions)}")
    usual = dict(style="prepend", melody="prepend", **parse_fuse(PRESETS["toy" if args.dataset == "toy" else "audio"]["fuse"]))
    return {name: asked.get(name, method) for name, method in usual.items()
            if name in args.conditions and not (name == "text" and args.no_text)}


def parse_fuse(entries: list) -> dict:
    """["text=cross"] -> {"text": "cross"}. Errors: ValueError for anything that is no NAME=METHOD."""
    if any(e.count("=") != 1 for e in entries):
        raise ValueError(f"--fuse {' '.join(entries)}: give NAME=METHOD, such as text=cross")
    return dict(e.split("=") for e in entries)


def segment_frames(args: argparse.Namespace, codec) -> int:
    """Frames T of a training segment."""
    return math.ceil(round(args.segment_seconds * codec.sample_rate) / codec.hop)


def style_frames(args: argparse.Namespace, codec) -> tuple[int, int]:
    """Least and most frames of a style excerpt."""
    return tuple(max(1, round(seconds * codec.frame_rate)) for seconds in args.style_seconds)


def of_the_run(argv: list | None, out: str | None) -> argparse.Namespace:
    """The flags of the run in a folder, for --only; those given now win. Errors: ValueError."""
    if out is None:
        raise ValueError("--only: of which run? Give --out, the folder of a run that has finished an epoch")
    parser, stored = build_parser(), load.read_model(out).get("args")
    if not isinstance(stored, dict):
        raise ValueError(f"{out}: its best.pt does not say how it was trained")
    parser.set_defaults(**{k: v for k, v in stored.items() if k not in HERE_ONLY and k in parser.parse_args([])})
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# estimate


@dataclass
class Plan:
    """What a run would take: parameters, GiB a rank by what for, FLOPs an update and rank, seconds in all."""
    parameters: int
    memory: dict
    flops: float
    seconds: float


def plan(args: argparse.Namespace, config: ModelConfig, T: int, world: int, speed: float) -> Plan:
    """Memory and time from shapes alone, at half of `speed` (peak FLOP/s of a rank).

    Activations: about 16 D numbers a layer and step are kept for backward (24 D with cross-attention); of the heads a few logits
    at a time, and their gradients in float32 until backward. Sharded: all but activations over the ranks, and two layers gathered
    (ZeRO-3) or all (ZeRO-2); whole, autocast keeps its casts of the weights until the backward pass. Frozen matrices (--lora) need
    no gradient, optimiser or average, and one pass backward instead of two."""
    N, S, B = count_parameters(config), config.layout(T).S_valid - 1, min(args.micro_batch_size, max(1, args.batch_size // world))
    added = count_parameters(config, args.lora) if args.lora else 0
    learnt = added or N
    bytes_each = 4 if args.dtype == "float32" else 2
    per_layer = (24 if config.cross_attention else 16) * config.dim
    kept = config.num_layers * (config.dim if args.checkpointing else per_layer) + (per_layer if args.checkpointing else 0)
    sharded = args.parallel == "fsdp" and world > 1
    share = world if sharded else 1
    once = B * world >= args.batch_size                              # else gradients add up whole until the last micro-batch
    memory = dict(weights=4 * (N + added) / share, gradients=4 * learnt / (share if once else 1), optimiser=8 * learnt / share,
                  EMA=4 * (learnt + sharded * (N + added)) / share,  # sharded, the best weights stay on the device too
                  gathered=sharded * bytes_each * N * (1 if args.zero == 2 else 2 / config.num_layers),
                  casts=(bytes_each < 4) * (not sharded) * bytes_each * N / (config.num_layers if added and args.checkpointing else 1),
                  activations=B * S * kept * bytes_each + 3 * 4 * LOGITS_AT_ONCE + (not added) * 4 * config.K * config.card * config.dim)
    passes = (2 if added else 3) + args.checkpointing
    flops = passes * flops_per_step(config, S, 16) * args.batch_size / world
    return Plan(N, {k: v / 2**30 for k, v in memory.items() if v}, flops, flops / (0.5 * speed) * args.epochs * args.updates_per_epoch)


def estimate(args: argparse.Namespace, config: ModelConfig, T: int, world: int) -> list:
    """Lines on memory and time of this run; with --plan_gpus of the same run on so many GPUs."""
    cases = [(n, args.plan_tflops * 1e12) for n in args.plan_gpus] if args.plan_gpus else [(world, machine_flops(args))]
    lines = []
    for world, speed in cases:
        p = plan(args, config, T, world, speed)
        low_rank = f", {count_parameters(config, args.lora) / 1e6:.2f}M more are trained (rank {args.lora})" if args.lora else ""
        lines += [f"model: {p.parameters / 1e6:.1f}M parameters without text encoder{low_rank}; a clip is {T} frames = "
                  f"{config.layout(T).S_valid} steps ({args.pattern})"] if not lines else []
        lines += [f"memory a rank ({world} in all), about: " + ", ".join(f"{k} {v:.2f}" for k, v in p.memory.items()) +
                  f" = {sum(p.memory.values()):.2f} GiB",
                  f"time, about: {p.flops / 1e9:.0f} GFLOP an update and rank at half of {speed / 1e9:.0f} GFLOP/s = "
                  f"{duration(p.seconds)} for {args.epochs} epochs of {args.updates_per_epoch} updates, "
                  "besides encoding audio and evaluation"]
    return lines


def machine_flops(args: argparse.Namespace) -> float:
    """Measured speed of a matrix product of 1,024 in the training precision, FLOP/s."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    a, times = torch.randn(1024, 1024, device=device, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        linear(a, a)[0, 0].item()                                    # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
