"""One visitor's questions, and the answers of all methods while they grow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from ..errors import WSDError
from ..serving.requests import Answerer, End, Piece
from ..text.chat import Messages
from .settings import Settings

REFRESH = 0.08
"""Seconds between two pictures of growing answers."""

SLOW = 0.15
"""Seconds for each piece in slow motion."""


@dataclass
class Answer:
    """One method's answer, as far as it is written.

    Attributes:
        method: its name, of `HEADINGS`.
        pieces: of its text.
        end: None until it is there.
        error: message for the reader, if the answer failed.
        stopped: whether the reader stopped it.
        messages: the chat that it answers.
    """

    method: str
    pieces: list[Piece] = field(default_factory=list)
    end: End | None = None
    error: str | None = None
    stopped: bool = False
    messages: Messages = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def draft(self) -> list[float]:
        """The base's log-probabilities of the drafted tokens so far."""
        return [likelihood.log_prob for piece in self.pieces for likelihood in piece.drafted]

    @property
    def over(self) -> bool:
        """True if nothing more will come."""
        return self.stopped or self.end is not None or self.error is not None


@dataclass
class Turn:
    """A question, and its answers under the settings that it was asked with."""

    question: str
    settings: Settings
    answers: list[Answer]

    def answer(self, method: str) -> Answer | None:
        """The answer of a method, if it was asked."""
        return next((answer for answer in self.answers if answer.method == method), None)


class Conversation:
    """The turns of one visitor, each method with its own answers before it.

    Args:
        threshold, window_size: of the switch that is shown in the last draft; the sliders move them.

    Attributes:
        turns: from the first.
    """

    def __init__(self, threshold: float, window_size: int) -> None:
        self.threshold, self.window_size = threshold, window_size
        self.turns: list[Turn] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def busy(self) -> bool:
        """True while answers are being written."""
        return not all(task.done() for task in self._tasks)

    def messages(self, method: str) -> Messages:
        """The chat of a method up to the last question; a question without an answer is forgotten.

        Where the method was not asked, the answer is that of Weak-to-Strong Decoding.
        """
        *before, last = self.turns
        messages = []
        for turn in before:
            answer = turn.answer(method) or turn.answer("wsd")
            if answer is not None and answer.text:
                messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer.text}]
        return [*messages, {"role": "user", "content": last.question}]

    async def ask(self, question: str, settings: Settings, answerer: Answerer) -> AsyncGenerator[Turn, None]:
        """Asks a question; the turn each time that there may be something new to see.

        Closed early, or stopped, it leaves the answers as they are and frees their rows.
        """
        turn = Turn(question, settings, [])
        self.turns.append(turn)
        turn.answers = [Answer(method, messages=self.messages(method)) for method in settings.shown]
        pause = SLOW if settings.slow else 0.0
        running = {
            asyncio.create_task(_follow(answerer, settings, answer, pause))
            for answer in sorted(turn.answers, key=lambda answer: answer.method != "wsd")  # whose curve is watched
        }
        self._tasks = list(running)
        try:
            while running:
                yield turn
                _, running = await asyncio.wait(running, timeout=REFRESH)
            yield turn
        finally:
            self.stop()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Stops the answers that are being written, if any."""
        for task in self._tasks:
            task.cancel()

    def retract(self) -> str:
        """Takes the last question back, with its answers."""
        return self.turns.pop().question if self.turns else ""


async def _follow(answerer: Answerer, settings: Settings, answer: Answer, pause: float) -> None:
    """Follows one answer to its end."""
    try:
        async with aclosing(answerer.answer(settings.request(answer.method, answer.messages))) as items:
            async for item in items:
                if isinstance(item, End):
                    answer.end = item
                else:
                    answer.pieces.append(item)
                    await asyncio.sleep(pause)
    except (WSDError, ValueError) as error:
        answer.error = str(error)
    except Exception as error:
        logging.getLogger(__name__).exception("an answer failed")
        answer.error = f"The models failed ({type(error).__name__}); the log of the server has more."
    finally:
        answer.stopped = not answer.end and not answer.error
