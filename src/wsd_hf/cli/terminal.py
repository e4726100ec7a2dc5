"""Standard input and output of the commands, on terminals, pipes and files of any encoding."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ..text.visible import visible


class Commands(TyperGroup):
    """Commands that no character can make fail.

    Characters that the encoding of the output lacks are printed as escapes, such as `\\u2502`. Bytes of the input that are no
    text become halves of surrogate pairs, which `check_text` refuses.
    """

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

    def resolve_command(self, context: Any, args: list[str]) -> Any:
        """As typer's; the old spelling of a command is refused in a line that has the new one."""
        if args[0] == "eval" and any(word.split("=")[0] == "--export" for word in args):
            say("wsd-hf: eval --export has moved: wsd-hf answers KIND --questions FILE --out FILE", err=True)
            raise typer.Exit(2)
        return super().resolve_command(context, args)


def say(text: str = "", *, err: bool = False) -> None:
    """Prints a line, in which control characters have a visible form, on a terminal and elsewhere."""
    # Not typer.echo, which takes ASCII for a mistake and writes UTF-8.
    print(visible(text), file=sys.stderr if err else sys.stdout, flush=True)


def by_rank(text: str) -> str:
    """A line with the number of this process, if a launcher has started several."""
    number, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return text if number is None or world == "1" else f"rank {number}: {text}"


def say_json(data: Any) -> None:
    """Prints a line of JSON that every encoding can hold, and in which every control character is escaped."""
    print(json.dumps(data), flush=True)
