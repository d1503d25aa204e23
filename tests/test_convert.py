"""Published weights in and ours out, against the models of transformers with random weights of small dimensions."""

import json
import pickle
import shutil

import pytest
import torch

import conditioning
import convert
import generate
import tokenizer
import train
from conditioning import ConditionerConfig
from generate import MusicGenerator, Sampling, generate_codes
from model import ModelConfig

try:
    import transformers
    transformers.logging.set_verbosity_error()
except ImportError:
    transformers = None
VERSION = "4.57.1"
needs_transformers = pytest.mark.skipif(transformers is None, reason=f"needs transformers: pip install transformers=={VERSION}")
WORDS = ["slow organ", "fast bells", "a calm harp with drums", "bright flute in C"]
PIECES = conditioning.fit_sentencepiece(WORDS * 9, 60)


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Weights large enough for every part to matter; nothing left at 0 or 1."""
    for name, x in list(module.named_parameters()) + list(module.named_buffers()):
        if name.endswith(("norm.weight", "original0", "weight_g")):
            x.uniform_(0.5, 1.5)
        elif x.is_floating_point() and "embed_positions" not in name and not name.endswith("inited"):
            x.normal_(std=x.shape[-1] ** -0.5 if x.dim() > 1 and "embed" not in name else 0.5)


def published(channels=1, width=32, **t5):
    """A MusicgenForConditionalGeneration of small dimensions with random weights."""
    text = transformers.T5Config(vocab_size=80, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                                 relative_attention_num_buckets=8, relative_attention_max_distance=20, **t5)
    codec = transformers.EncodecConfig(target_bandwidths=[1.0], sampling_rate=16000, hidden_size=16, num_filters=4, codebook_size=32,
                                       upsampling_ratios=[8, 5, 4, 2], use_causal_conv=False, use_conv_shortcut=False)
    decoder = transformers.MusicgenDecoderConfig(vocab_size=32, hidden_size=width, num_hidden_layers=3, ffn_dim=4 * width,
                                                 num_attention_heads=2, num_codebooks=4 * channels, audio_channels=channels,
                                                 pad_token_id=32, bos_token_id=32)
    torch.manual_seed(0)
    config = transformers.MusicgenConfig.from_sub_models_config(text, codec, decoder)
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    randomise(model)
    return model


def save(model, folder, **kwargs):
    """The folder that transformers writes, and T5's pieces, which the published ones have beside it."""
    model.save_pretrained(folder, **kwargs)
    (folder / "spiece.model").write_bytes(PIECES)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["mono", "stereo"])
def pair(request, tmp_path_factory):
    """(theirs, ours as a MusicGenerator, folder)."""
    if transformers is None:
        pytest.skip(f"needs transformers: pip install transformers=={VERSION}")
    theirs = published(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / "model")
    return theirs, MusicGenerator.load(folder), folder


@torch.no_grad()
def test_text_encoder(pair):
    theirs, ours, _ = pair
    part = ours.model.conditioner.parts["text"]
    ids, mask = part.prepare(WORDS)
    wanted = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    assert (part.encoder(ids, mask) - wanted)[mask].abs().max() < 1e-5
    wanted = theirs.enc_to_dec_proj(wanted) * mask[..., None]
    assert (part(ids, mask)[0] - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_logits_at_every_position(pair):
    """A batch of texts of several lengths and a null one: padding is masked there as it is here."""
    theirs, ours, _ = pair
    model = ours.model
    K, card = model.config.K, model.config.card
    seq = torch.randint(0, card + 1, (5, K, 40), generator=torch.Generator().manual_seed(1))
    ids, mask = model.conditioner.parts["text"].prepare(WORDS + [None])
    hidden = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    wanted = theirs(encoder_outputs=(hidden,), attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1)).logits
    found = model.logits(seq, model.conditioner({"text": (ids, mask)}))
    assert (found.flatten(0, 1) - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp_min(1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [320, 6400, 5001])
def test_codec(pair, samples):
    theirs, ours, folder = pair
    codec = tokenizer.load_codec(str(folder))
    wav = torch.randn(3, 1, samples, generator=torch.Generator().manual_seed(samples)) * 0.3
    codes = theirs.audio_encoder.encode(wav).audio_codes[0]
    assert torch.equal(codec.encode(wav), codes) and len(codes.unique()) > 5
    assert (codec.decode(codes) - theirs.audio_encoder.decode(codes[None], [None])[0]).abs().max() < 1e-5
    assert ours.codec.channels == ours.codec.lanes == theirs.config.decoder.audio_channels


@torch.no_grad()
def greedy(theirs, ids, mask, T: int, guidance: float = 3.0) -> torch.Tensor:
    """Codes [B,K,T] that transformers generates. A sequence of T frames has T + levels steps with the first, which is special."""
    channels, K = theirs.config.decoder.audio_channels, theirs.config.decoder.num_codebooks
    seen, decode = [], theirs.audio_encoder.decode
    theirs.audio_encoder.decode = lambda codes, **kwargs: seen.append(codes[0]) or decode(codes, **kwargs)
    try:
        theirs.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, guidance_scale=guidance, max_length=T + K // channels)
    finally:
        del theirs.audio_encoder.decode
    return torch.stack(seen, 2).flatten(1, 2)                                                           # [B, K, T]


def test_greedy_generation_with_guidance(pair):
    """The same tokens over 100 frames, of a batch whose texts are of several lengths."""
    theirs, ours, _ = pair
    ids, mask = ours.model.conditioner.parts["text"].prepare(WORDS)
    wanted = greedy(theirs, ids, mask, 100)
    found = generate_codes(ours.model, [{"text": t} for t in WORDS], 100, Sampling(cfg=3, temperature=0))
    assert torch.equal(found, wanted) and len(found.unique()) > 10
    assert not torch.equal(found, generate_codes(ours.model, [{"text": t} for t in WORDS], 100, Sampling(cfg=1, temperature=0)))


# ---------------------------------------------------------------------------------------------------------------------
# folders: every way they are written, and what is wrong with them


@needs_transformers
def test_shards_and_pickles_and_old_weight_norms(tmp_path):
    """One file, several, torch's own format, and the names of before parametrizations give the same tensors."""
    theirs = published()
    whole = convert.read(save(theirs, tmp_path / "whole"))
    folder = save(theirs, tmp_path / "shards", max_shard_size="60kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "whole", pickled)
    (pickled / "model.safetensors").unlink()
    state = {k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v
             for k, v in theirs.state_dict().items()}                # with the copy of T5's embedding
    torch.save(state, pickled / "pytorch_model.bin")
    for other in (folder, pickled):
        found = convert.read(other)
        assert found["codec"]["fingerprint"] == whole["codec"]["fingerprint"]
        assert found["model"].keys() == whole["model"].keys()
        assert all(torch.equal(x, found["model"][name]) for name, x in whole["model"].items())
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)               # as before torch 1.6
    assert torch.equal(convert.read(pickled)["model"]["out_norm.bias"], whole["model"]["out_norm.bias"])


@needs_transformers
@torch.no_grad()
def test_text_as_wide_as_the_model_has_no_projection(tmp_path):
    theirs = published(width=24)
    assert not hasattr(theirs, "enc_to_dec_proj")
    ours = MusicGenerator.load(save(theirs, tmp_path / "hf"))
    ids, mask = ours.model.conditioner.parts["text"].prepare(WORDS[:1])
    wanted = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    assert (ours.model.conditioner({"text": (ids, mask)}).cross - wanted).abs().max() < 1e-5


class Evil:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@needs_transformers
def test_wrong_folders_are_refused_with_one_line(tmp_path, capsys):
    source = save(published(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    state = published().state_dict()

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder)
        return folder

    def edit(part, **changes):
        def change(folder):
            new = json.loads(json.dumps(config))
            (new[part] if part else new).update(changes)
            (folder / "config.json").write_text(json.dumps(new))
        return change

    def weights_of(content, name="pytorch_model.bin"):
        def change(folder):
            (folder / "model.safetensors").unlink()
            torch.save(content, folder / name)
        return change

    def cut(name, size):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    def evil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))

    cases = [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors, model.safetensors.index.json"),
        (lambda f: (f / "spiece.model").unlink(), "spiece.model: no such file"),
        (cut("spiece.model", 50), "not a sentencepiece model"),
        (cut("config.json", 99), "not readable as JSON"),
        (cut("model.safetensors", 5000), "not a safetensors file, or truncated"),
        (cut("model.safetensors", 200_000), "not a safetensors file, or truncated"),
        (edit(None, model_type="llama"), "'llama', 'musicgen' was expected"),
        (edit("text_encoder", feed_forward_proj="gated-gelu"), "feed_forward_proj gated-gelu"),
        (edit("text_encoder", model_type="bert"), "'bert', 't5' was expected"),
        (edit("audio_encoder", model_type="dac"), "'dac', EnCodec was expected"),
        (edit("audio_encoder", num_filters=8), "of another shape"),
        (edit("audio_encoder", target_bandwidths=[0.5]), "has 1 to 2"),
        (edit("decoder", num_hidden_layers=4), "missing: decoder.model.decoder.layers.3."),
        (edit("decoder", num_hidden_layers=2), "unexpected: decoder.model.decoder.layers.2."),
        (edit("decoder", hidden_size=64, ffn_dim=256), "of another shape"),
        (edit("decoder", activation_function="relu"), "activation_function relu, gelu was expected"),
        (edit("decoder", num_codebooks="4"), "not that of a MusicGen"),
        (edit("text_encoder", d_kv="8"), "makes no model"),
        (weights_of({k: v for k, v in state.items() if "lm_heads.1" not in k}), "1 missing: decoder.lm_heads.1.weight"),
        (weights_of({**state, "extra": torch.zeros(1)}), "1 unexpected: extra"),
        (weights_of([1, 2]), "not a file of tensors by name"),
        (evil, "not a file of plain tensors"),
        (lambda f: (f / "model.safetensors").rename(f / "x") and (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x"}}'), "not an index of shards"),
    ]
    for change, says in cases:
        folder = broken(change)
        assert convert.main([str(folder)]) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and error.startswith("convert.py: "), (says, error)
    assert not (tmp_path / "owned").exists()
    assert convert.main([str(source)]) == 0 and "4 x 32 codes" in capsys.readouterr().out


def test_a_published_name_says_how_to_get_it(monkeypatch):
    """Without huggingface_hub, one line with the command."""
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="hf download facebook/musicgen-small --local-dir musicgen-small"):
        convert.locate("facebook/musicgen-small")


@pytest.mark.parametrize("size, millions", [("small", 420), ("medium", 1839), ("large", 3257)])
def test_full_sizes(size, millions):
    """Names and shapes of the published sizes, without allocating them: parameters with T5-base's projection, SPEC L6."""
    c = ConditionerConfig(text_vocab=32128, text_dim=768, text_layers=12, text_heads=12, text_head_dim=64, text_hidden=3072)
    model = convert.skeleton(ModelConfig(**train.SIZES[size]), c, {"text": PIECES})
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if ".encoder." not in name}
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6) == millions
    D = train.SIZES[size]["dim"]
    assert shapes["emb.3.weight"] == (2049, D) and shapes["linears.3.weight"] == (2048, D)
    assert shapes["transformer.layers.0.cross_attention.in_proj_weight"] == (3 * D, D)
    assert shapes["conditioner.parts.text.output_proj.weight"] == (D, 768)
    theirs = [n for name in model.state_dict() for n in convert.rename(name)]
    assert len(set(theirs)) == len(theirs) == len(model.state_dict()) + 4 * train.SIZES[size]["num_layers"]


# ---------------------------------------------------------------------------------------------------------------------
# commands


@needs_transformers
def test_generate_and_round_trip_from_a_folder(pair, tmp_path, capsys):
    _, ours, folder = pair
    assert generate.main(["--model", str(folder), "--prompt", "slow organ", "--seconds", "0.4", "--out", str(tmp_path / "g")]) == 0
    wav = tokenizer.read_audio(tmp_path / "g" / "000.wav")
    assert wav.shape == (ours.codec.channels, 6400)
    assert tokenizer.main([str(tmp_path / "g" / "000.wav"), str(tmp_path / "back.wav"), "--codec", str(folder)]) == 0
    assert "4 x 32 codes" in capsys.readouterr().out


TINY = ["--dataset", "toy", "--updates_per_epoch", "4", "--epochs", "1", "--batch_size", "4", "--valid_samples", "4", "--eval_samples", "1",
        "--generate_samples", "1", "--warmup_steps", "0", "--lr", "1e-3", "--dtype", "float32", "--device", "cpu"]


@needs_transformers
def test_fine_tuning_changes_what_is_trainable_alone(tmp_path, capsys):
    """A run from a folder: T5 stays bit for bit and out of the optimiser; it is resumed, and another starts from it."""
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = convert.read(folder)["model"]
    command = [*TINY, "--init_from", str(folder), "--out", str(out)]
    assert train.main(command) == 0, capsys.readouterr().err
    data = convert.read_deployment(out)
    frozen = {name for name in before if ".encoder." in name}
    same = {name for name, x in data["model"].items() if torch.equal(x, before[name])}
    assert frozen and same == frozen
    saved = torch.load(out / "last.pt", weights_only=True)
    assert not any(name in key for key in saved["names"] if key.startswith("optimizer/") for name in frozen)
    assert data["conditioner_config"]["text_frozen"] and data["codec"]["name"] == str(folder)
    assert train.main([*command, "--epochs", "2"]) == 0 and "going on from step 4" in capsys.readouterr().out
    again = [*command[:-1], str(tmp_path / "second")]
    again[again.index("--init_from") + 1] = str(out)
    assert train.main([*again, "--codec", str(folder)]) == 2         # no --size has this shape: it says so
    assert "does not fit" in capsys.readouterr().err


@needs_transformers
def test_fine_tuning_t5_as_well(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = convert.read(folder)["model"]
    assert train.main([*TINY, "--init_from", str(folder), "--out", str(out), "--no-freeze_text_encoder"]) == 0, capsys.readouterr().err
    data = convert.read_deployment(out)
    assert not data["conditioner_config"]["text_frozen"]
    assert not any(torch.equal(x, before[name]) for name, x in data["model"].items())


@needs_transformers
def test_stereo_fine_tuning_from_mono(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    assert train.main([*TINY, "--init_from", str(folder), "--out", str(out), "--channels", "2"]) == 0, capsys.readouterr().err
    assert convert.read_deployment(out)["model_config"]["K"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# out


def write(source, to, out, capsys, *more) -> str:
    """Runs convert.py, which must succeed; what it printed."""
    assert convert.main([str(source), "--to", to, "--out", str(out), *more]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@needs_transformers
def test_in_and_out_is_the_identity(pair, tmp_path, capsys):
    """On every tensor of the folder: names, shapes and values; and the configuration that transformers reads is the same."""
    theirs, _, folder = pair
    printed = write(folder, "hf", tmp_path / "out", capsys)
    assert "wrote" in printed and "note" not in printed
    before, after = (convert.weights.hf_tensors(f) for f in (folder, tmp_path / "out"))
    assert before.shapes == after.shapes
    assert all(torch.equal(before[name], after[name]) for name in before.shapes)
    loaded = transformers.MusicgenForConditionalGeneration.from_pretrained(tmp_path / "out")
    for part in ("text_encoder", "audio_encoder", "decoder"):
        ours, wanted = (getattr(m.config, part).to_dict() for m in (loaded, theirs))
        free = {"_name_or_path", "dtype", "torch_dtype", "architectures", "dropout", "dropout_rate", "decoder_start_token_id", "use_cache",
                "initializer_factor", "is_encoder_decoder", "transformers_version"}
        assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in wanted.items() if k not in free}
    write(folder, "nano", tmp_path / "nano", capsys)
    write(tmp_path / "nano", "hf", tmp_path / "again", capsys)
    again = convert.weights.hf_tensors(tmp_path / "again")
    assert again.shapes == before.shapes and all(torch.equal(before[name], again[name]) for name in before.shapes)


@needs_transformers
@pytest.mark.parametrize("channels", [1, 2])
def test_a_trained_run_generates_the_same_in_transformers(tmp_path, capsys, channels):
    """A toy run with its own vocabulary and the toy codec, whose graph has no LSTM: text, tokens, codes and audio."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--fuse", "text=cross", "--out", str(out), "--channels", str(channels)]) == 0
    write(out, "hf", tmp_path / "hf", capsys)
    theirs, info = transformers.MusicgenForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    music, texts = MusicGenerator.load(out), ["a slow deep organ tune in D major with drums", "bells, fast"]
    tokens = transformers.T5Tokenizer.from_pretrained(tmp_path / "hf")(texts, padding=True, return_tensors="pt")
    ids, mask = music.model.conditioner.parts["text"].prepare(texts)
    assert torch.equal(tokens.input_ids, ids) and torch.equal(tokens.attention_mask.bool(), mask)
    codes = generate_codes(music.model, [{"text": t} for t in texts], 60, Sampling(cfg=3, temperature=0))
    assert torch.equal(greedy(theirs.eval(), ids, mask, 60), codes)
    with torch.no_grad():
        mono = tokenizer.load_codec("toy")
        audio = torch.randn(2, 1, 8000) * 0.2
        assert torch.equal(theirs.audio_encoder.encode(audio).audio_codes[0], mono.encode(audio))
        sound = theirs.audio_encoder.decode(codes[None, :, ::channels], [None])[0]
        assert (sound - mono.decode(codes[:, ::channels])).abs().max() < 1e-4
    settings = theirs.generation_config
    assert settings.top_k == 50 and settings.guidance_scale == 1.0 and settings.max_length == convert.read_deployment(out)["segment_frames"] + 4


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
    """With every reason, in one line; and nothing is overwritten."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--pattern", "parallel", "--out", str(out)]) == 0
    capsys.readouterr()
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "text=cross+sum" in error and "parallel" in error and error.count("\n") == 1 and not (tmp_path / "hf").exists()
    assert convert.main([str(out), "--to", "hf", "--out", str(out)]) == 2 and "is there already" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "none"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "no best.pt" in capsys.readouterr().err
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf"), "--codec", str(tmp_path / "gone.pt")]) == 2
    assert "gone.pt" in capsys.readouterr().err
