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
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import checkpoint, common
import conditioning
import data
from evaluate import board, page
from interop import load
from support import distributed
import tokenizer
from support.build import build, model_config, read_start
from support.checkpoint import checkpoint_errors
from support.flags import build_parser, check, derive, duration, estimate, of_the_run, segment_frames
from support.distributed import Ranks
from support.signals import Stop, Stopped
from support.scan import scan_dataset
from support.run import Run, commit, cut_log, keep_best, read_checkpoint, restore, show, summary, write_config
from evaluate.stages import (beside_text, draw_page, evaluate_stage, figures, generate_stage, prepare, to_codes, valid_stage,
                             without_excerpts)

REFERENCE_RUN = page.REFERENCE_RUN
DROPOUT_STREAM = 13                                                  # name of a random stream, see conditioning.generator


# ---------------------------------------------------------------------------------------------------------------------
# one update


def lr_at(step: int, args: argparse.Namespace) -> float:
    """Learning rate of update `step` (from 0): linear warm-up that starts above zero, then a cosine to the minimum."""
    total = args.epochs * args.updates_per_epoch
    if step < args.warmup_steps:
        return args.lr * (step + 1) / (args.warmup_steps + 1)
    done = min(1.0, (step - args.warmup_steps) / max(1, total - args.warmup_steps))
    return args.lr * (args.lr_min_ratio + (1 - args.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


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


def update(run: Run, micros: list) -> tuple[Tensor, Tensor, float]:
    """One optimiser step. Returns the rank's summed loss [K], the targets of all ranks [K] and the gradient norm."""
    args, model = run.args, run.model
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(run.step, args) * group["lr_scale"]
    counts = run.ranks.sum(sum(model.count_targets(learnt) for *_, learnt in micros)).clamp_min(1)      # [K]
    sums = torch.zeros(model.config.K, device=run.ranks.device)
    for i, micro in enumerate(micros):
        with distributed.gradient_sync(run.wrapped, last=i == len(micros) - 1):
            with run.autocast():
                part = run.wrapped(*micro)                                                              # [K]
            loss = (part / counts).mean() * run.ranks.world_size          # gradients are averaged over ranks: undo the division
            run.scaler.scale(loss).backward()
        sums += part.detach()
    run.scaler.unscale_(run.optimizer)
    norm = distributed.full_tensor(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if args.max_grad_norm and norm.isfinite():                       # what is not finite stays where it is, to be named
        nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, norm)
    norm = float(norm)
    if math.isfinite(norm) or run.scaler.is_enabled():               # the scaler itself skips what is not finite
        run.scaler.step(run.optimizer)
        run.scaler.update()
    if model.conditioner is not None:
        model.conditioner.learn(run.ranks.sum, keep=math.isfinite(norm) and not args.lora)
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
    return next((name for name, x in named if not distributed.local_parts([x.detach()])[0].isfinite().all()), None)


def found_first(ranks: Ranks, name: str | None) -> str | None:
    """The first rank that found something, with it: "NAME (rank 1)"."""
    return next((f"{found} (rank {rank})" for rank, found in enumerate(ranks.gather(name)) if found), None)


# ---------------------------------------------------------------------------------------------------------------------
# the run


def train_stage(run: Run) -> dict:
    """The rest of an epoch's updates; a log line every `--log_every`, a checkpoint every `--save_minutes`.

    Errors: Stopped, after a checkpoint, where a signal asked any rank to end."""
    args, ranks, epoch = run.args, run.ranks, run.epoch
    start = run.step - epoch * args.updates_per_epoch
    run.wrapped.train()
    first = (0, 0) if args.overfit_one_batch else (epoch, start)
    loader = data.batches(run.train_set, *first, args.updates_per_epoch, args.batch_size,
                          rank=ranks.rank, world_size=ranks.world_size, workers=args.workers)
    fixed = micro_batches(run, next(loader)) if args.overfit_one_batch else None
    began = marked = time.perf_counter()
    timed = 0                                                        # updates since `marked`
    for position in tqdm(range(start + 1, args.updates_per_epoch + 1), f"epoch {epoch + 1}", leave=False,
                         disable=not (ranks.is_main and sys.stderr.isatty())):
        sums, counts, norm = update(run, fixed or micro_batches(run, next(loader)))
        run.sums += torch.stack([sums, counts / ranks.world_size])        # counts are of all ranks already
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


def finish_stage(run: Run, stage: str, epoch: int, values: dict) -> dict:
    """Logs a stage, prints its line, keeps it in the history."""
    record = dict(kind="stage", stage=stage, epoch=epoch, step=run.step, **values)
    run.history.append(record)
    run.log(record)
    run.ranks.print(summary(record))
    return values


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


def compare_with_reference(run: Run) -> None:
    """Prints how far the validation loss of this run is from the reference run's, at the same number of updates."""
    curve = {r["step"]: r for r in page.reference_curve(vars(run.args), REFERENCE_RUN) if r["stage"] == "valid"}
    mine = {r["step"]: r for r in run.history if r["stage"] == "valid"}
    if not (both := sorted(set(curve) & set(mine))):
        return
    step = both[-1]
    run.ranks.print(f"beside the reference run at step {step}: ce {mine[step]['ce']:.4f} here, {curve[step]['ce']:.4f} there; "
                    + ", ".join(f"{k[3:]} {mine[step][k] - curve[step][k]:+.4f}" for k in mine[step] if k.startswith("ce_q")))


def prepare_folder(args: argparse.Namespace) -> Path:
    """The run folder, made if need be. Errors: ValueError where it cannot be, or holds a run not to be gone on with."""
    if args.resume == "never" and checkpoint.has_checkpoint(Path(args.out)):
        raise ValueError(f"--resume never, but {args.out} holds a run: give another --out")
    return common.output_folder(args.out)


def prepare_run(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> Run | None:
    """Everything before the first update: the same on every rank, its errors too. None after a dry run."""
    found = args.dataset if args.cache or args.dataset == "toy" else scan_dataset(args.dataset)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    config, T = model_config(args, codec), segment_frames(args, codec)
    if T < 2:
        raise ValueError(f"--segment_seconds {args.segment_seconds:g}: more than the {1 / codec.frame_rate:g} s of a frame")
    ranks.print(*notes, *estimate(args, config, T, ranks.world_size))
    if args.dry_run:
        return None
    out = prepare_folder(args)
    held = checkpoint.lock_folder(out) if ranks.is_main else None
    try:
        with checkpoint_errors(out):
            saved = read_checkpoint(args, ranks, out)
        start = read_start(args, config, codec) if saved is None else None
        if start is not None:
            ranks.print(f"starting with the weights and the vocabulary of {args.init_from}")
        run = build(args, ranks, codec, found, out, saved, stop, start)
        if saved is not None:
            with checkpoint_errors(out):
                restore(run, saved)
        if ranks.is_main:
            with checkpoint_errors(out):
                cut_log(out / "log.jsonl", saved["log_bytes"] if saved else 0)
            write_config(run)
            run.board = board.open_board(out, run.step) if args.tensorboard else None
    except BaseException:
        if held is not None:
            os.close(held)
        raise
    run.held, run.saved_at, run.drawn_at = held, time.monotonic(), time.monotonic()
    return run


def stage_alone(args: argparse.Namespace, notes: list, ranks: Ranks, stop: Stop) -> None:
    """A stage of the run in --out with its best weights; prints a line a figure. History, log and checkpoints stay as they are."""
    out, best = Path(args.out), load.read_model(args.out)
    found = args.dataset if args.cache or args.dataset == "toy" else scan_dataset(args.dataset)
    codec = tokenizer.load_codec(args.codec, args.num_codebooks, ranks.device, args.channels)
    if codec.fingerprint != best["codec"]["fingerprint"]:
        raise ValueError(f"{args.out}: --codec {args.codec} is not the one it was trained with: its fingerprint is another")
    ranks.print(*notes)
    run = build(args, ranks, codec, found, out, best, stop)
    with checkpoint_errors(out):
        distributed.load_tensors(distributed.named_tensors(run.ema.model), best["model"])
    run.step = best["step"]
    values = {"valid": lambda: valid_stage(run), "evaluate": lambda: evaluate_stage(run), "generate": lambda: generate_stage(run, "best")}
    ranks.print(*(f"{args.only} {name} {value:.6g}" for name, value in common.flatten_numbers(values[args.only]()).items()))


def train(run: Run) -> None:
    """From the first update to the end of the run."""
    began = time.perf_counter()
    run_epochs(run)
    run.ranks.print(f"finished: {duration(time.perf_counter() - began)}, best valid ce {run.best_ce:.4f}; {run.out / 'best.pt'}")
    compare_with_reference(run)


# ---------------------------------------------------------------------------------------------------------------------
# the command


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
            distributed.keep_freed_memory(sparing=args.checkpointing)
            ranks = distributed.join_process_group(args.device, args.timeout)
            if args.only:
                stage_alone(args, notes, ranks, stop)
            elif (run := prepare_run(args, notes, ranks, stop)) is not None:
                train(run)
    except Stopped as signal:
        code = stopped(run, signal, rank)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        mistake = isinstance(error, ValueError)
        text = explain(error)
        if stop.requested and text and distributed.is_lost_peer(error):          # the others have obeyed a signal first
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
        distributed.exit_process(code)
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
    if distributed.is_lost_peer(error):
        return f"lost the other ranks ({common.describe_error(error)}); the same command goes on from the last checkpoint"
    if "DataLoader worker" in str(error):
        return f"a process that loads data died ({common.describe_error(error)}); the same command goes on from the last checkpoint"
    return None


if __name__ == "__main__":
    sys.exit(main())
