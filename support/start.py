"""A start from other weights (--init_from): a run or a published model; mono also starts stereo.

Everything that would make the numbers mean something else is compared first, and named: shape, conditions,
codec. Conditions that the other model does not have begin anew.

Legend: K codebooks.
"""

import argparse
from dataclasses import asdict, dataclass

from conditioning import CONDITIONS
from interop import load
from model import ModelConfig, MusicGen
from support import common
from support.flags import fuse_methods


@dataclass
class Start:
    """What --init_from brings to a new run."""
    weights: dict                     # {name: tensor}
    assets: dict                      # {name of a condition: uint8 tensor}
    conditioner_config: dict | None   # flat, as files hold it
    added: list                       # names of conditions that begin anew
    copies: int                       # 2: a mono model starts a stereo one


def read_start(args: argparse.Namespace, config: ModelConfig, codec) -> Start:
    """The weights and the vocabulary of --init_from, for a model of `config` over `codec`.

    Errors: ValueError naming what differs, there and here."""
    content = load.read_model(args.init_from)
    try:
        fuse = (content["conditioner_config"] or {}).get("fuse")
        theirs = ModelConfig(**content["model_config"])
        there, assets = model_traits(theirs, fuse), content["assets"]
        stored = dict(channels=1) | content["codec"]                 # older files: mono
        their_codes = "codes {K} of {name} (channels {channels}, {fingerprint:.12})".format(**stored)
        weights = content["model"]
    except Exception as error:                                       # a foreign file can fail in any way
        problem = common.describe_error(error)
        raise ValueError(f"{args.init_from}: not {common.MODEL_FILE}, or damaged ({problem})") from None
    methods = fuse_methods(args)
    here, given = model_traits(config, methods or None), there["conditions"] or {}

    # conditions that it does not have; --lora trains nothing but its additions, so it cannot learn them
    added = [name for name in methods if name not in given]
    if added and not args.lora:
        there["conditions"] = {**given, **{name: methods[name] for name in added}}
    differ = [f"{k} {there[k]} there, {v} here" for k, v in here.items() if there[k] != v]

    # the codec: the same, or the same over one of two channels that it encodes one by one
    single = codec.with_channels(codec.channels // codec.streams)
    copies = {single.fingerprint: codec.streams, codec.fingerprint: 1}.get(stored["fingerprint"])
    if copies is None:
        differ.append(f"{their_codes} there, codes {codec.K} of {codec.name} (channels {codec.channels}, "
                      f"{codec.fingerprint:.12}) here")
    elif copies > 1:
        differ += [f"a {name} read from one channel there, from two here" for name in methods
                   if CONDITIONS[name].reads_codes]
    if differ:
        raise ValueError(f"--init_from {args.init_from} does not fit: {'; '.join(differ)}. Give the flags it "
                         "was trained with")

    # a model can be made of it; its vocabulary must be one, for instance
    try:
        load.skeleton(theirs, load.read_conditioner_config(content["conditioner_config"]),
                      {name: common.tensor_to_bytes(x) for name, x in assets.items()})
    except Exception as error:                                       # a foreign file can fail in any way
        problem = common.describe_error(error)
        raise ValueError(f"{args.init_from}: not {common.MODEL_FILE}, or damaged ({problem})") from None
    return Start(weights, assets, content["conditioner_config"], added, copies)


def load_start(model: MusicGen, start: Start, where: str) -> None:
    """Fills a new model with the weights of `read_start`. Errors: ValueError if names or shapes differ."""
    try:
        weights = copy_channels(start.weights, start.copies)
        found = {name: list(x.shape) for name, x in weights.items()}
    except Exception as error:                                       # a foreign file can fail in any way
        problem = common.describe_error(error)
        raise ValueError(f"--init_from {where}: its weights are damaged ({problem})") from None
    new = tuple(f"conditioner.parts.{name}." for name in start.added)
    wanted = {name: list(x.shape) for name, x in model.state_dict().items() if not name.startswith(new)}
    wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"--init_from {where}: weights are not what this model has: {wrong[0]} is "
                         f"{found.get(wrong[0])} there, {wanted.get(wrong[0])} here ({len(wrong)} differ)")
    model.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False, assign=True)


def model_traits(config: ModelConfig, fuse: dict | None) -> dict:
    """What must be equal to start from a model. Codebooks and delays are compared by the codec."""
    free = ("K", "delays", "flattening", "dropout", "emb_std")
    return {k: v for k, v in asdict(config).items() if k not in free} | dict(conditions=fuse)


def copy_channels(weights: dict, copies: int) -> dict:
    """Weights of a mono model for a stereo one: each embedding and head `copies` times, the rest as it is.

    audiocraft (docs/MUSICGEN.md) copies the embeddings as they are. But those of a step are summed. Halved,
    the model reads two equal channels exactly as it read one (toy: ce 0.325 as before, 0.598 where they are
    not halved)."""
    copied = {}
    for name, x in weights.items():
        part, _, rest = name.partition(".")
        if part not in ("emb", "linears"):
            copied[name] = x
            continue
        k, _, leaf = rest.partition(".")
        for c in range(copies):
            copied[f"{part}.{int(k) * copies + c}.{leaf}"] = x / copies if part == "emb" else x.clone()
    return copied
