"""The pace proposes what pays: on its own arithmetic, without any model or clock."""

from __future__ import annotations

import copy

import pytest

from families import tiny_model
from wsd_hf.speculation.pace import CAPTURED, CHUNKS, CPU, EAGER, Pace, Price, Rates

FREE_POSITIONS = Rates(layer=0.0, several=0.0, token=0.0)


def pace(pilot: float, rates: Rates = FREE_POSITIONS, fixed: int | None = None, speculate: bool = True) -> Pace:
    """A pace for a pilot whose forward costs so much of the base's."""
    return Pace([Price(0.0, 1e9, rates), Price(0.0, pilot * 1e9, rates)], fixed, speculate)


def chunk(pace: Pace, drafting: int, free: int) -> int:
    """Number of tokens that the pilot proposes next, beside n-grams that have nothing to propose."""
    plan = pace.plan(drafting, {row: [0.0] * (pace.most + 1) for row in range(free)})
    assert not plan.ngrams
    assert plan.by_pilot == (plan.chunk > 0)
    return plan.chunk


def settle(pace: Pace, agreement: float) -> Pace:
    """Shows it an agreement, in judged proposals of a hundred rows, until nothing else counts."""
    kept = round(100 * agreement)
    for _ in range(200):
        pace.judged([(1, 1)] * kept + [(0, 1)] * (100 - kept))
    return pace


def expected(agreement: float, proposals: int) -> float:
    """Tokens of a free row: the proposals up to the first rejected one, and one of the base."""
    tokens = 1.0
    for position in range(1, proposals + 1):
        tokens += agreement**position
    return tokens


@pytest.mark.parametrize("agreement", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [0.0, 0.05, 0.15, 0.45, 1.0])
def test_a_free_row_gets_the_chunk_of_most_tokens_for_their_price(agreement: float, cost: float) -> None:
    def gain(proposals: int) -> float:
        """Tokens of a step for its price, to which proposals add a tenth."""
        return expected(agreement, proposals) / (1 + proposals * cost) / (1.1 if proposals else 1.0)

    best = max(CHUNKS, key=gain)
    assert chunk(settle(pace(cost), agreement), drafting=0, free=1) == best


def test_a_pilot_as_dear_as_the_base_proposes_nothing_after_the_switch() -> None:
    dear = pace(1.0, CPU)
    assert chunk(dear, drafting=0, free=1) == 0
    assert chunk(dear, drafting=1, free=0) > 0  # a draft is the pilot's, whatever it costs


def test_positions_that_cost_something_shorten_chunks() -> None:
    for agreement in (0.5, 0.8, 0.95):
        chunks = [chunk(settle(pace(0.1, CPU), agreement), drafting=0, free=rows) for rows in (4, 16, 64)]
        assert chunks == sorted(chunks, reverse=True)
        assert chunks[-1] < chunk(settle(pace(0.1), agreement), drafting=0, free=64)


def test_drafts_take_longer_chunks_than_rows_that_may_reject_them() -> None:
    for rows in (1, 16):
        for rates in (CPU, CAPTURED, EAGER):
            alone = pace(0.1, rates)
            assert chunk(alone, drafting=rows, free=0) >= chunk(alone, drafting=rows, free=rows) >= chunk(alone, 0, rows)


def test_a_pilot_that_is_never_right_is_given_up_and_seldom_tried_again() -> None:
    stranger, asked = pace(0.15, CPU), []
    for _ in range(600):
        proposed = chunk(stranger, drafting=0, free=1)
        asked.append(proposed)
        stranger.judged([(0, proposed)])
    assert sum(map(bool, asked[:20])) <= 4
    assert 1 <= sum(map(bool, asked[20:])) <= 580 / 25
    assert sum(asked[20:]) <= 0.1 * 580


def test_a_fixed_chunk_is_kept_and_none_is_proposed_without_speculation() -> None:
    assert {chunk(pace(1.0, fixed=5), drafting, free) for drafting, free in ((0, 1), (1, 0), (2, 3))} == {5}
    assert chunk(pace(0.0, fixed=5, speculate=False), drafting=0, free=2) == 0
    assert chunk(pace(0.0, speculate=False), drafting=0, free=2) == 0
    assert chunk(pace(0.0, speculate=False), drafting=1, free=1) > 0


def test_equal_histories_get_equal_chunks() -> None:
    def history() -> list[int]:
        one, chunks = pace(0.12, CPU), []
        for step in range(50):
            chunks.append(chunk(one, drafting=int(step < 5), free=3))
            one.judged([(min(step % 4, chunks[-1]), chunks[-1])] * 3)
        return chunks

    assert history() == history()


def test_a_price_is_a_fact_of_the_shapes() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    price = Price.of(model, captured=False)
    for weight in model.parameters():
        weight.data.zero_()
    assert Price.of(model, captured=False) == price
    one, several = price(1), [price(tokens) for tokens in (2, 4, 64)]
    assert one < several[0] < several[1] < several[2]


@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_reads_the_head_and_not_the_embeddings(tied: bool) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.tie_word_embeddings = tied
    model = type(tiny_model("llama"))(config)
    table = config.vocab_size * config.hidden_size
    layers = sum(weight.numel() for weight in (*model.model.layers.parameters(), *model.model.norm.parameters()))
    assert Price.of(model, captured=False).weights == 4 * (layers + table)
