"""The way of a call through transformers' `generate` to a strategy, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerationMode
from transformers.utils import logging

from .. import _compat
from ..errors import WSDValueError
from ..text.stop_strings import StopStrings
from .call import Call
from .checks import check_kind, check_prompt, check_token_ids, closing_token_id, eos_token_ids, known_ids, vocabulary_size
from .joint_calls import process_count
from .numbers import MOST_SAMPLES, check_integer, check_positive_integer
from .small_model import SmallModel
from .strategy import StrategyConfig, StrategyOutput

logger = logging.get_logger(__name__)

INTEGERS = {"max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_return_sequences", "top_k", "pad_token_id"}
INTEGERS |= {"bos_token_id", "forced_bos_token_id", "prefill_chunk_size"}
INTEGERS |= {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size"}
"""Settings of transformers that may come as other numbers than Python's integers."""

ENDS = ("eos_token_id", "forced_eos_token_id")
"""Settings that are a token id or several, which may come so as well."""


def decode_within(
    strategy: StrategyConfig,
    generate: Callable[..., Any],
    base: PreTrainedModel,
    partners: Mapping[str, SmallModel],
    *,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    synced_gpus: bool | None = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    """Lets transformers' own `generate` of the base prepare the call, then runs the strategy's decoder instead of its loop.

    Other keywords are arguments of `generate`. Calls that no strategy can serve are refused before any forward.
    """
    configs = (generation_config, base.generation_config)
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase)
    if custom_generate is not None:
        raise WSDValueError(
            f"custom_generate cannot be combined with strategy={strategy.name!r}: each would decide every token"
        )
    if synced_gpus and process_count() == 1:
        raise WSDValueError(
            f"synced_gpus=True is not supported by strategy={strategy.name!r} in a single process: it lets several run "
            "the same forwards; leave it out"
        )
    _check_arguments(strategy, kwargs, *configs)
    if strategy.always_samples:
        if generation_setting("do_sample", kwargs, generation_config) is False:
            raise WSDValueError(f"do_sample=False: strategy={strategy.name!r} chooses among samples; leave it out")
        kwargs["do_sample"] = True
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if (stop_strings := generation_setting("stop_strings", kwargs, *configs)) is not None:
        if tokenizer is None:
            raise WSDValueError(f"stop_strings={stop_strings!r} are text: pass the base's tokenizer as tokenizer=")
        # transformers drops the tokenizer on the way to a callable custom_generate, so its own criterion can't be built.
        stopping_criteria.append(StopStrings(tokenizer, stop_strings))
        kwargs["stop_strings"] = None
    if strategy.ends_with_pilot and "eos_token_id" not in kwargs:
        kwargs["eos_token_id"] = _ends_of_both(generation_setting("eos_token_id", {}, *configs), partners["assistant"], base)
    kwargs |= _integers(kwargs, *configs)
    fills_cache = kwargs.get("past_key_values") is not None

    def custom(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        call = Call(
            model,
            input_ids,
            model_kwargs.get("attention_mask"),
            logits_processor,
            stopping_criteria,
            _with_known_pad_token(model, generation_config),
            partners,
            tokenizer,
            model_kwargs,
            streamer,
            fills_cache,
        )
        _check(strategy, call)
        output = _decode(strategy, call)
        return output if generation_config.return_dict_in_generate else output.sequences

    return generate(
        generation_config=generation_config,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        custom_generate=custom,
        **kwargs,
    )


def _decode(strategy: StrategyConfig, call: Call) -> StrategyOutput:
    """Output of a strategy; padding that is no token of the base is replaced while it decodes."""
    known = call
    if "inputs_embeds" not in call.model_kwargs:  # the base reads those
        known = replace(call, input_ids=known_ids("input_ids", *call.prompt, "the base", call.base))
    output = strategy.decode(known)
    if call.streamer is not None:
        call.streamer.end()
    output.sequences[:, : call.input_ids.shape[1]] = call.input_ids
    return replace(output, prompt_length=call.input_ids.shape[1], strategy=strategy)


def _check_arguments(strategy: StrategyConfig, keywords: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """Raises if no strategy can serve what was passed; `_check` looks at what transformers has made of it."""
    if generation_setting("token_healing", keywords, *configs):
        raise WSDValueError(f"token_healing=True is not supported by strategy={strategy.name!r}: heal the prompt first")
    if generation_setting("cache_implementation", keywords, *configs) == "paged":  # transformers would leave for generate_batch
        raise WSDValueError(f"cache_implementation='paged' is not supported by strategy={strategy.name!r}: leave it out")
    if (copies := generation_setting("num_return_sequences", keywords, *configs)) is not None:
        check_positive_integer("num_return_sequences", copies, MOST_SAMPLES)  # before transformers copies the prompt as often
    for name in ("inputs", "input_ids"):
        check_token_ids("input_ids", keywords.get(name))


def generation_setting(name: str, keywords: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A generation setting before transformers merges its sources: call keyword > passed config > model's config."""
    values = (source.get(name) for source in (keywords, *(vars(config) for config in configs if config is not None)))
    return next((value for value in values if value is not None), None)


def may_sample(strategy: StrategyConfig, base: PreTrainedModel, keywords: dict[str, Any]) -> bool:
    """True if some model of a call draws its tokens."""
    configs = (keywords.get("generation_config"), base.generation_config)
    pilot = getattr(strategy, "assistant_do_sample", False)
    return bool(strategy.always_samples or pilot or generation_setting("do_sample", keywords, *configs))


def _integers(keywords: dict[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    """The settings that came as numbers of another kind, as keywords, which beat them: floats, numbers of numpy or torch."""
    found: dict[str, Any] = {}
    for name in sorted(INTEGERS.union(ENDS)):
        given = generation_setting(name, keywords, *configs)
        value = given.tolist() if name in ENDS and hasattr(given, "tolist") else given
        several = value if name in ENDS and isinstance(value, list | tuple) else [value]
        if value is None:
            continue
        numbers = [check_integer(name, number) for number in several]
        if name.endswith("_token_id") and (beyond := [number for number in numbers if abs(number) >= 2**63]):
            raise WSDValueError(f"{name}={beyond[0]}: must be a token id, of at most 64 bits")
        if value is not given or any(type(number) is not int for number in several):
            found[name] = numbers if name in ENDS else numbers[0]
    return found


def _ends_of_both(given: Any, pilot: SmallModel, base: PreTrainedModel) -> list[Any] | None:
    """The call's EOS ids, and after them the pilot's that the base has; None if there are none."""
    given = given.tolist() if hasattr(given, "tolist") else given
    own = [] if given is None else [*given] if isinstance(given, list | tuple) else [given]
    others = eos_token_ids(pilot.model.generation_config) | eos_token_ids(pilot.tokenizer)
    return [*own, *sorted(token for token in others.difference(own) if 0 <= token < vocabulary_size(base))] or None


def _with_known_pad_token(model: PreTrainedModel, generation_config: GenerationConfig) -> GenerationConfig:
    """The configuration with a pad token that the model can be fed: an EOS, as in transformers where there is no pad token."""
    pad, size = generation_config.pad_token_id, vocabulary_size(model)
    if pad is None or 0 <= pad < size:
        return generation_config
    known = closing_token_id(eos_token_ids(generation_config), size)
    logger.warning_once(
        f"pad_token_id={int(pad)} is no token of the base, whose vocabulary has {size} tokens: "
        f"responses that end before others are padded with {known or 0}"
    )
    return _compat.with_pad_token(generation_config, known or 0)


def _check(strategy: StrategyConfig, call: Call) -> None:
    mode = call.generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise WSDValueError(
            f"strategy={strategy.name!r} decodes greedily or samples; this call asks for {mode.value} "
            f"(num_beams={call.generation_config.num_beams}): leave out the arguments that select it"
        )
    if call.input_ids.shape[1] == 0 and "inputs_embeds" in call.model_kwargs:
        raise WSDValueError(
            "inputs_embeds without input_ids leaves the small models no prompt: pass the prompt's input_ids too"
        )
    check_prompt("input_ids", *call.prompt, rows=len(call.input_ids))
    padded = call.attention_mask is not None and not bool(call.attention_mask.all())
    if padded and len(call.input_ids) > 1 and call.generation_config.pad_token_id is None:
        raise WSDValueError("a padded batch needs a pad token: set pad_token_id, e.g. to the EOS id")
