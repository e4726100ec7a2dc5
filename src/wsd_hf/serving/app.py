"""The web application: an answerer in the form of OpenAI's API.

Logs and metrics hold no text of a request or an answer, and no message of an error, which may repeat some: its kind alone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import WSDServerError, WSDValueError
from .body import Defaults, Refused, read_order
from .completion import Completion
from .hosts import NameRequired
from .metrics import Metrics, Outcome
from .replies import Reply, WholeReply, error_response, json_response, reply_to
from .requests import Answerer, ChatRequest, End

CLOSING = 5.0
"""Most seconds for which an abandoned answer may take to end its requests to other servers."""

DRAINED = 16
"""Times the limit of a body that is read of a longer one: most clients read no refusal before they have sent everything."""

RETRY_AFTER = 1
"""Seconds after which a client may try again that was refused since too many requests were open, or since a server stops."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: most bytes in the body of a request.
        body_seconds: most seconds in which a body must come.
        reading_seconds: most seconds for which a client may take no part of its answer.
        open_requests: most requests for an answer that are open at a time.
    """

    body_bytes: int = 2**20
    body_seconds: float = 30.0
    reading_seconds: float = 60.0
    open_requests: int = 256


def create_app(
    answerer: Answerer, defaults: Defaults, limits: Limits | None = None, key: str = "", names: Collection[str] = ()
) -> Starlette:
    """The application.

    Args:
        answerer: of the requests.
        defaults: settings of the answers.
        limits: of requests.
        key: token that clients must send, but for `/health`; "" for none.
        names: of this server, as for `NameRequired`; none: it may have any.
    """
    metrics = Metrics()
    card = {"id": defaults.model, "object": "model", "created": int(time.time()), "owned_by": "wsd_hf"}

    async def models(_request: Request) -> Response:
        return json_response(200, {"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] == defaults.model:
            return json_response(200, card)
        return error_response(Refused(404, f"the model here is {defaults.model!r}", "model", "model_not_found"))

    async def health(_request: Request) -> Response:
        return json_response(200, {"status": "ok"})

    async def numbers(_request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def no_route(_request: Request, error: HTTPException) -> Response:
        hint = f": this server has {', '.join(route.path for route in routes)}" if error.status_code == 404 else ""
        return error_response(Refused(error.status_code, error.detail + hint), error.headers)

    routes = [
        Route("/v1/chat/completions", _ChatCompletions(answerer, defaults, limits or Limits(), metrics), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", numbers),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            *([Middleware(NameRequired, names=names)] if names else []),
            *([Middleware(_KeyRequired, key=key)] if key else []),
        ],
        exception_handlers={HTTPException: no_route},
    )


class _KeyRequired:
    """Refuses requests without the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._has_key(dict(scope["headers"])):
            await self._app(scope, receive, send)
        else:
            refused = Refused(401, "the API key is missing or wrong: send it as a bearer token", code="invalid_api_key")
            await error_response(refused, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._key)


class _ChatCompletions:
    """The endpoint of answers."""

    def __init__(self, answerer: Answerer, defaults: Defaults, limits: Limits, metrics: Metrics) -> None:
        self._answerer, self._defaults, self._limits, self._metrics = answerer, defaults, limits, metrics
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        outcome: Outcome = "left"
        reply: Reply = WholeReply(Completion(self._defaults.model), scope, receive, send)
        try:
            with self._counted():
                order = read_order(await _body(Request(scope, receive), self._limits), self._defaults)
                reply = reply_to(order, self._defaults.model, scope, receive, send)
                async with _while_connected(receive):
                    outcome = await self._answer(order.chat, reply, began)
        except Refused as refused:
            outcome = "refused"
            await reply.fail(refused)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # of the whole process, whose grace is over: a client's is caught where it leaves
            outcome = "failed"
            await reply.fail(Refused(503, "this server is being stopped", code="stopping", retry_after=RETRY_AFTER))
        finally:
            self._metrics.requests.labels(outcome).inc()
            logger.info("a request was %s after %.2f s", outcome, time.monotonic() - began)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """One of the open requests."""
        if self._open >= self._limits.open_requests:
            problem = f"{self._open} requests are open, as many as this server takes: try again later"
            raise Refused(429, problem, code="too_many_requests", retry_after=RETRY_AFTER)
        self._open += 1
        self._metrics.open.inc()
        try:
            yield
        finally:
            self._open -= 1
            self._metrics.open.dec()

    async def _answer(self, request: ChatRequest, reply: Reply, began: float) -> Outcome:
        """Sends the answer, or the error in its place."""
        items = self._answerer.answer(request)
        try:
            begun = False
            async for item in items:
                seconds = time.monotonic() - began
                if isinstance(item, End):
                    self._metrics.ended(item, seconds)
                elif not begun:
                    begun = True
                    self._metrics.first_token.observe(seconds)
                if not await self._taken(reply.add(item)):
                    return "left"
            return "answered"
        except WSDValueError as error:
            refused = Refused(400, str(error))
        except WSDServerError as error:
            refused = Refused(502, f"the {error.role}'s server failed ({error.reason})", code="upstream_failed")
            logger.warning("%s", refused)
        except Exception as error:
            logger.error("%s:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            refused = Refused(500, f"this server failed ({type(error).__name__})")
        finally:
            with anyio.move_on_after(CLOSING, shield=True):
                await items.aclose()
        if not await self._taken(reply.fail(refused)):
            return "left"
        return "refused" if refused.status < 500 else "failed"

    async def _taken(self, sending: Awaitable[None]) -> bool:
        """Sends a part of a response; returns False for a client that takes nothing for too long."""
        with anyio.move_on_after(self._limits.reading_seconds) as scope:
            await sending
        return not scope.cancelled_caught


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request, which is JSON and within the limits."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other sites may send anything else from a browser
        raise Refused(415, "Content-Type: must be application/json")
    content, length = bytearray(), 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for part in request.stream():
                length += len(part)
                if length <= limits.body_bytes:
                    content += part
                elif length > DRAINED * limits.body_bytes:
                    break
    except TimeoutError:
        raise Refused(408, f"the body has not come within {limits.body_seconds:g} seconds") from None
    if length > limits.body_bytes:
        raise Refused(413, f"the body has more than {limits.body_bytes:,} bytes, the most that this server takes")
    return bytes(content)


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels what is within it when the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()
