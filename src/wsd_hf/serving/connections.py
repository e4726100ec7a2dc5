"""Connections of clients: the most that are open, and the time in which each must send a request."""

from __future__ import annotations

import asyncio
import logging

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import Limits

SPARE = 256
"""Most connections beside those with an open request: of health checks, refused requests, and clients that wait."""

IDLE = 30.0
"""Seconds after which a connection is closed on which no head of a request has come, or the rest of an answer is not taken."""

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that is closed if its client sends nothing; uvicorn waits for the first request forever.

    Connections from `limit_concurrency` on are closed at once. A process that runs out of files instead fills its log.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to watch the connection, or closes it."""
        super().connection_made(transport)
        self._watching = self.loop.call_later(IDLE, self._watch, None)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            logger.warning("a connection was closed: %d are open, as many as this server takes", len(self.connections) - 1)
            transport.abort()
            self.connections.discard(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the watch."""
        self._watching.cancel()
        super().connection_lost(exc)

    def _watch(self, before: object) -> None:
        """Closes the connection if it was idle all the time since it was in the state `before`."""
        answering = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
        state = object() if answering else self.cycle
        if state is before:
            self.transport.abort()
        else:
            self._watching = self.loop.call_later(IDLE, self._watch, state)


def server_of(app: ASGIApp, limits: Limits, grace: int) -> uvicorn.Server:
    """The server of an application; `grace`: seconds that open requests have to end once it is stopped.

    Its parser of HTTP is h11, which limits the length of a head; uvicorn would prefer httptools, which doesn't.
    """
    settings = uvicorn.Config(
        app,
        http=Connection,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.open_requests + SPARE,
        timeout_graceful_shutdown=grace,
    )
    return uvicorn.Server(settings)
