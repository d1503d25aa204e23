"""The analyser hears clean toy clips and refuses what is none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tokenizer
import toy
from evaluate import adherence, analyser

ANALYSER = analyser.Analyser()


def clips(n, split="valid", seed=5):
    return [toy.make_clip(seed, 0, i, split) for i in range(n)]


@pytest.mark.parametrize("split", ("valid", "heldout"))
def test_analyser_on_clean_clips(split):
    made = clips(200, split)
    scores = analyser.accuracy(ANALYSER(np.stack([m.wav for m in made])), [m.clip.attributes() for m in made])
    assert all(v >= 0.97 for v in scores.values()), scores


def test_shuffled_captions_score_at_chance():
    made = clips(300)
    heard, asked = ANALYSER(np.stack([m.wav for m in made])), [m.clip.attributes() for m in made]
    scores = analyser.accuracy(heard, asked[1:] + asked[:1])
    assert all(abs(scores[k] - analyser.CHANCE[k]) < 0.1 for k in scores), scores


def test_what_is_no_toy_clip_is_none_of_these():
    rng = np.random.default_rng(0)
    t = np.arange(25_600) / toy.SAMPLE_RATE
    noise, silence = 0.1 * rng.standard_normal(25_600), np.zeros(25_600)
    whine, broken = 0.2 * np.sin(2 * np.pi * 5000 * t), np.full(25_600, np.nan)
    heard = ANALYSER(np.stack([noise, silence, whine, broken]).astype(np.float32))
    assert all(h["instrument"] == analyser.NONE for h in heard)
    assert set(heard[1].values()) == set(heard[3].values()) == {analyser.NONE}
    assert heard[0]["root"] == analyser.NONE


def test_analyser_takes_no_short_clips():
    with pytest.raises(AssertionError, match="10240"):
        ANALYSER(torch.zeros(1, 100))


def test_tune_accuracy():
    made = clips(60)
    heard = lambda m, clip: analyser.tune_accuracy(torch.from_numpy(m.wav), clip)
    right = [heard(m, m.clip) for m in made]
    other = [heard(m, o.clip) for m, o in zip(made, made[1:] + made[:1])]
    assert np.mean(right) > 0.97 and np.mean(other) < 0.3, (np.mean(right), np.mean(other))
    assert analyser.tune_accuracy(torch.zeros(25_600), made[0].clip) == 0


def test_what_is_heard_along_a_piece():
    """Pieces that play what was asked for three seconds, then nothing."""
    def generate(texts, seconds, seed, first):
        drawn = [toy.draw_clip(seed, 0, adherence.FIRST_CLIP + first + i, "valid") for i in range(len(texts))]
        assert [text for _, text in drawn] == list(texts)
        wav = np.stack([toy.render(clip, seconds) for clip, _ in drawn])[:, None]
        wav[..., 3 * toy.SAMPLE_RATE:] = 0
        return torch.from_numpy(wav)

    music = SimpleNamespace(generate=generate, codec=tokenizer.load_codec("toy", None, "cpu", 1))
    rows = adherence.measure_long(music, "valid", 12, 1, 4.6, batch=8)
    assert list(rows) == ["from 0 s", "from 1 s", "from 2 s", "from 3 s", "codec"]
    assert rows["from 0 s"]["tempo"] == rows["from 1 s"]["drums"] == 1 and rows["codec"]["drums"] > 0.9
    assert set(rows["from 3 s"].values()) == {0}
