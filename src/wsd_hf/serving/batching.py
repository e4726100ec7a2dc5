"""Requests that wait at the same time, answered in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

from ..text.chat import Messages

R = TypeVar("R", bound="Waiting")


@dataclass(eq=False)
class Waiting:
    """A request that waits for its batch."""

    messages: Messages
    settings: dict[str, Any]
    """Keywords of `generate`; equal for requests that may share a batch."""
    seed: int | None
    """Of the sampling; such a request shares no batch, whose other rows would draw from the same numbers."""
    outcome: Any = field(default=None, init=False)
    """None until the request is answered; then its answer, or the exception that it is refused with."""
    taken: bool = field(default=False, init=False)
    """True from the start of its batch on."""
    begun: bool = field(default=False, init=False)
    """True once a part of its answer is out: then it is not answered again if its batch fails."""


class Batcher(Generic[R]):
    """Answers requests in batches, one batch at a time, in a thread.

    Args:
        answer: the outcomes of a batch, in its order; an exception refuses those requests alone that raise it by themselves.
        gathering: seconds for which a batch waits for more requests: those answered together come back together.
    """

    def __init__(self, answer: Callable[[list[R]], Sequence[Any]], gathering: float) -> None:
        self._answer, self._gathering = answer, gathering
        self._waiting: list[R] = []
        self._turn = anyio.Lock()

    async def outcome(self, request: R, most: int) -> Any:
        """The answer to a request, in a batch of at most `most` with others that are waiting then."""
        self._waiting.append(request)
        try:
            async with self._turn:
                if request.outcome is None:
                    await anyio.sleep(self._gathering)
                    batch = self._batch(request, most)
                    await anyio.to_thread.run_sync(self._answer_all, batch)
        finally:
            self._waiting.remove(request)
        if isinstance(request.outcome, Exception):
            raise request.outcome
        return request.outcome

    def _batch(self, first: R, most: int) -> list[R]:
        """The request whose turn it is, and those waiting that can be answered with it."""
        batch = [first]
        if first.seed is None:
            others = [one for one in self._waiting if one is not first and one.outcome is None and one.seed is None]
            batch += [one for one in others if one.settings == first.settings][: most - 1]
        for request in batch:
            request.taken = True
        return batch

    def _answer_all(self, batch: list[R]) -> None:
        try:
            outcomes = self._answer(batch)
        except Exception as error:
            for request in batch:
                if len(batch) == 1 or request.begun:
                    request.outcome = error
                else:  # only the requests that cannot be answered shall fail
                    self._answer_all([request])
        else:
            for request, outcome in zip(batch, outcomes, strict=True):
                request.outcome = outcome
