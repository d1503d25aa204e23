"""The toy music is a function of (seed, epoch, index); its analyser hears clean clips and refuses what is none."""

import numpy as np
import pytest
import torch

import toy

ANALYSER = toy.Analyser()


def clips(n, split="valid", seed=5):
    return [toy.sample(seed, 0, i, split) for i in range(n)]


def test_deterministic_and_fresh():
    a, b, c = toy.sample(1, 2, 3), toy.sample(1, 2, 3), toy.sample(1, 3, 3)
    assert np.array_equal(a.wav, b.wav) and a.text == b.text and a.clip == b.clip
    assert not np.array_equal(a.wav, c.wav)
    assert a.wav.shape == (25_600,) and a.wav.dtype == np.float32 and np.abs(a.wav).max() <= 1


@pytest.mark.parametrize("split", ("valid", "heldout"))
def test_analyser_on_clean_clips(split):
    samples = clips(200, split)
    scores = toy.accuracy(ANALYSER(np.stack([s.wav for s in samples])), [s.clip.attributes() for s in samples])
    assert all(v >= 0.97 for v in scores.values()), scores


def test_shuffled_captions_score_at_chance():
    samples = clips(300)
    heard, asked = ANALYSER(np.stack([s.wav for s in samples])), [s.clip.attributes() for s in samples]
    scores = toy.accuracy(heard, asked[1:] + asked[:1])
    assert all(abs(scores[k] - toy.CHANCE[k]) < 0.1 for k in scores), scores


def test_what_is_no_toy_clip_is_none_of_these():
    rng = np.random.default_rng(0)
    t = np.arange(25_600) / toy.SAMPLE_RATE
    noise, silence = 0.1 * rng.standard_normal(25_600), np.zeros(25_600)
    whine, broken = 0.2 * np.sin(2 * np.pi * 5000 * t), np.full(25_600, np.nan)
    heard = ANALYSER(np.stack([noise, silence, whine, broken]).astype(np.float32))
    assert all(h["instrument"] == toy.NONE for h in heard)
    assert set(heard[1].values()) == set(heard[3].values()) == {toy.NONE}
    assert heard[0]["root"] == toy.NONE


def test_held_out_combinations_never_appear_in_training():
    held = {tuple(c.values()) for c in toy.combinations()["heldout"]}
    assert len(held) == 216 and len(toy.combinations()["train"]) == 1944
    for split in ("train", "valid"):
        seen = {tuple(toy.draw(0, e, i, split)[0].attributes().values()) for e in range(5) for i in range(500)}
        assert not held & seen and len(seen) > 1000
    assert {tuple(toy.draw(0, 0, i, "heldout")[0].attributes().values()) for i in range(3000)} == held


def test_captions_name_every_attribute():
    for i in range(200):
        clip, text = toy.draw(0, 0, i)
        for value in clip.attributes().values():
            assert any(word in text for word in toy.WORDS.get(value, (value,))), (value, text)
    assert len({toy.draw(0, 0, i)[1] for i in range(500)}) > 450


def test_unknown_split():
    with pytest.raises(ValueError, match="train, valid, heldout"):
        toy.draw(0, 0, 0, "test")


def test_longer_rendering_repeats_the_tune():
    clip = toy.Clip("chip", "medium", "C", "low", "no", (0, 7, 0, 4, 0, 7, 0, 4))
    wav = toy.render(clip, 6.4)
    assert wav.shape == (102_400,) and np.array_equal(wav[:51_200], wav[51_200:])


def test_analyser_takes_no_short_clips():
    with pytest.raises(AssertionError, match="10240"):
        ANALYSER(torch.zeros(1, 100))


def test_tune_accuracy():
    samples = clips(60)
    right = [toy.tune_accuracy(torch.from_numpy(s.wav), s.clip) for s in samples]
    other = [toy.tune_accuracy(torch.from_numpy(s.wav), o.clip) for s, o in zip(samples, samples[1:] + samples[:1])]
    assert np.mean(right) > 0.97 and np.mean(other) < 0.3, (np.mean(right), np.mean(other))
    assert toy.tune_accuracy(torch.zeros(25_600), samples[0].clip) == 0
