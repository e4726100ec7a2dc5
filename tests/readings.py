"""Readings made by hand, for tests of measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wsd_hf.diagnosis.reading import Reading


def reading(
    probabilities: Sequence[float],
    tokens: Sequence[int] = (),
    best: Sequence[float] = (),
    entropies: Sequence[float] = (),
    **fields: Any,
) -> Reading:
    """A draft of a base that gives its tokens these probabilities; tokens that are not given are all different."""
    count = len(probabilities)
    tokens = [*tokens] or [*range(1000, 1000 + count)]
    return Reading(
        **{
            "prompt": 0,
            "writer": "pilot",
            "tokens": tokens,
            "texts": [f" {token}" for token in tokens],
            "log_probs": [math.log(p) if p else -math.inf for p in probabilities],
            "best_log_probs": [*map(math.log, best or [p or 0.5 for p in probabilities])],
            "entropies": [*entropies] or [1.0] * count,
            "base_prompt": [1, 2, 3],
            "ended": True,
            "forwards": count,
            "seconds": count / 10,
            **fields,
        }
    )
