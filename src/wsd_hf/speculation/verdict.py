"""Everything of one step that the decision is made from: on the device, and on the host."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .rule import Logits

FAULTS = {"pilot": 1, "base": 2, "reference": 4, "target": 8}
"""Bit of each model in a sum that names those whose logits are not finite."""


class Verdict(NamedTuple):
    """One step on the host: for each live row, c proposals and the position after them, in lists of c + 1."""

    proposed: dict[int, list[int]]
    """Token ids; `FREE` at the end."""
    faults: dict[int, list[int]]
    """Sums of `FAULTS`."""
    own: dict[int, list[int]]
    """Token ids: the target's own, if all positions can be chosen for at once."""
    own_by_pilot: Mapping[int, list[float]] = MappingProxyType({})
    """Weights of `own`; only for rules that weigh what is written."""
    afresh: Mapping[int, list[int]] = MappingProxyType({})
    """Token ids: the target's own, drawn without regard to the proposal; only where some row drafts."""
    afresh_by_pilot: Mapping[int, list[float]] = MappingProxyType({})
    log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's log-probabilities of the proposals, of float32 precision; only where some row drafts."""
    ranks: Mapping[int, list[int]] = MappingProxyType({})
    """Ranks of the proposals in the base's distributions; only where some row drafts, for a streamer that takes them."""
    best_log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's highest log-probabilities; only for rules that read distributions."""
    entropies: Mapping[int, list[float]] = MappingProxyType({})
    """Entropies of the base's distributions, in nats; only for rules that read distributions."""


class Scored(NamedTuple):
    """A model's raw logits and what becomes of them, each [rows, c + 1, ...]."""

    logits: Logits
    target: torch.Tensor
    """Scores that free rows choose from, before the processors; the base's logits themselves under most rules."""
    faults: torch.Tensor
    """Sums of `FAULTS`, LongTensor[rows, c + 1]."""


class Own(NamedTuple):
    """A token that a free row writes."""

    token: int
    weight: float
    """NaN unless the rule weighs what is written."""


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
