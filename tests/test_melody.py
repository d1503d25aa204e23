"""Melody: chroma against its definition, the token cache against live audio, and how the model reads it."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import generate
import tokenizer
from generate import Sampling, generate_long
from support import audio, chroma
from support.encode import make_cache
from support.chroma import Chroma
from support.melody import melody_window
from three_conditions import CLASSES, tiny, tone

RATE = 32_000


# ----------------------------------------------------------------------------------------------------------
# chroma


@pytest.mark.parametrize("rate", (16_000, 22_050, 24_000, 32_000, 44_100))
def test_chroma_of_a_tone_is_its_class_and_of_silence_nothing(rate):
    assert 4 * chroma.hop_length(rate) / rate == pytest.approx(0.512, abs=1e-4)
    assert chroma.count_frames(30 * rate, rate) == 235
    for midi in (48, 60, 69, 82):
        found = chroma.chromagram(tone(midi, rate), rate)
        assert found.shape == (chroma.count_frames(2 * rate, rate), 12)
        assert found.amax(1).eq(1).all()
        assert (found.argmax(1) == midi % 12).all()
    assert chroma.chromagram(torch.zeros(2, 2 * rate), rate).abs().max() == 0
    # 120 dB below full scale
    assert chroma.chromagram(1e-6 * tone(60, rate), rate).abs().max() == 0


def test_silent_frames_are_no_class():
    """Half silence, half a tone: an argmax alone would hear a C in the silence."""
    wav = torch.cat([torch.zeros(2 * RATE), tone(62)])
    found = chroma.strongest(chroma.chromagram(wav, RATE))
    assert found[:12].abs().max() == 0
    assert torch.equal(found[-12:], CLASSES[[2] * 12])


def test_short_audio_is_padded_to_a_window():
    for samples in (1, 500, 4 * 4096 - 1, 4 * 4096):
        found = chroma.chromagram(tone(60)[:samples], RATE)
        assert found.shape == (chroma.count_frames(samples, RATE), 12) == (5, 12)


def test_chroma_against_librosa():
    librosa = pytest.importorskip("librosa")
    for rate in (16_000, 24_000, 32_000, 44_100):
        n_fft = 4 * chroma.hop_length(rate)
        theirs = librosa.filters.chroma(sr=rate, n_fft=n_fft, tuning=0, n_chroma=12)
        assert np.abs(chroma.filterbank(rate, n_fft).numpy() - theirs).max() < 1e-6
    wav = np.random.default_rng(0).normal(size=3 * RATE).astype(np.float32) / 5
    power = np.abs(librosa.stft(wav, n_fft=16384, hop_length=4096, pad_mode="reflect")) ** 2
    theirs = librosa.filters.chroma(sr=RATE, n_fft=16384, tuning=0) @ power
    theirs = librosa.util.normalize(theirs, norm=np.inf, axis=0)
    assert np.abs(chroma.chromagram(torch.from_numpy(wav), RATE).numpy().T - theirs).max() < 1e-4


@pytest.mark.parametrize("pieces", ([0, 10, 20, 33], [0, 16, 33]))
def test_chroma_in_pieces_is_that_of_the_whole_file(pieces):
    """With two seconds on both sides, as the token cache reads them."""
    rate = 16_000
    wav = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 33 * rate)).astype(np.float32))
    whole, found = chroma.chromagram(wav, rate), []
    for start, stop in zip(pieces, pieces[1:]):
        first = start - min(start, 2)
        end = None if stop == pieces[-1] else stop * rate
        piece = wav[:, first * rate:(stop + 2) * rate]
        found.append(chroma.part_of_file(piece, first * rate, start * rate, end, rate))
    assert torch.cat(found).shape == whole.shape
    assert (torch.cat(found) - whole).abs().max() < 1e-5


def test_stems_without_demucs():
    if os.environ.get("HAVE_DEMUCS"):
        pytest.skip("demucs is installed")
    with pytest.raises(ValueError, match="pip install demucs"):
        chroma.load_separator()


# ----------------------------------------------------------------------------------------------------------
# data: live and from the cache


def songs(folder: Path, seconds=(7.0, 12.3)) -> Path:
    """Files whose pitch changes every half a second."""
    folder.mkdir()
    for i, length in enumerate(seconds):
        notes = np.random.default_rng(i).integers(48, 84, math.ceil(2 * length))
        wav = torch.cat([tone(int(n), 16_000, 0.5) for n in notes])[None, :round(length * 16_000)]
        audio.write_audio(folder / f"song{i}.wav", wav, 16_000)
        (folder / f"song{i}.txt").write_text(f"a slow song, number {i}, with bells")
    return folder


def test_chroma_from_the_cache_against_live_audio(tmp_path):
    """The cache's frames begin up to half a hop off the segment's, and its edges hear what lies beyond.

    The rest is the same melody."""
    root, out = songs(tmp_path / "songs"), str(tmp_path / "codes")
    codec = tokenizer.load_codec("toy")
    features = {"chroma": Chroma()}
    make_cache(str(root), out, codec, features=features)
    both = [data.open_dataset(str(root), 0.5, "train", 3.0, codec, features=features, cache=c)
            for c in (None, out)]
    same, inner, count = 0, 0, 0
    for index in range(12):
        live, cached = (d.example(0, index) for d in both)
        assert live.start_seconds == cached.start_seconds
        heard, stored = live.features["chroma"], cached.features["chroma"]
        assert abs(len(heard) - len(stored)) <= 1  # at a file's end
        assert heard.dtype == stored.dtype == np.float32
        frames = min(len(heard), len(stored))
        a, b = (torch.from_numpy(x[:frames]).argmax(1) for x in (heard, stored))
        same += (a == b).sum().item()
        inner += (a == b)[2:-2].sum().item()
        count += frames
    assert same / count > 0.7
    assert inner / (count - 12 * 4) > 0.8    # without the two frames at each edge
    # longer than the song: from its start
    whole = data.CacheDataset(out, codec, 30.0, 0, split="train", valid=0.5, features=features)
    live = data.open_dataset(str(root), 0.5, "train", 30.0, codec, features=features)
    a, b = whole.example(0, 0), live.example(0, 0)
    largest = np.abs(a.features["chroma"] - b.features["chroma"]).max()
    assert a.start_seconds == b.start_seconds == 0
    assert largest < 2e-3, largest


def test_a_cache_of_before_chroma_trains_with_text_alone(tmp_path):
    codec = tokenizer.load_codec("toy")
    root, out = str(songs(tmp_path / "songs", (1.6, 1.6, 1.6))), str(tmp_path / "codes")
    features = {"chroma": Chroma()}
    make_cache(root, out, codec, features=features)
    whole = dict(codec=codec, min_segment_ratio=1.0, features=features)
    cached = data.open_dataset(root, **whole, cache=out).example(0, 0)
    live = data.open_dataset(root, **whole).example(0, 0)
    assert live.path == cached.path
    # a whole clip: float16's rounding
    assert np.abs(live.features["chroma"] - cached.features["chroma"]).max() < 1e-3
    with pytest.raises(ValueError, match="drums and bass"):
        data.open_dataset(root, codec=codec, features={"chroma": Chroma(stems=True)}, cache=out)
    for path in Path(out).glob("*.chroma.npy"):
        path.unlink()
    assert data.open_dataset(root, codec=codec, cache=out).example(0, 0).features == {}
    with pytest.raises(ValueError, match="holds no chroma, which melody needs: make another"):
        data.open_dataset(root, codec=codec, features=features, cache=out)


# ----------------------------------------------------------------------------------------------------------
# the condition


def test_the_public_weights_null_melody():
    part = tiny(melody_null_bin0=True).conditioner.parts["melody"]
    values, mask = part.prepare([None, CLASSES[3:5], torch.zeros(6, 12)])
    assert mask.all()
    assert torch.equal(values[0], CLASSES[[0] * 6])
    assert torch.equal(values[1], CLASSES[[3, 4, 0, 0, 0, 0]])
    assert torch.equal(values[2], CLASSES[[0] * 6])


def test_melody_is_cut_padded_and_its_strongest_class_taken():
    soft = CLASSES[:9] * 0.7 + 0.3
    part = tiny().conditioner.parts["melody"]
    values, mask = part.prepare([soft, soft[:2].numpy().astype(np.float16)])
    assert torch.equal(values[0], CLASSES[:6])
    assert torch.equal(mask.sum(1), torch.tensor([6, 2]))
    values, _ = tiny(melody_argmax=False).conditioner.parts["melody"].prepare([soft])
    assert torch.equal(values[0], soft[:6])


def test_a_melody_begins_again_after_its_end():
    assert melody_window(CLASSES[:5], 3, 7).argmax(1).tolist() == [3, 4, 0, 1, 2, 3, 4]


def test_a_melody_is_read_on_in_each_window(monkeypatch):
    """Windows of 12 frames with stride 8 begin at frames 0, 8 and 16.

    The chroma has half as many frames: windows begin at its frames 0, 4 and 8. The melody has 9 of them."""
    model, seen, original = tiny(), [], generate.generate_codes

    def spy(model, values, *rest, **more):
        seen.append(values[0]["melody"].argmax(1).tolist())
        return original(model, values, *rest, **more)

    monkeypatch.setattr(generate, "generate_codes", spy)
    asked, sampling = [{"melody": CLASSES[:9]}], Sampling(cfg=1, temperature=0)
    generate_long(model, asked, 26, sampling, window=12, stride=8)
    assert seen == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 0], [8, 0, 1, 2, 3, 4]]
    seen.clear()
    # a prompt longer than a window: its last 10 frames begin at 10, and the next window's 3 at 18
    prompt = torch.randint(13, (1, 3, 20))
    generate_long(model, asked, 26, sampling, window=12, stride=8, prompt=prompt)
    assert seen == [[5, 6, 7, 8, 0, 1], [0, 1, 2, 3, 4, 5]]
