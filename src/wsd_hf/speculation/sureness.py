"""When the pilot stops proposing: where it is unsure."""

from __future__ import annotations

import math
from collections.abc import Sequence

SURE = 0.3
"""Least chance that all proposals so far are kept at which another one is added."""

PARTS = 5
"""Parts of the probabilities from 0 to 1 that are counted apart."""


class Sureness:
    """The chance that a token of the pilot is kept, by the probability that the pilot gave it.

    A probability is taken as that chance until tokens of about this probability have been judged in this call. Whether another
    token is proposed depends only on tokens that are proposed in any case, so the rejection rule stays exact.
    """

    def __init__(self) -> None:
        self._kept, self._judged = [0] * PARTS, [0] * PARTS

    @property
    def known(self) -> bool:
        """Whether any token has been judged; before, no probability is trusted."""
        return any(self._judged)

    def goes_on(self, probabilities: Sequence[float]) -> bool:
        """Whether proposals of such probabilities are likely enough to be kept that another is worth its price."""
        return not self.known or math.prod(map(self._chance, probabilities)) >= SURE

    def judged(self, probabilities: Sequence[float], kept: int) -> None:
        """Counts proposals up to the first that was rejected."""
        for place, probability in enumerate(probabilities[: kept + 1]):
            self._kept[_part(probability)] += place < kept
            self._judged[_part(probability)] += 1

    def _chance(self, probability: float) -> float:
        part = _part(probability)
        return (self._kept[part] + probability) / (self._judged[part] + 1)


def _part(probability: float) -> int:
    return min(int(PARTS * probability), PARTS - 1)
