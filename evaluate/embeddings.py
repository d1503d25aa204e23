"""What distances between sets of clips are measured in, and what is kept of a set: two moments of its
embedding.

A distance is worth nothing without its embedding. There are three, and only CLAP has to be downloaded:

    codec   latents of a frozen codec's encoder before the quantizer, a sample a frame: local sound, no memory
    mel     mean and spread over half a second of 32 log-mel bands: timbre and loudness over a beat or two
    clap    audio features of a CLAP model (Wu et al. 2023) over ten seconds, through the transformers package

    clip [C,N] ─► samples [n,D] of an Embedding ─► Moments: mean [D], covariance [D,D]; those of clips add up

Legend: C channels, N samples of audio, n samples of an embedding, D numbers of each, M mel bands, V texts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support import audio, common, quality

EMBEDDINGS = ("codec", "mel", "clap")
CHUNK_SECONDS = 30.0                                     # of audio embedded at once
MEL_RATE, MEL_BANDS, MEL_SECONDS = 16_000, 32, 0.5       # Hz, bands, seconds of a sample
CLAP_RATE, CLAP_SECONDS = 48_000, 10.0                   # as CLAP was trained


@dataclass
class Moments:
    """Sums over the n samples of clips, in float64: `total` of x [D], `products` of x x^T [D,D]. They add
    up."""
    clips: int
    seconds: float
    n: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, samples: Tensor, seconds: float = 0.0) -> "Moments":
        """The moments of one clip's samples [n,D]."""
        x = samples.detach().cpu().double()                                                       # [n, D]
        assert x.dim() == 2, f"samples are [n, D], not {tuple(x.shape)}"
        return cls(1, seconds, len(x), x.sum(0), x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.clips + other.clips, self.seconds + other.seconds, self.n + other.n,
                       self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """[D]"""
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """[D,D], over n - 1."""
        return (self.products - self.n * torch.outer(self.mean, self.mean)) / max(1, self.n - 1)


def sum_moments(parts: list) -> Moments:
    """The sum of several `Moments`, in their order: the same bits whichever rank made which."""
    return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Embedding:
    """What a distance is measured in. Numbers of embeddings with other fingerprints cannot be compared."""
    name: str                                            # its kind, and of what
    fingerprint: str                                     # of its weights or settings
    sample_rate: int                                     # Hz
    what: str                                            # what a sample is
    function: Callable                                   # mono audio [N] -> samples [n,D]

    @property
    def kind(self) -> str:
        """One of EMBEDDINGS."""
        return self.name.split()[0]

    @torch.no_grad()
    def __call__(self, wav: Tensor, sample_rate: int) -> Moments:
        """The moments of a clip [C,N] of any rate, mixed to mono. A long one is embedded in pieces."""
        mono = wav.detach().float().mean(0)                                                       # [N]
        mono = audio.resample(mono, sample_rate, self.sample_rate)
        assert len(mono), "nothing to embed in a clip without samples"
        size = round(CHUNK_SECONDS * self.sample_rate)
        pieces = []
        for piece in mono.split(size):
            if len(piece) == min(size, len(mono)) or len(piece) >= self.sample_rate:
                pieces.append(piece)                     # a rest of less than a second is left out
        samples = torch.cat([self.function(piece) for piece in pieces])                           # [n, D]
        return Moments.of(samples, wav.shape[-1] / sample_rate)

    def __str__(self) -> str:
        return f"{self.name} (fingerprint {self.fingerprint[:12]}; a sample is {self.what})"


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers as float32, in the order of their names."""
    tensors = (x for _, x in sorted(module.state_dict().items()))
    return hashlib.sha256(b"".join(x.detach().float().cpu().numpy().tobytes() for x in tensors)).hexdigest()


def codec_embedding(codec) -> Embedding:
    """The latents of a codec's encoder, before they are quantized: a sample is a frame."""
    own = codec.channels // codec.streams                  # channels that the networks take at once
    device = next(codec.encoder.parameters()).device

    def latents(mono: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return codec.encoder(mono.to(device).expand(1, own, -1))[0].T                         # [T, D]

    what = f"a frame of {1000 / codec.frame_rate:g} ms of its encoder's latents"
    return Embedding(f"codec {codec.name}", weights_digest(codec.encoder), codec.sample_rate, what, latents)


def mel_embedding() -> Embedding:
    """Mean and standard deviation of log-mel bands in half seconds (dB from -60, over 10). It has no
    weights."""
    spectrum = quality.MelSpectrum(MEL_RATE, 1024, MEL_BANDS)
    window = round(MEL_SECONDS * MEL_RATE)

    def statistics(mono: Tensor) -> Tensor:
        mono = torch.nn.functional.pad(mono.cpu(), (0, max(0, window - len(mono))))
        half = mono[:len(mono) // window * window].reshape(-1, window)                            # [n, N]
        level = 2 * spectrum(half).clamp_min(1e-3).log10()                                        # [n, M, F]
        return torch.cat([level.mean(2), level.std(2)], 1)                                        # [n, 2 M]

    described = (f"mel {MEL_RATE} Hz, {MEL_BANDS} bands of 1024, "
                 f"mean and std over {MEL_SECONDS} s, floor -60 dB")
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    what = f"mean and spread of {MEL_BANDS} log-mel bands over {MEL_SECONDS:g} s"
    return Embedding(f"mel {MEL_BANDS}", fingerprint, MEL_RATE, what, statistics)


class Clap:
    """A CLAP model of the transformers package (Wu et al. 2023): features of audio and of text in one
    space."""

    def __init__(self, path: str | None):
        """path: a local folder, or a name in the hub's cache. Errors: ValueError says what is missing."""
        try:
            from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
        except ImportError:
            raise ValueError("clap needs the transformers package: pip install transformers "
                             "(or take codec or mel)") from None
        if path is None:
            raise ValueError("clap: which model? Give --clap FOLDER, "
                             "such as a download of laion/larger_clap_music")
        try:
            self.model = ClapModel.from_pretrained(path).eval()
            self.extract = ClapFeatureExtractor.from_pretrained(path)
        except Exception as error:                       # the package raises whatever it meets
            reason = common.describe_error(error)
            raise ValueError(f"--clap {path}: no CLAP model there ({reason})") from None
        self.path = path
        self.read_tokenizer, self.tokenizer = AutoTokenizer.from_pretrained, None

    @torch.no_grad()
    def audio(self, mono: Tensor) -> Tensor:
        """Features [n,D] of audio [N] at CLAP_RATE, one row each CLAP_SECONDS.

        A rest of less than a second is left out."""
        # what is longer than its maximum is cropped at random
        size = min(round(CLAP_SECONDS * CLAP_RATE), self.extract.nb_max_samples)
        pieces = mono.split(size)
        if len(pieces) > 1 and len(pieces[-1]) < CLAP_RATE:
            pieces = pieces[:-1]
        rows = []
        for piece in pieces:                             # alone: of several, it declares one at random longer
            inputs = self.extract(piece.cpu().numpy(), sampling_rate=CLAP_RATE, return_tensors="pt",
                                  padding="repeatpad")
            features = self.model.get_audio_features(**inputs)                                    # [1, D]
            rows.append(getattr(features, "pooler_output", features))    # since transformers 5 it is wrapped
        return torch.cat(rows)                                                                    # [n, D]

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """Features [D] of a text. Errors: ValueError where the folder holds no tokenizer."""
        if self.tokenizer is None:
            try:
                self.tokenizer = self.read_tokenizer(self.path)
            except Exception as error:                   # as above
                reason = common.describe_error(error)
                raise ValueError(f"--clap {self.path}: no tokenizer there ({reason})") from None
        longest = self.model.config.text_config.max_position_embeddings - 2  # RoBERTa's positions begin at 2
        ids = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        mask = ids["attention_mask"]
        features = self.model.get_text_features(input_ids=ids["input_ids"], attention_mask=mask)
        return getattr(features, "pooler_output", features)[0]                                    # [D]

    def similarity(self, wav: Tensor, sample_rate: int, texts: list) -> list:
        """Cosine similarity of a clip [C,N] with each text, the mean over its pieces."""
        mono = audio.resample(wav.float().mean(0), sample_rate, CLAP_RATE)                           # [N]
        heard = self.audio(mono)                                                                  # [n, D]
        return [float(torch.cosine_similarity(heard, self.text(text)[None]).mean()) for text in texts]

    def label_probabilities(self, wav: Tensor, sample_rate: int, labels: list) -> Tensor:
        """How likely each of V texts is to name a clip [C,N], if one of them does: [V] float64.

        It is zero-shot classification: the softmax over the model's own scaled cosines."""
        scale = float(self.model.logit_scale_a.detach().exp())           # of audio towards texts
        cosines = torch.tensor(self.similarity(wav, sample_rate, labels), dtype=torch.float64)    # [V]
        return (scale * cosines).softmax(0)


def clap_embedding(path: str | None) -> Embedding:
    """Audio features of a `Clap`."""
    clap = Clap(path)
    what = f"{CLAP_SECONDS:g} s of its audio features"
    return Embedding(f"clap {path}", weights_digest(clap.model), CLAP_RATE, what, clap.audio)


def load_embedding(name: str, codec=None, clap: str | None = None) -> Embedding:
    """One of EMBEDDINGS, of a codec or of a CLAP model's folder.

    Errors: ValueError naming the choices, or what is missing."""
    if name == "codec":
        return codec_embedding(codec)
    if name == "mel":
        return mel_embedding()
    if name == "clap":
        return clap_embedding(clap)
    raise ValueError(f"--fad_embedding {name}: choose from {', '.join(EMBEDDINGS)}")
