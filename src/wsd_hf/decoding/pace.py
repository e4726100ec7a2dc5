"""How many tokens to propose at a time."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 16


@dataclass
class Pace:
    """The length of the next chunk, from what this call has measured so far.

    With agreement a and the cost r of one pilot step, in units of a base forward, a free row gains
    (1 - a^(c+1)) / (1 - a) tokens for 1 + c·r (arXiv 2211.17192, theorem 3.8). While drafting every token is kept.

    Args:
        first: chunk that opens the draft.
        fixed: always propose this many; None: adapt.
        speculate: propose after the switch too.
    """

    first: int
    fixed: int | None = None
    speculate: bool = True
    kept: float = 4.0
    proposed: float = 5.0
    pilot_seconds: float = 0.0
    pilot_steps: int = 0
    base_seconds: float = 0.0
    base_forwards: int = 0

    def drafting(self, drafted: int) -> int:
        """Chunk while some row still drafts."""
        if self.fixed is not None:
            return self.fixed
        return self.first if drafted == 0 else max(2, min(LONGEST // 2, self.first))

    def speculating(self) -> int:
        """Chunk when every row is free; 0 where proposing does not pay."""
        if not self.speculate:
            return 0
        if self.fixed is not None:
            return self.fixed
        return max(range(LONGEST + 1), key=self._tokens_per_cost)

    def _tokens_per_cost(self, chunk: int) -> float:
        agreement = min(self.kept / self.proposed, 0.99)
        return (1 - agreement ** (chunk + 1)) / (1 - agreement) / (1 + chunk * self._cost_ratio())

    def _cost_ratio(self) -> float:
        if not (self.pilot_steps and self.base_forwards and self.base_seconds):
            return 0.2
        return (self.pilot_seconds / self.pilot_steps) / (self.base_seconds / self.base_forwards)

    def judged(self, kept: int, proposed: int) -> None:
        """Counts proposals to free rows up to and including the first that was not kept; recent ones weigh more."""
        self.kept = 0.9 * self.kept + kept
        self.proposed = 0.9 * self.proposed + proposed
