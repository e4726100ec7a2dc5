"""Limits for a block of a test that talks to a server: what hangs fails, with its place, and so does a thread that stays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def time_limit(seconds: int = 60) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is up; without a limit where the system has no SIGALRM."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def hung(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def no_thread_left(seconds: int = 20) -> Iterator[None]:
    """Fails if threads that began in the block are still there so long after it; those of earlier tests may end meanwhile."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(seconds)
        assert not thread.is_alive(), thread
