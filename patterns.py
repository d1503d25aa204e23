"""Codebooks <-> sequence steps: how K codes a frame become one sequence that a transformer predicts.

Copet et al. 2023 (MusicGen), sec. 2.2, codebook interleaving patterns. A codec gives K codes a frame. To
predict them all at once (parallel) treats them as independent given the past, which they are not. To predict
one after the other (unrolled) is exact, but costs K times the steps. Delay is the compromise: each codebook
comes one step after the one before it, so that it sees the coarser codes of its own frame.

    K=4 codebooks, T=4 frames. A number is a frame, S the special token, | ends the valid steps:

    delay    q1  S 0 1 2 3 | S S S         parallel  q1  S 0 1 2 3 |
             q2  S S 0 1 2 | 3 S S                   q2  S 0 1 2 3 |
             q3  S S S 0 1 | 2 3 S                   q3  S 0 1 2 3 |
             q4  S S S S 0 | 1 2 3                   q4  S 0 1 2 3 |

    unrolled q1  S 0 S S S 1 S S S 2 S S S 3 S S S |
             q2  S S 0 S S S 1 S S S 2 S S S 3 S S |
             q3  S S S 0 S S S 1 S S S 2 S S S 3 S |
             q4  S S S S 0 S S S 1 S S S 2 S S S 3 |

Step 0 is all special: from it the model predicts step 1. Training uses the valid steps alone: under delay no
time goes into the tail, and the last k-1 frames of codebook k are no targets. Generation walks the whole
layout.

Shapes: B batch, K codebooks of `card` codes, T frames, I inner steps a frame, S sequence steps (S_valid of
them in training).
Run it alone: `python patterns.py --T 6 --K 4` draws the grids.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from support.common import command

PATTERNS = ("delay", "parallel", "unrolled")


@dataclass(frozen=True, eq=False)              # eq=False: hashed by identity, so that it can be a cache key
class Pattern:
    """Where each code stands: code (k, t) at exactly one step, so that `frame` and `step` invert each other.

    Made by `make_pattern`, which gives the same one to all who ask: never write into the tensors."""
    frame: Tensor                              # [K, S] the frame that codebook k holds at step s; -1: special
    step: Tensor                               # [K, T] the step at which code (k, t) stands
    S_valid: int                               # steps used in training: the layout without its tail

    @property
    def K(self) -> int:
        """Codebooks."""
        return self.frame.shape[0]

    @property
    def T(self) -> int:
        """Frames."""
        return self.step.shape[1]

    @property
    def S(self) -> int:
        """Steps of the full layout with the special first one: generating a clip takes S - 1 model calls."""
        return self.frame.shape[1]

    @property
    def supervised(self) -> Tensor:
        """Which codes are a target in training: bool [K, T]."""
        return self.step < self.S_valid                                                   # [K, T]

    def to(self, device) -> "Pattern":
        """The same pattern on `device`, remembered: only the first call copies anything."""
        device = torch.device(device)
        return self if device == self.frame.device else _moved(self, device)

    def build(self, codes: Tensor, special: int, valid_only: bool = True) -> Tensor:
        """Codes [B, K, T] to the sequence [B, K, S_valid], or [B, K, S] without `valid_only`.

        `special` stands where the sequence holds no code."""
        B, K, T = codes.shape
        assert (K, T) == (self.K, self.T), f"codes [B, {K}, {T}], the pattern is for [B, {self.K}, {self.T}]"
        frame = self.to(codes.device).frame[:, :self.S_valid if valid_only else self.S]   # [K, S]
        seq = codes.gather(2, frame.clamp(min=0).expand(B, -1, -1))                       # [B, K, S]
        return seq.masked_fill(frame < 0, special)                                        # [B, K, S]

    def revert(self, seq: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """Sequence [B, K, S_valid or S] back to (codes [B, K, T], mask [K, T]).

        Codes whose step lies past the sequence's end are `fill`, and False in the mask."""
        B, K, S = seq.shape
        assert K == self.K, f"{K} codebooks, the pattern has {self.K}"
        valid = self.S_valid
        assert S in (valid, self.S), f"{S} steps, the pattern has {valid} valid ones of {self.S}"
        step = self.to(seq.device).step                                                   # [K, T]
        mask = step < S                                                                   # [K, T]
        codes = seq.gather(2, step.clamp(max=S - 1).expand(B, -1, -1))                    # [B, K, T]
        return codes.masked_fill(~mask, fill), mask

    def revert_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K, S_valid or S_valid - 1, card] of a sequence to (logits [B, K, T, card], mask [K, T]).

        To look at what a model predicts of each code, and the paper's definition of the loss, which tests
        hold against `targets`. The logits of step s predict what stands at step s + 1; those of the last
        valid step are not used. What nothing predicts is NaN (a wrong use shows at once) and False in the
        mask, which is `supervised`."""
        B, K, S, card = logits.shape
        assert K == self.K, f"{K} codebooks, the pattern has {self.K}"
        valid = self.S_valid
        assert valid - 1 <= S <= valid, f"logits of {S} steps, the pattern has {valid} valid ones"
        here = self.to(logits.device)
        source = (here.step - 1).clamp(max=self.S_valid - 2)                              # [K, T]
        logits = logits.gather(2, source[None, :, :, None].expand(B, -1, -1, card))       # [B, K, T, card]
        mask = here.supervised                                                            # [K, T]
        return logits.masked_fill(~mask[:, :, None], float("nan")), mask

    def targets(self, codes: Tensor, frame_mask: Tensor | None = None, ignore: int = -100) -> Tensor:
        """What the logits of each input step must predict: [B, K, S_valid - 1].

        codes [B, K, T]; `frame_mask` bool [B, T] is True on real frames. `ignore` stands where the sequence
        holds the special token and on frames that are not real. Training uses these: the cross-entropy is
        that of `revert_logits` against `codes`, and nothing of the size of the logits is moved."""
        if frame_mask is not None:
            B, K, T = codes.shape
            assert frame_mask.shape == (B, T), f"frame_mask {list(frame_mask.shape)}, expected [{B}, {T}]"
            assert frame_mask.dtype == torch.bool, f"frame_mask is {frame_mask.dtype}, expected torch.bool"
            codes = codes.masked_fill(~frame_mask[:, None], ignore)                       # [B, K, T]
        return self.build(codes, special=ignore)[:, :, 1:]                                # [B, K, S_valid-1]

    def first_step(self, t: int) -> int:
        """The first step that holds a code of frame t: there generation from a prompt of t frames starts."""
        assert 0 <= t < self.T, f"frame {t}, the pattern has {self.T}"
        return int(self.step[:, t].min())


def delay(T: int, delays) -> Pattern:
    """Frame t of codebook k stands at step 1 + t + delays[k]; len(delays) is K. Errors: ValueError.

    Stereo (two interleaved codebooks a level, 1L 1R 2L 2R ..) takes delays 0 0 1 1 2 2 3 3: see --stereo."""
    _check(T, len(delays), delays)
    step = 1 + np.add.outer(np.array(delays), np.arange(T))                               # [K, T]
    S = 1 + T + max(delays)
    return _pattern(step, S, S_valid=S - (max(delays) - min(delays)))


def parallel(T: int, K: int) -> Pattern:
    """All K codes of a frame at one step: delay without the delays."""
    _check(T, K)
    return delay(T, [0] * K)


def unrolled(T: int, flattening, delays=None) -> Pattern:
    """Several steps a frame: codebook k stands at the frame's inner step flattening[k], alone or with others.

    flattening 0 1 2 3 is one code a step; 0 1 1 1 is the first codebook, then the others together. An inner
    step without a codebook becomes a step of special tokens, ahead of the frame's codes. With delays, a code
    of frame t is due at time t + delays[k]; at equal times older frames go first, then lower codebooks.
    Errors: ValueError."""
    K = len(flattening)
    delays = [0] * K if delays is None else delays
    _check(T, K, delays, flattening)
    inner_steps, times = max(flattening) + 1, T + max(delays)
    used = np.zeros(inner_steps, dtype=bool)
    used[list(flattening)] = True
    inner_delay = np.zeros(inner_steps, dtype=np.int64)
    inner_delay[list(flattening)] = delays

    # Sort the cells (inner step, frame) by when they are due, then by frame, then by inner step; cells of
    # inner steps that no codebook uses go before others. A cell stands at its place in that order.
    i, t = np.indices((inner_steps, times))                                               # [I, times] each
    due = t + inner_delay[:, None]                                                        # [I, times]
    inside = due < times                                                                  # [I, times]
    keys = (i, np.where(used[i], t, -1), due)                                          # the last counts first
    order = np.lexsort([key[inside] for key in keys])                                     # [S-1]
    step = np.full((inner_steps, times), -1)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    step[inside] = 1 + rank                                                               # [I, times]
    S = 1 + len(order)
    # As in the reference, the delays' range is cut off in steps, not in frames. With delays the valid steps
    # may therefore still hold special tokens at the end, and miss codes of the last frames.
    return _pattern(step[list(flattening), :T], S, S_valid=S - (max(delays) - min(delays)))


def make_pattern(name: str, T: int, K: int, delays=None, flattening=None) -> Pattern:
    """The pattern 'delay', 'parallel' or 'unrolled' for T frames of K codebooks; asking again is free.

    Defaults: delays 0..K-1 for 'delay' and none for 'unrolled', flattening 0..K-1.
    Errors: ValueError says what is allowed."""
    delays = None if delays is None else tuple(delays)
    flattening = None if flattening is None else tuple(flattening)
    return _make(name, T, K, delays, flattening)


@lru_cache(maxsize=100)
def _make(name, T, K, delays, flattening) -> Pattern:
    if name not in PATTERNS:
        raise ValueError(f"pattern {name!r}: choose one of {', '.join(PATTERNS)}")
    if name == "parallel" and delays is not None:
        raise ValueError(f"delays {list(delays)} with pattern 'parallel': leave them out or choose 'delay'")
    if name != "unrolled" and flattening is not None:
        raise ValueError(f"flattening {list(flattening)} with pattern {name!r}: only 'unrolled' takes one")
    _check(T, K, delays, flattening)
    if name == "delay":
        return delay(T, range(K) if delays is None else delays)
    if name == "parallel":
        return parallel(T, K)
    return unrolled(T, range(K) if flattening is None else flattening, delays)


def _check(T, K, delays=None, flattening=None):
    """ValueError for what no pattern can be made of."""
    for name, value in (("T (frames)", T), ("K (codebooks)", K)):
        if not 1 <= value <= 1 << 20 or T * K > 1 << 24:
            raise ValueError(f"{name} is {value}: at least 1, at most 2^20, and 2^24 codes are allowed")
    for name, values in (("delays", delays), ("flattening", flattening)):
        if values is None:
            continue
        if len(values) != K:
            raise ValueError(f"{name} {list(values)}: {K} values are needed, one a codebook")
        if list(values) != sorted(values) or values[0] < 0:
            raise ValueError(f"{name} {list(values)}: values of 0 or more, never falling, are needed")
    if delays is not None and flattening is not None:
        for k in range(1, K):
            if flattening[k] == flattening[k - 1] and delays[k] != delays[k - 1]:
                raise ValueError(f"delays {list(delays)} with flattening {list(flattening)}: inner step "
                                 f"{flattening[k]} has delays {delays[k - 1]} and {delays[k]}, "
                                 "but one only is allowed")


# A pattern outlives the call that makes it. If made in generation's inference_mode, autograd would refuse it.
@torch.inference_mode(False)
def _pattern(step: np.ndarray, S: int, S_valid: int) -> Pattern:
    """The pattern in which code (k, t) stands at step[k, t]; S - S_valid last steps are its tail."""
    K, T = step.shape
    frame = np.full((K, S), -1)
    np.put_along_axis(frame, step, np.arange(T)[None], axis=1)                            # [K, S]
    return Pattern(torch.from_numpy(frame).long(), torch.from_numpy(step).long(), S_valid)


@lru_cache(maxsize=100)
@torch.inference_mode(False)
def _moved(pattern: Pattern, device: torch.device) -> Pattern:
    return Pattern(pattern.frame.to(device), pattern.step.to(device), pattern.S_valid)


def draw_pattern(pattern: Pattern, stereo: bool = False) -> str:
    """The pattern as K lines over S columns: a frame's number, S the special token, | after the valid steps.

    `stereo` names the lines 1L 1R 2L 2R .."""
    width = len(str(pattern.T - 1))
    lines = []
    for k, frames in enumerate(pattern.frame.tolist()):
        name = f"{k // 2 + 1}{'LR'[k % 2]}" if stereo else f"{k + 1}"
        cells = [f"{'S' if t < 0 else t:>{width}}" for t in frames]
        cells.insert(pattern.S_valid, "|")
        lines.append(" ".join([f"    q{name:<3}", *cells]))
    return "\n".join(lines)


@command("patterns.py")
def main(argv: list | None = None) -> None:
    """Draw the three patterns, and unrolled in two steps a frame, with what each costs."""
    parser = argparse.ArgumentParser(description="Draw the codebook patterns.")
    parser.add_argument("--T", type=int, default=6, help="frames (default 6)")
    parser.add_argument("--K", type=int, default=4,
                        help="codebooks, with --stereo of each channel (default 4)")
    parser.add_argument("--stereo", action="store_true",
                        help="two interleaved codebooks a level, left and right at one step")
    args = parser.parse_args(argv)
    T, channels = args.T, 2 if args.stereo else 1
    if args.K > 1024:
        raise ValueError(f"--K {args.K}: at most 1024")
    K = args.K * channels
    level = [k // channels for k in range(K)]  # of each codebook: 0 0 1 1 .. in stereo
    patterns = {
        "delay": make_pattern("delay", T, K, level),
        "parallel": make_pattern("parallel", T, K),
        "unrolled": make_pattern("unrolled", T, K, flattening=level),
        "unrolled, coarse then fine": make_pattern("unrolled", T, K, flattening=[min(k, 1) for k in level]),
    }
    print(f"T={T} frames of K={K} codebooks. A number is a frame, S the special token, "
          "| ends the valid steps.")
    for name, p in patterns.items():
        print(f"\n{name}: S={p.S} steps, {p.S_valid} valid; {p.S - 1} model calls to generate a clip; "
              f"{int(p.supervised.sum())} of {K * T} codes supervised")
        print(draw_pattern(p, args.stereo))


if __name__ == "__main__":
    sys.exit(main())
