"""Models of transformers as ours: the same numbers, every way that a folder is written, and what is
refused."""

import base64
import io
import json
import math
import pickle
import shutil
import struct

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import tokenizer
import toy
from conditioning import ConditionerConfig
from generate import MusicGenerator, Sampling, generate_codes
from interop import convert, load, t5
from interop.huggingface import MELODY, TEXT, hf_names
from model import SIZES, ModelConfig
from foreign import pair_fixture, tuned_fixture  # noqa: F401, pytest finds them by their names
from foreign import PIECES, WORDS, extractor, greedy, needs_transformers, old_weight_norm, published
from foreign import save, transformers, tune
from support import chroma
from support.melody import Melody, MelodyConfig


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
    given = dict(attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1))
    wanted = theirs(encoder_outputs=(hidden,), **given).logits
    found = model.logits(seq, model.conditioner({"text": (ids, mask)}))
    assert (found.flatten(0, 1) - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp_min(1)


@torch.no_grad()
@pytest.mark.parametrize("samples", [320, 6400, 5001])
def test_codec(pair, samples):
    theirs, ours, folder = pair
    codec = tokenizer.load_codec(str(folder))
    wav = torch.randn(3, 1, samples, generator=torch.Generator().manual_seed(samples)) * 0.3
    codes = theirs.audio_encoder.encode(wav).audio_codes[0]
    assert torch.equal(codec.encode(wav), codes) and len(codes.unique()) > 4
    assert (codec.decode(codes) - theirs.audio_encoder.decode(codes[None], [None])[0]).abs().max() < 1e-5
    assert ours.codec.channels == ours.codec.streams == theirs.config.decoder.audio_channels


def test_greedy_generation_with_guidance(pair):
    """The same tokens over 100 frames, of a batch whose texts are of several lengths."""
    theirs, ours, _ = pair
    ids, mask = ours.model.conditioner.parts["text"].prepare(WORDS)
    wanted = greedy(theirs, ids, mask, 100)
    texts = [{"text": t} for t in WORDS]
    found = generate_codes(ours.model, texts, 100, Sampling(cfg=3, temperature=0))
    assert torch.equal(found, wanted) and len(found.unique()) > 10
    assert not torch.equal(found, generate_codes(ours.model, texts, 100, Sampling(cfg=1, temperature=0)))


# ----------------------------------------------------------------------------------------------------------
# melody


@needs_transformers
@pytest.mark.parametrize("rate", [16_000, 24_000, 32_000])
@pytest.mark.parametrize("seconds", [0.3, 2.7])
def test_chroma_is_that_of_their_feature_extractor(rate, seconds):
    """Silent frames are its first class.

    A frame of less than 94 dB below full scale is silence here, a class of its own there."""
    frames = chroma.count_frames(round(seconds * rate), rate)
    part = Melody(MelodyConfig(frames=frames, null_bin0=True), 8)
    for wav in (tune(seconds, 1, rate), torch.randn(1, round(seconds * rate)) * 0.1, torch.zeros(1, rate)):
        wanted = extractor(rate)(wav[0].numpy(), sampling_rate=rate, return_tensors="pt").input_features
        found, mask = part.prepare([chroma.chromagram(wav, rate)])
        frames = min(wanted.shape[1], found.shape[1])
        assert mask.all() and frames > 4 and torch.equal(found[:, :frames], wanted[:, :frames])
    a_d = 440 * 2 ** (-7 / 12)     # Hz
    quiet = 1e-6 * torch.sin(2 * math.pi * a_d * torch.arange(round(seconds * rate)) / rate)
    assert not chroma.chromagram(quiet, rate).any()
    theirs = extractor(rate)(quiet.numpy(), sampling_rate=rate, return_tensors="pt").input_features
    assert theirs[0, 2:-2].argmax(-1).eq(2).all()


@torch.no_grad()
def test_logits_with_melody_at_every_position(tuned):
    """What stands in front of the codes, and the logits.

    Texts of several lengths and a null one, melodies and a null one."""
    theirs, ours, _ = tuned
    model, texts = ours.model, WORDS + [None]
    K, card = model.config.K, model.config.card
    generator = torch.Generator().manual_seed(1)
    seq = torch.randint(0, card + 1, (5, K, 40), generator=generator)
    melodies = [torch.rand(20, 12, generator=generator) for _ in range(4)] + [None]
    classes = [torch.zeros(20).long() if m is None else m.argmax(1) for m in melodies]
    features = torch.stack([F.one_hot(row, 12) for row in classes]).float()
    attributes = [{"text": text, "melody": m} for text, m in zip(texts, melodies[::-1])]
    inputs = model.conditioner.prepare(attributes)
    ids, mask = inputs["text"]
    wanted = theirs(input_ids=ids, attention_mask=mask.long(), input_features=features.flip(0),
                    decoder_input_ids=seq.flatten(0, 1))
    conditions = model.conditioner(inputs)
    assert (conditions.prefix - wanted.encoder_hidden_states).abs().max() < 1e-5
    found, logits = model.logits(seq, conditions), wanted.logits[:, -40:]
    assert (found.flatten(0, 1) - logits).abs().max() < 1e-4 * logits.abs().max().clamp_min(1)
    # text alone
    alone = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=seq.flatten(0, 1))
    alone = alone.logits[:, -40:]
    inputs = model.conditioner.prepare([{"text": text} for text in texts])
    found = model.logits(seq, model.conditioner(inputs))
    assert (found.flatten(0, 1) - alone).abs().max() < 1e-4 * alone.abs().max().clamp_min(1)


@needs_transformers
def test_melody_beside_codes_of_another_rate(tmp_path):
    """75 frames a second over a codec of 24 kHz: 7.8 are of the melody, in windows of 12,288 samples."""
    folder = save(published(melody=True), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["audio_encoder"] |= dict(sampling_rate=24_000, target_bandwidths=[1.5])
    (folder / "config.json").write_text(json.dumps(config))
    data = load.read_published(folder)
    assert data["conditioner_config"]["melody_rate"] == 320 / 3072 and data["segment_frames"] == 30 * 75
    reasons = "windows of 12288 samples, there only in powers of two; its melody has 20 frames, there 235"
    with pytest.raises(ValueError, match=reasons):
        convert.write_model(data, "audiocraft", tmp_path / "no")
    convert.write_model(data, "hf", tmp_path / "out")
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out").n_fft == 12_288


@pytest.mark.parametrize("given", ["text and melody", "text", "melody"])
def test_greedy_generation_with_melody(tuned, given):
    """The same tokens over 100 frames.

    The audio to follow is shorter than a segment (it begins again) or longer (it is cut)."""
    theirs, ours, _ = tuned
    texts = [None] * 4 if given == "melody" else WORDS
    guided = Sampling(cfg=3, temperature=0)
    ids, mask = ours.model.conditioner.parts["text"].prepare(texts)
    for seconds in (1.5, 4.0):
        wavs, features = [None] * 4, {}
        if given != "text":
            wavs = [tune(seconds, seed).expand(ours.codec.channels, -1) for seed in range(4)]
            features = extractor()([w[0].numpy() for w in wavs], sampling_rate=16_000, return_tensors="pt")
        # with a cache 4.57.1 loses all conditions (its issue 45647)
        wanted = greedy(theirs, ids, mask, 100, use_cache=False, **features)
        found = ours.codes(ours.condition_values(texts, melody=wavs), 2.0, sampling=guided)
        assert torch.equal(found, wanted) and len(found.unique()) > 10
        plain = ours.codes(ours.condition_values(WORDS), 2.0, sampling=guided)
        assert torch.equal(found, plain) == (given == "text")


# ----------------------------------------------------------------------------------------------------------
# folders: every way they are written, and what is wrong with them


@needs_transformers
def test_shards_and_pickles_and_old_weight_norms(tmp_path):
    """One file, shards, torch's own format, and names of before parametrizations give the same tensors."""
    theirs = published()
    whole = load.read_published(save(theirs, tmp_path / "whole"))
    folder = save(theirs, tmp_path / "shards", max_shard_size="60kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "whole", pickled)
    (pickled / "model.safetensors").unlink()
    state = {old_weight_norm(k): v for k, v in theirs.state_dict().items()}  # with the copy of T5's embedding
    torch.save(state, pickled / "pytorch_model.bin")
    for other in (folder, pickled):
        found = load.read_published(other)
        assert found["codec"]["fingerprint"] == whole["codec"]["fingerprint"]
        assert found["model"].keys() == whole["model"].keys()
        assert all(torch.equal(x, found["model"][name]) for name, x in whole["model"].items())
    # as before torch 1.6
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = load.read_published(pickled)
    assert torch.equal(found["model"]["out_norm.bias"], whole["model"]["out_norm.bias"])


@needs_transformers
def test_variants_of_the_weights(tmp_path, capsys):
    """model.fp16.safetensors, whole and in shards, .bin too, and with T5's table under its other name."""
    theirs = published().half()
    wanted = load.read_published(save(theirs, tmp_path / "plain"))["model"]
    folder = save(theirs, tmp_path / "whole", variant="fp16")
    assert (folder / "model.fp16.safetensors").is_file() and not (folder / "model.safetensors").exists()
    shards = save(theirs, tmp_path / "shards", variant="fp16", max_shard_size="60kB")
    assert len(list(shards.glob("model.fp16-0000*.safetensors"))) > 3
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.fp16.safetensors").unlink()
    state = theirs.state_dict()
    state.pop("text_encoder.shared.weight")              # as a file may have it that keeps one name of two
    state["text_encoder.encoder.embed_tokens.weight"] = theirs.text_encoder.shared.weight
    torch.save(state, pickled / "pytorch_model.fp16.bin")
    for other in (folder, shards, pickled):
        found = load.read_published(other)["model"]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(x, found[name]) and found[name].dtype == x.dtype for name, x in wanted.items())
    shutil.copy(folder / "model.fp16.safetensors", folder / "model.bf16.safetensors")
    (shards / "model.safetensors.index.fp16.json").unlink()
    for other, says in ((folder, "several variants of the weights (model.bf16.safetensors, model.fp16."),
                        (shards, "only shards such as model.fp16-00001-of-000")):
        assert convert.main([str(other)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


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
        sentence_iterator=iter(captions), model_writer=out, vocab_size=150, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    top = proto_fields(out.getvalue())
    pieces = [dict(proto_fields(value)) for number, value in top if number == 1]
    vocab = [(piece[1].decode(), struct.unpack("<f", piece[2])[0]) for piece in pieces]
    table = dict(proto_fields(dict(top)[3]))[2]
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    extra = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return out.getvalue(), {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **special} for i in range(3)],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "decoder": space,
        "post_processor": {
            "type": "TemplateProcessing", "single": end, "pair": end,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*vocab, *extra]}}


@needs_transformers
def test_vocabulary_from_tokenizer_json(tmp_path, capsys):
    """The ids of spiece.model and of their fast tokenizer, on 200 captions and odd characters."""
    texts = [toy.draw_clip(1, 0, i)[1] for i in range(200)]
    texts += ["ﬁne Ｔｅｘｔ ½ é — “x”", "  two   spaces", "日本 drums", "Émile ☃"]
    model, content = unigram([toy.draw_clip(0, 0, i)[1] for i in range(2000)] + ["ﬁne Ｔｅｘｔ é"] * 3)
    folder = save(published(vocab_size=80), tmp_path / "hf")
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fast = transformers.T5TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = sentencepiece.SentencePieceProcessor(model_proto=t5.read_vocabulary(folder))
    wanted = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours.vocab_size() == wanted.vocab_size() > 100
    for text in texts:
        assert ours.encode(text) == wanted.encode(text), text
        assert [*ours.encode(text), 1] == fast(text).input_ids, text
    assert convert.main([str(folder)]) == 2
    assert "vocabulary has" in capsys.readouterr().err     # more pieces than its T5 has rows
    for change in (dict(model={**content["model"], "type": "BPE"}), dict(normalizer=None),
                   dict(model={"type": "Unigram"})):
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

    def lead_out(folder):
        (folder / "model.safetensors").rename(folder / "x")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')

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
        (edit(None, model_type="musicgen_melody", chroma_length="9"),
         "num_chroma 12, chroma_length 9; 12 and"),
        (edit(None, model_type="musicgen_melody"), "2 missing: audio_enc_to_dec_proj.bias"),
        (edit("audio_encoder", model_type="dac"), "'dac', EnCodec was expected"),
        (edit("audio_encoder", num_filters=8), "of another shape"),
        (edit("audio_encoder", target_bandwidths=[0.5]), "has 1 to 2"),
        (edit("decoder", num_hidden_layers=4), "missing: decoder.model.decoder.layers.3."),
        (edit("decoder", num_hidden_layers=2), "unexpected: decoder.model.decoder.layers.2."),
        (edit("decoder", hidden_size=64, ffn_dim=256), "of another shape"),
        (edit("decoder", activation_function="relu"), "activation_function relu, gelu was expected"),
        (edit("decoder", num_codebooks="4"), "num_codebooks is '4'"),
        (edit("text_encoder", d_kv="8"), "d_kv is '8'"),
        (weights_of({k: v for k, v in state.items() if "lm_heads.1" not in k}),
         "1 missing: decoder.lm_heads.1.weight"),
        (weights_of({**state, "extra": torch.zeros(1)}), "1 unexpected: extra"),
        (weights_of([1, 2]), "not a file of tensors by name"),
        (evil, "not a file of plain tensors"),
        (lead_out, "not an index of shards"),
    ]
    for change, says in cases:
        folder = broken(change)
        assert convert.main([str(folder)]) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (says, error)
        assert error.startswith("interop.convert: ")
    assert not (tmp_path / "owned").exists()
    assert convert.main([str(source)]) == 0 and "4 x 32 codes" in capsys.readouterr().out


@pytest.mark.parametrize("size, fuse, channels, millions", [
    ("small", TEXT, 1, 420), ("medium", TEXT, 1, 1839), ("large", TEXT, 1, 3257),
    ("medium", MELODY, 1, 1386), ("large", MELODY, 1, 2451),
    ("large", TEXT, 2, 3291), ("large", MELODY, 2, 2485)])
def test_full_sizes(size, fuse, channels, millions):
    """Names and shapes of the published sizes, without allocating them.

    Parameters with T5-base's projection, SPEC L6. Stereo has four more pairs of table and head, which are
    4 x 4097 x 2048 = 33.6M."""
    c = ConditionerConfig(fuse=fuse, text_vocab=32128, text_dim=768, text_layers=12, text_heads=12,
                          text_head_dim=64, text_hidden=3072)
    text, K = fuse == TEXT, 4 * channels
    model = load.skeleton(ModelConfig(K=K, cross_attention=text, **SIZES[size]), c, {"text": PIECES})
    assert {x.device.type for x in model.parameters()} == {"meta"}
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if ".encoder." not in name}
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6) == millions
    D, layers = SIZES[size]["dim"], SIZES[size]["num_layers"]
    assert (D, layers) == dict(small=(1024, 24), medium=(1536, 48), large=(2048, 48))[size]
    last = f"transformer.layers.{layers - 1}"
    # SPEC L7
    wanted = {**{f"emb.{k}.weight": (2049, D) for k in range(K)},
              **{f"linears.{k}.weight": (2048, D) for k in range(K)},
              f"{last}.self_attn.in_proj_weight": (3 * D, D), f"{last}.self_attn.out_proj.weight": (D, D),
              f"{last}.linear1.weight": (4 * D, D), f"{last}.linear2.weight": (D, 4 * D),
              f"{last}.norm2.bias": (D,), "out_norm.weight": (D,),
              "conditioner.parts.text.output_proj.weight": (D, 768)}
    cross = {f"{last}.cross_attention.in_proj_weight": (3 * D, D),
             f"{last}.cross_attention.out_proj.weight": (D, D)}
    wanted |= cross if text else {"conditioner.parts.melody.output_proj.weight": (D, 12),
                                  "conditioner.parts.melody.output_proj.bias": (D,)}
    assert wanted.items() <= shapes.items() and any("cross" in name for name in shapes) == text
    theirs = [n for name in model.state_dict() for n in hf_names(name)]
    assert len(set(theirs)) == len(theirs) == len(model.state_dict()) + (4 if text else 2) * layers
