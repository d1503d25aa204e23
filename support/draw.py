"""How often each file of a dataset is drawn: --min_seconds, --sample_by, and the weights of a manifest.

    files       weights      cumulative shares          a pass over 4 files: a draw from each quarter
    a  90 s     90           ├──────────a──────────┤     | a | a | a, b or c | c |
    b  10 s     10           ├b┤                        in an order of its own
    c  20 s     20           ├─c──┤

Of n files a pass makes n draws, one from each n-th part of the shares: every file is drawn as often as its
share says, to within one. Where all weights are equal, that is each file once.
"""

import numpy as np

SAMPLE_BY = ("file", "duration")


def long_enough(entries: list, min_seconds: float) -> list:
    """The files of at least so many seconds. Errors: ValueError where there is none."""
    if not 0 <= min_seconds < float("inf"):
        raise ValueError(f"--min_seconds {min_seconds}: at least 0")
    kept = [entry for entry in entries if entry.seconds >= min_seconds]
    if entries and not kept:
        longest = max(entry.seconds for entry in entries)
        raise ValueError(f"--min_seconds {min_seconds:g} leaves no file for training or for validation: the "
                         f"longest of {len(entries)} has {longest:.2f} s")
    return kept


def draw_weights(entries: list, sample_by: str) -> np.ndarray:
    """The weight of each file in the draw. Errors: ValueError where none would be drawn."""
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"--sample_by {sample_by}: choose {' or '.join(SAMPLE_BY)}")
    weights = np.array([1.0 if entry.weight is None else entry.weight for entry in entries])
    if sample_by == "duration":
        weights *= [entry.seconds for entry in entries]
    if len(weights) and not weights.sum() > 0:
        raise ValueError(f"all {len(entries)} files for training or for validation have weight 0")
    return weights


def cumulative_shares(entries: list, sample_by: str) -> np.ndarray | None:
    """The shares of all files up to each, ascending to 1; None where all are equal. Errors: as above."""
    weights = draw_weights(entries, sample_by)
    if len(set(weights)) <= 1:
        return None
    shares = np.cumsum(weights)
    return shares / shares[-1]


def draw_by_shares(shares: np.ndarray, part: int, rng: np.random.Generator) -> int:
    """The number of a file: anywhere in the given one of n equal parts of the shares."""
    return int(np.searchsorted(shares, (part + rng.random()) / len(shares), side="right"))


def describe_draws(entries: list, segment_seconds: float, sample_by: str) -> str:
    """One line on files shorter than a segment, whose examples are padded: their share of the draws.

    Errors: ValueError for a segment of no length."""
    if not 0 < segment_seconds < np.inf:
        raise ValueError(f"--segment_seconds {segment_seconds:g}: more than 0 seconds")
    short = np.array([entry.seconds < segment_seconds for entry in entries])
    shares = {}
    for by in SAMPLE_BY:
        weights = draw_weights(entries, by)
        shares[by] = f"{100 * weights[short].sum() / weights.sum():.2f} %"
    other, = set(SAMPLE_BY) - {sample_by}
    return (f"{shares[sample_by]} go to the {short.sum()} files shorter than a segment of "
            f"{segment_seconds:g} s, with --sample_by {other} {shares[other]} (see --min_seconds)")
