"""Files of other projects as tensors by name.

    folder/config.json + model.safetensors                 Hugging Face (pytorch_model.bin: older)
    folder/config.json + model.safetensors.index.json      the same in shards: which tensor lies in which file
    folder/config.json + model.fp16.safetensors            a variant; shards: ..index.fp16.json
    folder/state_dict.bin + compression_state_dict.bin     audiocraft's package, see package.py

Names and shapes are known before anything is built. One file is open at a time and a tensor is read when it
is asked for, so a large model does not need twice its size. No code of a pickle runs.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from support import common
from support.bounds import check_finite

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json")
SHARD = r"-\d+-of-\d+\."                                # in the name of a shard
PACKAGE_FILES = ("state_dict.bin", "compression_state_dict.bin")     # audiocraft's: language model and codec


def folder_kind(path: str | Path) -> str | None:
    """Who has written a folder, by its files: "hf" (Hugging Face), "audiocraft", or None."""
    folder = Path(path)
    ours = (folder / "best.pt").exists() or (folder / "log.jsonl").exists()     # a run may hold a config.json
    if (folder / "config.json").is_file() and not ours:
        return "hf"
    if any((folder / name).is_file() for name in PACKAGE_FILES):
        return "audiocraft"
    return None


class TensorFiles:
    """Tensors of one or several files by name, as `shapes` lists them; `files[name]` reads one.

    files: paths of the files. index: {name of a tensor: its file}; without it, a file holds what it holds.
    Errors: ValueError naming the file that is missing, truncated, or no file of tensors."""

    def __init__(self, files: list, index: dict | None = None):
        self.shapes = {}                       # {name: [int, ..]}
        self.paths = {}                        # {name: file}
        self._open_path = self._content = None
        for path in files:
            self._open(path)
            found = set(self._content.keys())
            wanted = found if index is None else {name for name, file in index.items() if file == path}
            if lost := sorted(wanted - found):
                raise ValueError(f"{path}: lacks {lost[0]}, which the index says it holds ({len(lost)} such)")
            for name in sorted(wanted):
                self.shapes[name] = self._shape(name)
                self.paths[name] = path

    def _open(self, path: Path) -> None:
        if path == self._open_path:
            return
        self._open_path = self._content = None           # lets go of the file before
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though the folder's index names it")
        self._content = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        self._open_path = path

    def _shape(self, name: str) -> list:
        if isinstance(self._content, dict):
            return list(self._content[name].shape)
        return list(self._content.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in float32 and memory of its own. Errors: ValueError for one with a NaN, for instance."""
        self._open(self.paths[name])
        x = self._content[name] if isinstance(self._content, dict) else self._content.get_tensor(name)
        check_finite(self.paths[name], {name: x})
        return x.to(torch.float32, copy=True)

    def read(self, names) -> dict:
        """{name: tensor}; each file is opened once."""
        order = {path: i for i, path in enumerate(dict.fromkeys(self.paths.values()))}
        return {name: self[name] for name in sorted(names, key=lambda name: order[self.paths[name]])}


def _open_safetensors(path: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        problem = "reading it needs the safetensors package: pip install safetensors"
        raise ValueError(f"{path}: {problem}") from None
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from None


def write_safetensors(path: Path, tensors: dict) -> None:
    """Writes {name: tensor} into a folder that is not in use yet. Errors: OSError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        save_file(tensors, str(path), {"format": "pt"})
    except SafetensorError as error:                     # as it reports a full disk
        raise OSError(f"{path} could not be written ({error})") from None


def _open_pickle(path: Path) -> dict:
    content = common.read_torch(path, "a file of plain tensors", mapped=True)
    if isinstance(content, dict):
        content = content.get("best_state", content)     # audiocraft keeps its settings beside the tensors
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in pairs):
        raise ValueError(f"{path}: not a file of tensors by name")
    return content


def find_weights(folder: Path) -> Path:
    """The file of a Hugging Face folder that holds the weights or names their shards.

    Where the usual names are not there, those of a variant are looked for, such as fp16: a word before the
    last ending. Errors: ValueError where there are none, or several variants."""
    for name in HF_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in HF_FILES:
        stem, _, end = name.rpartition(".")
        found = sorted(p for p in folder.glob(f"{stem}.*.{end}") if not re.search(SHARD, p.name))
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"{folder}: holds several variants of the weights ({names}): give one by itself")
        if found:
            return found[0]
    shards = sorted(p.name for p in folder.glob("*") if re.search(SHARD, p.name))
    found = f"only shards such as {shards[0]} without their index" if shards else "no weights"
    raise ValueError(f"{folder}: config.json is there, but {found}: "
                     f"one of {', '.join(HF_FILES)} was expected")


def open_hf_folder(folder: Path) -> TensorFiles:
    """The tensors of a Hugging Face folder. Errors: ValueError saying which file is missing or wrong."""
    path = find_weights(folder)
    if path.suffix != ".json":
        return TensorFiles([path])
    index = common.read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(_is_file_name(file) for file in index.values()):
        raise ValueError(f"{path}: not an index of shards: a weight_map of names to files was expected")
    index = {tensor: folder / file for tensor, file in index.items()}
    return TensorFiles(list(dict.fromkeys(index.values())), index)


def _is_file_name(file) -> bool:
    """No path leads out of the folder."""
    return isinstance(file, str) and Path(file).name == file


def check_shapes(where, found: dict, wanted: dict, ignored: str = r"(?!)") -> None:
    """Compares {name: shape} of a file with what its configuration asks for.

    ignored: pattern of names that may be there or not. Errors: ValueError counting what is missing,
    unexpected and of another shape, and naming the first."""
    wanted = {name: list(shape) for name, shape in wanted.items()}
    found = {name: list(shape) for name, shape in found.items()
             if name in wanted or not re.search(ignored, name)}
    both = sorted(wanted.keys() & found.keys())
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [f"{n} is {found[n]}, not {wanted[n]}" for n in both if found[n] != wanted[n]],
    }
    parts = []
    for what, names in wrong.items():
        if names:
            parts.append(f"{len(names)} {what}" + (f": {names[0][:160]}" if not parts else ""))
    if parts:
        raise ValueError(f"{where}: the weights are not what its configuration says: {'; '.join(parts)}")
