"""What a real GPU computes, beside the CPU: skipped where there is none.

`python -m tools.gpu_check` runs it."""

import copy
import warnings

import pytest
import torch

import conditioning
import tokenizer
from conditioning import Conditioner, ConditionerConfig
from generate import Sampling, generate_codes
from model import ModelConfig, MusicGen
from support.compiled import compile_step
from support.per_sample import Noise

DEVICE = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)
TEXTS = [{"text": "slow organ"}, {"text": None}]


@pytest.fixture
def models():
    """The same model on the CPU and on the GPU."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    vocab = conditioning.vocabulary_size(PIECES)
    shape = ConditionerConfig({"text": "cross+prepend+sum"}, text_vocab=vocab, text_dim=16, text_hidden=32)
    config = ModelConfig(card=32, dim=64, num_layers=2, num_heads=2)
    model = MusicGen(config, Conditioner(shape, 64, {"text": PIECES})).eval()
    return model, copy.deepcopy(model).to(DEVICE)


def loss_and_gradients(model, device):
    codes = torch.arange(2 * 4 * 30).view(2, 4, 30).mul(7).remainder(32).to(device)
    loss = model(codes, None, model.conditioner.prepare(TEXTS, device)).sum()
    loss.backward()
    return loss.cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}


def test_loss_and_gradients_are_those_of_the_cpu(models):
    (here, mine), (there, theirs) = (loss_and_gradients(m, m.emb[0].weight.device) for m in models)
    assert torch.allclose(here, there, rtol=1e-5)
    for name, gradient in mine.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-4 * gradient.abs().max()), name


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("prompt", (0, 20))
def test_greedy_codes_are_those_of_the_cpu(models, compiled, prompt):
    """Compiled it is a CUDA graph; 300 steps double its cache's room once."""
    cpu, gpu = models
    if compiled:
        compile_step(gpu)
    T, greedy = 300 if compiled else 60, Sampling(cfg=3, temperature=0)
    wanted = generate_codes(cpu, TEXTS, T, greedy)
    given = wanted[..., :prompt] if prompt else None
    found = generate_codes(gpu, TEXTS, T, greedy, prompt=given)
    assert (found.cpu() == wanted).float().mean() > 0.99


def test_noise_is_that_of_the_cpu():
    """The same seed gives the same draw: hashes are equal, logarithms almost."""
    cells, codes = torch.arange(4), torch.arange(4 * 9).view(1, 4, 9)
    here = Noise(3, [5])(cells, codes)
    there = Noise(3, [5], DEVICE)(cells.to(DEVICE), codes.to(DEVICE)).cpu()
    assert torch.allclose(here, there, rtol=1e-5)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_decoding_step_does_not_wait(models, compiled):
    """By PyTorch's own count. The first step reads the conditions and may wait; the first compiled record
    a graph again, for the new cache."""
    gpu, first = models[1], 8 if compiled else 1
    if compiled:
        compile_step(gpu)
        generate_codes(gpu, TEXTS, 30, Sampling())
    steps = []

    def watch(t, frame):
        steps.append(t)
        torch.cuda.set_sync_debug_mode("error" if first <= t < 29 else "default")

    try:
        generate_codes(gpu, TEXTS, 30, Sampling(), hear=watch, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 30


def test_codes_of_the_codec_are_those_of_the_cpu():
    wav = 0.1 * torch.randn(2, 1, 16000, generator=torch.Generator().manual_seed(0))
    here, there = tokenizer.load_codec("toy"), tokenizer.load_codec("toy", device=DEVICE)
    codes = here.encode(wav)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (there.encode(wav.to(DEVICE)).cpu() == codes).float().mean() > 0.98
    assert torch.allclose(there.decode(codes.to(DEVICE)).cpu(), here.decode(codes), atol=1e-3)
