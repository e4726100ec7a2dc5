"""The pilot's side of nudging: the next word of a response."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from ...engine.checks import check_finite, check_readable, check_shared
from ...engine.ragged_stream import RaggedStream
from ...engine.rows import Rows
from ...engine.sampling import choice
from ...text.bridge import Bridge
from ...text.settled_tokens import ContinuationTokenizer

LONGEST = 16
"""Tokens of the pilot after which a word counts as complete, for scripts without spaces."""

FIRST_WORD = re.compile(r" *[^ ]+(?= )")


class Word(NamedTuple):
    """What the pilot says when it is asked."""

    tokens: list[int]
    """Of the base's vocabulary; none if there is nothing that it could say."""
    over: bool
    """Whether it ends the response here instead."""


class Words:
    """The pilot, which says one word at a time.

    That a word is complete shows in the token behind it. This token is kept, and begins the next word if the pilot is asked
    again right there: so what it says in one go is what it would have written alone.

    Args:
        stream: of the pilot.
        bridge: makes its tokens the base's.
        encoder: of its tokenizer.
        warpers: shape its choice; None: it is greedy.
        end_token_ids: tokens with which it ends a response.
        limits: most tokens of a response that its context has room for, for every row.
        vocabulary: size of the base's.
    """

    def __init__(
        self,
        stream: RaggedStream,
        bridge: Bridge,
        encoder: ContinuationTokenizer,
        warpers: LogitsProcessorList | None,
        end_token_ids: Set[int],
        limits: list[int],
        vocabulary: int,
    ) -> None:
        self.stream = stream
        self._bridge = bridge
        self._encoder = encoder
        self._choice = choice(warpers)
        self._end_token_ids = end_token_ids
        self._limits = limits
        self._vocabulary = vocabulary
        self._fed: list[list[int]] = [[] for _ in limits]
        self._text: list[list[int]] = [[] for _ in limits]  # the pilot's tokens of each response and of its word behind it
        self._begin = [0] * len(limits)  # where that word begins in them
        self._next: list[int | None] = [None] * len(limits)  # what it would write behind the word
        self._lengths = [0] * len(limits)  # of each response with that word

    def ends(self, row: int, response: list[int]) -> bool:
        """Whether a response is at the end of a word behind which the pilot would end it."""
        return self._next[row] in self._end_token_ids and len(response) == self._lengths[row]

    def say(self, asked: list[int], rows: Rows) -> dict[int, Word]:
        """The next word of some rows; nothing of a row whose last character is not complete, so that it cannot be read."""
        for row in asked:
            self._read(row, rows.responses[row])
        asked = [row for row in asked if self._bridge.complete(row)]
        while speaking := [row for row in asked if not self._complete(row)]:
            self._go_on(speaking, rows)
        return {row: self._cross(row, rows.responses[row]) for row in asked}

    def _read(self, row: int, response: list[int]) -> None:
        """The word begins here; it has begun if the response goes on with nothing but the last word."""
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

    def _go_on(self, speaking: list[int], rows: Rows) -> None:
        """One token more of some words, and what would follow it."""
        for row in speaking:
            if (token := self._next[row]) is not None:
                self._text[row], self._next[row] = [*self._text[row], token], None
        asked = [row for row in speaking if len(self._text[row]) < self._limits[row]]
        if not asked:
            return
        stream = self.stream
        missing = [stream.resume(row, self._fed[row], self._text[row]) if row in asked else None for row in stream.live]
        for tokens_of_row in missing:
            check_readable("pilot", tokens_of_row or (), stream.model)
        block = stream.block(missing)
        tokens, not_finite, _ = stream.run(*self._choice, block, keep=1)
        tokens, not_finite = rows.whole(stream.live, torch.stack([tokens, not_finite.long()], dim=1).cpu()).T
        bad = torch.zeros_like(not_finite, dtype=torch.bool)
        bad[asked] = not_finite[asked].bool()
        words = (len(text) - begin for text, begin in zip(self._text, self._begin, strict=True))
        check_finite("pilot", bad, [length + word for length, word in zip(rows.lengths, words, strict=True)])
        for row in asked:
            self._fed[row], self._next[row] = self._text[row], int(tokens[row])

    def _cross(self, row: int, response: list[int]) -> Word:
        word = self._text[row][self._begin[row] :]
        tokens = self._bridge.guess(row, word)
        check_shared(max(tokens, default=0), self._vocabulary)
        self._lengths[row] = len(response) + len(tokens)
        return Word(tokens, over=not word and self._next[row] in self._end_token_ids)
