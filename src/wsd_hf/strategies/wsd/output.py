"""What Weak-to-Strong Decoding returns beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.stats import WSDStats
from .config import WSDConfig
from .draft import SwitchReason


@dataclass
class WSDGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput`, plus how the response was shared between pilot and base.

    Attributes:
        switch_index: response tokens written by the pilot, LongTensor[batch].
        draft_log_probs: the base's natural-log probabilities of the drafted tokens, float32 [batch, longest draft]; NaN
            behind the end of a shorter draft.
        switch_reason: why the pilot stopped, per row: "confident" (the base took over), "draft_ended" (the pilot's EOS),
            "draft_limit" (`max_draft_tokens`, or the end of the pilot's context), "budget" (the response was full while the
            pilot was still writing), "stopped" (a stop string or other criterion was met inside the draft).
        stats: forwards and tokens through each model.
        wsd_config: the settings of the call.
        prompt_length: columns of `sequences` that are prompt.

    `past_key_values` is None on the fast path, whose cache has another form than transformers'.
    """

    # ModelOutput insists on a default of None; a call always sets them.
    switch_index: torch.Tensor = None  # type: ignore[assignment]
    draft_log_probs: torch.Tensor = None  # type: ignore[assignment]
    switch_reason: list[SwitchReason] = None  # type: ignore[assignment]
    stats: WSDStats = None  # type: ignore[assignment]
    wsd_config: WSDConfig = None  # type: ignore[assignment]
    prompt_length: int = None  # type: ignore[assignment]
