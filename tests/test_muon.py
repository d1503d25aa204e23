"""Muon: its steps beside plain references, which weights it moves, what it keeps, what contradicts it."""

import pytest
import torch

from model import SIZES, ModelConfig, MusicGen, count_parameters, decay_groups
from support import muon
from support.estimate import plan_run
from support.flags import build_parser, fill_flags
from test_train import part, run, saved

CONFIG = ModelConfig(K=2, card=11, **SIZES["debug"])
D, HEADS = CONFIG.dim, CONFIG.num_heads


def model_and_optimizer(config=CONFIG, lr=0.01):
    """A model, Muon for all its weights, and gradients."""
    torch.manual_seed(0)
    model = MusicGen(config)
    optimizer = muon.Muon(muon.muon_groups(decay_groups(model, 0.1), model, 2.0), lr, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    set_gradients(model)
    return model, optimizer


def set_gradients(model, value=None):
    for p in model.parameters():
        p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


def newton_schulz(x):
    """One matrix [d,D] as the paper writes it."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_blocks_become_nearly_orthonormal():
    blocks = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0))
    blocks[3, 8:] = blocks[3, :8]                                    # of rank 8
    found = muon.orthogonalize(blocks)
    for x, y in zip(blocks, found):
        torch.testing.assert_close(y, newton_schulz(x).float(), atol=1e-4, rtol=0)
    values = torch.linalg.svdvals(found[[0, 1, 2, 4]])
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.equal(muon.orthogonalize(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_a_step_of_each_matrix():
    """Two updates beside loops: a head's queries, keys and values for themselves, its output by columns, the
    feed-forward in slices of the stream."""
    model, optimizer = model_and_optimizer()
    layer = model.transformer.layers[1]
    d, names = D // HEADS, ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    matrices = [layer.cross_attention.in_proj_weight, layer.self_attn.out_proj.weight,
                layer.linear1.weight, layer.linear2.weight]
    weights = [p.detach().double() for p in matrices]
    momenta = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        set_gradients(model)
        for i, (name, p) in enumerate(zip(names, matrices)):
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad
            look_ahead = 0.95 * momenta[i] + 0.05 * p.grad
            x = look_ahead if name in ("in_proj_weight", "linear2.weight") else look_ahead.T
            width = x.shape[1]
            y = torch.cat([newton_schulz(x[j:j + d]) for j in range(0, len(x), d)])
            y = y if x is look_ahead else y.T
            weights[i] = weights[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * width ** 0.5 * y
        optimizer.step()
    for w, p in zip(weights, matrices):
        torch.testing.assert_close(p.detach().double(), w, atol=2e-5, rtol=0)


def test_with_one_head_it_is_torchs():
    """torch.optim.Muon rounds to bfloat16 inside."""
    model, optimizer = model_and_optimizer(ModelConfig(K=2, card=11, dim=32, num_layers=1, num_heads=1))
    ours = model.transformer.layers[0].self_attn.out_proj.weight
    theirs = torch.nn.Parameter(ours.detach().clone())
    reference = torch.optim.Muon([theirs], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for _ in range(3):
        set_gradients(model)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def test_matrices_of_layers_and_nothing_else():
    model, optimizer = model_and_optimizer()
    optimizer.step()
    by_muon = {name for name, p in model.named_parameters() if "momentum" in optimizer.state[p]}
    layers = {name for name, p in model.named_parameters() if name.startswith("transformer") and p.dim() == 2}
    assert by_muon == layers and len(layers) == 6 * CONFIG.num_layers
    rest = [optimizer.state[p] for name, p in model.named_parameters() if name not in by_muon]
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in rest)


def test_the_others_move_as_under_adamw():
    model, optimizer = model_and_optimizer()
    other, _ = model_and_optimizer()
    adamw = torch.optim.AdamW(decay_groups(other, 0.1), 0.01, (0.9, 0.95), fused=True)
    for p, q in zip(model.parameters(), other.parameters()):
        q.grad = p.grad.clone()
    optimizer.step()
    adamw.step()
    moved = {name: torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), other.parameters())}
    assert all(same == ("momentum" not in optimizer.state[p])
               for same, p in zip(moved.values(), model.parameters()))


def test_the_estimate_is_what_it_keeps():
    """A number less for each weight of a matrix than AdamW."""
    _, optimizer = model_and_optimizer()
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    args = build_parser().parse_args(["--optimizer", "muon"])
    fill_flags(args, 1)
    assert plan_run(args, CONFIG, 100, 1, 1e12).memory["optimizer"] * 2 ** 30 == kept
    args.optimizer = "adamw"
    assert plan_run(args, CONFIG, 100, 1, 1e12).memory["optimizer"] * 2 ** 30 == 8 * count_parameters(CONFIG)


def test_a_loss_scaler_skips_what_is_not_finite():
    model, optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    before = [p.detach().clone() for p in model.parameters()]
    for value, moves in ((float("inf"), False), (4.0, True)):
        set_gradients(model, value)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before)) == moves
    assert scaler.get_scale() == 2


def test_an_adamw_run_goes_on_as_one(tmp_path, capsys):
    """Asked for another optimizer, it is refused."""
    short = ["--epochs", "1", "--updates_per_epoch", "2"]
    assert run(tmp_path / "a", *short) == 0
    assert run(tmp_path / "a", *short, "--optimizer", "muon") == 2
    assert "--optimizer adamw there, muon now" in capsys.readouterr().err
    assert run(tmp_path / "l", "--init_from", str(tmp_path / "a"), "--lora", "2", "--optimizer", "muon") == 2
    assert "--optimizer muon with --lora 2" in capsys.readouterr().err
    assert run(tmp_path / "m", *short, "--optimizer", "muon", "--muon_lr", "0.02") == 0
    assert run(tmp_path / "m", *short, "--epochs", "2") == 0         # both are left out: as the run has them
    assert saved(tmp_path / "m")["args"]["muon_lr"] == 0.02
    momenta = [name for name in part(saved(tmp_path / "m"), "optimizer") if name.startswith("momentum/")]
    assert len(momenta) == 6 * CONFIG.num_layers


@pytest.mark.parametrize("flags, says", [
    (["--muon_lr", "0.1"], "--muon_lr 0.1: give --optimizer muon with it"),
    (["--optimizer", "muon", "--lora", "2"], "give them by --init_from"),
])
def test_what_contradicts_it_is_one_line(flags, says, tmp_path, capsys):
    assert run(tmp_path / "new", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
