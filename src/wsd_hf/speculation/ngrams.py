"""The n-grams of a row's own text, which propose tokens without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, takewhile
from operator import mul

SIZES = (3, 2, 1)
"""Lengths of the endings that are looked up, the longest first."""

COMPARED = 16
"""Most tokens of a match that are compared and counted."""

EVEN_ODDS = 12.0
"""Square of the length of a match after which a guess is right every other time, before any guess was seen."""

LEARNING = 0.1
"""Share of an unexpected outcome by which the logarithm of the odds moves."""


class NGrams:
    """A guess of the next tokens: those that followed the end of the text where it occurred before.

    The longest of its last three n-grams that occurred before is looked up, and the latest place of it taken; a guess that was
    right goes on at its place (prompt lookup decoding). After a match of n tokens the odds of a right guess are n² to a number
    that is learnt from the tokens written, whether they were proposed or not (logistic regression, one token at a time).

    Indexing takes a fixed time for each token, and begins when a response is first read.

    Args:
        prompt: token ids.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # the latest token after each n-gram, as an index of the text
        self._place = self._matched = 0
        self._even_odds = EVEN_ODDS

    def read(self, response: list[int]) -> None:
        """Takes up those tokens of the response that have been written since."""
        if self._text:
            for token in response[len(self._text) - len(self._prompt) :]:
                self._append(token)
        else:
            self._text = [*self._prompt, *response]
            for size in SIZES:
                grams = zip(*(self._text[start:] for start in range(size)), strict=False)
                self._places.update(zip(grams, range(size, len(self._text)), strict=False))
            self._look_up()

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens, or none. A text that repeats itself up to its end is continued in the same way."""
        period = len(self._text) - self._place
        return [self._text[self._place + index % period] for index in range(count)] if self._matched else []

    def kept(self, most: int) -> list[float]:
        """Expected number of tokens kept of the first 0, 1, ..., `most` that are guessed."""
        if not self._matched:
            return [0.0] * (most + 1)
        right = (self._probability(self._matched + before) for before in range(most))
        return list(accumulate(accumulate(right, mul), initial=0.0))

    def _probability(self, matched: int) -> float:
        """Probability of a right guess after a match of so many tokens."""
        square = min(matched, COMPARED) ** 2
        return square / (square + self._even_odds)

    def _append(self, token: int) -> None:
        text, right = self._text, False
        if self._matched:
            right = text[self._place] == token
            self._even_odds *= math.exp(LEARNING * (self._probability(self._matched) - right))
        for size in SIZES:
            if size <= len(text):
                self._places[tuple(text[-size:])] = len(text)
        text.append(token)
        if right:
            self._place, self._matched = self._place + 1, self._matched + 1
        else:
            self._look_up()

    def _look_up(self) -> None:
        """Finds the latest place of the longest n-gram at the end, and counts the tokens before it that match as well."""
        text = self._text
        for size in SIZES:
            place = self._places.get(tuple(text[-size:]))
            if place is not None:
                alike = (text[place - back] == text[-back] for back in range(1, min(place, COMPARED) + 1))
                self._place, self._matched = place, sum(takewhile(bool, alike))
                return
        self._matched = 0
