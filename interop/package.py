"""One file of an audiocraft package: its tensors, and its settings, which are YAML in a string.

    {"best_state": {name: tensor}, "xp.cfg": "sample_rate: 32000\\nchannels: 1\\n..", "version": .., ..}
    {"pretrained": "facebook/encodec_32khz"}             the codec's file of some: the name of another folder

The settings are OmegaConf's: nested, and a value such as ${encodec.causal} stands for another one.
"""

import json
import re
from pathlib import Path

from interop.tensors import TensorFiles
from support import common


class PackageSettings:
    """The settings of a package: `settings.get("a.b.c")`."""

    def __init__(self, content: dict):
        self.content = content

    def get(self, path: str, default=None):
        """A value by its path, references followed; `default` where there is none, or null."""
        for _ in range(10):                              # a reference may lead to another; a circle ends
            value = self.content
            for key in path.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
            if reference is None:
                break
            path = reference[1]
        return default if value is None else value


def read_package(path: Path) -> tuple[PackageSettings, TensorFiles | None]:
    """(settings, tensors) of one file of a package.

    tensors is None where the file only points to a published codec: the setting "pretrained".
    Errors: ValueError naming the file and what was expected."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, a package of audiocraft was expected")
    content = common.read_torch(path, "a file of plain tensors", mapped=True)
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("pretrained"), str):
        return PackageSettings({"pretrained": content["pretrained"]}), None
    if not isinstance(content.get("best_state"), dict) or not isinstance(content.get("xp.cfg"), str):
        raise ValueError(f"{path}: not a package of audiocraft: best_state and xp.cfg as text were expected")
    return PackageSettings(_read_settings(content["xp.cfg"], path)), TensorFiles([path])


def _read_settings(text: str, path: Path) -> dict:
    """xp.cfg as a nested dict; empty where it is none."""
    if text.lstrip().startswith("{"):          # as we write it: JSON is YAML too, and needs no package
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its xp.cfg is not JSON ({common.describe_error(error)})") from None
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path}: its settings are YAML, reading them needs the pyyaml package: "
                         "pip install pyyaml") from None

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number, as OmegaConf does: YAML 1.1 asks for 1.0e-5."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                                 list("-+0123456789"))
    try:
        content = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: its xp.cfg is not YAML ({common.describe_error(error)})") from None
    return content if isinstance(content, dict) else {}
