"""HTTP responses: JSON, errors, and answers that are sent whole or piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .body import Order, Refused
from .completion import Completion, error_object, event
from .requests import End, Piece

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # for nginx, which would hold the pieces back
]


def json_response(status: int, data: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A response that is JSON."""
    return Response(json.dumps(data), status, headers, media_type="application/json")


def error_response(refused: Refused, headers: Mapping[str, str] | None = None, text: str = "") -> Response:
    """A response that is an error; `text`: of the answer so far."""
    headers = dict(headers or {})
    if refused.retry_after is not None:
        headers["Retry-After"] = str(refused.retry_after)
    return json_response(refused.status, error_object(refused, text), headers)


class Reply(Protocol):
    """The response to one request for an answer."""

    async def add(self, item: Piece | End) -> None:
        """Takes the next part of the answer."""

    async def fail(self, refused: Refused) -> None:
        """Ends the response with an error."""


class WholeReply:
    """A response that is sent when the answer is whole."""

    def __init__(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        self._completion, self._connection = completion, (scope, receive, send)
        self._text = ""

    async def add(self, item: Piece | End) -> None:
        """As `Reply.add`."""
        if isinstance(item, Piece):
            self._text += item.text
        else:
            await json_response(200, self._completion.whole(self._text, item))(*self._connection)

    async def fail(self, refused: Refused) -> None:
        """As `Reply.fail`; the error holds the text so far."""
        await error_response(refused, text=self._text)(*self._connection)


class StreamedReply:
    """A response whose pieces are sent as they come; its status is that of the first."""

    def __init__(self, completion: Completion, include_usage: bool, scope: Scope, receive: Receive, send: Send) -> None:
        self._completion, self._include_usage, self._connection = completion, include_usage, (scope, receive, send)
        self._started = False

    async def add(self, item: Piece | End) -> None:
        """As `Reply.add`."""
        if not self._started:
            await self._start()
        if isinstance(item, Piece):
            await self._send(event(self._completion.piece(item)))
        else:
            usage = event(self._completion.usage(item)) if self._include_usage else b""
            await self._send(event(self._completion.last(item)) + usage + b"data: [DONE]\n\n", more=False)

    async def fail(self, refused: Refused) -> None:
        """As `Reply.fail`; an event in a response that has begun."""
        if self._started:
            await self._send(event(error_object(refused)), more=False)
        else:
            await error_response(refused)(*self._connection)

    async def _start(self) -> None:
        self._started = True
        _, _, send = self._connection
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._send(event(self._completion.first()))

    async def _send(self, body: bytes, more: bool = True) -> None:
        _, _, send = self._connection
        await send({"type": "http.response.body", "body": body, "more_body": more})


def reply_to(order: Order, model: str, scope: Scope, receive: Receive, send: Send) -> Reply:
    """The response to a request."""
    completion = Completion(model)
    if order.stream:
        return StreamedReply(completion, order.include_usage, scope, receive, send)
    return WholeReply(completion, scope, receive, send)
