"""The step-by-step path: transformers' own loop, one forward of the base for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from .. import _compat
from ..config import WSDConfig
from ..outputs import WSDStats, peak_memory
from ..sampling import force
from ..setup import DraftSetup
from .call import Call
from .steps import DraftSteps


def decode(call: Call, setup: DraftSetup, config: WSDConfig) -> tuple[Any, WSDStats]:
    """Decodes with any causal base; returns what transformers' loop returns, and the work done."""
    criteria, steps = _WatchedCriteria(call.criteria), DraftSteps(setup)
    output = _compat.sample(
        call.base,
        call.input_ids,
        logits_processor=LogitsProcessorList([_DraftThenShape(steps, call.processors, criteria)]),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        streamer=call.streamer,
        **call.model_kwargs,
    )
    return output, _stats(steps, call, setup)


class _WatchedCriteria(StoppingCriteriaList):
    """The caller's criteria, and a memory of the rows that they have ended."""

    finished: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self.finished = ended if self.finished is None else self.finished | ended
        return ended


class _DraftThenShape(LogitsProcessor):
    """The only processor of the loop, so that the draft sees raw logits and has the last word over the caller's."""

    def __init__(self, steps: DraftSteps, processors: LogitsProcessorList, criteria: _WatchedCriteria) -> None:
        self._steps = steps
        self._processors = processors
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finished = self._criteria.finished
        if finished is None:
            finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens = self._steps.advance(input_ids, scores, finished)
        return force(self._processors(input_ids, scores), tokens)


def _stats(steps: DraftSteps, call: Call, setup: DraftSetup) -> WSDStats:
    rows, width = call.input_ids.shape
    repeated = 0 if call.generation_config.use_cache else sum(range(width, width + steps.taken - 1))
    return WSDStats(
        base_forwards=steps.taken,
        base_tokens=rows * (width + steps.taken - 1 + repeated),
        pilot_forwards=steps.stream.forwards,
        pilot_tokens=steps.stream.tokens,
        cache_memory=None,
        peak_memory=peak_memory(call.base, setup.pilot),
    )
