"""Whether two models speak one vocabulary, decided by the tokenizers and not by their sizes."""

from __future__ import annotations

from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from ..errors import WSDValueError


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
