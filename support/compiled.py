"""One decoding step by torch.compile: `compile_step(model)`, after which generation is the same and faster.

On a CPU weights become constants, stored once more in the order in which products read them, so they must
stay as they are; with weights of fewer bits, keys and values are kept in bfloat16 as well. On a GPU the step
is a CUDA graph, which replays what was recorded: sizes and addresses must not change. Each kind has a cache
that suits it.

Legend: B batch, K codebooks, S steps, D width, H heads.
"""

import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Cache, ModelConfig, MusicGen


class GrowingCache(Cache):
    """For a CPU: the compiled step reads only what is filled, as many keys and values as there are steps.

    It learns their number from the size of a tensor: a plain number would become a constant of the step."""

    def __init__(self, config: ModelConfig, B: int, S_max: int, device, dtype=torch.float32):
        # A full cache is contiguous, and torch.compile would compile again for it: it never gets full.
        super().__init__(config, B, S_max + 1, device, dtype)
        self.filled = None                                       # [length+1], of which only the size is read

    def prepare_step(self) -> None:
        """Marks what changes its size from step to step."""
        self.filled = torch.empty(self.length + 1, dtype=torch.bool)
        torch._dynamo.mark_dynamic(self.filled, 0)
        for kv in self.kv:
            torch._dynamo.mark_dynamic(kv, 3)

    def end(self, S: int) -> int:
        """Steps that are filled, as a size that the compiler knows to change."""
        return super().end(S) if self.filled is None else self.filled.shape[0]


class FixedCache(Cache):
    """For a CUDA graph: attention reads all the room, behind a mask. Full room doubles, for another graph."""
    FIRST_ROOM = 256                                             # steps

    def __init__(self, config: ModelConfig, B: int, S_max: int, device, dtype=torch.float32):
        super().__init__(config, B, self.FIRST_ROOM, device, dtype)
        for kv in self.kv:
            kv.zero_()                                           # what is masked must be finite
        self.stepping = self.marked = False

    def make_room(self, S: int) -> None:
        """Doubles the room until S more steps fit."""
        before = room = self.kv[0].shape[3]
        while room < self.length + S:
            room *= 2
        if room > before:
            self.kv, self.marked = [F.pad(kv, (0, 0, 0, room - before)) for kv in self.kv], False

    def prepare_step(self) -> None:
        """Marks what stays where it is, for the graph to read it there; a copy at every step is the
        alternative."""
        self.make_room(1)
        self.stepping = True
        if not self.marked:
            self.marked = True
            for x in [*self.kv, *self.cross_kv]:
                if x is not None:
                    torch._dynamo.mark_static_address(x, guard=False)

    def append(self, layer: int, kv: Tensor) -> Tensor:
        """As `Cache.append`; a step is written in place, and all the room is read."""
        if self.stepping:
            return self.kv[layer].index_copy_(3, self.position, kv.to(self.kv[layer].dtype))
        self.make_room(kv.shape[3])
        return super().append(layer, kv)

    def mask(self) -> Tensor:
        """What the next step may look at, [B or 1,1,1,room] bool."""
        room = self.kv[0].shape[3]
        seen = (torch.arange(room, device=self.position.device) <= self.position)[None, None, None]
        if self.prefix_mask is None:
            return seen
        codes = room - self.prefix_mask.shape[1]
        return seen & F.pad(self.prefix_mask, (0, codes), value=True)[:, None, None]


def require_compiler() -> None:
    """Errors: ValueError where the C++ compiler that torch.compile calls is missing."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise ValueError("--compile needs a C++ compiler: neither g++ nor clang++ is here")


def compile_step(model: MusicGen, backend: str = "inductor") -> None:
    """Compiles a model's `step`, in place; torch.compile does so again for another number of rows.

    backend: of torch.compile; any other than its own serves tests. Errors: see `require_compiler`."""
    if backend == "inductor":
        require_compiler()
    on_gpu = model.emb[0].weight.is_cuda
    mode = "reduce-overhead" if on_gpu else None
    compiled = torch.compile(model.step, backend=backend, mode=mode, fullgraph=True)
    if backend == "inductor" and not on_gpu:
        from torch._inductor import config                       # takes a second or two
        options = dict(freezing=True, max_autotune_gemm=True, max_autotune_gemm_backends="CPP")
        compiled = config.patch(**options)(compiled)

    def step(codes: Tensor, cache: Cache, which: range | None = None) -> Tensor:
        cache.prepare_step()
        logits = compiled(codes, cache)      # of all codebooks, whichever are asked for: one thing to compile
        return logits if which is None else logits[:, which.start:which.stop]

    model.step, model.compiled = step, True
    model.cache_class = FixedCache if on_gpu else GrowingCache
    if not on_gpu and not isinstance(model.linears[0].weight, Tensor):     # of a few bits, as --weights says
        model.kv_dtype = torch.bfloat16          # the loops over them read half as much
