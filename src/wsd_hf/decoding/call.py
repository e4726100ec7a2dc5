"""What a way of decoding is handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .. import _compat
from ..small_model import Prompt


@dataclass(frozen=True)
class Call:
    """One call of `generate`, checked and prepared by transformers up to its decoding loop.

    Attributes:
        base: the model that generates.
        input_ids: its prompts, padded on the left, [batch, prompt].
        attention_mask: [batch, prompt], or None if nothing is padded.
        processors: everything that shapes the base's choice, warpers included.
        criteria: everything that ends a response.
        generation_config: complete.
        model_kwargs: what transformers' own loop takes beside these.
        streamer: to be fed and ended; the prompt was put already.
        fills_cache: whether the caller passed a cache, which is to hold the tokens afterwards.
    """

    base: PreTrainedModel
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    streamer: BaseStreamer | None
    fills_cache: bool = False

    @property
    def budget(self) -> int:
        """Most tokens of a response."""
        return int(self.generation_config.max_length) - self.input_ids.shape[1]

    @property
    def pad_token_id(self) -> int:
        """What stands behind a response that has ended; anything where nothing is padded."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if pad is not None:
            return int(pad)
        return 0 if eos is None else int(torch.as_tensor(eos, device="cpu").flatten()[0])

    @property
    def copies(self) -> int:
        """Rows that are generated for each prompt of the caller."""
        return self.generation_config.num_return_sequences or 1

    @property
    def prompt(self) -> Prompt:
        """The prompts with a mask, also where nothing is padded."""
        mask = self.attention_mask
        if mask is None:
            mask = _compat.whole_mask(self.input_ids, self.generation_config)
        return Prompt(self.input_ids, mask)
