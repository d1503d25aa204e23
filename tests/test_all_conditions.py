"""Text, melody and style together: what masks and drops them, that what is given is heard, and whole runs."""

import json

import numpy as np
import pytest
import torch

import conditioning
import generate
import train
from generate import Sampling, generate_codes
from support import audio, chroma, resume
from support import style as style_condition
from three_conditions import ALL, CLASSES, style_codes, tiny, tone

# ----------------------------------------------------------------------------------------------------------
# in a model


def test_null_conditions_are_exactly_zero():
    conditioner = tiny().conditioner
    given = dict(melody=CLASSES[:6], style=style_codes(0), text="slow organ")
    out = conditioner(conditioner.prepare([given, {}]))
    assert out.prefix.shape == (2, 6 + 3, 32)
    assert out.prefix_mask[0].all() and not out.prefix_mask[1].any()
    assert out.prefix[0].abs().sum(1).gt(0).all()
    assert out.prefix[1].abs().max() == 0
    assert out.cross[1].abs().max() == 0


@pytest.mark.parametrize("name, values", [
    ("text", ["slow organ", "fast bells"]),
    ("melody", [CLASSES[:6], CLASSES[3:9]]),
    ("style", [style_codes(0), style_codes(1)]),
])
def test_a_condition_that_is_given_is_heard(name, values):
    """Two values, one seed: other codes; and every weight of its conditioner has a gradient."""
    model = tiny({**ALL, "text": "cross+sum"})
    sampling = Sampling(cfg=2, top_k=0)
    drawn = []
    for value in values:
        drawn.append(generate_codes(model, [{name: value}], 20, sampling))
    assert not torch.equal(*drawn)
    model.train()
    inputs = model.conditioner.prepare([{name: v} for v in values])
    model(torch.randint(13, (2, 3, 8)), None, inputs).sum().backward()
    part = model.conditioner.parts[name]
    still = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, still


def test_dropouts_of_three_conditions_are_independent():
    rates, names = dict(text=0.1, melody=0.3, style=0.5), ["melody", "style", "text"]

    def dropped(index, names=names):
        rng = conditioning.random_generator(0, conditioning.CONDITION_DROP_STREAM, 3, index)
        values = conditioning.drop_conditions(dict.fromkeys(names, 1), rng, 0.2, rates)
        return [values[name] is None for name in names]

    got = np.array([dropped(i) for i in range(20_000)])
    for i, name in enumerate(names):
        assert abs(got[:, i].mean() - (0.2 + 0.8 * rates[name])) < 0.012, name
        for j in range(i):
            both = 0.2 + 0.8 * rates[name] * rates[names[j]]
            assert abs((got[:, i] & got[:, j]).mean() - both) < 0.012, (name, names[j])
    # a condition more moves no other's draw
    assert [dropped(i, ["text"])[0] for i in range(500)] == got[:500, 2].tolist()


# ----------------------------------------------------------------------------------------------------------
# in a run

SHORT = ("--size debug --batch_size 4 --updates_per_epoch 2 --epochs 1 --valid_samples 4 --eval_samples 2 "
         "--generate_samples 1 --lr 0.01 --warmup_steps 2 --log_every 1 --device cpu "
         "--segment_seconds 1").split()
SMALL = [*SHORT, "--conditions", "text", "melody", "style"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with all three conditions."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert train.main([*SMALL, "--style_dropout", "0.3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def of_melody(tmp_path_factory):
    """A short run with a melody alone."""
    out = tmp_path_factory.mktemp("runs") / "melody"
    assert train.main([*SHORT, "--conditions", "melody", "--out", str(out)]) == 0
    return out


def test_a_run_keeps_its_statistics(finished):
    """best.pt holds the codebooks; evaluate says what each condition is worth."""
    best = torch.load(finished / "best.pt", weights_only=True)
    last = torch.load(finished / "last.pt", weights_only=True)
    name = "conditioner.parts.style.bottleneck.vectors"
    assert torch.equal(best["model"][name], last["tensors"][f"ema/{name}"])
    assert torch.equal(best["model"][name], last["tensors"][f"model/{name}"])
    assert best["model"][name.replace("vectors", "count")] > 1
    assert "collected" not in str(best["model"].keys())
    evaluated = last["history"][-2]
    assert {"ce_no_text", "ce_shuffled_melody", "ce_no_style", "ce_no_conditions"} <= evaluated.keys()


def test_generate_with_melody_and_style(finished, tmp_path, capsys):
    """The command line and the Python API; the json says what was given; two melodies give two clips."""
    a, b = str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    audio.write_audio(a, tone(60, 16_000)[None], 16_000)
    audio.write_audio(b, tone(67, 16_000)[None], 16_000)
    out = tmp_path / "out"
    flags = ["--run", str(finished), "--seconds", "1.5", "--out", str(out), "--temperature", "1"]
    given = ["--melody", a, b, "--style", b, "--prompt", "fast bells", "--cfg_style", "2"]
    assert generate.main([*flags, *given]) == 0
    records = [json.loads((out / f"00{i}.json").read_text()) for i in (0, 1)]
    assert [r["melody"] for r in records] == [a, b]
    assert records[0]["style"] == b and records[1]["prompt"] == "fast bells"
    music = generate.MusicGenerator.load(finished)
    melodies = [tone(60, 16_000)[None], None]
    wavs = music.generate([None, None], 0.5, melody=melodies, style=tone(67, 16_000)[None])
    assert wavs.shape == (2, 1, 8_000)
    assert not torch.equal(wavs[0], wavs[1])
    assert chroma.main([a]) == 0
    assert style_condition.main([b, "--run", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert " C |@@@" in printed and "level 3 |" in printed


@pytest.mark.parametrize("conditions", (["melody"], ["style"], ["style", "text"]))
def test_any_subset_trains_and_generates(conditions, tmp_path):
    assert train.main([*SHORT, "--conditions", *conditions, "--out", str(tmp_path / "run")]) == 0
    music = generate.MusicGenerator.load(tmp_path / "run")
    assert sorted(music.model.conditioner.parts) == sorted(conditions)
    assert music.generate([None], 0.2).isfinite().all()


def test_a_start_learns_further_conditions(of_melody, tmp_path, monkeypatch, capsys):
    """Its own weights are where it starts from; a style begins anew.

    Cross-attention cannot be added: it is in every layer."""
    seen, new, conditions = {}, [*SMALL, "--init_from", str(of_melody)], ["--conditions", "melody", "style"]
    monkeypatch.setattr(train, "run_epochs", lambda run: seen.update(run=run))
    assert train.main([*new, *conditions, "--out", str(tmp_path / "a")]) == 0
    start = torch.load(of_melody / "best.pt", weights_only=True)["model"]
    model = seen["run"].model.state_dict()
    assert all(torch.equal(x, model[name]) for name, x in start.items())
    fresh = {name for name in model if name not in start}
    assert {name.split(".")[2] for name in fresh} == {"style"}
    assert not any(model[name].is_meta for name in fresh)
    assert model["conditioner.parts.style.output_proj.weight"].std() > 0
    # a text's vocabulary is that of the captions, its shape no other's
    text = ["--conditions", "melody", "text", "--fuse", "melody=prepend", "text=prepend"]
    assert train.main([*new, *text, "--out", str(tmp_path / "text")]) == 0
    conditioner = seen["run"].model.conditioner
    pieces = conditioning.vocabulary_size(conditioner.assets["text"])
    assert conditioner.parts["text"].encoder.embed.num_embeddings == pieces
    # LoRA learns no condition
    assert train.main([*new, *conditions, "--lora", "2", "--out", str(tmp_path / "b")]) == 2
    wanted = "conditions {'melody': 'prepend'} there, {'style': 'prepend', 'melody': 'prepend'} here"
    assert wanted in capsys.readouterr().err
    assert train.main([*new, "--out", str(tmp_path / "c")]) == 2
    assert "cross_attention False there, True here" in capsys.readouterr().err


def test_resume_with_all_conditions_is_exact(finished, tmp_path, monkeypatch):
    """Killed between two updates: the same weights and statistics, bit for bit."""
    class Killed(Exception):
        pass

    save_checkpoint = resume.save_checkpoint

    def save_and_die(run):
        save_checkpoint(run)
        raise Killed

    flags = [*SMALL, "--style_dropout", "0.3", "--save_minutes", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(resume, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train.main(flags)
    monkeypatch.setattr(resume, "save_checkpoint", save_checkpoint)
    assert train.main(flags) == 0
    a, b = (torch.load(out / "last.pt", weights_only=True)["tensors"] for out in (tmp_path, finished))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
