"""A stopping criterion by which other threads end rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class Cancelled(StoppingCriteria):
    """Ends each row whose event is set, at its next token.

    Args:
        events: one for each row; any thread may set them at any time.
    """

    def __init__(self, events: Sequence[threading.Event]) -> None:
        self._events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Rows that are cancelled, BoolTensor[batch], on the device of `input_ids`, LongTensor[batch, length]."""
        return torch.tensor([event.is_set() for event in self._events], device=input_ids.device)
