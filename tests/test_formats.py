"""Audio as people keep it: formats, tags, headers that lie, channels that cancel.

Files that libsndfile cannot write are made by PyAV, or changed byte by byte. Legend: C channels, N samples.
"""

import os

import numpy as np
import pytest
import soundfile
import torch

import data
from support import audio, common, headers, scan, tags
from support.verify import decode_dataset

RATE = 16_000  # Hz


def music(seconds=2.0, channels=2, rate=RATE) -> np.ndarray:
    """[N, C] float32: a rising tone in each channel and some noise, so that every part differs."""
    t = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(0)
    tones = [0.4 * np.sin(2 * np.pi * (220 * (i + 1) + 100 * t) * t) for i in range(channels)]
    return (np.stack(tones, 1) + 0.02 * rng.standard_normal((len(t), channels))).astype(np.float32)


def write(path, wav=None, **more):
    """Writes [N, C] in the format of the suffix, or `format` -> the path."""
    soundfile.write(path, music() if wav is None else wav, RATE, **more)
    return path


def write_by_av(path, codec, wav, rate=44_100, **options):
    """The same by PyAV's encoders, with tags."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        stream.bit_rate = 192_000
        container.metadata.update(options)
        resampler = av.AudioResampler(stream.format, "stereo", rate, getattr(stream, "frame_size", 0) or 1024)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav.T), "fltp", "stereo")
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def without_av(monkeypatch):
    """As where PyAV is not installed."""
    monkeypatch.setattr(common, "has_package", lambda name: False)


def check(folder, capsys, *flags) -> str:
    """What `data.py check` prints of a folder."""
    assert data.main(["check", str(folder), *flags]) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# formats


def test_what_libsndfile_reads_is_read(tmp_path):
    """By suffixes in any case, and under names that are no text."""
    kinds = {"opus": "OGG", "oga": "OGG", "aif": "AIFF", "aifc": "AIFF", "caf": "CAF", "w64": "W64",
             "au": "AU", "AIFF": "AIFF", "Mp3": "MP3", "WAV": "WAV", "FLAC": "FLAC"}
    for suffix, kind in kinds.items():
        subtype = "OPUS" if suffix == "opus" else None
        write(tmp_path / f"a.{suffix}", format=kind, subtype=subtype)
    (tmp_path / "a.mp2").write_bytes((tmp_path / "a.Mp3").read_bytes())
    os.link(tmp_path / "a.WAV", os.fsencode(tmp_path) + b"/caf\xe9.wav")
    os.unlink(tmp_path / "a.WAV")
    found = scan.scan_dataset(str(tmp_path))
    assert len(found.entries) == len(kinds) + 1 and not found.skipped and not found.problems
    for entry in found.entries:
        assert abs(entry.seconds - 2) < 0.1
        assert abs(entry.read(0.5, 1.0, scan_codec(RATE, 1)).shape[1] - RATE) == 0


class scan_codec:
    """What of a codec says which audio it takes."""
    def __init__(self, sample_rate, channels):
        self.sample_rate, self.channels = sample_rate, channels


@pytest.mark.parametrize("suffix", ("opus", "mp3", "ogg"))
def test_a_part_is_that_of_the_whole(suffix, tmp_path):
    path, rate = tmp_path / f"a.{suffix}", 48_000
    more = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(path, music(6.0, rate=rate), rate, **more)
    whole = audio.read_audio(path)
    for start in (5.1, 2.0, 0.3, 1.23456):
        first = round(start * rate)
        part = audio.read_audio(path, start, 0.7)
        torch.testing.assert_close(part, whole[:, first:first + part.shape[1]], atol=1e-6, rtol=0)


def test_what_is_left_is_counted_by_its_kind(tmp_path, capsys, without_av):
    write(tmp_path / "a.wav")
    for name in ("a.m4a", "b.M4A", "c.wma"):
        (tmp_path / name).write_bytes(b"\0" * 99)
    (tmp_path / "d.mp3").write_bytes(b"\0\0\0\x20ftypM4A " + b"\0" * 999)
    for name in ("a.png", "b.PNG", "c.pdf", "none"):
        (tmp_path / name).write_bytes(b"\1")
    out = check(tmp_path, capsys)
    assert "4 audio that needs `pip install av`: .m4a 2, .wma 1, .m4a under the name .mp3 1 (" in out
    assert "4 not audio by its name: .png 2, .pdf 1, no suffix 1 (" in out
    with pytest.raises(ValueError, match="d.mp3: audio that needs `pip install av`: .m4a under"):
        audio.read_audio(tmp_path / "d.mp3")


@pytest.mark.parametrize("suffix, codec", (
    ("m4a", "aac"), ("mp4", "alac"), ("aac", "aac"), ("wma", "wmav2"), ("webm", "libopus"), ("mka", "ac3"),
    ("wv", "wavpack"), ("mp3", "libmp3lame"), ("oga", "flac")))
def test_what_av_reads_is_read(suffix, codec, tmp_path):
    """At the level and the pitch that it has, its parts as they are in the whole, also m4a called .mp3."""
    rate = 48_000 if codec == "libopus" else 44_100
    wav = music(4.0, rate=rate)
    path = write_by_av(tmp_path / f"a.{suffix}", codec, wav, rate)
    if suffix == "m4a":
        path = path.rename(tmp_path / "a.mp3")
    info, whole = audio.audio_info(path), audio.read_audio(path)
    assert (info.sample_rate, info.channels) == (rate, 2) and abs(info.seconds - 4) < 0.12
    assert abs(whole.shape[1] - 4 * rate) < 0.12 * rate
    found, expected = (np.fft.rfft(x[rate:2 * rate, 0], 2 * rate) for x in (whole.T.numpy(), wav))
    correlation = np.fft.irfft(found * expected.conj()).max() * 2 * rate      # at the best of all delays
    assert 0.95 < correlation / np.linalg.norm(wav[rate:2 * rate, 0]) ** 2 / (2 * rate) < 1.05
    for start, seconds in ((0.0, 0.5), (1.0, 1.0), (0.5, 0.25), (3.5, 9.0), (0.2, 3.0), (3.0, None),
                           (5.0, 1.0)):
        first = round(start * rate)
        part = audio.read_audio(path, start, seconds)
        stop = None if seconds is None else first + round(seconds * rate)
        assert torch.equal(part, whole[:, first:stop])
    half = audio.read_audio(path, sample_rate=rate // 2, channels=1)
    part = audio.read_audio(path, 1.5, 1.0, rate // 2, 1)
    torch.testing.assert_close(part, half[:, 3 * rate // 4:5 * rate // 4], atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# lengths


def odd_lengths(folder) -> dict:
    """Files of 3 s and such of two of them, whose headers say something else: {name: seconds in them}."""
    mp3 = write(folder / "whole.mp3", music(3.0), bitrate_mode="VARIABLE", compression_level=0.5).read_bytes()
    (folder / "joined.mp3").write_bytes(mp3 * 2)
    (folder / "cut.mp3").write_bytes(mp3[:len(mp3) // 3])
    header = headers._parse_frame(mp3[headers._find_frame(mp3):])
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    (folder / "headless.mp3").write_bytes(mp3[header[2]:])
    links = [write(folder / f"{i}.ogg", music(3.0)[i:]).read_bytes() for i in range(2)]
    (folder / "chained.ogg").write_bytes(b"".join(links))
    wav = bytearray(write(folder / "zero.wav", music(3.0)).read_bytes())
    wav[40:44] = bytes(4)
    (folder / "zero.wav").write_bytes(wav)
    flac = bytearray(write(folder / "piped.flac", music(3.0)).read_bytes())
    (folder / "cut.flac").write_bytes(flac[:len(flac) // 3])
    flac[21] &= 0xF0  # 36 bits: how many samples
    flac[22:26] = bytes(4)
    (folder / "piped.flac").write_bytes(flac)
    return {"whole.mp3": 3, "joined.mp3": 6, "cut.mp3": 1, "headless.mp3": 3, "chained.ogg": 6, "zero.wav": 3,
            "piped.flac": 3, "cut.flac": 1, "0.ogg": 3, "1.ogg": 3}


def test_headers_that_lie_are_named(tmp_path, capfd, without_av):
    """Without PyAV; no word of libmpg123's on the way."""
    odd_lengths(tmp_path)
    out = check(tmp_path, capfd)
    for name, line in (
            ("joined.mp3", "2 longer than its header says, `pip install av`"),
            ("headless.mp3", "2 longer than its header says"), ("cut.mp3", "1 cut off"),
            ("chained.ogg", "another stream follows the first"),
            ("zero.wav", "data of length 0 in its header 1"),
            ("piped.flac", "no length in its header (it was piped) 1")):
        assert [found for found in out.splitlines() if line in found and name in found], (name, out)
    with pytest.raises(ValueError, match="piped.flac: audio that needs `pip install av`: no length"):
        audio.read_audio(tmp_path / "piped.flac")
    assert audio.read_audio(tmp_path / "joined.mp3").shape[1] == 3 * RATE
    err = capfd.readouterr().err
    assert err.splitlines() == [
        f"{tmp_path}/joined.mp3: longer than its header says, `pip install av` reads all of it"]


def test_what_headers_hide_is_read(tmp_path, capfd):
    pytest.importorskip("av")
    lengths = odd_lengths(tmp_path)
    found = scan.scan_dataset(str(tmp_path))
    seconds = {entry.key: entry.seconds for entry in found.entries}
    assert not found.skipped and seconds.keys() == lengths.keys()
    for name, expected in lengths.items():
        assert name == "cut.flac" or abs(seconds[name] - expected) < 0.25, name
        read = audio.read_audio(tmp_path / name).shape[1] / RATE
        assert abs(read - expected) < (0.5 if name == "cut.flac" else 0.2), name
    assert "mpg123" not in capfd.readouterr().err


def test_decode_says_what_can_be_read(tmp_path, capsys, monkeypatch):
    """And the report then has true lengths; what cannot be decoded at all is skipped."""
    wav = music(3.0)
    write(tmp_path / "good.wav", wav)
    write(tmp_path / "opposite.wav", wav[:, :1] * np.float32([0.5, -0.499]))
    write(tmp_path / "silent.wav", 0 * wav)
    write(tmp_path / "nan.wav", np.nan * wav, subtype="FLOAT")
    flac = write(tmp_path / "cut.flac", wav).read_bytes()
    (tmp_path / "cut.flac").write_bytes(flac[:len(flac) // 2])
    ogg = write(tmp_path / "twice.ogg", wav).read_bytes()
    (tmp_path / "twice.ogg").write_bytes(ogg * 2)
    monkeypatch.setattr(headers, "is_chained", lambda *state: False)  # as where a few pages do not tell
    out = check(tmp_path, capsys, "--decode")
    lines = [line for line in out.splitlines() if line.startswith("decoded ")]
    lines = {line.split("/")[-1].split("'")[0]: line for line in lines}
    assert "good.wav" not in lines
    assert "another length: its header says 3.00 s, 1." in lines["cut.flac"]
    assert "it holds 2 streams, of which the first is read" in lines["twice.ogg"]
    assert "its channels cancel: as mono, channel 1 is taken" in lines["opposite.wav"]
    assert lines["silent.wav"].endswith(": silent")
    assert "samples not finite" in lines["nan.wav"]
    assert "files        5" in out and "1 skipped, 4 with a problem" in out
    found = scan.scan_dataset(str(tmp_path))
    decode_dataset(found)
    seconds = {entry.key: entry.seconds for entry in found.entries}
    assert 1 < seconds["cut.flac"] < 2 and seconds["good.wav"] == 3 and "nan.wav" not in seconds


# ------------------------------------------------------------------------------------------------------------
# channels that cancel


def test_mono_of_channels_that_cancel_is_the_stronger_one(tmp_path, monkeypatch):
    """From wherever it is read; where they cancel in a part of the file only, it is the mean everywhere."""
    wav = music(4.0)[:, :1] * np.float32([-0.501, 0.5])
    wav[RATE:2 * RATE] *= 1e-3
    wav[RATE:2 * RATE, 1] += 1e-4  # alone, this part does not cancel
    opposite = write(tmp_path / "opposite.wav", wav, subtype="FLOAT")
    wav = torch.from_numpy(wav.T)
    assert torch.equal(audio.read_audio(opposite, channels=1), wav[:1])
    for start, seconds in ((0.0, 0.5), (1.2, 0.5), (3.5, 9.0)):
        first = round(start * RATE)
        part = audio.read_audio(opposite, start, seconds, channels=1)
        assert torch.equal(part, wav[:1, first:first + round(seconds * RATE)])
    assert torch.equal(audio.read_audio(opposite, channels=2), wav)

    wav = music(4.0)
    wav[RATE:3 * RATE, 1] = -wav[RATE:3 * RATE, 0]
    partly = write(tmp_path / "partly.wav", wav, subtype="FLOAT")
    whole = audio.read_audio(partly, channels=1)
    assert torch.equal(whole[0], torch.from_numpy(wav).T.mean(0))
    assert torch.equal(audio.read_audio(partly, 1.5, 1.0, channels=1), whole[:, 24_000:40_000])


def test_what_is_silent_is_a_problem_of_a_cache(tmp_path, capsys):
    """Channels that cancel are not: they are read; `check` names them."""
    tone = music(1.0, 1)
    write(tmp_path / "opposite.wav", tone * np.float32([0.5, -0.5]))
    write(tmp_path / "silence.wav", 0 * tone)
    assert "1 channels cancel, as mono the strongest is taken" in check(tmp_path, capsys)
    flags = ["--codec", "toy", "--out", str(tmp_path / "codes")]
    for _ in range(2):  # again, when it is finished
        assert data.main(["cache", str(tmp_path), *flags]) == 0
        out = capsys.readouterr().out
        assert "1 silent" in out and "silence.wav" in out and "opposite.wav" not in out


# ------------------------------------------------------------------------------------------------------------
# tags


def id3(version: int, **frames) -> bytes:
    """An ID3v2.3 or v2.4 tag of text frames in UTF-8 or UTF-16."""
    body = b""
    for name, text in frames.items():
        encoded = b"\1" + text.encode("utf-16") if version == 3 else b"\3" + text.encode()
        if name == "COMM":
            nothing = b"\xff\xfe\0\0" if version == 3 else b"\0"
            encoded = encoded[:1] + b"eng" + nothing + encoded[1:]
        body += name.encode() + len(encoded).to_bytes(4, "big") + b"\0\0" + encoded
    length = bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3" + bytes([version, 0, 0]) + length + body


@pytest.mark.parametrize("version", (3, 4))
def test_tags_of_mp3(version, tmp_path, capsys):
    """A sidecar wins, field by field."""
    pytest.importorskip("mutagen")
    mp3 = write(tmp_path / "a.mp3").read_bytes()
    year = {"TYER": "1999"} if version == 3 else {"TDRC": "1999"}
    tag = id3(version, TIT2="D\xe4mmerung", TPE1="Ann", TCON="(80)", COMM="A slow\x07  tune",
              TBPM="92", TKEY="Dm", TMOO="Calm", **year)
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp3").write_bytes(tag + mp3)
    (tmp_path / "b.json").write_text('{"description": "a waltz", "bpm": 90}')
    (tmp_path / "c.mp3").write_bytes(id3(version, TBPM="0", COMM="https://example.org/a?b=c") + mp3)
    entries = {entry.key: entry for entry in scan.scan_dataset(str(tmp_path)).entries}
    expected = {"title": "D\xe4mmerung", "artist": "Ann", "genre": "folk", "description": "A slow tune",
                "bpm": 92.0, "key": "dm", "moods": ["calm"], "date": "1999"}
    assert (entries["a.mp3"].meta, entries["a.mp3"].caption) == (expected, "tags")
    assert entries["b.mp3"].meta == expected | {"description": "a waltz", "bpm": 90.0}
    assert entries["b.mp3"].caption == "json"
    assert (entries["c.mp3"].meta.get("description"), entries["c.mp3"].caption) == (None, "none")
    out = check(tmp_path, capsys)
    assert "tags (1)" in out and "json (1)" in out and "date 2" in out and "0 with a problem" in out


@pytest.mark.parametrize("suffix, kind", (("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"), ("opus", "OGG")))
def test_tags_without_mutagen(suffix, kind, tmp_path, monkeypatch):
    """Those that libsndfile knows; the command that helps is said where there may be more."""
    monkeypatch.setattr(common, "has_package", lambda name: False)
    path = tmp_path / f"a.{suffix}"
    with soundfile.SoundFile(path, "w", RATE, 2, "OPUS" if suffix == "opus" else None, format=kind) as file:
        file.title, file.artist, file.genre, file.comment, file.date = "Dawn", "Ann", "Folk", "A tune", "1999"
        file.write(music())
    meta = {"title": "Dawn", "artist": "Ann", "genre": "folk", "description": "A tune", "date": "1999"}
    found = scan.scan_dataset(str(tmp_path))
    assert {name: text for name, text in found.entries[0].meta.items() if text} == meta
    said = ["tags of 1 files read in part: `pip install mutagen` reads them all"]
    assert found.notes == (said if suffix != "wav" else [])


@pytest.mark.parametrize("suffix, codec", (
    ("m4a", "aac"), ("wma", "wmav2"), ("webm", "libopus"), ("wv", "wavpack"), ("flac", "flac"),
    ("opus", "libopus")))
def test_tags_by_mutagen(suffix, codec, tmp_path):
    pytest.importorskip("mutagen")
    rate = 48_000 if codec == "libopus" else 44_100
    wav = music(0.5, rate=rate)
    path = write_by_av(tmp_path / f"a.{suffix}", codec, wav, rate, title="Dawn", artist="Ann", genre="Folk",
                       comment="A tune", date="1999")
    meta = {"title": "Dawn", "artist": "Ann", "genre": "folk", "description": "A tune", "date": "1999"}
    assert tags.read_tags(str(path), audio.audio_info(path).tags) == (meta, [])


def test_tags_that_cannot_be_read_are_left(tmp_path, monkeypatch):
    pytest.importorskip("mutagen")
    mp3 = write(tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(id3(4, TIT2="x", TBPM="fast")[:-4] + mp3)
    write(tmp_path / "b.wav")
    found = scan.scan_dataset(str(tmp_path))
    assert len(found.entries) == 2 and not found.skipped
