"""CUDA graphs: forwards that cost one launch, and the buffers that they are bound to.

A step's forwards are small: launching their kernels one by one takes longer than running them. So the second forward of a
shape is captured, and later ones are replayed. A graph reads and writes fixed memory, so it belongs to one cache, and both are
kept for later calls of like shape.

Nothing is captured on trial: the first forward of a shape runs as usual and is watched. A model whose forward waits for the
device or draws random numbers runs without graphs from then on.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import _compat
from .cache import RaggedCache

logger = logging.get_logger(__name__)

STEP = 256
"""Slots of captured forwards and of kept caches are a multiple of this, so that few shapes serve many calls."""

WIDEST = 32
"""Most positions of a captured forward; wider ones keep the device busy by themselves."""

AHEAD = 2048
"""Most tokens after its prompt that a kept cache is made for; a longer response makes it grow, which drops its graphs."""

SHARE = 0.125
"""Largest share of a device's memory that buffers and graphs may take between calls."""

FOREIGN = ("accelerate.", "bitsandbytes.", "peft.", "torch._dynamo.")
"""Libraries whose layers and hooks may act differently in every forward."""

DRAWING = threading.Lock()
"""Held while random numbers are drawn, and while a capture begins."""

_CAPTURING = threading.Lock()
_STREAMS: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # the stream for captures, by the one for replays
_DROPPED: deque[torch.cuda.CUDAGraph] = deque()  # graphs to destroy
_REFUSED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # models that run without graphs


class Graph:
    """A captured function, and the memory that its replays write to.

    Attributes:
        replay: runs it again on the memory of its inputs.
        outputs: what it returned.
        pool: the memory pool of all else, for further graphs over the same cache.
        memory: bytes by which that pool has grown.
    """

    def __init__(self, replay: Callable[[], None], outputs: Any, pool: Any, memory: int) -> None:
        self.replay, self.outputs, self.pool, self.memory = replay, outputs, pool, memory


def capture(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any) -> Graph:
    """Captures a function that has run on its CUDA device before, on the memory of its inputs.

    It must draw no random numbers. After a failure, which raises, streams and random numbers are as they were.

    Args:
        function: takes the inputs, and returns tensors that `_copied` knows.
        inputs: tensors that keep their memory.
        pool: `Graph.pool` of an earlier capture, or None.
    """
    device = inputs[0].device
    pool = pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    try:
        with _CAPTURING, torch.cuda.device(device), _no_garbage_collection(), _capture_stream():
            held = torch.cuda.memory_reserved()
            try:
                _begin(graph, device, pool)
                outputs = function(*inputs)
                graph.capture_end()
            except BaseException:
                _compat.abandon_capture(graph, device, pool)
                _DROPPED.append(graph)
                raise
            grown = max(0, torch.cuda.memory_reserved() - held)
    finally:
        _destroy_dropped()
    captured = Graph(graph.replay, outputs, pool, grown)
    weakref.finalize(captured, _drop, graph).atexit = False
    return captured


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Objects that are freed during a capture might be graphs, whose end breaks it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _capture_stream() -> Iterator[None]:
    """The one stream for captures of graphs that are replayed on the current stream, one after the other."""
    current = torch.cuda.current_stream()
    if current not in _STREAMS:
        _STREAMS[current] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side = _STREAMS[current]
    side.wait_stream(current)
    with torch.cuda.stream(side), _compat.workspaces_of_their_own():
        yield
    current.wait_stream(side)


def _begin(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Begins a capture, with which torch 2.11 reserves the default generator; a spare one serves for that.

    Otherwise other threads could neither draw nor replay during captures, and nobody could draw after one that failed. Of draws
    in the very moment of the beginning, only those that hold `DRAWING` are safe.
    """
    default = torch.cuda.default_generators[device.index]
    with DRAWING:
        state = default.graphsafe_get_state()
        default.graphsafe_set_state(torch.Generator(device))
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        finally:
            default.graphsafe_set_state(state)


def _drop(graph: torch.cuda.CUDAGraph) -> None:
    _DROPPED.append(graph)
    _destroy_dropped()


def _destroy_dropped() -> None:
    """Destroys graphs that nothing refers to, unless a capture runs: that would fail, and calls this at its end."""
    while _DROPPED and _CAPTURING.acquire(blocking=False):
        try:
            while _DROPPED:
                _DROPPED.pop().reset()
        finally:
            _CAPTURING.release()


class _Replay:
    """A captured function of any tensors: they are copied to the graph's inputs, and its outputs from the graph's."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self.graph = capture(function, self._inputs, pool)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for fixed, tensor in zip(self._inputs, inputs, strict=True):
            fixed.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return _copied(self.graph.outputs)


def _copied(outputs: Any) -> Any:
    """A copy of a tensor, or of a tuple of tensors and None."""
    if isinstance(outputs, tuple):
        return tuple(None if output is None else output.clone() for output in outputs)
    return outputs.clone()


class Workspace:
    """A cache, and the CUDA graphs of forwards over it; with `captures`, the second forward of each shape is captured.

    Attributes:
        refusal: reason against capturing this model's forwards, once one was found.
    """

    def __init__(self, cache: RaggedCache, captures: bool = False) -> None:
        self.cache = cache
        self.captures = captures
        self.refusal: str | None = None
        self._replays: dict[tuple[Any, ...], _Replay | None] = {}

    @property
    def memory(self) -> int:
        """Size of buffers and graphs, in bytes."""
        return self.cache.memory + sum(replay.graph.memory for replay in self._replays.values() if replay)

    def padded(self, tokens: int) -> int:
        """Number of positions of a block with `tokens` tokens in its fullest row; a power of two, to capture few shapes."""
        return 2 ** (tokens - 1).bit_length() if self.captures and 1 < tokens <= WIDEST else tokens

    def width(self, slots: int) -> int:
        """Number of slots that a forward attends to if `slots` of them are taken."""
        return _rounded(slots) if self.captures else slots

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens of a row; the buffers keep their content."""
        if self.cache.grow(self.width(1 + capacity)):
            self._replays = {}  # they read and write the old buffers

    def run(self, key: tuple[Any, ...], function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """`function(*inputs)`, captured or replayed; `key` and the inputs' shapes identify the function.

        It returns a tensor, or a tuple of tensors and None. Other memory that it reads must stay where it is.
        """
        if not self.captures or self.refusal or inputs[0].shape[1] > WIDEST:
            return function(*inputs)
        key = (*key, *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._replays:
            with _compat.Watch() as watch:
                outputs = function(*inputs)
            self._replays[key] = None
            self.refusal = watch.found and f"{watch.found} can't be captured"
            return outputs
        replay = self._replays[key] = self._replays[key] or self._capture(function, inputs)
        return function(*inputs) if replay is None else replay(*inputs)

    def _capture(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> _Replay | None:
        pool = next((replay.graph.pool for replay in self._replays.values() if replay), None)
        try:
            return _Replay(function, inputs, pool)
        except RuntimeError as error:  # run eagerly, a faulty forward raises its own error
            self.refusal = f"capture failed: {error}"
            return None


@contextmanager
def workspace(model: PreTrainedModel, rows: int, prompt: int, room: int, capturing: bool) -> Iterator[Workspace]:
    """Buffers for one call; with CUDA graphs (`capturing`, if the model allows) they are kept for later ones if it succeeds.

    `prompt` is the length of the longest one, `room` the number of tokens that a row is expected to hold after it, at most.
    """
    if not capturing or model in _REFUSED or not capturable(model):
        yield Workspace(RaggedCache(model.config, prompt + room))
        return
    capacity = _rounded(1 + prompt + min(room, AHEAD)) - 1
    shape = Shape(rows, capacity, _fingerprint(model), _current_stream(model.device), torch.is_inference_mode_enabled())
    taken = _SHELF.take(model, shape) or Workspace(RaggedCache(model.config), captures=True)
    taken.reserve(capacity)
    try:
        yield taken
    finally:
        if taken.refusal:
            _REFUSED.add(model)
            logger.warning_once(f"{type(model).__name__} runs without CUDA graphs: {taken.refusal}")
    if not taken.refusal:
        _SHELF.put(model, shape, taken)


def capturable(model: PreTrainedModel) -> bool:
    """True if a model's forward is always the same kernels over the same weights."""
    return (
        model.device.type == "cuda"
        and not model.training
        and not torch.is_autocast_enabled()
        and not getattr(model, "is_quantized", False)
        and all(weight.device == model.device for weight in model.parameters())
        and not any(_interferes(module) for module in model.modules())
    )


def _interferes(module: torch.nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return bool(hooked) or _compat.compiled(module) or type(module).__module__.startswith(FOREIGN)


def _fingerprint(model: PreTrainedModel) -> int:
    """Changes if the weights move, since captured forwards would read their old memory."""
    tensors = (*model.parameters(), *model.buffers())
    return hash(tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))


def _rounded(slots: int) -> int:
    return -(-slots // STEP) * STEP


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Shape(NamedTuple):
    """Calls of one shape can use a workspace one after the other."""

    rows: int
    capacity: int
    """Tokens of a row."""
    weights: int
    """Fingerprint."""
    stream: torch.cuda.Stream | None
    """Stream on which the graphs are replayed."""
    inference_mode: bool
    """True for tensors that were made in it."""


class _Kept(NamedTuple):
    model: weakref.ref[PreTrainedModel]
    shape: Shape
    workspace: Workspace


class _Shelf:
    """Workspaces that no call uses now; the oldest are dropped first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage may be collected, and `_forget` be called, wherever it is held
        self._kept: list[_Kept] = []

    def take(self, model: PreTrainedModel, shape: Shape) -> Workspace | None:
        """Newest workspace for this model and shape; it leaves the shelf."""
        with self._lock:
            usable = [kept for kept in self._kept if kept.model() is model and kept.shape == shape]
            if not usable:
                return None
            self._kept.remove(usable[-1])
            return usable[-1].workspace

    def put(self, model: PreTrainedModel, shape: Shape, workspace: Workspace) -> None:
        """Keeps a workspace, within `SHARE` of the device's memory."""
        with self._lock:
            # Workspaces of a model whose weights have moved are useless.
            self._kept = [kept for kept in self._kept if kept.model() is not model or kept.shape.weights == shape.weights]
            self._kept.append(_Kept(weakref.ref(model, self._forget), shape, workspace))
            while sum(kept.workspace.memory for kept in self._kept) > SHARE * _device_memory(model.device):
                self._kept.pop(0)

    def _forget(self, model: weakref.ref[PreTrainedModel]) -> None:
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.model is not model]


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


_SHELF = _Shelf()
