"""Tiny random models of all generative families of transformers, made from their configurations.

python tests/families.py writes the table of docs/families.md: the way in which each family of the installed version is decoded.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from wsd_hf import Pair
from wsd_hf.engine.recurrent_support import reads_single_tokens
from wsd_hf.engine.supported import unsupported_model
from wsd_hf.tiny import FOLDER

VOCABULARY = 64
EOS = 1
PAD = 0
IMAGE = 2

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
        "mamba_chunk_size": 16,  # tokens of a forward are padded to a multiple of it; the default is 256
    },
}


RAGGED = sorted(FAMILIES.keys() - {"bloom", "mamba", "qwen3_next", "bamba"})
"""Those that the fast path serves."""

MORE_RAGGED = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet codegen cohere cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2
    deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma3n_text gemma4_text glm glm4
    glm4_moe glm4_moe_lite gpt_bigcode gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe laguna
    llama4_text mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 modernbert-decoder mpt nanochat nemotron olmo
    olmo2 olmo3 olmoe persimmon phi phimoe qwen2_moe qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm
    youtu
""".split()  # noqa: SIM905
"""Further families that the fast path serves; not every version of transformers has all of them."""

_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {
    **_SIZES,
    **_TWO_KINDS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mlp_layer_types": ["dense", "sparse"],
    "moe_intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

RECURRENT: dict[str, dict[str, Any]] = {
    **{family: FAMILIES[family] for family in ("bamba", "mamba", "qwen3_next")},
    "bailing_hybrid": {**_LATENT, "n_group": 2, "topk_group": 1},
    "falcon_h1": {**_SIZES, **_MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_SIZES,
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "kimi_linear": {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {**_SIZES, "layer_types": ["conv", "full_attention"]},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
    },
    "nemotron_h": {
        **_SIZES,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "time_step_min": 1e-9,  # below it, single tokens and blocks of them differ
    },
    "olmo_hybrid": {**_SIZES, **_DELTA, **_TWO_KINDS},
    "qwen3_5_text": {**_SIZES, **_DELTA, **_TWO_KINDS},
    "qwen3_5_moe_text": {**_SIZES, **_DELTA, **_EXPERTS, **_TWO_KINDS},
    "lfm2_moe": {
        **_SIZES,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "zaya": _SIZES,
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "jamba": {
        **_SIZES,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
}
"""Families with a recurrent state that the fast path serves; not every version of transformers has all of them."""

SINGLE_TOKENS = {"falcon_mamba", "jamba", "mamba"}
"""Those of them that continue from their state with one token only."""

IMAGE_TEXT = ["gemma3", "gemma4", "glm4v", "got_ocr2", "idefics3", "internvl", "llama4", "llava", "llava_onevision", "mistral3"]
IMAGE_TEXT += ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
"""Families with parts for images that the fast path serves for text."""

_TINY: dict[str, Any] = {
    **_SIZES,
    **_GPT2_SIZES,
    **_COMMON,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "use_sliding_window": True,
    **{
        name: size
        for size, names in {
            1: "n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts moe_layer_start_index "
            "mamba_n_groups",
            2: "num_global_key_value_heads num_kv_shared_layers linear_num_key_heads num_experts_per_tok num_experts_per_token "
            "moe_k moe_topk top_k_experts index_n_heads mamba_expand max_window_layers depth",
            4: "n_heads n_layers num_layers num_heads num_query_heads num_experts num_local_experts n_routed_experts "
            "moe_num_experts linear_num_value_heads mamba_n_heads",
            8: "global_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim laurel_rank index_topk "
            "index_head_dim query_pre_attn_scalar sliding_window window_size attention_chunk_size keep_window_size "
            "hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim state_size mamba_d_state",
            16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank "
            "mamba_d_head",
            32: "d_model word_embed_proj_dim embed_dim",
            48: "n_inner ffn_dim ffn_hidden_size intermediate_size_mlp",
            64: "vocab_size_per_layer_input mamba_d_ssm",
            256: "max_seq_len",
        }.items()
        for name in names.split()
    },
}
"""Sizes, under all names that families have for them."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}

_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3": {"mm_tokens_per_image": 4, "image_token_id": IMAGE},
    "gemma3n_text": {**_SLIDING, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_SLIDING},
    "gemma4_unified_text": {**_SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "siglip_vision_model": {"image_size": 32, "patch_size": 8},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 16},
    "mpt": {"use_cache": True},
    "qwen3_5_text": {**_HYBRID},
    "qwen3_5_moe_text": {**_HYBRID},
    "qwen2_vl_text": {**_THREE_AXES},
    "qwen2_5_vl_text": {**_THREE_AXES},
    "qwen3_vl_text": {**_THREE_AXES},
    "qwen3_vl_moe_text": {**_THREE_AXES, "sliding_window": None},
    "glm4v_text": {**_THREE_AXES},
}


def _tiny_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Settings of a family's tiny models, from the names in its default config and in the configs inside that."""
    names = config.to_dict().keys() - {"bos_token_id"}
    if "qk_rope_head_dim" in names:  # every head has keys and values of its own, and two parts
        names -= {"head_dim", "num_key_value_heads"}
    settings = {name: size for name, size in _TINY.items() if name in names}
    for name, inner in vars(config).items():
        if isinstance(inner, PretrainedConfig):
            settings[name] = {"model_type": inner.model_type, **_tiny_settings(inner)}
    return settings | _EXCEPTIONS.get(config.model_type, {})


@functools.cache
def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose greedy text varies; one object for the whole run, so tests leave it as it is.

    Args:
        family: a model type of transformers; those of models with parts for images give the whole model.
        seed: of its weights.
        overrides: of its configuration.
    """
    known = FAMILIES | RECURRENT
    settings = {**known[family], **_COMMON} if family in known else _tiny_settings(CONFIG_MAPPING[family]())
    config = AutoConfig.for_model(family, **{**settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _auto_class(config).from_config(config, dtype=torch.float32).eval()


def _auto_class(config: PretrainedConfig) -> Any:
    takes_images = config.get_text_config(decoder=True) is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    writes_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not takes_images
    return AutoModelForCausalLM if writes_text else AutoModelForImageTextToText


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


def table() -> str:
    """All generative families by the way in which they are decoded, in Markdown."""
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    tested = {*RAGGED, *MORE_RAGGED, *RECURRENT, *IMAGE_TEXT}
    families: dict[str, list[str]] = defaultdict(list)
    for family in sorted(family for family, kind in CONFIG_MAPPING.items() if kind in kinds):
        try:
            model = tiny_model.__wrapped__(family)
        except Exception:
            families["not tried: needs settings of its own to be made tiny"].append(family)
            continue
        reason = unsupported_model("model", model)
        served = "fast path, tested against step by step" if family in tested else "fast path, by the self-test alone"
        if reason is None and (reason := reads_single_tokens("model", model)):
            families[f"fast path as pilot, step by step as base: {reason}"].append(family)
        else:
            families[served if reason is None else f"step by step: {reason}"].append(family)
    rows = [f"| {way} | {', '.join(f'`{name}`' for name in names)} |" for way, names in sorted(families.items())]
    return "\n".join(["| decoding | families |", "|---|---|", *rows])


PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
MARK = f"<!-- made by tests/families.py, transformers {transformers.__version__} -->\n"

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    text, _, _ = PAGE.read_text("utf-8").partition("<!-- made by")
    PAGE.write_text(f"{text}{MARK}{table()}\n", "utf-8")
