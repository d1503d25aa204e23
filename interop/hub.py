"""Where a model lies: a path, or a name of the Hugging Face hub that has been downloaded.

    runs/NAME, musicgen-small              a path
    USER/NAME                              a name of the hub, looked up in its cache
    models--USER--NAME                     a folder of that cache by its top

        refs/main                          the name of the newest snapshot
        snapshots/HASH/config.json ..      the files, as links into blobs/

The cache lies where huggingface_hub has it: HF_HUB_CACHE, or hub/ under HF_HOME or ~/.cache/huggingface.
"""

import os
import re
from pathlib import Path

from support import common

HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps what it has downloaded."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def find_folder(name: str | Path) -> Path:
    """The path of a model: a snapshot where `name` is a folder of the hub's cache, or a name of the hub that
    is there with its weights; else `name` itself, whether there is such a path or not.

    Errors: ValueError for a folder of the cache of which no snapshot can be chosen."""
    path = Path(name)
    if (path / "snapshots").is_dir() and (path.name.startswith("models--") or (path / "refs").is_dir()):
        return _newest_snapshot(path)
    if not path.exists() and _is_hub_name(name):
        top = hub_cache() / f"models--{str(name).replace('/', '--')}"
        if (top / "snapshots").is_dir():
            snapshot = _newest_snapshot(top)
            if any(snapshot.glob("*.safetensors")) or any(snapshot.glob("*.bin")):
                return snapshot
    return path


def _is_hub_name(name: str | Path) -> bool:
    """Whether it reads as USER/NAME. What begins with a folder that is here is a path."""
    return bool(re.fullmatch(HUB_NAME, str(name))) and not Path(name).parent.exists()


def _newest_snapshot(top: Path) -> Path:
    """The snapshot that refs/main names, or the only one. Errors: ValueError."""
    snapshots = sorted(p for p in (top / "snapshots").iterdir() if p.is_dir())
    main = top / "refs" / "main"
    if main.is_file():
        wanted = top / "snapshots" / main.read_text("utf-8", "replace").strip()
        if wanted in snapshots:
            return wanted
    if len(snapshots) == 1:
        return snapshots[0]
    found = "none" if not snapshots else ", ".join(p.name[:12] for p in snapshots[:3])
    raise ValueError(f"{top}: refs/main names no snapshot that is there (there: {found}): give the path of "
                     "one under snapshots, or download it again")


def locate(name: str | Path) -> Path:
    """`find_folder`; a published model, facebook/NAME, is downloaded where huggingface_hub can.

    Errors: ValueError with the command that gets it."""
    path = find_folder(name)
    if path.exists() or not _is_hub_name(name) or not str(name).startswith("facebook/"):
        return path
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "spiece.model"]))
    except ImportError:
        problem = "huggingface_hub is not installed"
    except Exception as error:                 # it has errors of a dozen libraries
        problem = common.describe_error(error)
    raise ValueError(f"{name}: no such path, and no download ({problem}). {how_to_get(name)}")


def how_to_get(name: str | Path) -> str:
    """What to do about a model that is not here; nothing where its name is not one of the hub."""
    if not _is_hub_name(name):
        return ""
    folder = Path(name).name
    return (f"A model of the hub is not in the cache {hub_cache()}; where there is a network: pip install "
            f"huggingface_hub && hf download {name} --local-dir {folder}; then give {folder}")
