"""The gate: digests of what the project computes, to compare before and after code moves. Not a test itself.

    python tests/gate.py --write FILE.json                        run everything, write the digests
    python tests/gate.py --compare FILE.json                      run it again, name what differs
    python tests/gate.py --compare FILE.json --only cache lora    these stages and what they need
    python tests/gate.py --compare FILE.json --plain              a Python of its own for every command

--compare exits with 1 where a digest differs or is missing; a new one (of a new flag, say) is named and does
not fail. --plain is slower and gives the same.

It drives the project only through its command lines, in a temporary folder, and imports none of it: modules
may move and functions may change their names, then COMMANDS is all that follows. Toy runs of a few updates
are trained in every mode (gate_stages.py); their logs, checkpoints, samples, clips, conversions, caches and
figures are taken apart (gate_digests.py), and every part has a digest of its own, so that a difference says
where it is. The codes behind a clip are in no file: its wav stands for them, which other codes would change.

Digests are of exact bits, so they compare on one machine alone, under one release of torch. Every process has
one thread, since the order of sums depends on their number; two run at a time. A minute on two idle cores.
"""

import argparse
import importlib
import json
import os
import platform
import queue
import resource
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from gate_digests import Digests
from gate_stages import BASE, STAGES

REPO = Path(__file__).resolve().parent.parent
COMMANDS = {  # what follows `python`, from the root of the repository: a file, or -m and a module
    "train": ["train.py"],
    "generate": ["generate.py"],
    "convert": ["-m", "interop.convert"],
    "check": ["data.py", "check"],
    "cache": ["data.py", "cache"],
    "tokenizer": ["tokenizer.py"],
    "fit_codec": ["-m", "tools.fit_codec"],
    "metrics": ["-m", "evaluate.metrics"],
    "page": ["-m", "evaluate.page"],
    "analyser": ["-m", "evaluate.analyser"],
    "show_text": ["conditioning.py"],
    "show_melody": ["-m", "support.chroma"],
    "show_style": ["-m", "support.style"],
    "patterns": ["patterns.py"],
    "model": ["model.py"],
}
ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
AT_A_TIME = 2  # processes
LIBRARIES = (
    *("torch", "torchaudio", "torch._dynamo", "torch.distributed.checkpoint", "torch.utils.data"),
    *("soundfile", "sentencepiece", "tqdm", "safetensors.torch", "encodec.modules", "encodec.quantization"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)


# ----------------------------------------------------------------------------------------------------------
# commands


def command(name: str, *words, ranks: int = 1) -> list:
    """The words of a command of the project: Python, torchrun if `ranks` > 1, its entry in COMMANDS, `words`.

    A word that begins with "--" may hold more, split at its spaces: "--cfg 3 --n 2"."""
    asked = [sys.executable]
    if ranks > 1:
        asked += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    asked += COMMANDS[name]
    for word in map(str, words):
        asked += word.split() if word.startswith("--") else [word]
    return asked


def start_process(words: list, **options) -> subprocess.Popen:
    """Starts a command of `command` at the root of the repository; options as Popen's."""
    return subprocess.Popen(words, cwd=REPO, env={**os.environ, **ENVIRONMENT}, text=True, **options)


class Starter:
    """Starts commands without waiting for torch each time.

    A process that has imported the LIBRARIES, and nothing of the project, forks for every command, and the
    child runs it as `python` would. Otherwise most of the time would go into imports."""

    def __init__(self):
        words = [sys.executable, __file__, "--starter"]
        self.process = start_process(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, words: list, printed: Path) -> int:
        """Runs a command of `command`, writes what it prints to a file -> exit code."""
        self.process.stdin.write(json.dumps([words[1:], str(printed)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        """Lets the process go."""
        self.process.stdin.close()
        self.process.wait()

    @staticmethod
    def serve() -> None:
        """What the process does: reads [words, file] from the standard input, answers with exit codes."""
        for name in LIBRARIES:
            importlib.import_module(name)
        for line in sys.stdin:
            words, printed = json.loads(line)
            if (child := os.fork()) == 0:
                os._exit(Starter.become(words, printed))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

    @staticmethod
    def become(words: list, printed: str) -> int:
        """What the child does: the command, as the main module -> exit code."""
        with open(printed, "w") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        module = words[0] == "-m"
        sys.argv = words[module:]
        sys.path[0] = str(REPO if module else (REPO / words[0]).parent)
        code = 0
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # as Python itself would
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return code


class Stage:
    """What a stage gets: its name, the folder that all share, digests to add to, commands to run.

    starters: a queue of those that are free; None where every command is a process of its own."""

    def __init__(self, name: str, folder: Path, starters: queue.Queue | None):
        self.name, self.folder, self.starters = name, folder, starters
        self.digests = Digests({str(folder): "FOLDER", str(REPO): "REPO"})

    def path(self, *names) -> Path:
        """A path in the shared folder."""
        return self.folder.joinpath(*names)

    def start(self, name: str, *words) -> subprocess.Popen:
        """Starts a command whose output can be read line by line."""
        return start_process(command(name, *words), stdout=subprocess.PIPE)

    def run(self, name: str, *words, ranks: int = 1) -> str:
        """Runs a command and returns what it printed. Errors: RuntimeError with its last lines."""
        printed, asked = self.path(f"{self.name}.printed.txt"), command(name, *words, ranks=ranks)
        if self.starters is None or ranks > 1:
            with open(printed, "w") as file:
                code = start_process(asked, stdout=file, stderr=subprocess.STDOUT).wait()
        else:
            starter = self.starters.get()
            code = starter.run(asked, printed)
            self.starters.put(starter)
        text = printed.read_text()
        printed.unlink()
        if code != 0:
            raise RuntimeError(f"{' '.join(asked[1:])}: exit code {code}\n{text[-2000:]}")
        return text

    def train(self, *words, ranks: int = 1) -> None:
        """Trains a run into the folder of the stage's name and digests it."""
        self.run("train", BASE, *words, "--out", self.path(self.name), ranks=ranks)
        self.digests.add_run(self.name, self.path(self.name))

    def generate(self, run: str, *words, name: str | None = None) -> None:
        """Generates clips of a run and digests them with their records."""
        name = name or self.name
        self.run("generate", "--run", self.path(run), *words, "--out", self.path(name))
        self.digests.add_folder(name, self.path(name))

    def convert(self, source: str, target: str, name: str, *words) -> None:
        """Converts a model and digests the folder."""
        self.run("convert", self.path(source), "--to", target, *words, "--out", self.path(name))
        self.digests.add_folder(name, self.path(name))


# ----------------------------------------------------------------------------------------------------------
# running the stages


def needed_stages(names: list) -> list:
    """The stages named, with all that they need, in order. Errors: SystemExit for a name that is none."""
    if unknown := [name for name in names if name not in STAGES]:
        raise SystemExit(f"no stage {unknown[0]}: there are {', '.join(STAGES)}")
    wanted, left = set(), list(names)
    while left:
        wanted.add(name := left.pop())
        left += [need for need in STAGES[name][1] if need not in wanted]
    return [name for name in STAGES if name in wanted]


def count_dependents(name: str, waiting: list) -> int:
    """How many of the stages that wait need this one, directly or not."""
    found, added = {name}, True
    while added:
        added = [n for n in waiting if n not in found and set(STAGES[n][1]) & found]
        found |= set(added)
    return len(found) - 1


def run_stages(names: list, folder: Path, plain: bool) -> tuple[dict, list]:
    """Runs stages, AT_A_TIME processes at a time, and prints the seconds of each -> (digests, the failed).

    Of those that can begin, the one that most others need goes first. plain: without a Starter."""
    starters = None if plain else queue.Queue()
    for _ in range(0 if plain else AT_A_TIME):
        starters.put(Starter())
    digests, failed, ended, waiting, busy = {}, [], set(), list(names), 0
    changed, began = threading.Condition(), time.perf_counter()

    def work(name: str) -> None:
        nonlocal busy
        start, problem, mine = time.perf_counter(), None, Stage(name, folder, starters)
        try:
            STAGES[name][0](mine)
        except Exception as error:  # whatever it is, the other stages go on
            problem = f"{type(error).__name__}: {error}"
        with changed:
            seconds, count = time.perf_counter() - start, len(mine.digests.found)
            print(f"{name:<18}{seconds:7.1f} s {count:4d} digests", flush=True)
            if problem:
                failed.append(name)
                print(f"FAILED {name}: {problem}", flush=True)
            else:
                digests.update(mine.digests.found)
            ended.add(name)
            busy -= STAGES[name][2]
            changed.notify()

    with changed:
        while waiting or busy:
            ready = [n for n in waiting if set(STAGES[n][1]) <= ended and busy + STAGES[n][2] <= AT_A_TIME]
            if not ready:
                changed.wait()
                continue
            name = max(ready, key=lambda n: (count_dependents(n, waiting), -waiting.index(n)))
            waiting.remove(name)
            if lacking := set(STAGES[name][1]) & set(failed):
                failed.append(name)
                ended.add(name)
                print(f"FAILED {name}: it needs {' '.join(sorted(lacking))}", flush=True)
                continue
            busy += STAGES[name][2]
            threading.Thread(target=work, args=(name,)).start()
    for _ in range(0 if plain else AT_A_TIME):
        starters.get().end()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, processor = time.perf_counter() - began, spent.ru_utime + spent.ru_stime
    print(f"{seconds:.1f} s in all, {processor:.0f} s of processor time", flush=True)
    return dict(sorted(digests.items())), failed


# ----------------------------------------------------------------------------------------------------------
# the command


def machine() -> dict:
    """What digests are true of."""
    return dict(
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
        processor=platform.machine(),
        python=platform.python_version(),
        numpy=np.__version__,
    )


def compare(old: dict, new: dict, names: list) -> int:
    """Prints what differs, is missing or is new -> exit code. names: the stages that were run."""
    old = {name: value for name, value in old.items() if name.split("/")[0] in names}
    wrong = 0
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            print(f"new: {name}")
        elif old[name] != new.get(name):
            print(f"{'differs' if name in new else 'missing'}: {name}")
            wrong += 1
    print(f"{wrong} of {len(old)} digests differ or are missing" if wrong else f"{len(old)} digests equal")
    return 1 if wrong else 0


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Digests of what the project computes.", allow_abbrev=False)
    parser.add_argument("--write", metavar="FILE", help="write digests")
    parser.add_argument("--compare", metavar="FILE", help="compare with digests written before")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages and what they need")
    parser.add_argument("--plain", action="store_true", help="every command in a process of its own")
    parser.add_argument("--starter", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.starter:
        Starter.serve()
        return 0
    if bool(args.write) == bool(args.compare):
        parser.error("give --write FILE or --compare FILE")
    names = needed_stages(args.only or list(STAGES))
    stored = json.loads(Path(args.compare).read_text()) if args.compare else None
    if stored and stored["machine"] != machine():
        print(f"note: made on another machine: {stored['machine']}, this is {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        found, failed = run_stages(names, Path(folder).resolve(), args.plain)
    if failed:
        print(f"failed: {' '.join(failed)}")
    if stored:
        return max(compare(stored["digests"], found, names), bool(failed))
    if failed:
        return 1
    Path(args.write).write_text(json.dumps(dict(machine=machine(), digests=found), indent=1) + "\n")
    print(f"{len(found)} digests written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
