"""Results of a comparison: a row for each method, for a terminal and for files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from .replies import WORK, Answer


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COUNT, ONE_DECIMAL, TWO_DECIMALS = "{:,}".format, "{:.1f}".format, "{:.2f}".format


def _column(heading: str, show: Callable[[Any], str], zeros: bool = True) -> Any:
    """A field of `Row` that tables show; without `zeros` only if one of its numbers is not 0."""
    return field(metadata={"heading": heading, "show": show, "hidden": (None,) if zeros else (None, 0)})


@dataclass(frozen=True, kw_only=True)
class Row:
    """Results of one method over all prompts. Times are multiples of the base's; tokens of a model are positions fed to it.

    Attributes:
        missing: prompts that are not answered yet; 0 in a finished run.
        time_per_token: for each token of its responses.
        length: mean tokens of a response.
        pilot_share: share of all response tokens that the pilot wrote; None where every token is the work of several models.
        switch_index: mean, of responses in which the base became confident; None if there are none.
        never_switched: share of the other responses; None for methods without a switch.
        draft_ended, draft_limit, budget, stopped: the same by `switch_reason`, the cause that ended the draft instead.
        score: mean of the judge's; None without a judge.
    """

    strategy: str = _column("", str)
    answers: int
    missing: int = _column("prompts still to come", COUNT, zeros=False)
    time: float = _column("time / base", TWO_DECIMALS)
    time_per_token: float = _column("time per token / base", TWO_DECIMALS)
    seconds: float
    base_forwards: int = _column("base forwards", COUNT, zeros=False)
    base_tokens: int = _column("base tokens", COUNT, zeros=False)
    pilot_forwards: int = _column("pilot forwards", COUNT, zeros=False)
    pilot_tokens: int = _column("pilot tokens", COUNT, zeros=False)
    reference_forwards: int = _column("reference forwards", COUNT, zeros=False)
    reference_tokens: int = _column("reference tokens", COUNT, zeros=False)
    length: float = _column("response length", ONE_DECIMAL)
    pilot_share: float | None = _column("written by the pilot", _percent)
    switch_index: float | None = _column("switch index", ONE_DECIMAL)
    never_switched: float | None = _column("never switched", _percent)
    draft_ended: float | None = _column("never switched: draft ended", _percent, zeros=False)
    draft_limit: float | None = _column("never switched: draft limit", _percent, zeros=False)
    budget: float | None = _column("never switched: response full", _percent, zeros=False)
    stopped: float | None = _column("never switched: stopped", _percent, zeros=False)
    score: float | None = _column("score", TWO_DECIMALS)


def table_rows(answers: Collection[Answer], strategies: Sequence[str], missing: int = 0) -> list[Row]:
    """A row for each of the methods, one of which must be "base".

    Args:
        answers: of all methods to the same prompts.
        strategies: the methods.
        missing: prompts that are not answered yet.
    """
    of = {name: [answer for answer in answers if answer.strategy == name] for name in strategies}
    return [_row(name, of[name], of["base"], missing) for name in strategies]


def _row(strategy: str, answers: list[Answer], by_base: list[Answer], missing: int) -> Row:
    def ended_by(reason: str) -> float | None:
        return _mean(found == reason for found in reasons)

    seconds, base_seconds = (sum(answer.seconds for answer in some) for some in (answers, by_base))
    tokens, base_tokens = (sum(answer.tokens for answer in some) for some in (answers, by_base))
    by_pilot = [answer.written_by_pilot for answer in answers if answer.written_by_pilot is not None]
    reasons = [answer.switch_reason for answer in answers if answer.switch_reason is not None]
    return Row(
        strategy=strategy,
        answers=len(answers),
        missing=missing,
        time=seconds / base_seconds,
        time_per_token=(seconds / tokens) / (base_seconds / base_tokens),
        seconds=seconds,
        **{name: sum(answer.work.get(name, 0) for answer in answers) for name in WORK},
        length=tokens / len(answers),
        pilot_share=sum(by_pilot) / tokens if by_pilot else None,
        switch_index=_mean(answer.switch_index for answer in answers if answer.switch_reason == "confident"),
        never_switched=_mean(reason != "confident" for reason in reasons),
        draft_ended=ended_by("draft_ended"),
        draft_limit=ended_by("draft_limit"),
        budget=ended_by("budget"),
        stopped=ended_by("stopped"),
        score=_mean(answer.score for answer in answers if answer.score is not None),
    )


def _mean(values: Iterable[Any]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, without columns that are empty in all rows."""
    columns = [
        column
        for column in fields(Row)
        if column.metadata and any(getattr(row, column.name) not in column.metadata["hidden"] for row in rows)
    ]
    values = [[(column.metadata["show"], getattr(row, column.name)) for column in columns] for row in rows]
    cells = [["-" if value is None else show(value) for show, value in line] for line in values]
    return [column.metadata["heading"] for column in columns], cells


def terminal(rows: Sequence[Row]) -> Table:
    """The table for a terminal, which is seldom wide: a column for each method."""
    (_, *headings), cells = shown(rows)
    (names, *lines) = zip(*cells, strict=True)
    table = Table("", *(Column(name, justify="right", overflow="fold") for name in names), box=SIMPLE_HEAD)
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
    writer.writerow(column.name for column in fields(Row))
    writer.writerows(map(astuple, rows))
    return file.getvalue()
