"""Speed and memory of training and generation, beside other implementations and beside what the machine can do.

A speed means little by itself: it moves with the machine, its load and the thread count. So a peer runs in the same process in
turn with ours (ours, peer, ours, peer ..), with the same dimensions, batch, guidance, threads and optimiser, and what counts is the
median of the ratios of neighbouring runs. `--limit` measures what the machine itself can do and prints fractions of it.

    python -m tools.bench train --vs transformers audiocraft --limit          an update: forward, backward, clipping, AdamW
    python -m tools.bench generate --vs transformers audiocraft --limit       sampling with guidance, 250 and 1,500 frames
    python -m tools.bench memory --vs audiocraft                              peak memory of an update, each in a process of its own
    python -m tools.bench data                                                updates from a token cache beside random codes
    python -m tools.bench codec --codec encodec_24khz                         encoding and decoding
    python -m tools.bench patterns                                            building and reverting the codebook patterns
    python -m tools.bench scaling                                             how the cost of an update grows

Weights and codes are random: speed does not depend on them. Legend: B batch, K codebooks, T frames, S sequence steps, L condition
tokens, D width.
"""

import argparse
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import data
import patterns
import tokenizer
from generate import Sampling, generate_codes
from support import common
from support.cache import CachedEntry, shard_path, write_array
from support.kernels import linear
from model import SIZES, Conditions, ModelConfig, MusicGen, decay_groups, flops_per_step
from support.compiled import compile_step, require_compiler
from tools.peers import INSTALL, PEERS, Peer
from support.distributed import keep_freed_memory

FRAME_RATE = 50                                                      # Hz, of MusicGen's codec: 50 frames/s are real time
REFERENCE = dict(dim=512, num_layers=8, num_heads=8)
DEFAULTS = {"generate": ([250, 1500], 1), "memory": ([1500], 4)}     # frames and batch of the commands; of the others 500 and 2
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}        # dense bfloat16 and float16, the makers' data sheets


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


class Given(nn.Module):
    """A conditioner whose embeddings [1,L,D] are simply there: what encoding a text costs is not measured. None is a null row."""

    def __init__(self, embedding: Tensor):
        super().__init__()
        self.register_buffer("embedding", embedding)

    def prepare(self, attributes: list, device="cpu") -> Tensor:
        """Which rows are conditioned: [B] bool."""
        return torch.tensor([a["text"] is not None for a in attributes], device=device)

    def forward(self, rows: Tensor) -> Conditions:
        mask = rows[:, None].expand(-1, self.embedding.shape[1])                                        # [B, L]
        return Conditions(cross=self.embedding * mask[..., None], cross_mask=mask)


def ours(args: argparse.Namespace, config: ModelConfig) -> Peer:
    """This repository's model in the same dress."""
    model = MusicGen(config, Given(torch.randn(1, args.tokens, config.dim))).to(args.device)
    model.transformer.checkpointing = args.checkpointing
    if args.compile and args.command == "generate":
        compile_step(model)
    elif args.compile:
        for layer in model.transformer.layers:                       # as train.py does
            layer.compile()
    asked = [{"text": "given"}] * args.batch_size
    sampling, dtype = Sampling(cfg=args.cfg, top_k=args.top_k), getattr(torch, args.dtype)

    def loss(codes):
        mask = torch.ones(codes.shape[0], codes.shape[2], dtype=torch.bool, device=codes.device)        # [B, T]
        sums = model(codes, mask, model.conditioner.prepare(asked, codes.device))                       # [K]
        return (sums / model.count_targets(mask)).mean()

    return Peer("ours", model, loss, lambda T: generate_codes(model, asked, T, sampling, dtype=dtype))


def build_sides(args: argparse.Namespace, names: list) -> list:
    """Ours and the peers by name, weights at random."""
    torch.manual_seed(0)
    return [ours(args, model_config(args)) if name == "ours" else
            PEERS[name](model_config(args), args.batch_size, args.tokens, args.device, args.cfg, args.top_k) for name in names]


def model_config(args: argparse.Namespace) -> ModelConfig:
    """The shape of the model that the flags ask for."""
    return ModelConfig(K=args.K, card=args.card, dim=args.dim, num_layers=args.num_layers, num_heads=args.num_heads,
                       hidden_scale=args.hidden_scale, pattern=args.pattern)


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def update_of(side: Peer, args: argparse.Namespace) -> Callable[[Tensor], None]:
    """One update on codes [B,K,T] as a function: `update` of train.py on one rank, with the same optimiser for every side."""
    optimizer = torch.optim.AdamW(decay_groups(side.model, 0.1), 1e-4, (0.9, 0.95), fused=True)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    def update(codes):
        side.model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = side.loss(codes)
        loss.backward()
        nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def on_gpu(args: argparse.Namespace) -> bool:
    """Whether the device is one of CUDA's."""
    return torch.device(args.device).type == "cuda"


def seconds_of(call: Callable[[], object], args: argparse.Namespace) -> float:
    """How long a call takes, with all the work it queued on the device."""
    wait = torch.cuda.synchronize if on_gpu(args) else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def in_turn(calls: list, args: argparse.Namespace, warm_up: int = 2) -> list:
    """Seconds of each call in every round [[float]]: first call, second, .. first, second, .. after `warm_up` rounds unmeasured."""
    rounds = [[seconds_of(call, args) for call in calls] for _ in range(warm_up + args.rounds)]
    return [list(times) for times in zip(*rounds[warm_up:])]


def spread(values: list, unit: float = 1.0, form: str = ".1f") -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values) * unit:{form}} ({min(values) * unit:{form}} to {max(values) * unit:{form}})"


def ratio_line(ours: list, other: list, what: str) -> str:
    """How much faster ours is than `what`, from the seconds of neighbouring runs."""
    return f"    ours is {spread([b / a for a, b in zip(ours, other)], form='.2f')} times as fast as {what}, {len(ours)} pairs"


@dataclass
class Limits:
    """What the machine can do, measured or (flops of known GPUs) from its data sheet; zeros where neither is wanted or known."""
    flops: float = 0.0                                               # FLOP/s of a matrix product
    read: float = 0.0                                                # bytes/s
    copy: float = 0.0                                                # bytes/s, read and written counted


def find_limits(args: argparse.Namespace) -> Limits:
    """With --limit: the fastest of several matrix products; a sum and a matrix-vector product over, and a copy of, 256 MB."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    name = torch.cuda.get_device_name(device) if on_gpu(args) else ""
    sheet = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name and dtype != torch.float32), 0.0)
    if sheet:
        print(f"data sheet of {name}: {sheet / 1e12:.0f} TFLOP/s")
    if not args.limit:
        return Limits(sheet)

    def best(call):
        call()
        return min(seconds_of(call, args) for _ in range(5))

    with torch.inference_mode():
        squares = [torch.randn(n, n, device=device).to(dtype) for n in ((4096, 8192) if on_gpu(args) else (1024, 2048))]
        flops = max(2 * len(a) ** 3 / best(lambda: f(a, a)) for a in squares for f in (torch.mm, linear))
        big = torch.randn(2 ** 28 // squares[0].itemsize // 4096, 4096, device=device).to(dtype)        # 256 MB, no cache holds it
        other, vector = torch.empty_like(big), big[0].clone()
        read = big.nbytes / min(best(big.sum), best(lambda: big @ vector))
        copy = 2 * big.nbytes / best(lambda: other.copy_(big))
    print(f"limits: a matrix product {flops / 1e9:.1f} GFLOP/s, memory read {read / 1e9:.1f} GB/s, copied {copy / 1e9:.1f} GB/s")
    return Limits(sheet or flops, read, copy)


def random_codes(args: argparse.Namespace, T: int) -> Tensor:
    """[B,K,T] int64 on the device."""
    return torch.randint(args.card, (args.batch_size, args.K, T), generator=torch.Generator().manual_seed(0)).to(args.device)


def update_flops(config: ModelConfig, B: int, T: int, L: int) -> int:
    """FLOPs of an update: the forward pass of `flops_per_step` and twice as much backwards; what checkpointing computes again is not
    counted. Over the peak and the time it is the model FLOP utilisation of PaLM (Chowdhery et al. 2022, appendix B):

        MFU = 3 * forward FLOPs / (seconds * peak FLOP/s)"""
    return 3 * B * flops_per_step(config, config.layout(T).S_valid - 1, L)


def step_bytes(config: ModelConfig, rows: int, S: int, L: int, itemsize: int) -> float:
    """Bytes a generation step must read, on average over S steps: all weights once but for the tables (a row each) and the keys and
    values of cross-attention (computed once), and the keys and values of the steps before and of the condition. Model bandwidth
    utilisation (as in PyTorch's gpt-fast) is this over the time and the memory's reading speed."""
    D, layers = config.dim, config.num_layers
    weights = layers * (4 + 2 + 2 * config.hidden_scale) * D * D + config.K * config.card * D
    return itemsize * (weights + layers * rows * 2 * D * ((S + 1) / 2 + L))


def peak_bytes() -> int:
    """Most memory that this process has held. Linux: VmHWM, because a child's ru_maxrss begins at what its parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # bytes on macOS


def gpu_peak(args: argparse.Namespace, call: Callable[[], object]) -> str:
    """` | peak 1.23 GiB` of one more call on a GPU; the CPU's is `memory`'s business."""
    if not on_gpu(args):
        return ""
    torch.cuda.reset_peak_memory_stats()
    call()
    return f" | peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB with all sides' weights"


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def bench_train(args: argparse.Namespace) -> None:
    """Updates of ours and of the peers."""
    sides, limits, config = build_sides(args, ["ours", *args.vs]), find_limits(args), model_config(args)
    updates = [update_of(side, args) for side in sides]
    for T in args.frames:
        codes = random_codes(args, T)
        calls = [lambda update=update: update(codes) for update in updates]
        flops, measured = update_flops(config, args.batch_size, T, args.tokens), in_turn(calls, args)
        for side, call, times in zip(sides, calls, measured):
            middle = statistics.median(times)
            print(f"{side.name:<13} T {T} | {args.batch_size * T / middle:.1f} frames/s | {spread(times, 1e3)} ms a step | "
                  f"{flops / middle / 1e9:.1f} GFLOP/s" + (f" | MFU {flops / middle / limits.flops:.1%}" if limits.flops else "") +
                  gpu_peak(args, call))
            if side.name != "ours":
                print(ratio_line(measured[0], times, side.name))


def bench_generate(args: argparse.Namespace) -> None:
    """Sampling by ours and by the peers. The peers' weights are in the asked precision, ours under autocast."""
    sides, limits, config = build_sides(args, ["ours", *args.vs]), find_limits(args), model_config(args)
    dtype = getattr(torch, args.dtype)
    for side in sides:
        side.model.eval().to(dtype if side.name != "ours" else torch.float32)
    for T in args.frames:
        S, rows = config.layout(T).S - 1, args.batch_size * (1 + (args.cfg != 1))
        calls = [lambda side=side: side.generate(T) for side in sides]
        needed = step_bytes(config, rows, S, args.tokens, dtype.itemsize)
        assert all(call().shape == (args.batch_size, config.K, T) for call in calls)
        measured = in_turn(calls, args, warm_up=0)
        for side, call, times in zip(sides, calls, measured):
            step = statistics.median(times) / S
            print(f"{side.name:<13} T {T} | {args.batch_size * T / S / step:.1f} frames/s | {1 / step:.1f} steps/s | "
                  f"{spread(times, 1e3 / S, '.2f')} ms a step | {T / S / step / FRAME_RATE:.2f} x real time | "
                  f"{needed / step / 1e9:.1f} GB/s" + (f" | {needed / step / limits.read:.1%} of reading" if limits.read else "") +
                  gpu_peak(args, call))
            if side.name != "ours":
                print(ratio_line(measured[0], times, side.name))


def two_updates(args: argparse.Namespace, name: str) -> None:
    """Updates of a new model, of which the second finds the optimiser's state there."""
    side, = build_sides(args, [name])
    update, codes = update_of(side, args), random_codes(args, args.frames[0])
    update(codes)
    update(codes)


def bench_memory(args: argparse.Namespace, argv: list) -> None:
    """Peak memory of updates, each side in a process of its own: on the CPU less what importing took, on a GPU what was allocated."""
    if args.child:
        name, _, args.checkpointing = args.child.partition("+")
        keep_freed_memory(sparing=args.checkpointing)
        small = argparse.Namespace(**vars(args) | dict(dim=64, num_heads=1, num_layers=1, card=8, batch_size=1, frames=[args.K + 1]))
        two_updates(small, name)                                     # what is imported on the way does not count
        before = peak_bytes()
        two_updates(args, name)
        print(torch.cuda.max_memory_allocated() if on_gpu(args) else peak_bytes() - before)
        return
    baseline = None
    for name in ["ours", "ours+checkpointing", *args.vs]:
        child = subprocess.run([sys.executable, "-m", "tools.bench", *argv, "--child", name], cwd=Path(__file__).parent.parent,
                               capture_output=True, text=True)
        if child.returncode:
            raise ValueError(child.stderr.strip().splitlines()[-1].removeprefix("bench.py: "))
        peak = int(child.stdout.split()[-1])
        baseline = baseline or peak
        print(f"{name:<19} T {args.frames[0]} | peak {peak / 2 ** 20:.0f} MiB | {peak / baseline:.2f} x ours")


def bench_data(args: argparse.Namespace) -> None:
    """Updates on segments of a token cache (random codes, in a temporary folder), loading included, beside the same on random codes."""
    side, = build_sides(args, ["ours"])
    update, T = update_of(side, args), args.frames[0]
    codec = SimpleNamespace(name="none", K=args.K, card=args.card, channels=1, sample_rate=FRAME_RATE, hop=1, fingerprint="none")
    with tempfile.TemporaryDirectory() as folder:
        frames, rng = 20 * T, np.random.default_rng(0)
        files = [CachedEntry(f"{i}.wav", f"{i}.wav", frames / FRAME_RATE, offset=i * frames, frames=frames) for i in range(20)]
        codes = rng.integers(0, args.card, (len(files) * frames, args.K), dtype=np.uint16)
        write_array(shard_path(folder, 0, "npy"), codes)
        common.write_json(shard_path(folder, 0, "json"), [file.to_row() for file in files])
        common.write_json(Path(folder, "cache.json"), dict(shards=1, K=args.K, dataset="none", codec="none", fingerprint="none"))
        source = data.CacheDataset(folder, codec, T / FRAME_RATE, 0, split="train", valid=0.05)
        batches = data.batches(source, 0, 0, 3 + args.rounds, args.batch_size, workers=args.workers)
        codes = random_codes(args, T)
        cached = lambda: update(data.collate(next(batches)).codes.to(args.device))
        random, cache = in_turn([lambda: update(codes), cached], args)
    for name, times in (("random codes", random), ("token cache", cache)):
        print(f"{name:<13} T {T} | {args.batch_size * T / statistics.median(times):.1f} frames/s | {spread(times, 1e3)} ms a step")
    print(f"    a step from the cache takes {spread([b / a for a, b in zip(random, cache)], form='.3f')} times as long, "
          f"{args.workers} workers")


def bench_codec(args: argparse.Namespace) -> None:
    """Encoding and decoding of noise: what a batch costs when training live, and what the cache command can reach."""
    codec = tokenizer.load_codec(args.codec, device=args.device)
    for T in args.frames:
        wav = 0.1 * torch.randn(args.batch_size, codec.channels, T * codec.hop, device=args.device)
        codes, seconds = codec.encode(wav), args.batch_size * T / codec.frame_rate
        for name, times in zip(("encode", "decode"), in_turn([lambda: codec.encode(wav), lambda: codec.decode(codes)], args, warm_up=1)):
            print(f"{name:<8} {args.codec}, {args.batch_size} clips of {T} frames = {seconds:.1f} s | "
                  f"{seconds / statistics.median(times):.1f} x real time | {spread(times, 1e3)} ms")


def bench_patterns(args: argparse.Namespace) -> None:
    """Building, shifting to targets, reverting and realigning under each pattern."""
    codes = random_codes(args, args.frames[0])
    for name in patterns.PATTERNS:
        p = patterns.make_pattern(name, codes.shape[2], args.K).to(args.device)
        seq, logits = p.build(codes, args.card), torch.randn(args.batch_size, args.K, p.S_valid, args.card, device=args.device)
        calls = [lambda: p.build(codes, args.card), lambda: p.targets(codes), lambda: p.revert(seq, -1), lambda: p.revert_logits(logits)]
        names = ("build", "targets", "revert", "revert_logits")
        print(f"{name:<9} T {codes.shape[2]}, S {p.S} | " + " | ".join(
            f"{call} {statistics.median(times) * 1e3:.3f} ms" for call, times in zip(names, in_turn(calls, args))))


def bench_scaling(args: argparse.Namespace) -> None:
    """A table: one thing at a time is changed; `growth` is the cost over the first row's, `linear` what a proportional cost would be."""
    base = argparse.Namespace(**vars(args) | dict(frames=args.frames[:1]))
    cases = {"frames": [[250], [500], [1000], [1500], [3000]], "num_layers": [2, 4, 8, 16], "batch_size": [1, 2, 4, 8], "K": [1, 2, 4, 8],
             "pattern": list(patterns.PATTERNS)}
    print(f"{'changed':<12}{'to':>10}{'ms a step':>12}{'growth':>9}{'linear':>9}")
    for name, values in cases.items():
        first = None
        for value in values:
            changed = argparse.Namespace(**vars(base) | {name: value})
            side, = build_sides(changed, ["ours"])
            update, codes = update_of(side, changed), random_codes(changed, changed.frames[0])
            step = statistics.median(in_turn([lambda: update(codes)], changed, warm_up=1)[0])
            value = value[0] if name == "frames" else value
            first = first or (step, value)
            linear = "" if name == "pattern" else f"{value / first[1]:.2f}"
            print(f"{name:<12}{value:>10}{step * 1e3:>12.1f}{step / first[0]:>9.2f}{linear:>9}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Speed and memory, beside the peers and the machine's limits.", allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="train",
                        choices=("train", "generate", "codec", "data", "patterns", "memory", "scaling"))
    parser.add_argument("--size", choices=SIZES, help="named size; without, dim 512, 8 layers, 8 heads")
    for name, what in (("dim", "width"), ("num_layers", "layers"), ("num_heads", "attention heads")):
        parser.add_argument(f"--{name}", type=int, help=f"{what}, in place of the size's")
    parser.add_argument("--hidden_scale", type=int, default=4, help="feed-forward width over dim (default 4)")
    parser.add_argument("--K", type=int, default=4, help="codebooks (default 4)")
    parser.add_argument("--card", type=int, default=2048, help="codes in a codebook (default 2048)")
    parser.add_argument("--pattern", choices=patterns.PATTERNS, default="delay")
    parser.add_argument("--tokens", type=int, default=16, help="condition tokens that are attended to (default 16)")
    parser.add_argument("--frames", type=int, nargs="+", help="frames (default 500; generate 250 and 1500, memory 1500)")
    parser.add_argument("--batch_size", type=int, help="samples (default 2; generate 1, memory 4)")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance coefficient (default 3)")
    parser.add_argument("--top_k", type=int, default=250, help="draw from the k likeliest codes (default 250)")
    parser.add_argument("--codec", default="toy", help="toy, encodec_24khz or a path")
    parser.add_argument("--workers", type=int, default=1, help="processes that load data (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's own)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--vs", nargs="+", default=[], choices=list(INSTALL), help="peers to measure in turn with ours")
    parser.add_argument("--compile", action="store_true", help="torch.compile our layers (train) or our step (generate)")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of ours (train)")
    parser.add_argument("--limit", action="store_true", help="measure the machine's limits too, and print fractions of them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def derive(args: argparse.Namespace) -> None:
    """Fills in what was left out and checks the rest. Errors: ValueError."""
    frames, batch_size = DEFAULTS.get(args.command, ([500], 2))
    args.frames, args.batch_size = args.frames or frames, batch_size if args.batch_size is None else args.batch_size
    for name, value in (SIZES[args.size] if args.size else REFERENCE).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.dtype = args.dtype or ("float32" if common.check_device(args.device).type == "cpu" else "bfloat16")
    for name in ("dim", "num_layers", "num_heads", "hidden_scale", "K", "card", "tokens", "batch_size", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if min(args.frames) <= args.K:
        raise ValueError(f"--frames {min(args.frames)}: more than --K {args.K}, or nothing is left to predict")
    if args.dim % (2 * args.num_heads):
        raise ValueError(f"--dim {args.dim}: an even multiple of --num_heads {args.num_heads}")
    if not 0 < args.top_k <= args.card:
        raise ValueError(f"--top_k {args.top_k}: at least 1, at most --card {args.card}")
    if args.vs and args.pattern != "delay":
        raise ValueError(f"--pattern {args.pattern} with --vs: the peers are measured under delay")
    for name in args.vs:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--vs {name}: not installed here; {INSTALL[name]}")
    if args.compile:
        require_compiler()
    if args.threads:
        torch.set_num_threads(args.threads)


def main(argv: list | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        derive(args)
        keep_freed_memory(sparing=args.checkpointing)
        where = torch.cuda.get_device_name(args.device) if on_gpu(args) else args.device
        print(f"{args.command}: dim {args.dim}, {args.num_layers} layers, {args.num_heads} heads, K {args.K}, card {args.card}, batch "
              f"{args.batch_size}, {args.pattern}, {args.dtype}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        command = globals()[f"bench_{args.command}"]
        command(args, argv) if args.command == "memory" else command(args)
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
