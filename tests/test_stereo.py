"""Stereo: a mono codec over two channels, its delays, training, generation, the cache, mono starts."""

import functools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
from support import audio, flags
from support.estimate import plan_run
from support.scan import scan_dataset
import generate
from evaluate import reference, stages
from interop import load
import patterns
import tokenizer
import toy
import train
from test_train import SMALL, lines, part, run, saved

ONE_EPOCH = ("--epochs", "1", "--updates_per_epoch", "2")


@pytest.fixture(scope="module")
def mono():
    return tokenizer.load_codec("toy")


@pytest.fixture(scope="module")
def stereo():
    return tokenizer.load_codec("toy", channels=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A mono run and a stereo run."""
    out = tmp_path_factory.mktemp("runs")
    assert run(out / "mono", *ONE_EPOCH) == 0
    eight = ("--epochs", "1", "--updates_per_epoch", "8", "--temperature", "1")      # else it says silence
    assert run(out / "stereo", "--channels", "2", *eight) == 0
    return out


def clips(n: int) -> torch.Tensor:
    """Panned toy clips [B, 2, N]."""
    drawn = [toy.draw_clip(0, 0, i, "valid")[0] for i in range(n)]
    return torch.from_numpy(np.stack([toy.pan(toy.render(c), c, 2) for c in drawn]))


def folder_of_clips(path, n: int) -> str:
    """Panned toy clips as stereo files."""
    path.mkdir()
    for i, wav in enumerate(clips(n)):
        soundfile.write(path / f"clip{i}.wav", wav.T.numpy(), 16_000)
    return str(path)


def codec_file(path, change) -> str:
    """The embedded codec, changed, as a file."""
    stored = torch.load(tokenizer.TOY_FILE, weights_only=True)
    change(stored)
    torch.save(stored, path)
    return str(path)


# ----------------------------------------------------------------------------------------------------------
# the codec


def test_each_channel_makes_its_own_round_trip(mono, stereo):
    wav = clips(3)[..., :-7]                                         # not a whole number of frames
    codes = stereo.encode(wav)                                                                     # [B, 8, T]
    assert codes.shape == (3, 8, 80)
    for c in (0, 1):                                                 # 1L 1R 2L 2R ...
        assert torch.equal(codes[:, c::2], mono.encode(wav[:, c:c + 1]))
        assert torch.equal(stereo.decode(codes)[:, c:c + 1], mono.decode(mono.encode(wav[:, c:c + 1])))
    back = stereo.decode(codes)
    assert back.shape == (3, 2, 25_600) and (back[:, 0] - back[:, 1]).abs().amax(1).min() > 0.05
    same = stereo.encode(wav[:, :1].expand(-1, 2, -1))
    assert torch.equal(same[:, ::2], same[:, 1::2])


def test_what_a_stereo_codec_is(mono, stereo):
    assert (stereo.channels, stereo.K, stereo.levels, stereo.card) == (2, 8, 4, 256)
    assert (stereo.hop, stereo.frame_rate, stereo.name) == (320, 50, "toy")
    assert (mono.channels, mono.K, mono.levels) == (1, 4, 4)         # not changed by the other
    assert stereo.fingerprint == tokenizer.load_codec("toy", channels=2).fingerprint != mono.fingerprint
    assert stereo.with_channels(1).fingerprint == mono.fingerprint
    assert stereo.with_channels(2).fingerprint == stereo.fingerprint
    two = tokenizer.load_codec("toy", 2, channels=2)
    assert two.K == 4 and two.fingerprint not in (mono.fingerprint, stereo.fingerprint)
    wav = clips(1)
    assert torch.equal(two.encode(wav), stereo.encode(wav)[:, :4])   # the coarse levels come first
    with pytest.raises(AssertionError, match="1 channels, the codec toy has 2"):
        stereo.encode(wav[:, :1])


def test_fingerprints_do_not_move(mono, stereo):
    """Runs and caches of before must still be those of these codecs."""
    assert mono.fingerprint[:12] == "e268287f8536" and stereo.fingerprint[:12] == "dbd138e1edfa"


def test_numbers_of_channels_that_no_codec_has(tmp_path):
    with pytest.raises(ValueError, match="--channels 3: the codec toy takes 1 or, each by itself, 2"):
        tokenizer.load_codec("toy", channels=3)

    def two_channels(stored):
        stored["config"]["seanet"]["channels"] = 2
        state = stored["state"]
        for name, x in state.items():                            # the outermost convolutions see two channels
            if name.startswith("encoder.model.0.") and x.dim() == 3:
                state[name] = x.repeat(1, 2, 1)
            elif name.startswith("decoder.model") and x.shape[0] == 1:
                state[name] = x.repeat(2, *[1] * (x.dim() - 1))

    path = codec_file(tmp_path / "two.pt", two_channels)
    with pytest.raises(ValueError, match="--channels 1: the codec .*two.pt takes 2$"):
        tokenizer.load_codec(path)
    codec = tokenizer.load_codec(path, channels=2)                   # serves as it is, nothing is interleaved
    assert (codec.channels, codec.streams, codec.K) == (2, 1, 4)
    assert codec.decode(codec.encode(clips(1))).shape == (1, 2, 25_600)
    args = train.build_parser().parse_args(SMALL + ["--channels", "2"])
    flags.fill_flags(args, 1)
    assert train.model_config(args, codec).delays is None


def test_round_trip_command(tmp_path, capsys):
    soundfile.write(tmp_path / "in.wav", clips(1)[0].T.numpy(), 16_000)
    argv = [str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--channels", "2"]
    assert tokenizer.main(argv) == 0 and "codes [1, 8, 80]" in capsys.readouterr().out
    wav, _ = soundfile.read(tmp_path / "out.wav")
    assert wav.shape == (25_600, 2) and np.abs(wav[:, 0] - wav[:, 1]).max() > 0.05


# ----------------------------------------------------------------------------------------------------------
# pattern, data, cache


@pytest.mark.parametrize("pattern, steps",
                         [("delay", 1 + 100 + 3), ("parallel", 1 + 100), ("unrolled", 1 + 4 * 100)])
def test_left_and_right_of_a_level_stand_at_the_same_step(pattern, steps, stereo):
    args = train.build_parser().parse_args(SMALL + ["--channels", "2", "--pattern", pattern])
    flags.fill_flags(args, 1)
    config = train.model_config(args, stereo)
    layout, one = config.layout(100), patterns.make_pattern(pattern, 100, 4)
    assert config.K == 8 and layout.S == steps == one.S
    assert torch.equal(layout.step[::2], one.step) and torch.equal(layout.step[1::2], one.step)
    assert config.delays == ([0, 0, 1, 1, 2, 2, 3, 3] if pattern == "delay" else None)


def test_drawn(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["patterns.py", "--T", "3", "--K", "2", "--stereo"])
    patterns.main()
    out = capsys.readouterr().out
    assert "    q1L  S 0 1 2 | S\n    q1R  S 0 1 2 | S\n    q2L  S S 0 1 | 2\n    q2R  S S 0 1 | 2\n" in out


def test_toy_clips_are_panned(mono, stereo):
    """Tune to the left, drums to the right, their mean the mono clip; no drums: the left is louder."""
    for i in range(20):
        x, y = (data.ToyDataset(0, "valid", codec).example(0, i) for codec in (mono, stereo))
        assert y.wav.shape == (2, 25_600) and y.meta == x.meta
        assert np.abs(y.wav.mean(0) - x.wav[0]).max() < 1e-6
        if y.meta["toy"]["drums"] == "no":
            assert np.allclose(y.wav[0], 2 * y.wav[1], atol=1e-6)
        elif y.meta["toy"]["drums"] != "snare":
            start = y.wav[:, :320]                                   # a kick stands at the beginning
            assert np.abs(start[1]).sum() > np.abs(start[0]).sum()


def test_files_of_one_and_of_two_channels(tmp_path, stereo):
    soundfile.write(tmp_path / "a.wav", clips(1)[0].T.numpy(), 16_000)
    soundfile.write(tmp_path / "b.wav", clips(1)[0, 0].numpy(), 16_000)
    entries = scan_dataset(str(tmp_path)).entries
    two, one = (data.AudioDataset([e], stereo, 1.0, 0).example(0, 0).wav for e in entries)
    assert two.shape == one.shape == (2, 16_000)
    assert not np.array_equal(two[0], two[1]) and np.array_equal(one[0], one[1])


def test_the_cache_holds_the_codes_of_both_channels(tmp_path, stereo, capsys):
    music, out = folder_of_clips(tmp_path / "music", 7), str(tmp_path / "c")
    assert data.main(["cache", music, "--channels", "2", "--out", out]) == 0
    assert "codebooks at 50 Hz" in capsys.readouterr().out
    whole = dict(split="train", min_segment_ratio=1.0)  # clips from their beginning
    cached = data.open_dataset(music, codec=stereo, cache=out, **whole)
    live = data.open_dataset(music, codec=stereo, **whole)
    for i in range(6):
        x, y = cached.example(0, i), live.example(0, i)
        codes = stereo.encode(torch.from_numpy(y.wav)[None])[0]
        assert x.codes.shape == (8, 80) and x.path == y.path and np.array_equal(x.codes, codes.numpy())
    coarse = data.open_dataset(music, codec=tokenizer.load_codec("toy", 2, channels=2), cache=out, **whole)
    assert np.array_equal(coarse.example(0, 3).codes, cached.example(0, 3).codes[:4])
    assert data.main(["cache", music, "--out", out]) == 2
    assert "another channels, fingerprint, K" in capsys.readouterr().err
    for codec in (tokenizer.load_codec("toy"), tokenizer.load_codec("toy", 4)):
        says = r"holds 8 codebooks of codec toy \(channels 2.*not 4 of toy \(channels 1"
        with pytest.raises(ValueError, match=says):
            data.open_dataset(music, split="train", codec=codec, cache=out)


def test_a_cache_of_before_goes_on(tmp_path, capsys):
    """One that does not say how many channels it has is mono."""
    import json
    music = folder_of_clips(tmp_path / "music", 2)
    command = ["cache", music, "--out", str(tmp_path / "c")]
    assert data.main(command) == 0
    settings = json.loads((tmp_path / "c" / "cache.json").read_text())
    del settings["channels"]
    (tmp_path / "c" / "cache.json").write_text(json.dumps(settings))
    assert data.main(command) == 0 and data.main([*command, "--channels", "2"]) == 2
    assert "another channels" in capsys.readouterr().err
    data.open_dataset(music, split="train", codec=tokenizer.load_codec("toy"), cache=str(tmp_path / "c"))


# ----------------------------------------------------------------------------------------------------------
# training, generation


def test_training_and_generating(runs, tmp_path):
    assert {f"ce_q{k}" for k in range(1, 9)} <= lines(runs / "stereo")[0].keys()
    assert saved(runs / "stereo")["best_values"]["ce"] < lines(runs / "stereo")[0]["ce"] - 0.3
    wav, rate = soundfile.read(runs / "stereo" / "samples" / "epoch_0001" / "000_unprompted.wav")
    assert wav.shape == (25_600, 2) and rate == 16_000 and np.abs(wav[:, 0] - wav[:, 1]).max() > 0.01
    flags = ["--run", str(runs / "stereo"), "--prompt", "a slow organ tune", "--out", str(tmp_path)]
    assert generate.main([*flags, "--seconds", "3", "--stride", "1"]) == 0                       # two windows
    info = soundfile.info(tmp_path / "000.wav")
    assert info.channels == 2 and info.duration == 3


@pytest.mark.parametrize("channels", (1, 2))
def test_continuing(channels, runs, tmp_path, stereo):
    """The beginning is the file, through the codec: mono in both channels."""
    prompt = clips(1)[0, :channels, :16_000]
    soundfile.write(tmp_path / "in.wav", prompt.T.numpy(), 16_000, subtype="FLOAT")
    flags = ["--run", str(runs / "stereo"), "--unconditional", "--continue", str(tmp_path / "in.wav")]
    assert generate.main([*flags, "--seconds", "2", "--out", str(tmp_path / "out")]) == 0
    wav = audio.read_audio(tmp_path / "out" / "000.wav")  # [2, N]
    wanted = stereo.decode(stereo.encode(prompt.expand(2, -1)[None]))[0]
    assert (wav[:, :14_000] - wanted[:, :14_000]).abs().max() < 1e-3
    assert torch.equal(wav[0, :14_000], wav[1, :14_000]) == (channels == 1)


def test_runs_of_before_are_mono(runs, tmp_path):
    old = load.read_model(runs / "mono")
    old["codec"] = {name: old["codec"][name] for name in ("name", "K", "fingerprint")}
    torch.save(old, tmp_path / "best.pt")
    music = generate.MusicGenerator.load(tmp_path)
    assert music.codec.channels == 1 and music.generate([None], seconds=0.2).shape == (1, 1, 3200)


def test_a_run_goes_on_with_its_channels_only(runs, capsys):
    assert run(runs / "mono", "--channels", "2", *ONE_EPOCH) == 2
    assert "--channels 1 there, 2 now" in capsys.readouterr().err


def test_the_reference_run_is_no_measure_of_stereo(runs, tmp_path, monkeypatch, capsys):
    """All flags but the channels are the same. Runs of more codebooks or other weights do not compare."""
    import json
    records = [dict(args=dict(dataset="toy", size="debug")), *lines(runs / "mono")]
    (tmp_path / "reference_run.jsonl").write_text("\n".join(map(json.dumps, records)))
    curve = functools.partial(reference.reference_curve, folder=tmp_path)
    monkeypatch.setattr(stages, "reference_curve", curve)
    for name, more, beside in (("a", [], True), ("b", ["--channels", "2"], False),
                               ("c", ["--init_from", str(runs / "mono")], False)):
        assert run(tmp_path / name, *more, *ONE_EPOCH) == 0
        assert ("beside the reference run" in capsys.readouterr().out) == beside


@pytest.mark.parametrize("pattern", ("parallel", "unrolled"))
def test_other_patterns_train(pattern, tmp_path):
    assert run(tmp_path, "--channels", "2", "--pattern", pattern, "--num_codebooks", "2",
               "--eval_samples", "1", *ONE_EPOCH) == 0
    music = generate.MusicGenerator.load(tmp_path)
    assert music.codec.K == 4 and music.generate(["x"], seconds=0.2).shape == (1, 2, 3200)


def test_the_estimate_counts_all_codebooks(mono, stereo):
    args = [train.build_parser().parse_args(SMALL + ["--channels", str(c)]) for c in (1, 2)]
    for a in args:
        flags.fill_flags(a, 1)
    one, two = (plan_run(a, train.model_config(a, c), 100, 1, 1e12) for a, c in zip(args, (mono, stereo)))
    # four more embeddings and heads of width 64; the activations are the gradients of the heads
    assert two.parameters - one.parameters == 4 * (257 + 256) * 64
    more = two.memory["activations"] - one.memory["activations"]
    assert more == pytest.approx(4 * 4 * 256 * 64 / 2 ** 30)
    assert two.flops > one.flops


# ----------------------------------------------------------------------------------------------------------
# starting from other weights


def test_a_mono_start_gives_the_same_audio_in_both_channels(runs, tmp_path, monkeypatch):
    """Before the first update; and what it says of two equal channels is what the mono model says of one."""
    seen = {}
    monkeypatch.setattr(train, "run_epochs", lambda run: seen.update(run=run))
    assert run(tmp_path, "--channels", "2", "--init_from", str(runs / "mono")) == 0
    model, source = seen["run"].model.eval(), load.build_model(load.read_model(runs / "mono"))
    assert model.conditioner.assets == source.conditioner.assets
    greedy = generate.Sampling(cfg=1, temperature=0)
    texts = [{"text": "a slow organ tune"}, {"text": None}]
    codes, one = (generate.generate_codes(m, texts, 30, greedy) for m in (model, source))
    assert torch.equal(codes[:, ::2], codes[:, 1::2]) and torch.equal(codes[:, ::2], one)
    music = generate.MusicGenerator(model, seen["run"].codec, 100, greedy)
    wav = music.generate(["fast bells"], seconds=1)
    assert wav.shape == (1, 2, 16_000) and torch.equal(wav[:, 0], wav[:, 1]) and wav.abs().max() > 0
    with torch.no_grad():
        logits = model.predict(one.repeat_interleave(2, 1))[0]       # [B, 8, T, card]
        wanted = source.predict(one)[0].repeat_interleave(2, 1)
    assert torch.allclose(logits.nan_to_num(), wanted.nan_to_num(), atol=1e-4)


def test_a_start_with_the_same_channels(runs, tmp_path):
    """The weights of best.pt as they are: after one update of nearly nothing they still are."""
    for name in ("mono", "stereo"):
        flags = ["--channels", "1" if name == "mono" else "2", "--init_from", str(runs / name / "best.pt"),
                 "--epochs", "1", "--updates_per_epoch", "1", "--lr", "1e-9", "--text_lr", "1e-9"]
        assert run(tmp_path / name, *flags) == 0
        before, after = load.read_model(runs / name)["model"], part(saved(tmp_path / name), "model")
        assert before.keys() == after.keys()
        assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-6


def test_a_resumed_run_ignores_where_it_started(runs, tmp_path, capsys):
    import shutil
    shutil.copytree(runs / "mono", tmp_path / "start")
    flags = ["--channels", "2", "--updates_per_epoch", "2"]
    assert run(tmp_path / "run", *flags, "--epochs", "1", "--init_from", str(tmp_path / "start")) == 0
    assert "starting with the weights" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "start")
    assert run(tmp_path / "run", *flags, "--epochs", "2", "--init_from", str(tmp_path / "start")) == 0
    out = capsys.readouterr().out
    assert "going on from step 2" in out and "starting with" not in out
    assert torch.equal(saved(tmp_path / "run")["assets"]["text"], saved(runs / "mono")["assets"]["text"])


@pytest.mark.parametrize("start, flags, says", [
    ("mono", "--size tiny", "dim 64 there, 192 here"),
    ("mono", "--channels 2 --size tiny", "num_layers 2 there, 4 here"),
    ("mono", "--no_text", "conditions {'text': 'cross+sum'} there, None here"),
    ("mono", "--fuse text=prepend", "conditions {'text': 'cross+sum'} there"),
    ("mono", "--pattern parallel", "pattern delay there, parallel here"),
    ("mono", "--channels 2 --num_codebooks 2", "codes 4 of toy (channels 1"),
    ("stereo", "--channels 1", "codes 8 of toy (channels 2"), ("nowhere", "", "no best.pt there")])
def test_starts_that_do_not_fit(start, flags, says, runs, tmp_path, capsys):
    assert run(tmp_path / "new", "--init_from", str(runs / start), *flags.split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_start_from_another_codec(runs, tmp_path, capsys):
    def louder(stored):
        stored["state"] = {k: v * 1.01 for k, v in stored["state"].items()}

    path = codec_file(tmp_path / "other.pt", louder)
    for channels in ("1", "2"):
        flags = ["--codec", path, "--channels", channels, "--init_from", str(runs / "mono")]
        assert run(tmp_path / "new", *flags) == 2
        error = capsys.readouterr().err
        assert "codes 4 of toy (channels 1" in error and f"{4 * int(channels)} of {path}" in error
        assert error.count("\n") == 1
    assert not Path(tmp_path, "new", "last.pt").exists()
