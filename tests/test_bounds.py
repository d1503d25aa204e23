"""What a number may be: absurd flags, configurations of others with absurd fields, weights that are not
finite, and memory that does not suffice. Each ends in one line before anything is built."""

import itertools
import re
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import generate
import mutations
import tokenizer
import toy
import train
from evaluate import analyser, metrics
from interop import load
from support import bounds, common, distributed, estimate
from tools import bench, fit_codec

ABSURD = "1000000000000"
FIT = ["--dataset", "toy", "--out", "no/such/c.pt"]
FLAGS = {
    train: ["epochs", "updates_per_epoch", "batch_size", "micro_batch_size", "valid_samples", "eval_samples",
            "generate_samples", "workers", "num_codebooks", "segment_seconds", "lora", "plan_gpus",
            "warmup_steps", "log_every", "style_levels", "text_vocab", "ema_every"],
    fit_codec: ["filters", "ratios", "residual_layers", "compress", "kernel", "last_kernel", "dim",
                "codebooks", "card", "sample_rate", "segment_seconds", "batch_size", "threads", "steps"],
    bench: ["dim", "num_layers", "num_heads", "hidden_scale", "K", "card", "tokens", "frames", "batch_size",
            "rounds", "threads", "workers"],
    metrics: ["n", "seed"],
    analyser: ["clips"],
    generate: ["n", "seconds"],
}
BEFORE = {fit_codec: FIT, generate: ["--run", "tests/old_run", "--prompt", "x"]}


@pytest.mark.parametrize("program, flag", [(p, f) for p, flags in FLAGS.items() for f in flags],
                         ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_absurd_flags_are_refused(program, flag, capsys):
    """By the range of each: none of them takes memory or time."""
    beside = {"style_levels": ["--conditions", "text", "style"], "plan_gpus": ["--dry_run"]}.get(flag, [])
    argv = [*BEFORE.get(program, []), *beside, f"--{flag}", ABSURD]
    before = time.monotonic()
    assert program.main(argv) == 2
    error = capsys.readouterr().err
    assert f"--{flag} 1" in error and "at most" in error or "less than" in error, error
    assert error.count("\n") == 1 and len(error) < 300 and time.monotonic() - before < 20


def test_absurd_sizes_are_refused(capsys):
    for size in ("1000000x1x1", "64x1000000000x2", "64x2x99999999999999999999", "64x2x2x1000"):
        assert train.main(["--size", size]) == 2
        error = capsys.readouterr().err
        assert f"--size {size}" in error and "num_layers 1 to 512" in error and error.count("\n") == 1


def test_a_run_that_no_machine_holds_is_refused(capsys, tmp_path, monkeypatch):
    """Before it is built, from the estimate."""
    monkeypatch.setattr(estimate, "machine_flops", lambda args: 1e9)
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--size", "65536x100x64"]
    assert train.main(flags) == 2
    assert "GiB of memory, cpu has" in capsys.readouterr().err and not any(tmp_path.iterdir())
    assert train.main([*flags, "--dry_run"]) == 0


def test_updates_of_an_epoch_take_no_memory():
    """An epoch may have as many as a run of any length."""
    made = data.batches(data.ToyDataset(0, "train", toy_codec()), 0, 0, 10 ** 12, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = [example.index for examples in itertools.islice(made, 2) for example in examples]
    assert first == [0, 1, 2, 3]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000                     # KiB


def toy_codec():
    """What a data set asks of a codec."""
    return type("Codec", (), dict(sample_rate=toy.SAMPLE_RATE, channels=1, hop=320))()


# how memory that does not suffice is reported: by torch on a CPU, by NumPy, by torch on a GPU
FULL = {
    "torch": lambda: torch.empty(1 << 50),
    "overflow": lambda: torch.empty(1 << 31, 1 << 31, 1 << 10),
    "numpy": lambda: np.empty(1 << 50),
    "gpu": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
}


@pytest.mark.parametrize("name", FULL)
def test_memory_that_does_not_suffice_is_one_line(name, capsys, monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)
    assert common.command("x.py", "--n")(lambda argv: FULL[name]())([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("x.py: out of memory") and error.endswith(": lower --n\n")
    monkeypatch.setattr(train, "fill_flags", lambda *args: FULL[name]())
    assert train.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: out of memory") and error.count("\n") == 1
    assert "--micro_batch_size" in error


def test_other_errors_of_the_code_stay_tracebacks():
    with pytest.raises(RuntimeError, match="ours"):
        common.command("x.py")(lambda argv: (_ for _ in ()).throw(RuntimeError("ours")))([])
    assert distributed.error_text(RuntimeError("ours")) is None


@pytest.mark.parametrize("fields, says", [
    (dict(num_layers=0), "num_layers is 0, a whole number from 1 to 512"),
    (dict(num_layers=10 ** 9), "num_layers is 1000000000"), (dict(num_layers=True), "num_layers is True"),
    (dict(num_layers=2.0), "num_layers is 2.0"), (dict(num_layers=None), "num_layers is None"),
    (dict(num_layers="9" * 999), "num_layers is '999"), (dict(dropout=float("nan")), "dropout is nan"),
    (dict(delays=[0, 10 ** 9]), "delays is [0, 1000000000], a list, each a whole number from 0"),
    (dict(delays=3), "delays is 3, a list"), (dict(mask_padding=1), "mask_padding is 1, true or false"),
    (dict(ratios=[]), "ratios is []")])
def test_fields_out_of_range_are_named(fields, says):
    with pytest.raises(ValueError) as error:
        bounds.check_fields("here", fields)
    assert str(error.value).startswith(f"here: its {says}") and len(str(error.value)) < 200
    bounds.check_fields("here", dict(num_layers=4, dropout=0, delays=None, mask_padding=True, other="x"))


def test_weights_that_are_not_finite_are_named():
    good = dict(a=torch.zeros(3), b=torch.ones(2, 2), c=torch.zeros(0))
    bounds.check_finite("here", good)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.ones(2, 2, dtype=torch.float16)
        bad[0, 1] = value
        with pytest.raises(ValueError, match="^here: its weights are not all finite: b has 1 of 4 that"):
            bounds.check_finite("here", good | dict(b=bad))
    wide = torch.zeros(1).expand(10 ** 9)      # as large as it says, in a file of nothing
    for odd in (3, torch.zeros(3, dtype=torch.long), torch.zeros(3).to_sparse(), wide):
        with pytest.raises(ValueError, match="^here: its b "):
            bounds.check_finite("here", good | dict(b=odd))


@pytest.fixture(name="campaign", scope="module")
def campaign_fixture(tmp_path_factory):
    """(good folders, {name: case})."""
    good = mutations.make_good(tmp_path_factory.mktemp("good"))
    return good, {case.name: case for case in mutations.all_cases(good)}


@pytest.mark.parametrize("name", ["text.pt", "codec.pt", "hf_text", "package"])
def test_weights_that_are_not_finite_are_not_loaded(name, campaign, tmp_path):
    """In every kind of file that holds a model or a codec; the line has the file's own name of the tensor."""
    path = tmp_path / name
    (shutil.copytree if (campaign[0] / name).is_dir() else shutil.copy)(campaign[0] / name, path)
    file = {"hf_text": path / "model.safetensors", "package": path / "state_dict.bin"}.get(name, path)
    if file.suffix == ".safetensors":
        weights = content = load_file(file)
    else:
        content = torch.load(file, weights_only=False)
        weights = content[{"text.pt": "model", "codec.pt": "state", "package": "best_state"}[name]]
    broken = next(key for key, x in weights.items() if x.is_floating_point() and x.numel() > 1)
    weights[broken].view(-1)[1] = float("nan")
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)

    with pytest.raises(ValueError, match=f"not all finite: {re.escape(broken)} has 1 of"):
        if name == "codec.pt":
            tokenizer.load_codec(str(path))
        else:
            load.read_model(path, path / "t5" if name == "package" else None)


def test_a_sample_of_the_campaign(campaign, tmp_path):
    """Every field of every file by an absurd value; `python tests/mutations.py` tries them all."""
    good, cases = campaign
    assert len(cases) > 4000
    endings = []
    for i, case in enumerate([*cases.values()][:50]):
        place = tmp_path / str(i)
        place.mkdir()
        endings.append(mutations.run_case(case, good, place))
    assert sum(ending.startswith("refused") for ending in endings) > 20


@pytest.mark.parametrize("name, says", [
    ("hf_text/config.json: decoder.num_hidden_layers = 1000000000", "its num_hidden_layers is 1000000000, a"),
    ("hf_text/config.json: decoder.num_attention_heads = 0", "its num_attention_heads is 0"),
    ("hf_text/config.json: decoder = None", "config.json is not that of a MusicGen"),
    ("hf_text/config.json: decoder = 'x'", "config.json is not that of a MusicGen"),
    ("hf_text/config.json: text_encoder.d_model = 1000000000", "its d_model is 1000000000"),
    ("hf_text/codec: num_filters = 1000000000", "its num_filters is 1000000000"),
    ("hf_text/codec: target_bandwidths = [1000000000]", "target_bandwidths is [1000000000]"),
    ("hf_text/codec: upsampling_ratios = deep", "upsampling_ratios is [[[[[[[...]]]]]]]"),
    ("hf_melody/config.json: chroma_length = 1000000000", "its chroma_length is 1000000000"),
    ("package/state_dict.bin: transformer_lm.num_heads = 0", "its num_heads is 0"),
    ("package/state_dict.bin: fuser = None", "its fuser has cross []"),
    ("package/compression_state_dict.bin: seanet.n_filters = 1000000000", "its n_filters is 1000000000"),
    ("package/t5: num_layers = 1000000000", "its num_layers is 1000000000"),
    ("text.pt: segment_frames = 1000000000000", "its segment_frames is 1000000000000"),
    ("text.pt: model_config.num_layers = 1000000000", "its num_layers is 1000000000"),
    ("text.pt: model_config.delays = [1000000000]", "its delays is [1000000000]"),
    ("style.pt: conditioner_config.style_bins = 1000000000", "its style_bins is 1000000000"),
    ("codec.pt: config.rvq.n_q = 1000000000", "its n_q is 1000000000"),
    ("codec.pt: config = None", "seanet and rvq were expected"),
    ("text.pt: weights nan", "has 1 of"), ("codec.pt: weights inf", "has 1 of"),
    ("hf_text: decoder. nan", "has 1 of"), ("hf_text: text_encoder. inf", "k.weight has 1 of"),
    ("hf_text: audio_encoder. nan", "audio_encoder."), ("package/t5: weights nan", "t5/model.safetensors"),
    ("package/state_dict.bin: weights nan", "has 1 of"), ("adapter: weights nan", "lora_A.weight has 1 of")])
def test_what_is_absurd_is_named(campaign, tmp_path, name, says):
    good, cases = campaign
    ending = mutations.run_case(cases[name], good, tmp_path)
    assert ending.startswith("refused") and says in ending
