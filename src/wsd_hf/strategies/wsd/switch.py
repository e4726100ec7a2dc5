"""The rule that hands the response from the pilot to the base (paper, auto-switch; arXiv 2506.07434).

Everything is computed in float64 from logarithms, so that a window of tiny probabilities does not underflow into another
answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from ...engine.numbers import check_positive_integer, check_probability
from ...errors import WSDValueError


def confidence(log_probs: Sequence[float] | torch.Tensor, window_size: int = 6) -> torch.Tensor:
    """The base's confidence at each drafted token: the geometric mean of the last `window_size` probabilities.

    Args:
        log_probs: natural-log probabilities of the drafted tokens under the base, [..., tokens].
        window_size: w >= 1.

    Returns:
        float64 tensor of the same shape; NaN before the first full window.

    >>> confidence([0.0, 0.0, 0.0], window_size=2).tolist()
    [nan, 1.0, 1.0]
    """
    window_size = check_positive_integer("window_size", window_size)
    return _window_means(_as_tensor(log_probs), window_size).exp()


def switch_index(log_probs: Sequence[float] | torch.Tensor, threshold: float = 0.8, window_size: int = 6) -> int | None:
    """The switch index k of a draft: number of the first token whose confidence reaches `threshold`, counted from 1.

    Args:
        log_probs: natural-log probabilities of the drafted tokens under the base, one dimension.
        threshold: γ in (0, 1]; equality crosses.
        window_size: w >= 1; windows cover drafted tokens only, so none is full before token w.

    Returns:
        k, which is also the length of the draft that is kept; None if the base never becomes confident (all of it is kept).

    Raises:
        WSDValueError: a threshold or window outside its range, or values that cannot be log-probabilities.

    >>> import math
    >>> switch_index([math.log(p) for p in (0.2, 0.9, 0.9, 0.9)], threshold=0.8, window_size=2)
    3
    >>> switch_index([-5.0, -5.0], window_size=1) is None
    True
    """
    threshold = check_probability("threshold", threshold)
    window_size = check_positive_integer("window_size", window_size)
    log_probs = _as_tensor(log_probs)
    if log_probs.ndim != 1:
        raise WSDValueError(f"log_probs has shape {tuple(log_probs.shape)}: must be one-dimensional")
    if not bool((log_probs <= 0).all()):
        bad = float(log_probs[~(log_probs <= 0)][0])
        raise WSDValueError(f"log_probs contains {bad}: natural-log probabilities are at most 0 (take the log first)")
    crossed = (_window_means(log_probs, window_size) >= math.log(threshold)).nonzero()
    return int(crossed[0]) + 1 if len(crossed) else None


class SwitchCriteria(StoppingCriteria):
    """The paper's switch as a `StoppingCriteria`: fires for the rows where the base has become confident.

    Stateless. Any other `StoppingCriteria` may take its place in `generate(..., switch_criteria=...)`; it is called after
    every drafted token.

    >>> SwitchCriteria(threshold=0.5, window_size=1)(torch.tensor([[7], [8]]), torch.tensor([[-0.1], [-3.0]])).tolist()
    [True, False]
    """

    def __init__(self, threshold: float = 0.8, window_size: int = 6) -> None:
        self.threshold = check_probability("threshold", threshold)
        self.window_size = check_positive_integer("window_size", window_size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Rows whose newest drafted token is the last of its draft.

        Args:
            input_ids: drafted tokens so far, newest last, [batch, drafted].
            scores: the base's log-probabilities of them, [batch, drafted]; NaN where a row drafted nothing.

        Returns:
            BoolTensor[batch].
        """
        if scores.shape[-1] < self.window_size:
            return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        return _window_means(scores[:, -self.window_size :].double(), self.window_size)[:, -1] >= math.log(self.threshold)


def _as_tensor(log_probs: Sequence[float] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(log_probs, dtype=torch.float64, device=getattr(log_probs, "device", "cpu"))


def _window_means(log_probs: torch.Tensor, window_size: int) -> torch.Tensor:
    """Mean over the window that ends at each position; NaN before the first full one.

    The switch compares these and not their exponentials, so that equality crosses exactly where the window is one token.
    """
    means = torch.full_like(log_probs, torch.nan)
    if log_probs.shape[-1] >= window_size:
        means[..., window_size - 1 :] = log_probs.unfold(-1, window_size, 1).mean(-1)
    return means
