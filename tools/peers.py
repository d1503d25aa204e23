"""Other implementations of MusicGen's language model, to be measured and compared with ours.

They are transformers and audiocraft. Each builder gives a `Peer`: the model with random weights, a loss of
codes, and sampling of codes, conditioned on embeddings that are simply there (what a text encoder costs is
not the question). Neither package is needed for anything else; INSTALL says how to get them. audiocraft asks
for old packages that cannot be installed beside this PyTorch: `hide_unneeded_modules` lets it do without.

Legend: B batch, K codebooks, T frames, S sequence steps, L condition tokens, D width.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig

INSTALL = {
    "transformers": "pip install transformers",
    "audiocraft": "pip install transformers==4.57.1 wheel && pip install --no-deps --no-build-isolation "
                  "audiocraft==1.3.0 omegaconf antlr4-python3-runtime==4.9.3 julius",
}
# What audiocraft imports and is not used here.
UNNEEDED = ("xformers", "flashy", "dora", "spacy", "av", "demucs", "librosa", "num2words", "hydra",
            "torchdiffeq", "torchmetrics", "pesq", "pystoi", "laion_clap", "audiocraft.solvers",
            "audiocraft.metrics", "audiocraft.adversarial", "audiocraft.losses")


@dataclass
class Peer:
    """One implementation: its model, the loss of codes [B,K,T], and sampling: generate(T) -> codes
    [B,K,T]."""
    name: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    generate: Callable[[int], Tensor]


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for the modules UNNEEDED: whatever is asked of them is there, and does nothing."""

    def find_spec(self, name, path, target=None):
        for module in UNNEEDED:
            if name == module or name.startswith(f"{module}."):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def hide_unneeded_modules() -> None:
    """Lets audiocraft 1.3.0 be imported without the old packages that it asks for (xformers, spacy, av
    ..)."""
    if not any(isinstance(finder, EmptyModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, EmptyModules())
    import audiocraft.modules.transformer as transformer
    transformer.ops.unbind = torch.unbind         # the one function of xformers that its torch backend calls


def transformers_peer(config: ModelConfig, B: int, L: int, device: str, cfg: float, top_k: int) -> Peer:
    """Hugging Face's MusicgenForCausalLM with PyTorch's attention. Errors: ModuleNotFoundError.

    Its own `generate` raises in 4.57.1 (huggingface/transformers pull request 46974), so sampling goes
    through the model around it, with a text encoder of one layer, which is called once, and a codec that
    hands the codes through."""
    from transformers import EncodecConfig, MusicgenConfig, MusicgenForConditionalGeneration, T5Config
    from transformers.models.musicgen import MusicgenDecoderConfig

    # The model around it: its decoder is what is measured, its text encoder and codec are as small as can be.
    special, K = config.card, config.K
    text = T5Config(vocab_size=32, d_model=config.dim, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    codec = EncodecConfig(num_filters=2, num_residual_layers=1, num_lstm_layers=1, hidden_size=8,
                          codebook_dim=8, codebook_size=8, upsampling_ratios=[2, 2])
    decoder = MusicgenDecoderConfig(
        vocab_size=config.card, hidden_size=config.dim, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, ffn_dim=config.dim * config.hidden_scale, num_codebooks=K,
        dropout=0.0, pad_token_id=special, bos_token_id=special)
    full = MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=codec.to_dict(),
                          decoder=decoder.to_dict())
    model = MusicgenForConditionalGeneration(full).to(device)
    backend = model.decoder.config._attn_implementation
    assert backend == "sdpa", backend
    model.audio_encoder.decode = lambda codes, **_: SimpleNamespace(audio_values=codes[0])
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(model.generation_config, name, special)

    # What it is conditioned on: embeddings in training, tokens of a text in sampling.
    ids = torch.ones(B, L, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    source = torch.randn(B, L, config.dim, device=device)

    def loss(codes):
        seq = config.layout(codes.shape[2]).build(codes, special)                     # [B, K, S]
        read, targets = seq[..., :-1].flatten(0, 1), seq[..., 1:].transpose(1, 2)
        return model.decoder(read, encoder_hidden_states=source, encoder_attention_mask=mask, labels=targets,
                             use_cache=False).loss

    def generate(T):
        return model.generate(input_ids=ids, attention_mask=mask, do_sample=True, guidance_scale=cfg,
                              top_k=top_k, max_new_tokens=T + K - 1)

    return Peer("transformers", model, loss, generate)


def audiocraft_peer(config: ModelConfig, B: int, L: int, device: str, cfg: float, top_k: int) -> Peer:
    """audiocraft's LMModel, built as its MusicGen configuration says, with its torch attention backend.

    The loss is its solver's. Errors: ModuleNotFoundError."""
    hide_unneeded_modules()
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningAttributes
    source = torch.randn(1, L, config.dim, device=device)

    class FixedProvider(nn.Module):
        """A condition provider whose embeddings are there; zeros for a null condition."""

        def tokenize(self, conditions):
            return torch.tensor([c.text["description"] is not None for c in conditions], device=device)

        def forward(self, rows):
            mask = rows[:, None].expand(-1, L)                                        # [B, L]
            embedding = (source * mask[..., None]).to(model.emb[0].weight.dtype)      # [B, L, D]
            return {"description": (embedding, mask)}

    model = LMModel(
        DelayedPatternProvider(config.K), FixedProvider(),
        ConditionFuser({"cross": ["description"], "prepend": []}),
        n_q=config.K, card=config.card, dim=config.dim, num_heads=config.num_heads,
        hidden_scale=config.hidden_scale, num_layers=config.num_layers, norm_first=True, bias_proj=False,
        bias_ff=False, bias_attn=False, dropout=0.0, activation="gelu", causal=True, memory_efficient=True,
        cross_attention=True, weight_init="gaussian", depthwise_init="current", zero_bias_init=True)
    model = model.to(device)
    attributes = [ConditioningAttributes(text={"description": "given"}) for _ in range(B)]

    def loss(codes):
        conditions = model.condition_provider(model.condition_provider.tokenize(attributes))
        out = model.compute_predictions(codes, [], conditions)
        losses = []
        for k in range(config.K):
            mask = out.mask[:, k]                                                     # [B, T]
            losses.append(F.cross_entropy(out.logits[:, k][mask], codes[:, k][mask]))
        return sum(losses) / config.K

    def generate(T):
        return model.generate(None, attributes, max_gen_len=T, top_k=top_k, cfg_coef=cfg)

    return Peer("audiocraft", model, loss, generate)


PEERS = {"transformers": transformers_peer, "audiocraft": audiocraft_peer}
