"""Calls in two processes of torch.distributed, which share weights or forwards by gloo: their answers are those of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock

import two_processes
import wsd_hf
from every_strategy import world
from oracle import random_prompt
from wsd_hf.files import write_whole

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)

SECONDS = 480
"""Time limit of both processes, on a busy machine."""

Answers = dict[str, Any]


class Runs(NamedTuple):
    """Answers to the calls of each rank, by the name of the call."""

    alone: list[Answers]
    together: list[Answers]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.sweep)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The calls of both ranks, which the first of several test processes makes for all."""
    own = tmp_path_factory.getbasetemp()
    made = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"two-{request.param}.json"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            write_whole(made, json.dumps(two_runs(tmp_path_factory.mktemp("two"), request.param)))
    return Runs(*json.loads(made.read_text("utf-8")))


def two_runs(folder: Path, number: str) -> Runs:
    """The calls of both ranks in one process each after the other, and in two processes."""
    two_processes.save_models(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(two_processes.__file__)), str(folder), str(rank), number],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        world.cache_clear()  # so that no earlier test has a part in these models
        alone = [two_processes.answers(two_processes.calls(folder, rank, number == "few", together=False)) for rank in (0, 1)]
        for process in processes:
            assert process.wait(SECONDS) == 0
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    files = [(folder / f"{rank}.json").read_text("utf-8") for rank in (0, 1)]
    return Runs(alone, [json.loads(text) for text in files])


def chosen(runs: Runs, *words: str) -> list[tuple[str, int]]:
    """The calls of each rank whose names contain some words."""
    names = [(name, rank) for rank in (0, 1) for name in runs.alone[rank] if all(word in name for word in words)]
    assert names
    return names


def test_unequal_work_on_sharded_weights_is_as_in_one_process(runs: Runs) -> None:
    calls = chosen(runs, "sharded: ", "unequal work")
    for name, rank in calls:
        assert "sequences" in runs.alone[rank][name], runs.alone[rank][name]
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)
    lengths = {len(runs.together[rank][name]["sequences"][0]) for name, rank in calls}
    assert min(lengths) < max(lengths) - 10


def test_equal_work_needs_no_joint_forwards(runs: Runs) -> None:
    for name, rank in chosen(runs, "sharded: ", "synced_gpus=False"):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)


def test_whole_weights_with_synced_gpus(runs: Runs) -> None:
    for name, rank in chosen(runs, "whole: "):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)


def test_a_model_with_a_state_in_its_layers_is_refused(runs: Runs) -> None:
    for name, rank in chosen(runs, "state in layers: "):
        assert "sequences" in runs.alone[rank][name], runs.alone[rank][name]
        kind, text = runs.together[rank][name]
        assert kind == "WSDValueError"
        assert text.startswith("RecurrentGemmaForCausalLM keeps a state in its layers")


def test_an_error_of_one_rank_lets_the_other_finish(runs: Runs) -> None:
    """Both make their next calls together, or these would not be those of one process."""
    for name, rank in chosen(runs, "fault: "):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)
        assert isinstance(runs.together[rank][name], list) == (rank == 1), (name, rank)
    causes = {
        "a processor fails": ["ArithmeticError", "a processor of the caller's failed"],
        "an interrupt": ["KeyboardInterrupt", "stopped"],
    }
    for cause, error in causes.items():
        for engine in ("fast", "step"):
            assert runs.together[1][f"fault: wsd {engine}, {cause}"] == error
    assert "NaN" in runs.together[1]["fault: wsd fast, logits are NaN"][1]


def test_an_error_in_a_forward_puts_the_ranks_out_of_step(runs: Runs) -> None:
    first, second = runs.together
    assert second["in a forward: it fails"] == ["OutOfMemoryError", "no memory is left"]
    assert isinstance(first["in a forward: it fails"], list)  # by torch, once the second process has ended
    for answers in runs.together:
        kind, text = answers["in a forward: the next call"]
        assert kind == "WSDValueError"
        assert text.startswith("an earlier call failed in the middle of a forward")


def test_ranks_that_lose_each_other_after_a_call_are_out_of_step(
    own_base: Any, own_pilot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has its answer, and the other fails in a forward that both run."""

    def agree(turns: Any, place: int) -> int:
        if place == len(turns._models):
            raise ConnectionError("the other process has ended")
        return place

    monkeypatch.setattr("wsd_hf.engine.joint_calls._Turns._agree", agree)
    for module in ("joint_calls", "preparation"):
        monkeypatch.setattr(f"wsd_hf.engine.{module}.process_count", lambda: 2)
    for error, message in ((ConnectionError, "the other process has ended"), (wsd_hf.WSDValueError, "an earlier call failed")):
        with pytest.raises(error, match=message):
            own_base.generate(
                random_prompt(0, 6), strategy="wsd", assistant_model=own_pilot, synced_gpus=True, max_new_tokens=4
            )


def test_a_logits_processor_with_a_whole_pilot(runs: Runs) -> None:
    for name, rank in chosen(runs, "sharded: ", "WSDLogitsProcessor, pilot whole"):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)


def test_a_logits_processor_with_a_sharded_pilot_is_refused(runs: Runs) -> None:
    for name, rank in chosen(runs, "sharded: ", "WSDLogitsProcessor, pilot sharded"):
        kind, text = runs.together[rank][name]
        assert kind == "WSDValueError"
        assert "the pilot of WSDLogitsProcessor has weights that are sharded" in text


def test_calls_leave_no_hooks(runs: Runs) -> None:
    for name, rank in chosen(runs, "sharded: ", "hooks"):
        assert runs.together[rank][name] == [0, 0]


def test_tensor_parallel_is_as_one_process(runs: Runs) -> None:
    for name, rank in chosen(runs, "tensor parallel: ", "the same call"):
        assert "sequences" in runs.alone[rank][name], runs.alone[rank][name]
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)


def test_tensor_parallel_ranks_with_other_seeds_may_decode_greedily(runs: Runs) -> None:
    for name, rank in chosen(runs, "tensor parallel: ", "greedy, a seed per rank"):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sampled, a seed per rank", "random states that differ"),
        ("a prompt per rank", "prompts or settings that differ"),
        ("a generation config per rank", "prompts or settings that differ"),
    ],
)
def test_tensor_parallel_ranks_that_would_part_are_refused(runs: Runs, words: str, message: str) -> None:
    for name, rank in chosen(runs, "tensor parallel: ", words):
        kind, text = runs.together[rank][name]
        assert kind == "WSDValueError"
        assert message in text


def test_a_streamer_of_one_tensor_parallel_rank_may_fail(runs: Runs) -> None:
    """The other rank has the whole answer, and both go on with their next call."""
    for name, rank in chosen(runs, "tensor parallel: ", "the streamer of one rank fails"):
        assert runs.together[rank][name] == runs.alone[rank][name], (name, rank)
        assert (runs.together[rank][name] == ["ConnectionError", "the reader has gone"]) == (rank == 0)


@pytest.mark.parametrize(
    ("argument", "message"), [("setting", "max_draft_tokens=0"), ("model", "must be a causal language model")]
)
def test_an_argument_of_one_tensor_parallel_rank_is_refused_on_all(runs: Runs, argument: str, message: str) -> None:
    for name, rank in chosen(runs, "tensor parallel: ", f"a {argument} of one rank is refused"):
        kind, text = runs.together[rank][name]
        assert kind == "WSDValueError"
        assert (message if rank else "prompts or settings that differ") in text


def test_zero_3_goes_step_by_step_in_several_processes(base: Any, pilot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gathers weights ahead, by the modules that have run before; copies of them would put ranks out of step."""
    monkeypatch.setattr("wsd_hf.engine.supported.process_count", lambda: 2)
    monkeypatch.setattr("wsd_hf.engine.supported.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(
        wsd_hf.WSDValueError, match=r"wsd_engine='fast' cannot serve this call: the base is sharded by DeepSpeed's"
    ):
        base.generate(random_prompt(0, 6), strategy="wsd", assistant_model=pilot, wsd_engine="fast", max_new_tokens=4)
