"""A run: everything that lives through training, and its files: log.jsonl, best.pt to deploy, last.pt to go on from.

    keep_best ─► best.pt                   averaged weights of the lowest validation loss, and all that generating takes
    commit    ─► last.pt, last.prev.pt     every tensor and number that resuming takes: it goes on bit for bit
    read_checkpoint ─► restore             and back

What files look like inside is in checkpoint.py; several ranks, each with its own shards, write and read them together.
A disk that is full ends no run: what could not be written is named, and tried again at the next checkpoint.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from support import checkpoint
from support import common
import conditioning
import generate
from evaluate import board
from support import distributed
from support.signals import Stop
from support.flags import NEUTRAL, segment_frames
from model import MusicGen
from support.lora import merge_lora
from support.distributed import Ranks

CHECKPOINT = {"format", "args", "step", "epoch", "ema_count", "scaler", "skipped", "skipped_in_a_row", "best_ce", "best_values",
              "history", "sums", "data", "log_bytes", "assets", "names", "tensors", "shards"}                # what last.pt holds


class Ema:
    """Bias-corrected average of the weights, a model of its own beside the trained one, in float32.

    count = count * decay + 1; weight of the newest = 1 / count: 1, .5025, .3367, ... towards 1 - decay. What is frozen is its own
    average, and lies in memory once (`share`), where it will not be sharded."""

    def __init__(self, model: nn.Module, decay: float, share: bool = True):
        frozen = {id(p): p for p in model.parameters() if share and not p.requires_grad}
        self.model, self.decay, self.count = copy.deepcopy(model, frozen).requires_grad_(False).eval(), decay, 0.0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now; where they are sharded, each rank its own part."""
        self.count = self.count * self.decay + 1
        learnt = [(old, now) for old, now in zip(self.model.parameters(), model.parameters()) if now.requires_grad]
        mine, new = (distributed.local_parts(parameters) for parameters in zip(*learnt))
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
                board.show_record(self.board, record)


def show(values: dict) -> str:
    """`ce 4.812 | q1 4.100 q2 ...`"""
    codebooks = [k for k in values if k.startswith("ce_q")]
    return f"ce {values['ce']:.4f} | " + " ".join(f"{k[3:]} {values[k]:.3f}" for k in codebooks)


def summary(record: dict) -> str:
    """A stage's line on the console."""
    figures = show(record) if "ce" in record else f"{record.get('samples', 0)} samples"
    return f"epoch {record['epoch']} {record['stage']} | {figures} | {record.get('seconds', 0.0):.1f} s"


# ---------------------------------------------------------------------------------------------------------------------
# files


def attempt(action, *arguments) -> str | None:
    """Does something that writes to the disk; what went wrong, or None."""
    try:
        action(*arguments)
    except (OSError, RuntimeError, ValueError) as error:             # torch and write_audio report a full disk as the latter two
        return common.describe_error(error)
    return None


def note_written(run: Run, name: str, problem: str | None, shared: bool = True) -> None:
    """Remembers on every rank (`shared`) what could not be written on any, and says so."""
    problem = next(filter(None, run.ranks.gather(problem)), None) if shared else problem
    if problem:
        run.ranks.print(f"{name} was not written: {problem}; the one before is kept and the run goes on")
    run.unwritten = tuple(n for n in run.unwritten if n != name) + ((name,) if problem else ())


def write_config(run: Run) -> None:
    """config.json: every flag, the model's and the conditioner's shape, the codec."""
    conditioner = run.model.conditioner
    content = dict(args=vars(run.args), model=asdict(run.model.config),
                   conditioner=None if conditioner is None else asdict(conditioner.config),
                   codec=run.codec.reference,
                   parameters=sum(p.numel() for p in run.model.parameters()), torch=torch.__version__)
    common.write_json(run.out / "config.json", content)


def log_size(run: Run) -> int:
    """Bytes of log.jsonl, for `cut_log` to cut off what comes after."""
    path = run.out / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def flush_log(run: Run) -> int:
    """Makes log.jsonl last before a checkpoint counts on its bytes; their number."""
    with contextlib.suppress(OSError), open(run.out / "log.jsonl", "rb") as f:
        os.fsync(f.fileno())
    return log_size(run)


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


# ---------------------------------------------------------------------------------------------------------------------
# best.pt: for deployment


def keep_best(run: Run, values: dict) -> None:
    """Keeps the averaged weights, and writes best.pt, if the validation loss is the lowest so far."""
    if values["ce"] < run.best_ce:
        run.best_ce, run.best_values = values["ce"], values
        run.best = {name: distributed.detached_copy(x) for name, x in averages(run).items()}
        write_best(run)


def write_best(run: Run) -> None:
    """Writes best.pt; where the disk is full it says so, and the next checkpoint tries again."""
    content = deployment(run, keep=run.ranks.is_main)
    note_written(run, "best.pt", attempt(common.write_torch, run.out / "best.pt", content) if run.ranks.is_main else None)


def deployment(run: Run, keep: bool = True) -> dict:
    """The content of best.pt: plain tensors and plain data, all that generating takes but the codec. All ranks call it;
    those that do not `keep` the weights get none."""
    model, args, codec = run.model, run.args, run.codec
    conditioner = model.conditioner
    weights = distributed.named_tensors(run.ema.model) | (run.best or {})        # none yet where every validation was not finite
    return dict(format=common.FORMAT, model=merge_lora(distributed.gather_state(weights, keep)), model_config=asdict(model.config),
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


# ---------------------------------------------------------------------------------------------------------------------
# last.pt: to go on from


def averages(run: Run) -> dict:
    """{name: tensor} of the average, without what is frozen: the model has that."""
    frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in distributed.named_tensors(run.ema.model).items() if name not in frozen}


def tensors(run: Run) -> dict:
    """Every tensor that resuming takes, as it lies on this rank: {"model/out_norm.weight": tensor, "optimizer/exp_avg/..": ..}."""
    names = {p: name for name, p in run.model.named_parameters()}
    found = {f"model/{name}": x for name, x in distributed.named_tensors(run.model).items()}
    found |= {f"ema/{name}": x for name, x in averages(run).items()}
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
        whole = distributed.gather_state(every, keep=run.ranks.is_main)
    if run.ranks.is_main and problem is None:
        content = dict(
            format=common.FORMAT, args=vars(run.args), step=run.step, epoch=run.epoch, ema_count=run.ema.count,
            scaler=run.scaler.state_dict(), skipped=run.skipped, skipped_in_a_row=run.skipped_in_a_row, best_ce=run.best_ce,
            best_values=run.best_values, history=run.history, sums=sums.cpu(), data=run.train_set.describe(),
            log_bytes=flush_log(run), assets=stored_assets(run.model),
            conditioner_config=asdict(run.model.conditioner.config) if run.model.conditioner else None,
            names=list(every), tensors=whole, shards=shards)
        problem = attempt(common.write_torch, run.out / checkpoint.LAST, content, run.out / checkpoint.PREVIOUS)
        checkpoint.remove_unused_shards(run.out)
    note_written(run, checkpoint.LAST, problem)


def read_checkpoint(args: argparse.Namespace, ranks: Ranks, out: Path) -> dict | None:
    """The folder's newest whole checkpoint, if there is one to go on from. Rank 0 chooses it.

    Errors: ValueError if its flags differ in what matters, naming the differences, or if none that is there can be read."""
    name, lines, problem = None, [], None
    if ranks.is_main:
        try:
            name, lines = checkpoint.newest_checkpoint(out, common.FORMAT, CHECKPOINT)
        except ValueError as error:
            problem = str(error)
    name, lines, problem = ranks.broadcast((name, lines, problem))
    ranks.print(*lines)
    if problem:
        raise ValueError(problem)
    if name is None:
        return None
    saved = checkpoint.read_checkpoint_file(out / name, check=False)                 # rank 0 has just done that
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
        distributed.load_tensors(tensors(run), saved["tensors"])
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
        run.best = {name: distributed.detached_copy(x) for name, x in averages(run).items()}
