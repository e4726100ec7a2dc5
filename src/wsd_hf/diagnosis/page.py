"""A diagnosis as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from ..pages.document import document, table
from ..pages.style import PILOT_COLOURS
from ..strategies.wsd.switch_rules import SwitchCriteria, SwitchRule
from ..text.visible import html_text
from .forwards import Prediction
from .measures import AFTER, BEFORE, START, Band, Firing, Place, confidences
from .plots import confidence_plot, highest_plot, positions_plot
from .reading import Reading
from .switches import switch_index

CURVES, PLACES = 3, 12
"""Most drafts with a switch whose confidence is drawn, most without, and most switches whose text is shown."""

Item = TypeVar("Item")


class Measured(Protocol):
    """The parts of a `Diagnosis` that its page shows."""

    @property
    def drafts(self) -> Sequence[Reading]: ...

    @property
    def rule(self) -> SwitchRule: ...

    def positions(self) -> Mapping[str, Sequence[Band]]: ...

    def grid(self) -> Sequence[Firing]: ...

    def rules(self) -> Sequence[Firing]: ...

    def highest(self) -> Sequence[float]: ...

    def places(self) -> Sequence[Place]: ...

    def verdict(self) -> Sequence[str]: ...

    def texts(self) -> Mapping[str, Mapping[str, float | None]]: ...


def page(diagnosis: Measured, predictions: Sequence[Prediction] = ()) -> str:
    """The whole page.

    Args:
        diagnosis: the measures.
        predictions: costs of methods on the same pair; a table of its own if there are any.

    Raises:
        WSDValueError: matplotlib is missing.
    """
    words = "".join(f"<p>{html_text(sentence)}</p>\n" for sentence in diagnosis.verdict())
    if not any(draft.tokens for draft in diagnosis.drafts):
        return document("wsd-hf diagnose", words)
    sections = {
        "Where the base takes over": _figures(diagnosis),
        "The text at these places": _places(diagnosis),
        "The texts": _texts(diagnosis.texts()),
        "Each switch rule at its defaults": _rules(diagnosis.rules()),
    }
    if predictions:
        sections["Predicted costs"] = _costs(predictions)
    headed = [f"<h2>{heading}</h2>\n{content}" for heading, content in sections.items()]
    return document("wsd-hf diagnose", words + "".join(headed))


def _figures(diagnosis: Measured) -> str:
    rule = diagnosis.rule
    threshold = rule.threshold if isinstance(rule, SwitchCriteria) and not rule.ignore_repeats else None
    switches = [(draft, switch_index(draft, rule)) for draft in diagnosis.drafts]
    drafts = [
        one for fires in (True, False) for one in _some([one for one in switches if (one[1] is not None) == fires], CURVES)
    ]
    curves = [confidences(draft, rule.window_size) for draft, _ in drafts]
    figures = {
        "The base's mean probability of a token, with one standard error. A repeat is a token that completes a 4-gram which "
        "the text held before.": positions_plot(diagnosis.positions()),
        f"Number of drafts by their highest confidence over {rule.window_size} tokens, which is the geometric mean of the "
        "base's probabilities.": highest_plot(diagnosis.highest(), threshold),
        f"Confidence over {rule.window_size} tokens along {len(drafts)} of the drafts, some with a switch and some without, as "
        "far as there are both.": confidence_plot(curves, [index for _, index in drafts], threshold),
        "Median switch index of the paper's rule at each threshold and window, drafts that never switch, and switches on a "
        "window that the draft held before. The darker, the more drafts never switch.": _grid(diagnosis.grid()),
    }
    elements = [
        f"<figure>\n{drawn}<figcaption>{html_text(words)}</figcaption>\n</figure>\n" for words, drawn in figures.items()
    ]
    return f'<div class="figures">\n{"".join(elements)}</div>\n'


def _grid(cells: Sequence[Firing]) -> str:
    """A line for each threshold, and a column for each window."""
    windows = sorted({cell.window_size for cell in cells})
    lines: dict[float, dict[int, Firing]] = {}
    for cell in cells:
        lines.setdefault(cell.threshold, {})[cell.window_size] = cell
    headings = ["threshold", *(f"window {window}" for window in windows)]
    rows = [(f"{threshold:g}", [line[window] for window in windows]) for threshold, line in lines.items()]
    return table("Switches at each threshold and window", headings, rows, _cell)


def _cell(cell: Firing) -> str:
    return (
        f'<td class="pilot-{_shade(1 - cell.never)}"><b>{_number(cell.median)}</b><br/>'
        f"never {_percent(cell.never)}<br/>repeats {_percent(cell.on_repeats)}</td>"
    )


def _places(diagnosis: Measured) -> str:
    """The words around some switches, as coloured text."""
    places, rule = _some(diagnosis.places(), PLACES), diagnosis.rule
    if not places:
        return "<p>The rule fires in no draft.</p>\n"
    drafts = {draft.prompt: draft for draft in diagnosis.drafts}
    legend = (
        "Drafted tokens, the darker the less likely under the base. The window of the switch is between bars, and after it is "
        "the rest of the draft, which the base replaces."
    )
    shown = [_place(drafts[place.prompt], place, rule.window_size) for place in places]
    return f'<p class="muted">{legend}</p>\n{"".join(shown)}'


def _place(draft: Reading, place: Place, window: int) -> str:
    end = place.index
    begin = max(end - window, 0)
    first = max(begin - BEFORE, 0)
    before, last = ("".join(_token(draft, at) for at in span) for span in (range(first, begin), range(begin, end)))
    label = ' <b class="label">repeats</b>' if place.repeats else ""
    return (
        f'<p class="text"><b class="muted">prompt {place.prompt + 1}</b> {"…" if first else ""}{before}<b>│{last}│</b>'
        f'<i class="muted">{html_text(place.after)}{"…" if end + AFTER < len(draft.tokens) else ""}</i>{label}</p>\n'
    )


def _token(draft: Reading, at: int) -> str:
    probability = math.exp(draft.log_probs[at])
    text = html_text(draft.texts[at])
    return f'<span class="pilot-{_shade(probability)}" title="probability {probability:.3f}">{text}</span>'


def _texts(texts: Mapping[str, Mapping[str, float | None]]) -> str:
    """A line for each measure, and a column for each writer."""
    names = {"pilot": "the pilot's drafts", "base": "the base's own answers"}
    lines = [(heading, [show(numbers[key]) for numbers in texts.values()]) for key, (heading, show) in MEASURES.items()]
    return table("The texts", ["", *(names[writer] for writer in texts)], lines)


def _rules(rules: Sequence[Firing]) -> str:
    headings = ["rule", "threshold", "window", "median switch index", "never", "on repeats", "written by the pilot"]
    rows = [
        (
            f"{found.rule}{', repeats ignored' if found.ignore_repeats else ''}",
            [
                f"{found.threshold:g}",
                f"{found.window_size}",
                _number(found.median),
                *map(_percent, (found.never, found.on_repeats, found.kept)),
            ],
        )
        for found in rules
    ]
    return table("Switches of each named rule at its defaults", headings, rows)


def _costs(predictions: Sequence[Prediction]) -> str:
    headings = ["method", "time per token / base", "base forwards per token", "pilot forwards", "reference forwards"]
    rows = [
        (
            found.method,
            [
                *map(_number, (found.time, found.base_forwards, found.pilot_forwards, found.reference_forwards)),
                _percent(found.pilot_share),
            ],
        )
        for found in predictions
    ]
    return table("Predicted costs of each method", [*headings, "written by the pilot"], rows)


def _some(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many items, at equal distances."""
    return items[:: max(1, math.ceil(len(items) / most))]


def _shade(share: float) -> int:
    """The class of a background from the pilot's darkest, for 0, to its lightest, for 1."""
    return min(int(share * len(PILOT_COLOURS)), len(PILOT_COLOURS) - 1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


MEASURES: Mapping[str, tuple[str, Callable[[float | None], str]]] = {
    "texts": ("texts", _number),
    "length": ("mean length in tokens", _number),
    "ended": ("ended by themselves", _percent),
    "repeated": ("repeated tokens", _percent),
    "probability": ("mean probability under the base", _number),
    "probability_without_repeats": ("the same without repeats", _number),
    "first_choice": ("tokens that are the base's first choice", _percent),
    "unsure": ("places where the base is unsure", _percent),
    "perplexity": ("perplexity under the base", _number),
    "perplexity_start": (f"of the first {START} tokens", _number),
    "perplexity_rest": ("of those after them", _number),
}
"""Numbers of a writer's texts, in the order of the page: keys as in `Diagnosis.texts`, headings, and forms."""
