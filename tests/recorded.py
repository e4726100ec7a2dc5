"""A stand-in for CUDA graphs that runs anywhere: it records the operations of a function, and repeats them on the same memory.

As with a graph, nothing but the operations is repeated: no Python, no shapes chosen anew, no value read by the host. What a
function that was captured once can't do again, shows in the results; asking for a value on the host raises, and so does drawing
random numbers, which a graph would share with other threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wsd_hf.engine.cuda_graphs import Graph

WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


class Recorder(TorchDispatchMode):
    """Keeps every operation, its arguments and what it wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        if torch.Tag.nondeterministic_seeded in func.tags and not name.startswith("_scaled_dot_product"):
            raise RuntimeError(f"{func} draws random numbers")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        """Runs every operation again, from what its arguments hold now to the memory that it wrote to."""
        for func, args, kwargs, out in self.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any) -> Graph:
    """As `wsd_hf.engine.cuda_graphs.capture`, for any device."""
    with Recorder() as recorder:
        outputs = function(*inputs)
    return Graph(recorder.repeat, outputs, pool or object(), memory=0)
