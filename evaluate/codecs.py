"""Codecs side by side on the same audio, so that one can be chosen.

    python -m evaluate.codecs --audio DIR --codec toy my_codec.pt opus opus:12

Every file below the folder is cut into pieces of 10 s, mixed to mono. Each codec gets a piece at its own
rate, and its output is compared with the piece at one rate, the same for all: the lowest of the codecs', or
--rate. What a codec of a higher rate keeps above that is not heard here.

    kbit/s      K * log2(card) * frame rate; of Opus, what its packets took
    SI-SNR      scale-invariant signal-to-noise ratio in dB: higher is better
    mel         distance of the mel spectra in dB: lower is better
    perplexity  how many codes each codebook uses, over all of the audio: at most card. Opus has no codebooks

Both distances are means over pieces, a short one as much as a long one. A silent piece has no signal-to-noise
ratio: it is left out of every figure, and counted.

`opus:6` is Opus (RFC 6716) as libsndfile writes it, asked for 6 kbit/s. It gets audio at the lowest of 16, 24
and 48 kHz that is not below the rate of the comparison, so that it spends no bits on what is not compared.

Legend: N samples, K codebooks, T frames.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer
from evaluate.metrics import list_audio, read_chunks
from support import audio, common, quality
from support.bounds import check_flag_number
from support.decode import open_sndfile

PIECE = 10.0                                             # seconds that are encoded and compared at once
OPUS_RATES = (16_000, 24_000, 48_000)                    # Hz; of its others, no music
OPUS_KBITS = (6, 256)                                    # the lowest and highest of libsndfile, a channel
RATES = (8_000, 96_000)                                  # Hz, to compare at


def opus_kbits(name: str) -> float | None:
    """What `opus` (6) or `opus:KBITS` asks for; None for the name of another codec. Errors: ValueError."""
    kind, colon, number = name.partition(":")
    if kind != "opus":
        return None
    try:
        kbits = float(number) if colon else float(OPUS_KBITS[0])
    except ValueError:
        kbits = math.nan
    if not OPUS_KBITS[0] <= kbits <= OPUS_KBITS[1]:
        raise ValueError(f"--codec {name}: opus:KBITS with {OPUS_KBITS[0]} to {OPUS_KBITS[1]} kbit/s")
    return kbits


def packet_bytes(ogg: bytes) -> int:
    """Bytes in the packets of an Ogg Opus file (RFC 7845), without its two headers and the framing of
    pages."""
    at, sizes = 0, []
    while at < len(ogg):
        segments = ogg[at + 26]
        sizes.append(sum(ogg[at + 27:at + 27 + segments]))
        at += 27 + segments + sizes[-1]
    return sum(sizes[2:])                                # each header has a page to itself


def through_opus(wav: Tensor, sample_rate: int, kbits: float) -> tuple[Tensor, int]:
    """wav [N] through Opus -> (what is left of it [N], the bits that its packets took).

    Errors: ValueError where libsndfile or soundfile are too old."""
    low, high = OPUS_KBITS
    # libsndfile drops the encoder's delay from the end: without a packet after them the last 6 ms are wrong
    padded = F.pad(wav, (0, sample_rate // 50))[None]
    try:
        ogg = audio.encode_audio(padded, sample_rate, "OGG", "OPUS",
                                 compression_level=1 - (kbits - low) / (high - low))
    except (TypeError, ValueError):                      # of an unknown argument, or format
        raise ValueError("--codec opus: this soundfile cannot write it: pip install -U soundfile") from None
    with tempfile.TemporaryFile() as file:
        file.write(ogg)
        file.seek(0)
        with open_sndfile(file.fileno(), closefd=False) as decoder:
            back = decoder.read(dtype="float32")                                                    # [N]
    return torch.from_numpy(back[:len(wav)]), 8 * packet_bytes(ogg)


@dataclass
class Measured:
    """A codec, and sums over the pieces that went through it."""
    name: str
    sample_rate: int                                     # Hz
    round_trip: Callable                                 # wav [N] -> ([N], bits, codes [1,K,T] or None)
    card: int = 0
    si_snr_db: float = 0.0
    mel_db: float = 0.0
    bits: float = 0.0
    counts: Tensor | int = 0                             # [K, card]

    def add(self, wav: Tensor, rate: int, target: Tensor, target_rate: int) -> None:
        """Sends a piece [N] through the codec and compares it with the same piece at another rate."""
        back, bits, codes = self.round_trip(audio.resample(wav, rate, self.sample_rate))
        back = audio.resample(back, self.sample_rate, target_rate)[:len(target)]
        measured = quality.round_trip_quality(target[None, None], back[None, None], target_rate)
        self.si_snr_db += measured["si_snr_db"]
        self.mel_db += measured["mel_db"]
        self.bits += bits
        if codes is not None:
            self.counts = self.counts + quality.count_codes(codes, self.card)


def measured_opus(name: str, rate: int) -> Measured:
    """Opus, at the lowest of its rates that is at least `rate`."""
    sample_rate = min((r for r in OPUS_RATES if r >= rate), default=OPUS_RATES[-1])
    kbits = opus_kbits(name)
    return Measured(name, sample_rate, lambda wav: (*through_opus(wav, sample_rate, kbits), None))


def measured_codec(codec: tokenizer.Codec) -> Measured:
    """One of tokenizer.py."""
    bits_per_second = codec.K * math.log2(codec.card) * codec.frame_rate

    def round_trip(wav: Tensor) -> tuple[Tensor, float, Tensor]:
        codes = codec.encode(wav[None, None])                                                    # [1, K, T]
        back = codec.decode(codes)[0, 0, :len(wav)]                                                 # [N]
        return back, bits_per_second * len(wav) / codec.sample_rate, codes

    return Measured(codec.name, codec.sample_rate, round_trip, codec.card)


def codecs_table(rows: list, pieces: int, seconds: float) -> str:
    """The figures of codecs as lines to print."""
    width = max(len("codec"), *(len(row.name) for row in rows))
    lines = [f"{'codec':<{width}}      Hz  kbit/s  SI-SNR dB  mel dB  perplexity"]
    for row in rows:
        used = quality.perplexities(row.counts) if row.card else []
        kbits = row.bits / seconds / 1000
        line = (f"{row.name:<{width}}  {row.sample_rate:>6}  {kbits:>6.2f}  {row.si_snr_db / pieces:>9.2f}  "
                f"{row.mel_db / pieces:>6.2f}  {' '.join(f'{p:.0f}' for p in used)}")
        lines.append(line.rstrip())
    return "\n".join(lines)


@common.command("evaluate.codecs")
def main(argv: list | None = None) -> None:
    """Prints what several codecs leave of the same audio."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.codecs", allow_abbrev=False,
                                     description="Codecs side by side on the same audio.")
    parser.add_argument("--audio", required=True, metavar="DIR", help="folder of audio")
    parser.add_argument("--codec", nargs="+", default=["toy", "opus"],
                        help="toy, encodec_24khz, the path of a codec, opus or opus:KBITS (default toy opus)")
    parser.add_argument("--rate", type=int, help="Hz, to compare all at (default: the lowest of the codecs)")
    args = parser.parse_args(argv)
    check_flag_number("rate", args.rate, *RATES)
    files = list_audio(args.audio, "--audio")
    names = list(dict.fromkeys(args.codec))
    codecs = {name: tokenizer.load_codec(name) for name in names if opus_kbits(name) is None}
    rate = args.rate or min((codec.sample_rate for codec in codecs.values()), default=OPUS_RATES[-1])
    rows = [measured_codec(codecs[name]) if name in codecs else measured_opus(name, rate) for name in names]

    pieces, silent, seconds = 0, 0, 0.0
    rates = (rate, *(row.sample_rate for row in rows))
    for wav, own_rate in read_chunks(files, PIECE, channels=1, rates=rates):
        wav = wav[0]                                                                                # [N]
        if (wav - wav.mean()).abs().max() <= audio.SILENT_PEAK:
            silent += 1
            continue
        target = audio.resample(wav, own_rate, rate)
        for row in rows:
            row.add(wav, own_rate, target, rate)
        pieces += 1
        seconds += len(wav) / own_rate
    if not pieces:
        raise ValueError(f"--audio {args.audio}: all of it is silent")
    print(codecs_table(rows, pieces, seconds))
    print(f"{pieces} pieces of {len(files)} files, {seconds:.1f} s, mono, compared at {rate} Hz; "
          f"left out as silent: {silent}")


if __name__ == "__main__":
    sys.exit(main())
