"""Requests for an answer to a chat, and the parts of the answer, independent of HTTP and of the models' place."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from ..engine.strategy import StrategyConfig
from ..speculation.rule import SwitchReason
from ..text.chat import Messages
from ..text.streaming import FinishReason, Likelihood, Writer


@dataclass(frozen=True)
class ChatRequest:
    """A chat to be answered, and the settings of its answer.

    Attributes:
        messages: the chat, as `build_inputs` takes it.
        strategy: its settings; None: the base answers alone.
        max_tokens: most tokens in the answer.
        temperature: of sampling; 0 is greedy.
        top_p, top_k: of sampling; None: in this process as the base's generation config has them, on servers no limit.
        seed: of sampling, in [-2**63, 2**63); None: a new sample each time.
        stop: strings at which the answer ends; they are no part of it.
        likelihoods: whether the pieces of the answer need their likelihoods, which take some time.
    """

    messages: Messages
    strategy: StrategyConfig | None
    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    likelihoods: bool = False


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, in whole characters, with its writer; never taken back.

    It may be an empty text, for tokens that show none.
    """

    text: str
    writer: Writer | None
    likelihoods: tuple[Likelihood, ...] = ()
    """Of the writer's tokens that the piece begins or completes, under the base, where they are asked for and known."""

    @property
    def drafted(self) -> tuple[Likelihood, ...]:
        """The likelihoods, if the tokens are the pilot's."""
        return self.likelihoods if self.writer == "pilot" else ()


class Stripping:
    """Takes the space around an answer off its pieces."""

    def __init__(self) -> None:
        self._space: list[Piece] = []
        self._begun = False

    def add(self, text: str, writer: Writer | None, likelihoods: tuple[Likelihood, ...] = ()) -> list[Piece]:
        """The pieces that can be sent after the next one; space is withheld until text follows."""
        text = text if self._begun else text.lstrip()
        body = text.rstrip()
        space = text[len(body) :]
        if not body:
            self._space.append(Piece(space, writer, likelihoods))
            return []
        pieces = [*self._space, Piece(body, writer, likelihoods)]
        self._begun, self._space = True, [Piece(space, writer)] if space else []
        return pieces

    def rest(self) -> list[Piece]:
        """Empty pieces for the tokens of space that was taken off at the end, if their likelihoods are known."""
        return [Piece("", piece.writer, piece.likelihoods) for piece in self._space if piece.likelihoods]


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        finish_reason: "length" if `max_tokens` cut the answer, else "stop".
        prompt_tokens: in the base's prompt.
        pilot_tokens, base_tokens: of the answer, by writer, in the base's vocabulary; tokens that are the work of several
            models count as the base's.
        switch_index, switch_reason: as in `WSDOutput`; -1 and None under another strategy.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    pilot_tokens: int
    base_tokens: int
    switch_index: int
    switch_reason: SwitchReason | None


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
