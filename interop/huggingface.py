"""MusicGen and MusicGen-Melody in the format of transformers, in and out: config.json and model.safetensors.

    theirs                                              ours
    decoder               ── q, k and v packed ──►      emb, transformer, out_norm, linears
    enc_to_dec_proj                                     conditioner.parts.text.output_proj
    audio_enc_to_dec_proj   (MusicGen-Melody)           conditioner.parts.melody.output_proj
    text_encoder            (T5)                        conditioner.parts.text.encoder
    audio_encoder           (EnCodec)                   the codec, see encodec.py

A text model attends to its text. A melody model has both in front of the codes, and nothing is hidden:

    | melody: a class a frame, cut or repeated to the length of a segment | text | codes ..
      null: class 0 all along                                               null: zeros

Legend: K codebooks, D width of the language model.
"""

import math
import re
import reprlib
from pathlib import Path
from typing import NamedTuple

import torch

from support.common import tensor_to_bytes
from interop import t5
from interop.encodec import codec_to_hf
from interop.tensors import TensorFiles, check_shapes, open_hf_folder, write_safetensors
from interop.tokenizer_json import tokenizer_json
from support import chroma, common
from support.bounds import check_fields, shown

SEGMENT_SECONDS = 30.0                                   # what the published models were trained on
TEXT = {"text": "cross"}                                 # how the conditions of the published models enter,
MELODY = {"melody": "prepend", "text": "prepend"}        # and in which order
DECODER_FIELDS = dict(                                   # ours: theirs, in the section of the decoder
    K="num_codebooks", card="vocab_size", dim="hidden_size", num_layers="num_hidden_layers",
    num_heads="num_attention_heads", ffn_dim="ffn_dim")
LAYER = "decoder.model.decoder.layers.{}."
T5_BLOCK = "text_encoder.encoder.block.{}.layer."
NAMES = {                                                # ours: theirs; {} is a number, [qkv] three tensors
    "emb.{}.weight": "decoder.model.decoder.embed_tokens.{}.weight",
    "transformer.layers.{}.self_attn.in_proj_weight": LAYER + "self_attn.[qkv]_proj.weight",
    "transformer.layers.{}.self_attn.out_proj.weight": LAYER + "self_attn.out_proj.weight",
    "transformer.layers.{}.norm1.weight": LAYER + "self_attn_layer_norm.weight",
    "transformer.layers.{}.norm1.bias": LAYER + "self_attn_layer_norm.bias",
    "transformer.layers.{}.cross_attention.in_proj_weight": LAYER + "encoder_attn.[qkv]_proj.weight",
    "transformer.layers.{}.cross_attention.out_proj.weight": LAYER + "encoder_attn.out_proj.weight",
    "transformer.layers.{}.norm_cross.weight": LAYER + "encoder_attn_layer_norm.weight",
    "transformer.layers.{}.norm_cross.bias": LAYER + "encoder_attn_layer_norm.bias",
    "transformer.layers.{}.linear1.weight": LAYER + "fc1.weight",
    "transformer.layers.{}.linear2.weight": LAYER + "fc2.weight",
    "transformer.layers.{}.norm2.weight": LAYER + "final_layer_norm.weight",
    "transformer.layers.{}.norm2.bias": LAYER + "final_layer_norm.bias",
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
    "conditioner.parts.text.encoder.layers.{}.norm1.weight": T5_BLOCK + "0.layer_norm.weight",
    "conditioner.parts.text.encoder.layers.{}.q.weight": T5_BLOCK + "0.SelfAttention.q.weight",
    "conditioner.parts.text.encoder.layers.{}.k.weight": T5_BLOCK + "0.SelfAttention.k.weight",
    "conditioner.parts.text.encoder.layers.{}.v.weight": T5_BLOCK + "0.SelfAttention.v.weight",
    "conditioner.parts.text.encoder.layers.{}.o.weight": T5_BLOCK + "0.SelfAttention.o.weight",
    "conditioner.parts.text.encoder.layers.{}.norm2.weight": T5_BLOCK + "1.layer_norm.weight",
    "conditioner.parts.text.encoder.layers.{}.wi.weight": T5_BLOCK + "1.DenseReluDense.wi.weight",
    "conditioner.parts.text.encoder.layers.{}.wo.weight": T5_BLOCK + "1.DenseReluDense.wo.weight",
    "conditioner.parts.text.encoder.final_norm.weight": "text_encoder.encoder.final_layer_norm.weight",
}
TEXT_ENCODER = "conditioner.parts.text.encoder."         # our names of T5's tensors begin so
PROJECTION = "enc_to_dec_proj."                          # there is none where T5 is as wide as the model
# The codec, which encodec.py reads, and copies of what is there under another name.
IGNORED = r"^audio_encoder\.|embed_positions\.weights$|^text_encoder\.encoder\.embed_tokens\.weight$"
T5_IGNORED = r"^(?!encoder\.block|encoder\.final|shared)"           # its decoder


def hf_names(name: str) -> list:
    """Our name of a tensor -> transformers': one, or q, k and v; [] of what is not there."""
    number = r"(?<=\.)\d+(?=\.)"
    pattern = NAMES.get(re.sub(number, "{}", name))
    if pattern is None:
        return []
    theirs = pattern.format(*re.findall(number, name))
    return [theirs.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in theirs else [theirs]


# ----------------------------------------------------------------------------------------------------------
# in


class PublishedModel(NamedTuple):
    """What the configuration of a published model says, before its weights are read."""
    model: dict                                # flat, of ModelConfig
    conditioner: dict                          # flat, of ConditionerConfig
    channels: int                              # of its audio; each has codebooks of its own
    segment_seconds: float                     # what it was trained on
    sampling: dict                             # what differs from the usual settings of generation


def read_hf_config(folder: Path) -> PublishedModel:
    """The model in a Hugging Face folder. Errors: ValueError naming the setting that is not MusicGen's."""
    config = common.read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("musicgen", "musicgen_melody"):
        raise ValueError(f"{folder}: config.json is of {reprlib.repr(kind)}, "
                         "'musicgen' or 'musicgen_melody' was expected")
    melody = kind == "musicgen_melody"
    try:
        decoder = config["decoder"]
        shape = {ours: decoder[theirs] for ours, theirs in DECODER_FIELDS.items()}
        K, D, heads, hidden = shape["K"], shape["dim"], shape["num_heads"], shape.pop("ffn_dim")
        channels = decoder.get("audio_channels", 1)
        check_fields(folder, {**shape, "ffn_dim": hidden, "channels": channels},
                     DECODER_FIELDS | dict(channels="audio_channels"))
        fixed = dict(activation_function="gelu", scale_embedding=False, tie_word_embeddings=False)
        for name, allowed in fixed.items():
            if decoder.get(name, allowed) != allowed:
                raise ValueError(f"{folder}: its decoder has {name} {shown(decoder[name])}, {allowed} was "
                                 "expected")
        if hidden % D or K % channels or D % heads:
            raise ValueError(f"{folder}: its decoder has ffn_dim {hidden}, hidden_size {D}, {heads} heads, "
                             f"{K} codebooks, {channels} channels, which do not divide")
        model = dict(
            **shape, hidden_scale=hidden // D, cross_attention=not melody, mask_padding=not melody,
            delays=[k // 2 for k in range(K)] if channels == 2 else None)    # 0 0 1 1 ..: left, right at once
        conditioner = dict(fuse=dict(TEXT)) | t5.text_fields(config["text_encoder"], folder)
        if melody:
            classes, frames = config.get("num_chroma", 12), config.get("chroma_length", 235)
            if classes != 12 or not isinstance(frames, int) or frames < 1:
                raise ValueError(f"{folder}: its melody has num_chroma {shown(classes)}, chroma_length "
                                 f"{shown(frames)}; "
                                 "12 and at least 1 were expected")
            check_fields(folder, dict(melody_frames=frames), dict(melody_frames="chroma_length"))
            conditioner |= dict(fuse=dict(MELODY), melody_null_bin0=True, melody_frames=frames)
    except (LookupError, TypeError, AttributeError) as error:
        problem = common.describe_error(error)
        raise ValueError(f"{folder}: config.json is not that of a MusicGen ({problem})") from None
    seconds = config.get("segment_seconds", SEGMENT_SECONDS)         # as write_hf has it
    check_fields(folder / "config.json", dict(segment_seconds=seconds))
    return PublishedModel(model, conditioner, channels, seconds, _read_sampling(folder))


def _read_sampling(folder: Path) -> dict:
    """What generation_config.json says of generate.Sampling."""
    path = folder / "generation_config.json"
    config = common.read_json(path) if path.is_file() else {}
    names = dict(cfg="guidance_scale", temperature="temperature", top_k="top_k", top_p="top_p")
    found = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    check_fields(path, found, names)
    if config.get("do_sample") is False:
        found["temperature"] = 0.0                       # the likeliest
    return found


def read_hf_weights(folder: Path, shapes: dict, projected: bool) -> dict:
    """{our name: tensor} of the model in a Hugging Face folder, T5 included.

    shapes: {our name: shape} of the model; projected: whether T5's width is another than the model's.
    Errors: ValueError listing what does not fit."""
    names = {ours: hf_names(ours) for ours in shapes}
    absent = [] if projected else [ours for ours, theirs in names.items() if theirs[0].startswith(PROJECTION)]
    present = {ours: theirs for ours, theirs in names.items() if ours not in absent}
    state = _read_packed(open_hf_folder(folder), present, shapes, folder, IGNORED)
    for ours in absent:                                  # then it is the identity
        size = shapes[ours]
        state[ours] = torch.eye(size[0]) if len(size) == 2 else torch.zeros(size)
    return {ours: state[ours] for ours in shapes}


def read_t5_weights(folder: Path, shapes: dict) -> dict:
    """{our name: tensor} of the text encoder from a folder that holds T5 alone: see `read_hf_weights`."""
    names = {}
    for ours in shapes:
        if ours.startswith(TEXT_ENCODER):
            names[ours] = [theirs.removeprefix("text_encoder.") for theirs in hf_names(ours)]
    return _read_packed(open_hf_folder(folder), names, shapes, folder, T5_IGNORED)


def _read_packed(tensors: TensorFiles, names: dict, shapes: dict, where, ignored: str) -> dict:
    """{our name: tensor}. names: {our name: their names}, several are stacked."""
    embedding = next((name for [name, *_] in names.values() if name.endswith("shared.weight")), "")
    copy = embedding.replace("shared", "encoder.embed_tokens")       # of which a file may keep either
    if embedding not in tensors.shapes and copy in tensors.shapes:
        names = {ours: [copy] if theirs == [embedding] else theirs for ours, theirs in names.items()}
    wanted = {}
    for ours, theirs in names.items():
        rows, *rest = shapes[ours]
        wanted |= dict.fromkeys(theirs, [rows // len(theirs), *rest])
    check_shapes(where, tensors.shapes, wanted, ignored)
    found = tensors.read(wanted)
    state = {}
    for ours, theirs in names.items():
        parts = [found.pop(name) for name in theirs]     # lets go of them: a large model is not held twice
        state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return state


# ----------------------------------------------------------------------------------------------------------
# out


def write_hf(data: dict, codec, folder: Path) -> None:
    """Writes a folder for Musicgen(Melody)ForConditionalGeneration and Musicgen(Melody)Processor.

    data: what best.pt holds, its configs with all defaults; codec: a tokenizer.Codec."""
    config, conditioner = data["model_config"], data["conditioner_config"]
    pieces = tensor_to_bytes(data["assets"]["text"])
    melody = "melody" in conditioner["fuse"]
    codec_config, codec_tensors = codec_to_hf(codec.config, codec.state_dict(), codec.levels, codec.name)

    # model.safetensors: the model with T5, and the codec
    projected = conditioner["text_dim"] != config["dim"]
    tensors = {}
    for ours, x in data["model"].items():
        names = hf_names(ours)
        if projected or not names[0].startswith(PROJECTION):
            tensors |= {name: part.contiguous() for name, part in zip(names, x.float().chunk(len(names)))}
    tensors |= {f"audio_encoder.{name}": x for name, x in codec_tensors.items()}
    write_safetensors(folder / "model.safetensors", tensors)

    # config.json, generation_config.json
    kind, model_type = ("MusicgenMelody", "musicgen_melody") if melody else ("Musicgen", "musicgen")
    decoder = dict(
        model_type=f"{model_type}_decoder", vocab_size=config["card"], hidden_size=config["dim"],
        ffn_dim=config["dim"] * config["hidden_scale"], num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"], num_codebooks=config["K"], audio_channels=codec.streams,
        activation_function="gelu", scale_embedding=False, dropout=config["dropout"],
        pad_token_id=config["card"], bos_token_id=config["card"], decoder_start_token_id=config["card"],
        tie_word_embeddings=False)
    whole = dict(architectures=[f"{kind}ForConditionalGeneration"], model_type=model_type,
                 is_encoder_decoder=not melody, torch_dtype="float32", text_encoder=t5.t5_config(conditioner),
                 audio_encoder=codec_config, decoder=decoder,
                 segment_seconds=data["segment_frames"] / codec.frame_rate)     # ours, kept by transformers
    if melody:
        whole |= dict(num_chroma=12, chroma_length=conditioner["melody_frames"])
    common.write_json(folder / "config.json", whole, indent=2)
    generation = _generation_config(data, melody, codec.levels)
    common.write_json(folder / "generation_config.json", generation, indent=2)

    # the tokenizer of the text; what reads a T5Tokenizer finds no <extra_id_N> after its pieces
    common.write_atomically(folder / "spiece.model", lambda file: file.write(pieces))
    common.write_json(folder / "tokenizer.json", tokenizer_json(pieces))
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=conditioner["text_max_tokens"], model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True, clean_up_tokenization_spaces=False, extra_ids=0)
    common.write_json(folder / "tokenizer_config.json", tokenizer_config, indent=2)

    # the processor of the audio: what to continue, or of a melody model what to follow
    processor = dict(
        processor_class="MusicgenProcessor", feature_extractor_type="EncodecFeatureExtractor",
        feature_size=codec.channels, sampling_rate=codec.sample_rate, padding_side="left", padding_value=0.0,
        return_attention_mask=True)
    if melody:
        hop = chroma.hop_length(codec.sample_rate)
        processor |= dict(
            processor_class="MusicgenMelodyProcessor",
            feature_extractor_type="MusicgenMelodyFeatureExtractor", feature_size=12, num_chroma=12,
            hop_length=hop, n_fft=4 * hop, padding_side="right", return_attention_mask=False,
            chunk_length=math.ceil(data["segment_frames"] / codec.frame_rate))
    common.write_json(folder / "preprocessor_config.json", processor, indent=2)


def _generation_config(data: dict, melody: bool, levels: int) -> dict:
    """transformers' defaults of generation: as the run has them, over a training window."""
    sampling, special, frames = data["sampling"], data["model_config"]["card"], data["segment_frames"]
    # Both lengths are the same: transformers 5 adds the first token to max_length alone, and the pipeline of
    # 4.57 reads no other.
    config = dict(do_sample=sampling["temperature"] > 0, guidance_scale=sampling["cfg"],
                  max_length=frames + levels, max_new_tokens=frames + levels - 1, bos_token_id=special,
                  pad_token_id=special, decoder_start_token_id=special)
    if config["do_sample"]:
        config |= dict(temperature=sampling["temperature"], top_k=sampling["top_k"])
        if sampling["top_p"] > 0:
            config |= dict(top_p=sampling["top_p"], top_k=0)
    if melody:                                           # see MELODY_NOTES in convert.py
        config["use_cache"] = False
    return config
