"""Bad input and how it ends. Nobody sees a traceback, and no file that was there before is touched:

    REFUSED    exit code 2 and one line on stderr that names the value and says what is allowed or what to do
    SKIPPED    a bad file among good ones: left out, named once and counted; the rest goes on
    FINE       odd, but no mistake: works

The cases stand in test_bad_train.py, test_bad_data.py and test_bad_generate.py. A case is a command line, run
in this process in an empty folder. @NAME is a file or folder that bad_material.py makes there first,
@music+A+B a folder of good songs with A and B beside them, $NAME one of TEXTS. Then come the words that its
message must hold.

    python tests/test_bad_train.py [WORD]    the table: case | how it ended, for the cases that hold WORD
"""

import contextlib
import hashlib
import io
import os
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import soundfile
import torch

import conditioning
import data
import generate
import tokenizer
import train
from bad_material import TEXTS, TINY_TRAINING, make_material, prepare
from evaluate import analyser, metrics, page
from interop import convert
from support import chroma, estimate, style
from tools import fit_codec

PROGRAMS = dict(train=train, data=data, tokenizer=tokenizer, generate=generate, metrics=metrics,
                conditioning=conditioning, analyser=analyser, fit_codec=fit_codec, chroma=chroma,
                style=style, convert=convert, page=page)
FIRST = {    # flags put before those of a case
    "train": TINY_TRAINING,
    "generate": "--seconds 0.1 --device cpu --out out".split(),
}


def locked(patch) -> None:
    """As if a song were another user's: root may read everything."""
    original = soundfile.SoundFile

    def opened(name, *more, **named):
        if "locked" in os.fsdecode(name):
            raise PermissionError(13, "Permission denied", name)
        return original(name, *more, **named)

    patch.setattr(soundfile, "SoundFile", opened)


def read_only(patch) -> None:
    """As if nothing could be written: root may write everywhere."""
    patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)


PATCHES = {    # of some cases
    "data check: a file that may not be read": locked,
    "train: run folder read-only": read_only,
    "generate: out read-only": read_only,
}


# ----------------------------------------------------------------------------------------------------------
# running a case


class Ending(NamedTuple):
    """How a case ended."""

    code: int
    out: str
    err: str
    before: dict    # {name of a file: sha256}
    after: dict


def listing(place: Path) -> dict:
    """Every file below: {name: sha256}; a link counts by where it points."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(place))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(place))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_case(name: str, command: str, place: Path, shared: Path, fault=contextlib.nullcontext()) -> Ending:
    """Runs a case within the folder `place`, while a fault, if one is given, lasts.

    shared: the folder that `prepare` made."""
    program, *words = shlex.split(command)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned, \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(place)
        patch.delenv("DEBUG", raising=False)
        patch.setattr(sys, "argv", [f"{program}.py"])
        patch.setattr(estimate, "machine_flops", lambda args: 1e9)    # measuring it takes seconds
        argv = []
        with contextlib.redirect_stdout(io.StringIO()):
            for word in words:
                if word[0] == "@":
                    word = make_material(word[1:], place, shared)
                elif word[0] == "$":
                    word = TEXTS[word[1:]]
                argv.append(word)
        if name in PATCHES:
            PATCHES[name](patch)
        before = listing(place)
        try:
            with fault:
                code = PROGRAMS[program].main([*FIRST.get(program, ()), *argv])
        except SystemExit as stopped:    # of argparse
            code = stopped.code
        for each in warned:              # what a user sees as lines on stderr
            print(warnings.formatwarning(each.message, each.category, each.filename, each.lineno), file=err)
    out.flush()
    err.flush()
    printed, complained = out.buffer.getvalue().decode(), err.buffer.getvalue().decode()
    return Ending(code, printed, complained, before, listing(place))


def check_case(case: tuple, name: str, shared: Path) -> None:
    """Runs a case in a folder of its own and asserts that it ends as it should."""
    check, command, *says = case
    with tempfile.TemporaryDirectory() as place:
        ending = run_case(name, command, Path(place), shared)
    assert "owned" not in ending.after, "a foreign pickle was run"
    check(ending, command, *says)


def the_line(err: str) -> str:
    """The only line of stderr; before it stands at most what argparse says on usage."""
    lines = err.splitlines()
    while lines and lines[0].startswith(("usage:", " ")):
        lines.pop(0)
    assert len(lines) == 1, f"{len(lines)} lines: {err[-500:]}"
    return lines[0]


def check_refused(ending: Ending, command: str, *says: str) -> str:
    """Exit code 2, one line of a size to read, every file as before -> the line.

    No file is new, but for those of a run that began."""
    code, _, err, before, after = ending
    line, program = the_line(err), command.split()[0]
    # A file in a room is called by its module, as argparse says: python -m evaluate.analyser.
    module = PROGRAMS[program].__name__
    names = (module, f"python -m {module}") if "." in module else (f"{program}.py",)
    assert code == 2 and line.startswith(names) and len(line) < 1000, (code, line)
    assert all(word in line for word in says), f"{says} not all in: {line}"
    assert before.items() <= after.items(), f"changed: {set(before.items()) - set(after.items())}"
    new = after.keys() - before.keys()
    assert new <= {"out/config.json", "out/.lock"}, f"written: {new}"
    return line


def check_fine(ending: Ending, command: str, *says: str) -> str:
    """Exit code 0, the words printed, every file as before -> the line with the first word.

    New files may stand beside the old ones."""
    code, out, err, before, after = ending
    assert code == 0, (code, err)
    assert all(word in out + err for word in says), f"{says} not all in: {out}{err}"
    assert before.items() <= after.items(), f"changed: {set(before.items()) - set(after.items())}"
    return next(line for line in (err + out).splitlines() if says[0] in line)


def check_skipped(ending: Ending, command: str, *says: str) -> str:
    """As fine; and what was skipped (the last word) is named once -> the line that names it."""
    check_fine(ending, command, *says)
    lines = [line for line in (ending.err + ending.out).splitlines() if says[-1] in line]
    assert len(lines) == 1, lines
    return lines[0]


def all_cases(refused: dict, skipped: dict, fine: dict) -> dict:
    """{name: (how to check it, command, words ...)}."""
    cases = {}
    for check, table in ((check_refused, refused), (check_skipped, skipped), (check_fine, fine)):
        for name, case in table.items():
            cases[name] = (check, *case)
    return cases


def print_table(cases: dict, word: str = "") -> int:
    """Prints how each case that holds `word` ends -> exit code, 1 if one ends otherwise than it should."""
    torch.set_num_threads(1)
    wrong, names = 0, [name for name in cases if word in name]
    width = max(map(len, names), default=0)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        shared.mkdir()
        prepare(shared)
        for i, name in enumerate(names):
            check, command, *says = cases[name]
            place = Path(folder, str(i))
            place.mkdir()
            try:
                ending = run_case(name, command, place, shared)
                shown = f"{ending.code}  {check(ending, command, *says)}"
            except Exception as error:    # a traceback, or another ending than the table's
                wrong += 1
                shown = f"WRONG  {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name:<{width}} | {shown.replace(f'{place}/', '')}", flush=True)
    print(f"{len(names)} cases, {wrong} of them end otherwise than they should")
    return int(wrong > 0)
