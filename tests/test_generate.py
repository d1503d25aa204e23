"""Sampling against its definition, cached generation against a full forward, windows, prompts, guidance."""

import shutil

import pytest
import torch

from tools import bench
import conditioning
import generate
import train
from conditioning import Conditioner, ConditionerConfig
from generate import Sampling, generate_codes, generate_long, sample_codes
from model import ModelConfig, MusicGen
from support.compiled import compile_step
from support.per_sample import Noise

PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)
GREEDY = Sampling(cfg=1, temperature=0)


def tiny(pattern="delay", K=3, seed=1, **fuse) -> MusicGen:
    torch.manual_seed(seed)
    config = ModelConfig(K=K, card=13, dim=32, num_layers=2, num_heads=2, pattern=pattern)
    vocab = conditioning.vocabulary_size(PIECES)
    shape = ConditionerConfig(fuse=fuse or {"text": "cross"}, text_vocab=vocab, text_dim=16, text_hidden=32)
    return MusicGen(config, Conditioner(shape, 32, {"text": PIECES})).eval()


def texts(*values) -> list:
    return [{"text": v} for v in values]


@torch.no_grad()
def slow_greedy(m: MusicGen, attributes, T: int, cfg: float) -> torch.Tensor:
    """Without cache: the whole sequence again for every step, guided and unguided apart."""
    layout = m.config.layout(T)
    seq = torch.full((len(attributes), m.config.K, layout.S), m.special)
    nothing = texts(*[None] * len(attributes))
    for s in range(1, layout.S):
        cond = m.logits(seq[..., :s], generate.encode_conditions(m, attributes, False))[:, :, -1]
        null = m.logits(seq[..., :s], generate.encode_conditions(m, nothing, False))[:, :, -1]
        best = (null + cfg * (cond - null)).argmax(-1)
        for k in range(m.config.K):
            if layout.frame[k, s] >= 0:
                seq[:, k, s] = best[:, k]
    return layout.revert(seq, -1)[0]


@pytest.mark.parametrize("pattern", ("delay", "parallel", "unrolled"))
@pytest.mark.parametrize("cfg", (1.0, 3.0))
@pytest.mark.parametrize("fuse", ("cross", "prepend", "sum"))
def test_cached_generation_equals_full_forward(pattern, cfg, fuse):
    m, asked = tiny(pattern, text=fuse), texts("slow organ", "fast bells", None)
    fast = generate_codes(m, asked, 7, Sampling(cfg=cfg, temperature=0))
    assert torch.equal(fast, slow_greedy(m, asked, 7, cfg))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_generation_is_the_same():
    """By the real compiler: for one row with guidance, for a model of that shape with other weights, and for
    six rows, where few are no case of their own."""
    one, three = texts("slow organ"), texts("slow organ", "fast bells", None)
    for asked, seed in ((one, 1), (one, 2), (three, 1)):
        plain, fast, greedy = tiny(seed=seed), tiny(seed=seed), Sampling(cfg=3, temperature=0)
        compile_step(fast)
        wanted, found = (generate_codes(m, asked, 40, greedy) for m in (plain, fast))
        assert torch.equal(found, wanted)
    for head in fast.linears:
        head.weight.data.zero_()
    assert generate_codes(fast, asked, 40, greedy).any(), "weights are constants of what was compiled"


def test_compiling_without_a_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        compile_step(tiny())
    assert bench.main(["train", "--compile"]) == 2
    assert train.main(["--dataset", "toy", "--out", str(tmp_path / "run"), "--compile"]) == 2
    assert capsys.readouterr().err.count("C++ compiler") == 2
    assert not (tmp_path / "run").exists()


def test_guidance_of_one_is_no_guidance():
    m, asked = tiny(), texts("slow organ", "fast bells")
    almost = Sampling(cfg=1 + 1e-7, temperature=0)    # goes through the doubled batch
    assert almost.cfg != 1
    guided = Sampling(cfg=5, temperature=0)
    assert torch.equal(generate_codes(m, asked, 9, GREEDY), generate_codes(m, asked, 9, almost))
    assert not torch.equal(generate_codes(m, asked, 9, GREEDY), generate_codes(m, asked, 9, guided))


def test_prompts_and_seeds():
    """Two texts with one seed differ; one text with one seed repeats; another seed differs."""
    m = tiny()

    def draw(text, seed):
        return generate_codes(m, texts(text), 30, Sampling(cfg=1, top_k=5), noise=Noise(seed, [0]))

    assert torch.equal(draw("slow organ", 0), draw("slow organ", 0))
    assert not torch.equal(draw("slow organ", 0), draw("slow organ", 1))
    assert not torch.equal(draw("slow organ", 0), draw("fast bells", 0))


@pytest.mark.parametrize("pattern", ("delay", "parallel", "unrolled"))
def test_continuation_keeps_the_prompt(pattern):
    """A greedy continuation of the first frames of a greedy clip is that clip."""
    m, asked = tiny(pattern), texts("slow organ")
    whole = generate_codes(m, asked, 10, GREEDY)
    assert torch.equal(generate_codes(m, asked, 10, GREEDY, prompt=whole[..., :6]), whole)


def test_number_of_steps():
    """T=12 frames of K=4 take T+K-1 = 15 steps under delay; training mode is given back."""
    m, steps = tiny(K=4).train(), []
    m.heads = lambda *a, heads=m.heads: steps.append(1) or heads(*a)
    generate_codes(m, texts("slow organ"), 12, GREEDY)
    assert len(steps) == 15 and m.training


def watch_windows(monkeypatch) -> list:
    """What `generate_codes` is called with from now on: (frames, prompt) of each window."""
    seen, original = [], generate.generate_codes

    def spy(model, values, T, sampling, *, prompt, **more):
        seen.append((T, prompt.clone()))
        return original(model, values, T, sampling, prompt=prompt, **more)

    monkeypatch.setattr(generate, "generate_codes", spy)
    return seen


def test_windows(monkeypatch):
    """60 frames in windows of 30 with stride 18: each begins with the end of the one before, whose last frame
    it draws again."""
    m, heard, seen = tiny(), [], watch_windows(monkeypatch)
    codes = generate_long(m, texts("slow organ"), 60, GREEDY, window=30, stride=18, hear=heard.append)
    assert codes.shape == (1, 3, 60) and [T for T, _ in seen] == [30, 30, 24]
    assert torch.equal(seen[1][1], codes[..., 18:29]) and torch.equal(seen[2][1], codes[..., 36:47])
    assert torch.equal(torch.cat(heard, 2), codes) and len(heard) == 60


@pytest.mark.parametrize("given, heard, frames", [
    (10, [10, 11, 11, 11], [30, 30, 30, 16]),
    (25, [25, 11, 11, 11], [30, 30, 30, 16]),
    (29, [28, 11, 11, 11], [30, 30, 30, 15]),
    (30, [28, 11, 11, 11], [30, 30, 30, 14]),
    (50, [28, 11], [30, 30]),
])
def test_a_prompt_is_heard_as_far_as_a_window_reaches(given, heard, frames, monkeypatch):
    """The first window hears all of it, or as much as leaves two frames to generate. The piece has 70."""
    prompt, seen = torch.randint(0, 13, (2, 3, given)), watch_windows(monkeypatch)
    codes = generate_long(tiny(), texts("slow organ", "fast bells"), 70, GREEDY, window=30, stride=18,
                          prompt=prompt)
    assert codes.shape[2] == 70 and torch.equal(codes[..., :given], prompt)
    assert [x.shape[2] for _, x in seen] == heard and [T for T, _ in seen] == frames
    assert torch.equal(seen[0][1], prompt[..., -heard[0]:])


@pytest.mark.parametrize("window, given", [(1, 0), (2, 1), (3, 2)])
def test_a_window_of_few_frames(window, given, monkeypatch):
    """What fits into one window is made in one, and hears all of its prompt; more needs three frames."""
    prompt, seen = torch.randint(0, 13, (1, 3, given)), watch_windows(monkeypatch)
    codes = generate_long(tiny(), texts("x"), window, GREEDY, window=window, stride=1, prompt=prompt)
    assert codes.shape[2] == window and [x.shape[2] for _, x in seen] == [given]
    if window < 3:
        with pytest.raises(ValueError, match=f"in windows of {window} frames: no frame is left"):
            generate_long(tiny(), texts("x"), 5, GREEDY, window=window, stride=1)


def test_bad_stride():
    with pytest.raises(ValueError, match="stride 29 in windows of 30"):
        generate_long(tiny(), texts("x"), 60, GREEDY, window=30, stride=29)


def draw(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """logits [B,k,card] -> codes [B,k]: k cells of B samples."""
    B, k, _ = logits.shape
    noise, cells = Noise(0, range(B)), torch.arange(k)
    return sample_codes(logits, sampling, lambda codes: noise(cells, codes))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(4, 10_000, 4)
    for temperature in (1.0, 0.5):
        drawn = draw(logits, Sampling(top_k=0, temperature=temperature))
        shares = drawn.flatten().bincount(minlength=4) / 40_000
        assert (shares - (logits[0, 0] / temperature).softmax(-1)).abs().max() < 0.01


def test_top_k_keeps_exactly_k_even_with_ties():
    logits = torch.zeros(1, 10_000, 8)
    assert len(draw(logits, Sampling(top_k=3)).unique()) == 3
    assert (draw(torch.arange(8.).expand(1, 99, 8), Sampling(top_k=1)) == 7).all()
    draw(logits, Sampling(top_k=10_000))    # more than there are: all of them


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 20_000, 4)
    for p, kept in ((0.4, 1), (0.6, 2), (0.85, 3), (1.0, 4)):
        assert sorted(draw(logits, Sampling(top_p=p)).unique().tolist()) == list(range(kept))


@pytest.mark.parametrize("changes", [
    dict(temperature=-1), dict(top_p=1.5), dict(top_k=-3), dict(cfg=float("nan"))])
def test_bad_sampling(changes):
    with pytest.raises(ValueError, match="lies between"):
        Sampling(**changes)


@pytest.mark.parametrize("argv, says", [
    (["--run", "nowhere", "--prompt", "x"], "no best.pt"),
    (["--run", "nowhere"], "nothing to generate"),
    (["--run", "nowhere", "--prompts", "missing.txt"], "missing.txt"),
    (["--run", "nowhere", "--prompt", "x", "--n", "0"], "--n 0"),
])
def test_command_line_errors(argv, says, capsys):
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_foreign_file_is_refused_without_running_it(tmp_path, capsys):
    """A pickle that would create a file when it is unpickled."""
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "best.pt").write_bytes(pickle.dumps(Evil()))
    assert generate.main(["--run", str(tmp_path), "--prompt", "x"]) == 2
    assert "not a model" in capsys.readouterr().err and not (tmp_path / "owned").exists()
