"""Forwards that are captured and replayed write what they write one by one; buffers are kept, and not for ever."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import recorded
import wsd_hf
from every_strategy import world
from families import PAD, tiny_model
from oracle import left_padded, random_prompt
from test_fast_path import EXACT, PROMPT, Ends, FiresAt, both, decode, pair, random_case
from test_faults import PilotBroke, failing
from test_two_vocabularies import GOLDEN, NOISE, a_call, a_world
from test_two_vocabularies import both as both_of_two
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.speculation.pace import CAPTURED, Price
from wsd_hf.strategies import STRATEGIES

SWEEP = pytest.mark.sweep


class Captures:
    """What was captured, and how often it was replayed."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, function: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> graphs.Graph:
        self.shapes.append(tuple(inputs[0].shape))
        graph = recorded.capture(function, inputs, pool)

        def counted() -> None:
            self.replays += 1
            graph.replay()

        return graphs.Graph(counted, graph.outputs, graph.pool, graph.memory)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captures]:
    """Every model can be captured, and the shelf starts empty."""
    captures = Captures()
    monkeypatch.setattr(graphs, "capture", captures)
    monkeypatch.setattr(graphs, "capturable", lambda model: True)
    monkeypatch.setattr(graphs, "_device_memory", lambda device: 2**40)
    monkeypatch.setattr(graphs, "_SHELF", graphs._Shelf())
    monkeypatch.setattr(graphs, "_REFUSED", weakref.WeakSet())
    yield captures
    gc.collect()


@pytest.mark.parametrize("family", [*EXACT, "opt"])
def test_random_calls_give_what_they_give_step_by_step(family: str, captures: Captures) -> None:
    rng = random.Random(family)
    for _ in range(6):
        both(*pair(family, rng.choice([0.05, 0.15, 0.4])), **random_case(rng, padded=True))
    assert captures.replays > 10


@pytest.mark.parametrize("name", [NOISE[0], NOISE[4], GOLDEN[1]], ids=" ".join)
def test_random_calls_with_two_vocabularies_too(name: tuple[str, str], captures: Captures) -> None:
    rng, world = random.Random(f"captured {name}"), a_world(name)
    for _ in range(4):
        case = a_call(rng, world)
        for _ in range(2):
            both_of_two(world, **case)
    assert captures.replays > 10


@pytest.mark.parametrize("strategy", ["emulated_fine_tuning", "product", "ensemble", "blend"])
def test_targets_too(strategy: str, captures: Captures) -> None:
    models, prefix = world("one"), STRATEGIES[strategy].prefix
    partners = {"assistant_model": models.pilot, "reference_model": models.reference}
    if "reference" not in STRATEGIES[strategy].partners:
        partners.pop("reference_model")
    for seed in range(4):
        rng = random.Random(seed)
        ids, mask = left_padded([random_prompt(seed, 9), random_prompt(seed + 9, rng.randint(1, 9))], PAD)
        settings = {"attention_mask": mask, "max_new_tokens": rng.randint(8, 24), "pad_token_id": PAD, **partners}
        if seed % 2:
            settings |= {"repetition_penalty": 1.3}
        step = models.base.generate(ids, strategy=strategy, **settings, **{f"{prefix}engine": "step"})
        for chunk in (None, 3):
            fast = {f"{prefix}engine": "fast", f"{prefix}chunk": chunk}
            assert torch.equal(models.base.generate(ids, strategy=strategy, **settings, **fast), step)
    assert captures.replays > 10


def test_a_step_is_replayed_from_its_third_time_on(captures: Captures) -> None:
    base, pilot = pair("llama")
    kwargs = {"max_new_tokens": 60, "eos_token_id": None, "wsd_chunk": 4}
    out = both(base, pilot, **kwargs)[0]
    forwards = out.stats.base.forwards + out.stats.pilot.forwards
    assert 0 < len(captures.shapes) <= 5
    assert captures.replays >= forwards - 2 * len(captures.shapes) - 4


def test_later_calls_of_like_shape_replay_what_was_captured(captures: Captures) -> None:
    base, pilot = pair("llama")
    first = decode(base, pilot, wsd_chunk=2)
    for _ in range(3):
        decode(base, pilot, wsd_chunk=2)
    captured = len(captures.shapes)
    for seed in range(4):
        both(base, pilot, random_prompt(seed, 6), wsd_chunk=2)
    assert len(captures.shapes) == captured
    assert decode(base, pilot, wsd_chunk=2).sequences.tolist() == first.sequences.tolist()


def test_the_prompt_is_not_captured(captures: Captures) -> None:
    base, pilot = pair("llama")
    for _ in range(3):
        decode(base, pilot, random_prompt(1, 40))
    assert max(shape[1] for shape in captures.shapes) <= graphs.WIDEST


def test_sampling_with_a_seed_is_repeated_after_capture(captures: Captures) -> None:
    base, pilot = pair("llama")

    def draw() -> list[list[int]]:
        torch.manual_seed(5)
        kwargs = {"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": 24, "wsd_chunk": 3}
        return decode(base, pilot, **kwargs).sequences.tolist()

    first = draw()
    assert [draw() for _ in range(4)] == [first] * 4
    assert captures.replays


def test_other_sampling_settings_are_not_replayed_from_what_was_captured(captures: Captures) -> None:
    base, pilot = pair("llama")
    kwargs = {"do_sample": True, "switch_criteria": FiresAt(20), "wsd_chunk": 3, "max_new_tokens": 20}
    for _ in range(3):
        decode(base, pilot, temperature=50.0, **kwargs)
    with_one = decode(base, pilot, top_k=1, **kwargs).sequences
    greedy = decode(base, pilot, **(kwargs | {"do_sample": False})).sequences
    assert with_one.tolist() == greedy.tolist()


def test_a_call_that_fails_leaves_no_buffers_to_the_next(captures: Captures) -> None:
    base, pilot = pair("llama")
    want = decode(base, pilot).sequences
    graphs._SHELF._kept.clear()
    for at in (1, 2):
        with failing(base, at, PilotBroke()), pytest.raises(PilotBroke):
            decode(base, pilot)
        assert not graphs._SHELF._kept
        assert torch.equal(decode(base, pilot).sequences, want)
        graphs._SHELF._kept.clear()


def test_rows_that_have_ended_stay_in_the_batch_and_disturb_nobody(captures: Captures) -> None:
    base, pilot = pair("llama")
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(6)], PAD)
    for _ in range(3):
        both(base, pilot, ids, attention_mask=mask, max_new_tokens=24, stopping_criteria=[Ends(*range(0, 60, 7))])


def test_weights_that_have_moved_are_not_read_where_they_were(captures: Captures) -> None:
    base, pilot = pair("llama")
    base = wsd_hf.enable_wsd(copy.deepcopy(base))
    for _ in range(3):
        decode(base, pilot)
    assert len(graphs._SHELF._kept) == 2
    for weight in base.parameters():
        weight.data = weight.data.flip(0) if weight.ndim == 1 else weight.data * 0.7
    both(base, pilot)
    assert len(graphs._SHELF._kept) == 2


def test_what_is_kept_goes_with_its_model_and_is_bounded(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pilot = pair("llama")
    decode(wsd_hf.enable_wsd(copy.deepcopy(base)), copy.deepcopy(pilot))
    gc.collect()
    decode(base, pilot)
    assert [kept[0]() for kept in graphs._SHELF._kept] == [pilot, base]
    memory = graphs._SHELF._kept[0][2].memory + graphs._SHELF._kept[1][2].memory
    monkeypatch.setattr(graphs, "_device_memory", lambda device: int(2.5 * memory / graphs.SHARE))
    for rows in (1, 1, 2, 4, 1):
        decode(base, pilot, PROMPT.repeat(rows, 1))
        assert sum(kept[2].memory for kept in graphs._SHELF._kept) <= 2.5 * memory


def test_budgets_may_differ_between_calls_that_share_what_was_captured(captures: Captures) -> None:
    base, pilot = pair("llama")
    for budget in (8, 8, 8, 60, 3, 40):
        both(base, pilot, max_new_tokens=budget, eos_token_id=None, wsd_chunk=3)
    assert captures.replays


def test_buffers_made_in_inference_mode_stay_there(captures: Captures) -> None:
    base, pilot = pair("llama")
    with torch.inference_mode():
        decode(base, pilot, max_new_tokens=1)
    for _ in range(3):
        both(base, pilot)


def test_graphs_can_be_switched_off(captures: Captures) -> None:
    base, pilot = pair("llama")
    for _ in range(3):
        decode(base, pilot, wsd_cuda_graphs=False)
    assert not captures.shapes
    assert not graphs._SHELF._kept


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far that tell of models without graphs."""
    monkeypatch.setattr(graphs.logger.parent, "propagate", True)
    graphs.logger.warning_once.cache_clear()
    return lambda: [record.message for record in caplog.records if "without CUDA graphs" in record.message]


def test_a_model_whose_capture_failed_runs_eagerly_from_then_on(
    captures: Captures, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    tried = []

    def refuse(*args: Any) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    for budget in (30, 30, 40):
        both(*pair("llama"), max_new_tokens=budget)
    assert len(tried) == 2  # once for each model
    assert not graphs._SHELF._kept
    assert len(warnings()) == 1
    monkeypatch.setattr(graphs, "capture", captures)
    for _ in range(2):
        both(*pair("qwen3"))
    assert captures.replays


def test_experts_that_are_chosen_on_the_host_are_not_captured(captures: Captures, warnings: Callable[[], list[str]]) -> None:
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        base, pilot = (copy.deepcopy(model) for model in pair("mixtral"))
        for model in (base, pilot):
            model.set_experts_implementation(implementation)
        for _ in range(2):
            both(wsd_hf.enable_wsd(base), pilot)
        assert bool(captures.replays) == (implementation == "batched_mm")
    assert len(warnings()) == 2


@pytest.mark.parametrize("family", ["falcon", "gemma", "gemma2", "qwen2"])
def test_further_families_are_captured(family: str, captures: Captures, warnings: Callable[[], list[str]]) -> None:
    for _ in range(2):
        both(*pair(family))
    assert captures.replays
    assert not warnings()


@pytest.mark.parametrize("operation", ["item", "nonzero", "mask", "host", "random", "unknown"])
def test_a_forward_that_cannot_be_captured_is_never_tried(
    operation: str, captures: Captures, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    base, pilot = (copy.deepcopy(model) for model in pair("llama"))
    base = wsd_hf.enable_wsd(base)
    layer = base.model.layers[0].mlp
    forward = layer.forward

    def odd(states: torch.Tensor) -> torch.Tensor:
        if operation == "item":
            states.sum().item()
        elif operation == "nonzero":
            states.nonzero()
        elif operation == "mask":
            states[states > 0]
        elif operation == "host":
            states.to("meta")
        elif operation == "random":
            torch.nn.functional.dropout(states)
        else:
            torch.ops.transformers.grouped_mm_fallback(states[0], states.new_ones(1, 32, 4), torch.tensor([states.shape[1]]))
        return forward(states)

    monkeypatch.setattr(layer, "forward", odd)
    both(base, pilot, max_new_tokens=30)
    assert len(warnings()) == 1
    captured = len(captures.shapes)
    both(base, base, max_new_tokens=30)
    assert len(captures.shapes) == captured


@pytest.mark.parametrize("warper", [{"top_h": 0.6}, {"eta_cutoff": 0.05}])
def test_a_choice_that_waits_for_the_device_leaves_the_forward_captured(
    warper: dict[str, float], captures: Captures, warnings: Callable[[], list[str]]
) -> None:
    base, pilot = pair("llama")

    def write(**kwargs: Any) -> list[list[int]]:
        torch.manual_seed(3)
        return decode(base, pilot, do_sample=True, max_new_tokens=30, **warper, **kwargs).sequences.tolist()

    want = write(wsd_cuda_graphs=False)
    assert [write() for _ in range(3)] == [want] * 3
    assert captures.replays
    assert not warnings()


@pytest.mark.parametrize(
    "sampling", [{"do_sample": True}, *(pytest.param(other, marks=SWEEP) for other in ({}, {"do_sample": True, "top_p": 0.9}))]
)
def test_a_seed_gives_the_same_response_with_graphs_and_without(sampling: dict[str, Any], captures: Captures) -> None:
    base, pilot = pair("llama")

    def write(seed: int, cuda_graphs: bool) -> list[list[int]]:
        torch.manual_seed(seed)
        return decode(base, pilot, max_new_tokens=40, wsd_cuda_graphs=cuda_graphs, **sampling).sequences.tolist()

    for seed in range(6):
        assert write(seed, True) == write(seed, False)
    assert captures.replays


@pytest.mark.parametrize("noise", [0.15, pytest.param(0.02, marks=SWEEP), pytest.param(0.4, marks=SWEEP)])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_first_call_captures_few_shapes(
    noise: float, do_sample: bool, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pilot = pair("llama", noise)
    prices = {base: Price(0.0, 1.0, CAPTURED), pilot: Price(0.0, 0.05, CAPTURED)}
    monkeypatch.setattr(Price, "of", lambda model, captured: prices[model])
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 256, "eos_token_id": None, "wsd_chunk": None, "wsd_threshold": 0.3, "wsd_window_size": 6}
    decode(base, pilot, random_prompt(1, 64), do_sample=do_sample, **kwargs)
    assert 0 < len(captures.shapes) <= 16


def test_graphs_are_destroyed_at_once_but_never_during_a_capture(captures: Captures) -> None:
    class FakeGraph:
        held = False

        def reset(self) -> None:
            assert not self.held
            destroyed.append(self)

    destroyed: list[FakeGraph] = []
    first, second = FakeGraph(), FakeGraph()
    graphs._drop(first)
    assert destroyed == [first]
    FakeGraph.held = True
    with graphs._CAPTURING:
        graphs._drop(second)
    FakeGraph.held = False
    graphs._destroy_dropped()
    assert destroyed == [first, second]


def test_a_value_that_the_host_asks_for_would_have_been_found() -> None:
    with pytest.raises(RuntimeError, match="waits for the device"):
        recorded.capture(lambda tokens: tokens * int(tokens.sum()), (torch.ones(2, 2),), None)


@pytest.mark.parametrize("hooked", ["forward hook", "training", "compiled", "compiled forward", "compiled layer", "elsewhere"])
def test_a_model_whose_forward_may_change_is_not_captured(hooked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda self, recurse=True: iter(()))
    assert graphs.capturable(model)
    if hooked == "forward hook":
        model.model.layers[0].register_forward_hook(lambda *args: None)
    elif hooked == "training":
        model.train()
    elif hooked == "compiled":
        model.model.layers[0].compile(backend="eager")
    elif hooked == "compiled forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif hooked == "compiled layer":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    else:
        monkeypatch.setattr(torch.nn.Module, "parameters", lambda self, recurse=True: iter([torch.nn.Parameter(torch.ones(1))]))
    assert not graphs.capturable(model)
