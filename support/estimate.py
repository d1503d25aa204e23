"""What a run would take, from shapes alone: memory by what for, and time. Nothing is allocated.

    python train.py --dry_run                                    for this machine
    python train.py --dry_run --plan_gpus 8 --plan_tflops 990    for eight GPUs of that peak

Legend: B batch of a rank, S sequence steps, D width.
"""

import argparse
import os
import time
from dataclasses import dataclass

import torch

from model import ModelConfig, count_parameters, forward_flops
from support.kernels import LOGITS_AT_ONCE, linear

UTILIZATION = 0.5                     # of the peak that an update is assumed to reach
TEXT_TOKENS = 16                      # of a caption


@dataclass
class Plan:
    """What a run would take: parameters, GiB a rank by what for, FLOPs an update and rank, seconds in all."""
    parameters: int
    memory: dict
    flops: float
    seconds: float


def plan_run(args: argparse.Namespace, config: ModelConfig, T: int, world: int, speed: float) -> Plan:
    """The plan of a run of segments of T frames on `world` ranks, each of `speed` peak FLOP/s."""
    N = count_parameters(config)
    added = count_parameters(config, args.lora) if args.lora else 0
    learned = added or N              # frozen matrices need no gradient, optimizer or average
    # AdamW keeps two numbers a weight, Muon one of the layers' matrices.
    squares = 4 + 4 * config.cross_attention + 2 * config.hidden_scale       # of the width, in a layer
    once = config.num_layers * squares * config.dim ** 2 if args.optimizer == "muon" else 0
    states = 8 * learned - 4 * once
    S = config.layout(T).S_valid - 1
    B = min(args.micro_batch_size, max(1, args.batch_size // world))
    number = 4 if args.dtype == "float32" else 2                     # bytes of an activation
    sharded = args.parallel == "fsdp" and world > 1
    ranks = world if sharded else 1                              # that share weights, gradients and optimizer

    # Activations: about 16 D numbers a layer and step are kept for backward, 24 D with cross-attention.
    per_layer = (24 if config.cross_attention else 16) * config.dim
    kept = config.num_layers * per_layer
    if args.checkpointing:                                    # the input of each layer, and one layer in full
        kept = config.num_layers * config.dim + per_layer
    # The heads keep a few logits at a time, and their gradients in float32 until backward.
    head_gradients = 0 if added else 4 * config.K * config.card * config.dim

    # Sharded: layers are gathered two at a time (ZeRO-3) or all (ZeRO-2). Whole: autocast keeps casts of the
    # weights.
    gathered = casts = 0
    if sharded:
        gathered = number * N * (1 if args.zero == 2 else 2 / config.num_layers)
    elif number < 4:
        casts = number * N / (config.num_layers if added and args.checkpointing else 1)

    # Gradients are shards only if one micro-batch is an update: else they add up in full until the last one.
    gradient_ranks = ranks if B * world >= args.batch_size else 1
    memory = dict(
        weights=4 * (N + added) / ranks,
        gradients=4 * learned / gradient_ranks,
        optimizer=states / ranks,
        EMA=4 * (learned + sharded * (N + added)) / ranks,  # sharded: the best weights stay on the device too
        gathered=gathered, casts=casts,
        activations=B * S * kept * number + 3 * 4 * LOGITS_AT_ONCE + head_gradients)

    passes = (2 if added else 3) + args.checkpointing         # forward, backward to inputs, to weights, again
    flops = passes * forward_flops(config, S, TEXT_TOKENS) * args.batch_size / world
    seconds = flops / (UTILIZATION * speed) * args.epochs * args.updates_per_epoch
    return Plan(N, {k: v / 2**30 for k, v in memory.items() if v}, flops, seconds)


def estimate_lines(args: argparse.Namespace, config: ModelConfig, T: int, world: int) -> list:
    """Lines on memory and time of this run; with --plan_gpus of the same run on so many GPUs."""
    if args.plan_gpus:
        cases = [(gpus, args.plan_tflops * 1e12) for gpus in args.plan_gpus]
    else:
        cases = [(world, machine_flops(args))]
    lines = []
    for world, speed in cases:
        p = plan_run(args, config, T, world, speed)
        if not lines:
            low_rank = ""
            if args.lora:
                millions = count_parameters(config, args.lora) / 1e6
                low_rank = f", {millions:.2f}M more are trained (rank {args.lora})"
            lines.append(f"model: {p.parameters / 1e6:.1f}M parameters without text encoder{low_rank}; "
                         f"a clip is {T} frames = {config.layout(T).S_valid} steps ({args.pattern})")
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in p.memory.items())
        lines.append(f"memory a rank ({world} in all), about: {parts} = {sum(p.memory.values()):.2f} GiB")
        if not args.plan_gpus and not args.dry_run:
            check_memory(args, sum(p.memory.values()))
        lines.append(f"time, about: {p.flops / 1e9:.0f} GFLOP an update and rank at half of "
                     f"{speed / 1e9:.0f} GFLOP/s = {duration_text(p.seconds)} for {args.epochs} epochs of "
                     f"{args.updates_per_epoch} updates, besides encoding audio and evaluation")
    return lines


def check_memory(args: argparse.Namespace, gib: float) -> None:
    """Errors: ValueError where a run would take twice the memory that the machine has, by the estimate."""
    device = torch.device(args.device)
    if device.type == "cuda" and not args.cpu_offload:
        there = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    else:
        return                                                       # it cannot be asked here
    if gib > 2 * there:
        raise ValueError(f"a rank would take about {gib:,.0f} GiB of memory, {args.device} has {there:,.0f}: "
                         "lower --micro_batch_size, --segment_seconds or --size")


def machine_flops(args: argparse.Namespace) -> float:
    """Measured speed of a matrix product of 1,024 in the training precision, FLOP/s."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    a, times = torch.randn(1024, 1024, device=device, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        linear(a, a)[0, 0].item()     # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times)


def duration_text(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
