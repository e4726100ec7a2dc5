"""How a token is chosen from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .checks import not_finite

SAMPLING_WARPERS = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
"""They look at the scores of one position, and at no token before it."""


def split(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """All processors in their order: up to the last that is no sampling warper, and the warpers after it.

    Warpers look at one position's scores only, and what they leave out is unlikely, not forbidden. Renormalizing forbids
    nothing either.
    """
    warpers = (*SAMPLING_WARPERS, LogitNormalization)
    others = [place for place, processor in enumerate(processors) if type(processor) not in warpers]
    end = 1 + max(others, default=-1)
    return LogitsProcessorList(processors[:end]), LogitsProcessorList(processors[end:])


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """One token of each distribution, [..., vocabulary] -> LongTensor[...]; -1 where it is NaN, and `torch.multinomial` raises.

    A race of exponential clocks, as in `torch.multinomial`, whose check of its input waits for the device.

    >>> draw(torch.tensor([[0.0, 1.0]])).tolist()
    [1]
    """
    drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)
    return torch.where(probabilities[..., 0] >= 0, drawn, -1)  # softmax makes NaN of all probabilities or of none


def choose(logits: torch.Tensor, warpers: LogitsProcessorList | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The pilot's choice: greedy without warpers, else drawn from the warped distribution.

    Args:
        logits: [batch, vocabulary].
        warpers: of the call, all among `SAMPLING_WARPERS`.

    Returns:
        The tokens, LongTensor[batch]; where none can be chosen, BoolTensor[batch]; and the distribution, [batch, vocabulary],
        None without warpers.
    """
    if warpers is None:
        return logits.argmax(dim=-1), not_finite(logits), None
    probabilities = warpers(None, logits).softmax(dim=-1)
    drawn = draw(probabilities)
    return drawn.clamp(min=0), not_finite(logits) | (drawn < 0), probabilities


def force(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The scores with `tokens` as their rows' only choice; rows that are `FREE` keep theirs.

    Args:
        scores: [batch, vocabulary]; not changed.
        tokens: LongTensor[batch].
    """
    only = torch.full_like(scores, -torch.inf).scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
    return torch.where((tokens != FREE)[:, None], only, scores)


FREE = -1
"""In a tensor of forced tokens: this row chooses for itself."""


def choice(warpers: LogitsProcessorList | None) -> tuple[str, Callable[[torch.Tensor], Any]]:
    """What `RaggedStream.run` takes for the pilot to choose a token, and the function's name.

    Args:
        warpers: shape its choice; None: it is greedy.

    Returns:
        A function of logits [rows, 1, V] to the tokens, LongTensor[rows], to where the logits are no numbers, BoolTensor[rows],
        and to what the tokens were drawn with, [rows, V] or None.
    """
    settings = None if warpers is None else [(type(warper).__name__, vars(warper)) for warper in warpers]

    def choose_one(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return choose(logits[:, 0], warpers)

    return f"choice {settings}", choose_one
