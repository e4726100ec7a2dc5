"""Ways of decoding that take turns, so that all of them meet the same machine; their times, forwards and memory."""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from wsd_hf.engine import cuda_graphs
from wsd_hf.engine.ragged_stream import RaggedStream


@dataclass
class Way:
    """One way of decoding in one setting.

    Attributes:
        run: decodes once.
        turns: number of timed runs.
        warm_up: number of runs before them; without, the first run is timed too.
        agreement: dialled before each run; None: any will do.
        hooked: the first run's forwards are counted by hooks, which keep a model from being captured, and make it compile anew.
        seconds: of each timed run.
        spent: seconds within forwards of base and pilot, of each timed run; only the fast path's are seen.
        bare: seconds of a run's CUDA graphs, replayed without anything between them.
        forwards: of base and pilot; 0 where nothing counts them.
        error: text of the error that ended it.
    """

    name: str
    run: Callable[[], Any]
    turns: int
    warm_up: int = 0
    agreement: float | None = None
    hooked: bool = True
    seconds: list[float] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)
    bare: float | None = None
    forwards: tuple[int, int] = (0, 0)
    peak_mib: float | None = None
    output: Any = None
    error: str | None = None


class Turns:
    """A base and a pilot on one device, and the time at which no further run is begun.

    Args:
        dial: called with a way's agreement before its runs, unless that is None.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        pilot: PreTrainedModel,
        dial: Callable[[float], None] = lambda agreement: None,
        deadline: float = float("inf"),
    ) -> None:
        self._models = {"base": base, "pilot": pilot}
        self._deadline = deadline
        self.cuda = base.device.type == "cuda"
        self._dial = dial

    @torch.no_grad()
    def take(self, ways: list[Way]) -> Iterator[None]:
        """Runs all ways, one after the other, as often as each is to be run; an error ends its own way only.

        Yields after each run, for results to be saved.
        """
        for way in ways:
            self._guarded(way, self._first)
            yield
        for turn in range(max(way.turns for way in ways)):
            for way in ways:
                if turn < way.turns and len(way.seconds) <= turn:
                    self._guarded(way, self._timed)
                    yield

    def replay(self, ways: list[Way]) -> None:
        """Measures the bare forwards of ways whose forwards are captured."""

        def measure(way: Way) -> None:
            way.bare = bare_seconds(way.run)

        for way in ways:
            self._guarded(way, measure)

    def _guarded(self, way: Way, run: Callable[[Way], None]) -> None:
        if way.error or (time.monotonic() > self._deadline and not way.seconds):
            way.error = way.error or "not run: no time left"
        elif time.monotonic() < self._deadline:
            try:
                if way.agreement is not None:
                    self._dial(way.agreement)
                run(way)
            except Exception as error:  # the other ways' results must not be lost
                way.error = f"{type(error).__name__}: {error}"

    def _first(self, way: Way) -> None:
        """A way's first run, in which its forwards are counted, and those that it warms up with."""
        before = reset_peak(self.cuda)
        counts, hooks = {"base": 0, "pilot": 0}, []
        if way.hooked:
            hooks = [model.register_forward_pre_hook(counter(counts, role)) for role, model in self._models.items()]
        try:
            self._timed(way)
        finally:
            for hook in hooks:
                hook.remove()
        highest = peak(self.cuda)
        way.peak_mib = None if highest is None else round(highest - before, 1)
        stats = getattr(way.output, "stats", None)
        way.forwards = (stats.base.forwards, stats.pilot.forwards) if stats else (counts["base"], counts["pilot"])
        if way.warm_up:
            way.seconds, way.spent = [], []
            for _ in range(way.warm_up - 1):
                way.run()

    def _timed(self, way: Way) -> None:
        with self._timed_forwards() as spans:
            self.synchronize()
            start = time.perf_counter()
            way.output = way.run()
            self.synchronize()
            way.seconds.append(time.perf_counter() - start)
        way.spent.append({role: sum(span() for span in times) for role, times in spans.items()})

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def _timed_forwards(self) -> Iterator[dict[str, list[Callable[[], float]]]]:
        """Time within each forward of the fast path; to be read when the device is done."""
        spans: dict[str, list[Callable[[], float]]] = {"base": [], "pilot": []}
        run = RaggedStream.run

        def timed(stream: RaggedStream, *args: Any, **kwargs: Any) -> Any:
            stop = clock(self.cuda)
            out = run(stream, *args, **kwargs)
            spans[self._role(stream)].append(stop())
            return out

        RaggedStream.run = timed  # type: ignore[method-assign]
        try:
            yield spans
        finally:
            RaggedStream.run = run  # type: ignore[method-assign]

    def _role(self, stream: RaggedStream) -> str:
        """By the weights, since a stream's model may be a copy that shares them."""
        return "base" if next(stream.model.parameters()) is next(self._models["base"].parameters()) else "pilot"


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the turns' ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratios(way: Way, other: Way) -> Spread | None:
    """Time of a way in times of another, turn by turn; the other's median stands in for turns that it didn't have."""
    if not way.seconds or not other.seconds:
        return None
    stand_in = [statistics.median(other.seconds)] * (len(way.seconds) - len(other.seconds))
    found = [own / theirs for own, theirs in zip(way.seconds, other.seconds + stand_in, strict=False)]
    return Spread(statistics.median(found), min(found), max(found))


def counter(counts: dict[str, int], name: str) -> Callable[..., None]:
    """Hook that counts."""

    def hook(*_: Any) -> None:
        counts[name] += 1

    return hook


def bare_seconds(run: Callable[[], Any]) -> float | None:
    """Time of the CUDA graphs of one run, replayed back to back, and of its forwards without one; None without any graph."""
    replays: list[Callable[[], None]] = []
    eager: list[Callable[[], float]] = []
    replay, forward = cuda_graphs._Replay.__call__, RaggedStream.run

    def kept(captured: Any, *inputs: torch.Tensor) -> Any:
        replays.append(captured.graph.replay)
        return replay(captured, *inputs)

    def timed(stream: RaggedStream, *args: Any, **kwargs: Any) -> Any:
        replayed, stop = len(replays), clock(cuda=True)
        out = forward(stream, *args, **kwargs)
        if len(replays) == replayed:
            eager.append(stop())
        return out

    cuda_graphs._Replay.__call__, RaggedStream.run = kept, timed  # type: ignore[method-assign]
    try:
        run()
    finally:
        cuda_graphs._Replay.__call__, RaggedStream.run = replay, forward  # type: ignore[method-assign]
    torch.cuda.synchronize()
    stop = clock(cuda=True)
    for again in replays:
        again()
    span = stop()
    torch.cuda.synchronize()
    return span() + sum(seconds() for seconds in eager) if replays else None


def clock(cuda: bool) -> Callable[[], Callable[[], float]]:
    """Starts a clock of the device; stopping it returns how to read the seconds."""

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    start = now()

    def stop() -> Callable[[], float]:
        end = now()
        return lambda: start.elapsed_time(end) / 1000 if cuda else end - start

    return stop


def reset_peak(cuda: bool) -> float:
    """Forgets the memory's peak; returns MiB in use."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak(cuda) or 0.0


def peak(cuda: bool) -> float | None:
    """MiB in use at most since the last reset; on a CPU, of the process, and None where the system does not tell."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def machine(device: str, threads: int) -> dict[str, str]:
    """Everything that a reader needs to run it again."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": f"{len(names)} x {names[0]}" if names else platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {threads} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
