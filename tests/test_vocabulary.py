"""The vocabulary: spellings of one text are read alike, two texts apart, and what it cannot say is named."""

import io
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

import conditioning
import generate
import toy
import train
from support import takes, vocabulary
from support.vocabulary import fit_sentencepiece

HERE = Path(__file__).parent
CAPTIONS = [toy.draw_clip(0, 0, i)[1] for i in range(500)]
PIECES = sentencepiece.SentencePieceProcessor(model_proto=fit_sentencepiece(CAPTIONS))


def old_pieces(captions) -> bytes:
    """A vocabulary as older runs have it: of merges, without folding and without bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=out, vocab_size=200, model_type="bpe",
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return out.getvalue()


@pytest.mark.parametrize("text", [CAPTIONS[0], "Émile's 138 BPM, naïve", "дом и лес ΣΕΑΣ", "日本の drums"])
def test_case_and_width_are_folded(text):
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    forms = [text.lower(), text.title(), text.upper(), text[0].upper() + text[1:], wide, f" {text}  "]
    assert all(PIECES.encode(form) == PIECES.encode(text) for form in forms)


def test_no_text_is_unknown_and_no_two_texts_are_one():
    texts = ["138 BPM", "140 BPM", "1380 BPM", "日本", "本日", "дом", "мод", "🎵", "🎶", "zither", "z", "C#",
             "C♯", "Sigur Rós", "موسيقى", "<unk>", "</s>", "<pad>", "<0x41>", "a\u0301\u0323"]
    rows = [tuple(PIECES.encode(text)) for text in texts]
    assert len(set(rows)) == len(rows) and not any(vocabulary.UNK in row or 1 in row for row in rows)
    assert all(PIECES.decode(list(row)) == PIECES.normalize(t).replace("▁", " ").strip()
               for t, row in zip(texts, rows))
    # numbers are read digit by digit, so that near ones look alike
    shared = len(set(PIECES.encode("138 BPM")) & set(PIECES.encode("139 BPM")))
    assert shared == len(PIECES.encode("138 BPM")) - 1


def test_words_of_the_captions_are_one_piece_each():
    """Also where a word stands in one place of every caption, or there is one caption."""
    for captions in (CAPTIONS, ["slow organ"], ["fast bells", "a calm harp"]):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=fit_sentencepiece(captions))
        for word in {w.strip(",:").lower() for text in captions for w in text.split()}:
            if word.isalpha():
                assert len(pieces.encode(word)) == 1, word


def test_what_a_vocabulary_cannot_say_is_named():
    old = sentencepiece.SentencePieceProcessor(model_proto=old_pieces(["slow organ with drums 1"] * 9))
    assert vocabulary.reading_notes(old, "slow organ", 256) == []
    notes = vocabulary.reading_notes(old, "Slow organ 138 日本 BPM BPM", 256)
    assert notes == ["not in the vocabulary: Slow, 138, 日本, BPM (all one unknown piece to this model)"]
    notes = vocabulary.reading_notes(PIECES, "Slow ORGAN Ｄrums 日本", 256)
    assert notes == ["not in the vocabulary: 日本 (spelled in bytes, which few captions had)"]
    many = vocabulary.reading_notes(old, " ".join(f"Ä{i}" for i in range(20)), 256)
    assert len(many) == 1 and "Ä9 and 10 more" in many[0]


def test_a_text_cut_off_is_named():
    """At the very length at which the model loses a piece."""
    part = conditioning.Text(conditioning.TextConfig(vocab=len(PIECES), max_tokens=20), 8,
                             PIECES.serialized_model_proto())
    for words, cut in ((19, False), (20, True), (300, True)):
        text = " ".join(["slow"] * (words - 1) + ["harp"])
        ids, _ = part.prepare([text])
        assert ids.shape[1] == 20 and (PIECES.encode("harp")[0] not in ids[0]) == cut
        assert [f"cut off: {words} pieces of 19" in note for note in part.remarks(text)] == [True] * cut
    assert vocabulary.caption_notes(PIECES.serialized_model_proto(), ["slow"] * 3 + ["slow " * 20], 20) == [
        "text: 1 of 4 captions are longer than 19 pieces; the rest of them is not read"]


@pytest.mark.parametrize("old", [False, True])
def test_commands_name_it(tmp_path, capsys, old):
    """generate.py and conditioning.py, one line to stderr, of a run of today and of an old one."""
    run = tmp_path / "run"
    shutil.copytree(HERE / "old_run", run)
    if not old:
        content = torch.load(run / "best.pt", weights_only=True)
        pieces = fit_sentencepiece(["slow organ", "fast bells"], 20)
        content["assets"]["text"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
        rows = vocabulary.vocabulary_size(pieces)
        name = "conditioner.parts.text.encoder.embed.weight"
        content["model"][name] = torch.randn(rows, content["model"][name].shape[1])
        content["conditioner_config"]["text_vocab"] = rows
        torch.save(content, run / "best.pt")
    asked = ["--run", str(run), "--seconds", "0.2", "--out", str(tmp_path / "out"), "--n", "2"]
    assert generate.main([*asked, "--prompt", "Slow Organ 日本"]) == 0
    named = "日本 (spelled in bytes, which few captions had)"
    if old:
        named = "Slow, Organ, 日本 (all one unknown piece to this model)"
    said = f"generate.py: text 'Slow Organ 日本': not in the vocabulary: {named}\n"
    assert capsys.readouterr().err == said
    assert conditioning.main(["Slow Organ 日本 " * 90, "--run", str(run)]) == 0
    out, err = capsys.readouterr()
    assert named in err and "cut off" in err and len(out.splitlines()[2].split()) == 256
    heard, music = [], generate.MusicGenerator.load(run, "cpu")
    takes.perform(music, takes.page_fields(music, 0.2) | dict(text="Slow Organ 日本"), remark=heard.append)
    assert len(heard) == 1 and named in heard[0] and heard[0].startswith("text 'Slow")


def test_training_counts_captions_that_are_cut_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "TEMPLATES", ("{tempo} " * 300 + "{register} {instrument} {root} {drums}",))
    flags = ("--size debug --batch_size 2 --updates_per_epoch 1 --epochs 1 --valid_samples 2 --device cpu "
             "--eval_samples 1 --generate_samples 1 --text_vocab 60 --warmup_steps 0 --seed 77")
    assert train.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.count("text: 4000 of 4000 captions are longer than 255 pieces; the rest") == 1
