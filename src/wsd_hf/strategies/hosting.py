"""What every strategy shares: the way from the arguments of `generate`, through its own preparation, to a way of decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerationMode

from ..checks import check_prompt
from ..config import MOST_SAMPLES, check_positive_integer
from ..decoding.call import Call
from ..errors import WSDValueError
from ..text.stopping import StopStrings


def decode_within(
    strategy: str,
    generate: Callable[..., Any],
    base: PreTrainedModel,
    decode: Callable[[Call], Any],
    *,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    synced_gpus: bool | None = None,
    custom_generate: Any = None,
    **kwargs: Any,
) -> Any:
    """Has `generate` prepare a call as it always does, and a strategy decode it.

    Args:
        strategy: its name, for errors.
        generate: transformers' own `generate` of the base.
        base: the model that generates.
        decode: makes what `generate` returns of a prepared call.
        **kwargs: everything else that `generate` was given, the arguments of the strategy excepted.

    Raises:
        WSDValueError: what no strategy can serve; before any forward.
    """
    configs = (generation_config, base.generation_config)
    if custom_generate is not None:
        raise WSDValueError(f"custom_generate cannot be combined with strategy={strategy!r}: each would decide every token")
    if synced_gpus:
        raise WSDValueError(f"synced_gpus=True is not supported by strategy={strategy!r}: its models take unequal steps")
    if setting("token_healing", kwargs, *configs):
        raise WSDValueError(f"token_healing=True is not supported by strategy={strategy!r}: heal the prompt before the call")
    if (copies := setting("num_return_sequences", kwargs, *configs)) is not None:
        check_positive_integer("num_return_sequences", copies, MOST_SAMPLES)  # before transformers copies the prompt as often
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings := setting("stop_strings", kwargs, *configs):
        if tokenizer is None:
            raise WSDValueError(f"stop_strings={stop_strings!r} are text: pass the base's tokenizer as tokenizer=")
        # transformers drops the tokenizer on the way to a callable custom_generate, so its own criterion can't be built.
        stopping_criteria.append(StopStrings(tokenizer, stop_strings))
        kwargs["stop_strings"] = None
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
            generation_config,
            model_kwargs,
            streamer,
            fills_cache,
        )
        _check(strategy, call)
        return decode(call)

    return generate(
        generation_config=generation_config,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        custom_generate=custom,
        **kwargs,
    )


def setting(name: str, keywords: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A generation setting before transformers merges its sources: call keyword > passed config > model's config."""
    values = (source.get(name) for source in (keywords, *(vars(config) for config in configs if config is not None)))
    return next((value for value in values if value is not None), None)


def _check(strategy: str, call: Call) -> None:
    mode = call.generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise WSDValueError(
            f"strategy={strategy!r} decodes greedily or samples; this call asks for {mode.value} "
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
