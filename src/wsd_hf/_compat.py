"""Every touch of a private transformers name, of PEFT, and of what the Hub's client is built on: upgrades are work on one file.

Works on transformers 5.17 and 5.23, and is tested on both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)
from transformers.utils.chat_template_utils import Chat as Chat

HTTPError: Any = HfHubHTTPError.__bases__[0]
"""What a broken connection raises in the Hub's client, which is built on httpx or, since 2.0, on httpx2."""


def sample(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """transformers' own loop for greedy decoding and sampling, as `generate` would call it."""
    return type(model)._sample(model, input_ids, **kwargs)


def update_model_kwargs(model: PreTrainedModel, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the next forward: cache, mask and positions moved on by one step."""
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    return updated


def takes_input(model: Any, name: str, value: Any) -> bool:
    """Whether transformers hands a keyword of `generate` on to the model's forward, or PEFT takes it out before."""
    if name in getattr(model, "special_peft_forward_args", ()):
        return True
    try:
        unwrapped(model)._validate_model_kwargs({name: value})
    except ValueError:
        return False
    return True


def default_setting(name: str) -> Any:
    """The value that transformers fills in where neither caller nor model has set a generation setting."""
    return GenerationConfig._get_default_generation_params().get(name)


CACHES = ("past_key_values", "cache_params")
"""What models call their cache; the second is Mamba's name."""


def can_select_rows(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> bool:
    """Whether all that a model will remember lies in a cache that can be reordered; RecurrentGemma's layers keep states."""
    holds_cache = any(isinstance(model_kwargs.get(name), Cache) for name in CACHES)
    return holds_cache and model.config.model_type != "recurrent_gemma"


def select_rows(model_kwargs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The keyword arguments of the next forward for some rows, each as often as it is named; the cache itself is reordered."""
    selected: dict[str, Any] = {
        name: value[rows.to(value.device)] if isinstance(value, torch.Tensor) and name != "cache_position" else value
        for name, value in model_kwargs.items()
    }
    for name in CACHES:
        if selected.get(name) is not None:
            selected[name].reorder_cache(rows)
    return selected


def whole_mask(input_ids: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
    """The mask of ones that transformers dropped; wider than `input_ids` where those lack what `past_key_values` holds."""
    return input_ids.new_ones(len(input_ids), getattr(generation_config, "_mask_length", input_ids.shape[1]))


def with_custom_entries(generation_config: GenerationConfig, entries: Mapping[str, Any]) -> GenerationConfig:
    """A copy of `generation_config` with more keys; one derived from a model's config would lose them when loaded."""
    customised = copy.deepcopy(generation_config)
    customised._from_model_config = False
    for name, value in entries.items():
        setattr(customised, name, value)
    return customised


def with_pad_token(generation_config: GenerationConfig, pad_token_id: int) -> GenerationConfig:
    """A copy of a configuration that `generate` has completed, with another pad token, which its loop reads as a tensor."""
    changed = copy.copy(generation_config)
    changed.pad_token_id = pad_token_id
    changed._pad_token_tensor = torch.full_like(generation_config._pad_token_tensor, pad_token_id)
    return changed


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that the model's decoder uses ("sdpa", "eager", ...)."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def custom_generate_source(model: PreTrainedModel) -> str | None:
    """What the call of `model.generate` that is running was given as `custom_generate`, if that is a folder or repository.

    transformers runs the code that it finds there and does not tell it where: it is read from the frame of `generate`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            source = frame.f_locals.get("custom_generate")
            if isinstance(source, str):
                return source
        frame = frame.f_back
    return None


def stop_string_mode(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How transformers matches stop strings in a vocabulary: None compares characters, any other mode bytes."""
    mode: str | None = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    return mode


def stop_string_bytes(token: str, mode: str | None, letters: Mapping[str, int]) -> bytes | None:
    """The bytes that transformers matches a token by where its spelling gives them; None where it has to be decoded.

    Args:
        token: as the vocabulary spells it.
        mode: see `stop_string_mode`.
        letters: the byte that each letter of a byte-level vocabulary stands for.
    """
    spelt: bytes | None = StopStringCriteria._token_to_bytes(token, mode, letters)
    return spelt


def commit(model: PreTrainedModel) -> str | None:
    """The commit of the Hub that a model was loaded from."""
    sha: str | None = getattr(model.config, "_commit_hash", None)
    return sha


def input_device(model: PreTrainedModel) -> torch.device:
    """Device of a model's inputs: where accelerate runs the model, if its weights are elsewhere between forwards."""
    hooked = model.modules() if model.device.type == "meta" else [model]
    hooks = [vars(module).get("_hf_hook") for module in hooked]
    devices = [getattr(part, "execution_device", None) for hook in hooks for part in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), model.device))


def lacks_weights(model: PreTrainedModel) -> bool:
    """Whether weights are on the meta device, and accelerate does not bring them from elsewhere for a forward."""
    on_meta = any(weight.is_meta for weight in model.parameters())
    return on_meta and not any("_hf_hook" in vars(module) for module in model.modules())


def checkpoints_gradients(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is in effect, as in training mode only; layers then ignore their cache."""
    return any(module.training and vars(module).get("gradient_checkpointing", False) for module in model.modules())


def adapter_layers(model: PreTrainedModel) -> set[torch.nn.Module]:
    """Layers that PEFT put into a model."""
    return {module for module in model.modules() if type(module).__module__.startswith("peft.")}


def compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` runs the forward of a module."""
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile(model)` wraps; any other object as it is."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def unwrapped(model: Any) -> Any:
    """The model within wrappers of torch.compile and PEFT; None where what was tuned lives in a wrapper."""
    inner = without_peft(uncompiled(model))
    return inner if inner is None or inner is model else unwrapped(inner)


def without_peft(model: Any) -> Any:
    """The model within a PEFT wrapper, its adapters included; None where what was tuned lives in the wrapper.

    Such a wrapper, while it generates, has the model within it prepare its inputs as the wrapper does.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    wrapper = getattr(prepare, "__self__", model)
    config = getattr(wrapper, "active_peft_config", None)
    if config is None:
        return model
    return None if config.is_prompt_learning else wrapper.get_base_model()


class DecodingLoop(NamedTuple):
    """What transformers does not tell a logits processor about the loop that calls it."""

    processors: LogitsProcessorList
    """The list that the loop runs: a new object for every call of `generate`, so it tells calls apart."""
    model: PreTrainedModel
    """The model that generates."""
    logits: torch.Tensor
    """Its logits before any processor changed them, float32 [batch, vocabulary]."""
    attention_mask: torch.Tensor | None
    """The mask that belongs to the tokens so far, [batch, length]; None if nothing is padded."""
    finished: torch.Tensor
    """Rows that have ended, BoolTensor[batch]."""
    generation_config: GenerationConfig
    """The configuration of this call, as `generate` completed it."""


def decoding_loop() -> DecodingLoop | None:
    """The greedy or sampling loop that is calling the current logits processor; None outside of one.

    transformers runs the processors of the generation config before the caller's, and hands each what the ones before it
    left over. The raw logits, and whether this is still the same call, are known to the loop alone: they are read from its
    frame.
    """
    processors = None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is LogitsProcessorList.__call__.__code__:
            processors = frame.f_locals["self"]
        elif frame.f_code is GenerationMixin._sample.__code__:
            local = frame.f_locals
            mask = local["model_kwargs"].get("attention_mask")
            return DecodingLoop(
                processors,
                model=local["self"],
                logits=local["next_token_logits"],
                attention_mask=None if mask is None else mask[:, :-1],
                finished=local["unfinished_sequences"] == 0,
                generation_config=local["generation_config"],
            )
        frame = frame.f_back
    return None
