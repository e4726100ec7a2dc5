"""Work that a call has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from .._compat import input_device


@dataclass(frozen=True)
class Work:
    """Work of one model in one call.

    Attributes:
        forwards: how many it ran.
        tokens: token positions that it was fed, all rows; padding counts where rows run in step.
    """

    forwards: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """Work done in one call.

    Attributes:
        base: of the model that generates.
        pilot: of the small aligned model.
        reference: of the pilot as it was before its tuning; None without one.
        proposed: tokens that were proposed, in the base's vocabulary: by the pilot, n-grams or a rejected step.
        kept: those of them that the responses hold.
        cache_memory: most bytes that both KV caches have taken; None where transformers keeps them.
        peak_memory: most bytes that PyTorch had allocated on the models' CUDA devices since its peak statistics were reset;
            None without CUDA.
    """

    base: Work
    pilot: Work
    reference: Work | None = None
    proposed: int = 0
    kept: int = 0
    cache_memory: int | None = None
    peak_memory: int | None = None


class Counted(Protocol):
    """A model that counts its work."""

    forwards: int
    tokens: int


def work(model: Counted) -> Work:
    """The work that a model has done."""
    return Work(model.forwards, model.tokens)


def peak_memory(*models: PreTrainedModel) -> int | None:
    """Most bytes allocated on the CUDA devices of some models; None if they are elsewhere."""
    devices = {weight.device for model in models for weight in model.parameters()} | {*map(input_device, models)}
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"]
    return sum(peaks) if peaks else None
