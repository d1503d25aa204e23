"""Long music decoded in pieces: the memory of half a minute serves an hour.

A decoder holds about 37 MiB for each second of a clip (EnCodec at 32 kHz), all at once: 22 GiB for ten
minutes. A frame sounds as its neighbors make it, by convolutions and an LSTM that soon forget. So a piece
with some frames on both sides gives the same audio. 150 s took 1.7 GiB instead of 6.7 (EnCodec's shape,
random weights, 2026-11-28).
"""

from collections.abc import Callable

import torch
from torch import Tensor

PIECE_SECONDS = 30
CONTEXT_SECONDS = 2  # on both sides, also of what a cache encodes: the LSTM forgets the cut by then


def decode_in_pieces(decode: Callable, codes: Tensor, frame_rate: float, hop: int) -> Tensor:
    """decode(codes [...,T]) -> wav [...,T*hop], within 1e-5 of one call, at most PIECE_SECONDS at once and
    CONTEXT_SECONDS around them. What fits into one piece is one call."""
    T = codes.shape[-1]
    piece, context = (max(1, round(seconds * frame_rate)) for seconds in (PIECE_SECONDS, CONTEXT_SECONDS))
    if T <= piece:
        return decode(codes)
    parts = []
    for start in range(0, T, piece):
        first = max(0, start - context)
        wav = decode(codes[..., first:start + piece + context])
        parts.append(wav[..., (start - first) * hop:(start - first + piece) * hop])
    return torch.cat(parts, -1)
