"""What every room needs: files written whole, files that cannot be trusted, a user's mistake as one line,
devices, randomness.

    write_atomically     a file is there in full or not at all, whatever is killed, however full the disk is
    read_torch           plain tensors and plain data out of a file that may hold anything; no code of it runs
    command              a mistake of the user, a full disk or a signal becomes one line and an exit code
    numbered_names       names 000, 001, .. that no other process takes
    random_generator     randomness that is a function of its key alone
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from support.signals import Stop, Stopped, exit_code

FORMAT = "nanomusicgen-1"                      # of best.pt and last.pt
MAX_TEXT = 10_000                              # characters of a text: a longer one is no caption
MODEL_FILE = "a model of this project"         # what best.pt is called in messages


def describe_error(error: Exception) -> str:
    """Kind and first sentence of an error, for the line that a user sees."""
    if is_out_of_memory(error):
        return out_of_memory_text(error)
    sentence = re.split(r"\. |\n", str(error).strip())[0][:200]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


@functools.cache
def say_once(line: str) -> None:
    """Prints a line on stderr; the same line never again."""
    tell(line, file=sys.stderr)


@contextlib.contextmanager
def left_out(what: str | Path):
    """Around what a program can do without, such as a picture: where it fails, one line says what and why."""
    try:
        yield
    except Exception as error:                 # whatever it is, what follows does not need it
        say_once(f"{what} is left out: {describe_error(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host's memory, or a GPU's, does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # how torch reports it of a CPU; a size that no machine has; of Apple's MPS
    words = ("can't allocate memory", "Storage size calculation overflowed", "bad_alloc", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def out_of_memory_text(error: BaseException) -> str:
    """What of an error of `is_out_of_memory` a user needs."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    return "out of memory" + (f" ({int(asked[1]) / 2 ** 30:.1f} GiB more were asked for)" if asked else "")


# --------------------------------------------------------------------------------------------------
# files


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: Callable, previous: Path | None = None) -> None:
    """Writes a file beside `path` by write(open binary file), flushes it to the disk, then swaps it in.

    What stood at `path` before becomes `previous`, if given. Errors: OSError naming the file if the disk is
    full or the folder may not be written to. Then, and where a signal ends the command, what stood there is
    untouched and no half file is left."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, (OSError, RuntimeError)):     # torch reports a failed write as the latter
            raise
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} could not be written ({cause})") from None
    sync_folder(path.parent)


def write_torch(path: Path, content, previous: Path | None = None) -> None:
    """`write_atomically` of what torch.save makes of plain tensors and plain data."""
    write_atomically(path, lambda file: torch.save(content, file), previous)


def write_json(path: Path, content, indent: int | None = 1) -> None:
    """`write_atomically` of plain data as JSON. NaN and infinities stay, as Python writes them."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=indent) + "\n").encode()))


def read_torch(path: Path, what: str, mapped: bool = False):
    """What torch.save wrote, on the CPU; no code of it runs. mapped: tensors are read when used.

    what: what was expected, for the message. Errors: ValueError naming the file."""
    try:
        with warnings.catch_warnings():
            # of a foreign file, which is refused right after
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, {what} was expected") from None
    except Exception as error:                 # torch.load raises many kinds on foreign bytes
        if is_out_of_memory(error):
            raise
        if mapped and Path(path).is_file():    # files of before torch 1.6 cannot be mapped
            return read_torch(path, what)
        raise ValueError(f"{path}: not {what}, or damaged ({describe_error(error)})") from None


def read_torch_dict(path: Path, what: str, mapped: bool = False) -> dict:
    """`read_torch` of a file whose content must be a dict. Errors: ValueError naming the file."""
    content = read_torch(path, what, mapped)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not {what}: holds a {type(content).__name__}")
    return content


def read_json(path: Path) -> dict:
    """A JSON object. Errors: ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:     # no UTF-8 and no JSON are ValueErrors
        raise ValueError(f"{path}: not readable as JSON ({str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def flatten_numbers(record: dict, prefix: str = "") -> dict:
    """Every number of a record of plain data, however deep, as {"a/b": number}."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


@contextlib.contextmanager
def numbered_names(folder: Path, count: int) -> Iterator[list[Path]]:
    """Paths without a suffix: the next `count` names 000, 001, .. of a folder, over all numbers in use.

    Another process cannot take them too: until NNN.wav is there, an NNN.wav.tmp holds its name, which is made
    only where there is none. `write_atomically` then fills it."""
    def holder(name: Path) -> Path:
        return name.with_name(name.name + ".wav.tmp")

    used = [int(path.stem) for path in folder.glob("*.*") if path.stem.isdecimal()]
    number, names = max(used, default=-1) + 1, []
    try:
        while len(names) < count:
            name = folder / f"{number:03d}"
            number += 1
            with contextlib.suppress(FileExistsError):         # held by another
                open(holder(name), "x").close()
                names.append(name)
                if name.with_suffix(".wav").exists():          # by one that has finished since we looked
                    holder(names.pop()).unlink(missing_ok=True)
        yield names
    finally:
        for name in names:
            holder(name).unlink(missing_ok=True)


def output_name(text: str) -> str:
    """A file or folder to write to, as argparse's type. Errors: its own for an empty name."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name what to write to")
    return text


def output_folder(name: str | Path) -> Path:
    """A folder to write to (--out), made if need be. Errors: ValueError."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error})") from None
    return folder


# --------------------------------------------------------------------------------------------------
# commands, devices, randomness, vectors


def command(name: str, lower: str | None = None) -> Callable:
    """Decorates a `main(argv)`, so that what ends it is one line: a ValueError or OSError with exit code 2,
    Ctrl-C with 130, SIGTERM with 143, as shells count them.

    lower: what to change where the memory does not suffice; that too is one line. With DEBUG=1 in the
    environment the error is raised, to see where it comes from."""
    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(argv: list | None = None) -> int:
            try:
                with Stop():
                    code = main(argv) or 0
                    sys.stdout.flush()                 # a full disk behind it is found here at the latest
                return code
            except (ValueError, OSError) as error:
                if os.environ.get("DEBUG"):
                    raise
                text, code = stdout_problem() or str(error), 2
            except (MemoryError, RuntimeError) as error:
                if os.environ.get("DEBUG") or not is_out_of_memory(error):
                    raise
                way_out = f"lower {lower}" if lower else "free some, or take a larger machine"
                text, code = f"{out_of_memory_text(error)}: {way_out}", 2
            except Stopped as stopped:
                text, code = f"stopped by {stopped}", exit_code(str(stopped))
            except KeyboardInterrupt:                  # in a thread, which has no handlers
                text, code = "stopped by SIGINT", exit_code("SIGINT")
            print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
            return code
        return run
    return decorate


def tell(*lines: str, file=None) -> None:
    """Prints lines of a training. Where a full disk behind them takes none, they are lost and it goes on."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=file, flush=True)


def stdout_problem() -> str | None:
    """Why standard output cannot be written, such as a full disk or a closed pipe behind it; or None.

    What it still holds is then dropped: Python would try again at its end, and complain a second time."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):             # of a test, it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"standard output could not be written ({error})"
    return None


def check_device(name) -> torch.device:
    """A device by its name. Errors: ValueError where there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: choose cpu, cuda, cuda:1 (a GPU by its number) or mps")
    mps = int(torch.backends.mps.is_available())
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}[device.type]
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: there is none here; take --device cpu")
    return device


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def has_package(name: str) -> bool:
    """Whether an optional package is installed and can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def random_generator(*key: int) -> np.random.Generator:
    """A random generator that is a function of its key alone, such as (seed, stream, step, sample).

    A stream is a number that keeps uses of one seed apart. Taken: 1 order of files, 2 places of segments
    (data.py), 11 dropping conditions, 12 text, 13 dropout in the model, 14 style, 15 melody, 16 where a toy
    clip begins."""
    return np.random.default_rng(key)


def nearest_vectors(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Index [n] of the nearest of vectors [V,D] to each x [n,D]: what a codebook calls a code."""
    return (vectors.square().sum(1) - 2 * x @ vectors.T).argmin(1)


def bytes_to_tensor(content: bytes) -> torch.Tensor:
    """Bytes as a uint8 tensor [n], as files keep them: they hold plain tensors and plain data only."""
    return torch.tensor(list(content), dtype=torch.uint8)


def tensor_to_bytes(tensor: torch.Tensor) -> bytes:
    """What `bytes_to_tensor` was given."""
    return bytes(tensor.tolist())
