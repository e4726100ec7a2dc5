"""Requests to an API: a limit of those that are open, attempts that are repeated, and a time limit of each part.

A request has a connection of its own, which is closed with the request: so closing a response early ends the request at the
server. An attempt is repeated as long as nothing of its response has come.
"""

from __future__ import annotations

import functools
import ssl
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import httpx

from ..errors import WSDServerError, WSDValueError
from .address import WAITS, Address, may_pass, retry_after

T = TypeVar("T")

Read = Callable[[httpx.Response], AsyncGenerator[T, None]]
"""A way to read a response in parts, each of which must come in time."""


class _Passing(Exception):
    """A failure after which the next attempt may succeed; `wait`: seconds until then that the server names."""

    def __init__(self, failure: WSDServerError, wait: float = 0.0) -> None:
        super().__init__(failure)
        self.failure, self.wait = failure, wait


@dataclass(frozen=True)
class Client(Address):
    """An API that is sent requests.

    Attributes:
        open_requests: most requests that are open at a time in an event loop; others wait for their turn.
        sleep: waits for some seconds before a further attempt.
        role: of the model in its pair, for errors; "" outside of one.
    """

    model: str = ""
    open_requests: int = 64
    sleep: Callable[[float], Awaitable[None]] = field(default=anyio.sleep, repr=False)
    role: str = field(default="", kw_only=True)
    _turns: anyio.lowlevel.RunVar[anyio.Semaphore] = field(
        # anyio before 4.10 takes run variables of one name for the same, also those of copies from other processes.
        default_factory=lambda: anyio.lowlevel.RunVar(f"turns {uuid.uuid4()}"),
        init=False,
        repr=False,
        compare=False,
    )

    def failure(self, reason: str, words: str = "") -> WSDServerError:
        """An error of this server; `words`: its own, which follow the reason in the message alone."""
        return WSDServerError(self.named(reason + words), reason=reason, role=self.role)

    async def content(self, method: str, path: str, body: Any = None) -> bytes:
        """A whole response.

        Raises:
            WSDServerError: the server refuses, fails at every attempt, or is silent.
        """
        async with aclosing(self._parts(method, path, body, _whole)) as parts:
            return await anext(parts)

    async def events(self, path: str, body: Any, parse: Callable[[bytes], T | None]) -> AsyncGenerator[T, None]:
        """The server-sent events of a response.

        Args:
            path, body: of the request.
            parse: the value of an event's data; None for an event that counts as silence.

        Raises:
            WSDServerError: as for `content`, or the connection breaks in the middle.
        """
        async with aclosing(self._parts("POST", path, body, functools.partial(_events, parse))) as parts:
            async for part in parts:
                yield part

    async def _parts(self, method: str, path: str, body: Any, read: Read[T]) -> AsyncGenerator[T, None]:
        """Parts of the first response that has one."""
        for wait in (*WAITS, None):
            begun = False
            try:
                async with aclosing(self._attempt(method, path, body, read)) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except _Passing as passing:
                if begun or wait is None:
                    raise passing.failure from None
                pause = max(wait, passing.wait)
            await self.sleep(pause)

    async def _attempt(self, method: str, path: str, body: Any, read: Read[T]) -> AsyncGenerator[T, None]:
        async with self._turn(), _http() as client:
            with self._in_time():
                request = client.build_request(method, self.url + path, json=body, headers=self.headers)
                response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    with self._in_time():
                        content = await response.aread()
                    refusal = self.refusal(response.status_code, response.headers.get("Location"), content)
                    if not may_pass(response.status_code):
                        raise self.failure(*refusal)
                    raise _Passing(self.failure(*refusal), retry_after(response.headers.get("Retry-After")))
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
        """Limits the open requests of the running event loop."""
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
            raise self.failure(f"sent nothing for {self.timeout:g} seconds") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Passing(self.failure(type(error).__name__, f": {error}")) from None


async def _whole(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    yield await response.aread()


async def _events(parse: Callable[[bytes], T | None], response: httpx.Response) -> AsyncGenerator[T, None]:
    """Values of events, up to the last one."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")  # not at other line breaks, which may be part of a JSON text
        for line in lines:
            name, _, data = line.partition(b":")
            if name == b"data":
                if data.strip() == b"[DONE]":
                    return
                if (value := parse(data.strip())) is not None:
                    yield value


def _http() -> httpx.AsyncClient:
    """A client for one request, with the proxies and certificates of the environment."""
    try:
        return httpx.AsyncClient(verify=_tls(), timeout=None)
    except (ImportError, ValueError, OSError) as error:
        raise WSDValueError(
            "the proxies and certificates of the environment (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY, SSL_CERT_FILE, SSL_CERT_DIR) "
            f"can't be used ({error}): correct or unset them"
        ) from None


@functools.cache
def _tls() -> ssl.SSLContext:
    """Certificates that are read once: it takes as long as a request."""
    context: ssl.SSLContext = httpx.create_ssl_context()
    return context
