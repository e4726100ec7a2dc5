"""Statistics of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np


def interval(values: Sequence[float], groups: Sequence[int] | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean; whole groups are drawn."""
    of: dict[int, list[float]] = {}
    for group, value in zip(groups or range(len(values)), values, strict=True):
        of.setdefault(group, []).append(value)
    sums, counts = np.array([sum(v) for v in of.values()]), np.array([len(v) for v in of.values()])
    draws = np.random.default_rng(0).integers(len(of), size=(2000, len(of)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def repeated_ngrams(tokens: Sequence[Any], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same text; 0 without any."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_ngrams(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams of words over all n-grams of some texts."""
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def pairwise_similarity(texts: Sequence[str]) -> float:
    """Mean similarity of two of some texts."""

    def alike(one: str, other: str) -> float:
        a, b = Counter(one.split()), Counter(other.split())
        return 2 * (a & b).total() / max(1, (a + b).total())

    return fmean(alike(one, other) for one, other in combinations(texts, 2))
