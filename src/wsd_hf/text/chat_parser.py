"""Chats read back from prompts: what a chat template wrote is taken apart again."""

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
"""Chats that show what a template writes in front of, between and behind messages; it may refuse some."""

MARK = "wsd{}"


class Chat(NamedTuple):
    """A chat, and the answer that a prompt asks for."""

    turns: Messages
    prefill: str
    """The beginning of the answer, if the prompt holds one."""


class ChatLayout:
    """How the chat template of a tokenizer joins messages, so that its prompts can be read back.

    What is read is checked: written by the template again, it must give the prompt. So what is returned is a chat that the
    base cannot tell from the one it was given. It is another one where a message contains the header of a turn (read as a
    turn), or where the template left something out (white space at the ends of a message, tools, earlier thoughts).

    Args:
        tokenizer: with the chat template; without one, nothing is read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._openings: dict[str, str] = {}  # what may stand in front of a chat, and the role that speaks next
        self._joints: dict[str, dict[str, str]] = {}  # the same for what may follow a role's message
        for roles in PROBES if tokenizer.chat_template else ():
            self._probe(roles)

    def read(self, ids: list[int]) -> Chat | None:
        """The chat of a prompt without padding; None where it is none of this layout. A BOS more or less is no matter."""
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
        """Text cut at the headers of turns; the last message may be an answer that has only begun."""
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
        """What the template writes, as text of tokens; None where it refuses."""
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
