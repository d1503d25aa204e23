"""What runs on a GPU, without one: no tensor on the wrong device, no needless wait, no wrong type.

Nothing is computed: see fake_gpu.py. Every wait of the host for the GPU is listed here with its reason; a new
one fails. How long a GPU takes, and whether its kernels round as a CPU's do, only a GPU can tell.
"""

import copy
from collections import Counter
from unittest import mock

import pytest
import torch

import data
import patterns
import tokenizer
import train
from evaluate import stages
from fake_gpu import DEVICE, fake_gpu
from generate import MusicGenerator, Sampling
from model import ModelConfig, MusicGen
from support import kernels
from support.compiled import FixedCache, compile_step
from support.distributed import Ranks, shard_model
from support.sets import open_sets

bf16 = torch.bfloat16
CODEC = tokenizer.load_codec("toy")            # files are read before there is a GPU
READ, TO, FROM = "reads a number", "copies to the GPU", "copies from the GPU"

# an update, from the second on: the first also copies the pattern to the GPU, once a length
UPDATE = {("train.py update", READ): "the norm decides on the host whether to step; it is logged as well"}
VALID = {
    ("evaluate/stages.py <genexpr>", FROM): "the set is encoded once and kept on the host",
    ("evaluate/stages.py <genexpr>", TO): "a batch of it for the loss, once an epoch",
    ("support/log.py loss_metrics", READ): "the result",
}
GENERATION = {                                 # once a window; a decoding step has none
    ("support/per_sample.py __init__", TO): "the keys of the noise, once a batch",
    ("generate.py guidance_coefficient", TO): "double guidance, once a window",
    ("patterns.py _moved", TO): "the pattern, once a length",
    ("model.py hidden", READ): "does the mask of cross-attention hide anything? If not, no step needs it",
    ("generate.py generate_codes", READ): "every code was generated",
    ("generate.py codes", TO): "the audio to continue",
    ("support/style.py from_user", TO): "the audio to read a style from",
    ("tokenizer.py", READ): "codes are in range, before the decoder sees them",
    ("tokenizer.py", TO): "a zero that the encodec package begins its sum with",
    ("generate.py decode", FROM): "the result",
}


def make_run(*flags, dtype="bfloat16"):
    """A training run as train.py builds it, its model on the GPU that is not there. Inside `fake_gpu`."""
    flags = ["--size", "64x1x2", "--batch_size", "2", "--valid_samples", "2", "--device", "cpu", *flags]
    args = train.build_parser().parse_args(flags)
    train.fill_flags(args, 1)
    train.check_flags(args, 1)
    args.device, args.dtype = "cuda", dtype
    ranks, codec = Ranks(0, 1, DEVICE), CODEC
    sets = open_sets(args, "toy", codec, ranks)
    return train.build_run(args, ranks, codec, sets, None, None)


def updates(run, gpu, count: int = 2) -> None:
    """So many updates; of the last one `gpu` tells."""
    batches = data.batches(run.train_set, 0, 0, count, run.args.batch_size)
    run.wrapped.train()
    for _ in range(count):
        gpu.waits.clear()
        train.update(run, train.micro_batches(run, next(batches)))


def unexpected(waits, allowed: dict) -> dict:
    """Waits that are not listed: by file and function, or by file."""
    return {(place, why): times for (place, why), times in waits.items()
            if not {(place, why), (place.split()[0], why)} & allowed.keys()}


def on_gpu(run) -> bool:
    """Whether all that an update moves is on the GPU."""
    state = [x for each in run.optimizer.state.values() for x in each.values()]
    models = [x for m in (run.model, run.ema.model) for x in (*m.parameters(), *m.buffers())]
    return all(x.device == DEVICE for x in (*models, *state, run.sums))


@pytest.fixture(scope="module")
def gpu():
    """One for all tests of this file: each clears what it looks at."""
    with fake_gpu() as gpu:
        CODEC.to(DEVICE)
        yield gpu


@pytest.fixture(scope="module")
def everything(gpu):
    """A run with all conditions, after two updates, and what the second one waited for."""
    run = make_run("--conditions", "text", "melody", "style", "--dropout", "0.1")
    updates(run, gpu)
    return run, dict(gpu.waits)


def test_an_update_waits_once(everything):
    run, waits = everything
    assert waits == {("train.py update", READ): 1} and waits.keys() == UPDATE.keys()
    assert on_gpu(run)


def test_muon_waits_once_too(gpu):
    run = make_run("--optimizer", "muon")
    updates(run, gpu)
    assert dict(gpu.waits) == {("train.py update", READ): 1}
    assert on_gpu(run) and any("momentum" in state for state in run.optimizer.state.values())


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_products_of_an_update_are_of_the_type_asked_for(gpu, dtype):
    """Forward and backward. Without text: its encoder keeps to float32. Under float16 a scaler joins in."""
    run = make_run("--no_text", "--micro_batch_size", "1", dtype=dtype)
    gpu.products.clear(), gpu.attention.clear(), gpu.doubles.clear()
    updates(run, gpu)
    wanted = getattr(torch, dtype)
    found = {(place, kind) for place, kind in gpu.products if not place.startswith("tokenizer.py")}
    assert found and {kind for _, kind in found} == {wanted}, found
    assert {tuple(kinds) for _, *kinds in gpu.attention} == {(wanted,) * 3}
    assert gpu.doubles <= ({"train.py update"} if dtype == "float16" else set())     # GradScaler's 1 / scale
    assert on_gpu(run) and not unexpected(gpu.waits, UPDATE)


def test_validation_is_on_the_gpu(everything, gpu):
    run, _ = everything
    gpu.waits.clear(), gpu.products.clear()
    assert stages.valid_stage(run)["ce"] == 1                # what the GPU that is not there always says
    assert not unexpected(gpu.waits, VALID)
    assert ("support/kernels.py linear", bf16) in gpu.products


WAV = 0.1 * torch.randn(1, CODEC.sample_rate, generator=torch.Generator().manual_seed(0))
FEW = 5                                                      # frames


@pytest.mark.parametrize("given, options, compiled", [
    ({}, dict(cfg=1.0), False),
    ({}, dict(top_p=0.9), False),
    ({"melody": WAV}, {}, False),
    ({"style": WAV}, dict(cfg_style=2.0), False),
    ({}, dict(prompt=True), False),
    ({}, {}, True),
    ({"melody": WAV}, dict(prompt=True), True),
], ids=("without guidance", "text", "melody", "style", "continuation", "compiled", "compiled, all at once"))
def test_a_decoding_step_waits_for_nothing(everything, gpu, given, options, compiled, monkeypatch):
    """What torch.compile is given runs as it is here: with the cache of a CUDA graph, whose room must not
    move within a step, and doubles once."""
    run, _ = everything
    monkeypatch.setattr(FixedCache, "FIRST_ROOM", 34)
    model, seen, options = copy.deepcopy(run.ema.model), [], dict(options)
    if compiled:
        with mock.patch("torch.compile", lambda function, **_: function):
            compile_step(model, backend="none")
        assert model.cache_class is FixedCache
    prompt = WAV[:, :2 * CODEC.hop] if options.pop("prompt", False) else None
    music = MusicGenerator(model, run.codec, run.train_set.segment_frames, Sampling(**options), bf16)

    def note(done, total):
        seen.append((Counter(gpu.waits), Counter(gpu.products)))

    gpu.waits.clear(), gpu.attention.clear(), gpu.doubles.clear()
    values, seconds = music.condition_values(["slow organ"], **given), FEW / CODEC.frame_rate
    codes = music.codes(values, seconds, prompt=prompt, progress=note)
    wav = music.decode(codes, seconds, prompt)
    assert codes.shape == (1, 4, FEW) and codes.dtype == torch.long and codes.device == DEVICE
    assert wav.shape == (1, 1, FEW * CODEC.hop)
    assert not unexpected(gpu.waits, GENERATION)

    (before, products), (after, more) = seen[1], seen[-1]    # seen[0] may be a prompt; the first step waits
    assert after - before == Counter()
    assert {kind for _, kind in more - products} == {bf16}
    assert gpu.attention["support/kernels.py attention", bf16, bf16, bf16] > len(seen) and not gpu.doubles


@pytest.mark.parametrize("name, delays, flattening", [
    ("delay", None, None), ("delay", (0, 0, 2, 5), None), ("parallel", None, None), ("unrolled", None, None),
    ("unrolled", None, (0, 1, 1, 1)), ("unrolled", (0, 0, 1, 3), (0, 0, 1, 2)),
])
def test_codebooks_that_are_open_together_are_neighbors(name, delays, flattening):
    """A step then writes to a range of them. A list of numbers would be copied to the GPU at every step."""
    for T in (1, 2, 5):
        pattern = patterns.make_pattern(name, T, 4, delays, flattening)
        for prompt in range(T):
            for row in (pattern.frame >= prompt).T.tolist():
                assert "0" not in "".join(str(int(x)) for x in row).strip("0")


# what the tests above must see


def read_a_number(logits, *_):
    logits.max().item()


def branch(logits, *_):
    if (logits > 0).all():
        logits.add_(1)


def copy_to_the_host(logits, *_):
    logits.cpu()


def index_by_a_list(logits, *_):
    logits[:, [0]]


def make_a_tensor(logits, *_):
    torch.tensor([1.0, 2.0], device=logits.device)


@pytest.mark.parametrize("mistake", (read_a_number, branch, copy_to_the_host, index_by_a_list, make_a_tensor))
def test_a_wait_is_seen(gpu, mistake):
    gpu.waits.clear()
    mistake(torch.zeros(2, 3, device=DEVICE))
    assert sum(gpu.waits.values()) == 1


@pytest.mark.parametrize("mistake, says", [
    (lambda x: x + torch.zeros(2, 3), "different devices"),
    (lambda x: x @ torch.zeros(3, 2), "different devices|not on the expected device"),
    (lambda x: x[x > 0], "mask"),
    (lambda x: x.__setitem__(x > 0, x[0]), "mask"),
    (lambda x: x.nonzero(), "size depends on data"),
    (lambda x: x.unique(), "size depends on data"),
    (lambda x: x.to(bf16) @ x.T, "a product of"),
    (lambda x: kernels.attention(x[None, None], x[None, None], torch.zeros(1, 1, 2, 3), None, False), "from"),
], ids=("sum of two devices", "product of two devices", "mask", "write by mask", "nonzero", "unique",
        "product of two types", "attention to the host"))
def test_a_mistake_is_refused(gpu, mistake, says):
    with torch.no_grad(), pytest.raises((AssertionError, RuntimeError), match=says):
        mistake(torch.zeros(2, 3, device=DEVICE))


def test_what_each_of_eight_gpus_holds(monkeypatch):
    """FSDP's plan: an eighth of every tensor, a group for each layer and one for the rest. The passes need
    streams of a real GPU."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name in ("device_count", "current_device", "set_device", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, {"device_count": lambda: 8}.get(name, lambda *_: 0))
    model = MusicGen(ModelConfig(dim=64, num_layers=2, num_heads=2, card=30))
    whole = {name: p.shape for name, p in model.named_parameters()}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        with fake_gpu():
            model.to(DEVICE)
            shard_model(model, Ranks(0, 8, DEVICE), bf16, zero=3, cpu_offload=False)
            for name, p in model.named_parameters():
                assert p.shape == whole[name] and p.placements == (Shard(0),), name
                part = p.to_local()
                assert part.shape == (-(-whole[name][0] // 8), *whole[name][1:]), name
                assert part.device == DEVICE and part.dtype == torch.float32, name
        groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert groups == ["", "transformer.layers.0", "transformer.layers.1"]
    finally:
        dist.destroy_process_group()
