"""Checkpoint files on the disk: they outlive crashes and full disks, and fit any number of ranks.

    last.pt.tmp ─fsync─► last.pt ─(at the next save)─► last.prev.pt

The new file is whole on the disk before anything is renamed, so one of the two is whole at every moment. A
file is checked before it is used: torch.save writes a zip container, which has a CRC-32 of every tensor. A
damaged last.pt is put aside, and the one before is taken. Files hold plain tensors and plain data and are
read with weights_only=True: a foreign pickle executes nothing.

With --sharded_checkpoint all ranks write the tensors beside it, through torch.distributed.checkpoint ("dcp"):

    last.pt ─ names ─► last.shards.0/          at most three folders: the one that neither last.pt nor
    last.prev.pt ────► last.shards.1/          last.prev.pt names is free for the next save

What is inside a checkpoint is the run's business: see support/resume.py.
"""

import contextlib
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from support.common import describe_error, is_out_of_memory, sync_folder
from support.distributed import Ranks, is_lost_peer

LAST, PREVIOUS, DAMAGED = "last.pt", "last.prev.pt", "last.damaged.pt"
SHARD_FOLDERS = ("last.shards.0", "last.shards.1", "last.shards.2")

# What reading a damaged or foreign file can raise.
UNREADABLE = (RuntimeError, ValueError, EOFError, LookupError, OSError, TypeError, AttributeError,
              pickle.UnpicklingError, zipfile.BadZipFile)

# The classes of dcp's table of contents: (module, name).
PLAIN_CLASSES = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
}


# ------------------------------------------------------------------------------------------------------------
# the newest checkpoint of a run


def read_checkpoint_file(path: Path, check: bool = True) -> dict:
    """The content of a checkpoint file, mapped into memory. `check`: after its checksums were found right.

    Errors: one of UNREADABLE."""
    if check:
        with zipfile.ZipFile(path) as container:
            if (bad := container.testzip()) is not None:
                raise ValueError(f"checksum of {bad} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def checkpoint_errors(out: Path):
    """Around what uses a checkpoint of the run in `out`.

    Errors: ValueError where the checkpoint does not hold what this code expects."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        raise ValueError(f"{out}: its checkpoint does not fit this code ({describe_error(error)}): "
                         "give another --out") from None


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def flags_of_checkpoint(folder: Path) -> dict:
    """The flags of the run in a folder; none if it holds no checkpoint that can be read."""
    for name in (LAST, PREVIOUS):
        with contextlib.suppress(*UNREADABLE):
            return dict(read_checkpoint_file(folder / name, check=False)["args"])
    return {}


def newest_checkpoint(folder: Path, format: str, keys: set) -> tuple[str | None, list]:
    """Which checkpoint of a folder to go on from -> (its name or None, lines about damaged ones).

    keys: what a checkpoint must hold. A damaged last.pt is renamed if the one before is whole, which the next
    save would push out otherwise. Errors: ValueError if there are checkpoints and none can be read, because a
    new run must not take their place."""
    lines = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            content = read_checkpoint_file(path)
            if content["format"] != format:
                raise ValueError(f"its format is {content['format']!r}, not {format!r}")
            if missing := sorted(keys - content.keys()):
                raise ValueError(f"it lacks {', '.join(missing)}")
            check_shards(folder, content)
        except UNREADABLE as error:
            lines.append(f"{path} cannot be used: {describe_error(error)}")
            continue
        if lines:
            os.replace(folder / LAST, folder / DAMAGED)
            lines.append(f"going back to {path}; the damaged one is kept as {folder / DAMAGED}")
        return name, lines
    if lines:
        raise ValueError(f"{'; '.join(lines)}. "
                         "Give another --out, or move the damaged files away to start over")
    return None, []


# ------------------------------------------------------------------------------------------------------------
# shards: tensors written by all ranks


class PlainReader(FileSystemReader):
    """Reads a shard folder without executing anything in it.

    dcp's table of contents is a pickle. Only PLAIN_CLASSES and dtypes are allowed in it. That excludes
    entries for what is no tensor, which dcp would load as pickles."""

    class Unpickler(pickle.Unpickler):
        """An unpickler that knows PLAIN_CLASSES and torch's dtypes only."""

        def find_class(self, module: str, name: str):
            """The class of a name in the pickle. Errors: pickle.UnpicklingError for any other."""
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if (module, name) in PLAIN_CLASSES or is_dtype:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")

    def read_metadata(self, *args, **kwargs):
        """The table of contents. Errors: pickle.UnpicklingError."""
        with open(Path(self.path, ".metadata"), "rb") as f:
            metadata = self.Unpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_shards(folder: Path, tensors: dict, ranks: Ranks) -> dict:
    """All ranks write their parts of {name: tensor} into a free shard folder.

    -> {"folder": its name, "files": {name: CRC-32}}. Errors: OSError on every rank if any could not write."""
    def empty_free_folder() -> str:
        in_use = shard_folders_in_use(folder)
        name = next(name for name in SHARD_FOLDERS if name not in in_use)
        shutil.rmtree(folder / name, ignore_errors=True)
        return name

    def checksums() -> dict:
        paths = sorted((folder / name).iterdir())
        sync_folder(folder / name)
        return {p.name: file_crc32(p) for p in paths[ranks.rank::ranks.world_size]}

    name = gather_outcomes(ranks, lambda: empty_free_folder() if ranks.is_main else None)[0]
    try:
        with ignore_single_process_warning():
            dcp.save(tensors, storage_writer=FileSystemWriter(folder / name), no_dist=ranks.world_size == 1)
    except dcp.api.CheckpointException as error:    # dcp raises it on every rank
        raise OSError(f"{folder / name} could not be written ({first_failure(error)})") from None
    files = {}
    for part in gather_outcomes(ranks, checksums):  # each rank reads some of the files
        files |= part
    sync_folder(folder)
    return dict(folder=name, files=files)


def load_shards(folder: Path, shards: dict, tensors: dict, ranks: Ranks) -> None:
    """Fills {name: tensor} in place from a shard folder, for any number of ranks and any sharding.

    Errors: RuntimeError where they do not fit."""
    reader = PlainReader(folder / shards["folder"])
    try:
        with ignore_single_process_warning():
            dcp.load(tensors, storage_reader=reader, no_dist=ranks.world_size == 1)
    except dcp.api.CheckpointException as error:
        raise RuntimeError(f"{shards['folder']}: {first_failure(error)}") from None


def check_shards(folder: Path, content: dict) -> None:
    """Refuses a checkpoint whose shards are missing or damaged. Errors: one of UNREADABLE."""
    shards = content.get("shards")
    if not shards:
        return
    for name, value in shards["files"].items():
        if file_crc32(folder / shards["folder"] / name) != value:
            raise ValueError(f"checksum of {shards['folder']}/{name} is wrong")


def remove_unused_shards(folder: Path) -> None:
    """Removes the shard folders that no checkpoint names; none of them where a checkpoint cannot be read."""
    with contextlib.suppress(OSError):
        in_use = shard_folders_in_use(folder)
        for path in folder.glob("last.shards.?"):
            if path.name not in in_use:
                shutil.rmtree(path, ignore_errors=True)


def shard_folders_in_use(folder: Path) -> set:
    """Names of the shard folders that the checkpoints of a run folder need.

    Errors: OSError where a checkpoint cannot be read: nothing must be removed then."""
    in_use = set()
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            shards = read_checkpoint_file(path, check=False)["shards"]
            if shards:
                in_use.add(shards.get("folder"))
        except UNREADABLE as error:
            raise OSError(f"{path} cannot be read ({describe_error(error)})") from None
    return in_use


def gather_outcomes(ranks: Ranks, action: Callable) -> list:
    """What `action()` returns on each rank. Errors: OSError on all ranks if on one: none is left waiting."""
    try:
        outcome = action()
    except OSError as error:
        outcome = error
    outcomes = ranks.gather(outcome)
    for each in outcomes:
        if isinstance(each, OSError):
            raise each
    return outcomes


def first_failure(error: dcp.api.CheckpointException) -> str:
    """The first rank's reason why shards could not be written or read."""
    return describe_error(next(iter(error.failures.values()))[0])


def file_crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


@contextlib.contextmanager
def ignore_single_process_warning():
    """Silences dcp's warning that there is no process group, which is right for a single process."""
    with warnings.catch_warnings():
        text = "torch.distributed is disabled, unavailable or uninitialized"
        warnings.filterwarnings("ignore", message=text)
        yield


# ------------------------------------------------------------------------------------------------------------
# one run a folder


def lock_folder(folder: Path) -> int | None:
    """Locks a run folder for this process -> a handle: closing it, or the end of the process, unlocks.

    Errors: ValueError if another process has the folder."""
    try:
        import fcntl
    except ImportError:  # not on this system, which has nothing to lock with
        return None
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # A POSIX lock is of the process alone: loaders that outlive it for a moment do not hold it.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise ValueError(f"{folder} is in use by another process: "
                         "wait for it, or give another --out") from None
    except OSError:  # a file system without locks
        pass
    return handle


def owns_folder(folder: Path, handle: int | None) -> bool:
    """Whether a lock is still that of its folder: not if that was removed, or removed and begun anew."""
    try:
        return handle is None or os.path.samestat(os.fstat(handle), os.stat(folder / ".lock"))
    except FileNotFoundError:
        return False
