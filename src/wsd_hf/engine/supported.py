"""Reasons against decoding outside of transformers' own loop: models, options, inputs, processors and criteria."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, PretrainedConfig, PreTrainedModel, StoppingCriteria
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import _compat
from ..text.stop_strings import StopStrings
from .attention import MASKED, has_twin
from .cache import LAYER_TYPES
from .call import Call
from .cancelled import Cancelled
from .checks import context_size, rotary
from .joint_calls import process_count
from .recurrent_support import is_recurrent, recurrent_self_test
from .sampling import SAMPLING_WARPERS
from .self_test import failed_self_test

DERIVED = {"attention_mask", "position_ids", "cache_position", "past_key_values", "cache_params", "use_cache"}
DERIVED |= {"logits_to_keep"}
"""Inputs of the base that `generate` makes, and that a ragged stream makes for itself."""

PREFIX_ONLY = {
    *SAMPLING_WARPERS,
    Cancelled,
    StopStrings,
    transformers.AlternatingCodebooksLogitsProcessor,
    transformers.EncoderNoRepeatNGramLogitsProcessor,
    transformers.EncoderRepetitionPenaltyLogitsProcessor,
    transformers.EosTokenCriteria,
    transformers.ExponentialDecayLengthPenalty,
    transformers.ForcedBOSTokenLogitsProcessor,
    transformers.ForcedEOSTokenLogitsProcessor,
    transformers.InfNanRemoveLogitsProcessor,
    transformers.LogitNormalization,
    transformers.MaxLengthCriteria,
    transformers.MaxTimeCriteria,
    transformers.MinLengthLogitsProcessor,
    transformers.MinNewTokensLengthLogitsProcessor,
    transformers.NoBadWordsLogitsProcessor,
    transformers.NoRepeatNGramLogitsProcessor,
    transformers.RepetitionPenaltyLogitsProcessor,
    transformers.SequenceBiasLogitsProcessor,
    transformers.StopStringCriteria,
    transformers.SuppressTokensAtBeginLogitsProcessor,
    transformers.SuppressTokensLogitsProcessor,
    transformers.WatermarkLogitsProcessor,
    transformers.WhisperTimeStampLogitsProcessor,
}
"""Processors and criteria whose result for a row depends only on its place in the batch, its prefix and its logits, in
whatever order they are called; a test calls every class of transformers to find them. `Cancelled` ends a row at any call."""


def depends_on_prefix_only(item: object) -> bool:
    """True for the classes in `PREFIX_ONLY`; a subclass may do anything."""
    return type(item) in PREFIX_ONLY


def unsupported_items(items: Iterable[object]) -> str | None:
    """The first reason against some processors and criteria; None if there is none.

    The caller's own are trusted to depend on the prefix only, and so is the function of a `PrefixConstrainedLogitsProcessor`.
    Classes of transformers outside `PREFIX_ONLY` and their subclasses are refused.
    """
    trusted = {*PREFIX_ONLY, LogitsProcessor, StoppingCriteria, transformers.PrefixConstrainedLogitsProcessor}
    for item in items:
        if any(kind.__module__.startswith("transformers.") and kind not in trusted for kind in type(item).__mro__):
            return f"{type(item).__name__} may keep a state from step to step, or depend on other rows or on scores"
    return None


def unsupported_model(name: str, model: PreTrainedModel) -> str | None:
    """The first reason against a ragged stream of a model, which `name` ("base", "pilot") refers to; None if there is none.

    The self-test finds whatever shows in texts of a few tokens. Some kinds of layers and of positions do not, so the config
    must name known ones.
    """
    text, attention = model.config.get_text_config(decoder=True), _compat.attention_implementation(model)
    if not getattr(inspect.unwrap(model.forward), "__module__", "").startswith("transformers."):
        return f"the {name} has a forward of its own ({type(model).__name__})"
    if "prepare_inputs_for_generation" in vars(model):
        return f"the {name} has its inputs prepared in a way of its own"
    if attention not in MASKED and not has_twin(model):
        return f"the {name} uses {attention!r} attention: load it with attn_implementation='sdpa'"
    if process_count() > 1 and is_deepspeed_zero3_enabled():
        return f"the {name} is sharded by DeepSpeed's ZeRO-3, which gathers weights for a model's modules, not for copies"
    if getattr(text, "alibi", False):
        return f"the {name} uses ALiBi, whose positions come from a plain mask"
    if {"dynamic", "longrope"} & _rope_types(text.to_dict().get("rope_parameters")):
        return f"the {name} stretches its rotary positions as the text grows"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"the {name} cannot compute logits for the last positions only"
    if is_recurrent(model):
        failure = recurrent_self_test(model).failure
    elif unknown := _layer_types(text) - LAYER_TYPES:
        failure = f"has layers of type {min(unknown)!r}, which can't be rewound row by row"
    else:
        failure = failed_self_test(model)
    return failure and f"the {name} {failure}"


def _layer_types(config: PretrainedConfig) -> set[str]:
    """Types of a model's layers; GPT-Neo has a name of its own for them."""
    return {*(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())}


def passes_context(model: PreTrainedModel, attention_mask: torch.Tensor, budget: int) -> bool:
    """True if a response of `budget` tokens may pass the end of a context whose positions are learned."""
    return not rotary(model) and int(attention_mask.sum(dim=1).max()) + budget > context_size(model)


def unsupported_inputs(call: Call) -> str | None:
    """The first reason against the base's inputs; None if there is none."""
    if call.fills_cache:
        return "past_key_values was given"
    for name, value in call.model_kwargs.items():
        if name not in DERIVED and value is not None and not _of_text_alone(name, value, call.base):
            return "images or videos were given" if name == _compat.ENCODED else f"{name} was given"
    mask, positions = call.attention_mask, call.model_kwargs.get("position_ids")
    mask = torch.ones_like(call.input_ids) if mask is None else mask
    if positions is not None and bool((positions * mask != (mask.cumsum(dim=1) - 1) * mask).any()):
        return "position_ids were given"
    if passes_context(call.base, mask, call.budget):
        return "the response may pass the end of the base's context, whose positions are learned"
    return None


def _of_text_alone(name: str, value: Any, base: PreTrainedModel) -> bool:
    """True for an input of a model that takes images too if a prompt without any has it."""
    if name == _compat.ENCODED:
        return all(encoded is None for encoded in value.values())
    takes_images = base.config.get_text_config(decoder=True) is not base.config
    return takes_images and name in ("token_type_ids", "mm_token_type_ids") and not value.any()


def unsupported_options(generation_config: GenerationConfig) -> str | None:
    """The first reason against generation settings, for any models; None if there is none."""
    if not generation_config.use_cache:
        return "use_cache=False was given"
    if generation_config.guidance_scale not in (None, 1):
        return "guidance_scale keeps a state of its own from step to step"
    if generation_config.cache_implementation is not None:
        return f"cache_implementation={generation_config.cache_implementation!r} was given"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            return f"{name}=True was given"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """Types of rotary positions of a model's layers; `rope_parameters` may be nested by type of layer."""
    if not isinstance(parameters, dict):
        return set()
    return {str(parameters.get("rope_type"))}.union(*map(_rope_types, parameters.values()))


def unsupported_reason(call: Call, small: Mapping[str, PreTrainedModel]) -> str | None:
    """The first reason against serving a call on ragged streams, its small models by name; None if there is none."""
    models = {"base": call.base, **small}
    return (
        next(filter(None, (unsupported_model(name, model) for name, model in models.items())), None)
        or unsupported_options(call.generation_config)
        or unsupported_inputs(call)
        or unsupported_items((*call.processors, *call.criteria))
    )


def stateful_reason(call: Call, setting: str) -> str | None:
    """Names a processor or criterion that may keep state between calls; None if there is none. `setting` vouches for it.

    Ragged streams call them with each row's exact prefix, but rows advance unequally, and rejected proposals repeat calls:
    state from step to step, as grammars keep it, would be wrong.
    """
    for item in (*call.processors, *call.criteria):
        if not depends_on_prefix_only(item):
            return f"{type(item).__name__} may keep a state from step to step ({setting}='fast' if it does not)"
    return None
