"""Judges for `wsd-hf compare --judge`, run in this folder."""

from __future__ import annotations

import re
from typing import Any


def right(record: dict[str, Any], response: str) -> float:
    """1 if a response holds what the pattern "check" of its prompt's record looks for, else 0.

    >>> right({"prompt": "What is the capital of France?", "check": "Paris"}, "It is Paris.")
    1.0
    """
    return float(re.search(record["check"], response) is not None)
