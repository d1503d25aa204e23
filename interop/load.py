"""Any model by its name: a run folder, its best.pt, or a folder of Hugging Face's or audiocraft's tools.

    runs/NAME, runs/NAME/best.pt         of this project
    musicgen-small                       config.json + model.safetensors, as published
    facebook/musicgen-small              the same from the hub's cache, downloaded if need be (hub.py)
    lora                                 adapter_config.json + adapter_model.safetensors, to one of the others
    package                              state_dict.bin + compression_state_dict.bin, as audiocraft keeps it

Whatever it is, `read_model` gives what best.pt holds, and train, generate and evaluate see no difference:

    format, model {name: tensor}, model_config, conditioner_config, assets {name: uint8 tensor}, codec,
    sampling, segment_frames, metrics, step, args
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import tokenizer
from conditioning import Conditioner, ConditionerConfig, vocabulary_size
from interop import t5
from interop.adapter import adapter_base, is_adapter, merge_adapter
from interop.audiocraft import read_package_config, read_package_weights
from interop.huggingface import PublishedModel, read_hf_config, read_hf_weights
from interop.hub import how_to_get, locate
from interop.tensors import check_shapes, folder_kind
from model import ModelConfig, MusicGen
from support import chroma, common
from support.bounds import check_fields, check_finite, shown

SAMPLING = dict(cfg=3.0, temperature=1.0, top_k=250, top_p=0.0)      # as published


def read_model(name: str | Path, t5_folder: str | Path | None = None, codec: str | None = None,
               base: str | Path | None = None) -> dict:
    """The content of a run's best.pt, or the same of a folder that others have written.

    t5_folder: with a package's T5; codec: where the codec lies, if not where it was; base: the model that an
    adapter adds to. Errors: ValueError says what is missing or wrong."""
    path = locate(name)
    if is_adapter(path):
        return merge_adapter(read_model(adapter_base(path, base), t5_folder, codec), path)
    if folder_kind(path):
        return read_published(path, t5_folder, codec)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        there = "no best.pt there" if Path(name).exists() else "no such path, so no best.pt there"
        raise ValueError(f"{name}: {there}; give the folder of a run that has finished an epoch, "
                         f"or one with published weights. {how_to_get(name)}".strip())
    data = common.read_torch_dict(path, common.MODEL_FILE)
    if data.get("format") != common.FORMAT:
        raise ValueError(f"{path}: not {common.MODEL_FILE}: "
                         f"its format is {shown(data.get('format'))}, not {common.FORMAT}")
    if codec and isinstance(data.get("codec"), dict):
        data["codec"] = {**data["codec"], "name": codec}
    check_model(path, data)
    return data


def check_model(where, data: dict, problem: str = f"not {common.MODEL_FILE}, or damaged") -> None:
    """Compares what best.pt says with the limits of bounds.py, then its weights with the shapes of the model
    that it describes, which has no storage, then their numbers.

    Errors: ValueError naming the first that is damaged. problem: what its line says before that."""
    damaged = f"{where}: {problem}"
    kinds = dict(model=dict, model_config=dict, conditioner_config=(dict, type(None)), assets=dict,
                 codec=dict, sampling=dict, segment_frames=int)
    for name, kind in kinds.items():
        if not isinstance(data.get(name, ...), kind):
            raise ValueError(f"{damaged}: its {name} is {shown(data[name]) if name in data else 'missing'}")
    codec = dict(K=None, name=None, fingerprint=None) | data["codec"]
    for fields in (data["model_config"], data["conditioner_config"] or {}, data["sampling"], codec,
                   dict(segment_frames=data["segment_frames"])):
        check_fields(damaged, fields)
    for name in ("name", "fingerprint"):
        if not isinstance(codec[name], str) or max(map(len, codec[name].split("/"))) > 255:
            raise ValueError(f"{damaged}: the {name} of its codec is {shown(codec[name])}")
    try:
        config = ModelConfig(**data["model_config"])
        config.layout(1)                                 # its pattern can be made
        assets = {name: common.tensor_to_bytes(tensor) for name, tensor in data["assets"].items()}
        model = skeleton(config, read_conditioner_config(data["conditioner_config"]), assets)
    except Exception as error:                           # a foreign file can fail in any way
        raise ValueError(f"{damaged} ({common.describe_error(error)})") from None
    check_finite(where, data["model"])
    check_shapes(damaged, {k: x.shape for k, x in data["model"].items()},
                 {k: x.shape for k, x in model.state_dict().items()})


def read_conditioner_config(flat: dict | None) -> ConditionerConfig | None:
    """A conditioner's config from the flat dict that files hold; None of a model without conditions."""
    return None if flat is None else ConditionerConfig(**flat)


def skeleton(config: ModelConfig, conditioner: ConditionerConfig | None, assets: dict) -> MusicGen:
    """A model without storage (on the meta device): names and shapes, to compare or to give tensors to."""
    with torch.device("meta"):
        return MusicGen(config, None if conditioner is None else Conditioner(conditioner, config.dim, assets))


def build_model(data: dict) -> MusicGen:
    """The model of what `read_model` gives, in eval mode on the CPU.

    It takes the tensors themselves, so that nothing is there twice. Errors: any, for a damaged file."""
    assets = {name: common.tensor_to_bytes(tensor) for name, tensor in data["assets"].items()}
    conditioner = read_conditioner_config(data["conditioner_config"])
    model = skeleton(ModelConfig(**data["model_config"]), conditioner, assets)
    model.load_state_dict(data["model"], assign=True)
    return model.float().eval()


class ModelShapes(NamedTuple):
    """What `peek` sees of a model."""
    model: ModelConfig
    conditioner: ConditionerConfig | None
    published: PublishedModel | None           # what else is known of a published model; None of ours
    path: Path                                 # where it lies; of an adapter, where the model that it adds to


def peek(name: str | Path) -> ModelShapes | None:
    """The shapes of a model without its weights. None where there is none to read: `read_model` says why.

    Errors: ValueError for a published one whose configuration is not that of a MusicGen."""
    path = locate(name)
    if is_adapter(path):
        path = locate(adapter_base(path))
    if folder_kind(path):
        found = read_published_config(path)
        conditioner = read_conditioner_config(found.conditioner)
        return ModelShapes(ModelConfig(**found.model), conditioner, found, path)
    path = path / "best.pt" if path.is_dir() else path
    try:
        data = common.read_torch_dict(path, common.MODEL_FILE, mapped=True)      # its weights are not read
        conditioner = read_conditioner_config(data["conditioner_config"] or None)
        check_fields(path, data["model_config"])
        return ModelShapes(ModelConfig(**data["model_config"]), conditioner, None, path)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


# ----------------------------------------------------------------------------------------------------------
# published models


def read_published_config(path: Path, t5_folder: str | Path | None = None) -> PublishedModel:
    """What the configuration of a published model says. t5_folder: a package's T5. Errors: ValueError."""
    return read_hf_config(path) if folder_kind(path) == "hf" else read_package_config(path, t5_folder)


def read_published(path: str | Path, t5_folder: str | Path | None = None, codec: str | None = None) -> dict:
    """A published model as what best.pt holds, from a Hugging Face folder or an audiocraft package.

    t5_folder: with the latter's T5; codec: where its codec lies, if it does not lie there.
    Errors: ValueError, one line with what was expected and what was found."""
    folder, is_package = Path(path), folder_kind(path) == "audiocraft"
    found = read_published_config(folder, t5_folder)
    pieces = t5.read_vocabulary(Path(t5_folder) if is_package else folder)
    if vocabulary_size(pieces) > found.conditioner["text_vocab"]:
        raise ValueError(f"{path}: its vocabulary has {vocabulary_size(pieces)} pieces, its text encoder "
                         f"{found.conditioner['text_vocab']}")

    # the language model and its conditioners, by our names
    try:
        config = ModelConfig(**found.model)
        model = skeleton(config, read_conditioner_config(found.conditioner), {"text": pieces})
        shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    except Exception as error:                 # a foreign config can fail in any way
        problem = common.describe_error(error)
        raise ValueError(f"{path}: its configuration makes no model ({problem})") from None
    if is_package:
        state = read_package_weights(folder, Path(t5_folder), shapes)
    else:
        state = read_hf_weights(folder, shapes, projected=found.conditioner["text_dim"] != config.dim)

    # its codec stays where it is and is named by its folder; it says how long a frame is
    codec = tokenizer.load_codec(str(codec or path), config.K // found.channels, "cpu", found.channels)
    if (codec.K, codec.card) != (config.K, config.card):
        raise ValueError(f"{path}: its model makes {config.K} x {config.card} codes, "
                         f"its codec has {codec.K} x {codec.card}")
    melody_rate = codec.hop / chroma.hop_length(codec.sample_rate)   # chroma frames a code frame
    conditioner = read_conditioner_config({**found.conditioner, "melody_rate": melody_rate})
    data = dict(
        format=common.FORMAT, model=state, model_config=asdict(config),
        conditioner_config=conditioner.to_dict(), assets={"text": common.bytes_to_tensor(pieces)},
        codec=codec.reference,
        sampling={**SAMPLING, **found.sampling},
        segment_frames=math.ceil(round(found.segment_seconds * codec.sample_rate) / codec.hop),
        metrics={}, step=0, args={})
    check_model(path, data, "it makes no model")
    return data
