"""Fits a small codec of one's own: minutes to hours on one core, resumable.

    a tenth of the steps    an autoencoder alone: codebooks that begin on untrained latents collapse
    then, at once           residual k-means on its latents makes the K codebooks
    the other steps         encoder, decoder and codebooks together, the codebooks by exponential averages

The losses are EnCodec's (Defossez et al. 2022, sec. 3.4): the waveform, mel spectra at three resolutions, the
commitment of the latents to their codes, and with --adversarial the MS-STFT discriminator.

The package's own training code of the quantizer is not used. Its k-means start sets sums that do not fit the
counts, its replacement of dead codes is undone within the same step, and levels 2..K give the encoder no
gradient.

Legend: B batch, C channels, N samples, K codebooks, T frames, D latent width, V vectors of a codebook (card),
M mel bands, F frames of a spectrum, n latents.

    python -m tools.fit_codec --dataset toy --out codec.pt
    python tokenizer.py in.wav out.wav --codec codec.pt
"""

import argparse
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from encodec.modules import SConv1d, SConvTranspose1d
from encodec.modules.seanet import SEANetResnetBlock
from torch import Tensor, nn

import tokenizer
import toy
from interop.encodec import check_codec_config
from support import audio, common
from support.bounds import LIMITS, check_flag_number
from support.decode import AUDIO_SUFFIXES
from support.quality import MelSpectrum, describe_quality, round_trip_quality

FIT_FORMAT = "nanomusicgen codec fit 1"        # of a checkpoint
LATENT_BATCHES = 40                            # that k-means starts on
DEAD_BELOW = 0.02                              # a code used less than once in 50 steps is dead
CODEBOOK_DECAY = 0.99
START_LEVEL = 0.5                              # signal level inside the networks at the start, as a share
MEL_SCALES = ((512, 40), (1024, 64), (2048, 80))         # (n_fft, mel bands)


# ----------------------------------------------------------------------------------------------------------
# data


class RandomSegments:
    """Random training audio, a function of (seed, step, place in the batch) alone: resuming is exact."""

    def __init__(self, dataset: str, sample_rate: int, channels: int, samples: int, grid: int, seed: int):
        """grid: toy clips are cut on multiples of so many samples, the hop: their notes begin there."""
        self.sample_rate = sample_rate         # Hz
        self.channels = channels
        self.samples = samples                 # of a segment
        self.grid = grid
        self.seed = seed
        self.files = None                      # {split: [path]}; None of the toy
        self.bad = set()                       # files that could not be read
        if dataset == "toy":
            if (sample_rate, channels) != (toy.SAMPLE_RATE, 1):
                asked = f"{channels} x {sample_rate} Hz"
                raise ValueError(f"--dataset toy is mono at {toy.SAMPLE_RATE} Hz, not {asked}")
            if samples > toy.SAMPLE_RATE * toy.CLIP_SECONDS:
                seconds = samples / sample_rate
                raise ValueError(f"--segment_seconds {seconds:g}: toy clips have {toy.CLIP_SECONDS} s")
            return
        if not Path(dataset).is_dir():
            raise ValueError(f"--dataset {dataset}: no such folder (or give the word toy)")
        paths = sorted(Path(dataset).rglob("*"))
        files = [p for p in paths if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()]
        if not files:
            raise ValueError(f"--dataset {dataset}: no {' '.join(AUDIO_SUFFIXES)} in it")
        valid = files[::20] if len(files) >= 20 else files     # one file in twenty only validates
        self.files = {"valid": valid, "train": [f for f in files if f not in set(valid)] or files}
        print(f"{len(files)} audio files, {len(valid)} of them to validate on", flush=True)

    def batch(self, step: int, size: int, split: str = "train") -> Tensor:
        """Audio [B,C,N] of a step; to train on, half at another gain and one in eight mixed with another."""
        rows = []
        for i in range(size):
            rng = common.random_generator(self.seed, ("train", "valid").index(split), step, i)
            wav = self._segment(rng, split, self.grid)                             # [C, N]
            if split == "train":
                if rng.random() < 1 / 8:
                    wav = 0.7 * (wav + self._segment(rng, split, 1))
                if rng.random() < 1 / 2:
                    wav = wav * rng.uniform(0.6, 1.2)
            rows.append(wav)
        return torch.stack(rows).float()                                           # [B, C, N]

    def _segment(self, rng: np.random.Generator, split: str, grid: int) -> Tensor:
        """One segment [C, N]."""
        if self.files is None:
            clip = toy.make_clip(int(rng.integers(2 ** 31)), 0, 0, split=split).wav
            start = grid * int(rng.integers((len(clip) - self.samples) // grid + 1))
            return torch.from_numpy(clip[None, start:start + self.samples])        # [C, N]
        for _ in range(100):
            path = self.files[split][rng.integers(len(self.files[split]))]
            place = rng.random()
            if path in self.bad:
                continue
            try:
                seconds = self.samples / self.sample_rate
                start = place * max(0.0, audio.audio_info(path).seconds - seconds)
                wav = audio.read_audio(path, start, seconds + 0.01, self.sample_rate, self.channels)
                wav = wav[:, :self.samples]
                return F.pad(wav, (0, self.samples - wav.shape[1]))                # [C, N]
            except ValueError as error:
                self.bad.add(path)
                print(f"skipped {error}", flush=True)
        raise ValueError("100 segments in a row were unreadable: see the files named above")


# ----------------------------------------------------------------------------------------------------------
# the start of the networks


@torch.no_grad()
def start_linear(encoder: nn.Module, decoder: nn.Module, wav: Tensor, generator: torch.Generator) -> None:
    """Starts both networks as a linear codec: principal components of audio [B,C,N] in, their transpose out.

    At torch's own start the latents of such small nets hardly move over time, and even at unit variance a
    spectral loss keeps them off the waveform (-30 dB SI-SNR after 250 steps; this starts at +12). Each
    encoder convolution gets the leading directions of its input blocks, `stride` wide so that they do not
    overlap, turned at random to spread the energy. The decoder's counterpart gets the same weights. Residual
    branches and biases start at zero, and ELU leaves small signals almost as they are."""
    ins = [m for m in encoder.model if isinstance(m, SConv1d)]
    outs = [m for m in decoder.model if isinstance(m, (SConv1d, SConvTranspose1d))][::-1]
    for network in (encoder, decoder):
        for module in network.model:
            if isinstance(module, SEANetResnetBlock):
                module.block[-1].conv.conv.weight.zero_()
        for module in network.modules():
            if hasattr(module, "bias"):
                module.bias.zero_()
    h = wav
    for module in encoder.model:
        if isinstance(module, SConv1d):
            conv, counterpart = module.conv.conv, outs[ins.index(module)]
            B, C, T = h.shape
            r, width = conv.stride[0], conv.out_channels
            blocks = h.view(B, C, T // r, r).transpose(1, 2).reshape(-1, C * r)    # [n, C*r]
            # eigenvectors of the covariance, the largest first
            directions = torch.linalg.eigh((blocks.T @ blocks).double())[1].flip(1)[:, :width].T.float()
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            W = (turn[:, :len(directions)] @ directions).view(width, C, r)         # [out, C, r]
            gain = 1.0
            if module is ins[0]:
                gain = START_LEVEL
            elif module is ins[-1]:            # latents of variance 1
                gain = 1 / float((blocks @ W.view(width, -1).T).std())
            _set_taps(conv, W * gain)
            if isinstance(counterpart, SConvTranspose1d):
                _set_taps(counterpart.convtr.convtr, W / gain)
            else:
                _set_taps(counterpart.conv.conv, W.transpose(0, 1) / gain)
        h = module(h)


def _set_taps(conv: nn.Module, W: Tensor) -> None:
    """Puts W [out, in, r] on the taps over a block's own samples; the rest of the kernel starts at zero."""
    k, stride = conv.kernel_size[0], conv.stride[0]
    first = -((stride - k) // 2)               # ceil((k - r) / 2): what the package pads left
    conv.weight.zero_()
    conv.weight[:, :, first:first + W.shape[-1]] = W


# ----------------------------------------------------------------------------------------------------------
# the quantizer


def kmeans(x: Tensor, V: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(means [V,D], counts [V]) of Lloyd's algorithm on x [n,D]; an empty cluster restarts at a random x."""
    means = x[torch.randperm(len(x), generator=generator)[:V].to(x.device)]
    for i in range(iterations + 1):
        index = torch.cdist(x, means).argmin(1)                                    # [n]
        counts = torch.bincount(index, minlength=V).to(x)                          # [V]
        if i == iterations:
            return means, counts
        means = torch.zeros_like(means).index_add_(0, index, x) / counts.clamp_min(1)[:, None]
        anew = x[torch.randint(len(x), (V,), generator=generator).to(x.device)]
        means = torch.where(counts[:, None] > 0, means, anew)


def start_codebooks(quantizer: nn.Module, x: Tensor, per_step: int, generator: torch.Generator) -> None:
    """Residual k-means on pooled latents x [n,D]; counts are scaled to the `per_step` latents of a step."""
    for layer in quantizer.vq.layers:
        book = layer._codebook
        means, counts = kmeans(x, book.codebook_size, 20, generator)
        counts = (counts * per_step / len(x)).clamp_min(DEAD_BELOW)
        set_codes(book, torch.ones_like(counts, dtype=torch.bool), means, counts)
        x = x - means[common.nearest_vectors(x, means)]


def set_codes(book: nn.Module, which: Tensor, vectors: Tensor, counts: Tensor) -> None:
    """Gives the codes which [V] of a codebook new vectors [V,D] and counts [V], and the sums of these."""
    book.embed[which], book.cluster_size[which] = vectors[which], counts[which]
    book.embed_avg[which] = (vectors * counts[:, None])[which]
    book.inited.fill_(1)


def quantize(quantizer: nn.Module, z: Tensor, learn: bool, revive: torch.Generator | None = None) -> tuple:
    """z [B,D,T] -> (quantized z with a straight-through gradient [B,D,T], commitment loss, codes [B,K,T]).

    Residuals keep their gradient from level to level and one straight-through stands on the sum, so that
    every level's commitment reaches the encoder. learn: moves the codebooks. revive: randomness that replaces
    dead codes."""
    B, D, T = z.shape
    residual = x = z.transpose(1, 2).reshape(B * T, D)                             # [B*T, D]
    commitment, codes = 0.0, []
    for layer in quantizer.vq.layers:
        book = layer._codebook
        index = common.nearest_vectors(residual.detach(), book.embed)              # [B*T]
        q = book.embed[index]                                                      # [B*T, D]
        commitment = commitment + F.mse_loss(residual, q)
        if learn:
            update_codebook(book, residual.detach(), index, revive)
        residual = residual - q
        codes.append(index.view(B, T))
    # relative to the latent's variance: the encoder gains nothing by shrinking or growing its scale
    commitment = commitment / len(codes) / x.var().clamp_min(1e-6)
    q = (x + (-residual).detach()).view(B, T, D).transpose(1, 2)                   # [B, D, T]
    return q, commitment, torch.stack(codes, 1)


@torch.no_grad()
def update_codebook(book: nn.Module, x: Tensor, index: Tensor, revive: torch.Generator | None) -> None:
    """One step of a codebook's exponential averages with latents x [n,D] at codes index [n].

    revive: randomness with which dead codes then become random x; None leaves them."""
    counts = torch.bincount(index, minlength=book.codebook_size).to(x)             # [V]
    book.cluster_size.lerp_(counts, 1 - CODEBOOK_DECAY)
    book.embed_avg.lerp_(torch.zeros_like(book.embed).index_add_(0, index, x), 1 - CODEBOOK_DECAY)
    alive = book.cluster_size[:, None] > 1e-4  # a code long unused keeps its vector
    means = book.embed_avg / book.cluster_size.clamp_min(1e-4)[:, None]            # [V, D]
    book.embed.copy_(torch.where(alive, means, book.embed))
    if revive is not None:
        dead = book.cluster_size < DEAD_BELOW
        picks = torch.randint(len(x), (book.codebook_size,), generator=revive).to(x.device)
        set_codes(book, dead, x[picks], torch.ones_like(counts))


# ----------------------------------------------------------------------------------------------------------
# losses


class ReconstructionLoss(nn.Module):
    """Waveform L1 and a multi-resolution mel loss, on magnitudes and on their logarithms."""

    def __init__(self, sample_rate: int):
        super().__init__()
        self.spectra = nn.ModuleList([MelSpectrum(sample_rate, n_fft, mels) for n_fft, mels in MEL_SCALES])

    def forward(self, estimate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(L1, spectral) of [B,C,N]; the log floor is -60 dB, digital silence is no aim."""
        a, b = estimate.flatten(0, 1), target.flatten(0, 1)                        # [B*C, N]
        spectral = 0.0
        for mel in self.spectra:
            x, y = mel(a), mel(b)                                                  # [B*C, M, F]
            log = (x.clamp_min(1e-3).log10() - y.clamp_min(1e-3).log10()).abs().mean()
            spectral = spectral + (log + 10 * (x - y).abs().mean()) / len(self.spectra)
        return F.l1_loss(estimate, target), spectral


class Adversary:
    """The package's MS-STFT discriminator, with hinge losses and feature matching (EnCodec sec. 3.4)."""

    def __init__(self, channels: int, lr: float, device):
        from encodec.msstftd import MultiScaleSTFTDiscriminator
        with warnings.catch_warnings():        # the package uses torch's old weight norm
            warnings.filterwarnings("ignore", message=".*weight_norm.*")
            self.net = MultiScaleSTFTDiscriminator(filters=16, in_channels=channels).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0)

    def codec_loss(self, estimate: Tensor, target: Tensor) -> Tensor:
        """What the codec shall lower: hinge on its audio, and the distance of the features."""
        self.net.requires_grad_(False)
        logits, features = self.net(estimate)
        wanted = self.net(target)[1]
        self.net.requires_grad_(True)
        hinge = sum(F.relu(1 - x).mean() for x in logits) / len(logits)
        pairs = [(a, b) for fa, fb in zip(features, wanted) for a, b in zip(fa, fb)]
        match = sum(F.l1_loss(a, b) / b.abs().mean().clamp_min(1e-6) for a, b in pairs) / len(pairs)
        return 0.1 * hinge + 0.2 * match       # small beside 10 L1 + 2 spectral

    def update(self, estimate: Tensor, target: Tensor) -> None:
        """One step of the discriminator."""
        real, fake = self.net(target)[0], self.net(estimate.detach())[0]
        loss = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


# ----------------------------------------------------------------------------------------------------------
# the fit


class CodecFit:
    """All that fitting a codec changes from step to step, and so all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, config: dict, segments: RandomSegments):
        self.args, self.config, self.segments, self.step = args, config, segments, 0
        self.autoencoder_steps = max(1, round(args.autoencoder_share * args.steps))    # without the quantizer
        torch.manual_seed(args.seed)
        encoder, quantizer, decoder = tokenizer.build_networks(config)
        unused = segments.batch(args.steps, 32)            # of a step past the end: in no training batch
        start_linear(encoder, decoder, unused, torch.Generator().manual_seed(args.seed))
        codec = tokenizer.Codec("fit", config["sample_rate"], encoder, quantizer, decoder)
        self.codec = codec.to(args.device)
        self.networks = nn.ModuleList([encoder, decoder]).requires_grad_(True)
        self.loss = ReconstructionLoss(config["sample_rate"]).to(args.device)
        weights = self.networks.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.8, 0.99), weight_decay=0.0)
        self.adversary = Adversary(encoder.channels, args.lr, args.device) if args.adversarial else None

    def generator(self) -> torch.Generator:
        """Randomness of this step, the same after a restart."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)

    def batch(self, step: int, split: str = "train") -> Tensor:
        """Audio [B,C,N] of a step on the device."""
        return self.segments.batch(step, self.args.batch_size, split).to(self.args.device)

    def start_quantizer(self) -> None:
        """k-means on the latents of LATENT_BATCHES batches."""
        with torch.no_grad():
            z = [self.codec.encoder(self.batch(self.args.steps + 1 + i)) for i in range(LATENT_BATCHES)]
        x = torch.cat(z).transpose(1, 2).flatten(0, 1)                             # [n, D]
        start_codebooks(self.codec.quantizer, x, len(x) // LATENT_BATCHES, self.generator())

    def update(self) -> dict:
        """One step -> {name: number} of its losses."""
        args, codec = self.args, self.codec
        quantizing = self.step >= self.autoencoder_steps
        if self.step == self.autoencoder_steps:
            self.start_quantizer()

        # forward
        wav = self.batch(self.step)                                                # [B, C, N]
        z = codec.encoder(wav)                                                     # [B, D, T]
        loss = 0.01 * (z.square().mean() - 1).square()     # holds the latents' scale, which is free otherwise
        commitment = None
        if quantizing:
            revive = self.step % 10 == 0 and self.step < 0.8 * args.steps
            z, commitment, codes = quantize(codec.quantizer, z, True, self.generator() if revive else None)
            loss = loss + args.commitment * commitment
        back = codec.decoder(z)                                                    # [B, C, N]
        l1, spectral = self.loss(back, wav)
        loss = loss + 10 * l1 + 2 * spectral
        if quantizing and self.adversary:
            self.adversary.update(back, wav)
            loss = loss + self.adversary.codec_loss(back, wav)

        # backward, clip, step
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"step {self.step}: the gradient is not finite: lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = codec_learning_rate(self.step, args)
        self.optimizer.step()
        self.step += 1

        metrics = {"loss": loss, "l1": l1, "spectral": spectral, "commit": commitment, "norm": norm}
        return {name: float(x.detach()) for name, x in metrics.items() if x is not None}

    @torch.no_grad()
    def validate(self, batches: int) -> dict:
        """Quality on segments kept out of training; without the quantizer as long as it has not started."""
        codec, card = self.codec, self.codec.card
        wav = torch.cat([self.batch(i, "valid") for i in range(batches)])          # [B, C, N]
        if self.step > self.autoencoder_steps:
            codes = codec.encode(wav)                                              # [B, K, T]
            back = codec.decode(codes)[..., :wav.shape[-1]]                        # [B, C, N]
            return round_trip_quality(wav, back, codec.sample_rate, codes, card)
        back = torch.cat([codec.decoder(codec.encoder(clip)) for clip in wav.split(1)])
        return round_trip_quality(wav, back, codec.sample_rate)

    def state_dict(self) -> dict:
        """Plain data and tensors."""
        state = {"format": FIT_FORMAT, "args": flags_of_result(self.args), "step": self.step,
                 "codec": self.codec.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.adversary:
            state["adversary"] = [self.adversary.net.state_dict(), self.adversary.optimizer.state_dict()]
        return state

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Goes on where a checkpoint of this command stopped. Errors: ValueError where the flags differ."""
        if state.get("format") != FIT_FORMAT:
            raise ValueError(f"{path}: not a checkpoint of this command")
        try:
            changed = [k for k, v in flags_of_result(self.args).items() if state["args"].get(k) != v]
            if not changed:
                self.step = state["step"]
                self.codec.load_state_dict(state["codec"])
                self.optimizer.load_state_dict(state["optimizer"])
                if self.adversary:
                    self.adversary.net.load_state_dict(state["adversary"][0])
                    self.adversary.optimizer.load_state_dict(state["adversary"][1])
        except Exception as error:             # a foreign file can fail in any way
            problem = common.describe_error(error)
            raise ValueError(f"{path}: damaged ({problem}): delete it to begin again") from None
        if changed:
            raise ValueError(f"{path} was made with another --{', --'.join(changed)}: "
                             "delete it or name another --out")


def codec_learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up over 100 steps, then a cosine to a fiftieth."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.steps))
    return args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def flags_of_result(args: argparse.Namespace) -> dict:
    """The flags that change the result."""
    free = ("out", "log_seconds", "save_every", "stop_after", "device")
    return {k: v for k, v in vars(args).items() if k not in free}


def codec_config(args: argparse.Namespace) -> dict:
    """The plain config of a codec file: all arguments of SEANet and RVQ, from the flags."""
    seanet = {
        "channels": 1, "dimension": args.dim, "n_filters": args.filters, "ratios": args.ratios,
        "n_residual_layers": args.residual_layers, "activation": "ELU", "activation_params": {"alpha": 1.0},
        "kernel_size": args.kernel, "last_kernel_size": args.last_kernel, "residual_kernel_size": 3,
        "dilation_base": 2, "causal": False, "pad_mode": "constant", "true_skip": True,
        "compress": args.compress, "lstm": 0}
    rvq = {"dimension": args.dim, "n_q": args.codebooks, "bins": args.card}
    return {"sample_rate": args.sample_rate, "seanet": seanet, "rvq": rvq}


def fit_codec(args: argparse.Namespace) -> None:
    """Fits a codec and writes it to args.out: {format, config, state (fp16), metrics}. Errors: ValueError."""
    torch.set_num_threads(args.threads)
    out, checkpoint = Path(args.out), Path(f"{args.out}.fit")
    if out.exists():
        raise ValueError(f"--out {out}: exists already; delete it first or name another")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    common.output_folder(out.parent)                           # may be read-only
    hop = math.prod(args.ratios)
    samples = round(args.segment_seconds * args.sample_rate / hop) * hop
    if samples < 2048:
        least = 2048 / args.sample_rate
        raise ValueError(f"--segment_seconds {args.segment_seconds}: at least {least:.2f} are needed")
    latents = LATENT_BATCHES * args.batch_size * samples // hop
    if args.card > latents:
        raise ValueError(f"--card {args.card}: at most {latents}, the frames of {LATENT_BATCHES} batches")

    # build, or go on
    config = codec_config(args)
    run = CodecFit(args, config, RandomSegments(args.dataset, args.sample_rate, 1, samples, hop, args.seed))
    millions = sum(p.numel() for p in run.networks.parameters()) / 1e6
    print(args)
    print(f"{millions:.2f}M weights, {args.sample_rate / hop:.0f} Hz, {args.codebooks} x {args.card} codes, "
          f"{run.autoencoder_steps} of {args.steps} steps without the quantizer", flush=True)
    if checkpoint.exists():
        run.load_state_dict(common.read_torch_dict(checkpoint, "a checkpoint of this command"), checkpoint)
        print(f"goes on at step {run.step} of {checkpoint}", flush=True)

    # train, with a line and a checkpoint now and then
    began = shown = time.monotonic()
    first = run.step
    stop = min(args.steps, first + args.stop_after) if args.stop_after else args.steps
    while run.step < stop:
        metrics = run.update()
        if time.monotonic() - shown > args.log_seconds or run.step in (1, stop):
            shown = time.monotonic()
            each = (shown - began) / (run.step - first)        # seconds a step
            left = (args.steps - run.step) * each / 60
            losses = " | ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            print(f"step {run.step}/{args.steps} | {losses} | valid {describe_quality(run.validate(2))} | "
                  f"{1000 * each:.0f} ms | {left:.0f} min left", flush=True)
        if run.step % args.save_every == 0 or run.step == stop:
            common.write_torch(checkpoint, run.state_dict())
    if run.step < args.steps:
        print(f"stopped at step {run.step}: the same command goes on from {checkpoint}", flush=True)
        return

    # the codec file takes the checkpoint's place
    measured = run.validate(16)
    state = {name: x.detach().cpu().half() for name, x in run.codec.state_dict().items()
             if not name.endswith(tokenizer.TRAINING_BUFFERS)}
    common.write_torch(out, {
        "format": tokenizer.CODEC_FORMAT, "config": config, "state": state,
        "metrics": {**measured, "dataset": args.dataset, "steps": args.steps, "seed": args.seed}})
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB): {describe_quality(measured)}", flush=True)


# ----------------------------------------------------------------------------------------------------------
# the command line


def fit_parser() -> argparse.ArgumentParser:
    """Flags of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fit_codec", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Fits a small codec: an autoencoder first, then k-means, then quantizing. If stopped, "
                    "the same command goes on exactly.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", required=True, help="toy, or a folder of audio files")
    add("--out", type=common.output_name, required=True,
        help="codec file to write; the checkpoint stands beside it")
    add("--sample_rate", type=int, default=16_000, help="Hz")
    add("--segment_seconds", type=float, default=1.0, help="length of a training segment")
    add = parser.add_argument_group("shape of the codec").add_argument
    add("--filters", type=int, default=16, help="channels at the full rate; every stride doubles them")
    add("--ratios", type=int, nargs="+", default=[1, 1, 20, 1, 16], metavar="R",
        help="strides from codes to audio; their product is the hop in samples")
    add("--residual_layers", type=int, default=0, help="residual blocks at every rate")
    add("--compress", type=int, default=2, help="a residual block is so many times narrower inside")
    add("--kernel", type=int, default=5, help="first convolution of encoder and decoder")
    add("--last_kernel", type=int, default=3, help="last convolution of encoder and decoder")
    add("--dim", type=int, default=96, help="width of the latent vectors")
    add("--codebooks", type=int, default=4, help="levels of the quantizer (K)")
    add("--card", type=int, default=256, help="vectors of a codebook")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=9000, help="updates in all")
    add("--batch_size", type=int, default=8, help="segments a step")
    add("--lr", type=float, default=3e-4, help="peak learning rate")
    add("--commitment", type=float, default=0.25, help="weight of the commitment loss")
    add("--autoencoder_share", type=float, default=0.1, help="share of the steps without the quantizer")
    add("--adversarial", action="store_true", help="with the MS-STFT discriminator as well; slow")
    add("--seed", type=int, default=0, help="of weights, data and codebooks")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="CPU threads; part of what makes a run repeatable")
    add("--log_seconds", type=float, default=20, help="time between progress lines")
    add("--save_every", type=int, default=200, help="steps between checkpoints")
    add("--stop_after", type=int, default=0, help="stop after so many steps (0: not), to go on later")
    return parser


def check_fit_flags(args: argparse.Namespace) -> None:
    """Refuses flags that make no codec. Errors: ValueError with what is allowed."""
    fields = dict(filters="n_filters", compress="compress", kernel="kernel_size", dim="dimension",
                  card="bins", last_kernel="last_kernel_size", codebooks="n_q",
                  residual_layers="n_residual_layers", sample_rate="sample_rate")
    ranges = {flag: LIMITS[field] for flag, field in fields.items()} | dict(
        steps=(1, 10 ** 9), save_every=(1, 10 ** 9), stop_after=(0, 10 ** 9), commitment=(0, 10 ** 9),
        seed=(0, 2 ** 31 - 1), batch_size=(1, 65_536), threads=(1, 512))
    for name, (low, high) in ranges.items():
        check_flag_number(name, getattr(args, name), low, high)
    for ratio in args.ratios:
        check_flag_number("ratios", ratio, 1, 1024)
    for name in ("lr", "segment_seconds"):
        if not 0 < (value := getattr(args, name)) < 1e4:
            raise ValueError(f"--{name} {value}: more than 0, less than 10000")
    if not 0 < args.autoencoder_share < 1:
        raise ValueError(f"--autoencoder_share {args.autoencoder_share}: between 0 and 1")
    if not args.residual_layers and args.compress != fit_parser().get_default("compress"):
        raise ValueError(f"--compress {args.compress}: there are no residual blocks; give --residual_layers")
    if args.residual_layers and args.compress > args.filters:
        raise ValueError(f"--compress {args.compress}: at most the {args.filters} of --filters")
    check_codec_config("--filters, --ratios ..", codec_config(args))
    if common.check_device(args.device).type == "mps":
        raise ValueError(f"--device {args.device}: cpu or cuda (MPS finds wrong nearest vectors)")


@common.command("tools.fit_codec", "--batch_size or --filters")
def main(argv: list | None = None) -> int:
    args = fit_parser().parse_args(argv)
    check_fit_flags(args)
    fit_codec(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
