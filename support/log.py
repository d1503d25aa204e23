"""What a run says of itself: the figures of a loss, lines on the console, log.jsonl and config.json.

log.jsonl has a line for every `--log_every` updates and for every stage. A checkpoint remembers how many
bytes it had, so that a run which was killed drops what came after and writes it again.
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from support import common
from support.sets import sets_fingerprint

LOG_NAME = "log.jsonl"


def loss_metrics(sums: Tensor, counts: Tensor) -> dict:
    """Summed loss [K] and targets [K] of each codebook -> {"ce", "ppl", "ce_q1", "ppl_q1", ..}.

    ce is the mean over codebooks of sum / count, nan where there was no target; ppl is exp(ce)."""
    each = (sums / counts).tolist()
    ce = sum(each) / len(each)
    metrics = dict(ce=ce, ppl=math.exp(min(ce, 80.0)))
    for k, value in enumerate(each, 1):
        metrics |= {f"ce_q{k}": value, f"ppl_q{k}": math.exp(min(value, 80.0))}
    return metrics


def loss_text(metrics: dict) -> str:
    """`ce 4.812 | q1 4.100 q2 ..`"""
    codebooks = [name for name in metrics if name.startswith("ce_q")]
    return f"ce {metrics['ce']:.4f} | " + " ".join(f"{name[3:]} {metrics[name]:.3f}" for name in codebooks)


def stage_text(record: dict) -> str:
    """A finished stage's line on the console."""
    result = loss_text(record) if "ce" in record else f"{record.get('samples', 0)} samples"
    return f"epoch {record['epoch']} {record['stage']} | {result} | {record.get('seconds', 0.0):.1f} s"


# --------------------------------------------------------------------------------------------------
# log.jsonl


def append_record(path: Path, record: dict) -> None:
    """Appends a line to log.jsonl. A full disk does not end the run, and leaves no half of a line."""
    size = log_size(path)
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        common.tell(f"a line of {path} was not written ({error})", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.truncate(path, size)


def log_size(path: Path) -> int:
    """Bytes of log.jsonl."""
    return path.stat().st_size if path.exists() else 0


def flush_log(path: Path) -> int:
    """Makes log.jsonl survive a power cut before a checkpoint counts on its bytes -> their number."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        os.fsync(file.fileno())
    return log_size(path)


def cut_log(path: Path, size: int) -> None:
    """Drops what a killed run wrote to log.jsonl after its last checkpoint: it will be written again.

    Errors: ValueError for a file that is no such log; it is left as it is."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        begins, kept = file.read(7), file.seek(max(0, size - 1)) and file.read(1)
    if not (b'{"kind"'.startswith(begins) and kept in (0, b"", b"\n")):
        raise ValueError(f"{path} is not the log of this run: move it away, or give another --out")
    if path.stat().st_size > size:
        os.truncate(path, size)


def only_begun(path: Path) -> bool:
    """Whether log.jsonl has nothing but what is logged before a first checkpoint: training in epoch 1."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):                             # cut by a kill
                return b'{"kind"'.startswith(line[:7])
            try:
                record = json.loads(line)
                begins = record["stage"] == "train" and record["epoch"] == 1
            except (ValueError, LookupError, TypeError, RecursionError):
                begins = False
            if not begins:
                return False
    return True


def describe_run(run) -> dict:
    """What config.json holds: all flags, the shapes of the model and its conditions, the codec, the files."""
    conditioner = run.model.conditioner
    return dict(args=vars(run.args), model=asdict(run.model.config),
                conditioner=None if conditioner is None else conditioner.config.to_dict(),
                codec=run.codec.reference, files=sets_fingerprint(run.train_set, run.valid_set),
                parameters=sum(p.numel() for p in run.model.parameters()), torch=torch.__version__)


def write_config(run) -> None:
    """config.json."""
    common.write_json(run.out / "config.json", describe_run(run))
