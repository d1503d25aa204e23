"""One flag of train.py, with all that is to be known of it, in one place.

support/flags.py has the list of them; a condition adds its own. argparse, the defaults by dataset, the checks
of ranges, what may change when a run goes on, and docs/flags.md all come from here.
"""

import argparse
from dataclasses import dataclass

RANGES = {                            # name: (test, what is allowed)
    "share": (lambda x: 0 <= x <= 1, "it lies between 0 and 1"),
    "count": (lambda x: x >= 1, "at least 1"),
    "natural": (lambda x: x >= 0, "at least 0"),
    "positive": (lambda x: 0 < x < 1e4, "more than 0, less than 10000"),
}
NOT_SAID = object()


@dataclass(frozen=True)
class Flag:
    """A flag, its default, its range, and what becomes of it when a run goes on."""
    name: str
    help: str
    type: type = str                  # bool is a switch, with --no-NAME too where its default is not False
    default: object = None            # None is filled in later, with a printed reason
    toy: object = None                # its default if the dataset is toy,
    audio: object = None              # and for any other one
    overfit: object = None            # and with --overfit_one_batch, which wins over both
    range: str | None = None          # of RANGES
    choices: tuple | None = None
    nargs: object = None
    metavar: object = None
    may_change: bool = False          # when a run goes on: it does not change what an update computes
    of_launch: bool = False           # of how and where a command runs: --only does not take it from the run
    before: object = NOT_SAID         # a flag newer than some runs: the value that they had without it

    def add_to(self, group) -> None:
        """Adds it to an argparse group."""
        if self.type is bool:
            action = "store_true" if self.default is False else argparse.BooleanOptionalAction
            group.add_argument(f"--{self.name}", action=action, default=self.default, help=self.help)
            return
        group.add_argument(f"--{self.name}", type=self.type, default=self.default, choices=self.choices,
                           nargs=self.nargs, metavar=self.metavar, help=self.help)

    def check(self, value) -> None:
        """Errors: ValueError for a value outside the range; also for NaN."""
        if self.range is None or value is None:
            return
        test, allowed = RANGES[self.range]
        if not test(value):
            raise ValueError(f"--{self.name} {value}: {allowed}")
