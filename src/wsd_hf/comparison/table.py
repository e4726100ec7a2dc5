"""Results of a comparison: a row for each variant, for a terminal and for files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ..text.visible import visible
from .prompts import Record
from .replies import WORK, Answer
from .statistics import distinct_ngrams, interval, pairwise_similarity


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % interval from a bootstrap over prompts, and the number of its values; None without any."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0


UNSWITCHED = ("draft_ended", "draft_limit", "budget", "stopped")
"""Reasons other than the base's confidence, by which a draft ends; as in `WSDOutput.switch_reason`."""

BESIDE = 3
"""Most variants beside the base in one table of a terminal."""

COUNT, ONE_DECIMAL, TWO_DECIMALS = "{:,}".format, "{:.1f}".format, "{:.2f}".format


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _whole_percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _column(
    heading: str, show: Callable[[Any], str], bound: Callable[[Any], str] | None = None, zeros: bool = True
) -> dict[str, Any]:
    """Metadata of a field of `Row` that tables show.

    Args:
        heading: of the column.
        show: makes the text of a number, or of a mean's value.
        bound: makes the text of a bound of the interval; without it tables leave the interval out.
        zeros: if False, the column is shown only if one of its numbers is not 0.
    """
    return {"heading": heading, "show": show, "bound": bound, "hidden": (None,) if zeros else (None, 0)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Results of one variant over all prompts. Times are multiples of the base's; tokens of a model are positions fed to it.

    Attributes:
        strategy: name of the variant.
        answers: number of them.
        missing: prompts that are not answered yet; 0 in a finished run.
        time_per_token: for each token of its responses.
        length: tokens of a response.
        ended: share of responses that ended by themselves, before they were cut.
        repeats: share of a response's 4-grams of tokens that it held before.
        pilot_share: share of all response tokens that the pilot wrote; None where every token is the work of several models.
        switch_index: of responses in which the base became confident.
        never_switched: share of the other responses; None for methods without a switch.
        draft_ended, draft_limit, budget, stopped: the same by `switch_reason`, the cause that ended the draft instead.
        distinct: share of different 2-grams among those of all answers to a prompt, if there are several.
        similarity: of two answers to the same prompt, from 0 to 1.
        scores: of each judge, by the heading of its column.
    """

    strategy: str = field(metadata=_column("", str))
    answers: int
    missing: int = field(metadata=_column("prompts still to come", COUNT, zeros=False))
    time: float = field(metadata=_column("time / base", TWO_DECIMALS))
    time_per_token: float = field(metadata=_column("time per token / base", TWO_DECIMALS))
    seconds: float
    base_forwards: int = field(metadata=_column("base forwards", COUNT, zeros=False))
    base_tokens: int = field(metadata=_column("base tokens", COUNT, zeros=False))
    pilot_forwards: int = field(metadata=_column("pilot forwards", COUNT, zeros=False))
    pilot_tokens: int = field(metadata=_column("pilot tokens", COUNT, zeros=False))
    reference_forwards: int = field(metadata=_column("reference forwards", COUNT, zeros=False))
    reference_tokens: int = field(metadata=_column("reference tokens", COUNT, zeros=False))
    length: Mean = field(metadata=_column("response length", ONE_DECIMAL))
    ended: Mean = field(metadata=_column("ended by itself", _percent, _whole_percent))
    repeats: Mean = field(metadata=_column("repeated 4-grams", _percent, _whole_percent))
    pilot_share: float | None = field(metadata=_column("written by the pilot", _percent))
    switch_index: Mean = field(metadata=_column("switch index", ONE_DECIMAL))
    never_switched: Mean = field(metadata=_column("never switched", _percent, _whole_percent))
    draft_ended: Mean = field(metadata=_column("never switched: draft ended", _percent, zeros=False))
    draft_limit: Mean = field(metadata=_column("never switched: draft limit", _percent, zeros=False))
    budget: Mean = field(metadata=_column("never switched: response full", _percent, zeros=False))
    stopped: Mean = field(metadata=_column("never switched: stopped", _percent, zeros=False))
    distinct: Mean = field(metadata=_column("distinct 2-grams", _percent, _whole_percent))
    similarity: Mean = field(metadata=_column("similarity of answers", TWO_DECIMALS, TWO_DECIMALS))
    scores: Mapping[str, Mean]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, unrounded, by name; a mean has three more: `_low` and `_high` of its interval, and its `_count`."""
        values = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "scores"}
        data: dict[str, Any] = {}
        for name, value in {**values, **(self.scores or {"score": Mean()})}.items():
            data[name] = _number(value)
            if isinstance(value, Mean):
                data |= {f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_count": value.count}
        return data


def table_rows(answers: Collection[Answer], strategies: Sequence[str], missing: int = 0) -> list[Row]:
    """A row for each of the variants, one of which must be "base".

    Args:
        answers: of all variants to the same prompts.
        strategies: names of the variants.
        missing: prompts that are not answered yet.
    """
    of = {name: [answer for answer in answers if answer.strategy == name] for name in strategies}
    return [_row(name, of[name], of["base"], missing) for name in strategies]


def by_key(answers: Iterable[Answer], records: Sequence[Record], key: str) -> dict[str, list[Answer]]:
    """Answers by the value of a key of their prompt's line, as text."""
    groups: dict[str, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.prompt):
        value = records[answer.prompt][key]
        groups.setdefault(value if isinstance(value, str) else json.dumps(value), []).append(answer)
    return groups


def _row(strategy: str, answers: list[Answer], by_base: list[Answer], missing: int) -> Row:
    seconds, base_seconds = (sum(answer.seconds for answer in some) for some in (answers, by_base))
    tokens, base_tokens = (sum(answer.tokens for answer in some) for some in (answers, by_base))
    by_pilot = [answer.written_by_pilot for answer in answers if answer.written_by_pilot is not None]
    switching = [answer for answer in answers if answer.switch_reason is not None]
    confident = [answer for answer in switching if answer.switch_reason == "confident"]
    responses: dict[int, list[str]] = {}
    for answer in answers:
        responses.setdefault(answer.prompt, []).append(answer.response)
    several = {prompt: texts for prompt, texts in responses.items() if len(texts) > 1}
    work: dict[str, Any] = {name: sum(answer.work.get(name, 0) for answer in answers) for name in WORK}
    reasons: dict[str, Any] = {
        reason: _mean((answer.prompt, answer.switch_reason == reason) for answer in switching) for reason in UNSWITCHED
    }
    return Row(
        strategy=strategy,
        answers=len(answers),
        missing=missing,
        time=seconds / base_seconds,
        time_per_token=(seconds / tokens) / (base_seconds / base_tokens),
        seconds=seconds,
        **work,
        length=_mean((answer.prompt, answer.tokens) for answer in answers),
        ended=_mean((answer.prompt, answer.ended) for answer in answers),
        repeats=_mean((answer.prompt, answer.repeats) for answer in answers),
        pilot_share=sum(by_pilot) / tokens if by_pilot else None,
        switch_index=_mean((answer.prompt, answer.switch_index) for answer in confident),
        never_switched=_mean((answer.prompt, answer.switch_reason != "confident") for answer in switching),
        **reasons,
        distinct=_mean((prompt, distinct_ngrams(texts)) for prompt, texts in several.items()),
        similarity=_mean((prompt, pairwise_similarity(texts)) for prompt, texts in several.items()),
        scores={
            heading: _mean((answer.prompt, answer.scores[judge]) for answer in answers)
            for judge, heading in score_headings(answers[0].scores).items()
        },
    )


def score_headings(judges: Collection[str]) -> dict[str, str]:
    """Headings of the columns of scores, by the names of the judges."""
    return {judge: "score" if len(judges) == 1 else f"score: {judge}" for judge in judges}


def _mean(found: Iterable[tuple[int, float | None]]) -> Mean:
    """The mean of values, each with the number of its prompt; None is no value."""
    pairs = [(prompt, value) for prompt, value in found if value is not None]
    values = [value for _, value in pairs]
    return Mean(fmean(values), *interval(values, [prompt for prompt, _ in pairs]), len(values)) if pairs else Mean()


def shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, without columns that are empty in all rows."""
    fields_shown = [column for column in fields(Row) if column.metadata]
    columns: list[tuple[Mapping[str, Any], list[Any]]]
    columns = [(column.metadata, [getattr(row, column.name) for row in rows]) for column in fields_shown]
    columns = [(form, values) for form, values in columns if any(_number(value) not in form["hidden"] for value in values)]
    columns += [(_column(name, TWO_DECIMALS, TWO_DECIMALS), [row.scores[name] for row in rows]) for name in rows[0].scores]
    cells = [[_cell(value, form["show"], form["bound"]) for value in values] for form, values in columns]
    return [form["heading"] for form, _ in columns], [list(line) for line in zip(*cells, strict=True)]


def _number(value: Any) -> Any:
    return value.value if isinstance(value, Mean) else value


def _cell(value: Any, show: Callable[[Any], str], bound: Callable[[Any], str] | None) -> str:
    """The text of a value, and of its interval if that is shown and not a single number."""
    if _number(value) is None:
        return "-"
    interval = f" ({bound(value.low)}-{bound(value.high)})" if bound and value.low < value.high else ""
    return show(_number(value)) + interval


def terminal(rows: Sequence[Row], title: str | None = None) -> Group:
    """The table for a terminal, which is seldom wide: a column for each variant, in as many tables as it takes."""
    (_, *headings), (base, *others) = shown(rows)
    parts = [others[start : start + BESIDE] for start in range(0, len(others), BESIDE)] or [[]]
    return Group(*(_columns(headings, [base, *part], title) for part in parts))


def _columns(headings: Sequence[str], cells: Sequence[Sequence[str]], title: str | None) -> Table:
    """A table with a column for each list of cells, whose first is the heading; intervals are below their means."""
    (names, *lines) = zip(*cells, strict=True)
    broken = [visible(name).replace(":", ":\n").replace(",", ",\n") for name in names]
    columns = (Column(Text(name), justify="right", overflow="fold") for name in broken)
    table = Table("", *columns, box=SIMPLE_HEAD, title=title and Text(visible(title)), title_justify="left")
    for heading, line in zip(headings, lines, strict=True):
        table.add_row(heading, *(cell.replace(" (", "\n(") for cell in line))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    headings, cells = shown(rows)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def as_csv(tables: Mapping[str, Sequence[Row]]) -> str:
    """All numbers of some tables, unrounded, each row after the name of its table; see `Row.to_dict`."""
    file = io.StringIO(newline="")
    lines = [{"group": name, **row.to_dict()} for name, rows in tables.items() for row in rows]
    writer = csv.DictWriter(file, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
