"""Published models generate, are tuned and go out again; runs of ours go out, or are refused with reasons."""

import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import generate
import tokenizer
import train
from generate import MusicGenerator, Sampling, generate_codes
from interop import convert, load, t5
from interop.tensors import open_hf_folder
from foreign import pair_fixture, tuned_fixture  # noqa: F401, pytest finds them by their names
from foreign import TINY, greedy, needs_transformers, published, save, transformers, tune, write
from support import audio, common


def test_a_published_name_says_how_to_get_it(monkeypatch):
    """Without huggingface_hub, one line with the command."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="hf download facebook/musicgen-small --local-dir musicgen-small"):
        load.locate("facebook/musicgen-small")


WHOLE = ("config.json", "model.safetensors")


def cached(cache, name: str, commits: str, main: str | None, files=WHOLE) -> Path:
    """A folder of the hub's cache as huggingface_hub writes it: snapshots of links into blobs."""
    top = cache / f"models--{name.replace('/', '--')}"
    (top / "blobs").mkdir(parents=True)
    for commit in commits:
        (top / "snapshots" / commit).mkdir(parents=True)
        for file in files:
            (top / "blobs" / file).write_text("{}")
            (top / "snapshots" / commit / file).symlink_to(f"../../blobs/{file}")
    if main is not None:
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(main)
    return top


def test_names_of_the_hub_are_found_in_its_cache(tmp_path, monkeypatch):
    """Of anybody, wherever the environment says that it lies, and by the folder's top."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    places = [("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"), ("HF_HOME", "home", "home/hub"),
              ("HF_HUB_CACHE", "hub", "hub")]
    for variable, folder, cache in places:
        monkeypatch.setenv(variable, str(tmp_path / folder))
        top = cached(tmp_path / cache, f"some-one/{variable}", "ab", "b\n")
        for name in (f"some-one/{variable}", top):
            assert load.locate(name) == top / "snapshots" / "b"
    cache = tmp_path / "hub"
    assert load.locate(cached(cache, "a/only", "c", None)).name == "c"
    with pytest.raises(ValueError, match="refs/main names no snapshot that is there .there: a, b.: give"):
        load.locate(cached(cache, "a/none_chosen", "ab", "c"))
    cached(cache, "a/half", "c", "c", files=["config.json"])
    for name in ("a/half", "a/unknown"):
        with pytest.raises(ValueError, match=f"{name}: no such .* not in the cache .*hf download {name} "):
            load.read_model(name)
    # what begins with a folder that is here is a path
    monkeypatch.chdir(tmp_path)
    cached(cache, "home/run", "c", "c")
    for name in ("home/run", "home/no/run", "../nothing/x", "nothing"):
        with pytest.raises(ValueError, match=f"{name}: no such path, so no best.pt there; .* weights.$"):
            load.read_model(name)


# ----------------------------------------------------------------------------------------------------------
# commands


@needs_transformers
def test_generate_and_round_trip_from_a_folder(pair, tmp_path, capsys):
    _, ours, folder = pair
    command = ["--model", str(folder), "--prompt", "slow organ", "--seconds", "0.4"]
    assert generate.main([*command, "--out", str(tmp_path / "g")]) == 0
    made = tmp_path / "g" / "000.wav"
    assert audio.read_audio(made).shape == (ours.codec.channels, 6400)
    assert tokenizer.main([str(made), str(tmp_path / "back.wav"), "--codec", str(folder)]) == 0
    assert "4 x 32 codes" in capsys.readouterr().out


@needs_transformers
def test_generate_from_a_melody_folder(tuned, tmp_path, capsys):
    """A file to follow, from the command line; refused where it is too short."""
    _, ours, folder = tuned
    audio.write_audio(tmp_path / "in.wav", tune(1.5, rate=22_050), 22_050)
    audio.write_audio(tmp_path / "short.wav", tune(0.4), 16_000)
    command = ["--model", str(folder), "--seconds", "0.4", "--out", str(tmp_path / "g"), "--melody"]
    with_text = [*command, str(tmp_path / "in.wav"), "--prompt", "slow organ"]
    assert generate.main(with_text) == 0, capsys.readouterr().err
    assert generate.main([*command, str(tmp_path / "in.wav")]) == 0
    assert audio.read_audio(tmp_path / "g" / "001.wav").shape == (ours.codec.channels, 6400)
    assert generate.main([*command, str(tmp_path / "short.wav")]) == 2
    assert "at least 0.512 s" in capsys.readouterr().err


@needs_transformers
def test_fine_tuning_changes_what_is_trainable_alone(tmp_path, capsys):
    """A run from a folder: T5 stays bit for bit and out of the optimizer.

    The run is resumed, and another starts from it."""
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = load.read_published(folder)["model"]
    command = [*TINY, "--init_from", str(folder), "--out", str(out)]
    assert train.main(command) == 0, capsys.readouterr().err
    data = load.read_model(out)
    frozen = {name for name in before if ".encoder." in name}
    same = {name for name, x in data["model"].items() if torch.equal(x, before[name])}
    assert frozen and same == frozen
    saved = torch.load(out / "last.pt", weights_only=True)
    assert not any(name in key for key in saved["names"] if key.startswith("optimizer/") for name in frozen)
    assert data["conditioner_config"]["text_frozen"] and data["codec"]["name"] == str(folder)
    assert train.main([*command, "--epochs", "2"]) == 0 and "going on from step 4" in capsys.readouterr().out
    again = [*command[:-1], str(tmp_path / "second")]
    again[again.index("--init_from") + 1] = str(out)
    # no --size has this shape: it is taken from there
    assert train.main([*again, "--codec", str(folder)]) == 0


@needs_transformers
def test_fine_tuning_t5_as_well(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = load.read_published(folder)["model"]
    command = [*TINY, "--init_from", str(folder), "--out", str(out), "--no-freeze_text_encoder"]
    assert train.main(command) == 0, capsys.readouterr().err
    data = load.read_model(out)
    assert not data["conditioner_config"]["text_frozen"]
    assert not any(torch.equal(x, before[name]) for name, x in data["model"].items())


@needs_transformers
def test_stereo_fine_tuning_from_mono(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    command = [*TINY, "--init_from", str(folder), "--out", str(out), "--channels", "2"]
    assert train.main(command) == 0, capsys.readouterr().err
    assert load.read_model(out)["model_config"]["K"] == 8


# ----------------------------------------------------------------------------------------------------------
# out


def test_in_and_out_is_the_identity(pair, tmp_path, capsys):
    """On every tensor of the folder: names, shapes and values. transformers reads the same configuration."""
    theirs, _, folder = pair
    assert "note" not in check_identity(theirs, folder, tmp_path, capsys)


def test_in_and_out_is_the_identity_with_melody(tuned, tmp_path, capsys):
    theirs, _, folder = tuned
    assert "turns use_cache off" in check_identity(theirs, folder, tmp_path, capsys)


def check_identity(theirs, folder, tmp_path, capsys) -> str:
    """Asserts it of a folder; what the converter printed."""
    printed = write(folder, "hf", tmp_path / "out", capsys)
    before, after = (open_hf_folder(f) for f in (folder, tmp_path / "out"))
    assert before.shapes == after.shapes
    assert all(torch.equal(before[name], after[name]) for name in before.shapes)
    loaded = type(theirs).from_pretrained(tmp_path / "out")
    assert all(getattr(loaded.config, name, None) == getattr(theirs.config, name, None)
               for name in ("num_chroma", "chroma_length"))
    for part in ("text_encoder", "audio_encoder", "decoder"):
        ours, wanted = (getattr(m.config, part).to_dict() for m in (loaded, theirs))
        free = {"_name_or_path", "dtype", "torch_dtype", "architectures", "dropout", "dropout_rate",
                "decoder_start_token_id", "use_cache", "initializer_factor", "is_encoder_decoder",
                "transformers_version"}
        ours, wanted = ({k: v for k, v in c.items() if k not in free} for c in (ours, wanted))
        assert ours == wanted
    write(folder, "nano", tmp_path / "nano", capsys)
    write(tmp_path / "nano", "hf", tmp_path / "again", capsys)
    again = open_hf_folder(tmp_path / "again")
    assert again.shapes == before.shapes
    assert all(torch.equal(before[name], again[name]) for name in before.shapes)
    return printed


@needs_transformers
@pytest.mark.parametrize("conditions", [["text"], ["text", "melody"]], ids=["text", "melody"])
def test_in_one_step_and_out_changes_exactly_what_is_trainable(tmp_path, capsys, conditions):
    """Every tensor but T5's and the codec's, which are the same bit for bit. The run goes on."""
    folder, run = save(published(melody="melody" in conditions), tmp_path / "hf"), tmp_path / "run"
    command = [*TINY, "--init_from", str(folder), "--conditions", *conditions, "--updates_per_epoch", "1",
               "--out", str(run)]
    assert train.main(command) == 0, capsys.readouterr().err
    write(run, "hf", tmp_path / "out", capsys)
    before, after = (open_hf_folder(f) for f in (folder, tmp_path / "out"))
    assert before.shapes == after.shapes
    changed = {name for name in before.shapes if not torch.equal(before[name], after[name])}
    frozen = ("text_encoder.", "audio_encoder.")
    assert changed == {name for name in before.shapes if not name.startswith(frozen)}
    assert {"enc_to_dec_proj.bias", "decoder.lm_heads.3.weight"} < changed
    assert ("audio_enc_to_dec_proj.weight" in changed) == ("melody" in conditions)
    assert train.main([*command, "--epochs", "2"]) == 0 and "going on from step 1" in capsys.readouterr().out


@needs_transformers
@pytest.mark.parametrize("channels", [1, 2])
def test_a_trained_run_generates_the_same_in_transformers(tmp_path, capsys, channels):
    """Text, tokens, codes and audio of a run with its own vocabulary and the toy codec, which has no LSTM."""
    out = tmp_path / "run"
    command = [*TINY, "--size", "debug", "--fuse", "text=cross", "--channels", str(channels)]
    assert train.main([*command, "--out", str(out)]) == 0
    write(out, "hf", tmp_path / "hf", capsys)
    kind = transformers.MusicgenForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    music, texts = MusicGenerator.load(out), ["a slow deep organ tune in D major with drums", "bells, fast"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = words(texts, padding=True, return_tensors="pt")
    ids, mask = music.model.conditioner.parts["text"].prepare(texts)
    assert torch.equal(tokens.input_ids, ids) and torch.equal(tokens.attention_mask.bool(), mask)
    codes = generate_codes(music.model, [{"text": t} for t in texts], 60, Sampling(cfg=3, temperature=0))
    assert torch.equal(greedy(theirs.eval(), ids, mask, 60), codes)
    with torch.no_grad():
        mono = tokenizer.load_codec("toy")
        noise = torch.randn(2, 1, 8000) * 0.2
        assert torch.equal(theirs.audio_encoder.encode(noise).audio_codes[0], mono.encode(noise))
        sound = theirs.audio_encoder.decode(codes[None, :, ::channels], [None])[0]
        assert (sound - mono.decode(codes[:, ::channels])).abs().max() < 1e-4
    settings = theirs.generation_config
    assert settings.top_k == 50 and settings.guidance_scale == 1.0
    assert settings.max_length == 84      # 1.6 s and the delays


def test_a_folder_that_is_read_back_keeps_window_and_sampling(tmp_path, monkeypatch):
    """Exactly, and 55 frames are 1.1 s, of which 50 times are more than 55 in floating point."""
    pytest.importorskip("safetensors")
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--fuse", "text=cross", "--updates_per_epoch", "1",
                       "--freeze_text_encoder", "--out", str(out)]) == 0
    data = load.read_model(out)
    shape = tuple(data["conditioner_config"][name] for name in t5.SHAPE_FIELDS)
    monkeypatch.setitem(t5.PUBLISHED_T5, shape, "t5-toy")
    common.write_json(tmp_path / "config.json", t5.t5_config(data["conditioner_config"]))
    asked = [(55, Sampling(1.0, 0.3, 50)), (80, Sampling(-2.5, 0.9, 0, 0.8)), (1, Sampling(0.0, 0.0, 250))]
    for frames, sampling in asked:
        data |= dict(segment_frames=frames, sampling=asdict(sampling))
        folder, package = tmp_path / f"hf_{frames}", tmp_path / f"package_{frames}"
        convert.write_model(data, "hf", folder)
        convert.write_model(data, "audiocraft", package)
        found = load.read_model(folder)
        assert (found["segment_frames"], Sampling(**found["sampling"])) == (frames, sampling)
        found = load.read_published_config(package, tmp_path)
        assert round(found.segment_seconds * 16_000) / 320 == frames
        assert Sampling(**found.sampling) == sampling

    # without them it is as the published ones are
    ours = ("segment_seconds", "temperature", "top_k", "top_p", "do_sample", "guidance_scale")
    for name in ("config.json", "generation_config.json"):
        known = common.read_json(folder / name)
        common.write_json(folder / name, {k: v for k, v in known.items() if k not in ours})
    found = load.read_model(folder)
    assert found["segment_frames"] == 1500 and Sampling(**found["sampling"]) == Sampling()
    for name, value in (("temperature", "hot"), ("top_k", -1), ("guidance_scale", math.inf)):
        common.write_json(folder / "generation_config.json", {name: value})
        with pytest.raises(ValueError, match=f"its {name} is {value!r}, a .*number from"):
            load.read_model(folder)


def melody_run(out, *more) -> Path:
    """A trained run that has melody and text in front of the codes, as the public weights have them."""
    command = [*TINY, "--size", "debug", "--conditions", "text", "melody", "--fuse", "melody=prepend",
               "text=prepend", *more]
    assert train.main([*command, "--out", str(out)]) == 0
    return out


@needs_transformers
def test_a_trained_melody_run_generates_the_same_in_transformers(tmp_path, capsys):
    """Their processor reads text and audio from the folder; its own settings of generation hear both."""
    out = melody_run(tmp_path / "run", "--no-mask_padding")
    write(out, "hf", tmp_path / "hf", capsys)
    kind = transformers.MusicgenMelodyForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    music, texts = MusicGenerator.load(out), ["a slow deep organ tune in D major with drums", "bells, fast"]
    for seconds in (0.8, 1.6):
        wavs = [tune(seconds, seed) for seed in range(2)]
        given = words(texts, padding=True, return_tensors="pt")
        heard = features([w[0].numpy() for w in wavs], sampling_rate=16_000, return_tensors="pt")
        wanted = greedy(theirs.eval(), given.input_ids, given.attention_mask, 60, **heard)

        def made(melodies: list) -> torch.Tensor:
            values = music.condition_values(texts, melody=melodies)
            return music.codes(values, 60 / 50, sampling=Sampling(cfg=3, temperature=0))

        assert torch.equal(wanted, made(wavs))
        assert not torch.equal(wanted, made(wavs[::-1]))


def test_a_melody_run_that_cannot_be_written(tmp_path, capsys):
    out = melody_run(tmp_path / "run", "--no-melody_argmax")
    capsys.readouterr()
    for target in ("hf", "audiocraft"):
        assert convert.main([str(out), "--to", target, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "no").exists()
        for reason in ("--no-mask_padding", "reads zeros", "all twelve classes"):
            assert reason in error, error


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
    """With every reason, in one line; and nothing is overwritten."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--pattern", "parallel", "--out", str(out)]) == 0
    capsys.readouterr()
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "text=cross+sum" in error and "parallel" in error and error.count("\n") == 1
    assert not (tmp_path / "hf").exists()
    assert convert.main([str(out), "--to", "hf", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "none"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "no best.pt" in capsys.readouterr().err
    gone = ["--codec", str(tmp_path / "gone.pt")]
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf"), *gone]) == 2
    assert "gone.pt" in capsys.readouterr().err


def test_a_folder_appears_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--fuse", "text=cross", "--out", str(out)]) == 0
    pytest.importorskip("safetensors")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(common, "write_json", full)
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "new")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    monkeypatch.undo()
    (tmp_path / "new").mkdir()            # an empty folder may be there
    assert "wrote" in write(out, "hf", tmp_path / "new", capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "run"]
