"""Distances between sets of clips: the arithmetic against independent formulas, and what must be near and
what far."""

import json
import re

import numpy as np
import pytest
import torch

import conditioning
from evaluate import adherence, distances, embeddings, metrics
import generate
from support import audio
import tokenizer
import toy
from conditioning import Conditioner, ConditionerConfig
from evaluate.distances import frechet
from evaluate.embeddings import Moments
from model import ModelConfig, MusicGen

CODEC = tokenizer.load_codec("toy")


def moments(x: np.ndarray) -> Moments:
    return Moments.of(torch.from_numpy(x))


def reference_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Through the eigenvalues of the product of both covariances, which is not symmetric: another way to the
    same trace."""
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * overlap)


def drawn(rng, n: int, D: int, rank: int, shift: float = 0.0) -> np.ndarray:
    """n samples in D dimensions that span only `rank` of them."""
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, D)) + shift * rng.standard_normal(D)


CASES = {
    "full": (500, 24, 24),
    "one dimension": (50, 2, 1),
    "low rank": (500, 24, 5),
    "fewer samples than numbers": (10, 32, 32),
    "wide": (300, 128, 128),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("other", (None, "low rank"))
def test_frechet_against_independent_formulas(case, other):
    n, D, rank = CASES[case]
    rng = np.random.default_rng(len(case))
    a, b = drawn(rng, n, D, rank), drawn(rng, n, D, min(D, 5) if other else rank, 0.5)
    found = frechet(moments(a), moments(b))
    assert found == pytest.approx(reference_frechet(a, b), rel=1e-3)
    assert found == pytest.approx(frechet(moments(b), moments(a)), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_frechet_against_the_published_formula(case):
    """As the FID and FAD packages compute it: the square root of the product of the covariances, by scipy."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    n, D, rank = CASES[case]
    rng = np.random.default_rng(1 + len(case))
    a, b = drawn(rng, n, D, rank), drawn(rng, n, D, rank, 0.5)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    singular = np.linalg.matrix_rank(A @ B) < D  # they then add a little to the diagonals, as here
    eps = 1e-9 * np.eye(D) if singular else 0
    root = linalg.sqrtm((A + eps) @ (B + eps)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(root)
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_frechet_against_torchmetrics(case):
    """A published implementation as it is: torchmetrics' (of two more see the README)."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    n, D, rank = CASES[case]
    rng = np.random.default_rng(2 + len(case))
    a, b = drawn(rng, n, D, rank), drawn(rng, n, D, rank, 0.5)
    figures = [x for s in (a, b) for x in (s.mean(0), np.cov(s, rowvar=False))]
    theirs = fid._compute_fid(*map(torch.from_numpy, figures))
    assert frechet(moments(a), moments(b)) == pytest.approx(float(theirs), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_set_lies_at_distance_zero_from_itself(case):
    n, D, rank = CASES[case]
    a = 100 * drawn(np.random.default_rng(2), n, D, rank, 3.0)
    assert frechet(moments(a), moments(a)) <= 1e-9 * np.trace(np.cov(a, rowvar=False))


def test_gaussians_with_a_known_distance():
    """N(0, 1) and N(3, 4) in each of 8 dimensions: 8 * (9 + 1)."""
    a = Moments(1, 0.0, 2, torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    products = 4 * torch.eye(8, dtype=torch.float64) + 18
    b = Moments(1, 0.0, 2, torch.full((8,), 6.0, dtype=torch.float64), products)
    assert frechet(a, b) == pytest.approx(80)


def test_extrapolation_takes_the_bias_away():
    """Two sets of one distribution: the distance of 60 clips is far over zero, that of infinitely many near
    it."""
    rng = np.random.default_rng(3)
    reference = moments(rng.standard_normal((20_000, 16)))
    clips = [moments(rng.standard_normal((1, 16))) for _ in range(60)]
    groups = [embeddings.sum_moments(clips[i::distances.SUBSETS]) for i in range(distances.SUBSETS)]
    finite = frechet(reference, embeddings.sum_moments(clips))
    infinite = distances.frechet_inf(reference, groups)
    assert finite > 1 and abs(infinite) < 0.35 * finite
    with pytest.raises(ValueError, match="too few"):
        distances.frechet_inf(reference, clips[:3])


def test_divergence_of_labels():
    values = ("a", "b", "c")
    assert distances.kl_of_counts(["a", "b"], ["b", "a"], values) == 0
    half = ["a"] * 10 + ["b"] * 10
    some, more = (distances.kl_of_counts(half, ["a"] * n + ["b"] * (20 - n), values) for n in (14, 20))
    assert 0 < some < more < 10
    p, q = np.array([10.5, 10.5, 0.5]) / 21.5, np.array([14.5, 6.5, 0.5]) / 21.5
    assert some == pytest.approx((p * np.log(p / q)).sum())


def clips(n: int = 8, seed: int = 0) -> list:
    """n rendered toy clips [1,N]."""
    return [torch.from_numpy(toy.make_clip(seed, 0, i, "valid").wav)[None] for i in range(n)]


@pytest.mark.parametrize("name", ("codec", "mel"))
def test_distance_grows_with_noise(name):
    embedding, real = embeddings.load_embedding(name, CODEC), clips()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(wav.shape, generator=generator) for wav in real]
    whole = embeddings.sum_moments([embedding(wav, 16_000) for wav in real])
    found = []
    for level in (0, 0.003, 0.01, 0.03, 0.1):
        noisy = [embedding(wav + level * x, 16_000) for wav, x in zip(real, noise)]
        found.append(frechet(whole, embeddings.sum_moments(noisy)))
    assert found[0] < 1e-6 and all(a < b for a, b in zip(found, found[1:])), found


def test_embeddings_name_themselves():
    codec, mel = (embeddings.load_embedding(name, CODEC) for name in ("codec", "mel"))
    assert codec.fingerprint != mel.fingerprint
    assert "frame of 20 ms" in str(codec) and codec.fingerprint[:12] in str(codec)
    assert codec(torch.zeros(1, 16_000), 16_000).n == 50 and mel(torch.zeros(1, 16_000), 16_000).n == 2
    assert mel(torch.zeros(2, 100), 44_100).n == 1  # shorter than a window, stereo, another rate
    assert codec(torch.zeros(1, 65 * 16_000), 16_000).n == 65 * 50   # in pieces


def test_order_of_the_bounds():
    """Other clips of the same kind lie nearer than the floor; each clip's own melody is nearer than
    another's."""
    real, other = clips(48), clips(48, seed=5)  # of twelve clips the bias alone is larger than the floor
    through = [distances.reconstruction(wav, CODEC) for wav in other]
    result = distances.against_reference(
        lambda i, j: (real[i:j], through[i:j]), 48, CODEC, labels=True, tunes=True
    )
    for name in ("fad_codec", "fad_mel"):
        assert 0 < result[name]["ceiling"] < result[name]["generated"] < result[name]["floor"], (name, result)
    assert result["kl_instrument"]["ceiling"] < result["kl_instrument"]["floor"]
    same = distances.against_reference(lambda i, j: (real[i:j], real[i:j]), 6, CODEC, batch=5, tunes=True)
    assert same["fad_codec"]["generated"] < 1e-6
    assert same["chroma"]["generated"] > 0.999 > same["chroma"]["floor"] + 0.1


def test_the_training_clips_beside_the_others():
    """A column of their own, where there are any; the melody's row has none."""
    real, other = clips(8), clips(8, seed=5)
    sides = (lambda i, j: (real[i:j], other[i:j])), (lambda i, j: (real[i:j], real[i:j], other[i:j]))
    plain, found = (distances.against_reference(make, 8, CODEC, batch=3, labels=True, tunes=True)
                    for make in sides)
    for name in ("fad_codec", "fad_mel", "kl_tempo"):
        assert "training" not in plain[name] and found[name]["training"] == plain[name]["generated"]
    assert found["fad_mel"]["generated"] < 1e-6 < found["fad_mel"]["training"]
    lines = distances.distances_table(found, "8 clips").splitlines()
    assert lines[0].split() == ["8", "clips", "generated", "ceiling", "training", "floor"]
    assert lines[0].index("floor") + 5 == len(lines[1]) == len(lines[-1]) and len(lines[-1].split()) == 4
    assert "training" not in distances.distances_table(plain, "8 clips")


def test_ranks_change_nothing():
    """Two ranks, one after the other in this process, with the same figures as one."""
    class Half:
        def __init__(self, rank, others):
            self.rank, self.world_size, self.others = rank, 2, others

        def gather(self, value):
            self.others[self.rank] = value
            return self.others

    real, other, shared = clips(7), clips(7, seed=5), [[], []]
    make = lambda i, j: (real[i:j], other[i:j])
    how = dict(batch=2, labels=True, tunes=True)
    alone = distances.against_reference(make, 7, CODEC, **how)
    distances.against_reference(
        make, 7, CODEC, ranks=Half(0, shared), **how
    )  # rank 1's part is not there yet
    assert distances.against_reference(make, 7, CODEC, ranks=Half(1, shared), **how) == alone


def test_floor_keeps_the_spectrum():
    wav = clips(1)[0]
    noise = distances.noise_like(wav, 3)
    assert noise.shape == wav.shape
    assert float(noise.square().mean()) == pytest.approx(float(wav.square().mean()), rel=1e-3)
    assert torch.equal(noise, distances.noise_like(wav, 3))
    assert not torch.equal(noise, distances.noise_like(wav, 4))


PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)


def tiny(names=("text",)) -> generate.MusicGenerator:
    """A model of random weights."""
    config, conditioner = ModelConfig(K=4, card=256, dim=32, num_layers=1, num_heads=2), None
    if names:
        shape = dict(text_vocab=conditioning.vocabulary_size(PIECES), text_dim=16, text_hidden=32)
        entering = ConditionerConfig(fuse=dict.fromkeys(names, "cross"), **shape)
        conditioner = Conditioner(entering, 32, {"text": PIECES})
    return generate.MusicGenerator(MusicGen(config, conditioner), CODEC, 80, generate.Sampling(cfg=1))


def test_untrained_is_drawn_anew():
    """The same weights from the same seed, other ones than the model's, and no draw of anybody else's
    changes."""
    music, state = tiny(), torch.get_rng_state()
    one, again, other = (adherence.untrained_copy(music, seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state()) and one.keys() == music.model.state_dict().keys()
    assert all(torch.equal(one[k], again[k]) for k in one)
    for found in (other, music.model.state_dict()):
        assert not torch.equal(one["emb.0.weight"], found["emb.0.weight"])


def test_table_of_sets():
    """Of a model that knows nothing: real clips, the codec, chance; and what is out of order is said."""
    rows = adherence.compare_toy_sets(tiny(), 24, seed=1, batch=9)
    assert list(rows) == ["real", "codec", "trained", "untrained", "shuffled"]
    assert all(rows["real"][name] >= 0.9 for name in toy.VALUES) and rows["untrained"]["root"] < 0.5
    for name in ("fad_codec", "fad_mel", "kl"):
        assert 0 < rows["real"][name] and rows["trained"][name] == rows["shuffled"][name]
    for name in ("fad_mel", "kl"):
        assert rows["real"][name] < rows["trained"][name] and rows["codec"][name] < rows["trained"][name]
    good = {title: dict.fromkeys(toy.VALUES, 1 - i / 5) | {"kl": float(i)} for i, title in enumerate(rows)}
    assert adherence.out_of_order(good) == []
    good["trained"] |= dict(root=0.9, kl=3.5)
    assert adherence.out_of_order(good) == [("root", "codec", "trained"), ("kl", "trained", "untrained")]
    with pytest.raises(ValueError, match="without text"):
        adherence.compare_toy_sets(tiny(()), 4, seed=1)
    assert metrics.main(["--table"]) == 2


def folder(path, wavs: list, rate: int = 16_000):
    path.mkdir()
    for i, wav in enumerate(wavs):
        audio.write_audio(path / f"{i:03d}.wav", wav, rate)
    return str(path)


def test_folders(tmp_path, capsys):
    reference, generated = folder(tmp_path / "a", clips(8)), folder(tmp_path / "b", clips(8, seed=5))
    flags = ["--reference", reference, "--generated", generated]
    assert metrics.main([*flags, "--fad_inf", "--labels"]) == 0
    out = capsys.readouterr().out
    names = "embedding  codec toy (fingerprint", "embedding  mel 32", CODEC.fingerprint[:12]
    rows = "fad_codec", "fad_inf_mel", "kl_tempo", "  chroma"
    for said in (f"reference  {reference}: 8 clips, 12.8 s", *names, *rows):
        assert said in out, said
    stereo = folder(tmp_path / "c", [torch.randn(2, 30_000)], 44_100)
    assert metrics.main(["--reference", stereo, "--generated", generated, "--fad_embedding", "mel"]) == 0
    assert "  chroma" not in capsys.readouterr().out                   # they are no pairs


@pytest.mark.parametrize("flags, says", [
    ("--reference {a}", "both --reference and --generated"),
    ("--reference {a} --generated {none}", "no such folder"),
    ("--reference {empty} --generated {a}", "no audio files there"),
    ("--reference {a} --generated {bad}", "bad.wav"),
    ("--reference {a} --generated {short}", "0.1 s"),
    ("--reference {a} --generated {a} --fad_inf", "too few"),
    ("--reference {a} --generated {a} --codec nowhere.pt", "nowhere.pt"),
    ("--reference {a} --generated {a} --fad_embedding clap", "clap"),
    ("--reference {a} --generated {nan}", "not finite"),
    ("--generated {a} --clap_text", "clap"),
    ("--reference {a} --generated {a} --run {a}", "--run: --reference does not read it"),
    ("--reference {a} --generated {a} --n 3", "--n: --reference does not read it"),
    ("--generated {a} --clap_text --labels", "--labels: --clap_text does not read it"),
    ("--run {a} --codec {a}", "--codec: --run does not read it"),
    ("--run {a} --table --cfg 3", "--cfg: --table does not read it"),
    ("--run {a} --table --seconds 3", "--seconds: --table does not read it"),
    ("--run {a} --conditions --split heldout", "--split: --conditions does not read it"),
    ("--split heldout", "--split: of which model?"),
    ("--weights int8", "--weights: of which model?"),
    ("--conditions", "of which model"),
])
def test_bad_folders_are_one_line(flags, says, tmp_path, capsys):
    import soundfile
    places = {name: str(tmp_path / name) for name in ("a", "none", "empty", "bad", "short", "nan")}
    folder(tmp_path / "a", clips(2))
    for name in ("empty", "bad", "nan"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "bad.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan" / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    folder(tmp_path / "short", [torch.zeros(1, 100)])
    assert metrics.main(flags.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


@pytest.fixture()
def clap(tmp_path) -> str:
    """A folder with a tiny CLAP model that was never trained, whose tokenizer knows bytes."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    audio = transformers.ClapAudioConfig(
        num_mel_bins=64,
        patch_embeds_hidden_size=32,
        depths=[1, 1, 1, 1],
        hidden_size=256,
        num_attention_heads=[1, 2, 4, 8],
        projection_dim=32,
    )
    text = transformers.ClapTextConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=32,
        max_position_embeddings=40,
    )
    folder = tmp_path / "clap"
    config = dict(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=32)
    transformers.ClapModel(transformers.ClapConfig(**config)).save_pretrained(folder)
    # as laion/larger_clap_music; pieces fit
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    known = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: i for i, piece in enumerate(known)}
    pieces = Tokenizer(models.BPE(vocabulary, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def test_clap_against_its_own_package(clap):
    """Features of audio and text are the package's own of the same input, and the similarity is their
    cosine."""
    import transformers
    found, model = embeddings.Clap(clap), transformers.ClapModel.from_pretrained(clap).eval()
    wav, text = clips(1)[0].tile(1, 3), "slow organ"                 # 4.8 s at 16 kHz
    mono = torch.nn.functional.interpolate(wav[None], scale_factor=3)[0, 0]  # any audio at 48 kHz
    with torch.no_grad():
        extract = transformers.ClapFeatureExtractor.from_pretrained(clap)
        heard = extract(mono.numpy(), sampling_rate=48_000, return_tensors="pt")
        read = transformers.AutoTokenizer.from_pretrained(clap)(text, return_tensors="pt")
        features = model.get_audio_features(**heard), model.get_text_features(**read)
        sound, words = (getattr(x, "pooler_output", x) for x in features)
    assert torch.equal(found.audio(mono), sound) and torch.equal(found.text(text), words[0])
    cosine = float(torch.cosine_similarity(sound, words))
    assert found.similarity(mono[None], 48_000, [text]) == [pytest.approx(cosine)]
    assert found.text("word " * 100).shape == (32,)                  # cut where its positions end
    assert found.audio(mono.tile(3)).shape == (2, 32)                # 14.4 s
    embedding = embeddings.clap_embedding(clap)
    assert embedding(wav, 16_000).total.shape == (32,)


def test_a_fused_clap_hears_the_same_twice(clap):
    """Of clips beyond ten seconds too: each piece as the package hears it alone, whatever NumPy's seed."""
    import transformers
    config = transformers.ClapConfig.from_pretrained(clap)
    config.audio_config.enable_fusion = True             # as laion/clap-htsat-fused
    torch.manual_seed(1)
    model, extract = transformers.ClapModel(config).eval(), transformers.ClapFeatureExtractor()
    model.save_pretrained(clap)
    extract.save_pretrained(clap)
    found, size = embeddings.Clap(clap), 480_000
    mono = torch.rand(3 * size + 24_000, generator=torch.Generator().manual_seed(0)) - 0.5        # 30.5 s
    with torch.no_grad():
        alone = []
        for piece in mono[:3 * size].split(size):
            features = model.get_audio_features(**extract(piece.numpy(), sampling_rate=48_000,
                                                          return_tensors="pt"))
            alone.append(getattr(features, "pooler_output", features))
    for seed in range(4):
        np.random.seed(seed)
        torch.testing.assert_close(found.audio(mono), torch.cat(alone))     # the half second is left out
    assert found.audio(mono[:24_000]).shape == (1, 32)


def test_text_consistency_of_a_folder(clap, tmp_path, capsys):
    """What a person computes by hand, from the files that generate.py writes; a clip without its prompt is
    named."""
    wavs, prompts = clips(3), ["slow organ", "fast bells", "fast bells"]
    place = folder(tmp_path / "made", wavs)
    flags = ["--generated", place, "--clap_text", "--clap", clap]
    assert metrics.main(flags) == 2 and "no 000.json beside it" in capsys.readouterr().err
    for i, prompt in enumerate(prompts):
        (tmp_path / "made" / f"{i:03d}.json").write_text(json.dumps(dict(prompt=prompt)))
    assert metrics.main(flags) == 0
    model = embeddings.Clap(clap)
    files = [audio.read_audio(f"{place}/{i:03d}.wav") for i in range(3)]
    near = lambda texts: np.mean([model.similarity(wav, 16_000, [x])[0] for wav, x in zip(files, texts)])
    own, others = near(prompts), near(("fast bells", "slow organ", "slow organ"))
    said = f"3 clips: {own:.4f} with their prompts, {others:.4f} with those of others"
    assert said in capsys.readouterr().out
    (tmp_path / "made" / "000.json").write_text('{"prompt": null}')
    assert metrics.main(flags) == 2 and "000.wav: its prompt is None" in capsys.readouterr().err


def test_divergence_of_claps_labels(clap, tmp_path, capsys):
    """What transformers' own zero-shot pipeline finds for each clip; pair by pair where names are the same,
    else of the means."""
    import transformers
    labels, real, made = ["organ", "bells", "a drum kit"], clips(3), clips(3, seed=7)
    sets = dict(real=real, made=made, other=made[:2])
    places = [folder(tmp_path / name, wavs) for name, wavs in sets.items()]
    model, judge = transformers.ClapModel.from_pretrained(clap).eval(), embeddings.Clap(clap)

    def odds(path):
        wav = audio.read_audio(path)
        mono = audio.resample(wav[0], 16_000, 48_000)
        extract = transformers.ClapFeatureExtractor.from_pretrained(clap)
        heard = extract(mono.numpy(), sampling_rate=48_000, return_tensors="pt")
        read = transformers.AutoTokenizer.from_pretrained(clap)(labels, return_tensors="pt", padding=True)
        words = {name: read[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p = model(**heard, **words).logits_per_audio.softmax(-1)[0].double()
        torch.testing.assert_close(judge.label_probabilities(wav, 16_000, labels), p, atol=1e-5, rtol=0)
        return p.numpy()

    p, q = ([odds(f"{place}/{i:03d}.wav") for i in range(3)] for place in places[:2])
    kl = lambda p, q: float((p * np.log(p / q)).sum())
    flags = ["--reference", places[0], "--fad_embedding", "mel", "--clap", clap]
    flags += ["--clap_labels", *labels, "--generated"]
    for place, expected, how in ((places[1], np.mean([kl(*pair) for pair in zip(p, q)]), "pair by pair"),
                                 (places[2], kl(np.mean(p, 0), np.mean(q[:2], 0)), "of means"),
                                 (places[0], 0.0, "pair by pair")):
        assert metrics.main(flags + [place]) == 0
        out = capsys.readouterr().out
        found = [float(x) for x in re.search(r"  kl_clap +(\S+) +(\S+) +(\S+)", out).groups()]
        assert found[0] == pytest.approx(expected, abs=1e-4) and how in out and found[2] > found[1] >= 0
    assert metrics.main([*flags[:6], "--clap_labels", "organ", "--generated", places[1]]) == 2
    assert "--clap_labels organ: at least two" in capsys.readouterr().err
