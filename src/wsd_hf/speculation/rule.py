"""A strategy's part in a call that is drafted and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from ..engine.likelihoods import log_probs

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


class Text(NamedTuple):
    """A response in tokens of the pilot."""

    tokens: list[int]
    last: int
    """Number of tokens at the end that the pilot is to weigh, at least 1."""


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
    """Whether `written` needs the token's weight."""
    one_by_one = False
    """Whether free rows write one token in a step, without proposals."""
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

    def weigh(self, pilot: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Weights of tokens that free rows write, float32 [...], by the pilot's raw logits, [..., V]: log-probabilities."""
        return log_probs(pilot, tokens)

    def written(self, row: int, token: int, weight: float) -> None:
        """Notes a token that a free row has written; its response goes on.

        A rule may let the row draft or wait from here on. `weight` is NaN unless the rule weighs what is written.
        """

    def unweighed(self) -> Mapping[int, Text]:
        """Responses that the pilot is to read before the next step, if it has a vocabulary of its own."""
        return {}

    def weighed(self, row: int, weights: list[float]) -> None:
        """Notes the weights of the last tokens of such a response; the row may draft or wait from here on."""
