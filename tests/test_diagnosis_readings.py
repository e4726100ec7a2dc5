"""Readings of drafts and own answers, and the switches that are read off them, against `generate` and single forwards."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import wsd_hf
from readings import reading
from wsd_hf import Pair
from wsd_hf.diagnosis.diagnosis import diagnose
from wsd_hf.diagnosis.reading import Reading, check_prompts, read, reading_tasks
from wsd_hf.diagnosis.switches import repeats, switch_index
from wsd_hf.ranks import Rank
from wsd_hf.strategies.wsd.switch_rules import SWITCH_RULES
from wsd_hf.tiny import demo_questions

MOST = 36

ECHO = "That is a very good question. What does the Keloft eat?"
"""A question whose answers hold 4-grams of it."""

CHATS = [question["messages"] for question in demo_questions()[:3]] + [[{"role": "user", "content": ECHO}]]

BOUNDS = {"confidence": (0.5, 0.95), "relative_confidence": (0.6, 0.97), "entropy": (0.01, 0.5), "agreement": (0.6, 1.0)}
"""Thresholds that are reached in the middle of some of the drafts."""


@pytest.fixture(scope="module", params=["pilot", "pilot_other_vocab"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair.tiny(request.param)


@pytest.fixture(scope="module")
def drafts(pair: Pair) -> list[Reading]:
    return readings(pair, batch_size=4, own_answers=False)


def readings(pair: Pair, most: int = MOST, **settings: Any) -> list[Reading]:
    tasks = reading_tasks(len(CHATS), (), **settings)
    return [one for task in tasks for one in read(pair, CHATS, task, most)]


@contextmanager
def changed(pair: Pair, name: str, change: Any) -> Iterator[Pair]:
    """The pair with a model whose logits are changed."""
    model = copy.deepcopy(getattr(pair, name))
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: change(logits))
    yield Pair(**{**vars(pair), name: model})


# Switches


@pytest.mark.parametrize("name", SWITCH_RULES)
@pytest.mark.parametrize("ignore_repeats", [False, True], ids=["all", "no repeats"])
@pytest.mark.parametrize("calls", [3, pytest.param(10, marks=pytest.mark.sweep)])
def test_switches_are_those_of_generate(pair: Pair, drafts: list[Reading], name: str, ignore_repeats: bool, calls: int) -> None:
    rng = random.Random(f"{name} {ignore_repeats}")
    found = set[int | None]()
    for _ in range(calls):
        settings: dict[str, Any] = {"window_size": rng.randint(1, 8), "ignore_repeats": ignore_repeats}
        settings |= {"threshold": rng.uniform(*BOUNDS[name])}
        switches = [switch_index(draft, SWITCH_RULES[name](**settings)) for draft in drafts]
        config = wsd_hf.WSDConfig(switch_criteria=name, **settings)  # type: ignore[arg-type]
        output = pair.generate(CHATS, config, max_new_tokens=MOST, do_sample=False)
        assert output.switch_index.tolist() == [index or -1 for index in switches], settings
        found |= {*switches}
    assert len(found) >= 3


def test_repeats_that_are_ignored_make_a_difference(pair: Pair, drafts: list[Reading]) -> None:
    rules = [wsd_hf.SwitchCriteria(0.7, 4, ignore_repeats=ignored) for ignored in (False, True)]
    first, second = (switch_index(drafts[-1], rule) for rule in rules)
    assert first
    assert second
    assert first < second


def test_a_window_repeats_if_it_was_there_before() -> None:
    draft = reading([0.5] * 6, tokens=[1, 2, 3, 1, 2, 4])
    assert [repeats(draft, end, 2) for end in (2, 4, 5, 6)] == [False, False, True, False]
    assert repeats(draft, 4, 1)


# Readings


@torch.no_grad()
def assert_read(pair: Pair, text: Reading) -> None:
    """Compares a reading with one forward of the base over prompt and text."""
    ids = torch.tensor([text.base_prompt + text.tokens])
    p = pair.base(ids).logits[0, len(text.base_prompt) - 1 : -1].double().softmax(dim=-1)
    chosen = p[range(len(text.tokens)), text.tokens]
    measured = {
        "log_probs": chosen.log(),
        "best_log_probs": p.amax(dim=-1).log(),
        "entropies": -(p * p.log()).nan_to_num().sum(dim=-1),
    }
    for name, want in measured.items():
        torch.testing.assert_close(torch.tensor(getattr(text, name)).double(), want, atol=1e-4, rtol=1e-4)
    assert "".join(text.texts) == pair.tokenizer.decode(text.tokens)
    assert len(text.texts) == len(text.tokens)


def test_a_draft_is_the_pilots_own_text(pair: Pair, drafts: list[Reading]) -> None:
    for draft, chat in zip(drafts, CHATS, strict=True):
        assert_read(pair, draft)
        inputs = pair.inputs([chat])
        assert draft.base_prompt == inputs["input_ids"][0].tolist()
        own = pair.pilot.generate(inputs["assistant_input_ids"], do_sample=False, max_new_tokens=80)
        text = pair.pilot_tokenizer.decode(own[0, inputs["assistant_input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.startswith("".join(draft.texts))
        assert draft.ended == (text.strip() == "".join(draft.texts).strip())
        assert draft.writer == "pilot"
    assert any(draft.ended for draft in drafts)


def test_own_answers_are_those_of_the_base_alone(pair: Pair) -> None:
    answers = [one for one in readings(pair, batch_size=4) if one.writer == "base"]
    for answer, chat in zip(answers, CHATS, strict=True):
        assert_read(pair, answer)
        inputs = pair.inputs([chat])
        prompt = inputs["input_ids"]
        ids = pair.base.generate(
            prompt, do_sample=False, max_new_tokens=MOST, stopping_criteria=inputs.get("stopping_criteria", [])
        )
        text = pair.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).split("\n\n[")[0]
        assert "".join(answer.texts).strip() == text.strip()
        assert all(own == best for own, best in zip(answer.log_probs, answer.best_log_probs, strict=True))
        assert answer.ended == (ids.shape[1] - prompt.shape[1] < MOST)
        assert answer.forwards >= len(answer.tokens)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_reads_as_single_prompts_do(pair: Pair, drafts: list[Reading], batch_size: int) -> None:
    for one, other in zip(readings(pair, batch_size=batch_size, own_answers=False), drafts, strict=True):
        assert (one.prompt, one.tokens, one.texts, one.ended) == (other.prompt, other.tokens, other.texts, other.ended)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize(("most", "forwards"), [(16, 1), (64, 1), (96, 2)])
def test_the_base_reads_a_batch_of_drafts_in_one_forward_for_64_tokens(pair: Pair, most: int, forwards: int) -> None:
    count = {"base": 0, "pilot": 0}

    def counting(name: str) -> Any:
        def hook(*_: Any) -> None:
            count[name] += 1

        return hook

    read(pair, CHATS, ("pilot", [0]), 2)  # models are tried once, at their first call
    with changed(pair, "pilot", lambda logits: endless(pair, logits)) as endlessly:
        read(endlessly, CHATS, ("pilot", [0]), 2)
        hooks = [getattr(endlessly, name).register_forward_pre_hook(counting(name)) for name in count]
        found = read(endlessly, CHATS, ("pilot", [0, 1, 2]), most)
        for hook in hooks:
            hook.remove()
    assert forwards <= count["base"] <= forwards + (pair.tokenizer.vocab_size != pair.pilot_tokenizer.vocab_size)
    assert {one.forwards for one in found} == {count["pilot"]}
    assert most <= count["pilot"] <= 2 * most
    assert {len(one.tokens) for one in found} == {most}
    assert not any(one.ended for one in found)


def endless(pair: Pair, logits: torch.Tensor) -> torch.Tensor:
    """The pilot's logits without an end."""
    ends = torch.tensor([pair.pilot.generation_config.eos_token_id, pair.pilot_tokenizer.eos_token_id]).flatten()
    return logits.index_fill(-1, ends, -1e9)


def test_a_pilot_that_ends_at_once_drafts_nothing(pair: Pair) -> None:
    end = pair.pilot_tokenizer.eos_token_id
    with changed(pair, "pilot", lambda logits: logits.index_fill(-1, torch.tensor([end]), 1e9)) as silent:
        diagnosis = diagnose(silent, CHATS[:2], max_draft_tokens=8, predict_costs=True)
    for draft in diagnosis.drafts:
        assert (draft.tokens, draft.texts, draft.log_probs, draft.ended) == ([], [], [], True)
    assert diagnosis.verdict()[0].startswith("The pilot ended every draft at once")
    assert {cell.never for cell in diagnosis.grid()} == {1.0}
    assert diagnosis.to_dict()["texts"]["pilot"]["perplexity"] is None


def test_times_are_those_of_the_writer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the base's forwards move, by a second each."""
    now = [0.0]
    monkeypatch.setattr("time.process_time", lambda: now[0])
    tick = pair.base.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1), prepend=False)
    model_forward = pair.base.forward
    try:
        [own] = read(pair, CHATS, ("base", [0]), 5)
    finally:
        tick.remove()
    assert own.seconds == own.forwards == 5
    monkeypatch.setattr(
        pair.base, "forward", lambda *args, **kwargs: (now.__setitem__(0, now[0] + 1), model_forward(*args, **kwargs))[1]
    )
    [draft] = read(pair, CHATS, ("pilot", [0]), 5)
    assert draft.seconds == 0


def test_the_models_are_left_as_they_were(pair: Pair) -> None:
    readings(pair, most=4, batch_size=4)
    assert not pair.base._forward_hooks
    assert not pair.base._forward_pre_hooks


# What is missing, and what is wrong


def test_tasks_are_the_readings_that_are_missing() -> None:
    def tasks(*args: Any, **settings: Any) -> list[tuple[str, list[int]]]:
        return [(writer, [*numbers]) for writer, numbers in reading_tasks(*args, **settings)]

    whole = [("pilot", [0, 1]), ("pilot", [2]), ("base", [0, 1]), ("base", [2])]
    assert tasks(3, (), 2) == whole
    assert tasks(3, {(0, "pilot"), (1, "base")}, 2) == whole  # a batch is the same, however much of it is there
    assert tasks(3, {(2, "pilot"), (0, "base"), (1, "base")}, 2) == [whole[0], whole[3]]
    assert tasks(2, (), 5, own_answers=False) == [("pilot", [0, 1])]
    assert [tasks(3, (), 2, rank=Rank(number, 2)) for number in (0, 1)] == [whole[::2], whole[1::2]]


@pytest.mark.parametrize("model", ["base", "pilot"])
def test_nan_is_an_error_that_names_the_prompts(pair: Pair, model: str) -> None:
    with (
        changed(pair, model, lambda logits: logits * math.nan) as broken,
        pytest.raises(wsd_hf.WSDLogitsError, match=f"^prompts 2 to 3: the {model} returned NaN"),
    ):
        read(broken, CHATS, ("pilot", [1, 2]), 4)


def test_nan_in_an_own_answer_too(pair: Pair) -> None:
    with (
        changed(pair, "base", lambda logits: logits * math.nan) as broken,
        pytest.raises(wsd_hf.WSDLogitsError, match=r"^prompt 2: the base returned NaN"),
    ):
        read(broken, CHATS, ("base", [1]), 4)


def test_a_prompt_that_is_too_long_is_named(pair: Pair) -> None:
    chats = [*CHATS[:1], [{"role": "user", "content": "What does the Keloft eat? " * 2000}]]
    with pytest.raises(wsd_hf.WSDValueError, match=r"^prompt 2: the prompt of the base has .* shorten the prompt"):
        check_prompts(pair, chats)


def test_a_pilot_without_a_chat_template_is_refused(pair: Pair) -> None:
    tokenizer = copy.deepcopy(pair.pilot_tokenizer)
    tokenizer.chat_template = None
    bare = Pair(**{**vars(pair), "pilot_tokenizer": tokenizer})
    with pytest.raises(wsd_hf.WSDValueError, match="prompt 1: assistant_tokenizer has no chat template"):
        diagnose(bare, ["Who?"])
