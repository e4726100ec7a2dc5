"""Ends of answers in a transcript: the header of the next turn, at which the base is stopped, and the answer before it."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from .stop_strings import StopStrings

BASE_STOP_STRINGS = [newlines + header for header in ("[System]", "[User]", "[Assistant]") for newlines in ("\n\n", "\n", "")]
"""Headers of the next turn, which a base writes after its answer when it continues the transcript."""


def next_turn_criteria(tokenizer: PreTrainedTokenizerBase) -> StoppingCriteriaList:
    """Criteria that end a response at the header of the next turn."""
    return StoppingCriteriaList([StopStrings(tokenizer, BASE_STOP_STRINGS)])


def before_next_turn(text: str) -> str:
    """An answer without the header of the next turn and the space before it.

    >>> before_next_turn("Paris.\\n\\n[User]\\n")
    'Paris.'
    """
    for stop in BASE_STOP_STRINGS:
        text = text.split(stop)[0]
    return text.rstrip()


def turn_headers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Stop strings of a model's answers: none if it has a chat template of its own, and so writes no transcript."""
    return [] if tokenizer.chat_template else BASE_STOP_STRINGS


def answer_text(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a response, LongTensor[length], without special tokens and the header of the next turn."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return (before_next_turn(text) if turn_headers(tokenizer) else text).strip()


def answer_length(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Number of a response's tokens that begin before the header of the next turn; None if there is no header."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    answer = before_next_turn(text)
    if answer == text.rstrip():
        return None
    length = len(ids)
    while length and len(tokenizer.decode(ids[: length - 1], skip_special_tokens=True).rstrip("\ufffd")) >= len(answer):
        length -= 1
    return length


def settled(text: str) -> str:
    """The beginning of a growing answer that no later token can turn into space or the header of the next turn.

    >>> settled("Paris.\\n\\n[Us")
    'Paris.'
    """
    text = before_next_turn(text.rstrip("\ufffd"))
    for start in range(max(0, len(text) - max(map(len, BASE_STOP_STRINGS))), len(text)):
        if any(stop.startswith(text[start:]) for stop in BASE_STOP_STRINGS):
            return text[:start].rstrip()
    return text
