"""The codec: shapes, freezing, files that are refused; audio in and out; fitting that resumes exactly."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from support import audio, common, quality
import tokenizer
import toy
from tools import fit_codec

FIT = ["--dataset", "toy", "--filters", "4", "--ratios", "1", "20", "16", "--residual_layers", "1",
       "--dim", "8", "--card", "16", "--codebooks", "3", "--batch_size", "2", "--segment_seconds", "0.2",
       "--log_seconds", "1000"]


@pytest.fixture(scope="module")
def codec():
    return tokenizer.load_codec("toy")


def valid_clips(n: int) -> torch.Tensor:
    wavs = [toy.make_clip(0, 0, i, "valid").wav for i in range(n)]
    return torch.from_numpy(np.stack(wavs))[:, None]                                           # [B, 1, N]


# ----------------------------------------------------------------------------------------------------------
# the codec


@pytest.mark.parametrize("N", [1, 319, 320, 321, 15_999, 16_001])
def test_round_trip_lengths(codec, N):
    wav = 0.1 * torch.randn(2, 1, N)
    codes = codec.encode(wav)                                                                      # [B, K, T]
    T = -(-N // codec.hop)
    assert codes.shape == (2, codec.K, T) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < codec.card
    back = codec.decode(codes)
    assert back.shape == (2, 1, T * codec.hop) and back.dtype == torch.float32 and back.isfinite().all()


def test_embedded_codec_is_what_the_design_says(codec):
    assert (codec.sample_rate, codec.channels, codec.hop, codec.K, codec.card) == (16_000, 1, 320, 4, 256)
    assert codec.frame_rate == 50 and codec.name == "toy"
    assert tokenizer.TOY_FILE.stat().st_size <= 4e6
    stored = torch.load(tokenizer.TOY_FILE, weights_only=True)
    assert stored["format"] == tokenizer.CODEC_FORMAT and stored["config"]["seanet"]["causal"] is False


def test_embedded_codec_keeps_the_music(codec):
    wav = valid_clips(24)
    codes = codec.encode(wav)
    back = codec.decode(codes)
    measured = quality.round_trip_quality(wav, back, codec.sample_rate, codes, codec.card)
    assert measured["si_snr_db"] > 8 and measured["mel_db"] < 4.5, measured           # 300 clips: 9.0 and 3.2
    assert min(measured["perplexity"]) > 25, measured                              # no codebook has collapsed


def test_frozen(codec):
    codec.train()
    assert not any(m.training for m in codec.modules())
    assert not any(p.requires_grad for p in codec.parameters())
    wav = (0.1 * torch.randn(1, 1, 3200)).requires_grad_()
    back = codec.decode(codec.encode(wav))
    assert not back.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = codec.encode(wav)
        assert torch.equal(codes, codec.encode(wav)) and torch.equal(codec.decode(codes), back)
        assert codec.decode(codes).dtype == torch.float32


def test_codes_depend_neither_on_the_batch_nor_on_threads(codec):
    wav = valid_clips(3)
    whole = codec.encode(wav)
    assert torch.equal(whole, torch.cat([codec.encode(w) for w in wav.split(1)]))
    assert torch.equal(whole, tokenizer.load_codec("toy").encode(wav))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, codec.encode(wav)) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def random_codec(sound: int = 1, remember: float = 0.0, **shape) -> tokenizer.Codec:
    """Random weights in EnCodec's shape. sound: its channels; remember: bias of the LSTM's forget gates."""
    torch.manual_seed(0)
    seanet = dict(channels=1, dimension=16, n_filters=4, ratios=[8, 5, 4, 2], lstm=2, norm="none") | shape
    config = dict(sample_rate=16_000, seanet=seanet, rvq=dict(dimension=16, n_q=4, bins=64))
    codec = tokenizer.Codec("test", 16_000, *tokenizer.build_networks(config)).with_channels(sound)
    for layer in codec.quantizer.vq.layers:
        layer._codebook.embed.normal_()
    for lstm in (x for x in codec.decoder.modules() if isinstance(x, torch.nn.LSTM)):
        for name, bias in lstm.named_parameters():
            if name.startswith("bias_ih"):
                bias[lstm.hidden_size:2 * lstm.hidden_size] = remember
    return codec


SHAPES = {
    "as MusicGen's": dict(),
    "as EnCodec's at 24 kHz": dict(causal=True),
    "stereo in one": dict(sound=2, channels=2),
    "stereo in two": dict(sound=2),
    "an LSTM that remembers": dict(remember=5.0, causal=True),
    "no LSTM, wide dilation": dict(lstm=0, n_residual_layers=6, dilation_base=3, ratios=[4, 2]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_long_music_is_decoded_in_pieces(name, monkeypatch):
    """As in one piece, whatever the weights remember, and no call gets much more than a piece of a second."""
    codec = random_codec(**SHAPES[name])
    size = round(codec.frame_rate)
    codes, lengths = torch.randint(64, (2, codec.K, 3 * size + 33)), []
    whole = codec.decode(codes)
    monkeypatch.setattr(tokenizer, "PIECE_SECONDS", 1)
    codec.decoder.model[-1].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    got = codec.decode(codes)
    assert got.shape == whole.shape == (2, codec.channels, codes.shape[2] * codec.hop)
    assert (got - whole).abs().max() < 1e-5 * whole.abs().max()
    assert len(lengths) >= 4 * 2 * codec.streams and max(lengths) < 1.5 * size * codec.hop


@pytest.mark.parametrize("name, late", [
    ("toy", 5), ("as MusicGen's", 4), ("as EnCodec's at 24 kHz", 0), ("stereo in two", 4),
    ("an LSTM that remembers", 0)])
def test_codes_that_come_frame_by_frame_are_decoded_soon(name, late):
    """As at once, each frame at most so many frames later; convolutions that are causal wait for nothing but
    the first frames, which padding mirrors."""
    codec = tokenizer.load_codec("toy") if name == "toy" else random_codec(**SHAPES[name])
    codes, parts, waiting = torch.randint(64, (1, codec.K, 40)), [], []
    decode = codec.piece_decoder()
    for t, frame in enumerate(codes.split(1, -1)):
        wav = decode(frame, t == 39)
        parts += [] if wav is None else [wav]
        waiting.append(t + 1 - sum(part.shape[-1] for part in parts) // codec.hop)
    got, whole = torch.cat(parts, -1), codec.decode(codes)
    assert got.shape == whole.shape and (got - whole).abs().max() < 1e-5 * whole.abs().max()
    assert waiting[-1] == 0 and max(waiting[10:]) == late and max(waiting) <= 9


def test_wrong_input_is_named(codec):
    for wav in (torch.zeros(1, 640), torch.zeros(1, 2, 640), torch.zeros(1, 1, 0)):
        with pytest.raises(AssertionError):
            codec.encode(wav)
    for codes in (torch.zeros(1, 3, 5).long(), torch.full((1, 4, 5), 256), torch.full((1, 4, 5), -1)):
        with pytest.raises(AssertionError):
            codec.decode(codes)


def test_fingerprint_changes_with_a_weight():
    one, other = tokenizer.load_codec("toy"), tokenizer.load_codec("toy")
    assert one.fingerprint == other.fingerprint and len(one.fingerprint) == 64
    next(other.decoder.parameters()).view(-1)[0] += 1e-3
    assert one.fingerprint != other.fingerprint


def test_fewer_codebooks_are_the_first_levels(codec):
    two, wav = tokenizer.load_codec("toy", 2), valid_clips(2)
    codes = two.encode(wav)
    assert two.K == 2 and torch.equal(codes, codec.encode(wav)[:, :2])
    assert two.decode(codes).shape == wav.shape
    for K in (0, 5):
        with pytest.raises(ValueError, match="1 to 4"):
            tokenizer.load_codec("toy", K)


def test_quantizer_is_a_nearest_neighbor_after_another(codec):
    z = codec.encoder(valid_clips(1)[..., :3200])[0].T                                                # [T, D]
    codes = codec.encode(valid_clips(1)[..., :3200])[0]                                               # [K, T]
    for t, residual in enumerate(z.double()):
        for k, layer in enumerate(codec.quantizer.vq.layers):
            distances = [float((residual - v).square().sum()) for v in layer.codebook.double()]
            best = int(np.argmin(distances))
            assert codes[k, t] == best or distances[codes[k, t]] - distances[best] < 1e-4
            residual = residual - layer.codebook[codes[k, t]].double()


def test_small_and_large_noise_in_si_snr():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 1, 1, 80_000)
    assert abs(float(quality.si_snr(3 * x + 0.3 * noise, x)) - 20) < 0.1            # whatever the scale
    assert float(quality.mel_distance(x, x, 16_000)) == 0
    assert abs(float(quality.mel_distance(x, x / 2, 16_000)) - 6.02) < 0.1
    counts = quality.count_codes(torch.arange(8).view(1, 1, 8), 16)
    assert quality.perplexities(counts) == pytest.approx([8.0])


# ----------------------------------------------------------------------------------------------------------
# which codecs there are


def test_offline_encodec_says_which_file_goes_where(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError) as error:
        tokenizer.load_codec("encodec_24khz")
    message = str(error.value)
    assert str(tmp_path / "checkpoints" / "encodec_24khz-d7cc33bc.th") in message and "https://" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="2, 4, 8, 16, 32"):
        tokenizer.load_codec("encodec_24khz", 3)


def test_encodec_from_the_hub_cache(monkeypatch, tmp_path):
    """With weights in torch.hub's cache no network is needed; the folded network is the package's own."""
    from encodec import EncodecModel
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EncodecModel.encodec_model_24khz(pretrained=False).eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "encodec_24khz-d7cc33bc.th")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    codec = tokenizer.load_codec("encodec_24khz", 8)
    assert (codec.sample_rate, codec.frame_rate, codec.K, codec.card, codec.hop) == (24_000, 75, 8, 1024, 320)
    wav = 0.1 * torch.randn(1, 1, 4801)
    codes = codec.encode(wav)
    assert codes.shape == (1, 8, 16)
    package = model.decoder(model.quantizer.decode(codes.transpose(0, 1))).detach()
    torch.testing.assert_close(codec.decode(codes), package)
    (tmp_path / "checkpoints" / "encodec_24khz-d7cc33bc.th").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="d7cc33bc"):
        tokenizer.load_codec("encodec_24khz")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("tokenizer_test_was_here"),)


def test_refused_names_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="scale"):
        tokenizer.load_codec("encodec_48khz")
    with pytest.raises(ValueError, match="toy, encodec_24khz"):
        tokenizer.load_codec("tory")
    with pytest.raises(ValueError, match="no such file"):
        tokenizer.load_codec("missing.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"format": tokenizer.CODEC_FORMAT, "config": Evil()}, "object.pt")
    torch.save({"model": torch.zeros(1)}, "other.pt")
    Path("short.pt").write_bytes(tokenizer.TOY_FILE.read_bytes()[:1000])
    stored = torch.load(tokenizer.TOY_FILE, weights_only=True)
    stored["config"]["seanet"]["n_filters"] //= 2
    torch.save(stored, "shapes.pt")
    for name in ("pickle.pt", "object.pt", "other.pt", "short.pt", "shapes.pt"):
        with pytest.raises(ValueError, match=name) as error:
            tokenizer.load_codec(name)
        assert "\n" not in str(error.value)
    assert not Path("tokenizer_test_was_here").exists()


# ----------------------------------------------------------------------------------------------------------
# audio files


@pytest.mark.parametrize("suffix, tolerance",
                         [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.08), (".mp3", 0.08)])
def test_audio_round_trip_and_seeking(tmp_path, suffix, tolerance):
    path, rate = tmp_path / f"a{suffix}", 32_000
    t = torch.arange(3 * rate) / rate
    wav = torch.stack([0.5 * torch.sin(500 * t * (1 + t)), 0.3 * torch.sin(900 * t)])                 # [2, N]
    audio.write_audio(path, wav, rate)
    info = audio.audio_info(path)
    assert (info.sample_rate, info.channels) == (rate, 2) and abs(info.seconds - 3) < 0.1
    back = audio.read_audio(path)
    assert back.dtype == torch.float32 and back.shape[0] == 2 and abs(back.shape[1] - 3 * rate) < 0.1 * rate
    part = slice(rate // 10, 2 * rate)
    assert (back[:, part] - wav[:, part]).abs().max() < tolerance
    for start in (0.0, 0.71, 1.3337):
        piece = audio.read_audio(path, start, 0.5)
        first = round(start * rate)
        assert piece.shape == (2, rate // 2)
        torch.testing.assert_close(piece, back[:, first:first + rate // 2], atol=1e-5, rtol=0)
    assert audio.read_audio(path, 2.9, 5.0).shape[1] < 0.25 * rate                # only what is left
    assert audio.read_audio(path, 99.0).shape == (2, 0)


def test_channels_and_resampling(tmp_path):
    many = 0.1 * torch.arange(7).float()[:, None].expand(7, 4800)
    audio.write_audio(tmp_path / "seven.wav", many, 48_000)
    for channels, wanted in ((1, many.mean(0)[None]), (2, many[:2]), (None, many)):
        found = audio.read_audio(tmp_path / "seven.wav", channels=channels)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    audio.write_audio(tmp_path / "one.wav", many[3:4], 48_000)
    stereo = audio.read_audio(tmp_path / "one.wav", sample_rate=16_000, channels=2)
    assert stereo.shape == (2, 1600) and torch.equal(stereo[0], stereo[1])
    assert abs(float(stereo[0, 800]) - 0.3) < 1e-3
    audio.write_audio(tmp_path / "loud.wav", torch.tensor([[4.0, -4.0]]), 16_000)
    assert audio.read_audio(tmp_path / "loud.wav").abs().max() <= 1


def test_bad_audio_is_named(tmp_path):
    (tmp_path / "text.mp3").write_text("no music")
    for path in (tmp_path / "text.mp3", tmp_path / "missing.wav"):
        for call in (audio.audio_info, audio.read_audio):
            with pytest.raises(ValueError, match=path.name):
                call(path)
    audio.write_audio(tmp_path / "two.wav", torch.zeros(2, 8), 16_000)
    with pytest.raises(ValueError, match="2 channels, 6 are wanted"):
        audio.read_audio(tmp_path / "two.wav", channels=6)
    with pytest.raises(ValueError, match="suffix"):
        audio.write_audio(tmp_path / "noname", torch.zeros(1, 8), 16_000)


# ----------------------------------------------------------------------------------------------------------
# fitting


def fit(out, *more: str) -> int:
    return fit_codec.main([*FIT, "--out", str(out), "--steps", "24", "--autoencoder_share", "0.5", *more])


def test_fit_is_deterministic_and_resumes_exactly(tmp_path, capsys):
    assert fit(tmp_path / "a.pt") == 0
    assert fit(tmp_path / "b.pt", "--stop_after", "7") == 0
    assert not (tmp_path / "b.pt").exists()
    assert fit(tmp_path / "b.pt", "--stop_after", "8") == 0                       # past the quantiser's start
    assert fit(tmp_path / "b.pt") == 0
    assert "goes on at step 15" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in "ab")
    assert a["metrics"] == b["metrics"] and a["config"] == b["config"]
    assert all(torch.equal(v, b["state"][k]) for k, v in a["state"].items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]       # checkpoints are cleared away
    assert fit_codec.main([*FIT, "--out", str(tmp_path / "a.pt")]) == 2        # nothing is overwritten
    codec = tokenizer.load_codec(str(tmp_path / "a.pt"))
    assert (codec.K, codec.card, codec.hop) == (3, 16, 320)
    assert not torch.equal(run_of().batch(0), run_of("--seed", "1").batch(0))
    assert torch.equal(run_of().batch(0), run_of().batch(0))


def run_of(*more: str) -> fit_codec.CodecFit:
    args = fit_codec.fit_parser().parse_args([*FIT, "--out", "x", *more])
    segments = fit_codec.RandomSegments("toy", 16_000, 1, 3200, 320, args.seed)
    return fit_codec.CodecFit(args, fit_codec.codec_config(args), segments)


def test_fit_starts_near_the_waveform_and_learns():
    run = run_of("--dim", "32", "--steps", "60", "--lr", "1e-3", "--autoencoder_share", "0.99",
                 "--batch_size", "4")
    assert run.validate(4)["si_snr_db"] > -10                                # torch's own start: about -45 dB
    run.batch = lambda step, split="train", one=run.batch(0): one                  # one batch again and again
    losses = [run.update()["loss"] for _ in range(40)]
    assert losses[-1] < 0.85 * losses[0], losses


def test_commitment_of_every_level_reaches_the_encoder():
    """The package's quantiser gives levels 2..K no gradient."""
    run = run_of()
    run.start_quantizer()
    z = torch.randn(2, 8, 10, requires_grad=True)
    q, commitment, codes = fit_codec.quantize(run.codec.quantizer, z, learn=False)
    assert codes.shape == (2, 3, 10)
    torch.testing.assert_close(q, run.codec.quantizer.vq.decode(codes.transpose(0, 1)))
    q.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z))                                    # straight through
    residual = z.detach() - q.detach()
    z.grad = None
    commitment.backward()
    assert torch.nn.functional.cosine_similarity(z.grad.flatten(), residual.flatten(), dim=0) > 0.5


def test_dead_codes_live_again_and_codebooks_follow_their_latents():
    run = run_of()
    run.start_quantizer()
    book = run.codec.quantizer.vq.layers[0]._codebook
    book.cluster_size[3], book.embed[3] = 0, 1e3
    x = torch.randn(40, 8)
    generator = torch.Generator().manual_seed(0)
    fit_codec.update_codebook(book, x, common.nearest_vectors(x, book.embed), generator)
    assert (book.embed[3] == x).all(1).any() and book.cluster_size[3] == 1
    for _ in range(1500):
        fit_codec.update_codebook(book, x, torch.zeros(40).long(), None)
    torch.testing.assert_close(book.embed[0], x.mean(0), atol=1e-4, rtol=1e-3)


def test_fit_on_a_folder_skips_and_names_bad_files(tmp_path, capsys):
    folder = tmp_path / "music"
    folder.mkdir()
    for i in range(3):
        audio.write_audio(folder / f"{i}.wav", 0.1 * torch.randn(1, 4000), 16_000)
    (folder / "bad.mp3").write_text("no music")
    flags = [f if f != "toy" else str(folder) for f in FIT]
    assert fit_codec.main([*flags, "--out", str(tmp_path / "x.pt"), "--steps", "4"]) == 0
    assert "bad.mp3" in capsys.readouterr().out and (tmp_path / "x.pt").exists()


def test_fit_with_the_discriminator(tmp_path):
    assert fit_codec.main([*FIT, "--out", str(tmp_path / "x.pt"), "--steps", "3", "--adversarial",
                           "--autoencoder_share", "0.3"]) == 0


@pytest.mark.parametrize("flags", [["--ratios", "0", "5"], ["--card", "1"], ["--autoencoder_share", "1"],
                                   ["--steps", "0"], ["--device", "mps"], ["--dataset", "nowhere"],
                                   ["--segment_seconds", "0.01"], ["--sample_rate", "8000"]])
def test_bad_flags_are_one_line(tmp_path, flags, capsys):
    assert fit(tmp_path / "x.pt", *flags) == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 1


def test_command_line_round_trip(tmp_path, capsys):
    audio.write_audio(tmp_path / "in.wav", valid_clips(1)[0], 16_000)
    for words in ([], ["roundtrip"]):
        assert tokenizer.main([*words, str(tmp_path / "in.wav"), str(tmp_path / "out.wav")]) == 0
        said = capsys.readouterr().out
        assert "[1, 4, 80]" in said and "SI-SNR" in said and "ppl_q4" in said
        assert audio.audio_info(tmp_path / "out.wav").seconds == 1.6
    assert tokenizer.main([str(tmp_path / "none.wav"), str(tmp_path / "out.wav")]) == 2
    assert tokenizer.main([str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--codec", "tory"]) == 2
    assert "Traceback" not in capsys.readouterr().err
