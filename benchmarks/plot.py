"""Draws where the time of a token goes, from the results of `decode.py`.

pip install -e '.[bench]'
python benchmarks/plot.py benchmarks/results/cpu.json docs/images/cpu.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib import pyplot as plt

PARTS = {"base": "#92c5de", "pilot": "#f4a582", "everything else": "#bbbbbb"}


def shares(row: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    """Time of a token in forwards of the base, in forwards of the pilot, and outside of both; 1 is plain decoding."""
    base, pilot = row["base_ms_per_token"], row["pilot_ms_per_token"]
    return [part / plain["ms_per_token"] for part in (base, pilot, row["ms_per_token"] - base - pilot)]


def main(
    results: Annotated[Path, typer.Argument(help="JSON of decode.py.")],
    picture: Annotated[Path, typer.Argument(help="SVG to write.")],
) -> None:
    """One bar for each setting; the line is plain decoding with the base alone."""
    matplotlib.rcParams["svg.hashsalt"] = "wsd_hf"  # the same picture from the same results
    rows = json.loads(results.read_text("utf-8"))["rows"]
    plain = {(row["batch"], row["prompt"]): row for row in rows if row["method"] == "plain"}
    fast = {
        (row["agreement"], row["batch"], row["prompt"]): row
        for row in rows
        if row["method"] == "WSD fast" and row["ms_per_token"]
    }
    groups = sorted({setting[1:] for setting in fast})
    figure, axes = plt.subplots(1, len(groups), figsize=(2 * len(groups), 3.2), sharey=True, layout="constrained")
    for axis, (batch, prompt) in zip(axes, groups, strict=True):
        settings = sorted(setting for setting in fast if setting[1:] == (batch, prompt))
        heights = [shares(fast[setting], plain[batch, prompt]) for setting in settings]
        bottom = [0.0] * len(settings)
        for part, (name, colour) in enumerate(PARTS.items()):
            values = [height[part] for height in heights]
            axis.bar([f"{setting[0]:g}" for setting in settings], values, bottom=bottom, color=colour, label=name)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"batch {batch}, prompt {prompt}", fontsize=9)
        axis.set_xlabel("agreement", fontsize=9)
    axes[0].set_ylabel("time of a token, plain = 1")
    axes[-1].legend(fontsize=7, loc="upper right")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
