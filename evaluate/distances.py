"""How far one set of clips is from another: Frechet audio distance, divergence of label distributions.

A set is embedded clip by clip; only the first two moments of the embedding are kept, so that a set may be of any size:

    clips ─► samples [n,D] of an Embedding ─► Moments (mean [D], covariance [D,D]) ─┐
                                        the same of the other set ─► frechet ◄─────┘

    frechet = |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)        (Heusel et al. 2017; audio: Kilgour et al. 2019)

Such a distance is worth nothing without its embedding: three are named here, none of which need be downloaded but CLAP.

    codec   latents of a frozen codec's encoder before the quantiser; a sample is a frame: local sound, no memory
    mel     mean and spread over half a second of 32 log-mel bands: timbre and loudness over a beat or two
    clap    audio features of a CLAP model (Wu et al. 2023) over ten seconds, through the transformers package

A distance from finitely many clips is too large, by about c/N: `frechet_inf` extrapolates to 1/N = 0 (Chong & Forsyth 2020; for
audio Gui et al. 2024). It stands apart from metrics.py, which asks models for clips and judges them: this here knows no model.

Legend: C channels, N samples of audio, n samples of an embedding, D numbers of each, V values of a label.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from torch import Tensor

from support import chroma, common
import tokenizer

EMBEDDINGS = ("codec", "mel", "clap")
CHUNK_SECONDS = 30.0                                                 # of audio embedded at once
MEL_RATE, MEL_BANDS, MEL_SECONDS = 16_000, 32, 0.5                   # Hz, bands, seconds of a sample
CLAP_RATE, CLAP_SECONDS = 48_000, 10.0                               # as CLAP was trained
GROUPS = 20                                                          # parts of a set that `frechet_inf` draws subsets from
SEED = 20_200_524                                                    # of subsets and of noise


# ---------------------------------------------------------------------------------------------------------------------
# the arithmetic


@dataclass
class Moments:
    """Sums over the samples of clips, in float64: of x [D] and of x x^T [D,D]. They add up."""
    clips: int
    seconds: float
    n: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, samples: Tensor, seconds: float = 0.0) -> "Moments":
        """The moments of one clip's samples [n,D]."""
        x = samples.detach().cpu().double()                                                             # [n, D]
        assert x.dim() == 2, f"samples are [n, D], not {tuple(x.shape)}"
        return cls(1, seconds, len(x), x.sum(0), x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.clips + other.clips, self.seconds + other.seconds, self.n + other.n, self.total + other.total,
                       self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """[D]"""
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """[D,D], over n - 1."""
        return (self.products - self.n * torch.outer(self.mean, self.mean)) / max(1, self.n - 1)

    def __str__(self) -> str:
        return f"{self.clips} clips, {self.seconds:.1f} s, {self.n} samples"


def together(parts: list) -> Moments:
    """The sum of several `Moments`, in their order: the same bits however they were shared out."""
    return sum(parts[1:], parts[0])


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root [D,D] of a symmetric positive semi-definite matrix; what rounding left below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    tiny = values.abs().max() * len(values) * torch.finfo(values.dtype).eps          # the root of noise of 1e-16 would be 1e-8
    return vectors * values.where(values > tiny, 0).sqrt() @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """The Frechet distance (squared 2-Wasserstein) of the Gaussians with the moments of two sets. 0 or more; also where
    covariances are singular.

    The trace of (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2: no root of a product is needed."""
    assert a.total.shape == b.total.shape, f"{len(a.total)} numbers a sample in one set, {len(b.total)} in the other"
    A, B = a.covariance, b.covariance
    overlap = torch.linalg.svdvals(square_root(A) @ square_root(B)).sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + A.trace() + B.trace() - 2 * overlap))


def frechet_inf(reference: Moments, parts: list, points: int = 15, draws: int = 4) -> float:
    """The Frechet distance extrapolated to infinitely many clips of a set that is given in `parts` (Moments of groups of clips).

    A line is fitted through the distances of random subsets over 1/clips, and read at 0. The reference set stays as it is: its own
    bias is in every number that is compared with it. Errors: ValueError for fewer than 4 parts."""
    if len(parts) < 4:
        raise ValueError(f"{len(parts)} clips are too few to extrapolate from: at least 4")
    rng, x, y = np.random.default_rng(SEED), [], []
    for size in np.unique(np.linspace(max(2, len(parts) // 4), len(parts), points).round().astype(int)):
        for _ in range(draws if size < len(parts) else 1):
            subset = together([parts[i] for i in sorted(rng.permutation(len(parts))[:size])])
            x.append(1 / subset.clips)
            y.append(frechet(reference, subset))
    return float(np.polyfit(x, y, 1)[1])


def grouped(clips: list, groups: int = GROUPS) -> list:
    """Moments of clips added up in at most so many groups, each of clips from all over the set."""
    return [together(clips[i::groups]) for i in range(min(groups, len(clips)))]


def kl_divergence(reference: list, generated: list, values: tuple) -> float:
    """KL(reference || generated) in nats of how often each of V values occurs in two lists; half a clip more is counted of each
    value, so that one that never occurs is no infinity."""
    p, q = (np.array([Counter(heard)[v] for v in values]) + 0.5 for heard in (reference, generated))    # [V]
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def soft_divergence(reference: list, generated: list, paired: bool) -> float:
    """KL(reference || generated) in nats of clips' probabilities [V]: the mean over pairs of clips, or that of the sets' means."""
    p, q = (torch.stack(part).double() for part in (reference, generated))                              # [n, V]
    if not paired:
        p, q = p.mean(0), q.mean(0)
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1).mean())


# ---------------------------------------------------------------------------------------------------------------------
# embeddings


@dataclass(frozen=True)
class Embedding:
    """What a distance is measured in. fingerprint: of its weights or settings; numbers of another one cannot be compared."""
    name: str
    fingerprint: str
    sample_rate: int                                                 # Hz
    what: str                                                        # what a sample is
    function: Callable                                               # mono audio [N] -> samples [n,D]

    @torch.no_grad()
    def __call__(self, wav: Tensor, sample_rate: int) -> Moments:
        """The moments of a clip [C,N], mixed to mono, of any rate; long ones are embedded in pieces."""
        mono = torchaudio.functional.resample(wav.detach().float().mean(0), sample_rate, self.sample_rate)          # [N]
        assert len(mono), "nothing to embed in a clip without samples"
        size = round(CHUNK_SECONDS * self.sample_rate)
        pieces = [piece for piece in mono.split(size) if len(piece) == min(size, len(mono)) or len(piece) >= self.sample_rate]
        return Moments.of(torch.cat([self.function(piece) for piece in pieces]), wav.shape[-1] / sample_rate)

    def __str__(self) -> str:
        return f"{self.name} (fingerprint {self.fingerprint[:12]}; a sample is {self.what})"


def codec_embedding(codec) -> Embedding:
    """The latents of a codec's encoder, before they are quantised: a sample is a frame."""
    own = codec.channels // codec.lanes                              # channels that the networks take at once
    device = next(codec.encoder.parameters()).device

    def frames(mono: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return codec.encoder(mono.to(device).expand(1, own, -1))[0].T                               # [T, D]

    weights = hashlib.sha256(b"".join(x.detach().float().cpu().numpy().tobytes() for _, x in sorted(codec.encoder.state_dict().items())))
    return Embedding(f"codec {codec.name}", weights.hexdigest(), codec.sample_rate,
                     f"a frame of {1000 / codec.frame_rate:g} ms of its encoder's latents", frames)


def mel_embedding() -> Embedding:
    """Mean and standard deviation of log-mel bands in half seconds (dB from -60, divided by 10): no weights at all."""
    spectrum, window = tokenizer.MelSpectrum(MEL_RATE, 1024, MEL_BANDS), round(MEL_SECONDS * MEL_RATE)

    def statistics(mono: Tensor) -> Tensor:
        mono = torch.nn.functional.pad(mono.cpu(), (0, max(0, window - len(mono))))
        half = mono[:len(mono) // window * window].reshape(-1, window)                                  # [n, half a second]
        level = 2 * spectrum(half).clamp_min(1e-3).log10()                                              # [n, bands, F]
        return torch.cat([level.mean(2), level.std(2)], 1)                                              # [n, 2 bands]

    settings = f"mel {MEL_RATE} Hz, {MEL_BANDS} bands of 1024, mean and std over {MEL_SECONDS} s, floor -60 dB"
    return Embedding(f"mel {MEL_BANDS}", hashlib.sha256(settings.encode()).hexdigest(), MEL_RATE,
                     f"mean and spread of {MEL_BANDS} log-mel bands over {MEL_SECONDS:g} s", statistics)


class Clap:
    """A CLAP model of the transformers package (Wu et al. 2023): features of audio and of text in one space."""

    def __init__(self, path: str | None):
        """path: a local folder, or a name in the hub's cache. Errors: ValueError says what is missing."""
        try:
            from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
        except ImportError:
            raise ValueError("clap needs the transformers package: pip install transformers (or take codec or mel)") from None
        if path is None:
            raise ValueError("clap: which model? Give --clap FOLDER, such as a download of laion/larger_clap_music")
        try:
            self.model, self.extract = ClapModel.from_pretrained(path).eval(), ClapFeatureExtractor.from_pretrained(path)
        except Exception as error:                                   # the package raises whatever it meets
            raise ValueError(f"--clap {path}: no CLAP model there ({common.describe_error(error)})") from None
        self.path, self.read_tokenizer, self.tokenizer = path, AutoTokenizer.from_pretrained, None

    @torch.no_grad()
    def audio(self, mono: Tensor) -> Tensor:
        """Features [n,D] of audio [N] at CLAP_RATE, one row each CLAP_SECONDS."""
        pieces = [p.cpu().numpy() for p in mono.split(round(CLAP_SECONDS * CLAP_RATE))]
        inputs = self.extract(pieces, sampling_rate=CLAP_RATE, return_tensors="pt", padding="repeatpad")
        found = self.model.get_audio_features(**inputs)                                                 # [n, D]
        return getattr(found, "pooler_output", found)                # since transformers 5 it is wrapped

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """Features [D] of a text. Errors: ValueError where the folder holds no tokenizer."""
        if self.tokenizer is None:
            try:
                self.tokenizer = self.read_tokenizer(self.path)
            except Exception as error:                               # as above
                raise ValueError(f"--clap {self.path}: no tokenizer there ({common.describe_error(error)})") from None
        longest = self.model.config.text_config.max_position_embeddings - 2              # RoBERTa's positions begin at 2
        ids = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        found = self.model.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])          # [1, D]
        return getattr(found, "pooler_output", found)[0]

    def similarity(self, wav: Tensor, sample_rate: int, texts: list) -> list:
        """Cosine similarity of a clip [C,N] with each text, the mean over its pieces."""
        mono = torchaudio.functional.resample(wav.float().mean(0), sample_rate, CLAP_RATE)                              # [N]
        found = self.audio(mono)                                                                                        # [n, D]
        return [float(torch.cosine_similarity(found, self.text(text)[None]).mean()) for text in texts]

    def label_probabilities(self, wav: Tensor, sample_rate: int, labels: list) -> Tensor:
        """How likely each of V texts is to name a clip [C,N] if one of them does: [V] float64, the model's own softmax over its scaled
        cosines (zero-shot classification)."""
        scale = float(self.model.logit_scale_a.detach().exp())       # of audio towards texts
        return (scale * torch.tensor(self.similarity(wav, sample_rate, labels), dtype=torch.float64)).softmax(0)


def clap_embedding(path: str | None) -> Embedding:
    """Audio features of a `Clap`."""
    clap = Clap(path)
    digest = hashlib.sha256(b"".join(x.detach().float().numpy().tobytes() for _, x in sorted(clap.model.state_dict().items())))
    return Embedding(f"clap {path}", digest.hexdigest(), CLAP_RATE, f"{CLAP_SECONDS:g} s of its audio features", clap.audio)


def load_embedding(name: str, codec=None, clap: str | None = None) -> Embedding:
    """One of EMBEDDINGS. Errors: ValueError naming the choices, or what is missing."""
    if name not in EMBEDDINGS:
        raise ValueError(f"--fad_embedding {name}: choose from {', '.join(EMBEDDINGS)}")
    return {"codec": lambda: codec_embedding(codec), "mel": mel_embedding, "clap": lambda: clap_embedding(clap)}[name]()


# ---------------------------------------------------------------------------------------------------------------------
# what lies between the best and the worst


def reconstruction(wav: Tensor, codec) -> Tensor:
    """A clip [C,N] at the codec's rate through the codec and back: what a model that makes its codes can reach at best."""
    device = next(codec.parameters()).device
    return codec.decode(codec.encode(wav[None].to(device)))[0, :, :wav.shape[1]].cpu()


def noise_like(wav: Tensor, seed: int) -> Tensor:
    """Noise with the spectrum and the loudness of a clip [C,N], without its notes and beats: its phases are drawn anew.

    What a good model must be far better than: the floor."""
    spectrum = torch.fft.rfft(wav.float().cpu())                                                        # [C, bins]
    turn = 2 * math.pi * torch.rand(spectrum.shape[1], generator=torch.Generator().manual_seed(SEED + seed))
    return torch.fft.irfft(torch.polar(spectrum.abs(), turn.expand_as(spectrum)), n=wav.shape[1])       # [C, N]


# ---------------------------------------------------------------------------------------------------------------------
# sets of clips


class Clips:
    """What is kept of a set of clips: its moments in every embedding, what an analyser heard, and (`tunes`) the melodies."""

    def __init__(self, embeddings: list, hear=None, tunes: bool = False, groups: int = GROUPS):
        self.embeddings, self.hear, self.groups = embeddings, hear, groups
        self.parts = {e.name: [] for e in embeddings}                # lists of Moments, of at most `groups` groups of clips
        self.heard, self.tunes, self.taken = [], [] if tunes else None, 0

    def take(self, wav: Tensor, sample_rate: int) -> None:
        """Adds a clip [C,N]."""
        for embedding in self.embeddings:
            parts, moments = self.parts[embedding.name], embedding(wav, sample_rate)
            if len(parts) < self.groups:
                parts.append(moments)
            else:
                parts[self.taken % self.groups] += moments
        if self.hear is not None:
            self.heard += self.hear(wav[None], sample_rate)
        if self.tunes is not None:
            self.tunes.append(chroma.chroma(wav, sample_rate))
        self.taken += 1

    def kept(self) -> tuple:
        """Plain data for `merged`."""
        return self.parts, self.heard, self.tunes

    def merged(self, kept: list) -> "Clips":
        """This set, empty until now, with what several others kept, in their order."""
        for parts, heard, tunes in kept:
            for name in self.parts:
                self.parts[name] += parts[name]
            self.heard += heard
            self.tunes = None if tunes is None else self.tunes + tunes
        return self


BOUNDS = dict(generated="generated", ceiling="codec", floor="noise")


def take_all(sets: dict, reference: Tensor, number: int, sample_rate: int, codec) -> None:
    """Adds a reference clip [C,N], what the codec leaves of it, and noise like it to the sets "reference", "codec" and "noise"."""
    mono = torchaudio.functional.resample(reference.float().mean(0), sample_rate, codec.sample_rate)    # [N]
    sets["reference"].take(reference, sample_rate)
    sets["codec"].take(reconstruction(mono.expand(codec.channels, -1), codec), codec.sample_rate)
    sets["noise"].take(noise_like(reference, number), sample_rate)


def compare(sets: dict, values: dict | None = None, inf: bool = False) -> dict:
    """Figures of the sets "generated", "codec" and "noise" against "reference", {metric: {"generated", "ceiling", "floor"}}:

        fad_NAME        Frechet distance in each embedding; with `inf` also fad_inf_NAME
        kl_LABEL        divergence of what was heard, for {label: its values}: of how often a value was, or of probabilities [V]
        chroma          cosine similarity of each clip's melody with that of its own reference; floor: of another clip's

    ceiling: the reference through the codec; floor: noise with the spectra of the reference."""
    reference, result = sets["reference"], {}
    tunes = reference.tunes
    paired = tunes is not None and len(sets["generated"].tunes or ()) == len(tunes)
    for embedding in reference.embeddings:
        whole, short = together(reference.parts[embedding.name]), embedding.name.split()[0]
        result[f"fad_{short}"] = {title: frechet(whole, together(sets[kind].parts[embedding.name])) for title, kind in BOUNDS.items()}
        if inf:
            result[f"fad_inf_{short}"] = {title: frechet_inf(whole, sets[kind].parts[embedding.name]) for title, kind in BOUNDS.items()}
    for label, choices in (values or {}).items():
        heard = {kind: [h[label] for h in clips.heard] for kind, clips in sets.items()}
        soft = isinstance(heard["reference"][0], Tensor)
        result[f"kl_{label}"] = {title: soft_divergence(heard["reference"], heard[kind], paired) if soft else
                                 kl_divergence(heard["reference"], heard[kind], choices) for title, kind in BOUNDS.items()}
    if paired:
        turned = tunes[1:] + tunes[:1]
        made = sets["generated"].tunes
        pairs = dict(generated=(made, tunes), ceiling=(sets["codec"].tunes, tunes), floor=(made, turned))
        result["chroma"] = {title: float(np.mean([chroma.similarity(a, b) for a, b in zip(*pair)])) for title, pair in pairs.items()}
    return result


def table(result: dict, title: str) -> str:
    """The figures of `compare` as lines to print."""
    return "\n".join([f"{title:<34}" + "".join(f"{c:>11}" for c in BOUNDS)] +
                     [f"  {name:<32}" + "".join(f"{row[c]:>11.4g}" for c in BOUNDS) for name, row in result.items()])
