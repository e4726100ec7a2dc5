"""Output of Weak-to-Strong Decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...engine.strategy import StrategyOutput
from ...speculation.rule import SwitchReason


@dataclass
class WSDOutput(StrategyOutput):
    """`StrategyOutput`, plus the draft and the switch of each row.

    Attributes:
        draft_length: response tokens that the pilot wrote, LongTensor[batch].
        switch_index: the paper's k, LongTensor[batch]: number of the drafted token, counted from 1, at which the base became
            confident, so that k = `draft_length`; -1 where it never did.
        draft_log_probs: the base's natural-log probabilities of the drafted tokens, float32 [batch, longest draft]; NaN
            after the end of a shorter draft.
        switch_reason: end of the pilot's part, per row: "confident" (the base took over), "draft_ended" (the pilot's EOS),
            "draft_limit" (`max_draft_tokens`, or the end of the pilot's context), "budget" (the response was full while the
            pilot was still writing), "stopped" (a stop string or other criterion was met inside the draft).

    `past_key_values` is None on the fast path, whose cache has another form than transformers'.
    """

    draft_length: torch.Tensor = None  # type: ignore[assignment]
    switch_index: torch.Tensor = None  # type: ignore[assignment]
    draft_log_probs: torch.Tensor = None  # type: ignore[assignment]
    switch_reason: list[SwitchReason] = None  # type: ignore[assignment]
