"""What the commands share: options, and how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..errors import WSDError
from ..text.visible import visible
from .models import DType
from .terminal import say

Base = Annotated[str | None, typer.Option(help="Base model, a path or Hub id. Default: the shipped pair.")]
Pilot = Annotated[str | None, typer.Option(help="Pilot, a path or Hub id.")]
Threshold = Annotated[float, typer.Option(help="Confidence at which the base takes over, in (0, 1].")]
Window = Annotated[int, typer.Option(help="Drafted tokens that confidence is measured over.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens in an answer, the draft included.", min=1)]
Device = Annotated[str, typer.Option(help="Where both models run: cpu, cuda, cuda:1, ...")]
DTypeOption = Annotated[DType, typer.Option(help="Data type of both models.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints an error that a user can put right in one line, with exit status 2; typer ends quietly at a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, WSDError) as error:
        say(one_line(error), err=True)
        raise typer.Exit(2) from None


def one_line(error: Exception) -> str:
    """The line that a command prints for an error."""
    return f"wsd-hf: {' '.join(visible(str(error)).split())}"
