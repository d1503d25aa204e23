"""What makes the model fast on a processor, behind the names of what it computes.

    linear               y = x W^T by the library that is fastest here, with its gradients
    packed_weights       while it lasts, `linear` reads weights in the order in which a CPU reads them fastest
    attention            scaled dot-product attention, also of one row, and of bfloat16 on a CPU
    LayerNorm            in the type of the activations
    Dropout              from a hash of the sample and the place: no generator's state
    recompute            activations computed again in the backward pass instead of kept
    head_loss            cross-entropy of a head; its logits never exist all at once

Matrix products. On a GPU, and in bfloat16 anywhere, PyTorch's own choice is right. In float32 on a CPU it
asks MKL, though it carries oneDNN as well, which is the faster of the two: about twice as fast where the
processor has AVX-512 but is not Intel's (MKL keeps to AVX2 there), 1.1 times with AVX2 alone, gradients of
weights excepted.

Legend: B batch, S sequence steps, D width, H heads, N rows of a product.
"""

import contextlib
import contextvars
import math
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# PyTorch calls oneDNN by its old name.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
SLOW_BFLOAT16 = HAS_ONEDNN and not HAS_AVX512    # oneDNN multiplies it from AVX-512 on; else PyTorch, slowly
FEW_ROWS = 4              # with AVX2 alone, MKL is faster for so few as columns, and bfloat16 than float32
MIN_PACKED_ROWS = 9       # with AVX2 alone, fewer rows a step are as fast without packing
PACK_ROWS = 1024          # rows that oneDNN packs for; for small numbers it has no packed layout
FEW_KEYS = 512            # up to so many, attention of bfloat16 on a CPU is faster in float32
IGNORE = -100             # a target that does not count (the default of F.cross_entropy)
LOGITS_AT_ONCE = 1 << 21  # numbers in a part of the logits: 8 MiB of float32

# ------------------------------------------------------------------------------------------------------------
# matrix products


class Packs(dict):
    """Copies of weights in oneDNN's blocks, by address and shape of the originals, which must stay."""

    def get_pack(self, weight: Tensor) -> Tensor:
        """The packed copy of a weight [out,in], made when first asked for; only oneDNN can read it."""
        key = weight.data_ptr(), weight.shape
        if key not in self:
            self[key] = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        return self[key]


PACKS = contextvars.ContextVar("PACKS", default=None)    # of the `packed_weights` that lasts


@contextlib.contextmanager
def packed_weights(rows: int):
    """For a loop of steps of so many rows: while it lasts, each weight is packed once and then read packed.

    Generation reads the same weights at every step, and how fast they are read is all that counts. With many
    rows (a batch of 8 with guidance has 16) a packed copy is worth its memory. With few it is as fast
    without; with AVX-512 they are packed all the same, because packed products give a row the same bits
    beside any number of others. Weights must not change meanwhile. 0 rows: nothing is packed."""
    few = 1 if HAS_AVX512 else MIN_PACKED_ROWS
    token = PACKS.set(Packs() if rows >= few else None)
    try:
        yield
    finally:
        PACKS.reset(token)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by oneDNN, without gradients: x [...,in], weight [out,in] in any memory order -> [...,out]."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def product_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """`product` for a few rows, as W x^T, in parts of W that threads can share."""
    parts, rows = math.gcd(len(weight), 16), x.reshape(-1, x.shape[-1])
    blocks = weight.reshape(parts, -1, weight.shape[1])                               # [parts, out/parts, in]
    columns = torch.bmm(blocks, rows.T.expand(parts, -1, -1))                         # [parts, out/parts, N]
    return columns.view(len(weight), -1).T.contiguous().view(*x.shape[:-1], -1)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dy^T x [out,in] from dy [N,out] and x [N,in]."""
    return linear(dy.T, x.T) if HAS_AVX512 else dy.T @ x     # oneDNN copies dy: with AVX2 alone MKL is faster


class SavedForGradients(torch.autograd.Function):
    """Saves what the gradients of y = x W^T need:     dx = dy W     dW = dy^T x

    Its output has the shape of y [N,out] and no content; `Product` puts y there. They are two, because
    recomputing stops as soon as everything is saved again: so it stops before the product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(len(x), len(weight))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        dx = product(dy, weight.T) if ctx.needs_input_grad[0] else None
        dW = weight_gradient(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dW


class Product(torch.autograd.Function):
    """`product`, whose gradients go to the output of `SavedForGradients`."""

    @staticmethod
    def forward(ctx, saved: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        return dy, None, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,in] and weight [out,in] -> [...,out], as `F.linear`; also of a `quantize.Matrix`."""
    if not isinstance(weight, Tensor):
        return weight.product(x)
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():    # these choose for themselves
        return F.linear(x, weight)
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not (HAS_ONEDNN and fits):
        return F.linear(x, weight)
    if torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])                                             # [N, in]
        y = Product.apply(SavedForGradients.apply(rows, weight), rows.detach(), weight.detach())
        return y.view(*x.shape[:-1], len(weight))
    if not HAS_AVX512 and x.numel() <= FEW_ROWS * x.shape[-1]:
        return product_of_few(x, weight)
    packs = PACKS.get()
    if packs is None:
        return product(x, weight)
    if x.numel() == x.shape[-1]:                             # a row alone would be summed in another order
        return product(x.expand(2, *x.shape), packs.get_pack(weight))[0]
    return product(x, packs.get_pack(weight))


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


# ------------------------------------------------------------------------------------------------------------
# inside a layer


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the type of the activations: FSDP gathers the weights of a layer in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """q [B,H,S,D/H] to k, v [B,H,S',D/H] -> [B,H,S,D/H]; mask [B or 1,1,S or 1,S']: True where q may look."""
    one_row = q.shape[2] == 1 and q.device.type == "cpu" and q.dtype == torch.float32
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= FEW_KEYS:
        # of 18 keys, PyTorch's gradients take ten times as long in bfloat16
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, is_causal).bfloat16()
    if not one_row:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    q = q * q.shape[-1] ** -0.5
    if torch.compiler.is_compiling():
        # PyTorch's operator takes longer to call than to run. The compiler makes loops of these sums.
        scores = (q * k).sum(-1)[:, :, None]                                          # [B, H, 1, S']
    else:
        # The operator would split the sums among threads that the batch leaves free, and round otherwise.
        scores = q @ k.transpose(2, 3)                                                # [B, H, 1, S']
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if torch.compiler.is_compiling():
        return (weights.transpose(2, 3) * v).sum(2, keepdim=True)                     # [B, H, 1, D/H]
    return weights @ v                                                                # [B, H, 1, D/H]


def hash_int32(x: Tensor) -> Tensor:
    """Scrambles int32 numbers: xor-shift and multiply, twice (the constants are Wellons' "lowbias32")."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


class Dropout:
    """The dropout of one layer, which has up to four sites: `dropout(x, site)`.

    What is dropped is a hash of (key, layer, site, place) and needs no generator's state. So it does not
    depend on the ranks and micro-batches that a batch was split into, nor on a restart, and a layer that is
    computed again drops the same.

    p: probability; keys: int32, one a sample [B] or a step [B,S]; without keys nothing is dropped."""
    SITES = 4

    def __init__(self, p: float, keys: Tensor | None, layer: int = 0):
        self.p, self.starts = p, None
        if keys is not None and p > 0:           # not hashed in the layer: compiled, it would fix its number
            sites = range(self.SITES * layer, self.SITES * (layer + 1))
            self.starts = [hash_int32(keys + (site * 0x9E3779B1 & 0x7FFFFFFF)) for site in sites]

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """Zeroes elements of x [B,S,D] with probability p and scales the others by 1/(1-p)."""
        if self.starts is None:
            return x
        start = self.starts[site]                                                     # [B] or [B, S]
        inside = x.shape[start.dim():]                                                # [S, D] or [D]
        place = torch.arange(inside.numel(), device=x.device, dtype=torch.int32).view(inside)
        hashed = hash_int32(place + start.view(*start.shape, *[1] * len(inside)))     # [B, S, D]
        kept = (hashed & 0xFFFFFF) >= int(self.p * (1 << 24))
        return x * kept / (1 - self.p)


def recompute(function: Callable, *inputs):
    """function(*inputs), of which training keeps only the inputs; the backward pass computes the rest again.

    It stops at the last tensor that gradients need: before a final product, for instance. No generator's
    state is kept, as `Dropout` needs none."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


# ------------------------------------------------------------------------------------------------------------
# the loss of a head


class HeadLoss(torch.autograd.Function):
    """The work of `head_loss`. Gradients are computed in the forward pass, a few rows at a time, while the
    logits of these rows are there: no logits are kept or computed twice. With p the softmax of the logits z,

        dloss/dz = p - [is the target]        dx = dloss/dz W        dW = (dloss/dz)^T x

    They are summed in float32 and scaled in the backward pass, as loss scaling needs. learning: whether
    gradients will be asked for; without, none are computed."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, learning: bool) -> Tensor:
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if learning and ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if learning and ctx.needs_input_grad[1] else None
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(x), rows):
            part, goal = x[start:start + rows], target[start:start + rows, None]
            logits = linear(part, weight)                                             # [rows, card]
            log_p = logits.float().log_softmax(-1)
            loss += F.nll_loss(log_p, goal[:, 0], ignore_index=IGNORE, reduction="sum")
            if learning:
                slope = log_p.exp_().scatter_add_(1, goal.clamp_min(0), log_p.new_full(goal.shape, -1.0))
                slope = slope.mul_(goal != IGNORE).to(logits.dtype)                   # dloss/dz
                if dx is not None:
                    dx[start:start + rows] = linear(slope, weight.T)
                if dW is not None:
                    dW += weight_gradient(slope, part)
        ctx.save_for_backward(dx, dW)
        ctx.dtype = weight.dtype if learning else None
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        dx, dW = ctx.saved_tensors
        dx = None if dx is None else scale.to(dx.dtype) * dx
        dW = None if dW is None else (scale * dW).to(ctx.dtype)
        return dx, dW, None, None


def head_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Summed cross-entropy of a codebook: x [N,D], weight [card,D], target [N] or IGNORE -> float32 []."""
    return HeadLoss.apply(x, weight, target, torch.is_grad_enabled())
