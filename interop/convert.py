"""Models on disk: ours, and the published MusicGens in the formats of Hugging Face and audiocraft, in and out.

Copet et al. 2023 (arXiv:2306.05284) published weights; this file reads them into what best.pt of a run holds, so that everything
that takes a run takes them too, and writes a run as a folder that the others' own loaders read. A model has three parts:

    theirs                                              ours
    decoder              ─ TABLE, q|k|v packed into one ─►  emb, transformer, out_norm, linears
    text_encoder (T5), enc_to_dec_proj    ─ TABLE       ─►  conditioner.parts.text
    audio_enc_to_dec_proj (MusicGen-Melody)   ─ TABLE   ─►  conditioner.parts.melody
    audio_encoder (EnCodec)               ─ weights.py  ─►  tokenizer.Codec, which stays where it is and is named by its folder

audiocraft's names are ours but for the conditioner's; its packages do not hold T5, which comes from a folder of its own (--t5).
A text model attends to its text; a melody model has both in front of the codes, and nothing of them is hidden:

    | melody: a class a frame, cut or repeated to the length of a segment | text | codes ..      null: class 0 all along | zeros

Legend: K codebooks, D width of the language model, T frames.
    python -m interop.convert DIR                                   says what a folder holds
    python -m interop.convert runs/NAME --to hf --out DIR           for transformers.Musicgen(Melody)ForConditionalGeneration
    python -m interop.convert DIR --t5 T5_DIR --to nano --out DIR2  audiocraft's package as a best.pt
"""

import argparse
import functools
import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from support import chroma
import tokenizer
from interop import weights
from support import common
from support.common import FORMAT, MODEL_FILE
from conditioning import Bottleneck, Conditioner, ConditionerConfig, pack, unpack, vocabulary_size
from model import ModelConfig, MusicGen

SAMPLING = dict(cfg=3.0, temperature=1.0, top_k=250, top_p=0.0)      # as published
SEGMENT_SECONDS, STYLE_SECONDS = 30.0, 3.0                           # what the published models were trained on, and read a style from
TEXT = {"text": "cross"}                                             # how the conditions of the published models enter,
MELODY = {"melody": "prepend", "text": "prepend"}                    # and in which order
STYLE = {"style": "prepend", "text": "prepend"}                      # read only
LAYER, T5_LAYER = "decoder.model.decoder.layers.{}", "text_encoder.encoder.block.{}.layer"
TABLE = {                                                            # our name: transformers'; {} is a number, [qkv] three tensors
    "emb.{}.weight": "decoder.model.decoder.embed_tokens.{}.weight",
    "transformer.layers.{}.self_attn.in_proj_weight": LAYER + ".self_attn.[qkv]_proj.weight",
    "transformer.layers.{}.self_attn.out_proj.weight": LAYER + ".self_attn.out_proj.weight",
    "transformer.layers.{}.norm1.weight": LAYER + ".self_attn_layer_norm.weight",
    "transformer.layers.{}.norm1.bias": LAYER + ".self_attn_layer_norm.bias",
    "transformer.layers.{}.cross_attention.in_proj_weight": LAYER + ".encoder_attn.[qkv]_proj.weight",
    "transformer.layers.{}.cross_attention.out_proj.weight": LAYER + ".encoder_attn.out_proj.weight",
    "transformer.layers.{}.norm_cross.weight": LAYER + ".encoder_attn_layer_norm.weight",
    "transformer.layers.{}.norm_cross.bias": LAYER + ".encoder_attn_layer_norm.bias",
    "transformer.layers.{}.linear1.weight": LAYER + ".fc1.weight",
    "transformer.layers.{}.linear2.weight": LAYER + ".fc2.weight",
    "transformer.layers.{}.norm2.weight": LAYER + ".final_layer_norm.weight",
    "transformer.layers.{}.norm2.bias": LAYER + ".final_layer_norm.bias",
    "out_norm.weight": "decoder.model.decoder.layer_norm.weight",
    "out_norm.bias": "decoder.model.decoder.layer_norm.bias",
    "linears.{}.weight": "decoder.lm_heads.{}.weight",
    "conditioner.parts.text.output_proj.weight": "enc_to_dec_proj.weight",
    "conditioner.parts.text.output_proj.bias": "enc_to_dec_proj.bias",
    "conditioner.parts.melody.output_proj.weight": "audio_enc_to_dec_proj.weight",
    "conditioner.parts.melody.output_proj.bias": "audio_enc_to_dec_proj.bias",
    "conditioner.parts.text.encoder.embed.weight": "text_encoder.shared.weight",
    "conditioner.parts.text.encoder.relative_bias.weight":
        "text_encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "conditioner.parts.text.encoder.final_norm.weight": "text_encoder.encoder.final_layer_norm.weight",
    "conditioner.parts.text.encoder.layers.{}.norm1.weight": T5_LAYER + ".0.layer_norm.weight",
    "conditioner.parts.text.encoder.layers.{}.norm2.weight": T5_LAYER + ".1.layer_norm.weight",
    **{f"conditioner.parts.text.encoder.layers.{{}}.{n}.weight": f"{T5_LAYER}.0.SelfAttention.{n}.weight" for n in "qkvo"},
    **{f"conditioner.parts.text.encoder.layers.{{}}.{n}.weight": f"{T5_LAYER}.1.DenseReluDense.{n}.weight" for n in ("wi", "wo")},
}
PROJECTION = "enc_to_dec_proj."                                      # transformers has none where T5 is as wide as the model
IGNORED = r"^audio_encoder\.|embed_positions\.weights$|^text_encoder\.encoder\.embed_tokens\.weight$"    # copies, and the codec
T5_CONFIG = dict(                                                    # ours: (transformers' name, its default)
    text_dim=("d_model", 512), text_layers=("num_layers", 6), text_heads=("num_heads", 8), text_head_dim=("d_kv", 64),
    text_hidden=("d_ff", 2048), text_vocab=("vocab_size", 32128), text_buckets=("relative_attention_num_buckets", 32),
    text_max_distance=("relative_attention_max_distance", 128))


# ---------------------------------------------------------------------------------------------------------------------
# models of this project


def skeleton(config: ModelConfig, conditioner: ConditionerConfig | None, assets: dict) -> MusicGen:
    """A model without storage (on the meta device): names and shapes, to compare or to give tensors to."""
    with torch.device("meta"):
        return MusicGen(config, None if conditioner is None else Conditioner(conditioner, config.dim, assets))


def build_model(data: dict) -> MusicGen:
    """The model of a deployment file (best.pt) with its weights, in eval mode on the CPU. It takes the tensors themselves: nothing
    is there twice."""
    conditioner = data["conditioner_config"]
    model = skeleton(ModelConfig(**data["model_config"]), None if conditioner is None else ConditionerConfig(**conditioner),
                     {name: unpack(t) for name, t in data["assets"].items()})
    model.load_state_dict(data["model"], assign=True)
    return model.float().eval()


def read_deployment(run: str | Path) -> dict:
    """The content of a run's best.pt (or of such a file itself), or the same of a folder that others have written.

    Errors: ValueError says what is missing or wrong."""
    path = locate(run)
    if weights.kind_of(path):
        return read(path)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{run}: no best.pt there; give the folder of a run that has finished an epoch, or one with published "
                         "weights")
    data = common.read_torch_dict(path, MODEL_FILE)
    if data.get("format") != FORMAT:
        raise ValueError(f"{path}: not {MODEL_FILE}: its format is {data.get('format')!r}, not {FORMAT!r}")
    return data


def locate(name: str | Path) -> Path:
    """The path of a model; a published one that is not there by its name is downloaded, where huggingface_hub can.

    Errors: ValueError with the command that gets it."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"facebook/[\w.-]+", str(name)):
        return path
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "spiece.model"]))
    except ImportError:
        problem = "huggingface_hub is not installed"
    except Exception as error:                                       # it has errors of a dozen libraries
        problem = common.describe_error(error)
    raise ValueError(f"{name}: no such path, and no download ({problem}). Where there is a network: pip install huggingface_hub && "
                     f"hf download {name} --local-dir {path.name}; then give {path.name}")


def peek(path: str | Path) -> tuple[ModelConfig, ConditionerConfig | None, dict | None] | None:
    """Shapes of a model without its weights, and what `read_config` adds if it is a published one. None where there is no model.

    Errors: ValueError for a published one whose configuration is not that of a MusicGen."""
    path = locate(path)
    if weights.kind_of(path):
        return read_config(path)
    path = path / "best.pt" if path.is_dir() else path
    try:
        data = weights.read_pickle(path)                             # mapped: its weights are not read
        conditioner = data["conditioner_config"]
        return ModelConfig(**data["model_config"]), ConditionerConfig(**conditioner) if conditioner else None, None
    except (ValueError, TypeError, LookupError):                     # `read_deployment` says what is wrong
        return None


# ---------------------------------------------------------------------------------------------------------------------
# in


def read(path, t5=None, codec=None) -> dict:
    """A published model as what best.pt holds, from a Hugging Face folder or an audiocraft package.

    t5: folder with the latter's T5; codec: where its codec lies, if it does not lie there.

    Errors: ValueError, one line with what was expected and what was found."""
    config, conditioner, source = read_config(path, t5)
    kind, folder = weights.kind_of(path), Path(path)
    pieces = read_pieces(Path(t5) if kind == "audiocraft" else folder)
    if vocabulary_size(pieces) > conditioner.text_vocab:
        raise ValueError(f"{path}: its vocabulary has {vocabulary_size(pieces)} pieces, its text encoder {conditioner.text_vocab}")
    try:
        shapes = {name: list(x.shape) for name, x in skeleton(config, conditioner, {"text": pieces}).state_dict().items()}
    except Exception as error:                                       # a foreign config can fail in any way
        raise ValueError(f"{path}: its configuration makes no model ({common.describe_error(error)})") from None
    if kind == "hf":
        model = read_hf(folder, shapes, projected=conditioner.text_dim != config.dim)
    else:
        model = read_package(folder, Path(t5), shapes)
    channels = source["channels"]
    codec = tokenizer.load_codec(str(codec or path), config.K // channels, "cpu", channels)
    if (codec.K, codec.card) != (config.K, config.card):
        raise ValueError(f"{path}: its model makes {config.K} x {config.card} codes, its codec has {codec.K} x {codec.card}")
    conditioner.melody_rate = codec.hop / chroma.hop_length(codec.sample_rate)
    conditioner.style_frames = round(source["style_seconds"] * codec.frame_rate)
    return dict(format=FORMAT, model=model, model_config=asdict(config), conditioner_config=asdict(conditioner),
                assets={"text": pack(pieces)}, codec=codec.reference, sampling={**SAMPLING, **source["sampling"]},
                segment_frames=math.ceil(source["seconds"] * codec.frame_rate), metrics={}, step=0, args={})


def read_config(path, t5=None) -> tuple[ModelConfig, ConditionerConfig, dict]:
    """Shapes of a published model, and {channels, seconds, style_seconds, sampling}, without its weights. Errors: ValueError."""
    return hf_config(Path(path)) if weights.kind_of(path) == "hf" else package_config(Path(path), t5)


def hf_config(folder: Path) -> tuple[ModelConfig, ConditionerConfig, dict]:
    """Shapes of the model in a Hugging Face folder. Errors: ValueError naming the setting that is not MusicGen's."""
    config = weights.read_json(folder / "config.json")
    if config.get("model_type") not in ("musicgen", "musicgen_melody"):
        raise ValueError(f"{folder}: config.json is of {config.get('model_type')!r}, 'musicgen' or 'musicgen_melody' was expected")
    melody = config["model_type"] == "musicgen_melody"
    try:
        decoder, text = config["decoder"], config["text_encoder"]
        K, D, channels = decoder["num_codebooks"], decoder["hidden_size"], decoder.get("audio_channels", 1)
        for name, allowed in (("activation_function", "gelu"), ("scale_embedding", False), ("tie_word_embeddings", False)):
            if decoder.get(name, allowed) != allowed:
                raise ValueError(f"{folder}: its decoder has {name} {decoder[name]}, {allowed} was expected")
        if decoder["ffn_dim"] % D or K % channels or D % decoder["num_attention_heads"]:
            raise ValueError(f"{folder}: its decoder has ffn_dim {decoder['ffn_dim']}, hidden_size {D}, "
                             f"{decoder['num_attention_heads']} heads, {K} codebooks, {channels} channels, which do not divide")
        model = ModelConfig(K=K, card=decoder["vocab_size"], dim=D, num_layers=decoder["num_hidden_layers"],
                            num_heads=decoder["num_attention_heads"], hidden_scale=decoder["ffn_dim"] // D,
                            cross_attention=not melody, mask_padding=not melody,
                            delays=[k // 2 for k in range(K)] if channels == 2 else None)        # 0 0 1 1 ..: left and right at once
        conditioner = t5_config(text, folder)
        if melody:
            classes, frames = config.get("num_chroma", 12), config.get("chroma_length", 235)
            if classes != 12 or not isinstance(frames, int) or frames < 1:
                raise ValueError(f"{folder}: its melody has num_chroma {classes}, chroma_length {frames}; 12 and at least 1 were expected")
            conditioner = replace(conditioner, fuse=dict(MELODY), melody_null_bin0=True, melody_frames=frames)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: config.json is not that of a MusicGen ({common.describe_error(error)})") from None
    path = folder / "generation_config.json"
    guidance = weights.read_json(path).get("guidance_scale") if path.is_file() else None
    return model, conditioner, dict(channels=channels, seconds=SEGMENT_SECONDS, style_seconds=STYLE_SECONDS,
                                    sampling=dict(cfg=float(guidance)) if guidance else {})


def t5_config(config: dict, where) -> ConditionerConfig:
    """The text encoder of a transformers T5Config. Errors: ValueError for another encoder or a variant of it."""
    if config.get("model_type") != "t5":
        raise ValueError(f"{where}: its text encoder is {config.get('model_type')!r}, 't5' was expected")
    for name, allowed in (("feed_forward_proj", "relu"), ("layer_norm_epsilon", 1e-6)):
        if config.get(name, allowed) != allowed:
            raise ValueError(f"{where}: its T5 has {name} {config[name]}, {allowed} was expected")
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in T5_CONFIG.items()}
    return ConditionerConfig(fuse=dict(TEXT), text_max_tokens=512, text_frozen=True, **fields)


def read_pieces(folder: Path) -> bytes:
    """T5's sentencepiece model, from spiece.model or from tokenizer.json. Errors: ValueError naming the file."""
    path, other = folder / "spiece.model", folder / "tokenizer.json"
    if not path.is_file() and not other.is_file():
        raise ValueError(f"{path}: no such file: the sentencepiece model of T5 was expected, as in google-t5/t5-base "
                         f"(hf download google-t5/t5-base spiece.model --local-dir {folder}), or its tokenizer.json")
    path = path if path.is_file() else other
    pieces = path.read_bytes() if path != other else weights.read_tokenizer(path)
    try:
        vocabulary_size(pieces)
    except Exception as error:                                       # a foreign file can fail in any way
        raise ValueError(f"{path}: not a sentencepiece model ({common.describe_error(error)})") from None
    return pieces


def rename(name: str) -> list:
    """Our name of a tensor -> transformers': one, or q, k and v of what is packed."""
    number = r"(?<=\.)\d+(?=\.)"
    theirs = TABLE[re.sub(number, "{}", name)].format(*re.findall(number, name))
    return [theirs.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in theirs else [theirs]


def read_hf(folder: Path, shapes: dict, projected: bool, prefix: str = "") -> dict:
    """Weights by our names from a Hugging Face folder. shapes: {our name: shape}; projected: whether T5's width is another than the
    model's; prefix: what their names begin with and the folder's do not. Errors: ValueError listing what does not fit."""
    tensors, names = weights.hf_tensors(folder), {ours: rename(ours) for ours in shapes}
    absent = [] if projected else [ours for ours, theirs in names.items() if theirs[0].startswith(PROJECTION)]
    names = {ours: [name.removeprefix(prefix) for name in theirs] for ours, theirs in names.items() if ours not in absent}
    wanted = {name: [shapes[ours][0] // len(theirs), *shapes[ours][1:]] for ours, theirs in names.items() for name in theirs}
    weights.check_names(folder, tensors.shapes, wanted, IGNORED if not prefix else r"^(?!encoder\.block|encoder\.final|shared)")
    found = {name: tensors[name] for name in tensors.in_order_of_files(wanted)}
    model = {ours: torch.cat([found.pop(name) for name in theirs]) if len(theirs) > 1 else found.pop(theirs[0])
             for ours, theirs in names.items()}
    for ours in absent:                                              # then it is the identity
        model[ours] = torch.eye(shapes[ours][0]) if len(shapes[ours]) == 2 else torch.zeros(shapes[ours])
    return {ours: model[ours] for ours in shapes}


# ---------------------------------------------------------------------------------------------------------------------
# audiocraft's packages, in


def package_config(folder: Path, t5) -> tuple[ModelConfig, ConditionerConfig, dict]:
    """Shapes of the model in a package of audiocraft. Errors: ValueError naming the setting that is not MusicGen's."""
    path = folder / weights.PACKAGE_FILES[0]
    get = functools.partial(weights.setting, weights.package(path)[0])
    if t5 is None:
        raise ValueError(f"{folder}: a package of audiocraft does not hold its T5 ({get('conditioners.description.t5.name', 't5-base')}): "
                         f"python -m interop.convert {folder} --t5 T5_FOLDER --to nano --out NEW, then give NEW")
    lm = {name: get(f"transformer_lm.{name}") for name in ("n_q", "card", "dim", "num_heads", "num_layers", "hidden_scale")}
    if lacking := [name for name, value in lm.items() if not isinstance(value, int)]:
        raise ValueError(f"{path}: its xp.cfg lacks transformer_lm.{lacking[0]}")
    for name, allowed in PACKAGE_SETTINGS.items():
        if (value := get(name, allowed)) != allowed:
            raise ValueError(f"{path}: its {name} is {value}, {allowed} was expected")
    cross, prepend = get("fuser.cross", []), get("fuser.prepend", [])
    if get("fuser.sum", []) or (cross, sorted(prepend)) not in ((["description"], []), ([], ["description", "self_wav"])):
        raise ValueError(f"{path}: its fuser has cross {cross}, prepend {prepend}; cross ['description'], or prepend ['self_wav', "
                         "'description'] was expected")
    K, channels = lm["n_q"], get("channels", 1)
    seconds = float(get("dataset.segment_duration", SEGMENT_SECONDS))
    delays = get("codebooks_pattern.delay.delays", list(range(K)))
    config = ModelConfig(K=K, card=lm["card"], dim=lm["dim"], num_layers=lm["num_layers"], num_heads=lm["num_heads"],
                         hidden_scale=lm["hidden_scale"], cross_attention=bool(cross), mask_padding=False,
                         delays=None if delays == list(range(K)) else delays)
    conditioner = t5_config(weights.read_json(Path(t5) / "config.json"), t5)
    if prepend and get("conditioners.self_wav.model") == "style":
        conditioner = replace(conditioner, **package_style(get, lm["card"], channels, path))
    elif prepend:
        conditioner = replace(conditioner, **package_melody(get, seconds, path))
    sampling = dict(cfg=float(get("classifier_free_guidance.inference_coef", SAMPLING["cfg"])))
    return config, conditioner, dict(channels=channels, seconds=seconds, sampling=sampling,
                                     style_seconds=float(get("conditioners.self_wav.style.length", STYLE_SECONDS)))


def package_melody(get, seconds: float, path: Path) -> dict:
    """Of a ConditionerConfig what audiocraft's conditioner of a melody has in `get`. Errors: ValueError naming the setting."""
    stem = "conditioners.self_wav.chroma_stem"
    rate = get(f"{stem}.sample_rate", get("sample_rate"))
    n_fft = 4 * chroma.hop_length(rate)
    for name, allowed in (("conditioners.self_wav.model", "chroma_stem"), (f"{stem}.n_chroma", 12), (f"{stem}.argmax", True),
                          (f"{stem}.radix2_exp", f"{math.log2(n_fft):g}")):
        if str(get(name)) != str(allowed):
            raise ValueError(f"{path}: its {name} is {get(name)}, {allowed} was expected")
    return dict(fuse=dict(MELODY), melody_null_bin0=True, melody_frames=chroma.count_frames(int(seconds * rate), rate))


def package_style(get, card: int, channels: int, path: Path) -> dict:
    """Of a ConditionerConfig what audiocraft's conditioner of a style has in `get`. Errors: ValueError naming the setting."""
    style = "conditioners.self_wav.style"
    if (reader := get(f"{style}.model_name")) != "encodec" or channels != 1:
        raise ValueError(f"{path}: its style is read from {channels} channels by {reader}, 1 by encodec was expected: MERT, which the "
                         "published MusicGen-Style has, is a network that is not here")
    scale, levels, norm = get(f"{style}.transformer_scale", "default"), get(f"{style}.n_q_out", 6), get(f"{style}.batch_norm", True)
    if scale not in STYLE_SIZES or levels < 1 or not norm:
        raise ValueError(f"{path}: its {style} has transformer_scale {scale}, n_q_out {levels}, batch_norm {norm}; one of "
                         f"{', '.join(STYLE_SIZES)}, at least 1 and true were expected")
    return dict(fuse=dict(STYLE), style_card=card, style_codebooks=get(f"{style}.encodec_n_q", 4), style_bins=get(f"{style}.bins", 1024),
                style_levels=min(levels, get(f"{style}.eval_q", 3)), style_every=get(f"{style}.ds_factor", 15), style_norm=False,
                **STYLE_SIZES[scale])


STYLE_SIZES = {"xsmall": dict(style_dim=256, style_heads=8, style_layers=4), "default": dict(style_dim=512, style_heads=8, style_layers=8),
               "large": dict(style_dim=1024, style_heads=16, style_layers=24)}          # audiocraft's names
PACKAGE_SETTINGS = {                                                 # of audiocraft, where there is only one that this model has
    "lm_model": "transformer_lm", "codebooks_pattern.modeling": "delay", "conditioners.description.model": "t5",
    "transformer_lm.activation": "gelu", "transformer_lm.norm_first": True, "transformer_lm.bias_ff": False,
    "transformer_lm.bias_attn": False, "transformer_lm.bias_proj": False, "transformer_lm.causal": True,
    "transformer_lm.positional_embedding": "sin", "transformer_lm.norm": "layer_norm", "transformer_lm.layer_scale": None,
    "transformer_lm.qk_layer_norm": False, "transformer_lm.kv_repeat": 1, "transformer_lm.past_context": None}
SELF_WAV = "condition_provider.conditioners.self_wav."
WINDOW = SELF_WAV + "chroma.spec.window"                             # of the melody's FFT, a buffer
LEVELS = SELF_WAV + "rvq.vq.layers.{}._codebook."
PACKAGE_TABLE = {                                                    # our names begin so: audiocraft's; {} is a level, ours are stacked
    "conditioner.parts.text.": "condition_provider.conditioners.description.",
    "conditioner.parts.melody.": SELF_WAV,
    "conditioner.parts.style.bottleneck.vectors": LEVELS + "embed",
    "conditioner.parts.style.bottleneck.sizes": LEVELS + "cluster_size",
    "conditioner.parts.style.bottleneck.count": SELF_WAV + "batch_norm.num_batches_tracked",
    "conditioner.parts.style.bottleneck.": SELF_WAV + "batch_norm.running_",
    "conditioner.parts.style.emb.": SELF_WAV + "embed.",
    "conditioner.parts.style.": SELF_WAV}


def package_name(name: str) -> str:
    """Our name of a tensor -> audiocraft's."""
    ours = next((start for start in PACKAGE_TABLE if name.startswith(start)), "")
    return PACKAGE_TABLE.get(ours, "") + name.removeprefix(ours)


def read_package(folder: Path, t5: Path, shapes: dict) -> dict:
    """Weights by our names from a package of audiocraft and a folder with T5. A style's quantiser may have more levels than it is used
    with: they are left out. Errors: ValueError listing what does not fit."""
    encoder, path = "conditioner.parts.text.encoder.", folder / weights.PACKAGE_FILES[0]
    _, tensors = weights.package(path)
    names = {ours: package_name(ours) for ours in shapes if not ours.startswith(encoder)}
    names = {ours: [theirs.format(i) for i in range(shapes[ours][0])] if "{}" in theirs else theirs for ours, theirs in names.items()}
    wanted = {}
    for ours, theirs in names.items():
        wanted |= {theirs: shapes[ours]} if isinstance(theirs, str) else dict.fromkeys(theirs, shapes[ours][1:])
    levels = shapes.get("conditioner.parts.style.bottleneck.vectors", [1])[0]
    unused = LEVELS.format(f"(?!({'|'.join(map(str, range(levels)))})[.])[0-9]+")
    weights.check_names(path, tensors.shapes, wanted, rf"{WINDOW}|{unused}|_codebook[.](inited|embed_avg)$")
    found = read_hf(t5, {name: shape for name, shape in shapes.items() if name.startswith(encoder)}, True, "text_encoder.")
    found |= {ours: tensors[theirs] if isinstance(theirs, str) else torch.stack([tensors[name] for name in theirs])
              for ours, theirs in names.items()}
    if (count := "conditioner.parts.style.bottleneck.count") in found:
        found[count].clamp_(max=1 / (1 - Bottleneck.DECAY))          # there every update counts, here an average of them
    return {ours: found[ours] for ours in shapes}


# ---------------------------------------------------------------------------------------------------------------------
# out


def misfits(data: dict, codec, target: str) -> list:
    """What of a model the target's classes cannot express."""
    config, conditioner = ModelConfig(**data["model_config"]), data["conditioner_config"] or {"fuse": {}}
    usual = [k // codec.streams for k in range(config.K)]
    found = []
    if list(conditioner["fuse"].items()) not in (list(TEXT.items()), list(MELODY.items())):          # in this order
        found.append(f"its conditions are {entering(conditioner['fuse'])}, only {entering(TEXT)} or {entering(MELODY)} can be written")
    elif "melody" in conditioner["fuse"]:
        found += melody_misfits(ConditionerConfig(**conditioner), config, data, codec, target)
    if config.pattern != "delay" or (config.delays or list(range(config.K))) != usual:
        found.append(f"its pattern is {config.pattern} {config.delays or ''}, only delay {' '.join(map(str, usual))} can be written")
    if codec.channels > codec.streams:
        found.append(f"its codec takes {codec.channels} channels at once")
    if codec.config is None:
        found.append("its codec's configuration is not known")
    if target == "hf" and conditioner.get("text_dim") == config.dim and not found and not is_identity(data["model"]):
        found.append(f"text encoder and model are both {config.dim} wide, and then transformers has no projection between them")
    if target == "audiocraft" and not found and t5_name(conditioner) is None:
        found.append("its text encoder is not a published T5 left as it is, which audiocraft fetches by name")
    return found


def entering(fuse: dict) -> str:
    """{name: method} as --fuse takes it."""
    return " ".join(f"{name}={method}" for name, method in fuse.items()) or "no condition"


def melody_misfits(conditioner: ConditionerConfig, config: ModelConfig, data: dict, codec, target: str) -> list:
    """What of a model with melody and text in front of the codes the target's classes cannot express."""
    n_fft, seconds = 4 * chroma.hop_length(codec.sample_rate), data["segment_frames"] / codec.frame_rate
    frames = chroma.count_frames(int(seconds * codec.sample_rate), codec.sample_rate)
    found = []
    if config.mask_padding:
        found.append("it hides padding in front of the codes, which there is attended to (train with --no-mask_padding)")
    if not conditioner.melody_null_bin0:
        found.append("without a melody it reads zeros, there the first class all along")
    if not conditioner.melody_argmax:
        found.append("its melody is of all twelve classes, there the strongest alone")
    if target == "audiocraft" and n_fft & (n_fft - 1):
        found.append(f"its melody is read in windows of {n_fft} samples, there only in powers of two")
    if target == "audiocraft" and conditioner.melody_frames != frames:
        found.append(f"its melody has {conditioner.melody_frames} frames, there {frames}, those of {seconds:g} s")
    return found


def is_identity(model: dict) -> bool:
    """Whether the text's projection leaves it as it is."""
    weight, bias = (model[f"conditioner.parts.text.output_proj.{leaf}"] for leaf in ("weight", "bias"))
    return torch.equal(weight, torch.eye(len(weight))) and not bias.any()


def write_out(data: dict, target: str, out: Path) -> list:
    """Writes a model (as `read_deployment` gives it) as a folder for hf or audiocraft, or as best.pt for nano -> lines to print.

    Errors: ValueError says what of it the target cannot express."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already: name a new folder")
    stored = dict(channels=1, levels=data["codec"]["K"]) | data["codec"]                 # older files: mono
    codec = tokenizer.load_codec(stored["name"], stored["levels"], "cpu", stored["channels"])
    if codec.fingerprint != stored["fingerprint"]:
        raise ValueError(f"codec {stored['name']} has fingerprint {codec.fingerprint[:12]}, the model was trained on codes of "
                         f"{stored['fingerprint'][:12]}: give that codec by --codec")
    if target != "nano" and (found := misfits(data, codec, target)):
        raise ValueError(f"it cannot be written for {target}: {'; '.join(found)}")
    notes, melody = [], "melody" in (data["conditioner_config"] or {"fuse": {}})["fuse"]
    if target == "hf" and not data["model_config"]["mask_padding"] and not melody:
        notes = ["note: this model attends to padded text, transformers hides it: a batch of texts of several lengths gives other numbers"]
    if target == "audiocraft" and data["model_config"]["mask_padding"]:
        notes = ["note: this model hides padded text, audiocraft attends to it: a batch of texts of several lengths gives other numbers"]
    if target == "hf" and melody:
        notes = ["note: generation_config.json turns use_cache off: with it, transformers 4.57 and others of before its pull request 48679 "
                 "generate without text and melody. Where it is fixed, generate(use_cache=True) is faster"]
    if target == "audiocraft" and melody:
        notes = ["note: audiocraft takes drums and bass out of a melody (demucs) before it reads it"]
    files = dict(hf=hf_files, audiocraft=package_files, nano=nano_files)[target](data, codec)
    out.mkdir(parents=True, exist_ok=True)
    for name, write in files.items():
        write(out / name)
    return notes + [f"wrote {out / name} ({(out / name).stat().st_size / 1e6:.1f} MB)" for name in files]


def nano_files(data: dict, codec) -> dict:
    """{name: function that writes it} of a run's deployment file."""
    return {"best.pt": lambda path: torch.save(data, path)}


def hf_files(data: dict, codec) -> dict:
    """{name: function that writes it} of a folder for transformers.MusicgenForConditionalGeneration and MusicgenProcessor, or for
    MusicgenMelody's."""
    conditioner, pieces = ConditionerConfig(**data["conditioner_config"]), unpack(data["assets"]["text"])
    melody = "melody" in conditioner.fuse
    kind, model_type = ("MusicgenMelody", "musicgen_melody") if melody else ("Musicgen", "musicgen")
    projected = conditioner.text_dim != data["model_config"]["dim"]
    tensors = {}
    for ours, x in data["model"].items():
        names = rename(ours)
        if projected or not names[0].startswith(PROJECTION):
            tensors |= {name: part.contiguous() for name, part in zip(names, x.float().chunk(len(names)))}
    tensors |= {f"audio_encoder.{name}": x for name, x in codec_tensors(codec).items()}
    text = {theirs: getattr(conditioner, ours) for ours, (theirs, _) in T5_CONFIG.items()}
    extra = 100 if conditioner.text_vocab - vocabulary_size(pieces) >= 100 else 0        # T5's <extra_id_N>, which no text has
    config = dict(
        architectures=[f"{kind}ForConditionalGeneration"], model_type=model_type, is_encoder_decoder=not melody, torch_dtype="float32",
        text_encoder=dict(model_type="t5", feed_forward_proj="relu", layer_norm_epsilon=1e-6, dropout_rate=0.0, pad_token_id=0,
                          eos_token_id=1, decoder_start_token_id=0, **text),
        audio_encoder=weights.to_hf_codec_config(codec.config, codec.levels),
        decoder=dict(model_type=f"{model_type}_decoder", **hf_decoder_config(data["model_config"], codec)),
        **(dict(num_chroma=12, chroma_length=conditioner.melody_frames) if melody else {}))
    tokens = dict(tokenizer_class="T5Tokenizer", extra_ids=extra, legacy=True, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                  model_max_length=conditioner.text_max_tokens, additional_special_tokens=[f"<extra_id_{i}>" for i in range(extra)])
    hop = chroma.hop_length(codec.sample_rate)
    processor = dict(processor_class="MusicgenProcessor", feature_extractor_type="EncodecFeatureExtractor", feature_size=codec.channels,
                     sampling_rate=codec.sample_rate, padding_side="left", padding_value=0.0, return_attention_mask=True)
    if melody:                                                       # audio there is what to follow, not what to continue
        processor |= dict(processor_class="MusicgenMelodyProcessor", feature_extractor_type="MusicgenMelodyFeatureExtractor",
                          feature_size=12, num_chroma=12, hop_length=hop, n_fft=4 * hop, padding_side="right", return_attention_mask=False,
                          chunk_length=math.ceil(data["segment_frames"] / codec.frame_rate))

    def save(path):
        from safetensors.torch import save_file
        save_file(tensors, str(path), {"format": "pt"})

    plain = {"config.json": config, "generation_config.json": hf_generation_config(data, codec), "tokenizer_config.json": tokens,
             "preprocessor_config.json": processor}
    return {"model.safetensors": save, "spiece.model": lambda path: path.write_bytes(pieces),
            **{name: lambda path, content=content: path.write_text(json.dumps(content, indent=2) + "\n")
               for name, content in plain.items()}}


def hf_decoder_config(config: dict, codec) -> dict:
    """transformers' configuration of the decoder."""
    return dict(vocab_size=config["card"], hidden_size=config["dim"],
                ffn_dim=config["dim"] * config["hidden_scale"], num_hidden_layers=config["num_layers"],
                num_attention_heads=config["num_heads"], num_codebooks=config["K"],
                audio_channels=codec.streams, activation_function="gelu", scale_embedding=False, dropout=config["dropout"],
                pad_token_id=config["card"], bos_token_id=config["card"], tie_word_embeddings=False)


def hf_generation_config(data: dict, codec) -> dict:
    """transformers' defaults of generation: as the run has them, over a training window."""
    sampling, special = data["sampling"], data["model_config"]["card"]
    chosen = dict(temperature=sampling["temperature"], top_k=sampling["top_k"]) if sampling["temperature"] > 0 else {}
    chosen |= dict(top_p=sampling["top_p"], top_k=0) if chosen and sampling["top_p"] > 0 else {}
    cache = dict(use_cache=False) if "melody" in data["conditioner_config"]["fuse"] else {}          # see `write_out`
    return dict(do_sample=bool(chosen), guidance_scale=sampling["cfg"], max_length=data["segment_frames"] + codec.levels,
                bos_token_id=special, pad_token_id=special, decoder_start_token_id=special, **chosen, **cache)


def codec_tensors(codec) -> dict:
    """A codec's tensors by transformers' names: those of the folder it came from as they stand there, else made of ours."""
    if weights.kind_of(codec.name) == "hf":
        config, tensors, prefix, _ = weights.open_codec(codec.name)
        if config["rvq"]["n_q"] == codec.levels:
            return {name.removeprefix(prefix): tensors[name] for name in tensors.shapes if name.startswith(prefix)}
    state = {name: x for name, x in codec.state_dict().items() if not name.endswith(weights.TRAINING_BUFFERS)}
    return weights.to_hf_codec(state, codec.config, codec.levels)


T5_NAMES = {                                                         # (width, layers, heads, of a head, feed-forward, rows)
    (512, 6, 8, 64, 2048, 32128): "t5-small", (768, 12, 12, 64, 3072, 32128): "t5-base", (1024, 24, 16, 64, 4096, 32128): "t5-large"}


def t5_name(conditioner: dict) -> str | None:
    """The published T5 that a text encoder is, if it was left as it is; None for any other."""
    shape = tuple(conditioner[name] for name in ("text_dim", "text_layers", "text_heads", "text_head_dim", "text_hidden", "text_vocab"))
    return T5_NAMES.get(shape) if conditioner["text_frozen"] else None


def package_files(data: dict, codec) -> dict:
    """{name: function that writes it} of a package of audiocraft. Its configuration is JSON, which is YAML too."""
    config, sampling, special = data["model_config"], data["sampling"], dict(version="1.3.0", exported=True)
    conditioners = dict(description=dict(model="t5", t5=dict(name=t5_name(data["conditioner_config"]), finetune=False, word_dropout=0.0,
                                                             normalize_text=False)))
    model = {package_name(name): x.float() for name, x in data["model"].items() if ".text.encoder." not in name}
    if melody := "melody" in data["conditioner_config"]["fuse"]:
        n_fft = 4 * chroma.hop_length(codec.sample_rate)
        model[WINDOW] = torch.hann_window(n_fft)
        conditioners["self_wav"] = dict(model="chroma_stem", chroma_stem=dict(
            sample_rate=codec.sample_rate, n_chroma=12, radix2_exp=int(math.log2(n_fft)), argmax=True, match_len_on_eval=True,
            eval_wavs=None, n_eval_wavs=0))
    lm = dict(
        sample_rate=codec.sample_rate, channels=codec.channels, lm_model="transformer_lm", compression_model="encodec",
        dataset=dict(segment_duration=data["segment_frames"] / codec.frame_rate),
        transformer_lm=dict(n_q=config["K"], card=config["card"], dim=config["dim"], num_heads=config["num_heads"],
                            num_layers=config["num_layers"], hidden_scale=config["hidden_scale"], dropout=0.0, emb_lr=None,
                            activation="gelu", norm_first=True, bias_ff=False, bias_attn=False, bias_proj=False, causal=True, custom=False,
                            memory_efficient=True, attention_as_float32=False, layer_scale=None, positional_embedding="sin", xpos=False,
                            past_context=None, weight_init="gaussian", depthwise_init="current", zero_bias_init=True, norm="layer_norm",
                            cross_attention=False, qk_layer_norm=False, qk_layer_norm_cross=False, attention_dropout=None, kv_repeat=1,
                            checkpointing="none", two_step_cfg=False),
        codebooks_pattern=dict(modeling="delay", delay=dict(delays=config["delays"] or list(range(config["K"])), flatten_first=0,
                                                            empty_initial=0)),
        classifier_free_guidance=dict(training_dropout=0.0, inference_coef=sampling["cfg"]), attribute_dropout={},
        conditioners=conditioners,
        fuser=dict(cross_attention_pos_emb=False, cross_attention_pos_emb_scale=1, sum=[], input_interpolate=[],
                   prepend=["self_wav", "description"] if melody else [], cross=[] if melody else ["description"]),
        interleave_stereo_codebooks=dict(use=codec.streams == 2, per_timestep=False))
    seanet = {**weights.plain_seanet(codec.config), "norm": "weight_norm", "norm_params": {}, "disable_norm_outer_blocks": 0}
    own = codec.channels // codec.streams
    codec_config = dict(
        sample_rate=codec.sample_rate, channels=own, compression_model="encodec",
        encodec=dict(autoencoder="seanet", quantizer="rvq", sample_rate=codec.sample_rate, channels=own, causal=seanet["causal"],
                     renormalize=False),
        seanet={**seanet, "encoder": {}, "decoder": dict(trim_right_ratio=1.0, final_activation=None, final_activation_params=None)},
        rvq=dict(n_q=codec.levels, bins=codec.card, q_dropout=False, kmeans_init=False, decay=0.99))
    state = {name: x for name, x in codec.state_dict().items() if not name.endswith(weights.TRAINING_BUFFERS)}
    contents = zip(weights.PACKAGE_FILES, ((model, lm), (weights.to_package_codec(state, codec.levels), codec_config)))
    return {name: functools.partial(torch.save, {"best_state": tensors, "xp.cfg": json.dumps(settings, indent=1), **special})
            for name, (tensors, settings) in contents}


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def describe(data: dict) -> list:
    """Lines on what a model is."""
    config, codec = data["model_config"], data["codec"]
    parameters = sum(x.numel() for name, x in data["model"].items() if ".encoder." not in name)
    fuse = (data["conditioner_config"] or {}).get("fuse") or {}
    return [f"model: {parameters / 1e6:.1f}M parameters without text encoder; width {config['dim']}, {config['num_layers']} layers, "
            f"{config['num_heads']} heads; {config['K']} x {config['card']} codes, pattern {config['pattern']}",
            f"conditions: {', '.join(f'{name} ({method})' for name, method in fuse.items()) or 'none'}",
            f"codec: {codec['name']}, fingerprint {codec['fingerprint'][:12]}"]


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Published weights in, ours out.", allow_abbrev=False)
    parser.add_argument("model", help="run folder, best.pt, a Hugging Face folder, or a package of audiocraft")
    parser.add_argument("--to", choices=("hf", "audiocraft", "nano"), help="what to write; without it, say what is there")
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--codec", help="where the codec lies, if it has moved since training or is not in the folder")
    parser.add_argument("--t5", help="folder with the T5 of an audiocraft package (config.json, weights, spiece.model)")
    args = parser.parse_args(argv)
    if bool(args.to) != bool(args.out):
        parser.error("--to and --out go together")
    try:
        path = locate(args.model)
        published = weights.kind_of(path)
        data = read(path, args.t5, args.codec) if published else read_deployment(path)
        if args.codec and not published:
            data["codec"] = {**data["codec"], "name": args.codec}
        try:
            print(*(write_out(data, args.to, Path(args.out)) if args.to else describe(data)), sep="\n")
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:          # a foreign file can fail in any way
            raise ValueError(f"{path}: not {MODEL_FILE}, or damaged ({common.describe_error(error)})") from None
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
