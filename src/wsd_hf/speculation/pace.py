"""The proposers of the next step, and the length of its chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from .sureness import Sureness

CHUNKS = (0, 1, 3, 7, 11, 15)
"""Lengths of chunks; few, because each is captured as a CUDA graph of its own.

A check has one position more: multiples of four, for which matrix kernels are made (on a CPU, 7 can cost twice as much as 8).
"""

WITHOUT_PILOT = (7, 15)
"""Those of them that n-grams alone propose; shorter ones pay nowhere more, since only the check has a price."""

PROPOSING = 1.1
"""Price of a step with proposals, in prices of its forwards: the host has more to do."""

DRAFT_GOES_ON = 0.96
"""Probability that a drafted token is followed by another: the base takes over after some 25 tokens."""

EXPECTED_KEPT, EXPECTED_JUDGED = 3.2, 4.0
"""Kept and judged proposals that stand for an agreement of 0.8 before any was seen."""

FADING = 1 / 128
"""Share by which agreement returns to what is expected in each step without proposals, so that they are tried again."""


class Rates(NamedTuple):
    """Prices of one kind of device, measured by `benchmarks/prices.py`."""

    layer: float
    """Overhead of a layer, in bytes that are read in that time."""
    several: float
    """Share of the weights' price that a second token adds: matrices in place of vectors."""
    token: float
    """Share of the weights' price that each token adds after that."""


CPU = Rates(layer=4e6, several=0.5, token=0.04)
CAPTURED = Rates(layer=0.3e9, several=0.0, token=0.008)
EAGER = Rates(layer=3.6e9, several=0.0, token=0.008)


class Price(NamedTuple):
    """Price of a model's forwards, in bytes that are read in that time.

    It follows from shapes and the kind of device alone, and not from a clock, so that a seed repeats a response anywhere.
    """

    overhead: float
    weights: float
    rates: Rates

    @classmethod
    def of(cls, model: PreTrainedModel, captured: bool) -> Price:
        """Price of a model whose forwards are captured as CUDA graphs or not."""
        rates = CPU if model.device.type == "cpu" else CAPTURED if captured else EAGER
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        return cls(layers * rates.layer, _weights(model), rates)

    def __call__(self, tokens: int) -> float:
        """Price of a forward that is fed so many tokens, all rows together."""
        more = self.rates.several + self.rates.token * tokens if tokens > 1 else 0.0
        return self.overhead + self.weights * (1 + more)


class Plan(NamedTuple):
    """Proposals of one step."""

    chunk: int
    """c, the number of tokens proposed to a row."""
    by_pilot: bool
    """Whether the pilot proposes, to all rows but those that `ngrams` has."""
    ngrams: list[int]
    """Free rows to which their n-grams propose."""


NOTHING = Plan(0, False, [])


class Pace:
    """The proposers of the next step and the length of its chunk: most tokens for their price, by what was kept in this call.

    With agreement a, a free row gains (1 - a^(c+1)) / (1 - a) tokens by c proposals of the pilot (arXiv 2211.17192, theorem
    3.8), and it takes those of its n-grams where more of them are expected to be kept; a row that drafts keeps each of the
    pilot's until the base takes over. The price is that of one check, one forward of the reference, and c forwards of the pilot
    if it proposes (one more where it is read after the last one too); where it only reads, that of one forward.

    Args:
        prices: of the base, the pilot, and the reference if there is one.
        fixed: c, if it is given.
        speculate: whether the pilot proposes to free rows.
        reads_pilot: whether the pilot reads all proposals.
        sureness: of the pilot, if it stops where it is unsure when it proposes to a single free row.
    """

    def __init__(
        self,
        prices: Sequence[Price],
        fixed: int | None,
        speculate: bool,
        reads_pilot: bool = False,
        sureness: Sureness | None = None,
    ) -> None:
        self._base, self._pilot, *self._references = prices
        self._fixed, self._speculate, self._reads_pilot, self._sureness = fixed, speculate, reads_pilot, sureness
        self._kept, self._judged = EXPECTED_KEPT, EXPECTED_JUDGED

    @property
    def most(self) -> int:
        """Most tokens that are proposed at a time."""
        return self._fixed or max(CHUNKS)

    def plan(self, drafting: int, free: Mapping[int, Sequence[float]]) -> Plan:
        """The proposals that pay most.

        Args:
            drafting: number of rows that draft.
            free: for each free row, the expected number of its n-grams' first 0, 1, ..., `most` tokens that are kept.
        """
        guesses = [*free.values()]
        options = self._options(drafting, any(kept[-1] for kept in guesses))
        chunk, by_pilot = max(options, key=lambda option: self._tokens_per_price(option[0], option[1], drafting, guesses))
        by_agreement = self._kept_of_pilot(chunk, by_pilot)
        ngrams = [row for row, kept in free.items() if kept[chunk] > by_agreement]
        if by_pilot and self._sureness and self._sureness.known and len(free) == 1 and not drafting:
            chunk = self.most  # up to which it stops by itself
        return Plan(chunk, by_pilot, ngrams)

    def judged(self, rows: list[tuple[int, int]], sure: Sequence[float] = ()) -> None:
        """Counts the pilot's kept and proposed tokens in each free row, up to the first rejected; recent ones weigh more.

        `sure`: its probabilities of a single row's tokens, where it may stop.
        """
        if self._sureness and sure:
            self._sureness.judged(sure, rows[0][0])
        rows = [(kept, proposed) for kept, proposed in rows if proposed]
        if rows:
            self._kept = 0.9 * self._kept + sum(kept for kept, _ in rows) / len(rows)
            self._judged = 0.9 * self._judged + sum(min(kept + 1, proposed) for kept, proposed in rows) / len(rows)
        else:
            self._kept += FADING * (EXPECTED_KEPT - self._kept)
            self._judged += FADING * (EXPECTED_JUDGED - self._judged)

    def _options(self, drafting: int, ngrams: bool) -> list[tuple[int, bool]]:
        """Chunks, and whether the pilot proposes; the cheaper ones first. With a fixed chunk it does wherever it may."""
        pilot = drafting > 0 or self._speculate
        if self._fixed is not None:
            return [(self._fixed, pilot) if pilot or ngrams else (0, False)]
        without = [] if drafting else [(0, False), *((chunk, False) for chunk in WITHOUT_PILOT if ngrams)]
        return [*without, *((chunk, True) for chunk in CHUNKS[1:] if pilot)]

    def _kept_of_pilot(self, chunk: int, by_pilot: bool) -> float:
        """Expected number of the pilot's tokens that a free row keeps."""
        return _run(min(self._kept / self._judged, 0.99), chunk + 1) - 1 if by_pilot else 0.0

    def _tokens_per_price(self, chunk: int, by_pilot: bool, drafting: int, free: list[Sequence[float]]) -> float:
        by_agreement = self._kept_of_pilot(chunk, by_pilot)
        tokens = drafting * _run(DRAFT_GOES_ON, chunk) + sum(1 + max(by_agreement, kept[chunk]) for kept in free)
        rows = drafting + len(free)
        price = sum(model(rows * (chunk + 1)) for model in (self._base, *self._references))
        if by_pilot:
            price += (chunk + self._reads_pilot) * self._pilot(rows)
        elif self._reads_pilot:
            price += self._pilot(rows * (chunk + 1))
        return tokens / (price * PROPOSING if chunk else price)


def _run(probability: float, most: int) -> float:
    """Expected length of a run, of which each token follows the one before with a probability."""
    return (1 - probability**most) / (1 - probability)


def _weights(model: PreTrainedModel) -> int:
    """Size of the weights that a forward reads, in bytes: of the input embeddings only a few rows, unless they are the head."""
    head = model.get_output_embeddings()
    embeddings = {*model.get_input_embeddings().parameters()} - {*(head.parameters() if head else ())}
    return sum(weight.nbytes for weight in model.parameters() if weight not in embeddings)
