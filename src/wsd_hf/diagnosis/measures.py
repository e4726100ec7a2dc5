"""Measures of readings: the base's probabilities by position, its confidence, and the places where a rule fires."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, median
from typing import NamedTuple

from ..strategies.blend import BlendConfig
from ..strategies.wsd.switch import confidence
from ..strategies.wsd.switch_rules import SWITCH_RULES, GrowingText, SwitchRule
from .reading import Reading
from .switches import repeats, switch_index

BANDS = ((1, 1), (2, 4), *((2**power + 1, 2 ** (power + 1)) for power in range(2, 24)))
"""First and last position of the bands that probabilities are averaged over; counted from 1."""

START = 8
"""Tokens that count as the beginning of a text, for perplexity."""

THRESHOLDS, WINDOWS = (0.5, 0.6, 0.7, 0.8, 0.9), (1, 3, 6, 12)
"""Of the grid."""

BEFORE, AFTER = 12, 8
"""Tokens that are shown before the window of a switch, and after it."""


class Band(NamedTuple):
    """The base's mean probability of the tokens at some positions of all texts.

    `error` is the standard error of that mean, with whole texts as samples, whose tokens resemble each other; 0 for one text.
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
        with_repeats: False leaves out `repeated` tokens.
    """
    texts = [
        [math.nan if again and not with_repeats else math.exp(log_prob) for log_prob, again in places]
        for places in (zip(reading.log_probs, repeated(reading), strict=True) for reading in readings)
    ]
    bands = []
    for first, last in BANDS:
        parts = [[value for value in text[first - 1 : last] if not math.isnan(value)] for text in texts]
        if parts := [part for part in parts if part]:
            bands.append(Band(first, last, sum(map(len, parts)), *_mean(parts)))
    return bands


def _mean(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of all numbers and its standard error, with parts as samples: that of a ratio of two sums."""
    count = sum(map(len, parts))
    mean = math.fsum(chain.from_iterable(parts)) / count
    squares = math.fsum((math.fsum(part) - mean * len(part)) ** 2 for part in parts)
    return mean, math.sqrt(squares * len(parts) / (len(parts) - 1)) / count if len(parts) > 1 else 0.0


def repeated(reading: Reading) -> list[bool]:
    """For each token whether it completes a 4-gram that the base's prompt or the text held before, as for `ignore_repeats`."""
    text = GrowingText(reading.base_prompt)
    return [text.repeats(token) for token in reading.tokens]


def of_texts(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Numbers of one writer's texts, of which there is at least one; see `Diagnosis.texts`."""
    tokens = [token for reading in readings for token in reading.drafted]
    again = [one for reading in readings for one in repeated(reading)]
    new = [token.log_prob for token, repeats in zip(tokens, again, strict=True) if not repeats]
    return {
        "texts": len(readings),
        "length": fmean(len(reading.tokens) for reading in readings),
        "ended": fmean(reading.ended for reading in readings),
        "repeated": mean(again),
        "probability": mean([math.exp(token.log_prob) for token in tokens]),
        "probability_without_repeats": mean([math.exp(log_prob) for log_prob in new]),
        "first_choice": mean([token.log_prob == token.best_log_prob for token in tokens]),
        "unsure": mean([math.exp(token.best_log_prob) < BlendConfig.threshold for token in tokens]),
        "perplexity": _perplexity(readings, 0, None),
        "perplexity_start": _perplexity(readings, 0, START),
        "perplexity_rest": _perplexity(readings, START, None),
    }


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return fmean(values) if values else None


def _perplexity(readings: Sequence[Reading], first: int, last: int | None) -> float | None:
    """The base's perplexity of some tokens of each text; infinite where a token has no probability."""
    log_probs = [*chain.from_iterable(reading.log_probs[first:last] for reading in readings)]
    if not log_probs:
        return None
    entropy = -math.fsum(log_probs) / len(log_probs)
    return math.exp(entropy) if math.isfinite(entropy) else math.inf


def confidences(reading: Reading, window_size: int) -> list[float]:
    """The paper's confidence at each token of a text, NaN before the first full window."""
    values: list[float] = confidence(reading.log_probs, window_size).tolist() if reading.tokens else []
    return values


def highest_confidence(reading: Reading, window_size: int) -> float:
    """The highest confidence that a text reaches; 0 for a text shorter than the window."""
    return max((value for value in confidences(reading, window_size) if not math.isnan(value)), default=0.0)


@dataclass(frozen=True)
class Firing:
    """The effect of a switch rule on some drafts.

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
    """The effect of a rule on at least one draft; see `Firing`."""
    indices = [switch_index(draft, rule) for draft in drafts]
    found = [(draft, index) for draft, index in zip(drafts, indices, strict=True) if index is not None]
    drafted = sum(len(draft.tokens) for draft in drafts)
    kept = sum(len(draft.tokens) if index is None else index for draft, index in zip(drafts, indices, strict=True))
    return Firing(
        rule_name(rule),
        rule.threshold,
        rule.window_size,
        rule.ignore_repeats,
        never=(len(drafts) - len(found)) / len(drafts),
        median=float(median(index for _, index in found)) if found else None,
        on_repeats=mean([repeats(draft, index, rule.window_size) for draft, index in found]),
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
