"""Processes of a launcher that share some work, and a file that they write together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .errors import WSDValueError
from .files import only_writer, write_whole

T = TypeVar("T")

PATIENCE = 600.0
"""Most seconds for which a process waits until the others have read or merged their parts of a file."""


@dataclass(frozen=True)
class Rank:
    """One of the processes that share some work.

    >>> Rank(1, 3).share("abcdefg")
    'be'

    Attributes:
        number: of this process, counted from 0.
        of: number of processes.
    """

    number: int = 0
    of: int = 1

    @classmethod
    def from_environment(cls) -> Rank:
        """This process, by RANK and WORLD_SIZE, which torchrun and `accelerate launch` set; the only one without them.

        Raises:
            WSDValueError: one of the two is missing or no such number.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return ALONE
        number, world = _from_environment("RANK"), _from_environment("WORLD_SIZE")
        if number >= world:
            raise WSDValueError(f"RANK={number}: must be below WORLD_SIZE={world}, the number of processes that share the work")
        return cls(number, world)

    @property
    def alone(self) -> bool:
        """True for the only process."""
        return self.of == 1

    @property
    def first(self) -> bool:
        """True for the process that reports on the work of all."""
        return self.number == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every item belongs to one, by its number."""
        return items[self.number :: self.of]


ALONE = Rank()


def local_rank() -> int | None:
    """Number of this process among those of its machine, by LOCAL_RANK; None without a launcher.

    Raises:
        WSDValueError: it is no such number.
    """
    return _from_environment("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None


def _from_environment(name: str) -> int:
    value = os.environ.get(name)
    if value is None:
        raise WSDValueError(f"{name} is not set: a launcher such as torchrun sets RANK and WORLD_SIZE; unset the other one")
    if not re.fullmatch("[0-9]+", value):
        raise WSDValueError(f"{name}={value!r}: must be a whole number of at least 0, as a launcher such as torchrun sets it")
    return int(value)


class Parts:
    """A file that several processes write: each a part of its own, `NAME.rank-NUMBER.ENDING`, and the last one the whole file.

    Parts of an earlier run, with any number of processes, count too. In one process the file itself is written.

    Attributes:
        own: the file that this process writes.
        wrote: whether it has written anything.
    """

    def __init__(self, file: Path, rank: Rank) -> None:
        self._file, self._rank = file, rank
        self.own = file if rank.alone else self._beside(f"rank-{rank.number}")
        self.wrote = False

    def _beside(self, name: str) -> Path:
        return self._file.with_name(f"{self._file.stem}.{name}{self._file.suffix}")

    def existing(self) -> list[Path]:
        """The file and its parts, as far as they exist."""
        return [file for file in (self._file, *self._of_ranks()) if file.exists()]

    def _of_ranks(self) -> list[Path]:
        form = re.compile(rf"{re.escape(self._file.stem)}\.rank-([0-9]+){re.escape(self._file.suffix)}")
        found = {match: file for file in self._file.parent.iterdir() if (match := form.fullmatch(file.name))}
        return [found[match] for match in sorted(found, key=lambda match: int(match[1]))]

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Keeps the other processes from opening and merging parts meanwhile."""
        with nullcontext() if self._rank.alone else only_writer(self._beside("ranks"), PATIENCE):
            yield

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other runs away; that of the first process has the same lock as that of one process alone."""
        return only_writer(self._lock(self._rank.number))

    def _lock(self, number: int) -> Path:
        return self._beside(f"rank-{number}") if number else self._file

    def others_at_work(self) -> bool:
        """Whether another process of this run holds its lock; within `one_at_a_time`, since it tries the locks."""
        for number in range(self._rank.of):
            if number != self._rank.number:
                try:
                    with only_writer(self._lock(number)):
                        pass
                except WSDValueError:
                    return True
        return False

    def last(self, before: bool, now: bool) -> bool:
        """Whether this process ends the work of all, within `one_at_a_time`: the last that wrote, or the first if none did.

        Of processes that begin together it is one. A first process without work that begins after all others have ended takes
        theirs for an earlier run's, and is a second one.

        Args:
            before: whether the work was done when this process began.
            now: whether it is done.
        """
        if self._rank.alone:
            return True
        if self.wrote:  # its part is gone once another process has merged all
            return now and self.own.exists()
        return before and self._rank.first

    def merge(self, text: str) -> None:
        """Replaces the file and its parts, where there are any, by the whole."""
        if parts := self._of_ranks():
            write_whole(self._file, text)
            for part in parts:
                part.unlink()
