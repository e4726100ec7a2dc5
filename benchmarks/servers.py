"""Discrete-event simulation of servers with continuous batching; time is in seconds."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

Wait = float | tuple["Job", int]
"""Seconds, or a job and the number of one of its tokens, counted from 1."""


@dataclass(frozen=True)
class Price:
    """Seconds of a forward: its own, those of each row that writes a token, and those of each prompt token that is read."""

    forward: float
    row: float
    prompt_token: float

    def seconds(self, rows: int, prompt_tokens: int) -> float:
        """Time of one forward."""
        return self.forward + self.row * rows + self.prompt_token * prompt_tokens

    def times(self, factor: float) -> Price:
        """Every part times a factor."""
        return Price(factor * self.forward, factor * self.row, factor * self.prompt_token)


class Clock:
    """The time, and the events to come."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls later; events of the same time keep their order."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), call))

    def follow(self, process: Iterator[Wait]) -> None:
        """Runs a process up to its next wait, and goes on after it."""
        wait = next(process, None)
        go_on = partial(self.follow, process)
        if isinstance(wait, float):
            self.after(wait, go_on)
        elif wait is not None:
            job, token = wait
            job.server.when(job, token, go_on)

    def run(self) -> None:
        """Lets time pass until no event is left."""
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


@dataclass(eq=False)
class Job:
    """One request to a server: prompt tokens to read, then tokens to write.

    Attributes:
        unread: prompt tokens that are still to be read.
        came: time of its arrival.
        first_step: number of the server's step that wrote the first token; None before.
        waits: tokens, and calls for them, of a job that has written none.
        open: neither ended nor cancelled.
    """

    server: Server
    unread: int
    tokens: int
    came: float
    first_step: int | None = None
    waits: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    open: bool = True


class Server:
    """Continuous batching: a step writes one token in each running row, and reads prompts of waiting jobs, in order of arrival.

    Args:
        rows: most rows of a step.
        budget: most prompt tokens of a step; a longer prompt takes several.

    Attributes:
        requests: number of requests that are at this server, see `quietest`.
        steps: number of steps that have ended.
        busy: seconds in steps.
        row_seconds: sum over steps of their seconds, times the rows that wrote in them.
        waited: sum over jobs of the seconds between their arrival and the step that read the last of their prompt.
        read: number of prompt tokens read.
        written: number of tokens written.
    """

    def __init__(self, clock: Clock, price: Price, rows: int, budget: int) -> None:
        self._clock, self._price, self._rows, self._budget = clock, price, rows, budget
        self._queue: deque[Job] = deque()
        self._running = 0
        self._stepping = False
        self._calls: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.requests = self.steps = self.read = self.written = 0
        self.busy = self.row_seconds = self.waited = 0.0

    def submit(self, prompt: int, tokens: int) -> Job:
        """A job of so many prompt tokens and tokens to write."""
        job = Job(self, prompt, tokens, self._clock.now)
        self._queue.append(job)
        if not self._stepping:
            self._step()
        return job

    def close(self, job: Job) -> None:
        """Ends or cancels a job, and frees its row."""
        if job.open:
            job.open = False
            self._running -= job.first_step is not None
            if job in self._queue:
                self._queue.remove(job)

    def when(self, job: Job, token: int, call: Callable[[], None]) -> None:
        """Calls as soon as a job has written a token."""
        if job.first_step is None:
            job.waits.append((token, call))
        elif job.first_step + token - 1 <= self.steps:
            call()
        else:
            self._at(job.first_step + token - 1, call)

    def _at(self, step: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (step, next(self._numbers), call))

    def _step(self) -> None:
        """Begins a step, if there is work."""
        begun, room = self._admit()
        read = self._budget - room
        self._stepping = bool(self._running or read)
        if self._stepping:
            seconds = self._price.seconds(self._running, read)
            self.busy += seconds
            self.row_seconds += seconds * self._running
            self.read += read
            self._clock.after(seconds, partial(self._end_step, begun))

    def _admit(self) -> tuple[list[Job], int]:
        """Jobs whose prompts the next step reads to their ends, and what is left of its budget."""
        begun: list[Job] = []
        room = self._budget
        while self._queue and room and self._running + len(begun) < self._rows:
            job = self._queue[0]
            part = min(job.unread, room)
            job.unread -= part
            room -= part
            if not job.unread:
                self.waited += self._clock.now - job.came
                begun.append(self._queue.popleft())
        return begun, room

    def _end_step(self, begun: Sequence[Job]) -> None:
        self.steps += 1
        for job in begun:
            if job.open:
                job.first_step = self.steps
                self._running += 1
                for token, call in [*job.waits, (job.tokens, partial(self.close, job))]:
                    self._at(self.steps + token - 1, call)
        self.written += self._running
        while self._calls and self._calls[0][0] <= self.steps:
            heapq.heappop(self._calls)[2]()
        self._step()


@contextmanager
def quietest(servers: Sequence[Server]) -> Iterator[Server]:
    """The first of the servers with the fewest requests; it has one more for as long as the context lasts."""
    server = min(servers, key=lambda server: server.requests)
    server.requests += 1
    yield server
    server.requests -= 1
