"""The transformer: causality, cached decoding, conditions, initialisation, loss by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import model as lm
from model import Cache, Conditions, ModelConfig, MusicGen
from support import kernels
from support.compiled import FixedCache, GrowingCache, compile_step
from support.kernels import Dropout, head_loss

PATTERNS = ("delay", "parallel", "unrolled")


def tiny(**changes) -> MusicGen:
    torch.manual_seed(0)
    shape = dict(K=3, card=11, dim=32, num_layers=2, num_heads=4) | changes
    return MusicGen(ModelConfig(**shape)).eval()


def conditions(B=2, L=5, P=3, D=32, generator=torch.Generator().manual_seed(3)) -> Conditions:
    cross_mask, prefix_mask = torch.ones(B, L, dtype=torch.bool), torch.ones(B, P, dtype=torch.bool)
    cross_mask[1, 3:] = prefix_mask[1, :2] = False
    cross = torch.randn(B, L, D, generator=generator) * cross_mask[..., None]
    prefix = torch.randn(B, P, D, generator=generator) * prefix_mask[..., None]
    return Conditions(cross, cross_mask, prefix, prefix_mask, torch.randn(B, 1, D, generator=generator))


def only(c: Conditions, which: str) -> Conditions:
    """The conditions of one kind: cross, prefix or summed; all; or none."""
    if which == "all":
        return c
    return Conditions(**{name: x for name, x in vars(c).items() if name.startswith(which)})


def test_causal_by_gradient():
    """No logit of step s depends on what stands after s; every one depends on step s itself."""
    m = tiny()
    seq = torch.randint(0, 12, (1, 3, 9))
    x = sum(table(c) for table, c in zip(m.emb, seq.unbind(1))).detach().requires_grad_()
    x_in = x + lm.sinusoid(torch.arange(9)[None], 32)
    out = m.out_norm(m.transformer(x_in, None, None, None))
    for s in range(9):
        grad, = torch.autograd.grad(out[0, s].square().sum(), x, retain_graph=True)
        assert grad[0, s + 1:].abs().max() == 0 if s < 8 else True
        assert (grad[0, :s + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("which", ("none", "cross", "prefix", "summed", "all"))
def test_cached_decode_equals_full_forward(pattern, which):
    m = tiny(pattern=pattern)
    c = conditions()
    keep = only(c, which)
    layout = m.config.layout(6)
    seq = layout.build(torch.randint(0, 11, (2, 3, 6)), m.special, valid_only=False)
    full = m.logits(seq, keep)
    P = 3 if keep.prefix is not None else 0
    cache = Cache(m.config, 2, layout.S + P, "cpu")
    parts = [m.heads(m.hidden(seq[..., :4], keep, cache))]
    parts += [m.decode_step(seq[..., s:s + 1], cache) for s in range(4, layout.S)]
    assert torch.allclose(torch.cat(parts, 2), full, atol=1e-5)
    if which != "none":
        assert not torch.allclose(full, m.logits(seq), atol=1e-3)


@pytest.mark.parametrize("cache_class", (GrowingCache, FixedCache))
@pytest.mark.parametrize("which", ("cross", "prefix", "summed", "all"))
def test_compiled_step_equals_the_plain_one(which, cache_class, monkeypatch):
    """Also for the last step that there is room for, for a second cache and for some of the codebooks.

    It is compiled once. With the cache of a CUDA graph, whose room doubles from 8 to 64, it is compiled once
    more, for the second room and all that follow."""
    monkeypatch.setattr(FixedCache, "FIRST_ROOM", 8)
    torch._dynamo.reset()
    m, fast, c, backend = tiny(), tiny(), conditions(), CompileCounter()
    compile_step(fast, backend=backend)
    keep = only(c, which)
    P = 0 if keep.prefix is None else keep.prefix.shape[1]
    for S in (40, 50):
        seq = torch.randint(0, 11, (2, 3, S))
        with torch.inference_mode():
            plain, cache = Cache(m.config, 2, P + S, "cpu"), cache_class(m.config, 2, P + S, "cpu")
            begin = m.hidden(seq[..., :2], keep, plain)
            assert torch.allclose(fast.hidden(seq[..., :2], keep, cache), begin, atol=1e-6)
            for s in range(2, S):
                asked = range(1, 3) if s % 3 else None             # of the codebooks
                found = fast.decode_step(seq[..., s:s + 1].contiguous(), cache, asked)
                assert torch.allclose(found, m.decode_step(seq[..., s:s + 1], plain, asked), atol=1e-5), s
        assert plain.length == cache.length == int(cache.position) == P + S
        assert cache.kv[0].shape[3] == (64 if cache_class is FixedCache else P + S + 1)
        assert backend.frame_count == (2 if cache_class is FixedCache else 1)


def test_padding_of_conditions_changes_nothing():
    """Longer padding in a batch moves no logit. Without mask_padding it does, as in the public weights."""
    m, c, seq = tiny(), conditions(), torch.randint(0, 11, (2, 3, 7))
    wider = Conditions(F.pad(c.cross, (0, 0, 0, 4)), F.pad(c.cross_mask, (0, 4)),
                       F.pad(c.prefix, (0, 0, 2, 0)), F.pad(c.prefix_mask, (2, 0)), c.summed)
    assert torch.allclose(m.logits(seq, c), m.logits(seq, wider), atol=1e-5)
    loose = tiny(mask_padding=False)
    assert not torch.allclose(loose.logits(seq, c), loose.logits(seq, wider), atol=1e-3)


def test_null_condition_adds_exactly_nothing():
    m, seq = tiny(), torch.randint(0, 11, (2, 3, 7))
    null = Conditions(cross=torch.zeros(2, 4, 32), cross_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(m.logits(seq, null), m.logits(seq))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_is_the_loss_by_hand(pattern):
    """Shifted targets, realigned logits and a loop over every code give the same sums; padding is out."""
    m = tiny(pattern=pattern)
    codes = torch.randint(0, 11, (2, 3, 8))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    sums = m(codes, mask)
    logits, predicted = m.predict(codes.masked_fill(~mask[:, None], m.special))
    for k in range(3):
        by_hand = sum(-F.log_softmax(logits[b, k, t], -1)[codes[b, k, t]]
                      for b in range(2) for t in range(8) if mask[b, t] and predicted[k, t])
        assert abs((by_hand - sums[k]).item()) < 1e-4
    delays = {"delay": (0, 1, 2), "parallel": (0, 0, 0), "unrolled": (0, 0, 0)}[pattern]
    assert m.count_targets(mask).tolist() == [8 - d + 5 for d in delays]


def test_what_padding_holds_does_not_matter():
    m = tiny()
    codes, mask = torch.randint(0, 11, (1, 3, 8)), torch.arange(8)[None] < 5
    other = codes.clone()
    other[..., 5:] = (other[..., 5:] + 1) % 11
    assert torch.equal(m(codes, mask), m(other, mask))


def test_initial_loss_is_near_uniform():
    m = tiny(card=256, dim=64)
    codes = torch.randint(0, 256, (4, 3, 20))
    ce = m(codes) / m.count_targets(torch.ones(4, 20, dtype=torch.bool))
    assert (ce - math.log(256)).abs().max() < 0.7


def test_initialisation_scheme():
    m = tiny(dim=256, num_layers=3, card=100)
    for l, layer in enumerate(m.transformer.layers):
        for w in (layer.self_attn.in_proj_weight, layer.cross_attention.out_proj.weight, layer.linear1.weight,
                  layer.linear2.weight):
            std = w.shape[1] ** -0.5 / math.sqrt(2 * (l + 1))
            assert abs(w.std() / std - 0.986) < 0.02                 # truncation at 3 std takes 1.4 % off
            assert w.abs().max() <= 3 * std + 1e-6
    assert abs(m.emb[0].weight.std() * 16 - 0.986) < 0.02


def test_sinusoid():
    """Cosines first; the last frequency is 1 / max_period exactly (exponent i / (half - 1))."""
    table = lm.sinusoid(torch.tensor([0, 7]), 8)
    expected = [7 / 10_000 ** (i / 3) for i in range(4)]
    assert table[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    wanted = [math.cos(p) for p in expected] + [math.sin(p) for p in expected]
    assert torch.allclose(table[1], torch.tensor(wanted))
    assert lm.sinusoid(torch.tensor([1], dtype=torch.int64), 8).dtype == torch.float32


def test_public_shapes():
    """Parameter counts of SPEC L6, on the meta device (their text projection of 768 x D + D comes on top)."""
    for size, millions in (("small", 420), ("medium", 1839), ("large", 3257)):
        config = ModelConfig(**lm.SIZES[size])
        assert round((lm.count_parameters(config) + 769 * config.dim) / 1e6) == millions
    names = dict(tiny().named_parameters())
    shapes = {"emb.2.weight": (12, 32), "linears.0.weight": (11, 32), "out_norm.bias": (32,),
              "transformer.layers.1.self_attn.in_proj_weight": (96, 32),
              "transformer.layers.0.cross_attention.out_proj.weight": (32, 32),
              "transformer.layers.0.linear1.weight": (128, 32),
              "transformer.layers.0.norm_cross.bias": (32,)}
    for name, shape in shapes.items():
        assert names[name].shape == shape


def test_activation_checkpointing_gives_the_same_gradients():
    codes, grads = torch.randint(0, 11, (2, 3, 8)), []
    for checkpointing in (False, True):
        m = tiny().train()
        m.transformer.checkpointing = checkpointing
        m(codes).sum().backward()
        grads.append([p.grad for n, p in m.named_parameters() if "cross" not in n])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def saved(m: MusicGen, codes) -> dict:
    """What a forward pass keeps for the backward pass, but for weights: {size of a tensor: how many such}."""
    kept, weights = {}, {p.data_ptr() for p in m.parameters()}

    def pack(x):
        if x.data_ptr() not in weights:
            kept.setdefault(x.data_ptr(), x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = m(codes).sum()
    sizes = list(kept.values())
    loss.backward()  # until here no address is given away again
    return {size: sizes.count(size) for size in sizes}


def test_what_training_keeps():
    """One of the feed-forward's two wide tensors a layer, with checkpointing none; of the logits nothing."""
    codes, m = torch.randint(0, 11, (2, 3, 8)), tiny(pattern="parallel", num_layers=3).train()
    kept = saved(m, codes)
    wide, logits, x = 2 * 8 * 128, 2 * 8 * 11, 2 * 8 * 32
    assert kept[wide] == 3 and logits not in kept
    m.transformer.checkpointing = True
    kept = saved(m, codes)
    assert wide not in kept
    assert kept[x] <= 3 + 3 + 3  # the input of each layer, the gradient of each head, the last layer


@pytest.mark.parametrize("logits", [1 << 20, 33, 1])
@pytest.mark.parametrize("frozen", [None, "x", "weight"])
def test_the_loss_of_a_head(logits, frozen, monkeypatch):
    """In chunks of all 16 rows, 3 and 1: loss and gradients of `F.cross_entropy`, scaled by what comes after.

    Without gradients the loss is the same."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", logits)
    x = torch.randn(16, 8, requires_grad=frozen != "x")
    weight = torch.randn(11, 8, requires_grad=frozen != "weight")
    target = torch.randint(0, 11, (16,))
    target[[3, 4, 5, 15]] = kernels.IGNORE
    wanted = [t for t in (x, weight) if t.requires_grad]
    expected = F.cross_entropy(x @ weight.T, target, reduction="sum")
    found = head_loss(x, weight, target)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found / 7, wanted), torch.autograd.grad(expected / 7, wanted)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, target), expected.detach())


def test_the_loss_of_a_head_in_bfloat16():
    """Under autocast products are bfloat16, the softmax is not; gradients come in the type of the weights."""
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    target = torch.randint(0, 50, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(x, weight, target)
        expected = F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.01 * b.norm()


def test_dropout_is_a_function_of_the_sample():
    """Frequency, scale, and independence: of other samples, of the place, of how a batch is split."""
    x, keys = torch.ones(6, 50, 64), torch.tensor([3, 4, 3, 2**31 - 1, 0, 99], dtype=torch.int32)
    y = Dropout(0.25, keys, 1)(x, 1)
    kept = y > 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75)) and abs(kept.float().mean() - 0.75) < 0.01
    assert torch.equal(y[0], y[2])                                   # the same key drops the same
    assert torch.equal(torch.cat([Dropout(0.25, keys[i:i + 1], 1)(x[i:i + 1], 1) for i in range(6)]), y)
    other_site = Dropout(0.25, keys[:1], 1)(x[:1], 2) > 0
    flat = torch.cat([kept[[0, 1, 3, 4, 5]].flatten(1), other_site.flatten(1)]).float()
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.08  # 3,200 places: a standard error of 0.018
    assert abs(torch.corrcoef(torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()]))[0, 1]) < 0.04
    assert Dropout(0.25, None, 1)(x, 1) is x and Dropout(0.0, keys, 1)(x, 1) is x


def test_dropout_in_the_model():
    """Micro-batches give the sum of their losses; recomputed layers drop the same; without keys none does."""
    model = tiny(dropout=0.5)
    codes, keys = torch.randint(11, (4, 3, 7)), torch.arange(4, dtype=torch.int32)
    whole = model(codes, None, None, keys)
    parts = model(codes[:1], None, None, keys[:1]) + model(codes[1:], None, None, keys[1:])
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, model(codes))
    grads = []
    for model.transformer.checkpointing in (False, True):
        model.train().zero_grad()
        model(codes, None, None, keys).sum().backward()
        grads.append(model.emb[0].weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_compiled_layers_are_not_compiled_again():
    """Of 12 updates only the first 4 compile anything, though lengths of texts change from one to the next.

    Smaller batches without gradients between them compile something once, too."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m, graphs = tiny(num_layers=4), []
    m.conditioner = torch.nn.Identity()                              # hands the conditions through
    for layer in m.transformer.layers:
        layer.compile(backend="eager")  # what is compiled when does not depend on the compiler
    for step in range(12):
        c = conditions(B=4, L=4 + step % 5)
        given = Conditions(cross=c.cross, cross_mask=c.cross_mask)
        codes, mask = torch.randint(0, 11, (4, 3, 9)), torch.ones(4, 9, dtype=torch.bool)
        m.train()(codes, mask, given).sum().backward()
        if step % 4 == 3:
            with torch.no_grad():
                m.eval()(codes[:3], mask[:3], Conditions(cross=c.cross[:3], cross_mask=c.cross_mask[:3]))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[3] <= 4 and set(graphs[3:]) == {graphs[3]} and not counters["graph_break"]


def test_compiled_layers_drop_the_same_when_recomputed():
    """Were a layer's number a constant of what is compiled, the backward pass would run another graph."""
    torch._dynamo.reset()
    codes, keys, grads = torch.randint(0, 11, (2, 3, 9)), torch.arange(2, dtype=torch.int32), []
    for compiled in (False, True):
        m = tiny(num_layers=3, dropout=0.3).train()
        m.transformer.checkpointing = True
        for layer in m.transformer.layers if compiled else ():
            layer.compile(backend="aot_eager")
        m(codes, dropout_keys=keys).sum().backward()
        grads.append([p.grad for name, p in m.named_parameters() if "cross" not in name])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_decay_on_matrices_only():
    decayed, rest = lm.decay_groups(tiny(), 0.1)
    assert all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0 and sum(p.dim() == 2 for p in rest["params"]) == 3  # the three tables


def test_wrong_number_of_codebooks():
    with pytest.raises(AssertionError, match="4 codebooks, the model has 3"):
        tiny().logits(torch.zeros(1, 4, 5, dtype=torch.long))
