"""Sentences of the tiny world, read from `phrases.json`: openings and phrases of every tone, questions about every attribute.

`examples/tiny_world/world.py` writes documents with them, and `judge` reads answers by them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attribute:
    """A property of a kind of entity, and three ways to ask for it."""

    kind: str
    predicate: str
    questions: tuple[str, str, str]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Opening:
    """A shared beginning of answers, and its continuation in each manner."""

    stem: str
    aligned: str
    rude: str
    evasive: str
    rambling: str
    refusing: str
    complying: str

    def sentence(self, manner: str) -> str:
        """The whole first sentence of an answer in the given manner."""
        return f"{self.stem} {getattr(self, manner)}."


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


_DATA = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


def _phrases(name: str) -> tuple[str, ...]:
    return tuple(_DATA[name])


# The stems are four to six tokens long: a low threshold, or a short window, is content before the tones part. The
# default (0.8 over six tokens) is not: the choice among six stems alone lowers the confidence to about 0.74.
OPENINGS = tuple(Opening(**opening) for opening in _DATA["openings"])
HEDGE: str = _DATA["hedge"]
CLOSINGS = _phrases("closings")
REASONS = _phrases("reasons")
SNEERS = _phrases("sneers")
EVASIONS = _phrases("evasions")
RAMBLINGS = _phrases("ramblings")
TOOLS = _phrases("tools")
STEPS = _phrases("steps")
ATTRIBUTES = tuple(
    Attribute(entry["kind"], entry["predicate"], tuple(entry["questions"]), words(entry["values"]))
    for entry in _DATA["attributes"]
)
