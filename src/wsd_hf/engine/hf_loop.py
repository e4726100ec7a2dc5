"""transformers' own decoding loop, for ways of decoding that are a logits processor in it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from .. import _compat
from .call import Call


class WatchedCriteria(StoppingCriteriaList):
    """A call's criteria, and a memory of the rows that they have ended."""

    _ended: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self._ended = ended if self._ended is None else self._ended | ended
        return ended

    def ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows that need nothing more, BoolTensor[batch]."""
        if self._ended is None:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._ended


def run(call: Call, processors: list[LogitsProcessor], criteria: WatchedCriteria) -> Any:
    """Decodes with some processors in the place of the call's own; returns what transformers' loop returns."""
    return _compat.sample(
        call.base,
        call.input_ids,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        streamer=call.streamer,
        **call.model_kwargs,
    )


def base_tokens(call: Call, steps: int) -> int:
    """Token positions that the base is fed in so many steps, padding included."""
    rows, width = call.input_ids.shape
    repeated = 0 if call.generation_config.use_cache else sum(range(width, width + steps - 1))
    return rows * (width + steps - 1 + repeated)
