"""Comparison of two models' vocabularies, by their tokenizers and not by their sizes."""

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
"""Text that tokenizers normalize and split in different ways."""

BEGINNING = 16
"""Number of tokens that may differ if one tokenizer adds a space before a text."""


def same_vocabulary(
    base_size: int,
    pilot_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> bool:
    """True if token ids mean the same for base and pilot, so that drafted tokens need no translation.

    That is so if each id is one token in both vocabularies, each token has one id, and both tokenizers turn a sample text
    into the same ids. The sample holds text that tokenizers normalize and split in different ways, and shared tokens. File
    format, padded embeddings, a space added before a text, EOS, pad, chat template and added tokens make no difference.
    Added tokens that a model has no row for are not part of its vocabulary. The sizes are widths of logits; if they differ,
    both tokenizers are needed.
    """
    if tokenizer is None or assistant_tokenizer is None:
        if base_size != pilot_size:
            missing = "tokenizer" if tokenizer is None else "assistant_tokenizer"
            raise WSDValueError(
                f"the base's vocabulary has {base_size} entries and the pilot's {pilot_size}: pass {missing}= so that the "
                "tokenizers can be compared, and drafts be translated as text if they differ"
            )
        return True
    if tokenizer is assistant_tokenizer:
        return True
    sizes = len(tokenizer), len(assistant_tokenizer), base_size, pilot_size
    compared = _COMPARED.setdefault(tokenizer, weakref.WeakKeyDictionary())
    known_sizes, same = compared.get(assistant_tokenizer, (None, False))
    if known_sizes != sizes:
        same = _same(tokenizer, assistant_tokenizer, base_size, pilot_size)
        compared[assistant_tokenizer] = sizes, same
    return bool(same)


_COMPARED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Sizes and result for each pair compared before: comparing two tokenizers of 262k tokens takes a second."""


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
    """Vocabulary without the added tokens that the model has no row for."""
    added = tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if index < size or token not in added}


def _conflict(base: dict[str, int], pilot: dict[str, int]) -> bool:
    """True if a token has two ids, or an id two tokens."""
    base_tokens = {index: token for token, index in base.items()}
    return any(base.get(token, index) != index or base_tokens.get(index, token) != token for token, index in pilot.items())


def _sample(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> str:
    """One text of about a thousand of the tokens."""
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:: len(tokens) // 1000 + 1]]
    return "".join(text for text in texts if "\ufffd" not in text)
