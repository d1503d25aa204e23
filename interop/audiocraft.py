"""MusicGen and MusicGen-Melody in the format of audiocraft, in and out: a package of two files (package.py).

    state_dict.bin               the language model and what projects its conditions; T5 has its own folder
    compression_state_dict.bin   the codec, see encodec.py

Its names are ours but for the conditioners'. MusicGen-Style's packages are not read: the published one reads
a style by MERT, a network that is not here.

Legend: K codebooks.
"""

import json
import math
from pathlib import Path

import torch

from interop import t5
from interop.encodec import codec_to_package
from interop.huggingface import MELODY, SEGMENT_SECONDS, TEXT, TEXT_ENCODER, PublishedModel, read_t5_weights
from interop.package import PackageSettings, read_package
from interop.tensors import PACKAGE_FILES, check_shapes
from support import chroma, common
from support.bounds import check_fields, shown

CONDITIONERS = "condition_provider.conditioners."
PREFIXES = {                                             # our names begin so: theirs
    "conditioner.parts.text.": CONDITIONERS + "description.",
    "conditioner.parts.melody.": CONDITIONERS + "self_wav."}
MELODY_WINDOW = CONDITIONERS + "self_wav.chroma.spec.window"         # of the melody's FFT, a buffer
TRANSFORMER = dict(                                      # settings that this model has in one way only
    activation="gelu", norm_first=True, bias_ff=False, bias_attn=False, bias_proj=False, causal=True,
    positional_embedding="sin", norm="layer_norm", layer_scale=None, qk_layer_norm=False, kv_repeat=1,
    past_context=None)
SETTINGS = {                                             # the same, by their paths
    "lm_model": "transformer_lm",
    "codebooks_pattern.modeling": "delay",
    "conditioners.description.model": "t5",
    **{f"transformer_lm.{name}": value for name, value in TRANSFORMER.items()}}
SAMPLING_SETTINGS = dict(                                # names of generate.Sampling: theirs
    cfg="classifier_free_guidance.inference_coef", temperature="generate.lm.temp",
    top_k="generate.lm.top_k", top_p="generate.lm.top_p")


def package_tensor_name(name: str) -> str:
    """Our name of a tensor -> audiocraft's."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


# ----------------------------------------------------------------------------------------------------------
# in


def read_package_config(folder: Path, t5_folder: str | Path | None) -> PublishedModel:
    """The model in a package. t5_folder: with its T5.

    Errors: ValueError naming the setting that is not MusicGen's, or saying how to give its T5."""
    path = folder / PACKAGE_FILES[0]
    settings, _ = read_package(path)
    if t5_folder is None:
        name = settings.get("conditioners.description.t5.name", "t5-base")
        raise ValueError(f"{folder}: a package of audiocraft does not hold its T5 ({name}): "
                         f"python -m interop.convert {folder} --t5 T5_FOLDER --to nano --out NEW, "
                         "then give NEW")

    lm = {}
    for name in ("n_q", "card", "dim", "num_heads", "num_layers", "hidden_scale"):
        lm[name] = settings.get(f"transformer_lm.{name}")
        if not isinstance(lm[name], int):
            raise ValueError(f"{path}: its xp.cfg lacks transformer_lm.{name}")
    K, channels = lm.pop("n_q"), settings.get("channels", 1)
    check_fields(path, {"K": K, **lm, "channels": channels}, {"K": "n_q"})
    for name, allowed in SETTINGS.items():
        if (value := settings.get(name, allowed)) != allowed:
            raise ValueError(f"{path}: its {name} is {shown(value)}, {allowed} was expected")
    cross, prepend = settings.get("fuser.cross", []), settings.get("fuser.prepend", [])
    usual = (["description"], []), ([], ["description", "self_wav"]), ([], ["self_wav", "description"])
    if settings.get("fuser.sum", []) or (cross, prepend) not in usual:
        raise ValueError(f"{path}: its fuser has cross {shown(cross)}, prepend {shown(prepend)}; cross "
                         "['description'], or prepend ['self_wav', 'description'] was expected")

    delays = settings.get("codebooks_pattern.delay.delays", list(range(K)))
    check_fields(path, dict(delays=delays), dict(delays="codebooks_pattern.delay.delays"))
    model = dict(K=K, **lm, cross_attention=bool(cross), mask_padding=False,
                 delays=None if delays == list(range(K)) else delays)
    seconds = settings.get("dataset.segment_duration", SEGMENT_SECONDS)
    conditioner = dict(fuse=dict(TEXT))
    conditioner |= t5.text_fields(common.read_json(Path(t5_folder) / "config.json"), t5_folder)
    if prepend:
        conditioner |= _melody_fields(settings, seconds, path)
    sampling = {}
    for ours, theirs in SAMPLING_SETTINGS.items():
        value = settings.get(theirs)
        if value is not None and (ours == "cfg" or settings.get("generate.lm.use_sampling")):
            sampling[ours] = value
    check_fields(path, dict(segment_seconds=seconds) | sampling,
                 SAMPLING_SETTINGS | dict(segment_seconds="dataset.segment_duration"))
    return PublishedModel(model, conditioner, channels, seconds, sampling)


def _melody_fields(settings: PackageSettings, seconds: float, path: Path) -> dict:
    """The melody's part of a conditioner's flat config. Errors: ValueError naming the setting."""
    if (model := settings.get("conditioners.self_wav.model")) == "style":
        raise ValueError(f"{path}: is a MusicGen-Style, which is not read: "
                         "MusicGen or MusicGen-Melody was expected")
    stem = "conditioners.self_wav.chroma_stem"
    rate = settings.get(f"{stem}.sample_rate", settings.get("sample_rate"))
    check_fields(path, dict(sample_rate=rate, segment_seconds=seconds))
    octaves = math.log2(4 * chroma.hop_length(rate))     # of the FFT's window
    for name, found, allowed in (
            ("conditioners.self_wav.model", model, "chroma_stem"),
            (f"{stem}.n_chroma", settings.get(f"{stem}.n_chroma"), 12),
            (f"{stem}.argmax", settings.get(f"{stem}.argmax"), True),
            (f"{stem}.radix2_exp", settings.get(f"{stem}.radix2_exp"), f"{octaves:g}")):
        if shown(found) != shown(allowed):
            raise ValueError(f"{path}: its {name} is {shown(found)}, {allowed} was expected")
    return dict(fuse=dict(MELODY), melody_null_bin0=True,
                melody_frames=chroma.count_frames(int(seconds * rate), rate))


def read_package_weights(folder: Path, t5_folder: Path, shapes: dict) -> dict:
    """{our name: tensor} of the model in a package and of its T5. shapes: {our name: shape}.

    Errors: ValueError listing what does not fit."""
    path = folder / PACKAGE_FILES[0]
    _, tensors = read_package(path)
    names = {ours: package_tensor_name(ours) for ours in shapes if not ours.startswith(TEXT_ENCODER)}
    wanted = {theirs: shapes[ours] for ours, theirs in names.items()}
    check_shapes(path, tensors.shapes, wanted, MELODY_WINDOW)
    state = read_t5_weights(t5_folder, shapes)
    state |= {ours: tensors[theirs] for ours, theirs in names.items()}
    return {ours: state[ours] for ours in shapes}


# ----------------------------------------------------------------------------------------------------------
# out


def write_package(data: dict, codec, folder: Path) -> None:
    """Writes a package for audiocraft.models.MusicGen.get_pretrained. Its settings are JSON, a kind of YAML.

    data: what best.pt holds, its configs with all defaults; codec: a tokenizer.Codec."""
    config, conditioner, sampling = data["model_config"], data["conditioner_config"], data["sampling"]
    melody = "melody" in conditioner["fuse"]
    tensors = {}
    for ours, x in data["model"].items():
        if not ours.startswith(TEXT_ENCODER):
            tensors[package_tensor_name(ours)] = x.float()
    encoder = dict(name=t5.published_t5(conditioner), finetune=False, word_dropout=0.0, normalize_text=False)
    conditioners = dict(description=dict(model="t5", t5=encoder))
    if melody:
        n_fft = 4 * chroma.hop_length(codec.sample_rate)
        tensors[MELODY_WINDOW] = torch.hann_window(n_fft)
        conditioners["self_wav"] = dict(model="chroma_stem", chroma_stem=dict(
            sample_rate=codec.sample_rate, n_chroma=12, radix2_exp=int(math.log2(n_fft)), argmax=True,
            match_len_on_eval=True, eval_wavs=None, n_eval_wavs=0))

    transformer = dict(
        n_q=config["K"], card=config["card"], dim=config["dim"], num_heads=config["num_heads"],
        num_layers=config["num_layers"], hidden_scale=config["hidden_scale"], dropout=0.0, emb_lr=None,
        **TRANSFORMER, custom=False, memory_efficient=True, attention_as_float32=False, xpos=False,
        weight_init="gaussian", depthwise_init="current", zero_bias_init=True, cross_attention=False,
        qk_layer_norm_cross=False, attention_dropout=None, checkpointing="none", two_step_cfg=False)
    delays = config["delays"] or list(range(config["K"]))
    settings = dict(
        sample_rate=codec.sample_rate, channels=codec.channels, lm_model="transformer_lm",
        compression_model="encodec", dataset=dict(segment_duration=data["segment_frames"] / codec.frame_rate),
        transformer_lm=transformer,
        codebooks_pattern=dict(modeling="delay", delay=dict(delays=delays, flatten_first=0, empty_initial=0)),
        classifier_free_guidance=dict(training_dropout=0.0, inference_coef=sampling["cfg"]),
        generate=dict(lm=dict(use_sampling=True, temp=sampling["temperature"],       # 0 is the likeliest
                              top_k=sampling["top_k"], top_p=sampling["top_p"])),
        attribute_dropout={}, conditioners=conditioners,
        fuser=dict(
            cross_attention_pos_emb=False, cross_attention_pos_emb_scale=1, sum=[], input_interpolate=[],
            prepend=["self_wav", "description"] if melody else [], cross=[] if melody else ["description"]),
        interleave_stereo_codebooks=dict(use=codec.streams == 2, per_timestep=False))

    codec_settings, codec_tensors = codec_to_package(codec.config, codec.state_dict(), codec.levels)
    for name, state, config in ((PACKAGE_FILES[0], tensors, settings),
                                (PACKAGE_FILES[1], codec_tensors, codec_settings)):
        text = json.dumps(config, indent=1)
        content = {"best_state": state, "xp.cfg": text, "version": "1.3.0", "exported": True}
        common.write_torch(folder / name, content)
