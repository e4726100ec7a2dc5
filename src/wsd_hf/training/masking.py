"""Examples as a pilot's token ids, and the part of each answer that is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import WSDValueError
from ..text.chat import Messages, encode_turns, render, with_bos
from .examples import Example
from .recipe import Recipe

NAME = "the pilot's tokenizer"
IGNORED = -100
"""Label of a token without a loss."""


@dataclass(frozen=True)
class EncodedAnswer:
    """An answer as the pilot would write it.

    Attributes:
        ids: its token ids, up to the end of the turn.
        begins: place of each token's first character in the answer; those of the end of the turn lie after it.
    """

    ids: list[int]
    begins: list[int]

    def tokens_before(self, characters: int) -> int:
        """Number of tokens that begin before a place in the answer."""
        return sum(begin < characters for begin in self.begins)


@dataclass(frozen=True)
class EncodedExample:
    """An example in the pilot's token ids; its prompt is the one that `generate` gives to the pilot."""

    prompt: list[int]
    chosen: EncodedAnswer
    rejected: EncodedAnswer | None


@dataclass(frozen=True)
class Row:
    """A prompt and the trained beginning of its answers, in token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def sft(self) -> dict[str, list[int]]:
        """The row that `SFTTrainer` takes: tokens after the trained part are left out, those of the prompt have no loss."""
        return {"input_ids": self.prompt + self.chosen, "labels": [IGNORED] * len(self.prompt) + self.chosen}

    def preference(self) -> dict[str, list[int]]:
        """The row that `DPOTrainer` takes, after its tokenization."""
        return {"prompt_ids": self.prompt, "chosen_ids": self.chosen, "rejected_ids": self.rejected}


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, ends: Collection[int], recipe: Recipe
) -> list[EncodedExample]:
    """Token ids of all examples.

    Args:
        examples: chats with their answers.
        tokenizer: the pilot's.
        ends: token ids that end an answer.
        recipe: its `max_length` cuts answers; its objective may need rejected ones.

    Raises:
        WSDValueError: an example that cannot be trained on, by its place: no rejected answer where one is needed, a prompt that
            the template refuses or that fills `max_length`, or a template that writes another prompt for an answered chat.
    """
    if not tokenizer.chat_template:
        raise WSDValueError(
            "the pilot has no chat template: a pilot needs the one that it is tuned with; set its chat_template"
        )
    if not tokenizer.is_fast:
        raise WSDValueError(f"the pilot's {type(tokenizer).__name__} gives no offsets of tokens: load a fast tokenizer")
    encoded = []
    for example in examples:
        try:
            encoded.append(_encode(example, tokenizer, ends, recipe))
        except WSDValueError as error:
            raise WSDValueError(f"{example.place}: {error}") from None
    return encoded


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], recipe: Recipe) -> EncodedExample:
    prompt = encode_turns(NAME, example.messages, "", tokenizer)
    room = recipe.max_length - len(prompt)
    if room < 1:
        raise WSDValueError(f"its prompt has {len(prompt)} tokens, which leaves no room within max_length={recipe.max_length}")

    def answer(text: str) -> EncodedAnswer:
        return _encode_answer(example.messages, prompt, text, tokenizer, ends, room)

    needed = recipe.objective != "sft"
    if needed and example.rejected is None:
        raise WSDValueError(f"has no rejected answer, which objective={recipe.objective!r} needs")
    return EncodedExample(prompt, answer(example.chosen), answer(example.rejected) if needed and example.rejected else None)


def _encode_answer(
    messages: Messages,
    prompt: list[int],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    room: int,
) -> EncodedAnswer:
    header = with_bos(render(NAME, messages, tokenizer), tokenizer)
    chat = [*messages, {"role": "assistant", "content": text}]
    whole = with_bos(render(NAME, chat, tokenizer, answered=True), tokenizer)
    if not whole.startswith(header):
        raise WSDValueError(
            "the pilot's chat template writes one prompt before an answer and another with it, so a pilot would be trained "
            "on a prompt that it never gets; set a chat_template that only appends"
        )
    place = max(len(header), whole.rfind(text.strip())) - (len(text) - len(text.lstrip()))
    ids, offsets = _tokens(whole, tokenizer)
    if ids[: len(prompt)] == prompt:
        ids, offsets = ids[len(prompt) :], offsets[len(prompt) :]
    else:  # tokens that reach from the prompt into the answer never occur in `generate`
        ids, offsets = _tokens(whole[len(header) :], tokenizer)
        place -= len(header)
    length = next((number for number, token in enumerate(ids, start=1) if token in ends), len(ids))
    begins = [offset - place for offset in offsets]
    return EncodedAnswer(ids[: min(length, room)], begins[: min(length, room)])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the place of each token's first character."""
    encoding: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [begin for begin, _ in encoding["offset_mapping"]]


def cut(encoded: Sequence[EncodedExample], ends: Sequence[int | None], recipe: Recipe) -> list[Row]:
    """The trained part of each example; the rejected answer is cut to as many tokens.

    Args:
        encoded: the examples.
        ends: number of characters of each chosen answer that a pilot writes, where `recipe.part` is `"drafted"`; None: all of
            them, and the end of the turn.
        recipe: see `Recipe.part`.
    """
    rows = []
    for example, end in zip(encoded, ends, strict=True):
        length = len(example.chosen.ids)
        if isinstance(recipe.part, int):
            length = min(recipe.part, length)
        elif recipe.part == "drafted" and end is not None:
            length = max(1, example.chosen.tokens_before(end))
        rejected = example.rejected.ids[:length] if example.rejected else []
        rows.append(Row(example.prompt, example.chosen.ids[:length], rejected))
    return rows
