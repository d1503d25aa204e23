"""Several processes that train one model: torchrun's process group, DDP, FSDP2, tensors that lie in shards.

    ddp     every rank holds the whole model; gradients are averaged. For a model that fits one device.
    fsdp    every rank holds 1 / world size of each tensor and gathers a layer while it computes (ZeRO,
            Rajbhandari et al. 2019). --zero 3 frees a gathered layer after its forward pass, --zero 2 after
            its backward pass.

                 weights                     a layer's, on both                          gradients
    rank 0    [rows 0..n/2] ─┐                                                       ┌─► [rows 0..n/2]
                             ├─ all-gather ─► [rows 0..n] ─ backward ─ reduce-scatter┤
    rank 1    [rows n/2..n] ─┘                                                       └─► [rows n/2..n]

Sharded tensors are DTensors. `full_tensor` makes one plain again, and `shard_like` takes a rank's part of
a plain one. Files hold plain tensors only: they do not know how many ranks wrote them.
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

from support.common import describe_error, is_out_of_memory, out_of_memory_text, tell

# what may end a run that is no fault of the code, see `error_text`
ENDINGS = (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError)


@dataclass
class Ranks:
    """The processes of this training, seen from one of them: torchrun's, or a single one."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def print(self, *lines) -> None:
        """Prints lines on rank 0 only."""
        if self.is_main and lines:
            tell(*lines)

    def sum(self, x: Tensor) -> Tensor:
        """Sums a tensor over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> list:
        """Whether each flag is true on any rank: the same list everywhere. Summed without a GPU's help."""
        counts = self.sum(torch.tensor([int(flag) for flag in flags], dtype=torch.int64))
        return [bool(n) for n in counts]

    def gather(self, value) -> list:
        """The values of all ranks, in rank order, on every rank. A value is anything that pickles."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Rank 0's value on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def apply_to_gathered(self, mine: list, batch_size: int, change) -> list:
        """Applies `change` to the list of all ranks, in a single process's order -> this rank's part of it.

        A batch is a block of each rank, in rank order; `mine` is this rank's blocks, end to end."""
        block = batch_size // self.world_size
        starts = range(0, len(mine), block)
        parts = self.gather(mine)
        everything = []
        for start in starts:
            for part in parts:
                everything += part[start:start + block]
        changed = change(everything)
        result = []
        for start in starts:
            first = start * self.world_size + self.rank * block
            result += changed[first:first + block]
        return result


# ------------------------------------------------------------------------------------------------------------
# the beginning and the end of a process


def join_process_group(device: str, timeout_minutes: float) -> Ranks:
    """Joins the process group that torchrun announced: NCCL between GPUs, gloo between hosts' memory.

    timeout_minutes: a rank that is waited for longer, at the start or in a collective, ends the job.
    Errors: ValueError where a rank has no GPU, DistStoreError where a rank does not come."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: rank {device.index} of this machine has no GPU, "
                             f"it has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(rendezvous(store, rank, world_size, timeout.total_seconds()), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(rank, world_size, device)


def rendezvous(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Waits until all ranks of this start are there -> a name that no earlier start had, the same everywhere.

    torchrun keeps one store through all its restarts, and the addresses of dead ranks stay in it (torch 2.11,
    pytorch issue 135712). A rank that reads one before the live rank has written its own is refused, or waits
    for a call until the time-out. So this start writes everything below a new name.
    TORCHELASTIC_RESTART_COUNT cannot be that name: each machine counts its own failures only.
    Errors: DistStoreError naming the ranks that did not come."""
    token, deadline = secrets.token_hex(8), time.monotonic() + seconds
    missing = [*range(1, world_size)]
    if rank == 0:
        store.set("leader", token)  # until then the others see the leader of a start that died
    while time.monotonic() < deadline:
        if rank == 0:
            missing = [r for r in missing if not store.check([f"{token}/{r}"])]
            if not missing:
                members = [store.get(f"{token}/{r}") for r in range(1, world_size)]
                store.set(f"{token}/members", b" ".join(members))
                return token
        elif store.check(["leader"]):
            leader = store.get("leader").decode()
            store.set(f"{leader}/{rank}", token)
            members = f"{leader}/members"
            if store.check([members]) and token in store.get(members).decode().split():
                return leader  # it names this very process, so it is alive
        time.sleep(0.02)  # not in a waiting call of the store, which would hold up signals
    who = f"rank {', '.join(map(str, missing))}" if rank == 0 else "another rank"
    raise dist.DistStoreError(f"{who} did not come within {seconds:g} s")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone or does not answer: gloo's is a plain RuntimeError."""
    words = ("gloo", "NCCL", "Connection", "Timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def error_text(error: Exception) -> str | None:
    """One line on what ended a run; None for what is no mistake of the user or of the machine, but ours."""
    if is_out_of_memory(error):
        return (f"{out_of_memory_text(error)}: lower --micro_batch_size, --segment_seconds or --size, give "
                "--checkpointing or --parallel fsdp")
    if not isinstance(error, RuntimeError):
        return str(error)
    problem, way_out = describe_error(error), "the same command goes on from the last checkpoint"
    if is_lost_peer(error):
        return f"lost the other ranks ({problem}); {way_out}"
    if "DataLoader worker" in str(error):
        return f"a process that loads data died ({problem}); {way_out}"
    return None


def exit_process(code: int) -> None:
    """Ends this process at once, without the interpreter's clean-up.

    Destroying a gloo group there hangs now and then (torch 2.11): what drops the last reference to it holds
    the interpreter's lock, and waits for a thread that wants this lock."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_freed_memory(sparing: bool = False) -> None:
    """Tells glibc to keep up to a gigabyte of freed memory for the next tensors.

    The system clears what it is given back before it lends it again: 3 to 8 % of an update on a CPU.
    Other C libraries, and a process with variables MALLOC_*, are left alone.

    sparing: large blocks go back at once all the same, because what fits between kept ones leaves gaps.
        With checkpointing, on a CPU, an update then takes a fifth longer and two fifths less memory."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version") and not any(name.startswith("MALLOC_") for name in os.environ):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                      # of glibc's malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)                          # bytes
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 23 if sparing else 1 << 25)  # bytes; glibc itself goes up to 2^25


# ------------------------------------------------------------------------------------------------------------
# models of several ranks


def shard_model(model: nn.Module, ranks: Ranks, dtype: torch.dtype, zero: int, cpu_offload: bool) -> None:
    """Shards a MusicGen over the ranks, in place. A layer is one group: gathered together and freed together.

    Layers are gathered in `dtype`, the rest (embeddings, heads, conditioners) in float32. Gradients are
    averaged in float32. Autocast decides the type of activations between layers, as without sharding."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if cpu_offload else OffloadPolicy()
    common = dict(mesh=mesh, reshard_after_forward=zero == 3, offload_policy=offload)
    param_dtype = None if dtype == torch.float32 else dtype
    low = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    for layer in model.transformer.layers:
        fully_shard(layer, mp_policy=low, **common)
    fully_shard(model, mp_policy=full, **common)


def wrap_ddp(model: nn.Module, ranks: Ranks, parallel: str) -> nn.Module:
    """The module that training calls: DDP around the model; the model itself where it is sharded or alone."""
    if ranks.world_size == 1 or parallel == "fsdp":
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Buffers need no broadcast: every rank computes the same ones.
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def gradient_sync(wrapped: nn.Module, last: bool):
    """Around the passes of one micro-batch: gradients are reduced over ranks in the last one of an update."""
    if hasattr(wrapped, "set_requires_gradient_sync"):    # FSDP2
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_is_last_backward(last)
        yield
    elif last or not hasattr(wrapped, "no_sync"):         # DDP's last, or a single process
        yield
    else:
        with wrapped.no_sync():
            yield


# ------------------------------------------------------------------------------------------------------------
# tensors of several ranks


def named_tensors(model: nn.Module) -> dict:
    """{name: tensor} of all parameters and buffers: everything that a model has to remember."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def local_parts(tensors) -> list:
    """This rank's parts of tensors, as plain tensors that share their memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor in full, any other as it is; detached. All ranks must call it together."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """The inverse of `full_tensor`: a plain tensor laid out as `like` is, in its type and on its device."""
    full = full.to(device=like.device, dtype=like.dtype)
    if not isinstance(like, DTensor):
        return full
    # src_data_rank None: every rank has read the same file, so none sends its tensor to the others.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def detached_copy(x: Tensor) -> Tensor:
    """A detached copy on the host; of a sharded tensor where the shard lies."""
    return x.detach().clone() if isinstance(x, DTensor) or x.device.type == "cpu" else x.detach().cpu()


def gather_state(state: dict, keep: bool = True) -> dict:
    """{name: tensor} in full on the host. All ranks call it; those that do not `keep` get an empty dict."""
    gathered = {}
    for name, x in state.items():
        x = full_tensor(x)
        if keep:
            gathered[name] = x.cpu()
    return gathered


@torch.no_grad()
def load_tensors(targets: dict, full: dict) -> None:
    """Copies plain tensors {name: tensor} into `targets`, sharded or not.

    Errors: RuntimeError naming a tensor that is missing, unknown or of another shape."""
    if odd := sorted(targets.keys() ^ full.keys()):
        what = "missing" if odd[0] in targets else "not known"
        raise RuntimeError(f"the weights do not fit the model: {odd[0]} is {what} ({len(odd)} such)")
    for name, x in targets.items():
        if x.shape != full[name].shape:
            shapes = f"{list(full[name].shape)}, not {list(x.shape)}"
            raise RuntimeError(f"the weights do not fit the model: {name} is {shapes}")
        x.copy_(shard_like(full[name], x))
