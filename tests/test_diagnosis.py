"""Measures of readings, against numbers counted by hand, and the verdict."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import wsd_hf
from readings import reading
from wsd_hf import Pair
from wsd_hf.diagnosis.diagnosis import Diagnosis, diagnose, of_readings
from wsd_hf.diagnosis.forwards import Prediction
from wsd_hf.diagnosis.measures import by_position, firing, highest_confidence, of_texts, places, repeated
from wsd_hf.diagnosis.summary import summary

CALM, SURE = [0.5] * 12, [0.5] * 5 + [0.1] + [0.9] * 6
"""A draft in which the paper's rule never fires, and one in which it fires at its last token."""


def diagnosis(*drafts: Any, own: Any = (), **settings: Any) -> Diagnosis:
    return Diagnosis(drafts=drafts, own=own, **{"max_draft_tokens": 96, **settings})


# Means


def test_means_by_position_are_over_all_tokens_of_a_band() -> None:
    first, second = by_position([reading([0.1, 0.2, 0.3]), reading([0.3, 0.4])])
    assert first[:3] == (1, 1, 2)
    assert second[:3] == (2, 4, 3)
    assert first.probability == pytest.approx(0.2)
    assert first.error == pytest.approx(0.1)  # of two numbers: half their distance
    assert second.probability == pytest.approx(0.3)
    assert second.error == pytest.approx(
        math.sqrt(2 * (0.1**2 + 0.1**2)) / 3
    )  # texts are 0.1 below the mean's share, and above


def test_bands_double() -> None:
    bands = by_position([reading([0.5] * 40)])
    assert [(band.first, band.last, band.tokens) for band in bands] == [
        (1, 1, 1),
        (2, 4, 3),
        (5, 8, 4),
        (9, 16, 8),
        (17, 32, 16),
        (33, 64, 8),
    ]
    assert {band.error for band in bands} == {0.0}


def test_repeats_are_of_the_text_and_of_the_prompt() -> None:
    text = reading([0.5] * 9, tokens=[1, 2, 3, 4, 9, 1, 2, 3, 4], base_prompt=[7, 9, 1, 2, 3])
    assert repeated(text) == [False] * 7 + [True] * 2
    text = reading([0.5] * 5, tokens=[1, 2, 3, 4, 5], base_prompt=[1, 2, 3, 4])
    assert repeated(text) == [False, False, False, True, False]


def test_repeats_can_be_left_out_of_means() -> None:
    text = reading([0.2] * 5 + [0.4] * 3 + [1.0], tokens=[1, 2, 3, 4, 9, 1, 2, 3, 4], base_prompt=[])
    bands = by_position([text], with_repeats=False)
    assert [band.tokens for band in bands] == [1, 3, 4]
    assert bands[-1].probability == pytest.approx(0.35)


def test_numbers_of_texts() -> None:
    texts = [
        reading([0.5, 0.25], best=[0.5, 0.3], ended=False),
        reading([0.5] * 8 + [0.25, 0.25], best=[0.5] * 10),
    ]
    numbers = of_texts(texts)
    assert {name: numbers[name] for name in ("texts", "length", "ended", "repeated")} == {
        "texts": 2,
        "length": 6,
        "ended": 0.5,
        "repeated": 0,
    }
    assert numbers["first_choice"] == pytest.approx(9 / 12)
    assert numbers["unsure"] == pytest.approx(1 / 12)
    assert numbers["probability"] == numbers["probability_without_repeats"] == pytest.approx((9 * 0.5 + 3 * 0.25) / 12)
    assert numbers["perplexity"] == pytest.approx((0.5**9 * 0.25**3) ** (-1 / 12))
    assert numbers["perplexity_start"] == pytest.approx((0.5**9 * 0.25) ** (-1 / 10))
    assert numbers["perplexity_rest"] == pytest.approx(4)


def test_numbers_of_empty_texts_are_none() -> None:
    numbers = of_texts([reading([]), reading([])])
    assert (numbers["texts"], numbers["length"], numbers["ended"]) == (2, 0, 1)
    assert {value for name, value in numbers.items() if name not in ("texts", "length", "ended")} == {None}


def test_a_token_without_probability_is_no_number_of_json() -> None:
    found = diagnosis(reading([0.5, 0.0, 0.5]))
    assert found.texts()["pilot"]["perplexity"] == math.inf
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["texts"]["pilot"]["perplexity"] is None
    assert data["texts"]["pilot"]["probability"] == pytest.approx(1 / 3)


def test_the_highest_confidence_is_over_the_window() -> None:
    text = reading([0.9, 0.1, 0.4, 0.9, 0.9])
    assert highest_confidence(text, 2) == pytest.approx(0.9)
    assert highest_confidence(text, 3) == pytest.approx((0.4 * 0.9 * 0.9) ** (1 / 3))
    assert highest_confidence(text, 6) == highest_confidence(reading([]), 1) == 0
    assert diagnosis(text, rule=wsd_hf.SwitchCriteria(0.8, 3)).highest() == [highest_confidence(text, 3)]


# Switches


def test_a_rule_on_drafts() -> None:
    echo = reading([0.5] * 3 + [0.95] * 3, tokens=[1, 2, 3, 1, 2, 3])
    found = firing([reading(CALM), reading(SURE), echo, reading([0.9] * 4)], wsd_hf.SwitchCriteria(0.8, 3))
    assert (found.rule, found.threshold, found.window_size, found.ignore_repeats) == ("confidence", 0.8, 3, False)
    assert found.never == 1 / 4
    assert found.median == 6  # of 9, 6 and 3
    assert found.on_repeats == pytest.approx(1 / 3)
    assert found.kept == pytest.approx((12 + 9 + 6 + 3) / (12 + 12 + 6 + 4))


def test_the_grid_and_the_rules_have_every_setting() -> None:
    found = diagnosis(reading(SURE))
    cells = {(cell.threshold, cell.window_size): cell.median for cell in found.grid()}
    assert len(cells) == 20
    assert cells[0.5, 1] == 1
    assert cells[0.8, 6] == 12
    assert cells[0.9, 12] is None
    rules = [(rule.rule, rule.ignore_repeats) for rule in found.rules()]
    names = ["confidence", "relative_confidence", "entropy", "agreement"]
    assert rules == [(name, ignored) for name in names for ignored in (False, True)]
    assert found.rules()[0].median == 12


def test_places_are_text_around_the_window() -> None:
    text = reading([0.5] * 19 + [0.1] + [0.9] * 6 + [0.5] * 20, tokens=[*range(46)], prompt=4)
    [place] = places([reading(CALM), text], wsd_hf.SwitchCriteria())
    assert (place.prompt, place.index, place.repeats) == (4, 26, False)
    assert place.before == "".join(f" {token}" for token in range(8, 20))
    assert place.window == " 20 21 22 23 24 25"
    assert place.after == "".join(f" {token}" for token in range(26, 34))


def test_short_drafts_never_switch() -> None:
    found = diagnosis(reading([0.99] * 3), reading([]))
    assert found.rules()[0].never == 1
    assert not found.places()
    assert found.highest() == [0, 0]
    assert "The rule never fires" in " ".join(found.verdict())


# The verdict


def sentences(*drafts: Any, **settings: Any) -> str:
    return "\n".join(diagnosis(*drafts, **settings).verdict())


def test_a_rule_that_fires_in_half_of_the_drafts_fires() -> None:
    sure, calm = reading(SURE), reading(CALM)
    assert "The rule fires (confidence of 0.8 over 6 tokens): in 50 % of the drafts, at token 12" in sentences(sure, calm)
    assert "Half of the drafts" not in sentences(sure, calm)
    rarely = sentences(sure, calm, calm)
    assert "The rule rarely fires (confidence of 0.8 over 6 tokens): in 33 % of the drafts, at token 12" in rarely
    assert "Half of the drafts reach a confidence of 0.50 or less." in rarely
    assert "The rule never fires" in sentences(calm)
    other = sentences(calm, rule=wsd_hf.EntropyCriteria(ignore_repeats=True))
    assert "The rule never fires (entropy of 0.5 over 8 tokens, repeats ignored)" in other


def test_a_quarter_of_switches_on_repeats_is_repetition() -> None:
    rule = wsd_hf.SwitchCriteria(0.8, 3)
    echo, sure = reading([0.5] * 3 + [0.95] * 3, tokens=[1, 2, 3, 1, 2, 3]), reading(SURE)
    assert "25 % of its switches are on a window that the draft held before, word for word: repetition makes it fire." in (
        sentences(echo, sure, sure, sure, rule=rule)
    )
    assert "20 % of its switches are on a window that the draft held before, word for word: repetition is not its cause." in (
        sentences(echo, sure, sure, sure, sure, rule=rule)
    )
    assert "its switches" not in sentences(reading(CALM))


def test_the_threshold_is_compared_with_the_bases_own_text_without_its_loops() -> None:
    own = {"writer": "base"}
    loop = reading([0.3] * 4 + [0.99] * 20, tokens=[1, 2, 3, 4] * 6, **own)
    above = "repeats left out, the rule would fire in 0 % only: the threshold is above what this base gives its own text."
    assert above in sentences(reading(CALM), own=[loop])
    within = "the rule would fire in 50 %: this base reaches the threshold."
    assert within in sentences(reading(CALM), own=[loop, reading(SURE, **own)])
    assert "own answers" not in sentences(reading(CALM))
    assert "own answers" not in sentences(reading(CALM), own=[reading([], **own)])


def test_more_than_20_percent_of_unsure_places_are_named() -> None:
    draft = reading([0.1] * 10, best=[0.39] * 3 + [0.4001] * 7)
    assert "At 30 % of the tokens the base's largest probability is below 0.4, more than 20 %" in sentences(draft)
    assert "nudging and blend, hand much of the answer to it." in sentences(draft)
    own = reading([0.9] * 8 + [0.3] * 2, writer="base")
    assert "At 20 % of the tokens the base's largest probability is below 0.4, no more than 20 %" in sentences(draft, own=[own])


def test_the_beginning_of_drafts_is_described() -> None:
    assert "first token of a draft 0.25: it may begin like this itself." in sentences(reading([0.25] * 8))
    goes_along = "first token of a draft 0.10, and the last ones 0.60: it would not begin like this, but it goes along."
    assert goes_along in sentences(reading([0.1] + [0.6] * 3))
    against = "first token of a draft 0.10, and the last ones 0.15: it does not grow sure of this pilot's texts."
    assert against in sentences(reading([0.1] + [0.15] * 3))


@pytest.mark.parametrize(
    ("time", "words"),
    [(0.79, "pays in time"), (0.8, "takes about as long"), (1.2, "takes about as long"), (1.21, "does not pay in time")],
)
def test_predicted_costs_are_judged_by_time(time: float, words: str) -> None:
    others = [Prediction(method="base", base_forwards=1, time=1.0), Prediction(method="two_way", time=0.1)]
    wsd = Prediction(method="wsd", base_forwards=0.25, pilot_forwards=0.9, pilot_share=0.4, time=time)
    found = sentences(reading(SURE), predictions=[*others, wsd])
    forwards = "Predicted costs of a token with this rule: 0.25 forwards of the base, 0.90 of the pilot"
    assert f"{forwards}, and {time:.2f} of the base's time alone: it {words}." in found
    assert "Predicted" not in sentences(reading(SURE), predictions=others)


# Arguments


def test_questions_chats_and_records_are_prompts() -> None:
    question = "What does the Keloft eat?"
    chat = [{"role": "user", "content": question}]
    found = diagnose(Pair.tiny(), [question, chat, {"messages": chat, "kind": "fact"}], max_draft_tokens=9, batch_size=3)
    first, *others = [(draft.tokens, own.tokens) for draft, own in zip(found.drafts, found.own, strict=True)]
    assert others == [first, first]
    assert [draft.prompt for draft in found.drafts] == [0, 1, 2]
    assert found.texts().keys() == {"pilot", "base"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_own_answers_may_be_left_out() -> None:
    found = diagnose(Pair.tiny(), ["Who?"], max_draft_tokens=4, own_answers=False)
    assert not found.own
    assert found.texts().keys() == {"pilot"}
    assert found.positions().keys() == {"draft", "draft, repeats left out"}


@pytest.mark.parametrize("vocabulary", ["pilot", "pilot_other_vocab"])
def test_costs_are_predicted_for_the_methods_that_a_pair_can_run(vocabulary: str) -> None:
    found = diagnose(Pair.tiny(vocabulary), ["What does the Keloft eat?"], max_draft_tokens=24, predict_costs=True)
    methods = ["base", "pilot", "nudging", "wsd", "two_way"]
    methods += ["product", "ensemble", "blend"] if vocabulary == "pilot" else []
    assert [one["method"] for one in found.to_dict()["predictions"]] == methods
    assert "Predicted costs of a token with this rule" in found.verdict()[-1]
    assert "Predicted costs of a token" in "".join(str(getattr(part, "title", "")) for part in summary(found))


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r"prompts=\[\]: must be a list of questions, chats or records, at least one"),
        ("Who?", {}, "prompts='Who[?]': must be a list of questions"),
        ([{"prompt": "Who?"}], {}, r"prompts\[0\]={'prompt': 'Who[?]'}: must be a question, a list of messages"),
        ([7], {}, r"prompts\[0\]=7: must be a question, a list of messages"),
        (["Who?", [{"role": "user"}]], {}, r"prompt 2: messages\[0\]"),
        (["Who?"], {"max_draft_tokens": 0}, "max_draft_tokens=0: must be an integer of at least 1"),
        (["Who?"], {"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        (["Who?"], {"predict_costs": True, "own_answers": False}, "predict_costs=True needs own_answers=True"),
    ],
)
def test_wrong_arguments_are_refused(prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        diagnose(Pair.tiny(), prompts, **settings)


def test_a_diagnosis_needs_a_draft() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="drafts: there are none"):
        of_readings([reading(CALM, writer="base")], 96)
