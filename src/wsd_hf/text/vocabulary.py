"""Whether two models speak one vocabulary, decided by the tokenizers and not by their sizes."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import WSDValueError

SPLIT_SAMPLE = (
    "any text may begin with a space, "
    "The HTTPServer's 1234567 words don't fit,  she'LL say:\n\n\n    return x+=1;\t// (see [b]) ...\r\n   \n"
    "Cafe\u0301 café ﬁne ＡＢ ½ İstanbul straße, Привет мир! 你好，世界。こんにちは ᄒ\u1161\u11ab국어 हिन्दी ไทย "
    "👩\u200d👧 \u00a0\u3000▁_"
)
"""What tokenizers normalize and split in different ways."""

BEGINNING = 16
"""Tokens that may differ where one tokenizer puts a space in front of a text."""


def same_vocabulary(
    base_size: int,
    pilot_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> bool:
    """Whether token ids mean the same for base and pilot, so that a draft can cross as it is.

    They do if no id and no token stands for two things, and if both tokenizers turn text into the same ids: a sample of what
    tokenizers normalize and split in different ways, and of the tokens that both have. How they were saved, padded embeddings,
    a space in front of a text, EOS, pad, chat template and added tokens make no difference. Equal tokens behind another
    normalizer or another way to split do: then a draft in the pilot's tokens is not what the base would read. Tokens that a
    model has no row for are no part of its vocabulary.

    Args:
        base_size: width of the base's logits.
        pilot_size: width of the pilot's logits.
        tokenizer: the base's.
        assistant_tokenizer: the pilot's.

    Raises:
        WSDValueError: the sizes differ, and a tokenizer that could tell is missing; names it.
    """
    if tokenizer is None or assistant_tokenizer is None:
        if base_size != pilot_size:
            missing = "tokenizer" if tokenizer is None else "assistant_tokenizer"
            raise WSDValueError(
                f"the base's vocabulary has {base_size} entries and the pilot's {pilot_size}: pass {missing}= so that both "
                "tokenizers can be compared, and the draft can cross as text where they differ"
            )
        return True
    if tokenizer is assistant_tokenizer:
        return True
    sizes = len(tokenizer), len(assistant_tokenizer), base_size, pilot_size
    compared = _COMPARED.setdefault(tokenizer, weakref.WeakKeyDictionary())
    if compared.get(assistant_tokenizer, (None, False))[0] != sizes:
        compared[assistant_tokenizer] = sizes, _same(tokenizer, assistant_tokenizer, base_size, pilot_size)
    same: bool = compared[assistant_tokenizer][1]
    return same


_COMPARED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""For each pair compared before, its sizes and the verdict: comparing two of 262k tokens takes a second."""


def _same(
    tokenizer: PreTrainedTokenizerBase, assistant_tokenizer: PreTrainedTokenizerBase, base_size: int, pilot_size: int
) -> bool:
    base, pilot = _with_rows(tokenizer, base_size), _with_rows(assistant_tokenizer, pilot_size)
    if _conflict(base, pilot):
        return False
    added = tokenizer.get_added_vocab().keys() | assistant_tokenizer.get_added_vocab().keys()
    shared = sorted(base.keys() & pilot.keys() - added, key=base.__getitem__)
    sample = SPLIT_SAMPLE + _sample(tokenizer, shared)
    ids = [one.encode(sample, add_special_tokens=False) for one in (tokenizer, assistant_tokenizer)]
    size = max(0, min(map(len, ids)) - BEGINNING)
    return bool(ids[0][-size:] == ids[1][-size:])


def _with_rows(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, int]:
    """A tokenizer's vocabulary without the added tokens that its model has no row for."""
    added = tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if index < size or token not in added}


def _conflict(base: dict[str, int], pilot: dict[str, int]) -> bool:
    """Whether a token has two ids, or an id two tokens."""
    base_tokens = {index: token for token, index in base.items()}
    return any(base.get(token, index) != index or base_tokens.get(index, token) != token for token, index in pilot.items())


def _sample(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> str:
    """Some thousand of the tokens as one text."""
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:: len(tokens) // 1000 + 1]]
    return "".join(text for text in texts if "\ufffd" not in text)
