"""Trains a MusicGen: `python train.py`, or `torchrun --nproc_per_node=8 train.py --dataset /music ...`.

Copet et al. 2023 (arXiv:2306.05284), sec. 3. The protocol, spelled in `main`:

    restore
    for each epoch:   train ─► valid (EMA weights) ─► keep_best ─► evaluate, generate (best weights) if due ─► commit

One update: audio ─frozen codec─► codes; captions, chroma, excerpts ─dropouts─► conditions; summed cross-entropy of each codebook over the
micro-batches, divided by the number of targets of all micro-batches and ranks; backward, unscale, clip, step, EMA.
Whatever is random is a function of (seed, step, sample), so ranks, micro-batches and restarts change nothing.

Legend: B batch, K codebooks, T frames.
    python train.py                                         the embedded default: offline, minutes on two CPU cores
    python train.py --dataset ~/music --size small          a folder of audio with captions beside it
    python train.py --dry_run                               what it would take, without allocating it
    python train.py --only evaluate --out runs/toy          a stage alone, of a run that is there, with its best weights
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import chroma
import conditioning
import convert
import data
import distances
import generate
import metrics
import page
import ranks as several
import tokenizer
import toy
from checkpoint import Stop, Stopped
from conditioning import Conditioner, ConditionerConfig
from model import SIZES, ModelConfig, MusicGen, count_parameters, decay_groups, flops_per_step
from ranks import Ranks

REFERENCE_RUN = page.REFERENCE_RUN
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
NEUTRAL = {"out", "device", "workers", "resume", "init_from", "dry_run", "log_every", "evaluate_every", "generate_every", "compile",
           "micro_batch_size", "parallel", "zero", "cpu_offload", "sharded_checkpoint", "save_minutes", "timeout", "checkpointing",
           "epochs", "eval_samples", "generate_samples", "plan_gpus", "plan_tflops", "only", "tensorboard"}  # may change on resume
HERE_ONLY = {"device", "dtype", "workers", "micro_batch_size", "parallel", "zero", "cpu_offload", "compile", "checkpointing", "out",
             "resume", "init_from", "dry_run", "only", "tensorboard", "plan_gpus", "plan_tflops"}           # not taken from a run by --only
CHECKPOINT = {"format", "args", "step", "epoch", "ema_count", "scaler", "skipped", "skipped_in_a_row", "best_ce", "best_values",
              "history", "sums", "data", "log_bytes", "assets", "names", "tensors", "shards"}                # what last.pt holds
ONLY = ("valid", "evaluate", "generate")
PUBLISHED = "published"                                              # stands for the --size of weights that have no name for theirs
PLURALS = dict(text="captions", melody="melodies", style="styles")
DROPOUT_STREAM = 13                                                  # name of a random stream, see conditioning.generator


# ---------------------------------------------------------------------------------------------------------------------
# flags


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
    g.add_argument("--size", default=None, choices=SIZES, help="named size")
    g.add_argument("--pattern", default="delay", choices=("delay", "parallel", "unrolled"), help="codebook pattern")
    g.add_argument("--dropout", type=float, default=0.0, help="dropout in the transformer")
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
    g.add_argument("--compile", action="store_true", help="torch.compile the layers")
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
    on_cuda = tokenizer.check_device(args.device).type == "cuda"
    fill("dtype", "bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32", f"best on {args.device}")
    fill("workers", 0 if kind == "toy" else 4, "synthesis is nearly free" if kind == "toy" else "audio is read from disk")
    fill("micro_batch_size", max(1, args.batch_size // world), "the rank's whole share")
    fill("log_every", max(1, args.updates_per_epoch // 10), "a tenth of an epoch")
    fill("out", f"runs/{Path(args.cache or args.dataset).resolve().stem if kind != 'toy' else 'toy'}", "by dataset")
    return list(notes.values())


def start_defaults(args: argparse.Namespace) -> dict:
    """Flags that follow from what --init_from names; published weights bring their size, codec and text encoder."""
    found = convert.peek(args.init_from) if args.init_from else None
    if found is None:
        return dict(mask_padding=True, freeze_text_encoder=False)
    config, conditioner, published = found
    flags = dict(mask_padding=config.mask_padding, freeze_text_encoder=bool(conditioner and conditioner.text_frozen))
    if published is None:
        return flags
    shape = published_shape(config)
    name = next((name for name, size in SIZES.items() if {**size, "hidden_scale": 4} == shape), PUBLISHED)
    return flags | dict(size=name, fuse=[f"{k}={v}" for k, v in conditioner.fuse.items()], codec=str(convert.locate(args.init_from)),
                        num_codebooks=config.K // published["channels"])


def published_shape(config: ModelConfig) -> dict:
    """Of a model's shape what --size stands for."""
    return {name: getattr(config, name) for name in ("dim", "num_layers", "num_heads", "hidden_scale")}


def size_of(args: argparse.Namespace) -> dict:
    """Width, layers and heads of --size; of published weights that have no such size, theirs."""
    return published_shape(convert.peek(args.init_from)[0]) if args.size == PUBLISHED else SIZES[args.size]


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
    if args.cpu_offload and args.parallel != "fsdp":
        raise ValueError("--cpu_offload moves shards: give --parallel fsdp with it")
    if any(n < 1 for n in args.plan_gpus or ()):
        raise ValueError(f"--plan_gpus {min(args.plan_gpus)}: at least 1")
    if args.emb_std is not None and not 0 < args.emb_std < 100:
        raise ValueError(f"--emb_std {args.emb_std}: more than 0")
    generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)
    low, high = args.style_seconds
    if "style" in args.conditions and not 0 < low <= high < args.segment_seconds:
        raise ValueError(f"--style_seconds {low:g} {high:g}: more than 0, the second not less than the first, both less than the segment "
                         f"of {args.segment_seconds:g} s")
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

    Activations: about 20 D numbers a layer and step are kept for backward (28 D with cross-attention), and three of the
    logits' size in float32. Sharded: all but activations over the ranks, and two layers gathered (ZeRO-3) or all (ZeRO-2)."""
    N, S, B = count_parameters(config), config.layout(T).S_valid - 1, min(args.micro_batch_size, max(1, args.batch_size // world))
    bytes_each = 4 if args.dtype == "float32" else 2
    per_layer = (28 if config.cross_attention else 20) * config.dim
    kept = config.num_layers * (config.dim if args.checkpointing else per_layer) + (per_layer if args.checkpointing else 0)
    sharded = args.parallel == "fsdp" and world > 1
    share = world if sharded else 1
    once = B * world >= args.batch_size                              # else gradients add up whole until the last micro-batch
    memory = dict(weights=4 * N / share, gradients=4 * N / (share if once else 1), optimiser=8 * N / share,
                  EMA=(8 if sharded else 4) * N / share,             # sharded, the best weights stay on the device too
                  gathered=sharded * bytes_each * N * (1 if args.zero == 2 else 2 / config.num_layers),
                  activations=B * S * (kept * bytes_each + 3 * config.K * config.card * 4))
    flops = 3 * flops_per_step(config, S, 16) * args.batch_size / world * (4 / 3 if args.checkpointing else 1)
    return Plan(N, {k: v / 2**30 for k, v in memory.items() if v}, flops, flops / (0.5 * speed) * args.epochs * args.updates_per_epoch)


def estimate(args: argparse.Namespace, config: ModelConfig, T: int, world: int) -> list:
    """Lines on memory and time of this run; with --plan_gpus of the same run on so many GPUs."""
    cases = [(n, args.plan_tflops * 1e12) for n in args.plan_gpus] if args.plan_gpus else [(world, machine_flops(args))]
    lines = []
    for world, speed in cases:
        p = plan(args, config, T, world, speed)
        lines += [f"model: {p.parameters / 1e6:.1f}M parameters without text encoder; a clip is {T} frames = "
                  f"{config.layout(T).S_valid} steps ({args.pattern})"] if not lines else []
        lines += [f"memory a rank ({world} in all), about: " + ", ".join(f"{k} {v:.2f}" for k, v in p.memory.items()) +
                  f" = {sum(p.memory.values()):.2f} GiB",
                  f"time, about: {p.flops / 1e9:.0f} GFLOP an update and rank at half of {speed / 1e9:.0f} GFLOP/s = "
                  f"{duration(p.seconds)} for {args.epochs} epochs of {args.updates_per_epoch} updates"]
    return lines


def machine_flops(args: argparse.Namespace) -> float:
    """Measured speed of a matrix product of 1,024 in the training precision, FLOP/s."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    a, times = torch.randn(1024, 1024, device=device, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                                         # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------------------------------------------------------------
# the run


class Ema:
    """Bias-corrected average of the weights, a model of its own beside the trained one, in float32.

    count = count * decay + 1; weight of the newest = 1 / count: 1, .5025, .3367, ... towards 1 - decay."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.count = copy.deepcopy(model).requires_grad_(False).eval(), decay, 0.0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now; where they are sharded, each rank its own part."""
        self.count = self.count * self.decay + 1
        mine, new = (several.local(m.parameters()) for m in (self.model, model))
        torch._foreach_lerp_(mine, new, 1 / self.count)
        for old, now in zip(self.model.buffers(), model.buffers()):  # statistics are averages already
            old.copy_(now)


@dataclass
class Run:
    """Everything that lives through a training run."""
    args: argparse.Namespace
    ranks: Ranks
    codec: nn.Module
    train_set: object
    valid_set: object
    model: MusicGen
    wrapped: nn.Module                                               # DDP around the model, or the model itself
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    out: Path
    stop: Stop
    history: list                                                    # records of the finished stages
    sums: Tensor                                                     # [2, 2, K] loss and targets: of the epoch, since the last line
    step: int = 0                                                    # updates done
    epoch: int = 0                                                   # epochs done with all their stages
    skipped: int = 0                                                 # updates skipped, in all
    skipped_in_a_row: int = 0
    best_ce: float = math.inf
    best: dict | None = None                                         # averaged weights of the best epoch, sharded as the model is
    best_values: dict | None = None                                  # and what validation said of them
    valid_batches: list | None = None                                # [(codes, frame mask, what counts, attributes)] on the host
    saved_at: float = 0.0                                            # time.monotonic of the last checkpoint
    unwritten: tuple = ()                                            # files that a full disk has kept from being written
    held: int | None = None                                          # the lock on the run folder
    board: object = None                                             # TensorBoard's writer, on rank 0
    drawn_at: float = 0.0                                            # time.monotonic of the last page
    drawing_seconds: float = 1.0                                     # and what it took; at first a guess

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.args.dtype)

    def autocast(self):
        """Autocast in the training precision; nothing in float32."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.ranks.device.type, self.dtype)

    def log(self, record: dict) -> None:
        """Appends a line to log.jsonl; a disk that is full does not end the run, and leaves no half of a line."""
        if self.ranks.is_main:
            path, size = self.out / "log.jsonl", log_size(self)
            try:
                with open(path, "a") as f:
                    f.write(json.dumps(record) + "\n")
            except OSError as error:
                print(f"a line of {path} was not written ({error})", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
            if self.board is not None:
                page.show_record(self.board, record)


def build_conditioner(args: argparse.Namespace, train_set, codec, ranks: Ranks, saved: dict | None) -> Conditioner | None:
    """The conditioner, with the vocabulary of the checkpoint, or one fitted to the captions of the training set."""
    if not (methods := fuses(args)):
        return None
    shape, assets = condition_shapes(args, codec), {}
    if "text" in methods:
        if saved is not None:                                        # captions may have changed since
            pieces = fitting(Path(args.out), conditioning.unpack, saved["assets"]["text"])
            fitting(Path(args.out), conditioning.vocabulary_size, pieces)
        else:
            pieces = conditioning.fit_sentencepiece(sample_captions(args, train_set), args.text_vocab)
        assets["text"], shape["text_vocab"] = pieces, conditioning.vocabulary_size(pieces)
        if stored := (saved or {}).get("conditioner_config"):        # T5 has another shape than ours, and more rows than pieces
            shape |= {name: value for name, value in stored.items() if name.startswith("text_")}
        elif shape["text_vocab"] < args.text_vocab:
            ranks.print(f"text: {shape['text_vocab']} pieces, not {args.text_vocab}: the captions hold no more")
        shape["text_frozen"] = args.freeze_text_encoder
    return Conditioner(ConditionerConfig(fuse=methods, **shape), size_of(args)["dim"], assets)


def condition_shapes(args: argparse.Namespace, codec) -> dict:
    """What the melody's and the style's conditioners look like: by the segment, the codec and the model's size."""
    size, (low, high) = size_of(args), style_frames(args, codec)
    bins = min(1024, max(16, args.batch_size * (low + high) // 4))  # some frames of every update fall to each
    hop, width = chroma.hop_length(codec.sample_rate), min(512, size["dim"])
    return dict(melody_frames=chroma.count_frames(round(args.segment_seconds * codec.sample_rate), codec.sample_rate),
                melody_rate=codec.hop / hop, melody_argmax=args.melody_argmax, melody_stems=args.melody_stems,
                style_codebooks=min(3, codec.K), style_card=codec.card, style_dim=width, style_heads=max(1, width // 64),
                style_layers=min(8, size["num_layers"] // 2), style_levels=args.style_levels, style_bins=bins,
                style_every=max(1, min(round(codec.frame_rate / 5), low // 4)),        # 5 a second; of a short excerpt at least 4
                style_frames=(low + high) // 2)


def style_frames(args: argparse.Namespace, codec) -> tuple[int, int]:
    """Least and most frames of a style excerpt."""
    return tuple(max(1, round(seconds * codec.frame_rate)) for seconds in args.style_seconds)


def sample_captions(args: argparse.Namespace, train_set, limit: int = 20_000) -> list:
    """Captions of the training set to fit the vocabulary on, metadata merged in both ways."""
    if args.dataset == "toy" and args.cache is None:
        return [toy.draw(args.seed, 0, i)[1] for i in range(4000)]
    texts = []
    for entry in train_set.files[:limit]:
        texts += [conditioning.describe(entry.meta) or "", conditioning.describe({**entry.meta, "description": None}) or ""]
    return texts


def open_data(args: argparse.Namespace, found, codec, ranks: Ranks) -> list:
    """The training and validation sets, with a line on each. found: the dataset's name or what scanning it gave."""
    sets = [data.open_dataset(found, args.valid, split, args.segment_seconds, codec, args.seed, args.min_segment_ratio,
                              args.cache, "melody" in args.conditions, args.melody_stems) for split in ("train", "valid")]
    if isinstance(found, data.Scan):
        for line in data.skip_lines(found.skipped):
            ranks.print(f"skipped: {line}")
    for split, each in zip(("train", "valid"), sets):
        ranks.print(f"{split}: {each.describe()}")
    return sets


def build(args: argparse.Namespace, ranks: Ranks, codec, found, out: Path, saved: dict | None, stop: Stop,
          start: dict | None = None) -> Run:
    """Allocates model, average and optimiser. Every rank draws the same initial weights from the seed.

    found: the dataset's name or what scanning it gave; saved: the checkpoint that `restore` will go on from; start: what
    `read_start` gave."""
    train_set, valid_set = open_data(args, found, codec, ranks)
    torch.manual_seed(args.seed)
    config, dtype = model_config(args, codec), getattr(torch, args.dtype)
    sharded = args.parallel == "fsdp" and ranks.world > 1
    with torch.device("cpu" if start is None else "meta"):           # without storage where it takes the tensors of another
        model = MusicGen(config, build_conditioner(args, train_set, codec, ranks, saved or start))
    if start is not None:
        load_start(model, start, args.init_from)
    if args.freeze_text_encoder:
        model.conditioner.parts["text"].encoder.requires_grad_(False)
    model = model if sharded else model.to(ranks.device)             # sharding moves a layer at a time
    model.transformer.checkpointing = args.checkpointing
    ema = Ema(model, args.ema_decay)
    if args.compile:
        for layer in model.transformer.layers:
            layer.compile()
    if sharded:
        several.shard(model, ranks, dtype, args.zero, args.cpu_offload)
        several.shard(ema.model, ranks, dtype, 3, args.cpu_offload)  # no backward pass will let go of what it gathers
    wrapped = several.wrap(model, ranks, args.parallel)
    optimizer = torch.optim.AdamW(optimizer_groups(model, args), args.lr, (args.beta1, args.beta2), fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16")
    sums = torch.zeros(2, 2, config.K, device=ranks.device, dtype=torch.float64)
    return Run(args, ranks, codec, train_set, valid_set, model, wrapped, ema, optimizer, scaler, out, stop, [], sums)


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


def model_config(args: argparse.Namespace, codec) -> ModelConfig:
    """The language model's shape from the flags and the codec."""
    cross = any("cross" in method for method in fuses(args).values())
    level = [k // codec.lanes for k in range(codec.K)] if codec.lanes > 1 else None      # 0 0 1 1 ..: left and right at once
    return ModelConfig(K=codec.K, card=codec.card, dropout=args.dropout, cross_attention=cross, pattern=args.pattern,
                       emb_std=args.emb_std, delays=level if args.pattern == "delay" else None,
                       flattening=level if args.pattern == "unrolled" else None, mask_padding=args.mask_padding, **size_of(args))


def read_start(args: argparse.Namespace, config: ModelConfig, codec) -> dict | None:
    """Weights ("model") and vocabulary ("assets") of the run that --init_from names, for a model of `config` over `codec`.

    A run over one channel of a codec that interleaves two starts them both ("copies" is 2): see `both_channels`.
    Errors: ValueError naming what differs, there and here."""
    if args.init_from is None:
        return None
    start = generate.read_deployment(args.init_from)
    try:
        theirs = fixed_shape(ModelConfig(**start["model_config"]), (start["conditioner_config"] or {}).get("fuse"))
        stored = dict(channels=1) | start["codec"]                   # older files: mono
        their_codes = "codes {K} of {name} (channels {channels}, {fingerprint:.12})".format(**stored)
        weights, assets = start["model"], start["assets"]
        if "text" in (theirs["conditions"] or ()):
            conditioning.vocabulary_size(conditioning.unpack(assets["text"]))
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{args.init_from}: not {generate.WHAT}, or damaged ({tokenizer.reason(error)})") from None
    mine = fixed_shape(config, fuses(args) or None)
    differ = [f"{k} {theirs[k]} there, {v} here" for k, v in mine.items() if theirs[k] != v]
    one = codec.over(codec.channels // codec.lanes)                  # the same codec over one of its interleaved channels
    copies = {one.fingerprint: codec.lanes, codec.fingerprint: 1}.get(stored["fingerprint"])
    if copies is None:
        differ.append(f"{their_codes} there, codes {codec.K} of {codec.name} (channels {codec.channels}, "
                      f"{codec.fingerprint:.12}) here")
    if (copies or 1) > 1 and "style" in fuses(args):
        differ.append("a style read from one channel there, from two here")
    if differ:
        raise ValueError(f"--init_from {args.init_from} does not fit: {'; '.join(differ)}. Give the flags it was trained with")
    return dict(model=weights, assets=assets, copies=copies, conditioner_config=start["conditioner_config"])


def load_start(model: MusicGen, start: dict, where: str) -> None:
    """Fills a new model with the weights of `read_start`. Errors: ValueError where a name or a shape is another."""
    try:
        weights = both_channels(start["model"], start["copies"])
        found = {name: list(x.shape) for name, x in weights.items()}
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"--init_from {where}: its weights are damaged ({tokenizer.reason(error)})") from None
    wanted = {name: list(x.shape) for name, x in model.state_dict().items()}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise ValueError(f"--init_from {where}: weights are not what this model has: {wrong[0]} is {found.get(wrong[0])} there, "
                         f"{wanted.get(wrong[0])} here ({len(wrong)} differ)")
    model.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)


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


def segment_frames(args: argparse.Namespace, codec) -> int:
    """Frames T of a training segment."""
    return math.ceil(round(args.segment_seconds * codec.sample_rate) / codec.hop)


# ---------------------------------------------------------------------------------------------------------------------
# stages


def lr_at(step: int, args: argparse.Namespace) -> float:
    """Learning rate of update `step` (from 0): linear warm-up that starts above zero, then a cosine to the minimum."""
    total = args.epochs * args.updates_per_epoch
    if step < args.warmup_steps:
        return args.lr * (step + 1) / (args.warmup_steps + 1)
    done = min(1.0, (step - args.warmup_steps) / max(1, total - args.warmup_steps))
    return args.lr * (args.lr_min_ratio + (1 - args.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def to_codes(run: Run, batch: data.Batch) -> tuple[Tensor, Tensor]:
    """Codes [B,K,T] and frame mask [B,T] of a batch on the device."""
    device = run.ranks.device
    codes = run.codec.encode(batch.wav.to(device)) if batch.codes is None else batch.codes.to(device, torch.long)
    return codes, batch.frame_mask.to(device)


def micro_batches(run: Run, examples: list) -> list:
    """A rank's share of an update: the arguments of MusicGen.forward, of each micro-batch."""
    args, conditioner, device = run.args, run.model.conditioner, run.ranks.device
    codes, mask = to_codes(run, data.collate(examples))
    attributes, keys, learnt, step = [], None, mask, 0 if args.overfit_one_batch else run.step
    if args.dropout > 0:
        draws = [conditioning.generator(args.seed, DROPOUT_STREAM, step, e.index).integers(2**31) for e in examples]
        keys = torch.tensor(draws, dtype=torch.int32, device=device)                                    # [B]
    if conditioner is not None:
        merge = dict(merge_text_p=args.merge_text_p, drop_desc_p=args.drop_desc_p, keep_other_p=args.keep_other_p)
        alone = {name: getattr(args, f"{name}_dropout") for name in conditioner.names}
        rngs = [conditioning.generator(args.seed, conditioning.STYLE_STREAM, step, e.index) for e in examples]
        given, places = beside_text(run, examples, codes, rngs)
        attributes = [conditioning.training_attributes(e.meta, conditioner.names, args.seed, step, e.index, args.cfg_dropout, alone,
                                                       args.word_dropout, merge, more) for e, more in zip(examples, given)]
        learnt = without_excerpts(mask, [place if a.get("style") is not None else (0, 0) for a, place in zip(attributes, places)])
    parts = [slice(i, i + args.micro_batch_size) for i in range(0, len(examples), args.micro_batch_size)]
    return [(codes[p], mask[p], prepare(run.model, attributes[p], device), None if keys is None else keys[p], learnt[p])
            for p in parts]


def beside_text(run: Run, examples: list, codes: Tensor, rngs: list) -> tuple[list, list]:
    """(melody and style of each example, (start, stop) of its style excerpt) from codes [B,K,T]. rngs: None is the middle."""
    names, (low, high) = run.model.conditioner.names, style_frames(run.args, run.codec)
    places = [conditioning.excerpt(e.frames, low, high, rng) for e, rng in zip(examples, rngs)]
    given = [{"melody": e.chroma, "style": row[:, slice(*place)].clone()} for e, row, place in zip(examples, codes, places)]
    return [{name: value for name, value in each.items() if name in names} for each in given], places


def in_full(run: Run, examples: list, codes: Tensor) -> tuple[list, list | None]:
    """(all conditions of each example, nothing dropped, {name: value}; places of style excerpts, the middle of each clip, or None)."""
    given, places = [{} for _ in examples], None
    if run.model.conditioner is not None:
        given, places = beside_text(run, examples, codes, [None] * len(examples))
    return [{"text": conditioning.describe(e.meta), **more} for e, more in zip(examples, given)], places


def without_excerpts(mask: Tensor, places: list) -> Tensor:
    """Frames [B,T] less those of style excerpts [(start, stop)]: the model has read them already, and would learn to copy."""
    frames = torch.arange(mask.shape[1])
    shown = torch.stack([(start <= frames) & (frames < stop) for start, stop in places])
    return mask & ~shown.to(mask.device, non_blocking=True)


def prepare(model: MusicGen, attributes: list, device) -> dict | None:
    """Conditions of a micro-batch as the model takes them."""
    return None if model.conditioner is None else model.conditioner.prepare(attributes, device)


def update(run: Run, micros: list) -> tuple[Tensor, Tensor, float]:
    """One optimiser step. Returns the rank's summed loss [K], the targets of all ranks [K] and the gradient norm."""
    args, model = run.args, run.model
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(run.step, args) * group["lr_scale"]
    counts = run.ranks.sum(sum(model.count_targets(learnt) for *_, learnt in micros)).clamp_min(1)      # [K]
    sums = torch.zeros(model.config.K, device=run.ranks.device)
    for i, micro in enumerate(micros):
        with several.synchronised(run.wrapped, last=i == len(micros) - 1):
            with run.autocast():
                part = run.wrapped(*micro)                                                              # [K]
            loss = (part / counts).mean() * run.ranks.world          # gradients are averaged over ranks: undo the division
            run.scaler.scale(loss).backward()
        sums += part.detach()
    run.scaler.unscale_(run.optimizer)
    norm = several.whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if args.max_grad_norm and norm.isfinite():                       # what is not finite stays where it is, to be named
        nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, norm)
    norm = float(norm)
    if math.isfinite(norm) or run.scaler.is_enabled():               # the scaler itself skips what is not finite
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if model.conditioner is not None:
        model.conditioner.learn(run.ranks.sum, keep=math.isfinite(norm))
    count_skipped(run, norm, sums)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.step % args.ema_every == 0:
        run.ema.update(model)
    return sums, counts, norm


def count_skipped(run: Run, norm: float, sums: Tensor) -> None:
    """Counts updates whose gradients were not finite, and says where. Every rank sees the same norm.

    Errors: FloatingPointError after `--max_skipped` in a row, or at once if a weight itself is not finite."""
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        return
    run.skipped += 1
    run.skipped_in_a_row += 1
    weights, losses, gradients = (found_first(run.ranks, name) for name in (
        first_bad(run.model.named_parameters()),
        next((f"loss of codebook {k}" for k, x in enumerate(sums.tolist(), 1) if not math.isfinite(x)), None),
        first_bad((name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None)))
    where = f"step {run.step + 1}: gradients not finite; first in " + "; ".join(filter(None, (losses, gradients)))
    if weights:
        raise FloatingPointError(f"step {run.step + 1}: weights not finite; first in {weights}; go on from an earlier checkpoint")
    if run.skipped_in_a_row >= run.args.max_skipped:
        raise FloatingPointError(f"{where}; {run.skipped_in_a_row} times in a row; try a lower --lr or --dtype float32")
    if not run.scaler.is_enabled() or run.skipped_in_a_row > 1:      # a scaler that looks for its scale is nothing to report
        run.ranks.print(f"{where}; this update is skipped")


def first_bad(named) -> str | None:
    """The first name whose tensor (this rank's part of it) is not finite."""
    return next((name for name, x in named if not several.local([x.detach()])[0].isfinite().all()), None)


def found_first(ranks: Ranks, name: str | None) -> str | None:
    """The first rank that found something, with it: "NAME (rank 1)"."""
    return next((f"{found} (rank {rank})" for rank, found in enumerate(ranks.gather(name)) if found), None)


def figures(sums: Tensor, counts: Tensor) -> dict:
    """Summed loss and targets of each codebook -> {"ce", "ppl", "ce_q1", "ppl_q1", ...}."""
    each = (sums / counts.clamp_min(1)).tolist()
    ce = sum(each) / len(each)
    result = dict(ce=ce, ppl=math.exp(min(ce, 80.0)))
    for k, value in enumerate(each, 1):
        result |= {f"ce_q{k}": value, f"ppl_q{k}": math.exp(min(value, 80.0))}
    return result


def show(values: dict) -> str:
    """`ce 4.812 | q1 4.100 q2 ...`"""
    codebooks = [k for k in values if k.startswith("ce_q")]
    return f"ce {values['ce']:.4f} | " + " ".join(f"{k[3:]} {values[k]:.3f}" for k in codebooks)


def train_stage(run: Run) -> dict:
    """The rest of an epoch's updates; a log line every `--log_every`, a checkpoint every `--save_minutes`.

    Errors: Stopped, after a checkpoint, where a signal asked any rank to end."""
    args, ranks, epoch = run.args, run.ranks, run.epoch
    start = run.step - epoch * args.updates_per_epoch
    run.wrapped.train()
    first = (0, 0) if args.overfit_one_batch else (epoch, start)
    loader = data.batches(run.train_set, *first, args.updates_per_epoch, args.batch_size, ranks.rank, ranks.world, args.workers)
    fixed = micro_batches(run, next(loader)) if args.overfit_one_batch else None
    began = marked = time.perf_counter()
    timed = 0                                                        # updates since `marked`
    for position in tqdm(range(start + 1, args.updates_per_epoch + 1), f"epoch {epoch + 1}", leave=False,
                         disable=not (ranks.is_main and sys.stderr.isatty())):
        sums, counts, norm = update(run, fixed or micro_batches(run, next(loader)))
        run.sums += torch.stack([sums, counts / ranks.world])        # counts are of all ranks already
        timed += 1
        last = position == args.updates_per_epoch
        if last or position % args.log_every == 0:
            log_step(run, norm, (time.perf_counter() - marked) / timed)
            marked, timed = time.perf_counter(), 0
        stop, due = ranks.any(run.stop.requested is not None, time.monotonic() - run.saved_at >= 60 * args.save_minutes)
        if not last and (stop or due):                               # the end of an epoch has its own checkpoint
            commit(run)
            if stop:
                raise Stopped(next(filter(None, ranks.gather(run.stop.requested))))
    values = figures(*ranks.sum(run.sums[0].clone()))
    run.sums.zero_()
    return values | dict(skipped=run.skipped, seconds=time.perf_counter() - began)


def log_step(run: Run, norm: float, seconds: float) -> None:
    """The line of the updates since the last one, on the console and in log.jsonl."""
    args, frames = run.args, segment_frames(run.args, run.codec)
    values = figures(*run.ranks.sum(run.sums[1].clone()))
    run.sums[1].zero_()
    record = dict(kind="step", stage="train", epoch=run.epoch + 1, step=run.step, **values, grad_norm=norm,
                  lr=lr_at(run.step - 1, args), seconds=seconds, frames_per_second=args.batch_size * frames / seconds,
                  skipped=run.skipped)
    run.log(record)
    run.ranks.print(f"epoch {run.epoch + 1} step {run.step} | {show(values)} | norm {norm:.2f} | lr {record['lr']:.1e} | "
                    f"{seconds * 1000:.0f} ms | {record['frames_per_second'] / 1000:.1f}k frames/s" +
                    (f" | skipped {run.skipped}" if run.skipped else ""))


def valid_source(run: Run):
    """What validation reads: the held-out clips, or the only batch there is."""
    return run.train_set if run.args.overfit_one_batch else run.valid_set


def load_valid(run: Run) -> list:
    """This rank's share of the validation set, encoded once and kept on the host as [(codes, mask, what counts, attributes)].

    A style excerpt is the middle of its clip, and does not count in the loss, whatever conditions are then given. Which segments
    it has depends on the flags alone: --valid_samples, rounded up to whole batches."""
    if run.valid_batches is None:
        args, ranks = run.args, run.ranks
        run.valid_batches = []
        for examples in data.batches(valid_source(run), 0, 0, math.ceil(args.valid_samples / args.batch_size), args.batch_size, ranks.rank,
                                     ranks.world, args.workers):
            for i in range(0, len(examples), args.micro_batch_size):
                part = examples[i:i + args.micro_batch_size]
                codes, mask = (x.cpu() for x in to_codes(run, data.collate(part)))
                attributes, places = in_full(run, part, codes)
                counted = without_excerpts(mask, places) if places and "style" in run.model.conditioner.names else mask
                run.valid_batches.append((codes, mask, counted, attributes))
    return run.valid_batches


@torch.no_grad()
def mean_loss(run: Run, model: MusicGen, change=lambda attributes: attributes) -> dict:
    """Figures of a model over the validation set; `change` may alter the list of all its conditions."""
    model.eval()
    totals = torch.zeros(2, model.config.K, device=run.ranks.device, dtype=torch.float64)
    batches = load_valid(run)
    attributes = iter(run.ranks.change_all([a for *_, part in batches for a in part], run.args.batch_size, change))
    for codes, mask, counted, part in batches:
        codes, mask, counted = (x.to(run.ranks.device) for x in (codes, mask, counted))
        with run.autocast():
            sums = model(codes, mask, prepare(model, [next(attributes) for _ in part], run.ranks.device), None, counted)
        totals += torch.stack([sums, model.count_targets(counted)])
    return figures(*run.ranks.sum(totals))


def valid_stage(run: Run) -> dict:
    """Cross-entropy of the averaged weights on the validation set."""
    began = time.perf_counter()
    return mean_loss(run, run.ema.model) | dict(seconds=time.perf_counter() - began)


def keep_best(run: Run, values: dict) -> None:
    """Keeps the averaged weights, and writes best.pt, if the validation loss is the lowest so far."""
    if values["ce"] < run.best_ce:
        run.best_ce, run.best_values = values["ce"], values
        run.best = {name: several.copy_of(x) for name, x in several.named(run.ema.model).items()}
        write_best(run)


def write_best(run: Run) -> None:
    """Writes best.pt; where the disk is full it says so, and the next checkpoint tries again."""
    content = deployment(run, keep=run.ranks.is_main)
    note_written(run, "best.pt", attempt(checkpoint.write, run.out / "best.pt", content) if run.ranks.is_main else None)


def deployment(run: Run, keep: bool = True) -> dict:
    """The content of best.pt: plain tensors and plain data, all that generating takes but the codec. All ranks call it;
    those that do not `keep` the weights get none."""
    model, args, codec = run.model, run.args, run.codec
    conditioner = model.conditioner
    weights = run.best or several.named(run.ema.model)               # none yet where every validation was not finite
    return dict(format=generate.FORMAT, model=several.gather_state(weights, keep), model_config=asdict(model.config),
                conditioner_config=None if conditioner is None else asdict(conditioner.config),
                assets=stored_assets(model),
                codec=codec.reference,
                segment_frames=segment_frames(args, codec),
                sampling=asdict(generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)),
                metrics=dict(run.best_values or {}), step=run.step, args=vars(args))


def stored_assets(model: MusicGen) -> dict:
    """What the conditioners need beside weights, {name: bytes as a uint8 tensor}: no file holds more than plain tensors."""
    assets = {} if model.conditioner is None else model.conditioner.assets
    return {name: conditioning.pack(content) for name, content in assets.items()}


def best_music(run: Run) -> generate.MusicGenerator:
    """The best weights as a whole model on every rank, with the run's sampling settings. All ranks call it."""
    content = deployment(run)
    return generate.MusicGenerator(generate.build_model(content).to(run.ranks.device), run.codec, content["segment_frames"],
                                   generate.Sampling(**content["sampling"]), run.dtype)


def evaluate_stage(run: Run) -> dict:
    """What each condition is worth to the loss; how near generated clips are to real ones; on the toy set, how well they follow their
    captions."""
    began, music = time.perf_counter(), best_music(run)
    model, result = music.model, mean_loss(run, music.model)
    names = model.conditioner.names if model.conditioner is not None else []
    for name in names:
        without = mean_loss(run, model, lambda a: [{**x, name: None} for x in a])["ce"]
        others = mean_loss(run, model, lambda a: [{**x, name: y[name]} for x, y in zip(a, a[1:] + a[:1])])["ce"]
        result |= {f"ce_no_{name}": without, f"ce_shuffled_{name}": others}
        run.ranks.print(f"evaluate: ce {result['ce']:.4f} with {PLURALS[name]}, {without:.4f} without, "
                        f"{others:.4f} with those of other clips")
    if len(names) > 1:
        result["ce_no_conditions"] = mean_loss(run, model, lambda a: [dict.fromkeys(x) for x in a])["ce"]
        run.ranks.print(f"evaluate: ce {result['ce_no_conditions']:.4f} without any condition")
    if run.args.dataset == "toy" and "text" in names:
        result["adherence"] = toy_adherence(run, music)
    if run.args.dataset == "toy" and set(names) - {"text"}:
        result["given"] = metrics.toy_conditions(music, run.args.eval_samples, run.args.seed, ranks=run.ranks)
        run.ranks.print(metrics.conditions_table(result["given"], f"{run.args.eval_samples} clips, given"))
    result["distances"] = held_out_distances(run, music)
    return result | dict(seconds=time.perf_counter() - began)


def toy_adherence(run: Run, music: generate.MusicGenerator) -> dict:
    """Caption adherence on combinations of values seen in training and on those held out; prints both tables."""
    args, result = run.args, {}
    for split, title in (("valid", "combinations seen in training"), ("heldout", "combinations held out")):
        table = metrics.toy_captions(music, split, args.eval_samples, args.seed, ranks=run.ranks)
        run.ranks.print(metrics.adherence_table(table, f"{args.eval_samples} clips, {title}"))
        result[split] = {k: v for k, v in table.items() if k != "heard"}
    return result


def held_out(run: Run, music: generate.MusicGenerator, first: int, stop: int) -> tuple[list, list]:
    """Validation clips first..stop-1: the audio [C,N] of each, without padding, and its conditions {name: value}.

    A token cache has no audio: then it is what the codec makes of its codes. Errors: ValueError where one cannot be read."""
    examples = data.fetch(valid_source(run), 0, stop - first, first)
    if isinstance(examples, ValueError):
        raise examples
    codes, _ = to_codes(run, data.collate(examples))
    wavs = run.codec.decode(codes).cpu() if examples[0].wav is None else [torch.from_numpy(e.wav) for e in examples]
    names = music.model.conditioner.names if music.model.conditioner is not None else []
    conditions = [{name: a[name] for name in names} for a in in_full(run, examples, codes)[0]]
    return [wav[:, :e.frames * run.codec.hop] for wav, e in zip(wavs, examples)], conditions


def held_out_distances(run: Run, music: generate.MusicGenerator) -> dict:
    """Distances of clips generated for the conditions of validation clips from these; prints them. All ranks call it."""
    args, n = run.args, run.args.eval_samples

    def make(first: int, stop: int) -> tuple[list, list]:
        real, conditions = held_out(run, music, first, stop)
        wavs = run.codec.decode(music.codes(conditions, args.segment_seconds, seed=args.seed + first)).cpu()
        return real, [wav[:, :x.shape[1]] for wav, x in zip(wavs, real)]

    heard = args.dataset == "toy" and args.cache is None and args.segment_seconds * toy.SAMPLE_RATE >= toy.LEAST
    names = music.model.conditioner.names if music.model.conditioner is not None else []
    found = metrics.against_reference(make, n, run.codec, ranks=run.ranks, labels=heard, tunes="melody" in names)
    run.ranks.print(distances.table(found, f"{n} clips beside validation clips"))
    if args.cache is not None:
        run.ranks.print("(a cache has no audio: validation clips are as the codec decodes them, and the ceiling counts it twice)")
    return found


def generate_stage(run: Run, folder: str) -> dict:
    """Writes samples for the conditions of fixed validation clips, wav and json, under samples/FOLDER: see page.py. Once, under
    samples/reference, the clips themselves."""
    args, began = run.args, time.perf_counter()
    if not run.ranks.is_main or args.generate_samples == 0:
        deployment(run, keep=False)                                  # lends its shards to rank 0
        return {}
    music = best_music(run)
    real, conditions = held_out(run, music, 0, args.generate_samples)
    record = dict(seed=args.seed, epoch=run.step // args.updates_per_epoch, step=run.step, seconds=args.segment_seconds,
                  **asdict(music.sampling))
    sets = references(run, real) | make_samples(run, music, real, conditions)
    note_written(run, "samples", attempt(write_samples, run, folder, sets, conditions, record), shared=False)
    return dict(samples=sum(map(len, sets.values())), folder=str(run.out / "samples" / folder), seconds=time.perf_counter() - began)


def make_samples(run: Run, music: generate.MusicGenerator, real: list, conditions: list) -> dict:
    """{kind: audio [B,C,N]} for the conditions of clips, the same seed for all: see page.KINDS."""
    args, quarter = run.args, segment_frames(run.args, run.codec) // 4 * run.codec.hop                   # samples
    asked = {"unprompted": dict(attributes=conditions)} if any(conditions) else {}
    if quarter:
        begun = [nn.functional.pad(wav[:, :quarter], (0, max(0, quarter - wav.shape[1]))) for wav in real]
        asked["prompted"] = dict(attributes=conditions, prompt=torch.stack(begun))
    asked["unconditional"] = dict(attributes=[dict.fromkeys(c) for c in conditions])
    return {kind: run.codec.decode(music.codes(seconds=args.segment_seconds, seed=args.seed, **how)).cpu() for kind, how in asked.items()}


def references(run: Run, real: list) -> dict:
    """Clips as they are, and through the codec."""
    return {"reference": real, "codec": [distances.reconstruction(wav, run.codec) for wav in real]}


def write_samples(run: Run, folder: str, sets: dict, conditions: list, record: dict) -> None:
    """{kind: audio} with its settings as NNN_KIND.wav and .json; `given` names the conditions it had. A reference is written once."""
    samples = run.out / "samples"
    for i, clip in enumerate(conditions):
        for kind, wavs in sets.items():
            once, name = kind in ("reference", "codec"), f"{i:03d}_{kind}"
            if once and (samples / "reference" / f"{name}.json").is_file():
                continue
            made = {} if once else dict(record, given=[k for k, v in clip.items() if v is not None and kind != "unconditional"])
            if kind == "prompted":
                made["prompt_seconds"] = segment_frames(run.args, run.codec) // 4 / run.codec.frame_rate
            place = samples / ("reference" if once else folder)
            page.write_sample(place, name, wavs[i], run.codec.sample_rate, dict(prompt=clip.get("text"), kind=kind, **made))
            if run.board is not None:
                page.show_sample(run.board, name, place / f"{name}.wav", run.step)
        kinds = ",".join(k for k in sets if k not in ("reference", "codec"))
        print(f"wrote {samples / folder / f'{i:03d}'}_{{{kinds}}}.wav: {clip.get('text')}", flush=True)


def draw_page(run: Run, final: bool) -> None:
    """Writes index.html, on rank 0. Epochs so short that it would take over a twentieth of the time share one; the last has its own."""
    if not run.ranks.is_main or not final and time.monotonic() - run.drawn_at < 20 * run.drawing_seconds:
        return
    began = time.monotonic()
    note_written(run, page.NAME, attempt(page.write, run.out), shared=False)
    run.drawn_at = time.monotonic()
    run.drawing_seconds = run.drawn_at - began


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def attempt(action, *arguments) -> str | None:
    """Does something that writes to the disk; what went wrong, or None."""
    try:
        action(*arguments)
    except (OSError, RuntimeError, ValueError) as error:             # torch and write_audio report a full disk as the latter two
        return tokenizer.reason(error)
    return None


def note_written(run: Run, name: str, problem: str | None, shared: bool = True) -> None:
    """Remembers on every rank (`shared`) what could not be written on any, and says so."""
    problem = next(filter(None, run.ranks.gather(problem)), None) if shared else problem
    if problem:
        run.ranks.print(f"{name} was not written: {problem}; the one before is kept and the run goes on")
    run.unwritten = tuple(n for n in run.unwritten if n != name) + ((name,) if problem else ())


def tensors(run: Run) -> dict:
    """Every tensor that resuming takes, as it lies on this rank: {"model/out_norm.weight": tensor, "optimizer/exp_avg/..": ..}."""
    names = {p: name for name, p in run.model.named_parameters()}
    found = {f"model/{name}": x for name, x in several.named(run.model).items()}
    found |= {f"ema/{name}": x for name, x in several.named(run.ema.model).items()}
    found |= {f"best/{name}": x for name, x in (run.best or {}).items()}
    return found | {f"optimizer/{key}/{names[p]}": x for p, state in run.optimizer.state.items() for key, x in state.items()}


def commit(run: Run) -> None:
    """Writes last.pt; the one before becomes last.prev.pt. A disk that is full keeps both, and the next save tries again."""
    if "best.pt" in run.unwritten:
        write_best(run)
    run.saved_at = time.monotonic()
    every, shards, problem = tensors(run), None, None
    sums = run.ranks.sum(run.sums.clone())
    if run.args.sharded_checkpoint:
        try:
            shards, whole = checkpoint.save_shards(run.out, every, run.ranks), None
        except OSError as error:
            problem = str(error)
    else:
        whole = several.gather_state(every, keep=run.ranks.is_main)
    if run.ranks.is_main and problem is None:
        content = dict(
            format=generate.FORMAT, args=vars(run.args), step=run.step, epoch=run.epoch, ema_count=run.ema.count,
            scaler=run.scaler.state_dict(), skipped=run.skipped, skipped_in_a_row=run.skipped_in_a_row, best_ce=run.best_ce,
            best_values=run.best_values, history=run.history, sums=sums.cpu(), data=run.train_set.describe(),
            log_bytes=flush_log(run), assets=stored_assets(run.model),
            conditioner_config=asdict(run.model.conditioner.config) if run.model.conditioner else None,
            names=list(every), tensors=whole, shards=shards)
        problem = attempt(checkpoint.write, run.out / checkpoint.LAST, content, run.out / checkpoint.PREVIOUS)
        checkpoint.drop_unnamed_shards(run.out)
    note_written(run, checkpoint.LAST, problem)


def log_size(run: Run) -> int:
    """Bytes of log.jsonl, for `cut_log` to cut off what comes after."""
    path = run.out / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def flush_log(run: Run) -> int:
    """Makes log.jsonl last before a checkpoint counts on its bytes; their number."""
    with contextlib.suppress(OSError), open(run.out / "log.jsonl", "rb") as f:
        os.fsync(f.fileno())
    return log_size(run)


def read_checkpoint(args: argparse.Namespace, ranks: Ranks, out: Path) -> dict | None:
    """The folder's newest whole checkpoint, if there is one to go on from. Rank 0 chooses it.

    Errors: ValueError if its flags differ in what matters, naming the differences, or if none that is there can be read."""
    name, lines, problem = None, [], None
    if ranks.is_main:
        try:
            name, lines = checkpoint.newest(out, generate.FORMAT, CHECKPOINT)
        except ValueError as error:
            problem = str(error)
    name, lines, problem = ranks.first((name, lines, problem))
    ranks.print(*lines)
    if problem:
        raise ValueError(problem)
    if name is None:
        return None
    saved = checkpoint.read(out / name, check=False)                 # rank 0 has just done that
    if refused := [f"--{k} {saved['args'][k]} there, {v} now" for k, v in changed_flags(args, saved).items()
                   if k not in NEUTRAL]:
        raise ValueError(f"{out} holds another run: {'; '.join(refused)}. Give the same flags, or another --out")
    return saved


def changed_flags(args: argparse.Namespace, saved: dict) -> dict:
    """Flags whose value is not the checkpoint's: {name: value now}."""
    return {k: v for k, v in vars(args).items() if k in saved["args"] and saved["args"][k] != v}


def restore(run: Run, saved: dict) -> None:
    """Goes on from a checkpoint, and prints the epochs it holds."""
    allocate(run, saved["names"])
    if saved["shards"]:
        checkpoint.load_shards(run.out, saved["shards"], tensors(run), run.ranks)
    else:
        several.fill(tensors(run), saved["tensors"])
    run.scaler.load_state_dict(saved["scaler"])
    run.ema.count, run.step, run.epoch, run.history = (saved[k] for k in ("ema_count", "step", "epoch", "history"))
    run.skipped, run.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
    run.best_ce, run.best_values = saved["best_ce"], saved["best_values"]
    if run.ranks.is_main:
        run.sums.copy_(saved["sums"])                                # of all ranks: one has them, the sum is the same
    changed = "".join(f"; --{k} is {v} now" for k, v in changed_flags(run.args, saved).items())
    run.ranks.print(f"going on from step {run.step}{changed}")
    if (now := run.train_set.describe()) != saved["data"]:
        run.ranks.print(f"the data are not what they were: {saved['data']} then, {now} now")
    for record in run.history:
        run.ranks.print(summary(record))


def allocate(run: Run, names: list) -> None:
    """Makes the tensors that a checkpoint has and a new run has not yet: the optimiser's and the best weights."""
    params = dict(run.model.named_parameters())
    for name in names:
        group, _, rest = name.partition("/")
        if group == "optimizer":
            key, _, rest = rest.partition("/")
            like = params[rest]
            run.optimizer.state[like][key] = torch.zeros((), device=like.device) if key == "step" else torch.zeros_like(like)
    if any(name.startswith("best/") for name in names):
        run.best = {name: several.copy_of(x) for name, x in several.named(run.ema.model).items()}


def cut_log(path: Path, size: int) -> None:
    """Drops what a killed run wrote to log.jsonl after its last checkpoint: it will be written again.

    Errors: ValueError for a file that is no such log; it is left as it is."""
    if not path.is_file():
        return
    with open(path, "rb") as f:
        begins, kept = f.read(7), f.seek(max(0, size - 1)) and f.read(1)
    if not (b'{"kind"'.startswith(begins) and kept in (0, b"", b"\n")):
        raise ValueError(f"{path} is not the log of this run: move it away, or give another --out")
    if path.stat().st_size > size:
        os.truncate(path, size)


def summary(record: dict) -> str:
    """A stage's line on the console."""
    figures = show(record) if "ce" in record else f"{record.get('samples', 0)} samples"
    return f"epoch {record['epoch']} {record['stage']} | {figures} | {record.get('seconds', 0.0):.1f} s"


def finish_stage(run: Run, stage: str, epoch: int, values: dict) -> dict:
    """Logs a stage, prints its line, keeps it in the history."""
    record = dict(kind="stage", stage=stage, epoch=epoch, step=run.step, **values)
    run.history.append(record)
    run.log(record)
    run.ranks.print(summary(record))
    return values


def compare_with_reference(run: Run) -> None:
    """Prints how far the validation loss of this run is from the reference run's, at the same number of updates."""
    curve = {r["step"]: r for r in page.reference_curve(vars(run.args), REFERENCE_RUN) if r["stage"] == "valid"}
    mine = {r["step"]: r for r in run.history if r["stage"] == "valid"}
    if not (common := sorted(set(curve) & set(mine))):
        return
    step = common[-1]
    run.ranks.print(f"beside the reference run at step {step}: ce {mine[step]['ce']:.4f} here, {curve[step]['ce']:.4f} there; "
                    + ", ".join(f"{k[3:]} {mine[step][k] - curve[step][k]:+.4f}" for k in mine[step] if k.startswith("ce_q")))


# ---------------------------------------------------------------------------------------------------------------------


def prepare_folder(args: argparse.Namespace) -> Path:
    """The run folder, made if need be. Errors: ValueError where it cannot be, or holds a run not to be gone on with."""
    if args.resume == "never" and checkpoint.exists(Path(args.out)):
        raise ValueError(f"--resume never, but {args.out} holds a run: give another --out")
    return generate.output_folder(args.out)


def run_epochs(run: Run) -> None:
    """The protocol: train, valid, keep_best, evaluate, generate, commit."""
    args = run.args
    while run.epoch < args.epochs:
        epoch = run.epoch + 1
        final = epoch == args.epochs
        if run.step < epoch * args.updates_per_epoch:                # else a run was killed after this epoch's training
            with run.stop.hold():
                finish_stage(run, "train", epoch, train_stage(run))
                commit(run)
        keep_best(run, finish_stage(run, "valid", epoch, valid_stage(run)))
        if final or (args.evaluate_every and epoch % args.evaluate_every == 0):
            finish_stage(run, "evaluate", epoch, evaluate_stage(run))
        if final or (args.generate_every and epoch % args.generate_every == 0):
            finish_stage(run, "generate", epoch, generate_stage(run, f"epoch_{epoch:04d}"))
        with run.stop.hold():
            run.epoch = epoch
            commit(run)
        draw_page(run, final)
    if run.unwritten:
        raise OSError(f"the run is finished, but could not be written: {', '.join(run.unwritten)}; make room and start it again")


def prepare_run(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> Run | None:
    """Everything before the first update: the same on every rank, its errors too. None after a dry run."""
    found = args.dataset if args.cache or args.dataset == "toy" else data.scan(args.dataset)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    config, T = model_config(args, codec), segment_frames(args, codec)
    if T < 2:
        raise ValueError(f"--segment_seconds {args.segment_seconds:g}: more than the {1 / codec.frame_rate:g} s of a frame")
    ranks.print(*notes, *estimate(args, config, T, ranks.world))
    if args.dry_run:
        return None
    out = prepare_folder(args)
    held = checkpoint.lock(out) if ranks.is_main else None
    try:
        saved = fitting(out, read_checkpoint, args, ranks, out)
        start = read_start(args, config, codec) if saved is None else None
        if start is not None:
            ranks.print(f"starting with the weights and the vocabulary of {args.init_from}")
        run = build(args, ranks, codec, found, out, saved, stop, start)
        if saved is not None:
            fitting(out, restore, run, saved)
        if ranks.is_main:
            fitting(out, cut_log, out / "log.jsonl", saved["log_bytes"] if saved else 0)
            write_config(run)
            run.board = page.open_board(out, run.step) if args.tensorboard else None
    except BaseException:
        if held is not None:
            os.close(held)
        raise
    run.held, run.saved_at, run.drawn_at = held, time.monotonic(), time.monotonic()
    return run


def fitting(out: Path, action, *arguments):
    """Does something with a checkpoint. Errors: ValueError where what it holds is not what this code writes."""
    try:
        return action(*arguments)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or several.lost(error):
            raise
        raise ValueError(f"{out}: its checkpoint does not fit this code ({tokenizer.reason(error)}): give another --out") from None


def of_the_run(argv: list | None, out: str | None) -> argparse.Namespace:
    """The flags of the run in a folder, for --only; those given now win. Errors: ValueError."""
    if out is None:
        raise ValueError("--only: of which run? Give --out, the folder of a run that has finished an epoch")
    parser, stored = build_parser(), generate.read_deployment(out).get("args")
    if not isinstance(stored, dict):
        raise ValueError(f"{out}: its best.pt does not say how it was trained")
    parser.set_defaults(**{k: v for k, v in stored.items() if k not in HERE_ONLY and k in parser.parse_args([])})
    return parser.parse_args(argv)


def stage_alone(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> None:
    """A stage of the run in --out with its best weights; prints a line a figure. History, log and checkpoints stay as they are."""
    out, best = Path(args.out), generate.read_deployment(args.out)
    found = args.dataset if args.cache or args.dataset == "toy" else data.scan(args.dataset)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    if codec.fingerprint != best["codec"]["fingerprint"]:
        raise ValueError(f"{args.out}: --codec {args.codec} is not the one it was trained with: its fingerprint is another")
    ranks.print(*notes)
    run = build(args, ranks, codec, found, out, best, stop)
    fitting(out, several.fill, several.named(run.ema.model), best["model"])
    run.step = best["step"]
    values = {"valid": lambda: valid_stage(run), "evaluate": lambda: evaluate_stage(run), "generate": lambda: generate_stage(run, "best")}
    ranks.print(*(f"{args.only} {name} {value:.6g}" for name, value in page.flat(values[args.only]()).items()))


def train(run: Run) -> None:
    """From the first update to the end of the run."""
    began = time.perf_counter()
    run_epochs(run)
    run.ranks.print(f"finished: {duration(time.perf_counter() - began)}, best valid ce {run.best_ce:.4f}; {run.out / 'best.pt'}")
    compare_with_reference(run)


def write_config(run: Run) -> None:
    """config.json: every flag, the model's and the conditioner's shape, the codec."""
    conditioner = run.model.conditioner
    content = dict(args=vars(run.args), model=asdict(run.model.config),
                   conditioner=None if conditioner is None else asdict(conditioner.config),
                   codec=run.codec.reference,
                   parameters=sum(p.numel() for p in run.model.parameters()), torch=torch.__version__)
    path = run.out / "config.json"
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def main(argv: list | None = None) -> int:
    """Runs -> exit code: 0; 2 and one line for a mistake of the user; 1 for what went wrong on the way."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    who = f"train.py, rank {rank}" if world > 1 else "train.py"
    debug = os.environ.get("DEBUG")                                  # DEBUG=1 shows where an error was raised
    args, run, code, stop = build_parser().parse_args(argv), None, 0, Stop()
    try:
        with stop:
            args = of_the_run(argv, args.out) if args.only else args
            notes = derive(args, world)
            check(args, world)
            ranks = several.setup(args.device, args.timeout)
            if args.only:
                stage_alone(args, notes, ranks, stop)
            elif (run := prepare_run(args, notes, ranks, stop)) is not None:
                train(run)
    except Stopped as signal:
        code = stopped(run, signal, rank)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        mistake = isinstance(error, ValueError)
        text = explain(error)
        if stop.requested and text and several.lost(error):          # the others have obeyed a signal first
            code = stopped(run, stop.requested, rank)
        elif text and not debug:
            if run is not None or not mistake or os.environ.get("LOCAL_RANK", "0") == "0":   # every rank of a machine makes the same
                print(f"{'train.py' if run is None and mistake and rank == 0 else who}: {text}", file=sys.stderr, flush=True)
            code = 2 if mistake else 1
        elif world == 1:
            raise
        else:
            traceback.print_exc()
            code = 1
    finally:
        if run is not None and run.held is not None:
            os.close(run.held)
    if world > 1:
        several.leave(code)
    return code


def stopped(run: Run | None, signal, rank: int) -> int:
    """Says that a signal was obeyed -> exit code."""
    if rank == 0:
        where = "before the first update" if run is None else f"after update {run.step}; the same command goes on from there"
        print(f"stopped by {signal} {where}", flush=True)
    return 1 if run is not None and run.unwritten else 0


def explain(error: Exception) -> str | None:
    """One line on what ended a run; None for what is no mistake of the user or of the machine, but ours."""
    if not isinstance(error, RuntimeError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is too small: lower --micro_batch_size, or give --checkpointing or --parallel fsdp"
    if several.lost(error):
        return f"lost the other ranks ({tokenizer.reason(error)}); the same command goes on from the last checkpoint"
    if "DataLoader worker" in str(error):
        return f"a process that loads data died ({tokenizer.reason(error)}); the same command goes on from the last checkpoint"
    return None


if __name__ == "__main__":
    sys.exit(main())
