"""CUDA graphs: forwards of a model that cost one launch, and the buffers that they are bound to.

A step's forwards are small, and launching their kernels one by one takes longer than running them. So the second time that
a forward of some shape is asked for, it is captured, and from then on replayed. A graph reads and writes fixed memory: it
lives and dies with one cache, and both are kept for later calls of like shape.
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
"""Captured forwards look at a multiple of so many slots, and pooled caches hold one: few shapes serve many calls."""

WIDEST = 32
"""Most positions of a forward that is worth capturing; wider ones keep the device busy by themselves."""

AHEAD = 2048
"""Most tokens beyond its prompt that a pooled cache is made for: growing loses what was captured, so few calls should."""

SHARE = 0.125
"""Most of a device's memory that buffers and graphs may hold on to between calls."""

FOREIGN = ("accelerate.", "bitsandbytes.", "peft.", "torch._dynamo.")
"""Libraries whose layers and hooks decide anew in every forward."""


class Eager:
    """Runs forwards as they come."""

    memory = 0

    def run(self, key: tuple[Any, ...], function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """What the function makes of the inputs."""
        return function(*inputs)


class Graphs:
    """Captures a forward the second time that it is asked for, and replays it from then on.

    Attributes:
        memory: bytes that the graphs hold on to.
    """

    def __init__(self) -> None:
        self.memory = 0
        self._replays: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self._pool: Any = None
        self._refused = False

    def run(self, key: tuple[Any, ...], function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """What the function makes of the inputs.

        Args:
            key: says, together with the inputs' shapes, which function it is.
            function: of tensors to tensors, a tuple of them or None; what it reads beside its inputs stays where it is.
            inputs: on one device.
        """
        key = (*key, *(tuple(tensor.shape) for tensor in inputs))
        if key in self._replays and self._replays[key] is None and inputs[0].shape[1] <= WIDEST and not self._refused:
            self._replays[key] = self._capture(function, inputs)
        replay = self._replays.setdefault(key, None)
        return function(*inputs) if replay is None else replay(*inputs)

    def _capture(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Callable[..., Any] | None:
        held = _reserved(inputs[0].device)
        try:
            replay, self._pool = capture(function, inputs, self._pool)
        except RuntimeError as error:  # whatever a forward may do that can't be captured; run eagerly, it shows its own errors
            logger.warning_once(f"Weak-to-Strong Decoding runs without CUDA graphs, since capture failed: {error}")
            self._refused = True
            return None
        self.memory += max(0, _reserved(inputs[0].device) - held)
        return replay


_CAPTURING = threading.Lock()


def capture(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any = None) -> tuple[Callable[..., Any], Any]:
    """Captures what a function does on a CUDA device; returns how to replay it on other inputs, and the memory pool.

    The function has run before, so that whatever happens once has happened.
    """
    static = [tensor.clone() for tensor in inputs]
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # torch's own context would leave its stream current after a failure, and shares one stream between devices.
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
    """A cache, and how forwards over it are run.

    Args:
        cache: its buffers.
        graphs: runs and, on CUDA, captures.
    """

    def __init__(self, cache: RaggedCache, graphs: Eager | Graphs) -> None:
        self.cache = cache
        self.graphs = graphs

    @property
    def captures(self) -> bool:
        """Whether shapes should stay the same, because forwards are captured."""
        return isinstance(self.graphs, Graphs)

    @property
    def memory(self) -> int:
        """Bytes of buffers and graphs."""
        return self.cache.memory + self.graphs.memory

    def padded(self, tokens: int) -> int:
        """How many positions a block has, of which so many are taken in its fullest row: few numbers, to capture few shapes."""
        return 2 ** (tokens - 1).bit_length() if self.captures and 1 < tokens <= WIDEST else tokens

    def reserve(self, capacity: int) -> None:
        """Makes room for so many tokens of a row; nothing that the buffers hold is lost."""
        if self.cache.grow(self.width(1 + capacity)) and self.captures:
            self.graphs = Graphs()  # those captured before read and write the old buffers

    def width(self, slots: int) -> int:
        """How many slots a forward looks at, of which so many are taken."""
        return _rounded(slots) if self.captures else slots


@contextmanager
def workspace(model: PreTrainedModel, rows: int, prompt: int, room: int, capturing: bool) -> Iterator[Workspace]:
    """Buffers for one call; one of an earlier call where shapes are captured, to which it returns unless the call fails.

    Args:
        model: whose keys and values it is for.
        rows: of the batch.
        prompt: tokens of the longest prompt.
        room: most tokens that a row will hold beyond it, as far as that is known.
        capturing: whether to capture CUDA graphs where the model allows it.
    """
    if not (capturing and capturable(model)):
        yield Workspace(RaggedCache(model.config, prompt + room), Eager())
        return
    capacity = _rounded(1 + prompt + min(room, AHEAD)) - 1
    shape = (rows, capacity, _fingerprint(model), torch.is_inference_mode_enabled())
    taken = _SHELF.take(model, shape) or Workspace(RaggedCache(model.config), Graphs())
    taken.reserve(capacity)
    yield taken
    _SHELF.put(model, shape, taken)


def capturable(model: PreTrainedModel) -> bool:
    """Whether a model's forward is always the same kernels over the same weights."""
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
    """Another one once the weights lie elsewhere, and a captured forward would read what is no longer theirs."""
    tensors = (*model.parameters(), *model.buffers())
    return hash(tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))


def _rounded(slots: int) -> int:
    return -(-slots // STEP) * STEP


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # as capture does
    return torch.cuda.memory_reserved(device)


Shape = tuple[int, int, int, bool]
"""Rows, capacity, where the weights are, and whether tensors are made in inference mode."""


class _Shelf:
    """Workspaces that no call uses now; the oldest make room for the newest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[weakref.ref[PreTrainedModel], Shape, Workspace]] = []

    def take(self, model: PreTrainedModel, shape: Shape) -> Workspace | None:
        """One for this model and shape, newest first."""
        with self._lock:
            for place in reversed(range(len(self._kept))):
                if self._kept[place][0]() is model and self._kept[place][1] == shape:
                    return self._kept.pop(place)[2]
        return None

    def put(self, model: PreTrainedModel, shape: Shape, workspace: Workspace) -> None:
        """Keeps one, within the memory that may be held on to."""
        with self._lock:
            # A model whose weights have moved can use its old ones no more.
            self._kept = [kept for kept in self._kept if kept[0]() is not model or kept[1][2] == shape[2]]
            self._kept.append((weakref.ref(model, self._forget), shape, workspace))
            while sum(kept[2].memory for kept in self._kept) > SHARE * _device_memory(model.device):
                self._kept.pop(0)

    def _forget(self, model: weakref.ref[PreTrainedModel]) -> None:
        self._kept = [kept for kept in self._kept if kept[0] is not model]


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


_SHELF = _Shelf()
