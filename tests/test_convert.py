"""Published weights in and ours out, against the models of transformers with random weights of small dimensions."""

import base64
import io
import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from support import audio, chroma
import conditioning
from interop import convert
import generate
import tokenizer
import toy
import train
from conditioning import ConditionerConfig
from generate import MusicGenerator, Sampling, generate_codes
from model import SIZES, ModelConfig

try:
    import transformers
    transformers.logging.set_verbosity_error()
except ImportError:
    transformers = None
VERSION = "4.57.1"
needs_transformers = pytest.mark.skipif(transformers is None, reason=f"needs transformers: pip install transformers=={VERSION}")
WORDS = ["slow organ", "fast bells", "a calm harp with drums", "bright flute in C"]
PIECES = conditioning.fit_sentencepiece(WORDS * 9, 60)


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Weights large enough for every part to matter; nothing left at 0 or 1."""
    for name, x in list(module.named_parameters()) + list(module.named_buffers()):
        if name.endswith(("norm.weight", "original0", "weight_g")):
            x.uniform_(0.5, 1.5)
        elif x.is_floating_point() and "embed_positions" not in name and not name.endswith("inited"):
            x.normal_(std=x.shape[-1] ** -0.5 if x.dim() > 1 and "embed" not in name else 0.5)


def published(channels=1, width=32, melody=False, **t5):
    """A MusicgenForConditionalGeneration (or MusicgenMelody's, with melodies of 20 frames) of small dimensions with random weights."""
    text = transformers.T5Config(vocab_size=80, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                                 relative_attention_num_buckets=8, relative_attention_max_distance=20, **t5)
    codec = transformers.EncodecConfig(target_bandwidths=[1.0], sampling_rate=16000, hidden_size=16, num_filters=4, codebook_size=32,
                                       upsampling_ratios=[8, 5, 4, 2], use_causal_conv=False, use_conv_shortcut=False)
    kind = "MusicgenMelody" if melody else "Musicgen"
    decoder = getattr(transformers, f"{kind}DecoderConfig")(
        vocab_size=32, hidden_size=width, num_hidden_layers=3, ffn_dim=4 * width, num_attention_heads=2, num_codebooks=4 * channels,
        audio_channels=channels, pad_token_id=32, bos_token_id=32)
    torch.manual_seed(0)
    more = dict(chroma_length=20) if melody else {}
    config = getattr(transformers, f"{kind}Config").from_sub_models_config(text, codec, decoder, **more)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config.update(decoder_start_token_id=32, bos_token_id=32, pad_token_id=32)          # as beside the public weights
    randomise(model)
    return model


def save(model, folder, **kwargs):
    """The folder that transformers writes, and T5's pieces, which the published ones have beside it."""
    model.save_pretrained(folder, **kwargs)
    (folder / "spiece.model").write_bytes(PIECES)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["mono", "stereo"])
def pair(request, tmp_path_factory):
    """(theirs, ours as a MusicGenerator, folder)."""
    if transformers is None:
        pytest.skip(f"needs transformers: pip install transformers=={VERSION}")
    theirs = published(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / "model")
    return theirs, MusicGenerator.load(folder), folder


@torch.no_grad()
def test_text_encoder(pair):
    theirs, ours, _ = pair
    part = ours.model.conditioner.parts["text"]
    ids, mask = part.prepare(WORDS)
    wanted = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    assert (part.encoder(ids, mask) - wanted)[mask].abs().max() < 1e-5
    wanted = theirs.enc_to_dec_proj(wanted) * mask[..., None]
    assert (part(ids, mask)[0] - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_logits_at_every_position(pair):
    """A batch of texts of several lengths and a null one: padding is masked there as it is here."""
    theirs, ours, _ = pair
    model = ours.model
    K, card = model.config.K, model.config.card
    seq = torch.randint(0, card + 1, (5, K, 40), generator=torch.Generator().manual_seed(1))
    ids, mask = model.conditioner.parts["text"].prepare(WORDS + [None])
    hidden = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    wanted = theirs(encoder_outputs=(hidden,), attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1)).logits
    found = model.logits(seq, model.conditioner({"text": (ids, mask)}))
    assert (found.flatten(0, 1) - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp_min(1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [320, 6400, 5001])
def test_codec(pair, samples):
    theirs, ours, folder = pair
    codec = tokenizer.load_codec(str(folder))
    wav = torch.randn(3, 1, samples, generator=torch.Generator().manual_seed(samples)) * 0.3
    codes = theirs.audio_encoder.encode(wav).audio_codes[0]
    assert torch.equal(codec.encode(wav), codes) and len(codes.unique()) > 5
    assert (codec.decode(codes) - theirs.audio_encoder.decode(codes[None], [None])[0]).abs().max() < 1e-5
    assert ours.codec.channels == ours.codec.streams == theirs.config.decoder.audio_channels


@torch.no_grad()
def greedy(theirs, ids, mask, T: int, guidance: float = 3.0, **given) -> torch.Tensor:
    """Codes [B,K,T] that transformers generates. A sequence of T frames has T + levels steps with the first, which is special."""
    channels, K = theirs.config.decoder.audio_channels, theirs.config.decoder.num_codebooks
    seen, decode = [], theirs.audio_encoder.decode
    theirs.audio_encoder.decode = lambda codes, **kwargs: seen.append(codes[0]) or decode(codes, **kwargs)
    try:
        theirs.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, guidance_scale=guidance, max_length=T + K // channels,
                        **given)
    finally:
        del theirs.audio_encoder.decode
    return torch.stack(seen, 2).flatten(1, 2)                                                           # [B, K, T]


def test_greedy_generation_with_guidance(pair):
    """The same tokens over 100 frames, of a batch whose texts are of several lengths."""
    theirs, ours, _ = pair
    ids, mask = ours.model.conditioner.parts["text"].prepare(WORDS)
    wanted = greedy(theirs, ids, mask, 100)
    found = generate_codes(ours.model, [{"text": t} for t in WORDS], 100, Sampling(cfg=3, temperature=0))
    assert torch.equal(found, wanted) and len(found.unique()) > 10
    assert not torch.equal(found, generate_codes(ours.model, [{"text": t} for t in WORDS], 100, Sampling(cfg=1, temperature=0)))


# ---------------------------------------------------------------------------------------------------------------------
# melody


@pytest.fixture(scope="module", params=[dict(), dict(channels=2), dict(width=24)], ids=["mono", "stereo", "text as wide as the model"])
def tuned(request, tmp_path_factory):
    """(theirs, ours as a MusicGenerator, folder) with melody and text in front of the codes."""
    if transformers is None:
        pytest.skip(f"needs transformers: pip install transformers=={VERSION}")
    theirs = published(melody=True, **request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / "model")
    return theirs, MusicGenerator.load(folder), folder


def tune(seconds, seed=0, rate=16_000) -> torch.Tensor:
    """Notes of half a second with some noise, and a silence [1, N]."""
    generator = torch.Generator().manual_seed(seed)
    pitch = torch.randint(48, 84, (math.ceil(2 * seconds),), generator=generator)
    time = torch.arange(rate // 2) / rate
    notes = torch.cat([torch.sin(2 * math.pi * 440 * 2 ** ((p - 69) / 12) * time) for p in pitch])[:round(seconds * rate)]
    notes += 0.01 * torch.randn(notes.shape, generator=generator)
    notes[rate // 2:rate] = 0
    return 0.3 * notes[None]


def extractor(rate=16_000):
    """transformers' own, for windows as long as at its 32 kHz."""
    return transformers.MusicgenMelodyFeatureExtractor(sampling_rate=rate, hop_length=rate * 16 // 125, n_fft=rate * 64 // 125)


@needs_transformers
@pytest.mark.parametrize("rate", [16_000, 24_000, 32_000])
@pytest.mark.parametrize("seconds", [0.3, 2.7])
def test_chroma_is_that_of_their_feature_extractor(rate, seconds):
    """Silent frames are its first class; a frame of less than 94 dB below full scale is silence here, a class of its own there."""
    part = conditioning.MelodyConditioner(ConditionerConfig(melody_frames=chroma.count_frames(round(seconds * rate), rate),
                                                            melody_null_bin0=True), 8)
    for wav in (tune(seconds, 1, rate), torch.randn(1, round(seconds * rate)) * 0.1, torch.zeros(1, rate)):
        wanted = extractor(rate)(wav[0].numpy(), sampling_rate=rate, return_tensors="pt").input_features
        found, mask = part.prepare([chroma.chroma(wav, rate)])
        frames = min(wanted.shape[1], found.shape[1])
        assert mask.all() and frames > 4 and torch.equal(found[:, :frames], wanted[:, :frames])
    quiet = 1e-6 * torch.sin(2 * math.pi * 440 * 2 ** (-7 / 12) * torch.arange(round(seconds * rate)) / rate)         # a D
    assert not chroma.chroma(quiet, rate).any()
    assert extractor(rate)(quiet.numpy(), sampling_rate=rate, return_tensors="pt").input_features[0, 2:-2].argmax(-1).eq(2).all()


@torch.no_grad()
def test_logits_with_melody_at_every_position(tuned):
    """Texts of several lengths and a null one, melodies and a null one: what stands in front of the codes, and the logits."""
    theirs, ours, _ = tuned
    model, texts = ours.model, WORDS + [None]
    K, card = model.config.K, model.config.card
    generator = torch.Generator().manual_seed(1)
    seq = torch.randint(0, card + 1, (5, K, 40), generator=generator)
    melodies = [torch.rand(20, 12, generator=generator) for _ in range(4)] + [None]
    features = torch.stack([F.one_hot(torch.zeros(20).long() if m is None else m.argmax(1), 12) for m in melodies]).float()
    attributes = [{"text": text, "melody": m} for text, m in zip(texts, melodies[::-1])]
    inputs = model.conditioner.prepare(attributes)
    ids, mask = inputs["text"]
    wanted = theirs(input_ids=ids, attention_mask=mask.long(), input_features=features.flip(0), decoder_input_ids=seq.flatten(0, 1))
    conditions = model.conditioner(inputs)
    assert (conditions.prefix - wanted.encoder_hidden_states).abs().max() < 1e-5
    found, logits = model.logits(seq, conditions), wanted.logits[:, -40:]
    print(f"largest difference {(found.flatten(0, 1) - logits).abs().max():.1e} of logits up to {logits.abs().max():.1f}")
    assert (found.flatten(0, 1) - logits).abs().max() < 1e-4 * logits.abs().max().clamp_min(1)
    alone = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1)).logits[:, -40:]       # text alone
    found = model.logits(seq, model.conditioner(model.conditioner.prepare([{"text": text} for text in texts])))
    assert (found.flatten(0, 1) - alone).abs().max() < 1e-4 * alone.abs().max().clamp_min(1)


@needs_transformers
def test_melody_beside_codes_of_another_rate(tmp_path):
    """75 frames a second over a codec of 24 kHz: 7.8 of them are of the melody, in windows of 12,288 samples."""
    folder = save(published(melody=True), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["audio_encoder"] |= dict(sampling_rate=24_000, target_bandwidths=[1.5])
    (folder / "config.json").write_text(json.dumps(config))
    data = convert.read(folder)
    assert data["conditioner_config"]["melody_rate"] == 320 / 3072 and data["segment_frames"] == 30 * 75
    with pytest.raises(ValueError, match="windows of 12288 samples, there only in powers of two; its melody has 20 frames, there 235"):
        convert.write_out(data, "audiocraft", tmp_path / "no")
    convert.write_out(data, "hf", tmp_path / "out")
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out").n_fft == 12_288


@pytest.mark.parametrize("given", ["text and melody", "text", "melody"])
def test_greedy_generation_with_melody(tuned, given):
    """The same tokens over 100 frames, of audio to follow that is shorter than a segment (it begins again) and longer (it is cut)."""
    theirs, ours, _ = tuned
    texts = [None] * 4 if given == "melody" else WORDS
    ids, mask = ours.model.conditioner.parts["text"].prepare(texts)
    for seconds in (1.5, 4.0):
        wavs = [None] * 4 if given == "text" else [tune(seconds, seed).expand(ours.codec.channels, -1) for seed in range(4)]
        features = {} if given == "text" else extractor()([w[0].numpy() for w in wavs], sampling_rate=16_000, return_tensors="pt")
        wanted = greedy(theirs, ids, mask, 100, use_cache=False, **features)         # with it 4.57.1 loses all conditions (its issue 45647)
        found = ours.codes(ours.attributes(texts, wavs), 2.0, sampling=Sampling(cfg=3, temperature=0))
        assert torch.equal(found, wanted) and len(found.unique()) > 10
        plain = ours.codes(ours.attributes(WORDS), 2.0, sampling=Sampling(cfg=3, temperature=0))
        assert torch.equal(found, plain) == (given == "text")


# ---------------------------------------------------------------------------------------------------------------------
# folders: every way they are written, and what is wrong with them


@needs_transformers
def test_shards_and_pickles_and_old_weight_norms(tmp_path):
    """One file, several, torch's own format, and the names of before parametrizations give the same tensors."""
    theirs = published()
    whole = convert.read(save(theirs, tmp_path / "whole"))
    folder = save(theirs, tmp_path / "shards", max_shard_size="60kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "whole", pickled)
    (pickled / "model.safetensors").unlink()
    state = {k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v
             for k, v in theirs.state_dict().items()}                # with the copy of T5's embedding
    torch.save(state, pickled / "pytorch_model.bin")
    for other in (folder, pickled):
        found = convert.read(other)
        assert found["codec"]["fingerprint"] == whole["codec"]["fingerprint"]
        assert found["model"].keys() == whole["model"].keys()
        assert all(torch.equal(x, found["model"][name]) for name, x in whole["model"].items())
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)               # as before torch 1.6
    assert torch.equal(convert.read(pickled)["model"]["out_norm.bias"], whole["model"]["out_norm.bias"])


@needs_transformers
@torch.no_grad()
def test_text_as_wide_as_the_model_has_no_projection(tmp_path):
    theirs = published(width=24)
    assert not hasattr(theirs, "enc_to_dec_proj")
    ours = MusicGenerator.load(save(theirs, tmp_path / "hf"))
    ids, mask = ours.model.conditioner.parts["text"].prepare(WORDS[:1])
    wanted = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    assert (ours.model.conditioner({"text": (ids, mask)}).cross - wanted).abs().max() < 1e-5


def proto_fields(content: bytes) -> list:
    """[(number, value)] of a protocol buffer: integers, and bytes for all else."""
    found, at = [], 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = content[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        key = varint()
        size = varint() if key & 7 in (0, 2) else 4
        found.append((key >> 3, size if key & 7 == 0 else content[at:at + size]))
        at += 0 if key & 7 == 0 else size
    return found


def unigram(captions) -> tuple[bytes, dict]:
    """A sentencepiece model as T5 has it, and the same as the public tokenizer.json hold it."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=out, vocab_size=150, model_type="unigram", hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    top = proto_fields(out.getvalue())
    pieces = [dict(proto_fields(value)) for number, value in top if number == 1]
    vocab = [(piece[1].decode(), struct.unpack("<f", piece[2])[0]) for piece in pieces]
    table = dict(proto_fields(dict(top)[3]))[2]
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    return out.getvalue(), {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **special} for i in range(3)],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]}, "decoder": space,
        "post_processor": {"type": "TemplateProcessing", "single": end, "pair": end,
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*vocab, *[(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]]}}


@needs_transformers
def test_vocabulary_from_tokenizer_json(tmp_path, capsys):
    """The same ids as from spiece.model, and as their fast tokenizer gives, on 200 captions and odd characters."""
    texts = [toy.draw_clip(1, 0, i)[1] for i in range(200)] + ["ﬁne Ｔｅｘｔ ½ é — “x”", "  two   spaces", "日本 drums", "Émile ☃"]
    model, content = unigram([toy.draw_clip(0, 0, i)[1] for i in range(2000)] + ["ﬁne Ｔｅｘｔ é"] * 3)
    folder = save(published(), tmp_path / "hf")
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fast = transformers.T5TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours, wanted = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (convert.read_pieces(folder), model))
    assert ours.vocab_size() == wanted.vocab_size() > 100
    for text in texts:
        assert ours.encode(text) == wanted.encode(text) and [*ours.encode(text), 1] == fast(text).input_ids, text
    assert convert.main([str(folder)]) == 2 and "vocabulary has" in capsys.readouterr().err          # more pieces than its T5 has rows
    for change in (dict(model={**content["model"], "type": "BPE"}), dict(normalizer=None), dict(model={"type": "Unigram"})):
        (folder / "tokenizer.json").write_text(json.dumps({**content, **change}))
        assert convert.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert "not the vocabulary of T5" in error and error.count("\n") == 1


class Evil:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@needs_transformers
def test_wrong_folders_are_refused_with_one_line(tmp_path, capsys):
    source = save(published(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    state = published().state_dict()

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder)
        return folder

    def edit(part, **changes):
        def change(folder):
            new = json.loads(json.dumps(config))
            (new[part] if part else new).update(changes)
            (folder / "config.json").write_text(json.dumps(new))
        return change

    def weights_of(content, name="pytorch_model.bin"):
        def change(folder):
            (folder / "model.safetensors").unlink()
            torch.save(content, folder / name)
        return change

    def cut(name, size):
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    def evil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))

    cases = [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors, model.safetensors.index.json"),
        (lambda f: (f / "spiece.model").unlink(), "hf download google-t5/t5-base spiece.model --local-dir"),
        (cut("spiece.model", 50), "not a sentencepiece model"),
        (cut("config.json", 99), "not readable as JSON"),
        (cut("model.safetensors", 5000), "not a safetensors file, or truncated"),
        (cut("model.safetensors", 200_000), "not a safetensors file, or truncated"),
        (edit(None, model_type="llama"), "'llama', 'musicgen' or 'musicgen_melody' was expected"),
        (edit("text_encoder", feed_forward_proj="gated-gelu"), "feed_forward_proj gated-gelu"),
        (edit("text_encoder", model_type="bert"), "'bert', 't5' was expected"),
        (edit(None, model_type="musicgen_melody", num_chroma=24), "num_chroma 24, chroma_length 235; 12 and"),
        (edit(None, model_type="musicgen_melody", chroma_length="9"), "num_chroma 12, chroma_length 9; 12 and"),
        (edit(None, model_type="musicgen_melody"), "2 missing: audio_enc_to_dec_proj.bias"),
        (edit("audio_encoder", model_type="dac"), "'dac', EnCodec was expected"),
        (edit("audio_encoder", num_filters=8), "of another shape"),
        (edit("audio_encoder", target_bandwidths=[0.5]), "has 1 to 2"),
        (edit("decoder", num_hidden_layers=4), "missing: decoder.model.decoder.layers.3."),
        (edit("decoder", num_hidden_layers=2), "unexpected: decoder.model.decoder.layers.2."),
        (edit("decoder", hidden_size=64, ffn_dim=256), "of another shape"),
        (edit("decoder", activation_function="relu"), "activation_function relu, gelu was expected"),
        (edit("decoder", num_codebooks="4"), "not that of a MusicGen"),
        (edit("text_encoder", d_kv="8"), "makes no model"),
        (weights_of({k: v for k, v in state.items() if "lm_heads.1" not in k}), "1 missing: decoder.lm_heads.1.weight"),
        (weights_of({**state, "extra": torch.zeros(1)}), "1 unexpected: extra"),
        (weights_of([1, 2]), "not a file of tensors by name"),
        (evil, "not a file of plain tensors"),
        (lambda f: (f / "model.safetensors").rename(f / "x") and (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x"}}'), "not an index of shards"),
    ]
    for change, says in cases:
        folder = broken(change)
        assert convert.main([str(folder)]) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and error.startswith("convert.py: "), (says, error)
    assert not (tmp_path / "owned").exists()
    assert convert.main([str(source)]) == 0 and "4 x 32 codes" in capsys.readouterr().out


def test_a_published_name_says_how_to_get_it(monkeypatch):
    """Without huggingface_hub, one line with the command."""
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="hf download facebook/musicgen-small --local-dir musicgen-small"):
        convert.locate("facebook/musicgen-small")


@pytest.mark.parametrize("size, fuse, channels, millions", [
    ("small", convert.TEXT, 1, 420), ("medium", convert.TEXT, 1, 1839), ("large", convert.TEXT, 1, 3257),
    ("medium", convert.MELODY, 1, 1386), ("large", convert.MELODY, 1, 2451), ("large", convert.TEXT, 2, 3291), ("large", convert.MELODY, 2, 2485)])
def test_full_sizes(size, fuse, channels, millions):
    """Names and shapes of the published sizes, without allocating them: parameters with T5-base's projection, SPEC L6; stereo has four
    more pairs of table and head, 4 x 4097 x 2048 = 33.6M."""
    c = ConditionerConfig(fuse=fuse, text_vocab=32128, text_dim=768, text_layers=12, text_heads=12, text_head_dim=64, text_hidden=3072)
    text, K = fuse == convert.TEXT, 4 * channels
    model = convert.skeleton(ModelConfig(K=K, cross_attention=text, **SIZES[size]), c, {"text": PIECES})
    assert {x.device.type for x in model.parameters()} == {"meta"}
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if ".encoder." not in name}
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6) == millions
    D, layers = SIZES[size]["dim"], SIZES[size]["num_layers"]
    assert (D, layers) == dict(small=(1024, 24), medium=(1536, 48), large=(2048, 48))[size]
    last = f"transformer.layers.{layers - 1}"
    wanted = {**{f"emb.{k}.weight": (2049, D) for k in range(K)}, **{f"linears.{k}.weight": (2048, D) for k in range(K)},      # SPEC L7
              f"{last}.self_attn.in_proj_weight": (3 * D, D), f"{last}.self_attn.out_proj.weight": (D, D),
              f"{last}.linear1.weight": (4 * D, D), f"{last}.linear2.weight": (D, 4 * D), f"{last}.norm2.bias": (D,),
              "out_norm.weight": (D,), "conditioner.parts.text.output_proj.weight": (D, 768)}
    cross = {f"{last}.cross_attention.in_proj_weight": (3 * D, D), f"{last}.cross_attention.out_proj.weight": (D, D)}
    wanted |= cross if text else {"conditioner.parts.melody.output_proj.weight": (D, 12), "conditioner.parts.melody.output_proj.bias": (D,)}
    assert wanted.items() <= shapes.items() and any("cross" in name for name in shapes) == text
    theirs = [n for name in model.state_dict() for n in convert.rename(name)]
    assert len(set(theirs)) == len(theirs) == len(model.state_dict()) + (4 if text else 2) * layers


# ---------------------------------------------------------------------------------------------------------------------
# commands


@needs_transformers
def test_generate_and_round_trip_from_a_folder(pair, tmp_path, capsys):
    _, ours, folder = pair
    assert generate.main(["--model", str(folder), "--prompt", "slow organ", "--seconds", "0.4", "--out", str(tmp_path / "g")]) == 0
    wav = audio.read_audio(tmp_path / "g" / "000.wav")
    assert wav.shape == (ours.codec.channels, 6400)
    assert tokenizer.main([str(tmp_path / "g" / "000.wav"), str(tmp_path / "back.wav"), "--codec", str(folder)]) == 0
    assert "4 x 32 codes" in capsys.readouterr().out


@needs_transformers
def test_generate_from_a_melody_folder(tuned, tmp_path, capsys):
    """A file to follow, from the command line; refused where it is too short."""
    _, ours, folder = tuned
    audio.write_audio(tmp_path / "in.wav", tune(1.5, rate=22_050), 22_050)
    audio.write_audio(tmp_path / "short.wav", tune(0.4), 16_000)
    command = ["--model", str(folder), "--seconds", "0.4", "--out", str(tmp_path / "g"), "--melody"]
    assert generate.main([*command, str(tmp_path / "in.wav"), "--prompt", "slow organ"]) == 0, capsys.readouterr().err
    assert generate.main([*command, str(tmp_path / "in.wav")]) == 0
    assert audio.read_audio(tmp_path / "g" / "001.wav").shape == (ours.codec.channels, 6400)
    assert generate.main([*command, str(tmp_path / "short.wav")]) == 2 and "at least 0.512 s" in capsys.readouterr().err


TINY = ["--dataset", "toy", "--updates_per_epoch", "4", "--epochs", "1", "--batch_size", "4", "--valid_samples", "4", "--eval_samples", "1",
        "--generate_samples", "1", "--warmup_steps", "0", "--lr", "1e-3", "--dtype", "float32", "--device", "cpu"]


@needs_transformers
def test_fine_tuning_changes_what_is_trainable_alone(tmp_path, capsys):
    """A run from a folder: T5 stays bit for bit and out of the optimiser; it is resumed, and another starts from it."""
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = convert.read(folder)["model"]
    command = [*TINY, "--init_from", str(folder), "--out", str(out)]
    assert train.main(command) == 0, capsys.readouterr().err
    data = convert.read_deployment(out)
    frozen = {name for name in before if ".encoder." in name}
    same = {name for name, x in data["model"].items() if torch.equal(x, before[name])}
    assert frozen and same == frozen
    saved = torch.load(out / "last.pt", weights_only=True)
    assert not any(name in key for key in saved["names"] if key.startswith("optimizer/") for name in frozen)
    assert data["conditioner_config"]["text_frozen"] and data["codec"]["name"] == str(folder)
    assert train.main([*command, "--epochs", "2"]) == 0 and "going on from step 4" in capsys.readouterr().out
    again = [*command[:-1], str(tmp_path / "second")]
    again[again.index("--init_from") + 1] = str(out)
    assert train.main([*again, "--codec", str(folder)]) == 0         # no --size has this shape: it is taken from there


@needs_transformers
def test_fine_tuning_t5_as_well(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    before = convert.read(folder)["model"]
    assert train.main([*TINY, "--init_from", str(folder), "--out", str(out), "--no-freeze_text_encoder"]) == 0, capsys.readouterr().err
    data = convert.read_deployment(out)
    assert not data["conditioner_config"]["text_frozen"]
    assert not any(torch.equal(x, before[name]) for name, x in data["model"].items())


@needs_transformers
def test_stereo_fine_tuning_from_mono(tmp_path, capsys):
    folder, out = save(published(), tmp_path / "hf"), tmp_path / "run"
    assert train.main([*TINY, "--init_from", str(folder), "--out", str(out), "--channels", "2"]) == 0, capsys.readouterr().err
    assert convert.read_deployment(out)["model_config"]["K"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# out


def write(source, to, out, capsys, *more) -> str:
    """Runs convert.py, which must succeed; what it printed."""
    assert convert.main([str(source), "--to", to, "--out", str(out), *more]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_in_and_out_is_the_identity(pair, tmp_path, capsys):
    """On every tensor of the folder: names, shapes and values; and the configuration that transformers reads is the same."""
    theirs, _, folder = pair
    assert "note" not in check_identity(theirs, folder, tmp_path, capsys)


def test_in_and_out_is_the_identity_with_melody(tuned, tmp_path, capsys):
    theirs, _, folder = tuned
    assert "turns use_cache off" in check_identity(theirs, folder, tmp_path, capsys)


def check_identity(theirs, folder, tmp_path, capsys) -> str:
    """Asserts it of a folder; what convert.py printed."""
    printed = write(folder, "hf", tmp_path / "out", capsys)
    before, after = (convert.weights.hf_tensors(f) for f in (folder, tmp_path / "out"))
    assert before.shapes == after.shapes
    assert all(torch.equal(before[name], after[name]) for name in before.shapes)
    loaded = type(theirs).from_pretrained(tmp_path / "out")
    assert all(getattr(loaded.config, name, None) == getattr(theirs.config, name, None) for name in ("num_chroma", "chroma_length"))
    for part in ("text_encoder", "audio_encoder", "decoder"):
        ours, wanted = (getattr(m.config, part).to_dict() for m in (loaded, theirs))
        free = {"_name_or_path", "dtype", "torch_dtype", "architectures", "dropout", "dropout_rate", "decoder_start_token_id", "use_cache",
                "initializer_factor", "is_encoder_decoder", "transformers_version"}
        assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in wanted.items() if k not in free}
    write(folder, "nano", tmp_path / "nano", capsys)
    write(tmp_path / "nano", "hf", tmp_path / "again", capsys)
    again = convert.weights.hf_tensors(tmp_path / "again")
    assert again.shapes == before.shapes and all(torch.equal(before[name], again[name]) for name in before.shapes)
    return printed


@needs_transformers
@pytest.mark.parametrize("conditions", [["text"], ["text", "melody"]], ids=["text", "melody"])
def test_in_one_step_and_out_changes_exactly_what_is_trainable(tmp_path, capsys, conditions):
    """Every tensor of the folder but T5's and the codec's, which are the same bit for bit; and the run goes on."""
    folder, run = save(published(melody="melody" in conditions), tmp_path / "hf"), tmp_path / "run"
    command = [*TINY, "--init_from", str(folder), "--conditions", *conditions, "--updates_per_epoch", "1", "--out", str(run)]
    assert train.main(command) == 0, capsys.readouterr().err
    write(run, "hf", tmp_path / "out", capsys)
    before, after = (convert.weights.hf_tensors(f) for f in (folder, tmp_path / "out"))
    assert before.shapes == after.shapes
    changed = {name for name in before.shapes if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before.shapes if not name.startswith(("text_encoder.", "audio_encoder."))}
    assert {"enc_to_dec_proj.bias", "decoder.lm_heads.3.weight"} < changed
    assert ("audio_enc_to_dec_proj.weight" in changed) == ("melody" in conditions)
    assert train.main([*command, "--epochs", "2"]) == 0 and "going on from step 1" in capsys.readouterr().out


@needs_transformers
@pytest.mark.parametrize("channels", [1, 2])
def test_a_trained_run_generates_the_same_in_transformers(tmp_path, capsys, channels):
    """A toy run with its own vocabulary and the toy codec, whose graph has no LSTM: text, tokens, codes and audio."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--fuse", "text=cross", "--out", str(out), "--channels", str(channels)]) == 0
    write(out, "hf", tmp_path / "hf", capsys)
    theirs, info = transformers.MusicgenForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    music, texts = MusicGenerator.load(out), ["a slow deep organ tune in D major with drums", "bells, fast"]
    tokens = transformers.T5Tokenizer.from_pretrained(tmp_path / "hf")(texts, padding=True, return_tensors="pt")
    ids, mask = music.model.conditioner.parts["text"].prepare(texts)
    assert torch.equal(tokens.input_ids, ids) and torch.equal(tokens.attention_mask.bool(), mask)
    codes = generate_codes(music.model, [{"text": t} for t in texts], 60, Sampling(cfg=3, temperature=0))
    assert torch.equal(greedy(theirs.eval(), ids, mask, 60), codes)
    with torch.no_grad():
        mono = tokenizer.load_codec("toy")
        audio = torch.randn(2, 1, 8000) * 0.2
        assert torch.equal(theirs.audio_encoder.encode(audio).audio_codes[0], mono.encode(audio))
        sound = theirs.audio_encoder.decode(codes[None, :, ::channels], [None])[0]
        assert (sound - mono.decode(codes[:, ::channels])).abs().max() < 1e-4
    settings = theirs.generation_config
    assert settings.top_k == 50 and settings.guidance_scale == 1.0 and settings.max_length == 84         # 1.6 s and the delays


def melody_run(out, *more) -> Path:
    """A trained run that has melody and text in front of the codes, as the public weights have them."""
    command = [*TINY, "--size", "debug", "--conditions", "text", "melody", "--fuse", "melody=prepend", "text=prepend", *more]
    assert train.main([*command, "--out", str(out)]) == 0
    return out


@needs_transformers
def test_a_trained_melody_run_generates_the_same_in_transformers(tmp_path, capsys):
    """Their processor reads text and audio from the folder; its own settings of generation hear both."""
    out = melody_run(tmp_path / "run", "--no-mask_padding")
    write(out, "hf", tmp_path / "hf", capsys)
    theirs, info = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    words = transformers.T5Tokenizer.from_pretrained(tmp_path / "hf")
    music, texts = MusicGenerator.load(out), ["a slow deep organ tune in D major with drums", "bells, fast"]
    for seconds in (0.8, 1.6):
        wavs = [tune(seconds, seed) for seed in range(2)]
        given = words(texts, padding=True, return_tensors="pt")
        heard = features([w[0].numpy() for w in wavs], sampling_rate=16_000, return_tensors="pt")
        wanted = greedy(theirs.eval(), given.input_ids, given.attention_mask, 60, **heard)
        found = music.codes(music.attributes(texts, wavs), 60 / 50, sampling=Sampling(cfg=3, temperature=0))
        assert torch.equal(found, wanted)
        assert not torch.equal(found, music.codes(music.attributes(texts, wavs[::-1]), 60 / 50, sampling=Sampling(cfg=3, temperature=0)))


def test_a_melody_run_that_cannot_be_written(tmp_path, capsys):
    out = melody_run(tmp_path / "run", "--no-melody_argmax")
    capsys.readouterr()
    for target in ("hf", "audiocraft"):
        assert convert.main([str(out), "--to", target, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "no").exists()
        for reason in ("--no-mask_padding", "reads zeros", "all twelve classes"):
            assert reason in error, error


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
    """With every reason, in one line; and nothing is overwritten."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--size", "debug", "--pattern", "parallel", "--out", str(out)]) == 0
    capsys.readouterr()
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "text=cross+sum" in error and "parallel" in error and error.count("\n") == 1 and not (tmp_path / "hf").exists()
    assert convert.main([str(out), "--to", "hf", "--out", str(out)]) == 2 and "is there already" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "none"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "no best.pt" in capsys.readouterr().err
    assert convert.main([str(out), "--to", "hf", "--out", str(tmp_path / "hf"), "--codec", str(tmp_path / "gone.pt")]) == 2
    assert "gone.pt" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# audiocraft's packages


XP_CFG = """\
sample_rate: 16000
channels: {channels}
lm_model: transformer_lm
compression_model: encodec
dataset:
  segment_duration: 30
  train:
    num_samples: 1000000
transformer_lm:
  n_q: {K}
  card: 32
  dim: 32
  num_heads: 2
  num_layers: 3
  hidden_scale: 4
  activation: gelu
  norm_first: true
  bias_ff: false
  layer_scale: null
  positional_embedding: sin
codebooks_pattern:
  modeling: delay
  delay:
    delays:
    {delays}
    flatten_first: 0
classifier_free_guidance:
  training_dropout: 0.3
  inference_coef: 3.0
conditioners:
  description:
    model: t5
    t5:
      name: t5-base
      finetune: false
fuser:
  sum: []
  prepend: []
  cross:
  - description
note: 'a long text: that
  goes on'
"""
MELODY_CFG = """\
  self_wav:
    model: chroma_stem
    chroma_stem:
      sample_rate: ${sample_rate}
      n_chroma: 12
      radix2_exp: 13
      argmax: true
      match_len_on_eval: false
fuser:
  sum: []
  prepend:
  - self_wav
  - description
  cross: []
"""
CODEC_CFG = """\
sample_rate: 16000
channels: 1
compression_model: encodec
encodec:
  autoencoder: seanet
  quantizer: rvq
  sample_rate: ${sample_rate}
  channels: ${channels}
  causal: false
  renormalize: false
seanet:
  dimension: 16
  channels: ${channels}
  causal: ${encodec.causal}
  n_filters: 4
  n_residual_layers: 1
  ratios:
  - 8
  - 5
  - 4
  - 2
  activation: ELU
  activation_params:
    alpha: 1.0
  kernel_size: 7
  residual_kernel_size: 3
  last_kernel_size: 7
  dilation_base: 2
  pad_mode: reflect
  true_skip: true
  compress: 2
  lstm: 2
rvq:
  n_q: 4
  bins: 32
"""


def package_of(theirs, folder):
    """What audiocraft writes of such a model, by its names (SPEC L7), and a folder with its T5. Its melodies are as long as a segment."""
    channels, K = theirs.config.decoder.audio_channels, theirs.config.decoder.num_codebooks
    state, lm, codec, melody = theirs.state_dict(), {}, {}, hasattr(theirs, "audio_enc_to_dec_proj")
    layer = "decoder.model.decoder.layers."
    parts = dict(fc1="linear1", fc2="linear2", self_attn_layer_norm="norm1", final_layer_norm="norm2", encoder_attn_layer_norm="norm_cross")
    for name, x in state.items():
        if name.startswith(layer) and "_proj." not in name:
            number, part, leaf = name.removeprefix(layer).split(".")
            lm[f"transformer.layers.{number}.{parts[part]}.{leaf}"] = x
        elif name.endswith("q_proj.weight"):
            number, part = name.removeprefix(layer).split(".")[:2]
            ours = f"transformer.layers.{number}.{'cross_attention' if part == 'encoder_attn' else part}"
            lm[f"{ours}.in_proj_weight"] = torch.cat([state[name.replace("q_proj", f"{i}_proj")] for i in "qkv"])
            lm[f"{ours}.out_proj.weight"] = state[name.replace("q_proj", "out_proj")]
        elif name.startswith("audio_encoder."):
            name = name.removeprefix("audio_encoder.").replace("quantizer.layers", "quantizer.vq.layers").replace(".codebook", "._codebook")
            name = name.replace("coder.layers", "coder.model").replace(".conv.", ".conv.conv.")
            name = name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")
            transposed = name.startswith("decoder.model.") and ".block." not in name and name.split(".")[2] in ("3", "6", "9", "12")
            codec[name.replace("conv.conv", "convtr.convtr") if transposed else name] = x
    for k in range(K):
        lm[f"emb.{k}.weight"], lm[f"linears.{k}.weight"] = (state[f"{n}.{k}.weight"] for n in
                                                            ("decoder.model.decoder.embed_tokens", "decoder.lm_heads"))
    for leaf in ("weight", "bias"):
        lm[f"out_norm.{leaf}"] = state[f"decoder.model.decoder.layer_norm.{leaf}"]
        lm[f"condition_provider.conditioners.description.output_proj.{leaf}"] = state[f"enc_to_dec_proj.{leaf}"]
        if melody:
            lm[f"condition_provider.conditioners.self_wav.output_proj.{leaf}"] = state[f"audio_enc_to_dec_proj.{leaf}"]
            lm["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(8192)
    delays = "\n    ".join(f"- {k // channels}" for k in range(K))
    folder.mkdir()
    config = XP_CFG.format(K=K, channels=channels, delays=delays)
    if melody:
        config = config[:config.index("fuser:")] + MELODY_CFG
    torch.save({"best_state": lm, "xp.cfg": config, "version": "1.3.0", "exported": True}, folder / "state_dict.bin")
    torch.save({"best_state": codec, "xp.cfg": CODEC_CFG, "version": "1.3.0", "exported": True}, folder / "compression_state_dict.bin")
    theirs.text_encoder.save_pretrained(folder.parent / "t5")
    (folder.parent / "t5" / "spiece.model").write_bytes(PIECES)
    return folder, folder.parent / "t5"


def test_plain_yaml():
    read = convert.weights.read_yaml(CODEC_CFG)
    get = lambda path: convert.weights.setting(read, path)           # noqa: E731
    assert get("seanet.ratios") == [8, 5, 4, 2] and get("encodec.channels") == 1 and get("seanet.causal") is False
    assert get("seanet.activation_params") == {"alpha": 1.0} and get("rvq.bins") == 32 and get("rvq.no.such") is None
    read = convert.weights.read_yaml(XP_CFG.format(K=2, channels=1, delays="- 0\n    - 1"))
    assert read["codebooks_pattern"]["delay"] == {"delays": [0, 1], "flatten_first": 0} and read["fuser"]["cross"] == ["description"]
    assert read["transformer_lm"]["layer_scale"] is None and read["fuser"]["sum"] == [] and "note" in read


STYLE_CFG = """\
  self_wav:
    model: style
    style:
      model_name: encodec
      transformer_scale: xsmall
      encodec_n_q: 3
      length: 3.0
      ds_factor: 15
      n_q_out: 6
      eval_q: 3
      bins: 16
      batch_norm: true
"""


def style_package_of(state, folder):
    """A package with a style conditioner of these tensors, and a folder with its T5."""
    package, t5 = package_of(published(melody=True), folder.parent / "melody")
    content = torch.load(package / "state_dict.bin")
    start = "condition_provider.conditioners.self_wav."
    kept = {name: x for name, x in content["best_state"].items() if not name.startswith(start)}
    content["best_state"] = kept | {start + name: x for name, x in state.items()}
    config = content["xp.cfg"]
    content["xp.cfg"] = config[:config.index("  self_wav:")] + STYLE_CFG + config[config.index("fuser:"):]
    package.rename(folder)
    torch.save(content, folder / "state_dict.bin")
    return folder, t5


def style_state(D=256, layers=4) -> dict:
    """Tensors of a style conditioner with names and shapes as audiocraft has them (SPEC L7), three levels more than are used."""
    shapes = {**{f"embed.{k}.weight": (32, D) for k in range(3)}, "batch_norm.running_mean": (D,), "output_proj.weight": (32, D),
              "output_proj.bias": (32,)}
    for l in range(layers):
        shapes |= {f"transformer.layers.{l}.{n}": s for n, s in {
            "self_attn.in_proj_weight": (3 * D, D), "self_attn.out_proj.weight": (D, D), "linear1.weight": (4 * D, D),
            "linear2.weight": (D, 4 * D), **{f"norm{i}.{leaf}": (D,) for i in (1, 2) for leaf in ("weight", "bias")}}.items()}
    for q in range(6):
        book = f"rvq.vq.layers.{q}._codebook."
        shapes |= {book + "embed": (16, D), book + "embed_avg": (16, D), book + "cluster_size": (16,), book + "inited": (1,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {**state, "batch_norm.running_var": torch.ones(D) / 2, "batch_norm.num_batches_tracked": torch.tensor(70_000)}


@needs_transformers
def test_style_package_in(tmp_path, capsys):
    """Its tensors under our names, the levels that are used alone; it generates; MERT is refused; it does not go out."""
    state = style_state()
    package, t5 = style_package_of(state, tmp_path / "package")
    write(package, "nano", tmp_path / "nano", capsys, "--t5", str(t5))
    data = convert.read_deployment(tmp_path / "nano")
    c, model, start = ConditionerConfig(**data["conditioner_config"]), data["model"], "conditioner.parts.style."
    assert c.fuse == convert.STYLE and (c.style_levels, c.style_every, c.style_frames, c.style_norm) == (3, 15, 150, False)
    assert torch.equal(model[start + "bottleneck.vectors"][2], state["rvq.vq.layers.2._codebook.embed"])
    assert torch.equal(model[start + "bottleneck.sizes"][1], state["rvq.vq.layers.1._codebook.cluster_size"])
    assert torch.equal(model[start + "bottleneck.mean"], state["batch_norm.running_mean"]) and model[start + "bottleneck.count"] == 100
    for name in ("transformer.layers.3.linear2.weight", "output_proj.bias"):
        assert torch.equal(model[start + name], state[name])
    assert torch.equal(model[start + "emb.2.weight"], state["embed.2.weight"])
    audio.write_audio(tmp_path / "in.wav", tune(4), 16_000)
    command = ["--model", str(tmp_path / "nano"), "--prompt", "slow organ", "--style", str(tmp_path / "in.wav"), "--seconds", "0.2"]
    assert generate.main([*command, "--out", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    assert convert.main([str(tmp_path / "nano"), "--to", "hf", "--out", str(tmp_path / "no")]) == 2
    assert "its conditions are style=prepend text=prepend" in capsys.readouterr().err
    content = torch.load(package / "state_dict.bin")
    for old, new, says in (("model_name: encodec", "model_name: mert", "a network that is not here"),
                           ("transformer_scale: xsmall", "transformer_scale: none", "transformer_scale none"),
                           ("bins: 16", "bins: 8", "6 of another shape")):
        torch.save({**content, "xp.cfg": content["xp.cfg"].replace(old, new)}, package / "state_dict.bin")
        assert convert.main([str(package), "--t5", str(t5)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


@needs_transformers
@pytest.mark.parametrize("melody", [False, True], ids=["text", "melody"])
@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
def test_package_in_and_out(channels, melody, tmp_path, capsys, monkeypatch):
    """The same tensors as from the Hugging Face folder, in and out again; padded text is attended to, as audiocraft has it."""
    theirs = published(channels, melody=melody)
    folder, (package, t5) = save(theirs, tmp_path / "hf"), package_of(theirs, tmp_path / "package")
    wanted, found = convert.read(folder), convert.read(package, t5)
    assert found["conditioner_config"] == {**wanted["conditioner_config"], "melody_frames": 235}
    assert found["model"].keys() == wanted["model"].keys()
    assert all(torch.equal(x, found["model"][name]) for name, x in wanted["model"].items())
    assert found["codec"]["fingerprint"] == wanted["codec"]["fingerprint"]
    assert {**wanted["model_config"], "mask_padding": False} == found["model_config"]
    assert found["segment_frames"] == 1500 and found["sampling"]["cfg"] == 3.0
    assert generate.main(["--model", str(package), "--prompt", "x"]) == 2
    assert "--t5 T5_FOLDER --to nano" in capsys.readouterr().err
    write(package, "nano", tmp_path / "nano", capsys, "--t5", str(t5))
    command = ["--model", str(tmp_path / "nano"), "--prompt", "slow organ", "--seconds", "0.2", "--out", str(tmp_path / "g")]
    assert generate.main(command) == 0
    capsys.readouterr()
    assert convert.main([str(tmp_path / "nano"), "--to", "audiocraft", "--out", str(tmp_path / "no")]) == 2
    assert "fetches by name" in capsys.readouterr().err
    monkeypatch.setitem(convert.T5_NAMES, (24, 2, 3, 8, 40, 80), "t5-tiny")
    assert ("demucs" in write(tmp_path / "nano", "audiocraft", tmp_path / "out", capsys)) == melody
    back = convert.read(tmp_path / "out", t5)
    assert back["model_config"] == found["model_config"] and back["segment_frames"] == 1500
    for name in convert.weights.PACKAGE_FILES:
        (_, before), (_, after) = (convert.weights.package(f / name) for f in (package, tmp_path / "out"))
        assert before.shapes == after.shapes
        if name == "state_dict.bin":
            assert all(torch.equal(before[n], after[n]) for n in before.shapes)
    a, b = (tokenizer.load_codec(str(f)) for f in (package, tmp_path / "out"))           # the weight norms are written anew
    wav = torch.randn(1, 1, 4000) * 0.3
    assert torch.equal(a.encode(wav), b.encode(wav)) and (a.decode(a.encode(wav)) - b.decode(a.encode(wav))).abs().max() < 1e-5


@needs_transformers
def test_wrong_packages(tmp_path, capsys):
    package, t5 = package_of(published(), tmp_path / "package")
    other, _ = package_of(published(melody=True), tmp_path / "melody")
    content, tuned = (torch.load(folder / "state_dict.bin") for folder in (package, other))
    cases = [
        *((lambda old=old, new=new: torch.save({**tuned, "xp.cfg": tuned["xp.cfg"].replace(old, new)}, package / "state_dict.bin"), says)
          for old, new, says in (("argmax: true", "argmax: false", "chroma_stem.argmax is False, True was expected"),
                                 ("radix2_exp: 13", "radix2_exp: 14", "chroma_stem.radix2_exp is 14, 13 was expected"),
                                 ("n_chroma: 12", "n_chroma: 24", "chroma_stem.n_chroma is 24, 12 was expected"),
                                 ("model: chroma_stem", "model: clap", "conditioners.self_wav.model is clap, chroma_stem was expected"),
                                 ("  - self_wav\n", "", "prepend ['description']; cross ['description'], or prepend"))),
        (lambda: torch.save({**content, "xp.cfg": content["xp.cfg"].replace("modeling: delay", "modeling: parallel")},
                            package / "state_dict.bin"), "codebooks_pattern.modeling is parallel, delay was expected"),
        (lambda: torch.save({**content, "xp.cfg": "nothing"}, package / "state_dict.bin"), "lacks transformer_lm.n_q"),
        (lambda: torch.save(dict(best_state={}), package / "state_dict.bin"), "best_state and xp.cfg as text were expected"),
        (lambda: torch.save({**content, "best_state": {}}, package / "state_dict.bin"), "missing: "),
        (lambda: (package / "state_dict.bin").write_bytes(b"PK\3\4"), "not a file of plain tensors"),
        (lambda: torch.save(content, package / "state_dict.bin") or torch.save(
            dict(pretrained="facebook/encodec_32khz"), package / "compression_state_dict.bin"), "only points to facebook/encodec_32khz"),
    ]
    for change, says in cases:
        change()
        assert convert.main([str(package), "--t5", str(t5)]) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (says, error)
    assert convert.main([str(package), "--t5", str(t5), "--codec", str(save(published(), tmp_path / "hf"))]) == 0
