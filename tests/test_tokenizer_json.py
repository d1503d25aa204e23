"""An exported folder in transformers: the same ids by every way of reading it, the same length; it trains.

CI runs this file with transformers 4.57.1 and with the newest release."""

import json
import random
import shutil

import pytest
import sentencepiece
import torch

import toy
import train
from conditioning import fit_sentencepiece
from foreign import TINY, needs_transformers, transformers, write
from interop import convert
from interop.tokenizer_json import sentencepiece_model, tokenizer_json
from support.vocabulary import EOS, clean_text
from test_huggingface import unigram
from test_vocabulary import old_pieces

CAPTIONS = [toy.draw_clip(0, 0, i)[1] for i in range(2000)]
ODD = [
    "", "138 BPM", "１３８ ＢＰＭ", "日本 music 日本日", "İstanbul caddesi", "STRASSE ß ẞ", "ΣΕΑΣ ς",
    "ﬁne ½ ™ é É ～", "e\u0301 E\u0301 Q\u0301 N\u0303a", "ｶﾞ ﾊﾟ", "a\tb\nc\x00d\u200be\u200df",
    "🎵🎶 👩\u200d🎤 a🎵b", "موسيقى هادئة", "नमस्ते", "ภาษาไทย", "<0x41> <0x4A>x", "“x” — …", "Ǆ ǅ ǆ",
    "</s> <pad> <unk> x</s>y <extra_id_5>", "▁a▁b  ▁", "  two   spaces ", "\u00a0nbsp\u3000wide",
    "x" * 3000, "word " * 400]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789   ,.:-'éÉßçÇ日本ñÑ<>/"
random.seed(0)
TEXTS = [*(toy.draw_clip(1, 0, i)[1] for i in range(1000)), *ODD,
         *("".join(random.choices(LETTERS, k=random.randint(1, 60))) for _ in range(300))]
VOCABULARIES = {
    "folded": lambda: fit_sentencepiece(CAPTIONS),
    "merges": lambda: old_pieces(text.lower().replace(" c", " C") for text in CAPTIONS),
    "of T5": lambda: unigram(CAPTIONS)[0]}


def ids_of(pieces: bytes) -> list:
    """What the model reads of each text, with its end."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    return [processor.encode(clean_text(text)) + [EOS] for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run of ours as a folder for transformers."""
    out = tmp_path_factory.mktemp("exported")
    command = [*TINY, "--size", "debug", "--fuse", "text=cross"]
    assert train.main([*command, "--out", str(out / "run")]) == 0
    assert convert.main([str(out / "run"), "--to", "hf", "--out", str(out / "hf")]) == 0
    return out / "hf"


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_there_and_back(tmp_path, kind):
    """By sentencepiece alone: a folder without spiece.model gives the same ids."""
    pieces = VOCABULARIES[kind]()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(pieces)))
    assert ids_of(sentencepiece_model(tmp_path / "tokenizer.json")) == ids_of(pieces)


@needs_transformers
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_ids_are_the_same_by_every_way_of_reading(folder, tmp_path, kind):
    pieces = VOCABULARIES[kind]()
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "spiece.model").write_bytes(pieces)
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer_json(pieces)))
    read = {
        "AutoTokenizer": transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
        "AutoProcessor": transformers.AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer,
        "MusicgenProcessor": transformers.MusicgenProcessor.from_pretrained(tmp_path / "hf").tokenizer,
        "pipeline": transformers.pipeline("text-to-audio", str(tmp_path / "hf"), device="cpu").tokenizer}
    transformers.AutoProcessor.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "again")
    read["saved again"] = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    wanted = ids_of(pieces)
    for name, tokenizer in read.items():
        found = [tokenizer(text).input_ids for text in TEXTS]
        assert [t for t, a, b in zip(TEXTS, found, wanted) if a != b] == [], name
        both = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
        assert set(both) == {"input_ids", "attention_mask"} and both.attention_mask.sum() == sum(
            map(len, wanted[:2]))
    assert ids_of(sentencepiece_model(tmp_path / "again" / "tokenizer.json")) == wanted


@needs_transformers
def test_length_and_training_by_the_folders_own_settings(folder):
    """1.6 s are 80 frames: by `generate` and by the pipeline. A loss of labels is finite and reaches all."""
    model = transformers.MusicgenForConditionalGeneration.from_pretrained(folder)
    inputs = transformers.AutoProcessor.from_pretrained(folder)(
        text=["a slow organ", "fast"], padding=True, return_tensors="pt")
    assert model.generate(**inputs).shape == (2, 1, 80 * 320)
    made = transformers.pipeline("text-to-audio", str(folder), device="cpu")("a slow organ")
    assert made["audio"].size == 80 * 320 and made["sampling_rate"] == 16_000
    check_training(model, inputs)


def check_training(model, inputs) -> None:
    """The loss of labels equals that of codes shifted by hand; every part that learns has a gradient."""
    card, K = model.config.decoder.vocab_size, model.config.decoder.num_codebooks
    labels = torch.randint(0, card, (2, 12, K), generator=torch.Generator().manual_seed(0))
    shifted = torch.full_like(labels, card)
    shifted[:, 1:] = labels[:, :-1]
    given = model(**inputs, decoder_input_ids=shifted.transpose(1, 2).flatten(0, 1)).logits      # [B*K, T, V]
    wanted = torch.nn.functional.cross_entropy(
        given[:, -12:].flatten(0, 1), labels.transpose(1, 2).flatten())
    loss = model(**inputs, labels=labels).loss
    assert abs(float((loss - wanted).detach())) < 1e-4
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for name, x in model.named_parameters()
               if name.startswith(("decoder.", "enc_to_dec_proj.", "text_encoder.")))


@needs_transformers
def test_a_folder_with_melody_trains(tmp_path, capsys):
    command = [*TINY, "--size", "debug", "--conditions", "text", "melody", "--fuse", "melody=prepend",
               "text=prepend", "--no-mask_padding"]
    assert train.main([*command, "--out", str(tmp_path / "run")]) == 0
    write(tmp_path / "run", "hf", tmp_path / "hf", capsys)
    model = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(tmp_path / "hf")
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")(
        text=["a slow organ", "fast"], padding=True, return_tensors="pt")
    check_training(model, inputs)
    assert model.generate(**inputs).shape == (2, 1, 80 * 320)
