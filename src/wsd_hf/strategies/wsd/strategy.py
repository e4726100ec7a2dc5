"""`strategy="wsd"`: Weak-to-Strong Decoding, from the arguments of `generate` to the way of decoding that serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging

from ...engine.call import Call, decode_within
from ...engine.keywords import with_settings
from ...engine.small_model import SmallModel
from ...engine.supported import stateful_reason, unsupported_reason
from ...errors import WSDValueError
from . import fast, stepwise
from .config import PREFIX, WSDConfig
from .draft_setup import DraftArguments, DraftSetup
from .output import WSDGenerateOutput

logger = logging.get_logger(__name__)


@with_settings(WSDConfig().to_dict())
def weak_to_strong_decoding(
    generate: Callable[..., Any],
    base: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel,
    assistant_input_ids: torch.Tensor | None = None,
    assistant_attention_mask: torch.Tensor | None = None,
    assistant_do_sample: bool | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    switch_criteria: StoppingCriteria | None = None,
    wsd_config: WSDConfig | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Runs one call; `WSDGenerationMixin.generate` documents the arguments.

    Args:
        generate: transformers' own `generate` of the base.
        base: the model that generates.
    """
    keywords = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
    config = WSDConfig.resolve(keywords, wsd_config, generation_config, base.generation_config)
    pilot = SmallModel("assistant", assistant_model, assistant_input_ids, assistant_attention_mask, assistant_tokenizer)
    arguments = DraftArguments(pilot, assistant_do_sample, tokenizer, config, switch_criteria)

    def decode(call: Call) -> Any:
        setup = arguments.prepare(call.base, *call.prompt, call.generation_config, call.processors)
        decoding = stepwise.decode if _step_by_step(call, setup, config) else fast.decode
        output, stats = decoding(call, setup, config)
        if not call.generation_config.return_dict_in_generate:
            return output
        draft, device = setup.draft, call.input_ids.device
        draft.end(full=output.sequences.shape[1] >= call.generation_config.max_length)
        return WSDGenerateOutput(
            **output,
            switch_index=draft.switch_index.to(device),
            draft_log_probs=draft.log_probs.to(device),
            switch_reason=draft.reasons,
            stats=stats,
            wsd_config=config,
            prompt_length=call.input_ids.shape[1],
        )

    return decode_within("wsd", generate, base, decode, tokenizer=tokenizer, generation_config=generation_config, **kwargs)


def _step_by_step(call: Call, setup: DraftSetup, config: WSDConfig) -> bool:
    if config.engine == "step":
        return True
    reason = unsupported_reason(call, setup.pilot)
    if reason and config.engine == "fast":
        raise WSDValueError(f"wsd_engine='fast' cannot serve this call: {reason}")
    if config.engine == "auto":
        reason = reason or stateful_reason(call)
    if reason:
        logger.warning_once(f"Weak-to-Strong Decoding goes step by step, since {reason}")
    return reason is not None
