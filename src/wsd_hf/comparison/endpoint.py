"""A model behind an HTTP API in the form of OpenAI's chat completions, which many servers have.

One request of one kind is all that a judge needs, so the client is the standard library's: no package to install, no redirect
that is followed, and a key that is in one header and nowhere else.
"""

from __future__ import annotations

import json
import re
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import WSDValueError
from ..text.json_data import parse_json

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, unless the server names more."""

LONGEST_WAIT = 60.0
"""Most seconds of a server's `Retry-After` that are waited."""

RETRIED = {408, 409, 425, 429}
"""Statuses below 500 after which the next attempt may succeed."""

MOST_TOKENS = 2048
"""Tokens of a reply: room for a model that reasons first, and an end for one that rambles."""


def check_url(name: str, url: str) -> str:
    """The URL of an API, without a slash at its end.

    Raises:
        WSDValueError: it has another form; the error does not repeat it, since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", url) or set(url) & set("@?#"):
        raise WSDValueError(f"{name}: must be http(s)://HOST[:PORT][/PATH] in ASCII, without a user, a password or a query")
    return url.rstrip("/")


def check_key(name: str, key: str) -> str:
    """A key that a header can hold.

    Raises:
        WSDValueError: it can't; the error does not repeat it.
    """
    if not re.fullmatch(r"[!-~]*", key):
        raise WSDValueError(f"{name}: holds a space, a line break or a letter outside ASCII, which no key has; copy it again")
    return key


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API.

    Attributes:
        url: of the API; `/chat/completions` is added to it.
        model: its name there.
        key: sent to that URL as a bearer token; "" for servers that need none.
        timeout: seconds for which the server may be silent.
        sleep: waits for some seconds before an attempt.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def reply(self, text: str) -> str:
        """The model's reply to one message of a user, at temperature 0; "" if it has no text.

        Raises:
            WSDValueError: the server refuses, fails at every attempt, or sends something else.
        """
        message = {"role": "user", "content": text}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": MOST_TOKENS}
        content = self._post(json.dumps(body).encode())
        try:
            found = parse_json(content, self.url)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            found = None
        if not isinstance(found, str):
            raise WSDValueError(self._named(f"sent no chat completion but {_start(content)}"))
        return found

    def _post(self, body: bytes) -> bytes:
        """The content of the first attempt that succeeds, or of the last."""
        for wait in WAITS:
            try:
                return self._attempt(body)
            except _Transient as failure:
                self.sleep(max(wait, failure.wait))
        return self._attempt(body)

    def _attempt(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "wsd_hf"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = Request(f"{self.url}/chat/completions", data=body, headers=headers)
        try:
            with build_opener(_NoRedirects).open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                problem = self._named(_refusal(error))
            if error.code < 500 and error.code not in RETRIED:
                raise WSDValueError(problem) from None
            raise _Transient(problem, _retry_after(error)) from None
        except (OSError, HTTPException) as error:
            raise _Transient(self._named(f"{type(error).__name__}: {error}")) from None

    def _named(self, problem: str) -> str:
        """A problem with its place, without the key, which some servers repeat."""
        problem = problem.replace(self.key, "***") if self.key else problem
        return f"{self.url}, model {self.model}: {problem}"


class _Transient(WSDValueError):
    """A failure after which the next attempt may succeed; `wait`: seconds until then that the server names."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirects(HTTPRedirectHandler):
    """Leaves a redirect as the failure that it is here: prompts and key go to no other address."""

    def redirect_request(self, *_args: Any) -> None:
        return None


def _refusal(error: HTTPError) -> str:
    """A status, and the server's own words."""
    if 300 <= error.code < 400:
        return f"answered {error.code}, a redirect to {error.headers.get('Location')}: give that address, if it can be trusted"
    content = error.read()
    try:
        message = parse_json(content, "")["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = None
    return f"answered {error.code}: {message if isinstance(message, str) else _start(content)}"


def _retry_after(error: HTTPError) -> float:
    """Seconds that a server names; 0 for none, and for a date."""
    value = error.headers.get("Retry-After", "")
    return min(float(value), LONGEST_WAIT) if re.fullmatch(r"\d{1,9}", value) else 0.0


def _start(content: bytes) -> str:
    return reprlib.repr(content.decode(errors="replace"))
