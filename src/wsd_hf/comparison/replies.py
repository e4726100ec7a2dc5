"""One answer of some models, its cost, and the writers of its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import input_device
from ..engine.checks import check_room
from ..engine.strategy import StrategyConfig
from ..pair import Pair
from ..strategies.wsd.output import WSDOutput
from ..text.chat import Messages
from ..text.next_turn import answer_text, next_turn_criteria

WORK = tuple(f"{model}_{unit}" for model in ("base", "pilot", "reference") for unit in ("forwards", "tokens"))
"""Costs of an answer: forwards of each model, and token positions fed to it; as in `Stats`."""


@dataclass(frozen=True)
class Bench:
    """The models that answer, and the settings that they share.

    Attributes:
        pair: the models, with a reference for the methods that need it.
        examples: the in-context prompt of the base; see `urial_messages`.
        strategies: settings of each strategy, by its name.
        max_new_tokens: most tokens of an answer.
    """

    pair: Pair
    examples: Messages
    strategies: Mapping[str, StrategyConfig]
    max_new_tokens: int

    @property
    def criteria(self) -> dict[str, Any]:
        """Stopping criteria that end the base's answers, if it writes a transcript."""
        return {} if self.pair.tokenizer.chat_template else {"stopping_criteria": next_turn_criteria(self.pair.tokenizer)}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response, and its cost.

    Attributes:
        response: its text, without the header of a next turn.
        tokens: number of tokens written, the end (EOS, or that header) included.
        seconds: of this process's CPUs; where a GPU does the work, seconds that passed.
        work: numbers for some of `WORK`; those missing are 0.
        written_by_pilot: number of the response's tokens that the pilot wrote; None where every token is the work of several
            models.
        switch_index, switch_reason: as in `WSDOutput`; None where there is no switch.
        html: the writers, as an HTML element; None where one model alone answered, or tokens have no single writer.
    """

    response: str
    tokens: int
    seconds: float
    work: dict[str, int]
    written_by_pilot: int | None = None
    switch_index: int | None = None
    switch_reason: str | None = None
    html: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer(Reply):
    """A reply with its prompt (counted from 0), its method, and the judge's score."""

    prompt: int
    strategy: str
    score: float | None


def by_base(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """The base alone."""
    return replace(_plain("base", bench.pair.base, bench.pair.tokenizer, bench, inputs), written_by_pilot=0)


def by_pilot(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """The pilot alone."""
    own = {name.removeprefix("assistant_"): value for name, value in inputs.items()}
    reply = _plain("pilot", bench.pair.pilot, bench.pair.pilot_tokenizer, bench, own)
    return replace(reply, written_by_pilot=reply.tokens)


def _plain(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bench: Bench, inputs: Mapping[str, Any]
) -> Reply:
    """One model alone: a forward for each token, the first over the prompt, the others over the token before."""

    def generate(prompt: BatchEncoding, limit: int) -> Any:
        return model.generate(**prompt, max_new_tokens=limit, do_sample=False)

    ids, seconds = _timed(generate, model, bench, inputs)
    prompt = inputs["input_ids"].shape[1]
    tokens = ids.shape[1] - prompt
    work = {f"{name}_forwards": tokens, f"{name}_tokens": prompt + tokens - 1}
    return Reply(response=answer_text(ids[0, prompt:], tokenizer), tokens=tokens, seconds=seconds, work=work)


def by_strategy(name: str, bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """A strategy: greedily, or with the same samples in every run, at the temperature of search's official runs."""
    pair, strategy = bench.pair, bench.strategies[name]
    sampling = {"do_sample": True, "temperature": 0.7} if strategy.always_samples else {"do_sample": False}

    def generate(prompt: BatchEncoding, limit: int) -> Any:
        return pair.generate(prompt, strategy, max_new_tokens=limit, **sampling)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        output, seconds = _timed(generate, pair.base, bench, inputs)
    models = {name: work for name in ("base", "pilot", "reference") if (work := getattr(output.stats, name))}
    single = output.written_by_pilot is not None
    return Reply(
        response=pair.answers(output)[0],
        tokens=output.sequences.shape[1] - output.prompt_length,
        seconds=seconds,
        work={f"{name}_{unit}": count for name, work in models.items() for unit, count in asdict(work).items()},
        written_by_pilot=int(output.written_by_pilot.sum()) if single else None,
        switch_index=int(output.switch_index[0]) if isinstance(output, WSDOutput) else None,
        switch_reason=output.switch_reason[0] if isinstance(output, WSDOutput) else None,
        html=pair.explain(output).to_html() if single else None,
    )


def _timed(
    generate: Callable[[BatchEncoding, int], Any], model: PreTrainedModel, bench: Bench, inputs: Mapping[str, Any]
) -> tuple[Any, float]:
    """Output of a call, of prompts on the model's device and the most new tokens, and the seconds that it took."""
    device = input_device(model)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    prompt = BatchEncoding(inputs).to(device)
    room = int(check_room("model", model, inputs["attention_mask"]))  # transformers itself goes on, and may fail there
    limit = min(bench.max_new_tokens, room)
    begin = clock()
    output = generate(prompt, limit)
    return output, clock() - begin
