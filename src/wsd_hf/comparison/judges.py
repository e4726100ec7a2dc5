"""Judges: from a prompt's record and a response to a score."""

from __future__ import annotations

import copy
import math
import os
import pkgutil
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from ..errors import WSDValueError
from .prompts import Record

LONGEST_SEARCH = 5.0
"""Seconds after which the search for a check is given up: patterns such as `(a|aa)+$` take time that grows exponentially."""


class Unscored(Exception):
    """A response that a judge could not score, though it judges the prompt; the message is the reason."""


class Judge(ABC):
    """A scorer of responses, without a state."""

    def check(self, record: Record) -> None:
        """Raises a WSDValueError if a prompt's record cannot be judged."""
        return

    @abstractmethod
    def score(self, record: Record, response: str) -> float | None:
        """The score of a response, a finite number; None if this judge does not judge the prompt.

        Raises:
            Unscored: this response cannot be scored.
            WSDValueError: the judge itself fails.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """Options beside `--judge` that its scores depend on, as JSON data."""
        return {}


@dataclass(frozen=True)
class Function(Judge):
    """A function of a record, of which it gets a copy, and a response."""

    function: Callable[[Record, str], Any]

    def score(self, record: Record, response: str) -> float | None:
        try:
            value = self.function(copy.deepcopy(record), response)
        except WSDValueError:
            raise
        except Exception as error:  # a function may raise anything
            raise WSDValueError(f"the judge raised {type(error).__name__}: {error}") from error
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise WSDValueError(
                f"the judge returned {value!r}: must return a finite number, or None for a prompt without a score"
            )
        return number


@dataclass(frozen=True)
class Checks(Judge):
    """1 if the pattern "check" of a record is found in the response, else 0; None for records without one.

    The pattern is a regular expression of the package `regex`, which reads those of Python's `re`, and heeds a time limit. Case
    counts, unless the pattern begins with `(?i)`.

    >>> record = {"prompt": "What is the capital of France?", "check": r"\\bParis\\b"}
    >>> Checks().score(record, "It is Paris."), Checks().score(record, "It is paris.")
    (1.0, 0.0)
    """

    seconds: float = LONGEST_SEARCH

    def check(self, record: Record) -> None:
        if "check" not in record:
            return
        pattern = record["check"]
        if not isinstance(pattern, str):
            raise WSDValueError(f"check={reprlib.repr(pattern)}: must be a regular expression")
        try:
            regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            raise WSDValueError(f"check={reprlib.repr(pattern)}: is no regular expression ({error})") from error

    def score(self, record: Record, response: str) -> float | None:
        if "check" not in record:
            return None
        try:
            return float(regex.search(record["check"], response, timeout=self.seconds) is not None)
        except TimeoutError:
            shown = reprlib.repr(record["check"])
            raise Unscored(f"the search for check={shown} takes longer than {self.seconds:g} seconds") from None


FUNCTIONS = {"tiny_world": "wsd_hf.tiny.judge:score"}
"""Judges that are functions, by their names."""

JUDGES = ("checks", "llm", *FUNCTIONS)
"""Names that `--judge` takes, beside import paths."""


def find_judge(name: str) -> Judge:
    """The judge with a name in `JUDGES`, "llm" excepted, or the function at an import path `package.module:function`.

    Raises:
        WSDValueError: there is none.
    """
    return Checks() if name == "checks" else Function(find_function("--judge", name, FUNCTIONS, JUDGES))


def find_function(option: str, name: str, known: Mapping[str, str], names: Iterable[str] = ()) -> Callable[..., Any]:
    """A function by a known name or an import path.

    Args:
        option: of the command line, for errors.
        name: its value.
        known: import paths by their names.
        names: all that the option takes, for errors; default: those that are known.

    Raises:
        WSDValueError: there is none.
    """
    path = known.get(name, name)
    if ":" not in path:
        listed = ", ".join(names or known)
        raise WSDValueError(f"{option} {name}: unknown; known are {listed}, and import paths package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # missing for installed commands; functions of users are often there
    try:
        function = pkgutil.resolve_name(path)
    except Exception as error:  # an imported module may raise anything
        raise WSDValueError(f"{option} {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise WSDValueError(f"{option} {name}: is not a function")
    return function  # type: ignore[no-any-return]


def scores(
    judges: Mapping[str, Judge], record: Record, response: str, unscored: Callable[[str], None]
) -> dict[str, float | None]:
    """Scores of a response by the names of the judges; None of a judge that does not judge the prompt, or cannot score it.

    Args:
        judges: by their names.
        record: the prompt.
        response: the answer to it.
        unscored: called with the reason for each score that could not be given.

    Raises:
        WSDValueError: a judge fails.
    """
    found: dict[str, float | None] = {}
    for name, judge in judges.items():
        try:
            found[name] = judge.score(record, response)
        except Unscored as error:
            unscored(f"--judge {name}: {error}")
            found[name] = None
    return found
