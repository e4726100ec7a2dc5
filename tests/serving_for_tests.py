"""An application of `wsd_hf.serving` in a thread, an answerer that does as it is told, and clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import OpenAI

from time_limit import HANG
from wsd_hf.serving.app import Limits, create_app
from wsd_hf.serving.body import Defaults
from wsd_hf.serving.connections import server_of
from wsd_hf.serving.requests import Answerer, ChatRequest, End, Piece

GRACE = HANG  # seconds that a server has to end open requests
END = End("stop", prompt_tokens=3, pilot_tokens=1, base_tokens=1, switch_index=1, switch_reason="confident")


class Scripted:
    """An answerer whose items are given: pieces, an end, errors that are raised, events that are waited for.

    Attributes:
        requests: so far.
        closed: number of iterators that have ended or were closed.
    """

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.requests: list[ChatRequest] = []
        self.closed = 0

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Piece | End, None]:
        self.requests.append(request)
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, threading.Event):
                    while not item.is_set():
                        await asyncio.sleep(0.005)
                else:
                    yield item
        finally:
            self.closed += 1


@contextmanager
def running(answerer: Answerer, *, model: str = "tiny", max_tokens: int = 64, **options: Any) -> Iterator[str]:
    """The address of an application over an answerer; the options are those of `create_app`."""
    app = create_app(answerer, Defaults(model, max_tokens=max_tokens), **options)
    server = server_of(app, options.get("limits") or Limits(), GRACE)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(2 * HANG)
        listener.close()
        assert not thread.is_alive()


def client(url: str, key: str = "none") -> OpenAI:
    """A client that tries once."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=HANG)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def post(url: str, **body: Any) -> httpx.Response:
    """The response to a request for an answer."""
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": user("Hello."), **body}, timeout=HANG)


def get(url: str, **options: Any) -> httpx.Response:
    """The response to a request of a page."""
    return httpx.get(url, timeout=HANG, **options)


def asked(url: str, **body: Any) -> HTTPConnection:
    """A connection on which an answer was asked for; closing it is leaving."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=HANG)
    content = json.dumps({"messages": user("Hello."), **body})
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    return connection


def numbers(url: str) -> dict[str, float]:
    """The metrics by their names and labels."""
    lines = [line for line in get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def wait_until_over(url: str, **outcomes: float) -> dict[str, float]:
    """The metrics, as soon as no request is open and so many had these outcomes: they are counted after the response."""
    wanted = {f'wsd_requests_total{{outcome="{outcome}"}}': count for outcome, count in outcomes.items()}
    wait_until(lambda: {"wsd_open_requests": 0, **wanted}.items() <= numbers(url).items())
    return numbers(url)


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns as soon as the condition holds; fails if it doesn't come to that."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def text(chunks: Sequence[Any]) -> str:
    """The text of a stream's chunks."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
