"""A model behind a server of OpenAI-style completions that takes token ids and gives log-probabilities of prompts (vLLM's).

A request has a connection of its own, which is closed with the request: so a stream that is closed early ends its request at
the server. An attempt is repeated as long as nothing of its answer has come.
"""

from __future__ import annotations

import functools
import itertools
import math
import ssl
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import anyio
import anyio.lowlevel
import httpx

from ..engine.numbers import check_number, check_positive_integer
from ..errors import WSDServerError, WSDValueError
from ..speculation.rule import Drafted
from ..text.json_data import parse_json
from .address import WAITS, Address, check_key, check_url, may_pass, retry_after

GREEDY: Mapping[str, float] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields of a request that is decoded greedily. All are sent, since servers take others from a model's generation config."""

FLAT = 4.0
"""Temperature under which log-probabilities of a prompt are asked for, to see that they don't depend on it."""

TOLERANCE = 0.5
"""Most by which log-probabilities of the same prompt may differ from request to request: servers batch, in low precision."""

REMEDY = "raw ones are needed, start it with --logprobs-mode raw_logprobs"

_NUMBERS = itertools.count()  # anyio before 4.10 takes run variables of one name for the same

Read = Callable[[httpx.Response], AsyncGenerator[bytes, None]]
"""A way to read a response in parts."""


class Tokens(NamedTuple):
    """Token ids of a stream that came together."""

    ids: list[int]
    finish: Literal["stop", "length"] | None
    """Reason for the stream's end; None if more may come."""


class _Passing(WSDServerError):
    """A failure after which the next attempt may succeed; `wait`: seconds until then that the server names."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Server(Address):
    """A model behind a server of completions.

    Args:
        url: of the API, such as "http://localhost:8000/v1".
        model: its name there; "" for the server's only one.
        key: sent to that URL as a bearer token; "" for servers that need none.
        timeout: seconds in which the next token must come, the first one included, or a check of a draft.
        open_requests: most requests that are open at a time; others wait for their turn.
        context: most tokens of a prompt and its continuation; `RemotePair.connect` takes it from the server.
        vocabulary: width of the model's logits; `RemotePair.connect` takes it from the model's config.
        sleep: waits for some seconds before a further attempt.

    Raises:
        WSDValueError: naming the argument and the rule.
    """

    model: str = ""
    open_requests: int = 64
    context: int = sys.maxsize
    vocabulary: int = sys.maxsize
    sleep: Callable[[float], Awaitable[None]] = field(default=anyio.sleep, repr=False)
    _turns: anyio.lowlevel.RunVar[anyio.Semaphore] = field(
        default_factory=lambda: anyio.lowlevel.RunVar(f"turns {next(_NUMBERS)}"), init=False, repr=False, compare=False
    )

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
        content = await self._content("GET", "/models")
        try:
            cards = {str(card["id"]): card for card in parse_json(content, self.url)["data"]}
        except (ValueError, LookupError, TypeError):
            raise WSDServerError(self.named(f"sent no list of models but {self.start(content)}")) from None
        model = self.model or (next(iter(cards)) if len(cards) == 1 else "")
        if model not in cards:
            known = ", ".join(map(repr, cards)) or "none"
            raise WSDServerError(self.named(f"has no such model, but {known}" if self.model else f"name its model, of {known}"))
        context = cards[model].get("max_model_len")
        return replace(self, model=model, context=context if type(context) is int and context > 0 else sys.maxsize)

    async def check(self, prompt: Sequence[int], scores: bool) -> None:
        """Tries all that a call needs, on a prompt of at least two tokens; `scores`: whether it has to check drafts.

        Raises:
            WSDServerError: naming what the server lacks.
        """
        async with aclosing(self.stream(prompt, 1, GREEDY)) as stream:
            async for _ in stream:
                pass
        if scores:
            raw = await self.score(prompt[:1], prompt[1:], best=True)
            flat = await self.score(prompt[:1], prompt[1:], best=True, sampling={**GREEDY, "temperature": FLAT, "seed": 0})
            if min(drafted.best_log_prob for drafted in raw) < -math.log(self.vocabulary) - TOLERANCE:
                raise WSDServerError(self.named(f"gives logits in prompt_logprobs: {REMEDY}"))
            if any(abs(one.log_prob - other.log_prob) > TOLERANCE for one, other in zip(raw, flat, strict=True)):
                raise WSDServerError(self.named(f"gives prompt_logprobs that depend on the temperature: {REMEDY}"))

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
        async with aclosing(self._contents("POST", "/completions", body, self._events)) as contents:
            async for content in contents:
                tokens = self._tokens(content)
                received += len(tokens.ids)
                if tokens.finish == "length" and received < max_tokens:
                    raise WSDServerError(self.named(f"ended after {received} of {max_tokens} tokens, at a limit of its own"))
                yield tokens
                if tokens.finish:
                    return
        raise WSDServerError(self.named(f"stopped in the middle, after {received} tokens"))

    async def score(
        self, prompt: Sequence[int], tokens: Sequence[int], best: bool, sampling: Mapping[str, Any] = GREEDY
    ) -> list[Drafted]:
        """The model's log-probabilities of tokens after a prompt; with `best`, those of its likeliest tokens too.

        Prompt, tokens and one token more must fit the context.

        Raises:
            WSDServerError: as for `stream`.
        """
        # No prefix cache must be asked for beside prompt_logprobs: vLLM 0.32 dies of it.
        body = {**self._body([*prompt, *tokens], 1, sampling), "prompt_logprobs": int(best)}
        content = await self._content("POST", "/completions", body)
        listed = self._choice(content).get("prompt_logprobs")
        if listed is None:
            raise WSDServerError(self.named("gives no prompt_logprobs, by which drafts are checked: serve the base with vLLM"))
        try:
            rows = [{name: entry["logprob"] for name, entry in row.items()} for row in listed[len(prompt) :]]
            drafted = [Drafted(token, row[str(token)], max(row.values())) for token, row in zip(tokens, rows, strict=True)]
            values = [value for row in rows for value in row.values()]
            if not all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in values):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            tried = len(prompt) + len(tokens)
            raise WSDServerError(self.named(f"gives prompt_logprobs of another form for {tried} tokens")) from None
        if (highest := max(one.best_log_prob for one in drafted)) > 1e-3:
            raise WSDServerError(self.named(f"gives {highest:g} as a log-probability in prompt_logprobs: {REMEDY}"))
        return drafted

    def _body(self, prompt: Sequence[int], max_tokens: int, sampling: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, **sampling}

    def _choice(self, content: bytes) -> dict[str, Any]:
        """The choice in a response or an event."""
        try:
            value = parse_json(content, self.url)
            if isinstance(value, dict) and "error" in value:
                error = value["error"]
                message = error.get("message") if isinstance(error, dict) else error
                raise WSDServerError(self.named(f"stopped in the middle: {message}"))
            choice = (value["choices"] or [{"token_ids": []}])[0]
            if not isinstance(choice, dict):
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise WSDServerError(self.named(f"sent no completion but {self.start(content)}")) from None
        return choice

    def _tokens(self, content: bytes) -> Tokens:
        choice = self._choice(content)
        ids, finish = choice.get("token_ids"), choice.get("finish_reason")
        if ids is None and (choice.get("text") or finish is None):
            raise WSDServerError(self.named("gives no token_ids in a stream (return_token_ids): serve the model with vLLM"))
        known = range(self.vocabulary)
        if not isinstance(ids or [], list) or not all(type(token) is int and token in known for token in ids or ()):
            raise WSDServerError(self.named(f"sent no tokens of its vocabulary but {self.start(content)}"))
        if finish not in (None, "stop", "length"):
            raise WSDServerError(self.named(f"stopped in the middle, with finish_reason {finish!r}"))
        return Tokens(ids or [], finish)

    async def _content(self, method: str, path: str, body: Any = None) -> bytes:
        """A whole response."""
        async with aclosing(self._contents(method, path, body, self._whole)) as contents:
            return await anext(contents)

    async def _contents(self, method: str, path: str, body: Any, read: Read) -> AsyncGenerator[bytes, None]:
        """Parts of the first response that has one."""
        for wait in (*WAITS, None):
            begun = False
            try:
                async with aclosing(self._attempt(method, path, body, read)) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except _Passing as failure:
                if begun or wait is None:
                    raise WSDServerError(str(failure)) from None
                pause = max(wait, failure.wait)
            await self.sleep(pause)

    async def _attempt(self, method: str, path: str, body: Any, read: Read) -> AsyncGenerator[bytes, None]:
        async with self._turn(), httpx.AsyncClient(verify=_tls(), timeout=None) as client:
            request = client.build_request(method, self.url + path, json=body, headers=self.headers)
            with self._in_time():
                response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    with self._in_time():
                        content = await response.aread()
                    problem = self.named(self.refusal(response.status_code, response.headers.get("Location"), content))
                    if not may_pass(response.status_code):
                        raise WSDServerError(problem)
                    raise _Passing(problem, retry_after(response.headers.get("Retry-After")))
                async with aclosing(read(response)) as parts:
                    while True:
                        with self._in_time():
                            part = await anext(parts, None)
                        if part is None:
                            return
                        yield part
            finally:
                await response.aclose()

    def _turn(self) -> anyio.Semaphore:
        """Limits the open requests of an event loop."""
        try:
            return self._turns.get()
        except LookupError:
            self._turns.set(anyio.Semaphore(self.open_requests))
            return self._turns.get()

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Turns silence and broken connections into errors."""
        try:
            with anyio.fail_after(self.timeout):
                yield
        except TimeoutError:
            raise WSDServerError(self.named(f"sent nothing for {self.timeout:g} seconds")) from None
        except httpx.HTTPError as error:
            raise _Passing(self.named(f"{type(error).__name__}: {error}")) from None

    async def _whole(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        yield await response.aread()

    async def _events(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Data of server-sent events, up to the last one."""
        rest = b""
        async for part in response.aiter_bytes():
            *lines, rest = (rest + part).split(b"\n")  # not at other line breaks, which may be part of a JSON text
            for line in lines:
                name, _, data = line.partition(b":")
                if name == b"data":
                    if data.strip() == b"[DONE]":
                        return
                    yield data.strip()


@functools.cache
def _tls() -> ssl.SSLContext:
    """Certificates that are read once: it takes as long as a request."""
    context: ssl.SSLContext = httpx.create_ssl_context()
    return context
