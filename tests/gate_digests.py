"""Digests of what the project writes: logs, checkpoints, folders of any kind. For gate.py.

What no two runs share is left out: seconds and rates in logs, the length of a log in bytes (its seconds have
more or fewer digits), the release of torch, the checksums of shards, whose files hold a random number.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

TIMED = {"seconds", "frames_per_second"}  # of records in logs and histories
NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def tensor_digest(x: torch.Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes."""
    content = b""
    if x.numel():
        content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode() + content).hexdigest()


def holds_tensors(value) -> bool:
    """Whether a value is a dictionary of tensors and of nothing else."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(x, torch.Tensor) for x in value.values())


class Digests:
    """Digests by name: {"toy_run/last.pt/tensors/ema": "0a1b.."}.

    folders: {path: the word that stands for it}, so that a temporary folder changes nothing."""

    def __init__(self, folders: dict):
        self.folders, self.found = folders, {}

    def plain(self, value, dropped=frozenset()):
        """A value as JSON holds it: tensors as digests, folders as words, without the keys `dropped`."""
        if isinstance(value, torch.Tensor):
            return {"tensor": tensor_digest(value)}
        if isinstance(value, dict):
            return {str(k): self.plain(v, dropped) for k, v in value.items() if k not in dropped}
        if isinstance(value, (list, tuple)):
            return [self.plain(v, dropped) for v in value]
        if isinstance(value, str):
            for path, word in self.folders.items():
                value = value.replace(path, word)
        return value

    def add(self, name: str, value, dropped=frozenset()) -> None:
        """Notes the digest of a value under a name."""
        assert name not in self.found, f"{name} is there already"
        if not isinstance(value, bytes):
            value = json.dumps(self.plain(value, dropped), sort_keys=True).encode()
        self.found[name] = hashlib.sha256(value).hexdigest()[:20]

    def add_numbers(self, name: str, text: str) -> None:
        """The numbers of what a command printed, in order; its words may change."""
        self.add(name, re.findall(NUMBER, self.plain(text)))

    def add_parts(self, name: str, tensors: dict) -> None:
        """Tensors in parts, by what their names begin with: "ema/..", "transformer.." and so on."""
        parts = {}
        for key, x in tensors.items():
            parts.setdefault(re.split(r"[/.]", key)[0], {})[key] = x
        for part, content in parts.items():
            self.add(f"{name}/{part}", content)

    def add_sections(self, name: str, content: dict) -> None:
        """A checkpoint or the like: a digest for each section, each flag, each part of the tensors."""
        for section, value in content.items():
            place = f"{name}/{section}"
            if section in ("log_bytes", "torch"):
                continue
            if section == "args":
                for flag, setting in value.items():
                    self.add(f"{place}/{flag}", setting)
            elif section == "shards" and value:
                self.add(place, dict(folder=value["folder"], files=sorted(value["files"])))
            elif section == "xp.cfg":  # of a package: JSON as text, in any order
                self.add(place, json.loads(value))
            elif holds_tensors(value):
                self.add_parts(place, value)
            else:
                self.add(place, value, TIMED if section in ("history", "metrics", "best_values") else ())

    def add_file(self, name: str, path: Path) -> None:
        """A file by its kind: JSON, checkpoints and safetensors by their content, others by their bytes."""
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            flags = content.get("args") if isinstance(content, dict) else None
            (self.add_sections if isinstance(flags, dict) else self.add)(name, content)
        elif path.suffix in (".pt", ".bin"):
            self.add_sections(name, torch.load(path, map_location="cpu", weights_only=True))
        elif path.suffix == ".safetensors":
            self.add_parts(name, load_file(path))
        else:
            self.add(name, path.read_bytes())

    def add_folder(self, name: str, folder: Path, pattern: str = "**/*") -> None:
        """Every file of a folder, and the list of their names."""
        paths = sorted(p for p in folder.glob(pattern) if p.is_file())
        assert paths, f"{folder} is empty"
        self.add(f"{name}/files", [str(p.relative_to(folder)) for p in paths])
        for path in paths:
            self.add_file(f"{name}/{path.relative_to(folder)}", path)

    def add_log(self, name: str, path: Path) -> None:
        """A log.jsonl: a digest for the records of each kind and stage."""
        groups = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            groups.setdefault(f"{record['kind']}_{record['stage']}", []).append(record)
        for group, records in groups.items():
            self.add(f"{name}/{group}", records, TIMED)

    def add_run(self, name: str, out: Path) -> None:
        """A run folder: log, checkpoints, configuration, samples; not index.html, which shows times."""
        self.add(f"{name}/files", sorted(p.name for p in out.iterdir()))
        self.add_log(f"{name}/log.jsonl", out / "log.jsonl")
        for file in ("last.pt", "best.pt", "config.json"):
            self.add_file(f"{name}/{file}", out / file)
        if (out / "samples").is_dir():
            self.add_folder(f"{name}/samples", out / "samples")
