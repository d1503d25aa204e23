"""Checkpoints that outlive crashes, full disks and other numbers of ranks; and how a run is stopped.

    last.pt.tmp ─fsync─► last.pt ─(at the next save)─► last.prev.pt

The new file is whole on the disk before anything is renamed, so that at every moment one of the two is whole. What is
read is checked first: the container that torch.save writes (a zip file) has a CRC-32 of every tensor. A damaged last.pt
is put aside and the one before is taken. Files hold plain tensors and plain data and are read with weights_only=True: a
foreign pickle executes nothing.

With --sharded_checkpoint the tensors lie beside it, written by all ranks through torch.distributed.checkpoint:

    last.pt ─ names ─► last.shards.0/          at most three folders; the one that neither last.pt nor last.prev.pt
    last.prev.pt ────► last.shards.1/          names is free for the next save
"""

import contextlib
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from support.common import describe_error, sync_folder
from support.distributed import is_lost_peer

LAST, PREVIOUS, DAMAGED = "last.pt", "last.prev.pt", "last.damaged.pt"
UNREADABLE = (RuntimeError, ValueError, EOFError, LookupError, OSError, TypeError, AttributeError, pickle.UnpicklingError,
              zipfile.BadZipFile)


# ---------------------------------------------------------------------------------------------------------------------
# one file


def read_checkpoint_file(path: Path, check: bool = True) -> dict:
    """The content of a file that `write_torch` made, mapped into memory, after its checksums were found right (`check`).

    Errors: one of UNREADABLE."""
    if check:
        with zipfile.ZipFile(path) as container:
            if (bad := container.testzip()) is not None:
                raise ValueError(f"checksum of {bad} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def checkpoint_errors(out: Path):
    """Around what uses a checkpoint of `out`. Errors: ValueError where it does not hold what this code writes."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or is_lost_peer(error):
            raise
        raise ValueError(f"{out}: its checkpoint does not fit this code ({describe_error(error)}): "
                         "give another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# the newest checkpoint of a run


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def newest_checkpoint(folder: Path, format: str, keys: set) -> tuple[str | None, list]:
    """Which checkpoint of a folder to go on from: (its name or None, lines on what was damaged). keys: what it must hold.

    A damaged last.pt is renamed where the one before is whole, so that the next save does not push that one out.
    Errors: ValueError if there are checkpoints and none can be read: a run must not start over in their place."""
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
        raise ValueError(f"{'; '.join(lines)}. Give another --out, or move the damaged files away to start over")
    return None, []


# ---------------------------------------------------------------------------------------------------------------------
# tensors written by all ranks


PLAIN = {("torch.distributed.checkpoint.metadata", name) for name in (
    "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
    "_MEM_FORMAT_ENCODING")}
PLAIN |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
          ("pathlib", "PosixPath"), ("pathlib", "Path"), ("collections", "OrderedDict")}


class PlainReader(FileSystemReader):
    """Reads torch.distributed.checkpoint's table of contents, a pickle, without executing anything: plain classes alone, and
    among those none for entries that are no tensors (they would be loaded as pickles)."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) in PLAIN or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path, ".metadata"), "rb") as f:
            metadata = self.Unpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def file_crc32(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def shard_folders_in_use(folder: Path) -> set:
    """The shard folders that the checkpoints of a run folder name. Errors: OSError where one cannot be read: drop nothing then."""
    names = set()
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            names |= {(read_checkpoint_file(path, check=False)["shards"] or {}).get("folder")} if path.exists() else set()
        except UNREADABLE as error:
            raise OSError(f"{path} cannot be read ({describe_error(error)})") from None
    return names - {None}


def save_shards(folder: Path, tensors: dict, ranks) -> dict:
    """All ranks write their parts of {name: tensor} into a free shard folder -> {"folder", "files": {name: CRC-32}}.

    Errors: OSError on every rank if any could not write."""
    def free() -> str:
        taken = shard_folders_in_use(folder)
        name = next(n for n in ("last.shards.0", "last.shards.1", "last.shards.2") if n not in taken)
        shutil.rmtree(folder / name, ignore_errors=True)
        return name

    def checksums() -> dict:
        paths = sorted((folder / name).iterdir())
        sync_folder(folder / name)
        return {p.name: file_crc32(p) for p in paths[ranks.rank::ranks.world_size]}

    def agree(action) -> list:
        """What it gives on every rank. An error on one is an error on all: nobody is left waiting."""
        try:
            outcome = action()
        except OSError as error:
            outcome = error
        outcomes = ranks.gather(outcome)
        for each in outcomes:
            if isinstance(each, OSError):
                raise each
        return outcomes

    name = agree(lambda: free() if ranks.is_main else None)[0]
    try:
        with ignore_single_process_warning():
            dcp.save(tensors, storage_writer=FileSystemWriter(folder / name), no_dist=ranks.world_size == 1)
    except dcp.api.CheckpointException as error:                     # dcp tells every rank
        raise OSError(f"{folder / name} could not be written ({first_failure(error)})") from None
    files = {}
    for part in agree(checksums):
        files |= part
    sync_folder(folder)
    return dict(folder=name, files=files)


def first_failure(error: dcp.api.CheckpointException) -> str:
    """The first rank's reason why shards could not be written or read."""
    return describe_error(next(iter(error.failures.values()))[0])


def check_shards(folder: Path, content: dict) -> None:
    """Refuses a checkpoint whose shards are missing or damaged. Errors: one of UNREADABLE."""
    shards = content.get("shards")
    for name, value in (shards["files"] if shards else {}).items():
        if file_crc32(folder / shards["folder"] / name) != value:
            raise ValueError(f"checksum of {shards['folder']}/{name} is wrong")


def load_shards(folder: Path, shards: dict, tensors: dict, ranks) -> None:
    """Fills {name: tensor} in place from a shard folder, for any number of ranks and any sharding.

    Errors: RuntimeError where they do not fit."""
    try:
        with ignore_single_process_warning():
            dcp.load(tensors, storage_reader=PlainReader(folder / shards["folder"]), no_dist=ranks.world_size == 1)
    except dcp.api.CheckpointException as error:
        raise RuntimeError(f"{shards['folder']}: {first_failure(error)}") from None


@contextlib.contextmanager
def ignore_single_process_warning():
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def remove_unused_shards(folder: Path) -> None:
    """Removes shard folders that no checkpoint names."""
    with contextlib.suppress(OSError):
        taken = shard_folders_in_use(folder)
        for path in folder.glob("last.shards.?"):
            if path.name not in taken:
                shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# one run a folder


def lock_folder(folder: Path) -> int | None:
    """Keeps a run folder for this process until the handle is closed or the process dies, however it dies.

    Errors: ValueError if another process has it."""
    try:
        import fcntl
    except ImportError:                                              # not on this system: nothing to guard with
        return None
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)           # this process's own: its loaders do not hold it after it
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise ValueError(f"{folder} is in use by another process: wait for it, or give another --out") from None
    except OSError:                                                  # a file system without locks
        pass
    return handle
