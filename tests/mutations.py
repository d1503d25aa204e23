"""A campaign of absurd fields: every field of every file that holds a model or a codec, by every value of
ABSURD. What reads it must say in one line what is wrong, or work; within 60 s and 2 GB more than before.

    python tests/mutations.py [WORD]      all of them: case | what it said; those whose name holds WORD

test_bounds.py runs a sample. The folders are made by our own exporter, so nothing need be installed.
"""

import copy
import functools
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import tokenizer
from conditioning import ConditionerConfig, fit_sentencepiece, vocabulary_size
from generate import MusicGenerator
from interop import convert, load
from interop.tensors import PACKAGE_FILES
from model import ModelConfig
from support import common

HERE = Path(__file__).parent
DEEP = "[" * 900 + "]" * 900                   # as JSON: Python reads it, and stumbles over showing it
ABSURD = [0, -1, 1, 3, 10 ** 9, 10 ** 12, 10 ** 400, 1.5, 1e300, float("nan"), float("inf"), "x", "",
          "9" * 400, True, False, None, [], {}, [None], ["x"], [10 ** 9], {"a": 1}]
SECONDS, GIB = 60, 2


class Case(NamedTuple):
    """A mutation: its name, what makes the broken file of a copy of `good`, and what reads it."""
    name: str
    good: str                                  # of `make_good`
    damage: Callable                           # of a path
    read: Callable                             # of a path


# ------------------------------------------------------------------------------------------------------------
# good folders


def random_model(fuse: dict, pieces: bytes) -> dict:
    """What best.pt holds of a small model with random weights over a codec of 2 x 16 codes."""
    codec = tokenizer.load_codec(str(HERE / "old_codec.pt"))
    melody = "melody" in fuse
    conditions = ConditionerConfig(
        fuse, text_vocab=vocabulary_size(pieces), text_dim=24, text_layers=1, text_heads=2, text_head_dim=8,
        text_hidden=32, text_max_tokens=512, melody_frames=20, melody_null_bin0=True)
    config = ModelConfig(K=codec.K, card=codec.card, dim=32, num_layers=2, num_heads=2,
                         cross_attention=not melody, mask_padding=not melody)
    torch.manual_seed(0)
    shapes = load.skeleton(config, conditions, {"text": pieces}).state_dict()
    sampling = dict(cfg=3.0, temperature=1.0, top_k=50, top_p=0.0, cfg_style=1.0)
    return dict(
        format=common.FORMAT, model={name: torch.randn(x.shape) * 0.1 for name, x in shapes.items()},
        model_config=asdict(config), conditioner_config=conditions.to_dict(),
        assets={"text": common.bytes_to_tensor(pieces)}, codec=codec.reference, segment_frames=80,
        sampling=sampling, metrics={}, step=1, args={})


def make_good(folder: Path) -> Path:
    """Good files of every kind, small."""
    pieces = fit_sentencepiece(["slow organ", "fast bells", "a calm harp with drums"] * 9, 60)
    for name, fuse in (("text", {"text": "cross"}), ("melody", {"melody": "prepend", "text": "prepend"})):
        content = random_model(fuse, pieces)
        common.write_torch(folder / f"{name}.pt", content)
        convert.write_model(content, "hf", folder / f"hf_{name}")
    shutil.copy(HERE / "old_tune" / "best.pt", folder / "style.pt")
    shutil.copy(HERE / "old_codec.pt", folder / "codec.pt")
    shutil.copytree(HERE / "old_package", folder / "package")
    (folder / "adapter").mkdir()
    config = dict(peft_type="LORA", base_model_name_or_path="x", r=2, lora_alpha=4, target_modules=["fc1"],
                  rank_pattern={"fc2": 2}, alpha_pattern={"fc2": 2}, use_rslora=False, bias="none")
    common.write_json(folder / "adapter" / "adapter_config.json", config)
    stem = "base_model.model.decoder.model.decoder.layers.0.fc1.lora_"
    save_file({f"{stem}A.weight": torch.randn(2, 32), f"{stem}B.weight": torch.randn(128, 2)},
              str(folder / "adapter" / "adapter_model.safetensors"))
    return folder


# ------------------------------------------------------------------------------------------------------------
# damage


def places(content, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field of plain data; of a list only its first item."""
    if isinstance(content, (dict, list)) and path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list) and content:
        yield from places(content[0], (*path, 0))
    elif path:
        yield path


def replaced(content, path: tuple, value):
    """Plain data with another value at a path."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def in_json_file(name: str, path: tuple, value):
    """Damage of a field of a folder's JSON file; DEEP is written as it is."""
    def damage(folder: Path) -> None:
        text = json.dumps(replaced(json.loads((folder / name).read_text()), path, value))
        (folder / name).write_text(text.replace(json.dumps(DEEP), DEEP))
    return damage


def in_settings(name: str, path: tuple, value):
    """Damage of a field of a package's settings, which are JSON in a string."""
    def damage(folder: Path) -> None:
        content = torch.load(folder / name)
        text = json.dumps(replaced(json.loads(content["xp.cfg"]), path, value))
        torch.save(content | {"xp.cfg": text.replace(json.dumps(DEEP), DEEP)}, folder / name)
    return damage


def in_torch_file(path: tuple, value):
    """Damage of a field of a torch file."""
    return lambda file: torch.save(replaced(torch.load(file), path, value), file)


def in_weights(part: str, change: Callable, inner: str = ""):
    """Damage of the first matrix in a torch file's `part`. inner: the file's name in a folder."""
    def damage(file: Path) -> None:
        file = file / inner if inner else file
        content = torch.load(file)
        weights = content[part]
        name = next(name for name, x in weights.items() if x.dim() > 1)
        weights[name] = change(weights[name].clone())
        torch.save(content, file)
    return damage


def in_safetensors(inner: str, prefix: str, change: Callable):
    """Damage of the first matrix of a folder's file whose name begins so."""
    def damage(folder: Path) -> None:
        weights = load_file(folder / inner)
        name = next(name for name, x in weights.items() if name.startswith(prefix) and x.dim() > 1)
        weights[name] = change(weights[name])
        save_file(weights, str(folder / inner))
    return damage


def with_number(value: float) -> Callable:
    """A tensor with one other number."""
    def change(x):
        x.view(-1)[0] = value
        return x
    return change


WEIGHTS = {
    "nan": with_number(float("nan")), "inf": with_number(float("inf")), "-inf": with_number(-float("inf")),
    "whole numbers": lambda x: x.long(), "transposed": lambda x: x.transpose(0, 1).contiguous()[:1],
    "empty": lambda x: x[:0].clone(), "a scalar": lambda x: x.sum(), "half": lambda x: x.half()}


# ------------------------------------------------------------------------------------------------------------
# reading


def read_whole(path: Path, t5: Path | None = None) -> str:
    """A model by its name, as every command does, and a tenth of a second of its music."""
    if t5 is None:
        load.peek(path)
        music = MusicGenerator.load(path)
        music.generate([None], 0.1)
        return f"{music.window} frames"
    content = load.read_model(path, t5)
    load.build_model(content)
    return "; ".join(convert.describe_model(content))


def read_package(folder: Path) -> str:
    """A package with the T5 inside it."""
    return read_whole(folder, folder / "t5")


def read_adapter(folder: Path) -> str:
    """An adapter to the model inside it."""
    load.build_model(load.read_model(folder, base=folder / "base"))
    return "merged"


def read_codec(path: Path) -> str:
    """A codec, and a tenth of a second through it."""
    codec = tokenizer.load_codec(str(path))
    codec.decode(codec.encode(torch.zeros(1, codec.channels, codec.sample_rate // 10)))
    return f"{codec.K} x {codec.card}"


def all_cases(good: Path) -> list:
    """Every mutation, in a random order that is always the same."""
    cases = []

    def add(file: str, damage: Callable, read: Callable, content, inner: str = "", deep: bool = True):
        for path in places(content):
            for value in ABSURD + [DEEP] * deep:
                shown = "deep" if value == DEEP else f"{value!r:.20}"
                where = ".".join(map(str, path))
                cases.append(Case(f"{file}{inner}: {where} = {shown}", file, damage(path, value), read))

    for file in ("hf_text", "hf_melody"):
        for name in ("config.json", "generation_config.json"):
            content = json.loads((good / file / name).read_text())
            add(file, functools.partial(in_json_file, name), read_whole, content, f"/{name}")
    content = json.loads((good / "hf_text" / "config.json").read_text())["audio_encoder"]
    add("hf_text", lambda path, value: in_json_file("config.json", ("audio_encoder", *path), value),
        read_codec, content, "/codec")
    content = json.loads((good / "adapter" / "adapter_config.json").read_text())
    add("adapter", functools.partial(in_json_file, "adapter_config.json"), read_adapter, content)
    for name in PACKAGE_FILES:
        content = json.loads(torch.load(good / "package" / name)["xp.cfg"])
        add("package", functools.partial(in_settings, name), read_package, content, f"/{name}")
    content = json.loads((good / "package" / "t5" / "config.json").read_text())
    add("package", functools.partial(in_json_file, "t5/config.json"), read_package, content, "/t5")
    for file in ("text.pt", "melody.pt", "style.pt", "codec.pt"):
        content, read = torch.load(good / file), read_codec if file == "codec.pt" else read_whole
        # of dicts of tensors only the whole; what training says of itself makes no music
        fields = {k: 0 if k in ("state", "model", "assets") else v for k, v in content.items()}
        fields |= dict.fromkeys(("args", "metrics"), 0)
        add(file, in_torch_file, read, fields, deep=False)

    # their weights
    for name, change in WEIGHTS.items():
        for file, part in (("text.pt", "model"), ("style.pt", "model"), ("codec.pt", "state")):
            read = read_codec if file == "codec.pt" else read_whole
            cases.append(Case(f"{file}: weights {name}", file, in_weights(part, change), read))
        for prefix in ("decoder.", "text_encoder.", "audio_encoder."):
            damage = in_safetensors("model.safetensors", prefix, change)
            cases.append(Case(f"hf_text: {prefix} {name}", "hf_text", damage, read_whole))
        damage = in_safetensors("t5/model.safetensors", "", change)
        cases.append(Case(f"package/t5: weights {name}", "package", damage, read_package))
        damage = in_safetensors("adapter_model.safetensors", "", change)
        cases.append(Case(f"adapter: weights {name}", "adapter", damage, read_adapter))
        for file in PACKAGE_FILES:
            damage = in_weights("best_state", change, file)
            cases.append(Case(f"package/{file}: weights {name}", "package", damage, read_package))
    random.Random(0).shuffle(cases)
    return cases


def alarm(number, frame):
    """Of SIGALRM."""
    raise TimeoutError(f"longer than {SECONDS} s")


def run_case(case: Case, good: Path, place: Path) -> str:
    """How a case ends: what it gave, or "refused: ..". Errors: AssertionError for any other ending."""
    path = place / case.good
    copy_of = shutil.copytree if (good / case.good).is_dir() else shutil.copy
    copy_of(good / case.good, path)
    if case.good == "adapter":
        shutil.copytree(good / "hf_text", path / "base")
    case.damage(path)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, before = time.monotonic(), signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    try:
        ending = case.read(path)
    except ValueError as error:
        text = str(error).replace(f"{path}", case.good)
        assert "\n" not in text and len(text) <= 300, f"{len(text)} characters: {text[:400]!r}"
        assert any(word in text for word in (case.good, "codec ", "stride ")), f"does not say where: {text}"
        ending = f"refused: {text}"
    except TimeoutError as error:
        raise AssertionError(str(error)) from None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise AssertionError(f"{type(error).__name__} {str(error)[:150]!r} at {where.name}") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size
    assert grown < GIB << 20, f"{grown >> 10} MiB"
    assert time.monotonic() - began < SECONDS
    return ending


def main(word: str = "") -> int:
    """The campaign -> exit code, 1 if one ended otherwise than it may."""
    torch.set_num_threads(1)
    wrong = count = 0
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder, "good")
        good.mkdir()
        make_good(good)
        for i, case in enumerate(all_cases(good)):
            if word in case.name:
                place, count = Path(folder, str(i)), count + 1
                place.mkdir()
                try:
                    ending = run_case(case, good, place)
                except AssertionError as error:
                    ending, wrong = f"WRONG  {error}", wrong + 1
                shutil.rmtree(place)
                print(f"{case.name} | {ending}", flush=True)
    print(f"{count} cases, {wrong} of them end otherwise than they may")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
