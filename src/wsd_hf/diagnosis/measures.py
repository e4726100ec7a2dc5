"""Measures of readings: the base's probabilities by position, its confidence, and the places where a rule fires."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, median, stdev
from typing import NamedTuple

from ..strategies.wsd.switch import confidence
from ..strategies.wsd.switch_rules import REPEATED, SWITCH_RULES, SwitchRule
from .reading import Reading
from .switches import repeats, switch_index

BANDS = ((1, 1), (2, 4), *((2**power + 1, 2 ** (power + 1)) for power in range(2, 12)))
"""First and last position of the bands that probabilities are averaged over; counted from 1."""

BEFORE, AFTER = 12, 8
"""Tokens that are shown before the window of a switch, and after it."""


class Band(NamedTuple):
    """The base's probabilities of the tokens at some positions of all texts.

    `error` is the standard error of the mean, 0 for a single token.
    """

    first: int
    last: int
    tokens: int
    probability: float
    error: float


def by_position(readings: Sequence[Reading], with_repeats: bool = True) -> list[Band]:
    """The base's mean probability of a token, by the token's position.

    Args:
        readings: the texts.
        with_repeats: False leaves out tokens that complete a 4-gram which occurred earlier in the same text.
    """
    places: dict[int, list[float]] = {}
    for reading in readings:
        repeated = repeated_places(reading)
        for place, log_prob in enumerate(reading.log_probs, start=1):
            if with_repeats or place not in repeated:
                places.setdefault(place, []).append(math.exp(log_prob))
    bands = []
    for first, last in BANDS:
        found = [probability for place in range(first, last + 1) for probability in places.get(place, [])]
        if found:
            error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
            bands.append(Band(first, last, len(found), fmean(found), error))
    return bands


def repeated_places(reading: Reading) -> set[int]:
    """Positions, from 1, of the tokens that complete a 4-gram which occurred earlier in the same text."""
    seen, found = set[tuple[int, ...]](), set[int]()
    for end in range(REPEATED, len(reading.tokens) + 1):
        ngram = tuple(reading.tokens[end - REPEATED : end])
        if ngram in seen:
            found.add(end)
        seen.add(ngram)
    return found


def first_choice_share(readings: Sequence[Reading]) -> float | None:
    """Share of all tokens that are the base's first choice in their places; None without tokens."""
    pairs = [*chain.from_iterable(zip(reading.log_probs, reading.best_log_probs, strict=True) for reading in readings)]
    return fmean(log_prob == best for log_prob, best in pairs) if pairs else None


def perplexity(readings: Sequence[Reading], first: int = 1, last: int | None = None) -> float | None:
    """The base's perplexity of the tokens at positions `first` to `last` of all texts; None without such tokens."""
    log_probs = [*chain.from_iterable(reading.log_probs[first - 1 : last] for reading in readings)]
    return math.exp(-fmean(log_probs)) if log_probs else None


def confidences(reading: Reading, window_size: int) -> list[float]:
    """The paper's confidence at each token of a text, NaN before the first full window."""
    values: list[float] = confidence(reading.log_probs, window_size).tolist()
    return values


def highest_confidence(reading: Reading, window_size: int) -> float:
    """The highest confidence that a text reaches; 0 for a text shorter than the window."""
    return max((value for value in confidences(reading, window_size) if not math.isnan(value)), default=0.0)


@dataclass(frozen=True)
class Firing:
    """What a switch rule does with some drafts.

    Attributes:
        rule: its name.
        threshold, window_size, ignore_repeats: its settings.
        never: share of the drafts in which it never fires.
        median: median switch index of the others; None if there are none.
        on_repeats: share of the switches whose window was in the draft before, word for word; None without switches.
        kept: tokens that the pilot writes, by all that it drafted.
    """

    rule: str
    threshold: float
    window_size: int
    ignore_repeats: bool
    never: float
    median: float | None
    on_repeats: float | None
    kept: float


def firing(drafts: Sequence[Reading], rule: SwitchRule) -> Firing:
    """See `Firing`; `drafts` holds one or more."""
    indices = [switch_index(draft, rule) for draft in drafts]
    found = [(draft, index) for draft, index in zip(drafts, indices, strict=True) if index is not None]
    drafted = sum(len(draft.tokens) for draft in drafts)
    kept = sum(len(draft.tokens) if index is None else index for draft, index in zip(drafts, indices, strict=True))
    return Firing(
        rule_name(rule),
        rule.threshold,
        rule.window_size,
        rule.ignore_repeats,
        never=1 - len(found) / len(drafts),
        median=median(index for _, index in found) if found else None,
        on_repeats=fmean(repeats(draft, index, rule.window_size) for draft, index in found) if found else None,
        kept=kept / drafted if drafted else 1.0,
    )


def rule_name(rule: SwitchRule) -> str:
    """The name of a rule in `SWITCH_RULES`, or that of its class."""
    return next((name for name, kind in SWITCH_RULES.items() if type(rule) is kind), type(rule).__name__)


@dataclass(frozen=True)
class Place:
    """The text around a switch.

    Attributes:
        prompt: number of the prompt, counted from 0.
        index: the switch index.
        before, window, after: text before the window, in it, and what the pilot wrote after it.
        repeats: whether the window was in the draft before, word for word.
    """

    prompt: int
    index: int
    before: str
    window: str
    after: str
    repeats: bool


def places(drafts: Sequence[Reading], rule: SwitchRule) -> Iterator[Place]:
    """The places where a rule fires, in the order of the prompts."""
    for draft in drafts:
        if (index := switch_index(draft, rule)) is None:
            continue
        begin = max(0, index - rule.window_size)
        before, window, after = (
            "".join(draft.texts[first:last])
            for first, last in ((max(0, begin - BEFORE), begin), (begin, index), (index, index + AFTER))
        )
        yield Place(draft.prompt, index, before, window, after, repeats(draft, index, rule.window_size))
