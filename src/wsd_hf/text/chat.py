"""Prompts for base and pilot, made from the same chat messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import WSDValueError
from .next_turn import next_turn_criteria

Messages = Sequence[Mapping[str, Any]]

BASE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n\\n[' + message['role'] | capitalize + ']\\n' + message['content'] | trim }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n[Assistant]\\n' }}{% endif %}"
)
"""A chat as a plain transcript, for base models without a template of their own (the official layout)."""

ROLES = ("system", "user", "assistant")


def build_inputs(
    messages: Messages | Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase,
) -> BatchEncoding:
    """Makes the inputs of `generate(..., strategy=...)` for a chat, or for a batch of chats.

    The pilot's prompt follows its chat template. The base's follows its own template if it has one, else
    `BASE_CHAT_TEMPLATE`; then `stopping_criteria` ends the response at `BASE_STOP_STRINGS`. A last assistant message is the
    beginning of the answer, and part of both prompts.

    The pilot's prompt and the base's transcript begin with the BOS, if the tokenizer has one, even if the pilot's template
    writes none, as in the official code. The prompt of a base with a template of its own is as that template writes it.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": str}` dicts, or a list of such lists.
        tokenizer: the base's.
        assistant_tokenizer: the pilot's; needs a chat template.

    Returns:
        `input_ids`, `attention_mask`, `assistant_input_ids`, `assistant_attention_mask`, each LongTensor[batch, prompt],
        on the CPU and padded on the left, and `stopping_criteria` if the base has no template.

    Raises:
        WSDValueError: messages of another form, a tokenizer without a chat template or pad token that it needs, or a template
            that refuses the messages (system messages, often).
    """
    single = len(messages) == 0 or isinstance(messages[0], Mapping)
    inputs = chat_prompts(cast("Sequence[Messages]", [messages] if single else messages), tokenizer, assistant_tokenizer)
    if not tokenizer.chat_template:
        inputs["stopping_criteria"] = next_turn_criteria(tokenizer)
    return BatchEncoding(inputs)


def chat_prompts(
    chats: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, assistant_tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The tensors of `build_inputs`, which documents arguments and errors."""
    base, pilot = base_prompts(chats, tokenizer), pilot_prompts(chats, assistant_tokenizer)
    return {**base, **{f"assistant_{name}": value for name, value in pilot.items()}}


def base_prompts(chats: Sequence[Messages], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The base's `input_ids` and `attention_mask`."""
    own = bool(tokenizer.chat_template)
    transcript = None if own else BASE_CHAT_TEMPLATE
    return _pad("tokenizer", tokenizer, [_encode("tokenizer", tokenizer, chat, transcript, bos=not own) for chat in chats])


def pilot_prompts(chats: Sequence[Messages], assistant_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The pilot's `input_ids` and `attention_mask`."""
    name = "assistant_tokenizer"
    if assistant_tokenizer.chat_template is None:
        raise WSDValueError(f"{name} has no chat template: a pilot needs the one it was tuned with; set its chat_template")
    return _pad(name, assistant_tokenizer, [_encode(name, assistant_tokenizer, chat) for chat in chats])


def check_messages(messages: Messages) -> None:
    """Raises unless the messages are a chat that ends with a user message, or with an answer to be continued."""
    check_turns("messages", messages)
    turns = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not turns or turns[-1]["role"] != "user":
        raise WSDValueError("messages must end with a user message, or with one assistant message to be continued")


def check_turns(name: str, messages: Messages) -> None:
    """Raises unless each message of the argument `name` has a role and a text."""
    for position, message in enumerate(messages):
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            shown = reprlib.repr(message)  # whole, it may fill the screen, or be nested too deep for repr
            raise WSDValueError(f"{name}[{position}]={shown}: must have a role ({', '.join(ROLES)}) and a text as content")
        check_text(f"{name}[{position}]", message["content"])


def check_text(name: str, text: str) -> None:
    """Raises unless the text of the argument `name` can be written in UTF-8, as tokenizers and files need it."""
    # Half of a surrogate pair can't: Python puts one for each byte of an argument that isn't UTF-8, and JSON may spell one.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise WSDValueError(f"{name}: holds half of a surrogate pair ({half}), which is no text; give text in UTF-8") from None


def _encode(
    name: str, tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str | None = None, bos: bool = True
) -> list[int]:
    check_messages(messages)
    turns, prefill = messages, ""
    if messages[-1]["role"] == "assistant":
        turns, prefill = messages[:-1], messages[-1]["content"].strip()
    return encode_turns(name, turns, prefill, tokenizer, template, bos)


def encode_turns(
    name: str,
    turns: Messages,
    prefill: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    bos: bool = True,
) -> list[int]:
    """Token ids of the prompt for an answer to `turns`, of which `prefill`, maybe empty, is the beginning.

    Args:
        name: of the tokenizer, for errors.
        template: replaces that of the tokenizer.
        bos: whether the prompt begins with the BOS, if the tokenizer has one, even if the template writes none.
    """
    prompt = render(name, turns, tokenizer, template)
    ids: list[int] = tokenizer.encode(with_bos(prompt, tokenizer) if bos else prompt, add_special_tokens=False)
    return ids + tokenizer.encode(prefill, add_special_tokens=False) if prefill else ids


def with_bos(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt that begins with the BOS, if the tokenizer has one."""
    return prompt if prompt.startswith(tokenizer.bos_token or "") else tokenizer.bos_token + prompt


def render(
    name: str, turns: Messages, tokenizer: PreTrainedTokenizerBase, template: str | None = None, answered: bool = False
) -> str:
    """Output of the chat template for `turns`, with the header of the answer unless `answered`.

    Raises:
        WSDValueError: the template refuses the turns.
    """
    try:
        prompt: str = tokenizer.apply_chat_template(
            list(turns), chat_template=template, add_generation_prompt=not answered, tokenize=False
        )
        check_text("its output", prompt)
    except Exception as error:  # a template is a program, and may raise anything
        reason = error if isinstance(error, TemplateError | WSDValueError) else f"{type(error).__name__}: {error}"
        raise WSDValueError(f"the chat template of {name} refuses these messages: {reason}") from error
    return prompt


def _pad(name: str, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    if tokenizer.pad_token_id is None and any(len(row) < width for row in rows):
        raise WSDValueError(f"{name} has no pad token, and the prompts differ in length: set its pad_token")
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device="cpu"),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cpu"),
    }
