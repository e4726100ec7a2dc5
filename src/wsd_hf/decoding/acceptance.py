"""Which proposals a free row keeps: those that the base would have written itself."""

from __future__ import annotations

import torch


def judge(scores: torch.Tensor, proposals: torch.Tensor, proposed: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """The token that the base writes at each position; it is the proposal where that is kept.

    Greedy: the argmax. Sampling: the rejection rule of speculative decoding (arXiv 2211.17192, algorithm 1), which leaves
    the base's distribution p as it is: the proposal, drawn from q, is kept with probability min(1, p/q), and replaced by a
    draw from the normalised positive part of p - q otherwise.

    Args:
        scores: the base's processed scores, [positions, vocabulary].
        proposals: LongTensor[positions].
        proposed: q, the probabilities that the proposals were drawn with, [positions, vocabulary]; zero throughout where
            nothing was proposed. Not read when greedy.
        do_sample: whether the base samples.

    Returns:
        LongTensor[positions].

    >>> judge(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.zeros(1, 2), do_sample=False).tolist()
    [1]
    """
    if not do_sample:
        return scores.argmax(dim=-1)
    p, index = scores.softmax(dim=-1), proposals[:, None]
    q_proposal = proposed.gather(1, index)
    kept = (torch.rand_like(q_proposal) * q_proposal < p.gather(1, index)) & (q_proposal > 0)
    residual = (p - proposed).clamp(min=0)
    residual = torch.where(residual.sum(dim=1, keepdim=True) > 0, residual, p)
    return torch.where(kept, index, torch.multinomial(residual, num_samples=1)).squeeze(1)
