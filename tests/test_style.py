"""Style: the excerpt, which the loss leaves out, the bottleneck's statistics, double guidance."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

import conditioning
import generate
from generate import Sampling, generate_codes
from support.style import Bottleneck, excerpt_place
from three_conditions import style_codes, tiny


def test_style_does_not_depend_on_its_neighbors():
    part = tiny().conditioner.parts["style"]
    batches = [[style_codes(0, 4)], [style_codes(0, 4), style_codes(1, 11), None]]
    alone, together = (part(*part.prepare(values))[0][0] for values in batches)
    assert together.shape[0] == 6
    assert torch.allclose(alone, together[:2], atol=1e-5)
    assert together[2:].abs().max() == 0


# ----------------------------------------------------------------------------------------------------------
# the excerpt


def test_excerpts():
    assert excerpt_place(100, 20, 40) == (35, 65)
    assert excerpt_place(10, 20, 40) == (0, 10)
    drawn = [excerpt_place(100, 20, 40, conditioning.random_generator(0, 14, 0, i)) for i in range(500)]
    assert {b - a for a, b in drawn} == set(range(20, 41))
    assert min(a for a, _ in drawn) == 0
    assert max(b for _, b in drawn) == 100


def test_the_excerpt_does_not_count_in_the_loss():
    """Targets within it do not count; with the style dropped they do."""
    model = tiny(dict(style="prepend"))
    codes, frames = torch.randint(13, (2, 3, 12)), torch.ones(2, 12, dtype=torch.bool)
    examples = [SimpleNamespace(frames=12, index=i, meta={}) for i in range(2)]
    args = SimpleNamespace(seed=0, style_seconds=[0.4, 0.4], cfg_dropout=0.0, style_dropout=0.5)

    def read(step):
        codec = SimpleNamespace(frame_rate=10.0)
        return model.conditioner.example_values(examples, codes, frames, args, codec, step)

    # an update that drops the second style alone
    step = next(s for s in range(99) if [v["style"] is None for v in read(s)[0]] == [False, True])
    values, loss_mask = read(step)
    start = int((~loss_mask[0]).int().argmax())
    assert loss_mask.sum(1).tolist() == [8, 12]
    assert not loss_mask[0, start:start + 4].any()
    assert frames.all()
    assert torch.equal(values[0]["style"], codes[0, :, start:start + 4])
    # outside training: the middle
    values, outside = read(None)
    assert not outside[:, 4:8].any()
    assert outside.sum(1).tolist() == [8, 8]
    assert torch.equal(values[1]["style"], codes[1, :, 4:8])
    # what is counted is what the targets hold
    assert (model.count_targets(frames) - model.count_targets(loss_mask)).tolist() == [4, 4, 4]
    targets = model.config.layout(12).targets(codes, loss_mask, -100)
    assert torch.equal((targets != -100).sum((0, 2)), model.count_targets(loss_mask))
    # hidden states that do not change, so that the loss sees codes as targets alone
    constant = torch.randn(2, targets.shape[2], 32)
    model.conditioner, model.hidden = None, lambda *a, **k: constant
    changed = codes.clone()
    changed[0, :, start:start + 4] = (changed[0, :, start:start + 4] + 1) % 13
    a, b = (model(c, frames, loss_mask=loss_mask) for c in (codes, changed))
    assert torch.equal(a, b)
    c, d = (model(c, frames) for c in (codes, changed))
    assert not torch.equal(c, d)


# ----------------------------------------------------------------------------------------------------------
# the bottleneck


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
    padded = torch.cat([x, torch.full((6, 3, 4), 50.0)], 1), F.pad(real, (0, 3))
    nulls = torch.cat([x, torch.full((2, 10, 4), -9.0)]), F.pad(real, (0, 0, 0, 2))
    for parts in ([padded], [nulls], [(x[:2], real[:2]), (x[2:], real[2:])]):
        other = run_updates(parts)
        assert max(float((whole[k] - other[k]).abs().max()) for k in whole) < 1e-4
    nothing = run_updates([(x, torch.zeros(6, 10, dtype=torch.bool))])
    fresh = dict(Bottleneck(4, 2, 8).named_buffers())
    assert all(torch.equal(nothing[k], fresh[k]) for k in fresh)


def test_statistics_move_only_after_an_update_that_counts():
    bottleneck = Bottleneck(4, 2, 8).train()
    x, mask = torch.randn(3, 9, 4), torch.ones(3, 9, dtype=torch.bool)
    before = {k: v.clone() for k, v in bottleneck.named_buffers()}
    # an update that was skipped
    bottleneck(x, mask)
    bottleneck.end_update(lambda t: t, keep=False)
    # nothing is collected outside training
    bottleneck.eval()(x, mask)
    bottleneck.end_update(lambda t: t, keep=True)
    assert all(torch.equal(before[k], v) for k, v in bottleneck.named_buffers())
    bottleneck.train()(x, mask)
    bottleneck.end_update(lambda t: t, keep=True)
    assert torch.allclose(bottleneck.mean, x.mean((0, 1)), atol=1e-5)
    assert torch.allclose(bottleneck.var, x.var((0, 1), correction=0), atol=1e-4)


def test_the_codebooks_find_clusters():
    """Eight clusters in eight vectors, which begin anywhere: nearly nothing is left of the distance."""
    torch.manual_seed(3)
    centers = torch.randn(8, 4) * 3
    bottleneck, left = Bottleneck(4, 1, 8).train(), []
    for _ in range(300):
        x = centers[torch.randint(8, (4, 20))] + 0.05 * torch.randn(4, 20, 4)
        z = bottleneck.normalize(x)
        rounded = bottleneck(x, torch.ones(4, 20, dtype=torch.bool))
        left.append(float((rounded - z).square().mean()))
        bottleneck.end_update(lambda t: t, keep=True)
    assert left[-1] < 0.02 < left[0]
    assert (bottleneck.sizes > 1).all()


def test_the_gradient_passes_the_rounding():
    bottleneck, x = Bottleneck(4, 2, 8), torch.randn(1, 5, 4, requires_grad=True)
    bottleneck(x, torch.ones(1, 5, dtype=torch.bool)).sum().backward()
    # the derivative of the normalization, whose variance is 1
    assert torch.allclose(x.grad, torch.ones(1, 5, 4), atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def test_double_guidance_is_its_formula():
    """Greedy codes against the formula spelled out without cache.

    Rows with one condition have single guidance."""
    model = tiny()
    asked = [dict(text="slow organ", style=style_codes(0), melody=None),
             dict(text="fast bells", style=None, melody=None),
             dict(text=None, style=style_codes(1), melody=None)]
    without_text = [{**a, "text": None} for a in asked]
    nothing = [dict.fromkeys(a) for a in asked]
    sampling, layout = Sampling(cfg=2.0, cfg_style=3.0, temperature=0), model.config.layout(6)
    seq = torch.full((3, 3, layout.S), model.special)
    for s in range(1, layout.S):
        full, middle, null = (
            model.logits(seq[..., :s], generate.encode_conditions(model, values, False))[:, :, -1]
            for values in (asked, without_text, nothing))
        logits = null + 2 * (full - null)
        logits[0] = null[0] + 2 * (middle[0] + 3 * (full[0] - middle[0]) - null[0])
        best = logits.argmax(-1)
        for k in range(3):
            if layout.frame[k, s] >= 0:
                seq[:, k, s] = best[:, k]
    assert torch.equal(generate_codes(model, asked, 6, sampling), layout.revert(seq, -1)[0])
    single = generate_codes(model, asked, 6, Sampling(cfg=2.0, temperature=0))
    nearly_single = Sampling(cfg=2.0, cfg_style=1.0 + 1e-6, temperature=0)
    assert torch.equal(generate_codes(model, asked, 6, nearly_single), single)
    assert not torch.equal(generate_codes(model, asked, 6, sampling)[0], single[0])
