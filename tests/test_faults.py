"""When a model fails or a user interrupts, the error comes through and nothing is left changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

import wsd_hf
from oracle import ones, random_prompt

PROMPT = random_prompt(1, 6)
DRAFTED, BUDGET = 4, 8


class PilotBroke(Exception):
    """Not an exception that anybody else raises."""


def decode(base: PreTrainedModel, pilot: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    """Step by step, where the k-th forward is that of the k-th token; `test_fast_path.py` has the other path's faults."""
    return base.generate(
        PROMPT,
        attention_mask=ones(PROMPT),
        assistant_model=pilot,
        strategy="wsd",
        wsd_engine="step",
        wsd_threshold=1e-9,
        wsd_window_size=DRAFTED,
        max_new_tokens=BUDGET,
        **kwargs,
    )


@contextmanager
def failing(model: PreTrainedModel, at: int, error: BaseException) -> Iterator[None]:
    """The model raises at its `at`-th forward, counted from 1."""
    count = 0

    def fail(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise error

    hook = model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that a call might leave changed."""
    return {
        "class": type(model),
        "generation_config": copy.deepcopy(vars(model.generation_config)),
        "config": model.config.to_dict(),
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "attributes": set(vars(model)),
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
    }


@pytest.mark.parametrize("at", range(1, DRAFTED + 1))
def test_an_error_of_the_pilot_comes_through_and_the_next_call_is_as_the_first(base: Any, pilot: Any, at: int) -> None:
    want = decode(base, pilot)
    error = PilotBroke(at)
    with failing(pilot, at, error), pytest.raises(PilotBroke) as caught:
        decode(base, pilot)
    assert caught.value is error
    assert torch.equal(decode(base, pilot), want)


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("injected"), RuntimeError("injected")])
def test_an_interruption_at_any_forward_leaves_both_models_as_they_were(
    base: Any, pilot: Any, role: str, error: BaseException
) -> None:
    model = {"base": base, "pilot": pilot}[role]
    want = decode(base, pilot)
    before = state(base), state(pilot), torch.is_grad_enabled()
    for at in range(1, (BUDGET if role == "base" else DRAFTED) + 1):
        with failing(model, at, error), pytest.raises(type(error)) as caught:
            decode(base, pilot)
        assert caught.value is error
        assert (state(base), state(pilot), torch.is_grad_enabled()) == before
        assert torch.equal(decode(base, pilot), want)


def test_the_models_run_exactly_as_often_as_the_faults_above_are_placed(base: Any, pilot: Any) -> None:
    stats = decode(base, pilot, return_dict_in_generate=True).stats
    assert (stats.base.forwards, stats.pilot.forwards) == (BUDGET, DRAFTED)


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_a_model_in_training_mode_stays_in_it(own_base: Any, own_pilot: Any, role: str) -> None:
    model = {"base": own_base, "pilot": own_pilot}[role].train()
    decode(own_base, own_pilot)
    assert all(module.training for module in model.modules())


def test_an_error_of_a_callers_processor_comes_through(base: Any, pilot: Any) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise PilotBroke("processor")

    with pytest.raises(PilotBroke, match="processor"):
        decode(base, pilot, logits_processor=[Fails()])


@pytest.mark.parametrize("where", ["stopping_criteria", "switch_criteria"])
def test_an_error_of_a_callers_criterion_comes_through(base: Any, pilot: Any, where: str) -> None:
    class Fails(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            raise PilotBroke("criterion")

    with pytest.raises(PilotBroke, match="criterion"):
        decode(base, pilot, **{where: [Fails()] if where == "stopping_criteria" else Fails()})


def test_every_error_of_this_package_can_be_caught_as_one(base: Any, pilot: Any) -> None:
    with pytest.raises(wsd_hf.WSDError):
        decode(base, None)
    with failing(pilot, 1, PilotBroke()), pytest.raises(PilotBroke) as caught:
        decode(base, pilot)
    assert not isinstance(caught.value, wsd_hf.WSDError)
