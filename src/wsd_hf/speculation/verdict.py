"""Everything of one step that the decision is made from: on the device, and on the host."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..text.streaming import Likelihood
from .rule import Drafted, Logits

FAULTS = {"pilot": 1, "base": 2, "reference": 4, "target": 8}
"""Bit of each model in a sum that names those whose logits are not finite."""


class Own(NamedTuple):
    """A token that a free row writes."""

    token: int
    weight: float
    """NaN unless the rule weighs what is written."""
    likelihood: Likelihood | None
    """Under the base; None unless the streamer takes it."""


class Verdict(NamedTuple):
    """One step on the host: for each live row, c proposals and the position after them, in lists of c + 1."""

    proposed: Mapping[int, list[int]]
    """Token ids; `FREE` at the end."""
    faults: Mapping[int, list[int]]
    """Sums of `FAULTS`."""
    proposed_log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's, of float32 precision; only where some row drafts."""
    proposed_ranks: Mapping[int, list[int]] = MappingProxyType({})
    """In the base's distributions; only where some row drafts, for a streamer that takes them."""
    best_log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's highest log-probabilities; only for rules that read distributions."""
    entropies: Mapping[int, list[float]] = MappingProxyType({})
    """Entropies of the base's distributions, in nats; only for rules that read distributions."""
    own: Mapping[int, list[int]] = MappingProxyType({})
    """Token ids: the target's own, if all positions can be chosen for at once."""
    own_weights: Mapping[int, list[float]] = MappingProxyType({})
    """Only for rules that weigh what is written."""
    own_log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's; only for a streamer that takes them."""
    own_ranks: Mapping[int, list[int]] = MappingProxyType({})
    """In the base's distributions; only for a streamer that takes them."""
    afresh: Mapping[int, list[int]] = MappingProxyType({})
    """Token ids: the target's own, drawn without regard to the proposal; only where some row drafts and tokens are drawn."""
    afresh_weights: Mapping[int, list[float]] = MappingProxyType({})
    afresh_log_probs: Mapping[int, list[float]] = MappingProxyType({})
    afresh_ranks: Mapping[int, list[int]] = MappingProxyType({})

    def drafted(self, row: int, position: int) -> Drafted:
        """A proposal as a drafted token."""
        drafted = Drafted(self.proposed[row][position], self.proposed_log_probs[row][position])
        if not self.entropies:
            return drafted
        return drafted._replace(best_log_prob=self.best_log_probs[row][position], entropy=self.entropies[row][position])

    def likelihoods(self, rows: Collection[int], position: int) -> dict[int, Likelihood | None]:
        """Of the proposals in some rows; none without a streamer that takes them."""
        log_probs, ranks = self.proposed_log_probs, self.proposed_ranks
        return {row: Likelihood(log_probs[row][position], ranks[row][position]) for row in rows} if ranks else {}

    def choice(self, row: int, position: int, afresh: bool) -> Own:
        """The target's own token."""
        tokens, weights, log_probs, ranks = self.own, self.own_weights, self.own_log_probs, self.own_ranks
        if afresh and self.afresh:
            tokens, weights, log_probs, ranks = self.afresh, self.afresh_weights, self.afresh_log_probs, self.afresh_ranks
        return Own(
            tokens[row][position],
            weights[row][position] if weights else math.nan,
            Likelihood(log_probs[row][position], ranks[row][position]) if ranks else None,
        )


class Scored(NamedTuple):
    """A model's raw logits and what becomes of them, each [rows, c + 1, ...]."""

    logits: Logits
    target: torch.Tensor
    """Scores that free rows choose from, before the processors; the base's logits themselves under most rules."""
    faults: torch.Tensor
    """Sums of `FAULTS`, LongTensor[rows, c + 1]."""


def entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropies of distributions, [..., V] -> [...], in nats."""
    return -torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * log_probs).sum(dim=-1)


def on_host(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Integers and float32 numbers of one shape as lists; all travel as one tensor of integers."""
    packed = torch.stack(
        [(part.view(torch.int32) if part.is_floating_point() else part).long() for part in parts.values()]
    ).cpu()
    return {
        name: (numbers.int().view(torch.float32) if part.is_floating_point() else numbers).tolist()
        for (name, part), numbers in zip(parts.items(), packed, strict=True)
    }
