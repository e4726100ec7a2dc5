"""Everything that one call is drafted and checked with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from transformers import PreTrainedModel

from ..engine.pilot_side import PilotSide
from ..engine.small_model import Prompt
from ..text.bridge import Bridge
from .rule import Rule

AnyRule = TypeVar("AnyRule", bound=Rule, covariant=True)


class ReferenceSide(NamedTuple):
    """The reference model's side of one call."""

    model: PreTrainedModel
    prompt: Prompt


@dataclass(frozen=True)
class Setup(Generic[AnyRule]):
    """The models' sides of one call, and its rule.

    Attributes:
        side: of the pilot.
        bridge: from the pilot's tokens to the base's.
        rule: state of the call.
        longest: most tokens that any row may draft.
        reference: that of the reference model, for rules that read it.
    """

    side: PilotSide
    bridge: Bridge
    rule: AnyRule
    longest: int
    reference: ReferenceSide | None = None
