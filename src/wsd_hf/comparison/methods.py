"""The ways of answering that can be compared: one line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.checks import check_room
from ..engine.strategy import StrategyConfig
from ..strategies import STRATEGIES
from ..text.chat import Messages, base_prompts, chat_prompts, pilot_prompts
from ..text.urial import urial_messages
from .replies import Bench, Reply, by_base, by_pilot, by_strategy


@dataclass(frozen=True)
class Method:
    """A way of answering.

    Attributes:
        prompt: makes the inputs of a batch; they are named as by `build_inputs`, the pilot's `assistant_`.
        reply: answers them, under settings of the strategy, or None.
        strategy: class of its settings; None if it has none.
        needs_reference: whether it needs the reference model too.
        needs_reward: whether it needs a reward.
    """

    prompt: Callable[[Bench, Sequence[Messages]], Mapping[str, Any]]
    reply: Callable[[Bench, Mapping[str, Any], Any], list[Reply]]
    strategy: type[StrategyConfig] | None = None
    needs_reference: bool = False
    needs_reward: bool = False

    def limits(self, bench: Bench, chats: Sequence[Messages]) -> list[int]:
        """Most tokens of the answer to each prompt; a WSDValueError if a prompt leaves no room for any."""
        inputs = self.prompt(bench, chats)
        models = {"base": (bench.pair.base, "attention_mask"), "pilot": (bench.pair.pilot, "assistant_attention_mask")}
        room, *_ = [check_room(name, model, inputs[mask]) for name, (model, mask) in models.items() if mask in inputs]
        limits: list[int] = room.clamp(max=bench.max_new_tokens).tolist()
        return limits

    def answer(
        self, bench: Bench, chats: Sequence[Messages], settings: StrategyConfig | None = None, sample: int = 0
    ) -> list[Reply]:
        """An answer to each prompt, the same in every run.

        Args:
            bench: models and settings of all methods.
            chats: the prompts of a batch.
            settings: of the strategy.
            sample: number of the answer among those to the same prompt.
        """
        replies: dict[int, Reply] = {}
        limits = self.limits(bench, chats)
        for limit in sorted(set(limits)):  # a call has one limit for all of its rows
            rows = [row for row, own in enumerate(limits) if own == limit]
            some = [chats[row] for row in rows]
            with torch.random.fork_rng():
                torch.manual_seed(bench.torch_seed(some, sample))
                replies.update(zip(rows, self.reply(bench, self.prompt(bench, some), settings), strict=True))
        return [replies[row] for row in range(len(chats))]


def _base_prompt(bench: Bench, chats: Sequence[Messages]) -> Mapping[str, Any]:
    return base_prompts(chats, bench.pair.tokenizer) | bench.criteria


def _urial_prompt(bench: Bench, chats: Sequence[Messages]) -> Mapping[str, Any]:
    return _base_prompt(bench, [urial_messages(chat, bench.examples) for chat in chats])


def _pilot_prompt(bench: Bench, chats: Sequence[Messages]) -> Mapping[str, Any]:
    return {f"assistant_{name}": value for name, value in pilot_prompts(chats, bench.pair.pilot_tokenizer).items()}


def _both_prompts(bench: Bench, chats: Sequence[Messages]) -> Mapping[str, Any]:
    return chat_prompts(chats, bench.pair.tokenizer, bench.pair.pilot_tokenizer) | bench.criteria


METHODS = {
    "base": Method(_base_prompt, by_base),
    "pilot": Method(_pilot_prompt, by_pilot),
    "urial": Method(_urial_prompt, by_base),
    **{
        name: Method(_both_prompts, by_strategy, strategy, "reference" in strategy.partners, "reward" in strategy.keywords())
        for name, strategy in STRATEGIES.items()
    },
}
"""The methods by the names that `wsd-hf compare --strategies` takes; strategies have those of `generate`."""

ALIASES = {"eft": "emulated_fine_tuning", "wss": "weak_to_strong_search"}
"""Short names of strategies."""
