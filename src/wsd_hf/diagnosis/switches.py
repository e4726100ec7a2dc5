"""Switches that are read off a draft, without another forward."""

from __future__ import annotations

from ..strategies.wsd.switch_rules import RowSwitch, SwitchRule
from .reading import Reading


def switch_index(reading: Reading, rule: SwitchRule) -> int | None:
    """The paper's k, as `generate` finds it in this draft with this rule; None if the rule never fires."""
    switch = RowSwitch(rule, reading.base_prompt)
    return next((length for length, drafted in enumerate(reading.drafted, start=1) if switch.ends(drafted)), None)


def repeats(reading: Reading, end: int, window: int) -> bool:
    """True if the window that ends after `end` tokens was in the text before, word for word."""
    last = reading.tokens[end - window : end]
    return any(reading.tokens[start : start + window] == last for start in range(end - window))
