"""The pilot as a stream of next-token logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from . import _compat
from .checks import context_size


class PilotStream:
    """A pilot that is fed one token per row at a time, with its own prompt and its own cache.

    `generate` with a callable `custom_generate` prepares mask, positions and cache in the way the pilot's architecture
    needs; the stream then drives the forwards itself.
    """

    def __init__(
        self, pilot: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
    ) -> None:
        """Prepares the stream; runs no forward.

        Args:
            pilot: the model, on any device.
            input_ids: its prompt, [batch, prompt].
            attention_mask: 1 for real tokens, [batch, prompt]; padding on the left.
            max_new_tokens: room to prepare the cache for.
        """
        self.forwards = 0
        self.tokens = 0
        self._pilot = pilot
        self._input_ids = input_ids.to(pilot.device)
        self._fresh: int | None = None
        self._model_kwargs: dict[str, Any] = {}
        pad_token_id = pilot.generation_config.pad_token_id
        pilot.generate(
            self._input_ids,
            attention_mask=attention_mask.to(pilot.device),
            custom_generate=self._take_model_kwargs,
            max_new_tokens=max_new_tokens,
            max_length=None,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            stop_strings=None,
            token_healing=False,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
        )

    def _take_model_kwargs(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        self._pilot = model
        self._model_kwargs = model_kwargs
        return input_ids

    def next_logits(self) -> torch.Tensor:
        """Feeds what the cache does not hold yet; returns float32 logits of the next token, [batch, vocabulary]."""
        inputs = self._pilot.prepare_inputs_for_generation(
            self._input_ids,
            next_sequence_length=self._fresh,
            is_first_iteration=self._fresh is None,
            **self._model_kwargs,
        )
        if inputs.get("position_ids") is not None:
            # A row that drafts no more may have filled its context: what it is fed then is read by nobody.
            inputs["position_ids"] = inputs["position_ids"].clamp(max=context_size(self._pilot) - 1)
        outputs = self._pilot(**inputs, return_dict=True)
        self.forwards += 1
        self.tokens += inputs["input_ids"].numel()
        self._model_kwargs = _compat.update_model_kwargs(self._pilot, outputs, self._model_kwargs)
        self._fresh = 1
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Adds one token per row, [batch]."""
        self._input_ids = torch.cat([self._input_ids, tokens[:, None].to(self._input_ids)], dim=1)
