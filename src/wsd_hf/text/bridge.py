"""Translation between the pilot's tokens and the base's: none for a shared vocabulary, else through text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from .settled_tokens import ContinuationTokenizer, SettledTokens
from .token_texts import BYTE_TOKEN, INCOMPLETE, plain_text

LOOK_BACK = 64
"""Least number of tokens that each step reads again of a text that grows; the most are about twice as many."""

DraftOver = Literal["draft_ended", "draft_limit"]
"""Reason why a draft has no more tokens: the pilot's EOS, or the limit."""


class Offer(NamedTuple):
    """The next tokens of a draft, of the base's vocabulary; none of them is ever taken back."""

    tokens: list[int]
    over: DraftOver | None
    """Reason why no more will come; None while the pilot may go on."""


class OneVocabulary:
    """The bridge of one call of `generate` whose models share a vocabulary: tokens stay as they are.

    Args:
        end_token_ids: tokens that end a draft, and are no part of it.
        limits: most tokens of a draft in each row.
    """

    token_by_token = True
    """True if each token of the pilot is one of the base, so that a limit is known with the draft's last token."""

    def __init__(self, end_token_ids: Set[int], limits: list[int]) -> None:
        self.end_token_ids, self._limits = end_token_ids, limits
        self._drafts = [_Draft(end_token_ids, [], limit) for limit in limits]

    def begin(self, row: int, response: list[int], room: int) -> bool:
        """Begins a further draft after a response; False if the pilot has no room for it.

        Args:
            row: whose draft before has ended.
            response: the base's tokens so far.
            room: tokens that the pilot's context holds after its prompt.
        """
        self._drafts[row] = _Draft(self.end_token_ids, list(response), min(len(response) + self._limits[row], room))
        return len(response) < room

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """Extends a row's draft by the pilot's proposed tokens, and returns the base's tokens of the extension."""
        draft = self._drafts[row]
        return Offer(draft.extend(proposed), draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of a response; without one, those up to the end of the row's own draft."""
        return list(self._drafts[row].tokens if response is None else response)

    def complete(self, row: int) -> bool:
        """True if the pilot's tokens hold all text of the response last given to `pilot_tokens`."""
        return True

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """The base's tokens of the pilot's proposal after the response last given to `pilot_tokens`."""
        return list(proposed)


class TwoVocabularies:
    """The bridge of one call of `generate` whose models have tokenizers of their own: drafts are translated as text.

    All offered tokens of a draft together are the encoding of its text on its own. Special tokens of the pilot have no text,
    and of a draft that ends within a character the beginning of that character is dropped. A further draft of a row continues
    the draft before it, as far as that was taken, and the encoding of the base's text after it.

    Args:
        end_token_ids, limits: as for `OneVocabulary`, in tokens of the pilot.
        base_end_token_ids: tokens of the base that end a draft if its text spells one.
    """

    token_by_token = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Set[int],
        limits: list[int],
        base_end_token_ids: Set[int] = frozenset(),
    ) -> None:
        self._base = ContinuationTokenizer(tokenizer)
        self._pilot = ContinuationTokenizer(assistant_tokenizer)
        self._base_decoder = Decoder(self._base, self._base.decode)
        self._decoder = Decoder(self._pilot, functools.partial(plain_text, assistant_tokenizer))
        self.end_token_ids, self._limits = end_token_ids, limits
        self._base_end_token_ids = base_end_token_ids
        self._rows = [self._row(limit) for limit in limits]

    def _row(self, limit: int, known: list[int] | None = None, response: int = 0) -> _Row:
        """A draft that begins after the pilot's known tokens, which are the response's first ones."""
        known = known or []
        draft, begun = _Draft(self.end_token_ids, known, limit), (response, len(known))
        text = _GrowingText(self._decoder, len(known))
        return _Row(draft, text, SettledTokens(self._base), known, begun=begun, mark=begun)

    def begin(self, row: int, response: list[int], room: int) -> bool:
        """As for `OneVocabulary`; the response has been given to `settle`, and ends with a complete character."""
        state = self._rows[row]
        text, tokens = state.stretch or self._take_over(state, response)
        known = state.known + tokens.finish(text.rest(response))
        self._rows[row] = self._row(min(len(known) + self._limits[row], room), known, len(response))
        return len(known) < room

    def settle(self, row: int, response: list[int]) -> list[int]:
        """The pilot's tokens of the base's text after a draft that its newest token settles; they end `pilot_tokens(row)`.

        For a response that continues a draft, after each token of the base. No later text can change these tokens, so that
        they are the same however drafts were proposed. A token of the pilot that the draft's end has cut is encoded again,
        together with the base's text.
        """
        state = self._rows[row]
        text, tokens = state.stretch or self._take_over(state, response[:-1])
        settled = tokens.grow(text.more(response))
        state.known = state.known + settled
        state.mid_character = not text.complete(response)
        return settled

    def _take_over(self, state: _Row, response: list[int]) -> _Stretch:
        """Begins to read the base's text after a response that ends with a draft."""
        base_begun, begun = state.begun
        state.stretch = stretch = _Stretch(_GrowingText(self._base_decoder, base_begun), SettledTokens(self._pilot))
        text = stretch.text.more(response)
        kept = self._decoder.within(state.draft.tokens, begun, text)
        own = self._decoder.text(kept, begun)
        while len(kept) > begun and self._decoder.text(kept[:-1], begun) == own:  # tokens without text, drafted after the end
            kept = kept[:-1]
        state.known = kept + stretch.tokens.grow(text[len(own) :])
        return stretch

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """Extends a row's draft, and returns the base's tokens that are settled now; at the draft's end all that are left."""
        state = self._rows[row]
        draft = state.draft
        if draft.over:
            return Offer([], draft.over)
        draft.extend(proposed)
        state.known = draft.tokens
        if draft.over:
            tokens = state.crossed.finish(state.drafted.rest(draft.tokens))
        else:
            tokens = state.crossed.grow(state.drafted.more(draft.tokens))
        kept = before_end(tokens, self._base_end_token_ids)
        if len(kept) < len(tokens):
            draft.over = "draft_ended"
        return Offer(kept, draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of a response's text, up to its last complete character.

        Tokens returned, drafted or guessed before are kept as far as their text is that of the response; the rest of the text
        is encoded on its own. Without a response: those up to the end of the row's own draft, or after it the settled ones. Of
        a response that grows from call to call only the end is read.
        """
        state = self._rows[row]
        if response is None:
            return list(state.known if state.stretch else state.draft.tokens)
        base_begun, begun = state.begun
        text = self._base_decoder.text(response, base_begun)
        whole = text.rstrip(INCOMPLETE)
        state.mid_character = whole != text
        kept = self._decoder.within(state.known, begun, whole)
        state.known = kept + self._pilot.encode(whole[len(self._decoder.text(kept, begun)) :])
        state.response = len(state.known)
        if not state.mid_character and len(response) >= state.mark[0] + LOOK_BACK:
            self._begin_later(state, response)
        return list(state.known)

    def _begin_later(self, state: _Row, response: list[int]) -> None:
        """Begins to read at the last mark, if the texts before it are the same, and sets the next mark."""
        (base_begun, begun), (base_mark, mark) = state.begun, state.mark
        head = self._base_decoder.before(base_mark, response, base_begun)
        if head is not None and head == self._decoder.before(mark, state.known, begun):
            state.begun = state.mark
        state.mark = len(response), len(state.known)

    def complete(self, row: int) -> bool:
        """True if the response last given to `pilot_tokens` or `settle` ends with a complete character."""
        return not self._rows[row].mid_character

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """As for `OneVocabulary`, up to the last complete character; none after a response that ends within one."""
        state = self._rows[row]
        if state.mid_character:
            return []
        known, begun = state.known[: state.response], state.begun[1]
        state.known = known + before_end(proposed, self.end_token_ids)
        text = self._decoder.whole(state.known, begun)[len(self._decoder.text(known, begun)) :]
        return before_end(self._base.encode(text), self._base_end_token_ids)


Bridge = OneVocabulary | TwoVocabularies


class _Draft:
    """The pilot's tokens of one row's response up to the end of a draft, `limit` at most."""

    def __init__(self, end_token_ids: Set[int], before: list[int], limit: int) -> None:
        self.tokens = before
        self.over: DraftOver | None = None
        self._end_token_ids = end_token_ids
        self._limit = limit

    def extend(self, proposed: list[int]) -> list[int]:
        """Adds the proposed tokens before the draft's end, and returns them."""
        if self.over:
            return []
        room = proposed[: self._limit - len(self.tokens)]
        taken = before_end(room, self._end_token_ids)
        self.tokens = self.tokens + taken
        if len(taken) < len(room):
            self.over = "draft_ended"
        elif len(self.tokens) == self._limit:
            self.over = "draft_limit"
        return taken


class _Stretch(NamedTuple):
    """The base's text after a draft."""

    text: _GrowingText
    tokens: SettledTokens
    """Of the pilot."""


@dataclass
class _Row:
    draft: _Draft
    drafted: _GrowingText
    crossed: SettledTokens
    known: list[int] = field(default_factory=list)
    """The pilot's tokens of the draft or the response, and its guess after them."""
    response: int = 0
    """Number of tokens in `known` that belong to the response."""
    mid_character: bool = False
    """True if the response ends within a character."""
    begun: tuple[int, int] = (0, 0)
    """Numbers of tokens, of the response and in `known`, whose texts are the same, and are read no more."""
    mark: tuple[int, int] = (0, 0)
    """The next such numbers."""
    stretch: _Stretch | None = None
    """The base's text after the draft, if it is read by `settle`."""


class _GrowingText:
    """Text of tokens from a place on, in pieces that no later token can change; of a long text only the end is read."""

    def __init__(self, decoder: Decoder, begun: int = 0) -> None:
        self._decoder = decoder
        self._begun = self._mark = begun
        self._returned = 0

    def more(self, tokens: list[int]) -> str:
        """The next piece of the text of all tokens so far."""
        text = self._decoder.settled(tokens, self._begun)
        piece = text[self._returned :]
        self._returned = len(text)
        if len(tokens) >= self._mark + LOOK_BACK:
            if (head := self._decoder.before(self._mark, tokens, self._begun)) is not None:
                self._begun, self._returned = self._mark, self._returned - len(head)
            self._mark = len(tokens)
        return piece

    def rest(self, tokens: list[int]) -> str:
        """The last piece, if no token follows."""
        return self._decoder.whole(tokens, self._begun)[self._returned :]

    def complete(self, tokens: list[int]) -> bool:
        """True if the text of all tokens so far ends with a complete character."""
        return not self._decoder.text(tokens, self._begun).endswith(INCOMPLETE)


class Decoder:
    """Text of a tokenizer's tokens, of which more may follow; `begun` is the place of the first token that is read."""

    def __init__(self, tokenizer: ContinuationTokenizer, decode: Callable[[list[int]], str]) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._first, self._later = decode, tokenizer.decode
        self._special = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    def text(self, tokens: list[int], begun: int) -> str:
        return self._read(tokens[begun:], begun)

    def _read(self, tokens: list[int], begun: int) -> str:
        return self._later(tokens) if begun else self._first(tokens)

    def before(self, mark: int, tokens: list[int], begun: int) -> str | None:
        """Text before a mark, if the tokens after it are read alone as they are read after that text; else None."""
        head, tail = self.text(tokens[:mark], begun), self.text(tokens, mark)
        whole = head + tail == self.text(tokens, begun) and not head.endswith(INCOMPLETE)
        return head if whole and not any(map(self._byte, tokens[mark : mark + 1])) else None

    def settled(self, tokens: list[int], begun: int) -> str:
        """Text that no later token can change."""
        tokens = self._without_special(tokens[begun:])
        end = len(tokens)
        # A run of byte tokens at the end is left out: after a wrong byte, the decoder gives up the whole run.
        while end and self._byte(tokens[end - 1]):
            end -= 1
        return self._read(tokens[:end], begun).rstrip(INCOMPLETE)

    def whole(self, tokens: list[int], begun: int) -> str:
        """Text of the tokens if none follows: all but an incomplete last character."""
        tokens = self._without_special(tokens[begun:])
        # Only a byte-level decoder returns the text before an incomplete character in the same run of bytes.
        ends = range(len(tokens), max(-1, len(tokens) - 4), -1)
        return max((self._read(tokens[:end], begun).rstrip(INCOMPLETE) for end in ends), key=len)

    def within(self, tokens: list[int], begun: int, text: str) -> list[int]:
        """The longest prefix of `tokens` that ends with a character and whose text is a prefix of `text`."""
        low, high = begun, len(tokens)
        end = high
        while low < high:
            if text.startswith(self.settled(tokens[:end], begun)):
                low = end
            else:
                high = end - 1
            end = (low + high + 1) // 2
        while not text.startswith(self.text(tokens[:low], begun)):
            low -= 1
        return tokens[:low]

    def _byte(self, token: int) -> bool:
        # The pilot may also draw ids of padded embeddings, which have neither token nor text.
        return bool(BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""))

    def _without_special(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token not in self._special]


def before_end(tokens: list[int], end_token_ids: Set[int]) -> list[int]:
    """
    >>> before_end([5, 6, 2, 7], {2})
    [5, 6]
    """
    return tokens[: next((index for index, token in enumerate(tokens) if token in end_token_ids), len(tokens))]
