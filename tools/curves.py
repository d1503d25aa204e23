"""The validation losses of several runs side by side: after so many minutes, and when each reaches a loss.

It reads log.jsonl. Minutes are those of the updates alone, without validation, evaluation and samples, so
that runs compare which do these more or less often. Let runs that are to be compared have a machine each, or
take turns: a busy machine makes minutes longer.

    python -m tools.curves runs/adamw runs/muon --minutes 15 60 --loss 4.2
"""

import argparse
import sys
from pathlib import Path

from evaluate.page import read_log, records_of
from support import common
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
    args = parser.parse_args(argv)
    if bad := [x for x in args.minutes if not x > 0]:
        raise ValueError(f"--minutes {bad[0]:g}: more than 0")
    curves = {run: curve_of(run) for run in args.runs}
    wanted = args.loss if args.loss is not None else min(r["ce"] for r in curves[args.runs[0]])
    for run, curve in curves.items():
        print(f"{run}: {curve[-1]['step']} updates, {curve[-1]['minutes']:.1f} minutes of training")
        for minutes in args.minutes:
            if curve[0]["minutes"] <= minutes <= 1.02 * curve[-1]["minutes"]:    # a run of 59.5 has its hour
                last = max((r for r in curve if r["minutes"] <= minutes), key=lambda r: r["minutes"])
                print(f"  after {minutes:g} min: {losses_text(last)}")
        best = min(curve, key=lambda r: r["ce"])
        print(f"  lowest, {best['minutes']:.1f} min: {losses_text(best)}")
        reached = next((r for r in curve if r["ce"] <= wanted), None)
        when = "never" if reached is None else f"update {reached['step']}, {reached['minutes']:.1f} min"
        print(f"  ce {wanted:.4f} or less: {when}")


if __name__ == "__main__":
    sys.exit(main())
