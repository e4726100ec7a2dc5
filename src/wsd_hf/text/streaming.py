"""Streaming the answer of a base that is stopped at the header of the next turn."""

from __future__ import annotations

import sys
from collections import deque

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from .next_turn import before_next_turn, settled


class AnswerStreamer(BaseStreamer):
    """Hands a chat's answer on to another streamer, without the header at which a base that writes a transcript is stopped.

    `generate(..., streamer=AnswerStreamer(TextStreamer(tokenizer), tokenizer))`; the pipeline does it by itself. A token is
    handed on as soon as no later one can make its text part of such a header, and whole, also where the header begins within
    it. In a batch, every token is handed on at once.

    Args:
        streamer: gets the prompt and the answer's tokens.
        tokenizer: the base's.
    """

    def __init__(self, streamer: BaseStreamer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._streamer, self._tokenizer = streamer, tokenizer
        self._begin()

    def _begin(self) -> None:
        self._prompt_is_next = True
        self._ids: list[int] = []
        self._text = ""
        self._withheld: deque[tuple[int, torch.Tensor]] = deque()  # with where each token's text begins

    def put(self, value: torch.Tensor) -> None:
        """The prompt, [batch, prompt], and then tokens, [batch]."""
        if self._prompt_is_next or len(value) > 1:
            self._prompt_is_next = False
            self._streamer.put(value)
            return
        self._withheld.append((len(self._text.rstrip("\ufffd")), value))
        self._ids += value.tolist()
        self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._hand_on(len(settled(self._text)))

    def end(self) -> None:
        """What was withheld is handed on now, unless it is a header."""
        answer = before_next_turn(self._text)
        self._hand_on(sys.maxsize if answer == self._text.rstrip() else len(answer))
        self._begin()
        self._streamer.end()

    def _hand_on(self, length: int) -> None:
        while self._withheld and self._withheld[0][0] < length:
            self._streamer.put(self._withheld.popleft()[1])
