"""Bodies of requests for a chat completion, in the form of OpenAI's API."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..engine.numbers import check_integer, check_number, check_positive_integer, check_probability
from ..engine.strategy import check_choice
from ..errors import WSDError, WSDValueError
from ..strategies.wsd.config import WSDConfig
from ..text.chat import Messages, check_messages
from ..text.json_data import check_texts, parse_json
from .requests import ChatRequest

STRATEGY = ("switch_criteria", "wsd_threshold", "wsd_window_size", "wsd_ignore_repeats")
"""Fields with settings of the decoding, by their keywords of `generate`; the rule by which others are checked is first."""

HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "tool_choice",
    "user",
}
"""Fields that change no answer of a model without tools."""

WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that would change an answer, each with the values that don't."""

MOST_STOPS = 4
"""Most stop strings of a request, as in OpenAI's API."""

LONGEST_STOP = 1000
"""Most characters of a stop string: so many at the end of the answer are compared after each token."""

LEAST_TEMPERATURE = 1e-6
"""Least temperature above 0: logits that are divided by a smaller one may overflow."""

MOST_TEMPERATURE = 2.0
"""As in OpenAI's API; vLLM refuses others too."""

LONGEST_MESSAGE = 500
"""Most letters of an error: the values that it repeats may be as long as a body."""

SEEDS = 2**63
"""Number of seeds, from 0 on."""

T = TypeVar("T")
D = TypeVar("D")


class Refused(WSDError):
    """A request that is not answered.

    Attributes:
        status: of the HTTP response.
        param: field of the body that is at fault, if one is.
        code: short name of the fault, if it has one.
        retry_after: seconds after which the same request may succeed, if it may.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(_short(message))
        param = None if param is None else _short(param)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


@dataclass(frozen=True)
class Defaults:
    """Settings of the answers to requests that leave them out.

    Attributes:
        model: name of the pair, in requests and answers.
        strategy: settings of Weak-to-Strong Decoding.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        max_tokens: most tokens in an answer; a request may have fewer.
    """

    model: str
    strategy: WSDConfig = field(default_factory=WSDConfig)
    temperature: float = 0.0
    top_p: float | None = None
    max_tokens: int = 2048


@dataclass(frozen=True)
class Order:
    """A request, and the form of its answer.

    Attributes:
        chat: the request.
        stream: whether the answer is sent piece by piece.
        include_usage: whether a stream ends with the numbers of its tokens.
    """

    chat: ChatRequest
    stream: bool
    include_usage: bool


def read_order(content: bytes, defaults: Defaults) -> Order:
    """Reads the body of a request.

    Raises:
        Refused: naming the field and the rule.
    """
    fields = _Fields(content)
    model = fields.take("model", _text, defaults.model)
    if model != defaults.model:
        raise Refused(404, f"model={reprlib.repr(model)}: the model here is {defaults.model!r}", "model", "model_not_found")
    messages = fields.take("messages", _messages, None)
    if messages is None:
        raise Refused(400, "messages is missing: send the chat", "messages")
    strategy = defaults.strategy
    for name in STRATEGY:
        strategy = fields.take(name, functools.partial(_with_setting, strategy), strategy)
    most = functools.partial(check_positive_integer, most=defaults.max_tokens)
    chat = ChatRequest(
        messages=messages,
        strategy=strategy,
        max_tokens=min(fields.take(name, most, defaults.max_tokens) for name in ("max_tokens", "max_completion_tokens")),
        temperature=fields.take("temperature", check_temperature, defaults.temperature),
        top_p=fields.take("top_p", check_probability, defaults.top_p),
        top_k=fields.take("top_k", check_positive_integer, None),
        seed=fields.take("seed", _seed, None),
        stop=fields.take("stop", _stop_strings, ()),
    )
    stream = fields.take("stream", _switch, False)
    include_usage = fields.take("stream_options", _include_usage, False)
    fields.check_rest()
    return Order(chat, stream, include_usage)


class _Fields:
    """Fields of a body that are still to be read; null counts as left out."""

    def __init__(self, content: bytes) -> None:
        try:
            body = parse_json(content, "the body")
            check_texts(body, "the body")
        except WSDValueError as error:
            raise Refused(400, str(error)) from None
        if not isinstance(body, dict):
            raise Refused(400, "the body: must be an object of JSON")
        self._fields = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, check: Callable[[str, Any], T], default: D) -> T | D:
        """The value of a field, checked."""
        if name not in self._fields:
            return default
        try:
            return check(name, self._fields.pop(name))
        except WSDValueError as error:
            raise Refused(400, str(error), name) from None

    def check_rest(self) -> None:
        """Raises unless all other fields are without effect."""
        for name, value in self._fields.items():
            if name not in HARMLESS and value not in WITHOUT_EFFECT.get(name, ()):
                problem = f"{name}={reprlib.repr(value)}: this server has no such setting; leave it out"
                raise Refused(400, problem, name, "unsupported_parameter")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise WSDValueError(f"{name}={reprlib.repr(value)}: must be a text")
    return value


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def _with_setting(config: WSDConfig, name: str, value: Any) -> WSDConfig:
    return WSDConfig.resolve({name: value}, config)


def check_temperature(name: str, value: Any) -> float:
    """A temperature that models on servers and in this process can sample at, or 0.

    Raises:
        WSDValueError: it is none.
    """
    number = check_number(name, value, least=0)
    if 0 < number < LEAST_TEMPERATURE:
        raise WSDValueError(f"{name}={value!r}: must be 0, which is greedy, or at least {LEAST_TEMPERATURE:f}")
    if number > MOST_TEMPERATURE:
        raise WSDValueError(f"{name}={value!r}: must be at most {MOST_TEMPERATURE:g}")
    return number


def _switch(name: str, value: Any) -> bool:
    check_choice(name, value, (True, False))
    return bool(value)


def _include_usage(name: str, value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise WSDValueError(f"{name}={reprlib.repr(value)}: must be an object, whose only key is include_usage")
    return _switch(f"{name}.include_usage", value.get("include_usage") or False)


def _seed(name: str, value: Any) -> int:
    seed = check_integer(name, value)
    if not 0 <= seed < SEEDS:
        raise WSDValueError(f"{name}={seed}: must be at least 0 and below 2**63")
    return seed


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    texts = isinstance(stops, list) and all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    if not texts or len(stops) > MOST_STOPS:
        rule = f"a text of at most {LONGEST_STOP:,} characters, or a list of at most {MOST_STOPS}"
        raise WSDValueError(f"{name}={reprlib.repr(value)}: must be {rule}")
    return tuple(stops)


def _messages(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise WSDValueError(f"{name}={reprlib.repr(value)}: must be a list of objects with a role and a content")
    messages = [_message(f"{name}[{position}]", message) for position, message in enumerate(value)]
    check_messages(messages)
    return messages


def _message(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one text; "developer" is OpenAI's newer name for "system"."""
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, "", []):
            raise WSDValueError(f"{name}.{key}={reprlib.repr(value)}: the models read role and content alone")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise WSDValueError(f"{name}.content holds {reprlib.repr(part.get('type'))}: the models read text alone")
        content = "".join(part["text"] for part in parts)
    return {"role": "system" if role == "developer" else role, "content": content}
