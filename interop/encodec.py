"""EnCodec in the formats of Hugging Face and audiocraft, in and out: its plain config and its tensors.

A folder may hold a codec alone or a whole MusicGen. Our names of the tensors are those of the `encodec`
package and of audiocraft:

    ours                                          transformers'
    encoder.model.3.conv.conv.weight              encoder.layers.3.conv.weight
    decoder.model.3.convtr.convtr.weight          decoder.layers.3.conv.weight
    quantizer.vq.layers.0._codebook.embed         quantizer.layers.0.codebook.embed

Convolutions have a weight norm there (Salimans & Kingma 2016): a weight is kept as its direction and its
length, under one of two pairs of names. It is folded on the way in, which computes the same, and made anew on
the way out.
"""

import math
import re
import reprlib
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from interop.hub import find_folder
from interop.package import read_package
from interop.tensors import HF_FILES, PACKAGE_FILES, TensorFiles, folder_kind, open_hf_folder
from support import common
from support.bounds import check_fields, fits, shown

# Buffers of a codebook that serve its training: not part of what a codec computes.
TRAINING_BUFFERS = ("inited", "cluster_size", "embed_avg")
# Ends of names, (length, direction): torch's old way to write a weight norm, and its new one.
WEIGHT_NORMS = ((".weight_g", ".weight_v"),
                (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
ENCODEC_24KHZ_URL = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
CONVOLUTIONS = (".conv.conv.weight", ".convtr.convtr.weight")
SEANET_DEFAULTS = dict(                        # of the encodec package: a config may leave them out
    channels=1, dimension=128, n_filters=32, n_residual_layers=1, ratios=[8, 5, 4, 2], activation="ELU",
    activation_params={"alpha": 1.0}, kernel_size=7, last_kernel_size=7, residual_kernel_size=3,
    dilation_base=2, causal=False, pad_mode="reflect", true_skip=False, compress=2, lstm=2)
ACTIVATIONS = ("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh")
PADDINGS = ("reflect", "constant", "replicate", "circular")
HF_FIELDS = dict(                              # ours: transformers' name
    channels="audio_channels", dimension="hidden_size", n_filters="num_filters",
    ratios="upsampling_ratios", n_residual_layers="num_residual_layers", kernel_size="kernel_size",
    last_kernel_size="last_kernel_size", residual_kernel_size="residual_kernel_size",
    dilation_base="dilation_growth_rate", causal="use_causal_conv", pad_mode="pad_mode", compress="compress",
    lstm="num_lstm_layers")
HF_DEFAULTS = dict(                            # of transformers' EncodecConfig: the same of config.json
    target_bandwidths=[1.5, 3.0, 6.0, 12.0, 24.0], sampling_rate=24_000, audio_channels=1, normalize=False,
    chunk_length_s=None, hidden_size=128, num_filters=32, num_residual_layers=1,
    upsampling_ratios=[8, 5, 4, 2], norm_type="weight_norm", kernel_size=7, last_kernel_size=7,
    residual_kernel_size=3, dilation_growth_rate=2, use_causal_conv=True, pad_mode="reflect", compress=2,
    num_lstm_layers=2, trim_right_ratio=1.0, codebook_size=1024, use_conv_shortcut=True)


# ----------------------------------------------------------------------------------------------------------
# in


class CodecFolder(NamedTuple):
    """A codec that lies in a folder of others."""
    config: dict                               # plain, of tokenizer.build_networks
    tensors: TensorFiles                       # by their names
    prefix: str                                # of the codec's names among them


def is_codec_folder(path: str | Path) -> bool:
    """Whether a folder is one that Hugging Face's or audiocraft's tools have written."""
    return folder_kind(find_folder(path)) is not None


def read_codec_folder(path: str | Path) -> tuple[dict, dict]:
    """(plain config of tokenizer.build_networks, {our name: tensor}) of the codec in a folder.

    The tensors are those of the networks without TRAINING_BUFFERS, weight norms folded. The caller checks
    that they are all there and of the right shapes. Errors: ValueError with what was expected."""
    config, tensors, prefix = open_codec_folder(path)
    return config, _read_state(tensors, prefix, path)


def read_encodec_24khz() -> tuple[dict, dict]:
    """(plain config, {our name: tensor}) of the public 24 kHz EnCodec, which is downloaded once.

    It lies where torch.hub keeps its files. Errors: ValueError saying how to get it without a network."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / ENCODEC_24KHZ_URL.rsplit("/", 1)[1]
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(20)                 # seconds; without one a dead network hangs
            path.parent.mkdir(parents=True, exist_ok=True)
            progress = sys.stderr.isatty()
            torch.hub.download_url_to_file(ENCODEC_24KHZ_URL, str(path), "d7cc33bc", progress=progress)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"encodec_24khz: no download ({error}): "
                             f"put {ENCODEC_24KHZ_URL} at {path}") from None
        finally:
            socket.setdefaulttimeout(timeout)
    try:
        state = _read_state(TensorFiles([path]), "", path)
    except ValueError:
        raise ValueError(f"{path}: not the weights of encodec_24khz: put {ENCODEC_24KHZ_URL} there") from None
    rvq = dict(dimension=128, n_q=32, bins=1024)
    return dict(sample_rate=24_000, seanet=dict(causal=True), rvq=rvq), state


def _read_state(tensors: TensorFiles, prefix: str, where) -> dict:
    """{our name: tensor} of those that begin with `prefix`, weight norms folded, without TRAINING_BUFFERS."""
    shapes = {}
    for name, shape in tensors.shapes.items():
        if name.startswith(prefix) and not name.endswith(TRAINING_BUFFERS):
            shapes[name.removeprefix(prefix)] = shape
    layers = [re.match(r"decoder\.(?:layers|model)\.(\d+)\.", name) for name in shapes]
    last = max((int(match[1]) for match in layers if match), default=0)
    state = {}
    for name in shapes:
        length_end, direction_end = next(
            (pair for pair in WEIGHT_NORMS if name.endswith(pair)), (None, None))
        if length_end is None:
            state[our_codec_name(name, last)] = tensors[prefix + name]
        elif name.endswith(direction_end):
            stem = name.removesuffix(direction_end)
            length = stem + length_end
            if shapes.get(length) != [shapes[name][0], 1, 1]:
                raise ValueError(f"{where}: {name} needs its length {length}, which is {shapes.get(length)}")
            weight = torch._weight_norm(tensors[prefix + name], tensors[prefix + length], 0)
            state[our_codec_name(stem + ".weight", last)] = weight
    return state


def open_codec_folder(path: str | Path) -> CodecFolder:
    """The codec in a folder, its tensors not yet read. Errors: ValueError."""
    folder = find_folder(path)
    kind = folder_kind(folder)
    if kind is None:
        expected = f"config.json with {HF_FILES[0]}, or {PACKAGE_FILES[1]}"
        raise ValueError(f"{path}: no codec in this folder: {expected}, was expected")
    if kind == "hf":
        config = common.read_json(folder / "config.json")
        prefix = "audio_encoder." if "audio_encoder" in config else ""
        try:
            plain = _from_hf_config(config.get("audio_encoder", config), folder)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            problem = common.describe_error(error)
            raise ValueError(f"{folder}: config.json is not that of an EnCodec ({problem})") from None
        return CodecFolder(plain, open_hf_folder(folder), prefix)
    where = folder / PACKAGE_FILES[1]
    settings, tensors = read_package(where)
    if tensors is None:
        raise ValueError(f"{where}: only points to {settings.get('pretrained')}: give that folder by --codec")
    return CodecFolder(_from_package_settings(settings, where), tensors, "")


def _from_hf_config(config: dict, where) -> dict:
    """The plain config for a transformers EncodecConfig. Errors: ValueError for what it cannot be."""
    if config.get("model_type") != "encodec":
        kind = reprlib.repr(config.get("model_type"))
        raise ValueError(f"{where}: its codec is {kind}, EnCodec was expected")
    full = {**HF_DEFAULTS, **config}
    fixed = dict(norm_type="weight_norm", normalize=False, chunk_length_s=None, trim_right_ratio=1.0)
    for name, allowed in fixed.items():
        if full[name] != allowed:
            raise ValueError(f"{where}: its codec has {name} {shown(full[name])}, {allowed} was expected")
    seanet = {ours: full[theirs] for ours, theirs in HF_FIELDS.items()}
    check_fields(where, dict(true_skip=full["use_conv_shortcut"]), dict(true_skip="use_conv_shortcut"))
    seanet |= dict(activation="ELU", activation_params={"alpha": 1.0})
    seanet |= dict(true_skip=not full["use_conv_shortcut"])
    dim, card, rate = full["hidden_size"], full["codebook_size"], full["sampling_rate"]
    kbps, inner = full["target_bandwidths"], full.get("codebook_dim")
    if inner not in (None, dim):
        raise ValueError(f"{where}: its codec has codebook_dim {shown(inner)}, {shown(dim)} was expected, "
                         "its hidden_size")
    names = dict(bins="codebook_size", sample_rate="sampling_rate", kbps="target_bandwidths")
    check_fields(where, dict(bins=card, sample_rate=rate, kbps=kbps, ratios=seanet["ratios"]),
                 HF_FIELDS | names)
    levels = _hf_levels(kbps[-1], rate, math.prod(seanet["ratios"]), card)
    config = dict(sample_rate=rate, seanet=seanet, rvq=dict(dimension=dim, n_q=levels, bins=card))
    check_codec_config(where, config, HF_FIELDS | dict(n_q="levels by target_bandwidths"))
    return config


def _hf_levels(kbps: float, sample_rate: int, hop: int, card: int) -> int:
    """Levels of the quantizer: transformers has them by the bandwidth, in kbit/s."""
    frame_rate, bits = -(-sample_rate // hop), (card - 1).bit_length()
    return int(1000 * kbps // (frame_rate * bits))


def _from_package_settings(settings, where) -> dict:
    """The plain config for the settings of an audiocraft codec. Errors: ValueError."""
    if (model := settings.get("compression_model")) != "encodec":
        raise ValueError(f"{where}: its codec is {reprlib.repr(model)}, encodec was expected")
    if settings.get("encodec.renormalize", False):
        raise ValueError(f"{where}: its codec scales every clip by a factor of its own (renormalize), "
                         "which is lost here")
    seanet = {name: settings.get(f"seanet.{name}") for name in SEANET_DEFAULTS}
    if lacking := [name for name, value in seanet.items() if value is None]:
        raise ValueError(f"{where}: its xp.cfg lacks seanet.{lacking[0]}")
    rvq = dict(dimension=seanet["dimension"], n_q=settings.get("rvq.n_q"), bins=settings.get("rvq.bins"))
    config = dict(sample_rate=settings.get("sample_rate"), seanet=seanet, rvq=rvq)
    check_codec_config(where, config)
    return config


def check_codec_config(where, config: dict, names: dict | None = None) -> None:
    """Whether a plain config makes a codec that can be built. names: see `check_fields`.

    Errors: ValueError naming what is out of range."""
    parts = [config.get(name) if isinstance(config, dict) else None for name in ("seanet", "rvq")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{where}: its codec's configuration is damaged: seanet and rvq were expected")
    known = {"norm", "dimension", "n_q", "bins", *SEANET_DEFAULTS}
    if unknown := [name for part in parts for name in part if name not in known]:
        raise ValueError(f"{where}: its codec has {shown(unknown[0])}, which EnCodec has not")
    seanet, rvq = full_seanet(config), {"dimension": None, "n_q": None, "bins": None} | config["rvq"]
    check_fields(where, {**seanet, "sample_rate": config.get("sample_rate")}, names)
    check_fields(where, rvq, names)
    for name, choices in (("activation", ACTIVATIONS), ("pad_mode", PADDINGS)):
        if seanet[name] not in choices:
            raise ValueError(f"{where}: its codec has {name} {shown(seanet[name])}, {', '.join(choices)} was "
                             "expected")
    params = seanet["activation_params"]
    if not isinstance(params, dict) or not all(fits(x, (-1e4, 1e4)) for x in params.values()):
        raise ValueError(f"{where}: its codec has activation_params {shown(params)}, numbers were expected")
    hop, width = math.prod(seanet["ratios"]), seanet["n_filters"] * 2 ** len(seanet["ratios"])
    dilation = seanet["dilation_base"] ** max(0, seanet["n_residual_layers"] - 1)
    for name, value, most in (
            ("samples a frame", hop, config["sample_rate"]),
            ("channels after the last stride", width, 1 << 16),
            ("dilation of the last residual block", dilation, 1 << 12),
            ("compress", seanet["compress"] if seanet["n_residual_layers"] else 1, seanet["n_filters"])):
        if value > most:
            raise ValueError(f"{where}: its codec has {name} {value:,}, at most {most:,} was expected")


def our_codec_name(name: str, last: int) -> str:
    """transformers' name of a codec's tensor -> ours; audiocraft's, which is ours, stays.

    last: the decoder's last layer. Its convolutions between the first and the last are transposed ones."""
    name = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
    name = re.sub(r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", name)
    if re.search(r"\.conv\.(weight|bias)$", name) and not re.search(r"\.(conv\.conv|convtr\.convtr)\.", name):
        layer = re.match(r"decoder\.model\.(\d+)\.conv\.", name)
        transposed = layer is not None and 0 < int(layer[1]) < last
        name = name.replace(".conv.", ".convtr.convtr." if transposed else ".conv.conv.")
    return name


def hf_codec_name(name: str) -> str:
    """Our name of a codec's tensor -> transformers'."""
    for ours, theirs in ((".model.", ".layers."), (".conv.conv.", ".conv."), (".convtr.convtr.", ".conv."),
                         ("quantizer.vq.", "quantizer."), ("._codebook.", ".codebook.")):
        name = name.replace(ours, theirs, 1)
    return name


# ----------------------------------------------------------------------------------------------------------
# out


def full_seanet(config: dict) -> dict:
    """A codec's seanet config with every default of the encodec package filled in."""
    return {**SEANET_DEFAULTS, **config["seanet"]}


def codec_to_hf(config: dict, state: dict, levels: int, source: str | Path) -> tuple[dict, dict]:
    """(transformers' EncodecConfig as a dict, {transformers' name: tensor}) of a codec's first `levels`.

    config, state: as `read_codec_folder` gives them; source: where the codec came from: the tensors of a
    Hugging Face folder go out as they are. Errors: ValueError for what transformers' EnCodec lacks."""
    hf_config = _to_hf_config(config, levels)
    if folder_kind(find_folder(source)) == "hf":
        found = open_codec_folder(source)
        if found.config["rvq"]["n_q"] == levels:
            names = [name for name in found.tensors.shapes if name.startswith(found.prefix)]
            return hf_config, {name.removeprefix(found.prefix): found.tensors[name] for name in names}

    # transformers' EnCodec always has an LSTM beside a skip connection. Where ours has none it gets one of
    # zeros, which adds exactly nothing, and the layers behind it move up by one.
    seanet, tensors = full_seanet(config), {}
    shift = 0 if seanet["lstm"] else 1
    last = max(int(name.split(".")[2]) for name in state if name.startswith("encoder."))
    if shift:                                            # in front of the encoder's last convolution
        width = seanet["n_filters"] * 2 ** len(seanet["ratios"])
        for name, x in torch.nn.LSTM(width, width).state_dict().items():
            tensors[f"encoder.layers.{last - 1}.lstm.{name}"] = torch.zeros_like(x)
            tensors[f"decoder.layers.1.lstm.{name}"] = torch.zeros_like(x)

    for name, x in _first_levels(state, levels).items():
        side, _, rest = name.partition(".model.")
        if rest:
            number, _, leaf = rest.partition(".")
            behind = int(number) == last if side == "encoder" else int(number) > 0
            name = f"{side}.model.{int(number) + shift * behind}.{leaf}"
        theirs = hf_codec_name(name)
        if name.endswith(CONVOLUTIONS):
            length, direction = (theirs.removesuffix(".weight") + end for end in WEIGHT_NORMS[1])
            tensors |= {length: _lengths(x), direction: x.contiguous()}
        else:
            tensors[theirs] = x.contiguous()
        if name.endswith(".embed"):
            tensors |= _training_buffers(theirs, x)
    return hf_config, tensors


def _to_hf_config(config: dict, levels: int) -> dict:
    seanet, rate, card = full_seanet(config), config["sample_rate"], config["rvq"]["bins"]
    if (seanet["activation"], seanet["activation_params"]) != ("ELU", {"alpha": 1.0}):
        raise ValueError("transformers' EnCodec has ELU alone, this codec "
                         f"{seanet['activation']} {seanet['activation_params']}")
    if card & (card - 1):
        raise ValueError(f"transformers' EnCodec takes powers of two as cardinality, this codec has {card}")
    hop = math.prod(seanet["ratios"])
    kbps = levels * -(-rate // hop) * (card - 1).bit_length() / 1000
    while _hf_levels(kbps, rate, hop, card) < levels:    # it divides and rounds down
        kbps = math.nextafter(kbps, math.inf)
    return dict(
        model_type="encodec", target_bandwidths=[kbps], sampling_rate=rate, audio_channels=seanet["channels"],
        normalize=False, chunk_length_s=None, overlap=None, hidden_size=seanet["dimension"],
        codebook_dim=seanet["dimension"], num_filters=seanet["n_filters"],
        num_residual_layers=seanet["n_residual_layers"], upsampling_ratios=seanet["ratios"],
        norm_type="weight_norm", kernel_size=seanet["kernel_size"],
        last_kernel_size=seanet["last_kernel_size"], residual_kernel_size=seanet["residual_kernel_size"],
        dilation_growth_rate=seanet["dilation_base"], use_causal_conv=seanet["causal"],
        pad_mode=seanet["pad_mode"], compress=seanet["compress"], num_lstm_layers=seanet["lstm"] or 1,
        trim_right_ratio=1.0, codebook_size=card, use_conv_shortcut=not seanet["true_skip"])


def codec_to_package(config: dict, state: dict, levels: int) -> tuple[dict, dict]:
    """(audiocraft's settings, {audiocraft's name: tensor}) of a codec's first `levels`: see `codec_to_hf`."""
    tensors = {}
    for name, x in _first_levels(state, levels).items():
        if name.endswith(CONVOLUTIONS):
            tensors |= {name + "_g": _lengths(x), name + "_v": x.clone()}
        else:
            tensors[name] = x.clone()
        if name.endswith(".embed"):
            tensors |= _training_buffers(name, x)
    seanet, rate = full_seanet(config), config["sample_rate"]
    channels = seanet["channels"]
    settings = dict(
        sample_rate=rate, channels=channels, compression_model="encodec",
        encodec=dict(autoencoder="seanet", quantizer="rvq", sample_rate=rate, channels=channels,
                     causal=seanet["causal"], renormalize=False),
        seanet=seanet | dict(
            norm="weight_norm", norm_params={}, disable_norm_outer_blocks=0, encoder={},
            decoder=dict(trim_right_ratio=1.0, final_activation=None, final_activation_params=None)),
        rvq=dict(n_q=levels, bins=config["rvq"]["bins"], q_dropout=False, kmeans_init=False, decay=0.99))
    return settings, tensors


def _first_levels(state: dict, levels: int) -> dict:
    """The tensors without TRAINING_BUFFERS and without the quantizer's levels that are not used."""
    kept = {}
    for name, x in state.items():
        level = re.match(r"quantizer\.vq\.layers\.(\d+)\.", name)
        if not name.endswith(TRAINING_BUFFERS) and (level is None or int(level[1]) < levels):
            kept[name] = x
    return kept


def _lengths(weight: torch.Tensor) -> torch.Tensor:
    """The length of each row of a convolution's weight [N, ..]: [N,1,1]."""
    return weight.flatten(1).norm(dim=1)[:, None, None]


def _training_buffers(name: str, vectors: torch.Tensor) -> dict:
    """Buffers that both formats ask for beside a codebook's vectors [V,D], made up. name: of the vectors."""
    stem = name.removesuffix("embed")
    return {stem + "embed_avg": vectors.clone(), stem + "cluster_size": vectors.new_ones(len(vectors)),
            stem + "inited": vectors.new_ones(1)}
