"""What only a GPU can show, in one command of at most eight minutes; on a CPU the same parts at a toy's size.

    python -m tools.gpu_check --json gpu.json

The parts run one after the other, each a process with a time limit of its own: the tests that need a GPU, the
quick start (shortened), speed and memory of the sizes small and medium beside the peers that are installed,
and DDP and FSDP over NCCL with one rank. What fails is a row that says so with the last line of its output,
and the next part runs. Exit code 1 if any failed. A target that is missed is shown and is no failure.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from model import SIZES, ModelConfig, MusicGen
from support import common
from support.distributed import Ranks, exit_process, full_tensor, shard_model
from tools.peers import INSTALL

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 480
TARGET_MFU = "MFU {}%", 45                     # of size small, 1,500 frames, compiled
TARGET_SPEED = "{} x real time", 15            # of size small, a clip, guidance, compiled
SHOWN = ("ours", "transformers", "audiocraft", "    ours is", "finished", "one rank")    # beginnings of lines
OURS = "ours "
RUNNING = []                                   # processes of parts, those that have ended included
ERROR = r"(\[rank0\]: )?(tools\.\w+: |train\.py: |FAILED |\w*Error: )"


@dataclass
class CheckPart:
    """A part: its command, its time limit, and what a figure of ours should reach, (form, least number)."""
    name: str
    command: list
    limit: int                                 # seconds
    target: tuple | None = None


@dataclass
class Outcome:
    """What a part gave: its lines, and why it failed, if it did."""
    name: str
    command: str
    seconds: float
    problem: str | None
    lines: list = field(default_factory=list)
    target: str | None = None                  # what should be reached, and whether it was


def check_parts(device: str, folder: str) -> list:
    """All parts; folder: for what they write."""
    python, on_gpu = [sys.executable], torch.device(device).type == "cuda"
    bench = [*python, "-m", "tools.bench"]
    peers = [name for name in INSTALL if importlib.util.find_spec(name)]
    vs = ["--vs", *peers] if peers else []
    small, medium = (["--device", device, "--size", size if on_gpu else "debug"]
                     for size in ("small", "medium"))
    few = [] if on_gpu else ["--frames", "24", "--rounds", "2", "--batch_size", "1", "--threads", "1"]
    fast = ["--compile", "--limit"] if on_gpu else []                # on a CPU the compiler takes minutes

    start = [*python, "train.py", "--device", device, "--out", str(Path(folder, "run"))]
    start += ["--epochs", "3", "--eval_samples", "32"] if on_gpu else \
        ["--size", "debug", "--epochs", "1", "--updates_per_epoch", "2", "--batch_size", "2",
         "--valid_samples", "2", "--eval_samples", "2", "--generate_samples", "1"]
    ranks = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
             "-m", "tools.gpu_check", "--device", device, "--child"]
    long, short = (["--frames", frames, "--rounds", "5"] if on_gpu else few for frames in ("1500", "250"))
    return [
        CheckPart("tests", [*python, "-m", "pytest", "-q", "tests/test_on_gpu.py"], 60),
        CheckPart("one rank", ranks, 60),
        CheckPart("quick start", start, 90),
        CheckPart("train small", [*bench, "train", *small, *long, *fast, *vs], 110, TARGET_MFU),
        CheckPart("generate small", [*bench, "generate", *small, *short, *fast, *vs], 110, TARGET_SPEED),
        CheckPart("train medium", [*bench, "train", *medium, *(few or ["--rounds", "3"]), *vs], 60),
        CheckPart("generate medium", [*bench, "generate", *medium, *short, *vs], 60),
        CheckPart("memory small", [*bench, "memory", *small, *few], 60),
        CheckPart("memory medium", [*bench, "memory", *medium, *few], 60),
    ]


def run_check(part: CheckPart, left: float) -> Outcome:
    """Runs a part up to its limit, in the seconds that are left; whatever it started ends with it."""
    began, problem, seconds = time.perf_counter(), None, min(part.limit, left)
    shown = " ".join(["python", *part.command[1:]])
    if left < 1:
        return Outcome(part.name, shown, 0.0, f"not run: {TOTAL_SECONDS} s are over")
    process = subprocess.Popen(part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", start_new_session=True)
    RUNNING.append(process)
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s"
    end_group(process)
    if problem:
        output = process.communicate()[0]
    elif process.returncode:
        problem = f"exit code {process.returncode}"
    written = [line.rstrip() for line in output.splitlines() if line.strip()]
    # torchrun ends with a frame around nothing: an error of ours, or of Python's, says more
    errors = [line for line in written if re.match(ERROR, line)]
    last = (errors or written or ["it wrote nothing"])[-1]
    lines = [line for line in written if line.startswith(SHOWN)] or [last]
    outcome = Outcome(part.name, shown, time.perf_counter() - began, problem and f"{problem}: {last}")
    outcome.lines = [] if problem else lines
    if part.target and not problem:
        outcome.target = compare(lines, *part.target)
    return outcome


def end_group(process: subprocess.Popen) -> None:
    """Ends a part and its children: torchrun and the loader have some."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def compare(lines: list, form: str, least: float) -> str:
    """What our line should show, and whether it does."""
    pattern = re.escape(form).replace(r"\{\}", r"([\d.]+)")
    mine = next((line for line in lines if line.startswith(OURS)), "")
    found = re.search(pattern, mine)
    wanted = form.format(least)
    if not found:
        return f"{wanted}: not measured here"
    return f"{wanted}: {'reached' if float(found[1]) >= least else 'missed'}, {form.format(found[1])}"


def one_rank(device: str) -> None:
    """In torchrun's only process: the loss and the gradients of DDP and FSDP are those of the plain model.

    Errors: ValueError where they are not."""
    device = torch.device(device, 0) if device == "cuda" else torch.device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    torch.manual_seed(0)
    plain = MusicGen(ModelConfig(**SIZES["debug"], card=64)).to(device)
    codes = torch.randint(64, (2, 4, 40)).to(device)
    sharded, ranks = copy.deepcopy(plain), Ranks(0, 1, device)
    shard_model(sharded, ranks, torch.float32, zero=3, cpu_offload=False)
    averaged = nn.parallel.DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=True)
    found = {}
    for name, model in (("alone", plain), ("ddp", averaged), ("fsdp", sharded)):
        loss = model(codes).sum()
        loss.backward()
        # without a text cross-attention has none
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradient = full_tensor(nn.utils.get_total_norm(gradients))
        found[name] = loss.item(), gradient.item()
    for name, values in found.items():
        for mine, wanted in zip(values, found["alone"]):
            if abs(mine - wanted) > 1e-3 * abs(wanted):
                raise ValueError(f"{name}: loss and gradient {values}, alone {found['alone']}")
    print(f"one rank, {dist.get_backend_config()}: DDP and FSDP equal the plain model, "
          f"loss {found['alone'][0]:.1f}")


def outcome_table(outcomes: list) -> str:
    """The outcomes as text, a line or more a part."""
    rows = []
    for outcome in outcomes:
        texts = [f"FAILED: {outcome.problem}"] if outcome.problem else list(outcome.lines)
        if outcome.target:
            texts.append(f"target: {outcome.target}")
        rows.append(f"{outcome.name:<16} {outcome.seconds:>5.0f} s  {texts[0]}")
        rows += [f"{'':<16} {'':>5}    {text}" for text in texts[1:]]
    return "\n".join(rows)


@common.command("tools.gpu_check")
def main(argv: list | None = None) -> int:
    """Runs all parts and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=main.__doc__,
                                     allow_abbrev=False)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--json", metavar="FILE", type=common.output_name, help="write the table there, too")
    parser.add_argument("--device", default=here, help=f"cuda or cpu (default here {here})")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)      # of the part "one rank"
    args = parser.parse_args(argv)
    device = common.check_device(args.device)
    if device.type not in ("cuda", "cpu") or device.index:
        raise ValueError(f"--device {args.device}: cuda or cpu; another GPU by CUDA_VISIBLE_DEVICES")
    if args.child:
        one_rank(device.type)
        exit_process(0)
    if args.json and (Path(args.json).is_dir() or not os.access(Path(args.json).absolute().parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: a file in a folder that can be written to")

    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    about = dict(date=datetime.date.today().isoformat(), device=machine, torch=torch.__version__)
    print(f"gpu_check: {machine}, torch {torch.__version__}, {about['date']}", flush=True)
    outcomes, end = [], time.monotonic() + TOTAL_SECONDS
    at_once = 1 if device.type == "cuda" else 2                      # on a CPU no figure counts
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        parts = check_parts(device.type, folder)
        try:
            for outcome in pool.map(lambda part: run_check(part, end - time.monotonic()), parts):
                outcomes.append(outcome)
                print(outcome_table([outcome]), flush=True)
                if args.json:                  # after every part, so that nothing is lost
                    common.write_json(Path(args.json), about | dict(parts=[asdict(x) for x in outcomes]))
        except BaseException:                  # such as Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                end_group(process)
            raise
    failed = [outcome.name for outcome in outcomes if outcome.problem]
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(outcomes)} parts ran")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
