"""Texts that repeat their prompt, with a pilot that never agrees: what the second proposer, the n-grams, saves.

    python benchmarks/repeats.py

The models of decode.py, whose embeddings and heads are set so that the base writes out a document that its prompt holds, as
where code is edited: at some places the prompt has another token than the response. The pilot has the wrong token everywhere.
All ways of one setting take turns (turns.py), and times are ratios to plain decoding in the same turn. Forwards don't depend on
the machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from models import PRESETS, After, Pair
from rich.console import Console
from rich.table import Table
from turns import Spread, Turns, Way, machine, ratios

EDITS = (0.0, 0.05, 0.2, 1.0)
"""Share of the document's tokens that differ in the prompt; with all of them, nothing repeats."""

DOCUMENT = 240
"""Its length in tokens, at most half the vocabulary."""

PLAIN, LOOKUP, SPECULATE = "plain", "prompt lookup of transformers", ("pilot", "auto", "ngram")


@dataclass
class Measurement:
    """One way of decoding in one setting."""

    method: str
    edits: float
    batch: int
    to_plain: Spread | None
    base_forwards: float
    pilot_forwards: float
    """Forwards for each token of a response."""
    error: str | None


class Document:
    """Prompts with a document in which some tokens are wrong, and the models' weights that write the right ones.

    Even ids are tokens of the document; the id after each is its wrong form, and is followed by the same token.
    """

    def __init__(self, pair: Pair, batch: int, edits: float) -> None:
        shape, device = pair.shape, pair.shape.device
        generator = torch.Generator().manual_seed(3)
        tokens = 2 * torch.randperm(shape.vocabulary // 2, generator=generator)[:DOCUMENT].to(device)
        pair.write(tokens, tokens.roll(-1))
        wrong = torch.rand(batch, len(tokens) - 1, generator=generator).to(device) < edits
        self.pair, self.length = pair, shape.new_tokens
        self.input_ids = torch.cat([tokens[:-1] + wrong.long(), tokens[-1:].expand(batch, 1)], dim=1)

    def plain(self, **kwargs: Any) -> Any:
        """The base alone."""
        mask = torch.ones_like(self.input_ids)
        settings = {"attention_mask": mask, "max_new_tokens": self.length, "do_sample": False}
        return self.pair.base.generate(self.input_ids, **settings, **kwargs)

    def wsd(self, speculate: str) -> Any:
        """Weak-to-Strong Decoding; the base takes over after one token, a wrong form."""
        settings = {"strategy": "wsd", "switch_criteria": After(1), "wsd_speculate": speculate}
        return self.plain(assistant_model=self.pair.pilot, return_dict_in_generate=True, **settings)


def ways(document: Document, turns: int) -> list[Way]:
    """Plain decoding, prompt lookup of transformers for one row, and WSD with each proposer."""
    found = [Way(PLAIN, document.plain, turns)]
    if len(document.input_ids) == 1:
        found.append(Way(LOOKUP, lambda: document.plain(prompt_lookup_num_tokens=10), turns))
    return found + [Way(name, lambda name=name: document.wsd(name), turns, hooked=False) for name in SPECULATE]


def main(
    preset: Annotated[str, typer.Option(help="Shapes of decode.py: cpu, gpu or gpu-tiny.")] = "cpu",
    turns: Annotated[int, typer.Option(help="Turns of each way.")] = 3,
    batches: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,4",
    out: Annotated[Path | None, typer.Option(help="Write JSON there.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Measures every setting."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    pair = Pair(PRESETS[preset])
    taking = Turns(pair.base, pair.pilot)
    table = Table("batch", "edits", "proposer", "to plain", "base forwards per token", "pilot forwards per token")
    rows: list[Measurement] = []
    for batch in map(int, batches.split(",")):
        for edits in EDITS:
            run = ways(Document(pair, batch, edits), turns)
            for _ in taking.take(run):
                pass
            for way in run:
                forwards = [count / pair.shape.new_tokens for count in way.forwards]
                rows.append(Measurement(way.name, edits, batch, ratios(way, run[0]), *forwards, way.error))
                counts = (f"{count:.2f}" for count in forwards)
                table.add_row(str(batch), f"{edits:.0%}", way.name, str(rows[-1].to_plain or way.error), *counts)
    Console(width=120).print(table)
    if out:
        results = {**machine(pair.shape.device, threads), "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    typer.run(main)
