"""What a comparison comes to: a row for each method, for a terminal and for files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ..strategies.wsd.draft import SwitchReason
from .replies import WORK
from .store import Answer


@dataclass(frozen=True)
class Row:
    """One method, over all prompts.

    Attributes:
        strategy: its name.
        answers: how many.
        missing: prompts that are not answered yet; 0 in a finished run.
        time: its time, as a multiple of the base's.
        time_per_token: its time for each token of its responses, as a multiple of the base's.
        seconds: its time.
        base_forwards, base_tokens, pilot_forwards, pilot_tokens, reference_forwards, reference_tokens: work in all; tokens are
            positions fed to the model.
        length: mean tokens of a response.
        pilot_share: share of all response tokens that the pilot wrote; None where every token is the work of several models.
        switch_index: mean, where the base took over; None where it never did.
        never_switched: share of responses in which the base did not become confident; None for methods without a switch.
        draft_ended, draft_limit, budget, stopped: the same share by `switch_reason`, the cause that ended the draft instead.
        score: the judge's mean; None without a judge.
    """

    strategy: str
    answers: int
    missing: int
    time: float
    time_per_token: float
    seconds: float
    base_forwards: int
    base_tokens: int
    pilot_forwards: int
    pilot_tokens: int
    reference_forwards: int
    reference_tokens: int
    length: float
    pilot_share: float | None
    switch_index: float | None
    never_switched: float | None
    draft_ended: float | None
    draft_limit: float | None
    budget: float | None
    stopped: float | None
    score: float | None


def _count(value: float) -> str:
    return f"{value:,}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _decimals(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "strategy": ("", str),
    "missing": ("prompts still to come", _count),
    "time": ("time / base", _decimals(2)),
    "time_per_token": ("time per token / base", _decimals(2)),
    "base_forwards": ("base forwards", _count),
    "base_tokens": ("base tokens", _count),
    "pilot_forwards": ("pilot forwards", _count),
    "pilot_tokens": ("pilot tokens", _count),
    "reference_forwards": ("reference forwards", _count),
    "reference_tokens": ("reference tokens", _count),
    "length": ("response length", _decimals(1)),
    "pilot_share": ("written by the pilot", _percent),
    "switch_index": ("switch index", _decimals(1)),
    "never_switched": ("never switched", _percent),
    "draft_ended": ("never switched: draft ended", _percent),
    "draft_limit": ("never switched: draft limit", _percent),
    "budget": ("never switched: response full", _percent),
    "stopped": ("never switched: stopped", _percent),
    "score": ("score", _decimals(2)),
}
"""What is shown of a row, under which heading, and how."""

OF_SOME_RUNS = ("missing", *WORK, "draft_ended", "draft_limit", "budget", "stopped")
"""Columns that are shown only if a number in them is not 0."""


def table_rows(answers: Collection[Answer], strategies: Sequence[str], missing: int = 0) -> list[Row]:
    """A row for each of the methods, of which "base" must be one.

    Args:
        answers: of all methods to the same prompts.
        strategies: the methods.
        missing: prompts that are not answered yet.
    """
    of = {name: [answer for answer in answers if answer.strategy == name] for name in strategies}
    return [_row(name, of[name], of["base"], missing) for name in strategies]


def _row(strategy: str, answers: list[Answer], by_base: list[Answer], missing: int) -> Row:
    def work(name: str) -> int:
        return sum(answer.work.get(name, 0) for answer in answers)

    def ended_by(reason: SwitchReason) -> float | None:
        return _mean(found == reason for found in reasons)

    seconds, base_seconds = (sum(answer.seconds for answer in some) for some in (answers, by_base))
    tokens, base_tokens = (sum(answer.tokens for answer in some) for some in (answers, by_base))
    by_pilot = [answer.written_by_pilot for answer in answers if answer.written_by_pilot is not None]
    reasons = [answer.switch_reason for answer in answers if answer.switch_reason is not None]
    scores = [answer.score for answer in answers if answer.score is not None]
    return Row(
        strategy,
        len(answers),
        missing,
        seconds / base_seconds,
        (seconds / tokens) / (base_seconds / base_tokens),
        seconds,
        work("base_forwards"),
        work("base_tokens"),
        work("pilot_forwards"),
        work("pilot_tokens"),
        work("reference_forwards"),
        work("reference_tokens"),
        length=tokens / len(answers),
        pilot_share=sum(by_pilot) / tokens if by_pilot else None,
        switch_index=_mean(answer.switch_index for answer in answers if answer.switch_reason == "confident"),
        never_switched=_mean(reason != "confident" for reason in reasons),
        draft_ended=ended_by("draft_ended"),
        draft_limit=ended_by("draft_limit"),
        budget=ended_by("budget"),
        stopped=ended_by("stopped"),
        score=_mean(scores),
    )


def _mean(values: Iterable[Any]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, without the columns that say nothing of any row: the work of a model that nobody asked, for one."""
    silent = {name: (None, 0) if name in OF_SOME_RUNS else (None,) for name in COLUMNS}
    names = [name for name in COLUMNS if any(getattr(row, name) not in silent[name] for row in rows)]
    cells = [[_cell(name, getattr(row, name)) for name in names] for row in rows]
    return [COLUMNS[name][0] for name in names], cells


def _cell(name: str, value: Any) -> str:
    return "-" if value is None else COLUMNS[name][1](value)


def terminal(rows: Sequence[Row]) -> Table:
    """The table for a terminal, which is seldom wide: a column for each method."""
    (_, *headings), cells = shown(rows)
    (names, *lines) = zip(*cells, strict=True)
    table = Table("", *(Column(name, justify="right") for name in names), box=SIMPLE_HEAD)
    for heading, line in zip(headings, lines, strict=True):
        table.add_row(heading, *line)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    headings, cells = shown(rows)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """All numbers, unrounded, with the attributes of `Row` as headings."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(map(astuple, rows))
    return file.getvalue()
