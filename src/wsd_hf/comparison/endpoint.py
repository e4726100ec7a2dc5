"""A model behind an HTTP API in the form of OpenAI's chat completions, which many servers have.

One request of one kind is all that a judge needs, so the client is the standard library's: no package to install.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import WSDValueError
from ..remote.address import WAITS, Address, may_pass, retry_after
from ..text.json_data import parse_json

MOST_TOKENS = 2048
"""Tokens of a reply: room for a model that reasons first, and an end for one that rambles."""


@dataclass(frozen=True)
class Endpoint(Address):
    """A model behind an API of chat completions; `/chat/completions` is added to its URL.

    Attributes:
        sleep: waits for some seconds before an attempt.
    """

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
            raise WSDValueError(self.named(f"sent no chat completion but {self.start(content)}"))
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
        request = Request(f"{self.url}/chat/completions", data=body, headers=self.headers)
        try:
            with build_opener(_NoRedirects).open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                problem = self.named("".join(self.refusal(error.code, error.headers.get("Location"), error.read())))
            if not may_pass(error.code):
                raise WSDValueError(problem) from None
            raise _Transient(problem, retry_after(error.headers.get("Retry-After"))) from None
        except (OSError, HTTPException) as error:
            raise _Transient(self.named(f"{type(error).__name__}: {error}")) from None


class _Transient(WSDValueError):
    """A failure after which the next attempt may succeed; `wait`: seconds until then that the server names."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirects(HTTPRedirectHandler):
    """Leaves a redirect as the failure that it is here: prompts and key go to no other address."""

    def redirect_request(self, *_args: Any) -> None:
        return None
