"""State that torch keeps for the whole process or thread changes nothing: every strategy gives what it gives undisturbed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation import BaseStreamer

import wsd_hf
from every_strategy import CASES, Case, each, every_case
from families import tiny_parts, tiny_pilot
from oracle import left_padded
from tokenizers_for_tests import letter_tokenizer


@contextmanager
def setting(change: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.set_default_dtype, dtype, torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype bfloat16": functools.partial(default_dtype, torch.bfloat16),
    "default dtype float16": functools.partial(default_dtype, torch.float16),
    "default dtype float64": functools.partial(default_dtype, torch.float64),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "within a device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),  # leaves models in float64 alone
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "gradients": torch.enable_grad,
}

SWEPT = {"default dtype float16", "within a device"}
"""Those that torch sets as another one."""

every_state = pytest.mark.parametrize(
    "state",
    [pytest.param(state, id=name, marks=[pytest.mark.sweep] if name in SWEPT else []) for name, state in STATES.items()],
)


def tensors(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of an output, and where they are in it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors(entry, f"{name}.{key}")
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{name}[{index}]")


def assert_equal(got: Any, want: Any) -> None:
    got, want = dict(tensors(got)), dict(tensors(want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].device) == (tensor.dtype, tensor.device), name
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


@functools.cache
def prompts(case: Case) -> dict[str, torch.Tensor]:
    """Two prompts of unequal length, made before torch's state changes."""
    ids, mask = left_padded([case.prompt(1), case.prompt(2, length=9)], pad=0)
    return {"ids": ids, "attention_mask": mask}


def call(case: Case, do_sample: bool) -> Any:
    """With a processor that reads the prefix, stop strings, a streamer, and everything that a call can return."""
    torch.manual_seed(7)
    choice: dict[str, Any] = {"do_sample": True, "temperature": 1.5} if do_sample else {"top_k": 1} if case.samples else {}
    if case.engine:
        choice |= {"output_scores": True, "output_logits": True}
    more = {"pad_token_id": 0, "no_repeat_ngram_size": 2, "max_new_tokens": 6, "stop_strings": ["zzz"]}
    streamer = Columns()
    return case.generate(**prompts(case), streamer=streamer, **more, **choice), streamer.columns


class Columns(BaseStreamer):
    """Keeps the columns of a batch, on the CPU."""

    def __init__(self) -> None:
        self.columns: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value.cpu().clone())

    def end(self) -> None:
        pass


undisturbed = functools.cache(call)


@every_case
@every_state
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_every_strategy_gives_what_it_gives_undisturbed(
    case: Case, state: Callable[[], AbstractContextManager[Any]], do_sample: bool, tried: Any
) -> None:
    want = undisturbed(case, do_sample)
    with state():
        got = call(case, do_sample)
    assert_equal(got, want)
    tried("calls in another state of torch")


class EvenSum(StoppingCriteria):
    """Hands over where the drafted ids have an even sum, from the fourth on."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> list[bool]:
        assert bool((scores <= 0).all())
        return [len(row) > 3 and sum(row) % 2 == 0 for row in input_ids.tolist()]


@every_state
@each(case for case in CASES if case.strategy == "wsd")
def test_drafts_end_as_they_do_undisturbed(case: Case, state: Callable[[], AbstractContextManager[Any]], tried: Any) -> None:
    """By a criterion of the caller's, by the limit, and by logits that are no numbers."""

    def call(**kwargs: Any) -> Any:
        output = case.generate(prompts(case)["ids"][-1:], **kwargs)
        return list(tensors(output)), output.switch_reason

    limited = {"wsd_max_draft_tokens": 2, "wsd_threshold": 1.0, "wsd_draft_end": "stop", "pad_token_id": None}
    want = call(switch_criteria=EvenSum()), call(**limited)
    assert [reasons for _, reasons in want] == [["confident"], ["draft_limit"]]
    with state():
        got = call(switch_criteria=EvenSum()), call(**limited)
        with without_numbers(case.world.pilot), pytest.raises(wsd_hf.WSDLogitsError, match="the pilot returned NaN"):
            call()
    for (one, reasons), (other, expected) in zip(got, want, strict=True):
        assert reasons == expected
        assert_equal(dict(one), dict(other))
    tried("calls in another state of torch", 3)


def _fill(module: torch.nn.Module, arguments: Any, output: Any) -> None:
    output.logits.fill_(torch.nan)


@contextmanager
def without_numbers(model: PreTrainedModel) -> Iterator[None]:
    """A model whose logits are NaN."""
    hook = model.register_forward_hook(_fill)
    try:
        yield
    finally:
        hook.remove()


@functools.cache
def shipped() -> Any:
    base, pilot, *tokenizers = tiny_parts()
    return base.double(), pilot.double(), *tokenizers


def chat() -> tuple[list[torch.Tensor], list[Any]]:
    """From messages to a trace, and by a logits processor: tensors, and everything else."""
    base, pilot, tokenizer, assistant_tokenizer = shipped()
    inputs = wsd_hf.build_inputs([{"role": "user", "content": "What does the Keloft eat?"}], tokenizer, assistant_tokenizer)
    output = base.generate(
        **inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=20, return_dict_in_generate=True, output_logits=True
    )
    prompt = {name: inputs.pop(name) for name in ("assistant_input_ids", "assistant_attention_mask")}
    processor = wsd_hf.WSDLogitsProcessor(pilot, **prompt)
    processed = base.generate(**inputs, logits_processor=[processor], max_new_tokens=20)
    trace = wsd_hf.explain(output, tokenizer)
    log_probs = [-0.1, -0.2, -0.3]
    crossed = wsd_hf.switch_index(log_probs, threshold=0.7, window_size=2)
    return [*inputs.values(), output.sequences, processed, wsd_hf.confidence(log_probs, 2)], [trace, crossed]


@every_state
def test_the_way_of_a_chat_is_what_it_is_undisturbed(state: Callable[[], AbstractContextManager[Any]], tried: Any) -> None:
    want = chat()
    with state():
        got = chat()
    assert_equal(got, want)
    assert got[1] == want[1]
    tried("calls in another state of torch", 2)


@pytest.mark.parametrize("state", ["inference mode", "autocast", "cast"])
def test_a_value_goes_on_after_calls_in_another_state(state: str) -> None:
    """What it has read is kept from call to call; keys and values of another precision are not gone on with."""
    tokenizer = letter_tokenizer(64)
    tokenizer.eos_token = "a"
    models = [copy.deepcopy(tiny_pilot("llama", noise=noise)) for noise in (0.15, 0.3)]
    texts, ended = ["gh", "ghijkl", "g"], [False, False, True]
    want = wsd_hf.ImplicitValue(*models, tokenizer, ["bcdef"])(texts, ended)
    value = wsd_hf.ImplicitValue(*models, tokenizer, ["bcdef"])
    with cast(models) if state == "cast" else STATES[state]():
        value(["gh"], [False])
    torch.testing.assert_close(value(texts, ended), want, rtol=0, atol=1e-4)


@contextmanager
def cast(models: list[PreTrainedModel]) -> Iterator[None]:
    """Models in float64 for a while."""
    for model in models:
        model.double()
    yield
    for model in models:
        model.float()
