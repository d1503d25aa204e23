"""A GPU that is not there: for tests of what code does on one. Nothing is computed there.

Tensors "on cuda" are PyTorch's fake tensors: a shape, a type and a device. Tensors of the host are real, so
that what prepares a batch works as ever. What a GPU would refuse is refused: tensors of two devices in one
operation, products of two types. What it would obey and be slow is written down in `waits`, with the place
in our code: every wait of the host for the GPU.

    with fake_gpu() as gpu:
        model = MusicGen(config).to("cuda")
        model(torch.zeros(2, 4, 50, dtype=torch.long, device="cuda"))
    assert not gpu.waits

Of PyTorch two things need help where there is no GPU. Autocast asks the driver whether there is one. And the
autograd engine asks it for its streams, so `walk_backward` calls the nodes of the graph instead.
"""

import functools
import heapq
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent.parent
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)                     # batched ones are parts of attention
attention = torch.nn.functional.scaled_dot_product_attention
READS = (aten._local_scalar_dense.default, aten.equal.default)       # answer with a number
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
GROWS = torch.Tag.dynamic_output_shape                               # as large as the data say


def is_on_gpu(x) -> bool:
    """Whether it is a tensor of the GPU that is not there, or the name of one."""
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


@functools.cache
def name_in_repository(path: str) -> str | None:
    """A product file's name; None for any other."""
    path = Path(path)
    inside = path.is_relative_to(HERE) and path.parent.name != "tests" and "site-packages" not in path.parts
    return str(path.relative_to(HERE)) if inside else None


def place() -> str:
    """Where our code is now, as "file.py function"."""
    frame = sys._getframe(1)
    while frame is not None:
        if name := name_in_repository(frame.f_code.co_filename):
            return f"{name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"


class FakeGpu(TorchDispatchMode):
    """What happens on it, in {(place, ..): times}: `waits` of the host and why, `products` of matrices and
    their type, `attention` and the types of q, k, v; `doubles` are the places that compute in float64."""

    def __init__(self):
        super().__init__()
        self.waits, self.products, self.attention, self.doubles = Counter(), Counter(), Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(map(is_on_gpu, leaves)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)

        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        # In inference mode operations of several parts arrive whole.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func in READS:
            self.waits[place(), "reads a number"] += 1
            with unset_fake_temporarily():
                return torch.ones((), dtype=args[0].dtype).item()
        if func in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise AssertionError(f"{place()}: {func} by a mask: the host must wait for its count")
            if is_on_gpu(args[0]) and not all(map(is_on_gpu, indices)):
                self.waits[place(), "copies an index to the GPU"] += 1
        elif GROWS in func.tags:
            raise AssertionError(f"{place()}: {func}: the size depends on data, which the host must wait for")
        if func in (aten._to_copy.default, aten.copy_.default):
            result = self.copy(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                self.doubles.add(place())
        if func in PRODUCTS:
            kinds = {x.dtype for x in leaves if isinstance(x, torch.Tensor)}
            assert len(kinds) == 1, f"{place()}: a product of {kinds}"
            self.products[place(), result.dtype] += 1
        return result

    def attend(self, q, k, v, attn_mask=None, **options):
        """Attention. PyTorch takes its parts here, in float32, where a GPU has a kernel for the whole."""
        if is_on_gpu(q):
            assert q.device == k.device == v.device, f"{place()}: attention from {q.device} to {k.device}"
            assert attn_mask is None or attn_mask.device == q.device, f"{place()}: mask on {attn_mask.device}"
            kinds = q.dtype, k.dtype, v.dtype
            assert len({*kinds}) == 1 or torch.is_autocast_enabled("cuda"), f"{place()}: attention of {kinds}"
            self.attention[place(), *kinds] += 1
            if not torch.is_grad_enabled():
                return torch.empty_like(q)
        return attention(q, k, v, attn_mask, **options)

    def copy(self, func, args, kwargs):
        """A copy, maybe between host and GPU. The host waits, unless it is one to the GPU that need not be
        waited for. What comes from the GPU is all ones: any code, any flag, a finite number."""
        source = args[0] if func is aten._to_copy.default else args[1]
        from_gpu = is_on_gpu(source)
        to_gpu = is_on_gpu(args[0] if func is aten.copy_.default else kwargs.get("device", args[0].device))
        if source.numel() and from_gpu != to_gpu:
            non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
            if from_gpu:
                self.waits[place(), "copies from the GPU"] += 1
            elif not non_blocking:
                self.waits[place(), "copies to the GPU"] += 1
        if from_gpu and not to_gpu:
            with unset_fake_temporarily():
                if func is aten.copy_.default:
                    return args[0].fill_(1)
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)


@contextmanager
def fake_gpu():
    """While it lasts there is a GPU to PyTorch's tensors: a FakeGpu, which says what happened on it."""
    gpu = FakeGpu()
    patches = {"torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
               "torch.cuda.is_bf16_supported": lambda *_: True,
               "torch.autograd._engine_run_backward": walk_backward,
               "torch.nn.functional.scaled_dot_product_attention": gpu.attend}
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        yield gpu


def walk_backward(tensors, gradients, *_args, **_kwargs) -> None:
    """What the autograd engine does with one device: each node after all that feed it, the latest first."""
    roots = [(tensor.grad_fn, tensor.output_nr, gradient) for tensor, gradient in zip(tensors, gradients)]
    waiting, seen, stack = Counter(), set(), [node for node, _, _ in roots]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [n for n, _ in node.next_functions if n is not None]
            waiting.update(following)
            stack += following

    sums, ready = defaultdict(dict), []

    def push(node) -> None:
        heapq.heappush(ready, (-node._sequence_nr(), id(node), node))

    for node, number, gradient in roots:
        sums[node][number] = gradient
        push(node)
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[2]
            given, results = sums.pop(node, {}), (None,) * len(node.next_functions)
            if given:
                call = node if callable(node) else node.apply        # apply: of torch.autograd.Function
                results = call(*[given.get(i) for i in range(len(node._input_metadata))])
            results = results if isinstance(results, tuple) else (results,)
            for (following, number), gradient in zip(node.next_functions, results):    # numbers come last
                if following is None:
                    continue
                if gradient is not None:
                    # broadcast in the forward pass, or cast
                    of = following._input_metadata[number]
                    gradient = gradient.sum_to_size(of.shape).to(of.dtype)
                    assert gradient.device == of.device, f"{place()}: a gradient on {gradient.device}"
                    before = sums[following].get(number)
                    sums[following][number] = gradient if before is None else before + gradient
                waiting[following] -= 1
                if not waiting[following]:
                    push(following)
