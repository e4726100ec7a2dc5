"""Many threads, one pair of models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

import wsd_hf
from oracle import ones, random_prompt
from time_limit import HANG


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Runs every task in a thread of its own, all let go at once; raises what any of them raised."""
    barrier = threading.Barrier(len(tasks), timeout=HANG)
    results: list[Any] = [None] * len(tasks)

    def work(index: int) -> None:
        try:
            barrier.wait()
            results[index] = tasks[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive(), "a thread hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def task(base: PreTrainedModel, pilot: PreTrainedModel, index: int, **kwargs: Any) -> Callable[[], Any]:
    prompt = random_prompt(index, 4 + index)

    def run() -> Any:
        out = base.generate(
            prompt,
            attention_mask=ones(prompt),
            assistant_model=pilot,
            strategy="wsd",
            wsd_threshold=(0.1, 0.15, 0.3, 0.5)[index % 4],
            wsd_window_size=1 + index % 3,
            max_new_tokens=10,
            return_dict_in_generate=True,
            **kwargs,
        )
        return out.sequences.tolist(), out.draft_length.tolist(), out.switch_reason, out.stats

    return run


def test_eight_threads_on_one_pair_equal_serial_calls(base: Any, pilot: Any) -> None:
    tasks = [task(base, pilot, index) for index in range(8)]
    serial = [run() for run in tasks]
    assert len({tuple(result[1]) for result in serial}) >= 3, "the calls should switch at different steps"
    for _ in range(3):
        assert together(tasks) == serial


def test_threads_may_share_one_switch_criterion_and_one_config(base: Any, pilot: Any) -> None:
    shared = {"switch_criteria": wsd_hf.SwitchCriteria(0.15, 2), "assistant_do_sample": False}
    tasks = [task(base, pilot, index, **shared) for index in range(4)]
    assert together(tasks) == [run() for run in tasks]


def test_a_call_that_fails_disturbs_no_other(base: Any, pilot: Any) -> None:
    good = task(base, pilot, 1)

    def refused() -> None:
        with pytest.raises(wsd_hf.WSDValueError, match="strategy"):
            task(base, pilot, 3, num_beams=2)()

    want = good()
    results = together([good, refused, good, refused])
    assert results == [want, None, want, None]
