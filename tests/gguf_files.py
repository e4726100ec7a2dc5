"""GGUF files of the shipped models, written with llama.cpp's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

gguf = pytest.importorskip("gguf", reason='no GGUF: pip install "wsd_hf[gguf]"')

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL = 1, 3


def write_gguf(folder: Path, file: Path, kind: str = "F32", rope_factors: Any = None, **metadata: str | int) -> Path:
    """A Llama folder as one GGUF file, with its tokenizer.

    Args:
        folder: of the model.
        file: to write.
        kind: of the matrices: F32, F16, Q8_0. Norms are float32.
        rope_factors: divisors of the rotary frequencies, float32[head size / 2].
        **metadata: more of it, with `__` for each dot.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = {token["content"]: token["id"] for token in tokenizer["added_tokens"]} | tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if index in special else NORMAL for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    if (folder / "chat_template.jinja").exists():
        writer.add_chat_template((folder / "chat_template.jinja").read_text("utf-8"))
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    for name, weight in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_name(name), *_stored(name, weight.astype("float32"), config, kind))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        number, part = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{number}.{TENSORS[part]}.weight"
    return f"{TENSORS[name]}.weight"


def _stored(name: str, weight: Any, config: dict[str, Any], kind: str) -> tuple[Any, ...]:
    if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers the halves of a head
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        weight = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
    if weight.ndim == 1 or kind == "F32":
        return (weight,)
    if kind == "F16":
        return (weight.astype("float16"),)
    stored = gguf.GGMLQuantizationType[kind]
    return gguf.quantize(weight, stored), None, stored
