"""Trains a MusicGen: `python train.py`, or `torchrun --nproc_per_node=8 train.py --dataset /music ...`.

Copet et al. 2023 (arXiv:2306.05284), sec. 3. The protocol, spelled in `main`:

    restore
    for each epoch:   train ─► valid (EMA weights) ─► keep_best ─► evaluate, generate (best weights) if due ─► commit

One update: audio ─frozen codec─► codes, captions ─dropouts─► conditions; summed cross-entropy of each codebook over the
micro-batches, divided by the number of targets of all micro-batches and ranks; backward, unscale, clip, step, EMA.
Whatever is random is a function of (seed, step, sample), so ranks, micro-batches and restarts change nothing.

Legend: B batch, K codebooks, T frames.
    python train.py                                         the embedded default: offline, minutes on two CPU cores
    python train.py --dataset ~/music --size small          a folder of audio with captions beside it
    python train.py --dry_run                               what it would take, without allocating it
"""

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import conditioning
import data
import generate
import metrics
import tokenizer
import toy
from conditioning import Conditioner, ConditionerConfig
from model import SIZES, ModelConfig, MusicGen, count_parameters, decay_groups, flops_per_step

REFERENCE_RUN = Path(__file__).parent / "assets" / "reference_run.jsonl"
PRESETS = {                                                          # defaults that depend on what is trained on
    "toy": dict(size="tiny", fuse=["text=cross+sum"], codec="toy", segment_seconds=toy.CLIP_SECONDS, batch_size=16, epochs=10,
                updates_per_epoch=100, lr=8e-3, text_lr=1.5e-3, warmup_steps=20, ema_every=1, emb_std=1.0, cfg_dropout=0.1,
                word_dropout=0.0, merge_text_p=0.0, valid_samples=128, cfg=1.0, temperature=0.3, top_k=50,
                evaluate_every=0, generate_every=5),
    "audio": dict(size="small", fuse=["text=cross"], codec="encodec_24khz", segment_seconds=30.0, batch_size=32, epochs=100,
                  updates_per_epoch=500, lr=1e-4, text_lr=1e-4, warmup_steps=1000, ema_every=10, cfg_dropout=0.3,
                  word_dropout=0.3, merge_text_p=0.25, valid_samples=512, cfg=3.0, temperature=1.0, top_k=250,
                  evaluate_every=25, generate_every=25),
}
NEUTRAL = {"out", "device", "workers", "resume", "dry_run", "log_every", "evaluate_every", "generate_every", "compile",
           "micro_batch_size", "parallel", "checkpointing", "epochs", "eval_samples", "generate_samples"}   # may change on resume


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
    g.add_argument("--num_codebooks", type=int, default=None, help="K, the first of the codec's codebooks (default: all)")
    g.add_argument("--channels", type=int, default=1, choices=(1,), help="audio channels")
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
    g.add_argument("--no_text", action="store_true", help="train an unconditional model")
    g.add_argument("--fuse", nargs="+", default=None, help="how a condition enters: NAME=cross|prepend|sum, several joined by +")
    g.add_argument("--text_vocab", type=int, default=2000, help="most pieces of the vocabulary fitted to the captions")
    g.add_argument("--cfg_dropout", type=float, default=None, help="probability that a sample loses all its conditions")
    g.add_argument("--text_dropout", type=float, default=0.0, help="probability that a sample loses its text alone")
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
    g.add_argument("--text_lr", type=float, default=None, help="peak learning rate of the text encoder")
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
    g.add_argument("--parallel", default="ddp", choices=("ddp",), help="how several ranks share the work")
    g = new("run")
    g.add_argument("--out", default=None, help="run folder (default: runs/ and the name of the dataset)")
    g.add_argument("--seed", type=int, default=0, help="of weights, data, dropouts and samples")
    g.add_argument("--resume", default="auto", choices=("auto", "never"), help="auto: go on from the folder's checkpoint")
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
    g.add_argument("--dry_run", action="store_true", help="print the estimate of memory and time, then stop")
    return parser


def derive(args: argparse.Namespace, world: int) -> list:
    """Fills in the flags left out, in place, and returns lines that say what was chosen, by reason."""
    notes = {}

    def fill(name, value, reason):
        if getattr(args, name) is None:
            setattr(args, name, value)
            shown = " ".join(value) if isinstance(value, list) else value
            notes[reason] = f"{notes.get(reason, f'{reason}:')} --{name} {shown}"

    kind = "toy" if args.dataset == "toy" else "audio"
    if args.overfit_one_batch:
        for name, value in dict(epochs=1, updates_per_epoch=200, batch_size=4 * world, lr=1e-3, text_lr=1e-3,
                                warmup_steps=20, cfg_dropout=0.0, word_dropout=0.0, merge_text_p=0.0, evaluate_every=0,
                                valid_samples=4 * world).items():
            fill(name, value, "overfitting one batch")
    for name, value in PRESETS[kind].items():
        fill(name, value, f"default for {kind}")
    fill("device", "cuda" if torch.cuda.is_available() else "cpu", "what there is")
    on_cuda = torch.device(args.device).type == "cuda"
    fill("dtype", "bfloat16" if on_cuda and torch.cuda.is_bf16_supported() else "float32", f"best on {args.device}")
    fill("workers", 0 if kind == "toy" else 4, "synthesis is nearly free" if kind == "toy" else "audio is read from disk")
    fill("micro_batch_size", max(1, args.batch_size // world), "the rank's whole share")
    fill("log_every", max(1, args.updates_per_epoch // 10), "a tenth of an epoch")
    fill("out", f"runs/{Path(args.cache or args.dataset).resolve().stem if kind != 'toy' else 'toy'}", "by dataset")
    return list(notes.values())


def check(args: argparse.Namespace, world: int) -> None:
    """Refuses flags that contradict each other or lie outside their range. Errors: ValueError with the way out."""
    for name in ("cfg_dropout", "text_dropout", "word_dropout", "merge_text_p", "drop_desc_p", "keep_other_p", "dropout",
                 "ema_decay", "beta1", "beta2", "top_p", "lr_min_ratio", "min_segment_ratio"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise ValueError(f"--{name} {value}: it lies between 0 and 1")
    for name in ("epochs", "updates_per_epoch", "batch_size", "micro_batch_size", "ema_every", "log_every", "valid_samples",
                 "max_skipped", "text_vocab", "eval_samples"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "workers", "evaluate_every", "generate_every", "seed",
                 "generate_samples"):
        if not (value := getattr(args, name)) >= 0:
            raise ValueError(f"--{name} {value}: at least 0")
    for name in ("lr", "text_lr", "segment_seconds"):
        if not 0 < (value := getattr(args, name)) < 1e4:
            raise ValueError(f"--{name} {value}: more than 0")
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} is over all ranks and does not divide by {world}: "
                         f"take {args.batch_size // world * world or world}")
    share = args.batch_size // world
    if share % args.micro_batch_size:
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} does not divide a rank's {share} samples: take one of "
                         f"{', '.join(str(d) for d in range(1, share + 1) if share % d == 0)}")
    if args.dtype == "float16" and torch.device(args.device).type == "cpu":
        raise ValueError("--dtype float16 needs a GPU: take float32 or bfloat16")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no GPU is visible here; take --device cpu")
    if args.emb_std is not None and not 0 < args.emb_std < 100:
        raise ValueError(f"--emb_std {args.emb_std}: more than 0")
    generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)
    if not args.no_text:
        ConditionerConfig(fuse=parse_fuse(args.fuse))


def parse_fuse(entries: list) -> dict:
    """["text=cross"] -> {"text": "cross"}. Errors: ValueError for anything that is no NAME=METHOD."""
    if any(e.count("=") != 1 for e in entries):
        raise ValueError(f"--fuse {' '.join(entries)}: give NAME=METHOD, such as text=cross")
    return dict(e.split("=") for e in entries)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


@dataclass
class Ranks:
    """This process among all: torchrun's environment, or a single one."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *lines) -> None:
        """Prints on rank 0 only."""
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def setup_ranks(args: argparse.Namespace) -> Ranks:
    """Joins the process group that torchrun announced (NCCL on GPU, gloo on CPU)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    return Ranks(rank, world, device)


# ---------------------------------------------------------------------------------------------------------------------
# estimate


def estimate(args: argparse.Namespace, config: ModelConfig, T: int, world: int) -> list:
    """Lines on memory and time, from shapes alone. Activations: about 20 D floats a layer and step are kept for backward
    (28 D with cross-attention), and three of the logits' size."""
    N, S, B = count_parameters(config), config.layout(T).S_valid - 1, args.micro_batch_size
    bytes_each = 4 if args.dtype == "float32" else 2
    per_layer = (28 if config.cross_attention else 20) * config.dim
    kept = config.num_layers * (config.dim if args.checkpointing else per_layer) + (per_layer if args.checkpointing else 0)
    activations = B * S * (kept * bytes_each + 3 * config.K * config.card * 4)
    parts = dict(weights=4 * N, gradients=4 * N, optimiser=8 * N, EMA=4 * N, activations=activations)
    total = sum(parts.values())
    flops = 3 * flops_per_step(config, S, 16) * args.batch_size / world * (4 / 3 if args.checkpointing else 1)
    speed = machine_flops(args)
    seconds = flops / (0.5 * speed) * args.epochs * args.updates_per_epoch
    return [f"model: {N / 1e6:.1f}M parameters without text encoder; a clip is {T} frames = {S} steps ({args.pattern})",
            "memory a rank, about: " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in parts.items()) +
            f" = {total / 2**30:.2f} GiB",
            f"time, about: {flops / 1e9:.0f} GFLOP an update and rank at half of {speed / 1e9:.0f} GFLOP/s = "
            f"{duration(seconds)} for {args.epochs} epochs of {args.updates_per_epoch} updates"]


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
        """Takes in the weights as they are now."""
        self.count = self.count * self.decay + 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 / self.count)


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
    step: int = 0
    skipped: int = 0                                                 # updates skipped, in all
    skipped_in_a_row: int = 0
    best_ce: float = math.inf
    best_state: dict | None = None
    history: list = None
    valid_batches: list | None = None                                # [(codes, frame mask, attributes)] kept on the host

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.args.dtype)

    def autocast(self):
        """Autocast in the training precision; nothing in float32."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.ranks.device.type, self.dtype)

    def log(self, record: dict) -> None:
        """Appends a line to log.jsonl."""
        if self.ranks.is_main:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")


def build_conditioner(args: argparse.Namespace, train_set, dim: int, ranks: Ranks, saved: dict | None) -> Conditioner | None:
    """The conditioner, with the vocabulary of the checkpoint, or one fitted to the captions of the training set."""
    if args.no_text:
        return None
    if saved is not None:                                            # captions may have changed since
        pieces = conditioning.unpack(saved["assets"]["text"])
    else:
        pieces = conditioning.fit_sentencepiece(sample_captions(args, train_set), args.text_vocab)
    config = ConditionerConfig(fuse=parse_fuse(args.fuse), text_vocab=conditioning.vocabulary_size(pieces))
    if config.text_vocab < args.text_vocab:
        ranks.print(f"text: {config.text_vocab} pieces, not {args.text_vocab}: the captions hold no more")
    return Conditioner(config, dim, {"text": pieces})


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
                              args.cache) for split in ("train", "valid")]
    if isinstance(found, data.Scan):
        for line in data.skip_lines(found.skipped):
            ranks.print(f"skipped: {line}")
    for split, each in zip(("train", "valid"), sets):
        ranks.print(f"{split}: {each.describe()}")
    return sets


def build(args: argparse.Namespace, ranks: Ranks, codec, found, out: Path, saved: dict | None = None) -> Run:
    """Allocates model, average and optimiser. Every rank draws the same initial weights from the seed.

    found: the dataset's name or what scanning it gave; saved: the checkpoint that `restore` will go on from."""
    train_set, valid_set = open_data(args, found, codec, ranks)
    torch.manual_seed(args.seed)
    config = model_config(args, codec)
    model = MusicGen(config, build_conditioner(args, train_set, config.dim, ranks, saved)).to(ranks.device)
    model.transformer.checkpointing = args.checkpointing
    ema = Ema(model, args.ema_decay)
    if args.compile:
        for layer in model.transformer.layers:
            layer.compile()
    wrapped = model
    if ranks.world > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    optimizer = torch.optim.AdamW(optimizer_groups(model, args), args.lr, (args.beta1, args.beta2), fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16")
    torch.manual_seed(args.seed + 1 + ranks.rank)                    # dropout differs between ranks
    return Run(args, ranks, codec, train_set, valid_set, model, wrapped, ema, optimizer, scaler, out, history=[])


def optimizer_groups(model: MusicGen, args: argparse.Namespace) -> list:
    """Groups of the optimiser: decayed and not, the text encoder at its own learning rate (`lr_scale` times the other's)."""
    text = {id(p) for p in model.conditioner.parameters()} if model.conditioner is not None else set()
    groups = []
    for group in decay_groups(model, args.weight_decay):
        for scale, inside in ((1.0, False), (args.text_lr / args.lr, True)):
            params = [p for p in group["params"] if (id(p) in text) == inside]
            groups += [{**group, "params": params, "lr_scale": scale}] if params else []
    return groups


def model_config(args: argparse.Namespace, codec) -> ModelConfig:
    """The language model's shape from the flags and the codec."""
    cross = not args.no_text and any("cross" in method for method in parse_fuse(args.fuse).values())
    return ModelConfig(K=codec.K, card=codec.card, dropout=args.dropout, cross_attention=cross, pattern=args.pattern,
                       emb_std=args.emb_std, **SIZES[args.size])


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
    """A rank's share of an update as [(codes [b,K,T], frame mask [b,T], prepared conditions)]."""
    args = run.args
    codes, mask = to_codes(run, data.collate(examples))
    attributes = []
    if run.model.conditioner is not None:
        merge = dict(merge_text_p=args.merge_text_p, drop_desc_p=args.drop_desc_p, keep_other_p=args.keep_other_p)
        step = 0 if args.overfit_one_batch else run.step
        attributes = [conditioning.training_attributes(
            e.meta, run.model.conditioner.names, args.seed, step, e.index, args.cfg_dropout, {"text": args.text_dropout},
            args.word_dropout, merge) for e in examples]
    return [(codes[i:i + args.micro_batch_size], mask[i:i + args.micro_batch_size],
             prepare(run.model, attributes[i:i + args.micro_batch_size], run.ranks.device))
            for i in range(0, len(examples), args.micro_batch_size)]


def prepare(model: MusicGen, attributes: list, device) -> dict | None:
    """Conditions of a micro-batch as the model takes them."""
    return None if model.conditioner is None else model.conditioner.prepare(attributes, device)


def update(run: Run, micros: list) -> tuple[Tensor, Tensor, float]:
    """One optimiser step. Returns the rank's summed loss [K], the targets of all ranks [K] and the gradient norm."""
    args, model = run.args, run.model
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(run.step, args) * group["lr_scale"]
    counts = run.ranks.sum(sum(model.count_targets(mask) for _, mask, _ in micros)).clamp_min(1)        # [K]
    sums = torch.zeros(model.config.K, device=run.ranks.device)
    for i, (codes, mask, inputs) in enumerate(micros):
        last = i == len(micros) - 1                                  # gradients meet once an update
        with contextlib.nullcontext() if last or run.ranks.world == 1 else run.wrapped.no_sync():
            with run.autocast():
                part = run.wrapped(codes, mask, inputs)                                                 # [K]
            loss = (part / counts).mean() * run.ranks.world          # DDP averages over ranks: undo its division
            run.scaler.scale(loss).backward()
        sums += part.detach()
    run.scaler.unscale_(run.optimizer)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf))
    if math.isfinite(norm) or run.scaler.is_enabled():               # the scaler itself skips what is not finite
        run.scaler.step(run.optimizer)
        run.scaler.update()
    count_skipped(run, norm)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.step % args.ema_every == 0:
        run.ema.update(model)
    return sums, counts, norm


def count_skipped(run: Run, norm: float) -> None:
    """Counts updates whose gradients were not finite; stops after `--max_skipped` of them in a row."""
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        return
    run.skipped += 1
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row >= run.args.max_skipped:
        bad = next((n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()), "none")
        raise FloatingPointError(f"step {run.step}, rank {run.ranks.rank}: gradients not finite {run.skipped_in_a_row} times "
                                 f"in a row, first in {bad}; try a lower --lr or --dtype float32")


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
    """The rest of an epoch's updates; a log line every `--log_every`."""
    args, ranks = run.args, run.ranks
    epoch, start = divmod(run.step, args.updates_per_epoch)
    run.wrapped.train()
    data_epoch = 0 if args.overfit_one_batch else epoch
    loader = data.batches(run.train_set, data_epoch, start, args.updates_per_epoch, args.batch_size, ranks.rank, ranks.world,
                          args.workers)
    fixed = micro_batches(run, next(loader)) if args.overfit_one_batch else None
    K, T, norm = run.model.config.K, segment_frames(args, run.codec), 0.0
    epoch_sums, window_sums = (torch.zeros(2, K, device=ranks.device, dtype=torch.float64) for _ in range(2))
    began = marked = time.perf_counter()
    for position in tqdm(range(start + 1, args.updates_per_epoch + 1), f"epoch {epoch + 1}", leave=False,
                         disable=not (ranks.is_main and sys.stderr.isatty())):
        sums, counts, norm = update(run, fixed or micro_batches(run, next(loader)))
        window_sums += torch.stack([sums, counts / ranks.world])     # counts are of all ranks already
        if position % args.log_every and position != args.updates_per_epoch:
            continue
        updates = (position - start - 1) % args.log_every + 1
        seconds = (time.perf_counter() - marked) / updates
        epoch_sums += window_sums
        values = figures(*ranks.sum(window_sums))
        record = dict(kind="step", stage="train", epoch=epoch + 1, step=run.step, **values, grad_norm=norm,
                      lr=lr_at(run.step - 1, args), seconds=seconds, frames_per_second=args.batch_size * T / seconds,
                      skipped=run.skipped)
        run.log(record)
        ranks.print(f"epoch {epoch + 1} step {run.step} | {show(values)} | norm {norm:.2f} | lr {record['lr']:.1e} | "
                    f"{seconds * 1000:.0f} ms | {record['frames_per_second'] / 1000:.1f}k frames/s" +
                    (f" | skipped {run.skipped}" if run.skipped else ""))
        window_sums.zero_()
        marked = time.perf_counter()
    return figures(*ranks.sum(epoch_sums)) | dict(skipped=run.skipped, seconds=time.perf_counter() - began)


def load_valid(run: Run) -> list:
    """This rank's share of the validation set, encoded once and kept on the host as [(codes, mask, attributes)]."""
    if run.valid_batches is None:
        args, ranks = run.args, run.ranks
        size = args.micro_batch_size * ranks.world
        updates = math.ceil(args.valid_samples / size)
        source = run.train_set if args.overfit_one_batch else run.valid_set
        run.valid_batches = []
        for examples in data.batches(source, 0, 0, updates, size, ranks.rank, ranks.world, args.workers):
            codes, mask = to_codes(run, data.collate(examples))
            run.valid_batches.append((codes.cpu(), mask.cpu(), [{"text": conditioning.describe(e.meta)} for e in examples]))
    return run.valid_batches


@torch.no_grad()
def mean_loss(run: Run, model: MusicGen, change=lambda attributes: attributes) -> dict:
    """Figures of a model over the validation set; `change` may alter the conditions of each batch."""
    model.eval()
    totals = torch.zeros(2, model.config.K, device=run.ranks.device, dtype=torch.float64)
    for codes, mask, attributes in load_valid(run):
        codes, mask = codes.to(run.ranks.device), mask.to(run.ranks.device)
        with run.autocast():
            sums = model(codes, mask, prepare(model, change(attributes), run.ranks.device))
        totals += torch.stack([sums, model.count_targets(mask)])
    return figures(*run.ranks.sum(totals))


def valid_stage(run: Run) -> dict:
    """Cross-entropy of the averaged weights on the validation set."""
    began = time.perf_counter()
    return mean_loss(run, run.ema.model) | dict(seconds=time.perf_counter() - began)


def keep_best(run: Run, values: dict) -> None:
    """Keeps the averaged weights, and writes best.pt, if the validation loss is the lowest so far."""
    if not values["ce"] < run.best_ce:
        return
    run.best_ce = values["ce"]
    run.best_state = {k: v.detach().cpu().clone() for k, v in run.ema.model.state_dict().items()}
    if run.ranks.is_main:
        write(run.out / "best.pt", deployment(run, values))


def deployment(run: Run, values: dict) -> dict:
    """The content of best.pt: plain tensors and plain data, all that generating takes but the codec."""
    model, args, codec = run.model, run.args, run.codec
    conditioner = model.conditioner
    return dict(format=generate.FORMAT, model=run.best_state, model_config=asdict(model.config),
                conditioner_config=None if conditioner is None else asdict(conditioner.config),
                assets=stored_assets(model),
                codec=dict(name=codec.name, K=codec.K, fingerprint=codec.fingerprint),
                segment_frames=segment_frames(args, codec),
                sampling=asdict(generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)),
                metrics=dict(values), step=run.step, args=vars(args))


def stored_assets(model: MusicGen) -> dict:
    """What the conditioners need beside weights, {name: bytes as a uint8 tensor}: no file holds more than plain tensors."""
    assets = {} if model.conditioner is None else model.conditioner.assets
    return {name: conditioning.pack(content) for name, content in assets.items()}


@contextlib.contextmanager
def best_weights(run: Run):
    """The averaged model holding the best weights for the while; it gets its own back whatever happens."""
    own = {k: v.detach().clone() for k, v in run.ema.model.state_dict().items()}
    try:
        if run.best_state is not None:                               # none yet where every validation was not finite
            run.ema.model.load_state_dict(run.best_state)
        yield run.ema.model
    finally:
        run.ema.model.load_state_dict(own)


def evaluate_stage(run: Run) -> dict:
    """What captions are worth to the loss; on the toy set, how well generated clips follow them."""
    began, result = time.perf_counter(), {}
    with best_weights(run) as model:
        result |= mean_loss(run, model)
        if model.conditioner is not None:
            result["ce_no_text"] = mean_loss(run, model, lambda a: [dict.fromkeys(x) for x in a])["ce"]
            result["ce_shuffled_text"] = mean_loss(run, model, lambda a: a[1:] + a[:1])["ce"]
            run.ranks.print(f"evaluate: ce {result['ce']:.4f} with captions, {result['ce_no_text']:.4f} without, "
                            f"{result['ce_shuffled_text']:.4f} with those of other clips")
        if run.args.dataset == "toy" and run.ranks.is_main and not run.args.no_text:
            result["adherence"] = toy_adherence(run, model)
    return result | dict(seconds=time.perf_counter() - began)


def toy_adherence(run: Run, model: MusicGen) -> dict:
    """Caption adherence on combinations of values seen in training and on those held out; prints both tables."""
    args, result = run.args, {}
    music = generate.MusicGenerator(model, run.codec, segment_frames(args, run.codec),
                                    generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p), run.dtype)
    for split, title in (("valid", "combinations seen in training"), ("heldout", "combinations held out")):
        table = metrics.toy_captions(music, split, args.eval_samples, args.seed)
        print(metrics.adherence_table(table, f"{args.eval_samples} clips, {title}"), flush=True)
        result[split] = {k: v for k, v in table.items() if k != "heard"}
    return result


def generate_stage(run: Run, epoch: int) -> dict:
    """Writes samples for fixed captions of the validation set, wav and json, under samples/epoch_NNNN."""
    args, began = run.args, time.perf_counter()
    if not run.ranks.is_main or args.generate_samples == 0:
        return {}
    texts = [a["text"] for _, _, attributes in load_valid(run) for a in attributes][:args.generate_samples]
    folder = run.out / "samples" / f"epoch_{epoch:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    sampling = generate.Sampling(args.cfg, args.temperature, args.top_k, args.top_p)
    with best_weights(run) as model:
        music = generate.MusicGenerator(model, run.codec, segment_frames(args, run.codec), sampling, run.dtype)
        prompts = texts if model.conditioner is not None else [None] * len(texts)
        wavs = music.generate(prompts, args.segment_seconds, seed=args.seed)
    for i, (text, wav) in enumerate(zip(prompts, wavs)):
        tokenizer.write_audio(folder / f"{i:03d}.wav", wav, run.codec.sample_rate)
        record = dict(prompt=text, seed=args.seed, epoch=epoch, seconds=args.segment_seconds, **asdict(sampling))
        (folder / f"{i:03d}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {folder / f'{i:03d}.wav'}: {text}", flush=True)
    return dict(samples=len(texts), folder=str(folder), seconds=time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def write(path: Path, content: dict) -> None:
    """Writes beside, flushes to disk, then swaps in: at no moment is there less than one whole file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def commit(run: Run) -> None:
    """Writes last.pt; the one before becomes last.prev.pt."""
    if not run.ranks.is_main:
        return
    last = run.out / "last.pt"
    if last.exists():
        shutil.copyfile(last, run.out / "last.prev.pt.tmp")
        os.replace(run.out / "last.prev.pt.tmp", run.out / "last.prev.pt")
    write(last, dict(
        format=generate.FORMAT, args=vars(run.args), model=run.model.state_dict(), ema=run.ema.model.state_dict(),
        ema_count=run.ema.count, optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(), step=run.step,
        skipped=run.skipped, best_ce=run.best_ce, best_state=run.best_state, history=run.history,
        assets=stored_assets(run.model), rng=torch.get_rng_state()))


def read_checkpoint(args: argparse.Namespace, out: Path) -> dict | None:
    """The folder's last.pt, if there is one to go on from.

    Errors: ValueError if its flags differ in what matters, naming the differences."""
    path = out / "last.pt"
    if not path.is_file():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if refused := [f"--{k} {saved['args'][k]} there, {v} now" for k, v in changed_flags(args, saved).items()
                   if k not in NEUTRAL]:
        raise ValueError(f"{out} holds another run: {'; '.join(refused)}. Give the same flags, or another --out")
    return saved


def changed_flags(args: argparse.Namespace, saved: dict) -> dict:
    """Flags whose value is not the checkpoint's: {name: value now}."""
    return {k: v for k, v in vars(args).items() if k in saved["args"] and saved["args"][k] != v}


def restore(run: Run, saved: dict) -> None:
    """Goes on from a checkpoint, and prints the epochs it holds."""
    run.model.load_state_dict(saved["model"])
    run.ema.model.load_state_dict(saved["ema"])
    run.ema.count = saved["ema_count"]
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.step, run.skipped, run.history = saved["step"], saved["skipped"], saved["history"]
    run.best_ce, run.best_state = saved["best_ce"], saved["best_state"]
    if run.ranks.world == 1:
        torch.set_rng_state(saved["rng"])
    if run.ranks.is_main:
        rewind_log(run.out / "log.jsonl", run.step)
    run.ranks.print(f"going on from {run.out / 'last.pt'}, step {run.step}" +
                    "".join(f"; --{k} is {v} now" for k, v in changed_flags(run.args, saved).items()))
    for record in run.history:
        run.ranks.print(summary(record))


def rewind_log(path: Path, step: int) -> None:
    """Drops the lines of log.jsonl that a killed run wrote after its last checkpoint: they will be written again."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


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
    if not REFERENCE_RUN.is_file():
        return
    lines = [json.loads(line) for line in REFERENCE_RUN.read_text().splitlines()]
    same = all(getattr(run.args, k) == v for k, v in lines[0]["args"].items())
    curve = {r["step"]: r for r in lines[1:] if r["kind"] == "stage" and r["stage"] == "valid"}
    mine = {r["step"]: r for r in run.history if r["stage"] == "valid"}
    if not same or not (common := sorted(set(curve) & set(mine))):
        return
    step = common[-1]
    run.ranks.print(f"beside the reference run at step {step}: ce {mine[step]['ce']:.4f} here, {curve[step]['ce']:.4f} there; "
                    + ", ".join(f"{k[3:]} {mine[step][k] - curve[step][k]:+.4f}" for k in mine[step] if k.startswith("ce_q")))


# ---------------------------------------------------------------------------------------------------------------------


def prepare_folder(args: argparse.Namespace, ranks: Ranks) -> Path:
    """The run folder, made if need be. Errors: ValueError where it cannot be, or holds a run not to be gone on with."""
    out = Path(args.out)
    if args.resume == "never" and (out / "last.pt").exists():
        raise ValueError(f"--resume never, but {out} holds a run: give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error})") from None
    return out


def run_epochs(run: Run) -> None:
    """The protocol: train, valid, keep_best, evaluate, generate, commit."""
    args = run.args
    while run.step < args.epochs * args.updates_per_epoch:
        epoch = run.step // args.updates_per_epoch + 1
        final = epoch == args.epochs
        finish_stage(run, "train", epoch, train_stage(run))
        keep_best(run, finish_stage(run, "valid", epoch, valid_stage(run)))
        if final or (args.evaluate_every and epoch % args.evaluate_every == 0):
            finish_stage(run, "evaluate", epoch, evaluate_stage(run))
        if final or (args.generate_every and epoch % args.generate_every == 0):
            finish_stage(run, "generate", epoch, generate_stage(run, epoch))
        commit(run)
        if run.ranks.world > 1:
            dist.barrier()


def start(argv: list | None) -> None:
    """From flags to the end of the run."""
    args = build_parser().parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    notes = derive(args, world)
    check(args, world)
    ranks = setup_ranks(args)
    try:
        found = args.dataset if args.cache or args.dataset == "toy" else data.scan(args.dataset)
        codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device)
        config, T = model_config(args, codec), segment_frames(args, codec)
        ranks.print(*notes, *estimate(args, config, T, world))
        if args.dry_run:
            return
        out = prepare_folder(args, ranks)
        began = time.perf_counter()
        saved = read_checkpoint(args, out)
        run = build(args, ranks, codec, found, out, saved)
        if saved is not None:
            restore(run, saved)
        if ranks.is_main:
            write_config(run)
        run_epochs(run)
        ranks.print(f"finished: {duration(time.perf_counter() - began)}, best valid ce {run.best_ce:.4f}; {out / 'best.pt'}")
        compare_with_reference(run)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def write_config(run: Run) -> None:
    """config.json: every flag, the model's and the conditioner's shape, the codec."""
    conditioner = run.model.conditioner
    content = dict(args=vars(run.args), model=asdict(run.model.config),
                   conditioner=None if conditioner is None else asdict(conditioner.config),
                   codec=dict(name=run.codec.name, K=run.codec.K, fingerprint=run.codec.fingerprint),
                   parameters=sum(p.numel() for p in run.model.parameters()), torch=torch.__version__)
    (run.out / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list | None = None) -> int:
    """Runs; a user's mistake is one line and exit code 2."""
    try:
        start(argv)
    except (ValueError, FloatingPointError) as error:
        if os.environ.get("DEBUG"):                                  # DEBUG=1 shows where it was raised
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
