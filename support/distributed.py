"""Several processes as one: torchrun's process group, DDP and FSDP2, and weights that lie in shards.

    ddp     every rank holds the whole model; gradients are averaged                              (fits one device)
    fsdp    every rank holds 1/world of each tensor, and gathers a layer while it computes        (ZeRO, Rajbhandari et al. 2019)
            --zero 3 lets go of a gathered layer after its forward pass, --zero 2 keeps it until its backward pass is done

          rank 0        rank 1                      gathered for a layer's forward        gradients
    w   [rows 0..n/2] [rows n/2..n]    ─all-gather─►  [rows 0..n]   ─ backward ─►  reduce-scatter ─► [rows 0..n/2] [..]

Sharded tensors are DTensors. `full_tensor` makes one plain again and `shard_like` takes a rank's part, so that everything that is
written is plain tensors: files do not know how many ranks made them.
"""

import contextlib
import ctypes
import datetime
import os
import secrets
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class Ranks:
    """This process among all: torchrun's environment, or a single one."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *lines) -> None:
        """Prints on rank 0 only."""
        if self.is_main and lines:
            print(*lines, sep="\n", flush=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> list:
        """For each flag whether it is up on any rank: the same answer everywhere. On the host, so that no GPU is waited for."""
        return [bool(n) for n in self.sum(torch.tensor([int(f) for f in flags], dtype=torch.int64))]

    def gather(self, value) -> list:
        """The plain values of all ranks, in their order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Rank 0's value on every rank."""
        return self.gather(value)[0]

    def apply_to_gathered(self, mine: list, batch_size: int, change) -> list:
        """`change` done to the list of all ranks, in the order in which one process would have it; this rank's part of the result."""
        share, parts = batch_size // self.world_size, self.gather(mine)
        blocks = range(0, len(mine), share)                          # a batch is made of one block of each rank
        every = change([x for i in blocks for part in parts for x in part[i:i + share]])
        return [x for i in blocks for x in every[i * self.world_size + self.rank * share:][:share]]


def keep_freed_memory(sparing: bool = False) -> None:
    """Tells glibc to keep what tensors leave behind, up to a gigabyte, for the next: memory that went back to the system is cleared before
    it comes again, which takes 3 to 8 % of an update on a CPU. Another C library, and the variables MALLOC_*, are left alone.

    sparing: large blocks go back at once all the same, for what fits between kept ones leaves gaps: with checkpointing, on a CPU, an
    update then takes a fifth longer and two fifths less memory."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version") and not any(name.startswith("MALLOC_") for name in os.environ):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                  # of malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)                      # bytes
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 23 if sparing else 1 << 25)                  # bytes; glibc itself goes up to 2^25


def join_process_group(device: str, timeout_minutes: float) -> Ranks:
    """Joins the process group that torchrun announced: NCCL between GPUs, gloo between hosts' memory.

    timeout_minutes: a rank that is waited for longer, at the start or in a collective, ends the job."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: rank {device.index} of this machine has no GPU, it has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(rendezvous(store, rank, world, timeout.total_seconds()), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timeout)
    return Ranks(rank, world, device)


def rendezvous(store: dist.Store, rank: int, world: int, seconds: float) -> str:
    """Waits for all ranks of this start -> a name that no earlier start had, the same on every rank.

    torchrun serves one store through all its restarts, in which the addresses of dead ranks still stand (torch 2.11,
    pytorch issue 135712): a rank that reads one before the live rank has written its own is refused, or waits to be
    called until the time-out. So everything is written below a new name. TORCHELASTIC_RESTART_COUNT is none: each
    machine counts its own failures only. Errors: DistStoreError naming the ranks that did not come."""
    token, deadline, missing = secrets.token_hex(8), time.monotonic() + seconds, [*range(1, world)]
    if rank == 0:
        store.set("leader", token)                                   # until this is written, others see a leader that is dead
    while time.monotonic() < deadline:
        if rank == 0:
            if not (missing := [r for r in missing if not store.check([f"{token}/{r}"])]):
                store.set(f"{token}/members", b" ".join(store.get(f"{token}/{r}") for r in range(1, world)))
                return token
        elif store.check(["leader"]):
            leader = store.get("leader").decode()
            store.set(f"{leader}/{rank}", token)
            if store.check([f"{leader}/members"]) and token in store.get(f"{leader}/members").decode().split():
                return leader                                        # it knows this very process: it is alive
        time.sleep(0.02)                                             # not within the store, where a signal would have to wait
    who = f"rank {', '.join(map(str, missing))}" if rank == 0 else "another rank"
    raise dist.DistStoreError(f"{who} did not come within {seconds:g} s")


def exit_process(code: int) -> None:
    """Ends this process at once. Taking a gloo group down in the interpreter hangs now and then (torch 2.11: the last
    reference to it waits, holding the interpreter's lock, for a thread that wants that lock)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# models of several ranks


def shard_model(model: nn.Module, ranks: Ranks, dtype: torch.dtype, zero: int, cpu_offload: bool) -> None:
    """Shards a MusicGen over the ranks in place, a group of tensors a layer: what is gathered and let go of together.

    Layers are gathered in `dtype`; the rest (embeddings, heads, text encoder) in float32. Gradients always meet in
    float32. The activations between layers keep their own type: autocast rules them, as without sharding."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if cpu_offload else OffloadPolicy()
    common = dict(mesh=mesh, reshard_after_forward=zero == 3, offload_policy=offload)
    low = None if dtype == torch.float32 else dtype
    for layer in model.transformer.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False), **common)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False), **common)


def wrap_ddp(model: nn.Module, ranks: Ranks, parallel: str) -> nn.Module:
    """What training calls: DDP around a model that every rank holds; the model itself where it is sharded or alone."""
    if ranks.world_size == 1 or parallel == "fsdp":
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)     # they are the same by themselves


@contextlib.contextmanager
def gradient_sync(wrapped: nn.Module, last: bool):
    """A micro-batch: gradients meet in the last of an update only."""
    if hasattr(wrapped, "set_requires_gradient_sync"):               # FSDP2
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_is_last_backward(last)
        yield
    elif last or not hasattr(wrapped, "no_sync"):
        yield
    else:
        with wrapped.no_sync():
            yield


# ---------------------------------------------------------------------------------------------------------------------
# tensors of several ranks


def named_tensors(model: nn.Module) -> dict:
    """{name: tensor}: the weights, and the statistics that no gradient moves. All that a model has to remember."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def local_parts(tensors) -> list:
    """The rank's own parts of tensors, as plain tensors that share their memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def full_tensor(x: Tensor) -> Tensor:
    """A tensor in full, detached. All ranks must call it together; where nothing is sharded it is the tensor itself."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full_tensor`: a plain tensor laid out as `like` is, of its type and on its device."""
    full = full.to(device=like.device, dtype=like.dtype)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)    # every rank read the same file


def detached_copy(x: Tensor) -> Tensor:
    """A detached copy that stays: on the host, or a shard where it lies."""
    return x.detach().clone() if isinstance(x, DTensor) or x.device.type == "cpu" else x.detach().cpu()


def gather_state(state: dict, keep: bool = True) -> dict:
    """{name: tensor} in full on the host. Every rank calls it; those that do not `keep` get an empty dict."""
    full = {}
    for name, x in state.items():
        x = full_tensor(x)
        if keep:
            full[name] = x.cpu()
    return full


@torch.no_grad()
def load_tensors(targets: dict, full: dict) -> None:
    """Copies plain tensors into {name: tensor}, sharded or not. Errors: RuntimeError names what is missing or odd."""
    if odd := sorted(targets.keys() ^ full.keys()):
        raise RuntimeError(f"the weights do not fit the model: {odd[0]} is {'missing' if odd[0] in targets else 'not known'} "
                         f"({len(odd)} such)")
    for name, x in targets.items():
        if x.shape != full[name].shape:
            raise RuntimeError(f"the weights do not fit the model: {name} is {list(full[name].shape)}, not {list(x.shape)}")
        x.copy_(shard_like(full[name], x))


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone or does not answer. gloo reports it as a plain RuntimeError."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout"))
