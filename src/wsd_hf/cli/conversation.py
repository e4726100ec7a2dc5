"""A chat in the terminal: questions from standard input, answers that are shown while they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..errors import WSDValueError
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch import SwitchCriteria
from ..text.next_turn import before_next_turn, settled, turn_headers
from ..text.visible import visible
from ..trace import BASE_COLOUR, PILOT_COLOURS, explain
from .models import Pair, answer
from .options import one_line
from .terminal import say


class Conversation:
    """A history, and the pair that goes on with it.

    Answers go to standard output: the pilot's part in orange and the base's in blue, or with a `│` between them where there is
    no colour. All else goes to standard error.

    Args:
        pair: base, pilot, and their tokenizers.
        config: threshold and window.
        max_new_tokens: most tokens of an answer.
        system: the system message, if any.

    Attributes:
        messages: the history; a question without an answer is forgotten.
    """

    def __init__(self, pair: Pair, config: WSDConfig, max_new_tokens: int, system: str | None = None) -> None:
        self._pair, self._config, self._max_new_tokens = pair, config, max_new_tokens
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._beginning)

    def run(self) -> None:
        """Answers line by line, until the input ends or says `/exit`; `/reset` starts anew."""
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                self.reset()
            elif line:
                self.ask(line)

    def ask(self, question: str) -> None:
        """One question and its answer; Ctrl-C stops the answer, of which the history keeps what there is."""
        chat = [*self.messages, {"role": "user", "content": question}]
        tokenizer, criteria = self._pair[2], CountingCriteria(self._config.threshold, self._config.window_size)
        streamer = _Display(tokenizer, criteria, _Printer())
        try:
            output = answer(self._pair, chat, self._config, self._max_new_tokens, streamer=streamer, switch_criteria=criteria)
            remark = explain(output, tokenizer, stop_strings=turn_headers(tokenizer)).summary()
        except KeyboardInterrupt:
            remark = "stopped by Ctrl-C"
        except WSDValueError as error:
            remark = f"{one_line(error)} (/reset starts anew)"
        say()
        say(remark, err=True)
        if streamer.answer:
            self.messages = [*chat, {"role": "assistant", "content": streamer.answer}]


class CountingCriteria(SwitchCriteria):
    """The paper's switch; it is asked after every drafted token, before that is streamed, so it knows whose token that is."""

    drafted = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As `SwitchCriteria`."""
        self.drafted = scores.shape[-1]
        return super().__call__(input_ids, scores, **kwargs)


class _Display(BaseStreamer):
    """Gives on the text of one answer as it grows; withholds what may yet become the header of a next turn.

    Args:
        tokenizer: the base's.
        criteria: the switch of the same call.
        write: takes a piece of text, and whether the base wrote it.

    Attributes:
        answer: what has been written.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, criteria: CountingCriteria, write: Callable[[str, bool], None]
    ) -> None:
        self.answer = ""
        self._tokenizer, self._criteria, self._write = tokenizer, criteria, write
        self._transcript = bool(turn_headers(tokenizer))
        self._text = ""
        self._ids: list[int] | None = None
        self._drafted = 0  # characters of the pilot's

    def put(self, value: torch.Tensor) -> None:
        """The prompt, and then the answer's tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if len(self._ids) <= self._criteria.drafted:
            self._drafted = len(self._text.rstrip("\ufffd"))
        self._show(settled(self._text) if self._transcript else self._text.rstrip("\ufffd"))

    def end(self) -> None:
        """What was withheld turned out to be text."""
        self._show(before_next_turn(self._text) if self._transcript else self._text)

    def _show(self, answer: str) -> None:
        shown, self.answer = len(self.answer), answer
        for piece, by_base in ((answer[shown : self._drafted], False), (answer[max(shown, self._drafted) :], True)):
            if piece:
                self._write(piece, by_base)


class _Printer:
    """Prints an answer's pieces to standard output."""

    def __init__(self) -> None:
        self._switched = False

    def __call__(self, piece: str, by_base: bool) -> None:
        console = Console(highlight=False)  # a new one each time: Ctrl-C may leave text in its buffer, to come out again
        text = Text(visible(piece))
        if console.color_system and not console.no_color:
            text.stylize(f"#101010 on {BASE_COLOUR if by_base else PILOT_COLOURS[0]}")
        elif by_base and not self._switched:
            text = Text("│") + text
        self._switched = by_base
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
