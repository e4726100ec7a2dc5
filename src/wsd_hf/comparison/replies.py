"""One answer of some models, what it cost, and who wrote it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import input_device
from ..engine.checks import check_room
from ..engine.strategy import StrategyConfig
from ..strategies.wsd.config import WSDConfig
from ..text.chat import Messages
from ..text.next_turn import answer_text, next_turn_criteria, turn_headers
from ..trace import explain

WORK = tuple(f"{model}_{unit}" for model in ("base", "pilot", "reference") for unit in ("forwards", "tokens"))
"""What an answer costs: forwards of each model, and token positions fed to it; named as in `Stats`."""


@dataclass(frozen=True)
class Bench:
    """The models that answer, and the settings they share.

    Attributes:
        reference: the pilot before its alignment, for the methods that need it.
        examples: the in-context prompt of the base; see `urial_messages`.
    """

    base: PreTrainedModel
    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistant_tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None
    examples: Messages
    config: WSDConfig
    nudging_threshold: float
    max_new_tokens: int

    @property
    def criteria(self) -> dict[str, Any]:
        """What ends the base's answers, if it writes a transcript."""
        return {} if self.tokenizer.chat_template else {"stopping_criteria": next_turn_criteria(self.tokenizer)}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response, and what it took.

    Attributes:
        response: its text, without the header of a next turn.
        tokens: how many were written, the end (EOS, or that header) included.
        seconds: of this process's CPUs; where a GPU does the work, seconds that passed.
        work: numbers for some of `WORK`; what is missing is 0.
        written_by_pilot: of the response's tokens; None where every token is the work of several models.
        switch_index, switch_reason: as in `WSDOutput`; None where there is no switch.
        html: who wrote what, as an HTML element; None where one model wrote it all.
    """

    response: str
    tokens: int
    seconds: float
    work: dict[str, int]
    written_by_pilot: int | None = None
    switch_index: int | None = None
    switch_reason: str | None = None
    html: str | None = None


def by_base(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """The base alone."""
    return replace(_plain("base", bench.base, bench.tokenizer, bench, inputs), written_by_pilot=0)


def by_pilot(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """The pilot alone."""
    own = {name.removeprefix("assistant_"): value for name, value in inputs.items()}
    reply = _plain("pilot", bench.pilot, bench.assistant_tokenizer, bench, own)
    return replace(reply, written_by_pilot=reply.tokens)


def _plain(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bench: Bench, inputs: Mapping[str, Any]
) -> Reply:
    """One model alone: a forward for each token, the first over the prompt, the others over the token before."""
    ids, seconds = _generate(model, bench, inputs)
    prompt = inputs["input_ids"].shape[1]
    tokens = ids.shape[1] - prompt
    work = {f"{name}_forwards": tokens, f"{name}_tokens": prompt + tokens - 1}
    return Reply(response=answer_text(ids[0, prompt:], tokenizer), tokens=tokens, seconds=seconds, work=work)


def by_wsd(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """Weak-to-Strong Decoding."""
    output, reply = _together(bench.config, bench, inputs)
    return replace(
        reply,
        written_by_pilot=int(output.draft_length[0]),
        switch_index=int(output.switch_index[0]),
        switch_reason=output.switch_reason[0],
        html=explain(output, bench.tokenizer, stop_strings=turn_headers(bench.tokenizer)).to_html(),
    )


def by_nudging(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """Nudging: every token has a writer of its own."""
    output, reply = _together("nudging", bench, inputs, nudging_threshold=bench.nudging_threshold)
    return replace(reply, written_by_pilot=int(output.written_by_pilot[0].sum()))


def by_emulated_fine_tuning(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """Emulated fine-tuning, in which no token has a single writer."""
    return _together("emulated_fine_tuning", bench, inputs, reference_model=bench.reference)[1]


def by_search(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    """Weak-to-strong search: samples of the base alone; the same ones in every run, at the official runs' temperature."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, reply = _together(
            "weak_to_strong_search", bench, inputs, reference_model=bench.reference, do_sample=True, temperature=0.7
        )
    return replace(reply, written_by_pilot=0)


def _together(strategy: str | StrategyConfig, bench: Bench, inputs: Mapping[str, Any], **settings: Any) -> tuple[Any, Reply]:
    """One of our strategies; its output tells what it cost."""
    output, seconds = _generate(
        bench.base,
        bench,
        inputs,
        strategy=strategy,
        assistant_model=bench.pilot,
        tokenizer=bench.tokenizer,
        assistant_tokenizer=bench.assistant_tokenizer,
        return_dict_in_generate=True,
        **settings,
    )
    response = output.sequences[0, inputs["input_ids"].shape[1] :]
    works = {name: work for name in ("base", "pilot", "reference") if (work := getattr(output.stats, name))}
    work = {f"{name}_{unit}": count for name, work in works.items() for unit, count in asdict(work).items()}
    return output, Reply(response=answer_text(response, bench.tokenizer), tokens=len(response), seconds=seconds, work=work)


def _generate(model: PreTrainedModel, bench: Bench, inputs: Mapping[str, Any], **kwargs: Any) -> tuple[Any, float]:
    device = input_device(model)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    there = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    room = int(check_room("model", model, inputs["attention_mask"]))  # transformers itself goes on, and may fail there
    limit = min(bench.max_new_tokens, room)
    begin = clock()
    output = model.generate(**there, **{"do_sample": False, **kwargs}, max_new_tokens=limit)
    return output, clock() - begin
