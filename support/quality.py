"""What a round trip through a codec costs: the waveform, the mel spectrum, the use of the codebooks.

Legend: B clips, C channels, N samples, M mel bands, F frames of a spectrum, K codebooks, T frames of codes.
"""

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn


def si_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio [B] in dB of [B,C,N] (Le Roux et al. 2019)."""
    assert estimate.shape == target.shape, f"{tuple(estimate.shape)} against {tuple(target.shape)}"
    estimate, target = estimate.flatten(1), target.flatten(1)                       # [B, C*N]
    estimate = estimate - estimate.mean(1, keepdim=True)
    target = target - target.mean(1, keepdim=True)
    power = target.square().sum(1, keepdim=True).clamp_min(1e-9)                    # [B, 1]
    gain = (estimate * target).sum(1, keepdim=True) / power
    noise = (estimate - gain * target).square().sum(1).clamp_min(1e-9)              # [B]
    return 10 * ((gain * target).square().sum(1) / noise).clamp_min(1e-9).log10()


class MelSpectrum(nn.Module):
    """Mel magnitudes [B, M, F] of mono audio [B, N]; a full-scale sine is about 1."""

    def __init__(self, sample_rate: int, n_fft: int, mels: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft))
        banks = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate)
        self.register_buffer("banks", banks.T.contiguous() * 4 / n_fft)             # [M, n_fft/2+1]

    def forward(self, wav: Tensor) -> Tensor:
        spec = torch.stft(wav, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        magnitude = torch.view_as_real(spec).square().sum(-1).add(1e-10).sqrt()     # [B, n_fft/2+1, F]
        return self.banks @ magnitude                                               # [B, M, F]


def mel_distance(estimate: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference [B] in dB of 64 mel bands of [B,C,N], leveled below -60 dB of full scale."""
    assert estimate.shape == target.shape, f"{tuple(estimate.shape)} against {tuple(target.shape)}"
    mel = MelSpectrum(sample_rate, 1024, 64).to(target.device)
    missing = max(0, mel.n_fft - target.shape[-1])       # samples, where there is less than one window

    def decibels(wav: Tensor) -> Tensor:
        mono = F.pad(wav.float().mean(1), (0, missing))                             # [B, N]
        return 20 * mel(mono).clamp_min(1e-3).log10()                               # [B, M, F]

    return (decibels(estimate) - decibels(target)).abs().mean((1, 2))


def count_codes(codes: Tensor, card: int) -> Tensor:
    """How often each code occurs in each codebook of codes [B,K,T] -> [K, card]."""
    return torch.stack([torch.bincount(c.flatten(), minlength=card) for c in codes.unbind(1)])


def perplexities(counts: Tensor) -> list:
    """Perplexity of each codebook's code frequencies, from counts [K, card]: 1 (one code) to card (all
    alike)."""
    counts = counts.float()
    p = counts / counts.sum(1, keepdim=True)
    return (-(p * p.clamp_min(1e-12).log()).sum(1)).exp().tolist()


def round_trip_quality(wav: Tensor, back: Tensor, sample_rate: int, codes: Tensor | None = None,
                       card: int = 0) -> dict:
    """How near back [B,C,N] is to wav: {"si_snr_db", "mel_db": means over clips, "perplexity": [K]}.

    codes [B,K,T] are those in between, each one of `card`; without them the list is empty."""
    return {"si_snr_db": float(si_snr(back, wav).mean()),
            "mel_db": float(mel_distance(back, wav, sample_rate).mean()),
            "perplexity": [] if codes is None else perplexities(count_codes(codes, card))}


def describe_quality(measured: dict) -> str:
    """`round_trip_quality` in one line."""
    line = f"SI-SNR {measured['si_snr_db']:.2f} dB | mel distance {measured['mel_db']:.2f} dB"
    return line + "".join(f" | ppl_q{k} {p:.0f}" for k, p in enumerate(measured["perplexity"], 1))
