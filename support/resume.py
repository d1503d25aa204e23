"""The two files of a run: best.pt to generate and to ship, last.pt to go on from.

    write_best        ─► best.pt                  averaged weights of the lowest validation loss, and all that
                                                  generating takes; of the codec the path and fingerprint
    save_checkpoint   ─► last.pt, last.prev.pt    all tensors and numbers that resuming takes: bit for bit
    find_checkpoint   ─► restore                  and back; or nothing, in a folder for a new run

Only last.pt holds the trained weights and the average as they are now (--lora: apart from the matrices that
they add to), the optimizer, the scaler, counters, the history of stages and the sums of the epoch under way;
it holds the best average, too. Several ranks, each with its own shards, write and read them together. How the
files are written is in checkpoint.py.

A full disk ends no run: what could not be written is named, and tried again at the next checkpoint. A new run
writes over nothing, and one whose folder was taken away stops.
"""

import argparse
import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from generate import Sampling
from model import MusicGen
from support import checkpoint, common, distributed
from support.distributed import Ranks
from support.flags import changed_flags, refused_changes, segment_frames
from support.log import LOG_NAME, flush_log, log_size, only_begun, stage_text
from support.lora import merge_lora
from support.sets import sets_fingerprint

# what last.pt must hold, but for the shape of the conditions, files and codec, which older ones lack
CHECKPOINT_KEYS = {
    "format", "args", "step", "epoch", "ema_count", "scaler", "skipped", "skipped_in_a_row", "best_ce",
    "best_values", "history", "sums", "data", "log_bytes", "assets", "names", "tensors", "shards"}


def try_to_write(action, *arguments) -> str | None:
    """Does something that writes to the disk -> what went wrong, or None."""
    try:
        action(*arguments)
    except (OSError, RuntimeError, ValueError) as error:   # torch and write_audio report a full disk as these
        return common.describe_error(error)
    return None


def note_written(run, name: str, problem: str | None, shared: bool = True) -> None:
    """Remembers on every rank (`shared`) what could not be written on any, and says so."""
    if shared:
        problem = next(filter(None, run.ranks.gather(problem)), None)
    if problem:
        if run.args.only:                       # nothing goes on that could try again
            raise OSError(f"{name} was not written: {problem}")
        run.ranks.print(f"{name} was not written: {problem}; the one before is kept and the run goes on")
    run.unwritten = tuple(n for n in run.unwritten if n != name) + ((name,) if problem else ())


def stored_conditions(model: MusicGen) -> dict:
    """The conditions' shapes, and what they need beside weights, as plain data and uint8 tensors."""
    conditioner = model.conditioner
    if conditioner is None:
        return dict(conditioner_config=None, assets={})
    assets = {name: common.bytes_to_tensor(content) for name, content in conditioner.assets.items()}
    return dict(conditioner_config=conditioner.config.to_dict(), assets=assets)


# --------------------------------------------------------------------------------------------------
# best.pt


def check_folder(run) -> None:
    """Before anything is written. Errors: OSError on all ranks where the folder is no longer this run's."""
    if not run.ranks.broadcast(checkpoint.owns_folder(run.out, run.lock)):
        raise OSError(f"{run.out} was removed, or begun anew by another process, while this run wrote to it: "
                      f"it stops after update {run.step}")


def write_best(run) -> None:
    """Writes best.pt. All ranks call it. On a full disk the next checkpoint tries again."""
    check_folder(run)
    content, problem = export_best(run, keep=run.ranks.is_main), None
    if run.ranks.is_main:
        problem = try_to_write(common.write_torch, run.out / "best.pt", content)
    note_written(run, "best.pt", problem)


def write_missing_best(run) -> None:
    """Writes best.pt again where it is gone or could not be written. All ranks call it."""
    gone = run.ranks.broadcast(not (run.out / "best.pt").exists())
    if run.best is not None and (gone or "best.pt" in run.unwritten):
        write_best(run)


def best_text(run) -> str:
    """What is to be said of best.pt at the end of a run."""
    if run.best is None:
        return "no best.pt: the validation loss was never finite"
    return f"best valid ce {run.best_ce:.4f}; {run.out / 'best.pt'}"


def export_best(run, keep: bool = True) -> dict:
    """The content of best.pt, plain tensors and data. All ranks call it; weights for those that `keep`."""
    args, model = run.args, run.model
    # no best weights yet where every validation so far was not finite
    weights = distributed.named_tensors(run.ema.model) | (run.best or {})
    weights = distributed.gather_state(weights, keep)
    added = {name: x for name, x in weights.items() if "_lora." in name}         # also by themselves, to ship
    sampling = Sampling(args.cfg, args.temperature, args.top_k, args.top_p)
    return dict(format=common.FORMAT, model=merge_lora(weights), **({"lora": added} if added else {}),
                model_config=asdict(model.config), **stored_conditions(model), codec=run.codec.reference,
                segment_frames=segment_frames(args, run.codec), sampling=asdict(sampling),
                metrics=dict(run.best_values or {}), step=run.best_step or run.step, args=vars(args))


# --------------------------------------------------------------------------------------------------
# last.pt


def averages(run) -> dict:
    """{name: tensor} of the average, without what is frozen: the model has that."""
    frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in distributed.named_tensors(run.ema.model).items() if name not in frozen}


def run_tensors(run) -> dict:
    """Every tensor that resuming takes, as it lies on this rank: {"model/out_norm.weight": tensor, ..}."""
    names = {p: name for name, p in run.model.named_parameters()}
    found = {f"model/{name}": x for name, x in distributed.named_tensors(run.model).items()}
    found |= {f"ema/{name}": x for name, x in averages(run).items()}
    found |= {f"best/{name}": x for name, x in (run.best or {}).items()}
    for p, state in run.optimizer.state.items():
        found |= {f"optimizer/{key}/{names[p]}": x for key, x in state.items()}
    return found


def save_checkpoint(run) -> None:
    """Writes last.pt; the one before becomes last.prev.pt. All ranks call it. A full disk keeps both."""
    check_folder(run)
    write_missing_best(run)
    run.saved_at = time.monotonic()

    # the tensors: gathered on rank 0, or written by every rank beside last.pt
    every, shards, whole, problem = run_tensors(run), None, None, None
    if run.args.sharded_checkpoint:
        try:
            shards = checkpoint.save_shards(run.out, every, run.ranks)
        except OSError as error:
            problem = str(error)
    else:
        whole = distributed.gather_state(every, keep=run.ranks.is_main)

    # the rest
    sums = run.ranks.sum(run.sums.clone())
    if run.ranks.is_main and problem is None:
        content = dict(
            format=common.FORMAT, args=vars(run.args), step=run.step, epoch=run.epoch,
            ema_count=run.ema.count, scaler=run.scaler.state_dict(),
            skipped=run.skipped, skipped_in_a_row=run.skipped_in_a_row,
            best_ce=run.best_ce, best_values=run.best_values, history=run.history, sums=sums.cpu(),
            data=run.train_set.describe(), files=sets_fingerprint(run.train_set, run.valid_set),
            codec=run.codec.fingerprint, log_bytes=flush_log(run.out / LOG_NAME),
            **stored_conditions(run.model), names=list(every), tensors=whole, shards=shards)
        last, previous = run.out / checkpoint.LAST, run.out / checkpoint.PREVIOUS
        problem = try_to_write(common.write_torch, last, content, previous)
        checkpoint.remove_unused_shards(run.out)
    note_written(run, checkpoint.LAST, problem)


def moved_flags(args: argparse.Namespace, saved: dict, sets: tuple, codec) -> set:
    """Flags whose path may be another than in a checkpoint, because the same files or codec lie there."""
    moved = set()
    for name in ("dataset", "valid", "cache", "captions"):                       # ./music is music/
        there, here = saved["args"].get(name), getattr(args, name)
        if there and here and os.path.realpath(str(there)) == os.path.realpath(str(here)):
            moved.add(name)
    if saved.get("files") == sets_fingerprint(*sets):
        moved |= {"dataset", "valid", "captions"}
        moved |= {"cache"} if args.cache and saved["args"].get("cache") else set()
    elif "files" not in saved and saved["data"] == sets[0].describe():          # an older one
        moved.add("dataset")
    if saved.get("codec") == codec.fingerprint:
        moved.add("codec")
    return moved


def find_checkpoint(args: argparse.Namespace, ranks: Ranks, out: Path, sets: tuple, codec) -> dict | None:
    """The folder's newest whole checkpoint, if there is one to go on from. Rank 0 chooses it.

    Errors: ValueError if its flags differ in what matters, naming the differences, if none that is there can
    be read, or if there is none and a new run would write over something."""
    name, lines, problem = None, [], None
    if ranks.is_main:
        try:
            if not checkpoint.has_checkpoint(out):
                check_new_folder(args, out)
            elif args.resume == "never":
                raise ValueError(f"--resume never, but {out} holds a run: give another --out")
            name, lines = checkpoint.newest_checkpoint(out, common.FORMAT, CHECKPOINT_KEYS)
        except ValueError as error:
            problem = str(error)
    name, lines, problem = ranks.broadcast((name, lines, problem))
    ranks.print(*lines)
    if problem:
        raise ValueError(problem)
    if name is None:
        return None
    saved = checkpoint.read_checkpoint_file(out / name, check=False)              # rank 0 has just checked it
    if refused := refused_changes(args, saved["args"], moved_flags(args, saved, sets, codec)):
        raise ValueError(f"{out} holds another run: {'; '.join(refused)}. Give the same flags, or "
                         "another --out")
    return saved


def check_new_folder(args: argparse.Namespace, out: Path) -> None:
    """Errors: ValueError if a new run would write over what lies in its folder, in which is no checkpoint.

    What a run leaves that was killed before its first checkpoint is given up: config.json, and the log of its
    first epoch if the flags are the same."""
    way_out = f"Move it away to begin anew, or give another --out than {out}"
    for name in ("best.pt", "samples", "index.html"):
        if os.path.lexists(out / name):
            raise ValueError(f"{out / name} is there, but no last.pt to go on from. {way_out}")
    flags, log = None, out / LOG_NAME
    if os.path.lexists(out / "config.json"):
        with contextlib.suppress(ValueError, LookupError):
            flags = common.read_json(out / "config.json")["args"]
        if not isinstance(flags, dict):
            raise ValueError(f"{out / 'config.json'} is not that of a run. {way_out}")
    if os.path.lexists(log) and not only_begun(log):
        raise ValueError(f"{log} is the log of more than a first epoch, or of something else, and there is "
                         f"no last.pt to go on from. {way_out}")
    refused = ["it has no config.json"] if flags is None else refused_changes(args, flags)
    if log_size(log) and refused:
        raise ValueError(f"{log} is the log of another run: {'; '.join(refused)}. {way_out}")


def restore(run, saved: dict, learning_rate) -> None:
    """Goes on from a checkpoint, and prints the epochs it holds.

    learning_rate: a function of (step, flags)."""
    allocate_tensors(run, saved["names"])
    if saved["shards"]:
        checkpoint.load_shards(run.out, saved["shards"], run_tensors(run), run.ranks)
    else:
        distributed.load_tensors(run_tensors(run), saved["tensors"])
    run.scaler.load_state_dict(saved["scaler"])
    run.step, run.epoch, run.history = saved["step"], saved["epoch"], saved["history"]
    run.ema.count = saved["ema_count"]
    run.skipped, run.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
    run.best_ce, run.best_values = saved["best_ce"], saved["best_values"]
    steps = {r["ce"]: r["step"] for r in run.history if r["stage"] == "valid"}
    run.best_step = steps.get(run.best_ce, 0)
    if run.ranks.is_main:
        run.sums.copy_(saved["sums"])          # of all ranks: if one rank has them, their sum is the same

    changed = changed_flags(run.args, saved["args"])
    now = [f"; --{name} is {value} now" for name, (_, value) in changed.items() if name != "init_from"]
    if run.args.init_from and "init_from" in changed:
        now.append(f"; --init_from {run.args.init_from} has no effect: a new run alone reads it")
    run.ranks.print(f"going on from step {run.step}" + "".join(now))
    if "epochs" in changed:
        then = argparse.Namespace(**vars(run.args) | saved["args"])
        rates = [learning_rate(run.step - 1, then), learning_rate(run.step, run.args)]
        run.ranks.print(f"another number of epochs is another schedule: the learning rate was {rates[0]:.1e} "
                        f"in the last update and is {rates[1]:.1e} in the next")
    now = run.train_set.describe()
    if now != saved["data"]:
        run.ranks.print(f"the data are not what they were: {saved['data']} then, {now} now")
    run.ranks.print(*map(stage_text, run.history))
    write_missing_best(run)


def allocate_tensors(run, names: list) -> None:
    """Makes the tensors that a new run has not yet: the optimizer's and the best weights."""
    params = dict(run.model.named_parameters())
    for name in names:
        group, _, rest = name.partition("/")
        if group == "optimizer":
            key, _, rest = rest.partition("/")
            like = params[rest]
            new = torch.zeros((), device=like.device) if key == "step" else torch.zeros_like(like)
            run.optimizer.state[like][key] = new
    if any(name.startswith("best/") for name in names):
        run.best = {name: distributed.detached_copy(x) for name, x in averages(run).items()}
