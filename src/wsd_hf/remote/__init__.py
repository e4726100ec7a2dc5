"""Weak-to-Strong Decoding over two servers: a base and a pilot behind OpenAI-style completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import WSDValueError

if TYPE_CHECKING:
    from .answer import RemoteAnswer
    from .pair import RemotePair
    from .server import Server

__all__ = ["RemoteAnswer", "RemotePair", "Server"]


def __getattr__(name: str) -> Any:
    """The public names, whose modules need the extra; `address` works without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import answer, pair, server
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "anyio"):
            raise
        raise WSDValueError(f'decoding over servers needs httpx and anyio ({error}); pip install "wsd_hf[remote]"') from None
    names = {"RemoteAnswer": answer.RemoteAnswer, "RemotePair": pair.RemotePair, "Server": server.Server}
    return names[name]
