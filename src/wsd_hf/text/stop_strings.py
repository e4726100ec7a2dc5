"""Stop strings, searched in the text of the last tokens, without transformers' table over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from .. import _compat
from ..errors import WSDValueError
from .token_texts import BYTES, PerTokenizer

PREFIX = "abcdef"
"""Text before a token while it is decoded, so that the decoder takes no space from it; the same as in transformers."""


class StopStrings(StoppingCriteria):
    """Ends a row whose last token completes a stop string, exactly where transformers' `StopStringCriteria` does.

    The texts of the last tokens are joined; a string that ends within the last of them ends the row. As there, tokens of the
    prompt and special tokens count as text, and an id without a token separates the texts on its two sides. As many tokens
    are read as the longest string has characters or, in vocabularies of bytes, bytes.

    Raises:
        WSDValueError: stop strings that are not text, or none at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: str | Sequence[str]) -> None:
        self._tokenizer = tokenizer
        try:
            self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
            spelt = [stop.encode() for stop in self.stop_strings]
        except (TypeError, AttributeError, UnicodeEncodeError):
            raise WSDValueError(f"stop_strings={stop_strings!r}: must be text, or a list of texts") from None
        if not spelt:
            raise WSDValueError(f"stop_strings={stop_strings!r} holds no text: give at least one, or None")
        self._targets: Sequence[Any] = self.stop_strings if _texts(tokenizer).mode is None else spelt
        self._longest = max(map(len, self._targets))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Ends of rows, BoolTensor[batch], by the last tokens of `input_ids`, LongTensor[batch, length]; `scores` is unused."""
        ended = [self.ends([], row) for row in input_ids[:, -self._longest :].tolist()]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def ends(self, prompt: list[int], response: list[int]) -> bool:
        """True if the last token of a row, given as its prompt's and its response's token ids, completes a stop string."""
        row = response if len(response) >= self._longest else prompt + response
        return self._ended(row[-self._longest :], _texts(self._tokenizer))

    def _ended(self, row: list[int], texts: _Texts) -> bool:
        last = texts.of(self._tokenizer, row[-1])
        if last is None:
            return "" in self.stop_strings
        before: list[Any] = []
        length = 0
        for token in reversed(row[:-1]):
            text = texts.of(self._tokenizer, token) if length < self._longest - 1 else None
            if text is None:
                break
            before.append(text)
            length += len(text)
        written = last[:0].join([*reversed(before), last])
        return any(written.find(target, max(0, length + 1 - len(target))) >= 0 for target in self._targets)


def before_stop(text: str, stop_strings: Sequence[str], whole: bool = True) -> str:
    """A text up to the first stop string; if it is not whole, up to a place at which one may begin.

    >>> before_stop("a fox and", [" and"]), before_stop("a fox an", [" and"], whole=False)
    ('a fox', 'a fox')
    """
    end = min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))
    longest = max(map(len, stop_strings), default=0)
    for start in range(max(0, end - longest), 0 if whole else end):
        if any(stop.startswith(text[start:end]) for stop in stop_strings):
            return text[:start]
    return text[:end]


class _Texts:
    """Texts of a tokenizer's tokens, each looked up once; no reference to the tokenizer is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mode = _compat.stop_string_mode(tokenizer)  # None compares characters, others bytes
        ids = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
        self._prefix: list[str] = tokenizer.convert_ids_to_tokens(ids)
        self._known: dict[int, str | bytes | None] = {}

    def of(self, tokenizer: PreTrainedTokenizerBase, index: int) -> Any:
        """Text or bytes of a token, by `mode`; None for an id without a token."""
        if index not in self._known:
            self._known[index] = self._look_up(tokenizer, index)
        return self._known[index]

    def _look_up(self, tokenizer: PreTrainedTokenizerBase, index: int) -> str | bytes | None:
        try:
            token = tokenizer.convert_ids_to_tokens(index)
        except (LookupError, OverflowError):
            return None
        if token is None or tokenizer.convert_tokens_to_ids(token) != index:  # some give their unknown token for any id
            return None
        spelt = _compat.stop_string_bytes(token, self.mode, BYTES)
        if spelt is not None:
            return spelt
        text: str = tokenizer.convert_tokens_to_string([*self._prefix, token])
        _, found, rest = text.partition(PREFIX)
        if not found:  # a vocabulary without these letters
            rest = text[len(tokenizer.convert_tokens_to_string(self._prefix)) :]
        return rest if self.mode is None else rest.encode()


_texts = PerTokenizer(_Texts)
