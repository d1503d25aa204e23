"""One flag of train.py, with all that is to be known of it, in one place.

support/flags.py has the list of them; a condition adds its own. argparse, the defaults by dataset, the checks
of ranges, what may change when a run goes on, and docs/flags.md all come from here.
"""

import argparse
import reprlib
from dataclasses import dataclass

from support.bounds import check_flag_number

RANGES = {                            # name: (test, what is allowed)
    "share": (lambda x: 0 <= x <= 1, "it lies between 0 and 1"),
    "count": (lambda x: 1 <= x <= 1e9, "at least 1, at most 1,000,000,000"),
    "million": (lambda x: 1 <= x <= 1e6, "at least 1, at most 1,000,000"),
    "natural": (lambda x: 0 <= x <= 1e9, "at least 0, at most 1,000,000,000"),
    "positive": (lambda x: 0 < x < 1e4, "more than 0, less than 10000"),
    "clip": (lambda x: 0 < x <= 3600, "more than 0, at most 3600"),
}
NOT_SAID = object()
SMALL_WIDTH = 512


@dataclass(frozen=True)
class Flag:
    """A flag, its default, its range, and what becomes of it when a run goes on."""
    name: str
    help: str
    type: type = str                  # bool is a switch, with --no-NAME too where its default is not False
    default: object = None            # None is filled in later, with a printed reason
    toy: object = None                # its default if the dataset is toy,
    audio: object = None              # and for any other one
    small: object = None              # and there for a model of at most SMALL_WIDTH: see `fill_flags`
    overfit: object = None            # and with --overfit_one_batch, which wins over all
    range: str | tuple | None = None  # of RANGES, or (least, most)
    choices: tuple | None = None
    nargs: object = None
    metavar: object = None
    may_change: bool = False          # when a run goes on: it does not change what an update computes
    of_launch: bool = False           # of how and where a command runs: --only does not take it from the run
    before: object = NOT_SAID         # a flag newer than some runs: the value that they had without it

    @property
    def by_dataset(self) -> bool:
        """Whether its default depends on the dataset."""
        return self.toy is not None or self.audio is not None

    def expected(self, args: argparse.Namespace):
        """The value it will have in a new run: as given, by --overfit_one_batch, or by the dataset."""
        by_heart = self.overfit if args.overfit_one_batch else None
        values = (getattr(args, self.name), by_heart, self.toy if args.dataset == "toy" else self.audio)
        return next((value for value in values if value is not None), None)

    def add_to(self, group) -> None:
        """Adds it to an argparse group."""
        if self.type is bool:
            action = "store_true" if self.default is False else argparse.BooleanOptionalAction
            group.add_argument(f"--{self.name}", action=action, default=self.default, help=self.help)
            return
        group.add_argument(f"--{self.name}", type=self.type, default=self.default, choices=self.choices,
                           nargs=self.nargs, metavar=self.metavar, help=self.help)

    def check(self, value) -> None:
        """Errors: ValueError for a value of another type or outside the range; also for NaN.

        The values of --only come from a file, which may hold anything."""
        kinds = (int, float) if self.type is float else self.type if isinstance(self.type, type) else str
        values = value if self.nargs and isinstance(value, (list, tuple)) else [value]
        if value is None:
            return
        if not all(isinstance(x, kinds) and isinstance(x, bool) == (self.type is bool) for x in values):
            raise ValueError(f"--{self.name} {reprlib.repr(value)}: "
                             f"{getattr(kinds, '__name__', 'number')} was expected")
        for x in values if self.range is not None else ():
            if isinstance(self.range, tuple):
                check_flag_number(self.name, x, *self.range)
            elif not RANGES[self.range][0](x):
                raise ValueError(f"--{self.name} {x}: {RANGES[self.range][1]}")
