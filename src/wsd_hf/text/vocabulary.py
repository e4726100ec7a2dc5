"""Whether two models speak one vocabulary, decided by the tokenizers and not by their sizes."""

from __future__ import annotations

from operator import itemgetter

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
    normalizer or another way to split do: then a draft in the pilot's tokens is not what the base would read.

    Args:
        base_size: width of the base's logits.
        pilot_size: width of the pilot's logits.
        tokenizer: the base's.
        assistant_tokenizer: the pilot's.

    Raises:
        WSDValueError: the sizes differ, and a tokenizer that could tell is missing; names it.
    """
    if tokenizer is None or assistant_tokenizer is None:
        check_vocabularies(base_size, pilot_size, tokenizer, assistant_tokenizer)
        return True
    if _first_conflict(tokenizer.get_vocab(), assistant_tokenizer.get_vocab()):
        return False
    sample = SPLIT_SAMPLE + _sample_of_tokens(tokenizer, assistant_tokenizer)
    ids = [one.encode(sample, add_special_tokens=False) for one in (tokenizer, assistant_tokenizer)]
    size = max(0, min(map(len, ids)) - BEGINNING)
    return bool(ids[0][-size:] == ids[1][-size:])


def check_vocabularies(
    base_size: int,
    pilot_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raises unless token ids mean the same for base and pilot.

    Embeddings padded to different widths, and base/instruct siblings that differ in eos, pad or a few added tokens, are one
    vocabulary. Equal sizes alone are taken as one vocabulary only where no tokenizers were given to compare.

    Args:
        base_size: width of the base's logits.
        pilot_size: width of the pilot's logits.
        tokenizer: the base's.
        assistant_tokenizer: the pilot's.
    """
    if tokenizer is not None and assistant_tokenizer is not None:
        if conflict := _first_conflict(tokenizer.get_vocab(), assistant_tokenizer.get_vocab()):
            raise WSDValueError(
                f"tokenizer and assistant_tokenizer are different vocabularies ({conflict}); "
                "Weak-to-Strong Decoding across two vocabularies is not supported yet: choose a pilot of the base's family"
            )
    elif base_size != pilot_size:
        missing = "tokenizer" if tokenizer is None else "assistant_tokenizer"
        raise WSDValueError(
            f"the base's vocabulary has {base_size} entries and the pilot's {pilot_size}: pass {missing}= so that both "
            "tokenizers can be compared (padded embeddings of one vocabulary are fine)"
        )


def _first_conflict(base: dict[str, int], pilot: dict[str, int]) -> str | None:
    base_tokens = {index: token for token, index in base.items()}
    for token, index in sorted(pilot.items(), key=itemgetter(1)):
        if base.get(token, index) != index:
            return f"{token!r} is {base[token]} for the base and {index} for the pilot"
        if base_tokens.get(index, token) != token:
            return f"id {index} is {base_tokens[index]!r} for the base and {token!r} for the pilot"
    return None


def _sample_of_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """Some thousand tokens that both have, in the order of their ids, as one text."""
    added = tokenizer.get_added_vocab().keys() | other.get_added_vocab().keys()
    shared = sorted((tokenizer.get_vocab().items() & other.get_vocab().items()), key=itemgetter(1))
    tokens = [token for token, _ in shared if token not in added]
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens[:: len(tokens) // 1000 + 1]]
    return "".join(text for text in texts if "\ufffd" not in text)
