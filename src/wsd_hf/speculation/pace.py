"""The length of the next chunk of proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

CHUNKS = (0, 1, 3, 7, 11, 15)
"""Lengths of chunks; few, because each is captured as a CUDA graph of its own.

A check has one position more: multiples of four, for which matrix kernels are made (on a CPU, 7 can cost twice as much as 8).
"""

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


class Pace:
    """The length of the next chunk: most tokens for their price, at the agreement that this call has seen so far.

    With agreement a, a free row gains (1 - a^(c+1)) / (1 - a) tokens by c proposals (arXiv 2211.17192, theorem 3.8); a row that
    drafts keeps each of them until the base takes over. The price is that of c forwards of the pilot (one more where it is
    read after the last one too), one check, and one forward of the reference.

    Args:
        prices: of the base, the pilot, and the reference if there is one.
        fixed: c, if it is given.
        speculate: whether free rows get proposals.
        reads_pilot: whether the pilot reads the last proposal too.
    """

    def __init__(self, prices: Sequence[Price], fixed: int | None, speculate: bool, reads_pilot: bool = False) -> None:
        self._base, self._pilot, *self._references = prices
        self._reads_pilot = reads_pilot
        self._fixed = fixed
        self._speculate = speculate
        self._kept, self._judged = EXPECTED_KEPT, EXPECTED_JUDGED

    def chunk(self, drafting: int, free: int) -> int:
        """Number of tokens to propose now, for so many rows that draft and that are free; 0 where it does not pay."""
        if not drafting and not self._speculate:
            return 0
        if self._fixed is not None:
            return self._fixed
        return max(CHUNKS[bool(drafting) :], key=lambda chunk: self._tokens_per_price(chunk, drafting, free))

    def judged(self, rows: list[tuple[int, int]]) -> None:
        """Counts kept and proposed tokens of each free row, up to the first that was rejected; recent ones weigh more."""
        rows = [(kept, proposed) for kept, proposed in rows if proposed]
        if rows:
            self._kept = 0.9 * self._kept + sum(kept for kept, _ in rows) / len(rows)
            self._judged = 0.9 * self._judged + sum(min(kept + 1, proposed) for kept, proposed in rows) / len(rows)
        else:
            self._kept += FADING * (EXPECTED_KEPT - self._kept)
            self._judged += FADING * (EXPECTED_JUDGED - self._judged)

    def _tokens_per_price(self, chunk: int, drafting: int, free: int) -> float:
        agreement = min(self._kept / self._judged, 0.99)
        tokens = drafting * _run(DRAFT_GOES_ON, chunk) + free * _run(agreement, chunk + 1)
        rows = drafting + free
        price = self._base(rows * (chunk + 1)) + (chunk + self._reads_pilot) * self._pilot(rows)
        price += sum(reference(rows * (chunk + 1)) for reference in self._references)
        return tokens / (price * PROPOSING if chunk else price)


def _run(probability: float, most: int) -> float:
    """Expected length of a run, of which each token follows the one before with a probability."""
    return (1 - probability**most) / (1 - probability)


def _weights(model: PreTrainedModel) -> int:
    """Size of the weights that a forward reads, in bytes: of the input embeddings only a few rows, unless they are the head."""
    head = model.get_output_embeddings()
    embeddings = {*model.get_input_embeddings().parameters()} - {*(head.parameters() if head else ())}
    return sum(weight.nbytes for weight in model.parameters() if weight not in embeddings)
