"""Settings of the switch that are worth a comparison, since they do different things."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .diagnosis import Diagnosis
from .measures import Firing

MARKS = {"early": 1 / 6, "middle": 1 / 2, "late": 5 / 6}
"""Places in the range of the pilot's shares that the grid allows."""


@dataclass(frozen=True)
class Suggestion:
    """A setting of WSD.

    Attributes:
        name: "early", "middle" or "late" for the base's turn, or "rule" for another switch rule.
        variant: as `wsd-hf compare --strategies` takes it.
        firing: what it does with the drafts.
    """

    name: str
    variant: str
    firing: Firing


def suggest(diagnosis: Diagnosis) -> list[Suggestion]:
    """Cells of the grid in which the base takes over early, in the middle and late, and another rule; none is the best.

    Cells are compared by the share of the drafts that is kept. Those that switch in fewer than half of the drafts are left out
    unless all are. A cell that does the same as one before is left out, too. The other rule is the one whose share is nearest
    to that of the middle, so that the two differ in their places and not in the pilot's share.
    """
    grid = _fire_mostly(diagnosis.grid())
    lowest, highest = min(cell.kept for cell in grid), max(cell.kept for cell in grid)
    found: dict[str, Firing] = {}
    for name, mark in MARKS.items():
        cell = _nearest(grid, lowest + mark * (highest - lowest))
        if all(_effect(cell) != _effect(other) for other in found.values()):
            found[name] = cell
    middle = found.get("middle", found["early"])
    rules = _fire_mostly([rule for rule in diagnosis.rules() if rule.rule != middle.rule and not rule.ignore_repeats])
    found["rule"] = _nearest(rules, middle.kept)
    return [Suggestion(name, _variant(cell), cell) for name, cell in found.items()]


def compare_command(suggestions: Sequence[Suggestion], options: Mapping[str, str | int | None]) -> str:
    """A `wsd-hf compare` of base, pilot and the suggestions, quoted for a shell; options without a value are left out.

    >>> compare_command([], {"--base": None, "--prompts": "my prompts.jsonl", "--out": "out"})
    "wsd-hf compare --prompts 'my prompts.jsonl' --out out --strategies base,pilot"
    """
    given = [[name, str(value)] for name, value in options.items() if value is not None]
    strategies = ",".join(["base", "pilot", *(suggestion.variant for suggestion in suggestions)])
    return shlex.join(["wsd-hf", "compare", *(word for option in given for word in option), "--strategies", strategies])


def _fire_mostly(cells: Sequence[Firing]) -> Sequence[Firing]:
    return [cell for cell in cells if cell.never <= 0.5] or cells


def _nearest(cells: Sequence[Firing], kept: float) -> Firing:
    return min(cells, key=lambda cell: abs(cell.kept - kept))


def _effect(cell: Firing) -> tuple[float | None, ...]:
    return cell.kept, cell.never, cell.median


def _variant(cell: Firing) -> str:
    rule = "" if cell.rule == "confidence" else f",switch_criteria={cell.rule}"
    return f"wsd:threshold={cell.threshold},window_size={cell.window_size}{rule}"
