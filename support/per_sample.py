"""What keeps a sample independent of its batch: noise of its own, and conditions that are encoded alone.

Legend: B batch, k codebooks that are drawn at a step, n candidates of each, L condition tokens, D width.
"""

import copy
import hashlib
import struct
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from conditioning import CONDITIONS
from model import Conditions, MusicGen
from support.kernels import hash_int32

TOKENS_MULTIPLE = 32      # so a sum over tokens takes its terms in the same order, however many are padding


class Noise:
    """Exponential noise: a hash of (seed, number of the sample, cell, code), and of nothing else.

    It needs no generator's state: so it is the same in any batch, at any place, in windows of any length, and
    on any device. A cell is a codebook's place in a frame."""

    def __init__(self, seed: int, numbers: Iterable, device="cpu"):
        """numbers: of the B samples, ints."""
        digests = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in numbers]
        keys = [struct.unpack("<2i", digest) for digest in digests]
        self.keys = torch.tensor(keys, dtype=torch.int32, device=device)                            # [B, 2]
        self.first_cell = 0

    def from_cell(self, cell: int) -> "Noise":
        """The same noise, for cells that are counted from this one: of a window within a piece."""
        later = copy.copy(self)
        later.first_cell += cell
        return later

    def __call__(self, cells: Tensor, codes: Tensor) -> Tensor:
        """cells [k] and codes [B,k,n] -> noise [B,k,n] float32, more than 0.

        Two hashes follow each other: where the first of two samples meet, the second keeps them apart."""
        cells = cells.int() + self.first_cell
        first, second = (hash_int32(key[:, None] + cells) for key in self.keys.unbind(1))           # [B, k]
        hashed = hash_int32(hash_int32(codes.int() + first[..., None]) ^ second[..., None])      # [B, k, n]
        uniform = ((hashed & 0x7FFFFF) + 0.5) / (1 << 23)            # 23 bits: exact in float32, never 0 or 1
        return -uniform.log()


def encode_conditions(model: MusicGen, values: list, guided: bool, double: bool = False) -> Conditions:
    """Conditions of the batch; if `double`, the same without texts; if `guided`, as many null ones.

    Each row {name: value or None} is encoded by itself, then padded. Where the model hides padding, there can
    be as much as rounding wants; public weights that attend to it get what the longest row needs."""
    if model.conditioner is None:
        return Conditions()
    rows = list(values)
    if double:
        for sample in values:
            rows.append({name: None if CONDITIONS[name].is_text else value for name, value in sample.items()})
    if guided:
        rows += [dict.fromkeys(v) for v in values]

    encoded = {}                                             # what several rows share is encoded once
    keys = [tuple((name, id(value)) for name, value in row.items()) for row in rows]
    for key, row in zip(keys, rows):
        if key not in encoded:
            inputs = model.conditioner.prepare([row], model.emb[0].weight.device)
            encoded[key] = model.conditioner(inputs)
    multiple = TOKENS_MULTIPLE if model.config.mask_padding else 1

    def stack(name: str) -> Tensor | None:
        """One field of all: [B, L, D], or [B, L] of a mask."""
        parts = [getattr(encoded[key], name) for key in keys]
        if parts[0] is None:
            return None
        L = -(-max(part.shape[1] for part in parts) // multiple) * multiple
        return torch.cat([F.pad(part, (0, 0) * (part.dim() - 2) + (0, L - part.shape[1])) for part in parts])

    summed = [encoded[key].summed for key in keys]
    return Conditions(stack("cross"), stack("cross_mask"), stack("prefix"), stack("prefix_mask"),
                      None if summed[0] is None else torch.cat(summed))
