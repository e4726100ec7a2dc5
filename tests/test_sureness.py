"""On a CPU the pilot stops proposing to a single row where it is unsure: less is thrown away, and no token is withdrawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wsd_hf
from test_acceptance import chi_squared
from test_fast_path import exact, tiny
from test_ngrams import OTHER, TEXT, answered, successors
from wsd_hf.speculation.pace import CPU, Price
from wsd_hf.speculation.sureness import Sureness


@pytest.fixture(autouse=True)
def cheap_pilots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one size, of which the first to be priced in a call, the base, is said to be twenty times as dear."""
    prices: list[Price] = []

    def price(model: Any, captured: bool) -> Price:
        prices.append(Price(0.0, 1.0 if len(prices) % 2 == 0 else 0.05, CPU))
        return prices[-1]

    monkeypatch.setattr(Price, "of", price)


def test_no_probability_is_trusted_before_any_proposal_was_judged() -> None:
    sureness = Sureness()
    assert sureness.goes_on([0.01, 0.01])
    sureness.judged([0.9], 1)
    assert not sureness.goes_on([0.01])
    assert sureness.goes_on([0.95, 0.95])


def test_proposals_go_on_while_all_of_them_are_likely_to_be_kept() -> None:
    sureness = Sureness()
    sureness.judged([0.1], 0)
    lengths = [next(count for count in range(1, 99) if not sureness.goes_on([sure] * count)) for sure in (0.3, 0.6, 0.9)]
    assert lengths == [2, 3, 12]


def test_probabilities_are_read_by_what_became_of_such_proposals() -> None:
    modest, boastful = Sureness(), Sureness()
    for _ in range(20):
        modest.judged([0.05], 1)
        boastful.judged([0.95], 0)
    assert modest.goes_on([0.05] * 5)
    assert not boastful.goes_on([0.95])


def test_proposals_after_a_rejected_one_say_nothing() -> None:
    one, other = Sureness(), Sureness()
    one.judged([0.9, 0.5, 0.1, 0.1], 1)
    other.judged([0.9, 0.5], 1)
    for probability in (0.1, 0.5, 0.9):
        assert one._chance(probability) == other._chance(probability)


def test_a_pilot_proposes_nothing_after_a_token_that_it_only_guesses() -> None:
    after = dict(zip([OTHER, *TEXT], [*TEXT, OTHER], strict=True))
    base = wsd_hf.enable_wsd(successors(0, after))
    unsure = TEXT[3::5]
    pilot = successors(0, {token: successor for token, successor in after.items() if token not in unsure})
    ids, want = torch.tensor([TEXT]), [OTHER, *TEXT, OTHER, *TEXT]
    wasted, forwards = {}, {}
    for rows in (1, 2):  # of two rows, neither ends the other's proposals
        out = answered(base, pilot, ids.repeat(rows, 1), "pilot", max_new_tokens=len(want), eos_token_id=None)
        assert out.sequences[:, len(TEXT) :].tolist() == [want] * rows
        wasted[rows], forwards[rows] = (out.stats.proposed - out.stats.kept) / rows, out.stats.base.forwards
    # Each guess, and the rest of two chunks: of the one in which the base took over, and of the next, the first to be judged.
    assert wasted[1] <= 2 * len(unsure) + 2 * 15
    assert wasted[1] < 0.8 * wasted[2]
    assert forwards[1] <= forwards[2]


@pytest.mark.sweep
def test_continuations_of_a_pilot_that_stops_are_distributed_as_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sureness, "known", True)
    base, pilot = wsd_hf.enable_wsd(tiny(5, 0)), tiny(5, 7)
    prompt, draws = torch.tensor([[1, 3]]), 1500
    stops: list[bool] = []
    goes_on = Sureness.goes_on

    def counted(sureness: Sureness, probabilities: Any) -> bool:
        stops.append(not goes_on(sureness, probabilities))
        return not stops[-1]

    monkeypatch.setattr(Sureness, "goes_on", counted)
    torch.manual_seed(0)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "pad_token_id": 0}
    drawn = torch.cat([answered(base, pilot, prompt, "pilot", **settings).sequences[:, 2:] for _ in range(draws)])
    assert 0.1 < sum(stops) / len(stops) < 0.9
    with torch.no_grad():
        first = pilot(prompt).logits[0, -1].float().softmax(-1)
    want = exact(base, first, 4, 5).view(5, 125).sum(dim=0)
    cells = (drawn[:, 1:] * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want) > 1e-3
