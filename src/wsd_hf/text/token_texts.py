"""Texts of a tokenizer's tokens, as bytes, and what of them is cached for each tokenizer."""

from __future__ import annotations

import re
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

INCOMPLETE = "\ufffd"
"""Character that a decoder writes for bytes that are not yet a character."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""Token of one byte, for characters that a vocabulary lacks."""

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""Bytes by the letters that stand for them in byte-level vocabularies."""

SPACE_MARK = "▁"

Made = TypeVar("Made")


class TokenTexts:
    """Texts of all tokens of a tokenizer, to which no reference is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = _token_text(tokenizer)
        self._texts = {_token_bytes(token, text(token)) for token in tokenizer.get_vocab()}
        self.marks_spaces = text(SPACE_MARK) == " "
        if adds_space(tokenizer):  # after special tokens too
            self._texts |= {text[1:] for text in self._texts if text.startswith(b" ")}
        self._sorted = sorted(self._texts)
        self.longest = max(map(len, self._sorted))  # in bytes
        self.eats_spaces = any(token.lstrip for token in tokenizer.added_tokens_decoder.values())

    def starts(self, text: bytes, boundaries: set[int], whole: bool) -> set[int]:
        """Offsets, among `boundaries`, at which the first token that reaches past the end of `text` may begin.

        A byte-level token may begin between boundaries; then another token ends there, whose own beginning is searched, until
        a boundary is found. If not `whole`, `text` is the end of a longer one.
        """
        end = len(text)
        found = {start for start in range(max(0, end - self.longest), end) if self._begins_a_token(text[start:])}
        inner = found - boundaries
        while inner:
            end = inner.pop()
            if end < self.longest and not whole:
                found.add(0)
            starts = {start for start in range(max(0, end - self.longest), end) if text[start:end] in self._texts}
            inner |= starts - boundaries - found
            found |= starts
        return found & boundaries

    def _begins_a_token(self, text: bytes) -> bool:
        index = bisect_right(self._sorted, text)
        return index < len(self._sorted) and self._sorted[index].startswith(text)


class PerTokenizer(Generic[Made]):
    """A cached function whose results, without reference to their tokenizer, live with it until the vocabulary grows."""

    def __init__(self, make: Callable[[PreTrainedTokenizerBase], Made]) -> None:
        self._make = make
        self._cache: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Made]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> Made:
        with self._lock:
            size, made = self._cache.get(tokenizer, (None, None))
            if made is None or size != len(tokenizer):
                made = self._make(tokenizer)
                self._cache[tokenizer] = len(tokenizer), made
            return made


token_texts = PerTokenizer(TokenTexts)
"""The token texts of a tokenizer. The first call takes about a second for 262k tokens."""


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of `ids`, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if a tokenizer puts a space before any text."""
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[:1]
    return bool(first) and _token_text(tokenizer)(first[0]).startswith(" ")


def _token_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function from a token to its text."""
    anchor = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[-1:]
    skip = len(tokenizer.convert_tokens_to_string(anchor))

    def text(token: str) -> str:
        decoded: str = tokenizer.convert_tokens_to_string([*anchor, token])[skip:]
        return token if decoded == f" {token}" else decoded  # a decoder that joins words, not a token with a space

    return text


def _token_bytes(token: str, text: str) -> bytes:
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if INCOMPLETE in text and all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token)
    return text.encode()
