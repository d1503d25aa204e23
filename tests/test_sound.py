"""Sound on its way through the project: resampling, measured with tones; what is written of it; loudness.

Legend: C channels, N samples.
"""

import gc
import json
import math
import re
from pathlib import Path

import pytest
import soundfile
import torch

from evaluate import listen
from support import audio

ROOT = Path(__file__).parents[1]


def sine(hertz, rate, seconds=1.0):
    """[N] float64, at full scale."""
    return torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate), dtype=torch.float64) / rate)


def levels(wav, rate, hertz):
    """(of the tone at `hertz`, of the loudest other) in dB of full scale, away from the ends of wav [N]."""
    middle = wav[len(wav) // 4:-(len(wav) // 4)].double()
    window = torch.hann_window(len(middle), dtype=torch.float64)
    level = 20 * (2 * torch.fft.rfft(middle * window).abs() / window.sum()).clamp_min(1e-9).log10()
    near = (torch.arange(len(level)) * rate / len(middle) - hertz).abs() < 30
    return float(level[near].max()) if near.any() else -180.0, float(level[~near].max())


# ------------------------------------------------------------------------------------------------------------
# resampling


@pytest.mark.parametrize("rate, new_rate, hertz", (
    (44_100, 32_000, 17_000),                  # above the new Nyquist frequency: nothing may be left of it,
    (48_000, 32_000, 16_500),                  # nor fold to 15,500 Hz
    (44_100, 24_000, 12_500),
    (44_100, 16_000, 9_000),
    (44_099, 32_000, 17_000),                  # a rate that shares no factor with the other
    (44_100, 32_000, 13_000),                  # below: it stays as it is,
    (44_100, 32_000, 14_390),                  # to 0.9 of it
    (48_000, 32_000, 14_000),
    (44_100, 24_000, 10_500),
    (44_100, 16_000, 7_000),
    (16_000, 32_000, 7_000),                   # and is not mirrored to 9,000 Hz
    (22_050, 32_000, 9_900),
    (44_099, 32_000, 13_000)))
def test_tones_pass_or_vanish(rate, new_rate, hertz, tmp_path):
    soundfile.write(tmp_path / "tone.wav", sine(hertz, rate).numpy(), rate, "FLOAT")
    wav = audio.read_audio(tmp_path / "tone.wav", sample_rate=new_rate)
    assert wav.shape == (1, new_rate) and wav.dtype == torch.float32
    tone, other = levels(wav[0], new_rate, hertz)
    assert other < -95
    assert hertz > new_rate / 2 or abs(tone) < 0.001


def test_resampling_keeps_time_and_shape():
    """Sample n of the result is the signal at n / new_rate, in every row; silence lies beyond the ends."""
    for rate, new_rate in ((44_100, 32_000), (16_000, 44_100), (48_000, 16_000), (8_000, 44_099)):
        tone = sine(440, rate, 0.5).float()
        wav = torch.stack([tone, -0.5 * tone])[None]                       # [1, 2, N]
        made = audio.resample(wav, rate, new_rate)
        expected = sine(440, new_rate, 0.5)
        assert made.shape == (1, 2, math.ceil(wav.shape[-1] * new_rate / rate))
        inside = slice(new_rate // 20, -new_rate // 20)
        assert (made[0, 0] - expected[:made.shape[-1]])[inside].abs().max() < 1e-5
        torch.testing.assert_close(made[0, 1], -0.5 * made[0, 0])
    for length, expected in ((0, 0), (1, 1), (5, 4)):
        assert audio.resample(torch.ones(2, length), 44_100, 32_000).shape == (2, expected)


@pytest.mark.parametrize("rate", (44_100, 48_000, 22_050, 44_099))
@pytest.mark.parametrize("suffix", ("wav", "flac"))
def test_a_part_of_a_file_is_that_of_the_whole(rate, suffix, tmp_path):
    """Also at its edges, and where it begins between two samples of the file."""
    path = tmp_path / f"noise.{suffix}"
    noise = torch.rand(2 * rate, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    soundfile.write(path, noise.numpy(), rate)
    whole = audio.read_audio(path, sample_rate=32_000, channels=1)
    assert whole.shape == (1, 64_000)
    for start, seconds in ((0.0, 0.5), (0.02, 0.4), (0.33333, 0.7), (1.5, 0.5), (1.9, 9.0), (1.25, None)):
        first = round(start * 32_000)
        stop = None if seconds is None else first + round(seconds * 32_000)
        part = audio.read_audio(path, start, seconds, sample_rate=32_000, channels=1)
        torch.testing.assert_close(part, whole[:, first:stop], atol=2e-6, rtol=0)
    assert audio.read_audio(path, 2.0, 1.0, sample_rate=32_000).shape[1] == 0


def test_one_function_resamples():
    for folder in (".", "support", "evaluate", "interop", "tools"):
        for path in (ROOT / folder).glob("*.py"):
            assert not re.search(r"functional\.resample|transforms\.Resample", path.read_text()), path


# ------------------------------------------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("suffix", ("wav", "flac"))
def test_sixteen_bits_are_rounded_to_the_nearest(suffix, tmp_path, capsys):
    path = tmp_path / f"a.{suffix}"
    wav = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    audio.write_audio(path, wav, 16_000)
    assert soundfile.info(path).subtype == "PCM_16"
    error = (torch.from_numpy(soundfile.read(path, dtype="int16")[0].T).double() - wav.double() * 2 ** 15)
    assert error.abs().max() <= 0.5 and abs(error.mean()) < 0.005                # steps; 0.005 is 5 sigma
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ("wav", "flac", "ogg"))
def test_what_is_written_is_clipped_aloud(suffix, tmp_path, capsys):
    path = tmp_path / f"a.{suffix}"
    audio.write_audio(path, torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5]] * 2).repeat(1, 2000), 16_000)
    assert f"{path}: clipped at full scale, its peak was 2.00 times that" in capsys.readouterr().err
    if suffix != "ogg":
        assert soundfile.read(path, dtype="int16")[0][:5, 0].tolist() == [32767, -32768, 32767, -32768, 16384]
    audio.write_audio(path, torch.tensor([[1.0, -1.0]]), 16_000)
    assert capsys.readouterr().err == ""


def test_a_signal_while_a_file_is_closed(tmp_path, monkeypatch):
    """It is closed once: libsndfile would free its memory a second time."""
    class Signal(BaseException):
        pass

    class Library:
        """libsndfile; a signal raises as soon as it has closed a file."""
        closed = []

        def __getattr__(self, name):
            return getattr(library, name)

        def sf_close(self, file):
            self.closed.append(file)
            if self.closed.count(file) == 1:
                library.sf_close(file)
            raise Signal

    audio.write_audio(tmp_path / "a.wav", torch.zeros(1, 100), 16_000)
    library = soundfile._snd
    monkeypatch.setattr(soundfile, "_snd", Library())
    for use in (lambda: audio.read_audio(tmp_path / "a.wav"),
                lambda: audio.encode_audio(torch.zeros(1, 100), 16_000, "wav")):
        Library.closed.clear()
        with pytest.raises(Signal):
            use()
        gc.collect()
        assert len(Library.closed) == 1


def test_samples_that_are_not_finite_are_not_written(tmp_path):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a.wav: not written: samples that are not finite"):
            audio.write_audio(tmp_path / "a.wav", torch.tensor([[0.0, bad]]), 16_000)
    assert not (tmp_path / "a.wav").exists()


# ------------------------------------------------------------------------------------------------------------
# loudness


def loud_clips(rate):
    """{name: [C,N] float64} of 5 s, near full scale and over it; the same bits everywhere."""
    t = torch.arange(5 * rate, dtype=torch.float64) / rate
    tone = lambda hertz: torch.sin(2 * math.pi * hertz * t)
    square = torch.sign(tone(55.5))
    quiet_from_2 = torch.where(t < 2, 1.0, 0.02)
    swelling = (1.3 * (t % 1)).clamp_max(1)
    clips = {
        "997": tone(997), "7000": tone(7000), "100": 0.5 * tone(100),
        "chord": 0.3 * (tone(220) + tone(277) + tone(1661)), "twice full scale": 2 * tone(440),
        "loud, then quiet": 0.8 * tone(220) * quiet_from_2,
        "square": 0.9 * square, "swelling square": 0.9 * square * swelling}
    clips = {name: wav[None] for name, wav in clips.items()}
    clips["stereo"] = torch.stack([2 * tone(440), tone(3000)])
    clips["stereo square"] = torch.stack([0.9 * square, 0.7 * square * quiet_from_2])
    return clips


# What pyloudnorm 0.2.0 finds at 48 kHz, Meter(48_000, filter_class="DeMan"): the standard's own filters
PYLOUDNORM = {
    "997": -3.010, "7000": 0.335, "100": -10.856, "chord": -8.503, "twice full scale": 2.327,
    "loud, then quiet": -6.189, "square": -3.965, "swelling square": -7.124, "stereo": 4.368,
    "stereo square": -3.038}


def test_loudness_is_that_of_the_standard():
    """Its coefficients, its reference of 997 Hz, and figures of another implementation."""
    shelf, high_pass = listen.k_weighting(48_000)
    for (numerator, denominator), expected in (
            (shelf, (1.53512485958697, -2.69169618940638, 1.19839281085285, -1.69065929318241,
                     0.73248077421585)),
            (high_pass, (1.0, -2.0, 1.0, -1.99004745483398, 0.99007225036621))):
        found = [x / denominator[0] for x in (*numerator, *denominator[1:])]
        assert found == pytest.approx(expected, abs=1e-10)
    tone = sine(997, 48_000, 5)[None]
    assert listen.measure_loudness(tone, 48_000) == pytest.approx(-3.01, abs=0.005)
    assert listen.measure_loudness(tone / 10, 48_000) == pytest.approx(-23.01, abs=0.005)
    for rate, tolerance in ((48_000, 0.002), (44_100, 0.005), (32_000, 0.01), (16_000, 0.06)):
        for name, wav in loud_clips(rate).items():
            found = listen.measure_loudness(wav, rate)
            assert found == pytest.approx(PYLOUDNORM[name], abs=tolerance), (rate, name)


@pytest.mark.parametrize("rate", (16_000, 32_000))
def test_samples_end_at_the_same_loudness(rate, tmp_path):
    """Those near and over full scale as those far below, long and short; its json tells the truth."""
    clips = loud_clips(rate)
    chord = clips["chord"]
    clips |= {"quiet": 0.05 * chord, "0.2 s": clips["997"][:, :rate // 5], "10 ms": chord[:, :rate // 100]}
    for name, wav in clips.items():
        louder, gain = listen.normalize_loudness(wav, rate)
        torch.testing.assert_close(louder, wav * 10 ** (gain / 20))
        assert listen.measure_loudness(louder, rate) == pytest.approx(-14, abs=0.01), name
        listen.write_sample(tmp_path, "a", wav.float(), rate, {"kind": name})
        record = json.loads((tmp_path / "a.json").read_text())
        written = audio.read_audio(tmp_path / "a.wav")
        assert record["loudness"] == "-14.0 LUFS (ITU-R BS.1770-4)" and record["gain_db"] == round(gain, 2)
        assert listen.measure_loudness(written, rate) == pytest.approx(-14, abs=0.05), name


def test_a_peak_or_near_silence_holds_loudness_back(tmp_path):
    tone = 0.01 * sine(997, 16_000, 2)[None]
    click, hiss = tone.clone(), 0.002 * tone
    click[:, 100] = 0.9
    for wav, why in ((click, r"-\d\d\.\d LUFS .*: louder, its peak would pass -1 dB"),
                     (0.3 * tone, "-53.5 LUFS .*: near silence, left as it is"),
                     (hiss, "-inf LUFS .*: near silence, left as it is"),
                     (0 * tone, "-inf LUFS .*: near silence, left as it is"),
                     (tone[:, :0], "-inf LUFS .*: near silence, left as it is")):
        louder, gain = listen.normalize_loudness(wav, 16_000)
        listen.write_sample(tmp_path, "a", wav, 16_000, {})
        assert re.fullmatch(why, json.loads((tmp_path / "a.json").read_text())["loudness"])
        if wav is click:
            assert float(louder.abs().max()) == pytest.approx(10 ** (-1 / 20), rel=1e-4)
        else:
            assert louder is wav and gain == 0
