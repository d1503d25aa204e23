"""Adapters of PEFT, in and out: the same numbers as peft's, and what is refused."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import generate
import train
from generate import MusicGenerator, Sampling
from interop import convert, load
from foreign import TINY, WORDS, published, save, transformers, write
from support.lora import LowRank

try:
    import peft
except ImportError:
    peft = None
needs_peft = pytest.mark.skipif(peft is None or transformers is None, reason="needs peft: pip install peft")
OLD_RUN = Path(__file__).parent / "old_run"
LAYER = "decoder.model.decoder.layers.0."
# What musicgen-dreamboothing's trainer targets, its text encoder not frozen.
TARGETS = ["enc_to_dec_proj", "audio_enc_to_dec_proj", "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2",
           *(f"lm_heads.{k}" for k in range(4)), *(f"embed_tokens.{k}" for k in range(4)),
           "k", "v", "q", "o", "wi", "wo"]


def write_files(folder, tensors: dict, **config) -> Path:
    """An adapter's folder to the old run, as peft writes it. tensors: by their names without the prefix."""
    folder.mkdir(exist_ok=True)
    torch.save({f"base_model.model.{name}": x for name, x in tensors.items()}, folder / "adapter_model.bin")
    whole = dict(peft_type="LORA", base_model_name_or_path=str(OLD_RUN), r=2, lora_alpha=3) | config
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def low_rank(module: str, fan_out: int, fan_in: int, rank: int = 2, embedding: bool = False) -> dict:
    """The two tensors of a module's addition, random."""
    A, B = torch.randn(rank, fan_in), torch.randn(fan_out, rank)
    if embedding:
        return {f"{module}.lora_embedding_A": A, f"{module}.lora_embedding_B": B}
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}


def outer_sum(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """B A [out,in] by its definition, a rank at a time."""
    return sum(torch.outer(B[:, i], A[i]) for i in range(len(A)))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_by_hand(tmp_path, rslora):
    """Every kind of tensor that an adapter has, against the formula, in the old run's weights."""
    torch.manual_seed(0)
    before = load.read_model(OLD_RUN)
    D, card = before["model_config"]["dim"], before["model_config"]["card"]
    tensors = {
        **low_rank(LAYER + "self_attn.k_proj", D, D),
        **low_rank(LAYER + "encoder_attn.v_proj", D, D),
        **low_rank(LAYER + "fc2", D, 4 * D, rank=5), **low_rank("decoder.lm_heads.0", card, D),
        **low_rank("decoder.model.decoder.embed_tokens.1", D, card + 1, embedding=True),
        "decoder.model.decoder.layer_norm.bias": torch.randn(D)}
    folder = write_files(tmp_path / "lora", tensors, use_rslora=rslora, rank_pattern={"fc2": 5},
                         alpha_pattern={r"layers\.0\.fc2": 7})
    after = load.read_model(folder)

    def addition(module: str, alpha: float = 3, end: str = "_{}.weight") -> torch.Tensor:
        A, B = (tensors[f"{module}.lora{end.format(part)}"] for part in "AB")
        return alpha / (math.sqrt(len(A)) if rslora else len(A)) * outer_sum(A, B)

    wanted = {name: x.clone() for name, x in before["model"].items()}
    layer = "transformer.layers.0."
    wanted[layer + "self_attn.in_proj_weight"][D:2 * D] += addition(LAYER + "self_attn.k_proj")
    wanted[layer + "cross_attention.in_proj_weight"][2 * D:] += addition(LAYER + "encoder_attn.v_proj")
    wanted[layer + "linear2.weight"] += addition(LAYER + "fc2", 7)
    wanted["linears.0.weight"] += addition("decoder.lm_heads.0")
    wanted["emb.1.weight"] += addition("decoder.model.decoder.embed_tokens.1", end="_embedding_{}").T
    wanted["out_norm.bias"] = tensors["decoder.model.decoder.layer_norm.bias"]
    assert wanted.keys() == after["model"].keys()
    for name, x in wanted.items():
        torch.testing.assert_close(after["model"][name], x, atol=1e-5, rtol=0)
    same = {name for name, x in before["model"].items() if torch.equal(x, after["model"][name])}
    assert len(wanted) - len(same) == 6
    assert load.peek(folder).model == load.peek(OLD_RUN).model
    command = ["--prompt", "fast bells", "--seconds", "0.2", "--out", str(tmp_path / "wav")]
    assert generate.main(["--model", str(folder), *command]) == 0


@pytest.mark.parametrize("config, tensors, says", [
    (dict(peft_type="LOHA"), {}, "peft_type is 'LOHA', 'LORA' was expected"),
    (dict(use_dora=True), {}, "it has use_dora True, which is not read"),
    (dict(layer_replication=[[0, 2]]), {}, "layer_replication [[0, 2]], which is not read"),
    (dict(init_lora_weights="pissa_niter_4"), {}, "'pissa_niter_4', which changes the model's own weights"),
    (dict(r=4), {}, "its rank is 4, that of its tensors 2"),
    (dict(lora_alpha="x"), {}, "TypeError"),
    (dict(alpha_pattern={"(": 1}), {}, "unterminated"),
    (dict(base_model_name_or_path=None), {}, "an adapter to None, which is not here: python -m interop."),
    (dict(base_model_name_or_path="facebook/musicgen-small"), {}, "--base FOLDER_OF_THE_MODEL --to nano"),
    ({}, low_rank("audio_encoder.x", 2, 2), "audio_encoder.x.weight is not of the model"),
    ({}, low_rank("text_encoder.shared", 8, 8, embedding=True), "shared.weight is not of the model"),
    ({}, {LAYER + "fc2.lora_A.weight": torch.zeros(2, 2)}, "fc2 has lora_B None, lora_A [2, 2]"),
    ({}, low_rank(LAYER + "fc2", 3, 4), "its addition [3, 4]"),
    ({}, {LAYER + "fc1.lora_magnitude_vector": torch.ones(3)}, "magnitude_vector [3] is not of the model"),
])
def test_adapters_that_are_refused(config, tensors, says, tmp_path, capsys, monkeypatch):
    """In one line, by all that reads a model."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    D = load.peek(OLD_RUN).model.dim
    folder = write_files(tmp_path / "lora", {**low_rank(LAYER + "fc1", 4 * D, D), **tensors}, **config)
    asked = ["--model", str(folder), "--prompt", "x"]
    for main, argv in ((convert.main, [str(folder)]), (generate.main, asked)):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    (folder / "adapter_model.bin").unlink()
    assert convert.main([str(folder), "--base", str(OLD_RUN)]) == 2
    assert convert.main([str(OLD_RUN), "--base", str(OLD_RUN)]) == 2
    assert "is no adapter" in capsys.readouterr().err


def test_an_adapter_beside_a_folder(tmp_path, capsys, monkeypatch):
    """Its base has moved: it is given once, and what comes out is a plain model."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    D = load.peek(OLD_RUN).model.dim
    folder = write_files(tmp_path / "lora", low_rank(LAYER + "fc1", 4 * D, D),
                         base_model_name_or_path="someone/far_away")
    write(folder, "nano", tmp_path / "whole", capsys, "--base", str(OLD_RUN))
    changed = load.read_model(tmp_path / "whole")["model"]
    before = load.read_model(OLD_RUN)["model"]
    differ = {name for name, x in before.items() if not torch.equal(x, changed[name])}
    assert differ == {"transformer.layers.0.linear1.weight"}
    second = write_files(tmp_path / "second", low_rank(LAYER + "fc1", 4 * D, D),
                         base_model_name_or_path=str(folder))
    assert convert.main([str(second)]) == 2
    assert "which is an adapter itself" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# out


@pytest.fixture(name="tuned_run", scope="module")
def tuned_run_fixture(tmp_path_factory):
    """(folder of transformers, a --lora run that began from it)."""
    pytest.importorskip("safetensors")
    tmp = tmp_path_factory.mktemp("adapter")
    start = [*TINY, "--size", "debug", "--fuse", "text=cross", "--out", str(tmp / "start")]
    assert train.main(start) == 0
    assert convert.main([str(tmp / "start"), "--to", "hf", "--out", str(tmp / "hf")]) == 0
    command = [*TINY, "--init_from", str(tmp / "hf"), "--lora", "3", "--ema_every", "1", "--out",
               str(tmp / "run")]
    assert train.main(command) == 0
    return tmp / "hf", tmp / "run"


def test_a_tuned_run_goes_out_as_an_adapter_and_comes_back(tuned_run, tmp_path, capsys):
    """The adapter on its base is best.pt; and it starts another run."""
    folder, run = tuned_run
    assert "note" not in write(run, "peft", tmp_path / "lora", capsys)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3 * LowRank.SCALE)
    assert config["base_model_name_or_path"] == str(folder)
    assert config["target_modules"] == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]
    wanted, found = load.read_model(run), load.read_model(tmp_path / "lora")
    assert wanted["lora"] and wanted["model"].keys() == found["model"].keys()
    for name, x in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], x, atol=1e-6, rtol=0)
    assert wanted["segment_frames"] == found["segment_frames"] == 80
    assert Sampling(**wanted["sampling"]) == Sampling(**found["sampling"]) != Sampling()
    more = ["--updates_per_epoch", "1", "--out", str(tmp_path / "next")]
    assert train.main([*TINY, "--init_from", str(tmp_path / "lora"), *more]) == 0


def test_what_is_no_adapter_is_not_written(tuned_run, tmp_path, capsys):
    folder, run = tuned_run
    start = run.parent / "start"
    alone = ["--init_from", str(folder), "--channels", "2", "--lora", "2", "--updates_per_epoch", "1"]
    assert train.main([*TINY, *alone, "--out", str(run.parent / "stereo")]) == 0
    cases = [([start], "holds no additions by themselves"),
             ([run, "--base", OLD_RUN], "is not what it was trained from"),
             ([run.parent / "stereo"], "is not what it was trained from: emb.0.weight is another there"),
             ([run, "--base", tmp_path / "gone"], "no best.pt there")]
    for argv, says in cases:
        argv = [str(argv[0]), "--to", "peft", "--out", str(tmp_path / "no"), *map(str, argv[1:])]
        assert convert.main(argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == []
    # the run that the folder was made of is the same model, which peft cannot load by its name
    printed = write(run, "peft", tmp_path / "lora", capsys, "--base", str(start))
    assert "--to hf --out DIR" in printed


# ----------------------------------------------------------------------------------------------------------
# beside peft


@torch.no_grad()
def check_logits(theirs, music) -> None:
    """Texts of several lengths and none, at every position. theirs: a model of transformers or of peft."""
    model = music.model
    generator = torch.Generator().manual_seed(1)
    seq = torch.randint(0, model.config.card + 1, (5, model.config.K, 40), generator=generator)
    inputs = model.conditioner.prepare([{"text": text} for text in [*WORDS, None]])
    ids, mask = inputs["text"]
    wanted = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1)).logits
    found = model.logits(seq, model.conditioner(inputs)).flatten(0, 1)
    assert (found - wanted[:, -40:]).abs().max() < 1e-5


@needs_peft
def test_peft_loads_what_we_trained(tuned_run, tmp_path, capsys):
    folder, run = tuned_run
    write(run, "peft", tmp_path / "lora", capsys)
    base = transformers.MusicgenForConditionalGeneration.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    check_logits(theirs, MusicGenerator.load(run))
    with pytest.raises(AssertionError), theirs.disable_adapter():
        check_logits(theirs, MusicGenerator.load(run))


@needs_peft
@pytest.mark.parametrize("melody", [False, True], ids=["text", "melody"])
@pytest.mark.parametrize("settings", [
    dict(target_modules=TARGETS),
    dict(target_modules=["q_proj", "fc1"], use_rslora=True, rank_pattern={"fc1": 3}, bias="lora_only",
         alpha_pattern={r"layers\.[01]\.fc1": 9}, modules_to_save=["enc_to_dec_proj", "lm_heads.1"]),
    dict(target_modules="all-linear")], ids=["dreamboothing", "patterns", "all"])
def test_what_peft_wrote_is_read(melody, settings, tmp_path):
    """Random additions, in the folder that its trainer leaves: the model's configuration lies beside them."""
    folder = save(published(melody=melody), tmp_path / "hf")
    kind = "MusicgenMelody" if melody else "Musicgen"
    base = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(base, config).eval()
    for name, p in theirs.named_parameters():
        if "modules_to_save" in name:
            p.data += torch.randn_like(p) * 0.1
    theirs.save_pretrained(tmp_path / "lora")
    shutil.copy(folder / "config.json", tmp_path / "lora")
    check_logits(theirs, MusicGenerator.load(tmp_path / "lora"))
    with pytest.raises(AssertionError):
        check_logits(theirs, MusicGenerator.load(folder))
