"""Text encoder, dropouts per sample, metadata merging, fusing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import conditioning
from conditioning import Conditioner, ConditionerConfig

CAPTIONS = 20 * [
    "a slow organ tune with drums",
    "fast bells, no percussion",
    "a calm harp in the key of C sharp major"]
PIECES = conditioning.fit_sentencepiece(CAPTIONS, 120)


def make(**changes) -> Conditioner:
    torch.manual_seed(0)
    vocab = conditioning.vocabulary_size(PIECES)
    config = ConditionerConfig(text_vocab=vocab, text_dim=32, text_hidden=64, **changes)
    return Conditioner(config, 48, {"text": PIECES}).eval()


def encode(c: Conditioner, *texts):
    return c(c.prepare([{"text": t} for t in texts]))


def test_null_text_is_exactly_zero():
    out = encode(make(), "a slow organ", None, "")
    assert out.cross[0].abs().sum() > 0
    assert out.cross[1:].abs().max() == 0
    assert not out.cross_mask[1:].any()


def test_text_does_not_depend_on_its_neighbors():
    c = make()
    alone = encode(c, "a slow organ")
    together = encode(c, "a slow organ", "a calm harp in the key of C sharp major, fast bells")
    L = alone.cross.shape[1]
    assert together.cross.shape[1] > L
    assert torch.allclose(alone.cross[0], together.cross[0, :L], atol=1e-6)
    assert together.cross[0, L:].abs().max() == 0


def test_two_texts_differ_and_have_gradients():
    c = make()
    out = encode(c, "a slow organ", "fast bells")
    assert not torch.allclose(out.cross[0, 0], out.cross[1, 0])
    out.cross.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in c.named_parameters())


@pytest.mark.parametrize("text", [
    "\0\0", "🎵🎶 music", "موسيقى هادئة", "x" * 20_000, "word " * 100_000, "a\nb\tc"])
def test_hostile_texts(text):
    c = make()
    ids, mask = c.prepare([{"text": text}])["text"]
    assert ids.shape[1] <= c.config["text"].max_tokens and ids.max() < c.config["text"].vocab
    assert encode(c, text).cross.isfinite().all()


def test_relative_buckets_by_hand():
    """Half the buckets for each direction, one each up to a quarter, logarithmic to the maximal distance."""
    b = conditioning.relative_buckets(200, 32, 128, "cpu")
    assert b[0, 0] == 0 and b[7, 0] == 7  # the key before the query
    assert b[8, 0] == 8 and b[127, 0] == 15 and b[199, 0] == 15
    assert b[0, 7] == 16 + 7 and b[0, 199] == 31  # the key after the query
    assert (b[1:, 0].diff() >= 0).all()


def test_dropout_frequencies_and_independence():
    """CFG and attribute dropout fall per sample at their own rates, independently of each other."""
    def dropped(step, index, cfg, alone):
        rng = conditioning.random_generator(0, conditioning.CONDITION_DROP_STREAM, step, index)
        out = conditioning.drop_conditions({"text": 1, "melody": 2}, rng, cfg, alone)
        return [out["text"] is None, out["melody"] is None]

    got = np.array([dropped(s, i, 0.2, {"melody": 0.5}) for s in range(100) for i in range(100)])
    both, melody_only = got.all(1).mean(), (got[:, 1] & ~got[:, 0]).mean()
    assert abs(both - 0.2) < 0.015 and abs(melody_only - 0.8 * 0.5) < 0.02
    # text is never dropped alone: its rate is 0
    assert not (got[:, 0] & ~got[:, 1]).any()
    # per sample, not per batch
    per_step = got[:, 0].reshape(100, 100).mean(1)
    assert 0.05 < per_step.min() and per_step.max() < 0.4
    twice = [dropped(3, 7, 0.2, {"melody": 0.5}) for _ in range(2)]
    assert twice[0] == twice[1]


def test_training_attributes_depend_on_seed_step_and_index_alone():
    meta = {"description": "a slow organ tune with drums and more",
            "genre": "rock", "bpm": 120.0, "moods": ["calm", "dark"]}
    conditioner, codes, frames = make(), torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool)
    args = dict(merge_text_p=0.5, drop_desc_p=0.5, keep_other_p=0.5,
                cfg_dropout=0.1, text_dropout=0.1, word_dropout=0.3)

    def draw(seed, step, index):
        example = SimpleNamespace(meta=meta, index=index)
        flags = SimpleNamespace(seed=seed, **args)
        values, _ = conditioner.example_values([example], codes, frames, flags, None, step)
        return values[0]["text"]

    table = {(s, i): draw(0, s, i) for s in range(10) for i in range(8)}
    # another order, as other ranks would have
    shuffled = sorted(table, key=lambda k: (k[1], -k[0]))
    assert all(draw(0, *key) == table[key] for key in shuffled)
    assert len(set(table.values())) > 20
    assert draw(1, 0, 0) != draw(0, 0, 0)


def test_merge_metadata():
    meta = {"description": "A cool song.", "key": "c major", "bpm": 120.0, "genre": "rock",
            "moods": ["happy", "dark"], "keywords": ["a", "b"], "instrument": "mix", "title": "not merged"}

    def merge(**p):
        return conditioning.merge_metadata(meta, np.random.default_rng(1), **p)

    assert merge(merge_text_p=0) == "A cool song."
    full = merge(merge_text_p=1, drop_desc_p=0, keep_other_p=1)
    assert full.startswith("A cool song. ") and "not merged" not in full
    assert sorted(full[len("A cool song. "):].split(". ")) == [
        "bpm: 120.0", "genre: rock", "instrument: mix", "key: c major",
        "keywords: a, b", "moods: happy, dark"]
    assert merge(merge_text_p=1, drop_desc_p=1, keep_other_p=0) is None
    assert "cool" not in merge(merge_text_p=1, drop_desc_p=1, keep_other_p=1)
    assert conditioning.full_text({"genre": "rock"}) == "genre: rock" and conditioning.full_text({}) is None


def test_word_dropout():
    rng = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in range(2000))
    kept = conditioning.drop_words(text, 0.3, rng).split()
    assert 0.65 < len(kept) / 2000 < 0.75
    assert kept == [w for w in text.split() if w in set(kept)]
    assert conditioning.drop_words(None, 0.3, rng) is None
    assert conditioning.drop_words("a b", 1.0, rng) == ""


@pytest.mark.parametrize("method, part", [("cross", "cross"), ("prepend", "prefix"), ("sum", "summed")])
def test_every_fuse_method_reaches_the_model(method, part):
    out = encode(make(fuse={"text": method}), "a slow organ", None)
    assert getattr(out, part) is not None
    assert sum(v is not None for v in (out.cross, out.prefix, out.summed)) == 1
    if method == "sum":
        assert out.summed.shape == (2, 1, 48)
        assert out.summed[1].abs().max() == 0


def test_several_fuse_methods_at_once():
    both, cross = (encode(make(fuse={"text": m}), "a slow organ", None) for m in ("cross+sum", "cross"))
    assert torch.equal(both.cross, cross.cross)
    assert both.summed[0].abs().sum() > 0
    assert both.summed[1].abs().max() == 0
    tokens = int(cross.cross_mask[0].sum())
    assert torch.allclose(both.summed[0, 0], cross.cross[0].sum(0) / tokens ** 0.5, atol=1e-5)


def test_vocabulary_round_trip_and_cap():
    pieces = conditioning.fit_sentencepiece(CAPTIONS, 4000)
    assert conditioning.vocabulary_size(pieces) < 400
    assert pieces == conditioning.fit_sentencepiece(CAPTIONS, 4000)  # deterministic
    with pytest.raises(ValueError, match="no captions"):
        conditioning.fit_sentencepiece(["", None, "\0"])


@pytest.mark.parametrize("fuse", [{"text": "nowhere"}, {"text": "cross+"}, {"text": ""}, {"smell": "cross"}])
def test_bad_fuse(fuse):
    with pytest.raises(ValueError, match="choose from"):
        ConditionerConfig(fuse=fuse)
