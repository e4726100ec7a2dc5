"""Judges: functions from a prompt's record and a response to a score."""

from __future__ import annotations

import copy
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import WSDValueError
from .prompts import Record

Judge = Callable[[Record, str], float]

JUDGES = {"tiny_world": "wsd_hf.tiny.judge:score"}
"""Judges by their names."""


def find_judge(name: str) -> Judge:
    """The judge with a name in `JUDGES`, or at an import path `package.module:function`; a WSDValueError if there is none."""
    return find_function("--judge", name, JUDGES)


def find_function(option: str, name: str, known: Mapping[str, str]) -> Callable[..., Any]:
    """A function by a known name or an import path; a WSDValueError that names the option if there is none."""
    path = known.get(name, name)
    if ":" not in path:
        raise WSDValueError(f"{option} {name}: unknown; known are {', '.join(known)}, and import paths package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # missing for installed commands; functions of users are often there
    try:
        function = pkgutil.resolve_name(path)
    except Exception as error:  # an imported module may raise anything
        raise WSDValueError(f"{option} {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise WSDValueError(f"{option} {name}: is not a function")
    return function  # type: ignore[no-any-return]


def score(judge: Judge, record: Record, response: str) -> float:
    """A judge's score of a response; a WSDValueError unless it is a finite number. The judge gets a copy of the record."""
    try:
        value: Any = judge(copy.deepcopy(record), response)
    except WSDValueError:
        raise
    except Exception as error:  # a judge may raise anything
        raise WSDValueError(f"the judge raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise WSDValueError(f"the judge returned {value!r}: must return a finite number")
    return number
