"""Output of reward-guided decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...engine.strategy import StrategyOutput


class JudgedStep(NamedTuple):
    """A step of a response."""

    end: int
    """Response tokens up to its end."""
    reward: float
    """Of the step that the pilot wrote, accepted or not; NaN where it could write none."""
    accepted: bool
    """True if the pilot's step was kept; else the base wrote this one."""


@dataclass
class RewardGuidedOutput(StrategyOutput):
    """`StrategyOutput`, plus the steps of each response.

    Attributes:
        steps: of each row, in their order.
    """

    steps: list[list[JudgedStep]] = None  # type: ignore[assignment]
