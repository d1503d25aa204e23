"""What the tests of interop/ share: models of other projects, of small dimensions with random weights."""

import math

import pytest
import torch

import conditioning
from generate import MusicGenerator
from interop import convert

try:
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()          # the tests count lines
except ImportError:
    transformers = None
VERSION = "4.57.1"
MISSING = f"needs transformers: pip install transformers=={VERSION}"
needs_transformers = pytest.mark.skipif(transformers is None, reason=MISSING)
WORDS = ["slow organ", "fast bells", "a calm harp with drums", "bright flute in C"]
PIECES = conditioning.fit_sentencepiece(WORDS * 9, 60)


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Weights large enough for every part to matter; nothing left at 0 or 1."""
    for name, x in list(module.named_parameters()) + list(module.named_buffers()):
        if name.endswith(("norm.weight", "original0", "weight_g")):
            x.uniform_(0.5, 1.5)
        elif x.is_floating_point() and "embed_positions" not in name and not name.endswith("inited"):
            x.normal_(std=x.shape[-1] ** -0.5 if x.dim() > 1 and "embed" not in name else 0.5)


def published(channels=1, width=32, melody=False, **t5):
    """transformers' Musicgen, or its MusicgenMelody with melodies of 20 frames, with random weights."""
    shape = dict(vocab_size=360, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                 relative_attention_num_buckets=8, relative_attention_max_distance=20)
    text = transformers.T5Config(**shape | t5)
    codec = transformers.EncodecConfig(target_bandwidths=[1.0], sampling_rate=16000, hidden_size=16,
                                       num_filters=4, codebook_size=32, upsampling_ratios=[8, 5, 4, 2],
                                       use_causal_conv=False, use_conv_shortcut=False)
    kind = "MusicgenMelody" if melody else "Musicgen"
    decoder = getattr(transformers, f"{kind}DecoderConfig")(
        vocab_size=32, hidden_size=width, num_hidden_layers=3, ffn_dim=4 * width, num_attention_heads=2,
        num_codebooks=4 * channels, audio_channels=channels, pad_token_id=32, bos_token_id=32)
    torch.manual_seed(0)
    more = dict(chroma_length=20) if melody else {}
    parts = dict(text_encoder=text, audio_encoder=codec, decoder=decoder)
    config = getattr(transformers, f"{kind}Config")(**{k: v.to_dict() for k, v in parts.items()}, **more)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    # as beside the public weights
    model.generation_config.update(decoder_start_token_id=32, bos_token_id=32, pad_token_id=32)
    randomize(model)
    return model


def save(model, folder, **kwargs):
    """The folder that transformers writes, and T5's pieces, which the published ones have beside it."""
    model.save_pretrained(folder, **kwargs)
    (folder / "spiece.model").write_bytes(PIECES)
    return folder


@pytest.fixture(name="pair", scope="module", params=[1, 2], ids=["mono", "stereo"])
def pair_fixture(request, tmp_path_factory):
    """(theirs, ours as a MusicGenerator, folder)."""
    if transformers is None:
        pytest.skip(MISSING)
    theirs = published(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / "model")
    return theirs, MusicGenerator.load(folder), folder


@pytest.fixture(name="tuned", scope="module", params=[dict(), dict(channels=2), dict(width=24)],
                ids=["mono", "stereo", "text as wide as the model"])
def tuned_fixture(request, tmp_path_factory):
    """(theirs, ours as a MusicGenerator, folder) with melody and text in front of the codes."""
    if transformers is None:
        pytest.skip(MISSING)
    theirs = published(melody=True, **request.param)
    folder = save(theirs, tmp_path_factory.mktemp("hf") / "model")
    return theirs, MusicGenerator.load(folder), folder


@torch.no_grad()
def greedy(theirs, ids, mask, T: int, guidance: float = 3.0, **given) -> torch.Tensor:
    """Codes [B,K,T] that transformers generates.

    A sequence of T frames has T + levels steps with the first, which is special and not new."""
    channels, K = theirs.config.decoder.audio_channels, theirs.config.decoder.num_codebooks
    seen, decode = [], theirs.audio_encoder.decode
    theirs.audio_encoder.decode = lambda codes, **kwargs: seen.append(codes[0]) or decode(codes, **kwargs)
    try:
        theirs.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, guidance_scale=guidance,
                        max_new_tokens=T + K // channels - 1, **given)
    finally:
        del theirs.audio_encoder.decode
    return torch.stack(seen, 2).flatten(1, 2)  # [B, K, T]


def tune(seconds, seed=0, rate=16_000) -> torch.Tensor:
    """Notes of half a second with some noise, and a silence [1, N]."""
    generator = torch.Generator().manual_seed(seed)
    pitch = torch.randint(48, 84, (math.ceil(2 * seconds),), generator=generator)
    time = torch.arange(rate // 2) / rate
    notes = torch.cat([torch.sin(2 * math.pi * 440 * 2 ** ((p - 69) / 12) * time) for p in pitch])
    notes = notes[:round(seconds * rate)]
    notes += 0.01 * torch.randn(notes.shape, generator=generator)
    notes[rate // 2:rate] = 0
    return 0.3 * notes[None]


def extractor(rate=16_000):
    """transformers' own, for windows as long as at its 32 kHz."""
    return transformers.MusicgenMelodyFeatureExtractor(sampling_rate=rate, hop_length=rate * 16 // 125,
                                                       n_fft=rate * 64 // 125)


TINY = ["--dataset", "toy", "--updates_per_epoch", "4", "--epochs", "1", "--batch_size", "4",
        "--valid_samples", "4", "--eval_samples", "1", "--generate_samples", "1", "--warmup_steps", "0",
        "--lr", "1e-3", "--dtype", "float32", "--device", "cpu"]


def write(source, to, out, capsys, *more) -> str:
    """Runs the converter, which must succeed; what it printed."""
    assert convert.main([str(source), "--to", to, "--out", str(out), *more]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
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


def old_weight_norm(name: str) -> str:
    """The name of a weight norm's tensor as it was before torch had parametrizations."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


def package_of(theirs, folder):
    """What audiocraft writes of such a model, by its names (SPEC L7), and a folder with its T5.

    Its melodies are as long as a segment."""
    channels, K = theirs.config.decoder.audio_channels, theirs.config.decoder.num_codebooks
    state, melody = theirs.state_dict(), hasattr(theirs, "audio_enc_to_dec_proj")
    lm, codec = {}, {}
    layer = "decoder.model.decoder.layers."
    parts = dict(fc1="linear1", fc2="linear2", self_attn_layer_norm="norm1", final_layer_norm="norm2",
                 encoder_attn_layer_norm="norm_cross")
    for name, x in state.items():
        if name.startswith(layer) and "_proj." not in name:
            number, part, leaf = name.removeprefix(layer).split(".")
            lm[f"transformer.layers.{number}.{parts[part]}.{leaf}"] = x
        elif name.endswith("q_proj.weight"):
            number, part = name.removeprefix(layer).split(".")[:2]
            ours = f"transformer.layers.{number}.{'cross_attention' if part == 'encoder_attn' else part}"
            qkv = [state[name.replace("q_proj", f"{i}_proj")] for i in "qkv"]
            lm[f"{ours}.in_proj_weight"] = torch.cat(qkv)
            lm[f"{ours}.out_proj.weight"] = state[name.replace("q_proj", "out_proj")]
        elif name.startswith("audio_encoder."):
            name = name.removeprefix("audio_encoder.")
            name = name.replace("quantizer.layers", "quantizer.vq.layers").replace(".codebook", "._codebook")
            name = name.replace("coder.layers", "coder.model").replace(".conv.", ".conv.conv.")
            name = old_weight_norm(name)
            on_top = name.startswith("decoder.model.") and ".block." not in name
            transposed = on_top and name.split(".")[2] in ("3", "6", "9", "12")
            codec[name.replace("conv.conv", "convtr.convtr") if transposed else name] = x
    for k in range(K):
        lm[f"emb.{k}.weight"] = state[f"decoder.model.decoder.embed_tokens.{k}.weight"]
        lm[f"linears.{k}.weight"] = state[f"decoder.lm_heads.{k}.weight"]
    conditioners = "condition_provider.conditioners"
    for leaf in ("weight", "bias"):
        lm[f"out_norm.{leaf}"] = state[f"decoder.model.decoder.layer_norm.{leaf}"]
        lm[f"{conditioners}.description.output_proj.{leaf}"] = state[f"enc_to_dec_proj.{leaf}"]
        if melody:
            lm[f"{conditioners}.self_wav.output_proj.{leaf}"] = state[f"audio_enc_to_dec_proj.{leaf}"]
            lm[f"{conditioners}.self_wav.chroma.spec.window"] = torch.hann_window(8192)
    delays = "\n    ".join(f"- {k // channels}" for k in range(K))
    folder.mkdir()
    config = XP_CFG.format(K=K, channels=channels, delays=delays)
    if melody:
        config = config[:config.index("fuser:")] + MELODY_CFG
    more = {"version": "1.3.0", "exported": True}
    torch.save({"best_state": lm, "xp.cfg": config, **more}, folder / "state_dict.bin")
    torch.save({"best_state": codec, "xp.cfg": CODEC_CFG, **more}, folder / "compression_state_dict.bin")
    theirs.text_encoder.save_pretrained(folder.parent / "t5")
    (folder.parent / "t5" / "spiece.model").write_bytes(PIECES)
    return folder, folder.parent / "t5"
