"""The fast path's way from a prepared call to its output."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..checks import context_size, eos_token_ids
from ..config import WSDConfig
from ..logits_process import DraftSetup
from .loop import Decoding
from .pace import LONGEST, Pace
from .rows import Rows
from .stream import Stream


def decode(
    base: PreTrainedModel,
    setup: DraftSetup,
    config: WSDConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    streamer: BaseStreamer | None,
) -> Decoding:
    """Decodes a batch; what it wrote and what that took are in the result."""
    budget = generation_config.max_length - input_ids.shape[1]
    room = budget + max(LONGEST, config.chunk or 0)
    prompts = real_tokens(input_ids, attention_mask)
    pilot_prompts = real_tokens(setup.input_ids, setup.attention_mask)
    pad_token_id = next(
        (token for token in (generation_config.pad_token_id, *sorted(eos_token_ids(generation_config))) if token is not None), 0
    )
    decoding = Decoding(
        Stream(base, prompts, room, last_position=max(map(len, prompts)) + budget - 1),
        Stream(setup.pilot, pilot_prompts, room, last_position=context_size(setup.pilot) - 1),
        setup.draft,
        Rows(input_ids, generation_config.max_length, pad_token_id, criteria, streamer),
        Pace(config.chunk, config.speculate),
        processors,
        setup.warpers,
        generation_config.do_sample,
    )
    decoding.run()
    if streamer is not None:
        streamer.end()
    return decoding


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows without their padding."""
    rows = input_ids.tolist()
    if attention_mask is None:
        return rows
    return [
        [token for token, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, attention_mask.tolist(), strict=True)
    ]


def why_not_this_call(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> str | None:
    """Why the fast path cannot serve this call, whatever the models; None where it can."""
    cache = model_kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        return "past_key_values was given"
    if model_kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds was given"
    if not generation_config.use_cache:
        return "use_cache=False was given"
    if generation_config.guidance_scale not in (None, 1):
        return "guidance_scale keeps a state of its own from step to step"
    if generation_config.cache_implementation is not None:
        return f"cache_implementation={generation_config.cache_implementation!r} was given"
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            return f"{name}=True was given"
    return None
