"""T5 (Raffel et al. 2020), the text encoder of the published MusicGens: its configuration and its vocabulary.

    folder/config.json       d_model, num_layers ..: text_dim, text_layers .. of a conditioner's flat config
    folder/spiece.model      its pieces, a sentencepiece model, which is what a model of this project keeps
    folder/tokenizer.json    the same pieces by the `tokenizers` library, where there is no spiece.model

The names of its tensors stand in huggingface.py beside those of the language model.
"""

import reprlib
from pathlib import Path

from conditioning import vocabulary_size
from interop.tokenizer_json import sentencepiece_model
from support import common
from support.bounds import check_fields, shown

T5_FIELDS = dict(                              # ours: (transformers' name, its default)
    text_dim=("d_model", 512), text_layers=("num_layers", 6), text_heads=("num_heads", 8),
    text_head_dim=("d_kv", 64), text_hidden=("d_ff", 2048), text_vocab=("vocab_size", 32128),
    text_buckets=("relative_attention_num_buckets", 32),
    text_max_distance=("relative_attention_max_distance", 128))
SHAPE_FIELDS = ("text_dim", "text_layers", "text_heads", "text_head_dim", "text_hidden", "text_vocab")
PUBLISHED_T5 = {                               # SHAPE_FIELDS: name
    (512, 6, 8, 64, 2048, 32128): "t5-small",
    (768, 12, 12, 64, 3072, 32128): "t5-base",
    (1024, 24, 16, 64, 4096, 32128): "t5-large"}


def text_fields(config: dict, where) -> dict:
    """The text's part of a conditioner's flat config for a transformers T5Config.

    Errors: ValueError for another encoder or a variant of T5."""
    if (kind := config.get("model_type")) != "t5":
        raise ValueError(f"{where}: its text encoder is {reprlib.repr(kind)}, 't5' was expected")
    for name, allowed in (("feed_forward_proj", "relu"), ("layer_norm_epsilon", 1e-6)):
        if config.get(name, allowed) != allowed:
            raise ValueError(f"{where}: its T5 has {name} {shown(config[name])}, {allowed} was expected")
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in T5_FIELDS.items()}
    check_fields(where, fields, {ours: theirs for ours, (theirs, _) in T5_FIELDS.items()})
    return fields | dict(text_max_tokens=512, text_frozen=True)


def t5_config(conditioner: dict) -> dict:
    """The transformers T5Config, as a dict, of a conditioner's flat config."""
    fixed = dict(model_type="t5", feed_forward_proj="relu", layer_norm_epsilon=1e-6, dropout_rate=0.0,
                 pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return fixed | {theirs: conditioner[ours] for ours, (theirs, _) in T5_FIELDS.items()}


def published_t5(conditioner: dict) -> str | None:
    """The name of the published T5 that a text encoder is, if it was left as it is; None for any other."""
    shape = tuple(conditioner[name] for name in SHAPE_FIELDS)
    return PUBLISHED_T5.get(shape) if conditioner["text_frozen"] else None


# ----------------------------------------------------------------------------------------------------------
# the vocabulary


def read_vocabulary(folder: Path) -> bytes:
    """T5's sentencepiece model, from spiece.model or tokenizer.json. Errors: ValueError naming the file."""
    path = folder / "spiece.model"
    if path.is_file():
        pieces = path.read_bytes()
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        pieces = sentencepiece_model(path)
    else:
        command = f"hf download google-t5/t5-base spiece.model --local-dir {folder}"
        raise ValueError(f"{path}: no such file: the sentencepiece model of T5 was expected, "
                         f"as in google-t5/t5-base ({command}), or its tokenizer.json")
    try:
        vocabulary_size(pieces)
    except Exception as error:                 # a foreign file can fail in any way
        raise ValueError(f"{path}: not a sentencepiece model ({common.describe_error(error)})") from None
    return pieces
