"""The fault campaign: runs killed at random moments must end with the weights of the run that was left alone.

    python tests/faults.py WHAT, where WHAT is
    kills [--kills 100] [--terms 20]   kill -9 and SIGTERM, one process and one rank of two
    equal                              one process, DDP, FSDP, micro-batches, bfloat16: the same numbers
    worlds                             saved with one number of ranks, gone on with another
    starts [--tries 20]                ranks of one start never take those of another for their own
    restarts [--tries 20]              torchrun --max-restarts brings a killed rank's job to its end
    nan                                not finite on one rank of two: which step, tensor and rank
    hang                               a rank that stands still ends the job within --timeout
    disk                               a full disk (a small tmpfs, needs root)

Runs are forked from this process, which has everything imported: a start takes a second, and a killed child
is as dead as any. tests/test_faults.py does all this in short.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # 260 modules that every forked training would import by itself

import data
import tokenizer
from support import checkpoint
import conditioning
import model
from support import distributed
import train

torch.set_num_threads(1)
TINY = ("--size debug --epochs 2 --updates_per_epoch 10 --batch_size 4 --segment_seconds 0.5 "
        "--valid_samples 4 --eval_samples 2 --generate_samples 1 --generate_every 1 "
        "--dropout 0.1 --log_every 3 --timeout 1 --device cpu "
        "--conditions text melody style --text_dropout 0.2 --melody_dropout 0.2 --style_dropout 0.2").split()
SHORT = ["--updates_per_epoch", "4"]  # as many stages and saves at every step, fewer steps


# ------------------------------------------------------------------------------------------------------------
# processes


def remember_captions() -> None:
    """Makes the toy set's captions and their vocabulary, functions of the seed, once for all forks.

    They are a third of what a tiny training takes. Any other captions are fitted each time."""
    draw, fit, captions, pieces = data.ToyDataset.metadata, conditioning.fit_sentencepiece, {}, {}

    def metadata(self, limit: int = 4000) -> list:
        if (self.seed, limit) not in captions:
            captions[self.seed, limit] = draw(self, limit)
        return captions[self.seed, limit]

    def fit_sentencepiece(texts, vocab=2000):
        key = vocab, tuple(texts)
        if key not in pieces:
            pieces[key] = fit(texts, vocab)
        return pieces[key]

    data.ToyDataset.metadata, conditioning.fit_sentencepiece = metadata, fit_sentencepiece
    args = train.build_parser().parse_args(TINY)
    toy_set = data.open_dataset("toy", codec=tokenizer.load_codec("toy"), seed=args.seed)
    conditioning.Text.make_asset(args, toy_set)


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(flags: list, world: int, log: Path, before=None) -> list:
    """Forks the ranks of a training -> process ids. They print to `log`; `before(rank)` is called first."""
    port, pids = free_port(), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.setpgid(0, 0)  # with its loaders a group of its own, as torchrun makes it
            if world > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = 3  # a traceback
            try:
                if before:
                    before(rank)
                code = train.main(flags)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pids: list, seconds: float = 300.0) -> list:
    """Exit codes of processes (-9: killed). Errors: AssertionError if one is still alive after `seconds`."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"{len(pids) - len(codes)} of {len(pids)} ranks hung for {seconds} s")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def complete(flags: list, world: int, log: Path) -> None:
    """Runs a training to its end. Errors: AssertionError with what it printed."""
    codes = wait(launch(flags, world, log))
    assert set(codes) == {0}, f"exit codes {codes}: {log.read_text()[-2000:]}"


# ------------------------------------------------------------------------------------------------------------
# comparing runs


def state(out: Path) -> dict:
    """All tensors of a run's last checkpoint (unless they lie in shards), and of best.pt."""
    found = dict(checkpoint.read_checkpoint_file(out / "last.pt")["tensors"] or {})
    best = torch.load(out / "best.pt", weights_only=True)["model"]
    return found | {f"best.pt/{name}": x for name, x in best.items()}


def largest_difference(a: dict, b: dict, prefix: str = "") -> float:
    """Largest absolute difference of two sets of tensors with the same names."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:3]
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if k.startswith(prefix))


def curve(out: Path) -> list:
    """The records of log.jsonl without what is timed."""
    timed = ("seconds", "frames_per_second", "folder")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def largest_loss_difference(a: Path, b: Path) -> float:
    """Largest difference of the losses that the steps of two runs logged."""
    pairs = zip(curve(a), curve(b))
    return max(abs(x["ce"] - y["ce"]) for x, y in pairs if x["kind"] == "step")


def assert_same_run(out: Path, reference: Path, log_too: bool = True) -> None:
    """Bit for bit: every tensor, and every line of the log."""
    assert largest_difference(state(out), state(reference)) == 0, f"{out} differs from {reference}"
    assert not log_too or curve(out) == curve(reference), f"log of {out} differs from {reference}"


def saved_step(out: Path) -> int:
    """The step that a start would go on from now; -1 without a checkpoint. The folder is left as it is."""
    steps = [-1]
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        if (out / name).exists():
            try:
                content = checkpoint.read_checkpoint_file(out / name)
                checkpoint.check_shards(out, content)
                steps.append(content["step"])
                break
            except checkpoint.UNREADABLE:
                continue
    return steps[-1]


# ------------------------------------------------------------------------------------------------------------
# kills


def campaign(folder: Path, flags: list, world: int, kills: int, number: int, rng: random.Random) -> dict:
    """Kills runs with signal `number`, one rank of several at random, until `kills` have hit.

    Every run is finished and compared. -> numbers for the table."""
    tally, runs, reference = Counter(), 0, folder / "reference"
    began = time.monotonic()
    complete(flags + ["--out", str(reference)], world, folder / "reference.log")
    length = time.monotonic() - began
    while tally["kills"] < kills:
        out, log, before = folder / f"run{runs}", folder / f"run{runs}.log", -1
        runs += 1
        while True:
            pids = launch(flags + ["--out", str(out)], world, log)
            if tally["kills"] < kills:
                time.sleep(rng.uniform(0, length))
                tally["writing"] += strike(pids, out, world, number, rng, tally)
            codes = wait(pids)
            assert 3 not in codes, f"traceback in {log}: {log.read_text()[-3000:]}"
            ended = number == signal.SIGKILL or set(codes) <= {0, 143, -signal.SIGTERM}
            assert ended, (codes, log.read_text()[-3000:])
            after = saved_step(out)
            tally["lost"] += after < before
            before = after
            if set(codes) == {0} and (out / "best.pt").exists() and "finished:" in log.read_text():
                break
        assert_same_run(out, reference, log_too=world == 1)
        tally["equal"] += 1
    return dict(runs=runs, **tally)


def strike(pids: list, out: Path, world: int, number: int, rng: random.Random, tally: Counter) -> bool:
    """Signals one rank (SIGTERM: all, as torchrun does) if it runs -> whether it was writing a checkpoint."""
    chosen = pids if number == signal.SIGTERM else [rng.choice(pids)]
    alive = [pid for pid in chosen if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"]
    writing = (out / "last.pt.tmp").exists() or (out / "best.pt.tmp").exists()
    for pid in alive:
        (os.killpg if number == signal.SIGTERM else os.kill)(pid, number)
    tally["kills"] += bool(alive)
    return bool(alive) and writing


def kills(args: argparse.Namespace) -> None:
    """The table of kills."""
    print(f"{'campaign':<34}{'hits':>6}{'in a write':>12}{'runs':>6}{'equal':>7}{'lost':>6}", flush=True)
    every, never = ["--save_minutes", "0"], ["--save_minutes", "60", "--workers", "1"]
    fsdp, sharded = ["--parallel", "fsdp"], ["--parallel", "fsdp", "--sharded_checkpoint"]
    cases = [("kill -9, one process", every, 1, args.kills * 6 // 10, signal.SIGKILL),
             ("kill -9, one rank of two, DDP", every, 2, args.kills * 3 // 10, signal.SIGKILL),
             ("kill -9, one rank of two, FSDP", every + fsdp, 2, args.kills // 10, signal.SIGKILL),
             ("kill -9, one rank of two, shards", every + sharded, 2, args.kills // 10, signal.SIGKILL),
             ("SIGTERM, one process", never, 1, args.terms * 3 // 4, signal.SIGTERM),
             ("SIGTERM, two ranks, DDP", never, 2, args.terms // 4, signal.SIGTERM)]
    for i, (title, flags, world, hits, number) in enumerate(cases):
        if hits == 0:
            continue
        flags = TINY + (SHORT if args.short else []) + flags
        with tempfile.TemporaryDirectory() as folder:
            result = campaign(Path(folder), flags, world, hits, number, random.Random(args.seed + i))
        columns = ("kills", 6), ("writing", 12), ("runs", 6), ("equal", 7), ("lost", 6)
        print(f"{title:<34}" + "".join(f"{result.get(k, 0):>{width}}" for k, width in columns), flush=True)
        assert result["equal"] == result["runs"] and not result.get("lost"), result


# ------------------------------------------------------------------------------------------------------------
# the same numbers


LAYOUTS = (("one process", 1, []), ("one process, micro-batches of 1", 1, ["--micro_batch_size", "1"]),
           ("DDP x2", 2, []), ("DDP x2, micro-batches of 1", 2, ["--micro_batch_size", "1"]),
           ("FSDP x2, ZeRO-3", 2, ["--parallel", "fsdp"]),
           ("FSDP x2, ZeRO-2", 2, ["--parallel", "fsdp", "--zero", "2"]),
           ("FSDP x2, micro-batches of 1", 2, ["--parallel", "fsdp", "--micro_batch_size", "1"]),
           ("FSDP x2, checkpointing", 2, ["--parallel", "fsdp", "--checkpointing"]))


def equal(args: argparse.Namespace) -> None:
    """The table of layouts, each beside one process with the whole batch in the same precision."""
    flags = TINY + ["--epochs", "2", "--updates_per_epoch", str(args.updates // 2), "--batch_size", "8",
                    "--log_every", "1", "--generate_samples", "0", "--lr", "2e-3"]
    title = f"after {args.updates} updates, dropout 0.1"
    print(f"{title:<47}{'loss, largest':>15}{'weight, largest':>17}{'mean':>10}")
    layouts = [LAYOUTS[i] for i in (0, 3, 5, 6)] if args.short else LAYOUTS
    kinds = [("float32", "adamw"), ("float32", "muon")] + [("bfloat16", "adamw")] * (not args.short)
    for dtype, optimizer in kinds:
        if args.short and optimizer == "muon":
            layouts = [LAYOUTS[i] for i in (0, 2, 6)]
        with tempfile.TemporaryDirectory() as folder:
            first = None
            for i, (title, world, more) in enumerate(layouts):
                out = Path(folder, str(i))
                more = more + ["--dtype", dtype, "--optimizer", optimizer]
                complete(flags + more + ["--out", str(out)], world, Path(folder, "log"))
                first = first or out
                a, b = ({k: v for k, v in state(o).items() if k.startswith("model/")} for o in (out, first))
                losses = largest_loss_difference(out, first)
                mean = sum(float((a[k] - b[k]).abs().sum()) for k in a) / sum(x.numel() for x in a.values())
                weights = largest_difference(a, b)
                print(f"{f'{dtype}, {optimizer}, {title}':<47}{losses:>15.1e}{weights:>17.1e}{mean:>10.1e}",
                      flush=True)
                assert losses < (1e-4 if dtype == "float32" else 0.1)
                assert mean < (1e-5 if dtype == "float32" else 1e-3)


def worlds(args: argparse.Namespace) -> None:
    """Runs stopped after their first epoch in one layout go on in another, beside one process all the way."""
    layouts = dict(single=(1, []), ddp=(2, ["--parallel", "ddp"]), fsdp=(2, ["--parallel", "fsdp"]),
                   sharded=(2, ["--parallel", "fsdp", "--sharded_checkpoint"]))
    tiny, half = TINY + (SHORT if args.short else []), 4 if args.short else 10
    print(f"{'saved with':<12}{'gone on with':<14}{'loss, largest':>15}{'weight, largest':>17}")
    with tempfile.TemporaryDirectory() as folder:
        log, reference = Path(folder, "log"), Path(folder, "reference")
        complete(tiny + ["--out", str(reference)], 1, log)
        pairs = (("fsdp", "single"), ("single", "ddp"), ("sharded", "single"), ("single", "fsdp"),
                 ("ddp", "fsdp"), ("sharded", "ddp"), ("single", "sharded"))
        for i, (before, after) in enumerate(pairs[:3] if args.short else pairs):
            out = Path(folder, str(i))
            world, more = layouts[before]
            stop_after(tiny + more + ["--save_minutes", "60", "--out", str(out)], world, log, out, half)
            world, more = layouts[after]
            flags = [f for f in more if f != "--sharded_checkpoint"]  # so that last.pt can be compared
            complete(tiny + flags + ["--out", str(out)], world, log)
            losses = largest_loss_difference(out, reference)
            assert losses < 1e-4, losses
            weights = largest_difference(state(out), state(reference), "model/")
            print(f"{before:<12}{after:<14}{losses:>15.1e}{weights:>17.1e}", flush=True)


def stop_after(flags: list, world: int, log: Path, out: Path, step: int) -> None:
    """Starts a training and ends it by SIGTERM once log.jsonl shows `step`."""
    pids = launch(flags, world, log)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or not any(r["step"] >= step for r in curve(out)):
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert set(codes := wait(pids)) == {0}, f"exit codes {codes}: {log.read_text()[-2000:]}"


# ------------------------------------------------------------------------------------------------------------
# torchrun, and a rank that stands still


def starts(args: argparse.Namespace) -> None:
    """Starts two ranks many times on one store, as torchrun does; one is late, or dies before they meet."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port), WORLD_SIZE="2",
                  TORCHELASTIC_USE_AGENT_STORE="True")
    rng, tally = random.Random(args.seed), Counter()
    for i in range(args.tries):
        late, dies = rng.randrange(2), i % 4 == 1
        pids = []
        for rank in range(2):
            if (pid := os.fork()) == 0:
                os.environ |= shared | dict(RANK=str(rank))
                time.sleep(0.3 * (rank == late))
                if dies and rank == late:
                    os._exit(9)
                code = 1
                try:  # 0.6 s is the time-out that a dead rank is waited for
                    ranks = distributed.join_process_group("cpu", 0.01 if dies else 0.1)
                    code = 10 * int(ranks.sum(torch.ones(1)).item())
                except RuntimeError as error:
                    code = 2 if "did not come" in str(error) else 1
                finally:
                    os._exit(code)
            pids.append(pid)
        expected = [20, 20] if not dies else [9, 2] if late == 0 else [2, 9]
        codes = wait(pids)
        assert codes == expected, f"start {i + 1}: exit codes {codes}, not {expected}"
        tally["dead" if dies else f"rank {late}"] += 1
    print(f"{args.tries} of {args.tries} starts on one store: {tally['rank 0']} with rank 0 late, "
          f"{tally['rank 1']} with rank 1; {tally['dead']} with a rank dead, "
          "which the other says within the time-out")


def torchrun(out: Path, logs: Path) -> tuple[subprocess.Popen, dict]:
    """Starts a job of two ranks that may restart three times -> (torchrun, {rank: process id}).

    Each start has a folder in `logs`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               "--max-restarts=3", "--redirects=3", f"--log-dir={logs}",
               "train.py", *TINY, "--save_minutes", "0", "--out", str(out)]
    logs.mkdir()
    with open(logs / "torchrun.log", "w") as printed:
        job = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=printed, stderr=printed)
    found = {}
    while len(found) < 2:
        assert job.poll() is None, everything(logs)
        children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout
        for pid in children.split():
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found |= {rank: int(pid) for rank in (0, 1) if f"RANK={rank}" in environment}
    return job, found


def everything(logs: Path) -> str:
    """The end of what torchrun and each rank of each start printed."""
    files = sorted(logs.rglob("*.log"))
    return "\n".join(f"--- {path.relative_to(logs)}\n{path.read_text()[-2000:]}" for path in files)


def restarts(args: argparse.Namespace) -> None:
    """Kills a random rank of torchrun jobs at random moments, the start included.

    Each job must restart by itself and end as if nothing had been. What one that does not printed is kept."""
    rng, tally, folder = random.Random(args.seed), Counter(), Path(tempfile.mkdtemp())
    job, _ = torchrun(folder / "reference", folder / "logs")
    began = time.monotonic()
    assert job.wait(300) == 0, everything(folder / "logs")
    length = time.monotonic() - began
    columns = dict(tries=5, rank_0_killed=15, rank_1_killed=15, restarts=10, equal=7, seconds_a_try=15)
    print("".join(f"{name.replace('_', ' '):>{width}}" for name, width in columns.items()))
    while tally["equal"] < args.tries:
        out, logs = folder / f"run{tally['jobs']}", folder / f"logs{tally['jobs']}"
        tally["jobs"] += 1
        job, ranks = torchrun(out, logs)
        began, rank = time.monotonic(), rng.randrange(2)
        time.sleep(rng.uniform(0, length))
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], signal.SIGKILL)
        assert (code := job.wait(600)) == 0, f"exit code {code}, see {folder}\n{everything(logs)}"
        assert_same_run(out, folder / "reference", log_too=False)
        starts = len(list(logs.glob("*/attempt_*")))
        if starts > 1:  # else the rank had ended before it was killed: no try
            seconds = time.monotonic() - began
            tally.update({f"rank {rank}": 1, "restarts": starts - 1, "equal": 1, "seconds": seconds})
            print(f"{tally['equal']:>5}{tally['rank 0']:>15}{tally['rank 1']:>15}{tally['restarts']:>10}"
                  f"{tally['equal']:>7}{tally['seconds'] / tally['equal']:>15.1f}", flush=True)
    shutil.rmtree(folder)


def poison_loss(rank: int) -> None:
    """In rank 1, the loss of the third update's second codebook is not a number."""
    loss, calls = model.head_loss, [0]

    def poisoned(*rest):
        calls[0] += 1
        return loss(*rest) * (float("nan") if calls[0] == 10 and rank == 1 else 1)

    model.head_loss = poisoned


def poison_weight(rank: int) -> None:
    """In rank 1, a weight is infinite from the start."""
    begin = train.build_run

    def poisoned(*rest, **more):
        run = begin(*rest, **more)
        if rank == 1:
            distributed.local_parts([run.model.linears[1].weight.data])[0][0, 0] = float("inf")
        return run

    train.build_run = poisoned


def nan(args: argparse.Namespace) -> None:
    """Numbers not finite on one rank of two: both skip the same update, or stop, and say where it began."""
    short, fsdp = TINY + ["--epochs", "1", "--updates_per_epoch", "4"], ["--parallel", "fsdp"]
    of_loss = "step 3: gradients not finite; first in loss of codebook 2 (rank 1)"
    of_weight = "step 1: weights not finite; first in linears.1.weight (rank 1)"
    for title, flags, poison, code, says in (("loss, DDP", [], poison_loss, 0, of_loss),
                                             ("loss, FSDP", fsdp, poison_loss, 0, of_loss),
                                             ("weight, FSDP", fsdp, poison_weight, 1, of_weight)):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            codes = wait(launch(short + flags + ["--out", str(Path(folder, "run"))], 2, log, poison))
            lines = [line for line in log.read_text().splitlines() if says in line]
            assert codes == [code, code] and lines, (codes, log.read_text()[-2000:])
            print(f"{title:<14} exit codes {codes}: {lines[0]}")


def hang(args: argparse.Namespace) -> None:
    """Stops one rank of two without killing it: the other must give up within the time-out and say so."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "run"), Path(folder, "log")
        pids = launch(TINY + ["--timeout", "0.1", "--updates_per_epoch", "2000", "--out", str(out)], 2, log)
        while not (out / "log.jsonl").exists():
            time.sleep(0.05)
        os.kill(pids[1], signal.SIGSTOP)
        began = time.monotonic()
        code = wait(pids[:1], 60)[0]
        seconds = time.monotonic() - began
        os.kill(pids[1], signal.SIGKILL)
        wait(pids[1:])
        line = next(line for line in log.read_text().splitlines() if "lost the other ranks" in line)
        assert code == 1 and seconds < 30, (code, seconds)
        print(f"a rank that stands still: exit code {code} after {seconds:.1f} s of a time-out of 6 s")
        print(f"  {line[:150]}")


# ------------------------------------------------------------------------------------------------------------
# a full disk


def disk(args: argparse.Namespace) -> None:
    """A run in a tmpfs too small for its second checkpoint; with room made, the same command goes on."""
    folder = Path(tempfile.mkdtemp())
    full = folder / "small"
    full.mkdir()
    complete(TINY + ["--out", str(folder / "reference")], 1, folder / "log")
    size = (folder / "reference/last.pt").stat().st_size + (folder / "reference/best.pt").stat().st_size
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", full], check=True)
    try:
        code = wait(launch(TINY + ["--out", str(full / "run")], 1, folder / "full.log"))[0]
        print((folder / "full.log").read_text())
        kept = sorted(path.name for path in (full / "run").iterdir())
        print(f"full disk: exit code {code}; kept: {kept}, step {saved_step(full / 'run')}")
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", full], check=True)
        complete(TINY + ["--out", str(full / "run")], 1, folder / "log")
        assert_same_run(full / "run", folder / "reference", log_too=False)
        print("room made, same command: the weights of the run that was left alone")
        subprocess.run(["mount", "-o", "remount,ro", full], check=True)
        for out in ("run", "new"):
            flags = TINY + ["--epochs", "3", "--out", str(full / out)]
            code = wait(launch(flags, 1, folder / f"{out}.log"))[0]
            assert code == 2, code
            print(f"read-only: exit code {code}: {(folder / f'{out}.log').read_text().splitlines()[-1]}")
    finally:
        subprocess.run(["umount", full], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills trainings and compares what they end with.")
    campaigns = dict(kills=kills, equal=equal, worlds=worlds, starts=starts, restarts=restarts, nan=nan,
                     hang=hang, disk=disk)
    parser.add_argument("what", choices=campaigns)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--short", action="store_true",
                        help="equal, worlds: the cases that differ most; kills, worlds: fewer steps")
    args = parser.parse_args()
    remember_captions()
    campaigns[args.what](args)


if __name__ == "__main__":
    main()
