"""Writing of files by runs that may end at any time: whole or not at all, by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import WSDValueError


@contextmanager
def only_writer(file: Path, seconds: float = 0) -> Iterator[None]:
    """Locks a file, in a folder that exists, until the context or the process ends; a WSDValueError if that cannot be.

    Another's lock is waited for so many seconds.

    The lock is on a hidden file next to it, `.NAME.lock`, which is removed afterwards; one that a killed process leaves locks
    nothing.
    """
    place = file.with_name(f".{file.name}.lock")
    lock = FileLock(place, timeout=seconds, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise WSDValueError(
            f"{file}: another run is writing it, or this one has it still open; wait for its end, or choose another place"
        ) from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise WSDValueError(f"{file}: cannot be locked ({error}); choose a place where that is possible") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open, and the release removes it there
            place.unlink()
        lock.release()


def write_whole(file: Path, text: str) -> None:
    """Replaces a file's content at once by a text, in UTF-8 and with its own line ends."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with named_errors(file):
            unfinished.write_text(text, encoding="utf-8", newline="")
            os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Adds the file's name to an OSError that lacks one, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise
