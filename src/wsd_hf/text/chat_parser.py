"""Chats read back from prompts that a chat template wrote."""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import WSDValueError
from .chat import Messages, render

PROBES = (
    ("user",),
    ("system", "user"),
    ("user", "user"),
    ("user", "assistant", "user"),
    ("user", "assistant", "assistant"),
)
"""Roles of chats whose prompts show the text before, between and after messages; a template may refuse some."""

MARK = "wsd{}"


class Chat(NamedTuple):
    """The turns of a prompt, and the beginning of the answer, if the prompt holds one."""

    turns: Messages
    prefill: str


class ChatLayout:
    """The text between the messages of a tokenizer's chat template, by which prompts are read back.

    A result is checked: rendered again, it must be the prompt. So the base could not distinguish the returned chat from the
    original. The two differ if a message contains the header of a turn (read as a turn), or if the template left out
    something (white space at the ends of a message, tools, earlier thoughts). Without a chat template, nothing is read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._openings: dict[str, str] = {}  # texts before a chat, each with the role of the next message
        self._joints: dict[str, dict[str, str]] = {}  # the same for texts after a role's message
        for roles in PROBES if tokenizer.chat_template else ():
            self._probe(roles)

    def read(self, ids: list[int]) -> Chat | None:
        """The chat of a prompt without padding, with or without BOS; None if the prompt has another layout."""
        text = self._text(ids)
        messages = self._messages(text)
        turns = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        prompt = self._prompt(turns) if turns else None
        return None if prompt is None or not text.startswith(prompt) else Chat(turns, text[len(prompt) :].strip())

    def _probe(self, roles: tuple[str, ...]) -> None:
        prompt = self._prompt([{"role": role, "content": MARK.format(position)} for position, role in enumerate(roles)])
        opening, *joints = re.split("|".join(map(MARK.format, range(len(roles)))), prompt or "")
        if len(joints) == len(roles):
            self._openings[opening] = roles[0]
            for role, joint, following in zip(roles, joints, (*roles[1:], "assistant"), strict=True):
                if joint:
                    self._joints.setdefault(role, {})[joint] = following

    def _messages(self, text: str) -> list[dict[str, str]]:
        """The text, cut at the headers of turns; the last message may be the beginning of an answer."""
        opening = max(filter(text.startswith, self._openings), key=len, default=None)
        if opening is None:
            return []
        role, text = self._openings[opening], text[len(opening) :]
        messages = []
        while found := [joint for joint in self._joints.get(role, ()) if joint in text]:
            joint = min(found, key=lambda joint: (text.index(joint), -len(joint)))
            content, _, text = text.partition(joint)
            messages.append({"role": role, "content": content})
            role = self._joints[role][joint]
        return [*messages, {"role": role, "content": text}]

    def _prompt(self, turns: Messages) -> str | None:
        """The template's output, as text of its tokens; None if the template refuses the turns."""
        try:
            prompt = render("tokenizer", turns, self._tokenizer)
        except WSDValueError:
            return None
        return self._text(self._tokenizer.encode(prompt, add_special_tokens=False))

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        bos = self._tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text
