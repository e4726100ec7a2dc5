"""A chat in the terminal: questions from standard input, answers that are shown while they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from ..engine.strategy import StrategyOutput
from ..errors import WSDValueError
from ..pages.style import BASE_COLOUR, PILOT_COLOURS
from ..pair import Pair
from ..text.streaming import Writer, WriterStreamer
from ..text.visible import visible
from .options import one_line
from .terminal import say

COLOURS = {"pilot": PILOT_COLOURS[0], "base": BASE_COLOUR}


class Conversation:
    """A history, and the pair that continues it.

    Answers go to standard output: the pilot's part in orange and the base's in blue, or with a `│` at each change of the
    writer where there is no colour. All else goes to standard error.

    Args:
        pair: the models.
        system: the system message, if any.
        **settings: keywords of `Pair.generate`.

    Attributes:
        messages: the history; a question without an answer is forgotten.
    """

    def __init__(self, pair: Pair, system: str | None = None, **settings: Any) -> None:
        self._pair, self._settings = pair, settings
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._beginning)

    def run(self) -> None:
        """Answers line by line, until the input ends or a line is `/exit`; `/reset` starts anew."""
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                self.reset()
            elif line:
                self.ask(line)

    def ask(self, question: str) -> None:
        """Answers a question; Ctrl-C stops the answer, whose beginning the history keeps."""
        chat = [*self.messages, {"role": "user", "content": question}]
        printer = _Printer()
        streamer = WriterStreamer(self._pair.tokenizer, printer)
        try:
            remark = summary(self._pair, self._pair.generate(chat, streamer=streamer, **self._settings))
        except KeyboardInterrupt:
            remark = "stopped by Ctrl-C"
        except WSDValueError as error:
            remark = f"{one_line(error)} (/reset starts anew)"
        say()
        say(remark, err=True)
        if printer.answer:
            self.messages = [*chat, {"role": "assistant", "content": printer.answer}]


def summary(pair: Pair, output: StrategyOutput) -> str:
    """One line: the pilot's part of an answer."""
    if output.written_by_pilot is None:
        return f"{output.strategy.name}: every token is the work of all models"
    return pair.explain(output).summary()


class _Printer:
    """Prints the pieces of an answer to standard output, and keeps them."""

    def __init__(self) -> None:
        self.answer = ""
        self._writer: Writer = "pilot"

    def __call__(self, piece: str, writer: Writer | None) -> None:
        self.answer += piece
        console = Console(highlight=False)  # a new one each time: Ctrl-C may leave text in its buffer, to come out again
        text = Text(visible(piece))
        if writer is not None:
            if console.color_system and not console.no_color:
                text.stylize(f"#101010 on {COLOURS[writer]}")
            elif writer != self._writer:
                text = Text("│") + text
            self._writer = writer
        console.print(text, end="", soft_wrap=True)


def _lines() -> Iterator[str]:
    """Lines that are typed or piped in, without a byte order mark; Ctrl-C drops a line."""
    prompt, mark = "", "\ufeff"
    if sys.stdin is None:  # closed
        return
    if sys.stdin.isatty():
        prompt = "> "
        say("Ctrl-C stops an answer, /reset starts anew, /exit or Ctrl-D leaves.", err=True)
        with suppress(ImportError):
            import readline  # noqa: F401 - its import gives input() a line to edit
    while True:
        try:
            yield input(prompt).removeprefix(mark).strip()
            mark = ""
        except EOFError:
            return
        except KeyboardInterrupt:
            say()
