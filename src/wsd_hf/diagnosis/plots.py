"""Plots of a diagnosis: SVG elements in the colours of the page that they are on, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import WSDValueError
from ..pages.style import LIGHT
from ..text.visible import html_text
from .measures import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches; at 72 points each, the numbers on an axis are as large as small print on the narrowest phones."""


def positions_plot(positions: Mapping[str, Sequence[Band]]) -> str:
    """The base's mean probability of a token by the token's position, in a band of one standard error.

    Args:
        positions: as of `Diagnosis.positions`.
    """
    figure, axes = _axes(3.4, "position in the text", "the base's probability")
    for name, bands in positions.items():
        text, _, without = name.partition(", ")
        colour, label = (LIGHT["pilot"], "pilot's draft") if text == "draft" else (LIGHT["base"], "base's own answer")
        places = [math.sqrt(band.first * band.last) for band in bands]
        low, high = ([band.probability + sign * band.error for band in bands] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=colour, alpha=0.1 if without else 0.2, linewidth=0)
        means, style = [band.probability for band in bands], "--" if without else "-"
        axes.plot(places, means, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=without or label)
    axes.set_ylim(0, 1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _legend(figure)
    return _svg(figure, "positions", "The base's mean probability of a token, by its position in the text")


def highest_plot(highest: Sequence[float], threshold: float | None) -> str:
    """Number of drafts by the highest confidence that each reaches, and the threshold, if there is one for it."""
    figure, axes = _axes(3, "highest confidence of a draft", "drafts")
    axes.hist(highest, bins=[number / 20 for number in range(21)], color=LIGHT["pilot"], edgecolor=LIGHT["page"])
    if threshold is not None:
        axes.axvline(threshold, color=LIGHT["text"], linestyle="--", label=f"threshold {threshold:g}")
    axes.set_xlim(0, 1)
    axes.locator_params(axis="y", integer=True)
    _legend(figure)
    return _svg(figure, "highest", "Number of drafts by the highest confidence that each reaches")


def confidence_plot(drafts: Sequence[Sequence[float]], switches: Sequence[int | None], threshold: float | None) -> str:
    """Confidence along some drafts, from the first full window on.

    Args:
        drafts: confidence at each token, NaN where there is none.
        switches: switch index of each draft, which gets a dot.
        threshold: of the confidence, if there is one.
    """
    figure, axes = _axes(3.4, "position in the draft", "confidence")
    for confidences in drafts:
        axes.plot(range(1, len(confidences) + 1), confidences, color=LIGHT["pilot"], linewidth=1.2, alpha=0.7)
    found = [(index, draft[index - 1]) for draft, index in zip(drafts, switches, strict=True) if index is not None]
    if found:
        axes.plot(*zip(*found, strict=True), "o", color=LIGHT["base"], clip_on=False, zorder=3, label="the base takes over")
    if threshold is not None:
        axes.axhline(threshold, color=LIGHT["text"], linestyle="--", label=f"threshold {threshold:g}")
    axes.set_ylim(0, 1)
    _legend(figure)
    return _svg(figure, "confidence", f"Confidence along {len(drafts)} drafts")


def _axes(height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with empty axes, in the page's colours."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise WSDValueError('the plots need matplotlib: pip install "wsd_hf[diagnose]"') from None
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.set_xlabel(x, color=LIGHT["text"], fontsize=11)
    axes.set_ylabel(y, color=LIGHT["text"], fontsize=11)
    axes.tick_params(colors=LIGHT["muted"], labelsize=10)
    axes.grid(color=LIGHT["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["muted"])
    return figure, axes


def _legend(figure: Figure) -> None:
    """A legend above the axes, where it hides no mark."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10, labelcolor=LIGHT["text"])


def _svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an SVG element as wide as its place; texts stay texts, and ids begin with `name`."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
    drawn = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", file.getvalue())
    for colour, value in LIGHT.items():
        drawn = drawn.replace(value, f"var(--{colour})")
    _, size, content = re.split(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', drawn, maxsplit=1)
    return f'<svg role="img" aria-label="{html_text(description)}" {size}>' + content.replace("xlink:href", "href")
