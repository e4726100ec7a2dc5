"""Plots of a diagnosis: SVG elements in the colours of the page that they are on, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import WSDValueError
from ..pages.style import LIGHT
from ..text.visible import html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches; at 72 points each, the numbers on an axis are as large as small print on the narrowest phones."""


@dataclass(frozen=True)
class Curve:
    """A mean at each of some positions.

    Attributes:
        name: in the legend.
        writer: of the text, which gives the colour.
        positions: counted from 1.
        means: of the base's probabilities there.
        errors: standard errors of the means.
        dashed: for the second curve of a writer.
    """

    name: str
    writer: Literal["pilot", "base"]
    positions: Sequence[float]
    means: Sequence[float]
    errors: Sequence[float]
    dashed: bool = False


def positions_plot(curves: Sequence[Curve]) -> str:
    """The base's mean probability of a token by the token's position, each curve in a band of one standard error."""
    figure, axes = _axes(3.4, "position in the text", "the base's probability")
    for curve in curves:
        low, high = ([m + sign * e for m, e in zip(curve.means, curve.errors, strict=True)] for sign in (-1, 1))
        colour, style = LIGHT[curve.writer], "--" if curve.dashed else "-"
        axes.fill_between(curve.positions, low, high, color=colour, alpha=0.1 if curve.dashed else 0.2, linewidth=0)
        axes.plot(curve.positions, curve.means, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=curve.name)
    axes.set_ylim(0, 1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _legend(figure)
    return _svg(figure, "positions", "The base's mean probability of a token, by its position in the text")


def highest_plot(highest: Sequence[float], threshold: float, measure: str) -> str:
    """How many drafts reach which highest confidence; those right of the threshold switch."""
    figure, axes = _axes(3, f"highest {measure} of a draft", "drafts")
    axes.hist(highest, bins=[number / 20 for number in range(21)], color=LIGHT["pilot"], edgecolor=LIGHT["page"])
    axes.axvline(threshold, color=LIGHT["text"], linestyle="--", label=f"threshold {threshold:g}")
    axes.set_xlim(0, 1)
    axes.locator_params(axis="y", integer=True)
    _legend(figure)
    return _svg(figure, "highest", f"Number of drafts by the highest {measure} that each reaches")


def confidence_plot(drafts: Sequence[Sequence[float]], switches: Sequence[int | None], threshold: float, measure: str) -> str:
    """Confidence along some drafts, from each one's first full window on, with a dot where the base takes over."""
    figure, axes = _axes(3.4, "position in the draft", measure)
    for confidences in drafts:
        axes.plot(range(1, len(confidences) + 1), confidences, color=LIGHT["pilot"], linewidth=1.2, alpha=0.7)
    found = [(k, confidences[k - 1]) for confidences, k in zip(drafts, switches, strict=True) if k is not None]
    axes.plot([k for k, _ in found], [value for _, value in found], "o", color=LIGHT["base"], label="switch")
    axes.axhline(threshold, color=LIGHT["text"], linestyle="--", label=f"threshold {threshold:g}")
    axes.set_ylim(0, 1)
    _legend(figure)
    return _svg(figure, "confidence", f"{measure.capitalize()} along {len(drafts)} drafts")


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
