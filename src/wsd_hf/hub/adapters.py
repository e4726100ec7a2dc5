"""LoRA adapters over a model: their files checked, and put into the model by PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import WSDHubError
from .errors import reading
from .model_folder import int64, json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

SETTINGS = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
"""Settings of a LoRA adapter that say how its weights are added to those of the model."""

WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Settings that a model doesn't depend on once the adapter is in it; the rest must be empty."""


def adapter_settings(name: str, folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder, as `peft.LoraConfig` takes them.

    Raises:
        WSDHubError: no adapter, one of another kind than LoRA, or PEFT is not installed.
    """
    if not (folder / CONFIG).is_file():
        raise WSDHubError(f"{name} has no {CONFIG}: give an adapter that PEFT saved, after the + of its model")
    config = json_object(folder / CONFIG, parse_int=int64)
    if (kind := config.get("peft_type")) != "LORA":
        raise WSDHubError(f"{name} is an adapter of type {kind!r:.50}, and LORA alone is loaded: merge it into its model first")
    others = [key for key, value in config.items() if value and key not in SETTINGS | WITHOUT_EFFECT]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):  # others change the model's own weights
        others.append("init_lora_weights")
    if others:
        raise WSDHubError(f"{name} has {others[0]}={config[others[0]]!r:.100} in its {CONFIG}: merge it into its model first")
    if importlib.util.find_spec("peft") is None:
        raise WSDHubError(f'{name} is an adapter, and peft is not installed; pip install "wsd_hf[adapters]"')
    return {key: value for key, value in config.items() if key in SETTINGS}


def adapter_weights(name: str, fetch: Callable[[str], Path]) -> Path:
    """The file with an adapter's weights."""
    try:
        return fetch(WEIGHTS)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise WSDHubError(f"{name} has no {WEIGHTS}: save the adapter again with PEFT (.bin files may run code)") from error


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: str, config: PreTrainedConfig) -> None:
    """Raises a WSDHubError if an adapter's tokenizer has tokens that the model has no embedding for."""
    size = int(config.get_text_config(decoder=True).vocab_size)
    if len(tokenizer) > size:
        raise WSDHubError(
            f"{name} has a tokenizer of {len(tokenizer)} tokens, and {model} a vocabulary of {size}: merge them "
            "(resize_token_embeddings, then merge_and_unload), and give the result"
        )


def with_adapter(model: PreTrainedModel, name: str, settings: dict[str, Any], weights: Path) -> PreTrainedModel:
    """The model with an adapter: merged into weights that are floats, kept beside quantised ones.

    Raises:
        WSDHubError: the adapter doesn't fit the model, or is damaged.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    with reading(f"{name} is an adapter that doesn't fit its model, or is damaged"):
        stored = load_file(weights)
        ranks = [settings.get("r", 0), *settings.get("rank_pattern", {}).values()]
        if max(ranks) > max((weight.shape[0] for key, weight in stored.items() if "lora_A" in key), default=0):
            raise ValueError(f"it has rank {max(ranks)}, and smaller weights")
        wrapped = get_peft_model(model, LoraConfig(**settings, inference_mode=True), low_cpu_mem_usage=True)
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if different := sorted(wanted.keys() ^ stored.keys()):
            raise ValueError(f"{'lacks' if different[0] in wanted else 'has'} {different[0]}")
        set_peft_model_state_dict(wrapped, stored, low_cpu_mem_usage=True)
        quantised = getattr(model, "is_quantized", False)
        inner: Any = wrapped.get_base_model() if quantised else wrapped.merge_and_unload(safe_merge=True)
    return inner.eval()
