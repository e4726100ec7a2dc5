"""Limits for tests that wait for threads, servers and processes: what hangs fails, with its place, and so does what stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from types import FrameType

HANG = 120
"""Seconds until a test that hangs fails: more than a busy machine needs for anything else."""


@contextlib.contextmanager
def time_limit(seconds: int = 2 * HANG) -> Iterator[None]:
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
def no_thread_left() -> Iterator[None]:
    """Fails if threads that began in the block stay after it; those of earlier tests may end meanwhile."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), thread


def output_of(command: list[str], seconds: int = 2 * HANG, env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Output and error of a process that succeeds; after the time, or Ctrl-C, it is killed with all that it has started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, out + err
    return out, err


def status_of(child: int) -> int:
    """The status with which a forked process ends, as `os.waitpid` has it; one that hangs is killed."""
    try:
        with time_limit():
            return os.waitpid(child, 0)[1]
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
