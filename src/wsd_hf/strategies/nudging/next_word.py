"""The pilot's side of nudging: the next word of a response."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from ...engine.call import Call
from ...engine.checks import check_readable, check_shared, eos_token_ids, logits_error, vocabulary_size
from ...engine.pilot_side import PilotSide
from ...engine.rows import Rows
from ...engine.sampling import choice
from ...engine.stream import Stream
from ...text.bridge import Bridge
from ...text.settled_tokens import ContinuationTokenizer

LONGEST = 16
"""Tokens of the pilot after which a word counts as complete, for scripts without spaces."""

FIRST_WORD = re.compile(r" *[^ ]+(?= )")


class Word(NamedTuple):
    """The pilot's part of one step."""

    tokens: list[int]
    """Of the base's vocabulary; none where it can write nothing."""
    over: bool
    """True where it ends the response instead."""


class Words:
    """The pilot, which writes one word at a time.

    A word is known to be complete only after the next token has been chosen. That token is kept, and begins the next word if
    the pilot continues right there: so words in a row are what the pilot would have written alone.
    """

    def __init__(self, call: Call, side: PilotSide, bridge: Bridge, encoder: ContinuationTokenizer, stream: Stream) -> None:
        self.stream, self._bridge, self._encoder = stream, bridge, encoder
        self._choice = choice(side.warpers)
        self._end_token_ids = side.end_token_ids
        if side.one_vocabulary:
            self._end_token_ids = side.end_token_ids | eos_token_ids(call.generation_config)
        self._vocabulary = vocabulary_size(call.base)
        self._limits: list[int] = side.room.tolist()
        self._fed: list[list[int]] = [[] for _ in self._limits]
        self._text: list[list[int]] = [[] for _ in self._limits]  # the pilot's tokens of each response and the word after it
        self._begin = [0] * len(self._limits)  # place of that word in them
        self._next: list[int | None] = [None] * len(self._limits)  # its token after the word
        self._lengths = [0] * len(self._limits)  # of each response with that word

    def ends(self, row: int, response: list[int]) -> bool:
        """True where a response is at the end of a word after which the pilot ends it."""
        return self._next[row] in self._end_token_ids and len(response) == self._lengths[row]

    def write(self, nudged: list[int], rows: Rows) -> dict[int, Word]:
        """The next word of some rows; none of a row whose last character is incomplete, so that it cannot be read."""
        for row in nudged:
            self._read(row, rows.responses[row])
        readable = [row for row in nudged if self._bridge.complete(row)]
        while writing := [row for row in readable if not self._complete(row)]:
            self._advance(writing, rows)
        return {row: self._cross(row, rows.responses[row]) for row in readable}

    def _read(self, row: int, response: list[int]) -> None:
        """Begins a word here; its first token is known if nothing but the last word has been appended."""
        text = self._bridge.pilot_tokens(row, response)
        if text != self._text[row] or len(response) != self._lengths[row]:
            self._text[row], self._next[row] = text, None
        self._begin[row] = len(text)

    def _complete(self, row: int) -> bool:
        word, following = self._text[row][self._begin[row] :], self._next[row]
        if following is None:
            return len(self._text[row]) >= self._limits[row]
        if following in self._end_token_ids or len(word) >= LONGEST:
            return True
        first = FIRST_WORD.match(self._encoder.decode([*word, following]))
        return first is not None and first.end() <= len(self._encoder.decode(word))

    def _advance(self, writing: list[int], rows: Rows) -> None:
        """One token more of some words, and the token after it."""
        for row in writing:
            if (token := self._next[row]) is not None:
                self._text[row], self._next[row] = [*self._text[row], token], None
        unread = [row for row in writing if len(self._text[row]) < self._limits[row]]
        if not unread:
            return
        stream = self.stream
        missing = [stream.resume(row, self._fed[row], self._text[row]) if row in unread else None for row in stream.live]
        for tokens_of_row in missing:
            check_readable("pilot", tokens_of_row or (), stream.model)
        tokens, not_finite, *_ = self._choice(stream, stream.block(missing))
        packed = dict(zip(stream.live, torch.stack([tokens, not_finite.long()], dim=1).tolist(), strict=True))
        for row in unread:
            token, bad = packed[row]
            if bad:
                raise logits_error("pilot", len(rows.responses[row]) + len(self._text[row]) - self._begin[row], row)
            self._fed[row], self._next[row] = self._text[row], token

    def _cross(self, row: int, response: list[int]) -> Word:
        word = self._text[row][self._begin[row] :]
        tokens = self._bridge.guess(row, word)
        check_shared(max(tokens, default=0), self._vocabulary)
        self._lengths[row] = len(response) + len(tokens)
        return Word(tokens, over=not word and self._next[row] in self._end_token_ids)
