"""The loop end to end on the toy set, and what it promises: equal numbers, exact resume, refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conditioning
import data
import generate
import model
import train
from evaluate import listen, stages
from interop import load
from support import resume
from support.flags import flags_by_name
from support.log import loss_metrics
from train import Ema

HERE = Path(__file__).parent.parent
SMALL = ("--size debug --batch_size 4 --updates_per_epoch 3 --epochs 2 --valid_samples 8 --eval_samples 2 "
         "--lr 0.01 --warmup_steps 2 --generate_samples 2 --log_every 1 --ema_every 2 --device cpu").split()


def run(out, *flags) -> int:
    return train.main([*SMALL, "--out", str(out), *flags])


def saved(out) -> dict:
    return torch.load(Path(out, "last.pt"), weights_only=True)


def part(checkpoint: dict, group: str) -> dict:
    """The tensors of a checkpoint that belong to "model", "ema", "best" or "optimizer"."""
    prefix, tensors = f"{group}/", checkpoint["tensors"]
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def lines(out) -> list:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def assert_same_run(a, b) -> None:
    """Equal up to the order of float32 sums.

    A few weights whose gradient is nearly zero may move by more, because Adam divides by its size. So the
    mean difference of each tensor is bounded tightly, the largest loosely."""
    for x, y in zip(lines(a), lines(b), strict=True):
        if "ce" in x:
            assert x["ce"] == pytest.approx(y["ce"], abs=1e-5)
    first, second = (part(saved(out), "model") for out in (a, b))
    assert max(float((first[k] - second[k]).abs().mean()) for k in first) < 1e-6
    assert largest_difference(first, second) < 2e-3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two short epochs."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert run(out) == 0
    return out


def test_log_has_flat_records(finished):
    records = lines(finished)
    stages = [(r["stage"], r["epoch"], r["step"]) for r in records if r["kind"] == "stage"]
    assert stages == [("train", 1, 3), ("valid", 1, 3), ("train", 2, 6), ("valid", 2, 6),
                      ("evaluate", 2, 6), ("generate", 2, 6)]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"ce", "ppl", "ce_q1", "ce_q4", "ppl_q4", "grad_norm", "lr", "frames_per_second", "skipped"}
    for r in steps:
        assert wanted <= r.keys()
        assert abs(r["ce"] - sum(r[f"ce_q{k}"] for k in (1, 2, 3, 4)) / 4) < 1e-9
        assert abs(r["ppl"] - math.exp(r["ce"])) < 1e-6
    assert steps[0]["ce"] == pytest.approx(math.log(256), abs=0.9)       # over it: --emb_std is 1
    assert steps[0]["lr"] > 0
    # an epoch's loss is the mean of its updates here, because all have equally many targets
    mean = sum(r["ce"] for r in steps if r["epoch"] == 2) / 3
    epoch_two = next(r for r in records if r["kind"] == "stage" and r["stage"] == "train" and r["epoch"] == 2)
    assert epoch_two["ce"] == pytest.approx(mean, abs=1e-6)


def test_run_folder(finished):
    wanted = {"config.json", "log.jsonl", "last.pt", "last.prev.pt", "best.pt", "samples", "index.html"}
    assert wanted <= {p.name for p in finished.iterdir()}
    samples = sorted(p.name for p in (finished / "samples" / "epoch_0002").iterdir())
    stems = [f"00{i}_{kind}" for i in (0, 1) for kind in listen.SAMPLE_KINDS]
    assert samples == sorted(f"{stem}.{end}" for stem in stems for end in ("json", "wav"))
    references = sorted(p.name for p in (finished / "samples" / "reference").glob("*.wav"))
    assert references == ["000_codec.wav", "000_reference.wav", "001_codec.wav", "001_reference.wav"]
    config = json.loads((finished / "config.json").read_text())
    assert config["args"]["batch_size"] == 4 and config["model"]["card"] == 256
    best = torch.load(finished / "best.pt", weights_only=True)
    assert best["metrics"]["ce"] == min(r["ce"] for r in lines(finished) if r["stage"] == "valid")


def test_best_holds_the_averaged_weights(finished):
    best, last = torch.load(finished / "best.pt", weights_only=True), saved(finished)
    assert last["best_ce"] == last["history"][3]["ce"]  # the loss fell: the second epoch is the best
    assert largest_difference(best["model"], part(last, "ema")) == 0
    assert largest_difference(best["model"], part(last, "model")) > 0


def test_generate_command(finished, tmp_path):
    second = ["--prompt", "fast bells", "--run", str(finished), "--seconds", "1"]
    flags = ["--prompt", "a slow organ tune", *second]
    warm = [*flags, "--temperature", "1"]
    other = ["--prompt", "a quick chip lead", *second, "--temperature", "1"]
    for name, words in (("a", flags), ("b", flags), ("c", other), ("d", warm)):
        assert generate.main([*words, "--out", str(tmp_path / name)]) == 0
    a, b, c, d = ([(tmp_path / name / f"00{i}.wav").read_bytes() for i in (0, 1)] for name in "abcd")
    assert a == b        # bit for bit
    assert c[0] != d[0]  # same seed, other prompt
    record = json.loads((tmp_path / "a" / "001.json").read_text())
    assert record["prompt"] == "fast bells" and record["seconds"] == 1
    assert record["cfg"] == flags_by_name()["cfg"].toy
    # nothing is overwritten
    assert generate.main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "002.wav").exists()
    assert (tmp_path / "a" / "000.wav").read_bytes() == a[0]


def test_generate_longer_and_continued(finished, tmp_path):
    import soundfile
    flags = ["--run", str(finished), "--out", str(tmp_path)]
    long = [*flags, "--prompt", "fast bells", "--seconds", "5", "--stride", "1", "--n", "2"]
    assert generate.main(long) == 0
    assert soundfile.info(tmp_path / "001.wav").duration == 5
    continued = [*flags, "--unconditional", "--continue", str(tmp_path / "000.wav")]
    assert generate.main([*continued, "--seconds", "6"]) == 0
    assert soundfile.info(tmp_path / "002.wav").duration == 6
    assert generate.main([*continued, "--seconds", "4"]) == 2  # no longer than what it continues


def test_pieces_of_a_text_with_the_vocabulary_of_a_run(finished, capsys):
    conditioning.main(["a slow organ", "--run", str(finished)])
    out = capsys.readouterr().out.splitlines()
    assert "pieces in the vocabulary" in out[0] and "organ" in out[1] and out[2].endswith(" 1")


def test_python_api_of_the_readme(finished):
    from generate import MusicGenerator
    music = MusicGenerator.load(finished)
    wav = music.generate(["a slow organ tune", None], seconds=1)
    assert wav.shape == (2, 1, 16_000) and wav.isfinite().all()


def test_micro_batches_change_nothing(finished, tmp_path):
    assert run(tmp_path, "--micro_batch_size", "1") == 0
    assert_same_run(finished, tmp_path)


def test_two_ranks_equal_one(finished, tmp_path):
    torchrun = ["torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command = [sys.executable, "-m", *torchrun, str(HERE / "train.py"), *SMALL, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("checkpoints, optimizer", [(1, "adamw"), (2, "adamw"), (4, "adamw"), (1, "muon")])
def test_resume_equals_the_uninterrupted_run(checkpoints, optimizer, tmp_path, monkeypatch, capsys):
    """Killed after a checkpoint and started again: the same bits.

    The checkpoint stands within an epoch, before its validation, or after it."""
    class Killed(Exception):
        pass

    save_checkpoint, left = resume.save_checkpoint, [checkpoints]

    def save_and_die(run):
        save_checkpoint(run)
        left[0] -= 1
        if not left[0]:
            raise Killed

    flags = ["--dropout", "0.1", "--updates_per_epoch", "2", "--save_minutes", "0", "--log_every", "2",
             "--optimizer", optimizer]
    monkeypatch.setattr(resume, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        run(tmp_path, *flags)
    monkeypatch.setattr(resume, "save_checkpoint", save_checkpoint)
    killed = saved(tmp_path)
    assert (killed["step"], killed["epoch"]) == {1: (1, 0), 2: (2, 0), 4: (3, 1)}[checkpoints]
    # as if it had been killed a little later: one record more, and the beginning of another
    record = dict(kind="step", stage="train", epoch=2, step=4, ce=99.0)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n" + '{"kind": "st')
    assert run(tmp_path, *flags) == 0
    assert "going on from step" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert run(whole, *flags) == 0
    resumed, straight = saved(tmp_path), saved(whole)
    assert largest_difference(resumed["tensors"], straight["tensors"]) == 0
    history, wanted = ([r["ce"] for r in c["history"] if "ce" in r] for c in (resumed, straight))
    assert history == wanted
    log, wanted = ([(r["stage"], r["step"], r.get("ce")) for r in lines(out)] for out in (tmp_path, whole))
    assert log == wanted


def test_more_epochs_say_what_becomes_of_the_learning_rate(finished, tmp_path, capsys):
    """The cosine is stretched: its rate, near its end, goes up again."""
    import shutil
    shutil.copytree(finished, tmp_path / "run")
    assert run(tmp_path / "run", "--epochs", "8") == 0
    then, now = lines(finished)[-5]["lr"], lines(tmp_path / "run")[len(lines(finished))]["lr"]
    assert now > 4 * then
    says = f"the learning rate was {then:.1e} in the last update and is {now:.1e} in the next"
    assert says in capsys.readouterr().out


def test_resume_keeps_the_vocabulary_of_the_checkpoint(finished, tmp_path, monkeypatch):
    """Captions that changed since the start must not give the ids of text another meaning."""
    import shutil
    shutil.copytree(finished, tmp_path / "run")
    other = [{"description": "entirely other captions"}] * 50
    monkeypatch.setattr(data.ToyDataset, "metadata", lambda *rest: other)
    assert run(tmp_path / "run", "--epochs", "3") == 0
    assert torch.equal(saved(tmp_path / "run")["assets"]["text"], saved(finished)["assets"]["text"])
    assert saved(tmp_path / "run")["step"] == 9


def test_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    assert run(finished) == 0
    out = capsys.readouterr().out
    assert "going on from" in out and "epoch 2 valid" in out
    assert (finished / "last.pt").read_bytes() == before


def test_another_configuration_is_refused(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    assert run(finished, "--pattern", "parallel") == 2
    assert "--pattern delay there, parallel now" in capsys.readouterr().err
    assert run(finished, "--resume", "never") == 2
    assert (finished / "last.pt").read_bytes() == before


@pytest.mark.parametrize("pattern", ("delay", "parallel", "unrolled"))
def test_overfit_one_batch_falls(pattern, tmp_path):
    """The commands of the README reach 0.05 with the tiny size. Here a debug model gets well on the way."""
    flags = ["--overfit_one_batch", "--updates_per_epoch", "60", "--epochs", "1", "--log_every", "60"]
    assert run(tmp_path, *flags, "--pattern", pattern) == 0
    ce = [r["ce"] for r in lines(tmp_path) if r["kind"] == "step"]
    assert ce[-1] < 3.2 < math.log(256)


def test_overfitting_goes_on_with_the_same_batch(tmp_path, monkeypatch):
    """Stopped within its epoch, it must not go on with the batch that would stand there."""
    seen, update, save_checkpoint = [], train.update, resume.save_checkpoint

    def remember_codes(run, micros):
        seen.append(micros[0][0].clone())
        return update(run, micros)

    def stop_at_two(run):
        save_checkpoint(run)
        if run.step == 2 and not seen[2:]:
            raise train.Stopped("SIGTERM")

    flags = ["--overfit_one_batch", "--updates_per_epoch", "3", "--epochs", "1", "--save_minutes", "0"]
    monkeypatch.setattr(train, "update", remember_codes)
    monkeypatch.setattr(resume, "save_checkpoint", stop_at_two)
    assert run(tmp_path, *flags) == 0 and len(seen) == 2
    monkeypatch.setattr(resume, "save_checkpoint", save_checkpoint)
    assert run(tmp_path, *flags) == 0 and len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_unconditional_and_other_fuses(tmp_path):
    short = ["--epochs", "1", "--updates_per_epoch", "1"]
    assert run(tmp_path / "a", "--no_text", *short) == 0
    flags = ["--run", str(tmp_path / "a"), "--out", str(tmp_path)]
    assert generate.main([*flags, "--unconditional", "--seconds", "0.5"]) == 0
    assert generate.main([*flags, "--prompt", "x"]) == 2
    assert run(tmp_path / "b", "--fuse", "text=prepend", *short) == 0
    assert run(tmp_path / "c", "--fuse", "text=sum", "--dtype", "bfloat16", "--checkpointing", *short) == 0


def test_gradients_not_finite(tmp_path, monkeypatch, capsys):
    """Weights stay as they are, the update is counted, the tensor is named.

    After --max_skipped in a row the run stops."""
    norm = torch.nn.utils.get_total_norm

    def poison(gradients, *rest):
        gradients[2][0, 0] = float("nan")
        return norm(gradients, *rest)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poison)
    assert run(tmp_path, "--max_skipped", "2") == 1
    out, err = capsys.readouterr()
    assert "step 1: gradients not finite; first in emb.2.weight (rank 0); this update is skipped" in out
    assert "step 2: gradients not finite; first in emb.2.weight (rank 0); 2 times in a row" in err
    assert [r["skipped"] for r in lines(tmp_path) if r["kind"] == "step"] == [1]


def test_a_weight_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    begin = train.build_run

    def planted(*rest, **more):
        run = begin(*rest, **more)
        run.model.linears[1].weight.data[3, 5] = float("nan")
        return run

    monkeypatch.setattr(train, "build_run", planted)
    assert run(tmp_path) == 1
    assert "step 1: weights not finite; first in linears.1.weight (rank 0)" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    """One poisoned update among good ones: said, skipped, and gone on."""
    loss, calls = model.head_loss, [0]

    def poison(*rest):
        calls[0] += 1
        in_update_two_codebook_two = calls[0] == 6
        return loss(*rest) * (float("inf") if in_update_two_codebook_two else 1)

    monkeypatch.setattr(model, "head_loss", poison)
    assert run(tmp_path) == 0
    assert "step 2: gradients not finite; first in loss of codebook 2 (rank 0)" in capsys.readouterr().out
    assert [r["skipped"] for r in lines(tmp_path) if r["kind"] == "step"] == [0, 1, 1, 1, 1, 1]


def test_validation_knows_an_epoch_that_is_shorter_than_the_averaging(tmp_path):
    """After its three updates the average of every tenth has the last one, not the starting weights."""
    assert run(tmp_path, "--epochs", "1", "--ema_every", "10") == 0
    best = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    assert largest_difference(best, part(saved(tmp_path), "model")) == 0


def test_validation_in_which_nothing_counts_is_refused(tmp_path, monkeypatch, capsys):
    """Nor is the loss of nothing 0, which no later one could be under."""
    assert math.isnan(loss_metrics(torch.zeros(4), torch.zeros(4))["ce"])
    monkeypatch.setattr(stages, "all_conditions", lambda run, examples, codes, mask: ([{}], mask & False))
    assert run(tmp_path) == 2
    assert "validation: no frame of any clip counts in the loss of codebook 1" in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_ema_sequence():
    """Weights 1, .5025, .3367, ...: the bias-corrected average of decay 0.99."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema, weights, average = Ema(model, 0.99), [], None
    for value in (1.0, 0.0, 0.0, 0.0):
        model.weight.data.fill_(value)
        ema.update(model)
        weights.append(1 / ema.count)
        if average is None:
            average = value
        else:
            average += weights[-1] * (value - average)
        assert float(ema.model.weight) == pytest.approx(average)
    assert weights[:3] == pytest.approx([1, 0.50251, 0.33668], abs=1e-4)


def test_the_text_encoder_has_its_own_learning_rate(finished):
    """Two groups of each kind; every parameter stands in exactly one of them."""
    model = load.build_model(load.read_model(finished))
    args = train.build_parser().parse_args(["--lr", "8e-3", "--text_lr", "2e-3"])
    groups = train.optimizer_groups(model, args)
    kinds = sorted((g["lr_scale"], g["weight_decay"]) for g in groups)
    assert kinds == [(0.25, 0.0), (0.25, 0.1), (1.0, 0.0), (1.0, 0.1)]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    text = {id(p) for p in model.conditioner.parameters()}
    assert all((id(p) in text) == (g["lr_scale"] == 0.25) for g in groups for p in g["params"])


def test_learning_rate():
    flags = ["--lr", "1", "--warmup_steps", "4", "--epochs", "1", "--updates_per_epoch", "24"]
    args = train.build_parser().parse_args(flags)
    rates = [train.learning_rate(n, args) for n in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.5)
    assert rates[24] == 0


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "new", "--dry_run", "--size", "small") == 0
    out = capsys.readouterr().out
    assert "GiB" in out and "time, about" in out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, says", [
    (["--batch_size", "0"], "--batch_size 0"),
    (["--micro_batch_size", "3"], "take one of 1, 2, 4"),
    (["--cfg_dropout", "1.5"], "--cfg_dropout 1.5"),
    (["--lr", "-1"], "--lr -1.0"),
    (["--lr", "nan"], "--lr nan"),
    (["--text_lr", "0"], "--text_lr 0.0"),
    (["--emb_std", "-1"], "--emb_std -1.0"),
    (["--epochs", "0"], "--epochs 0"),
    (["--segment_seconds", "0"], "--segment_seconds 0.0"),
    (["--codec", "encodec_48khz"], "encodec_48khz"),
    (["--codec", "missing.pt"], "missing.pt"),
    (["--num_codebooks", "9"], "9"),
    (["--dataset", "missing_folder"], "missing_folder"),
    (["--fuse", "text=nowhere"], "nowhere"),
    (["--fuse", "text"], "NAME=METHOD"),
    (["--temperature", "-2"], "temperature -2"),
    (["--dtype", "float16"], "float16"),
    (["--cache", "missing_cache"], "missing_cache"),
    (["--size", "huge"], "--size huge: debug, tiny"),
    (["--size", "320x6"], "--size 320x6"),
    (["--size", "320x6x0"], "--size 320x6x0"),
    (["--size", "100x2x3"], "a multiple of the heads"),
    (["--size", "64x2x2x4x1"], "WIDTHxLAYERSxHEADS"),
])
def test_bad_flags_are_one_line(flags, says, tmp_path, capsys):
    assert run(tmp_path / "new", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("train.py: ")


@pytest.mark.parametrize("flags", [["--sise", "tiny"], ["--pattern", "zigzag"], ["--seed", "x"]])
def test_mistyped_flags(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *flags)
    assert stopped.value.code == 2


def test_read_only_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may write anywhere
    assert run(tmp_path / "x") == 2
    assert "cannot be written" in capsys.readouterr().err
