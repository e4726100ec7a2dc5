"""Texts as the base reads them: the pilot's drafts, and the base's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One greedy text, and the base's opinion of each of its tokens.

    Attributes:
        prompt: number of the prompt, counted from 0.
        writer: the pilot of a draft, or the base of its own answer.
        tokens: of the text, in the base's vocabulary.
        texts: part of the text that each token adds.
        log_probs: of each token, from a float32 softmax of the base's raw logits.
        best_log_probs: of the base's first choice in each place.
        entropies: of the base's distribution in each place, in nats.
        base_prompt: token ids that the base read before the text.
        ended: whether the writer ended the text by itself, before the limit.
        forwards: of the writer while it wrote.
        seconds: that these took; of a batch, its time divided by its rows.
    """

    prompt: int
    writer: Literal["pilot", "base"]
    tokens: list[int]
    texts: list[str]
    log_probs: list[float]
    best_log_probs: list[float]
    entropies: list[float]
    base_prompt: list[int]
    ended: bool
    forwards: int
    seconds: float
