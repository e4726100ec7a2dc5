"""Requests for an answer to a chat, and the parts of the answer, independent of HTTP and of the models' place."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from ..speculation.rule import SwitchReason
from ..strategies.wsd.config import WSDConfig
from ..text.chat import Messages
from ..text.streaming import Writer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ChatRequest:
    """A chat to be answered, and the settings of its answer.

    Attributes:
        messages: the chat, as `build_inputs` takes it.
        strategy: settings of Weak-to-Strong Decoding.
        max_tokens: most tokens in the answer.
        temperature: of sampling; 0 is greedy.
        top_p, top_k: of sampling; None: as the base's generation config has them.
        seed: of sampling, in [-2**63, 2**63); None: a new sample each time.
        stop: strings at which the answer ends; they are no part of it.
    """

    messages: Messages
    strategy: WSDConfig
    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, in whole characters, with its writer; never taken back."""

    text: str
    writer: Writer | None


class Stripping:
    """Takes the space around an answer off its pieces."""

    def __init__(self) -> None:
        self._space: list[Piece] = []
        self._begun = False

    def add(self, text: str, writer: Writer | None) -> list[Piece]:
        """The pieces that can be sent after the next one; space is withheld until text follows."""
        text = text if self._begun else text.lstrip()
        body = text.rstrip()
        space = [Piece(text[len(body) :], writer)] if len(body) < len(text) else []
        if not body:
            self._space += space
            return []
        pieces = [*self._space, Piece(body, writer)]
        self._begun, self._space = True, space
        return pieces


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        finish_reason: "length" if `max_tokens` cut the answer, else "stop".
        prompt_tokens: in the base's prompt.
        pilot_tokens, base_tokens: of the answer, by writer, in the base's vocabulary.
        switch_index, switch_reason: as in `WSDOutput`.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    pilot_tokens: int
    base_tokens: int
    switch_index: int
    switch_reason: SwitchReason


class Answerer(Protocol):
    """Models that answer chats, several at once."""

    def answer(self, request: ChatRequest) -> AsyncGenerator[Piece | End, None]:
        """The pieces of an answer as they are written, and its end; without surrounding space.

        Closed early, its row ends at the next step, or its requests to other servers are aborted.

        Raises:
            WSDValueError: a request that cannot be served; before the first piece.
            WSDServerError: a server that the answer needs fails, before the first piece or after any.
        """
        ...
