"""Standard input and output of the commands, whatever they are connected to."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

from typer.core import TyperGroup

from ..text.visible import visible


class Commands(TyperGroup):
    """Commands that don't fail for characters: output shows one that its encoding lacks as an escape, as `\\u2502`; input
    keeps bytes that are no text as halves of surrogate pairs, which `check_text` refuses."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As typer's."""
        for stream, errors in (
            (sys.stdin, "surrogateescape"),
            (sys.stdout, "backslashreplace"),
            (sys.stderr, "backslashreplace"),
        ):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        return super().main(*args, **kwargs)


def say(text: str = "", *, err: bool = False) -> None:
    """Prints a line, on a terminal or not, with a visible form of control characters."""
    # Not typer.echo, which takes ASCII for a mistake and writes UTF-8.
    print(visible(text), file=sys.stderr if err else sys.stdout, flush=True)


def say_json(data: Any) -> None:
    """Prints a line of JSON that every encoding can hold, and in which every control character is escaped."""
    print(json.dumps(data), flush=True)
