"""Speed and memory of training and generation, beside other implementations and what the machine can do.

A speed alone says little: it moves with the machine, its load and the number of threads. So a peer runs in
the same process in turn with ours (ours, peer, ours, peer ..), with the same dimensions, batch, guidance,
threads and optimizer. What counts is the median of the ratios of neighboring runs. `--limit` measures what
the machine itself can do and prints fractions of it.

    python -m tools.bench train --vs transformers audiocraft --limit      an update
    python -m tools.bench train --optimizer adamw muon                    the same with another optimizer
    python -m tools.bench generate --vs transformers audiocraft --limit   sampling of 250 and 1,500 frames
    python -m tools.bench generate --size small --weights int8 float32    weights in fewer bits, in turn
    python -m tools.bench memory --vs audiocraft                          peak of an update, a process each
    python -m tools.bench data                                            updates from a token cache
    python -m tools.bench codec --codec encodec_24khz                     encoding and decoding
    python -m tools.bench patterns                                        building and reverting patterns
    python -m tools.bench scaling                                         how the cost of an update grows

An update is forward, backward, clipping and the optimizer: AdamW, if --optimizer says no other. Weights and
codes are random: speed does not depend on what they are.

Legend: B batch, K codebooks, T frames, S sequence steps, L condition tokens, D width.
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
from model import SIZES, Conditions, ModelConfig, MusicGen, decay_groups, forward_flops
from support import common
from support.cache import CachedEntry, shard_path
from support.compiled import compile_step, require_compiler
from support.bounds import LIMITS, check_flag_number
from support.distributed import keep_freed_memory
from support.encode import write_array
from support.kernels import linear
from support.muon import Muon, muon_groups
from support.quantize import STORED_AS, store_weights
from tools.peers import INSTALL, PEERS, Peer

FRAME_RATE = 50                           # Hz, of MusicGen's codec: 50 frames/s are real time
DEFAULT_SHAPE = dict(dim=512, num_layers=8, num_heads=8)
DEFAULT_FRAMES = {"generate": [250, 1500], "memory": [1500]}     # of the other commands 500
DEFAULT_BATCH = {"generate": 1, "memory": 4}                     # of the other commands 2
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # dense 16-bit, the makers' data sheets


# ------------------------------------------------------------------------------------------------------------
# what is measured


class FixedConditioner(nn.Module):
    """A conditioner whose embeddings [1,L,D] are simply there: what encoding a text costs is not measured."""

    def __init__(self, embedding: Tensor):
        super().__init__()
        self.register_buffer("embedding", embedding)

    def prepare(self, attributes: list, device="cpu") -> Tensor:
        """Which rows are conditioned, [B] bool: those whose text is not None."""
        return torch.tensor([a["text"] is not None for a in attributes], device=device)

    def forward(self, rows: Tensor) -> Conditions:
        mask = rows[:, None].expand(-1, self.embedding.shape[1])                      # [B, L]
        return Conditions(cross=self.embedding * mask[..., None], cross_mask=mask)


def shape_of_flags(args: argparse.Namespace) -> ModelConfig:
    """The shape of the model that the flags ask for."""
    return ModelConfig(K=args.K, card=args.card, dim=args.dim, num_layers=args.num_layers,
                       num_heads=args.num_heads, hidden_scale=args.hidden_scale, pattern=args.pattern)


def build_ours(args: argparse.Namespace, weights: str = "float32") -> Peer:
    """This repository's model, in the same dress as the peers; weights: what its matrices are held as."""
    config = shape_of_flags(args)
    model = MusicGen(config, FixedConditioner(torch.randn(1, args.tokens, config.dim))).to(args.device)
    model.transformer.checkpointing = args.checkpointing
    store_weights(model, weights)
    if args.compile and args.command == "generate":
        compile_step(model)
    elif args.compile:
        for layer in model.transformer.layers:    # as train.py does
            layer.compile()
    attributes = [{"text": "given"}] * args.batch_size
    sampling, dtype = Sampling(cfg=args.cfg, top_k=args.top_k), getattr(torch, args.dtype)

    def loss(codes):
        mask = torch.ones(codes.shape[0], codes.shape[2], dtype=torch.bool, device=codes.device)    # [B, T]
        sums = model(codes, mask, model.conditioner.prepare(attributes, codes.device))              # [K]
        return (sums / model.count_targets(mask)).mean()

    def generate(T):
        return generate_codes(model, attributes, T, sampling, dtype=dtype)

    return Peer("ours" if weights == "float32" else f"ours {weights}", model, loss, generate)


def build_sides(args: argparse.Namespace, names: list) -> list:
    """`Peer`s with random weights by name: ours, ours with matrices held as one of STORED_AS, the others."""
    torch.manual_seed(0)
    sides = []
    for name in names:
        if name == "ours" or name in STORED_AS:
            sides.append(build_ours(args, "float32" if name == "ours" else name))
        else:
            sides.append(PEERS[name](shape_of_flags(args), args.batch_size, args.tokens, args.device,
                                     args.cfg, args.top_k))
    return sides


def random_codes(args: argparse.Namespace, T: int) -> Tensor:
    """Codes [B,K,T] int64 on the device, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(args.card, (args.batch_size, args.K, T), generator=generator).to(args.device)


def make_update(side: Peer, args: argparse.Namespace, optimizer: str = "adamw") -> Callable[[Tensor], None]:
    """One update on codes [B,K,T], as a function. It is that of train.py on one rank, for all sides.

    optimizer: adamw, or for ours muon."""
    groups, betas = decay_groups(side.model, 0.1), (0.9, 0.95)
    if optimizer == "muon":
        optimizer = Muon(muon_groups(groups, side.model, 1.0), 1e-4, betas)
    else:
        optimizer = torch.optim.AdamW(groups, 1e-4, betas, fused=True)
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


# ------------------------------------------------------------------------------------------------------------
# measuring


def on_gpu(args: argparse.Namespace) -> bool:
    """Whether the device is one of CUDA's."""
    return torch.device(args.device).type == "cuda"


def seconds_of(call: Callable[[], object], args: argparse.Namespace) -> float:
    """How long a call takes, with all the work that it queues on the device."""
    if on_gpu(args):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu(args):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(calls: list, args: argparse.Namespace, warm_up: int = 2) -> list:
    """Seconds of each call in every round [[float]], `warm_up` rounds left out. A round is each call once."""
    rounds = [[seconds_of(call, args) for call in calls] for _ in range(warm_up + args.rounds)]
    return [list(times) for times in zip(*rounds[warm_up:])]


def median_and_range(values: list, unit: float = 1.0, form: str = ".1f") -> str:
    """`median (least to most)`, each times `unit`."""
    middle, least, most = (x * unit for x in (statistics.median(values), min(values), max(values)))
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def ratio_line(ours: list, other: list, what: str, name: str = "ours") -> str:
    """How much faster ours is than `what`, from the seconds of neighboring runs."""
    ratios = [theirs / mine for mine, theirs in zip(ours, other)]
    ratio = median_and_range(ratios, form=".2f")
    return f"    {name} is {ratio} times as fast as {what}, {len(ratios)} pairs"


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():                           # Linux, where a child's ru_maxrss begins at its parent's
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # bytes on macOS


def gpu_peak(args: argparse.Namespace, call: Callable[[], object]) -> list:
    """The peak of one more call on a GPU, as a part of a line; nothing on a CPU: see `bench_memory`."""
    if not on_gpu(args):
        return []
    torch.cuda.reset_peak_memory_stats()
    call()
    return [f"peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB with all sides' weights"]


# ------------------------------------------------------------------------------------------------------------
# what the machine can do, and what the model asks of it


@dataclass
class MachineLimits:
    """What the machine can do, measured or (flops of known GPUs) from a data sheet; 0 where not known."""
    flops: float = 0.0                            # FLOP/s of a matrix product
    read: float = 0.0                             # bytes/s


def measure_limits(args: argparse.Namespace) -> MachineLimits:
    """With --limit: the fastest matrix product, and the fastest of two ways to read 256 MB. Prints them."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    # The data sheet, for 16-bit types on a GPU.
    name = torch.cuda.get_device_name(device) if on_gpu(args) else ""
    sheet = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name and dtype != torch.float32), 0.0)
    if sheet:
        print(f"data sheet of {name}: {sheet / 1e12:.0f} TFLOP/s")
    if not args.limit:
        return MachineLimits(sheet)

    def fastest(call):
        call()
        return min(seconds_of(call, args) for _ in range(5))

    with torch.inference_mode():
        # Matrix products, of two sizes by two libraries.
        flops = 0.0
        for n in (4096, 8192) if on_gpu(args) else (1024, 2048):
            square = torch.randn(n, n, device=device).to(dtype)
            for product in (torch.mm, linear):
                flops = max(flops, 2 * n ** 3 / fastest(lambda: product(square, square)))

        # Memory: what no cache holds is summed, multiplied by a vector, copied.
        big = torch.randn(2 ** 28 // square.itemsize // 4096, 4096, device=device).to(dtype)    # 256 MB
        other, vector = torch.empty_like(big), big[0].clone()
        read = big.nbytes / min(fastest(big.sum), fastest(lambda: big @ vector))
        copy = 2 * big.nbytes / fastest(lambda: other.copy_(big))
    print(f"limits: a matrix product {flops / 1e9:.1f} GFLOP/s, "
          f"memory read {read / 1e9:.1f} GB/s, copied {copy / 1e9:.1f} GB/s")
    return MachineLimits(sheet or flops, read)


def update_flops(config: ModelConfig, B: int, T: int, L: int) -> int:
    """FLOPs of an update: the forward pass by `forward_flops`, and twice as much backwards.

    What checkpointing computes again is not counted. The model FLOP utilization of PaLM (Chowdhery et al.
    2022, appendix B) follows:

        MFU = 3 * forward FLOPs / (seconds * peak FLOP/s)"""
    return 3 * B * forward_flops(config, config.layout(T).S_valid - 1, L)


def step_bytes(config: ModelConfig, rows: int, S: int, L: int, itemsize: int, weight_size: int) -> float:
    """Bytes that a step of generation must read, on average over S steps; of a number, and of a weight.

    All weights once, without the tables (a row each) and the keys and values of cross-attention (computed
    once); then the keys and values of the steps before and of the condition. Model bandwidth utilization (as
    in PyTorch's gpt-fast) is this over the time and the memory's reading speed."""
    D, layers = config.dim, config.num_layers
    weights = layers * (4 + 2 + 2 * config.hidden_scale) * D * D + config.K * config.card * D
    return weight_size * weights + itemsize * layers * rows * 2 * D * ((S + 1) / 2 + L)


# ------------------------------------------------------------------------------------------------------------
# the commands


def bench_train(args: argparse.Namespace) -> None:
    """Updates of ours, with each optimizer, and of the peers."""
    optimizers = [*args.optimizer, *["adamw"] * len(args.vs)]
    sides = build_sides(args, [*["ours"] * len(args.optimizer), *args.vs])
    limits, config = measure_limits(args), shape_of_flags(args)
    for side, name in zip(sides[1:], args.optimizer[1:]):
        side.name = f"ours, {name}"
    updates = [make_update(side, args, name) for side, name in zip(sides, optimizers)]
    for T in args.frames:
        codes = random_codes(args, T)
        flops = update_flops(config, args.batch_size, T, args.tokens)
        calls = [lambda update=update: update(codes) for update in updates]
        measured = in_turn(calls, args)
        for side, call, times in zip(sides, calls, measured):
            seconds = statistics.median(times)
            parts = [f"{side.name:<13} T {T}", f"{args.batch_size * T / seconds:.1f} frames/s",
                     f"{median_and_range(times, 1e3)} ms a step", f"{flops / seconds / 1e9:.1f} GFLOP/s"]
            if limits.flops:
                parts.append(f"MFU {flops / seconds / limits.flops:.1%}")
            print(" | ".join(parts + gpu_peak(args, call)))
            if side.name != "ours":
                print(ratio_line(measured[0], times, side.name))


def bench_generate(args: argparse.Namespace) -> None:
    """Sampling by ours and by the peers. Weights of peers are in --dtype, ours in float32 under autocast."""
    sides = build_sides(args, [*args.weights, *args.vs])
    limits, config = measure_limits(args), shape_of_flags(args)
    dtype = getattr(torch, args.dtype)
    for side in sides:
        side.model.eval().to(torch.float32 if side.name.startswith("ours") else dtype)
    for T in args.frames:
        calls = [lambda side=side: side.generate(T) for side in sides]
        for call in calls:                        # the warm-up
            shape = tuple(call().shape)
            assert shape == (args.batch_size, config.K, T), f"codes {shape} of {T} frames"
        measured = in_turn(calls, args, warm_up=0)

        S, rows = config.layout(T).S - 1, args.batch_size * (1 + (args.cfg != 1))
        for side, call, times in zip(sides, calls, measured):
            seconds = statistics.median(times)
            step = seconds / S
            weight_size = {"ours bfloat16": 2, "ours int8": 1}.get(side.name, dtype.itemsize)
            kv_size = (getattr(side.model, "kv_dtype", None) or dtype).itemsize
            needed = step_bytes(config, rows, S, args.tokens, kv_size, weight_size)
            parts = [f"{side.name:<13} T {T}", f"{args.batch_size * T / seconds:.1f} frames/s",
                     f"{1 / step:.1f} steps/s", f"{median_and_range(times, 1e3 / S, '.2f')} ms a step",
                     f"{T / seconds / FRAME_RATE:.2f} x real time", f"{needed / step / 1e9:.1f} GB/s"]
            if limits.read:
                parts.append(f"{needed / step / limits.read:.1%} of reading")
            print(" | ".join(parts + gpu_peak(args, call)))
            if side is not sides[0]:
                print(ratio_line(measured[0], times, side.name, sides[0].name))


def two_updates(args: argparse.Namespace, name: str) -> None:
    """Updates of a new model. The second finds the optimizer's state there."""
    side, = build_sides(args, [name])
    update, codes = make_update(side, args), random_codes(args, args.frames[0])
    update(codes)
    update(codes)


def measure_memory(args: argparse.Namespace) -> None:
    """In a process of its own: prints the peak of updates in bytes, on a CPU without what importing took."""
    name, _, args.checkpointing = args.child.partition("+")
    keep_freed_memory(sparing=args.checkpointing)
    small = dict(dim=64, num_heads=1, num_layers=1, card=8, batch_size=1, frames=[args.K + 1])
    two_updates(argparse.Namespace(**vars(args) | small), name)  # imports what is imported on the way
    before = peak_bytes()
    two_updates(args, name)
    print(torch.cuda.max_memory_allocated() if on_gpu(args) else peak_bytes() - before)


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of updates, each side in a process of its own."""
    if args.child:
        measure_memory(args)
        return
    baseline = None
    for name in ["ours", "ours+checkpointing", *args.vs]:
        command = [sys.executable, "-m", "tools.bench", *args.argv, "--child", name]
        child = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if child.returncode:
            raise ValueError(child.stderr.strip().splitlines()[-1].removeprefix("tools.bench: "))
        peak = int(child.stdout.split()[-1])
        baseline = baseline or peak
        print(f"{name:<19} T {args.frames[0]} | peak {peak / 2 ** 20:.0f} MiB | {peak / baseline:.2f} x ours")


def write_random_cache(folder: str, args: argparse.Namespace, frames: int) -> None:
    """A token cache of 20 files of random codes, of `frames` each."""
    count, rng = 20, np.random.default_rng(0)
    codes = rng.integers(0, args.card, (count * frames, args.K), dtype=np.uint16)
    rows = []
    for i in range(count):
        name = f"{i}.wav"
        rows.append(CachedEntry(name, name, frames / FRAME_RATE, offset=i * frames, frames=frames).to_plain())
    write_array(shard_path(folder, 0, "npy"), codes)
    about = dict(entries=rows, K=args.K, dataset="none", codec="none", fingerprint="none")
    common.write_json(Path(folder, "cache.json"), about)


def bench_data(args: argparse.Namespace) -> None:
    """Updates on segments of a token cache, loading included, beside the same on random codes."""
    side, = build_sides(args, ["ours"])
    update, T = make_update(side, args), args.frames[0]
    codec = SimpleNamespace(name="none", K=args.K, card=args.card, channels=1, sample_rate=FRAME_RATE, hop=1,
                            fingerprint="none")
    warm_up, codes = 2, random_codes(args, T)
    with tempfile.TemporaryDirectory() as folder:
        write_random_cache(folder, args, frames=20 * T)
        source = data.CacheDataset(folder, codec, T / FRAME_RATE, 0, split="train", valid=0.05)
        batches = data.batches(source, 0, 0, warm_up + args.rounds, args.batch_size, workers=args.workers)

        def update_from_cache():
            update(data.collate(next(batches)).codes.to(args.device))

        random, cache = in_turn([lambda: update(codes), update_from_cache], args, warm_up)
    for name, times in (("random codes", random), ("token cache", cache)):
        speed = args.batch_size * T / statistics.median(times)
        print(f"{name:<13} T {T} | {speed:.1f} frames/s | {median_and_range(times, 1e3)} ms a step")
    ratios = [b / a for a, b in zip(random, cache)]
    print(f"    a step from the cache takes {median_and_range(ratios, form='.3f')} times as long, "
          f"{args.workers} workers")


def bench_codec(args: argparse.Namespace) -> None:
    """Encoding and decoding of noise: what live training pays for a batch, what making a cache can reach."""
    codec = tokenizer.load_codec(args.codec, device=args.device)
    for T in args.frames:
        wav = 0.1 * torch.randn(args.batch_size, codec.channels, T * codec.hop, device=args.device)
        codes, seconds = codec.encode(wav), args.batch_size * T / codec.frame_rate
        calls = {"encode": lambda: codec.encode(wav), "decode": lambda: codec.decode(codes)}
        for name, times in zip(calls, in_turn([*calls.values()], args, warm_up=1)):
            print(f"{name:<8} {args.codec}, {args.batch_size} clips of {T} frames = {seconds:.1f} s | "
                  f"{seconds / statistics.median(times):.1f} x real time | {median_and_range(times, 1e3)} ms")


def bench_patterns(args: argparse.Namespace) -> None:
    """Building, shifting to targets, reverting and realigning under each pattern."""
    codes = random_codes(args, args.frames[0])
    B, K, T = codes.shape
    for name in patterns.PATTERNS:
        pattern = patterns.make_pattern(name, T, K).to(args.device)
        seq = pattern.build(codes, args.card)                                         # [B, K, S]
        logits = torch.randn(B, K, pattern.S_valid, args.card, device=args.device)    # [B, K, S, card]
        calls = {"build": lambda: pattern.build(codes, args.card),
                 "targets": lambda: pattern.targets(codes),
                 "revert": lambda: pattern.revert(seq, -1),
                 "revert_logits": lambda: pattern.revert_logits(logits)}
        parts = [f"{name:<9} T {T}, S {pattern.S}"]
        for call, times in zip(calls, in_turn([*calls.values()], args)):
            parts.append(f"{call} {statistics.median(times) * 1e3:.3f} ms")
        print(" | ".join(parts))


def bench_scaling(args: argparse.Namespace) -> None:
    """A table: one thing at a time is changed.

    `growth` is the cost over the first row's, `linear` what a proportional cost would be."""
    base = vars(args) | dict(frames=args.frames[:1])
    cases = {"frames": [250, 500, 1000, 1500, 3000], "num_layers": [2, 4, 8, 16], "batch_size": [1, 2, 4, 8],
             "K": [1, 2, 4, 8], "pattern": list(patterns.PATTERNS)}
    print(f"{'changed':<12}{'to':>10}{'ms a step':>12}{'growth':>9}{'linear':>9}")
    for name, values in cases.items():
        first = None
        for value in values:
            changed = argparse.Namespace(**base | {name: [value] if name == "frames" else value})
            side, = build_sides(changed, ["ours"])
            update, codes = make_update(side, changed), random_codes(changed, changed.frames[0])
            step = statistics.median(in_turn([lambda: update(codes)], changed, warm_up=1)[0])
            first = first or (step, value)
            growth, proportional = step / first[0], "" if name == "pattern" else f"{value / first[1]:.2f}"
            print(f"{name:<12}{value:>10}{step * 1e3:>12.1f}{growth:>9.2f}{proportional:>9}", flush=True)


COMMANDS = {"train": bench_train, "generate": bench_generate, "memory": bench_memory, "data": bench_data,
            "codec": bench_codec, "patterns": bench_patterns, "scaling": bench_scaling}
READ_BY = {"cfg": "generate", "top_k": "generate", "weights": "generate", "optimizer": "train",
           "codec": "codec", "workers": "data", "limit": "train generate", "vs": "train generate memory",
           "checkpointing": "train data scaling", "compile": "train generate memory data scaling"}


# ------------------------------------------------------------------------------------------------------------
# the command line


def bench_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", usage="python -m tools.bench [COMMAND] [flags]", allow_abbrev=False,
        description="Speed and memory, beside other implementations and the machine's limits.")
    parser.add_argument("command", nargs="?", default="train", choices=COMMANDS,
                        help="what is measured (default train)")

    group = parser.add_argument_group("shape")
    group.add_argument("--size", choices=SIZES, help="named size (default: dim 512, 8 layers, 8 heads)")
    group.add_argument("--dim", type=int, help="width, in place of the size's")
    group.add_argument("--num_layers", type=int, help="layers, in place of the size's")
    group.add_argument("--num_heads", type=int, help="attention heads, in place of the size's")
    group.add_argument("--hidden_scale", type=int, default=4, help="feed-forward width over dim (default 4)")
    group.add_argument("--K", type=int, default=4, help="codebooks (default 4)")
    group.add_argument("--card", type=int, default=2048, help="codes in a codebook (default 2048)")
    group.add_argument("--pattern", choices=patterns.PATTERNS, default="delay", help="(default delay)")
    group.add_argument("--tokens", type=int, default=16, help="condition tokens (default 16)")
    group.add_argument("--frames", type=int, nargs="+",
                       help="length of a clip (default 500; generate 250 and 1500, memory 1500)")
    group.add_argument("--batch_size", type=int, help="samples (default 2; generate 1, memory 4)")

    group = parser.add_argument_group("work")
    group.add_argument("--cfg", type=float, default=3.0, help="guidance coefficient (default 3)")
    group.add_argument("--top_k", type=int, help="draw from the k likeliest codes (default 250 or all)")
    group.add_argument("--weights", nargs="+", choices=STORED_AS, default=["float32"],
                       help="generate: what our matrices are held as; several are measured in turn")
    group.add_argument("--codec", default="toy", help="toy, encodec_24khz or a path (default toy)")
    group.add_argument("--workers", type=int, default=1, help="processes that load data (default 1)")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile our layers (train) or our step (generate)")
    group.add_argument("--checkpointing", action="store_true", help="recompute our activations (train)")
    group.add_argument("--optimizer", nargs="+", default=["adamw"], choices=("adamw", "muon"),
                       help="of ours (train); the second is measured in turn with the first (default adamw)")

    group = parser.add_argument_group("measuring")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 or mps (default here {device})")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="(default bfloat16 on a GPU, else float32)")
    group.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's own choice)")
    group.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    group.add_argument("--vs", nargs="+", default=[], choices=INSTALL,
                       help="peers to measure in turn with ours")
    group.add_argument("--limit", action="store_true",
                       help="measure the machine's limits, and print fractions of them")
    group.add_argument("--child", help=argparse.SUPPRESS)        # whose memory this process measures
    return parser


def complete_flags(args: argparse.Namespace) -> None:
    """Fills in what was left out and checks the rest. Errors: ValueError."""
    # What depends on the command, the size and the device.
    args.frames = args.frames or DEFAULT_FRAMES.get(args.command, [500])
    if args.batch_size is None:
        args.batch_size = DEFAULT_BATCH.get(args.command, 2)
    for name, value in (SIZES[args.size] if args.size else DEFAULT_SHAPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device = common.check_device(args.device)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")

    # Numbers that must be positive, then those that depend on each other.
    ranges = {name: LIMITS[name] for name in ("dim", "num_layers", "num_heads", "hidden_scale", "K", "card")}
    ranges |= dict(tokens=(1, 65_536), batch_size=(1, 65_536), rounds=(1, 1_000_000), threads=(1, 512),
                   workers=(0, 512))
    for name, (low, high) in ranges.items():
        check_flag_number(name, getattr(args, name), low, high)
    check_flag_number("frames", max(args.frames), 1, 1_000_000)
    if min(args.frames) <= args.K:
        raise ValueError(f"--frames {min(args.frames)}: more than --K {args.K}, else nothing is predicted")
    if args.dim % (2 * args.num_heads):
        raise ValueError(f"--dim {args.dim}: an even multiple of --num_heads {args.num_heads}")
    parser = bench_parser()
    given = {name for name in READ_BY if getattr(args, name) != parser.get_default(name)}
    args.top_k = min(250, args.card) if args.top_k is None else args.top_k
    if not 0 < args.top_k <= args.card:
        raise ValueError(f"--top_k {args.top_k}: at least 1, at most --card {args.card}")

    # What must go together, and be installed.
    for name, commands in READ_BY.items():
        value = getattr(args, name)
        if name in given and args.command not in commands.split():
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            shown = f"--{name}" if value is True else f"--{name} {shown}"
            raise ValueError(f"{shown}: of {commands.replace(' ', ', ')}, not of {args.command}")
    if args.vs and args.pattern != "delay":
        raise ValueError(f"--pattern {args.pattern} with --vs: the peers are measured under delay")
    for name in args.vs:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--vs {name}: not installed here; {INSTALL[name]}")
    if args.compile:
        require_compiler()


@common.command("tools.bench", "--batch_size, --frames or --size")
def main(argv: list | None = None) -> None:
    """Measures what the command line asks for."""
    argv = sys.argv[1:] if argv is None else argv
    args = bench_parser().parse_args(argv)
    args.argv = argv                              # for processes that measure memory
    complete_flags(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory(sparing=args.checkpointing)
    where = torch.cuda.get_device_name(args.device) if on_gpu(args) else args.device
    print(f"{args.command}: dim {args.dim}, {args.num_layers} layers, {args.num_heads} heads, K {args.K}, "
          f"card {args.card}, batch {args.batch_size}, {args.pattern}, {args.dtype}, {where}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
