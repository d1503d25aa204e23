"""Trains a MusicGen: `python train.py`, or `torchrun --nproc_per_node=8 train.py --dataset /music ...`.

Copet et al. 2023 (arXiv:2306.05284), sec. 3. The protocol, spelled in `run_epochs`:

    restore
    for each epoch:  train ─► save ─► valid (EMA) ─► keep_best ─► evaluate, generate if due ─► save

    last.pt    all that resuming takes          best.pt    the best average, all that generating takes
               (support/resume.py says what each holds)

One update: audio ─frozen codec─► codes; conditions, dropped at random ─► embeddings; cross-entropy of each
codebook, summed over the micro-batches and divided by the number of targets of all micro-batches and ranks;
the mean over codebooks; backward, unscale, clip, step, EMA. Whatever is random is a function of (seed, step
or epoch, index of the sample), so ranks, micro-batches and restarts change nothing. support/flags.py has
every default.

Legend: B batch, K codebooks, T frames.
    python train.py                                    the embedded default: offline, minutes on two CPU cores
    python train.py --dataset ~/music --size small     a folder of audio with captions beside it
    python train.py --dry_run                          what it would take, without allocating it
    python train.py --only evaluate --out runs/toy     a stage alone, of a run that is there
"""

import argparse
import contextlib
import copy
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import tokenizer
from conditioning import CONDITIONS, Conditioner, ConditionerConfig
from evaluate import board, stages
from interop import load
from model import ModelConfig, MusicGen, decay_groups
from support import checkpoint, common, distributed, resume
from support.common import random_generator
from support.distributed import Ranks
from support.estimate import duration_text, estimate_lines
from support.flags import (build_parser, check_flags, fill_flags, flags_of_run, fuse_methods, parse_size,
                           segment_frames)
from support.log import LOG_NAME, append_record, cut_log, loss_metrics, loss_text, stage_text, write_config
from support.lora import add_lora
from support.muon import build_optimizer
from support.sets import check_sets, find_data, open_sets
from support.signals import Stop, Stopped, exit_code
from support.start import Start, load_start, read_start

MODEL_DROPOUT_STREAM = 13                      # of the transformer's dropout, see common.random_generator


class Ema:
    """Bias-corrected average of the weights, a model of its own beside the trained one, in float32.

    count = count * decay + 1; weight of the newest = 1 / count: 1, .5025, .3367, .. towards .01 at decay .99.
    What is frozen is its own average: it lies in memory once (`share`), unless the models will be sharded."""

    def __init__(self, model: nn.Module, decay: float, share: bool = True):
        # deepcopy's memo: what is in it is shared, not copied
        frozen = {id(p): p for p in model.parameters() if share and not p.requires_grad}
        self.model = copy.deepcopy(model, frozen).requires_grad_(False).eval()
        self.decay, self.count = decay, 0.0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now; where they are sharded, each rank its own part."""
        self.count = self.count * self.decay + 1
        pairs = zip(self.model.parameters(), model.parameters())
        learned = [(old, now) for old, now in pairs if now.requires_grad]
        averages, weights = (distributed.local_parts(parameters) for parameters in zip(*learned))
        torch._foreach_lerp_(averages, weights, 1 / self.count)
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
    wrapped: nn.Module                         # DDP around the model, or the model itself
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    out: Path
    stop: Stop
    history: list                              # records of the finished stages
    sums: Tensor                           # [epoch | since last log line, loss | targets, K]
    step: int = 0                              # updates done
    epoch: int = 0                             # epochs done with all their stages
    skipped: int = 0                           # updates skipped, in all
    skipped_in_a_row: int = 0
    best_ce: float = math.inf
    best: dict | None = None                   # averaged weights of the best epoch, sharded as the model is
    best_values: dict | None = None            # and what validation said of them
    best_step: int = 0                         # when that was; 0: not known
    valid_batches: list | None = None          # of stages.load_valid
    saved_at: float = 0.0                      # time.monotonic of the last checkpoint
    unwritten: tuple = ()                      # files that a full disk has kept from being written
    lock: int | None = None                    # on the run folder
    board: object = None                       # TensorBoard's writer, on rank 0
    drawn_at: float = 0.0                      # time.monotonic of the last page
    drawing_seconds: float = 1.0               # and what it took; at first a guess

    @property
    def dtype(self) -> torch.dtype:
        """Of autocast."""
        return getattr(torch, self.args.dtype)

    def autocast(self):
        """Autocast in the training precision; nothing in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, self.dtype)

    def log(self, record: dict) -> None:
        """Appends a record to log.jsonl, and to TensorBoard's log if there is one."""
        if self.ranks.is_main and checkpoint.owns_folder(self.out, self.lock):
            append_record(self.out / LOG_NAME, record)
            if self.board is not None:
                board.show_record(self.board, record)


# --------------------------------------------------------------------------------------------------
# one update


class MicroBatch(NamedTuple):
    """The arguments of MusicGen.forward, in its order and by its names."""
    codes: Tensor                              # [B, K, T]
    frame_mask: Tensor                         # [B, T] True where there is audio
    inputs: dict | None                        # of the conditions, prepared
    dropout_keys: Tensor | None                # [B] int32
    loss_mask: Tensor                          # [B, T] frames that count in the loss


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate of update `step` (from 0): linear warm-up from above zero, then a cosine."""
    total = args.epochs * args.updates_per_epoch
    if step < args.warmup_steps:
        return args.lr * (step + 1) / (args.warmup_steps + 1)
    done = min(1.0, (step - args.warmup_steps) / max(1, total - args.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * (args.lr_min_ratio + (1 - args.lr_min_ratio) * cosine)


def micro_batches(run: Run, examples: list) -> list:
    """This rank's share of an update: examples -> [MicroBatch]."""
    args, conditioner, device = run.args, run.model.conditioner, run.ranks.device
    step = 0 if args.overfit_one_batch else run.step
    codes, frame_mask = data.collate(examples).encode(run.codec, device)                   # [B, K, T], [B, T]

    # conditions: values, dropped at random for guidance; the loss leaves out what a style was read from
    values, loss_mask = [], frame_mask
    if conditioner is not None:
        values, loss_mask = conditioner.example_values(examples, codes, frame_mask, args, run.codec, step)

    # dropout: what is dropped is a hash of one key a sample
    dropout_keys = None
    if args.dropout > 0:
        rngs = [random_generator(args.seed, MODEL_DROPOUT_STREAM, step, e.index) for e in examples]
        keys = [rng.integers(2**31) for rng in rngs]
        dropout_keys = torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True)      # [B]

    parts = []
    for i in range(0, len(examples), args.micro_batch_size):
        p = slice(i, i + args.micro_batch_size)
        inputs = None if conditioner is None else conditioner.prepare(values[p], device)
        keys = None if dropout_keys is None else dropout_keys[p]
        parts.append(MicroBatch(codes[p], frame_mask[p], inputs, keys, loss_mask[p]))
    return parts


def update(run: Run, micros: list) -> tuple[Tensor, Tensor, float]:
    """One optimizer step -> the rank's summed loss [K], the targets of all ranks [K], the gradient's norm."""
    args, model, ranks = run.args, run.model, run.ranks
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, args) * group["lr_scale"]

    # forward and backward of each micro-batch; in the last backward pass DDP or FSDP averages over the ranks
    counts = sum(model.count_targets(m.loss_mask) for m in micros)                              # [K]
    counts = ranks.sum(counts).clamp_min(1)
    sums = torch.zeros(model.config.K, device=ranks.device)
    for i, micro in enumerate(micros):
        with distributed.gradient_sync(run.wrapped, last=i == len(micros) - 1):
            with run.autocast():
                part = run.wrapped(*micro)                                                   # [K] summed loss
            loss = (part / counts).mean() * ranks.world_size    # gradients are averaged over ranks: undo that
            run.scaler.scale(loss).backward()
        sums += part.detach()

    # unscale, clip; gradients that are not finite are not clipped, so that count_skipped can name them
    run.scaler.unscale_(run.optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total = distributed.full_tensor(nn.utils.get_total_norm(gradients))
    norm = float(total)                                              # an update waits for the GPU here alone
    finite = math.isfinite(norm)
    if args.max_grad_norm and finite:
        nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, total)

    # step; a scaler itself skips what is not finite
    if finite or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if model.conditioner is not None:                                # what learns without gradients
        model.conditioner.end_update(ranks.sum, keep=finite and not args.lora)
    count_skipped(run, norm, sums)
    run.optimizer.zero_grad(set_to_none=True)

    # average
    run.step += 1
    if run.step % args.ema_every == 0 or run.step % args.updates_per_epoch == 0:     # so that valid knows it
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

    def first_bad(named) -> str | None:
        """The first tensor (this rank's part of it) that is not finite, on the first rank that has one."""
        bad = (name for name, x in named if not distributed.local_parts([x.detach()])[0].isfinite().all())
        found = run.ranks.gather(next(bad, None))
        return next((f"{name} (rank {rank})" for rank, name in enumerate(found) if name), None)

    weights = first_bad(run.model.named_parameters())
    loss = first_bad((f"loss of codebook {k}", x) for k, x in enumerate(sums, 1))
    gradient = first_bad((name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None)
    if weights:
        raise FloatingPointError(f"step {run.step + 1}: weights not finite; first in {weights}; "
                                 "go on from an earlier checkpoint")
    found = "; ".join(filter(None, (loss, gradient)))
    where = f"step {run.step + 1}: gradients not finite; first in {found}"
    if run.skipped_in_a_row >= run.args.max_skipped:
        raise FloatingPointError(f"{where}; {run.skipped_in_a_row} times in a row; "
                                 "try a lower --lr or --dtype float32")
    # a scaler that looks for its scale skips now and then: once is nothing to report
    if not run.scaler.is_enabled() or run.skipped_in_a_row > 1:
        run.ranks.print(f"{where}; this update is skipped")


# --------------------------------------------------------------------------------------------------
# the epochs


def train_stage(run: Run) -> dict:
    """The rest of an epoch's updates; a log line every `--log_every`, a checkpoint every `--save_minutes`.

    Errors: Stopped, after a checkpoint, where a signal asked any rank to end."""
    args, ranks, epoch = run.args, run.ranks, run.epoch
    begun = run.step - epoch * args.updates_per_epoch           # updates of this epoch that a killed run made
    run.wrapped.train()
    data_epoch, start = (0, 0) if args.overfit_one_batch else (epoch, begun)         # always the same batch
    loader = data.batches(run.train_set, data_epoch, start, args.updates_per_epoch, args.batch_size,
                          rank=ranks.rank, world_size=ranks.world_size, workers=args.workers)
    fixed = micro_batches(run, next(loader)) if args.overfit_one_batch else None

    epoch_began = interval_began = time.perf_counter()
    timed = 0                                                        # updates since `interval_began`
    bar = tqdm(range(begun + 1, args.updates_per_epoch + 1), f"epoch {epoch + 1}", leave=False,
               disable=not (ranks.is_main and sys.stderr.isatty()))
    for position in bar:
        sums, counts, norm = update(run, fixed or micro_batches(run, next(loader)))

        # log
        run.sums += torch.stack([sums, counts / ranks.world_size])   # to both sums; counts are of all ranks
        timed += 1
        last = position == args.updates_per_epoch
        if last or position % args.log_every == 0:
            log_step(run, norm, (time.perf_counter() - interval_began) / timed)
            interval_began, timed = time.perf_counter(), 0

        # save, if it is time to or a signal came; the end of an epoch has its own checkpoint
        due = time.monotonic() - run.saved_at >= 60 * args.save_minutes
        stop, due = ranks.any(run.stop.requested is not None, due)
        if not last and (stop or due):
            resume.save_checkpoint(run)
            if stop:
                raise Stopped(next(filter(None, ranks.gather(run.stop.requested))))
    metrics = loss_metrics(*ranks.sum(run.sums[0].clone()))
    run.sums.zero_()
    return metrics | dict(skipped=run.skipped, seconds=time.perf_counter() - epoch_began)


def log_step(run: Run, norm: float, seconds: float) -> None:
    """The line of the updates since the last one, on the console and in log.jsonl. seconds: of an update."""
    args, frames = run.args, segment_frames(run.args, run.codec)
    metrics = loss_metrics(*run.ranks.sum(run.sums[1].clone()))
    run.sums[1].zero_()
    record = dict(kind="step", stage="train", epoch=run.epoch + 1, step=run.step, **metrics, grad_norm=norm,
                  lr=learning_rate(run.step - 1, args), seconds=seconds,
                  frames_per_second=args.batch_size * frames / seconds, skipped=run.skipped)
    run.log(record)
    skipped = f" | skipped {run.skipped}" if run.skipped else ""
    run.ranks.print(f"epoch {run.epoch + 1} step {run.step} | {loss_text(metrics)} | norm {norm:.2f} | "
                    f"lr {record['lr']:.1e} | {seconds * 1000:.0f} ms | "
                    f"{record['frames_per_second'] / 1000:.1f}k frames/s{skipped}")


def finish_stage(run: Run, stage: str, metrics: dict) -> dict:
    """Logs what a stage found, prints its line, keeps it in the history."""
    record = dict(kind="stage", stage=stage, epoch=run.epoch + 1, step=run.step, **metrics)
    run.history.append(record)
    run.log(record)
    run.ranks.print(stage_text(record))
    return metrics


def keep_best(run: Run, metrics: dict) -> None:
    """Keeps the averaged weights, and writes best.pt, if the validation loss is the lowest so far."""
    if metrics["ce"] < run.best_ce:
        run.best_ce, run.best_values, run.best_step = metrics["ce"], metrics, run.step
        run.best = {name: distributed.detached_copy(x) for name, x in resume.averages(run).items()}
        resume.write_best(run)


def run_epochs(run: Run) -> None:
    """The protocol: train, save, valid, keep_best, evaluate, generate, save."""
    args = run.args
    while run.epoch < args.epochs:
        epoch = run.epoch + 1
        final = epoch == args.epochs

        def is_due(every: int) -> bool:
            return final or bool(every and epoch % every == 0)

        if run.step < epoch * args.updates_per_epoch:      # else a run was killed after this epoch's training
            with run.stop.hold():
                finish_stage(run, "train", train_stage(run))       # a signal waits in here until it has saved
                resume.save_checkpoint(run)
        keep_best(run, finish_stage(run, "valid", stages.valid_stage(run)))
        if is_due(args.evaluate_every):
            finish_stage(run, "evaluate", stages.evaluate_stage(run))
        if is_due(args.generate_every):
            finish_stage(run, "generate", stages.generate_stage(run, f"epoch_{epoch:04d}"))
        with run.stop.hold():
            run.epoch = epoch
            resume.save_checkpoint(run)
        stages.draw_page(run, final)
    if run.unwritten:
        raise OSError(f"the run is finished, but could not be written: {', '.join(run.unwritten)}; "
                      "make room and start it again")


# --------------------------------------------------------------------------------------------------
# from flags to a run


def model_config(args: argparse.Namespace, codec) -> ModelConfig:
    """The language model's shape from the flags and the codec."""
    cross = any("cross" in method for method in fuse_methods(args).values())
    levels = None
    if codec.streams > 1:                                            # 0 0 1 1 ..: left and right at once
        levels = [k // codec.streams for k in range(codec.K)]
    return ModelConfig(
        **parse_size(args.size), K=codec.K, card=codec.card, dropout=args.dropout, cross_attention=cross,
        emb_std=args.emb_std, mask_padding=args.mask_padding, pattern=args.pattern,
        delays=levels if args.pattern == "delay" else None,
        flattening=levels if args.pattern == "unrolled" else None)


def build_conditioner(args: argparse.Namespace, train_set, codec, ranks: Ranks, assets: dict, flat: dict):
    """The conditions that the flags ask for; None if none.

    assets, flat: of the checkpoint or start that the run goes on from, or empty. A stored asset wins over one
    fitted again, because captions may have changed since; what is missing is fitted to the training set."""
    methods, size = fuse_methods(args), parse_size(args.size)
    if not methods:
        return None
    config, kept = ConditionerConfig(methods), {}
    for name in methods:
        condition, stored = CONDITIONS[name], None
        if name in assets:
            asset = common.tensor_to_bytes(assets[name])
            stored = {k.removeprefix(f"{name}_"): v for k, v in flat.items() if k.startswith(f"{name}_")}
        else:
            asset = condition.make_asset(args, train_set)
        if asset is not None:
            kept[name] = asset
        config.shapes[name] = condition.make_config(args, codec, size, asset, stored)
        ranks.print(*condition.notes(args, config.shapes[name], asset, train_set))
    return Conditioner(config, size["dim"], kept)


def optimizer_groups(model: MusicGen, args: argparse.Namespace) -> list:
    """Groups of the optimizer: decayed and not; some conditions learn at `lr_scale` times the rate."""
    parts = model.conditioner.parts.values() if model.conditioner is not None else []
    slower = {id(p) for part in parts if part.learns_at_text_lr for p in part.parameters()}
    groups = []
    for group in decay_groups(model, args.weight_decay):
        for scale, inside in ((1.0, False), (args.text_lr / args.lr, True)):
            params = [p for p in group["params"] if (id(p) in slower) == inside]
            if params:
                groups.append({**group, "params": params, "lr_scale": scale})
    return groups


def build_run(args: argparse.Namespace, ranks: Ranks, codec, sets: tuple, out: Path, stop: Stop, *,
              saved: dict | None = None, begin: Start | None = None) -> Run:
    """Allocates model, average and optimizer. All ranks draw the same weights from the seed.

    sets: of `open_sets`; saved: the checkpoint or best.pt whose weights will be filled in; begin: of
    --init_from."""
    # model: without storage where it takes all its tensors from another
    torch.manual_seed(args.seed)
    assets, flat = {}, {}
    if saved is not None:
        assets, flat = saved["assets"], saved.get("conditioner_config") or {}
    elif begin is not None:
        assets, flat = begin.assets, begin.conditioner_config or {}
    config, dtype = model_config(args, codec), getattr(torch, args.dtype)
    with torch.device("cpu" if begin is None or begin.added else "meta"):
        model = MusicGen(config, build_conditioner(args, sets[0], codec, ranks, assets, flat))
    if begin is not None:
        load_start(model, begin, args.init_from)
    if args.lora:
        add_lora(model, args.lora)
    sharded = args.parallel == "fsdp" and ranks.world_size > 1
    if not sharded:                                                  # sharding moves a layer at a time
        model = model.to(ranks.device)
    model.transformer.checkpointing = args.checkpointing

    # average, compilation, several ranks
    ema = Ema(model, args.ema_decay, share=not sharded)
    if args.compile:
        for layer in model.transformer.layers:
            layer.compile()
    if sharded:
        distributed.shard_model(model, ranks, dtype, args.zero, args.cpu_offload)
        # ZeRO-3 always: with 2, what a layer gathers is freed by the backward pass, and there is none
        distributed.shard_model(ema.model, ranks, dtype, 3, args.cpu_offload)
    wrapped = distributed.wrap_ddp(model, ranks, args.parallel)

    # optimizer
    optimizer = build_optimizer(optimizer_groups(model, args), model, args)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.dtype == "float16")
    sums = torch.zeros(2, 2, config.K, device=ranks.device, dtype=torch.float64)
    return Run(args, ranks, codec, *sets, model, wrapped, ema, optimizer, scaler, out, stop,
               history=[], sums=sums)


# --------------------------------------------------------------------------------------------------
# the command


def prepare_run(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> Run | None:
    """Everything before the first update: the same on every rank, its errors too. None after a dry run."""
    # what there is: data, codec, an estimate
    found = find_data(args, ranks)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    config, T = model_config(args, codec), segment_frames(args, codec)
    if T < 2:
        raise ValueError(f"--segment_seconds {args.segment_seconds:g}: more than the "
                         f"{1 / codec.frame_rate:g} s of a frame")
    ranks.print(*notes, *estimate_lines(args, config, T, ranks.world_size))
    sets = open_sets(args, found, codec, ranks)
    check_sets(args, *sets)
    if args.dry_run:
        stages.read_valid(args, ranks, *sets)
        if args.init_from is not None and not checkpoint.has_checkpoint(Path(args.out)):
            read_start(args, config, codec)                          # says what does not fit
        return None

    # the run folder: locked, and a checkpoint to go on from or weights to start with
    out = common.output_folder(args.out)
    lock = checkpoint.lock_folder(out) if ranks.is_main else None
    try:
        with checkpoint.checkpoint_errors(out):
            saved = resume.find_checkpoint(args, ranks, out, sets, codec)
        if saved is not None:
            with checkpoint.checkpoint_errors(out):
                run = build_run(args, ranks, codec, sets, out, stop, saved=saved)
                resume.restore(run, saved, learning_rate)
        elif args.init_from is not None:
            begin = read_start(args, config, codec)
            ranks.print(f"starting with the weights and the vocabulary of {args.init_from}")
            run = build_run(args, ranks, codec, sets, out, stop, begin=begin)
        else:
            run = build_run(args, ranks, codec, sets, out, stop)
        if run.epoch < args.epochs:
            stages.load_valid(run)
        if ranks.is_main:
            cut_log(out / LOG_NAME, saved["log_bytes"] if saved else 0)
            write_config(run)
            run.board = board.open_board(out, run.step) if args.tensorboard else None
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    run.lock, run.saved_at, run.drawn_at = lock, time.monotonic(), time.monotonic()
    return run


def stage_alone(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> None:
    """--only: a stage of the run in --out with its best weights; prints a line a number, changes no file."""
    out, best = Path(args.out), load.read_model(args.out)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    if codec.fingerprint != best["codec"]["fingerprint"]:
        raise ValueError(f"{args.out}: --codec {args.codec} is not the one it was trained with: "
                         "its fingerprint is another")
    ranks.print(*notes)
    sets = open_sets(args, find_data(args, ranks), codec, ranks)
    run = build_run(args, ranks, codec, sets, out, stop, saved=best)
    with checkpoint.checkpoint_errors(out):
        distributed.load_tensors(distributed.named_tensors(run.ema.model), best["model"])
    run.step = best["step"]
    if args.only == "valid":
        metrics = stages.valid_stage(run)
    elif args.only == "evaluate":
        metrics = stages.evaluate_stage(run)
    else:
        metrics = stages.generate_stage(run, "best")
    for name, value in common.flatten_numbers(metrics).items():
        ranks.print(f"{args.only} {name} {value:.6g}")


def main(argv: list | None = None) -> int:
    """Runs -> exit code: 0; 2 and one line for a mistake of the user; 1 for what went wrong on the way."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args, stop = build_parser().parse_args(argv), Stop()
    run, code = None, 0

    def stopped(signal) -> int:
        if rank == 0:
            where = "before the first update" if run is None else \
                f"after update {run.step}; the same command goes on from there"
            common.tell(f"stopped by {signal}{'' if args.only else f' {where}'}")
        return exit_code(str(signal)) if run is None else int(bool(run.unwritten))

    try:
        with stop:
            if args.only:
                args = flags_of_run(argv, args.out)
            notes = fill_flags(args, world)
            check_flags(args, world)
            distributed.keep_freed_memory(sparing=args.checkpointing)
            ranks = distributed.join_process_group(args.device, args.timeout)
            if args.only:
                stage_alone(args, notes, ranks, stop)
            elif (run := prepare_run(args, notes, ranks, stop)) is not None:
                began = time.perf_counter()
                run_epochs(run)
                ranks.print(f"finished: {duration_text(time.perf_counter() - began)}, "
                            f"{resume.best_text(run)}")
                stages.compare_with_reference(run)
    except Stopped as signal:
        code = stopped(signal)
    except distributed.ENDINGS as error:
        text, mistake = distributed.error_text(error), isinstance(error, ValueError)
        if stop.requested and text and distributed.is_lost_peer(error):     # the others obeyed a signal first
            code = stopped(stop.requested)
        elif text and not os.environ.get("DEBUG"):                   # DEBUG=1 shows where an error was raised
            # before the run every rank makes the same mistake: one a machine says so
            if run is not None or not mistake or os.environ.get("LOCAL_RANK", "0") == "0":
                of_all = world == 1 or (run is None and mistake and rank == 0)
                who = "" if of_all else f", rank {rank}"
                print(f"train.py{who}: {text}", file=sys.stderr, flush=True)
            code = 2 if mistake else 1
        elif world == 1:
            raise
        else:
            traceback.print_exc()
            code = 1
    finally:
        if run is not None and run.lock is not None:
            os.close(run.lock)
    if problem := common.stdout_problem():                           # a run's figures are in its log
        common.tell(f"train.py: {problem}", file=sys.stderr)
        code = code or int(bool(args.only))
    if world > 1:
        distributed.exit_process(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
