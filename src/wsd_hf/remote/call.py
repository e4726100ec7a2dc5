"""Calls over servers: prompts and settings, checked before any request."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.numbers import check_integer, check_number, check_positive_integer, check_probability
from ..engine.strategy import check_choice
from ..errors import WSDValueError
from ..pair import as_messages
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.draft import Draft
from ..text.chat import Messages, base_prompts, check_text, pilot_prompts
from ..text.next_turn import turn_headers
from ..text.stop_strings import StopStrings
from ..text.streaming import Writer
from .model import RemoteModel
from .server import GREEDY

MOST_TOP_K = 2**31 - 1
"""More than the tokens of any vocabulary, and as many as a server can hold."""

LOCAL = ("engine", "speculate", "cuda_graphs")
"""Settings of `WSDConfig` that concern models in this process."""


@dataclass(frozen=True)
class RemoteCall:
    """An answer that is to be written; checked."""

    config: WSDConfig
    prompt: list[int]
    pilot_prompt: list[int]
    budget: int
    """Most tokens of the answer; prompt and answer leave room in the base's context for one token more."""
    draft_limit: int
    """Most tokens of the draft, in the pilot's vocabulary."""
    stop_strings: StopStrings | None
    sampling: Mapping[str, Any]
    pilot_sampling: Mapping[str, Any]

    def draft(self, base: RemoteModel) -> Draft:
        """A draft that is empty; raises if its switch rule needs more than servers give."""
        draft = Draft(*self.config.draft_arguments([self.prompt], base.server.vocabulary, set(base.end_token_ids)))
        if "entropies" in draft.needs:
            raise WSDValueError(
                f"switch_criteria={self.config.switch_criteria!r}: needs the base's whole distributions, which servers don't "
                "give; choose 'confidence', 'relative_confidence' or 'agreement'"
            )
        return draft


def prepared_call(
    base: RemoteModel,
    pilot: RemoteModel,
    chat: str | Messages,
    config: WSDConfig,
    max_new_tokens: int,
    stops: list[str],
    sampling: Mapping[str, Any],
    pilot_sampling: Mapping[str, Any],
) -> RemoteCall:
    """A call for one chat; raises if it isn't one, or a prompt doesn't fit its model's context."""
    messages = as_messages([chat] if isinstance(chat, str) else chat)
    if len(messages) != 1:
        raise WSDValueError(f"chat={chat!r}: must be a question, or one list of messages")
    prompt: list[int] = base_prompts(messages, base.tokenizer)["input_ids"][0].tolist()
    pilot_prompt: list[int] = pilot_prompts(messages, pilot.tokenizer)["input_ids"][0].tolist()
    budget = check_positive_integer("max_new_tokens", max_new_tokens)
    stops = [*turn_headers(base.tokenizer), *stops]
    return RemoteCall(
        config,
        prompt,
        pilot_prompt,
        budget=min(budget, _room("base", base, prompt, less=1)),
        draft_limit=min(config.max_draft_tokens, _room("pilot", pilot, pilot_prompt)),
        stop_strings=StopStrings(base.tokenizer, stops) if stops else None,
        sampling=sampling,
        pilot_sampling=pilot_sampling,
    )


def _room(name: str, model: RemoteModel, prompt: Sequence[int], less: int = 0) -> int:
    """Number of tokens that a model's context holds after a prompt, less some; raises if there are none."""
    context = model.server.context
    if (room := context - len(prompt) - less) < 1:
        raise WSDValueError(
            f"the prompt of the {name} has {len(prompt)} tokens and the context of its server holds {context}: "
            "shorten the prompt"
        )
    return room


def check_strategy(strategy: str | WSDConfig) -> WSDConfig:
    """Settings that servers can honour; raises for others."""
    config = WSDConfig() if strategy == "wsd" else strategy
    if type(config) is not WSDConfig:
        raise WSDValueError(f"strategy={strategy!r}: over servers there are 'wsd' and WSDConfig objects; call a local Pair")
    for name in LOCAL:
        if (value := getattr(config, name)) != getattr(WSDConfig, name):
            raise WSDValueError(f"{name}={value!r} concerns models in this process, and has no effect on servers: leave it out")
    return config


def check_stop(stop: str | Sequence[str]) -> list[str]:
    """Texts that end an answer; raises for anything else."""
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(one, str) and one for one in stops):
        raise WSDValueError(f"stop={stop!r}: must be a text, or a list of texts, none of them empty")
    check_text("stop", "".join(stops))
    return list(stops)


def sampling_fields(
    assistant_do_sample: bool | None, do_sample: bool, temperature: float, top_p: float, top_k: int, seed: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of sampling in the base's requests, and in the pilot's."""
    check_choice("do_sample", do_sample, (True, False))
    if not check_number("temperature", temperature, least=0):
        raise WSDValueError("temperature=0: must be above 0; for greedy answers leave do_sample out")
    if (top_k := check_integer("top_k", top_k)) < 0:
        raise WSDValueError(f"top_k={top_k!r}: must be at least 0")
    top_k = min(top_k, MOST_TOP_K)
    values = {"temperature": float(temperature), "top_p": check_probability("top_p", top_p), "top_k": top_k}
    pilot_samples = do_sample if assistant_do_sample is None else assistant_do_sample
    if not do_sample and not pilot_samples and (values != {"temperature": 1, "top_p": 1, "top_k": 0} or seed is not None):
        raise WSDValueError(
            "temperature, top_p, top_k and seed have no effect without do_sample=True: leave them out, or add it"
        )

    def fields(samples: bool, writer: Writer) -> dict[str, Any]:
        # Each model draws from numbers of its own: with the same ones, the base's first choice would depend on the draft's.
        draws = {} if seed is None else {"seed": random.Random(f"{check_integer('seed', seed)} {writer}").getrandbits(62)}
        return {**GREEDY, **values, **draws} if samples else dict(GREEDY)

    return fields(do_sample, "base"), fields(pilot_samples, "pilot")
