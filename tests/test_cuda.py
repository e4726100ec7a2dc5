"""What can only be seen on a CUDA device; skipped without one."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import wsd_hf
from families import PAD
from oracle import left_padded, random_prompt
from test_fast_path import EXACT, both, decode, pair, random_case
from test_faults import PilotBroke, failing
from test_weak_to_strong_search import letters, models
from wsd_hf.engine import cuda_graphs as graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(family: str, noise: float = 0.15) -> tuple[PreTrainedModel, PreTrainedModel]:
    base, pilot = (copy.deepcopy(model).cuda() for model in pair(family, noise))
    return base, pilot


def there(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("family", EXACT)
def test_random_calls_give_what_they_give_step_by_step(family: str, cuda_graphs: bool) -> None:
    rng = random.Random(family)
    models = {noise: on_cuda(family, noise) for noise in (0.05, 0.4)}
    for _ in range(12):
        both(*models[rng.choice([0.05, 0.4])], **there(random_case(rng, padded=True)), wsd_cuda_graphs=cuda_graphs)


def test_forwards_are_captured_and_a_seed_repeats_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: captured.append(1) or capture(*args))
    base, pilot = on_cuda("llama")

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        kwargs = {"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": 24, "wsd_chunk": 3}
        return decode(base, pilot, random_prompt(1, 6).cuda(), **kwargs).sequences.tolist()

    first = draw(5)
    assert [draw(5) for _ in range(4)] == [first] * 4
    assert draw(6) != first
    assert captured


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_models_on_different_devices_write_the_same(role: str) -> None:
    base, pilot = on_cuda("llama")
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], PAD)
    want = both(base, pilot, ids.cuda(), attention_mask=mask.cuda())[0].sequences.tolist()
    where = "cuda"
    if role == "base":
        base, where = wsd_hf.enable_wsd(base.cpu()), "cpu"
    else:
        pilot = pilot.cpu()
    assert both(base, pilot, ids.to(where), attention_mask=mask.to(where))[0].sequences.tolist() == want


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("strategy", ["nudging", "emulated_fine_tuning", "weak_to_strong_search"])
def test_the_neighbours_write_what_they_write_on_a_cpu(strategy: str, apart: bool) -> None:
    settings: dict[str, Any] = {"tokenizer": letters(), "assistant_tokenizer": letters(), "pad_token_id": PAD}
    settings |= {"nudging_threshold": 0.7} if strategy == "nudging" else {}
    settings |= {"top_k": 1, "beam_width": 2} if strategy == "weak_to_strong_search" else {"do_sample": False}

    def write(base: str, small: str) -> Any:
        writer, tuned, untuned = (copy.deepcopy(model) for model in models())
        given = {} if strategy == "nudging" else {"reference_model": untuned.to(small)}
        call = {"max_new_tokens": 20, "return_dict_in_generate": True, **settings, **given}
        ids, mask = (tensor.to(base) for tensor in left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], PAD))
        return writer.to(base).generate(ids, attention_mask=mask, strategy=strategy, assistant_model=tuned.to(small), **call)

    there, here = write("cuda", "cpu" if apart else "cuda"), write("cpu", "cpu")
    assert there.sequences.device.type == "cuda"
    assert there.sequences.tolist() == here.sequences.tolist()
    assert (there.stats.base.forwards, there.stats.pilot.tokens) == (here.stats.base.forwards, here.stats.pilot.tokens)
    if strategy == "weak_to_strong_search":
        torch.testing.assert_close(there.values.cpu(), here.values, rtol=0, atol=1e-3)


def test_peak_memory_is_reported_and_a_thousand_calls_leave_nothing_behind() -> None:
    base, pilot = on_cuda("llama")
    prompt = random_prompt(1, 6).cuda()

    def call(index: int) -> None:
        if index % 10:
            assert decode(base, pilot, prompt, max_new_tokens=4).stats.peak_memory > 0
        else:
            with failing(pilot, 1 + index % 2, PilotBroke()), pytest.raises(PilotBroke):
                decode(base, pilot, prompt, max_new_tokens=4)

    for index in range(50):
        call(index)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for index in range(1000):
        call(index)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
