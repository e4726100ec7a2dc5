"""What can only be seen on a CUDA device; skipped without one."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import wsd_hf
from families import PAD
from oracle import left_padded, random_prompt
from test_concurrency import together
from test_fast_path import EXACT, ROUNDED, UNPADDED, both, decode, pair, random_case
from test_faults import PilotBroke, failing
from test_weak_to_strong_search import letters, models
from wsd_hf import Diagnosis, _compat
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.strategies import STRATEGIES
from wsd_hf.tiny import demo_questions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SERVED = [*EXACT, *ROUNDED, *UNPADDED, "falcon", "gemma", "opt", "qwen2"]
SLACK = 2**20  # bytes
DEVICES = ["cuda:0", "cuda:1"]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


UNCAPTURED = {"falcon"}
"""Families that can't be captured: lists as indices are copied from the host."""


def on_cuda(family: str = "llama", noise: float = 0.15, device: str = "cuda") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pair of its own, in float64."""
    models = [copy.deepcopy(model) for model in pair(family, noise)]
    for model in models:
        if family in ROUNDED:
            model.set_experts_implementation("batched_mm")  # which takes float64, and doesn't wait for the device
    base, pilot = (model.double().to(device) for model in models)
    return wsd_hf.enable_wsd(base), pilot


def there(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], PAD)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graphs.Graph]]:
    """What is captured; models that run without graphs must be among those that a test expects."""
    captured: list[graphs.Graph] = []
    capture = graphs.capture

    def kept(*args: Any) -> graphs.Graph:
        captured.append(capture(*args))
        return captured[-1]

    monkeypatch.setattr(graphs, "capture", kept)
    monkeypatch.setattr(graphs, "_SHELF", graphs._Shelf())
    yield captured
    captured.clear()
    gc.collect()


# The same tokens


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("family", SERVED)
def test_random_calls_give_what_they_give_step_by_step(family: str, cuda_graphs: bool, captured: list[graphs.Graph]) -> None:
    rng = random.Random(family)
    pairs = [on_cuda(family, noise) for noise in (0.05, 0.4)]
    for index in range(6):
        case = random_case(rng, padded=family not in UNPADDED)
        both(*pairs[index % 2], **there(case), wsd_cuda_graphs=cuda_graphs)
    captures = cuda_graphs and family not in UNCAPTURED
    assert bool(captured) == captures
    assert captures or not cuda_graphs or all(model in graphs._REFUSED for models in pairs for model in models)


@pytest.mark.parametrize("strategy", ["two_way", "emulated_fine_tuning", "product", "ensemble", "blend"])
def test_rules_that_are_drafted_give_what_they_give_step_by_step(strategy: str, captured: list[graphs.Graph]) -> None:
    base, pilot = on_cuda()
    kind, keyword = STRATEGIES[strategy], STRATEGIES[strategy].prefix
    settings = {"assistant_model": pilot, "max_new_tokens": 40, "pad_token_id": PAD, "do_sample": False, "strategy": strategy}
    if "reference" in kind.partners:
        settings["reference_model"] = on_cuda(noise=0.4)[1]
    if strategy == "two_way":
        settings |= {"two_way_threshold": 0.15, "two_way_window_size": 2, "two_way_handback_threshold": 0.05}
    for seed in range(4):
        ids, mask = left_padded([random_prompt(seed, 9), random_prompt(seed + 9, 5)], PAD)
        inputs = {"inputs": ids.cuda(), "attention_mask": mask.cuda(), **settings}
        step = base.generate(**inputs, **{f"{keyword}engine": "step"})
        for options in ({}, {"chunk": 3}, {"speculate": "ngram"}):
            fast = {f"{keyword}{name}": value for name, value in {"engine": "fast", **options}.items()}
            assert torch.equal(base.generate(**inputs, **fast), step)
    assert captured


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_in_float32_gives_what_it_gives_step_by_step(attention: str, captured: list[graphs.Graph]) -> None:
    rng = random.Random(attention)
    base, pilot = (model.float() for model in on_cuda("llama"))
    for model in (base, pilot):
        model.set_attn_implementation(attention)
    for _ in range(6):
        both(base, pilot, **there(random_case(rng, padded=True)))
    assert captured


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_h": 0.6}]
)
def test_a_seed_repeats_a_response_with_graphs_and_without(sampling: dict[str, Any], captured: list[graphs.Graph]) -> None:
    base, pilot = on_cuda()

    def write(seed: int, cuda_graphs: bool = True) -> list[list[int]]:
        torch.manual_seed(seed)
        kwargs = {"max_new_tokens": 32, "wsd_cuda_graphs": cuda_graphs, **sampling}
        return decode(base, pilot, random_prompt(1, 6).cuda(), **kwargs).sequences.tolist()

    first = write(5, cuda_graphs=False)
    assert [write(5) for _ in range(4)] == [first] * 4
    assert (write(6) != first) == bool(sampling)
    assert captured


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda:1", marks=TWO)])
def test_models_on_different_devices_write_the_same(role: str, other: str) -> None:
    base, pilot = on_cuda()
    ids, mask = rows()
    want = both(base, pilot, ids.cuda(), attention_mask=mask.cuda())[0].sequences.tolist()
    model = base if role == "base" else pilot
    model.to(other)
    where = other if role == "base" else "cuda"
    for _ in range(2):
        assert both(base, pilot, ids.to(where), attention_mask=mask.to(where))[0].sequences.tolist() == want


@TWO
def test_graphs_are_captured_on_a_device_that_is_not_the_current_one(captured: list[graphs.Graph]) -> None:
    ids, mask = rows()
    outputs = []
    for device in DEVICES:
        base, pilot = on_cuda(device=device)
        for _ in range(2):
            outputs.append(both(base, pilot, ids.to(device), attention_mask=mask.to(device))[0].sequences.tolist())
    assert outputs == [outputs[0]] * 4
    assert {
        graph.outputs.device if isinstance(graph.outputs, torch.Tensor) else graph.outputs[0].device for graph in captured
    } == {torch.device(device) for device in DEVICES}


def test_a_diagnosis_is_that_of_a_cpu() -> None:
    def diagnosis(device: str) -> Diagnosis:
        one = wsd_hf.Pair.tiny("pilot_other_vocab")
        one.base.double().to(device)
        one.pilot.double().to(device)
        return wsd_hf.diagnose(one, demo_questions()[:4], max_draft_tokens=24, batch_size=2)

    there, here = diagnosis("cuda"), diagnosis("cpu")
    for one, other in zip([*there.drafts, *there.own], [*here.drafts, *here.own], strict=True):
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert one.entropies == pytest.approx(other.entropies, abs=1e-4)
    assert there.grid() == here.grid()
    assert all(reading.seconds > 0 for reading in there.drafts)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("strategy", ["wsd", "nudging", "emulated_fine_tuning", "weak_to_strong_search"])
def test_every_strategy_writes_what_it_writes_on_a_cpu(strategy: str, apart: bool) -> None:
    settings: dict[str, Any] = {"tokenizer": letters(), "assistant_tokenizer": letters(), "pad_token_id": PAD}
    settings |= {"nudging_threshold": 0.7} if strategy == "nudging" else {}
    drafted = {"wsd": "wsd_chunk", "emulated_fine_tuning": "eft_chunk"}  # a pace of one's own differs from device to device
    settings |= {drafted[strategy]: 3} if strategy in drafted else {}
    settings |= {"top_k": 1, "beam_width": 2} if strategy == "weak_to_strong_search" else {"do_sample": False}
    alone = strategy in ("wsd", "nudging")

    def write(base: str, small: str) -> Any:
        writer, tuned, untuned = (copy.deepcopy(model) for model in models())
        given = {} if alone else {"reference_model": untuned.to(small)}
        call = {"max_new_tokens": 20, "return_dict_in_generate": True, **settings, **given}
        ids, mask = (tensor.to(base) for tensor in rows())
        return writer.to(base).generate(ids, attention_mask=mask, strategy=strategy, assistant_model=tuned.to(small), **call)

    there, here = write("cuda", "cpu" if apart else "cuda"), write("cpu", "cpu")
    assert there.sequences.device.type == "cuda"
    assert there.sequences.tolist() == here.sequences.tolist()
    assert (there.stats.base.forwards, there.stats.pilot.tokens) == (here.stats.base.forwards, here.stats.pilot.tokens)
    if strategy == "weak_to_strong_search":
        torch.testing.assert_close(there.values.cpu(), here.values, rtol=0, atol=1e-3)


# Captures


def breaks_in_a_capture(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, how: str) -> None:
    """A forward that is harmless except in a capture."""
    layer = model.model.layers[0].mlp
    forward = layer.forward

    def breaking(states: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            if how == "waits":
                states.sum().item()
            elif how == "draws":
                torch.rand(3, device=states.device)
            else:
                raise RuntimeError("no capture, please")
        return forward(states)

    monkeypatch.setattr(layer, "forward", breaking)


@pytest.mark.parametrize("how", ["waits", "draws", "raises"])
def test_a_capture_that_fails_leaves_everything_usable(
    how: str, monkeypatch: pytest.MonkeyPatch, captured: list[graphs.Graph]
) -> None:
    ids = random_prompt(1, 6).cuda()
    want = both(*on_cuda(), ids, max_new_tokens=30)[0].sequences.tolist()
    used = []
    for _ in range(6):
        base, pilot = on_cuda()
        with monkeypatch.context() as patch:
            breaks_in_a_capture(patch, base, how)
            assert both(base, pilot, ids, max_new_tokens=30)[0].sequences.tolist() == want
        assert base in graphs._REFUSED or how == "draws"  # which torch 2.11 refuses, and 2.13 captures
        assert pilot not in graphs._REFUSED
        assert gc.isenabled()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.manual_seed(0)
        torch.multinomial(torch.ones(8, device="cuda"), 4)
        decode(base, pilot, ids, do_sample=True, max_new_tokens=20)
        captured.clear()
        del base, pilot
        gc.collect()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1] + SLACK
    torch.cuda.synchronize()


def test_threads_capture_sample_and_replay_side_by_side(captured: list[graphs.Graph]) -> None:
    ids = random_prompt(1, 6).cuda()
    want = both(*on_cuda(), ids, max_new_tokens=24)[0].sequences.tolist()
    sampler, done = on_cuda(), threading.Event()

    def capturing() -> None:
        try:
            for _ in range(6):
                models = on_cuda()
                assert decode(*models, ids, max_new_tokens=24).sequences.tolist() == want
                assert not any(model in graphs._REFUSED for model in models)
        finally:
            done.set()

    def sampling() -> None:
        while not done.is_set():
            decode(*sampler, ids, do_sample=True, max_new_tokens=24)

    def collecting() -> None:
        while not done.wait(0.01):
            gc.collect()

    together([capturing, sampling, collecting])
    assert not any(model in graphs._REFUSED for model in sampler)


def test_calls_in_threads_equal_calls_one_after_the_other() -> None:
    base, pilot = on_cuda()

    def task(index: int) -> Callable[[], list[list[int]]]:
        prompt = random_prompt(index, 4 + index).cuda()
        return lambda: decode(base, pilot, prompt, max_new_tokens=10 + index).sequences.tolist()

    alone = [task(index)() for index in range(4)]
    for _ in range(3):
        assert together([task(index) for index in range(4)]) == alone


# Serving


def test_requests_at_once_are_answered_as_alone_on_a_cpu() -> None:
    import anyio

    from wsd_hf.serving.local import LocalAnswerer
    from wsd_hf.serving.requests import ChatRequest, Piece

    chats = [question["messages"] for question in demo_questions()[:24]]
    pair = wsd_hf.Pair.tiny(dtype=torch.float64)
    want = pair.answers(pair.generate(chats, max_new_tokens=48))
    answerer = LocalAnswerer(wsd_hf.Pair.tiny(dtype=torch.float64, device_map="cuda"), batch_size=8)
    answers: dict[int, str] = {}

    async def ask(number: int) -> None:
        text = ""
        async for part in answerer.answer(ChatRequest(chats[number], wsd_hf.WSDConfig(), max_tokens=48)):
            text += part.text if isinstance(part, Piece) else ""
            if number % 5 == 4:  # this client leaves
                return
        answers[number] = text

    async def ask_all() -> None:
        async with anyio.create_task_group() as group:
            for number in range(len(chats)):
                group.start_soon(ask, number)

    for _ in range(3):  # the second time, forwards are graphs
        answers.clear()
        anyio.run(ask_all)
        assert answers == {number: text for number, text in enumerate(want) if number % 5 != 4}


# Training of a pilot


@pytest.mark.parametrize(
    "settings", [{"lora_rank": 0}, {"lora_rank": 4, "objective": "dpo+sft"}], ids=["all weights", "adapter, both objectives"]
)
def test_a_pilot_is_trained_as_on_a_cpu(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason='no TRL: pip install "wsd_hf[train]"')
    from test_training import PAIRS, QUICK, UNTUNED, stopped_at, write

    data = write(tmp_path / "data.jsonl", [{**pair, "drafted": 30} for pair in PAIRS[:8]])
    recipe = dataclasses.replace(QUICK, epochs=4, **settings)

    def run(name: str, **options: Any) -> Any:
        return wsd_hf.training.train_pilot(UNTUNED, data, tmp_path / name, recipe=recipe, **options)

    there, here = run("cuda", device="cuda"), run("cpu")
    stopped_at(5, lambda report: run("stopped", device="cuda", report=report))
    resumed = run("stopped", device="cuda")
    for tuned in (here, resumed):
        losses = [[step["loss"] for step in one.losses] for one in (there, tuned)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert there.log_prob_after > there.log_prob_before + 0.02
    assert there.log_prob_after == pytest.approx(here.log_prob_after, rel=0.02)
    model, _ = wsd_hf.load_pilot(there.folder, device_map="cuda")
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]], device="cuda")).logits).all())


# Memory


def test_peak_memory_is_reported_and_a_thousand_calls_leave_nothing_behind() -> None:
    base, pilot = on_cuda()
    prompt = random_prompt(1, 6).cuda()

    def call(index: int) -> None:
        if index % 10:
            assert decode(base, pilot, prompt, max_new_tokens=4).stats.peak_memory > 0
        else:
            with failing(pilot, 1 + index % 20 // 10, PilotBroke()), pytest.raises(PilotBroke):
                decode(base, pilot, prompt, max_new_tokens=4)

    def memory() -> tuple[int, int]:
        gc.collect()
        torch.cuda.empty_cache()  # memory of graphs that are gone stays reserved until then
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for index in range(60):
        call(index)
    allocated, reserved = memory()
    for index in range(1000):
        call(index)
    assert memory()[0] <= allocated + SLACK
    assert memory()[1] <= reserved + 64 * SLACK


def test_memory_that_torch_frees_is_not_written_to() -> None:
    base, pilot = on_cuda()
    prompt = random_prompt(1, 6).cuda()
    want = decode(base, pilot, prompt).sequences.tolist()
    assert all(decode(base, pilot, prompt).sequences.tolist() == want for _ in range(2))
    with _compat.workspaces_of_their_own():  # frees those of the process, as torch.compile does
        torch.cuda.empty_cache()
    taken = torch.full((2**28,), 7, dtype=torch.int8, device="cuda")
    assert decode(base, pilot, prompt).sequences.tolist() == want
    assert bool((taken == 7).all())


def test_models_that_are_gone_leave_nothing_behind() -> None:
    def use() -> int:
        decode(*on_cuda(), random_prompt(1, 6).cuda(), max_new_tokens=20)
        gc.collect()
        return torch.cuda.memory_allocated()

    used = [use() for _ in range(8)]
    assert used[-1] <= used[1] + SLACK
