"""Text in pieces: a piece encoded on its own, and which of its tokens no later text can change."""

from __future__ import annotations

import re
import threading
import unicodedata
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte that a vocabulary without the character falls back to."""

SPACE_MARK = "▁"

PROBES = ("a", "A", "1", " ", " a", "\n", " \n", ".", "'s", "\u0301", "𒀀")
"""Continuations that move the boundaries at which tokenizers split text before they look for tokens: a letter of each case,
a digit, white space of both kinds, punctuation, a contraction, a mark, a letter that is in no vocabulary."""

CONTRACTIONS = ("'s", "'t", "'d", "'m", "'re", "'ve", "'ll")
"""The only pieces of such splits that end at letters: begun by the text, they are probed to their end."""

MARKED = "e\u0301\u0323"
"""A letter and two marks that every canonical form writes in another way."""

LOOK_BACK = 128
"""Characters of settled text that are looked at again with every step; twice as many at most."""

WORD_SPACE = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")

ANCHORS = ("\n", ".", "a")

Made = TypeVar("Made")

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


class TokenTexts:
    """What a tokenizer's tokens say, as bytes. Holds no reference to the tokenizer.

    Attributes:
        longest: bytes of the longest token.
        marks_spaces: whether the tokens write a space as `SPACE_MARK`.
        eats_spaces: whether some added token takes the white space in front of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = _token_text(tokenizer)
        self._texts = {_token_bytes(token, text(token)) for token in tokenizer.get_vocab()}
        self.marks_spaces = text(SPACE_MARK) == " "
        if adds_space(tokenizer):  # after special tokens too
            self._texts |= {text[1:] for text in self._texts if text.startswith(b" ")}
        self._sorted = sorted(self._texts)
        self.longest = max(map(len, self._sorted))
        self.eats_spaces = any(token.lstrip for token in tokenizer.added_tokens_decoder.values())

    def starts(self, text: bytes, boundaries: set[int], whole: bool) -> set[int]:
        """Where the first token that reaches past the end of `text` may begin.

        Args:
            text: the end of what has been written, or all of it.
            boundaries: the positions of interest, of characters for example. Byte-level tokens begin at others too: then a
                token ends there, and its own beginning is looked for, until a boundary is found.
            whole: whether nothing comes before `text`.

        Returns:
            The boundaries among all such positions, as offsets into `text`.
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


class Kept(Generic[Made]):
    """A function of tokenizers whose results are kept, as long as the tokenizer, until its vocabulary grows.

    Args:
        make: the function; its results hold no reference to the tokenizer.
    """

    def __init__(self, make: Callable[[PreTrainedTokenizerBase], Made]) -> None:
        self._make = make
        self._kept: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Made]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> Made:
        """The result for one tokenizer; threads wait for each other."""
        with self._lock:
            size, made = self._kept.get(tokenizer, (None, None))
            if made is None or size != len(tokenizer):
                made = self._make(tokenizer)
                self._kept[tokenizer] = len(tokenizer), made
            return made


token_texts = Kept(TokenTexts)
"""A tokenizer's token texts: about a second for 262k tokens, the first time."""


class PieceEncoder:
    """Encodes and decodes text that something else stands in front of.

    Args:
        tokenizer: fast tokenizers are followed exactly, their normalizers included; a tokenizer without a `backend_tokenizer`
            is taken to have no normalizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._composes = self._normalizer is not None and MARKED not in self._normalizer.normalize_str(MARKED)
        self._anchor = self._encode("a")
        self._skip = len(self._decode(self._anchor))

    @cached_property
    def _texts(self) -> TokenTexts:
        return token_texts(self.tokenizer)

    @cached_property
    def _adds_space(self) -> bool:
        return adds_space(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens and without a space that the tokenizer would put in front."""
        if self._adds_space and text:
            for anchor in ANCHORS:
                head, ids = self._encode(anchor), self._encode(anchor + text)
                if head and ids[: len(head)] == head:
                    return ids[len(head) :]
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; the space that their first token may begin with is kept."""
        return self._decode([*self._anchor, *ids])[self._skip :]

    def settled(self, text: str) -> list[int]:
        """The tokens that `encode(text + more)` begins with, whatever `more` is.

        A token that reaches past the end of `text` begins where the rest of `text` is the beginning of a token; before it
        stands the encoding of the text up to there. So what the encodings up to all these places share is settled. `PROBES`
        add what splitting into words may change.
        """
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
        # As it is, since added tokens may be found before the normalizer runs, and as it is normalized.
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

    def _decode(self, ids: list[int]) -> str:
        return plain_text(self.tokenizer, ids)


class Settling:
    """Turns a growing text into tokens, each given as soon as it is settled and never taken back.

    What it gives adds up to `encoder.encode` of the whole text. A long text is looked at from a space between words on, behind
    which everything was given long ago, so that a step's cost does not grow with the text.
    """

    def __init__(self, encoder: PieceEncoder) -> None:
        self._encoder = encoder
        self._start = 0
        self._given: list[int] = []

    def grow(self, text: str) -> list[int]:
        """The tokens newly settled, now that the text is `text`."""
        rest = text[self._start :]
        settled = self._encoder.settled(rest)
        given = len(self._given)
        if settled[:given] != self._given:
            return []
        self._given = settled
        self._forget_the_beginning(rest)
        return settled[given:]

    def finish(self, text: str) -> list[int]:
        """All tokens that are left of `text`, which grows no more."""
        rest = text[self._start :]
        tokens, given = self._encoder.encode(rest), len(self._given)
        if tokens[:given] == self._given:
            return tokens[given:]
        return self._encoder.encode(rest[len(self._encoder.decode(self._given)) :])

    def _forget_the_beginning(self, text: str) -> None:
        if len(text) <= 2 * LOOK_BACK or not (spaces := list(WORD_SPACE.finditer(text, 0, len(text) - LOOK_BACK))):
            return
        cut = spaces[-1].start()
        before = self._encoder.encode(text[:cut])
        if self._given[: len(before)] == before and before + self._encoder.encode(text[cut:]) == self._encoder.encode(text):
            self._start += cut
            self._given = self._given[len(before) :]


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What `ids` say, special tokens left out."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def common_prefix(left: list[int], right: list[int]) -> list[int]:
    """
    >>> common_prefix([1, 2, 3], [1, 2, 4])
    [1, 2]
    """
    same, different = 0, 1 + min(len(left), len(right))
    while different - same > 1:  # whole slices are compared at once: texts may be long, and are compared often
        middle = (same + different) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            different = middle
    return left[:same]


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space before any text."""
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[:1]
    return bool(first) and _token_text(tokenizer)(first[0]).startswith(" ")


def _token_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function from a token to its text."""
    anchor = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[-1:]
    skip = len(tokenizer.convert_tokens_to_string(anchor))

    def text(token: str) -> str:
        said: str = tokenizer.convert_tokens_to_string([*anchor, token])[skip:]
        return token if said == f" {token}" else said  # a decoder that joins words, not a token that begins with a space

    return text


def _token_bytes(token: str, text: str) -> bytes:
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    if INCOMPLETE in text and all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token)
    return text.encode()


def _last_to_compose(text: str) -> int:
    """Where the characters begin that a normalizer may still compose with what follows; the text's end if there are none."""
    start = len(text) - 1
    if start < 0 or unicodedata.category(text[start])[0] in "PZ" or text[start].isdecimal() or text[start].isspace():
        return len(text)
    while start and (unicodedata.combining(text[start]) or _compose(text[start - 1], text[start])):
        start -= 1
    return start


def _compose(left: str, right: str) -> bool:
    left, right = (unicodedata.normalize("NFC", letter) for letter in (left, right))
    return unicodedata.normalize("NFC", left + right) != left + right
