"""Streaming an answer: with the writer of each piece, and without the header of a next turn."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..errors import WSDValueError
from .bridge import LOOK_BACK, Decoder
from .next_turn import before_next_turn, settled, turn_headers
from .settled_tokens import ContinuationTokenizer
from .stop_strings import before_stop
from .token_texts import INCOMPLETE

Writer = Literal["pilot", "base"]

FinishReason = Literal["stop", "length"]
"""End of an answer: by its own text, or by a limit of its tokens."""


@dataclass(frozen=True)
class Likelihood:
    """A token in the base's raw distribution at its position, before temperature and processors.

    Attributes:
        log_prob: its natural-log probability, of float32 precision.
        rank: 1 for the base's likeliest token; in general 1 more than the number of tokens with a larger raw logit.
    """

    log_prob: float
    rank: int


Likelihoods = Sequence[Likelihood | None] | None
"""Of one token in every row. None in a row where it is not known: for the pilot's tokens under strategies that let the base
read them later (nudging, reward-guided), for tokens that no model chose (padding, the EOS of `draft_end="stop"`), and for all
tokens of weak-to-strong search and without a strategy."""


def takes_likelihoods(streamer: BaseStreamer | None) -> bool:
    """True if a streamer takes the likelihoods of tokens; they are computed for such a streamer only."""
    return getattr(streamer, "takes_likelihoods", False)


def put_tokens(
    streamer: BaseStreamer,
    tokens: torch.Tensor,
    by_pilot: torch.Tensor | None = None,
    likelihoods: Likelihoods = None,
) -> None:
    """Hands tokens to a streamer, with their writers and likelihoods as far as it takes them.

    Args:
        streamer: gets `by_pilot` if its attribute `takes_writers` is true, and both if `takes_likelihoods` is.
        tokens: LongTensor[batch] on the CPU.
        by_pilot: marks tokens of the pilot, BoolTensor[batch] on the CPU; None if they have no single writer.
        likelihoods: of the tokens under the base; None: none is known.
    """
    if takes_likelihoods(streamer):
        streamer.put(tokens, by_pilot, likelihoods)
    elif getattr(streamer, "takes_writers", False):
        streamer.put(tokens, by_pilot)
    else:
        streamer.put(tokens)


class WriterStreamer(BaseStreamer):
    """Hands over the text of one answer while it is written, with its writer.

    Text comes in whole characters, and as soon as no later token can change it. An answer by transcript ends before the
    header of the next turn, at which the base is stopped.

    >>> from wsd_hf import Pair
    >>> pair = Pair.tiny()
    >>> streamer = WriterStreamer(pair.tokenizer, lambda text, writer: print(f"{writer}:{text}"))
    >>> output = pair.generate("What does the Keloft eat?", max_new_tokens=3, streamer=streamer)
    pilot:That
    pilot: is
    pilot: a

    Args:
        tokenizer: the base's.
        write: takes a piece of text and its writer: "pilot", "base", or None where every token is the work of several models.
        likelihoods: if True, `write` takes a third argument: a tuple with the `log_prob` and the `rank` in the base's
            distribution of each token that the piece begins or completes. The log-probability is natural, and the rank of the
            base's likeliest token is 1. A piece has those of its writer's tokens only, so those of all pieces of the pilot, in
            order, are those of the draft. Tokens that show no text (an EOS, a header, the beginning of a character that the
            other model completes) have a piece of their own, which is an empty text. The tuple is empty where the base reads
            the pilot's tokens later (`"nudging"`, `"reward_guided"`), under `"weak_to_strong_search"`, and without a strategy.

    Raises:
        WSDValueError: a batch of several responses.
    """

    takes_writers = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[..., None], likelihoods: bool = False) -> None:
        self._tokenizer, self._write = tokenizer, write
        self.takes_likelihoods = likelihoods
        self._begin()

    def _begin(self) -> None:
        self._response: WrittenAnswer | None = None

    def put(self, value: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        """Takes the prompt, [1, prompt], and then tokens, [1], each with its writer and likelihood."""
        if len(value) > 1:
            raise WSDValueError(f"streamer: a WriterStreamer takes one response, not {len(value)}: ask for one at a time")
        if self._response is None:
            self._response = WrittenAnswer(self._tokenizer, transcript=bool(turn_headers(self._tokenizer)))
            return
        writer: Writer | None = None if by_pilot is None else "pilot" if bool(by_pilot) else "base"
        self._response.write(int(value), writer, likelihoods[0] if likelihoods else None)
        self._show(self._response.pieces())

    def end(self) -> None:
        """Writes withheld text, unless it is a header."""
        if self._response is not None:
            self._show(self._response.last_pieces())
        self._begin()

    def _show(self, pieces: Iterable[WrittenPiece]) -> None:
        for piece in pieces:
            if self.takes_likelihoods:
                self._write(*piece)
            elif piece.text:
                self._write(piece.text, piece.writer)


class AnswerStreamer(BaseStreamer):
    """Hands a chat's answer on to another streamer, without the header at which a base that writes a transcript is stopped.

    `generate(..., streamer=AnswerStreamer(TextStreamer(tokenizer), tokenizer))`; the pipeline does it by itself. A token is
    handed on as soon as no later one can make its text part of such a header, and whole, also where the header begins within
    it. In a batch, every token is handed on at once.

    Args:
        streamer: gets the prompt and the answer's tokens, with their writers and likelihoods if it takes them.
        tokenizer: the base's.
    """

    def __init__(self, streamer: BaseStreamer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._streamer, self._tokenizer = streamer, tokenizer
        self.takes_writers = getattr(streamer, "takes_writers", False)
        self.takes_likelihoods = takes_likelihoods(streamer)
        self._begin()

    def _begin(self) -> None:
        self._prompt_is_next = True
        self._response = GrowingAnswer(self._tokenizer, transcript=True)

    def put(self, value: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        """Takes the prompt, [batch, prompt], and then tokens, [batch], each with its writer and likelihood."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            self._streamer.put(value)
        elif len(value) > 1:
            put_tokens(self._streamer, value, by_pilot, likelihoods)
        else:
            self._response.add(value.flatten().tolist(), (value, by_pilot, likelihoods))
            self._hand_on(len(self._response.settled))

    def end(self) -> None:
        """Hands on what was withheld, unless it is a header."""
        text, answer = self._response.text, self._response.answer
        self._hand_on(sys.maxsize if answer == text.rstrip() else len(answer))
        self._begin()
        self._streamer.end()

    def _hand_on(self, length: int) -> None:
        tokens = self._response.tokens
        while tokens and tokens[0][0] < length:
            put_tokens(self._streamer, *tokens.popleft()[1])


class GrowingAnswer:
    """An answer that grows token by token; a character cut across tokens belongs to the token that completes it.

    Args:
        tokenizer: the base's.
        transcript: whether the answer ends before the header of a next turn.
        stop_strings: texts before which it ends too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, transcript: bool, stop_strings: Sequence[str] = ()) -> None:
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        self._decoder = Decoder(ContinuationTokenizer(tokenizer), decode)
        self._transcript, self._stop_strings = transcript, stop_strings
        self._ids: list[int] = []
        self._begun = self._mark = 0  # tokens before the first one are read no more
        self._head = ""  # their text
        self._shown = 0
        self.text = ""
        self.tokens: deque[tuple[int, Any]] = deque()  # places in the text at which tokens begin, and the items added with them

    def add(self, tokens: list[int], item: Any) -> None:
        """Adds tokens that have one item, such as their writer."""
        self.tokens.append((len(self.text.rstrip(INCOMPLETE)), item))
        self._ids += tokens
        self.text = self._head + self._decoder.text(self._ids, self._begun)
        if len(self._ids) >= self._mark + LOOK_BACK:
            if (head := self._decoder.before(self._mark, self._ids, self._begun)) is not None:
                self._begun, self._head = self._mark, self._head + head
            self._mark = len(self._ids)

    @property
    def settled(self) -> str:
        """The beginning of the answer that no later token can change."""
        text = settled(self.text) if self._transcript else self.text.rstrip(INCOMPLETE)
        return before_stop(text, self._stop_strings, whole=False)

    @property
    def answer(self) -> str:
        """The whole answer, if no token follows."""
        return before_stop(before_next_turn(self.text) if self._transcript else self.text, self._stop_strings)

    def more(self, text: str) -> Iterator[tuple[str, Any]]:
        """The part of a beginning of the answer that was not returned before, in pieces with their items."""
        while self._shown < len(text):
            while len(self.tokens) > 1 and self.tokens[1][0] <= self._shown:
                self.tokens.popleft()
            end = min(len(text), self.tokens[1][0]) if len(self.tokens) > 1 else len(text)
            piece, self._shown = text[self._shown : end], end
            yield piece, self.tokens[0][1]


class WrittenPiece(NamedTuple):
    """A piece of an answer's text, with its writer."""

    text: str
    writer: Writer | None
    likelihoods: tuple[Likelihood, ...]
    """Of the writer's tokens that the piece begins or completes, under the base, as far as they are known."""


class WrittenAnswer(GrowingAnswer):
    """A growing answer whose tokens have writers and likelihoods.

    Args:
        tokenizer, transcript, stop_strings: as for `GrowingAnswer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, transcript: bool, stop_strings: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, transcript, stop_strings)
        self._likelihoods: list[tuple[Writer | None, Likelihood]] = []
        self._handed_over = 0  # of these, those that were part of a piece

    def write(self, token: int, writer: Writer | None, likelihood: Likelihood | None = None) -> None:
        """Adds a token; `likelihood` is None if it is not known."""
        if likelihood is not None:
            self._likelihoods.append((writer, likelihood))
        self.add([token], (writer, len(self._likelihoods)))

    def pieces(self) -> Iterator[WrittenPiece]:
        """The new pieces that no later token can change."""
        return self._new(self.settled)

    def last_pieces(self) -> Iterator[WrittenPiece]:
        """The pieces that were withheld, if no token follows; and tokens that show no text, as empty pieces."""
        yield from self._new(self.answer)
        yield from self._without_text(len(self._likelihoods))

    def _new(self, text: str) -> Iterator[WrittenPiece]:
        for piece, (writer, end) in self.more(text):
            before = self._without_text(end)
            own = before.pop().likelihoods if before and before[-1].writer == writer else ()
            yield from before
            yield WrittenPiece(piece, writer, own)

    def _without_text(self, end: int) -> list[WrittenPiece]:
        """Empty pieces with the likelihoods up to one that were part of none: a piece for each run of one writer's."""
        begin, self._handed_over = self._handed_over, end
        runs = groupby(self._likelihoods[begin:end], key=itemgetter(0))
        return [WrittenPiece("", writer, tuple(likelihood for _, likelihood in run)) for writer, run in runs]
