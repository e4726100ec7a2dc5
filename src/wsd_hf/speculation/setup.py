"""Everything that one call is drafted and checked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..engine.pilot_side import PilotSide
from ..text.bridge import Bridge
from .rule import Rule

AnyRule = TypeVar("AnyRule", bound=Rule, covariant=True)


@dataclass(frozen=True)
class Setup(Generic[AnyRule]):
    """The models' sides of one call, and its rule.

    Attributes:
        side: of the pilot.
        bridge: from the pilot's tokens to the base's.
        rule: state of the call.
        longest: most tokens that any row may draft.
    """

    side: PilotSide
    bridge: Bridge
    rule: AnyRule
    longest: int
