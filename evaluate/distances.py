"""How far one set of clips is from another: Frechet audio distance, divergence of label distributions.

A set is embedded clip by clip (embeddings.py). Only two moments of the embedding are kept, so a set may be of
any size:

    frechet = |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)

with the means and the covariances A, B of both sets (Heusel et al. 2017; of audio: Kilgour et al. 2019). A
distance from finitely many clips is too large, by about c/N: `frechet_inf` extrapolates to 1/N = 0 (Chong &
Forsyth 2020; of audio: Gui et al. 2024).

A distance says little alone. It stands between a ceiling, the reference clips through the codec, and a floor,
noise with their spectra. Where a model has learned from other music than the reference, its training clips
may lie beyond the floor themselves, in the codec's latents for one:

    reference ─┬───────────────► set "reference" ◄─ distance ─┬─ set "generated": the model's clips
               ├─ the codec ───► set "codec"     ◄────────────┤
               └─ noise_like ──► set "noise"     ◄────────────┴─ set "training", in evaluation while training

Nothing here knows a model: see adherence.py and metrics.py, which ask for clips.

Legend: C channels, N samples of audio, n clips, D numbers of an embedding, V values of a label.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluate import analyser
from evaluate.embeddings import Moments, load_embedding, sum_moments
from support import audio, chroma

SUBSETS = 20                                             # parts of a set: `frechet_inf` draws subsets of them
SEED = 20_200_524                                        # of subsets and of noise
SETS = ("reference", "generated", "codec", "noise")
# column of a table: its set
COMPARED = dict(generated="generated", ceiling="codec", training="training", floor="noise")


# ------------------------------------------------------------------------------------------------------------
# the arithmetic


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root [D,D] of a symmetric positive semi-definite matrix.

    What rounding left below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # the root of noise of 1e-16 would be 1e-8
    tiny = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > tiny, 0).sqrt() @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """The Frechet distance (squared 2-Wasserstein) of the Gaussians with the moments of two sets.

    It is 0 or more, also where covariances are singular. The trace of (A^1/2 B A^1/2)^1/2 is the sum of the
    singular values of A^1/2 B^1/2, so no root of a product is needed."""
    assert a.total.shape == b.total.shape, f"samples of {len(a.total)} and of {len(b.total)} numbers"
    A, B = a.covariance, b.covariance
    overlap = torch.linalg.svdvals(square_root(A) @ square_root(B)).sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + A.trace() + B.trace() - 2 * overlap))


def frechet_inf(reference: Moments, parts: list, points: int = 15, draws: int = 4) -> float:
    """The Frechet distance extrapolated to infinitely many clips of a set: `parts` are Moments of groups of
    it.

    A line is fitted through the distances of random subsets over 1/clips, and read at 0. The reference set
    stays as it is: its own bias is in every number that is compared with it. Errors: ValueError for fewer
    than 4 parts."""
    if len(parts) < 4:
        raise ValueError(f"{len(parts)} clips are too few to extrapolate from: at least 4")
    rng, x, y = np.random.default_rng(SEED), [], []
    for size in np.unique(np.linspace(max(2, len(parts) // 4), len(parts), points).round().astype(int)):
        for _ in range(draws if size < len(parts) else 1):
            chosen = sorted(rng.permutation(len(parts))[:size])
            subset = sum_moments([parts[i] for i in chosen])
            x.append(1 / subset.clips)
            y.append(frechet(reference, subset))
    return float(np.polyfit(x, y, 1)[1])


def kl_of_counts(reference: list, generated: list, values: tuple) -> float:
    """KL(reference || generated) in nats of how often each of V values occurs in two lists.

    Half a clip more is counted of each value, so that one that never occurs is no infinity."""
    p, q = (np.array([Counter(heard)[v] for v in values]) + 0.5 for heard in (reference, generated))
    p, q = p / p.sum(), q / q.sum()                                                               # [V] x 2
    return float((p * np.log(p / q)).sum())


def kl_of_probabilities(reference: list, generated: list, paired: bool) -> float:
    """KL(reference || generated) in nats of clips' probabilities [V]: the mean over pairs of clips, or that
    of the sets' means."""
    p, q = (torch.stack(part).double() for part in (reference, generated))                        # [n, V] x 2
    if not paired:
        p, q = p.mean(0), q.mean(0)                                                               # [V] x 2
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------------------
# what lies between the best and the worst


def reconstruction(wav: Tensor, codec) -> Tensor:
    """A clip [C,N] at the codec's rate through the codec and back: what a model that makes its codes can
    reach at best."""
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(wav[None].to(device)))[0, :, :wav.shape[1]].cpu()            # [C, N]


def noise_like(wav: Tensor, seed: int) -> Tensor:
    """Noise with the spectrum and the loudness of a clip [C,N], without its notes and beats: its phases are
    drawn anew.

    It is the floor: a good model of such music must be far better."""
    spectrum = torch.fft.rfft(wav.float().cpu())                                                  # [C, bins]
    turn = 2 * math.pi * torch.rand(spectrum.shape[1], generator=torch.Generator().manual_seed(SEED + seed))
    return torch.fft.irfft(torch.polar(spectrum.abs(), turn.expand_as(spectrum)), n=wav.shape[1])  # [C, N]


# ------------------------------------------------------------------------------------------------------------
# sets of clips


class ClipSet:
    """What is kept of a set of clips: its moments in every embedding, what was heard in it, and its
    melodies."""

    def __init__(self, embeddings: list, hear: Callable | None = None, tunes: bool = False,
                 groups: int = SUBSETS):
        """hear: gives [{label: value}] of a clip [1,C,N] and its rate. tunes: whether melodies are kept."""
        self.embeddings, self.hear, self.groups = embeddings, hear, groups
        self.parts = {e.name: [] for e in embeddings}    # lists of Moments, each of a group of clips
        self.heard = []
        self.tunes = [] if tunes else None               # chromas [F,12]
        self.clips = 0

    def add(self, wav: Tensor, sample_rate: int) -> None:
        """Adds a clip [C,N]."""
        for embedding in self.embeddings:
            parts, moments = self.parts[embedding.name], embedding(wav, sample_rate)
            if len(parts) < self.groups:
                parts.append(moments)
            else:
                parts[self.clips % self.groups] += moments
        if self.hear is not None:
            self.heard += self.hear(wav[None], sample_rate)
        if self.tunes is not None:
            self.tunes.append(chroma.chromagram(wav, sample_rate))
        self.clips += 1

    def moments(self, embedding) -> Moments:
        """Of all its clips, in one of its embeddings."""
        return sum_moments(self.parts[embedding.name])

    def state(self) -> tuple:
        """Plain data for `add_state`."""
        return self.parts, self.heard, self.tunes

    def add_state(self, state: tuple) -> None:
        """Adds the clips of another set's `state`. Its groups stay apart."""
        parts, heard, tunes = state
        for name in self.parts:
            self.parts[name] += parts[name]
        self.heard += heard
        if self.tunes is not None:
            self.tunes += tunes


def add_reference(sets: dict, wav: Tensor, number: int, sample_rate: int, codec) -> None:
    """Adds reference clip `number` [C,N], what the codec leaves of it, and noise like it to their sets."""
    mono = audio.resample(wav.float().mean(0), sample_rate, codec.sample_rate)                       # [N]
    sets["reference"].add(wav, sample_rate)
    sets["codec"].add(reconstruction(mono.expand(codec.channels, -1), codec), codec.sample_rate)
    sets["noise"].add(noise_like(wav, number), sample_rate)


def compare_sets(sets: dict, labels: dict | None = None, extrapolate: bool = False) -> dict:
    """How far the other sets are from "reference": {metric: {"generated", "ceiling", "floor"}}.

        fad_KIND    Frechet distance in each embedding; with `extrapolate` also fad_inf_KIND
        kl_LABEL    divergence of what was heard, for {label: its values}: of counts, or of probabilities [V]
        chroma      cosine similarity of each clip's melody with its own reference's; floor: with another's

    chroma is there where the sets keep melodies and are pairs. "training" is a column where it is a set."""
    reference, result = sets["reference"], {}
    compared = {column: kind for column, kind in COMPARED.items() if kind in sets}
    tunes, made = reference.tunes, sets["generated"].tunes
    paired = tunes is not None and len(made or ()) == len(tunes)
    for embedding in reference.embeddings:
        whole = reference.moments(embedding)
        row = result[f"fad_{embedding.kind}"] = {}
        for column, kind in compared.items():
            row[column] = frechet(whole, sets[kind].moments(embedding))
        if extrapolate:
            row = result[f"fad_inf_{embedding.kind}"] = {}
            for column, kind in compared.items():
                row[column] = frechet_inf(whole, sets[kind].parts[embedding.name])
    for label, values in (labels or {}).items():
        heard = {kind: [h[label] for h in clips.heard] for kind, clips in sets.items()}
        row = result[f"kl_{label}"] = {}
        for column, kind in compared.items():
            if isinstance(heard["reference"][0], Tensor):
                row[column] = kl_of_probabilities(heard["reference"], heard[kind], paired)
            else:
                row[column] = kl_of_counts(heard["reference"], heard[kind], values)
    if paired:
        others = tunes[1:] + tunes[:1]
        pairs = dict(generated=(made, tunes), ceiling=(sets["codec"].tunes, tunes), floor=(made, others))
        row = result["chroma"] = {}
        for column, pair in pairs.items():
            row[column] = float(np.mean([chroma.similarity(a, b) for a, b in zip(*pair)]))
    return result


def make_in_batches(make: Callable, n: int, batch: int, ranks=None) -> list:
    """The lists make(0), make(batch), .. as one list of n.

    ranks: a distributed.Ranks; its processes share the batches out, and each gets the whole list."""
    rank, world = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    mine = [(i, make(i)) for i in range(rank * batch, n, batch * world)]
    gathered = ranks.gather(mine) if ranks else [mine]
    ordered = sorted((part for parts in gathered for part in parts), key=lambda part: part[0])
    return [x for _, made in ordered for x in made]


def against_reference(make: Callable, n: int, codec, *, batch: int = 16, ranks=None, labels: bool = False,
                      tunes: bool = False) -> dict:
    """`compare_sets` of n generated clips with reference clips, in the codec's latents and in mel statistics.

    make(i, j) gives clips i..j-1 as lists of audio [C,N] at the codec's rate: the reference, the generated
    ones and, if there are any, those of training. labels: also what the toy's analyser hears; tunes: also
    melodies. ranks: as in `make_in_batches`. Each batch is embedded by itself and added up in its order, so
    that the number of ranks changes nothing."""
    embeddings = [load_embedding("codec", codec), load_embedding("mel")]
    hear = analyser.hear if labels else None

    def embed(i: int) -> list:
        sets = defaultdict(lambda: ClipSet(embeddings, hear, tunes, groups=1))
        for number, (real, made, *training) in enumerate(zip(*make(i, min(i + batch, n)), strict=True), i):
            add_reference(sets, real, number, codec.sample_rate, codec)
            sets["generated"].add(made, codec.sample_rate)
            for wav in training:
                sets["training"].add(wav, codec.sample_rate)
        return [{kind: clips.state() for kind, clips in sets.items()}]

    sets = defaultdict(lambda: ClipSet(embeddings, hear, tunes))
    for states in make_in_batches(embed, n, batch, ranks):
        for kind, state in states.items():
            sets[kind].add_state(state)
    return compare_sets(sets, analyser.HEARD_VALUES if labels else None)


def distances_table(result: dict, title: str) -> str:
    """The figures of `compare_sets` as lines to print."""
    columns = [column for column in COMPARED if any(column in row for row in result.values())]
    lines = [f"{title:<34}" + "".join(f"{column:>11}" for column in columns)]
    for name, row in result.items():
        cells = [f"{row[column]:>11.4g}" if column in row else " " * 11 for column in columns]
        lines.append(f"  {name:<32}" + "".join(cells).rstrip())
    return "\n".join(lines)
