"""Choice of tokens from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList

from .checks import not_finite

SAMPLING_WARPERS = (
    transformers.TemperatureLogitsWarper,
    transformers.TopHLogitsWarper,
    transformers.TopKLogitsWarper,
    transformers.TopPLogitsWarper,
    transformers.MinPLogitsWarper,
    transformers.TypicalLogitsWarper,
    transformers.EpsilonLogitsWarper,
    transformers.EtaLogitsWarper,
)
"""Warpers that use one position's scores only, and none of its tokens."""

FREE = -1
"""Entry of a tensor of forced tokens: this row chooses for itself."""


def split(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """All processors in their order: up to the last that is no sampling warper, and the warpers after it.

    A token that warpers exclude is unlikely, one that other processors exclude is forbidden. Renormalizing counts as a warper:
    it forbids nothing.
    """
    warpers = (*SAMPLING_WARPERS, transformers.LogitNormalization)
    others = [place for place, processor in enumerate(processors) if type(processor) not in warpers]
    end = 1 + max(others, default=-1)
    return LogitsProcessorList(processors[:end]), LogitsProcessorList(processors[end:])


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """One token of each distribution, [..., vocabulary] -> LongTensor[...]; -1 where it is NaN.

    Exponential clocks race as in `torch.multinomial`, whose check of its input would wait for the device.

    >>> draw(torch.tensor([[0.0, 1.0]])).tolist()
    [1]
    """
    drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)
    return torch.where(probabilities[..., 0] >= 0, drawn, -1)  # softmax makes NaN of all probabilities or of none


def choose(logits: torch.Tensor, warpers: LogitsProcessorList | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The pilot's choice from logits, [batch, vocabulary]: greedy without warpers, else drawn from the warped distribution.

    Returns:
        The tokens, LongTensor[batch]; a mask of rows that allow no choice, BoolTensor[batch]; and the distribution,
        [batch, vocabulary], None without warpers.
    """
    if warpers is None:
        return logits.argmax(dim=-1), not_finite(logits), None
    probabilities = warpers(None, logits).softmax(dim=-1)
    drawn = draw(probabilities)
    return drawn.clamp(min=0), not_finite(logits) | (drawn < 0), probabilities


def choice(warpers: LogitsProcessorList | None) -> tuple[str, Callable[[torch.Tensor], Any]]:
    """Name and function for `RaggedStream.run`: `choose` for logits [rows, 1, vocabulary]."""
    settings = None if warpers is None else [(type(warper).__name__, vars(warper)) for warper in warpers]
    return f"choice {settings}", lambda logits: choose(logits[:, 0], warpers)


def force(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A copy of the scores, [batch, vocabulary], that leaves each row its token, LongTensor[batch]; `FREE` rows keep theirs."""
    only = torch.full_like(scores, -torch.inf).scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
    return torch.where((tokens != FREE)[:, None], only, scores)
