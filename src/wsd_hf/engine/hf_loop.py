"""transformers' own decoding loop, for strategies that are a logits processor in it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from .. import _compat
from ..text.streaming import put_tokens, takes_likelihoods
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
    """Hands the loop's tokens on with their writers and likelihoods; the loop may put a token after it has chosen the next.

    Args:
        streamer: gets them, and the prompt if the loop's caller puts it; None: none does.
    """

    def __init__(self, streamer: BaseStreamer | None) -> None:
        self._streamer = streamer
        self._expected = deque[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]]()

    def expect(self, logits: torch.Tensor, chosen: torch.Tensor, by_pilot: torch.Tensor | None = None) -> None:
        """Notes the origin of every row's next token.

        Args:
            logits: the base's raw ones, [batch, vocabulary].
            chosen: rows whose token is chosen by a model, BoolTensor[batch].
            by_pilot: as in `put_tokens`.
        """
        if self._streamer is not None:
            raw = logits.clone() if takes_likelihoods(self._streamer) else None  # before processors, which may write into them
            self._expected.append((by_pilot, raw, chosen))

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, [batch, prompt], if it is put, and then the next token of every row, LongTensor[batch]."""
        assert self._streamer is not None
        if not self._expected:
            self._streamer.put(value)
            return
        by_pilot, logits, chosen = self._expected.popleft()
        likelihoods = None
        if logits is not None:
            found = zip(likelihoods_of(logits, value.to(logits.device)), chosen.tolist(), strict=True)
            likelihoods = [one if by_model else None for one, by_model in found]
        put_tokens(self._streamer, value, by_pilot, likelihoods)

    def end(self) -> None:
        """Nothing: the streamer is ended with the call."""


class RawLogits(LogitsProcessor):
    """Changes no score: hands the raw logits of transformers' own call of the base to a streamer of its tokens."""

    def __init__(self, streamer: TokenStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are, [batch, vocabulary]."""
        if (decoding := _compat.decoding_loop()) is not None:
            self._streamer.expect(decoding.logits, ~decoding.finished)
        return scores


def run(
    call: Call, processors: list[LogitsProcessor], criteria: WatchedCriteria, streamer: TokenStreamer | None = None
) -> GenerateDecoderOnlyOutput:
    """Decodes with other processors and criteria than the call's, which call `streamer.expect` before each token, if given."""
    output = _compat.sample(
        call.base,
        call.input_ids,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=criteria,
        generation_config=call.generation_config,
        streamer=None if call.streamer is None else streamer or TokenStreamer(call.streamer),
        **call.model_kwargs,
    )
    return output if isinstance(output, GenerateDecoderOnlyOutput) else GenerateDecoderOnlyOutput(sequences=output)


def base_tokens(call: Call, steps: int) -> int:
    """Token positions that the base is fed in so many steps, padding included."""
    rows, width = call.input_ids.shape
    repeated = 0 if call.generation_config.use_cache else sum(range(width, width + steps - 1))
    return rows * (width + steps - 1 + repeated)
