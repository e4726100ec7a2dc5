"""The calls that test_two_processes.py compares: the same ones in one process, and in two that share weights or forwards.

python tests/two_processes.py FOLDER RANK few|all    one of the two: writes the answers to its calls to FOLDER/RANK.json
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

import wsd_hf
from every_strategy import SWEPT, WAYS, Case
from families import tiny_model, tiny_pilot
from oracle import ones, random_prompt

SECONDS = 240
"""Time limit of a collective: a rank that is left waiting ends with an error."""

TOKENS = (24, 7)
"""Length of each rank's responses, which makes their work unequal."""

FAMILIES = ("llama", "mixtral")
"""Models whose forwards are shared by tensor parallelism."""

ENGINES = ("fast", "step")

Calls = Iterator[tuple[str, Callable[[], Any]]]


class FailingProcessor(LogitsProcessor):
    """Fails once a text has 12 tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= 12:
            raise ArithmeticError("a processor of the caller's failed")
        return scores


class FailingCriterion(StoppingCriteria):
    """Fails once a text has 12 tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] >= 12:
            raise ArithmeticError("a criterion of the caller's failed")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FailingStreamer(BaseStreamer):
    """Fails at the third token after the prompt."""

    def __init__(self, error: BaseException) -> None:
        self._error, self._taken = error, 0

    def put(self, value: torch.Tensor) -> None:
        self._taken += 1
        if self._taken == 4:
            raise self._error

    def end(self) -> None:
        pass


FAULTS: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "a processor fails": lambda _: {"logits_processor": LogitsProcessorList([FailingProcessor()])},
    "an interrupt": lambda _: {"streamer": FailingStreamer(KeyboardInterrupt("stopped"))},
    "a streamer fails": lambda _: {"streamer": FailingStreamer(ConnectionError("the reader has gone"))},
    "a criterion fails": lambda _: {"stopping_criteria": StoppingCriteriaList([FailingCriterion()])},
    "an empty prompt": lambda prompt: {"attention_mask": 1 - ones(prompt)},
    "a mask without data": lambda prompt: {"attention_mask": ones(prompt).to("meta")},
    "an unknown keyword": lambda _: {"no_such_keyword": 1},
    "a pilot that is no model": lambda _: {"assistant_model": "no model"},
}
"""Arguments of calls that fail between forwards, or before the first, from the prompt."""

IN_FEW = {("wsd fast", cause) for cause in ("a processor fails", "an interrupt", "an empty prompt", "an unknown keyword")}
IN_FEW |= {("wsd fast", "a pilot that is no model")}
IN_FEW |= {("wsd step", cause) for cause in ("a processor fails", "an interrupt")}
"""Strategies and their faults that not only the sweep tries."""


def calls(folder: Path, rank: int, few: bool, together: bool) -> Calls:
    """The calls of a rank by name, on models that are prepared as they are needed.

    Args:
        folder: of `save_models`.
        rank: 0 or 1.
        few: whether to leave out those that only the sweep makes.
        together: whether the ranks share weights and forwards.
    """
    yield from _tensor_parallel_calls(folder, rank, few, together)
    yield from _calls_on_sharded_weights(rank, few, together)
    if together:  # at last, since it leaves the ranks out of step
        yield from _calls_that_fail_in_a_forward(rank)


def _calls_on_sharded_weights(rank: int, few: bool, together: bool) -> Calls:
    """Calls of unequal length between which the weights of base and small models are sharded."""
    world, prompt = Case("one", "wsd fast").world, random_prompt(rank, 6 + 3 * rank)
    hooks = [len(world.base._forward_hooks), len(world.base._forward_pre_hooks)]

    def decode(way: str, **kwargs: Any) -> Any:
        torch.manual_seed(rank)
        return Case("one", way).generate(prompt, **{"max_new_tokens": TOKENS[rank], **kwargs})

    def unequal(pilot: str) -> Calls:
        for way, sampled in itertools.product(WAYS, (False, True)):
            in_few = way not in SWEPT and (sampled if pilot == "sharded" else way in ("wsd fast", "wsd step"))
            if (in_few or not few) and (sampled or way != "search"):
                name = f"sharded: {way}, {'sampled' if sampled else 'greedy'}, pilot {pilot}, unequal work"
                yield name, partial(decode, way, do_sample=sampled or None)

    def without_numbers(way: str) -> Any:
        hook = world.base.register_forward_hook(_poison, with_kwargs=True) if rank else nullcontext()
        with hook:
            return decode(way)

    def faults() -> Calls:
        for way, (cause, arguments) in itertools.product(WAYS, FAULTS.items()):
            if not few or (way, cause) in IN_FEW:
                yield f"fault: {way}, {cause}", partial(decode, way, **(arguments(prompt) if rank else {}))
            if cause == "a processor fails" and (not few or way == "wsd fast"):
                yield f"fault: {way}, logits are NaN", partial(without_numbers, way)

    def through_processor() -> torch.Tensor:
        processor = wsd_hf.WSDLogitsProcessor(world.pilot, wsd_hf.WSDConfig(threshold=0.15, window_size=2))
        settings = {"attention_mask": ones(prompt), "max_new_tokens": TOKENS[rank], "logits_processor": [processor]}
        output: torch.Tensor = world.base.generate(prompt, **settings)
        return output

    yield "whole: wsd fast, synced_gpus=True", partial(decode, "wsd fast", synced_gpus=together or None)
    stateful = {"assistant_model": tiny_model("recurrent_gemma"), "wsd_engine": "step", "synced_gpus": together or None}
    yield "state in layers: wsd step, synced_gpus=True", partial(decode, "wsd step", **stateful)
    if together:
        _shard(world.base)
        hooks = [len(world.base._forward_hooks), len(world.base._forward_pre_hooks)]
    yield from unequal("whole")
    yield "sharded: WSDLogitsProcessor, pilot whole", through_processor
    yield from faults()
    for engine in ENGINES:
        same = partial(Case("one", f"wsd {engine}").generate, random_prompt(0, 6), synced_gpus=False)
        yield f"sharded: wsd {engine}, synced_gpus=False", same
    scorer = _scorer()
    judged = {"reward": scorer, "reward_tokenizer": world.tokenizer, "reward_guided_threshold": 0.0}
    if together:
        _shard(world.pilot)
        _shard(world.reference)
        _shard(scorer)
    yield from unequal("sharded")
    yield "sharded: reward guided, a model as reward, unequal work", partial(decode, "reward guided", **judged)
    yield "sharded: WSDLogitsProcessor, pilot sharded", through_processor
    left = [world.base._forward_hooks, world.base._forward_pre_hooks]
    yield "sharded: hooks", lambda: [len(now) - then for now, then in zip(left, hooks, strict=True)]


def _poison(_module: Any, _arguments: Any, keywords: dict[str, Any], output: Any) -> None:
    """A hook that makes NaN of the logits after a prompt."""
    if keywords["input_ids"].numel() > 1:
        output.logits.fill_(torch.nan)


def _calls_that_fail_in_a_forward(rank: int) -> Calls:
    """A call in which the second rank fails between two layers, and the next one."""
    case = Case("one", "wsd fast")
    decode = partial(case.generate, random_prompt(rank, 6))

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    def failing() -> Any:
        with case.world.base.model.layers[0].register_forward_hook(no_memory) if rank else nullcontext():
            return decode()

    yield "in a forward: it fails", failing
    yield "in a forward: the next call", decode


def _tensor_parallel_calls(folder: Path, rank: int, few: bool, together: bool) -> Calls:
    """Calls on models of `folder`, whose forwards both ranks share."""
    for family in FAMILIES:
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        plan = "auto" if together else None
        base = wsd_hf.enable_wsd(load(folder / f"{family} base", tp_plan=plan))
        pilots = {"whole": load(folder / f"{family} pilot"), "split": load(folder / f"{family} pilot", tp_plan=plan)}
        for engine, sampled, pilot in itertools.product(ENGINES, (False, True), pilots):
            if few and family != "llama" and not (sampled == (engine == "fast") == (pilot == "split")):
                continue
            decode = partial(_decode, base, pilots[pilot], engine, sampled)
            choice = "sampled" if sampled else "greedy"
            kind = f"tensor parallel: {family}, {engine}, {choice}, pilot {pilot}"
            yield f"{kind}, the same call", decode
            if pilot == "whole" or not few:
                yield f"{kind}, a prompt per rank", partial(decode, prompt=rank)
                yield f"{kind}, {choice}, a seed per rank", partial(decode, seed=rank)
            if not few or (family == "llama" and engine == "fast" and not sampled):
                config = GenerationConfig(repetition_penalty=1 + rank / 2)
                yield f"{kind}, a generation config per rank", partial(decode, generation_config=config)
                refused = partial(_decode, base, "no model" if rank else pilots[pilot], engine, sampled)
                yield f"{kind}, a model of one rank is refused", refused
            if not few or (family == "llama" and pilot == "whole" and not sampled):
                streamer = None if rank else FailingStreamer(ConnectionError("the reader has gone"))
                yield f"{kind}, the streamer of one rank fails", partial(decode, streamer=streamer)
                yield f"{kind}, a setting of one rank is refused", partial(decode, wsd_max_draft_tokens=8 * (1 - rank))


def _decode(
    base: Any, pilot: PreTrainedModel | str, engine: str, sampled: bool, prompt: int = 0, seed: int = 0, **kwargs: Any
) -> Any:
    torch.manual_seed(seed)
    ids = random_prompt(prompt, 6)
    settings = {"wsd_engine": engine, "wsd_threshold": 0.15, "wsd_window_size": 2, "return_dict_in_generate": True}
    settings |= {"attention_mask": ones(ids), "max_new_tokens": 24, "do_sample": sampled}
    return base.generate(ids, strategy="wsd", assistant_model=pilot, **settings, **kwargs)


def _scorer() -> PreTrainedModel:
    config = copy.deepcopy(tiny_model("llama").config)
    config.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def _shard(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def answers(calls: Calls) -> dict[str, Any]:
    """The answer to each call, or type and text of its error, as JSON has them."""
    found: dict[str, Any] = {}
    for name, call in calls:
        try:
            output = call()
        except (Exception, KeyboardInterrupt) as error:
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = _fields(output) if isinstance(output, dict) else output
    plain: dict[str, Any] = json.loads(json.dumps(found, default=torch.Tensor.tolist))
    return plain


def _fields(output: dict[str, Any]) -> dict[str, Any]:
    names = {"sequences", "draft_length", "switch_index", "switch_reason", "written_by_pilot"}
    return {name: output[name] for name in names & output.keys()}


def save_models(folder: Path) -> None:
    """Writes the models of the tensor-parallel calls."""
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / f"{family} base")
        tiny_pilot(family).save_pretrained(folder / f"{family} pilot")


def main() -> None:
    torch.set_num_threads(1)
    folder, rank, few = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "few"
    limit = timedelta(seconds=SECONDS)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=2)
    found = answers(calls(folder, rank, few, together=True))
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
