"""The reference runs: the losses that others saw with the same flags on the same data.

The first line of each assets/reference_*.jsonl is its header, with what a run must share with it to be
compared: some of its flags, of the model's shape, and on real music the fingerprint of its files. The other
lines are those of its log.jsonl that a stage ends with.
"""

import json
from pathlib import Path

from support.flags import values_before

ASSETS = Path(__file__).parent.parent / "assets"


def reference_curve(config: dict, folder: Path = ASSETS, without: dict | None = None) -> list:
    """The stages of the first reference run that is like the run of a config.json; [] if there is none.

    It is if all that the header names is equal, and flags that are younger than either: without, {flag:
    value}, says what runs had before these came (by default as their declarations in flags.py say). Each
    record's "other_codec" says whether the codes are those of another codec, and the losses so far others."""
    without = values_before() if without is None else without
    for path in sorted(folder.glob("reference_*.jsonl")):
        header, *records = (json.loads(line) for line in path.read_text().splitlines())
        if is_like(config, header, without):
            codec = config.get("codec")
            mine = codec.get("fingerprint") if isinstance(codec, dict) else None
            other = "codec" in header and header["codec"] != mine
            return [record | dict(other_codec=other) for record in records if record["kind"] == "stage"]
    return []


def is_like(config: dict, header: dict, without: dict) -> bool:
    """Whether the run of a config.json has all that a header names, see `reference_curve`."""
    args, model = (part if isinstance(part := config.get(name), dict) else {} for name in ("args", "model"))
    pairs = (without | header["args"], without | args), (header.get("model", {}), model)
    alike = all(name in found and found[name] == value
                for wanted, found in pairs for name, value in wanted.items())
    return alike and header.get("files") in (None, config.get("files"))
