"""What nudging returns beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.stats import WSDStats


@dataclass
class NudgingGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput`, plus who wrote which token. It holds no scores, logits or cache.

    Attributes:
        written_by_pilot: which response tokens are the pilot's, BoolTensor[batch, response]; False behind a response's end.
        stats: forwards and tokens through each model.
        prompt_length: columns of `sequences` that are prompt.
    """

    written_by_pilot: torch.Tensor = None  # type: ignore[assignment]
    stats: WSDStats = None  # type: ignore[assignment]
    prompt_length: int = None  # type: ignore[assignment]
