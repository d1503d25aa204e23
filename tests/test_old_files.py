"""Files that the project wrote before its code was rebuilt: today's code goes on with them.

    old_codec.pt    a codec file: 2 codebooks of 16 codes at 50 Hz
    old_cache/      a token cache of two clips by that codec
    old_run/        an epoch of four updates from the cache, with text, melody and style; what the code that
                    wrote it found: the losses of a second epoch (second_epoch.json), a greedy clip (clip.wav)
    old_tune/       the best.pt of a run with melody and text in front of the codes, as other formats hold it
    old_package/    the same as a package of audiocraft, its text encoder in t5/

All are of the smallest sizes that have every part, and are used as a user would, by the command lines.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from gate import Starter, command

OLD = Path(__file__).parent
FLAGS = (
    "--dataset clips --cache tests/old_cache --valid 0.5 --workers 0 --codec tests/old_codec.pt --size 8x2x2 "
    "--text_vocab 40 --segment_seconds 0.8 --batch_size 4 --updates_per_epoch 4 --valid_samples 4 "
    "--eval_samples 1 --generate_samples 0 --lr 0.01 --warmup_steps 2 --log_every 1 --ema_every 1 "
    "--dropout 0.1 --device cpu --conditions text melody style --fuse text=cross"
)
SECONDS, FRAMES, HOP, CARD = 0.8, 40, 320, 16  # of a clip; its frames; of the codec
LEAST = 2 / 32768  # two steps of 16 bits: rounding on another machine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, *words): a command of the project, from the root of the repository -> what it printed."""
    starter, printed = Starter(), tmp_path_factory.mktemp("printed") / "text"

    def run_command(name: str, *words) -> str:
        code = starter.run(command(name, *words), printed)
        assert code == 0, printed.read_text()[-2000:]
        return printed.read_text()

    yield run_command
    starter.end()


def read_log(out: Path) -> list:
    """The records of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_best(folder: Path) -> dict:
    """The content of a best.pt."""
    return torch.load(folder / "best.pt", weights_only=True)


def read_wav(path: Path) -> np.ndarray:
    """A clip of SECONDS [N]."""
    wav, rate = soundfile.read(path)
    assert rate == 16_000 and wav.shape == (FRAMES * HOP,) and np.isfinite(wav).all()
    return wav


def generate(run, model: Path, out: Path, *words) -> np.ndarray:
    """A clip of a model for a text [N]; greedy unless the words say otherwise."""
    asked = ("--prompt", "a slow organ", f"--temperature 0 --cfg 3 --seconds {SECONDS}")
    run("generate", "--run", model, *asked, *words, "--out", out)
    return read_wav(out / "000.wav")


def assert_same_weights(old: dict, new: dict) -> None:
    """Two best.pt hold the same model."""
    assert old["model"].keys() == new["model"].keys()
    for name, x in old["model"].items():
        assert torch.equal(x, new["model"][name]), name


def test_a_run_goes_on(run, tmp_path):
    """Its second epoch has the losses that the old code found: weights, averages, optimizer, random draws."""
    out = tmp_path / "run"
    shutil.copytree(OLD / "old_run", out)
    first = read_log(out)
    assert "going on from step 4" in run("train", FLAGS, "--epochs 2 --out", out)
    records = read_log(out)
    assert records[: len(first)] == first
    second = records[len(first) :]
    assert [r["step"] for r in second if r["kind"] == "step"] == [5, 6, 7, 8]
    losses = {f"{r['kind']} {r['stage']} {r['step']}": r["ce"] for r in second if "ce" in r}
    assert losses == pytest.approx(json.loads((out / "second_epoch.json").read_text()), abs=2e-3)
    last = torch.load(out / "last.pt", weights_only=True)
    assert (last["step"], last["epoch"]) == (8, 2)
    best_of_first = min(r["ce"] for r in first if r["stage"] == "valid")
    assert read_best(out)["metrics"]["ce"] == last["best_ce"] <= best_of_first


def test_a_run_generates(run, tmp_path):
    """The greedy clip is the one that the old code made; with melody and style there is another."""
    clip = OLD / "old_run/clip.wav"
    assert np.abs(generate(run, OLD / "old_run", tmp_path / "text") - read_wav(clip)).max() <= LEAST
    more = ("--melody", clip, "--style", clip, "--temperature 1")
    given = generate(run, OLD / "old_run", tmp_path / "all", *more)
    assert np.abs(given - read_wav(clip)).max() > LEAST


def test_a_run_converts_to_our_own_format(run, tmp_path):
    run("convert", OLD / "old_run", "--to nano --out", tmp_path / "nano")
    old, new = read_best(OLD / "old_run"), read_best(tmp_path / "nano")
    assert_same_weights(old, new)
    for section in ("model_config", "conditioner_config", "codec", "sampling", "segment_frames"):
        assert new[section] == old[section], section


def test_a_run_converts_to_a_hugging_face_folder_and_back(run, tmp_path):
    """What comes back is the same model, and the folder itself generates what the run does."""
    hf = tmp_path / "hf"
    run("convert", OLD / "old_tune", "--to hf --out", hf)
    config = json.loads((hf / "config.json").read_text())
    assert config["model_type"] == "musicgen_melody" and config["decoder"]["vocab_size"] == CARD
    run("convert", hf, "--to nano --out", tmp_path / "nano")
    assert_same_weights(read_best(OLD / "old_tune"), read_best(tmp_path / "nano"))
    ours, theirs = generate(run, OLD / "old_tune", tmp_path / "ours"), generate(run, hf, tmp_path / "theirs")
    assert np.abs(ours - theirs).max() <= LEAST


def test_a_package_converts(run, tmp_path):
    """A package of audiocraft that the old code wrote has the weights of the run that it was made of."""
    package = OLD / "old_package"
    run("convert", package, "--t5", package / "t5", "--to nano --out", tmp_path / "nano")
    assert_same_weights(read_best(OLD / "old_tune"), read_best(tmp_path / "nano"))


def test_a_cache_is_trained_from(run, tmp_path):
    """An update of a new run with the codes of the old cache."""
    codes = np.load(OLD / "old_cache/shard_00000.npy")
    assert codes.shape == (105, 2) and 0 <= codes.min() and codes.max() < CARD
    run("train", FLAGS, "--updates_per_epoch 1 --epochs 1 --out", tmp_path / "run")
    step = read_log(tmp_path / "run")[0]
    assert (step["kind"], step["step"]) == ("step", 1)
    assert 1 < step["ce"] < 8 and 0 < step["grad_norm"] < 100


def test_a_codec_is_read(run, tmp_path):
    """A round trip lasts as long as what went in."""
    back = tmp_path / "back.wav"
    printed = run("tokenizer", OLD / "old_run/clip.wav", back, "--codec", OLD / "old_codec.pt")
    assert f"codes [1, 2, {FRAMES}]" in printed
    assert read_wav(back).any()
