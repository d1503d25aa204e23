"""Audio <-> codes: the frozen codec under the language model.

EnCodec (Defossez et al. 2022, arXiv:2210.13438), as MusicGen uses it (Copet et al. 2023, sec. 2.1). A
convolutional encoder (SEANet) makes one vector of every `hop` samples. K codebooks describe it one after the
other, each what the ones before left over (residual vector quantization, RVQ). The decoder makes audio of the
sum:

    wav [B,C,N] -encoder-> z [B,D,T] -nearest of `card` vectors, K times over-> codes [B,K,T]
    codes [B,K,T] -sum of K vectors-> z' [B,D,T] -decoder-> wav [B,C,T*hop]             T = ceil(N / hop)

A mono codec serves stereo as well, as in the paper's stereo models. It encodes each channel by itself, and
the codebooks of the two take turns:

    wav [B,2,N] -> left [B,K/2,T], right [B,K/2,T] -> codes [B,K,T]: 1L 1R 2L 2R ..

The networks are those of the `encodec` package. `python -m tools.fit_codec` fits a small codec of such.
Legend: B batch, C channels, N samples, K codebooks, T frames, D width of a latent vector.

    python tokenizer.py in.wav out.wav --codec toy               a round trip, with what it costs in quality
    python tokenizer.py in.wav out.wav --channels 2              the same in stereo
"""

import argparse
import copy
import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from torch import Tensor, nn

from interop.encodec import TRAINING_BUFFERS, check_codec_config, is_codec_folder, read_codec_folder
from interop.encodec import read_encodec_24khz
from interop.tensors import check_shapes
from support import audio, common
from support.bounds import check_finite, shown
from support.pieces import PIECE_SECONDS, PieceDecoder
from support.quality import describe_quality, round_trip_quality

TOY_FILE = Path(__file__).parent / "assets" / "toy_codec.pt"
CODEC_FORMAT = "nanomusicgen codec 1"          # of a codec file
ENCODEC_24KHZ_CODEBOOKS = (2, 4, 8, 16, 32)    # 1.5, 3, 6, 12, 24 kbit/s


# ----------------------------------------------------------------------------------------------------------
# the codec


class Codec(nn.Module):
    """A frozen codec: no gradient, always in eval mode, float32 also under autocast.

    A clip's channels are encoded in `streams`: all in one, or one by one by the same networks. Each stream
    has `levels` codebooks, and K counts those of all streams."""

    def __init__(self, name: str, sample_rate: int, encoder: nn.Module, quantizer: nn.Module,
                 decoder: nn.Module, num_codebooks: int | None = None):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.name = name
        self.config = None                           # plain, of `build_networks`, where it is known
        self.sample_rate = sample_rate               # Hz
        self.hop = int(encoder.hop_length)           # samples a frame
        self.frame_rate = sample_rate / self.hop     # Hz
        self.channels = encoder.channels
        self.streams = 1                             # 2: each channel by itself, see `with_channels`
        self.K = quantizer.n_q if num_codebooks is None else num_codebooks
        self.card = quantizer.bins
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Codec":
        """Stays in eval mode whatever is asked: the codec is frozen."""
        return super().train(False)

    def to(self, device) -> "Codec":
        """Moves the networks. The quantizer stays off Apple's MPS, which finds wrong nearest vectors."""
        super().to(device)
        if torch.device(device).type == "mps":
            self.quantizer.to("cpu")
        return self

    def with_channels(self, channels: int) -> "Codec":
        """The same networks for clips of so many channels: of their own, or 2 in two streams of a mono codec.

        Errors: ValueError for any other number."""
        own = self.channels // self.streams          # what the networks take at once
        if channels not in (own, 2) or own > channels:
            more = " or, each by itself, 2" if own == 1 else ""
            raise ValueError(f"--channels {channels}: the codec {self.name} takes {own}{more}")
        other = copy.copy(self)
        other.channels = channels
        other.streams = channels // own
        other.K = self.levels * other.streams
        return other

    @property
    def levels(self) -> int:
        """Codebooks of one stream, which `num_codebooks` counts."""
        return self.K // self.streams

    @property
    def reference(self) -> dict:
        """What a file says of the codec, to load the same one again."""
        return dict(name=self.name, K=self.K, levels=self.levels, channels=self.channels,
                    fingerprint=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of K, rate, streams and weights: codes of codecs that share it are interchangeable."""
        text = f"{self.K} {self.sample_rate} "
        if self.streams > 1:
            text += f"{self.streams} lanes "         # the word that fingerprints in files were made with
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not name.endswith(TRAINING_BUFFERS):
                digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav [B,C,N] in [-1, 1] -> codes [B,K,T] int64, T = ceil(N / hop)."""
        assert wav.dim() == 3, f"encode takes [B, C, N], not {tuple(wav.shape)}"
        B, C, N = wav.shape
        assert C == self.channels, f"{C} channels, the codec {self.name} has {self.channels}"
        assert B > 0 and N > 0, f"nothing to encode in {tuple(wav.shape)}"

        def encode_streams(x: Tensor) -> Tensor:                                    # [b, C/streams, N]
            z = self.encoder(x).to(self._quantizer_device)                          # [b, D, T]
            return self.quantizer.vq.encode(z, n_q=self.levels).transpose(0, 1)     # [b, levels, T]

        streams = wav.float().reshape(B * self.streams, C // self.streams, N)       # [B*streams, .., N]
        with torch.autocast(wav.device.type, enabled=False):
            codes = clip_by_clip(encode_streams, streams).to(wav.device)            # [B*streams, levels, T]
        # level after level, the streams in turn: 1L 1R 2L 2R ..
        return codes.unflatten(0, (B, self.streams)).transpose(1, 2).flatten(1, 2)  # [B, K, T]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B,K,T] -> wav [B,C,T*hop] float32; what is longer than 30 s, in pieces."""
        assert codes.dim() == 3, f"decode takes [B, K, T], not {tuple(codes.shape)}"
        B, K, T = codes.shape
        assert K == self.K, f"{K} codebooks, the codec {self.name} has {self.K}"
        assert B > 0 and T > 0, f"nothing to decode in {tuple(codes.shape)}"
        low, high = int(codes.min()), int(codes.max())
        card = self.card
        assert 0 <= low and high < card, f"codes {low}..{high}, the codec {self.name} has 0..{card - 1}"

        def decode_long(x: Tensor) -> Tensor:                                       # [b, levels, T]
            *pieces, last = x.split(max(1, round(PIECE_SECONDS * self.frame_rate)), -1)
            if not pieces:
                return self.decoder(self._latents(x))                               # [b, C/streams, T*hop]
            decoder = PieceDecoder(self.decoder)
            parts = [decoder(self._latents(piece), False) for piece in pieces]
            return torch.cat([*(part for part in parts if part is not None),
                              decoder(self._latents(last), True)], -1)

        with torch.autocast(codes.device.type, enabled=False):
            wav = clip_by_clip(decode_long, self._split(codes))                     # [B*streams, .., T*hop]
        return wav.reshape(B, self.channels, T * self.hop)                          # [B, C, T*hop]

    def piece_decoder(self) -> Callable:
        """`decode` of codes that come piece by piece: (the next [B,K,t], whether they are the last) -> the
        next audio [B,C,n], or None where none is ready. See support/pieces.py."""
        decoder = PieceDecoder(self.decoder)

        @torch.no_grad()
        def decode_piece(codes: Tensor, is_last: bool) -> Tensor | None:
            with torch.autocast(codes.device.type, enabled=False):
                wav = decoder(self._latents(self._split(codes)), is_last)           # [B*streams, .., n]
            return None if wav is None else wav.reshape(len(codes), self.channels, -1)

        return decode_piece

    def _split(self, codes: Tensor) -> Tensor:
        """codes [B,K,T] -> those of each stream [B*streams, levels, T]."""
        return codes.unflatten(1, (-1, self.streams)).transpose(1, 2).flatten(0, 1)

    def _latents(self, codes: Tensor) -> Tensor:
        """codes [b, levels, T] -> z [b, D, T]."""
        return self.quantizer.vq.decode(codes.transpose(0, 1).to(self._quantizer_device)).to(codes.device)

    @property
    def _quantizer_device(self) -> torch.device:
        return next(self.quantizer.buffers()).device


def clip_by_clip(function: Callable, x: Tensor) -> Tensor:
    """function(x) for a batch x [B,...], without gradient; on a CPU each core takes one clip after another.

    Activations then stay in the core's cache and no core waits for another. That is at least twice as fast as
    whole batches, and gives the same bits whatever the batch and the number of threads."""
    if x.device.type != "cpu":
        return function(x)

    def one(clip: Tensor) -> Tensor:
        with torch.no_grad():                        # a new thread begins with gradients on
            return function(clip)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(one, x.split(1))))
    finally:
        torch.set_num_threads(threads)               # the pool has set the default of new threads to 1


# ----------------------------------------------------------------------------------------------------------
# which codecs there are


def build_networks(config: dict) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(encoder, quantizer, decoder) of a codec's plain config.

    config: {"sample_rate": Hz, "seanet": arguments of SEANet, "rvq": of ResidualVectorQuantizer}."""
    seanet = {**config["seanet"], "norm": "none"}    # weight norm, if there was one, has been folded
    # in this order: the order of the random draws is part of a fit
    encoder = SEANetEncoder(**seanet)
    quantizer = ResidualVectorQuantizer(**config["rvq"], kmeans_init=False)
    return encoder, quantizer, SEANetDecoder(**seanet)


def build_codec(name: str, config: dict, state: dict, num_codebooks: int | None = None) -> Codec:
    """The codec of a plain config (see `build_networks`) and its tensors by name, without TRAINING_BUFFERS.

    Errors: ValueError where they make no codec or do not fit each other, or num_codebooks is out of range."""
    check_codec_config(name, config)
    try:
        with torch.device("meta"):                   # without storage, to compare before anything is built
            codec = Codec(name, config["sample_rate"], *build_networks(config), num_codebooks)
        check_finite(name, state)
    except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        problem = common.describe_error(error)
        raise ValueError(f"{name}: its configuration makes no codec, or it is damaged ({problem})") from None
    if not 1 <= codec.K <= codec.quantizer.n_q:
        raise ValueError(f"num_codebooks {codec.K}: the codec {name} has 1 to {codec.quantizer.n_q}")
    wanted = {k: x.shape for k, x in codec.state_dict().items() if not k.endswith(TRAINING_BUFFERS)}
    check_shapes(name, {k: x.shape for k, x in state.items()}, wanted)

    codec = Codec(name, config["sample_rate"], *build_networks(config), num_codebooks)
    codec.load_state_dict({k: x.float() for k, x in state.items()}, strict=False)
    codec.config = config
    return codec


def read_codec_file(path: Path) -> tuple[dict, dict]:
    """(plain config, {name: tensor}) of a file of tools/fit_codec.py. Errors: ValueError naming the file."""
    what = "a codec file made by `python -m tools.fit_codec`"
    stored = common.read_torch_dict(path, what)
    if stored.get("format") != CODEC_FORMAT:
        raise ValueError(f"{path}: not {what}: its format is {shown(stored.get('format'))}")
    if missing := sorted({"config", "state"} - stored.keys()):
        raise ValueError(f"{path}: not {what}, or damaged: it lacks {' and '.join(missing)}")
    return stored["config"], stored["state"]


def load_codec(name: str, num_codebooks: int | None = None, device="cpu", channels: int = 1) -> Codec:
    """The codec `toy` (embedded), `encodec_24khz` (public weights) or a PATH, frozen on a device.

    A PATH is a file of tools/fit_codec.py, or a folder of Hugging Face or audiocraft with an EnCodec in it.
    num_codebooks: its first so many levels (default all; 4 of encodec_24khz, as MusicGen has). channels: see
    `Codec.with_channels`. Errors: ValueError, one line with a way out."""
    device = common.check_device(device)
    if name == "toy":
        config, state = read_codec_file(TOY_FILE)
    elif name == "encodec_24khz":
        num_codebooks = 4 if num_codebooks is None else num_codebooks
        if num_codebooks not in ENCODEC_24KHZ_CODEBOOKS:
            allowed = ", ".join(map(str, ENCODEC_24KHZ_CODEBOOKS))
            raise ValueError(f"num_codebooks {num_codebooks}: encodec_24khz has {allowed}")
        config, state = read_encodec_24khz()
    elif name == "encodec_48khz":
        raise ValueError("encodec_48khz scales every second by a factor of its own, which a language model "
                         "over codes loses: use encodec_24khz")
    elif is_codec_folder(name) or Path(name).is_dir():
        config, state = read_codec_folder(name)
    elif Path(name).exists() or Path(name).suffix:
        config, state = read_codec_file(Path(name))
    else:
        raise ValueError(f"codec {name!r}: choose toy, encodec_24khz or the path of a codec")
    return build_codec(str(name), config, state, num_codebooks).with_channels(channels).to(device)


# ----------------------------------------------------------------------------------------------------------
# the command line


@common.command("tokenizer.py")
def main(argv: list | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["fit"]:
        raise ValueError("a codec is fitted by `python -m tools.fit_codec`, with the same flags")
    if argv[:1] == ["roundtrip"]:                    # the command's long name
        argv = argv[1:]
    parser = argparse.ArgumentParser(prog="tokenizer.py", description="Audio -> codes -> audio.")
    parser.add_argument("input", help="audio file")
    parser.add_argument("output", type=common.output_name,
                        help="audio file to write, at the codec's sample rate")
    parser.add_argument("--codec", default="toy",
                        help="toy, encodec_24khz, a codec file, or a folder with an EnCodec (default toy)")
    parser.add_argument("--num_codebooks", type=int,
                        help="use the first so many codebooks of a channel (default all)")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 2),
                        help="2: stereo, each channel by itself (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    args = parser.parse_args(argv)
    if not Path(args.input).is_file():
        raise ValueError(f"{args.input}: no such file")
    if Path(args.output).exists() and os.path.samefile(args.input, args.output):     # a link to it, too
        raise ValueError(f"{args.output}: is the input itself: name another file to write")
    if not Path(args.output).parent.is_dir():
        raise ValueError(f"{args.output}: cannot be written: there is no folder {Path(args.output).parent}")

    codec = load_codec(args.codec, args.num_codebooks, args.device, args.channels)
    wav = audio.read_audio(args.input, sample_rate=codec.sample_rate, channels=codec.channels)
    wav = wav[None].to(args.device)                                                 # [1, C, N]
    N = wav.shape[-1]
    if N == 0:
        raise ValueError(f"{args.input}: holds no audio")
    codes = codec.encode(wav)                                                       # [1, K, T]
    back = codec.decode(codes)[..., :N]                                             # [1, C, N]
    audio.write_audio(os.path.realpath(args.output), back[0], codec.sample_rate)    # through a link

    seconds = N / codec.sample_rate
    print(f"{args.input}: {seconds:.2f} s -> codes {list(codes.shape)} at {codec.frame_rate:g} Hz "
          f"-> {args.output}")
    print(f"codec {codec.name}: {codec.K} x {codec.card} codes, fingerprint {codec.fingerprint[:12]}")
    print(describe_quality(round_trip_quality(wav, back, codec.sample_rate, codes, codec.card)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
