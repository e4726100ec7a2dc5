"""transformers' own decoding loop, for strategies that are a logits processor in it."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from .. import _compat
from ..text.streaming import Likelihoods
from .call import Call


class WatchedCriteria(StoppingCriteriaList):
    """A call's criteria, and the rows that they have ended."""

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


class Written(NamedTuple):
    """The writers of one token in every row, and the likelihoods of the drafted ones; as in `put_tokens`."""

    by_pilot: torch.Tensor
    likelihoods: Likelihoods


def run(
    call: Call, processors: list[LogitsProcessor], criteria: WatchedCriteria, written: deque[Written] | None = None
) -> GenerateDecoderOnlyOutput:
    """Decodes with some processors and criteria in the place of the call's own; the processors fill `written`."""
    output = _compat.sample(
        call.base,
        call.input_ids,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        streamer=None if call.streamer is None else _Streamer(call, written),
        **call.model_kwargs,
    )
    return output if isinstance(output, GenerateDecoderOnlyOutput) else GenerateDecoderOnlyOutput(sequences=output)


class _Streamer(BaseStreamer):
    """Hands the loop's tokens to the streamer of a call; the loop may put a token after it has chosen the next."""

    def __init__(self, call: Call, written: deque[Written] | None) -> None:
        self._call, self._written = call, written

    def put(self, value: torch.Tensor) -> None:
        """The next token of every row, LongTensor[batch]."""
        self._call.stream(value, *(self._written.popleft() if self._written else ()))

    def end(self) -> None:
        """Nothing: the streamer is ended with the call."""


def base_tokens(call: Call, steps: int) -> int:
    """Token positions that the base is fed in so many steps, padding included."""
    rows, width = call.input_ids.shape
    repeated = 0 if call.generation_config.use_cache else sum(range(width, width + steps - 1))
    return rows * (width + steps - 1 + repeated)
