import math

import pytest
import torch

from wsd_hf import SwitchCriteria, WSDValueError, confidence, switch_index


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_the_crossing_token_is_kept():
    assert switch_index(logs(0.1, 0.9, 0.9, 0.9), threshold=0.85, window_size=2) == 3


def test_no_window_reaches_into_the_prompt():
    assert switch_index(logs(1, 1, 1, 1, 1), threshold=0.5, window_size=6) is None


def test_equality_crosses_also_at_one():
    assert switch_index([0.0] * 6, threshold=1.0) == 6
    assert switch_index(logs(0.3, 0.8), threshold=0.8, window_size=1) == 2


def test_five_hundred_tiny_probabilities_do_not_underflow():
    draft = [-700.0] * 512
    assert switch_index(draft, threshold=math.exp(-699), window_size=512) is None
    assert switch_index(draft, threshold=math.exp(-700.5), window_size=512) == 512


def test_an_impossible_token_blocks_every_window_that_holds_it():
    assert switch_index([-math.inf, 0.0, 0.0, 0.0], threshold=0.5, window_size=2) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lists_and_tensors_agree(dtype):
    values = [-0.5, -0.25, -0.125]
    assert switch_index(torch.tensor(values, dtype=dtype), 0.7, 2) == switch_index(values, 0.7, 2) == 3


def test_an_empty_draft_never_switches():
    assert switch_index([]) is None
    assert confidence([]).shape == (0,)


def test_confidence_is_the_geometric_mean_of_the_window():
    values = confidence(torch.tensor(logs(0.5, 0.5, 0.125)), window_size=3)
    assert values[:2].isnan().all()
    assert values[2].item() == pytest.approx((0.5 * 0.5 * 0.125) ** (1 / 3))


def test_confidence_works_on_rows():
    rows = torch.tensor([logs(0.5, 0.5), logs(0.2, 0.8)])
    assert confidence(rows, window_size=1).exp().shape == (2, 2)
    assert torch.allclose(confidence(rows, window_size=1), rows.double().exp())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.01}, "threshold=1.01"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"window_size": 0}, "window_size=0"),
        ({"window_size": 2.5}, "window_size=2.5"),
        ({"window_size": True}, "window_size=True"),
    ],
)
def test_illegal_settings_name_field_and_value(arguments, message):
    with pytest.raises(WSDValueError, match=message):
        switch_index([-0.1], **arguments)


@pytest.mark.parametrize("values", [[0.9, 0.8], [-0.1, math.nan]])
def test_probabilities_instead_of_logarithms_are_refused(values):
    with pytest.raises(WSDValueError, match="log_probs"):
        switch_index(values)


def test_confidence_refuses_probabilities_too_and_skips_over_nan():
    with pytest.raises(WSDValueError, match=r"log_probs contains 0\.9"):
        confidence([0.9, 0.8])
    assert confidence([math.nan, -1.0, -1.0], window_size=2).isnan().tolist() == [True, True, False]


def test_a_batch_of_drafts_is_refused():
    with pytest.raises(WSDValueError, match="one-dimensional"):
        switch_index(torch.zeros(2, 3))


def test_criteria_decide_each_row_by_its_newest_window():
    criteria = SwitchCriteria(threshold=0.8, window_size=2)
    scores = torch.tensor([logs(0.1, 0.9, 0.9), logs(0.9, 0.9, 0.1), logs(0.9, 0.8, 0.8)])
    assert criteria(torch.zeros(3, 3, dtype=torch.long), scores).tolist() == [True, False, True]


def test_criteria_wait_for_a_full_window_and_ignore_rows_without_tokens():
    criteria = SwitchCriteria(threshold=0.1, window_size=3)
    assert criteria(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)).tolist() == [False]
    assert criteria(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0.0, 0.0, math.nan]])).tolist() == [False]
