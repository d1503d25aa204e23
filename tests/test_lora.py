"""Low-rank fine-tuning: nothing changes at the start, nor by merging; only the additions are trained."""

import os
import subprocess
import sys

import pytest
import torch

from interop import convert
from support import flags, resume
import generate
from model import SIZES, Attention, Cache, Conditions, ModelConfig, MusicGen, count_parameters
from support.estimate import plan_run
from support.lora import add_lora, merge_lora
import train
from train import Ema
from test_train import HERE, SMALL, lines, part, run, saved

CONFIG = ModelConfig(K=3, card=11, **SIZES["debug"])


def models() -> tuple[MusicGen, MusicGen]:
    """A model, and the same with additions that are no longer zero."""
    torch.manual_seed(0)
    plain, added = MusicGen(CONFIG).eval(), MusicGen(CONFIG).eval()
    added.load_state_dict(plain.state_dict())
    add_lora(added, 2)
    for name, p in added.named_parameters():
        if name.endswith("_lora.B"):
            torch.nn.init.normal_(p, std=0.1)
    return plain, added


def inputs() -> tuple[torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    seq = torch.randint(12, (2, 3, 7), generator=generator)
    return seq, Conditions(cross=torch.randn(2, 5, CONFIG.dim, generator=generator))


def matrices_of_layers(weights: dict) -> set:
    return {name for name, x in weights.items() if name.startswith("transformer") and x.dim() == 2}


def test_additions_are_nothing_at_the_start():
    plain, added = models()
    seq, conditions = inputs()
    assert not torch.allclose(added.logits(seq, conditions), plain.logits(seq, conditions), atol=0.01)
    for name, p in added.named_parameters():
        if name.endswith("_lora.B"):
            p.data.zero_()
    assert torch.equal(added.logits(seq, conditions), plain.logits(seq, conditions))


def test_merged_weights_compute_the_same():
    plain, added = models()
    seq, conditions = inputs()
    wanted = added.logits(seq, conditions)
    merged = merge_lora(added.state_dict())
    before = plain.state_dict()
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in before.items()}
    changed = {name for name, x in before.items() if not torch.equal(x, merged[name])}
    assert changed == matrices_of_layers(before)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.logits(seq, conditions), wanted, atol=1e-5, rtol=0)
    cache = Cache(CONFIG, 2, 7, "cpu")
    first = added.heads(added.hidden(seq[..., :1], conditions, cache))
    found = torch.cat([first] + [added.decode_step(seq[..., s:s + 1], cache) for s in range(1, 7)], 2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_only_the_additions_are_trained():
    _, added = models()
    seq, conditions = inputs()
    added.logits(seq, conditions).square().sum().backward()
    trained = {name for name, p in added.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in added.named_parameters() if "_lora." in name} != set()
    matrices = sum(isinstance(m, Attention) for m in added.modules()) * 2 + 2 * CONFIG.num_layers
    assert len(trained) == 2 * matrices
    numbers = sum(p.numel() for name, p in added.named_parameters() if "_lora." in name)
    assert count_parameters(CONFIG, 2) == numbers
    D, R = CONFIG.dim, 2  # both attentions: q|k|v and out; feed-forward: up and down
    assert count_parameters(CONFIG, R) == CONFIG.num_layers * R * (2 * (4 * D + 2 * D) + 2 * 5 * D)


def test_the_average_holds_frozen_weights_once():
    _, added = models()
    ema = Ema(added, 0.5)
    for (name, mine), theirs in zip(ema.model.named_parameters(), added.parameters()):
        assert (mine.data_ptr() == theirs.data_ptr()) == ("_lora." not in name)
    before = {name: x.clone() for name, x in ema.model.state_dict().items()}
    for p in added.parameters():
        if p.requires_grad:
            p.data += 1
    ema.update(added)
    for name, x in ema.model.state_dict().items():
        assert torch.allclose(x, before[name] + ("_lora." in name))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "start"
    assert run(out) == 0
    return out


def tuned(out, start, *more) -> int:
    return run(out, "--init_from", str(start), "--lora", "2", "--ema_every", "1", *more)


def test_a_run_tunes_resumes_and_exports(start, tmp_path, monkeypatch):
    """Best weights are of a plain model, which starts another run and is exported; resuming is exact."""
    assert tuned(tmp_path / "whole", start) == 0
    first, best = (torch.load(d / "best.pt", weights_only=True) for d in (start, tmp_path / "whole"))
    changed = {name for name, x in first["model"].items() if not torch.equal(x, best["model"][name])}
    assert changed == matrices_of_layers(first["model"])
    state = saved(tmp_path / "whole")
    added = {name for name in part(state, "model") if "_lora." in name}
    optimized = {name.split("/")[1] for name in part(state, "optimizer")}
    assert set(part(state, "ema")) == set(part(state, "best")) == optimized == added != set()
    save_checkpoint, seen = resume.save_checkpoint, []

    def save_and_die(run):
        save_checkpoint(run)
        seen.append(run.step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "killed", start, "--save_minutes", "0")
    monkeypatch.setattr(resume, "save_checkpoint", save_checkpoint)
    assert tuned(tmp_path / "killed", start, "--save_minutes", "0") == 0
    again = saved(tmp_path / "killed")
    assert all(torch.equal(x, again["tensors"][name]) for name, x in state["tensors"].items())
    asked = ["--run", str(tmp_path / "whole"), "--prompt", "fast bells", "--seconds", "0.5"]
    assert generate.main([*asked, "--out", str(tmp_path / "wav")]) == 0
    assert convert.main([str(tmp_path / "whole")]) == 0
    assert run(tmp_path / "next", "--init_from", str(tmp_path / "whole"), "--epochs", "1") == 0
    assert train.main(["--only", "valid", "--out", str(tmp_path / "whole")]) == 0


def test_two_ranks_and_shards_tune_as_one(start, tmp_path):
    assert tuned(tmp_path / "one", start, "--epochs", "1") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    tuning = ["--init_from", str(start), "--lora", "2", "--ema_every", "1", "--epochs", "1"]
    command = [*torchrun, "--master_port=0", str(HERE / "train.py"), *SMALL, *tuning, "--parallel", "fsdp",
               "--out", str(tmp_path / "two")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=one_thread)
    assert done.returncode == 0, done.stderr
    best = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("one", "two")]
    one, two = (state["model"] for state in best)
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, atol=5e-5, rtol=0)  # Adam steps even where all is rounding
    assert lines(tmp_path / "one")[0]["ce"] == pytest.approx(lines(tmp_path / "two")[0]["ce"], abs=1e-6)


def test_less_memory_is_estimated(start, tmp_path, capsys):
    assert tuned(tmp_path / "plan", start, "--dry_run") == 0
    assert "0.01M more are trained (rank 2)" in capsys.readouterr().out
    args = flags.build_parser().parse_args(["--init_from", str(start), "--optimizer", "adamw"])
    flags.fill_flags(args, 1)
    full = plan_run(args, CONFIG, 100, 1, 1e12)
    args.lora = 2
    low, added = plan_run(args, CONFIG, 100, 1, 1e12), count_parameters(CONFIG, 2)
    assert low.memory["weights"] * 2**30 == 4 * (count_parameters(CONFIG) + added)
    assert low.memory["optimizer"] * 2**30 == 8 * added and low.memory["EMA"] * 2**30 == 4 * added
    heads = 4 * CONFIG.K * CONFIG.card * CONFIG.dim / 2**30  # whose gradients wait for the backward pass
    assert low.memory["activations"] == pytest.approx(full.memory["activations"] - heads)
    assert low.flops == full.flops * 2 / 3


@pytest.mark.parametrize("given, says", [
    (["--lora", "0"], "--lora 0: at least 1"),
    (["--lora", "4"], "give them by --init_from"),
])
def test_bad_flags(given, says, tmp_path, capsys):
    assert run(tmp_path / "new", *given) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "new").exists()
