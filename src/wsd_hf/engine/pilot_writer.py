"""The pilot as a writer of pieces of a response: words, or steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..text.bridge import Bridge
from .call import Call
from .checks import check_readable, check_shared, eos_token_ids, logits_error, vocabulary_size
from .pilot_side import PilotSide
from .rows import Rows
from .sampling import choice
from .stream import Stream

Completes = Callable[[list[int], int], bool]
"""True if a piece is complete, from its tokens and the one after it, both of the pilot."""


class Piece(NamedTuple):
    """The pilot's next piece of a response."""

    tokens: list[int]
    """Of the base's vocabulary; none where it can write nothing."""
    ended: bool
    """True if the pilot ends the response after it."""


class PilotWriter:
    """The pilot, which writes a response piece by piece, on the host's decision after every token.

    The token after a piece is chosen together with it. If the response continues with the piece alone, that token begins the
    next one: so pieces in a row are what the pilot would have written alone.

    Args:
        longest: most tokens of a piece.
        completes: decides whether a shorter piece is complete.
    """

    def __init__(self, call: Call, side: PilotSide, bridge: Bridge, stream: Stream, longest: int, completes: Completes) -> None:
        self.stream, self._bridge = stream, bridge
        self._longest, self._completes = longest, completes
        self._choice, self._samples = choice(side.warpers), side.warpers is not None
        self._end_token_ids = side.end_token_ids
        if side.one_vocabulary:
            self._end_token_ids = side.end_token_ids | eos_token_ids(call.generation_config)
        self._vocabulary = vocabulary_size(call.base)
        self._limits: list[int] = side.room.tolist()
        self._text: list[list[int]] = [[] for _ in self._limits]  # the pilot's tokens of each response and the piece after it
        self._begin = [0] * len(self._limits)  # place of that piece in them
        self._next: list[int | None] = [None] * len(self._limits)  # its token after the piece
        self._lengths = [0] * len(self._limits)  # of each response with that piece

    def ends(self, row: int, response: list[int]) -> bool:
        """True where a response is at the end of a piece after which the pilot ends it."""
        return self._next[row] in self._end_token_ids and len(response) == self._lengths[row]

    def write(self, turn: list[int], rows: Rows) -> dict[int, Piece]:
        """The next piece in some rows; none in a row whose last character is incomplete, so that it cannot be read."""
        for row in turn:
            self._read(row, rows.responses[row])
        readable = [row for row in turn if self._bridge.complete(row)]
        while writing := [row for row in readable if not self._complete(row)]:
            self._advance(writing, rows)
        return {row: self._cross(row, rows.responses[row]) for row in readable}

    def drop(self, row: int) -> None:
        """Forgets a token drawn after a piece that is not appended: should the same text be appended, it is drawn anew."""
        if self._samples:
            self._next[row] = None

    def _read(self, row: int, response: list[int]) -> None:
        """Begins a piece here; its first token is known if nothing but the last piece has been appended."""
        text = self._bridge.pilot_tokens(row, response)
        if text != self._text[row] or len(response) != self._lengths[row]:
            self._text[row], self._next[row] = text, None
        self._begin[row] = len(text)

    def _complete(self, row: int) -> bool:
        piece, following = self._text[row][self._begin[row] :], self._next[row]
        if following is None:
            return len(self._text[row]) >= self._limits[row]
        return following in self._end_token_ids or len(piece) >= self._longest or self._completes(piece, following)

    def _advance(self, writing: list[int], rows: Rows) -> None:
        """One token more of some pieces, and the token after it."""
        for row in writing:
            if (token := self._next[row]) is not None:
                self._text[row], self._next[row] = [*self._text[row], token], None
        unread = [row for row in writing if len(self._text[row]) < self._limits[row]]
        if not unread:
            return
        stream = self.stream
        missing = [stream.resume(row, self._text[row]) if row in unread else None for row in stream.live]
        for tokens_of_row in missing:
            check_readable("pilot", tokens_of_row or (), stream.model)
        tokens, not_finite, *_ = self._choice(stream, stream.block(missing))
        packed = dict(zip(stream.live, torch.stack([tokens, not_finite.long()], dim=1).tolist(), strict=True))
        for row in unread:
            token, bad = packed[row]
            if bad:
                raise logits_error("pilot", len(rows.responses[row]) + len(self._text[row]) - self._begin[row], row)
            self._next[row] = token

    def _cross(self, row: int, response: list[int]) -> Piece:
        tokens = self._bridge.guess(row, self._text[row][self._begin[row] :])
        check_shared(max(tokens, default=0), self._vocabulary)
        self._lengths[row] = len(response) + len(tokens)
        return Piece(tokens, ended=self._next[row] in self._end_token_ids)
