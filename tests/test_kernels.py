"""Linear layers by oneDNN: the numbers and gradients of PyTorch's own, and only where they should be."""

import pytest
import torch
import torch.nn.functional as F

from support import kernels
from model import ModelConfig, Transformer, init_transformer

NO_ONEDNN = "no oneDNN for this processor: PyTorch's own products are used"
here = pytest.mark.skipif(not kernels.HAS_ONEDNN, reason=NO_ONEDNN)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@here
@pytest.mark.parametrize("shape", [(64,), (2, 1, 64), (9, 64), (3, 40, 64)])
@pytest.mark.parametrize("rows", [slice(None), slice(16, None)])
@pytest.mark.parametrize("wide", [True, False])
def test_values_and_gradients(shape, rows, wide, monkeypatch):
    """Also of rows of a weight, and where only one of the two wants a gradient. `F.linear` is not called."""
    monkeypatch.setattr(kernels, "HAS_AVX512", wide)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    expected = F.linear(x, weight[rows])
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, weight), dy)
    monkeypatch.setattr(F, "linear", None)
    close(kernels.linear(x, weight[rows]), expected)
    found = torch.autograd.grad(kernels.linear(x, weight[rows]), (x, weight), dy)
    for gradient, reference in zip(found, gradients):
        close(gradient, reference)
    close(*torch.autograd.grad(kernels.linear(x.detach(), weight[rows]), weight, dy), gradients[1])
    close(*torch.autograd.grad(kernels.linear(x, weight.detach()[rows]), x, dy), gradients[0])
    with torch.no_grad():
        found = kernels.linear(x, weight[rows])
        close(found, expected.detach())
        assert found.is_contiguous()  # attention wants it, and the next product


@here
def test_recomputing_stops_before_the_last_product(monkeypatch):
    """A layer has four products and eight of gradients. Recomputing its feed-forward's activations repeats no
    product; recomputing all of the layer repeats those before the last."""
    products = []
    product = kernels.product

    def counted(x, weight):
        products.append(weight.shape)
        return product(x, weight)

    monkeypatch.setattr(kernels, "product", counted)
    monkeypatch.setattr(kernels, "HAS_AVX512", True)
    stack = Transformer(ModelConfig(dim=64, num_layers=1, num_heads=2, cross_attention=False))
    init_transformer(stack)
    for stack.checkpointing, count in ((False, 12), (True, 15)):
        products.clear()
        stack(torch.randn(2, 5, 64, requires_grad=True), None, None, None).sum().backward()
        assert len(products) == count


@here
def test_packed_once_and_the_same():
    """Rows of one weight that are a weight of their own have a pack of their own."""
    weight = torch.randn(96, 64)
    with torch.inference_mode(), kernels.packed_weights(rows=16):
        for step in range(3):
            x = torch.randn(16, 1, 64)
            close(kernels.linear(x, weight), F.linear(x, weight))
            close(kernels.linear(x, weight[:32]), F.linear(x, weight[:32]))
            assert len(kernels.PACKS.get()) == 2
    assert kernels.PACKS.get() is None
    with kernels.packed_weights(rows=0):
        assert kernels.PACKS.get() is None, "a compiled step packs its weights itself"


@pytest.mark.skipif(not kernels.HAS_AVX512, reason="MKL rounds otherwise here")
def test_a_row_attends_with_the_same_bits_in_any_batch():
    """For one query PyTorch's operator splits the keys among the threads that a small batch leaves free."""
    q, (k, v) = torch.randn(9, 4, 1, 48), torch.randn(2, 9, 4, 112, 48)
    mask, before, found = torch.rand(9, 1, 1, 112) > 0.3, torch.get_num_threads(), []
    close(kernels.attention(q, k, v, mask, False), F.scaled_dot_product_attention(q, k, v, mask))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for B in (1, 2, 9):
                found.append(kernels.attention(q[:B], k[:B], v[:B], mask[:B], False)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("keys", [18, kernels.FEW_KEYS + 1])
def test_few_keys_of_bfloat16_are_looked_at_in_float32(keys):
    q = torch.randn(2, 3, 6, 16).bfloat16().requires_grad_()
    k, v = torch.randn(2, 2, 3, keys, 16).bfloat16()
    mask = torch.rand(2, 1, 1, keys) > 0.3
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.attention(q, k, v, mask, False)
    y.sum().backward()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).bfloat16()
    assert y.dtype == q.grad.dtype == torch.bfloat16
    assert torch.equal(y, exact) == (keys <= kernels.FEW_KEYS)
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.02)


def test_other_types_are_left_to_pytorch(monkeypatch):
    """Autocast and bfloat16 choose for themselves; what is empty has no product."""
    monkeypatch.setattr(kernels, "product", None)
    x, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    assert kernels.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert kernels.linear(x[:0], weight).shape == (0, 5)
    monkeypatch.setattr(kernels, "HAS_ONEDNN", False)
    assert kernels.linear(x, weight).equal(F.linear(x, weight))


def test_the_compiler_is_left_to_choose():
    """Its own lowering of oneDNN's operator is for frozen weights only, and fails here."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    found = torch.compile(kernels.linear, backend=backend, fullgraph=True)(x, weight)
    assert found.equal(F.linear(x, weight)) and any("linear" in name for name in seen)
    assert not any("mkldnn" in name or "autograd_function" in name for name in seen)


def test_layer_with_a_bias():
    layer, x = kernels.Linear(8, 5), torch.randn(2, 3, 8)
    close(layer(x), F.linear(x, layer.weight, layer.bias))
