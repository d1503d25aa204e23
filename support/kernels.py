"""The matrix products of linear layers, y = x W^T, and who computes them.

On a GPU, and in bfloat16 anywhere, PyTorch's own choice is right. In float32 on a CPU it asks MKL, though it carries oneDNN as well
(its compiler uses it), and oneDNN is the faster of the two: about twice as fast where the processor has AVX-512 but is not Intel's,
on which MKL keeps to AVX2; 1.1 times with AVX2 alone, dW excepted. README, "How fast", has the figures.

oneDNN's operator knows no gradients, so they stand here:

    y = x W^T        dx = dy W        dW = dy^T x

Generation reads the same weights again at every step, and how fast they are read is all that counts. With many rows (a batch of 8
with guidance has 16) it pays to store them once more in blocks as oneDNN walks through them: `Packs`, which live as long as the
key-value cache does. With a few rows and AVX2 alone MKL is the faster by 1.4 times, if it gets them as columns: `product_of_few`.
"""

import math
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")        # PyTorch calls oneDNN by its old name
WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()           # the vectors that oneDNN wins most by, and dW only by
FEW = 4                                                              # rows that MKL is faster for as columns, with AVX2 alone
UNPACKED = 8                                                         # rows a step that are as fast without packing
PACK_ROWS = 1024                                                     # that a packed layout is made for; fewer have no layout of their own


class Packs(dict):
    """Weights packed for oneDNN, made when first asked for, by the place of the plain ones, which must neither change nor go."""

    def get_pack(self, weight: Tensor) -> Tensor:
        """A weight [out,in] in oneDNN's blocks; only oneDNN can read it."""
        key = weight.data_ptr(), weight.shape
        if key not in self:
            self[key] = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        return self[key]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,in] and weight [out,in], transposed in memory or not -> [...,out], by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def product_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """`product` for a few rows, as W x^T, in parts of W that threads can share."""
    parts, rows = math.gcd(len(weight), 16), x.reshape(-1, x.shape[-1])
    columns = torch.bmm(weight.reshape(parts, -1, weight.shape[1]), rows.T.expand(parts, -1, -1))      # [parts, out/parts, N]
    return columns.view(len(weight), -1).T.contiguous().view(*x.shape[:-1], -1)


def gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW [out,in] of a weight from dy [N,out] and x [N,in]. oneDNN copies dy first: on AVX2 alone MKL is faster, by up to a half."""
    return linear(dy.T, x.T) if WIDE else dy.T @ x


class Kept(torch.autograd.Function):
    """What the gradients of a product need. Its output has the product's shape [N,out] and no content: a place in the graph.

    On its own, before `Product`, because what recomputes activations stops once the last of them is kept: here, before a product
    that nobody would look at."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(len(x), len(weight))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        dx = product(dy, weight.T) if ctx.needs_input_grad[0] else None
        dW = gradient(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dW


class Product(torch.autograd.Function):
    """`product` in the place that `Kept` made for it."""

    @staticmethod
    def forward(ctx, place: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        return dy, None, None


def linear(x: Tensor, weight: Tensor, packs: Packs | None = None) -> Tensor:
    """x [...,in] and weight [out,in] -> [...,out], as `F.linear`; packs: of a generation, in which weights stay as they are."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not (HERE and fits) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():   # which chooses for itself
        return F.linear(x, weight)
    if torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])                            # [N, in]
        return Product.apply(Kept.apply(rows, weight), rows.detach(), weight.detach()).view(*x.shape[:-1], len(weight))
    if not WIDE and x.numel() <= FEW * x.shape[-1]:
        return product_of_few(x, weight)
    return product(x, weight if packs is None else packs.get_pack(weight))


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias
