"""The switch at other settings, found in a draft that was recorded: no forward of any model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..strategies.wsd.switch import confidence, switch_index
from .answers import Answer, Turn


@dataclass(frozen=True)
class Recording:
    """The drafted part of an answer.

    Attributes:
        answer: whose draft it is.
        log_probs: the base's, of the drafted tokens.
        whole: whether the pilot wrote on to its end, so that no setting can find a switch after it.
    """

    answer: Answer
    log_probs: list[float]
    whole: bool

    def switch(self, threshold: float, window_size: int) -> int | None:
        """The switch index at some settings; None if the base takes over nowhere within this draft."""
        return switch_index(self.log_probs, threshold, window_size)

    def confidences(self, window_size: int) -> list[float]:
        """Confidence at each drafted token, NaN before the first full window."""
        curve: list[float] = confidence(self.log_probs, window_size).tolist()
        return curve


def recording(turn: Turn) -> Recording:
    """The longest draft of a turn: the pilot's alone, of which the other is the beginning if both are greedy after one chat."""
    alone, answer = turn.answer("pilot"), turn.answer("wsd")
    assert answer is not None
    draft = answer.draft
    if alone and alone.messages == answer.messages and not turn.settings.temperature and len(alone.draft) >= len(draft):
        answer, draft = alone, alone.draft
    return Recording(answer, draft, answer.end is not None and answer.end.switch_index < 0)


def counted(number: int, noun: str = "token") -> str:
    """A number of things in words.

    >>> counted(1), counted(2, "drafted token")
    ('1 token', '2 drafted tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def verdict(found: Recording, threshold: float, window_size: int) -> str:
    """One sentence about the switch at some settings."""
    settings = f"At {threshold:g} over {counted(window_size)}"
    index, drafted = found.switch(threshold, window_size), counted(len(found.log_probs))
    if index is not None:
        return f"{settings} the base takes over after {counted(index)}."
    highest = max((value for value in found.confidences(window_size) if not math.isnan(value)), default=None)
    reached = "" if highest is None else f" Its confidence reached {highest:.2f} at most."
    if not found.answer.over:
        return f"{settings} the base has not taken over yet, after {counted(len(found.log_probs), 'drafted token')}.{reached}"
    if found.whole:
        return f"{settings} the base never takes over: the draft of {drafted} is kept whole.{reached}"
    return f"{settings} the base does not take over within this draft of {drafted}; Retry shows where it would.{reached}"
