"""Low-rank fine-tuning: weights stay as they are, small additions to them are trained.

LoRA (Hu et al. 2021, arXiv:2106.09685): a matrix W [out, in] becomes W + SCALE * B A, with A [R, in] and
B [out, R]. B begins at zero, so the model begins as it was. An addition is called after its matrix:
`linear1.weight` has `linear1_lora`, `in_proj_weight` has `in_proj_lora`.
"""

import torch
from torch import Tensor, nn

from support.kernels import linear


class LowRank(nn.Module):
    """The addition to one matrix [fan_out, fan_in], of a rank R."""
    SCALE = 2.0          # alpha over the rank, as is usual

    def __init__(self, fan_in: int, fan_out: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, fan_in)), nn.Parameter(torch.zeros(fan_out, rank))
        std = fan_in ** -0.5
        nn.init.trunc_normal_(self.A, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor, rows: slice | None) -> Tensor:
        """What is added to x W^T, or to those rows of W: x [...,in] -> [...,out]."""
        B = self.B if rows is None else self.B[rows]
        return self.SCALE * linear(linear(x, self.A), B)


def lora_linear(x: Tensor, weight: Tensor, lora: LowRank | None, rows: slice | None = None) -> Tensor:
    """x W^T with what fine-tuning adds, if anything: x [...,in], weight [out,in] -> [...,out].

    rows: of the weight, None for all."""
    y = linear(x, weight if rows is None else weight[rows])
    return y if lora is None else y + lora(x, rows)


def add_lora(model: nn.Module, rank: int) -> None:
    """Freezes a MusicGen and gives every matrix of its layers a trainable addition of this rank, in place."""
    model.requires_grad_(False)
    for layer in model.transformer.layers:
        for module in layer.modules():
            if hasattr(module, "in_proj_weight"):                    # attention
                out, D = module.in_proj_weight.shape
                module.in_proj_lora, module.out_proj_lora = LowRank(D, out, rank), LowRank(D, D, rank)
        for name in ("linear1", "linear2"):
            out, fan_in = getattr(layer, name).weight.shape
            setattr(layer, f"{name}_lora", LowRank(fan_in, out, rank))


def lora_additions(weights: dict) -> dict:
    """{name of a matrix: (A [R,in], B [out,R])} of the additions among weights {name: tensor}."""
    additions = {}
    for name, A in weights.items():
        if name.endswith("_lora.A"):
            stem = name.removesuffix("_lora.A")
            matrix = f"{stem}_weight" if stem.endswith("in_proj") else f"{stem}.weight"
            additions[matrix] = A, weights[f"{stem}_lora.B"]
    return additions


def merge_lora(weights: dict) -> dict:
    """Weights {name: tensor} of the plain model that computes the same: additions are added, their names are
    gone."""
    merged = {name: x for name, x in weights.items() if "_lora." not in name}
    for matrix, (A, B) in lora_additions(weights).items():
        merged[matrix] = merged[matrix] + LowRank.SCALE * B @ A
    return merged
