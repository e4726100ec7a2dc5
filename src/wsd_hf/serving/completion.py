"""Answers and errors in the form of OpenAI's API; what only this package has is in fields named `wsd`."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .body import Refused
from .requests import End, Piece

ERRORS = {429: "rate_limit_error", 401: "authentication_error"}
"""Types of errors by their status; all others are errors of the request or of the server."""


@dataclass(frozen=True)
class Completion:
    """The objects of one answer.

    Args:
        model: name of the pair.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "finish_reason": end.finish_reason, "wsd": _work(end)}
        return self._object("chat.completion", choice, usage=_usage(end))

    def first(self) -> dict[str, Any]:
        """The first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """The chunk of a piece."""
        return self._chunk({"content": piece.text}, wsd={"writer": piece.writer})

    def last(self, end: End) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk({}, finish_reason=end.finish_reason, wsd=_work(end))

    def usage(self, end: End) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._object("chat.completion.chunk", usage=_usage(end))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        return self._object("chat.completion.chunk", {"delta": delta, "finish_reason": finish_reason, **more})

    def _object(self, kind: str, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        numbered = [{"index": index, "logprobs": None, **choice} for index, choice in enumerate(choices)]
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": numbered, **more}


def event(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(data)}\n\n".encode()


def error_object(refused: Refused, text: str = "") -> dict[str, Any]:
    """An error; `text`: of the answer so far, if there is any."""
    kind = ERRORS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    error = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}
    return {"error": error | ({"text": text} if text else {})}


def _usage(end: End) -> dict[str, int]:
    written = end.pilot_tokens + end.base_tokens
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": end.prompt_tokens + written,
    }


def _work(end: End) -> dict[str, Any]:
    return {
        "pilot_tokens": end.pilot_tokens,
        "base_tokens": end.base_tokens,
        "switch_index": end.switch_index,
        "switch_reason": end.switch_reason,
    }
