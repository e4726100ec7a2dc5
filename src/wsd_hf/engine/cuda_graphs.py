"""CUDA graphs: forwards that cost one launch, and the buffers that they are bound to.

A step's forwards are small: launching their kernels one by one takes longer than running them. So the second forward of a
shape is captured, and later ones are replayed. A graph reads and writes fixed memory, so it belongs to one cache, and both are
kept for later calls of like shape.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

_CAPTURING = threading.Lock()


def capture(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any = None) -> tuple[Callable[..., Any], Any]:
    """Captures a function that has run on its CUDA device before; returns a function that replays it, and the memory pool."""
    static = [tensor.clone() for tensor in inputs]
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # torch.cuda.graph without a stream leaves its own current after a failure, and shares it between devices.
    with (
        _CAPTURING,
        torch.cuda.device(device),
        torch.cuda.stream(side),
        torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
    ):
        outputs = function(*static)

    def replay(*inputs: torch.Tensor) -> Any:
        for fixed, tensor in zip(static, inputs, strict=True):
            fixed.copy_(tensor, non_blocking=True)
        graph.replay()
        if isinstance(outputs, tuple):
            return tuple(None if output is None else output.clone() for output in outputs)
        return outputs.clone()

    return replay, graph.pool()


class Workspace:
    """A cache, and the CUDA graphs of forwards over it; with `captures`, the second forward of each shape is captured."""

    def __init__(self, cache: RaggedCache, captures: bool = False) -> None:
        self.cache = cache
        self.captures = captures
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._replays: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self._pool: Any = None
        self._graph_memory = 0
        self._refused = False

    @property
    def memory(self) -> int:
        """Size of buffers and graphs, in bytes."""
        return self.cache.memory + self._graph_memory

    def padded(self, tokens: int) -> int:
        """Number of positions of a block with `tokens` tokens in its fullest row; a power of two, to capture few shapes."""
        return 2 ** (tokens - 1).bit_length() if self.captures and 1 < tokens <= WIDEST else tokens

    def width(self, slots: int) -> int:
        """Number of slots that a forward attends to if `slots` of them are taken."""
        return _rounded(slots) if self.captures else slots

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens of a row; the buffers keep their content."""
        if self.cache.grow(self.width(1 + capacity)):
            self._forget_graphs()  # they read and write the old buffers

    def run(self, key: tuple[Any, ...], function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """`function(*inputs)`, captured or replayed; `key` and the inputs' shapes identify the function.

        It returns a tensor, or a tuple of tensors and None. Other memory that it reads must stay where it is.
        """
        if not self.captures:
            return function(*inputs)
        key = (*key, *(tuple(tensor.shape) for tensor in inputs))
        if key in self._replays and self._replays[key] is None and inputs[0].shape[1] <= WIDEST and not self._refused:
            self._replays[key] = self._capture(function, inputs)
        replay = self._replays.setdefault(key, None)
        return function(*inputs) if replay is None else replay(*inputs)

    def _capture(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Callable[..., Any] | None:
        held = _reserved(inputs[0].device)
        try:
            replay, self._pool = capture(function, inputs, self._pool)
        except RuntimeError as error:  # anything that can't be captured; run eagerly, a faulty forward raises its own error
            logger.warning_once(f"Weak-to-Strong Decoding runs without CUDA graphs, since capture failed: {error}")
            self._refused = True
            return None
        self._graph_memory += max(0, _reserved(inputs[0].device) - held)
        return replay


@contextmanager
def workspace(model: PreTrainedModel, rows: int, prompt: int, room: int, capturing: bool) -> Iterator[Workspace]:
    """Buffers for one call; with CUDA graphs (`capturing`, if the model allows) they are kept for later ones if it succeeds.

    `prompt` is the length of the longest one, `room` the number of tokens that a row is expected to hold after it, at most.
    """
    if not (capturing and capturable(model)):
        yield Workspace(RaggedCache(model.config, prompt + room))
        return
    capacity = _rounded(1 + prompt + min(room, AHEAD)) - 1
    shape = (rows, capacity, _fingerprint(model), torch.is_inference_mode_enabled())
    taken = _SHELF.take(model, shape) or Workspace(RaggedCache(model.config), captures=True)
    taken.reserve(capacity)
    yield taken
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


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # as capture does
    return torch.cuda.memory_reserved(device)


Shape = tuple[int, int, int, bool]  # rows, capacity, fingerprint of the weights, True for tensors made in inference mode


class _Shelf:
    """Workspaces that no call uses now; the oldest are dropped first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[weakref.ref[PreTrainedModel], Shape, Workspace]] = []

    def take(self, model: PreTrainedModel, shape: Shape) -> Workspace | None:
        """Newest workspace for this model and shape; it leaves the shelf."""
        with self._lock:
            for place in reversed(range(len(self._kept))):
                if self._kept[place][0]() is model and self._kept[place][1] == shape:
                    return self._kept.pop(place)[2]
        return None

    def put(self, model: PreTrainedModel, shape: Shape, workspace: Workspace) -> None:
        """Keeps a workspace, within `SHARE` of the device's memory."""
        with self._lock:
            # Workspaces of a model whose weights have moved are useless.
            self._kept = [kept for kept in self._kept if kept[0]() is not model or kept[1][2] == shape[2]]
            self._kept.append((weakref.ref(model, self._forget), shape, workspace))
            while sum(kept[2].memory for kept in self._kept) > SHARE * _device_memory(model.device):
                self._kept.pop(0)

    def _forget(self, model: weakref.ref[PreTrainedModel]) -> None:
        self._kept = [kept for kept in self._kept if kept[0] is not model]


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


_SHELF = _Shelf()
