"""Weights held in fewer bits while music is generated: `--weights int8` or `bfloat16`.

A decoding step reads every matrix of the layers for a few rows, and how fast they are read is how fast it is.
int8 is a quarter of float32's bytes. Embeddings, norms and conditioners stay as they are, and so do files:
matrices are converted when a model is loaded.

    W [out,in]  ~  scale [out,1] * q [out,in] in -127..127          x W^T  ~  scale * (x q^T)

FBGEMM, which PyTorch carries for x86 processors, multiplies integers: a row of x becomes eight bits as well,
with a scale of its own, so that it gets the same bits beside any other rows. Elsewhere a row stays bfloat16.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from model import MusicGen
from support import kernels

STORED_AS = ("float32", "bfloat16", "int8")
LEVELS = 127                             # of a weight, on each side of zero
SMALLEST = 1e-12                         # a row of zeros is divided by this

# ------------------------------------------------------------------------------------------------------------
# kinds of matrices. `support.kernels.linear` takes one in the place of a weight


class Matrix:
    """A weight [out,in] in fewer bits; `product` is x W^T.

    cuts: rows at which it is cut, so that `matrix[start:stop]` between two cuts is a matrix as well."""

    def __init__(self, weight: Tensor, cuts: tuple = ()):
        self.rows, edges = len(weight), [0, *cuts, len(weight)]
        self.parts = {part: type(self)(weight[slice(*part)]) for part in zip(edges, edges[1:]) if cuts}
        if not cuts:
            self.pack(weight)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice) -> "Matrix":
        return self.parts[rows.start or 0, self.rows if rows.stop is None else rows.stop]

    def pack(self, weight: Tensor) -> None:
        """Keeps a weight as `product` reads it."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x [...,in] -> [...,out] in the type of x."""
        raise NotImplementedError


class Bfloat16Matrix(Matrix):
    """The upper half of each number. Where a CPU multiplies these slowly, many rows get them widened."""

    def pack(self, weight: Tensor) -> None:
        """As `Matrix.pack`."""
        self.weight = weight.bfloat16()

    def product(self, x: Tensor) -> Tensor:
        """As `Matrix.product`."""
        few = x.numel() <= kernels.FEW_ROWS * x.shape[-1]
        if x.device.type == "cpu" and kernels.SLOW_BFLOAT16 and not few:
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x.bfloat16(), self.weight).to(x.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out,in] -> (q [out,in] int8, scale [out] float32) with weight ~ scale[:, None] * q."""
    scale = (weight.abs().amax(1).float() / LEVELS).clamp_min(SMALLEST)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Matrix(Matrix):
    """For rows of bfloat16: on Arm by a kernel of PyTorch's, on a GPU converted on the way."""

    def pack(self, weight: Tensor) -> None:
        """As `Matrix.pack`."""
        self.q, scale = quantize_rows(weight)
        self.scale = scale.bfloat16()

    def product(self, x: Tensor) -> Tensor:
        """As `Matrix.product`."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        if x.device.type == "cpu":
            y = torch._weight_int8pack_mm(rows, self.q, self.scale)
        else:
            y = F.linear(rows, self.q.bfloat16()) * self.scale
        return y.view(*x.shape[:-1], -1).to(x.dtype)


class FbgemmMatrix(Matrix):
    """For rows of integers, by FBGEMM: no row depends on another."""
    handles = weakref.WeakValueDictionary()      # compiled code knows numbers, not objects
    # FBGEMM adds two products in 16 bits where the processor has no VNNI: rows of seven bits keep them whole
    levels = 127 if torch.cpu._is_vnni_supported() else 63

    def pack(self, weight: Tensor) -> None:
        """As `Matrix.pack`: in the order in which FBGEMM reads."""
        q, scale = quantize_rows(weight)
        zeros = torch.zeros(len(q), dtype=torch.int64)
        q = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(q, None)
        self.handles[id(self)] = self

    def multiply(self, x: Tensor) -> Tensor:
        """x [...,in] within -1..1 -> [...,out]."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
            x, 1 / self.levels, self.levels + 1, self.packed)

    def product(self, x: Tensor) -> Tensor:
        """As `Matrix.product`."""
        size = x.float().abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
        x_scaled = x / size
        if torch.compiler.is_compiling():
            y = torch.ops.nanomusicgen.fbgemm_product(x_scaled, id(self), self.rows)
        else:
            y = self.multiply(x_scaled)
        return (y * size).to(x.dtype)


LIBRARY = torch.library.Library("nanomusicgen", "DEF")
LIBRARY.define("fbgemm_product(Tensor x, int handle, int rows) -> Tensor")
LIBRARY.impl("fbgemm_product", lambda x, handle, rows: FbgemmMatrix.handles[handle].multiply(x), "CPU")
LIBRARY.impl("fbgemm_product", lambda x, handle, rows: x.new_empty((*x.shape[:-1], rows)), "Meta")


# ------------------------------------------------------------------------------------------------------------
# of a model


def matrix_class(weights: str, device: torch.device) -> type[Matrix]:
    """The kind of matrix for "bfloat16" or "int8" that is the fastest on a device."""
    if weights == "bfloat16":
        return Bfloat16Matrix
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    return FbgemmMatrix if device.type == "cpu" and has_fbgemm else Int8Matrix


def store_weights(model: MusicGen, weights: str) -> MusicGen:
    """The model itself, which holds the matrices of its layers and heads as one of STORED_AS from now on.

    They are converted one after the other. It can then generate, not learn. Errors: ValueError for another
    kind."""
    if weights not in STORED_AS:
        raise ValueError(f"weights {weights!r}: choose from {', '.join(STORED_AS)}")
    if weights == "float32":
        return model
    kind = matrix_class(weights, model.emb[0].weight.device)
    for path, module in [*model.transformer.named_modules(), *model.linears.named_modules()]:
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight.dim() != 2 or "_lora" in path:
                continue
            # Cross-attention computes queries at each step, keys and values once
            cuts = (weight.shape[1],) if path.endswith("cross_attention") else ()
            delattr(module, name)
            setattr(module, name, kind(weight.detach(), cuts))
            del weight
    return model
