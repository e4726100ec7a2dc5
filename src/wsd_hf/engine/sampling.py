"""Choice of tokens from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import LogitsProcessorList

from .checks import not_finite, vocabulary_size
from .cuda_graphs import DRAWING

if TYPE_CHECKING:
    from .stream import Stream

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

WAITING = (transformers.TopHLogitsWarper, transformers.EtaLogitsWarper)
"""Those of them that read values on the host, so that they can't be captured."""

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


def exponential_noise(*shape: int, device: torch.device) -> torch.Tensor:
    """Random numbers for `draw`, float32; drawn outside of CUDA graphs, which take them as an input."""
    with DRAWING:
        return torch.empty(*shape, dtype=torch.float32, device=device).exponential_()


def draw(probabilities: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """One token of each distribution, [..., vocabulary] -> LongTensor[...]; -1 where it is NaN.

    Exponential clocks race as in `torch.multinomial`, whose check of its input would wait for the device.

    Args:
        probabilities: float32.
        noise: of `exponential_noise`, with the shape of `probabilities`; drawn here if None.

    >>> draw(torch.tensor([[0.0, 1.0]])).tolist()
    [1]
    """
    if noise is None:
        noise = exponential_noise(*probabilities.shape, device=probabilities.device)
    drawn = (probabilities / noise).argmax(dim=-1)
    return torch.where(probabilities[..., 0] >= 0, drawn, -1)  # softmax makes NaN of all probabilities or of none


Choice = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Tokens, LongTensor[batch]; a mask of rows that allow no choice, BoolTensor[batch]; and the distribution that tokens were
drawn from, [batch, vocabulary], None if none was."""


def choose(logits: torch.Tensor, warpers: LogitsProcessorList | None, noise: torch.Tensor | None = None) -> Choice:
    """The pilot's choice from logits, [batch, vocabulary]: greedy without warpers, else drawn from the warped distribution."""
    if warpers is None:
        return logits.argmax(dim=-1), not_finite(logits), None
    probabilities = warpers(None, logits).softmax(dim=-1)
    drawn = draw(probabilities, noise)
    return drawn.clamp(min=0), not_finite(logits) | (drawn < 0), probabilities


def choice(warpers: LogitsProcessorList | None, with_logits: bool = False) -> Callable[[Stream, Any], Any]:
    """`choose` after a block of a stream, and the logits if they are to be returned too, else None.

    It is captured together with the forward if CUDA graphs are on.
    """

    def chosen(logits: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        return *choose(logits[:, 0], warpers, noise), logits[:, 0] if with_logits else None

    if warpers is None:
        return lambda stream, block: stream.run(f"argmax {with_logits}", chosen, block, 1)
    if any(isinstance(warper, WAITING) for warper in warpers):
        return lambda stream, block: chosen(stream.logits(block, 1))
    name = f"sample {with_logits} {[(type(warper).__name__, vars(warper)) for warper in warpers]}"

    def sample(stream: Stream, block: Any) -> Any:
        noise = exponential_noise(len(block.tokens), vocabulary_size(stream.model), device=stream.device)
        return stream.run(name, chosen, block, 1, noise)

    return sample


def force(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A copy of the scores, [batch, vocabulary], that leaves each row its token, LongTensor[batch]; `FREE` rows keep theirs."""
    only = torch.full_like(scores, -torch.inf).scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
    return torch.where((tokens != FREE)[:, None], only, scores)
