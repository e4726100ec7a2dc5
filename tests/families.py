"""Tiny random models of many architectures, made from their configurations."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wsd_hf import Pair
from wsd_hf.tiny import FOLDER

VOCABULARY = 64
EOS = 1
PAD = 0

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "initializer_range": 0.4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES},
    "qwen3": {**_SIZES},
    "qwen2": {**_SIZES},
    "gemma": {**_SIZES},
    "gemma2": {**_SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mistral": {**_SIZES, "sliding_window": 8},
    "gpt2": {**_GPT2_SIZES},
    "gpt_neox": {**_SIZES},
    "phi3": {**_SIZES},
    "mixtral": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "qwen3_next": {
        **_SIZES,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "bamba": {
        **_SIZES,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
    },
}


@functools.cache
def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose greedy text varies; one object for the whole run, so tests leave it as it is.

    Args:
        family: a key of `FAMILIES`.
        seed: of its weights.
        overrides: of its configuration.
    """
    special = {
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "initializer_range": 0.4, **special, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@functools.cache
def tiny_pilot(family: str = "llama", seed: int = 0, noise: float = 0.15) -> PreTrainedModel:
    """A disturbed copy of `tiny_model`: it often writes what that model finds likely, and often not."""
    model = copy.deepcopy(tiny_model(family, seed))
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=random) if weight.numel() > 1 else 0.0
    return model


def tiny_parts(pilot: str = "pilot") -> tuple[Any, Any, Any, Any]:
    """Base, pilot and their tokenizers of the shipped pair, for calls that are written out."""
    pair = Pair.from_pretrained(FOLDER / "base", FOLDER / pilot, dtype=torch.float32)
    return pair.base, pair.pilot, pair.tokenizer, pair.pilot_tokenizer
