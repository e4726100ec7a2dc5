"""The pilot's side of a call that drafts, and the draft."""

from __future__ import annotations

import sys
from typing import NamedTuple

from transformers import StoppingCriteria

from ...engine.call import Call
from ...engine.checks import closing_token_id, eos_token_ids, vocabulary_size
from ...engine.pilot_side import PilotSide, bridge_to_base, pilot_side
from ...errors import WSDValueError
from ...text.bridge import Bridge
from .draft import Draft


class DraftSetup(NamedTuple):
    """Everything that one call drafts with."""

    side: PilotSide
    longest: int
    """Most tokens that any row may draft."""
    draft: Draft
    bridge: Bridge
    """From the pilot's tokens to the base's, and back."""


def draft_setup(
    call: Call, switch_criteria: StoppingCriteria, max_draft_tokens: int, closes: bool, do_sample: bool | None
) -> DraftSetup:
    """The setup of a call, checked; runs no forward. `closes`: an unconfirmed draft ends the response."""
    side = pilot_side(call, do_sample)
    limits = side.room.clamp(max=min(max_draft_tokens, sys.maxsize))
    closing = closing_token_id(eos_token_ids(call.generation_config), vocabulary_size(call.base))
    if closes and closing is None:
        raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id to a token that it has")
    draft = Draft(switch_criteria, len(call.input_ids), vocabulary_size(call.base), closing if closes else None)
    return DraftSetup(side, int(limits.max()), draft, bridge_to_base(call, side, limits.tolist()))
