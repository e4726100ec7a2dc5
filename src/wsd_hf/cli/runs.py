"""Commands that run for long: their progress, and their end before they are done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import track
from rich.status import Status

from ..ranks import Rank
from .terminal import by_rank, say

T = TypeVar("T")

LINES = 40
"""About how many lines of progress a log gets."""


def progress(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items one by one; standard error shows how many are done, as a bar on a terminal and in a few lines elsewhere.

    Of several processes the first shows its own.
    """
    if not Rank.from_environment().first:
        yield from items
        return
    doing, console = by_rank(doing), Console(stderr=True)
    if sys.stderr.isatty() and console.is_interactive:
        yield from track(items, doing, console=console)
        return
    every = -(-len(items) // LINES)
    for done, item in enumerate(items, start=1):
        yield item
        if done == 1 or done % every == 0 or done == len(items):
            say(f"{doing}: {done} of {len(items)}", err=True)


@contextmanager
def resumable(place: Path) -> Iterator[None]:
    """Prints how to go on with a run that Ctrl-C or SIGTERM stops."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        say(by_rank(f"stopped; the same command goes on from what is in {place}"), err=True)
        raise


def status(doing: str) -> Status:
    """A context in which a terminal shows what is done; of several processes the first shows it."""
    return Console(stderr=True, quiet=not Rank.from_environment().first).status(doing)


def ends(last: bool) -> bool:
    """Whether this process ends the run, as `finish` says; another one prints that its share is done."""
    if not last:
        done = "its share is done; the process that ends last writes the results"
        say(by_rank(f"{done}, if all have one folder; after the failure of one, the same command goes on"), err=True)
    return last


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: a command cleans up, and exits with status 143."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
