"""Statistics of answers, against hand-made values and the normal approximation."""

from __future__ import annotations

import itertools
import random
from statistics import fmean, stdev

import pytest
import torch

import wsd_hf
from wsd_hf.comparison.statistics import distinct_ngrams, interval, pairwise_similarity, repeated_ngrams


@pytest.mark.parametrize("size", [200, 1000])
@pytest.mark.parametrize("kind", ["normal", "right or wrong"])
def test_the_interval_of_many_values_is_that_of_a_normal_distribution(size: int, kind: str) -> None:
    chance = random.Random(size)
    values = [chance.gauss(5, 2) if kind == "normal" else float(chance.random() < 0.3) for _ in range(size)]
    error = stdev(values) / size**0.5
    low, high = interval(values)
    assert low == pytest.approx(fmean(values) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(fmean(values) + 1.96 * error, abs=0.2 * error)


def test_groups_are_resampled_whole() -> None:
    """Copies of a value give no certainty: the interval is that of one value of each group."""
    chance = random.Random(0)
    values = [chance.gauss(0, 1) for _ in range(300)]
    copies = [value for value in values for _ in range(5)]
    groups = [f"prompt {number}" for number in range(300) for _ in range(5)]
    assert interval(copies, groups) == pytest.approx(interval(values))
    low, high = interval(copies)
    assert high - low < 0.6 * (interval(values)[1] - interval(values)[0])


def test_groups_differ_in_size() -> None:
    """Of two groups, a resample takes the first twice, the second twice, or both."""
    means = {fmean([0, 0, 3]), fmean([0, 0, 0, 0]), fmean([3, 3])}
    assert set(interval([0, 0, 3], ["a", "a", "b"])) == {min(means), max(means)}


def test_the_order_of_values_within_groups_changes_nothing() -> None:
    values, groups = [1.0, 5.0, 2.0, 7.0], ["a", "b", "a", "b"]
    assert interval(values, groups) == interval([2.0, 5.0, 1.0, 7.0], groups)


def test_an_interval_is_the_same_in_every_run_and_draws_no_number_of_the_user() -> None:
    before = torch.get_rng_state()
    assert interval([1.0, 2.0, 5.0]) == interval([1.0, 2.0, 5.0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("values", "groups"), [([], None), ([], []), ([1.0], ["a", "b"])])
def test_no_interval_without_a_group_for_each_value(values: list[float], groups: list[str] | None) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="a group of each"):
        interval(values, groups)


def test_repeated_ngrams_are_counted_after_their_first_place() -> None:
    chance = random.Random(1)
    for size in (0, 1, 3, 4, 5, 40):
        tokens = [chance.randrange(3) for _ in range(size)]
        places = range(size - 3)
        before = [any(tokens[i : i + 4] == tokens[place : place + 4] for i in range(place)) for place in places]
        assert repeated_ngrams(tokens) == pytest.approx(fmean(before) if before else 0.0)


def test_distinct_ngrams_stay_within_their_text() -> None:
    assert distinct_ngrams(["a b", "c d"]) == 1.0  # "b c" is none
    assert distinct_ngrams(["a b c", "a b c"]) == 0.5
    assert distinct_ngrams(["a a a a", ""], n=1) == 0.25
    assert distinct_ngrams(["", "one"]) == 0.0


def test_similarity_is_the_mean_over_pairs() -> None:
    assert pairwise_similarity(["the same", "the same", "the same"]) == 1.0
    assert pairwise_similarity(["one", "other"]) == 0.0
    assert pairwise_similarity(["a b", "b a", "c d"]) == pytest.approx(1 / 3)
    assert pairwise_similarity(["", ""]) == 1.0
    texts = ["a b c d", "a b x", "d e"]
    for order in itertools.permutations(texts):
        assert pairwise_similarity(order) == pytest.approx((2 / 5 + 1 / 5) / 3)


def test_similarity_takes_two_texts() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="1 texts"):
        pairwise_similarity(["alone"])
