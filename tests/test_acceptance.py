"""Whatever is proposed, what is written has the base's distribution."""

from __future__ import annotations

import pytest
import torch

from wsd_hf.engine.acceptance import keep_or_redraw

DRAWS = 100_000
BASE = [0.1, 0.4, 0.0, 0.3, 0.2]
PILOTS = {
    "the same": BASE,
    "another": [0.5, 0.1, 0.2, 0.05, 0.15],
    "certain of something likely": [0.0, 1.0, 0.0, 0.0, 0.0],
    "certain of something impossible": [0.0, 0.0, 1.0, 0.0, 0.0],
    "of a wider vocabulary": [0.1, 0.05, 0.0, 0.05, 0.1, 0.3, 0.4],
    "of a narrower vocabulary": [0.3, 0.7],
    "of no opinion": [0.2] * 5,
}


def chi_squared(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """The probability of a fit at least as bad; cells too rare to test are counted as one."""
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    assert not bool(((expected == 0) & (observed > 0)).any()), "something impossible was drawn"
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2))


@pytest.mark.parametrize("pilot", PILOTS)
def test_the_bases_distribution_is_left_as_it_is(pilot: str) -> None:
    torch.manual_seed(0)
    drawn_with = torch.tensor(PILOTS[pilot])
    proposals = torch.multinomial(drawn_with, DRAWS, replacement=True)
    known = torch.zeros(len(BASE))
    known[: len(drawn_with)] = drawn_with[: len(BASE)]
    written = keep_or_redraw(torch.tensor(BASE).log().expand(DRAWS, -1), proposals, known.expand(DRAWS, -1))
    assert chi_squared(written.bincount(minlength=len(BASE)), DRAWS * torch.tensor(BASE)) > 1e-3


@pytest.mark.parametrize("pilot", PILOTS)
def test_as_many_proposals_are_kept_as_the_two_agree(pilot: str) -> None:
    torch.manual_seed(1)
    drawn_with = torch.tensor(PILOTS[pilot])
    proposals = torch.multinomial(drawn_with, DRAWS, replacement=True)
    known = torch.zeros(len(BASE))
    known[: len(drawn_with)] = drawn_with[: len(BASE)]
    written = keep_or_redraw(torch.tensor(BASE).log().expand(DRAWS, -1), proposals, known.expand(DRAWS, -1))
    agreement = torch.minimum(known, torch.tensor(BASE)).sum()
    assert float((written == proposals).double().mean()) == pytest.approx(float(agreement), abs=0.01)


def test_where_nothing_was_proposed_the_base_draws() -> None:
    torch.manual_seed(0)
    scores = torch.tensor(BASE).log().expand(DRAWS, -1)
    written = keep_or_redraw(scores, torch.zeros(DRAWS, dtype=torch.long), torch.zeros(DRAWS, len(BASE)))
    assert chi_squared(written.bincount(minlength=len(BASE)), DRAWS * torch.tensor(BASE)) > 1e-3


def test_rows_are_judged_one_by_one() -> None:
    sure = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    drawn_with = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert keep_or_redraw(sure.log(), torch.tensor([1, 1, 0]), drawn_with).tolist() == [1, 0, 2]
