"""A codec's decoder on codes that come bit by bit: an hour of music takes the memory of half a minute, and
music can be heard while it is generated.

    z [B,D,T] ─convolution─► ─LSTM─► ─convolutions, each wider than the one before─► wav [B,C,T*hop]

Convolutions look at a few frames around one: those are kept, and computed again. An LSTM remembers for as
long as it likes: its state goes on. So the pieces equal what one call gives, whatever the weights. One call
takes about 37 MiB for each second (EnCodec at 32 kHz): 22 GiB for ten minutes.

Legend: B batch, D width of a latent vector, T frames, C channels.
"""

import torch
from encodec.modules.lstm import SLSTM
from torch import Tensor, nn

PIECE_SECONDS = 30
CONTEXT_SECONDS = 2  # on both sides of what a cache encodes: the LSTM forgets the cut by then


class PieceDecoder:
    """decoder(z) for a SEANetDecoder and one z [B,D,T], of which piece after piece is given."""

    def __init__(self, decoder: nn.Module):
        layers = decoder.model
        cuts = [i for i, layer in enumerate(layers) if isinstance(layer, SLSTM)]       # one, or none
        self.parts = [Convolutions(layers[:i]) for i in cuts] + [Memory(layers[i]) for i in cuts]
        self.parts.append(Convolutions(layers[cuts[0] + 1:] if cuts else layers))

    def __call__(self, z: Tensor, is_last: bool) -> Tensor | None:
        """The next frames [B,D,t] -> the next audio [B,C,n], as far as no later frame changes it; None while
        that is nothing."""
        for part in self.parts:
            z = part(z, is_last)
            if z is None:
                return None
        return z


class Convolutions:
    """layers(x) for one x [B,D,T], of which piece after piece is given. Called as `PieceDecoder`."""

    def __init__(self, layers: nn.Sequential):
        self.layers = layers
        self.back, self.ahead = reach(layers)
        self.x, self.done = None, 0                    # what is still needed, and its frames that are done

    def __call__(self, x: Tensor, is_last: bool) -> Tensor | None:
        x = x if self.x is None else torch.cat([self.x, x], -1)                        # [B, D, t]
        stop = x.shape[-1] if is_last else x.shape[-1] - self.ahead
        # padding mirrors the first frames: until they are there, the beginning may change
        too_few = not is_last and x.shape[-1] <= self.back + self.ahead
        if stop <= self.done or too_few:
            self.x = x
            return None
        y = self.layers(x)                                                             # [B, D', t*hop]
        hop = y.shape[-1] // x.shape[-1]
        y = y[..., self.done * hop:stop * hop]
        first = max(0, stop - self.back)
        self.x, self.done = x[..., first:], stop - first
        return y


class Memory:
    """An LSTM, whose state goes on from piece to piece. Called as `PieceDecoder`."""

    def __init__(self, layer: SLSTM):
        self.layer, self.state = layer, None

    def __call__(self, x: Tensor, is_last: bool) -> Tensor:
        x = x.permute(2, 0, 1)                                                         # [t, B, D]
        y, self.state = self.layer.lstm(x, self.state)
        return (y + x if self.layer.skip else y).permute(1, 2, 0)                      # [B, D, t]


def reach(layers: nn.Sequential) -> tuple[int, int]:
    """How many frames (back, ahead) of the input a frame of the output depends on.

    One frame that is not a number shows in whatever depends on it."""
    entry = next(m for m in layers.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)))
    half = 8
    while True:
        x = entry.weight.new_zeros(1, entry.in_channels, 2 * half + 1)
        x[..., half] = float("nan")
        y = layers(x)
        frames = y[0].isnan().any(0).nonzero().flatten() * x.shape[-1] // y.shape[-1]
        first, last = int(frames[0]), int(frames[-1])
        if first > 0 and last < 2 * half:              # all of it is inside
            return last - half, half - first
        half *= 2
