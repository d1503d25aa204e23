"""Weights that other projects have written, as tensors by name: Hugging Face folders, audiocraft's packages, and the codec in either.

    folder/config.json + model.safetensors                              Hugging Face (model.safetensors.index.json: in shards;
                                                                        pytorch_model.bin: older)
    folder/tokenizer.json                                               T5's vocabulary, where there is no spiece.model
    folder/state_dict.bin + compression_state_dict.bin                  audiocraft: {best_state: {name: tensor}, xp.cfg: YAML text}

It stands apart because both the codec (tokenizer.py) and the language model (convert.py) come out of such a folder, and the codec
is read without the model. Names and shapes are known before anything is built; one file is open at a time, and a tensor is read
when it is asked for, so that a large model does not need twice its size. No pickle is executed.
"""

import base64
import json
import math
import re
import struct
import warnings
from pathlib import Path

import torch
from torch import Tensor

HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PACKAGE_FILES = ("state_dict.bin", "compression_state_dict.bin")     # audiocraft's: language model and codec
TRAINING_BUFFERS = ("inited", "cluster_size", "embed_avg")           # of a codec's codebooks: not part of what it computes


# ---------------------------------------------------------------------------------------------------------------------
# folders


def kind_of(path) -> str | None:
    """"hf" or "audiocraft" for a folder that one of them has written, by its files; None for anything else."""
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / "best.pt").exists() and not (folder / "log.jsonl").exists():
        return "hf"
    return "audiocraft" if any((folder / name).is_file() for name in PACKAGE_FILES) else None


def read_json(path: Path) -> dict:
    """A JSON object. Errors: ValueError naming the file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:                           # what is no UTF-8 and what is no JSON are ValueErrors
        raise ValueError(f"{path}: not readable as JSON ({str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def read_pickle(path: Path):
    """What torch.save wrote, mapped into memory where its format allows; no code of it runs. Errors: ValueError naming the file."""
    for mapped in (True, False):                                     # files of before torch 1.6 cannot be mapped
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:                                   # torch.load raises many kinds on foreign bytes
            problem = " ".join(str(error).split())[:150]
    raise ValueError(f"{path}: not a file of plain tensors, or damaged ({problem})") from None


class Tensors:
    """Tensors of one or several files by name; shapes are known, data are read when asked for, a file at a time.

    shapes: {name: list}. Errors: ValueError naming the file that is missing, truncated or no such file."""

    def __init__(self, files: dict):
        self.files, self.shapes = files, {}                          # {name of a tensor, or None for all: path}
        self.open_path = self.open_file = None
        for path in dict.fromkeys(files.values()):
            self._open(path)
            found = self.open_file.keys()
            wanted = [n for n, p in files.items() if p == path and n is not None] or found
            if lost := sorted(set(wanted) - set(found)):
                raise ValueError(f"{path}: lacks {lost[0]}, which the index says it holds ({len(lost)} such)")
            self.shapes |= {name: self._shape(name) for name in wanted}
            self.where = {**getattr(self, "where", {}), **dict.fromkeys(wanted, path)}

    def _open(self, path: Path) -> None:
        if path == self.open_path:
            return
        self.open_path = self.open_file = None                       # lets go of the file before
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though the folder's index names it")
        if path.suffix == ".safetensors":
            self.open_file = _safetensors(path)
        else:
            content = read_pickle(path)
            content = content.get("best_state", content) if isinstance(content, dict) else content
            if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
                raise ValueError(f"{path}: not a file of tensors by name")
            self.open_file = content
        self.open_path = path

    def _shape(self, name: str) -> list:
        file = self.open_file
        return list(file[name].shape) if isinstance(file, dict) else list(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in float32 and memory of its own."""
        self._open(self.where[name])
        x = self.open_file[name] if isinstance(self.open_file, dict) else self.open_file.get_tensor(name)
        return x.to(torch.float32, copy=True)

    def in_order_of_files(self, names) -> list:
        """Names sorted so that each file is opened once."""
        order = {path: i for i, path in enumerate(dict.fromkeys(self.where.values()))}
        return sorted(names, key=lambda name: order[self.where[name]])


def _safetensors(path: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path}: reading it needs the safetensors package: pip install safetensors") from None
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from None


def hf_tensors(folder: Path) -> Tensors:
    """The tensors of a Hugging Face folder. Errors: ValueError saying which file was expected, or what is wrong with it."""
    name = next((name for name in HF_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder}: config.json is there, but no weights: one of {', '.join(HF_FILES)} was expected")
    if not name.endswith(".index.json"):
        return Tensors({None: folder / name})
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not index or not all(
            isinstance(file, str) and Path(file).name == file for file in index.values()):       # no path leads out of the folder
        raise ValueError(f"{folder / name}: not an index of shards: a weight_map of names to files was expected")
    return Tensors({tensor: folder / file for tensor, file in index.items()})


def package(path: Path) -> tuple[dict, Tensors | None]:
    """(configuration, tensors) of one file of an audiocraft package; tensors None where it only points to a published codec.

    Errors: ValueError naming the file and what was expected."""
    content = read_pickle(path) if path.is_file() else None
    if content is None:
        raise ValueError(f"{path}: no such file, a package of audiocraft was expected")
    if isinstance(content, dict) and isinstance(content.get("pretrained"), str):
        return dict(pretrained=content["pretrained"]), None
    if not (isinstance(content, dict) and isinstance(content.get("best_state"), dict) and isinstance(content.get("xp.cfg"), str)):
        raise ValueError(f"{path}: not a package of audiocraft: best_state and xp.cfg as text were expected")
    return read_yaml(content["xp.cfg"]), Tensors({None: path})


def check_names(where, found: dict, wanted: dict, ignored: str = r"(?!)") -> None:
    """Compares {name: shape} found with what the configuration asks for. Errors: ValueError lists what is missing, unexpected and of
    another shape. ignored: pattern of names that may be there or not."""
    found = {name: list(shape) for name, shape in found.items() if not re.search(ignored, name)}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [f"{n} is {found[n]}, not {list(wanted[n])}" for n in sorted(wanted.keys() & found.keys()) if found[n] != list(wanted[n])]
    parts = [f"{len(names)} {what}: {', '.join(names[:3])}{', ..' * (len(names) > 3)}"
             for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if parts:
        raise ValueError(f"{where}: the weights are not what its configuration says: {'; '.join(parts)}")


# ---------------------------------------------------------------------------------------------------------------------
# T5's vocabulary


def read_tokenizer(path: Path) -> bytes:
    """The sentencepiece model that T5's tokenizer.json was made from: pieces, their log-probabilities, the table of normalisation.

    Errors: ValueError for the vocabulary of another kind."""
    content = read_json(path)
    try:
        model, normalizer = content["model"], content["normalizer"]
        steps = normalizer.get("normalizers", [normalizer])
        table = base64.b64decode(next(step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"))
        pieces = [(piece, score) for piece, score in model["vocab"] if not re.fullmatch(r"<extra_id_\d+>", piece)]     # no text has these
        if model["type"] != "Unigram" or model["unk_id"] != 2 or [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"of {model['type']} with unk_id {model['unk_id']}")
        kinds = (3, 3, 2)                                            # control, control, unknown; 1: a piece of text
        return b"".join([
            *(_field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, kinds[i] if i < 3 else 1))
              for i, (piece, score) in enumerate(pieces)),
            _field(2, _field(3, 1) + _field(40, 2) + _field(41, -1) + _field(42, 1) + _field(43, 0)),     # Unigram; unk, no bos, eos, pad
            _field(3, _field(1, b"nmt_nfkc") + _field(2, table) + _field(3, 1) + _field(4, 1) + _field(5, 1))])
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, struct.error) as error:
        raise ValueError(f"{path}: not the vocabulary of T5 ({type(error).__name__} {error}): pieces of a Unigram that begin with <pad>, "
                         "</s>, <unk> were expected") from None


def _field(number: int, value) -> bytes:
    """A field of a protocol buffer, in which sentencepiece writes its models: an integer, a float or bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the low ones first, each but the last marked."""
    return bytes([value & 127 | 128]) + _varint(value >> 7) if value > 127 else bytes([value])


# ---------------------------------------------------------------------------------------------------------------------
# audiocraft's configuration


def read_yaml(text: str) -> dict:
    """Nested dict of the part of YAML that OmegaConf writes: keys by indentation, scalars, lists, references ${a.b}.

    What is not understood stays text: only a few values are asked for."""
    if text.lstrip().startswith("{"):                                # JSON is YAML too
        return json.loads(text)
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines()
             if line.strip() and not line.lstrip().startswith("#")]
    return _block(lines, 0)[0] if lines and not lines[0][1].startswith("-") else {}


def _block(lines: list, at: int) -> tuple:
    """(value, next line) of the mapping or list that begins at a line."""
    level, is_list = lines[at][0], lines[at][1].startswith("- ")
    value = [] if is_list else {}
    while at < len(lines) and lines[at][0] >= level:
        indent, body = lines[at]
        if indent > level or body.startswith("- ") != is_list:
            if indent == level:                                      # the list of a key has ended
                break
            at += 1                                                  # the rest of a long text
            continue
        if is_list:
            lines[at] = (level + 2, body[2:].strip())
            if re.match(r"- |[\w.]+:( |$)", lines[at][1]):
                item, at = _block(lines, at)
                value.append(item)
            else:
                value.append(_scalar(lines[at][1]))
                at += 1
            continue
        key, _, rest = body.partition(":")
        at += 1
        deeper = at < len(lines) and (lines[at][0] > level or (lines[at][0] == level and lines[at][1].startswith("- ")))
        if rest.strip() or not deeper:
            value[key.strip("'\"")] = _scalar(rest.strip())
        else:
            value[key.strip("'\"")], at = _block(lines, at)
    return value, at


def _scalar(text: str):
    """A plain value; JSON reads all but the words of YAML."""
    if text in ("", "null", "~", "true", "false"):
        return {"true": True, "false": False}.get(text)
    try:
        return json.loads(re.sub(r"(\d\.)(?=[^\d]|$)", r"\g<1>0", text))      # 1. is a number in YAML
    except ValueError:
        return text.strip("'\"")


def setting(config: dict, path: str, default=None):
    """A value of a nested dict by its path "a.b.c", references followed; `default` where there is none."""
    value = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)) and match[1] != path:
        return setting(config, match[1], default)
    return default if value is None else value


# ---------------------------------------------------------------------------------------------------------------------
# the codec


def hf_codec_config(config: dict, where) -> dict:
    """The plain config of tokenizer.build_networks for a transformers EncodecConfig. Errors: ValueError for what it cannot be."""
    if config.get("model_type") != "encodec":
        raise ValueError(f"{where}: its codec is {config.get('model_type')!r}, EnCodec was expected")
    full = {**HF_CODEC_DEFAULTS, **config}
    for name, allowed in (("norm_type", "weight_norm"), ("normalize", False), ("chunk_length_s", None), ("trim_right_ratio", 1.0)):
        if full[name] != allowed:
            raise ValueError(f"{where}: its codec has {name} {full[name]}, {allowed} was expected")
    hop, D = 1, full["hidden_size"]
    for ratio in full["upsampling_ratios"]:
        hop *= ratio
    if full.get("codebook_dim") not in (None, D):
        raise ValueError(f"{where}: its codec has codebook_dim {full['codebook_dim']}, {D} was expected, its hidden_size")
    levels = hf_levels(full["target_bandwidths"][-1], full["sampling_rate"], hop, full["codebook_size"])
    seanet = dict(channels=full["audio_channels"], dimension=D, n_filters=full["num_filters"], ratios=list(full["upsampling_ratios"]),
                  n_residual_layers=full["num_residual_layers"], activation="ELU", activation_params={"alpha": 1.0},
                  kernel_size=full["kernel_size"], last_kernel_size=full["last_kernel_size"],
                  residual_kernel_size=full["residual_kernel_size"], dilation_base=full["dilation_growth_rate"],
                  causal=full["use_causal_conv"], pad_mode=full["pad_mode"], true_skip=not full["use_conv_shortcut"],
                  compress=full["compress"], lstm=full["num_lstm_layers"])
    return dict(sample_rate=full["sampling_rate"], seanet=seanet, rvq=dict(dimension=D, n_q=levels, bins=full["codebook_size"]))


HF_CODEC_DEFAULTS = dict(                                            # config.json may leave out what is transformers' default
    target_bandwidths=[1.5, 3.0, 6.0, 12.0, 24.0], sampling_rate=24_000, audio_channels=1, normalize=False, chunk_length_s=None,
    hidden_size=128, num_filters=32, num_residual_layers=1, upsampling_ratios=[8, 5, 4, 2], norm_type="weight_norm", kernel_size=7,
    last_kernel_size=7, residual_kernel_size=3, dilation_growth_rate=2, use_causal_conv=True, pad_mode="reflect", compress=2,
    num_lstm_layers=2, trim_right_ratio=1.0, codebook_size=1024, use_conv_shortcut=True)


def hf_levels(kbps: float, sample_rate: int, hop: int, card: int) -> int:
    """Levels of the quantiser: transformers has them by the bandwidth, in kbit/s."""
    return int(1000 * kbps // (-(-sample_rate // hop) * (card - 1).bit_length()))


def hf_codec_name(name: str) -> str:
    """The encodec package's name of a codec's tensor -> transformers'."""
    for ours, theirs in ((".model.", ".layers."), (".conv.conv.", ".conv."), (".convtr.convtr.", ".conv."), ("quantizer.vq.", "quantizer."),
                         ("._codebook.", ".codebook.")):
        name = name.replace(ours, theirs, 1)
    return name


WEIGHT_NORMS = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))


def codec_names(shapes: dict, found, rename, lstm: bool = True) -> dict:
    """{our name: their name, or (length, direction) of a weight norm} for a codec's {our name: shape}. found: names that are there,
    which tell the two ways that torch has had to write a weight norm."""
    names = {}
    for name in shapes:
        stem = rename(name).removesuffix(".weight")
        pair = next(((stem + g, stem + v) for g, v in WEIGHT_NORMS if stem + v in found), (stem + ".weight_g", stem + ".weight_v"))
        convolution = name.endswith((".conv.conv.weight", ".convtr.convtr.weight"))
        names[name] = pair if convolution else rename(name)
    return names


def read_codec(tensors: Tensors, shapes: dict, rename, prefix: str, where) -> dict:
    """Weights of a codec by our names, the weight norms folded, from tensors that begin with `prefix`. shapes: {our name: shape}.

    Errors: ValueError listing what does not fit."""
    found = {name.removeprefix(prefix): shape for name, shape in tensors.shapes.items() if name.startswith(prefix)}
    names, wanted = codec_names(shapes, found, rename), {}
    for ours, theirs in names.items():
        shape = list(shapes[ours])
        wanted |= {theirs: shape} if isinstance(theirs, str) else {theirs[0]: [shape[0], 1, 1], theirs[1]: shape}
    check_names(where, found, wanted, ignored=r"\.(%s)$" % "|".join(TRAINING_BUFFERS))
    return {ours: tensors[prefix + theirs] if isinstance(theirs, str) else
            torch._weight_norm(tensors[prefix + theirs[1]], tensors[prefix + theirs[0]], 0) for ours, theirs in names.items()}


def package_codec_config(config: dict, where) -> dict:
    """The plain config of tokenizer.build_networks for the configuration of an audiocraft codec. Errors: ValueError."""
    if setting(config, "compression_model") != "encodec":
        raise ValueError(f"{where}: its codec is {setting(config, 'compression_model')!r}, encodec was expected")
    if setting(config, "encodec.renormalize", False):
        raise ValueError(f"{where}: its codec scales every clip by a factor of its own (renormalize), which is lost here")
    names = ("channels", "dimension", "n_filters", "n_residual_layers", "ratios", "activation", "activation_params", "kernel_size",
             "last_kernel_size", "residual_kernel_size", "dilation_base", "causal", "pad_mode", "true_skip", "compress", "lstm")
    seanet = {name: setting(config, f"seanet.{name}") for name in names}
    if lacking := [name for name, value in seanet.items() if value is None]:
        raise ValueError(f"{where}: its xp.cfg lacks seanet.{lacking[0]}")
    rvq = dict(dimension=seanet["dimension"], n_q=setting(config, "rvq.n_q"), bins=setting(config, "rvq.bins"))
    return dict(sample_rate=setting(config, "sample_rate"), seanet=seanet, rvq=rvq)


def plain_seanet(config: dict) -> dict:
    """A codec's seanet configuration with every default of the encodec package filled in."""
    return {**SEANET_DEFAULTS, **config["seanet"]}


SEANET_DEFAULTS = dict(channels=1, dimension=128, n_filters=32, n_residual_layers=1, ratios=[8, 5, 4, 2], activation="ELU",
                       activation_params={"alpha": 1.0}, kernel_size=7, last_kernel_size=7, residual_kernel_size=3, dilation_base=2,
                       causal=False, pad_mode="reflect", true_skip=False, compress=2, lstm=2)


def to_hf_codec_config(config: dict, levels: int) -> dict:
    """The transformers EncodecConfig of a codec's plain config, with its first `levels`. Errors: ValueError for what that lacks."""
    seanet, rate, card = plain_seanet(config), config["sample_rate"], config["rvq"]["bins"]
    if (seanet["activation"], seanet["activation_params"]) != ("ELU", {"alpha": 1.0}):
        raise ValueError(f"transformers' EnCodec has ELU alone, this codec {seanet['activation']} {seanet['activation_params']}")
    if card & (card - 1):
        raise ValueError(f"transformers' EnCodec takes powers of two as cardinality, this codec has {card}")
    hop = 1
    for ratio in seanet["ratios"]:
        hop *= ratio
    kbps = levels * -(-rate // hop) * (card - 1).bit_length() / 1000
    while hf_levels(kbps, rate, hop, card) < levels:                 # it divides and rounds down
        kbps = math.nextafter(kbps, math.inf)
    return dict(model_type="encodec", target_bandwidths=[kbps], sampling_rate=rate, audio_channels=seanet["channels"], normalize=False,
                chunk_length_s=None, overlap=None, hidden_size=seanet["dimension"], codebook_dim=seanet["dimension"],
                num_filters=seanet["n_filters"], num_residual_layers=seanet["n_residual_layers"], upsampling_ratios=seanet["ratios"],
                norm_type="weight_norm", kernel_size=seanet["kernel_size"], last_kernel_size=seanet["last_kernel_size"],
                residual_kernel_size=seanet["residual_kernel_size"], dilation_growth_rate=seanet["dilation_base"],
                use_causal_conv=seanet["causal"], pad_mode=seanet["pad_mode"], compress=seanet["compress"],
                num_lstm_layers=seanet["lstm"] or 1, trim_right_ratio=1.0, codebook_size=card, use_conv_shortcut=not seanet["true_skip"])


def to_hf_codec(state: dict, config: dict, levels: int) -> dict:
    """A codec's tensors by transformers' names, weight norms put back, the codebooks' buffers of training made up.

    transformers' EnCodec always has an LSTM beside a skip connection; where ours has none it gets one of zeros, which adds
    exactly nothing and moves the numbers of what follows."""
    seanet, found, move = plain_seanet(config), {}, 0 if plain_seanet(config)["lstm"] else 1
    last = max(int(re.match(r"encoder\.model\.(\d+)", name)[1]) for name in state if name.startswith("encoder."))     # its last convolution
    if move:
        width = seanet["n_filters"] * 2 ** len(seanet["ratios"])
        found = {f"{side}.layers.{at}.{name}": torch.zeros_like(x) for side, at in (("encoder", last - 1), ("decoder", 1))
                 for name, x in torch.nn.ModuleDict({"lstm": torch.nn.LSTM(width, width)}).state_dict().items()}
    for name, x in state.items():
        side, _, rest = name.partition(".model.")
        if rest:
            number, _, leaf = rest.partition(".")
            at = int(number) + move * ((side == "encoder" and int(number) == last) or (side == "decoder" and int(number) > 0))
            name = f"{side}.model.{at}.{leaf}"
        elif int(name.split(".")[3]) >= levels:                      # quantizer.vq.layers.{level}
            continue
        theirs = hf_codec_name(name)
        if name.endswith((".conv.conv.weight", ".convtr.convtr.weight")):
            length, direction = (theirs.removesuffix(".weight") + end for end in WEIGHT_NORMS[1])
            found |= {length: x.flatten(1).norm(dim=1)[:, None, None], direction: x.contiguous()}
        else:
            found[theirs] = x.contiguous()
        if name.endswith("._codebook.embed"):
            stem = theirs.removesuffix("embed")
            found |= {stem + "embed_avg": x.clone(), stem + "cluster_size": x.new_ones(len(x)), stem + "inited": x.new_ones(1)}
    return found


def to_package_codec(state: dict, levels: int) -> dict:
    """A codec's tensors by audiocraft's names: ours, with weight norms and the codebooks' buffers of training put back."""
    found = {}
    for name, x in state.items():
        if name.startswith("quantizer."):
            if int(name.split(".")[3]) < levels:
                stem = name.removesuffix("embed")
                found |= {name: x.clone(), stem + "embed_avg": x.clone(), stem + "cluster_size": x.new_ones(len(x)),
                          stem + "inited": x.new_ones(1)}
        elif name.endswith((".conv.conv.weight", ".convtr.convtr.weight")):
            found |= {name + "_g": x.flatten(1).norm(dim=1)[:, None, None], name + "_v": x.clone()}
        else:
            found[name] = x.clone()
    return found


def open_codec(path) -> tuple[dict, Tensors, str, object]:
    """(plain config, tensors, prefix of their names, renaming of ours) of the codec in a folder. Errors: ValueError."""
    folder = Path(path)
    if kind_of(folder) == "hf":
        config = read_json(folder / "config.json")
        prefix = "audio_encoder." if "audio_encoder" in config else ""
        return hf_codec_config(config.get("audio_encoder", config), folder), hf_tensors(folder), prefix, hf_codec_name
    where = folder / PACKAGE_FILES[1]
    config, tensors = package(where)
    if tensors is None:
        raise ValueError(f"{where}: only points to {config['pretrained']}: give that folder by --codec")
    return package_codec_config(config, where), tensors, "", str
