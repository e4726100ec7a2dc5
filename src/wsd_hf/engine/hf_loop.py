"""transformers' own decoding loop, for strategies that are a logits processor in it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from .. import _compat
from .call import Call
from .likelihoods import likelihoods_of


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


class TokenStreamer(BaseStreamer):
    """Hands the loop's tokens to the streamer of a call; the loop may put a token after it has chosen the next."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._expected = deque[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]]()

    def expect(self, logits: torch.Tensor, chosen: torch.Tensor, by_pilot: torch.Tensor | None = None) -> None:
        """Notes the origin of every row's next token.

        Args:
            logits: the base's raw ones, [batch, vocabulary].
            chosen: rows whose token is chosen by a model, BoolTensor[batch].
            by_pilot: as in `put_tokens`.
        """
        if self._call.streamer is not None:
            raw = logits.clone() if self._call.takes_likelihoods else None  # before processors, which may write into them
            self._expected.append((by_pilot, raw, chosen))

    def put(self, value: torch.Tensor) -> None:
        """The next token of every row, LongTensor[batch]."""
        by_pilot, logits, chosen = self._expected.popleft()
        likelihoods = None
        if logits is not None:
            found = zip(likelihoods_of(logits, value.to(logits.device)), chosen.tolist(), strict=True)
            likelihoods = [one if by_model else None for one, by_model in found]
        self._call.stream(value, by_pilot, likelihoods)

    def end(self) -> None:
        """Nothing: the streamer is ended with the call."""


def run(
    call: Call, processors: list[LogitsProcessor], criteria: WatchedCriteria, streamer: TokenStreamer
) -> GenerateDecoderOnlyOutput:
    """Decodes with other processors and criteria than the call's; they call `streamer.expect` before each token."""
    output = _compat.sample(
        call.base,
        call.input_ids,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        streamer=None if call.streamer is None else streamer,
        **call.model_kwargs,
    )
    return output if isinstance(output, GenerateDecoderOnlyOutput) else GenerateDecoderOnlyOutput(sequences=output)


def base_tokens(call: Call, steps: int) -> int:
    """Token positions that the base is fed in so many steps, padding included."""
    rows, width = call.input_ids.shape
    repeated = 0 if call.generation_config.use_cache else sum(range(width, width + steps - 1))
    return rows * (width + steps - 1 + repeated)
