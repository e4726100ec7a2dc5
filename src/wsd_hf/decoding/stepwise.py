"""The step-by-step path: transformers' own loop, one forward of the base for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..config import WSDConfig
from ..outputs import WSDStats, peak_memory
from ..sampling import force
from ..setup import DraftSetup
from .call import Call
from .plain_loop import WatchedCriteria, base_tokens, run
from .steps import DraftSteps


def decode(call: Call, setup: DraftSetup, config: WSDConfig) -> tuple[Any, WSDStats]:
    """Decodes with any causal base; returns what transformers' loop returns, and the work done."""
    criteria, steps = WatchedCriteria(call.criteria), DraftSteps(setup)
    output = run(call, [_DraftThenShape(steps, call.processors, criteria)], criteria)
    return output, WSDStats(
        base_forwards=steps.taken,
        base_tokens=base_tokens(call, steps.taken),
        pilot_forwards=steps.stream.forwards,
        pilot_tokens=steps.stream.tokens,
        cache_memory=None,
        peak_memory=peak_memory(call.base, setup.pilot),
    )


class _DraftThenShape(LogitsProcessor):
    """The only processor of the loop, so that the draft sees raw logits and has the last word over the caller's."""

    def __init__(self, steps: DraftSteps, processors: LogitsProcessorList, criteria: WatchedCriteria) -> None:
        self._steps = steps
        self._processors = processors
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self._steps.advance(input_ids, scores, self._criteria.ended(input_ids))
        return force(self._processors(input_ids, scores), tokens)
