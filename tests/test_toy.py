"""The toy music is a function of (seed, epoch, index); its captions say what it plays."""

from types import SimpleNamespace

import numpy as np
import pytest

import data
import toy


def test_deterministic_and_fresh():
    a, b, c = toy.make_clip(1, 2, 3), toy.make_clip(1, 2, 3), toy.make_clip(1, 3, 3)
    assert np.array_equal(a.wav, b.wav) and a.text == b.text and a.clip == b.clip
    assert not np.array_equal(a.wav, c.wav)
    assert a.wav.shape == (25_600,) and a.wav.dtype == np.float32 and np.abs(a.wav).max() <= 1


def test_training_clips_begin_anywhere_in_their_piece():
    """Two of three, the audio of the piece from there on; without being asked, none."""
    for i in range(40):
        clip = toy.draw_clip(1, 0, i)[0]
        assert toy.make_clip(1, 0, i).clip.start == 0
        made = toy.make_clip(1, 0, i, anywhere=True)
        piece = toy.render(clip, toy.CLIP_SECONDS + 8 * 0.64)
        start = made.clip.start * toy.GRID
        assert np.array_equal(made.wav, piece[start:start + 25_600])
    codec = SimpleNamespace(sample_rate=16_000, channels=1, hop=320)
    starts = {split: [data.ToyDataset(0, split, codec).example(0, i).start_seconds for i in range(100)]
              for split in ("train", "valid")}
    assert 60 < np.count_nonzero(starts["train"]) <= 66 and len(set(starts["train"])) > 50
    assert not any(starts["valid"])                              # the figures of validation stay comparable


def test_held_out_combinations_never_appear_in_training():
    held = {tuple(c.values()) for c in toy.combinations()["heldout"]}
    assert len(held) == 216 and len(toy.combinations()["train"]) == 1944

    def drawn(split, epochs, n):
        clips = [toy.draw_clip(0, e, i, split)[0] for e in range(epochs) for i in range(n)]
        return {tuple(clip.attributes().values()) for clip in clips}

    for split in ("train", "valid"):
        seen = drawn(split, 5, 500)
        assert not held & seen and len(seen) > 1000
    assert drawn("heldout", 1, 3000) == held


def test_captions_name_every_attribute():
    for i in range(200):
        clip, text = toy.draw_clip(0, 0, i)
        for value in clip.attributes().values():
            words = toy.WORDS.get(value, (value,))
            assert any(word.lower() in text.lower() for word in words), (value, text)
    assert len({toy.draw_clip(0, 0, i)[1] for i in range(500)}) > 450


def test_captions_come_in_every_case_and_with_digits():
    """As typed, lower, CAPITALS, Title Case, a capital first: about one in five each."""
    texts = [toy.draw_clip(0, 0, i)[1] for i in range(1000)]
    forms = [text.islower() + 2 * text.isupper() + 4 * text.istitle() for text in texts]
    assert all(forms.count(form) > 130 for form in (1, 2, 4)) and 300 < forms.count(0) < 500, forms
    assert sum(text[0].isupper() and not text.istitle() and not text.isupper() for text in texts) > 130
    assert sum("bpm" in text.lower() for text in texts) > 200


def test_unknown_split():
    with pytest.raises(ValueError, match="train, valid, heldout"):
        toy.draw_clip(0, 0, 0, "test")


def test_longer_rendering_repeats_the_tune():
    clip = toy.Clip("chip", "medium", "C", "low", "no", (0, 7, 0, 4, 0, 7, 0, 4))
    wav = toy.render(clip, 6.4)
    assert wav.shape == (102_400,) and np.array_equal(wav[:51_200], wav[51_200:])
