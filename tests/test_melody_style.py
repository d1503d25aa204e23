"""Melody and style: chroma against its definition, the token cache against live audio, the bottleneck's statistics, what masks
and drops them, and that what is given is heard."""

import math
import os
from types import SimpleNamespace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import audio, chroma
import conditioning
import data
import generate
import tokenizer
import train
from support.cache import make_cache
from support.chroma import Chroma
from conditioning import Conditioner, ConditionerConfig
from generate import Sampling, generate_codes, generate_long
from model import ModelConfig, MusicGen
from support import resume
from support import style as style_condition
from support.melody import melody_window
from support.style import Bottleneck, excerpt_place

RATE, F12 = 32_000, torch.eye(12)
PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)
SHAPE = dict(text_vocab=conditioning.vocabulary_size(PIECES), text_dim=16, text_hidden=32, melody_frames=6, melody_rate=0.5,
             style_codebooks=2, style_card=13, style_dim=32, style_layers=2, style_heads=2, style_levels=2, style_bins=8, style_every=2,
             style_frames=6)
ALL = {"melody": "prepend", "style": "prepend", "text": "cross"}


def tiny(fuse=ALL, **changes) -> MusicGen:
    torch.manual_seed(1)
    conditioner = Conditioner(ConditionerConfig(fuse=fuse, **{**SHAPE, **changes}), 32, {"text": PIECES})
    return MusicGen(ModelConfig(K=3, card=13, dim=32, num_layers=2, num_heads=2, emb_std=1.0), conditioner).eval()


def tone(midi: int, rate: int = RATE, seconds: float = 2.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * 440 * 2 ** ((midi - 69) / 12) * torch.arange(round(seconds * rate)) / rate)


def style(seed: int, length: int = 6) -> torch.Tensor:
    return torch.randint(13, (3, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# chroma


@pytest.mark.parametrize("rate", (16_000, 22_050, 24_000, 32_000, 44_100))
def test_chroma_of_a_tone_is_its_class_and_of_silence_nothing(rate):
    assert 4 * chroma.hop_length(rate) / rate == pytest.approx(0.512, abs=1e-4) and chroma.count_frames(30 * rate, rate) == 235
    for midi in (48, 60, 69, 82):
        found = chroma.chromagram(tone(midi, rate), rate)
        assert found.shape == (chroma.count_frames(2 * rate, rate), 12) and found.amax(1).eq(1).all()
        assert (found.argmax(1) == midi % 12).all()
    assert chroma.chromagram(torch.zeros(2, 2 * rate), rate).abs().max() == 0
    assert chroma.chromagram(1e-6 * tone(60, rate), rate).abs().max() == 0                         # 120 dB below full scale


def test_silent_frames_are_no_class():
    """Half silence, half a tone: an argmax alone would hear a C in the silence."""
    found = chroma.strongest(chroma.chromagram(torch.cat([torch.zeros(2 * RATE), tone(62)]), RATE))
    assert found[:12].abs().max() == 0 and torch.equal(found[-12:], F12[[2] * 12])


def test_short_audio_is_padded_to_a_window():
    for samples in (1, 500, 4 * 4096 - 1, 4 * 4096):
        assert chroma.chromagram(tone(60)[:samples], RATE).shape == (chroma.count_frames(samples, RATE), 12) == (5, 12)


def test_chroma_against_librosa():
    librosa = pytest.importorskip("librosa")
    for rate in (16_000, 24_000, 32_000, 44_100):
        n_fft = 4 * chroma.hop_length(rate)
        theirs = librosa.filters.chroma(sr=rate, n_fft=n_fft, tuning=0, n_chroma=12)
        assert np.abs(chroma.filterbank(rate, n_fft).numpy() - theirs).max() < 1e-6
    wav = np.random.default_rng(0).normal(size=3 * RATE).astype(np.float32) / 5
    power = np.abs(librosa.stft(wav, n_fft=16384, hop_length=4096, pad_mode="reflect")) ** 2
    theirs = librosa.util.normalize(librosa.filters.chroma(sr=RATE, n_fft=16384, tuning=0) @ power, norm=np.inf, axis=0)
    assert np.abs(chroma.chromagram(torch.from_numpy(wav), RATE).numpy().T - theirs).max() < 1e-4


@pytest.mark.parametrize("pieces", ([0, 10, 20, 33], [0, 16, 33]))
def test_chroma_in_pieces_is_that_of_the_whole_file(pieces):
    """With two seconds on both sides, as the token cache reads them."""
    wav = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 33 * 16_000)).astype(np.float32))
    whole, found = chroma.chromagram(wav, 16_000), []
    for start, stop in zip(pieces, pieces[1:]):
        left, last = min(start, 2), stop == pieces[-1]
        piece = wav[:, (start - left) * 16_000:(stop + 2) * 16_000]
        found.append(chroma.part_of_file(piece, (start - left) * 16_000, start * 16_000, None if last else stop * 16_000, 16_000))
    assert torch.cat(found).shape == whole.shape and (torch.cat(found) - whole).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# data: live and from the cache


def songs(folder: Path, seconds=(7.0, 12.3)) -> Path:
    """Files whose pitch changes every half a second."""
    folder.mkdir()
    for i, length in enumerate(seconds):
        notes = np.random.default_rng(i).integers(48, 84, math.ceil(2 * length))
        wav = torch.cat([tone(int(n), 16_000, 0.5) for n in notes])[None, :round(length * 16_000)]
        audio.write_audio(folder / f"song{i}.wav", wav, 16_000)
        (folder / f"song{i}.txt").write_text(f"a slow song, number {i}, with bells")
    return folder


def test_chroma_from_the_cache_against_live_audio(tmp_path, capsys):
    """Frames begin up to half a hop beside the segment's and its edges hear what lies beyond: the rest is the same melody."""
    root, out = songs(tmp_path / "songs"), str(tmp_path / "codes")
    codec = tokenizer.load_codec("toy")
    features = {"chroma": Chroma()}
    make_cache(str(root), out, codec, features=features)
    both = [data.open_dataset(str(root), 0.5, "train", 3.0, codec, features=features, cache=c) for c in (None, out)]
    same, inner, count = 0, 0, 0
    for index in range(12):
        live, cached = (d.example(0, index) for d in both)
        assert live.start_seconds == cached.start_seconds
        heard, stored = live.features["chroma"], cached.features["chroma"]
        assert abs(len(heard) - len(stored)) <= 1  # at a file's end
        assert heard.dtype == stored.dtype == np.float32
        frames = min(len(heard), len(stored))
        a, b = (torch.from_numpy(x[:frames]).argmax(1) for x in (heard, stored))
        same, inner, count = same + (a == b).sum().item(), inner + (a == b)[2:-2].sum().item(), count + len(a)
    print(f"frames of the same class: {same / count:.3f}, without the two at each edge {inner / (count - 12 * 4):.3f}")
    assert same / count > 0.7 and inner / (count - 12 * 4) > 0.8
    # longer than the song: from its start
    whole = data.CacheDataset(out, codec, 30.0, 0, split="train", valid=0.5, features=features)
    live = data.open_dataset(str(root), 0.5, "train", 30.0, codec, features=features)
    a, b = whole.example(0, 0), live.example(0, 0)
    largest = np.abs(a.features["chroma"] - b.features["chroma"]).max()
    assert a.start_seconds == b.start_seconds == 0 and largest < 2e-3, largest


def test_a_cache_of_before_chroma_trains_with_text_alone(tmp_path):
    codec, root, out = tokenizer.load_codec("toy"), str(songs(tmp_path / "songs", (1.6, 1.6, 1.6))), str(tmp_path / "codes")
    features, whole = {"chroma": Chroma()}, dict(codec=codec, min_segment_ratio=1.0)
    make_cache(root, out, codec, features=features)
    cached = data.open_dataset(root, **whole, features=features, cache=out).example(0, 0)
    live = data.open_dataset(root, **whole, features=features).example(0, 0)
    assert live.path == cached.path
    # a whole clip: float16's rounding
    assert np.abs(live.features["chroma"] - cached.features["chroma"]).max() < 1e-3
    with pytest.raises(ValueError, match="drums and bass"):
        data.open_dataset(root, codec=codec, features={"chroma": Chroma(stems=True)}, cache=out)
    for path in Path(out).glob("*.chroma.npy"):
        path.unlink()
    assert data.open_dataset(root, codec=codec, cache=out).example(0, 0).features == {}
    with pytest.raises(ValueError, match="holds no chroma, which melody needs: make another"):
        data.open_dataset(root, codec=codec, features=features, cache=out)


# ---------------------------------------------------------------------------------------------------------------------
# conditioners


def test_null_conditions_are_exactly_zero():
    model = tiny()
    out = model.conditioner(model.conditioner.prepare([dict(melody=F12[:6], style=style(0), text="slow organ"), {}]))
    assert out.prefix.shape == (2, 6 + 3, 32) and out.prefix_mask[0].all() and not out.prefix_mask[1].any()
    assert out.prefix[0].abs().sum(1).gt(0).all() and out.prefix[1].abs().max() == 0 and out.cross[1].abs().max() == 0


def test_the_public_weights_null_melody():
    model = tiny(melody_null_bin0=True)
    part = model.conditioner.parts["melody"]
    chroma_, mask = part.prepare([None, F12[3:5], torch.zeros(6, 12)])
    assert mask.all() and torch.equal(chroma_[0], F12[[0] * 6]) and torch.equal(chroma_[1], F12[[3, 4, 0, 0, 0, 0]])
    assert torch.equal(chroma_[2], F12[[0] * 6])


def test_melody_is_cut_padded_and_its_strongest_class_taken():
    soft = F12[:9] * 0.7 + 0.3
    part = tiny().conditioner.parts["melody"]
    values, mask = part.prepare([soft, soft[:2].numpy().astype(np.float16)])
    assert torch.equal(values[0], F12[:6]) and torch.equal(mask.sum(1), torch.tensor([6, 2]))
    values, _ = tiny(melody_argmax=False).conditioner.parts["melody"].prepare([soft])
    assert torch.equal(values[0], soft[:6])


def test_a_melody_begins_again_after_its_end():
    assert melody_window(F12[:5], 3, 7).argmax(1).tolist() == [3, 4, 0, 1, 2, 3, 4]


def test_style_does_not_depend_on_its_neighbours():
    part = tiny().conditioner.parts["style"]
    alone, together = (part(*part.prepare(v))[0][0] for v in ([style(0, 4)], [style(0, 4), style(1, 11), None]))
    assert together.shape[0] == 6 and torch.allclose(alone, together[:2], atol=1e-5) and together[2:].abs().max() == 0


@pytest.mark.parametrize("name, values", [("text", ["slow organ", "fast bells"]), ("melody", [F12[:6], F12[3:9]]),
                                          ("style", [style(0), style(1)])])
def test_a_condition_that_is_given_is_heard(name, values):
    """Two values, one seed: other codes; and every weight of its conditioner has a gradient."""
    model = tiny({**ALL, "text": "cross+sum"})
    drawn = [generate_codes(model, [{name: v}], 20, Sampling(cfg=2, top_k=0), generator=torch.Generator().manual_seed(0)) for v in values]
    assert not torch.equal(*drawn)
    model.train()
    model(torch.randint(13, (2, 3, 8)), None, model.conditioner.prepare([{name: v} for v in values])).sum().backward()
    part = model.conditioner.parts[name]
    still = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, still


def test_dropouts_of_three_conditions_are_independent():
    rates, names = dict(text=0.1, melody=0.3, style=0.5), ["melody", "style", "text"]

    def draw(index, names=names):
        rng = conditioning.random_generator(0, conditioning.DROP_STREAM, 3, index)
        a = conditioning.drop_conditions(dict.fromkeys(names, 1), rng, 0.2, rates)
        return [a[n] is None for n in names]

    got = np.array([draw(i) for i in range(20_000)])
    for i, name in enumerate(names):
        assert abs(got[:, i].mean() - (0.2 + 0.8 * rates[name])) < 0.012, name
        for j in range(i):
            assert abs((got[:, i] & got[:, j]).mean() - (0.2 + 0.8 * rates[name] * rates[names[j]])) < 0.012, (name, names[j])
    assert [draw(i, ["text"])[0] for i in range(500)] == got[:500, 2].tolist()                 # a condition more moves no other's draw


# ---------------------------------------------------------------------------------------------------------------------
# style: excerpt, bottleneck


def test_excerpts():
    assert excerpt_place(100, 20, 40) == (35, 65) and excerpt_place(10, 20, 40) == (0, 10)
    drawn = [excerpt_place(100, 20, 40, conditioning.random_generator(0, 14, 0, i)) for i in range(500)]
    lengths = {b - a for a, b in drawn}
    assert lengths == set(range(20, 41)) and min(a for a, _ in drawn) == 0 and max(b for _, b in drawn) == 100


def test_the_excerpt_is_not_learnt():
    """Targets within it do not count; with the style dropped they do."""
    model = tiny(dict(style="prepend"))
    codes, frames = torch.randint(13, (2, 3, 12)), torch.ones(2, 12, dtype=torch.bool)
    examples = [SimpleNamespace(frames=12, index=i, meta={}) for i in range(2)]
    args = SimpleNamespace(seed=0, style_seconds=[0.4, 0.4], cfg_dropout=0.0, style_dropout=0.5)
    codec = SimpleNamespace(frame_rate=10.0)
    step = next(s for s in range(99) if [v["style"] is None for v in model.conditioner.read(
        examples, codes, frames, args, codec, s)[0]] == [False, True])
    values, learnt = model.conditioner.read(examples, codes, frames, args, codec, step)
    start = int((~learnt[0]).int().argmax())
    assert learnt.sum(1).tolist() == [8, 12] and not learnt[0, start:start + 4].any() and frames.all()
    assert torch.equal(values[0]["style"], codes[0, :, start:start + 4])
    values, whole = model.conditioner.read(examples, codes, frames, args, codec, None)         # outside training: the middle
    assert not whole[:, 4:8].any() and whole.sum(1).tolist() == [8, 8] and torch.equal(values[1]["style"], codes[1, :, 4:8])
    assert (model.count_targets(frames) - model.count_targets(learnt)).tolist() == [4, 4, 4]
    targets = model.config.layout(12).targets(codes, learnt, -100)
    assert torch.equal((targets != -100).sum((0, 2)), model.count_targets(learnt))
    constant = torch.randn(2, targets.shape[2], 32)
    model.conditioner, model.hidden = None, lambda *a, **k: constant                       # so that the loss sees codes as targets alone
    changed = codes.clone()
    changed[0, :, start:start + 4] = (changed[0, :, start:start + 4] + 1) % 13
    a, b = (model(c, frames, loss_mask=learnt) for c in (codes, changed))
    assert torch.equal(a, b)
    c, d = (model(c, frames) for c in (codes, changed))
    assert not torch.equal(c, d)


def run_updates(parts: list, updates: int = 5) -> dict:
    """The statistics after updates on latents split in `parts`, the second of each pair its mask."""
    torch.manual_seed(0)
    bottleneck = Bottleneck(4, 2, 8).train()
    for step in range(updates):
        for x, mask in parts:
            bottleneck(x * (1 + step), mask)
        bottleneck.end_update(lambda t: t, keep=True)
    return {k: v.clone() for k, v in bottleneck.named_buffers()}


def test_statistics_ignore_null_samples_and_padding_and_how_a_batch_is_split():
    x, real = torch.randn(6, 10, 4), torch.ones(6, 10, dtype=torch.bool)
    whole = run_updates([(x, real)])
    padded = torch.cat([x, torch.full((6, 3, 4), 50.0)], 1), torch.nn.functional.pad(real, (0, 3))
    nulls = torch.cat([x, torch.full((2, 10, 4), -9.0)]), torch.cat([real, torch.zeros(2, 10, dtype=torch.bool)])
    for parts in ([padded], [nulls], [(x[:2], real[:2]), (x[2:], real[2:])]):
        other = run_updates(parts)
        assert max(float((whole[k] - other[k]).abs().max()) for k in whole) < 1e-4
    nothing = run_updates([(x, torch.zeros(6, 10, dtype=torch.bool))])
    fresh = dict(Bottleneck(4, 2, 8).named_buffers())
    assert all(torch.equal(nothing[k], fresh[k]) for k in fresh)


def test_statistics_move_only_after_an_update_that_counts():
    bottleneck, x, mask = Bottleneck(4, 2, 8).train(), torch.randn(3, 9, 4), torch.ones(3, 9, dtype=torch.bool)
    before = {k: v.clone() for k, v in bottleneck.named_buffers()}
    bottleneck(x, mask)
    bottleneck.end_update(lambda t: t, keep=False)                        # an update that was skipped
    bottleneck.eval()(x, mask)
    bottleneck.end_update(lambda t: t, keep=True)                         # nothing is collected outside training
    assert all(torch.equal(before[k], v) for k, v in bottleneck.named_buffers())
    bottleneck.train()(x, mask)
    bottleneck.end_update(lambda t: t, keep=True)
    assert torch.allclose(bottleneck.mean, x.mean((0, 1)), atol=1e-5) and torch.allclose(bottleneck.var, x.var((0, 1), correction=0), atol=1e-4)


def test_the_codebooks_find_clusters():
    """Eight clusters in eight vectors, which begin anywhere: nearly nothing is left of the distance."""
    torch.manual_seed(3)
    centres = torch.randn(8, 4) * 3
    bottleneck, left = Bottleneck(4, 1, 8).train(), []
    for _ in range(300):
        x = centres[torch.randint(8, (4, 20))] + 0.05 * torch.randn(4, 20, 4)
        z = bottleneck.normalize(x)
        left.append(float((bottleneck(x, torch.ones(4, 20, dtype=torch.bool)) - z).square().mean()))
        bottleneck.end_update(lambda t: t, keep=True)
    assert left[-1] < 0.02 < left[0] and (bottleneck.sizes > 1).all()


def test_the_gradient_passes_the_rounding():
    bottleneck, x = Bottleneck(4, 2, 8), torch.randn(1, 5, 4, requires_grad=True)
    bottleneck(x, torch.ones(1, 5, dtype=torch.bool)).sum().backward()
    assert torch.allclose(x.grad, torch.ones(1, 5, 4), atol=1e-4)    # the derivative of the normalisation, whose variance is 1


# ---------------------------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def test_double_guidance_is_its_formula():
    """Greedy codes against the formula spelled out without cache; rows with one condition have single guidance."""
    model = tiny()
    asked = [dict(text="slow organ", style=style(0), melody=None), dict(text="fast bells", style=None, melody=None),
             dict(text=None, style=style(1), melody=None)]
    sampling, layout = Sampling(cfg=2.0, cfg_style=3.0, temperature=0), model.config.layout(6)
    seq = torch.full((3, 3, layout.S), model.special)
    for s in range(1, layout.S):
        def at(attributes):
            return model.logits(seq[..., :s], generate.encode_conditions(model, attributes, False))[:, :, -1]
        full, middle, null = at(asked), at([{**a, "text": None} for a in asked]), at([dict.fromkeys(a) for a in asked])
        logits = null + 2 * (full - null)
        logits[0] = null[0] + 2 * (middle[0] + 3 * (full[0] - middle[0]) - null[0])
        best = logits.argmax(-1)
        for k in range(3):
            if layout.frame[k, s] >= 0:
                seq[:, k, s] = best[:, k]
    assert torch.equal(generate_codes(model, asked, 6, sampling), layout.revert(seq, -1)[0])
    single = generate_codes(model, asked, 6, Sampling(cfg=2.0, temperature=0))
    assert torch.equal(generate_codes(model, asked, 6, Sampling(cfg=2.0, cfg_style=1.0 + 1e-6, temperature=0)), single)
    assert not torch.equal(generate_codes(model, asked, 6, sampling)[0], single[0])


def test_a_melody_is_read_on_in_each_window(monkeypatch):
    """Windows of 12 frames with stride 8 begin at frames 0, 8 and 16: at half as many chroma frames, of a melody of 9."""
    model, seen, original = tiny(), [], generate.generate_codes

    def spy(model, values, *rest, **more):
        seen.append(values[0]["melody"].argmax(1).tolist())
        return original(model, values, *rest, **more)

    monkeypatch.setattr(generate, "generate_codes", spy)
    generate_long(model, [{"melody": F12[:9]}], 26, Sampling(cfg=1, temperature=0), window=12, stride=8)
    assert seen == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 0], [8, 0, 1, 2, 3, 4]]
    seen.clear()
    prompt = torch.randint(13, (1, 3, 20))                           # longer than a window: its last 4 frames begin at 16
    generate_long(model, [{"melody": F12[:9]}], 26, Sampling(cfg=1, temperature=0), window=12, stride=8, prompt=prompt)
    assert seen == [[8, 0, 1, 2, 3, 4]]


SMALL = ("--size debug --batch_size 4 --updates_per_epoch 2 --epochs 1 --valid_samples 4 --eval_samples 2 --generate_samples 1 --lr 0.01 "
         "--warmup_steps 2 --log_every 1 --device cpu --segment_seconds 1 --conditions text melody style").split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with all three conditions."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert train.main([*SMALL, "--style_dropout", "0.3", "--out", str(out)]) == 0
    return out


def test_a_run_keeps_its_statistics(finished):
    """best.pt holds the codebooks; evaluate says what each condition is worth."""
    best = torch.load(finished / "best.pt", weights_only=True)
    last = torch.load(finished / "last.pt", weights_only=True)
    name = "conditioner.parts.style.bottleneck.vectors"
    assert torch.equal(best["model"][name], last["tensors"][f"ema/{name}"]) and torch.equal(last["tensors"][f"model/{name}"], best["model"][name])
    assert best["model"][name.replace("vectors", "count")] > 1 and "collected" not in str(best["model"].keys())
    evaluated = last["history"][-2]
    assert {"ce_no_text", "ce_shuffled_melody", "ce_no_style", "ce_no_conditions"} <= evaluated.keys()


def test_generate_with_melody_and_style(finished, tmp_path, capsys):
    """The command line and the Python API; the json says what was given; two melodies give two clips."""
    import json
    for name, midi in (("a", 60), ("b", 67)):
        audio.write_audio(tmp_path / f"{name}.wav", tone(midi, 16_000)[None], 16_000)
    a, b = (str(tmp_path / f"{name}.wav") for name in "ab")
    flags = ["--run", str(finished), "--seconds", "1.5", "--out", str(tmp_path / "out"), "--temperature", "1"]
    assert generate.main([*flags, "--melody", a, b, "--style", b, "--prompt", "fast bells", "--cfg_style", "2"]) == 0
    records = [json.loads((tmp_path / "out" / f"00{i}.json").read_text()) for i in (0, 1)]
    assert [r["melody"] for r in records] == [a, b] and records[0]["style"] == b and records[1]["prompt"] == "fast bells"
    music = generate.MusicGenerator.load(finished)
    wavs = music.generate([None, None], 0.5, melody=[tone(60, 16_000)[None], None], style=tone(67, 16_000)[None])
    assert wavs.shape == (2, 1, 8_000) and not torch.equal(wavs[0], wavs[1])
    assert chroma.main([a]) == 0 and style_condition.main([b, "--run", str(finished)]) == 0
    assert " C |@@@" in (out := capsys.readouterr().out) and "level 3 |" in out


@pytest.mark.parametrize("conditions", (["melody"], ["style"], ["style", "text"]))
def test_any_subset_trains_and_generates(conditions, tmp_path):
    i = SMALL.index("--conditions")
    assert train.main([*SMALL[:i], "--conditions", *conditions, "--out", str(tmp_path / "run")]) == 0
    music = generate.MusicGenerator.load(tmp_path / "run")
    assert sorted(music.model.conditioner.names) == sorted(conditions) and music.generate([None], 0.2).isfinite().all()


@pytest.fixture(scope="module")
def of_melody(tmp_path_factory):
    """A short run with a melody alone."""
    out = tmp_path_factory.mktemp("runs") / "melody"
    assert train.main([*SMALL[:SMALL.index("--conditions")], "--conditions", "melody", "--out", str(out)]) == 0
    return out


def test_a_start_learns_further_conditions(of_melody, tmp_path, monkeypatch, capsys):
    """Its own weights are where it starts from; a style begins anew. Cross-attention cannot be added: it is in every layer."""
    seen, new, conditions = {}, [*SMALL, "--init_from", str(of_melody)], ["--conditions", "melody", "style"]
    monkeypatch.setattr(train, "run_epochs", lambda run: seen.update(run=run))
    assert train.main([*new, *conditions, "--out", str(tmp_path / "a")]) == 0
    start = torch.load(of_melody / "best.pt", weights_only=True)["model"]
    model = seen["run"].model.state_dict()
    assert all(torch.equal(x, model[name]) for name, x in start.items())
    fresh = {name for name in model if name not in start}
    assert {name.split(".")[2] for name in fresh} == {"style"} and not any(model[name].is_meta for name in fresh)
    assert model["conditioner.parts.style.output_proj.weight"].std() > 0
    text = ["--conditions", "melody", "text", "--fuse", "melody=prepend", "text=prepend", "--out", str(tmp_path / "text")]
    assert train.main([*new, *text]) == 0                            # its vocabulary is the captions', its shape no other's
    part = seen["run"].model.conditioner.parts["text"]
    assert part.encoder.embed.num_embeddings == conditioning.vocabulary_size(seen["run"].model.conditioner.assets["text"])
    assert train.main([*new, *conditions, "--lora", "2", "--out", str(tmp_path / "b")]) == 2
    assert "conditions {'melody': 'prepend'} there, {'style': 'prepend', 'melody': 'prepend'} here" in capsys.readouterr().err
    assert train.main([*new, "--out", str(tmp_path / "c")]) == 2
    assert "cross_attention False there, True here" in capsys.readouterr().err


def test_resume_with_all_conditions_is_exact(finished, tmp_path, monkeypatch):
    """Killed between two updates: the same weights and statistics, bit for bit."""
    class Killed(Exception):
        pass

    commit = resume.save_checkpoint

    def commit_and_die(run):
        commit(run)
        raise Killed

    flags = [*SMALL, "--style_dropout", "0.3", "--save_minutes", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(resume, "save_checkpoint", commit_and_die)
    with pytest.raises(Killed):
        train.main(flags)
    monkeypatch.setattr(resume, "save_checkpoint", commit)
    assert train.main(flags) == 0
    a, b = (torch.load(out / "last.pt", weights_only=True)["tensors"] for out in (tmp_path, finished))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stems_without_demucs():
    if os.environ.get("HAVE_DEMUCS"):
        pytest.skip("demucs is installed")
    with pytest.raises(ValueError, match="pip install demucs"):
        chroma.load_separator()
