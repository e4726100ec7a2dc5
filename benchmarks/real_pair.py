"""A real base and a real pilot: the cost of a token with the base alone, the pilot alone, nudging and Weak-to-Strong Decoding.

    python benchmarks/real_pair.py FOLDER                          # FOLDER/base and FOLDER/pilot
    python benchmarks/real_pair.py --base DIR --pilot DIR

Chats are rendered for each model as the package does it, and answered greedily at default settings. All ways answer one prompt
after the other before the next prompt's turn. A ratio is a way's time per token in the base's for the same prompt and turn; the
table has the median over prompts and turns, the least and the most. Answers differ in length, so their totals don't compare.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from turns import Spread, Turns, Way, machine

from wsd_hf import Pair
from wsd_hf.comparison.methods import METHODS
from wsd_hf.comparison.replies import Bench

PROMPTS = (
    "Name three fruits that grow on trees.",
    "Why is the sky blue?",
    "Write a short note to thank a neighbour for watering my plants.",
    "What is the difference between a lake and a river?",
    "Give me a recipe for tomato soup in a few sentences.",
    "How do I calm down before an exam?",
    "Explain in simple words how a bicycle stays upright.",
    "Which season comes after winter, and what changes in it?",
    "Write a Python function that adds up the even numbers of a list.",
    "What should I pack for two days in the mountains?",
    "Tell a very short story about a lost key.",
    "How can I write a polite reminder about an unpaid bill?",
)

WAYS = ("base", "pilot", "nudging", "wsd")


@dataclass
class Measurement:
    """One way of answering; means are over tokens or answers of all prompts."""

    method: str
    ms_per_token: float
    to_base: Spread
    tokens: int
    base_forwards: float
    pilot_forwards: float
    by_pilot: float | None = None
    """Share of tokens that the pilot wrote."""
    agreement: float | None = None
    """Share of these that the base would have written itself at their places."""
    switched: float | None = None
    """Share of answers in which the base took over."""
    base_ms: float | None = None
    pilot_ms: float | None = None
    """Time of a forward on the fast path."""


def ways_for(bench: Bench, prompt: str, turns: int) -> list[Way]:
    """Every way of answering one prompt."""
    messages, pair, limit = [{"role": "user", "content": prompt}], bench.pair, bench.max_new_tokens
    inputs = {name: METHODS[name].prompt(bench, [messages]) for name in WAYS}
    pilots = {name.removeprefix("assistant_"): value for name, value in inputs["pilot"].items()}
    single = {"max_new_tokens": limit, "do_sample": False, "return_dict_in_generate": True}
    runs = {
        "base": lambda: pair.base.generate(**inputs["base"], **single),
        "pilot": lambda: pair.pilot.generate(**pilots, **single),
        **{
            name: lambda name=name: pair.generate(
                transformers.BatchEncoding(inputs[name]), name, max_new_tokens=limit, do_sample=False
            )
            for name in ("nudging", "wsd")
        },
    }
    return [Way(name, run, turns, hooked=name in ("base", "pilot")) for name, run in runs.items()]


def length(way: Way) -> int:
    """Number of tokens of an answer: its forwards, where one model alone answered."""
    output = way.output
    return output.written_by_pilot.shape[1] if hasattr(output, "written_by_pilot") else sum(way.forwards)


@torch.no_grad()
def agreement(pair: Pair, output: Any) -> tuple[int, int]:
    """Number of the pilot's tokens that the base would have written, and of all of them."""
    written = output.written_by_pilot[0]
    logits = pair.base(output.sequences, logits_to_keep=len(written) + 1).logits[0, :-1]
    same = logits.argmax(dim=-1) == output.sequences[0, output.prompt_length :]
    return int((same & written).sum()), int(written.sum())


def measurement(pair: Pair, answers: list[dict[str, Way]], name: str) -> Measurement:
    """One way's numbers over all prompts."""
    ways = [answer[name] for answer in answers]
    lengths = {method: [length(answer[method]) for answer in answers] for method in (name, "base")}
    written = sum(lengths[name])
    pairs = zip(ways, answers, lengths[name], lengths["base"], strict=True)
    found = [
        (own / mine) / (theirs / base)
        for way, answer, mine, base in pairs
        for own, theirs in zip(way.seconds, answer["base"].seconds, strict=True)
    ]
    seconds = sum(statistics.median(way.seconds) for way in ways)
    base, pilot = (sum(way.forwards[place] for way in ways) for place in (0, 1))
    row = Measurement(
        name,
        1000 * seconds / written,
        Spread(statistics.median(found), min(found), max(found)),
        written,
        base / written,
        pilot / written,
    )
    if name in ("nudging", "wsd"):
        row.by_pilot = sum(int(way.output.written_by_pilot.sum()) for way in ways) / written
        same = [agreement(pair, way.output) for way in ways]
        row.agreement = sum(kept for kept, _ in same) / max(1, sum(every for _, every in same))
        spent = {role: sum(statistics.median(run[role] for run in way.spent) for way in ways) for role in ("base", "pilot")}
        row.base_ms, row.pilot_ms = 1000 * spent["base"] / max(1, base), 1000 * spent["pilot"] / max(1, pilot)
    if name == "wsd":
        row.switched = sum(int(way.output.switch_index[0]) >= 0 for way in ways) / len(ways)
    return row


def show(rows: list[Measurement], console: Console) -> None:
    """The table, and the parts of a token's time with WSD."""
    table = Table("", "ms / token", "to base", "base forwards", "pilot forwards", "by the pilot", "agreement", "switched")
    for row in rows:
        shares = ("" if share is None else f"{share:.2f}" for share in (row.by_pilot, row.agreement, row.switched))
        forwards = f"{row.base_forwards:.2f}", f"{row.pilot_forwards:.2f}"
        table.add_row(row.method, f"{row.ms_per_token:.1f}", str(row.to_base), *forwards, *shares)
    console.print(table)
    alone, pilot = rows[0].ms_per_token, rows[1].ms_per_token
    for row in rows:
        if row.base_ms is None or row.pilot_ms is None:
            continue
        total, check, draft = row.ms_per_token / alone, row.base_ms / alone, row.pilot_ms / alone
        checks, drafts = row.base_forwards * check, row.pilot_forwards * draft
        console.print(
            f"A token of {row.method} costs {total:.2f} of the base's: {checks:.2f} for {row.base_forwards:.2f} forwards "
            f"at {check:.2f}, {drafts:.2f} for {row.pilot_forwards:.2f} of the pilot's at {draft:.2f} (alone it takes "
            f"{pilot / alone:.2f} for a token), {total - checks - drafts:.2f} outside of forwards."
        )


def main(
    folder: Annotated[Path | None, typer.Argument(help="Folder that holds both models, as base/ and pilot/.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base.")] = None,
    pilot: Annotated[Path | None, typer.Option(help="Folder of the pilot.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    turns: Annotated[int, typer.Option(help="Turns of each prompt.")] = 3,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = len(PROMPTS),
    device: Annotated[str, typer.Option(help="Of both models.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write JSON there.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Answers the prompts in every way."""
    if folder is None and (base is None or pilot is None):
        raise typer.BadParameter("give a folder that holds base/ and pilot/, or both --base and --pilot")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pair = Pair.from_pretrained(
        base or folder / "base", pilot or folder / "pilot", device_map=None if device == "cpu" else device
    )
    bench = Bench(pair, [], tokens)
    taking = Turns(pair.base, pair.pilot)
    answers = []
    for prompt in PROMPTS[:prompts]:
        ways = ways_for(bench, prompt, turns)
        for _ in taking.take(ways):
            pass
        answers.append({way.name: way for way in ways})
    rows = [measurement(pair, answers, name) for name in WAYS]
    show(rows, Console(width=150))
    if out:
        models = {"base": pair.base.config.model_type, "pilot": pair.pilot.config.model_type}
        results = {**machine(device, threads), "models": models, "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    typer.run(main)
