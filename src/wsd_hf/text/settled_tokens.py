"""Tokens of a text that grows: those that no later text can change."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from .token_texts import SPACE_MARK, TokenTexts, adds_space, plain_text, token_texts

PROBES = ("a", "A", "1", " ", " a", "\n", " \n", ".", "'s", "\u0301", "𒀀")
"""Continuations that move the boundaries at which tokenizers split text before they search tokens: a letter of each case,
a digit, white space of both kinds, punctuation, a contraction, a mark, a letter that is in no vocabulary."""

CONTRACTIONS = ("'s", "'t", "'d", "'m", "'re", "'ve", "'ll")
"""The only results of such splits that end at letters; if a text ends within one, its rest is a probe too."""

MARKED = "e\u0301\u0323"
"""A letter and two marks that every canonical form of Unicode changes."""

LOOK_BACK = 64
"""Least number of characters of settled text that each step reads again; the most are twice as many."""

WORD_SPACE = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")

ANCHORS = ("\n", ".", "a")


class ContinuationTokenizer:
    """Encodes and decodes text that continues other text; slow tokenizers are taken to have no normalizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._composes = self._normalizer is not None and MARKED not in self._normalizer.normalize_str(MARKED)
        self._adds_space = adds_space(tokenizer)
        self._anchor = self._encode("a")
        self._skip = len(plain_text(tokenizer, self._anchor))

    @cached_property
    def _texts(self) -> TokenTexts:
        return token_texts(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens and without a space that the tokenizer would add at the beginning."""
        if self._adds_space and text:
            for anchor in ANCHORS:
                head, ids = self._encode(anchor), self._encode(anchor + text)
                if head and ids[: len(head)] == head:
                    return ids[len(head) :]
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens, with the space that the first token may begin with."""
        return plain_text(self.tokenizer, [*self._anchor, *ids])[self._skip :]

    def settled(self, text: str) -> list[int]:
        """Tokens that `encode(text + more)` begins with for every `more`."""
        # A token that reaches past the end of `text` begins at a place from which the rest of `text` is the beginning of a
        # token, after the encoding of the text before that place. So the common prefix of the encodings up to all these places
        # is settled. `PROBES` add the changes that splitting into words may make.
        if self._composes:
            text = text[: _last_to_compose(text)]
        ending = text[-2:].lower()
        endings = [word[begun:] for word in CONTRACTIONS for begun in (1, 2) if ending.endswith(word[:begun])]
        candidates = [text[:start] for start in self._token_starts(text)] + [text + probe for probe in (*PROBES, *endings)]
        tokens = self.encode(text)
        for candidate in candidates:
            tokens = common_prefix(tokens, self.encode(candidate))
        return tokens

    def _token_starts(self, text: str) -> set[int]:
        tail = text[-2 * self._texts.longest :]
        before = len(text) - len(tail)
        ends = range(len(tail) + 1)
        # Both as written, since added tokens may be found before the normalizer runs, and as normalized.
        starts = self._starts_in(tail, {len(tail[:end].encode()): end for end in ends}, whole=not before)
        if (normal := self._normal(tail)) != tail:
            heads = {end: self._normal(tail[:end]) for end in ends}
            boundaries = {len(head.encode()): end for end, head in heads.items() if normal.startswith(head)}
            starts |= self._starts_in(normal, boundaries, whole=not before)
        if self._texts.eats_spaces:
            starts |= {len(tail[:start].rstrip()) for start in {len(tail), *starts}}
        return {before + start for start in starts}

    def _starts_in(self, text: str, boundaries: dict[int, int], whole: bool) -> set[int]:
        return {boundaries[start] for start in self._texts.starts(text.encode(), set(boundaries), whole)}

    def _normal(self, text: str) -> str:
        if self._normalizer is not None:
            prefix = self._normalizer.normalize_str(".")
            text = self._normalizer.normalize_str("." + text)[len(prefix) :]
        return text.replace(SPACE_MARK, " ") if self._texts.marks_spaces else text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


class SettledTokens:
    """The tokens of one growing text, each returned as soon as it is settled, and never taken back.

    Together they are `tokenizer.encode` of the whole text. Of a long text only the end is read, from a space between words
    before which all tokens were returned long ago, so that the cost of a step does not grow with the text.
    """

    def __init__(self, tokenizer: ContinuationTokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._returned: list[int] = []

    def grow(self, more: str) -> list[int]:
        """Tokens that are newly settled after the next piece of the text."""
        self._text += more
        returned = len(self._returned)
        settled = self._tokenizer.settled(self._text)
        if settled[:returned] != self._returned:
            return []
        self._returned = settled
        self._skip_the_beginning()
        return settled[returned:]

    def finish(self, more: str) -> list[int]:
        """All remaining tokens after the last piece of the text."""
        self._text += more
        tokens, returned = self._tokenizer.encode(self._text), len(self._returned)
        if tokens[:returned] == self._returned:
            return tokens[returned:]
        return self._tokenizer.encode(self._text[len(self._tokenizer.decode(self._returned)) :])

    def _skip_the_beginning(self) -> None:
        text, encode = self._text, self._tokenizer.encode
        if len(text) <= 2 * LOOK_BACK or not (spaces := list(WORD_SPACE.finditer(text, 0, len(text) - LOOK_BACK))):
            return
        cut = spaces[-1].start()
        before = encode(text[:cut])
        if self._returned[: len(before)] == before and before + encode(text[cut:]) == encode(text):
            self._text = text[cut:]
            self._returned = self._returned[len(before) :]


def common_prefix(left: list[int], right: list[int]) -> list[int]:
    """
    >>> common_prefix([1, 2, 3], [1, 2, 4])
    [1, 2]
    """
    same, different = 0, 1 + min(len(left), len(right))
    while different - same > 1:  # slices are compared as a whole: texts may be long, and are compared often
        middle = (same + different) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            different = middle
    return left[:same]


def _last_to_compose(text: str) -> int:
    """Offset of the characters at the end that a normalizer may compose with a continuation; the text's length if none."""
    start = len(text) - 1
    if start < 0 or unicodedata.category(text[start])[0] in "PZ" or text[start].isdecimal() or text[start].isspace():
        return len(text)
    while start and (unicodedata.combining(text[start]) or _compose(text[start - 1], text[start])):
        start -= 1
    return start


def _compose(left: str, right: str) -> bool:
    left, right = (unicodedata.normalize("NFC", letter) for letter in (left, right))
    return unicodedata.normalize("NFC", left + right) != left + right
