"""Rejection rule of speculative decoding: the base's sampled tokens, made from the pilot's proposals."""

from __future__ import annotations

import torch

from .cuda_graphs import DRAWING
from .sampling import draw


def keep_or_redraw(scores: torch.Tensor, proposals: torch.Tensor, drawn_with: torch.Tensor) -> torch.Tensor:
    """Tokens distributed as the base's own, many of them equal to the proposals.

    A proposal drawn from q is accepted with probability min(1, p/q), and replaced by a draw from the normalised positive part
    of p - q otherwise; the result is distributed as p (arXiv 2211.17192, algorithm 1 and appendix A.1).

    Args:
        scores: the base's processed scores, [..., vocabulary]; p is their softmax.
        proposals: LongTensor[...]; one outside of the vocabulary is always rejected.
        drawn_with: q, [..., vocabulary]; 0 throughout where nothing was proposed.

    Returns:
        LongTensor[...].

    >>> certain = torch.tensor([[0.0, 1.0]])
    >>> keep_or_redraw(certain.log(), torch.tensor([1]), certain).tolist()
    [1]
    """
    p, known = scores.softmax(dim=-1), (proposals < scores.shape[-1])[..., None]
    index = torch.where(known, proposals[..., None], 0)
    q_proposal = torch.where(known, drawn_with.gather(-1, index), 0.0)
    with DRAWING:
        threshold = torch.rand_like(q_proposal)
    kept = (threshold * q_proposal < p.gather(-1, index)) & (q_proposal > 0)
    rest = (p - drawn_with).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    return torch.where(kept.squeeze(-1), index.squeeze(-1), draw(rest))
