"""Numbers of Python, numpy or torch, read from arguments and checked."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

from ..errors import WSDValueError

MOST_SAMPLES = 16_384
"""Most responses to one prompt that are written at a time; each takes a row of every tensor before its first token."""


def check_probability(name: str, value: Any) -> float:
    """`value` as a float in (0, 1]; raises for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number <= 1:
        raise WSDValueError(f"{name}={value!r}: must be a number above 0 and at most 1")
    return number


def as_number(value: Any) -> int | float | None:
    """A number as one of Python's, an int if it has no fraction; None for anything else, bool included.

    >>> as_number(20.0), as_number(0.5), as_number(True), as_number("20")
    (20, 0.5, None, None)
    """
    if hasattr(value, "item"):  # of numpy or torch
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one number
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_number(name: str, value: Any, least: float = -math.inf) -> float:
    """`value` as a finite float of at least `least`; raises for anything else."""
    number = as_number(value)
    if number is None or not abs(number) <= sys.float_info.max or number < least:
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise WSDValueError(f"{name}={value!r}: must be a finite number{limit}")
    return float(number)


def check_integer(name: str, value: Any) -> int:
    """`value` as an int (`20.0` is one); raises for anything else."""
    number = as_number(value)
    if not isinstance(number, int):
        raise WSDValueError(f"{name}={value!r}: must be an integer")
    return number


def check_positive_integer(name: str, value: Any, most: int | None = None) -> int:
    """`value` as an int from 1 to `most`; raises for anything else."""
    number = as_number(value)
    if not isinstance(number, int) or number < 1 or (most is not None and number > most):
        limit = "" if most is None else f" and at most {most:,}"
        raise WSDValueError(f"{name}={value!r}: must be an integer of at least 1{limit}")
    return number
