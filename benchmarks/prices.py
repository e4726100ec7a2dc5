"""Prices of forwards, from which the constants of `wsd_hf.speculation.pace` are taken.

python benchmarks/prices.py                              # the pair of decode.py
python benchmarks/prices.py --base DIR --pilot DIR       # a real one

Each forward is fed q tokens in each of B rows whose caches hold W tokens, through the fast path's own streams. All numbers of
tokens take turns, so that they meet the same machine. The table has medians, in milliseconds and in one-token forwards of the
base.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from models import PRESETS, build
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from wsd_hf.engine.streams import open_stream

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17)


@torch.no_grad()
def prices(model: PreTrainedModel, rows: int, width: int, turns: int) -> dict[int, float]:
    """Milliseconds of forwards that feed some numbers of tokens to each row."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts = torch.randint(3, vocabulary, (rows, width)).tolist()
    seconds: dict[int, list[float]] = {count: [] for count in TOKENS}
    with open_stream(model, prompts, max(TOKENS), capturing=True) as stream:
        stream.logits(stream.block([stream.missing(row, []) for row in range(rows)]), keep=1)
        for turn, count in itertools.product(range(turns + 2), TOKENS):
            block = stream.block([[3] * count] * rows)
            synchronize(model)
            start = time.perf_counter()
            stream.logits(block, keep=count)
            synchronize(model)
            if turn >= 2:  # before, shapes are captured
                seconds[count].append(time.perf_counter() - start)
            for row in range(rows):
                stream.rewind(row, 0)
    return {count: 1000 * statistics.median(times) for count, times in seconds.items()}


def synchronize(model: PreTrainedModel) -> None:
    """Waits for the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main(
    base: Annotated[Path | None, typer.Option(help="Folder of a base.")] = None,
    pilot: Annotated[Path | None, typer.Option(help="Folder of a pilot.")] = None,
    preset: Annotated[str, typer.Option(help="Shapes of decode.py, where no folders are given.")] = "cpu",
    turns: Annotated[int, typer.Option(help="Forwards of each size.")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    batches: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,4,16",
    widths: Annotated[str, typer.Option(help="Tokens in the cache.")] = "64,1024",
) -> None:
    """Prints one line for each model, number of rows and width."""
    torch.set_num_threads(threads)
    shape = PRESETS[preset]
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder).eval() if folder else build(shape, layers, seed=0)
        for name, folder, layers in (("base", base, shape.base_layers), ("pilot", pilot, shape.pilot_layers))
    }
    table = Table("rows", "width", "model", *map(str, TOKENS))
    for rows, width in itertools.product(map(int, batches.split(",")), map(int, widths.split(","))):
        unit = 0.0
        for name, model in models.items():
            found = prices(model, rows, width, turns)
            unit = unit or found[1]
            cells = [f"{found[count]:.1f} ({found[count] / unit:.2f})" for count in TOKENS]
            table.add_row(str(rows), str(width), name, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
