"""A conversation as a file: its data as JSON, or the page's look of it as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from ..pages.document import document
from ..text.visible import html_text
from .answers import Answer, Turn
from .style import ANSWERS
from .view import conversation, panel


def as_json(turns: Sequence[Turn], about: str) -> str:
    """All turns as JSON, with the models and this package's version; docs/ui.md has the fields.

    Args:
        turns: from the first.
        about: the line on the models that the page shows.
    """
    written = [
        {"question": turn.question, "settings": asdict(turn.settings), "answers": [_answer(answer) for answer in turn.answers]}
        for turn in turns
    ]
    data = {"wsd_hf": version("wsd_hf"), "models": about, "turns": written}
    return json.dumps(data, ensure_ascii=False, indent=1)


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "method": answer.method,
        "text": answer.text,
        "pieces": [asdict(piece) for piece in answer.pieces],
        "end": None if answer.end is None else asdict(answer.end),
        "stopped": answer.stopped,
        "error": answer.error,
    }


def as_html(turns: Sequence[Turn], threshold: float, window_size: int, about: str) -> str:
    """All turns as a page that needs no other file, with the last curve, and the models as for `as_json`."""
    drawn = panel(turns[-1] if turns else None, threshold, window_size)
    body = f"<p>{html_text(about)}</p>\n{conversation(turns)}<figure>{drawn}</figure>\n"
    return document("Weak-to-Strong Decoding", body, style=ANSWERS)
