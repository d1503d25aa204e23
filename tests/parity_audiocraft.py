"""Compares with audiocraft's own classes, which load what interop writes.

Not run by pytest: its release asks for old packages.

    python -m venv aside && aside/bin/pip install -r requirements.txt transformers==4.57.1 wheel
    aside/bin/pip install --no-deps --no-build-isolation audiocraft==1.3.0 omegaconf julius \\
        antlr4-python3-runtime==4.9.3
    aside/bin/python tests/parity_audiocraft.py

What audiocraft imports and does not need for this (xformers, spacy, av ..) is replaced by empty modules: see
tools/peers.py. Two it would need for a melody are replaced too: demucs, so that the whole audio is heard, and
librosa's filterbank by transformers', which has the same numbers.
"""

import itertools
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools import peers  # after the path


def main() -> None:
    torch.set_num_threads(1)
    peers.hide_unneeded_modules()
    import audiocraft.models.loaders as loaders
    import audiocraft.modules.chroma
    import audiocraft.modules.conditioners as conditioners
    import demucs
    import transformers
    from audiocraft.models.builders import get_wrapped_compression_model

    import foreign as made
    from interop import convert, load, t5
    from generate import MusicGenerator
    conditioners.T5Conditioner.MODELS.append("t5-tiny")
    conditioners.T5Conditioner.MODELS_DIMS["t5-tiny"] = 24
    t5.PUBLISHED_T5[24, 2, 3, 8, 40, 360] = "t5-tiny"
    demucs.pretrained.get_model().to().sources = ["drums", "bass", "other", "vocals"]
    conditioners.ChromaStemConditioner._get_stemmed_wav = lambda self, wav, sample_rate: wav

    def filterbank(sr, n_fft, tuning, n_chroma):
        bank = transformers.audio_utils.chroma_filter_bank(n_fft, n_chroma, sr, tuning=tuning)
        return bank.astype("float32")

    audiocraft.modules.chroma.filters.chroma = filterbank
    for channels, melody in itertools.product((1, 2), (False, True)):
        folder = Path(tempfile.mkdtemp())
        package, t5_folder = made.package_of(made.published(channels, melody=melody), folder / "package")
        pieces = transformers.T5Tokenizer.from_pretrained(t5_folder, extra_ids=0, legacy=True)
        encoder = made.published(channels, melody=melody).text_encoder
        conditioners.T5Tokenizer = SimpleNamespace(from_pretrained=lambda name, pieces=pieces: pieces)
        conditioners.T5EncoderModel = SimpleNamespace(from_pretrained=lambda name, encoder=encoder: encoder)
        data = load.read_published(package, t5_folder)
        convert.write_model(data, "nano", folder / "nano")
        convert.write_model(data, "audiocraft", folder / "ours")
        theirs = loaders.load_lm_model(str(folder / "ours"), device="cpu")
        their_codec = loaders.load_compression_model(str(folder / "ours"), device="cpu")
        their_codec = get_wrapped_compression_model(their_codec, theirs.cfg)
        if melody:  # as their MusicGen sets it for every model of this kind
            theirs.condition_provider.conditioners["self_wav"]._use_masking = False
        tune = made.tune if melody else None
        compare(MusicGenerator.load(folder / "nano"), theirs, their_codec, made.WORDS, tune)


def asked(texts: list, wavs: list, rate: int) -> list:
    """Their attributes of texts and of audio [C,N] to follow, None where there is none."""
    from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition

    def condition(wav):
        mono = torch.zeros(1, 1, 1) if wav is None else wav.mean(0)[None, None]
        return WavCondition(mono, torch.tensor([0 if wav is None else wav.shape[1]]), [rate], [None])
    return [ConditioningAttributes(text={"description": text}, wav={"self_wav": condition(wav)})
            for text, wav in zip(texts, wavs)]


@torch.no_grad()
def compare(ours, theirs, their_codec, words: list, tune) -> None:
    """Prints and asserts: logits, sequences, greedy codes with guidance, codes and audio of the codec.

    ours: a MusicGenerator; tune(seconds, seed): audio to follow, or None."""
    from generate import Sampling, generate_codes, values_at
    model, codec, texts = ours.model, ours.codec, words + [None]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, model.config.card, (5, model.config.K, 60), generator=generator)
    wavs = [tune and tune(2.5, seed).expand(codec.channels, -1) for seed in range(4)]
    melodies = [None] + wavs    # a text alone, a melody alone, both; or texts alone
    wanted = theirs.compute_predictions(codes, asked(texts, melodies, codec.sample_rate))
    values = values_at(model, ours.condition_values(texts, melody=melodies), 0)
    found, mask = model.predict(codes, model.conditioner(model.conditioner.prepare(values)))
    assert torch.equal(wanted.mask[0], mask)
    logits = float((wanted.logits - found)[wanted.mask].abs().max())
    their_pattern, our_pattern = theirs.pattern_provider.get_pattern(60), model.config.layout(60)
    sequence = their_pattern.build_pattern_sequence(codes, theirs.special_token_id)[0]
    same_sequence = torch.equal(sequence, our_pattern.build(codes, model.special, valid_only=False))
    greedy = theirs.generate(None, asked(words, wavs, codec.sample_rate), max_gen_len=100, use_sampling=False,
                             cfg_coef=3.0)
    values = values_at(model, ours.condition_values(words, melody=wavs), 0)
    same_greedy = torch.equal(greedy, generate_codes(model, values, 100, Sampling(cfg=3, temperature=0)))
    wav = torch.randn(3, codec.channels, 5000, generator=torch.Generator().manual_seed(0)) * 0.3
    encoded = their_codec.encode(wav)[0]
    audio = float((their_codec.decode(encoded) - codec.decode(encoded)).abs().max())
    same_codes = torch.equal(encoded, codec.encode(wav))
    print(f"channels {codec.channels}, {' and '.join(model.conditioner.parts)}: logits {logits:.1e}, "
          f"sequences equal {same_sequence}, greedy codes equal {same_greedy}, "
          f"codec's codes equal {same_codes}, audio {audio:.1e}")
    assert logits < 1e-4 and audio < 1e-4 and same_sequence and same_greedy and same_codes


if __name__ == "__main__":
    main()
