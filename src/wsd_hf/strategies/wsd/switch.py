"""The paper's rule that hands the response from the pilot to the base (auto-switch; arXiv 2506.07434), as functions.

Everything is computed in float64 from logarithms, so that a window of tiny probabilities does not underflow into another
answer, and with exact sums, so that lists and tensors on any device give the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...engine.numbers import check_positive_integer, check_probability
from ...errors import WSDValueError


def confidence(log_probs: Sequence[float] | torch.Tensor, window_size: int = 6) -> torch.Tensor:
    """The base's confidence at each drafted token: the geometric mean of the last `window_size` probabilities.

    Args:
        log_probs: natural-log probabilities of the drafted tokens under the base, [..., tokens].
        window_size: w >= 1.

    Returns:
        float64 tensor of the same shape; NaN before the first full window, and where a window holds NaN.

    Raises:
        WSDValueError: a window outside its range, or values that cannot be log-probabilities.

    >>> confidence([0.0, 0.0, 0.0], window_size=2).tolist()
    [nan, 1.0, 1.0]
    """
    window_size = check_positive_integer("window_size", window_size)
    log_probs = _as_tensor(log_probs)
    _refuse(log_probs[log_probs > 0])
    rows = [_window_means(row, window_size) for row in log_probs[None].flatten(0, -2).tolist()]
    return torch.tensor(rows, dtype=torch.float64, device=log_probs.device).reshape(log_probs.shape).exp()


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
    _refuse(log_probs[~(log_probs <= 0)])
    means = _window_means(log_probs.tolist(), window_size)
    return next((place + 1 for place, mean in enumerate(means) if mean >= math.log(threshold)), None)


def _as_tensor(log_probs: Sequence[float] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(log_probs, dtype=torch.float64, device=getattr(log_probs, "device", "cpu"))


def _refuse(bad: torch.Tensor) -> None:
    if len(bad):
        raise WSDValueError(f"log_probs contains {float(bad[0])}: natural-log probabilities are at most 0 (take the log first)")


def _window_means(log_probs: list[float], window_size: int) -> list[float]:
    """Mean over the window that ends at each position; NaN before the first full one."""
    ends = range(1, 1 + len(log_probs))
    return [window_mean(log_probs[end - window_size : end]) if end >= window_size else math.nan for end in ends]


def window_mean(window: Sequence[float]) -> float:
    """The mean that the switch compares, not its exponential, so that equality crosses where the window is one token."""
    return math.fsum(window) / len(window)
