"""Weights in fewer bits: how near their products are, rows that no other row changes, and the commands."""

import copy
from pathlib import Path

import pytest
import torch

import generate
import train
from evaluate import metrics
from generate import Sampling, generate_codes
from model import Cache, Conditions
from support import kernels, quantize
from support.compiled import compile_step
from support.lora import add_lora
from support.per_sample import Noise
from support.quantize import Bfloat16Matrix, FbgemmMatrix, Int8Matrix, quantize_rows, store_weights
from test_per_sample import EXACT, asked_for
from three_conditions import tiny

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
KINDS = [(Bfloat16Matrix, 0.005), (Int8Matrix, 0.012), pytest.param(
    FbgemmMatrix, 0.02, marks=pytest.mark.skipif(not HAS_FBGEMM, reason="FBGEMM is of x86 processors"))]


def matrix(out: int = 96, fan_in: int = 64) -> torch.Tensor:
    """A weight whose rows differ much in size; one is zero."""
    weight = torch.randn(out, fan_in, generator=torch.Generator().manual_seed(0))
    return weight * torch.logspace(-3, 3, out)[:, None] * (torch.arange(out) != 5)[:, None]


@pytest.mark.parametrize("kind, error", KINDS)
def test_products_are_near(kind, error):
    """Of each row of the weight and of x, whatever their sizes; rows of zeros stay zeros."""
    weight, x = matrix(), torch.randn(3, 2, 64) * torch.logspace(-4, 4, 3)[:, None, None]
    x[1, 1] = 0
    wanted, found = x @ weight.T, kind(weight).product(x)
    assert found.shape == wanted.shape and found.dtype == x.dtype
    assert not found[1, 1].any() and not found[..., 5].any()
    assert not torch.equal(found, wanted)
    for i, j in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        by_size = wanted[i, j] / weight.norm(dim=1).clamp_min(1e-9)
        assert ((found - wanted)[i, j] / weight.norm(dim=1).clamp_min(1e-9)).norm() < error * by_size.norm()


@pytest.mark.parametrize("rows", (2, 5))
@pytest.mark.parametrize("slow", (True, False))
def test_many_rows_of_bfloat16_on_a_cpu_that_is_slow_in_it(rows, slow, monkeypatch):
    """By products of float32, which round nothing of x; few rows stay bfloat16."""
    monkeypatch.setattr(kernels, "SLOW_BFLOAT16", slow)
    x = torch.randn(rows, 64)
    found, rounded = Bfloat16Matrix(matrix()).product(x), matrix().bfloat16()
    by_float = torch.nn.functional.linear(x, rounded.float())
    by_bfloat = torch.nn.functional.linear(x.bfloat16(), rounded).float()
    assert torch.equal(found, by_float if rows == 5 and slow else by_bfloat)
    assert not torch.equal(by_float, by_bfloat) and found.dtype == x.dtype


def test_quantized_rows_keep_half_a_step():
    weight = matrix()
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and q.abs().amax(1).tolist() == [0 if i == 5 else 127 for i in range(96)]
    assert ((q * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize("kind, error", KINDS)
def test_a_cut_matrix_gives_its_parts(kind, error):
    weight, x = matrix(), torch.randn(2, 64)
    whole, cut = kind(weight), kind(weight, (32,))
    assert len(whole) == len(cut) == 96
    assert torch.equal(cut[:32].product(x), whole.product(x)[:, :32])
    assert torch.equal(cut[32:].product(x), whole.product(x)[:, 32:])


@pytest.mark.skipif(not HAS_FBGEMM, reason="FBGEMM is of x86 processors")
def test_a_row_has_the_same_bits_beside_any_others():
    packed, x = FbgemmMatrix(matrix()), torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    whole = packed.product(x)
    for rows in (slice(7, 8), slice(3, 5), slice(0, 9), slice(20, 40)):
        assert torch.equal(packed.product(x[rows]), whole[rows])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.skipif(not EXACT, reason="products round otherwise here")
def test_a_sample_alone_and_in_a_batch(weights):
    model = store_weights(tiny(), weights)

    def draw(numbers) -> torch.Tensor:
        noise = Noise(4, numbers)
        return generate_codes(model, asked_for(numbers), 12, Sampling(cfg=3, top_k=5), noise=noise)

    whole = draw(range(7))
    for batch in ([5], [3, 0], [6, 5, 3]):
        assert torch.equal(draw(batch), whole[batch]), batch


@pytest.mark.parametrize("weights, error", [("bfloat16", 0.02), ("int8", 0.04)])
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_of_fewer_bits_says_nearly_the_same(weights, error, lora):
    """With text, melody and style, and with a fine-tuning's additions, which stay as they are."""
    plain = tiny()
    if lora:
        add_lora(plain, 2)
        for name, x in plain.named_parameters():
            if name.endswith("_lora.B"):
                torch.nn.init.normal_(x, std=0.1)
    small = store_weights(copy.deepcopy(plain), weights)
    left, kept = ({name for name, x in model.named_parameters() if x.dim() == 2} for model in (small, plain))
    assert kept - left == {name for name in kept if "_lora." not in name and (
        name.startswith(("transformer.layers.", "linears.")))}
    seq, c = torch.randint(13, (2, 3, 9)), Conditions(cross=torch.randn(2, 5, 32))
    with torch.no_grad():
        wanted, found = plain.logits(seq, c), small.logits(seq, c)
    assert 0 < (found - wanted).norm() < error * wanted.norm()


def test_compiled_int8_is_the_same():
    """Traced as torch.compile traces it; the C++ compiler itself is tested with float32."""
    plain, fast = store_weights(tiny(), "int8"), store_weights(tiny(), "int8")
    compile_step(fast, backend="aot_eager")
    assert plain.kv_dtype is None and fast.kv_dtype is torch.bfloat16
    plain.kv_dtype = torch.bfloat16
    sampling = Sampling(cfg=3, temperature=0)
    wanted, found = (generate_codes(m, asked_for(range(2)), 30, sampling) for m in (plain, fast))
    assert (found == wanted).float().mean() > 0.9, "sums in another order may round elsewhere"


def test_keys_and_values_in_bfloat16():
    """A cache holds them as it is told, and what is read of it has the type of the activations."""
    codes, logits = torch.randint(13, (2, 3, 9), generator=torch.Generator().manual_seed(0)), {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny().eval()
            cache = Cache(model.config, 2, 9, "cpu", dtype)
            model.hidden(codes[..., :4], None, cache)
            steps = [model.decode_step(codes[..., s:s + 1], cache) for s in range(4, 9)]
            assert {kv.dtype for kv in cache.kv} == {dtype} and cache.length == 9
            logits[dtype] = torch.cat(steps, 2)
    wanted, found = logits[torch.float32], logits[torch.bfloat16]
    assert found.dtype == wanted.dtype and 0 < (found - wanted).norm() < 0.01 * wanted.norm()


def test_which_kind_where():
    assert quantize.matrix_class("int8", torch.device("cuda")) is Int8Matrix
    assert quantize.matrix_class("bfloat16", torch.device("cpu")) is Bfloat16Matrix


def test_the_commands(tmp_path, capsys):
    """The record says which; a word that is none, and training in fewer bits, are refused."""
    run = str(Path(__file__).parent / "old_run")
    for weights in ("float32", "int8"):
        argv = f"--run {run} --prompt slow --seconds 0.2 --weights {weights} --out {tmp_path / weights}"
        assert not generate.main(argv.split())
    assert '"weights": "int8"' in (tmp_path / "int8" / "000.json").read_text()
    capsys.readouterr()
    assert train.main(["--weights", "int8"]) == 2
    assert "--weights int8: a model is trained in float32" in capsys.readouterr().err
    for main in (generate.main, metrics.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--run", run, "--weights", "int4"])
        assert stopped.value.code == 2 and "int4" in capsys.readouterr().err
    assert metrics.main(["--weights", "int8", "--codec", "toy"]) == 2
    assert "--weights: of which model?" in capsys.readouterr().err
    numbers = {}
    for weights in ("float32", "int8"):
        assert train.main(["--only", "valid", "--out", run, "--weights", weights]) == 0
        numbers[weights] = float(capsys.readouterr().out.split("valid ce ")[1].split()[0])
    assert numbers["int8"] != numbers["float32"]
    assert abs(numbers["int8"] - numbers["float32"]) < 0.01 * numbers["float32"]
