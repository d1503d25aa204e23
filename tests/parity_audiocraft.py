"""Compares with audiocraft's own classes, which load what convert.py writes. Not run by pytest: its release asks for old packages.

    python -m venv aside && aside/bin/pip install -r requirements.txt transformers==4.57.1 wheel
    aside/bin/pip install --no-deps --no-build-isolation audiocraft==1.3.0 omegaconf antlr4-python3-runtime==4.9.3 julius
    aside/bin/python tests/parity_audiocraft.py

What audiocraft imports and does not need for this (xformers, spacy, av, demucs ..) is replaced by empty modules: see peers.py.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import peers                                                         # after the path


def main() -> None:
    torch.set_num_threads(1)
    peers.hide_unneeded_modules()
    import audiocraft.models.loaders as loaders
    import audiocraft.modules.conditioners as conditioners
    import transformers
    from audiocraft.models.builders import get_wrapped_compression_model
    from audiocraft.modules.conditioners import ConditioningAttributes

    import convert
    import test_convert as made
    import tokenizer
    from generate import Sampling, generate_codes
    conditioners.T5Conditioner.MODELS.append("t5-tiny")
    conditioners.T5Conditioner.MODELS_DIMS["t5-tiny"] = 24
    convert.T5_NAMES[24, 2, 3, 8, 40, 80] = "t5-tiny"
    for channels in (1, 2):
        folder = Path(tempfile.mkdtemp())
        package, t5 = made.package_of(made.published(channels), folder / "package")
        pieces, encoder = transformers.T5Tokenizer.from_pretrained(t5, extra_ids=0, legacy=True), made.published(channels).text_encoder
        conditioners.T5Tokenizer = SimpleNamespace(from_pretrained=lambda name: pieces)
        conditioners.T5EncoderModel = SimpleNamespace(from_pretrained=lambda name: encoder)
        data = convert.read(package, t5)
        convert.write_out(data, "audiocraft", folder / "ours")
        model, codec = convert.build_model(data), tokenizer.load_codec(str(package), channels=channels)
        theirs = loaders.load_lm_model(str(folder / "ours"), device="cpu")
        their_codec = get_wrapped_compression_model(loaders.load_compression_model(str(folder / "ours"), device="cpu"), theirs.cfg)
        compare(model, codec, theirs, their_codec, made.WORDS, ConditioningAttributes, Sampling, generate_codes)


@torch.no_grad()
def compare(model, codec, theirs, their_codec, words, Attributes, Sampling, generate_codes) -> None:
    """Prints and asserts: logits, delayed sequences, greedy codes with guidance, codes and audio of the codec."""
    codes = torch.randint(0, model.config.card, (5, model.config.K, 60), generator=torch.Generator().manual_seed(0))
    texts = words + [None]
    wanted = theirs.compute_predictions(codes, [Attributes(text={"description": text}) for text in texts])
    found, mask = model.predict(codes, model.conditioner(model.conditioner.prepare([{"text": text} for text in texts])))
    assert torch.equal(wanted.mask[0], mask)
    logits = float((wanted.logits - found)[wanted.mask].abs().max())
    sequence = theirs.pattern_provider.get_pattern(60).build_pattern_sequence(codes, theirs.special_token_id)[0]
    same_sequence = torch.equal(sequence, model.config.layout(60).build(codes, model.special, valid_only=False))
    asked = [Attributes(text={"description": text}) for text in words]
    greedy = theirs.generate(None, asked, max_gen_len=60, use_sampling=False, cfg_coef=3.0)
    same_greedy = torch.equal(greedy, generate_codes(model, [{"text": text} for text in words], 60, Sampling(cfg=3, temperature=0)))
    wav = torch.randn(3, codec.channels, 5000, generator=torch.Generator().manual_seed(0)) * 0.3
    encoded = their_codec.encode(wav)[0]
    audio = float((their_codec.decode(encoded) - codec.decode(encoded)).abs().max())
    print(f"channels {codec.channels}: logits {logits:.1e}, sequences equal {same_sequence}, greedy codes equal {same_greedy}, "
          f"codec's codes equal {torch.equal(encoded, codec.encode(wav))}, audio {audio:.1e}")
    assert logits < 1e-4 and audio < 1e-4 and same_sequence and same_greedy and torch.equal(encoded, codec.encode(wav))


if __name__ == "__main__":
    main()
