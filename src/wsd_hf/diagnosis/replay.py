"""One row of a call, replayed along a path: the plans of its pace, and the forwards that follow from them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..speculation.config import SpeculativeConfig
from ..speculation.ngrams import NGrams
from ..speculation.pace import CPU, PROPOSING, Pace, Price
from ..speculation.sureness import Sureness
from .paths import Path


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices of a pair's forwards; a reference costs what the pilot costs.

    Attributes:
        base, pilot: by number of tokens, as the pace has them.
        base_alone: of the base in plain `generate`, which captures no CUDA graphs.
        base_seconds, pilot_seconds: measured, of a forward over one token: of the base alone, and of the pilot as it drafts.
        one_vocabulary: whether tokens mean the same to both.
    """

    base: Price
    pilot: Price
    base_alone: Price
    base_seconds: float
    pilot_seconds: float
    one_vocabulary: bool


class Replay:
    """A row that writes the tokens of a path; no model runs.

    Args:
        path: the text.
        prompt: token ids that the base read before it.
        costs: of the pair.
        settings: of the strategy.
        limit: most tokens of a response.
        reads_pilot: whether the strategy needs the pilot's logits at every token of a free row.
        reads_reference: whether it needs the reference's.

    Attributes:
        at: number of tokens written.
        by_pilot: those of them that the pilot wrote.
        base_forwards, pilot_forwards, reference_forwards: so far.
        seconds: that these take.
    """

    def __init__(
        self,
        path: Path,
        prompt: Sequence[int],
        costs: Costs,
        settings: SpeculativeConfig,
        limit: int,
        reads_pilot: bool = False,
        reads_reference: bool = False,
    ) -> None:
        self.path, self.at, self.by_pilot = path, 0, 0
        self.base_forwards = self.pilot_forwards = self.reference_forwards = 0
        self.seconds = 0.0
        stops = settings.chunk is None and costs.one_vocabulary and costs.pilot.rates == CPU
        prices = [costs.base, costs.pilot, *([costs.pilot] if reads_reference else [])]
        self._sureness = Sureness() if stops else None
        by_pilot, by_ngrams = settings.speculate in ("auto", "pilot"), settings.speculate in ("auto", "ngram")
        self._pace = Pace(prices, settings.chunk, by_pilot, reads_pilot, self._sureness)
        self._ngrams = NGrams(prompt) if by_ngrams else None
        self._costs, self._limit, self._reads_pilot, self._reads_reference = costs, limit, reads_pilot, reads_reference

    @property
    def ended(self) -> bool:
        """True when the whole path is written."""
        return self.at >= len(self.path.tokens)

    @property
    def place(self) -> int:
        """Number of the pilot's tokens that are complete."""
        return bisect_right(self.path.pilot_reach, self.at)

    def run_base(self, tokens: int = 1) -> None:
        """A forward of the base, and of the reference."""
        self.base_forwards += 1
        self.seconds += self._costs.base_seconds * self._costs.base(tokens) / self._costs.base_alone(1)
        if self._reads_reference:
            self.reference_forwards += 1
            self.seconds += self._costs.pilot_seconds * self._costs.pilot(tokens) / self._costs.pilot(1)

    def run_pilot(self, forwards: int = 1, tokens: int = 1) -> None:
        """Forwards of the pilot."""
        self.pilot_forwards += forwards
        self.seconds += forwards * self._costs.pilot_seconds * self._costs.pilot(tokens) / self._costs.pilot(1)

    def draft(self, end: int, by_pilot: bool = False, one_by_one: bool = False) -> None:
        """A draft up to a place, and the tokens that its last check gives a row which is free from there on.

        Args:
            end: number of tokens of the path.
            by_pilot: whether the pilot ends the draft there by a token of its own.
            one_by_one: whether free rows write one token in a step.
        """
        chunk = self._pace.plan(1, {}).chunk
        begin, needed = self.place, bisect_left(self.path.pilot_reach, end) + 1 + by_pilot
        steps = max(1, math.ceil((needed - begin) / chunk))
        for _ in range(steps):
            self._check(chunk, chunk + self._reads_pilot)
        self.by_pilot += end - self.at
        self.at = end
        self._write(0 if by_pilot or one_by_one else self._kept(begin + steps * chunk))

    def step(self) -> None:
        """A step of a free row: proposals of the pilot or the n-grams, and their check."""
        plan = self._pace.plan(0, {0: self._guessed()})
        if plan.ngrams:
            self._step_by_ngrams(plan.chunk)
        elif plan.by_pilot:
            self._step_by_pilot(plan.chunk)
        else:
            self.step_alone()
            self._pace.judged([(0, 0)])

    def step_alone(self) -> None:
        """A token without proposals."""
        if self._reads_pilot:
            self.run_pilot()
        self.run_base()
        self._write(0)

    def _guessed(self) -> Sequence[float]:
        if self._ngrams is None:
            return [0.0] * (self._pace.most + 1)
        self._ngrams.read(self.path.tokens[: self.at])
        return self._ngrams.kept(self._pace.most)

    def _step_by_ngrams(self, chunk: int) -> None:
        assert self._ngrams is not None
        self._check(chunk, int(self._reads_pilot), chunk + 1)
        following = zip(self._ngrams.guess(chunk), self.path.tokens[self.at :], self.path.followed[self.at :], strict=False)
        self._write(sum(1 for _ in takewhile(lambda one: one[0] == one[1] and one[2], following)))
        self._pace.judged([])

    def _step_by_pilot(self, chunk: int) -> None:
        sure = self._sure(chunk)
        chunk = len(sure) if self._sureness else chunk
        self._check(chunk, chunk + self._reads_pilot)
        end = min(self.place + chunk, len(self.path.pilot_reach))
        proposed = math.ceil(self.path.pilot_reach[end - 1]) - self.at if end else 0
        kept = self._kept(end)
        self._write(kept)
        self._pace.judged([(kept, max(kept, proposed))], sure)

    def _check(self, chunk: int, pilot_forwards: int, pilot_tokens: int = 1) -> None:
        """The forwards of a step with proposals."""
        before = self.seconds
        self.run_pilot(pilot_forwards, pilot_tokens)
        self.run_base(chunk + 1)
        self.seconds = before + PROPOSING * (self.seconds - before)

    def _sure(self, chunk: int) -> list[float]:
        """The pilot's probabilities of its proposals, until it stops; after a wrong one it is taken to be as sure as here."""
        sure: list[float] = []
        if self._sureness is None:
            return sure
        following = self.path.pilot_certainties[self.place :]
        chunk = min(chunk, max(1, self._limit - self.at - 1))
        while len(sure) < chunk and (not sure or self._sureness.goes_on(sure)):
            sure.append(following[min(len(sure), len(following) - 1)])
        return sure

    def _kept(self, end: int) -> int:
        """Number of the base's tokens that are kept of the pilot's proposals up to its token `end`."""
        reach, begin = self.path.pilot_reach, self.place
        if begin and reach[begin - 1] != self.at:  # the pilot reads its last token in parts, and its guess is another
            return 0
        right = sum(takewhile(bool, self.path.pilot_followed[begin:end]))
        reached = int(reach[begin + right - 1]) if right else self.at
        return sum(takewhile(bool, self.path.followed[self.at : reached]))

    def _write(self, kept: int) -> None:
        """Writes what was kept, and the token after it."""
        self.at = min(self.at + kept + 1, len(self.path.tokens))
