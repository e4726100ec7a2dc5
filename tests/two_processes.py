"""The calls that test_two_processes.py compares: the same ones in one process, and in two that share weights or forwards.

python tests/two_processes.py FOLDER RANK    one of the two: writes the answers to its calls to FOLDER/RANK.json
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import wsd_hf
from every_strategy import WAYS, Case
from families import tiny_model, tiny_pilot
from oracle import ones, random_prompt

SECONDS = 40
"""Time limit of a collective: a rank that is left waiting ends with an error."""

TOKENS = (24, 7)
"""Length of each rank's responses, which makes their work unequal."""

FAMILIES = ("llama", "mixtral")
"""Models whose forwards are shared by tensor parallelism."""

Calls = Iterator[tuple[str, Callable[[], Any]]]


class Breaks(LogitsProcessor):
    """A processor that fails once a text has some length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self._length:
            raise ArithmeticError("a processor of the caller's failed")
        return scores


def fully_sharded_calls(rank: int, shard: Callable[[PreTrainedModel], Any]) -> Calls:
    """Calls of unequal length, in one process or in two between which `shard` divides the weights of a model."""
    world = Case("one", "wsd fast").world
    prompt, twin = random_prompt(rank, 6 + 3 * rank), random_prompt(0, 6)
    hooks = len(world.base._forward_pre_hooks)

    def decode(way: str, **kwargs: Any) -> Callable[[], Any]:
        def call() -> Any:
            torch.manual_seed(rank)
            return Case("one", way).generate(prompt, **{"max_new_tokens": TOKENS[rank], **kwargs})

        return call

    def plain(**kwargs: Any) -> torch.Tensor:
        pilot = wsd_hf.WSDLogitsProcessor(world.pilot, wsd_hf.WSDConfig(threshold=0.15, window_size=2))
        settings = {"attention_mask": ones(prompt), "max_new_tokens": TOKENS[rank], "logits_processor": [pilot]}
        output: torch.Tensor = world.base.generate(prompt, **settings)
        return output

    yield "synced_gpus=True, whole weights", decode("wsd fast", synced_gpus=True if shard is not whole else None)
    shard(world.base)
    for way, sampled in itertools.product(WAYS, (False, True)):
        if sampled or way != "search":
            yield f"{way}, {'sampled' if sampled else 'greedy'}, pilot replicated", decode(way, do_sample=sampled or None)
    yield "a processor of logits, pilot replicated", plain
    unequal = LogitsProcessorList([Breaks(12)] if rank else [])
    for way in ("wsd fast", "wsd step"):
        yield f"{way}, a processor fails in one rank", decode(way, logits_processor=unequal)
    yield "wsd fast, a bad prompt in one rank", decode("wsd fast", **({"attention_mask": 1 - ones(prompt)} if rank else {}))
    for way in ("wsd fast", "wsd step"):
        yield f"{way}, synced_gpus=False, equal work", lambda way=way: Case("one", way).generate(twin, synced_gpus=False)
    shard(world.pilot)
    shard(world.reference)
    for way, sampled in itertools.product(WAYS, (False, True)):
        if sampled or way != "search":
            yield f"{way}, {'sampled' if sampled else 'greedy'}, pilot sharded", decode(way, do_sample=sampled or None)
    yield "a processor of logits, pilot sharded", plain
    yield "hooks that calls have left", lambda: len(world.base._forward_pre_hooks) - hooks - (shard is not whole)


def tensor_parallel_calls(folder: Path, rank: int, plan: str | None) -> Calls:
    """Calls of one length on models of `folder`, whose forwards two ranks share if there is a `plan`."""

    def load(name: str, plan: str | None) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, tp_plan=plan)

    for family in FAMILIES:
        base = wsd_hf.enable_wsd(load(f"{family} base", plan))
        pilots = {"replicated": load(f"{family} pilot", None), "split": load(f"{family} pilot", plan)}

        def decode(
            pilot: str, engine: str, sampled: bool, seed: int = 0, of: int = 0, base: Any = base, pilots: Any = pilots
        ) -> Any:
            torch.manual_seed(seed)
            prompt = random_prompt(of, 6)
            settings = {"wsd_engine": engine, "wsd_threshold": 0.15, "wsd_window_size": 2, "return_dict_in_generate": True}
            settings |= {"attention_mask": ones(prompt), "max_new_tokens": 24, "do_sample": sampled}
            return base.generate(prompt, strategy="wsd", assistant_model=pilots[pilot], **settings)

        for pilot, engine, sampled in itertools.product(pilots, ("fast", "step"), (False, True)):
            name = f"{family}, {engine}, {'sampled' if sampled else 'greedy'}, pilot {pilot}"
            yield name, lambda arguments=(pilot, engine, sampled), decode=decode: decode(*arguments)
        for engine in ("fast", "step"):
            seeded = lambda engine=engine, decode=decode: decode("replicated", engine, sampled=True, seed=rank)
            other = lambda engine=engine, decode=decode: decode("replicated", engine, sampled=False, of=rank)
            greedy = lambda engine=engine, decode=decode: decode("replicated", engine, sampled=False, seed=rank)
            yield f"{family}, {engine}, sampled, a seed per rank", seeded
            yield f"{family}, {engine}, greedy, a prompt per rank", other
            yield f"{family}, {engine}, greedy, a seed per rank", greedy


def answers(calls: Calls) -> dict[str, Any]:
    """The answer to each call, or its error."""
    found: dict[str, Any] = {}
    for name, call in calls:
        try:
            output = call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = _plain(output)
    return found


def _plain(output: Any) -> Any:
    if not isinstance(output, dict):
        return output.tolist() if isinstance(output, torch.Tensor) else output
    switches = {name: output.get(name) for name in ("draft_length", "switch_index", "switch_reason", "written_by_pilot")}
    known = {"tokens": output["sequences"], **switches}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in known.items()}


def save_models(folder: Path) -> None:
    """Writes the models of `tensor_parallel_calls`."""
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / f"{family} base")
        tiny_pilot(family).save_pretrained(folder / f"{family} pilot")


def whole(model: PreTrainedModel) -> None:
    """Leaves a model as it is."""


def _sharded(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def main() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    limit = timedelta(seconds=SECONDS)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=2)
    found = answers(fully_sharded_calls(rank, _sharded)) | answers(tensor_parallel_calls(folder, rank, "auto"))
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
