"""What must hold for every strategy, engine and number of vocabularies when models fail, calls overlap, and rows differ."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel, TextIteratorStreamer
from transformers.generation import BaseStreamer

import wsd_hf
from every_strategy import CASES, Case, counting, every_case, every_long_case, every_model, some
from oracle import left_padded
from test_concurrency import together
from test_fast_path import live_tensors
from test_faults import failing, state
from time_limit import HANG


class Broke(Exception):
    """Not an exception that anybody else raises."""


ERRORS: list[Callable[[], BaseException]] = [
    Broke,
    KeyboardInterrupt,
    lambda: torch.OutOfMemoryError("injected"),
    lambda: RuntimeError("injected"),
    StopIteration,
    lambda: SystemExit(3),
]


class Undisturbed(NamedTuple):
    """A call that nothing interferes with: its prompt, its sequences, and the number of forwards of each model."""

    ids: torch.Tensor
    sequences: torch.Tensor
    forwards: dict[str, int]


@functools.cache
def undisturbed(case: Case) -> Undisturbed:
    """The call that faults are injected into, made once for all tests."""
    ids = case.prompt(1)
    sequences = case.seeded(ids)  # models have passed their self-test before forwards are counted
    with ExitStack() as stack:
        runs = {role: stack.enter_context(counting(model)) for role, model in case.models.items()}
        case.seeded(ids)
    return Undisturbed(ids, sequences, {role: len(run) for role, run in runs.items()})


@contextmanager
def poisoned(model: PreTrainedModel, at: int, value: float) -> Iterator[None]:
    """One logit of every position of the `at`-th forward is `value`; all of them if that is -inf."""
    count = itertools.count(1)

    def poison(module: Any, arguments: Any, output: Any) -> None:
        if next(count) == at:
            output.logits[..., slice(None) if value == -torch.inf else 7] = value

    hook = model.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


# Faults


@every_case
def test_all_models_of_a_call_take_part_in_it(case: Case) -> None:
    """Else the faults below would strike nothing."""
    assert min(undisturbed(case).forwards.values()) >= 2, undisturbed(case).forwards


@every_model
@pytest.mark.parametrize("shift", some(1, len(ERRORS)))
@pytest.mark.parametrize("part", some(1, 3))
def test_an_error_at_any_forward_comes_through_and_leaves_nothing_changed(
    case: Case, role: str, shift: int, part: int, tried: Any
) -> None:
    ids, want, forwards = undisturbed(case)
    before = {name: state(model) for name, model in case.models.items()}
    struck = range(1 + part, forwards[role] + 1, 3)
    for number, at in enumerate(struck, start=shift):
        error, streamer = ERRORS[number % len(ERRORS)](), Concatenates()
        with failing(case.models[role], at, error), pytest.raises(type(error)) as caught:
            case.seeded(ids, streamer=streamer)
        assert caught.value is error
        assert streamer.tokens == want[0, : len(streamer.tokens)].tolist(), "what is streamed is never taken back"
        assert streamer.ends == 1
        assert {name: state(model) for name, model in case.models.items()} == before
        assert torch.is_grad_enabled()
        assert torch.equal(case.seeded(ids), want)
    tried("errors raised in a forward", len(struck))


@pytest.mark.parametrize(
    ("case", "role", "value"),
    [
        pytest.param(case, role, value, id=f"{case}, {role}, {value}", marks=marks)
        for case in CASES
        for infinite in [case.marks_of_long_checks if case.strategy == "wsd" else [pytest.mark.sweep]]
        for value, marks in {torch.nan: case.marks, torch.inf: infinite, -torch.inf: infinite}.items()
        for role in case.roles
    ],
)
@pytest.mark.parametrize("part", some(1, 3))
def test_logits_that_are_no_numbers_raise_wherever_they_are_read(
    case: Case, role: str, value: float, part: int, tried: Any
) -> None:
    (ids, want, forwards), raised = undisturbed(case), 0
    poisoned_forwards = range(1 + part, forwards[role] + 1, 3)
    for at in poisoned_forwards:
        with poisoned(case.models[role], at, value):
            try:
                tokens = case.seeded(ids)
            except wsd_hf.WSDLogitsError:
                raised += 1
            else:  # nothing of this forward's last position was read
                assert torch.equal(tokens, want), f"forward {at}: other tokens"
        assert torch.equal(case.seeded(ids), want)
    assert raised >= 1 or part > 0
    tried("forwards with NaN or infinite logits", len(poisoned_forwards))


class Spoils(LogitsProcessor):
    """One score of every row is `value`; all of them if that is -inf."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([*range(scores.shape[1])] if self.value == -torch.inf else [7]), self.value)


@every_case
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_of_which_none_can_be_drawn_raise_as_in_plain_generate(case: Case, value: float, tried: Any) -> None:
    ids = case.prompt(1)
    kwargs = {"logits_processor": [Spoils(value)], "do_sample": True, **case.by_the_base}
    with pytest.raises((wsd_hf.WSDLogitsError, RuntimeError), match=r"can be drawn at response token|probability tensor"):
        case.seeded(ids, **kwargs)
    tried("scores of which none can be drawn")


@every_case
def test_a_temperature_at_which_logits_overflow_raises_as_in_plain_generate(case: Case, tried: Any) -> None:
    only_base = {"assistant_do_sample": False, **case.by_the_base}
    for sampler in [{}, only_base] if case.switches else [{}]:
        with pytest.raises((wsd_hf.WSDLogitsError, RuntimeError), match=r"temperature|probability tensor"):
            case.seeded(case.prompt(1), **{"do_sample": True, "temperature": 1e-320, "top_k": 0, **sampler})
        tried("scores of which none can be drawn")


@pytest.mark.parametrize("role", ["assistant_model", "reference_model"])
def test_a_value_that_serves_many_searches_forgets_what_a_fault_interrupted(role: str, tried: Any) -> None:
    case = Case("one", "search")
    ids, world = case.prompt(1), case.world
    prompts = [ids[0].tolist()]
    fresh = wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, prompts)
    want = fresh(["bcd", "bce"], [False, True])
    model = case.models[role]
    with counting(model) as run:
        wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, prompts)(["bcd", "bce"], [False, True])
    for at in range(1, len(run) + 1):
        value = wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, prompts)
        with failing(model, at, Broke()), pytest.raises(Broke):
            value(["bcd", "bce"], [False, True])
        assert torch.allclose(value(["bcd", "bce"], [False, True]), want, atol=1e-9)
        with failing(model, 1, Broke()), pytest.raises(Broke):
            value(["bcdfg", "bcefgh"], [False, True])
        assert torch.allclose(value(["bcd", "bce"], [False, True]), want, atol=1e-9)
        tried("errors raised in a forward", 2)


# Streams


class Concatenates(BaseStreamer):
    """Keeps what it is given; raises at the `fails_at`-th token, counted from 0, which is the prompt."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.tokens: list[int] = []
        self.ends = 0
        self._fails_at = fails_at
        self._count = itertools.count()

    def put(self, value: torch.Tensor) -> None:
        if next(self._count) == self._fails_at:
            raise Broke("put")
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


@every_case
@pytest.mark.parametrize("seed", some(3, 20))
def test_a_stream_is_the_sequence_and_changes_nothing(case: Case, seed: int, tried: Any) -> None:
    ids = case.prompt(100 + seed, 3 + seed % 7)
    for do_sample in (True,) if case.samples else (False, True):
        streamer, settings = Concatenates(), {"do_sample": do_sample, "max_new_tokens": 1 + 2 * seed}
        streamed = case.seeded(ids, seed, streamer=streamer, **settings)
        assert streamer.tokens == streamed[0].tolist()
        assert streamer.ends == 1
        assert torch.equal(case.seeded(ids, seed, **settings), streamed)
        tried("streamed responses")


@every_model
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_reader_is_released_when_a_model_fails(case: Case, role: str, at: int, tried: Any) -> None:
    ids, _, forwards = undisturbed(case)
    if at > forwards[role]:
        return
    streamer, raised = TextIteratorStreamer(case.world.tokenizer, timeout=HANG), []

    def write() -> None:
        with failing(case.models[role], at, Broke()), pytest.raises(Broke) as caught:
            case.seeded(ids, streamer=streamer)
        raised.append(caught.value)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    list(streamer)
    thread.join(HANG)
    assert raised
    tried("streamed calls that fail")


REFUSED = {
    "prompt_lookup_num_tokens": 3,
    "synced_gpus": True,
    "assistant_model": "a path",
    "token_healing": True,
    "unheard_of": 1,
}


@every_case
@pytest.mark.parametrize("name", REFUSED)
def test_a_reader_is_released_when_a_call_is_refused(case: Case, name: str, tried: Any) -> None:
    streamer = TextIteratorStreamer(case.world.tokenizer, timeout=HANG)
    with pytest.raises(ValueError, match=f"{name}|decodes greedily"):
        case.generate(case.prompt(1), streamer=streamer, **{name: REFUSED[name]})
    list(streamer)
    tried("streamed calls that are refused")


@every_case
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_of_a_streamer_comes_through(case: Case, at: int, tried: Any) -> None:
    streamer = Concatenates(fails_at=at)
    with pytest.raises(Broke, match="put"):
        case.seeded(case.prompt(1), streamer=streamer)
    assert streamer.ends == 1
    tried("streamers that raise")


@every_case
def test_a_batch_is_refused_by_a_streamer_of_text_and_its_reader_is_released(case: Case) -> None:
    streamer = TextIteratorStreamer(case.world.tokenizer, timeout=HANG)
    with pytest.raises(ValueError, match="batch size 1"):
        case.generate(case.prompt(1).repeat(2, 1), streamer=streamer)
    assert list(streamer) in ([], [""])


# Rows, budgets, seeds


@every_case
@pytest.mark.parametrize("seed", some(1, 30))
def test_every_row_of_a_batch_is_what_it_is_alone(case: Case, seed: int, tried: Any) -> None:
    rng = random.Random(seed)
    rows = [case.prompt(1000 * seed + row, rng.randint(1, 14)) for row in range(rng.randint(2, 5))]
    settings: dict[str, Any] = {"max_new_tokens": rng.randint(1, 16), "pad_token_id": 0}
    if rng.random() < 0.3:
        settings["repetition_penalty"] = 1.3
    if rng.random() < 0.3:
        settings |= {"no_repeat_ngram_size": 2, "suppress_tokens": [0]}  # transformers counts padding as repeated
    if rng.random() < 0.5:
        settings["eos_token_id"] = rng.sample(range(3, 60), 5)
    if rng.random() < 0.3:
        settings["stop_strings"] = ["e", "bc", " t"]
    ids, mask = left_padded(rows, 0)
    together = case.repeatable(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()
    for row, prompt in enumerate(rows):
        alone = case.repeatable(prompt, **settings)[0, prompt.shape[1] :].tolist()
        assert together[row] == alone + [0] * (len(together[row]) - len(alone)), (row, settings)
    tried("rows of a batch, each against itself alone", len(rows))


@every_long_case
@pytest.mark.parametrize("part", some(1, 3))
def test_a_budget_cuts_the_response_and_changes_no_token_before(case: Case, part: int, tried: Any) -> None:
    ids = case.prompt(3)
    longest = case.repeatable(ids, max_new_tokens=24)[0].tolist()
    for budget in range(1 + part, 25, 3):
        assert case.repeatable(ids, max_new_tokens=budget)[0].tolist() == longest[: ids.shape[1] + budget]
    tried("budgets, each against a larger one", 8)


@every_case
@pytest.mark.parametrize("seed", some(1, 10))
def test_a_seed_repeats_a_response_and_greedy_calls_draw_nothing(case: Case, seed: int, tried: Any) -> None:
    ids = case.prompt(200 + seed)
    first, after = case.seeded(ids, seed, do_sample=True), torch.random.get_rng_state()
    assert torch.equal(case.seeded(ids, seed, do_sample=True), first)
    assert torch.equal(torch.random.get_rng_state(), after)
    if not case.samples:
        greedy = case.repeatable(ids)
        assert all(torch.equal(case.repeatable(ids), greedy) for _ in range(3))
        assert torch.equal(torch.random.get_rng_state(), after)
    tried("repeated calls", 1 if case.samples else 5)


# Ids outside of a vocabulary


@every_case
@pytest.mark.parametrize("argument", ["input_ids", "assistant_input_ids", "reference_input_ids"])
def test_a_prompt_with_an_id_that_its_model_lacks_is_refused_before_any_forward(case: Case, argument: str, tried: Any) -> None:
    role = {"input_ids": "base"}.get(argument, argument.replace("input_ids", "model"))
    if role not in case.models:
        return
    size = case.models[role].config.vocab_size
    for token, place in itertools.product((size, 10**6, -1), (0, 2)):
        prompts = {"input_ids": case.prompt(1, 4)}
        bad = torch.full((1, 4), 5)
        bad[0, place] = token
        prompts |= {argument: bad}
        with ExitStack() as stack:
            runs = [stack.enter_context(counting(model)) for model in case.models.values()]
            with pytest.raises(wsd_hf.WSDValueError, match=f"{argument} .*{token}"):
                case.generate(prompts.pop("input_ids"), **prompts)
            assert not any(runs)
        tried("prompts with an id outside the vocabulary")


@every_case
def test_a_pilot_with_a_wider_vocabulary_writes_no_id_that_the_base_lacks(case: Case, tried: Any) -> None:
    pilot = copy.deepcopy(case.world.pilot)
    size = pilot.config.vocab_size
    pilot.resize_token_embeddings(size + 8)
    with torch.no_grad():
        pilot.lm_head.weight[size:] = 0.0
        pilot.lm_head.weight[size + 3] = 50 * pilot.lm_head.weight[:size].mean(dim=0)
        output = pilot(case.prompt(1) % size).logits[0, -1]
        if output.argmax() != size + 3:
            pilot.lm_head.weight[size + 3] *= -1
    known = case.world.base.config.vocab_size
    for seed in range(4):
        with suppress(wsd_hf.WSDValueError):
            assert int(case.seeded(case.prompt(seed), assistant_model=pilot).max()) < known
        tried("calls with a pilot whose vocabulary is wider")


# Calls at the same time, and many after each other


@pytest.mark.parametrize("vocabularies", ["one", "two"])
@pytest.mark.parametrize("seed", some(2, 12))
def test_eight_threads_with_mixed_strategies_equal_serial_calls(vocabularies: str, seed: int, tried: Any) -> None:
    rng = random.Random(seed)
    cases = [case for case in CASES if case.vocabularies == vocabularies]

    def a_call(index: int) -> Callable[[], list[list[int]]]:
        case = cases[(index + 8 * seed) % len(cases)]
        ids = case.prompt(50 * seed + index, 2 + rng.randint(1, 10))
        settings: dict[str, Any] = {"max_new_tokens": rng.randint(3, 12)}
        if rng.random() < 0.3:
            settings["repetition_penalty"] = 1.2
        if rng.random() < 0.3:
            settings["stop_strings"] = ["b", "t "]
        return lambda: case.repeatable(ids, **settings).tolist()

    calls = [a_call(index) for index in range(8)]
    assert together(calls) == [call() for call in calls]
    tried("calls in threads at the same time", 8)


@every_case
def test_calls_that_fail_or_are_refused_disturb_no_other(case: Case, tried: Any) -> None:
    ids = case.prompt(4)

    def good() -> list[list[int]]:
        return case.repeatable(ids, max_new_tokens=8).tolist()

    def refused() -> None:
        with pytest.raises(wsd_hf.WSDValueError, match="num_beams=2"):
            case.repeatable(ids, num_beams=2)

    def broken() -> None:
        with pytest.raises(Broke, match="put"):
            case.repeatable(ids, streamer=Concatenates(fails_at=2))

    want = good()
    assert together([good, refused, broken, good, refused, broken]) == [want, None, None, want, None, None]
    tried("calls in threads at the same time", 6)


@every_long_case
@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.sweep)])
def test_many_calls_leave_nothing_in_memory(case: Case, count: int, tried: Any) -> None:
    ids, models = case.prompt(1), itertools.cycle(case.models.values())

    def call(index: int) -> None:
        if index % 10:
            case.seeded(ids, max_new_tokens=3)
        else:
            with failing(next(models), 1, Broke()), pytest.raises(Broke):
                case.seeded(ids, max_new_tokens=3)

    for index in range(10):
        call(index)
    before = live_tensors()
    for index in range(count):
        call(index)
    gc.collect()
    assert all(now <= then for now, then in zip(live_tensors(), before, strict=True))
    tried("calls in a row, for leaks", count)
