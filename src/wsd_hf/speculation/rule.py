"""A strategy's part in a call that is drafted and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

SwitchReason = Literal["confident", "draft_ended", "draft_limit", "budget", "stopped"]


class Logits(NamedTuple):
    """Raw logits of a call's models at the same positions, float32 [rows, positions, V]; V is the base's vocabulary.

    Tokens that a small model lacks have -inf there.
    """

    base: torch.Tensor
    # Typed for targets, which get those of all their partners.
    pilot: torch.Tensor = None  # type: ignore[assignment]
    """None unless the rule reads the pilot."""
    reference: torch.Tensor = None  # type: ignore[assignment]
    """None without a reference model."""


def over_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor:
    """A small model's logits over the base's vocabulary, [..., size]: -inf for tokens that it lacks."""
    if logits.shape[-1] >= size:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, size - logits.shape[-1]), value=-torch.inf)


class Drafted(NamedTuple):
    """A drafted token, and the base's distribution at its position: natural logarithms, of float32 precision."""

    token: int
    log_prob: float
    best_log_prob: float = math.nan
    """That of the base's likeliest token; NaN unless the rule reads distributions."""
    entropy: float = math.nan
    """In nats; NaN unless the rule reads distributions."""


class Rule:
    """One call's rule, row by row: which tokens are the pilot's, and the scores that all others are chosen from.

    A row that *drafts* takes the pilot's tokens as they are. A *free* row chooses from the target's scores; tokens proposed to
    it are kept if it would have written them itself. This class is the base alone: every row is free from the beginning.

    Attributes:
        drafting: for each row, whether its next token is the pilot's.
        waiting: for each row, whether it writes nothing for now.
    """

    reads_pilot = False
    """Whether the pilot's logits are needed at every token of free rows, for `target` or because of `weighs_written`."""
    weighs_written = False
    """Whether `written` needs the pilot's log-probability of the token."""
    reads_distributions = False
    """Whether `take` needs the base's best log-probability and entropy."""

    def __init__(self, rows: int) -> None:
        self.drafting = [False] * rows
        self.waiting = [False] * rows

    def target(self, logits: Logits) -> torch.Tensor:
        """Scores that free rows choose from, before the caller's processors, float32 [rows, positions, V]."""
        return logits.base

    def take(self, offered: Mapping[int, Drafted]) -> dict[int, int]:
        """Appends a token to the drafts of some rows; returns the tokens that rows must take now."""
        return {}

    def stop(self, row: int, reason: SwitchReason) -> None:
        """Ends a row's draft, unless it has ended."""

    def drop(self, row: int, full: bool = False) -> None:
        """Ends the draft of a row whose response has ended; if the row is full, the budget has ended it."""

    def written(self, row: int, token: int, pilot_log_prob: float) -> None:
        """Notes a token that a free row has written.

        A rule may let the row draft or wait from here on. `pilot_log_prob` is the pilot's log-probability of the token; NaN
        unless the rule weighs what is written.
        """
