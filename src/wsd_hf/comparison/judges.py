"""Judges: functions from a prompt's record and a response to a score."""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from ..errors import WSDValueError
from .prompts import Record

Judge = Callable[[Record, str], float]

JUDGES = {"tiny_world": "wsd_hf.tiny.judge:score"}
"""The judges with a name."""


def find_judge(name: str) -> Judge:
    """The judge of a name in `JUDGES`, or at an import path `package.module:function`.

    Raises:
        WSDValueError: there is none; says why.
    """
    module, colon, function = JUDGES.get(name, name).partition(":")
    if not colon:
        known = ", ".join(JUDGES)
        raise WSDValueError(f"--judge {name}: unknown; known are {known}, and import paths package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # of a command it isn't; but there a judge of the user's will lie
    try:
        judge = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise WSDValueError(f"--judge {name}: {type(error).__name__}: {error}") from error
    if not callable(judge):
        raise WSDValueError(f"--judge {name}: is no function")
    return judge  # type: ignore[no-any-return]


def score(judge: Judge, record: Record, response: str) -> float:
    """What a judge says of a response, which must be a number; the judge may change the record that it is given."""
    try:
        value: Any = judge(copy.deepcopy(record), response)
    except WSDValueError:
        raise
    except Exception as error:  # whatever the judge does
        raise WSDValueError(f"the judge raised {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise WSDValueError(f"the judge returned {value!r}: must return a finite number")
    return number
