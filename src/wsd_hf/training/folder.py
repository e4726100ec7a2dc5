"""Names of what a training leaves in its folder."""

from __future__ import annotations

PILOT = "pilot"
"""Tuned weights, tokenizer and model card; it is there as soon as the training is done."""

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
HANDOVERS = "handovers.json"
LOSSES = "losses.json"
