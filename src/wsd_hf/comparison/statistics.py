"""Statistics of answers: intervals of means, repetition within an answer, diversity between answers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from statistics import fmean

import torch

from ..errors import WSDValueError

RESAMPLES = 2000


def interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Confidence interval of a mean at 95 %, from a percentile bootstrap: the same in every run.

    Values of one group, such as the answers to one prompt, resemble each other: a resample takes groups whole, as many as there
    are, with replacement. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. The interval is
    too narrow for few groups, and of no width for one.

    Args:
        values: at least one.
        groups: of each value; without them, every value is a group of its own.

    Returns:
        Both ends of the interval, in the unit of the values.

    Raises:
        WSDValueError: there are no values, or not as many groups.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    >>> low, high = interval([0.0, 1.0] * 50)
    >>> 0.39 <= low < 0.5 < high <= 0.61
    True
    >>> interval([0.0, 1.0] * 50, groups=[prompt for prompt in range(50) for _ in range(2)])
    (0.5, 0.5)
    """
    groups = range(len(values)) if groups is None else groups
    if not values or len(groups) != len(values):
        raise WSDValueError(
            f"{len(values)} values and {len(groups)} groups: an interval takes a value or more, and a group of each"
        )
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of = torch.tensor([numbers[group] for group in groups])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, of, torch.tensor(values, dtype=torch.float64))
    sizes = torch.bincount(of)
    drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before, in [0, 1]; 0 for a text without any.

    Source: "seq-rep-n" of Welleck et al., arXiv 1908.04319.

    >>> repeated_ngrams("to be or not to be".split(), n=2)
    0.2
    >>> repeated_ngrams([7] * 8), repeated_ngrams([7, 7])
    (0.8, 0.0)
    """
    found = _ngrams(tokens, n)
    return (len(found) - len(set(found))) / len(found) if found else 0.0


def distinct_ngrams(texts: Iterable[str], n: int = 2) -> float:
    """Share of distinct n-grams of words among all of some texts, in [0, 1]: diversity; 0 for texts without any.

    Words lie between white space; no n-gram goes from one text to the next. Source: "distinct-n" of Li et al., arXiv
    1510.03055.

    >>> distinct_ngrams(["a red fox", "a red hen"])
    0.75
    """
    found = [ngram for text in texts for ngram in _ngrams(text.split(), n)]
    return len(set(found)) / len(found) if found else 0.0


def pairwise_similarity(texts: Sequence[str]) -> float:
    """Mean similarity of two of some texts, in [0, 1], over all pairs: the Jaccard index of their sets of words.

    That index is the number of words that are in both, by the number of words that are in one or both; 1 for two empty texts.
    Words lie between white space. Source: Jaccard, The distribution of the flora in the alpine zone (1912).

    Raises:
        WSDValueError: there are fewer than two texts.

    >>> pairwise_similarity(["a red fox", "a red hen"])
    0.5
    """
    if len(texts) < 2:
        raise WSDValueError(f"{len(texts)} texts: a similarity takes two or more")
    pairs = combinations([set(text.split()) for text in texts], 2)
    return fmean(len(one & other) / len(one | other) if one | other else 1.0 for one, other in pairs)


def _ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
