"""The ways of answering that can be compared: one line each in `METHODS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_room
from ..config import WSDConfig
from ..outputs import explain
from ..strategies import STRATEGIES
from ..text.chat import (
    BASE_STOP_STRINGS,
    Messages,
    base_prompts,
    before_next_turn,
    build_inputs,
    next_turn_criteria,
    pilot_prompts,
)
from ..text.urial import urial_messages

WORK = tuple(f"{model}_{unit}" for model in ("base", "pilot", "reference") for unit in ("forwards", "tokens"))
"""What an answer costs: forwards of each model, and token positions fed to it; named as in `WSDStats`."""


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
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response, and what it took.

    Attributes:
        response: its text, without the header of a next turn.
        tokens: how many were written, the end (EOS, or that header) included.
        seconds: of this process's CPUs; where a GPU does the work, seconds that passed.
        work: numbers for some of `WORK`; what is missing is 0.
        written_by_pilot: of the response's tokens; None where every token is the work of several models.
        switch_index, switch_reason: as in `WSDGenerateOutput`; None where there is no switch.
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


@dataclass(frozen=True)
class Method:
    """A way of answering.

    Attributes:
        prompt: makes the inputs; they are named as by `build_inputs`, the pilot's `assistant_`.
        reply: answers them.
        strategy: the `strategy=` of `generate` that it runs, if any.
        needs_reference: whether it asks the reference model too.
    """

    prompt: Callable[[Bench, Messages], Mapping[str, Any]]
    reply: Callable[[Bench, Mapping[str, Any]], Reply]
    strategy: str | None = None
    needs_reference: bool = False

    def check(self, bench: Bench, messages: Messages) -> None:
        """Raises a WSDValueError if a prompt leaves no room for an answer."""
        inputs = self.prompt(bench, messages)
        for name, model, mask in (("base", bench.base, "attention_mask"), ("pilot", bench.pilot, "assistant_attention_mask")):
            if mask in inputs:
                check_room(name, model, inputs[mask])

    def answer(self, bench: Bench, messages: Messages) -> Reply:
        """One answer, chosen greedily."""
        return self.reply(bench, self.prompt(bench, messages))


def _base_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    inputs = base_prompts([messages], bench.tokenizer)
    return inputs if bench.tokenizer.chat_template else {**inputs, "stopping_criteria": next_turn_criteria(bench.tokenizer)}


def _urial_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return _base_prompt(bench, urial_messages(messages, bench.examples))


def _pilot_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return {f"assistant_{name}": value for name, value in pilot_prompts([messages], bench.assistant_tokenizer).items()}


def _both_prompts(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return dict(build_inputs(messages, bench.tokenizer, bench.assistant_tokenizer))


def _by_base(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    return replace(_plain("base", bench.base, bench.tokenizer, bench, inputs), written_by_pilot=0)


def _by_pilot(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
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
    return Reply(response=_text(ids[0, prompt:], tokenizer), tokens=tokens, seconds=seconds, work=work)


def _by_wsd(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    output, reply = _together("wsd", bench, inputs, wsd_config=bench.config)
    drafted = int(output.switch_index[0])
    return replace(
        reply,
        written_by_pilot=drafted,
        switch_index=drafted,
        switch_reason=output.switch_reason[0],
        html=explain(output, bench.tokenizer, stop_strings=BASE_STOP_STRINGS).to_html(),
    )


def _by_nudging(bench: Bench, inputs: Mapping[str, Any]) -> Reply:
    output, reply = _together("nudging", bench, inputs)
    return replace(reply, written_by_pilot=int(output.written_by_pilot[0].sum()))


def _with_reference(strategy: str) -> Callable[[Bench, Mapping[str, Any]], Reply]:
    return lambda bench, inputs: _together(strategy, bench, inputs, reference_model=bench.reference)[1]


def _together(strategy: str, bench: Bench, inputs: Mapping[str, Any], **settings: Any) -> tuple[Any, Reply]:
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
    work = {name: getattr(output.stats, name) for name in WORK if hasattr(output.stats, name)}
    return output, Reply(response=_text(response, bench.tokenizer), tokens=len(response), seconds=seconds, work=work)


def _generate(model: PreTrainedModel, bench: Bench, inputs: Mapping[str, Any], **kwargs: Any) -> tuple[Any, float]:
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    there = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    begin = clock()
    output = model.generate(**there, **kwargs, do_sample=False, max_new_tokens=bench.max_new_tokens)
    return output, clock() - begin


def _text(response: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return before_next_turn(tokenizer.decode(response, skip_special_tokens=True)).lstrip()


METHODS = {
    name: method
    for name, method in {
        "base": Method(_base_prompt, _by_base),
        "pilot": Method(_pilot_prompt, _by_pilot),
        "urial": Method(_urial_prompt, _by_base),
        "nudging": Method(_both_prompts, _by_nudging, "nudging"),
        "eft": Method(_both_prompts, _with_reference("emulated_fine_tuning"), "emulated_fine_tuning", needs_reference=True),
        "wss": Method(_both_prompts, _with_reference("weak_to_strong_search"), "weak_to_strong_search", needs_reference=True),
        "wsd": Method(_both_prompts, _by_wsd, "wsd"),
    }.items()
    if method.strategy is None or method.strategy in STRATEGIES
}
"""The methods by the names that `wsd-hf compare --strategies` takes."""
