"""Scores that a function of the caller's gives to responses, by their texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..errors import WSDValueError

TextScore = Callable[[Sequence[str], Sequence[bool], Sequence[int]], Any]
"""One number for each response, from its text, whether that is whole, and the number of its prompt; see `ImplicitValue`."""


class ModelScore:
    """A score that models compute.

    Attributes:
        models: those whose forwards it runs.
    """

    models: Sequence[PreTrainedModel]


def text_scores(name: str, score: TextScore, texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
    """The numbers that `score`, which the argument `name` holds, gives to responses; raises unless there is one for each."""
    given = score(texts, ended, of)
    try:
        numbers = [float(number) for number in given]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        numbers = []
    if len(numbers) != len(texts) or any(map(math.isnan, numbers)):
        raise WSDValueError(f"{name} gave {given!r} for {len(texts)} texts: must be as many numbers, none of them NaN")
    return numbers
