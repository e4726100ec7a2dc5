"""Scores and logits of every token, for callers that ask for them."""

from __future__ import annotations

from typing import Literal

import torch


class Record:
    """The base's logits and scores at each token of each response, in transformers' form."""

    def __init__(self, rows: int) -> None:
        self._lengths = [0] * rows
        self._columns: dict[str, list[torch.Tensor]] = {"logits": [], "scores": []}

    def add(self, rows: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        """The next token of some rows, raw and processed, [batch, vocabulary]."""
        for row in rows:
            for columns, values in ((self._columns["logits"], logits), (self._columns["scores"], scores)):
                if self._lengths[row] == len(columns):
                    columns.append(torch.zeros_like(values))
                columns[self._lengths[row]][row] = values[row]
            self._lengths[row] += 1

    def columns(self, name: Literal["logits", "scores"], length: int | None = None) -> tuple[torch.Tensor, ...]:
        """A tensor [batch, vocabulary] for each token of the longest response (the first `length`); 0 where a row has ended."""
        return tuple(self._columns[name][:length])
