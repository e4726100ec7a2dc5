"""How many tokens to propose at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

LONGEST = 16
"""Most tokens proposed at a time."""

OPENING = 6
"""Tokens in each chunk of a draft; at most one less is thrown away where the base takes over."""


class Stopwatch:
    """Mean seconds per unit of work; the first measurement, which holds a prefill, is left out."""

    def __init__(self) -> None:
        self._seconds, self._units, self._started = 0.0, 0, False

    @contextmanager
    def time(self, units: int) -> Iterator[None]:
        """Measures a block of work."""
        start = perf_counter()
        yield
        if self._started:
            self._seconds += perf_counter() - start
            self._units += units
        self._started = True

    @property
    def mean(self) -> float | None:
        """None before anything was measured."""
        return self._seconds / self._units if self._units else None


class Pace:
    """The length of the next chunk, from what this call has measured so far.

    With agreement a and the cost r of a pilot step in units of a base forward, a free row gains
    (1 - a^(c+1)) / (1 - a) tokens for 1 + c·r (arXiv 2211.17192, theorem 3.8). While drafting every token is kept.

    Args:
        fixed: always propose this many; None: adapt.
        speculate: whether to propose after the switch too.
    """

    def __init__(self, fixed: int | None, speculate: bool) -> None:
        self.pilot = Stopwatch()
        self.base = Stopwatch()
        self._fixed = fixed
        self._speculate = speculate
        self._kept, self._judged = 3.2, 4.0

    def chunk(self, drafting: bool) -> int:
        """How many tokens to propose now; 0 where it does not pay.

        Args:
            drafting: whether some row still drafts.
        """
        if not drafting and not self._speculate:
            return 0
        if self._fixed is not None:
            return self._fixed
        return OPENING if drafting else max(range(LONGEST + 1), key=self._tokens_per_cost)

    def judged(self, kept: int, proposed: int) -> None:
        """Counts a free row's proposals up to the first that was not kept; what is recent weighs more."""
        self._kept = 0.95 * self._kept + kept
        self._judged = 0.95 * self._judged + min(kept + 1, proposed)

    def _tokens_per_cost(self, chunk: int) -> float:
        agreement = min(self._kept / self._judged, 0.99)
        pilot, base = self.pilot.mean, self.base.mean
        ratio = 0.2 if pilot is None or base is None else pilot / base
        return (1 - agreement ** (chunk + 1)) / (1 - agreement) / (1 + chunk * ratio)
