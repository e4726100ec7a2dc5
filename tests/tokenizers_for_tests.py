"""A tokenizer small enough to read: one letter, one token."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "<abcdefghijklmnopqrstuvwxyz" + "".join(chr(code) for code in range(0x100, 0x140))


def letter_tokenizer(size: int = 16, start: str = "") -> PreTrainedTokenizerFast:
    """Token 0 is `<` (padding), 1 `a`, 2 `b`, ...

    Args:
        size: of the vocabulary.
        start: letters that come first instead, for a vocabulary of another order.
    """
    letters = (start + "".join(letter for letter in LETTERS if letter not in start))[:size]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<", clean_up_tokenization_spaces=False)
