"""The length of the next chunk of proposals."""

from __future__ import annotations

from transformers import PreTrainedModel

CHUNKS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
"""Lengths of chunks; few, because each is captured as a CUDA graph of its own."""

OPENING = 6
"""Tokens in each chunk of a draft; at most one less is rejected where the base takes over."""


class Pace:
    """The length of the next chunk, from the agreement that this call has seen so far.

    With agreement a and the cost r of a pilot step in units of a base forward, a free row gains (1 - a^(c+1)) / (1 - a)
    tokens for 1 + c·r (arXiv 2211.17192, theorem 3.8). While drafting every token is kept. Nothing here depends on time, so
    that a seed repeats a response.
    """

    def __init__(self, cost: float, fixed: int | None, speculate: bool) -> None:
        self._cost = cost
        self._fixed = fixed
        self._speculate = speculate
        self._kept, self._judged = 3.2, 4.0

    def chunk(self, drafting: bool) -> int:
        """Tokens to propose now, while some row still drafts or after; 0 where it does not pay."""
        if not drafting and not self._speculate:
            return 0
        if self._fixed is not None:
            return self._fixed
        return OPENING if drafting else max(CHUNKS, key=self._tokens_per_cost)

    def judged(self, rows: list[tuple[int, int]]) -> None:
        """Counts kept and proposed tokens of each free row, up to the first that was rejected; recent ones weigh more."""
        rows = [(kept, proposed) for kept, proposed in rows if proposed]
        if rows:
            self._kept = 0.9 * self._kept + sum(kept for kept, _ in rows) / len(rows)
            self._judged = 0.9 * self._judged + sum(min(kept + 1, proposed) for kept, proposed in rows) / len(rows)

    def _tokens_per_cost(self, chunk: int) -> float:
        agreement = min(self._kept / self._judged, 0.99)
        return (1 - agreement ** (chunk + 1)) / (1 - agreement) / (1 + chunk * self._cost)


def cost_ratio(pilot: PreTrainedModel, base: PreTrainedModel) -> float:
    """Cost of a pilot's forward in forwards of the base: a few tokens cost as much as the weights that are read."""
    return _weights(pilot) / _weights(base)


def _weights(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings().weight.numel()
    return int(model.num_parameters(exclude_embeddings=True)) + int(head)
