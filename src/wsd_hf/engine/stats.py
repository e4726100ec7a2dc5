"""Work that a call has done, and the outputs that count it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from .._compat import input_device
from .ragged_stream import Stream


@dataclass(frozen=True)
class WSDStats:
    """Work done in one call.

    Attributes:
        base_forwards: forwards of the base.
        base_tokens: token positions fed to the base, all rows; step by step padding counts too.
        pilot_forwards: forwards of the pilot.
        pilot_tokens: token positions fed to the pilot, likewise.
        cache_memory: most bytes that both KV caches have taken; None step by step, where transformers keeps them.
        peak_memory: most bytes that PyTorch had allocated on the models' CUDA devices since the caller last reset its peak
            statistics; None without CUDA.
    """

    base_forwards: int
    base_tokens: int
    pilot_forwards: int
    pilot_tokens: int
    cache_memory: int | None
    peak_memory: int | None


@dataclass(frozen=True)
class GuidedStats(WSDStats):
    """Work done in one call that two small models guide: the tuned one is counted as the pilot.

    Attributes:
        reference_forwards: forwards of the untuned one.
        reference_tokens: token positions fed to it.
    """

    reference_forwards: int
    reference_tokens: int


def peak_memory(*models: PreTrainedModel) -> int | None:
    """Most bytes allocated on the CUDA devices of some models; None if they are elsewhere."""
    devices = {weight.device for model in models for weight in model.parameters()} | {*map(input_device, models)}
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"]
    return sum(peaks) if peaks else None


@dataclass
class GuidedGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput`, plus the work done.

    Attributes:
        stats: forwards and tokens through each model.
        prompt_length: columns of `sequences` that are prompt.
    """

    stats: GuidedStats = None  # type: ignore[assignment]
    prompt_length: int = None  # type: ignore[assignment]


def work_of(base: Stream, pilot: Stream) -> WSDStats:
    """The work that two streams have done."""
    return WSDStats(
        base.forwards,
        base.tokens,
        pilot.forwards,
        pilot.tokens,
        cache_memory=base.workspace.cache.memory + pilot.workspace.cache.memory,
        peak_memory=peak_memory(base.model, pilot.model),
    )
