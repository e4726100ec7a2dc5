"""Translation between the pilot's tokens and the base's: none for a shared vocabulary, else through text."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from .settled_tokens import ContinuationTokenizer, SettledTokens
from .token_texts import BYTE_TOKEN, INCOMPLETE, plain_text

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
        limits: most drafted tokens of each row.
    """

    token_by_token = True
    """True if each token of the pilot is one of the base, so that a limit is known with the draft's last token."""

    def __init__(self, end_token_ids: Set[int], limits: list[int]) -> None:
        self._drafts = [_Draft(end_token_ids, limit) for limit in limits]

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """Extends a row's draft by the pilot's proposed tokens, and returns the base's tokens of the extension."""
        draft = self._drafts[row]
        return Offer(draft.extend(proposed), draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of a response; without one, those of the row's own draft."""
        return list(self._drafts[row].tokens if response is None else response)

    def complete(self, row: int) -> bool:
        """True if the pilot's tokens hold all text of the response last given to `pilot_tokens`."""
        return True

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """The base's tokens of the pilot's proposal after the response last given to `pilot_tokens`."""
        return list(proposed)


class TwoVocabularies:
    """The bridge of one call of `generate` whose models have tokenizers of their own: drafts are translated as text.

    All offered tokens together are the encoding of the draft's text on its own. Special tokens of the pilot have no text, and
    of a draft that ends within a character the beginning of that character is dropped.

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
        self._decoder = _PilotDecoder(assistant_tokenizer)
        self._end_token_ids = end_token_ids
        self._base_end_token_ids = base_end_token_ids
        self._rows = [_Row(_Draft(end_token_ids, limit), SettledTokens(self._base)) for limit in limits]

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """Extends a row's draft, and returns the base's tokens that are settled now; at the draft's end all that are left."""
        state = self._rows[row]
        draft = state.draft
        if draft.over:
            return Offer([], draft.over)
        draft.extend(proposed)
        state.known = draft.tokens
        if draft.over:
            tokens = state.crossed.finish(self._decoder.whole(draft.tokens))
        else:
            tokens = state.crossed.grow(self._decoder.settled(draft.tokens))
        kept = before_end(tokens, self._base_end_token_ids)
        if len(kept) < len(tokens):
            draft.over = "draft_ended"
        return Offer(kept, draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of a response's text, up to its last complete character.

        Tokens returned, drafted or guessed before are kept as far as their text is that of the response; the rest of the text
        is encoded on its own. Without a response: those of the row's own draft.
        """
        state = self._rows[row]
        if response is None:
            return list(state.draft.tokens)
        text = self._base.decode(response)
        whole = text.rstrip(INCOMPLETE)
        state.mid_character = whole != text
        kept = self._decoder.tokens_within(state.known, whole)
        state.known = kept + self._pilot.encode(whole[len(self._decoder.text(kept)) :])
        state.response = len(state.known)
        return list(state.known)

    def complete(self, row: int) -> bool:
        """True if the response last given to `pilot_tokens` ends with a complete character."""
        return not self._rows[row].mid_character

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """As for `OneVocabulary`, up to the last complete character; none after a response that ends within one."""
        state = self._rows[row]
        if state.mid_character:
            return []
        known = state.known[: state.response]
        state.known = known + before_end(proposed, self._end_token_ids)
        text = self._decoder.whole(state.known)[len(self._decoder.text(known)) :]
        return before_end(self._base.encode(text), self._base_end_token_ids)


Bridge = OneVocabulary | TwoVocabularies


class _Draft:
    """The pilot's tokens of one row's draft."""

    def __init__(self, end_token_ids: Set[int], limit: int) -> None:
        self.tokens: list[int] = []
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


@dataclass
class _Row:
    draft: _Draft
    crossed: SettledTokens
    known: list[int] = field(default_factory=list)
    """The pilot's tokens of the draft or the response, and its guess after them."""
    response: int = 0
    """Number of tokens in `known` that belong to the response."""
    mid_character: bool = False
    """True if the response ends within a character."""


class _PilotDecoder:
    """Text of the pilot's tokens, of which more may follow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def text(self, tokens: list[int]) -> str:
        return plain_text(self._tokenizer, tokens)

    def settled(self, tokens: list[int]) -> str:
        """Text that no later token can change."""
        tokens = [token for token in tokens if token not in self._special]
        end = len(tokens)
        # A run of byte tokens at the end is left out: after a wrong byte, the decoder gives up the whole run.
        # The pilot may also draw ids of padded embeddings, which have neither token nor text.
        while end and BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(tokens[end - 1]) or ""):
            end -= 1
        return self.text(tokens[:end]).rstrip(INCOMPLETE)

    def whole(self, tokens: list[int]) -> str:
        """Text of the tokens if none follows: all but an incomplete last character."""
        tokens = [token for token in tokens if token not in self._special]
        # Only a byte-level decoder returns the text before an incomplete character in the same run of bytes.
        ends = range(len(tokens), max(-1, len(tokens) - 4), -1)
        return max((self.text(tokens[:end]).rstrip(INCOMPLETE) for end in ends), key=len)

    def tokens_within(self, tokens: list[int], text: str) -> list[int]:
        """The longest prefix of `tokens` that ends with a character and whose text is a prefix of `text`."""
        low, high = 0, len(tokens)
        end = high
        while low < high:
            if text.startswith(self.settled(tokens[:end])):
                low = end
            else:
                high = end - 1
            end = (low + high + 1) // 2
        while not text.startswith(self.text(tokens[:low])):
            low -= 1
        return tokens[:low]


def before_end(tokens: list[int], end_token_ids: Set[int]) -> list[int]:
    """
    >>> before_end([5, 6, 2, 7], {2})
    [5, 6]
    """
    return tokens[: next((index for index, token in enumerate(tokens) if token in end_token_ids), len(tokens))]
