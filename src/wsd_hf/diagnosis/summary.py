"""A diagnosis for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..text.visible import visible
from .forwards import Prediction
from .measures import BEFORE, Firing, Place

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

PLACES = 5
"""Most switches that are shown as text."""

WRITERS = {"pilot": "pilot's drafts", "base": "base's own answers"}


def summary(diagnosis: Diagnosis) -> Iterator[RenderableType]:
    """Tables, some switches as text, and the verdict."""
    yield _texts(diagnosis)
    yield _positions(diagnosis)
    yield _grid(diagnosis.grid())
    yield _rules(diagnosis.rules())
    if diagnosis.predictions:
        yield _predictions(diagnosis.predictions)
    yield from _places(diagnosis.places(), diagnosis.rule.window_size)
    yield Text("\n".join(diagnosis.verdict()))


def _texts(diagnosis: Diagnosis) -> Table:
    shown = {
        "texts": ("texts", _number),
        "length": ("tokens each", _number),
        "ended": ("ended by themselves", _percent),
        "repeated": ("repeated 4-grams", _percent),
        "probability": ("mean probability", _share),
        "probability_without_repeats": ("mean probability, repeats left out", _share),
        "first_choice": ("the base's first choice", _percent),
        "unsure": ("largest probability below 0.4", _percent),
        "perplexity": ("perplexity", _number),
        "perplexity_start": ("perplexity of the first 8 tokens", _number),
        "perplexity_rest": ("perplexity after them", _number),
    }
    texts = diagnosis.texts()
    table = _table("Texts as the base reads them", "", *(WRITERS[writer] for writer in texts))
    for name, (heading, show) in shown.items():
        table.add_row(heading, *(show(numbers[name]) for numbers in texts.values()))
    return table


def _positions(diagnosis: Diagnosis) -> Table:
    positions = diagnosis.positions()
    table = _table("The base's mean probability of a token, by position", "position", *positions)
    bands = {(band.first, band.last): None for curve in positions.values() for band in curve}
    for first, last in bands:
        found = ([band.probability for band in curve if band.first == first] for curve in positions.values())
        table.add_row(
            f"{first}" if first == last else f"{first} to {last}", *(_share(one[0] if one else None) for one in found)
        )
    return table


def _grid(cells: Sequence[Firing]) -> Table:
    windows = {cell.window_size: f"window {cell.window_size}" for cell in cells}
    table = _table("The paper's rule: median switch index, never [on repeats]", "threshold", *windows.values())
    for threshold in {cell.threshold: None for cell in cells}:
        row = [cell for cell in cells if cell.threshold == threshold]
        table.add_row(f"{threshold:g}", *map(_cell, row))
    return table


def _cell(cell: Firing) -> Text:
    return Text(f"{_number(cell.median)}, {_percent(cell.never)} [{_percent(cell.on_repeats)}]")


def _rules(cells: Sequence[Firing]) -> Table:
    table = _table("Every rule at its defaults", "rule", "repeats", "switch index", "never", "on repeats", "kept")
    for cell in cells:
        counted = "ignored" if cell.ignore_repeats else "counted"
        table.add_row(cell.rule, counted, _number(cell.median), *map(_percent, (cell.never, cell.on_repeats, cell.kept)))
    return table


def _predictions(predictions: Sequence[Prediction]) -> Table:
    table = _table("Predicted costs of a token", "method", "base forwards", "pilot forwards", "by the pilot", "time / base")
    for one in predictions:
        forwards = map(_share, (one.base_forwards, one.pilot_forwards))
        table.add_row(one.method, *forwards, _percent(one.pilot_share), _share(one.time))
    return table


def _places(places: Sequence[Place], window_size: int) -> Iterator[Text]:
    if places:
        yield Text("Switches, the window between bars", style="italic")
    for place in places[:: -(-len(places) // PLACES) or 1]:
        before, window, after = (visible(text).replace("\n", "⏎") for text in (place.before, place.window, place.after))
        cut = "…" if place.index > BEFORE + window_size else ""
        yield Text(f"{place.prompt + 1}: {cut}{before}│{window}│{after}")


def _table(title: str, first: str, *headings: str) -> Table:
    columns = (Column(heading, justify="right", overflow="fold") for heading in headings)
    return Table(first, *columns, title=Text(title), title_justify="left", box=SIMPLE_HEAD)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
