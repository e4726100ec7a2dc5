"""Stream of a model's next-token logits, all rows in lockstep, over transformers' own cache; serves any causal model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .. import _compat
from .checks import context_size, rotary, vocabulary_size


class LockstepStream:
    """A model with its own prompt and cache that is fed one token per row at a time; runs no forward when it is made.

    `generate` with a callable `custom_generate` prepares mask, positions and cache as the model's architecture needs; the
    stream then drives the forwards itself.

    Args:
        model: a causal model on any device.
        input_ids: its prompt, LongTensor[rows, prompt].
        attention_mask: 1 for real tokens, [rows, prompt]; padding on the left.
        max_new_tokens: most tokens that it is fed after its prompt; any integer.

    Attributes:
        input_ids: prompt and all tokens appended, LongTensor[rows, length].
        tokens: number of token positions fed, padding included.
    """

    def __init__(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
    ) -> None:
        device = _compat.input_device(model)
        self.input_ids = input_ids.to(device)
        self.forwards = self.tokens = 0
        self.model = model
        self._fresh: int | None = None
        self._model_kwargs: dict[str, Any] = {}
        pad_token_id = model.generation_config.pad_token_id
        type(model).generate(  # a packed model's own `generate` decodes with its pilot
            model,
            self.input_ids,
            attention_mask=attention_mask.to(device),
            custom_generate=self._take_model_kwargs,
            max_new_tokens=max_new_tokens,
            max_length=None,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            cache_implementation=None,  # one of fixed size would take the memory of all tokens that may be written
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
        self._model_kwargs = model_kwargs
        return input_ids

    def next_logits(self) -> torch.Tensor:
        """Feeds the tokens that the cache lacks; returns float32 logits of the next token, [rows, vocabulary]."""
        inputs = self.model.prepare_inputs_for_generation(
            self.input_ids, next_sequence_length=self._fresh, is_first_iteration=self._fresh is None, **self._model_kwargs
        )
        if inputs.get("position_ids") is not None and not rotary(self.model):
            # Learned positions end with the context, which a row may have filled whose tokens are no longer read.
            inputs["position_ids"] = inputs["position_ids"].clamp(max=context_size(self.model) - 1)
        outputs = self.model(**inputs, return_dict=True)
        self.forwards += 1
        self.tokens += inputs["input_ids"].numel()
        self._model_kwargs = _compat.update_model_kwargs(self.model, outputs, self._model_kwargs)
        self._fresh = 1
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Adds one token per row, LongTensor[rows]; the model may lack it if the row's logits are no longer read."""
        known = tokens[:, None].to(self.input_ids).clamp(max=vocabulary_size(self.model) - 1)
        self.input_ids = torch.cat([self.input_ids, known], dim=1)

    def select(self, rows: torch.Tensor) -> None:
        """Replaces the rows by some of them, LongTensor[rows]; a row may be named several times."""
        self.input_ids = self.input_ids[rows.to(self.input_ids.device)]
        self._model_kwargs = _compat.select_rows(self._model_kwargs, rows)
