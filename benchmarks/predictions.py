"""Predicted costs beside measured ones: the forwards and the time of each token, by method.

    python benchmarks/predictions.py                                    # the shipped pair and its questions
    python benchmarks/predictions.py --base DIR --pilot DIR --prompts FILE.jsonl --tokens 48
    python benchmarks/predictions.py --base DIR --pilot DIR --prompts FILE.jsonl --compared DIR

Predictions are made from a diagnosis of the pair; measured is what `wsd-hf compare` counts. Its folder is read if it is given
(of greedy answers, one at a time, to the same prompts, with as many tokens); else the prompts are answered here.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from turns import machine

from wsd_hf import Pair
from wsd_hf.comparison import Plan, open_answers
from wsd_hf.comparison.prompts import Record, read_prompts
from wsd_hf.comparison.replies import Bench
from wsd_hf.comparison.table import table_rows
from wsd_hf.comparison.variants import Variant, read_variants
from wsd_hf.diagnosis.diagnosis import diagnose
from wsd_hf.diagnosis.forwards import Prediction, costs, predict
from wsd_hf.diagnosis.paths import find_paths
from wsd_hf.text.urial import URIAL_PROMPT
from wsd_hf.tiny import demo_questions, polite_examples

UNTUNED = Path(__file__).parents[1] / "examples/tiny_world/pilot_untuned"

WSD = "wsd,wsd:threshold=.6,wsd:threshold=.5,wsd:window_size=3,wsd:switch_criteria=relative_confidence,two_way"
TWO_VOCABULARIES = f"base,pilot,urial,nudging,nudging:threshold=.8,{WSD}"
ONE_VOCABULARY = f"{TWO_VOCABULARIES},eft,product,ensemble,blend"

COLUMNS = ("base_forwards", "pilot_forwards", "reference_forwards", "pilot_share", "time")

Numbers = dict[str, float | None]
"""The columns of one method."""


def predictions(pair: Pair, records: list[Record], variants: list[Variant], tokens: int) -> list[Prediction]:
    """A diagnosis, and what follows from it."""
    chats = [record["messages"] for record in records]
    diagnosis = diagnose(pair, chats, max_draft_tokens=tokens)
    methods = {variant.name: variant.strategy for variant in variants}
    paths = [*tqdm(find_paths(pair, chats, diagnosis.drafts, tokens, methods), "paths", len(records))]
    return predict(methods, diagnosis.drafts, paths, costs(pair, diagnosis.drafts, diagnosis.own), tokens)


def answered(pair: Pair, records: list[Record], variants: list[Variant], tokens: int, shipped: bool) -> list[dict[str, Any]]:
    """The rows of a comparison that is made here."""
    bench, plan = Bench(pair, polite_examples() if shipped else URIAL_PROMPT, tokens), Plan(records, variants)
    with tempfile.TemporaryDirectory() as folder, open_answers(Path(folder), {}) as answers:
        plan.answer_all(bench, answers, lambda batches: tqdm(batches, "answers"), print)
        rows = table_rows(answers.lines.values(), [variant.name for variant in variants])
    return [row.to_dict() for row in rows]


def measured(row: dict[str, Any]) -> Numbers:
    """The columns of one row of a comparison, by token."""
    forwards = {name: row[name] / (row["length"] * row["answers"]) for name in COLUMNS[:3]}
    return {**forwards, "pilot_share": row["pilot_share"], "time": row["time_per_token"]}


def show(rows: dict[str, tuple[Numbers, Numbers]], console: Console) -> None:
    """The table: predicted, then measured."""
    table = Table("predicted / measured", *(name.replace("_", " ") for name in COLUMNS))
    for name, (predicted, found) in rows.items():
        cells = [[one[column] for one in (predicted, found)] for column in COLUMNS]
        table.add_row(name, *(" / ".join("-" if value is None else f"{value:.2f}" for value in cell) for cell in cells))
    console.print(table)


def main(
    base: Annotated[Path | None, typer.Option(help="Folder of the base. Default: the shipped pair.")] = None,
    pilot: Annotated[str, typer.Option(help="Folder of the pilot; or one of the shipped pair.")] = "pilot",
    prompts: Annotated[Path | None, typer.Option(help='Lines of {"prompt": ...}. Default: the shipped questions.')] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 96,
    strategies: Annotated[str | None, typer.Option(help="As for wsd-hf compare. Default: all that can be predicted.")] = None,
    compared: Annotated[Path | None, typer.Option(help="Folder of a wsd-hf compare, whose methods are predicted.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON there.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
) -> None:
    """Predicts, and answers or reads the answers."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    one_vocabulary = base is None and pilot == "pilot"
    pair = Pair.from_pretrained(base, pilot) if base else Pair.tiny(pilot, reference=UNTUNED if one_vocabulary else None)
    records = (read_prompts(prompts) if prompts else demo_questions())[:limit]
    table = json.loads((compared / "table.json").read_text("utf-8"))["strategies"] if compared else None
    names = strategies or (ONE_VOCABULARY if one_vocabulary else TWO_VOCABULARIES)
    variants = read_variants(",".join(row["strategy"] for row in table) if table else names, {})
    found = predictions(pair, records, variants, tokens)
    table = table or answered(pair, records, variants, tokens, shipped=base is None)
    rows = {one.method: (asdict(one), measured(row)) for one, row in zip(found, table, strict=True)}
    show(rows, Console(width=150))
    if out:
        both = [{"method": name, "predicted": one, "measured": other} for name, (one, other) in rows.items()]
        results = {**machine("cpu", threads), "prompts": len(records), "tokens": tokens, "rows": both}
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
