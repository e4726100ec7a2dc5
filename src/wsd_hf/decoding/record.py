"""Scores and logits of every token, for callers that ask for them."""

from __future__ import annotations

from typing import Literal

import torch


class Record:
    """What the base said at each token of each response, in transformers' form.

    Args:
        rows: of the batch.
    """

    def __init__(self, rows: int) -> None:
        self._kept: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in range(rows)] for name in ("logits", "scores")}

    def add(self, rows: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """The next token of some rows, raw and processed, [batch, vocabulary]."""
        for row in rows:
            self._kept["logits"][row].append(logits[row].clone())
            self._kept["scores"][row].append(scores[row].clone())

    def columns(self, name: Literal["logits", "scores"]) -> tuple[torch.Tensor, ...]:
        """One tensor [batch, vocabulary] for each token of the longest response; 0 where a row has ended."""
        kept = self._kept[name]
        nothing = torch.zeros_like(kept[0][0])
        longest = max(map(len, kept))
        return tuple(torch.stack([row[column] if column < len(row) else nothing for row in kept]) for column in range(longest))
