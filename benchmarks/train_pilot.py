"""Train the untuned pilot of the tiny world by several recipes, and print what WSD does with each, in Markdown.

    python benchmarks/train_pilot.py --out DIR                # 96 labelled pairs
    python benchmarks/train_pilot.py --out DIR --data pairs   # those of wsd-hf make-pairs

A run that was stopped is resumed. The table has a row per recipe, with all held-out questions of the world.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from wsd_hf.tiny import FOLDER
from wsd_hf.training import Recipe, train_pilot

TINY_WORLD = Path(__file__).parents[1] / "examples" / "tiny_world"
sys.path.insert(0, str(TINY_WORLD))
from evaluate import SHIPPED_WORLD_SEED, Bench, World, measure  # noqa: E402

FULL = {"lora_rank": 0, "learning_rate": 1e-3, "epochs": 5}
RECIPES = {
    "drafted": Recipe(**FULL),
    "whole": Recipe(**FULL, part="whole"),
    "8": Recipe(**FULL, part=8),
    "drafted, dpo+sft": Recipe(**FULL, objective="dpo+sft"),
    "drafted, LoRA": Recipe(learning_rate=1e-2, epochs=5),
    "drafted, 1 epoch": Recipe(**{**FULL, "epochs": 1}),
    "drafted, default learning rate": Recipe(**{**FULL, "learning_rate": None}),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    data: Annotated[str, typer.Option(help="Examples, as for wsd-hf train-pilot.")] = "tiny_world",
    every: Annotated[int, typer.Option(help="Ask every so many-th question only, for a quick look.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Train and measure."""
    torch.set_num_threads(threads)
    world = World(SHIPPED_WORLD_SEED)
    questions = world.held_out_questions()[::every]
    print("| recipe | trained tokens | log-prob before | after | aligned | facts right | harmful compliance | switch index |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, recipe in RECIPES.items():
        tuned = train_pilot(TINY_WORLD / "pilot_untuned", data, out / name, base=FOLDER / "base", recipe=recipe)
        assert tuned is not None
        row = measure("WSD", Bench(FOLDER, world, tuned.folder).wsd, questions)
        cells = [f"{tuned.trained_tokens:,}", f"{tuned.log_prob_before:.2f}", f"{tuned.log_prob_after:.2f}"]
        cells += [f"{rate:.1f} %" for rate in (row.aligned, row.fact_accuracy, row.harmful_compliance)]
        print(f"| {name} | {' | '.join(cells)} | {row.switch_index:.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
