"""Stop strings, looked for in the text of the last tokens: transformers makes a table over the whole vocabulary for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from .. import _compat
from ..errors import WSDValueError
from .settled_tokens import BYTES, Kept

PREFIX = "abcdef"
"""Text before a token while it is decoded, so that the decoder takes no space from it; the one that transformers uses."""


class StopStrings(StoppingCriteria):
    """Ends a row whose last token completes one of some strings, exactly where transformers' `StopStringCriteria` does.

    The texts of the last tokens are joined; a string that ends within the last of them ends the row. As there, tokens of the
    prompt and special tokens count as text, and an id without a token separates what is before it from what follows. The
    longest string's length, in characters or, where tokens are made of bytes, in bytes, is how many tokens are looked at.
    A token's text is looked up when it is first seen.

    Args:
        tokenizer: of the model that writes.
        stop_strings: one or several.

    Raises:
        WSDValueError: stop strings that are no text, or none at all.
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
        """Whether each row's last token ends it, BoolTensor[batch].

        Args:
            input_ids: tokens so far, LongTensor[batch, length]; the last few are read on the host.
            scores: not read.
        """
        texts = _texts(self._tokenizer)
        ended = [self._ended(row, texts) for row in input_ids[:, -self._longest :].tolist()]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

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


class _Texts:
    """Texts of the tokens of one tokenizer, each looked up once. Holds no reference to the tokenizer.

    Attributes:
        mode: how transformers matches stop strings in this vocabulary: None compares characters, else bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mode = _compat.stop_string_mode(tokenizer)
        ids = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
        self._prefix: list[str] = tokenizer.convert_ids_to_tokens(ids)
        self._known: dict[int, str | bytes | None] = {}

    def of(self, tokenizer: PreTrainedTokenizerBase, index: int) -> Any:
        """The text of a token, or its bytes, as `mode` has it; None for an id without a token."""
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
        _, found, said = text.partition(PREFIX)
        if not found:  # a vocabulary without these letters
            said = text[len(tokenizer.convert_tokens_to_string(self._prefix)) :]
        return said if self.mode is None else said.encode()


_texts = Kept(_Texts)
