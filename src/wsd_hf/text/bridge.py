"""From the pilot's tokens to the base's and back: as they are where both speak one vocabulary, through text where not."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from .settled_tokens import BYTE_TOKEN, INCOMPLETE, PieceEncoder, Settling, plain_text

DraftOver = Literal["draft_ended", "draft_limit"]
"""Why a draft has no more tokens: the pilot's EOS, or the limit."""


class Offer(NamedTuple):
    """What a draft goes on with.

    Attributes:
        tokens: of the base's vocabulary; none of them is ever taken back.
        over: why no more will come, `"draft_ended"` or `"draft_limit"`; None while the pilot may go on.
    """

    tokens: list[int]
    over: DraftOver | None


class OneVocabulary:
    """The bridge of one call of `generate` whose models share a vocabulary: every token stays what it is.

    Args:
        end_token_ids: tokens that end a draft instead of entering it.
        limits: most tokens that the pilot may draft, for every row.
    """

    token_by_token = True
    """Whether each token of the pilot is one of the base, so that a limit is known with the draft's last token."""

    def __init__(self, end_token_ids: Set[int], limits: list[int]) -> None:
        self._drafts = [_Draft(end_token_ids, limit) for limit in limits]

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """The base's tokens that a row's draft goes on with when the pilot proposes these next; nothing after its end."""
        draft = self._drafts[row]
        return Offer(draft.take(proposed), draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of the response, or of the row's own draft while it drafts and no response is given."""
        return list(self._drafts[row].tokens if response is None else response)

    def complete(self, row: int) -> bool:
        """Whether the pilot's tokens say all of the response last given to `pilot_tokens`."""
        return True

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """The base's tokens of what the pilot proposes behind the response last given to `pilot_tokens`."""
        return list(proposed)


class TwoVocabularies:
    """The bridge of one call of `generate` whose models have tokenizers of their own: the draft crosses as text.

    The tokens offered add up to the encoding of the draft's text on its own. Special tokens of the pilot say nothing, and of
    a draft that ends inside a character the beginning of that character is dropped.

    Args:
        tokenizer: the base's.
        assistant_tokenizer: the pilot's.
        end_token_ids: tokens of the pilot that end a draft instead of entering it.
        limits: most tokens of the pilot in a row's draft, for every row.
        base_end_token_ids: tokens of the base that end a draft, should its text spell one.
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
        self._base = PieceEncoder(tokenizer)
        self._pilot = PieceEncoder(assistant_tokenizer)
        self._reader = _Reader(assistant_tokenizer)
        self._end_token_ids = end_token_ids
        self._base_end_token_ids = base_end_token_ids
        self._rows = [_Row(_Draft(end_token_ids, limit), Settling(self._base)) for limit in limits]

    def offer(self, row: int, proposed: list[int]) -> Offer:
        """The base's tokens that are settled now that the pilot proposes these next; at the draft's end all that are left."""
        state = self._rows[row]
        draft = state.draft
        if draft.over:
            return Offer([], draft.over)
        draft.take(proposed)
        state.known = draft.tokens
        settling = state.settling
        if draft.over:
            tokens = settling.finish(self._reader.whole(draft.tokens))
        else:
            tokens = settling.grow(self._reader.settled(draft.tokens))
        kept = before_end(tokens, self._base_end_token_ids)
        if len(kept) < len(tokens):
            draft.over = "draft_ended"
        return Offer(kept, draft.over)

    def pilot_tokens(self, row: int, response: list[int] | None = None) -> list[int]:
        """The pilot's tokens of the response's text, as far as its last character is complete.

        Tokens given earlier, drafted or guessed stay as they are as far as they say what the response says; the rest of its
        text is encoded on its own. Without a response: the row's own draft, while it drafts.
        """
        state = self._rows[row]
        if response is None:
            return list(state.draft.tokens)
        text = self._base.decode(response)
        said = text.rstrip(INCOMPLETE)
        state.mid_character = said != text
        kept = self._reader.tokens_within(state.known, said)
        state.known = kept + self._pilot.encode(said[len(self._reader.text(kept)) :])
        state.response = len(state.known)
        return list(state.known)

    def complete(self, row: int) -> bool:
        """Whether the pilot's tokens say all of the response last given to `pilot_tokens`: it ends with a whole character."""
        return not self._rows[row].mid_character

    def guess(self, row: int, proposed: list[int]) -> list[int]:
        """The base's tokens of the text that the pilot proposes behind the response last given to `pilot_tokens`.

        An incomplete last character is left out. Nothing can be guessed while the response itself ends inside a character.
        """
        state = self._rows[row]
        if state.mid_character:
            return []
        known = state.known[: state.response]
        state.known = known + before_end(proposed, self._end_token_ids)
        text = self._reader.whole(state.known)[len(self._reader.text(known)) :]
        return before_end(self._base.encode(text), self._base_end_token_ids)


Bridge = OneVocabulary | TwoVocabularies


class _Draft:
    """The pilot's tokens of one row's draft."""

    def __init__(self, end_token_ids: Set[int], limit: int) -> None:
        self.tokens: list[int] = []
        self.over: DraftOver | None = None
        self._end_token_ids = end_token_ids
        self._limit = limit

    def take(self, proposed: list[int]) -> list[int]:
        """Those of the proposed tokens that enter the draft; `over` says whether more can."""
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
    """Where a row stands.

    Attributes:
        known: the pilot's tokens of the draft or the response, with what it guessed behind it.
        response: how many of them the response itself takes.
        mid_character: whether the response ends inside a character.
    """

    draft: _Draft
    settling: Settling
    known: list[int] = field(default_factory=list)
    response: int = 0
    mid_character: bool = False


class _Reader:
    """The text of a pilot's tokens as they come in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def text(self, tokens: list[int]) -> str:
        return plain_text(self._tokenizer, tokens)

    def settled(self, tokens: list[int]) -> str:
        """What the tokens say whatever follows.

        A run of byte tokens counts only when it is over, since one wrong byte makes its decoder give up the whole run.
        """
        tokens = [token for token in tokens if token not in self._special]
        end = len(tokens)
        # A model's padded embeddings may be drawn too: such an id is no token, and says nothing.
        while end and BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(tokens[end - 1]) or ""):
            end -= 1
        return self.text(tokens[:end]).rstrip(INCOMPLETE)

    def whole(self, tokens: list[int]) -> str:
        """What the tokens say if nothing follows: all but an incomplete last character."""
        tokens = [token for token in tokens if token not in self._special]
        # Only a byte-level decoder gives back what stands before an incomplete character in the same run of bytes.
        ends = range(len(tokens), max(-1, len(tokens) - 4), -1)
        return max((self.text(tokens[:end]).rstrip(INCOMPLETE) for end in ends), key=len)

    def tokens_within(self, tokens: list[int], text: str) -> list[int]:
        """The longest beginning of `tokens` that ends with a character and says how `text` begins."""
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
