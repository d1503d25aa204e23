"""Codecs side by side, and what is heard in music: against audio of which the answer is known.

Legend: N samples.
"""

import math
import re

import numpy as np
import pytest
import soundfile
import torch

import tokenizer
from evaluate import codecs, metrics, sound
from support import audio, quality
from test_sound import sine

CODEC = tokenizer.load_codec("toy")



# ------------------------------------------------------------------------------------------------------------
# codecs


@pytest.mark.parametrize("rate", codecs.OPUS_RATES)
def test_opus_is_aligned_and_as_large_as_asked_for(rate):
    """At a high rate it is the input, sample for sample; its bits are those of its packets."""
    wav = sum(0.2 * sine(hertz, rate, 1.5) for hertz in (700, 1100, 2900)).float()
    back, bits = codecs.through_opus(wav, rate, 160)
    assert back.shape == wav.shape and bits / 1.5 / 1000 == pytest.approx(160, rel=0.04)
    assert quality.si_snr(back[None, None], wav[None, None]) > 38
    assert quality.si_snr(back[None, None].roll(1), wav[None, None]) < 15
    _, few = codecs.through_opus(wav, rate, 16)
    assert few < bits / 4


def test_packets_are_counted_without_headers_and_framing():
    def page(*packets: int) -> bytes:
        table = b"".join(bytes([255] * (size // 255) + [size % 255]) for size in packets)
        return b"OggS" + bytes(22) + bytes([len(table)]) + table + bytes(sum(packets))

    assert codecs.packet_bytes(page(19) + page(600) + page(10, 255, 700) + page(4)) == 969


def test_figures_are_those_of_each_codec(tmp_path, capsys):
    """The toy codec as measured by hand; perplexity over all pieces; silence left out; one rate for all."""
    rng = torch.Generator().manual_seed(0)
    pieces = [0.3 * torch.randn(1, 40_000, generator=rng), 0.3 * sine(440, 16_000, 2).float()[None]]
    (tmp_path / "deep").mkdir()
    for i, wav in enumerate([*pieces, torch.full((1, 16_000), 0.25)]):         # silence may have an offset
        audio.write_audio(tmp_path / "deep" / f"{i}.wav", wav, 16_000)
    assert codecs.main(["--audio", str(tmp_path), "--codec", "toy", "opus:64"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert "2 pieces of 3 files, 4.5 s, mono, compared at 16000 Hz; left out as silent: 1" in out
    codes = [CODEC.encode(wav[None]) for wav in pieces]
    by_hand = [quality.round_trip_quality(wav[None], CODEC.decode(code)[..., :wav.shape[1]], 16_000)
               for wav, code in zip(pieces, codes)]
    hertz, kbits, si_snr, mel, *used = map(float, rows["toy"])
    assert hertz == 16_000 and kbits == pytest.approx(CODEC.K * math.log2(CODEC.card) * 50 / 1000, abs=0.01)
    assert si_snr == pytest.approx(np.mean([row["si_snr_db"] for row in by_hand]), abs=0.03)
    assert mel == pytest.approx(np.mean([row["mel_db"] for row in by_hand]), abs=0.03)
    whole = quality.perplexities(quality.count_codes(torch.cat(codes, 2), CODEC.card))
    assert used == pytest.approx(whole, abs=2)
    assert len(rows["opus:64"]) == 4 and float(rows["opus:64"][1]) == pytest.approx(64, rel=0.1)


@pytest.mark.parametrize("flags, says", [
    ("--audio {none}", "no such folder"),
    ("--audio {empty}", "no audio files there"),
    ("--audio {bad}", "bad.wav"),
    ("--audio {silent}", "all of it is silent"),
    ("--audio {silent} --codec nowhere.pt", "nowhere.pt"),
    ("--audio {silent} --codec opus:5", "opus:5: opus:KBITS with 6 to 256"),
    ("--audio {silent} --codec opus:much", "opus:much"),
    ("--audio {silent} --rate 100", "--rate 100: at least 8000"),
])
def test_bad_folders_of_codecs_are_one_line(flags, says, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("none", "empty", "bad", "silent")}
    for name in ("empty", "bad", "silent"):
        places[name].mkdir()
    (places["bad"] / "bad.wav").write_text("no audio")
    audio.write_audio(places["silent"] / "a.wav", torch.zeros(1, 4_000), 16_000)
    assert codecs.main(flags.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


# ------------------------------------------------------------------------------------------------------------
# what is heard


def clicks(rate: int, per_second: float, seconds: float = 8.0):
    """Short tones [1,N] that begin so many times a second, from 0.2 s on."""
    wav = torch.zeros(round(rate * seconds))
    t = torch.arange(round(0.1 * rate)) / rate
    tone = (torch.sin(2 * math.pi * 660 * t) * torch.exp(-40 * t)).float()
    for i in range(round((seconds - 0.2) * per_second)):
        begin = round((0.2 + i / per_second) * rate)
        wav[begin:begin + len(tone)] += tone[:len(wav) - begin]
    return wav[None]


@pytest.mark.parametrize("rate, per_second", ((16_000, 2), (16_000, 6.5), (44_100, 4)))
def test_onsets_are_counted(rate, per_second):
    """Whatever the rate and the loudness, over noise and a steady chord as in silence."""
    wav = clicks(rate, per_second)
    chord = sum(0.1 * sine(hertz, rate, 8).float() for hertz in (220, 277, 330))
    noise = 0.01 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    for heard in (wav, 0.01 * wav, wav + noise, wav + chord):
        found = sound.measure_sound(heard, rate, 16_000)["onsets"]
        assert found == pytest.approx(round(7.8 * per_second) / 8, abs=0.15), found


def test_what_has_no_onsets_has_few():
    noise = torch.randn(1, 160_000, generator=torch.Generator().manual_seed(0))
    assert sound.measure_sound(noise, 16_000, 16_000)["onsets"] < 0.5
    assert sound.measure_sound(sine(440, 16_000, 5).float()[None], 16_000, 16_000)["onsets"] == 0


def test_centroid_and_loudness_of_known_sounds():
    """A tone's is its frequency, of two equal ones the middle, of white noise the middle of what is left of
    it at 16 kHz (to 7.6 kHz); a mono mix is as loud from two channels as from one."""
    tone = sine(1000, 44_100, 2).float()[None]
    both = tone + sine(3000, 44_100, 2).float()[None]
    noise = torch.randn(1, 88_200, generator=torch.Generator().manual_seed(0))
    for wav, hertz in ((tone, 1000), (both, 2000), (tone + 0.5, 1000), (noise, 3800)):
        assert sound.measure_sound(wav, 44_100, 16_000)["centroid"] == pytest.approx(hertz, rel=0.02)
    for wav in (tone, tone.expand(2, -1)):
        assert sound.measure_sound(wav, 44_100, 16_000)["loudness"] == pytest.approx(-3.0, abs=0.2)


@pytest.mark.parametrize("length", (1, 100, 1600, 16_000))
def test_silence_and_short_clips_have_figures(length):
    found = sound.measure_sound(torch.zeros(2, length), 16_000, 16_000)
    assert found["onsets"] == 0 and found["loudness"] == -70 and math.isnan(found["centroid"])
    hiss = sound.measure_sound(0.25 + 1e-5 * torch.rand(2, length), 16_000, 16_000)
    assert hiss["onsets"] == 0 and math.isnan(hiss["centroid"])
    found = sound.measure_sound(torch.rand(2, length), 16_000, 16_000)
    assert found["onsets"] >= 0 and found["loudness"] >= -70


def test_the_table_of_what_is_heard(tmp_path, capsys):
    """Of two folders, with the codec and noise between them; a silent clip counts in all but the centroid."""
    for name, wavs in (("real", [clicks(16_000, 2, 4), clicks(16_000, 6, 4)]),
                       ("made", [clicks(16_000, 4, 4), torch.zeros(1, 64_000)])):
        (tmp_path / name).mkdir()
        for i, wav in enumerate(wavs):
            soundfile.write(tmp_path / name / f"{i}.wav", wav[0].numpy(), 16_000)
    flags = ["--reference", str(tmp_path / "real"), "--generated", str(tmp_path / "made")]
    assert metrics.main([*flags, "--fad_embedding", "mel"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"what is heard .* reference +generated +codec +noise\n", out)
    onsets = [float(x) for x in re.search(r"  onsets a second .*", out)[0].replace("±", " ").split()[3:]]
    assert onsets[:4] == pytest.approx([3.875, 1.875, 1.875, 1.875], abs=0.13)
    assert "nan" not in out
    quiet = [sound.measure_sound(torch.zeros(1, 1600), 16_000, 16_000)]
    assert "-" in sound.sound_table(dict(generated=quiet)).splitlines()[-1]
