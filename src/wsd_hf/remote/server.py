"""A model behind a server of OpenAI-style completions that takes token ids and gives log-probabilities of prompts (vLLM's)."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..engine.numbers import check_number, check_positive_integer
from ..errors import WSDValueError
from ..speculation.rule import Drafted
from ..text.json_data import parse_json
from ..text.streaming import FinishReason
from .address import check_key, check_url
from .client import Client

GREEDY: Mapping[str, float] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields of a request that is decoded greedily. All are sent, since servers take others from a model's generation config."""

FLAT = 2.0
"""Temperature under which log-probabilities of a prompt are asked for, to see that they don't depend on it; vLLM's highest."""

TOLERANCE = 0.5
"""Most by which log-probabilities of the same prompt may differ from request to request: servers batch, in low precision."""

TRIED = 8
"""Tokens that a server is to write when it is tried."""

REMEDY = "raw ones are needed, start it with --logprobs-mode raw_logprobs"


class Tokens(NamedTuple):
    """Token ids of a stream that came together."""

    ids: list[int]
    text: str
    """The server's own text of them, which may lack the end of a character."""
    finish: FinishReason | None
    """Reason for the stream's end; None if more may come."""


@dataclass(frozen=True)
class Server(Client):
    """A model behind a server of completions.

    Args:
        url: of the API, such as "http://localhost:8000/v1".
        model: its name there; "" for the server's only one.
        key: sent to that URL as a bearer token; "" for servers that need none.
        timeout: seconds in which the next token must come, the first one included, or the result of a check.
        open_requests: most requests that are open at a time in an event loop; others wait for their turn.
        sleep: waits for some seconds before a further attempt.
        context: most tokens of a prompt and its continuation; `RemotePair.connect` takes it from the server.
        vocabulary: width of the model's logits; `RemotePair.connect` takes it from the model's config.
        role: "base" or "pilot", for errors; `RemotePair.connect` sets it.

    Raises:
        WSDValueError: naming the argument and the rule.
    """

    context: int = sys.maxsize
    vocabulary: int = sys.maxsize

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url("url", self.url))
        check_key("key", self.key)
        if not check_number("timeout", self.timeout, least=0):
            raise WSDValueError(f"timeout={self.timeout!r}: must be above 0 seconds")
        check_positive_integer("open_requests", self.open_requests)

    async def found(self) -> Server:
        """This server with its model's name and context.

        Raises:
            WSDServerError: it doesn't answer, or has no such model.
        """
        content = await self.content("GET", "/models")
        try:
            cards = {str(card["id"]): dict(card) for card in parse_json(content, self.url)["data"]}
        except (ValueError, LookupError, TypeError):
            raise self.failure("sent no list of models", f" but {self.start(content)}") from None
        model = self.model or (next(iter(cards)) if len(cards) == 1 else "")
        if model not in cards:
            known = ", ".join(map(repr, cards)) or "none"
            raise self.failure(f"has no such model, but {known}" if self.model else f"name one of its models: {known}")
        card = cards[model]
        context = card.get("max_model_len") or cards.get(str(card.get("parent")), {}).get("max_model_len")  # of an adapter
        return replace(self, model=model, context=context if type(context) is int and context > 0 else sys.maxsize)

    async def check(self, prompt: Sequence[int], scores: bool) -> list[Tokens]:
        """Tries all that a call needs, on a prompt of at least two tokens; `scores`: whether it has to check drafts.

        Returns:
            A continuation of `TRIED` tokens.

        Raises:
            WSDServerError: naming what the server lacks.
        """
        async with aclosing(self.stream(prompt, TRIED, GREEDY)) as stream:
            written = [tokens async for tokens in stream]
        if scores:
            raw = await self.score(prompt[:1], prompt[1:], best=True)
            flat = await self.score(prompt[:1], prompt[1:], best=True, sampling={**GREEDY, "temperature": FLAT, "seed": 0})
            if min(drafted.best_log_prob for drafted in raw) < -math.log(self.vocabulary) - TOLERANCE:
                raise self.failure(f"gives logits in prompt_logprobs: {REMEDY}")
            if any(abs(one.log_prob - other.log_prob) > TOLERANCE for one, other in zip(raw, flat, strict=True)):
                raise self.failure(f"gives prompt_logprobs that depend on the temperature: {REMEDY}")
        return written

    async def stream(
        self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], ends: Iterable[int] = ()
    ) -> AsyncGenerator[Tokens, None]:
        """The continuation of a prompt, as it is written; closing it ends the request.

        Args:
            prompt: token ids.
            max_tokens: most tokens, at least 1; prompt and continuation must fit the context.
            sampling: fields of the request, all of those of `GREEDY`.
            ends: tokens after which the continuation ends, and no others.

        Raises:
            WSDServerError: the server refuses, fails at every attempt, or stops in the middle.
        """
        body = {
            **self._body(prompt, max_tokens, sampling),
            "stream": True,
            "return_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": sorted(token for token in ends if 0 <= token < self.vocabulary),  # others are refused
        }
        received = 0
        async with aclosing(self.events("/completions", body, self._tokens)) as events:
            async for tokens in events:
                received += len(tokens.ids)
                if tokens.finish == "length" and received < max_tokens:
                    raise self.failure(f"ended after {received} of {max_tokens} tokens, at a limit of its own")
                yield tokens
                if tokens.finish:
                    return
        raise self.failure(f"stopped in the middle, after {received} tokens")

    async def score(
        self, prompt: Sequence[int], tokens: Sequence[int], best: bool, sampling: Mapping[str, Any] = GREEDY
    ) -> list[Drafted]:
        """The model's log-probabilities of tokens after a prompt; with `best`, those of its likeliest tokens too.

        Prompt, tokens and one token more must fit the context.

        Raises:
            WSDServerError: as for `stream`.
        """
        # Never with skip_reading_prefix_cache=False, beside which prompt_logprobs kill vLLM 0.32.
        body = {**self._body([*prompt, *tokens], 1, sampling), "prompt_logprobs": int(best)}
        listed = self._choice(await self.content("POST", "/completions", body)).get("prompt_logprobs")
        if listed is None:
            raise self.failure("gives no prompt_logprobs, by which drafts are checked: serve the base with vLLM")
        try:
            rows = [{name: entry["logprob"] for name, entry in row.items()} for row in listed[len(prompt) :]]
            drafted = [Drafted(token, row[str(token)], max(row.values())) for token, row in zip(tokens, rows, strict=True)]
            values = [value for row in rows for value in row.values()]
            if not all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            tried = len(prompt) + len(tokens)
            raise self.failure(f"gives prompt_logprobs of another form for {tried} tokens") from None
        if (highest := max(values)) > 1e-3:
            raise self.failure(f"gives {highest:g} as a log-probability in prompt_logprobs: {REMEDY}")
        return drafted

    def _body(self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, **sampling}

    def _tokens(self, event: bytes) -> Tokens | None:
        """The tokens of an event; None for an event that has none and does not end the stream."""
        choice = self._choice(event)
        ids, text, finish = (choice.get(name) for name in ("token_ids", "text", "finish_reason"))
        if ids is None and (text or finish is None):
            raise self.failure("gives no token_ids in a stream (return_token_ids): serve the model with vLLM")
        ids, known = ids or [], range(self.vocabulary)
        if not isinstance(ids, list) or not all(type(token) is int and token in known for token in ids):
            raise self.failure("sent no tokens of its vocabulary", f" but {self.start(event)}")
        if finish not in (None, "stop", "length"):
            raise self.failure("stopped in the middle", f", with finish_reason {finish!r}")
        return Tokens(ids, text if isinstance(text, str) else "", finish) if ids or finish else None

    def _choice(self, content: bytes) -> dict[str, Any]:
        """The choice in a response or an event."""
        try:
            value = parse_json(content, self.url)
            if isinstance(value, dict) and "error" in value:
                error = value["error"]
                message = error.get("message") if isinstance(error, dict) else error
                raise self.failure("stopped in the middle", f": {message}")
            choice = (value["choices"] or [{"token_ids": []}])[0]
            if not isinstance(choice, dict):
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise self.failure("sent no completion", f" but {self.start(content)}") from None
        return choice
