"""The confidence of the base along a draft, as an SVG element in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..text.visible import html_text

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 30, 6, 14, 28

LEAST = 16
"""Fewest tokens that the horizontal axis has room for."""


def curve(
    log_probs: Sequence[float],
    confidences: Sequence[float],
    threshold: float,
    window_size: int,
    switch: int | None,
    description: str,
) -> str:
    """The plot: a bar for the probability of each token, a line for the confidence, and the threshold.

    Args:
        log_probs: the base's, of the drafted tokens.
        confidences: at each of them, NaN before the first full window.
        threshold: a line across the plot.
        window_size: tokens before the switch whose bars are marked.
        switch: switch index, which gets a dot; None: none.
        description: for readers who don't see it.
    """
    places = _ticks(max(len(log_probs), LEAST))
    step = (WIDTH - LEFT - RIGHT) / places[-1]

    def across(position: float) -> float:
        return LEFT + position * step

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(places, across, up)]
    marked = range(switch - window_size, switch) if switch else range(0)
    for place, log_prob in enumerate(log_probs):
        look = "marked" if place in marked else "faded" if switch is not None and place >= switch else "drafted"
        top = up(math.exp(log_prob))
        parts.append(
            f'<rect class="{look}" x="{across(place) + 0.15 * step:.1f}" y="{top:.1f}" '
            f'width="{0.7 * step:.1f}" height="{up(0) - top:.1f}"/>'
        )
    points = [(across(place + 0.5), up(value)) for place, value in enumerate(confidences) if not math.isnan(value)]
    if points:
        parts.append(f'<polyline class="confidence" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    if switch is not None:
        x, y = across(switch - 0.5), up(confidences[switch - 1])
        parts.append(f'<line class="switch" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{up(0):.1f}"/>')
        parts.append(f'<circle class="switch" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    y = up(threshold)
    parts.append(f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(
        f'<text class="threshold" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">threshold {threshold:g}</text>'
    )
    label = html_text(description)
    return f'<svg class="curve" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _axes(places: Sequence[int], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """Grid, numbers and the names of both axes."""
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if value in (0, 0.5, 1):
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for place in places[:-1]:
        parts.append(f'<text x="{across(place):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{place}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 17}" text-anchor="end">{places[-1]} tokens</text>')
    return "".join(parts)


def _ticks(most: int) -> list[int]:
    """Round numbers from 0 to the first that is at least `most`.

    >>> _ticks(23)
    [0, 5, 10, 15, 20, 25]
    """
    scale = 10 ** max(int(math.log10(most)) - 1, 0)
    step = next(factor * scale for factor in (1, 2, 5, 10, 20, 50, 100) if factor * scale * 5 >= most)
    return [step * number for number in range(math.ceil(most / step) + 1)]
