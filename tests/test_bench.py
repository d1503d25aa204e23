"""The benchmark: its counts against the model itself, whose turn it is, that every command runs."""

import importlib.util
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, MusicGen
from support import kernels
from tools import bench, peers

SHAPE = "--dim 32 --num_layers 2 --num_heads 2 --card 16 --frames 12 --tokens 3"
SMALL = [*SHAPE.split(), "--rounds", "2", "--device", "cpu"]


def parsed(*argv):
    args = bench.bench_parser().parse_args([*argv])
    bench.complete_flags(args)
    return args


def test_weights_in_turn(capsys):
    """Each as often as the others, the first beside the rest; a weight of int8 is a byte."""
    assert bench.main(["generate", *SMALL, "--weights", "int8", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["ours int8", "ours"]
    assert lines[3].startswith("    ours int8 is ") and lines[3].endswith("times as fast as ours, 2 pairs")
    config = ModelConfig(dim=32, num_layers=1, num_heads=2)
    four, one = (bench.step_bytes(config, 2, 9, 5, 4, size) for size in (4, 1))
    assert four - one == 3 * (14 * 32 * 32 + 4 * 2048 * 32)


def test_the_defaults_are_the_reference_shape():
    args = parsed("--device", "cpu")
    assert (args.command, args.dtype) == ("train", "float32")
    assert (args.dim, args.num_layers, args.num_heads) == (512, 8, 8)
    assert (args.K, args.card, args.frames, args.batch_size, args.tokens) == (4, 2048, [500], 2, 16)
    args = parsed("generate", "--size", "tiny", "--num_heads", "6", "--device", "cpu")
    assert (args.dim, args.num_layers, args.num_heads) == (192, 4, 6)
    assert (args.frames, args.batch_size, args.cfg, args.top_k) == ([250, 1500], 1, 3, 250)


@pytest.mark.parametrize("command, says", [
    ("train", r"ours +T 12 \| [\d.]+ frames/s \| [\d.]+ \([\d.]+ to [\d.]+\) ms a step \| [\d.]+ GFLOP/s"),
    ("generate", r"ours +T 12 \| [\d.]+ frames/s \| [\d.]+ steps/s \| .* ms a step \| "
                 r"[\d.]+ x real time \| [\d.]+ GB/s"),
    ("codec", r"encode +toy, 2 clips of 12 frames = 0.5 s \| [\d.]+ x real time"),
    ("data", r"token cache +T 12 \| [\d.]+ frames/s"),
    ("patterns", r"unrolled +T 12, S 49 \| build [\d.]+ ms \| targets [\d.]+ ms \| revert [\d.]+ ms \| "
                 r"revert_logits [\d.]+ ms"),
])
def test_commands(command, says, capsys):
    more = {"generate": ["--top_k", "5"], "data": ["--workers", "0"]}.get(command, [])
    assert bench.main([command, *SMALL, *more]) == 0
    assert re.search(says, capsys.readouterr().out)


def test_two_optimizers_are_measured_in_turn(capsys):
    assert bench.main(["train", *SMALL, "--optimizer", "adamw", "muon"]) == 0
    wanted = r"ours, muon +T 12 .*\n +ours is [\d.]+ \(.*\) times as fast as ours, muon, 2 pairs"
    assert re.search(wanted, capsys.readouterr().out)


def test_limits_are_fractions_of_what_was_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_limits", lambda args: bench.MachineLimits(flops=1e15, read=1e15))
    for command, says in (("train", "MFU 0.0%"), ("generate", "0.0% of reading")):
        assert bench.main([command, *SMALL, "--limit"]) == 0
        assert says in capsys.readouterr().out


def test_scaling(capsys, monkeypatch):
    def seconds(calls, args, warm_up):
        return [[args.frames[0] * args.batch_size * args.K]]

    monkeypatch.setattr(bench, "in_turn", seconds)
    assert bench.main(["scaling", *SMALL]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert ["frames", "3000", f"{3000 * 2 * 4 * 1e3:.1f}", "12.00", "12.00"] in rows
    assert ["K", "8", "192000.0", "8.00", "8.00"] in rows
    assert [row[1] for row in rows if row[0] == "pattern"] == ["delay", "parallel", "unrolled"]


def test_memory_is_of_a_process_of_its_own(capsys, monkeypatch):
    """Recomputing 8 layers of 600 steps holds less. What this process holds does not count.

    Nor does what the C library would keep of so little."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    ballast = torch.ones(2 ** 26)                                    # 256 MiB
    shape = "--dim 64 --num_layers 8 --num_heads 2 --card 16 --frames 600 --device cpu"
    assert bench.main(["memory", *shape.split()]) == 0
    ours, less = (int(x) for x in re.findall(r"peak (\d+) MiB", capsys.readouterr().out))
    kept = 8 * 4 * 600 * 64 * 4 / 2 ** 20                            # one [B,S,D] a layer
    assert 10 * kept < ours < 40 * kept and less < 0.5 * ours and ballast[0] == 1


@pytest.fixture
def fake(monkeypatch):
    """A peer that is there: a linear model, which writes down when it is used."""
    used = []

    def build(config, B, L, device, cfg, top_k):
        layer = torch.nn.Linear(1, 1)

        def loss(codes):
            used.append("loss")
            return layer(torch.ones(1, 1)).sum()

        def generate(T):
            used.append("generate")
            return torch.zeros(B, config.K, T)

        return peers.Peer("transformers", layer, loss, generate)

    monkeypatch.setitem(bench.PEERS, "transformers", build)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return used


@pytest.mark.parametrize("command, what", [("train", "loss"), ("generate", "generate")])
def test_a_peer_is_measured_as_often_as_ours(command, what, fake, capsys):
    assert bench.main([command, *SMALL, "--vs", "transformers"]) == 0
    assert fake == [what] * (2 + 2 if command == "train" else 1 + 2)
    wanted = r"ours is [\d.]+ \([\d.]+ to [\d.]+\) times as fast as transformers, 2 pairs"
    assert re.search(wanted, capsys.readouterr().out)


def test_in_turn():
    seen = []
    times = bench.in_turn([lambda: seen.append("a"), lambda: seen.append("b")], parsed(*SMALL), warm_up=1)
    assert seen == ["a", "b"] * 3 and [len(each) for each in times] == [2, 2]


def test_the_ratio_is_of_pairs():
    line = bench.ratio_line([1, 10, 2], [2, 15, 6], "x").strip()
    assert line == "ours is 2.00 (1.50 to 3.00) times as fast as x, 3 pairs"


def test_a_missing_peer_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main([*SMALL, "--vs", "audiocraft"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.bench: --vs audiocraft: not installed")
    assert peers.INSTALL["audiocraft"] in error and error.count("\n") == 1


@pytest.mark.parametrize("argv, says", [
    (["--rounds", "0"], "--rounds 0"),
    (["--frames", "3"], "--frames 3"),
    (["--dim", "30", "--num_heads", "4"], "--dim 30"),
    (["--top_k", "3000"], "--top_k 3000"),
    (["--vs", "audiocraft", "--pattern", "parallel"], "--pattern parallel"),
    (["--device", "tpu"], "tpu"),
    (["train", "--weights", "int8"], "--weights int8: of generate, not of train"),
    (["generate", "--optimizer", "muon"], "--optimizer muon: of train, not of generate"),
    (["data", "--limit"], "--limit: of train, generate, not of data"),
    (["codec", "--workers", "2"], "--workers 2: of data, not of codec"),
    (["codec", "--codec", "missing.pt"], "missing.pt"),
])
def test_bad_input(argv, says, capsys):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_flops_of_an_update_are_those_of_its_matrix_products(monkeypatch):
    """PyTorch's own count of its products; attention, which it does not count on a CPU, comes on top."""
    monkeypatch.setattr(kernels, "HAS_ONEDNN", False)  # nor does it count oneDNN's
    args = parsed(*SMALL)
    side, = bench.build_sides(args, ["ours"])
    with FlopCounterMode(display=False) as counter:
        side.loss(bench.random_codes(args, 12)).backward()
    S, L, D = 12, 3, 32
    attention = 3 * 2 * 2 * (4 * S * S * D + 4 * S * L * D)  # forward and twice backward, B, layers
    source = 2 * 2 * 4 * D * D * L  # nothing flows back into the condition: one product less
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert bench.update_flops(bench.shape_of_flags(args), 2, 12, L) == counted + attention + source


def test_bytes_of_a_step():
    """Every matrix but the tables and the keys and values of cross-attention; the cache as it is half way."""
    config = ModelConfig(dim=32, num_layers=2, num_heads=2, card=16)
    matrices = {name: p for name, p in MusicGen(config).named_parameters() if p.dim() == 2}
    weights = sum(p.numel() for name, p in matrices.items() if not name.startswith("emb"))
    mean_length, condition = sum(range(1, 10)) / 9, 5
    cache = 2 * 3 * 2 * 32 * (mean_length + condition)  # layers, rows, keys and values, D
    assert bench.step_bytes(config, 3, 9, 5, 4, 4) == 4 * (weights - 2 * 2 * 32 * 32 + cache)


@pytest.mark.parametrize("name", ["transformers", "audiocraft"])
def test_peers_are_of_the_same_size(name):
    """Where they are installed: as many parameters, a loss near ours, codes of the right shape."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: {peers.INSTALL[name]}")
    args = parsed(*SMALL)
    ours, theirs = bench.build_sides(args, ["ours", name])
    model = theirs.model.decoder if name == "transformers" else theirs.model
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.model.parameters())
    codes = bench.random_codes(args, 12)
    assert abs(theirs.loss(codes).item() - ours.loss(codes).item()) < 0.5
    theirs.model.eval()
    assert theirs.generate(12).shape == (2, 4, 12)
