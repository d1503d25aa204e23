"""Audio <-> codes: the frozen codec under the language model, and the command that fits a small one.

EnCodec (Defossez et al. 2022, arXiv:2210.13438), as MusicGen uses it (Copet et al. 2023, sec. 2.1). A convolutional
encoder (SEANet) makes one vector of every `hop` samples; K codebooks describe it one after the other, each what the
ones before left over (residual vector quantisation, RVQ); the decoder makes audio of the sum:

    wav [B,C,N] -encoder-> z [B,D,T] -nearest of `card` vectors, K times over-> codes [B,K,T]
    codes [B,K,T] -sum of K vectors-> z' [B,D,T] -decoder-> wav [B,C,T*hop]           T = ceil(N / hop)

Stereo by a mono codec: each channel by itself, the codebooks of the channels in turn (1L 1R 2L 2R ..): see `over`.

The modules are those of the `encodec` package. Its quantiser encodes and decodes, but does not train: see `quantise`.
Legend: B batch, C channels, N samples, K codebooks, T frames, D latent width, V vectors of a codebook ("card").

    python tokenizer.py in.wav out.wav --codec toy               a round trip, with what it costs in quality
    python tokenizer.py in.wav out.wav --channels 2              the same in stereo
    python tokenizer.py fit --dataset toy --out codec.pt         fits a codec: minutes to hours on one core, resumable
"""

import argparse
import copy
import hashlib
import math
import os
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from encodec.modules import SConv1d, SConvTranspose1d, SEANetDecoder, SEANetEncoder
from encodec.modules.seanet import SEANetResnetBlock
from encodec.quantization import ResidualVectorQuantizer
from torch import nn

from interop.encodec import TRAINING_BUFFERS, is_codec_folder, read_codec_folder
from interop.tensors import check_shapes
from support import audio, common

TOY_FILE = Path(__file__).parent / "assets" / "toy_codec.pt"
FORMAT = "nanomusicgen codec 1"
ENCODEC_24KHZ_URL = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
ENCODEC_24KHZ_CODEBOOKS = (2, 4, 8, 16, 32)                          # 1.5, 3, 6, 12, 24 kbps

# ---------------------------------------------------------------------------------------------------------------------
# the codec


class Codec(nn.Module):
    """A frozen codec: no gradient, always in eval mode, float32 also under autocast."""

    def __init__(self, name: str, sample_rate: int, encoder: nn.Module, quantizer: nn.Module, decoder: nn.Module,
                 num_codebooks: int | None = None):
        super().__init__()
        self.name, self.sample_rate, self.channels = name, sample_rate, encoder.channels
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.hop = int(encoder.hop_length)                           # samples a frame
        self.frame_rate = sample_rate / self.hop                     # Hz
        self.lanes = 1                                               # channels that have codebooks of their own: see `over`
        self.K = quantizer.n_q if num_codebooks is None else num_codebooks
        self.card = quantizer.bins
        self.config = None                                           # plain, of `build_networks`, where it is known
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode whatever is asked: the codec is frozen."""
        return super().train(False)

    def to(self, device) -> "Codec":
        """Moves the networks. Under Apple's MPS the quantiser stays on the CPU: nearest vectors come out wrong."""
        super().to(device)
        if torch.device(device).type == "mps":
            self.quantizer.to("cpu")
        return self

    def over(self, channels: int) -> "Codec":
        """The same networks for so many channels. A mono codec takes each by itself and interleaves their codebooks:

            wav [B,2,N] -> left [B,K/2,T], right [B,K/2,T] -> codes [B,K,T]: 1L 1R 2L 2R ..

        as the stereo models of Copet et al. 2023 do. A codec whose networks take that many serves as it is.
        Errors: ValueError for any other number."""
        own = self.channels // self.lanes                            # channels that the networks take at once
        if channels not in (own, 2) or own > channels:
            raise ValueError(f"--channels {channels}: the codec {self.name} takes {own}" + (" or, each by itself, 2" if own == 1 else ""))
        other = copy.copy(self)
        other.channels, other.lanes, other.K = channels, channels // own, self.levels * (channels // own)
        return other

    @property
    def levels(self) -> int:
        """Codebooks of each channel: what `num_codebooks` counts. K of them all."""
        return self.K // self.lanes

    @property
    def reference(self) -> dict:
        """What a file says of the codec, to load the same one again."""
        return dict(name=self.name, K=self.K, levels=self.levels, channels=self.channels, fingerprint=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of K, lanes and all weights by name: codes of codecs with the same fingerprint are interchangeable."""
        lanes = f"{self.lanes} lanes " if self.lanes > 1 else ""
        digest = hashlib.sha256(f"{self.K} {self.sample_rate} {lanes}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not name.endswith(TRAINING_BUFFERS):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        """wav [B,C,N] in [-1, 1] -> codes [B,K,T] int64, T = ceil(N / hop)."""
        assert wav.dim() == 3, f"encode takes [B, C, N], not {tuple(wav.shape)}"
        B, C, N = wav.shape
        assert C == self.channels, f"{C} channels, the codec {self.name} has {self.channels}"
        assert B > 0 and N > 0, f"nothing to encode in {tuple(wav.shape)}"

        def encode_some(wav):
            z = self.encoder(wav).to(self._quantizer_device)                                            # [b, D, T]
            return self.quantizer.vq.encode(z, n_q=self.levels).transpose(0, 1)                         # [b, levels, T]

        with torch.autocast(wav.device.type, enabled=False):
            lanes = wav.float().reshape(B * self.lanes, C // self.lanes, N)                             # [B*lanes, C/lanes, N]
            codes = clip_by_clip(encode_some, lanes).to(wav.device)                                     # [B*lanes, levels, T]
        return codes.unflatten(0, (B, self.lanes)).transpose(1, 2).flatten(1, 2)                        # [B, K, T]

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [B,K,T] -> wav [B,C,T*hop] float32."""
        assert codes.dim() == 3, f"decode takes [B, K, T], not {tuple(codes.shape)}"
        B, K, T = codes.shape
        assert K == self.K, f"{K} codebooks, the codec {self.name} has {self.K}"
        assert B > 0 and T > 0, f"nothing to decode in {tuple(codes.shape)}"
        low, high = int(codes.min()), int(codes.max())
        assert 0 <= low and high < self.card, f"codes {low}..{high}, the codec {self.name} has 0..{self.card - 1}"

        def decode_some(codes):
            z = self.quantizer.vq.decode(codes.transpose(0, 1).to(self._quantizer_device))              # [b, D, T]
            return self.decoder(z.to(codes.device))                                                     # [b, C/lanes, T*hop]

        lanes = codes.unflatten(1, (-1, self.lanes)).transpose(1, 2).flatten(0, 1)                      # [B*lanes, levels, T]
        with torch.autocast(codes.device.type, enabled=False):
            return clip_by_clip(decode_some, lanes).reshape(B, self.channels, T * self.hop)             # [B, C, T*hop]

    @property
    def _quantizer_device(self) -> torch.device:
        return next(self.quantizer.buffers()).device


def clip_by_clip(function, x: torch.Tensor) -> torch.Tensor:
    """function(x) for a batch x [B,...] without gradient; on a CPU each core takes one clip after another by itself.

    Activations then stay in the core's cache and no core waits for another: twice as fast as whole batches or more, and
    the same bits whatever the batch and the number of threads."""
    if x.device.type != "cpu":
        return function(x)

    def one(clip):
        with torch.no_grad():                                        # a new thread begins with gradients on
            return function(clip)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(one, x.split(1))))
    finally:
        torch.set_num_threads(threads)                               # the pool has set the default of new threads to 1


def build_networks(config: dict) -> tuple:
    """(encoder, quantizer, decoder) of a codec's plain config: the arguments of SEANet and RVQ by their own names."""
    seanet = {**config["seanet"], "norm": "none"}                    # weight norm, if there was one, has been folded
    return SEANetEncoder(**seanet), ResidualVectorQuantizer(**config["rvq"], kmeans_init=False), SEANetDecoder(**seanet)


def _codec_of_folder(path, num_codebooks: int | None) -> Codec:
    """EnCodec out of a Hugging Face folder or an audiocraft package, its own or that of a whole MusicGen."""
    config, state = read_codec_folder(path)
    try:
        codec = Codec(str(path), config["sample_rate"], *build_networks(config), num_codebooks)
    except Exception as error:                                       # a foreign config can fail in any way
        raise ValueError(f"{path}: its configuration makes no codec ({common.describe_error(error)})") from None
    if not 1 <= codec.K <= codec.quantizer.n_q:
        raise ValueError(f"num_codebooks {codec.K}: the codec {path} has 1 to {codec.quantizer.n_q}")
    wanted = {name: x.shape for name, x in codec.state_dict().items() if not name.endswith(TRAINING_BUFFERS)}
    check_shapes(path, {name: x.shape for name, x in state.items()}, wanted)
    codec.load_state_dict(state, strict=False)
    codec.config = config
    return codec


def _codec_of_file(path, name: str, num_codebooks: int | None) -> Codec:
    what = "a codec file made by `python tokenizer.py fit`"
    stored = common.read_torch_dict(path, what)
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path}: not {what}: its format is {stored.get('format')!r}")
    try:
        codec = Codec(name, stored["config"]["sample_rate"], *build_networks(stored["config"]), num_codebooks)
        found = {k: v.shape for k, v in stored["state"].items()}
    except Exception as error:                                       # a foreign config can fail in any way
        raise ValueError(f"{path}: not {what}, or damaged ({common.describe_error(error)})") from None
    if not 1 <= codec.K <= codec.quantizer.n_q:
        raise ValueError(f"num_codebooks {codec.K}: the codec {name} has 1 to {codec.quantizer.n_q}")
    wanted = {k: v.shape for k, v in codec.state_dict().items() if not k.endswith(TRAINING_BUFFERS)}
    wrong = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
    if wrong:
        raise ValueError(f"{path}: weights do not fit its config: {wrong[0]} is {found.get(wrong[0])}, "
                         f"not {wanted.get(wrong[0])} ({len(wrong)} differ)")
    codec.load_state_dict({k: v.float() for k, v in stored["state"].items()}, strict=False)
    codec.config = stored["config"]
    return codec


def _encodec_24khz(num_codebooks: int | None) -> Codec:
    from encodec import EncodecModel
    K = 4 if num_codebooks is None else num_codebooks                # 4 as MusicGen has
    if K not in ENCODEC_24KHZ_CODEBOOKS:
        raise ValueError(f"num_codebooks {K}: encodec_24khz has {', '.join(map(str, ENCODEC_24KHZ_CODEBOOKS))}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / ENCODEC_24KHZ_URL.rsplit("/", 1)[1]
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(20)                             # seconds; without one a dead network hangs
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ENCODEC_24KHZ_URL, str(path), "d7cc33bc", progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"encodec_24khz: no download ({error}): put {ENCODEC_24KHZ_URL} at {path}") from None
        finally:
            socket.setdefaulttimeout(timeout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*")  # the package uses the old one, as does the file
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    try:
        model.load_state_dict(common.read_torch_dict(path, "the weights of encodec_24khz"))
    except RuntimeError:
        raise ValueError(f"{path}: not the weights of encodec_24khz: put {ENCODEC_24KHZ_URL} there") from None
    for module in model.modules():                                   # fold the weight norm: same output, faster
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    codec = Codec("encodec_24khz", model.sample_rate, model.encoder, model.quantizer, model.decoder, K)
    codec.config = dict(sample_rate=24_000, seanet=dict(causal=True), rvq=dict(dimension=128, n_q=32, bins=1024))     # else defaults
    return codec


def load_codec(name: str, num_codebooks: int | None = None, device="cpu", channels: int = 1) -> Codec:
    """The codec `toy` (embedded), `encodec_24khz` (public weights) or a PATH, frozen: a file of the fit command, or a folder of
    Hugging Face or audiocraft with an EnCodec in it.

    `num_codebooks` takes the first so many levels, of each channel where a mono codec serves two: see `Codec.over`.
    Errors: ValueError, one line with a way out."""
    device = common.check_device(device)
    if name == "toy":
        codec = _codec_of_file(TOY_FILE, "toy", num_codebooks)
    elif name == "encodec_24khz":
        codec = _encodec_24khz(num_codebooks)
    elif name == "encodec_48khz":
        raise ValueError("encodec_48khz scales every second by a factor of its own, which a language model over codes "
                         "loses: use encodec_24khz")
    elif is_codec_folder(name) or Path(name).is_dir():
        codec = _codec_of_folder(name, num_codebooks)
    elif Path(name).exists() or Path(name).suffix:
        codec = _codec_of_file(Path(name), str(name), num_codebooks)
    else:
        raise ValueError(f"codec {name!r}: choose toy, encodec_24khz or the path of a codec")
    return codec.over(channels).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# what a round trip costs


def si_snr(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-noise ratio [B] in dB of [B,C,N] (Le Roux et al. 2019)."""
    assert estimate.shape == target.shape, f"{tuple(estimate.shape)} against {tuple(target.shape)}"
    estimate, target = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (estimate, target))   # [B, C*N]
    gain = (estimate * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True).clamp_min(1e-9)
    noise = (estimate - gain * target).square().sum(1).clamp_min(1e-9)
    return 10 * ((gain * target).square().sum(1) / noise).clamp_min(1e-9).log10()


class MelSpectrum(nn.Module):
    """Mel magnitudes [B, M, F] of mono audio [B, N]; a full-scale sine is about 1."""

    def __init__(self, sample_rate: int, n_fft: int, mels: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft))
        banks = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate)
        self.register_buffer("banks", banks.T.contiguous() * 4 / n_fft)                                 # [M, n_fft/2+1]

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        spec = torch.stft(wav, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        return self.banks @ torch.view_as_real(spec).square().sum(-1).add(1e-10).sqrt()                 # [B, M, F]


def mel_distance(estimate: torch.Tensor, target: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Mean absolute difference [B] in dB of 64 mel bands of [B,C,N], everything under -60 dB of full scale levelled."""
    assert estimate.shape == target.shape, f"{tuple(estimate.shape)} against {tuple(target.shape)}"
    mel = MelSpectrum(sample_rate, 1024, 64).to(target.device)
    missing = max(0, mel.n_fft - target.shape[-1])                   # samples: less than one window of them
    pair = (F.pad(x.float().mean(1), (0, missing)) for x in (estimate, target))                         # [B, N] each
    a, b = (20 * mel(x).clamp_min(1e-3).log10() for x in pair)                                          # [B, M, F]
    return (a - b).abs().mean((1, 2))


def perplexities(codes: torch.Tensor, card: int) -> list:
    """Perplexity of each codebook's code frequencies in codes [B,K,T]: 1 (one code) to card (all alike)."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=card) for c in codes.unbind(1)]).float()  # [K, V]
    p = counts / counts.sum(1, keepdim=True)
    return (-(p * p.clamp_min(1e-12).log()).sum(1)).exp().tolist()


def quality(codec: Codec, wav: torch.Tensor) -> dict:
    """A round trip of wav [B,C,N]: {"si_snr_db", "mel_db": means over clips, "perplexity": [K]}."""
    codes = codec.encode(wav)                                                                           # [B, K, T]
    back = codec.decode(codes)[..., :wav.shape[-1]]                                                     # [B, C, N]
    return {"si_snr_db": float(si_snr(back, wav).mean()), "perplexity": perplexities(codes, codec.card),
            "mel_db": float(mel_distance(back, wav, codec.sample_rate).mean())}


# ---------------------------------------------------------------------------------------------------------------------
# fitting: data


class Segments:
    """Random training audio, a function of (seed, step, place in the batch) alone, so that resuming is exact."""

    def __init__(self, dataset: str, sample_rate: int, channels: int, samples: int, grid: int, seed: int):
        self.sample_rate, self.channels, self.samples, self.grid, self.seed = sample_rate, channels, samples, grid, seed
        self.files = None
        self.bad = set()
        if dataset == "toy":
            import toy
            self.toy = toy
            if (sample_rate, channels) != (toy.SAMPLE_RATE, 1):
                raise ValueError(f"--dataset toy is mono at {toy.SAMPLE_RATE} Hz, not {channels} x {sample_rate} Hz")
            if samples > toy.SAMPLE_RATE * toy.CLIP_SECONDS:
                raise ValueError(f"--segment_seconds {samples / sample_rate:g}: toy clips have {toy.CLIP_SECONDS} s")
            return
        if not Path(dataset).is_dir():
            raise ValueError(f"--dataset {dataset}: no such folder (or give the word toy)")
        files = sorted(p for p in Path(dataset).rglob("*") if p.suffix.lower() in audio.AUDIO_SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"--dataset {dataset}: no {' '.join(audio.AUDIO_SUFFIXES)} in it")
        held = files[::20] if len(files) >= 20 else files            # one file in twenty only validates
        self.files = {"valid": held, "train": [f for f in files if f not in set(held)] or files}
        print(f"{len(files)} audio files, {len(held)} of them to validate on", flush=True)

    def batch(self, step: int, size: int, split: str = "train") -> torch.Tensor:
        """Audio [B,C,N] of a step: half as it is, half at a gain of .6 to 1.2, one in eight mixed with another."""
        rows = []
        for i in range(size):
            rng = np.random.default_rng((self.seed, ("train", "valid").index(split), step, i))
            wav = self._one(rng, split)                                                                 # [C, N]
            if split == "train":
                if rng.random() < 1 / 8:
                    wav = 0.7 * (wav + self._one(rng, split, grid=1))
                if rng.random() < 1 / 2:
                    wav = wav * rng.uniform(0.6, 1.2)
            rows.append(wav)
        return torch.stack(rows).float()                                                                # [B, C, N]

    def _one(self, rng: np.random.Generator, split: str, grid: int | None = None) -> torch.Tensor:
        """One segment [C, N]; toy clips are cut on multiples of the hop, where their notes begin."""
        if self.files is None:
            clip = self.toy.make_clip(int(rng.integers(2 ** 31)), 0, 0, split=split).wav
            grid = grid or self.grid
            start = grid * int(rng.integers((len(clip) - self.samples) // grid + 1))
            return torch.from_numpy(clip[None, start:start + self.samples])                             # [C, N]
        for _ in range(100):
            path = self.files[split][rng.integers(len(self.files[split]))]
            place = rng.random()
            if path in self.bad:
                continue
            try:
                seconds = self.samples / self.sample_rate
                start = place * max(0.0, audio.audio_info(path).seconds - seconds)
                wav = audio.read_audio(path, start, seconds + 0.01, self.sample_rate, self.channels)[:, :self.samples]
                return F.pad(wav, (0, self.samples - wav.shape[1]))                                     # [C, N]
            except ValueError as error:
                self.bad.add(path)
                print(f"skipped {error}", flush=True)
        raise ValueError("100 segments in a row were unreadable: see the files named above")


# ---------------------------------------------------------------------------------------------------------------------
# fitting: the quantiser. The package's own training code is not used: its k-means start sets sums that do not fit the
# counts, its replacement of dead codes is undone within the same step, and levels 2..K give the encoder no gradient.


def kmeans(x: torch.Tensor, V: int, iterations: int, generator: torch.Generator) -> tuple:
    """(means [V,D], counts [V]) of Lloyd's algorithm on x [n,D]; an empty cluster starts again at a random x."""
    means = x[torch.randperm(len(x), generator=generator)[:V].to(x.device)]
    for i in range(iterations + 1):
        index = torch.cdist(x, means).argmin(1)                                                         # [n]
        counts = torch.bincount(index, minlength=V).to(x)                                               # [V]
        if i == iterations:
            return means, counts
        means = torch.zeros_like(means).index_add_(0, index, x) / counts.clamp_min(1)[:, None]
        again = x[torch.randint(len(x), (V,), generator=generator).to(x.device)]
        means = torch.where(counts[:, None] > 0, means, again)


def start_codebooks(quantizer: nn.Module, x: torch.Tensor, per_step: int, generator: torch.Generator) -> None:
    """Residual k-means on pooled latents x [n,D]; counts are scaled to the `per_step` latents that a step brings."""
    for layer in quantizer.vq.layers:
        book = layer._codebook
        means, counts = kmeans(x, book.codebook_size, 20, generator)
        counts = (counts * per_step / len(x)).clamp_min(DEAD_BELOW)
        set_codes(book, torch.ones_like(counts, dtype=torch.bool), means, counts)
        x = x - means[common.nearest_vectors(x, means)]


def set_codes(book: nn.Module, which: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor) -> None:
    """Gives the codes which [V] of a codebook new vectors [V,D] and counts [V], with the sums that belong to them."""
    book.embed[which], book.cluster_size[which] = vectors[which], counts[which]
    book.embed_avg[which] = (vectors * counts[:, None])[which]
    book.inited.fill_(1)


DEAD_BELOW = 0.02                                                    # a code used less than once in 50 steps is dead
CODEBOOK_DECAY = 0.99


def quantise(quantizer: nn.Module, z: torch.Tensor, learn: bool, revive: torch.Generator | None = None) -> tuple:
    """z [B,D,T] -> (quantised z with a straight-through gradient [B,D,T], commitment loss, codes [B,K,T]).

    Residuals keep their gradient from level to level and one straight-through stands on the sum, so that every level's
    commitment reaches the encoder. `learn` moves the codebooks, `revive` is the randomness that replaces dead codes."""
    B, D, T = z.shape
    residual = x = z.transpose(1, 2).reshape(B * T, D)                                                  # [B*T, D]
    commitment, codes = 0.0, []
    for layer in quantizer.vq.layers:
        book = layer._codebook
        index = common.nearest_vectors(residual.detach(), book.embed)                                                  # [B*T]
        q = book.embed[index]                                                                           # [B*T, D]
        commitment = commitment + F.mse_loss(residual, q)
        if learn:
            update_codebook(book, residual.detach(), index, revive)
        residual = residual - q
        codes.append(index.view(B, T))
    # relative to the latent's variance: the encoder gains nothing by shrinking or growing its scale
    commitment = commitment / len(codes) / x.var().clamp_min(1e-6)
    q = (x + (-residual).detach()).view(B, T, D).transpose(1, 2)                                        # [B, D, T]
    return q, commitment, torch.stack(codes, 1)


@torch.no_grad()
def update_codebook(book: nn.Module, x: torch.Tensor, index: torch.Tensor, revive: torch.Generator | None) -> None:
    """One step of the exponential averages with latents x [n,D] at codes index [n]; then dead codes become random x."""
    counts = torch.bincount(index, minlength=book.codebook_size).to(x)                                  # [V]
    book.cluster_size.lerp_(counts, 1 - CODEBOOK_DECAY)
    book.embed_avg.lerp_(torch.zeros_like(book.embed).index_add_(0, index, x), 1 - CODEBOOK_DECAY)
    alive = book.cluster_size[:, None] > 1e-4                        # a code long unused keeps its vector
    book.embed.copy_(torch.where(alive, book.embed_avg / book.cluster_size.clamp_min(1e-4)[:, None], book.embed))
    if revive is not None:
        dead = book.cluster_size < DEAD_BELOW
        picks = torch.randint(len(x), (book.codebook_size,), generator=revive).to(x.device)
        set_codes(book, dead, x[picks], torch.ones_like(counts))


# ---------------------------------------------------------------------------------------------------------------------
# fitting: losses and the loop


class Losses(nn.Module):
    """Waveform L1 and a multi-resolution mel loss, on magnitudes and on their logarithms; optionally MS-STFT hinge."""

    SCALES = ((512, 40), (1024, 64), (2048, 80))                     # (n_fft, mel bands)

    def __init__(self, sample_rate: int):
        super().__init__()
        self.spectra = nn.ModuleList([MelSpectrum(sample_rate, n_fft, mels) for n_fft, mels in self.SCALES])

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> tuple:
        """(L1, spectral) of [B,C,N]; the log floor is -60 dB, digital silence is no aim."""
        a, b = estimate.flatten(0, 1), target.flatten(0, 1)                                             # [B*C, N]
        spectral = 0.0
        for mel in self.spectra:
            x, y = mel(a), mel(b)                                                                       # [B*C, M, F]
            log = (x.clamp_min(1e-3).log10() - y.clamp_min(1e-3).log10()).abs().mean()
            spectral = spectral + (log + 10 * (x - y).abs().mean()) / len(self.spectra)
        return F.l1_loss(estimate, target), spectral


@torch.no_grad()
def start_linear(encoder: nn.Module, decoder: nn.Module, wav: torch.Tensor, generator: torch.Generator) -> None:
    """Starts the two networks as a linear codec: principal components of audio [B,C,N] in, their transpose out.

    At torch's own start the latents of such small nets hardly move over time, and even at unit variance a spectral
    loss keeps them off the waveform (-30 dB SI-SNR after 250 steps; this starts at +12). Each encoder convolution
    gets the leading directions of its input blocks, `stride` wide so that they do not overlap, turned at random to
    spread the energy; the decoder's counterpart gets the same weights. Residual branches and biases start at zero, and
    ELU leaves small signals almost as they are."""
    ins = [m for m in encoder.model if isinstance(m, SConv1d)]
    outs = [m for m in decoder.model if isinstance(m, (SConv1d, SConvTranspose1d))][::-1]
    for block in [m for net in (encoder, decoder) for m in net.model if isinstance(m, SEANetResnetBlock)]:
        block.block[-1].conv.conv.weight.zero_()
    for module in [m for net in (encoder, decoder) for m in net.modules() if hasattr(m, "bias")]:
        module.bias.zero_()
    h = wav
    for module in encoder.model:
        if isinstance(module, SConv1d):
            conv, back = module.conv.conv, outs[ins.index(module)]
            B, C, T = h.shape
            r, width = conv.stride[0], conv.out_channels
            blocks = h.view(B, C, T // r, r).transpose(1, 2).reshape(-1, C * r)                         # [n, C*r]
            directions = torch.linalg.eigh((blocks.T @ blocks).double())[1].flip(1)[:, :width].T.float()
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            W = (turn[:, :len(directions)] @ directions).view(width, C, r)                              # [out, C, r]
            gain = 1.0
            if module is ins[0]:
                gain = START_LEVEL
            elif module is ins[-1]:                                  # latents of variance 1
                gain = 1 / float((blocks @ W.view(width, -1).T).std())
            _set_taps(conv, W * gain)
            if isinstance(back, SConvTranspose1d):
                _set_taps(back.convtr.convtr, W / gain)
            else:
                _set_taps(back.conv.conv, W.transpose(0, 1) / gain)
        h = module(h)


START_LEVEL = 0.5                                                    # signal level inside the networks, of that outside


def _set_taps(conv: nn.Module, W: torch.Tensor) -> None:
    """Puts W [out, in, r] on the taps that stand on a block's own samples; the rest of the kernel starts at zero."""
    k, stride = conv.kernel_size[0], conv.stride[0]
    first = -((stride - k) // 2)                                     # ceil((k - r) / 2): what the package pads left
    conv.weight.zero_()
    conv.weight[:, :, first:first + W.shape[-1]] = W


class Adversary:
    """The package's MS-STFT discriminator, with hinge losses and feature matching (EnCodec sec. 3.4)."""

    def __init__(self, channels: int, lr: float, device):
        from encodec.msstftd import MultiScaleSTFTDiscriminator
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.*")  # the package uses torch's old one
            self.net = MultiScaleSTFTDiscriminator(filters=16, in_channels=channels).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0)

    def loss(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the codec shall lower: hinge on its own audio, and the distance of the discriminator's features."""
        self.net.requires_grad_(False)
        logits, features = self.net(estimate)
        wanted = self.net(target)[1]
        self.net.requires_grad_(True)
        hinge = sum(F.relu(1 - x).mean() for x in logits) / len(logits)
        pairs = [(a, b) for fa, fb in zip(features, wanted) for a, b in zip(fa, fb)]
        match = sum(F.l1_loss(a, b) / b.abs().mean().clamp_min(1e-6) for a, b in pairs) / len(pairs)
        return 0.1 * hinge + 0.2 * match                             # small beside 10 L1 + 2 spectral

    def learn(self, estimate: torch.Tensor, target: torch.Tensor) -> None:
        """One step of the discriminator."""
        real, fake = self.net(target)[0], self.net(estimate.detach())[0]
        loss = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def learning_rate(step: int, args) -> float:
    """Warm-up over 100 steps, then a cosine to a fiftieth."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.steps))
    return args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def autoencoder_steps(args) -> int:
    """Steps before the quantiser starts: codebooks that start on untrained latents collapse."""
    return max(1, round(args.autoencoder_share * args.steps))


class Fit:
    """All that fitting a codec changes from step to step, and so all that a checkpoint holds."""

    def __init__(self, args, config: dict, segments: Segments):
        self.args, self.config, self.segments, self.step = args, config, segments, 0
        torch.manual_seed(args.seed)
        encoder, quantizer, decoder = build_networks(config)
        # step numbers past the end: data of no other use
        start_linear(encoder, decoder, segments.batch(args.steps, 32), torch.Generator().manual_seed(args.seed))
        self.codec = Codec("fit", config["sample_rate"], encoder, quantizer, decoder).to(args.device)
        self.networks = nn.ModuleList([encoder, decoder]).requires_grad_(True)
        self.losses = Losses(config["sample_rate"]).to(args.device)
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=0.0)
        self.adversary = Adversary(encoder.channels, args.lr, args.device) if args.adversarial else None

    def generator(self) -> torch.Generator:
        """Randomness of this step, the same after a restart."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)

    def batch(self, step: int, split: str = "train") -> torch.Tensor:
        """Audio [B,C,N] of a step on the device."""
        return self.segments.batch(step, self.args.batch_size, split).to(self.args.device)

    def start_quantiser(self) -> None:
        """k-means on the latents of 40 batches."""
        with torch.no_grad():
            z = [self.codec.encoder(self.batch(self.args.steps + 1 + i)) for i in range(40)]
        x = torch.cat(z).transpose(1, 2).flatten(0, 1)                                                  # [n, D]
        start_codebooks(self.codec.quantizer, x, len(x) // 40, self.generator())

    def update(self) -> dict:
        """One step; returns its figures."""
        args, codec, quantising = self.args, self.codec, self.step >= autoencoder_steps(self.args)
        if self.step == autoencoder_steps(args):
            self.start_quantiser()
        wav = self.batch(self.step)                                                                     # [B, C, N]
        z = codec.encoder(wav)                                                                          # [B, D, T]
        loss = 0.01 * (z.square().mean() - 1).square()               # holds the latents' scale, which is free otherwise
        figures = {}
        if quantising:
            revive = self.step % 10 == 0 and self.step < 0.8 * args.steps
            z, commitment, codes = quantise(codec.quantizer, z, True, self.generator() if revive else None)
            loss = loss + args.commitment * commitment
            figures["commit"] = commitment
        back = codec.decoder(z)                                                                         # [B, C, N]
        l1, spectral = self.losses(back, wav)
        loss = loss + 10 * l1 + 2 * spectral
        if quantising and self.adversary:
            self.adversary.learn(back, wav)
            loss = loss + self.adversary.loss(back, wav)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"step {self.step}: the gradient is not finite: lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args)
        self.optimizer.step()
        self.step += 1
        figures = {"loss": loss, "l1": l1, "spectral": spectral, **figures, "norm": norm}
        return {k: float(v.detach()) for k, v in figures.items()}

    @torch.no_grad()
    def validate(self, batches: int) -> dict:
        """Quality on segments held out of training; without the quantiser as long as it has not started."""
        wav = torch.cat([self.batch(i, "valid") for i in range(batches)])                               # [B, C, N]
        if self.step > autoencoder_steps(self.args):
            return quality(self.codec, wav)
        back = torch.cat([self.codec.decoder(self.codec.encoder(piece)) for piece in wav.split(1)])
        return {"si_snr_db": float(si_snr(back, wav).mean()), "perplexity": [],
                "mel_db": float(mel_distance(back, wav, self.codec.sample_rate).mean())}

    def state_dict(self) -> dict:
        """Plain data and tensors."""
        state = {"format": "nanomusicgen codec fit 1", "args": comparable(self.args), "step": self.step,
                 "codec": self.codec.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.adversary:
            state["adversary"] = [self.adversary.net.state_dict(), self.adversary.optimizer.state_dict()]
        return state

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Goes on where a checkpoint of the same command stopped. Errors: ValueError where the flags differ."""
        if state.get("format") != "nanomusicgen codec fit 1":
            raise ValueError(f"{path}: not a checkpoint of this command")
        try:
            changed = [k for k, v in comparable(self.args).items() if state["args"].get(k) != v]
            if not changed:
                self._take(state)
        except Exception as error:                                   # a foreign file can fail in any way
            raise ValueError(f"{path}: damaged ({common.describe_error(error)}): delete it to begin again") from None
        if changed:
            raise ValueError(f"{path} was made with another --{', --'.join(changed)}: delete it or name another --out")

    def _take(self, state: dict) -> None:
        self.step = state["step"]
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary:
            self.adversary.net.load_state_dict(state["adversary"][0])
            self.adversary.optimizer.load_state_dict(state["adversary"][1])


def comparable(args) -> dict:
    """The flags that change the result."""
    free = ("out", "log_seconds", "save_every", "stop_after", "device")
    return {k: v for k, v in vars(args).items() if k not in free}


def fit(args) -> None:
    """Fits a codec and writes it to args.out: {format, config, state (fp16), metrics}."""
    torch.set_num_threads(args.threads)
    out, checkpoint = Path(args.out), Path(f"{args.out}.fit")
    if out.exists():
        raise ValueError(f"--out {out}: exists already; delete it first or name another")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    config = codec_config(args)
    hop = math.prod(args.ratios)
    samples = round(args.segment_seconds * args.sample_rate / hop) * hop
    if samples < 2048:
        raise ValueError(f"--segment_seconds {args.segment_seconds}: at least {2048 / args.sample_rate:.2f} are needed")
    latents = 40 * args.batch_size * samples // hop                  # that k-means starts on
    if args.card > latents:
        raise ValueError(f"--card {args.card}: at most {latents}, the frames of 40 batches")
    segments = Segments(args.dataset, args.sample_rate, 1, samples, hop, args.seed)
    run = Fit(args, config, segments)
    millions = sum(p.numel() for p in run.networks.parameters()) / 1e6
    print(f"{args}\n{millions:.2f}M weights, {args.sample_rate / hop:.0f} Hz, {args.codebooks} x {args.card} codes, "
          f"{autoencoder_steps(args)} of {args.steps} steps without the quantiser", flush=True)
    if checkpoint.exists():
        run.load_state_dict(common.read_torch_dict(checkpoint, "a checkpoint of this command"), checkpoint)
        print(f"goes on at step {run.step} of {checkpoint}", flush=True)
    began = shown = time.monotonic()
    first, stop = run.step, min(args.steps, run.step + args.stop_after) if args.stop_after else args.steps
    while run.step < stop:
        figures = run.update()
        if time.monotonic() - shown > args.log_seconds or run.step in (1, stop):
            shown = time.monotonic()
            print(progress(run, figures, (shown - began) / (run.step - first)), flush=True)
        if run.step % args.save_every == 0 or run.step == stop:
            common.write_torch(checkpoint, run.state_dict())
    if run.step < args.steps:
        print(f"stopped at step {run.step}: the same command goes on from {checkpoint}", flush=True)
        return
    metrics = {**run.validate(16), "dataset": args.dataset, "steps": args.steps, "seed": args.seed}
    state = {k: v.detach().cpu().half() for k, v in run.codec.state_dict().items() if not k.endswith(TRAINING_BUFFERS)}
    common.write_torch(out, {"format": FORMAT, "config": config, "state": state, "metrics": metrics})
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB): {describe(metrics)}", flush=True)


def describe(metrics: dict) -> str:
    """Quality figures in one line."""
    text = f"SI-SNR {metrics['si_snr_db']:.2f} dB | mel distance {metrics['mel_db']:.2f} dB"
    return text + "".join(f" | ppl_q{k + 1} {p:.0f}" for k, p in enumerate(metrics["perplexity"]))


def progress(run: Fit, figures: dict, seconds: float) -> str:
    """One line: step, losses, quality on 16 held-out segments, speed."""
    line = f"step {run.step}/{run.args.steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in figures.items())
    left = (run.args.steps - run.step) * seconds / 60
    return f"{line} | valid {describe(run.validate(2))} | {1000 * seconds:.0f} ms | {left:.0f} min left"


def codec_config(args) -> dict:
    """The plain config of a codec file: all arguments of SEANet and RVQ, from the flags."""
    seanet = {"channels": 1, "dimension": args.dim, "n_filters": args.filters, "ratios": args.ratios,
              "n_residual_layers": args.residual_layers, "activation": "ELU", "activation_params": {"alpha": 1.0},
              "kernel_size": args.kernel, "last_kernel_size": args.last_kernel, "residual_kernel_size": 3,
              "dilation_base": 2, "causal": False, "pad_mode": "constant", "true_skip": True, "compress": args.compress,
              "lstm": 0}
    rvq = {"dimension": args.dim, "n_q": args.codebooks, "bins": args.card}
    return {"sample_rate": args.sample_rate, "seanet": seanet, "rvq": rvq}


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def fit_parser() -> argparse.ArgumentParser:
    """Flags of `python tokenizer.py fit`."""
    parser = argparse.ArgumentParser(prog="tokenizer.py fit", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Fits a small codec: an autoencoder first, then k-means, then "
                                                 "quantising. If stopped, the same command goes on exactly.")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="toy, or a folder of audio files")
    data.add_argument("--out", required=True, help="codec file to write; the checkpoint stands beside it")
    data.add_argument("--sample_rate", type=int, default=16_000, help="Hz")
    data.add_argument("--segment_seconds", type=float, default=1.0, help="length of a training segment")
    shape = parser.add_argument_group("shape of the codec")
    shape.add_argument("--filters", type=int, default=16, help="channels at the full rate; every stride doubles them")
    shape.add_argument("--ratios", type=int, nargs="+", default=[1, 1, 20, 1, 16], metavar="R",
                       help="strides from codes to audio; their product is the hop in samples")
    shape.add_argument("--residual_layers", type=int, default=0, help="residual blocks at every rate")
    shape.add_argument("--compress", type=int, default=2, help="a residual block is so many times narrower inside")
    shape.add_argument("--kernel", type=int, default=5, help="first convolution of encoder and decoder")
    shape.add_argument("--last_kernel", type=int, default=3, help="last convolution of encoder and decoder")
    shape.add_argument("--dim", type=int, default=96, help="width of the latent vectors")
    shape.add_argument("--codebooks", type=int, default=4, help="levels of the quantiser (K)")
    shape.add_argument("--card", type=int, default=256, help="vectors of a codebook")
    learn = parser.add_argument_group("training")
    learn.add_argument("--steps", type=int, default=9000, help="updates in all")
    learn.add_argument("--batch_size", type=int, default=8, help="segments a step")
    learn.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    learn.add_argument("--commitment", type=float, default=0.25, help="weight of the commitment loss")
    learn.add_argument("--autoencoder_share", type=float, default=0.1, help="share of the steps without the quantiser")
    learn.add_argument("--adversarial", action="store_true", help="with the MS-STFT discriminator as well; slow")
    learn.add_argument("--seed", type=int, default=0, help="of weights, data and codebooks")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="cpu or cuda")
    machine.add_argument("--threads", type=int, default=1, help="CPU threads; part of what makes a run repeatable")
    machine.add_argument("--log_seconds", type=float, default=20, help="time between progress lines")
    machine.add_argument("--save_every", type=int, default=200, help="steps between checkpoints")
    machine.add_argument("--stop_after", type=int, default=0, help="stop after so many steps (0: not), to go on later")
    return parser


def check_fit(args) -> None:
    """Refuses flags that make no codec. Errors: ValueError with what is allowed."""
    least = dict.fromkeys(("filters", "compress", "kernel", "last_kernel", "dim", "codebooks", "steps", "batch_size",
                           "sample_rate", "threads", "save_every"), 1)
    for name, low in {**least, "card": 2, "residual_layers": 0, "seed": 0, "stop_after": 0, "commitment": 0}.items():
        if not low <= (value := getattr(args, name)) < 2 ** 31:      # also refuses NaN
            raise ValueError(f"--{name} {value}: at least {low}, less than 2^31")
    if min(args.ratios) < 1:
        raise ValueError(f"--ratios {' '.join(map(str, args.ratios))}: at least 1 each")
    for name in ("lr", "segment_seconds"):
        if not 0 < (value := getattr(args, name)) < 1e4:
            raise ValueError(f"--{name} {value}: more than 0, less than 10000")
    if not 0 < args.autoencoder_share < 1:
        raise ValueError(f"--autoencoder_share {args.autoencoder_share}: between 0 and 1")
    if args.residual_layers and args.compress > args.filters:
        raise ValueError(f"--compress {args.compress}: at most the {args.filters} of --filters")
    if common.check_device(args.device).type == "mps":
        raise ValueError(f"--device {args.device}: cpu or cuda (MPS finds wrong nearest vectors)")


def roundtrip(argv: list) -> None:
    """Encodes and decodes one file and prints what that costs."""
    parser = argparse.ArgumentParser(prog="tokenizer.py", description="Audio -> codes -> audio. Also: tokenizer.py fit")
    parser.add_argument("input", help="audio file")
    parser.add_argument("output", help="audio file to write, at the codec's sample rate")
    parser.add_argument("--codec", default="toy", help="toy, encodec_24khz, a codec file, or a folder with an EnCodec (default toy)")
    parser.add_argument("--num_codebooks", type=int, help="use the first so many codebooks of a channel (default all)")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 2), help="2: stereo, each channel by itself (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    args = parser.parse_args(argv)
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise ValueError(f"{args.output}: is the input itself: name another file to write")
    if not Path(args.input).is_file():
        raise ValueError(f"{args.input}: no such file")
    codec = load_codec(args.codec, args.num_codebooks, args.device, args.channels)
    wav = audio.read_audio(args.input, sample_rate=codec.sample_rate, channels=codec.channels)[None].to(args.device)
    if wav.shape[-1] == 0:
        raise ValueError(f"{args.input}: holds no audio")
    codes = codec.encode(wav)                                                                           # [1, K, T]
    back = codec.decode(codes)[..., :wav.shape[-1]]                                                     # [1, C, N]
    audio.write_audio(args.output, back[0], codec.sample_rate)
    seconds = wav.shape[-1] / codec.sample_rate
    print(f"{args.input}: {seconds:.2f} s -> codes {list(codes.shape)} at {codec.frame_rate:g} Hz -> {args.output}")
    print(f"codec {codec.name}: {codec.K} x {codec.card} codes, fingerprint {codec.fingerprint[:12]}")
    print(describe({"si_snr_db": float(si_snr(back, wav)), "perplexity": perplexities(codes, codec.card),
                    "mel_db": float(mel_distance(back, wav, codec.sample_rate))}))


def main(argv: list | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["fit"]:
            args = fit_parser().parse_args(argv[1:])
            check_fit(args)
            fit(args)
        else:
            roundtrip(argv[1:] if argv[:1] == ["roundtrip"] else argv)
    except ValueError as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
