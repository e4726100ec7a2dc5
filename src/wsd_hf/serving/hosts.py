"""Names of a server in the header Host.

A page of another site can point a name of its own at a loopback address (DNS rebinding), and then counts as the same site.
"""

from __future__ import annotations

import ipaddress
import re
import reprlib
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .body import Refused
from .replies import error_response

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names by which all machines call themselves."""


def own_names(host: str) -> list[str]:
    """Names of a server that listens on a loopback address; none for one that other machines reach, by names of theirs."""
    address = str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    return [*LOOPBACK, host.lower()] if ipaddress.ip_address(address).is_loopback else []


class NameRequired:
    """Refuses requests for a server of another name.

    Args:
        app: gets the others.
        names: of the server, in lower case; IPv6 addresses in brackets.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        if re.sub(r":\d*$", "", host).lower() in self._names:
            await self._app(scope, receive, send)
        else:
            problem = f"Host: {reprlib.repr(host)} is no name of this server, which listens on a loopback address"
            await error_response(Refused(400, f"{problem}: call it localhost, also from a proxy"))(scope, receive, send)
