"""Writes docs/flags.md: every flag of train.py and generate.py, from where it is declared.

    python -m tools.write_flags > docs/flags.md        a test compares the page with what this prints
"""

import argparse
import sys

import generate
from support import common
from support.flag import SMALL_WIDTH
from support.flags import all_flags

HEAD = """# Flags

Written by `python -m tools.write_flags`; a test compares it with the code.

## train.py

A flag that is left out is filled in: by the dataset (toy, or any other), by the width of a model that
starts from random weights (`--top_k`: of any), by `--init_from`, by the machine.
The run prints what it chose and why. When a run goes on, flags marked *may change* may be others than before;
one that depends on the dataset, and is not so marked, is filled in with what the run had.
"""


def cell(text) -> str:
    """Text for a cell of a table."""
    return str(text).replace("|", "\\|")


def default_text(flag) -> str:
    """The default of a training flag, by dataset where it depends on it."""
    if flag.toy is not None or flag.audio is not None:
        audio = "see there" if flag.audio is None else flag.audio
        small = "" if flag.small is None else f"; else, up to {SMALL_WIDTH} wide: {flag.small}"
        return f"toy: {flag.toy}{small}; else: {audio}"
    if isinstance(flag.default, list):
        return " ".join(flag.default)
    if flag.type is bool:
        return "" if flag.default is None else "on" if flag.default else "off"
    return "" if flag.default is None else str(flag.default)


def training_tables() -> list:
    """Lines: a table for each group of train.py's flags."""
    lines = []
    for group, flags in all_flags().items():
        lines += [f"### {group}", "", "| flag | default | what it does | may change |", "|---|---|---|---|"]
        for flag in flags:
            changes = "yes" if flag.may_change else ""
            lines.append(f"| `--{flag.name}` | {cell(default_text(flag))} | {cell(flag.help)} | {changes} |")
        lines.append("")
    return lines


def generation_table() -> list:
    """Lines: the table of generate.py's flags."""
    lines = ["## generate.py", "", "| flag | what it does |", "|---|---|"]
    for action in generate.build_generate_parser()._actions:
        if action.dest != "help":
            lines.append(f"| `{action.option_strings[0]}` | {cell(action.help)} |")
    return lines


@common.command("tools.write_flags")
def main(argv: list | None = None) -> None:
    """Prints the page."""
    argparse.ArgumentParser(description="Prints docs/flags.md.").parse_args(argv)
    print(HEAD)
    print("\n".join(training_tables() + generation_table()))


if __name__ == "__main__":
    sys.exit(main())
