"""The validation losses of several runs side by side: after so many minutes, and when each reaches a loss.

It reads log.jsonl. Minutes are those of the updates alone, without validation, evaluation and samples, so
that runs compare which do these more or less often. Let runs that are to be compared have a machine each, or
take turns: a busy machine makes minutes longer.

    python -m tools.curves runs/adamw runs/muon --minutes 15 60 --loss 4.2
    python -m tools.curves runs/muon --cache music_codes             beside knowing how often each code occurs
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from evaluate.page import part_of, read_log, read_record, records_of
from support import common
from support.cache import read_index, read_rows, split_cache
from support.log import LOG_NAME


def minutes_of_updates(records: list) -> dict:
    """{step: minutes of training up to it} at each log line. A line's "seconds" are a mean update's since
    the one before."""
    minutes, before, found = 0.0, 0, {0: 0.0}
    for record in records_of(records, "train", "step"):
        minutes += (record["step"] - before) * record["seconds"] / 60
        before = record["step"]
        found[before] = minutes
    return found


def curve_of(run: str) -> list:
    """The validations of a run, each with the "minutes" of training before it.

    Errors: ValueError where the run has none."""
    path = Path(run, LOG_NAME)
    if not path.is_file():
        raise ValueError(f"{run}: no {LOG_NAME} there; give the folder of a run")
    records = read_log(path)
    minutes = minutes_of_updates(records)
    valid = [record | dict(minutes=minutes[record["step"]])
             for record in records_of(records, "valid") if record["step"] in minutes]
    if not valid:
        raise ValueError(f"{path}: no validation in it yet")
    return valid


def frequency_losses(folder: str, valid: str) -> list:
    """Cross-entropy [K] of a token cache's validation files by how often each code occurs in its training
    files: what a model pays that knows nothing else.

    valid: --valid of the run, for a cache that was made without. Errors: ValueError."""
    settings, entries = read_index(folder)
    counts = []
    for part in split_cache(folder, settings, entries, valid)[:2]:
        counts.append(np.zeros((settings["K"], 2 ** 16)))
        for entry in part:
            codes = read_rows(folder, entry.shard, "npy", entry.offset, entry.frames, settings["K"])
            counts[-1] += [np.bincount(column, minlength=2 ** 16) for column in codes.T]
        if not counts[-1].any():
            raise ValueError(f"--cache {folder}: one of its two sets is empty under --valid {valid}")
    card = 1 + max(np.flatnonzero(each.sum(0))[-1] for each in counts)
    p, q = counts[0][:, :card] + 1, counts[1][:, :card]                                            # [K, card]
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return (-(q * np.log(p)).sum(1)).tolist()


def losses_text(record: dict) -> str:
    """The losses of a validation in a line."""
    each = "".join(f"  {name[3:]} {value:.3f}" for name, value in record.items() if name.startswith("ce_q"))
    return f"update {record['step']:>7}  ce {record['ce']:.4f}{each}"


@common.command("tools.curves")
def main(argv: list | None = None) -> None:
    """Prints the curves of runs."""
    parser = argparse.ArgumentParser(prog="python -m tools.curves", allow_abbrev=False,
                                     description="Validation losses of runs by time.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--minutes", type=float, nargs="+", default=[15, 60, 180, 600],
                        help="of training (default: 15 60 180 600)")
    parser.add_argument("--loss", type=float, help="cross-entropy to reach (default: the first run's lowest)")
    parser.add_argument("--cache", help="token cache: also the loss by how often each code occurs")
    args = parser.parse_args(argv)
    if bad := [x for x in args.minutes if not x > 0]:
        raise ValueError(f"--minutes {bad[0]:g}: more than 0")
    curves = {run: curve_of(run) for run in args.runs}
    wanted = args.loss if args.loss is not None else min(r["ce"] for r in curves[args.runs[0]])
    if args.cache:
        config = read_record(Path(args.runs[0], "config.json"))
        each = frequency_losses(args.cache, part_of(config, "args").get("valid", "0.05"))
        print(f"by how often each code occurs: ce {np.mean(each):.4f}" +
              "".join(f"  q{k} {value:.3f}" for k, value in enumerate(each, 1)))
    for run, curve in curves.items():
        print(f"{run}: {curve[-1]['step']} updates, {curve[-1]['minutes']:.1f} minutes of training")
        for minutes in args.minutes:
            before = [r for r in curve if r["minutes"] <= minutes]
            found = losses_text(before[-1]) if before else "no validation yet"
            if minutes > 1.02 * curve[-1]["minutes"]:                            # a run of 59.5 has its hour
                found = "not trained so long"
            print(f"  after {minutes:g} min: {found}")
        best = min(curve, key=lambda r: r["ce"])
        print(f"  lowest, {best['minutes']:.1f} min: {losses_text(best)}")
        reached = next((r for r in curve if r["ce"] <= wanted), None)
        when = "never" if reached is None else f"update {reached['step']}, {reached['minutes']:.1f} min"
        print(f"  ce {wanted:.4f} or less: {when}")


if __name__ == "__main__":
    sys.exit(main())
