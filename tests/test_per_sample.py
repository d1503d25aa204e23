"""A sample depends on its conditions, the seed and its number, not on its batch, its place or threads.

A continuation is of real audio, and exactly as long as asked."""

import json

import pytest
import torch

import generate
from generate import MusicGenerator, Sampling, generate_codes, generate_long
from support import audio, kernels
from support.per_sample import Noise
from three_conditions import ALL, CLASSES, style_codes, tiny

WORDS = ["slow organ", "fast bells", None, "a calm harp with fast bells and a slow organ", "slow"]
# Elsewhere a product may round a row otherwise beside others: in so short clips that shows in no code.
EXACT = kernels.HAS_ONEDNN and kernels.HAS_AVX512


def noise_of(seed: int, number: int, cells=(5, 6), codes=range(4)) -> torch.Tensor:
    """[k, n]"""
    return Noise(seed, [number])(torch.tensor(cells), torch.tensor([[list(codes)] * len(cells)]))[0]


def test_noise_is_a_function_of_seed_number_cell_and_code():
    """Whatever else is asked for beside it, and in whichever order; each of the four changes it."""
    cells, codes = torch.tensor([9, 5]), torch.tensor([[[3, 1], [2, 0]], [[1, 3], [0, 2]]])
    many = Noise(7, [3, 1])(cells, codes)
    assert torch.equal(many[1, 1], noise_of(7, 1, [5], [0, 2])[0])
    assert torch.equal(many[0, 0], noise_of(7, 3, [9], [3, 1])[0])
    large = 2 ** 62
    asked = [noise_of(*x) for x in ((0, 0), (0, 1), (1, 0), (large, 0), (large + 1, 0), (0, large))]
    asked += [noise_of(0, 0, [6, 7]), noise_of(0, 0, codes=range(4, 8))]
    rows = torch.stack([x[0] for x in asked])
    assert len(rows.flatten().unique()) == rows.numel()


def test_noise_is_exponential_and_independent():
    """Of neighboring samples, cells and codes; the least and the greatest are finite and more than 0."""
    x = Noise(0, range(50))(torch.arange(40), torch.arange(200).expand(50, 40, -1))       # [50, 40, 200]
    assert 0 < x.min() and x.max() < 17
    for q in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = (x < -torch.tensor(1 - q).log()).double().mean()
        assert abs(share - q) < 5 * (q * (1 - q) / x.numel()) ** 0.5
    y = x.double() - 1
    for a, b in ((y[1:], y[:-1]), (y[:, 1:], y[:, :-1]), (y[..., 1:], y[..., :-1])):
        assert (a * b).mean().abs() < 5 * a.numel() ** -0.5


def asked_for(batch: list) -> list:
    """The conditions of samples by their numbers; every third has a melody, every other a style."""
    return [{"text": WORDS[i % 5], "melody": CLASSES[i % 4:] if i % 3 == 0 else None,
             "style": style_codes(i) if i % 2 else None} for i in batch]


@pytest.mark.parametrize("sampling", [
    Sampling(cfg=1, top_k=0), Sampling(cfg=3, top_k=5), Sampling(cfg=2, top_p=0.9, cfg_style=3)])
@pytest.mark.parametrize("fuse", [ALL, {"text": "prepend", "style": "cross+sum", "melody": "sum"}])
def test_a_sample_alone_and_in_any_batch(sampling, fuse):
    """Alone, at another place, among few and many: without guidance, with it, and with double guidance."""
    model = tiny(fuse)

    def draw(numbers) -> torch.Tensor:
        return generate_codes(model, asked_for(numbers), 12, sampling, noise=Noise(4, numbers))

    whole = draw(range(11))
    for batch in ([7], [3, 0], [10, 7, 3], [1, 2, 4, 5, 6, 8, 9]):
        assert torch.equal(draw(batch), whole[batch]), batch
    assert len(torch.unique(draw([0, 0, 7]), dim=0)) == 2 and not torch.equal(whole[0], whole[5])


@pytest.mark.skipif(not EXACT, reason="products round otherwise here")
def test_logits_of_a_row_have_the_same_bits_in_any_batch(monkeypatch):
    """Nothing but rounding is left to differ: with any number of rows and of threads."""
    model, logits = tiny(), []
    original = generate.sample_codes

    def spy(x, *more):
        logits.append(x[0].clone())
        return original(x, *more)

    monkeypatch.setattr(generate, "sample_codes", spy)
    wanted, before = None, torch.get_num_threads()
    try:
        for threads, rows in ((1, 1), (1, 3), (1, 30), (2, 1), (2, 3)):
            torch.set_num_threads(threads)
            logits.clear()
            generate_codes(model, asked_for(range(rows)), 5, Sampling(cfg=1, top_k=5))
            found = torch.cat(logits)
            wanted = found if wanted is None else wanted
            assert torch.equal(found, wanted), (threads, rows)
    finally:
        torch.set_num_threads(before)


def test_every_cell_of_a_long_piece_has_noise_of_its_own():
    """Only the last frame of a window, which the next one draws again, has its noise twice; a prompt has
    none."""
    drawn = []

    class Watched(Noise):
        def __call__(self, cells, codes):
            drawn.extend((cells + self.first_cell).tolist())
            return super().__call__(cells, codes)

    prompt = torch.randint(13, (1, 3, 5))
    generate_long(tiny({"text": "cross"}), asked_for([0]), 33, Sampling(cfg=1), window=12, stride=7,
                  noise=Watched(0, [0]), prompt=prompt)
    again = [frame * 3 + k for frame in (11, 18, 25) for k in range(3)]
    assert sorted(drawn) == sorted([*range(5 * 3, 33 * 3), *again])


# ----------------------------------------------------------------------------------------------------------
# lengths, and the command


def loudness_codes(wav: torch.Tensor) -> torch.Tensor:
    """[B,C,N] -> [B,T] of 0..12: the mean of 8 samples of all channels."""
    return (wav.mean(1).unflatten(1, (-1, 8)).mean(2) * 12).round().long()


class PlainCodec:
    """8 samples a frame at 8 kHz: the K codes of a frame repeat how loud it is; what it encodes is kept."""
    sample_rate, hop, frame_rate, fingerprint, name = 8000, 8, 1000.0, "0" * 64, "plain"

    def __init__(self, channels: int = 1):
        self.channels, self.encoded = channels, None

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        """[B,C,N] -> [B,3,T]"""
        assert wav.shape[1] == self.channels
        assert wav.shape[2] % self.hop == 0, "the last frame would be padded"
        self.encoded = wav
        return loudness_codes(wav)[:, None].expand(-1, 3, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """[B,3,T] -> [B,C,T*hop]"""
        return (codes[:, :1] / 12).repeat_interleave(self.hop, 2).expand(-1, self.channels, -1)


def make_music(channels: int = 1) -> MusicGenerator:
    """A model of windows of 20 frames, 0.02 s."""
    return MusicGenerator(tiny({"text": "cross"}), PlainCodec(channels), 20, Sampling(cfg=3, top_k=5))


@pytest.mark.parametrize("samples, length, channels", [
    (0, 391, 1), (3, 164, 2), (8, 161, 1), (77, 160, 2), (77, 400, 1), (160, 161, 1), (163, 164, 1),
    (163, 391, 2)])
def test_a_continuation_is_of_real_audio_and_exactly_as_long(samples, length, channels, monkeypatch):
    """The result is the prompt's codes, decoded, and then new ones; the model hears whole frames alone."""
    music, heard = make_music(channels), []
    original = generate.generate_codes

    def spy(*args, prompt, **more):
        heard.append(prompt)
        return original(*args, prompt=prompt, **more)

    monkeypatch.setattr(generate, "generate_codes", spy)
    given = torch.rand(2, channels, samples) * 0.5 + 0.5 if samples else None
    wav = music.generate(["slow organ", None], length / 8000, prompt=given)
    assert wav.shape == (2, channels, length)
    frames = samples // 8
    assert heard[0].shape[2] == min(frames, 18)
    if samples:
        silence = music.codec.encoded.shape[2] - samples
        assert silence < 8 and torch.equal(music.codec.encoded[..., silence:], given)
        start = samples - 8 * frames                                     # of the first whole frame
        assert torch.equal(heard[0][:, 0], loudness_codes(given[..., start:])[:, max(0, frames - 18):])
        decoded = music.codec.decode(music.codec.encode(torch.nn.functional.pad(given, (silence, 0))))
        assert torch.equal(wav[..., :samples], decoded[..., silence:])


def test_a_prompt_as_long_as_the_result_leaves_nothing():
    given = torch.rand(1, 163)
    with pytest.raises(ValueError, match="lasts 0.02 s"):
        make_music().generate([None], 163 / 8000, prompt=given)
    assert make_music().generate([None], 164 / 8000, prompt=given).shape == (1, 1, 164)


def test_the_command_gives_the_same_file_alone(monkeypatch, tmp_path):
    """By --first and by fewer --n, after a folder has files; and a continuation is as long as asked."""
    monkeypatch.setattr(MusicGenerator, "load", lambda *_, **__: make_music())
    run = ["--run", "x", "--seconds", "0.0401", "--device", "cpu"]
    audio.write_audio(tmp_path / "tune.wav", torch.rand(1, 101), 8000)

    def files(name: str, *flags) -> list:
        out = tmp_path / name
        assert generate.main([*run, *flags, "--out", str(out)]) in (0, None)
        return [path.read_bytes() for path in sorted(out.glob("*.wav"))]

    several = files("several", "--prompt", "slow organ", "--prompt", "fast bells", "--n", "3")
    assert len(set(several)) == 6
    assert files("few", "--prompt", "slow organ", "--n", "2") == several[:2]
    assert files("few", "--prompt", "fast bells", "--first", "4")[2:] == several[4:5]
    assert json.loads((tmp_path / "few" / "002.json").read_text())["number"] == 4
    assert files("seed", "--prompt", "fast bells", "--first", "4", "--seed", "1") != several[4:5]
    assert audio.read_audio(tmp_path / "several" / "000.wav").shape == (1, 321)
    tune = str(tmp_path / "tune.wav")
    both = files("tunes", "--prompt", "slow organ", "--unconditional", "--continue", tune)
    assert files("tune", "--unconditional", "--continue", tune, "--first", "1") == both[1:]
    assert all(audio.read_audio(tmp_path / "tunes" / f"00{i}.wav").shape == (1, 321) for i in (0, 1))


def test_a_bad_number(capsys, monkeypatch):
    monkeypatch.setattr(MusicGenerator, "load", lambda *_, **__: make_music())
    assert generate.main(["--run", "x", "--prompt", "a", "--first", "-1", "--device", "cpu"]) == 2
    assert "--first -1: it lies between 0 and 2^63" in capsys.readouterr().err
