"""Muon: the matrices of the layers move by orthogonal steps, all other weights by AdamW.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The momentum of a matrix has a few large directions
and many small ones. Muon gives all of them one length, so that rare ones are learned as well. Steps are about
as long as AdamW's (Liu et al. 2025, arXiv:2502.16982): at learning rate 1 a weight moves by 0.2 (RMS).

    momentum [out,in] ─► blocks [N,d,D] ─ Newton-Schulz ─► rows nearly orthonormal ─► step [out,in]

A block of attention is what one head reads from the stream of width D, or writes to it: d rows of the
queries, keys or values, d columns of the projection after them. The feed-forward reads and writes the stream
in slices of d: blocks [N,d,4D]. As one block it would learn hardly more an update, and take twenty times the
products at width 512 (docs/real_music.md).

torch.optim.Muon (torch 2.11) takes one whole matrix after the other, and only plain ones: it would make the
queries, keys and values that lie in one matrix orthogonal to each other, and of a sharded matrix (a DTensor)
it knows nothing.

Legend: N blocks, d rows of a block: the width of a head; D width.
"""

import argparse

import torch
from torch import Tensor, nn

from support.distributed import full_tensor, shard_like

MOMENTUM = 0.95                             # decay of the mean gradient, with Nesterov's look ahead
POLYNOMIAL = (3.4445, -4.7750, 2.0315)      # of Jordan et al.: five times, it takes singular values near 1
ITERATIONS = 5
STEP_RMS = 0.2
NUMBERS_AT_ONCE = dict(cpu=2**20, cuda=2**26)   # in blocks: what a CPU's cache holds, what fills a GPU


@torch.no_grad()
def orthogonalize(blocks: Tensor) -> Tensor:
    """Blocks [N,d,D], d <= D -> the same directions, with singular values between .7 and 1.2.

    Newton-Schulz, X <- (aI + b XX' + c (XX')^2) X, only ever multiplies X from the left. So it runs on XX'
    [N,d,d], collects the factors, and multiplies X once. Directions below a thousandth of the largest stay
    small."""
    a, b, c = POLYNOMIAL
    gram = blocks @ blocks.mT                                                         # [N, d, d]
    squares = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-20             # [N, 1, 1]
    gram = gram / squares                                            # no eigenvalue is above 1
    factors = squares.rsqrt()                                                         # [N, 1, 1]
    for i in range(ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factors = polynomial @ factors if i else polynomial * factors                 # [N, d, d]
        if i < ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    return factors @ blocks                                                           # [N, d, D]


def muon_groups(groups: list, model: nn.Module, lr_scale: float) -> list:
    """AdamW's groups with the matrices of a MusicGen's layers in groups of their own, as `Muon` takes them.

    lr_scale: of the matrices' learning rate."""
    D = model.config.dim
    d = D // model.config.num_heads
    attention, feed_forward = (d, D), (d, D * model.config.hidden_scale)
    # the shape of a block, and whether its rows are columns of the matrix
    kinds = {"in_proj_weight": (attention, False), "out_proj.weight": (attention, True),
             "linear1.weight": (feed_forward, True), "linear2.weight": (feed_forward, False)}
    blocks = {p: kind for name, p in model.transformer.layers.named_parameters()
              for end, kind in kinds.items() if name.endswith(end)}
    split = []
    for group in groups:
        parts = {}
        for p in group["params"]:
            parts.setdefault(blocks.get(p), []).append(p)
        for kind, params in parts.items():
            more = {} if kind is None else dict(block=kind[0], by_columns=kind[1], lr_scale=lr_scale)
            split.append({**group, **more, "params": params})
    return split


def build_optimizer(groups: list, model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, for AdamW's groups of a MusicGen."""
    betas = (args.beta1, args.beta2)
    if args.optimizer == "muon":
        return Muon(muon_groups(groups, model, args.muon_lr / args.lr), args.lr, betas)
    return torch.optim.AdamW(groups, args.lr, betas, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for the groups of `muon_groups` that have blocks, AdamW for the rest. lr, betas: AdamW's."""

    def __init__(self, groups: list, lr: float, betas: tuple):
        super().__init__(groups, dict(lr=lr, block=None))
        others = [group for group in self.param_groups if not group["block"]]
        self.adamw = torch.optim.AdamW(others, lr, betas, fused=True)
        self.adamw.state = self.state                                # one for both

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that are there. All ranks call it together."""
        self.adamw.step()
        for group in self.param_groups:
            if group["block"]:
                self.step_matrices(group)

    def step_matrices(self, group: dict) -> None:
        """Moves the matrices of a group, as many at once as there is room for."""
        waiting, numbers = [], 0
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            # a matrix that is sharded is gathered, and made orthogonal on every rank
            x = full_tensor(p.grad.lerp(momentum, MOMENTUM))                          # [out, in]
            x = x.mT if group["by_columns"] else x
            waiting.append((p, x.reshape(-1, *group["block"])))                       # [N, d, D]
            numbers += p.numel()
            if numbers >= NUMBERS_AT_ONCE.get(p.device.type, 2**26) or p is params[-1]:
                move(waiting, group)
                waiting, numbers = [], 0


def move(waiting: list, group: dict) -> None:
    """Moves matrices by their momenta in blocks: [(matrix [out,in], blocks [N,d,D])]."""
    blocks = orthogonalize(torch.cat([x for _, x in waiting]))
    length = group["lr"] * STEP_RMS * blocks.shape[2] ** 0.5         # orthonormal rows: an RMS of 1/sqrt(D)
    for p, x in zip([p for p, _ in waiting], blocks.split([len(x) for _, x in waiting])):
        x = x.flatten(0, 1)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(shard_like(x.mT if group["by_columns"] else x, p), alpha=length)
