"""What holds for every strategy, engine and number of vocabularies, whatever else it does.

A strategy is left out of a check only by a rule that the check states: those that sample have no greedy response, those that
mix distributions take no second vocabulary, and those that can't return scores refuse by name.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import wsd_hf
from every_strategy import CASES, Case, counting, each, every_case, every_model, some
from oracle import left_padded, ones, plain_tokens
from tokenizers_for_tests import letter_tokenizer
from wsd_hf.strategies import STRATEGIES

GREEDY = [case for case in CASES if not case.samples]


def refused(case: Case, message: str, ids: torch.Tensor, **kwargs: Any) -> None:
    """Checks that a call is refused with a message, and before any forward of any model."""
    with ExitStack() as stack:
        forwards = [stack.enter_context(counting(model)) for model in case.models.values()]
        with pytest.raises(wsd_hf.WSDValueError, match=message):
            case.generate(ids, **kwargs)
        assert not any(forwards)


def unless_refused(case: Case, name: str, ids: torch.Tensor, **kwargs: Any) -> Any:
    """The output of a call, or None if it is refused by a name and before any forward."""
    with ExitStack() as stack:
        forwards = [stack.enter_context(counting(model)) for model in case.models.values()]
        try:
            return case.generate(ids, **({"top_k": 1} if case.samples else {"do_sample": False}), **kwargs)
        except wsd_hf.WSDValueError as error:
            refusal = str(error)
        assert name in refusal
        assert not any(forwards)
        return None


def batch(case: Case) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Three prompts, and as one batch their ids and mask."""
    rows = [case.prompt(seed, 3 + 2 * seed) for seed in range(3)]
    return rows, *left_padded(rows, 0)


# Correctness


@each(case for case in GREEDY if case.vocabularies == "one")
@pytest.mark.parametrize("seed", some(2, 6))
def test_small_models_that_are_the_base_leave_it_as_it_is(case: Case, seed: int, tried: Any) -> None:
    base, same = case.world.base, {name: case.world.base for name in case.models if name != "base"}
    ids = case.prompt(seed, 1 + 2 * seed)
    response = case.repeatable(ids, max_new_tokens=16, **same)[0, ids.shape[1] :].tolist()
    assert response == plain_tokens(base, ids, 16)
    tried("calls whose models agree")


@every_case
def test_padding_on_the_left_changes_no_token(case: Case) -> None:
    ids = case.prompt(3)
    padded, mask = left_padded([ids], 0, width=ids.shape[1] + 32)
    want = case.repeatable(ids)[0, ids.shape[1] :]
    assert torch.equal(case.repeatable(padded, attention_mask=mask, pad_token_id=0)[0, padded.shape[1] :], want)


@every_case
@torch.no_grad()
def test_logits_are_those_of_a_forward_without_a_cache_and_scores_those_that_were_chosen_from(case: Case, tried: Any) -> None:
    rows, ids, mask = batch(case)
    kwargs = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 12, "repetition_penalty": 1.2}
    out = unless_refused(case, "output_logits=True", ids, output_logits=True, output_scores=True, **kwargs)
    if out is None:
        unless_refused(case, "output_scores=True", ids, output_scores=True, **kwargs)
        return
    assert out.sequences.tolist() == case.repeatable(ids, **kwargs).tolist()
    eos = case.world.base.generation_config.eos_token_id
    for row, prompt in enumerate(rows):
        response = out.sequences[row, out.prompt_length :].tolist()
        assert len(out.logits) == len(out.scores) == len(response)
        length = response.index(eos) + 1 if eos in response else len(response)
        whole = torch.cat([prompt, torch.tensor([response[:length]])], dim=1)
        want = case.world.base(whole, attention_mask=ones(whole), use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits[:length]]), want, atol=1e-5, rtol=1e-5)
        assert [int(step[row].argmax()) for step in out.scores[:length]] == response[:length]
        tried("logits against a forward without a cache", length)


@every_case
def test_stats_count_the_forwards_of_all_models(case: Case) -> None:
    _, ids, mask = batch(case)
    with ExitStack() as stack:
        runs = {name: stack.enter_context(counting(model)) for name, model in case.models.items()}
        stats = case.generate(ids, attention_mask=mask, pad_token_id=0, max_new_tokens=16).stats
    assert stats.base.forwards == len(runs["base"]) > 0
    assert stats.pilot.forwards == len(runs["assistant_model"])
    if "reference_model" in runs:
        assert stats.reference.forwards == len(runs["reference_model"])


@every_case
def test_a_plain_call_returns_the_sequences_alone(case: Case) -> None:
    ids = case.prompt(3)
    torch.manual_seed(7)
    assert torch.equal(case.generate(ids, return_dict_in_generate=False), case.seeded(ids, return_dict_in_generate=True))


@each(case for case in GREEDY if case.engine == "fast" and case.vocabularies == "one" and case.way != "wsd by n-grams")
@pytest.mark.parametrize("chunk", [1, 4])
def test_models_that_agree_take_one_forward_of_the_base_for_all_that_is_proposed(case: Case, chunk: int) -> None:
    """A step in which the pilot drafts writes c tokens, one in which it proposes to the base c + 1."""
    base, agreeing = case.world.base, copy.deepcopy(case.world.base)
    settings = {case.keyword("chunk"): chunk, "eos_token_id": None, "max_new_tokens": 40}
    for ids in (case.prompt(1), case.prompt(2).repeat(3, 1)):
        with counting(base) as forwards:
            case.repeatable(ids, **{role: agreeing for role in case.roles if role != "base"}, **settings)
        assert len(forwards) <= 2 + 40 / (chunk if case.switches else chunk + 1)


@every_case
@pytest.mark.parametrize("seed", some(1, 4))
def test_an_eos_of_none_ends_no_response_as_in_plain_generate(case: Case, seed: int) -> None:
    ids = case.prompt(seed)
    assert case.repeatable(ids, eos_token_id=None, max_new_tokens=24).shape[1] == ids.shape[1] + 24


@each(GREEDY)
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.sweep)])
def test_a_greedy_call_is_repeated_to_the_bit_and_draws_nothing(case: Case, count: int, tried: Any) -> None:
    ids = case.prompt(5)
    before, first = torch.random.get_rng_state(), case.repeatable(ids)
    assert all(torch.equal(case.repeatable(ids), first) for _ in range(count))
    assert torch.equal(torch.random.get_rng_state(), before)
    tried("repeated calls", count)


# What is the caller's


@every_model
def test_a_model_in_training_mode_stays_in_it_and_writes_the_same(case: Case, role: str) -> None:
    model = case.models[role]
    want = case.repeatable(case.prompt(2))
    model.train()
    try:
        assert torch.equal(case.repeatable(case.prompt(2)), want)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


class FailingProcessor(LogitsProcessor):
    """Raises when it is called for the n-th time."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = itertools.count(1), at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if next(self.calls) == self.at:
            raise LookupError("of the caller's")
        return scores


class FailingCriterion(StoppingCriteria):
    """Raises at the n-th token."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = itertools.count(1), at

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if next(self.calls) == self.at:
            raise LookupError("of the caller's")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@every_case
@pytest.mark.parametrize("at", [1, 2])
def test_an_error_of_the_callers_own_comes_through(case: Case, at: int) -> None:
    ids, want = case.prompt(3), case.seeded(case.prompt(3))
    for own in ({"logits_processor": [FailingProcessor(at)]}, {"stopping_criteria": [FailingCriterion(at)]}):
        with pytest.raises(LookupError, match="of the caller's"):
            case.seeded(ids, **own, **case.by_the_base)
        assert torch.equal(case.seeded(ids), want)


# Options of the base's own loop


OPTIONS: dict[str, Any] = {
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
    "output_attentions": True,
    "output_hidden_states": True,
}
"""How the base reads its prompt and what it returns beside the tokens: none of it may change one."""


@every_case
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_loop_change_no_token_or_are_refused(case: Case, name: str) -> None:
    ids = case.prompt(4)
    out = unless_refused(case, name, ids, **{name: OPTIONS[name]})
    if out is not None:
        assert torch.equal(out.sequences, case.repeatable(ids))


# Bad input


@every_case
@pytest.mark.parametrize("argument", ["input_ids", "assistant_input_ids", "reference_input_ids"])
def test_prompts_that_are_empty_or_padded_on_the_right_are_refused(case: Case, argument: str) -> None:
    if argument.replace("input_ids", "model") not in case.models and argument != "input_ids":
        return
    mask_name = argument.replace("input_ids", "attention_mask")
    for ids, mask, message in (
        (torch.full((1, 4), 5), torch.tensor([[1, 1, 1, 0]]), "padded on the right"),
        (torch.full((1, 4), 5), torch.zeros(1, 4, dtype=torch.long), "empty prompt"),
        (torch.full((1, 0), 5), torch.ones(1, 0, dtype=torch.long), "empty prompt"),
    ):
        prompts = {"input_ids": case.prompt(1, 4), argument: ids, mask_name: mask}
        refused(case, f"{argument}.*{message}", prompts.pop("input_ids"), **prompts)


@every_case
def test_without_a_pad_token_one_row_runs_without_a_warning_and_padded_rows_are_refused(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case.world.base, "generation_config", GenerationConfig(eos_token_id=1))
    ids = case.prompt(3)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)

    def warned(call: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # of garbage that other tests left
            call()
        records = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        return records + [str(warning.message) for warning in caught]

    try:
        plain = warned(lambda: case.world.base.generate(ids, attention_mask=ones(ids), max_new_tokens=4))
        assert warned(lambda: case.seeded(ids, max_new_tokens=4)) == plain
    finally:
        logger.removeHandler(caplog.handler)
    _, padded, mask = batch(case)
    refused(case, "pad_token_id", padded, attention_mask=mask)


@every_case
def test_tokenizers_are_asked_for_where_only_they_can_tell(case: Case) -> None:
    ids, want = case.prompt(3), case.repeatable(case.prompt(3))
    for missing in (("tokenizer",), ("assistant_tokenizer",), ("tokenizer", "assistant_tokenizer")):
        out = unless_refused(case, "tokenizer", ids, **dict.fromkeys(missing))
        if case.vocabularies == "one" and out is not None:
            assert torch.equal(out.sequences, want)
        assert case.vocabularies == "one" or out is None


@each(case for case in CASES if case.is_target)
def test_strategies_that_mix_distributions_refuse_two_vocabularies_by_name(case: Case) -> None:
    """Those of other sizes, and those of one size whose ids have other meanings."""
    message = rf"two vocabularies: strategy='{case.strategy}'"
    refused(case, message, case.prompt(3), assistant_tokenizer=letter_tokenizer(64, start="zyxw"))
    other = Case("two", case.way)
    refused(other, message, other.prompt(3))


@pytest.mark.parametrize(
    ("strategy", "field"), [(name, field.name) for name, kind in STRATEGIES.items() for field in fields(kind)]
)
@pytest.mark.parametrize("value", [math.nan, "no such value", b"", object()])
def test_settings_that_cannot_be_are_refused_by_name(strategy: str, field: str, value: Any) -> None:
    value = value.encode() if field == "delimiter" and isinstance(value, str) else value  # any text may be one
    with pytest.raises(wsd_hf.WSDValueError, match=rf"^{field}\b"):
        STRATEGIES[strategy](**{field: value})
