"""Switches that are read off a draft, without another forward."""

from __future__ import annotations

from ..speculation.rule import Drafted
from ..strategies.wsd.switch_rules import RowSwitch, SwitchRule
from .reading import Reading


def switch_index(reading: Reading, rule: SwitchRule) -> int | None:
    """The paper's k, as `generate` would find it in this draft with this rule; None where the rule never fires."""
    switch = RowSwitch(rule, reading.base_prompt)
    columns = (reading.tokens, reading.log_probs, reading.best_log_probs, reading.entropies)
    return next((place for place, token in enumerate(map(Drafted, *columns), start=1) if switch.ends(token)), None)


def repeats(reading: Reading, end: int, window: int) -> bool:
    """True if the window that ends after `end` tokens was in the draft before, word for word."""
    last = reading.tokens[end - window : end]
    return any(reading.tokens[start : start + window] == last for start in range(end - window))
