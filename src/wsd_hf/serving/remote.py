"""A base and a pilot on two servers, as an answerer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ..remote.answer import RemoteAnswer
from ..remote.pair import RemotePair
from .requests import ChatRequest, End, Piece, Stripping


class RemoteAnswerer:
    """A remote pair that answers requests, each by requests of its own to both servers.

    Args:
        pair: the models.
    """

    def __init__(self, pair: RemotePair) -> None:
        self._pair = pair

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Piece | End, None]:
        """As `Answerer.answer`."""
        stripping = Stripping()
        strategy: Any = request.strategy  # the pair refuses all but Weak-to-Strong Decoding
        stream = self._pair.stream(
            request.messages, strategy, max_new_tokens=request.max_tokens, stop=request.stop, **_sampling(request)
        )
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, RemoteAnswer):
                    yield _end(item)
                else:
                    for piece in stripping.add(*item):
                        yield piece


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """Keywords of a remote pair; without temperature there is no sampling."""
    if not request.temperature:
        return {}
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "seed")}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def _end(answer: RemoteAnswer) -> End:
    return End(
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_length,
        pilot_tokens=answer.draft_length,
        base_tokens=len(answer.token_ids) - answer.draft_length,
        switch_index=answer.switch_index,
        switch_reason=answer.switch_reason,
    )
