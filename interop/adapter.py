"""Adapters of PEFT (LoRA, Hu et al. 2021), in and out: small additions to the matrices of a model beside it.

    folder/adapter_config.json         the rank r, alpha, and the model that it was trained on
    folder/adapter_model.safetensors   two small matrices for each large one (adapter_model.bin: older)

        base_model.model.decoder.model.decoder.layers.0.fc1.lora_A.weight       [r, in]
        base_model.model.decoder.model.decoder.layers.0.fc1.lora_B.weight       [out, r]
        base_model.model.decoder.model.decoder.embed_tokens.0.lora_embedding_A  [r, rows], .._B [columns, r]
        base_model.model.enc_to_dec_proj.bias                                   whole: takes the place of ours

W becomes W + alpha / r * B A; with use_rslora alpha / sqrt(r). The names between are those of transformers'
model, whose q, k and v are three matrices. Ours are one, [q; k; v], and so are their additions: an A that the
three share, and the rows of B.
"""

import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

import torch

from interop.huggingface import hf_names
from interop.hub import locate
from interop.tensors import TensorFiles, write_safetensors
from support import common
from support.bounds import check_finite, shown
from support.lora import LowRank, lora_additions

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
SHARED = "text_encoder.shared.weight"
# Settings that say where additions are, how they began and were trained, but not what they compute. Others
# are refused unless they are off.
FREE = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "bias",
        "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
        "lora_dropout", "fan_in_fan_out", "runtime_config", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "peft_version",
        "ensure_weight_tying")
READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
STARTS = ("none", "true", "false", "gaussian", "orthogonal", "eva")  # that leave the matrices as they were


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter, with or without the configuration of its model."""
    return (Path(path) / CONFIG).is_file()


def adapter_base(folder: Path, given: str | Path | None = None) -> str | Path:
    """The model that an adapter adds to: the one given, or the one that it names where that is here.

    Errors: ValueError saying how to give it."""
    name = given or common.read_json(folder / CONFIG).get("base_model_name_or_path")
    try:
        base = locate(name) if isinstance(name, (str, Path)) and str(name) else None
    except ValueError:                         # no download
        base = None
    if base is None or not base.exists():
        raise ValueError(f"{folder}: an adapter to {shown(name)}, which is not here: python -m "
                         f"interop.convert {folder} --base FOLDER_OF_THE_MODEL --to nano --out NEW, "
                         "then give NEW")
    if is_adapter(base):
        raise ValueError(f"{folder}: an adapter to {base}, which is an adapter itself: python -m "
                         f"interop.convert {base} --to nano --out NEW, then the same of {folder} --base NEW")
    return name


def merge_adapter(data: dict, folder: Path) -> dict:
    """A model, as `load.read_model` gives it, with an adapter in its weights, which change in place.

    Errors: ValueError naming the setting that is not read, or the tensors that do not fit."""
    scale = _read_scales(folder)
    tensors = _open_weights(folder)

    # where their tensors lie in ours: views
    places = {}
    for ours, x in data["model"].items():
        if names := hf_names(ours):            # not of a condition that transformers' model does not have
            places |= dict(zip(names, x.chunk(len(names))))
    if SHARED in places:                       # transformers' T5 computes with a copy of it
        places[SHARED.replace("shared", "encoder.embed_tokens")] = places.pop(SHARED)

    # what the adapter has: pairs of matrices for a module, and tensors as they are
    pairs, whole, problems = {}, {}, []
    for key in tensors.shapes:
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if match:
            pairs.setdefault((match[1], bool(match[2])), {})[match[3]] = key
        else:
            whole[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = key
    additions = {}
    for (module, embedding), keys in pairs.items():
        name = f"{module}.weight"
        shapes = [tensors.shapes[keys[part]] if part in keys else None for part in "BA"]
        if name not in places:
            problems.append(f"{name} is not of the model")
        elif not all(shape and len(shape) == 2 for shape in shapes) or shapes[0][1] != shapes[1][0]:
            problems.append(f"{module} has lora_B {shapes[0]}, lora_A {shapes[1]}")
        else:
            wanted, found = list(places[name].shape), [shapes[0][0], shapes[1][1]]
            if wanted != (found[::-1] if embedding else found):
                problems.append(f"{name} is {wanted}, its addition {found}")
            additions[name] = keys["B"], keys["A"], embedding, scale(module, shapes[1][0])
    for name, key in whole.items():
        if name not in places or list(places[name].shape) != tensors.shapes[key]:
            problems.append(f"{name} {tensors.shapes[key]} is not of the model")
    if not tensors.shapes:
        problems.append("there are none")
    if problems:
        more = f" ({len(problems)} such)" if len(problems) > 1 else ""
        raise ValueError(f"{folder}: its tensors do not fit the model that it adds to: {problems[0]}"
                         f"{more}")

    for name, key in whole.items():
        places[name].copy_(tensors[key])
    for name, (B, A, embedding, factor) in additions.items():
        addition = factor * tensors[B] @ tensors[A]
        places[name] += addition.T if embedding else addition
    check_finite(folder, {name: places[name] for name in [*whole, *additions]})
    data.pop("lora", None)                     # of the base: not all that was added now
    if any(name.startswith("text_encoder.") for name in [*additions, *whole]):
        data["conditioner_config"]["text_frozen"] = False            # no longer the published one
    return data


def _open_weights(folder: Path) -> TensorFiles:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return TensorFiles([folder / name])
    raise ValueError(f"{folder}: {CONFIG} is there, but no weights: {' or '.join(WEIGHTS)} was expected")


def _read_scales(folder: Path):
    """A function (module, rank of its tensors) -> what B A is multiplied by.

    Errors: ValueError naming a setting that changes what an adapter computes, and is not read."""
    path = folder / CONFIG
    config = common.read_json(path)
    if config.get("peft_type") != "LORA":
        kind = reprlib.repr(config.get("peft_type"))
        raise ValueError(f"{path}: its peft_type is {kind}, 'LORA' was expected")
    if shown(start := config.get("init_lora_weights")).lower() not in STARTS:
        start = reprlib.repr(start)
        raise ValueError(f"{path}: its init_lora_weights is {start}, which changes the model's own weights "
                         "too; save it as a plain LoRA (path_initial_model_for_weight_conversion)")
    if others := [name for name, value in config.items() if value and name not in FREE + READ]:
        raise ValueError(f"{path}: it has {shown(others[0])} {shown(config[others[0]])}, which is not read")

    def setting(patterns: dict | None, module: str, usual):
        """The value of the first pattern that the module's name ends in."""
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return usual

    def scale(module: str, rank: int) -> float:
        try:
            r = setting(config.get("rank_pattern"), module, config.get("r", 8))
            alpha = setting(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            assert r == rank, f"its rank is {r}, that of its tensors {rank}"
            return alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        except Exception as error:             # a foreign file can hold anything
            raise ValueError(f"{path}: {module}: {common.describe_error(error)}") from None

    return scale


# ----------------------------------------------------------------------------------------------------------
# out


def write_adapter(data: dict, base: str, read_model: Callable, folder: Path) -> None:
    """Writes the additions of a --lora run for peft. base: the model that it began from.

    Errors: ValueError where the run has no additions, or they are to another model."""
    additions = lora_additions(data.get("lora") or {})
    if not additions:
        raise ValueError("it holds no additions by themselves: give a run of --lora. In those of older "
                         "versions best.pt has only the sum, which --to hf writes")
    there, here = read_model(base)["model"], data["model"]
    differ = sorted(name for name in (there.keys() | here.keys()) - additions.keys() if not (
        name in there and name in here and torch.equal(there[name], here[name])))
    if differ:
        raise ValueError(f"{base} is not what it was trained from: {differ[0]} is another there. Give "
                         "that model by --base")
    tensors = {}
    for matrix, (A, B) in additions.items():
        names = hf_names(matrix)
        for name, rows in zip(names, B.float().chunk(len(names))):
            stem = PREFIX + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = A.float().clone()     # a file of its own memory for each
            tensors[f"{stem}.lora_B.weight"] = rows.contiguous()
    rank, targets = len(A), {name.split(".")[-2] for m in additions for name in hf_names(m)}
    config = dict(peft_type="LORA", task_type=None, base_model_name_or_path=str(base), inference_mode=True,
                  r=rank, lora_alpha=LowRank.SCALE * rank, lora_dropout=0.0, bias="none",
                  target_modules=sorted(targets))
    write_safetensors(folder / WEIGHTS[0], tensors)
    common.write_json(folder / CONFIG, config, indent=2)
