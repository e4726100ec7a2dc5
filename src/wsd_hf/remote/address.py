"""Addresses of models behind HTTP APIs in OpenAI's form, and the rules of all requests to them.

No redirect is followed, a key is in one header and nowhere else, and a failure that may pass is waited for.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..errors import WSDValueError
from ..text.json_data import parse_json

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, unless the server names more."""

LONGEST_WAIT = 60.0
"""Most seconds of a server's `Retry-After` that are waited."""

RETRIED = {408, 409, 425, 429}
"""Statuses below 500 after which the next attempt may succeed."""


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
class Address:
    """A model behind an API.

    Attributes:
        url: of the API; the path of a request is added to it.
        model: its name there.
        key: sent to that URL as a bearer token; "" for servers that need none.
        timeout: seconds for which the server may be silent.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request with JSON."""
        headers = {"Content-Type": "application/json", "User-Agent": "wsd_hf"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def named(self, problem: str) -> str:
        """A problem with its place."""
        return f"{self.url}{f', model {self.model}' if self.model else ''}: {self._hidden(problem)}"

    def refusal(self, status: int, location: str | None, content: bytes) -> tuple[str, str]:
        """The reason of a refusal, and the server's own words after it; `location` is the header of a redirect."""
        if 300 <= status < 400:
            return f"answered {status}", f", a redirect to {location}: give that address, if it can be trusted"
        try:
            message = parse_json(content, "")["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = None
        return f"answered {status}", f": {message if isinstance(message, str) else self.start(content)}"

    def start(self, content: bytes) -> str:
        """The beginning of a response, for errors."""
        return reprlib.repr(self._hidden(content.decode(errors="replace")))

    def _hidden(self, text: str) -> str:
        """A text without the key, which some servers repeat."""
        return text.replace(self.key, "***") if self.key else text


def may_pass(status: int) -> bool:
    """True for the status of a failure after which the next attempt may succeed."""
    return status >= 500 or status in RETRIED


def retry_after(value: str | None) -> float:
    """Seconds that the header Retry-After names; 0 for none, and for a date."""
    return min(float(value), LONGEST_WAIT) if value and re.fullmatch(r"\d{1,9}", value) else 0.0
