"""Draws latencies and queues of the simulated fleets, from the results of `fleet.py`, and its assumptions below them.

pip install -e '.[bench]'
python benchmarks/plot_fleet.py benchmarks/results/fleet.json docs/images/fleet.svg
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, StrMethodFormatter

PANELS = {
    "first token, median, ms": "first token, 50 %",
    "answer, 95 % of them, ms": "answer, 95 %",
    "requests that wait at a base": "base, waiting",
    "requests that wait at a pilot": "pilot, waiting",
}


def main(
    results: Annotated[Path, typer.Argument(help="JSON of fleet.py.")],
    picture: Annotated[Path, typer.Argument(help="SVG to write.")],
) -> None:
    """One row of panels for each length of prompts, one line for each fleet."""
    matplotlib.rcParams.update({"svg.hashsalt": "wsd_hf", "svg.fonttype": "none"})  # the same picture from the same results
    found = json.loads(results.read_text("utf-8"))
    rows = found["curves"]
    prompts = sorted({row["prompt"] for row in rows})
    size = (3 * len(PANELS), 3 * len(prompts) + 1.6)
    figure, grid = plt.subplots(len(prompts), len(PANELS), figsize=size, sharex="row", squeeze=False)
    for prompt, axes in zip(prompts, grid, strict=True):
        for axis, (title, measure) in zip(axes, PANELS.items(), strict=True):
            for fleet in dict.fromkeys(row["fleet"] for row in rows):
                line = [(row["load"], row[measure]) for row in rows if (row["fleet"], row["prompt"]) == (fleet, prompt)]
                axis.plot(*zip(*line, strict=True), label=fleet, linewidth=1.2, marker=".", markersize=3)
            axis.set_title(f"prompts of {prompt:,} tokens: {title}", fontsize=7)
            axis.set_yscale("log" if title.endswith("ms") else "symlog")
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=7)
    for axis in grid[-1]:
        axis.set_xlabel("requests per second for each base", fontsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=5, frameon=False)
    lines = [line for text in found["assumptions"] for line in textwrap.wrap(f"- {text}", 190, subsequent_indent="  ")]
    figure.text(0.02, 0.01, "\n".join(lines), fontsize=7, va="bottom")
    figure.tight_layout(rect=(0, 0.02 * len(lines), 1, 0.95))
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
