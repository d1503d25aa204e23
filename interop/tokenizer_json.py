"""A sentencepiece model as tokenizer.json, the format of the `tokenizers` library, and back.

transformers reads a tokenizer.json alike in its releases 4 and 5, without the protobuf package. The text goes
through the same steps as in sentencepiece (and `clean_text` before it):

    text ─normalizer─► folded ─pre_tokenizer─► "▁slow" "▁organ" ─model─► pieces ─post_processor─► pieces, </s>

The library's `Precompiled` normalizer looks up a group of a letter and its accents by what the group begins
with, and loses the accents of a capital; so groups are composed, and capitals made small, before it.
"""

import base64
import re
import struct
from pathlib import Path

from support import common
from support.vocabulary import EOS, FOLDING, PAD, UNK

UNIGRAM, BPE = 1, 2                            # sentencepiece's numbers of a model's kind,
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6    # and of a piece's
COMPOSED = ("nfkc", "nmt_nfkc", "nfkc_cf", FOLDING)                  # its rules that begin with NFKC
# Lowercase and NFKC change two characters that sentencepiece leaves as they are. Characters for private use,
# which no clean text has, stand for them meanwhile.
KEPT = {"İ": "\ue000", "～": "\ue001"}


# ----------------------------------------------------------------------------------------------------------
# out


def tokenizer_json(pieces: bytes) -> dict:
    """What tokenizer.json holds for a serialized sentencepiece model, a Unigram or BPE.

    Errors: ValueError for a model of another kind."""
    fields = _read_fields(pieces)
    training, folding = (dict(_read_fields(dict(fields).get(number, b""))) for number in (2, 3))
    entries = [dict(_read_fields(value)) for number, value in fields if number == 1]
    vocab = [(e[1].decode(), struct.unpack("<f", e.get(2, bytes(4)))[0], e.get(3, NORMAL)) for e in entries]

    # the text's spelling
    rule, table = folding.get(1, b"").decode(), folding.get(2, b"")
    steps = [_replace({"Regex": r"[\p{C}\p{Z}]"}, " ")]                  # clean_text
    if rule in COMPOSED:
        steps += [_replace({"String": c}, other) for c, other in KEPT.items()]
        steps += [{"type": "NFKC"}, *([{"type": "Lowercase"}] if rule.endswith("_cf") else [])]
        steps += [_replace({"String": other}, c) for c, other in KEPT.items()]
    if table:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})

    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    words = [{"type": "WhitespaceSplit"}, space]

    kind = training.get(3, UNIGRAM)
    if kind == UNIGRAM:
        # a text may hold the name of a special piece, which is letters like any other: it is cut before ">"
        names = {"Regex": "(?<=</s|<pad|<unk|<0x[0-9A-F]{2})>"}
        words.append({"type": "Split", "pattern": names, "behavior": "MergedWithNext", "invert": False})
        model = {"type": "Unigram", "unk_id": UNK, "vocab": [[text, score] for text, score, _ in vocab],
                 "byte_fallback": any(piece == BYTE for _, _, piece in vocab)}
    elif kind == BPE:
        model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False,
                 "vocab": {text: i for i, (text, _, _) in enumerate(vocab)}, "merges": _merges(vocab)}
    else:
        raise ValueError(f"a sentencepiece model of kind {kind}, a Unigram ({UNIGRAM}) or BPE ({BPE}) was "
                         "expected")

    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **flags} for i in (PAD, EOS, UNK)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": {
            "type": "TemplateProcessing", "single": end, "pair": end,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]},
        "model": model}


def _replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(vocab: list) -> list:
    """The pairs that make a piece of BPE, the likeliest piece first: sentencepiece keeps the pieces alone."""
    scores = {text: score for text, score, kind in vocab if kind == NORMAL}
    merges = []
    for text in sorted(scores, key=scores.get, reverse=True):
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [list(pair) for pair in halves if pair[0] in scores and pair[1] in scores]
    return merges


def _read_fields(content: bytes) -> list:
    """[(number, value)] of a protocol buffer, in which sentencepiece writes its models: int or bytes."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = content[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        key = varint()
        value = varint() if key & 7 in (0, 2) else {1: 8, 5: 4}[key & 7]
        if key & 7:                                                  # what was read is a length
            value, at = content[at:at + value], at + value
        found.append((key >> 3, value))
    return found


# ----------------------------------------------------------------------------------------------------------
# in


def sentencepiece_model(path: Path) -> bytes:
    """The sentencepiece model that a tokenizer.json was made from: T5's, or one that `tokenizer_json` made.

    Errors: ValueError for a vocabulary of another kind."""
    content = common.read_json(path)
    try:
        model, normalizer = content["model"], content["normalizer"]
        merged = model["type"] == "BPE" and model["unk_token"] == "<unk>"
        if not merged and (model["type"] != "Unigram" or model["unk_id"] != UNK):
            raise ValueError(f"of {model['type']} with unk_id {model.get('unk_id')}")
        steps = normalizer.get("normalizers", [normalizer])
        table = next(step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled")
        vocab = model["vocab"]
        if merged:                             # whose score is its place
            vocab = [(piece, -i) for i, piece in enumerate(sorted(vocab, key=vocab.get))]
        pieces = [(piece, score) for piece, score in vocab
                  if not re.fullmatch(r"<extra_id_\d+>", piece)]                 # no text has these
        if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
            raise ValueError(f"begins with {[piece for piece, _ in pieces[:3]]}")

        # sentencepiece's ModelProto: field 1 is a piece (text, log-probability, kind), once for each
        fields = []
        for i, (piece, score) in enumerate(pieces):
            kind = (CONTROL, CONTROL, UNKNOWN)[i] if i < 3 else NORMAL
            if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                kind = BYTE
            fields.append(_field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, kind)))
        # 2: the settings of its training: its kind, with bytes or without; the ids of unknown, begin (none),
        # end and padding
        ids = _field(40, UNK) + _field(41, -1) + _field(42, EOS) + _field(43, PAD)
        kind = _field(3, BPE if merged else UNIGRAM) + _field(35, int(model.get("byte_fallback", 0)))
        fields.append(_field(2, kind + ids))
        # 3: normalization by a table; then a space in front, no double spaces, "▁" for a space
        switches = _field(3, 1) + _field(4, 1) + _field(5, 1)
        rule = FOLDING if any(step["type"] == "Lowercase" for step in steps) else "nmt_nfkc"
        fields.append(_field(3, _field(1, rule.encode()) + _field(2, base64.b64decode(table)) + switches))
        return b"".join(fields)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration, struct.error,
            RecursionError) as error:
        raise ValueError(f"{path}: not the vocabulary of T5 ({common.describe_error(error)}): "
                         "pieces of a Unigram that begin with <pad>, </s>, <unk> were expected") from None


def _field(number: int, value) -> bytes:
    """A field of a protocol buffer: an int, a float or bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the low ones first, each but the last marked."""
    return bytes([value & 127 | 128]) + _varint(value >> 7) if value > 127 else bytes([value])
