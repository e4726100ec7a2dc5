"""The ways of answering that can be compared: one line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..engine.checks import check_room
from ..strategies import STRATEGIES
from ..text.chat import Messages, base_prompts, chat_prompts, pilot_prompts
from ..text.urial import urial_messages
from .replies import Bench, Reply, by_base, by_pilot, by_strategy


@dataclass(frozen=True)
class Method:
    """A way of answering.

    Attributes:
        prompt: makes the inputs; they are named as by `build_inputs`, the pilot's `assistant_`.
        reply: answers them.
        needs_reference: whether it needs the reference model too.
        needs_reward: whether it needs a reward.
    """

    prompt: Callable[[Bench, Messages], Mapping[str, Any]]
    reply: Callable[[Bench, Mapping[str, Any]], Reply]
    needs_reference: bool = False
    needs_reward: bool = False

    def check(self, bench: Bench, messages: Messages) -> None:
        """Raises a WSDValueError if a prompt leaves no room for an answer."""
        inputs = self.prompt(bench, messages)
        models = {"base": (bench.pair.base, "attention_mask"), "pilot": (bench.pair.pilot, "assistant_attention_mask")}
        for name, (model, mask) in models.items():
            if mask in inputs:
                check_room(name, model, inputs[mask])

    def answer(self, bench: Bench, messages: Messages) -> Reply:
        """One answer, the same in every run."""
        return self.reply(bench, self.prompt(bench, messages))


def _base_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return base_prompts([messages], bench.pair.tokenizer) | bench.criteria


def _urial_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return _base_prompt(bench, urial_messages(messages, bench.examples))


def _pilot_prompt(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return {f"assistant_{name}": value for name, value in pilot_prompts([messages], bench.pair.pilot_tokenizer).items()}


def _both_prompts(bench: Bench, messages: Messages) -> Mapping[str, Any]:
    return chat_prompts([messages], bench.pair.tokenizer, bench.pair.pilot_tokenizer) | bench.criteria


METHODS = {
    "base": Method(_base_prompt, by_base),
    "pilot": Method(_pilot_prompt, by_pilot),
    "urial": Method(_urial_prompt, by_base),
    **{
        name: Method(
            _both_prompts, partial(by_strategy, name), "reference" in strategy.partners, "reward" in strategy.keywords()
        )
        for name, strategy in STRATEGIES.items()
    },
}
"""The methods by the names that `wsd-hf compare --strategies` takes; strategies have those of `generate`."""

ALIASES = {"eft": "emulated_fine_tuning", "wss": "weak_to_strong_search"}
"""Short names of strategies."""
