"""Music that is heard while it is generated: equal to the clip, early, and ended by whoever has heard enough.

And codes that are generated and not yet audio: nothing that fails while decoding loses them."""

import io
import os
import sys
import threading

import numpy as np
import pytest
import torch

import generate
import tokenizer
from support import audio
from test_serve import tiny

STEP = 1 / audio.FULL_SCALE


def make_music(pattern: str = "delay", channels: int = 1) -> generate.MusicGenerator:
    """Random weights that take a text; windows of 0.8 s."""
    music = tiny("text", pattern=pattern, K=4 * channels)
    music.codec = tokenizer.load_codec("toy", channels=channels)
    return music


@pytest.mark.parametrize("pattern, channels, seconds, given", [
    ("delay", 1, 0.8, 0), ("parallel", 1, 0.53, 0), ("delay", 2, 0.8, 0), ("delay", 1, 2.0, 0),
    ("delay", 1, 1.7, 16_123), ("unrolled", 2, 0.6, 3_000), ("delay", 1, 0.01, 0)])
def test_pieces_are_the_clip(pattern, channels, seconds, given):
    """Longer than the window, after a prompt of no whole frames, in stereo, shorter than a piece."""
    music = make_music(pattern, channels)
    prompt = torch.rand(channels, given) - 0.5 if given else None
    whole = music.generate(["slow organ"], seconds, 3, prompt=prompt, first=2)[0]
    pieces = list(music.stream("slow organ", seconds, 3, prompt=prompt, first=2))
    assert torch.cat(pieces, 1).shape == whole.shape == (channels, round(seconds * 16_000))
    assert (torch.cat(pieces, 1) - whole).abs().max() < STEP / 2
    assert all(piece.shape[1] <= 16_000 for piece in pieces) and len(pieces) > seconds - 0.1


def test_every_frame_is_told_once_and_in_order(monkeypatch):
    """As soon as its last code is there: under delay K-1 steps after its first, which is one a step."""
    told, steps = [], []
    music = make_music()
    music.model.decode_step = lambda *a, step=music.model.decode_step: steps.append(1) or step(*a)
    codes = generate.generate_codes(music.model, [{"text": "slow organ"}], 30, music.sampling,
                                    hear=lambda t, frame: told.append((t, len(steps), frame)))
    assert [(t, seen) for t, seen, _ in told] == [(t, t + 3) for t in range(30)]
    assert torch.equal(torch.cat([frame for _, _, frame in told], 2), codes)


def test_progress_is_told_in_frames():
    """Of the piece: a prompt counts, at once; nothing has to be heard for it."""
    music, told = make_music(), []
    prompt = torch.zeros(1, 5 * music.codec.hop)
    music.codes([{"text": "slow organ"}] * 2, 30 / 50, prompt=prompt, progress=lambda *a: told.append(a))
    assert told == [(frames, 30) for frames in range(5, 31)]


class Pipe(io.TextIOWrapper):
    """A standard output that notes `seen()` when something is first written."""

    def __init__(self, seen):
        super().__init__(io.BytesIO())
        self.seen, self.first = seen, None

    @property
    def buffer(self):
        self.first = self.seen() if self.first is None else self.first
        return super().buffer


def run(monkeypatch, music, *argv) -> int:
    """The command's exit code with this model."""
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: music)
    return generate.main(["--run", "nowhere", "--prompt", "slow organ", *map(str, argv)])


@pytest.mark.parametrize("channels", [1, 2])
def test_standard_output_is_the_file(channels, tmp_path, monkeypatch):
    """The same header, samples within one step of 16 bits. The first are there after half a second's frames
    and the K-1 steps that the last of them takes."""
    music, steps = make_music(channels=channels), []
    assert run(monkeypatch, music, "--out", tmp_path, "--seconds", 0.8) == 0
    music.model.step = lambda *a, step=music.model.step: steps.append(1) or step(*a)
    monkeypatch.setattr(sys, "stdout", Pipe(lambda: len(steps)))
    assert run(monkeypatch, music, "--out", "-", "--seconds", 0.8) == 0
    found, wanted = sys.stdout.buffer.getvalue(), (tmp_path / "000.wav").read_bytes()
    assert len(found) == len(wanted) and found[:44] == wanted[:44]
    samples = [np.frombuffer(x[44:], "<i2").astype(int) for x in (found, wanted)]
    assert abs(samples[0] - samples[1]).max() <= 1 and samples[0].any()
    assert sys.stdout.first + 1 == 25 + music.codec.K - 1              # one call is not of `step`: the first


@pytest.mark.parametrize("argv, says", [
    ("--prompt slow --n 2", "--out -: it takes one clip, 2 are asked for"),
    ("--prompt slow --prompt fast", "--out -: it takes one clip, 2 are asked for"),
    ("--prompt slow --seconds 1 --stride 9", "--stride 9"),
    ("--serve", "--out does not go with --serve"),
])
def test_what_standard_output_cannot_take(argv, says, monkeypatch, capsysbinary):
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: make_music())
    assert generate.main(["--run", "nowhere", "--out", "-", *argv.split()]) == 2
    out, err = capsysbinary.readouterr()
    assert out == b"" and says in err.decode() and err.count(b"\n") == 1


def test_a_terminal_gets_no_samples(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(monkeypatch, make_music(), "--out", "-") == 2
    out, err = capsys.readouterr()
    assert out == "" and "standard output is a terminal" in err and err.count("\n") == 1


def test_a_closed_pipe_ends_it_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    music = make_music()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(monkeypatch, music, "--out", "-", "--seconds", 60) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(monkeypatch, make_music(), "--out", "-") == 2
    err = capsys.readouterr().err
    assert "standard output could not be written" in err and err.count("\n") == 1


def test_a_listener_may_leave():
    """The thread ends and the model is as before; nothing of its modes reaches who listens."""
    music, before, steps = make_music(), threading.active_count(), []
    music.model.step = lambda *a, step=music.model.step: steps.append(1) or step(*a)
    music.model.train()
    pieces = music.stream("slow organ", 60)
    next(pieces).mul_(0.5)
    assert threading.active_count() == before + 1 and not torch.is_inference_mode_enabled()
    pieces.close()
    assert threading.active_count() == before and music.model.training and len(steps) < 1_000, "of 3,000"
    with pytest.raises(ValueError, match="--stride 9"):
        next(music.stream("slow organ", 2, stride_seconds=9))


def test_bad_samples_are_refused(monkeypatch, capsysbinary):
    music = make_music()
    music.codec.piece_decoder = lambda: lambda codes, is_last: torch.full((1, 1, 8000), float("nan"))
    assert run(monkeypatch, music, "--out", "-") == 2
    out, err = capsysbinary.readouterr()
    assert out == b"" and b"samples that are not finite" in err and err.count(b"\n") == 1


# ------------------------------------------------------------------------------------------------------------
# codes that are not yet audio


def fail_at(monkeypatch, music, clip: int, error: BaseException) -> None:
    """The decoder fails at this clip of those to come."""
    calls, decode = [], music.codec.decode

    def failing(codes):
        calls.append(1)
        if len(calls) == clip + 1:
            raise error
        return decode(codes)

    monkeypatch.setattr(music.codec, "decode", failing, raising=False)


@pytest.mark.parametrize("error, code, clip", [
    (MemoryError(), 2, 0), (OSError(28, "No space left on device"), 2, 2), (KeyboardInterrupt(), 130, 1)])
def test_codes_outlive_a_failure_of_decoding(error, code, clip, tmp_path, monkeypatch, capsys):
    """The same command goes on with them: all clips are there once, as of a command that did not fail."""
    music = make_music()
    argv = ("--n", 3, "--top_k", 20, "--out")
    assert run(monkeypatch, music, *argv, tmp_path / "whole") == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 6, "nothing but wav and json is left"
    with monkeypatch.context() as patch:
        fail_at(patch, music, clip, error)
        assert run(monkeypatch, music, *argv, tmp_path / "out") == code
    kept = list((tmp_path / "out").glob("codes_*.pt"))
    assert len(kept) == 1 and len(list((tmp_path / "out").iterdir())) == 1 + 2 * clip
    assert f"keeps the codes of {3 - clip} clips: the same command" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(music.model, "decode_step", None)
        assert run(monkeypatch, music, *argv, tmp_path / "out") == 0
    assert f"{3 - clip} clips that an earlier call has generated" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


@pytest.mark.parametrize("other", ["weights", "--seed 1", "--prompt slow", "--seconds 0.7", "--cfg 4"])
def test_codes_of_something_else_are_not_taken(other, tmp_path, monkeypatch):
    music, steps = make_music(), []
    with monkeypatch.context() as patch:
        fail_at(patch, music, 0, MemoryError())
        assert run(monkeypatch, music, "--out", tmp_path) == 2
    if other == "weights":
        music.model.linears[3].weight.data += 1e-3
    music.model.step = lambda *a, step=music.model.step: steps.append(1) or step(*a)
    assert run(monkeypatch, music, "--out", tmp_path, *other.replace("weights", "").split()) == 0 and steps
    assert len(list(tmp_path.glob("codes_*.pt"))) == 1


def test_damaged_codes_are_one_line(tmp_path, monkeypatch, capsys):
    music = make_music()
    with monkeypatch.context() as patch:
        fail_at(patch, music, 0, MemoryError())
        assert run(monkeypatch, music, "--out", tmp_path) == 2
    kept, = tmp_path.glob("codes_*.pt")
    stored = torch.load(kept, weights_only=True)
    assert stored["codes"].shape == (1, 4, 40) and stored["left"] == [0]
    for content in (b"", stored | dict(codes=stored["codes"] + 256), stored | dict(left=[1]), [1]):
        kept.write_bytes(content) if content == b"" else torch.save(content, kept)
        capsys.readouterr()
        assert run(monkeypatch, music, "--out", tmp_path) == 2
        err = capsys.readouterr().err
        assert kept.name in err and err.count("\n") == 1
