"""A base and a pilot of a few megabytes, trained on a made-up world, for demos and tests that need no download.

They were trained on that world only. `questions.json` holds questions about it, `preferences.jsonl` others with a good and a
bad answer, and `judge.py` judges the answers.
`examples/tiny_world/` has the training and the measurements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
"""Folder of the models `base`, `pilot` and `pilot_other_vocab`; `Pair.tiny` loads them."""


def demo_questions() -> list[dict[str, Any]]:
    """Held-out questions: `messages`, `kind` ("fact" or "harmful") and, for a fact, the right `answer`."""
    questions: list[dict[str, Any]] = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    return questions


def polite_examples() -> list[dict[str, str]]:
    """Three polite exchanges of the world, as `examples` of `urial_messages`; the models were trained on such."""
    examples: list[dict[str, str]] = json.loads((FOLDER / "polite_examples.json").read_text(encoding="utf-8"))
    return examples
