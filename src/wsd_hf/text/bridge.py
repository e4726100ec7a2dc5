"""From the pilot's tokens to the base's, and back."""

from __future__ import annotations

from typing import NamedTuple

from ..draft import SwitchReason


class Offer(NamedTuple):
    """How a draft goes on."""

    tokens: list[int]
    """Tokens of the base, never to be withdrawn."""
    over: SwitchReason | None
    """Why no more will come behind these; None: the pilot may go on."""


class OneVocabulary:
    """Base and pilot have the same tokens.

    Args:
        end_token_ids: end a draft instead of entering it.
        limits: most tokens that the pilot may draft in each row.
    """

    def __init__(self, end_token_ids: set[int], limits: list[int]) -> None:
        self._end_token_ids = end_token_ids
        self._left = list(limits)

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """What a drafting row gets of the pilot's next tokens."""
        left = self._left[row]
        ending = next((place for place, token in enumerate(proposed) if token in self._end_token_ids), len(proposed))
        tokens = proposed[: min(ending, left)]
        self._left[row] -= len(tokens)
        if ending < min(len(proposed), left):
            return Offer(tokens, "draft_ended")
        return Offer(tokens, None if self._left[row] else "draft_limit")
