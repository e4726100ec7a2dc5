"""`strategy="wsd"`: Weak-to-Strong Decoding, from the arguments of `generate` to the way of decoding that serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, GenerationMode
from transformers.utils import logging

from ..checks import check_adapted, check_causal
from ..config import PREFIX, WSDConfig
from ..decoding import fast, stepwise
from ..decoding.call import Call
from ..errors import WSDValueError
from ..outputs import WSDGenerateOutput
from ..setup import PilotArguments

logger = logging.get_logger(__name__)


def weak_to_strong_decoding(
    generate: Callable[..., Any],
    base: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel | None = None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    wsd_config: WSDConfig | None = None,
    synced_gpus: bool | None = None,
    custom_generate: Any = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    switch_criteria: StoppingCriteria | None = None,
    assistant_input_ids: torch.Tensor | None = None,
    assistant_attention_mask: torch.Tensor | None = None,
    assistant_do_sample: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Runs one call; `WSDGenerationMixin.generate` documents the arguments.

    Args:
        generate: transformers' own `generate` of the base.
        base: the model that generates.
    """
    check_causal("the model", base)
    check_adapted("the model", base)
    configs = (generation_config, base.generation_config)
    if custom_generate is not None:
        raise WSDValueError("custom_generate cannot be combined with strategy='wsd': each would decide every token")
    if synced_gpus:
        raise WSDValueError("synced_gpus=True is not supported by strategy='wsd': pilot and base take unequal steps")
    if _setting("token_healing", kwargs, *configs):
        raise WSDValueError("token_healing=True is not supported by strategy='wsd': heal the prompt before the call")
    keywords = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    config = WSDConfig.resolve(keywords, wsd_config, *configs)
    arguments = PilotArguments(
        assistant_model,
        config,
        switch_criteria,
        assistant_input_ids,
        assistant_attention_mask,
        assistant_do_sample,
        tokenizer,
        assistant_tokenizer,
    )
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings := _setting("stop_strings", kwargs, *configs):
        if tokenizer is None:
            raise WSDValueError(f"stop_strings={stop_strings!r} are text: pass the base's tokenizer as tokenizer=")
        # transformers drops the tokenizer on the way to a callable custom_generate, so its own criterion can't be built.
        stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))
        kwargs["stop_strings"] = None
    return generate(
        generation_config=generation_config,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        custom_generate=_Decoder(arguments, config, streamer, fills_cache=kwargs.get("past_key_values") is not None),
        **kwargs,
    )


def _setting(name: str, keywords: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A generation setting before transformers merges its sources: call keyword > passed config > model's config."""
    values = (source.get(name) for source in (keywords, *(vars(config) for config in configs if config is not None)))
    return next((value for value in values if value is not None), None)


class _Decoder:
    """The callable `custom_generate`: what `generate` would hand to its decoding method, it hands to this."""

    def __init__(self, arguments: PilotArguments, config: WSDConfig, streamer: BaseStreamer | None, fills_cache: bool) -> None:
        self._arguments = arguments
        self._config = config
        self._streamer = streamer
        self._fills_cache = fills_cache

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        attention_mask = model_kwargs.get("attention_mask")
        _check_call(input_ids, attention_mask, generation_config, with_embeddings="inputs_embeds" in model_kwargs)
        setup = self._arguments.prepare(model, input_ids, attention_mask, generation_config, logits_processor)
        call = Call(
            model,
            input_ids,
            attention_mask,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            self._streamer,
            self._config,
            setup,
            self._fills_cache,
        )
        output, stats = (stepwise if _step_by_step(call) else fast).decode(call)
        if not generation_config.return_dict_in_generate:
            return output
        draft = setup.draft
        draft.end(full=output.sequences.shape[1] >= generation_config.max_length)
        return WSDGenerateOutput(
            **output,
            switch_index=draft.switch_index.to(input_ids.device),
            draft_log_probs=draft.log_probs.to(input_ids.device),
            switch_reason=draft.reasons,
            stats=stats,
            wsd_config=self._config,
            prompt_length=input_ids.shape[1],
        )


def _step_by_step(call: Call) -> bool:
    if call.config.engine == "step":
        return True
    reason = fast.why_not(call)
    if reason and call.config.engine == "fast":
        raise WSDValueError(f"wsd_engine='fast' cannot serve this call: {reason}")
    if call.config.engine == "auto":
        reason = reason or fast.doubt(call)
    if reason:
        logger.warning_once(f"Weak-to-Strong Decoding goes step by step, since {reason}")
    return reason is not None


def _check_call(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig,
    with_embeddings: bool,
) -> None:
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise WSDValueError(
            f"strategy='wsd' decodes greedily or samples; this call asks for {mode.value} "
            f"(num_beams={generation_config.num_beams}): leave out the arguments that select it"
        )
    if input_ids.shape[1] == 0 and with_embeddings:
        raise WSDValueError("inputs_embeds without input_ids leaves the pilot no prompt: pass the prompt's input_ids too")
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded and len(input_ids) > 1 and generation_config.pad_token_id is None:
        raise WSDValueError("a padded batch needs a pad token: set pad_token_id, e.g. to the EOS id")
