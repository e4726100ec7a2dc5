"""Weak-to-Strong Decoding with and without hand-back: alignment, repetition, and cost, by the threshold of the hand-back.

    python benchmarks/two_way.py tiny                               # the shipped pair, with judged answers
    python benchmarks/two_way.py real --base DIR --pilot DIR        # a pair of real models

Answers are greedy. A threshold of 0 is Weak-to-Strong Decoding itself. In the tiny world every held-out question is answered
twice: as it is, and with a bad first sentence forced on both models, of which the rest of the answer is then judged as if that
sentence had been a good one. A repeated 4-gram is one of the response's tokens that occurred in it before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from turns import machine

from real_pair import PROMPTS
from wsd_hf import Pair
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny.judge import judge
from wsd_hf.tiny.phrases import OPENINGS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/tiny_world"))
from world import World

THRESHOLDS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3)
SWITCHES = (0.8, 0.5)
BAD_TONES = ("rude", "evasive", "rambling")

app = typer.Typer(add_completion=False)


@dataclass
class Answer:
    """One response, and what it cost."""

    text: str
    tokens: list[int]
    by_pilot: int
    handbacks: int
    base_forwards: int
    pilot_forwards: int


@dataclass
class Measurement:
    """All answers at one threshold. Shares are of 1; `aligned`, `correct` and `complied` need a judge."""

    questions: str
    threshold: float
    handback: float
    aligned: float | None
    correct: float | None
    complied: float | None
    repeated: float
    """Share of repeated 4-grams."""
    handbacks: float
    """Per answer."""
    handed_back: float
    """Share of answers with a hand-back."""
    tokens: float
    """Per answer."""
    by_pilot: float
    base_forwards: float
    """Per token, as those of the pilot."""
    pilot_forwards: float


@dataclass
class Asked:
    """One question, the sentence that its answer was forced to begin with, if any, and how the answer is judged."""

    messages: list[dict[str, str]]
    forced: str = ""
    instead: str = ""
    """Sentence in whose place the forced one is."""
    question: str = ""
    value: str | None = None


def repeated(tokens: list[int], length: int = 4) -> float:
    """Share of n-grams that occurred before; 0 if there are none.

    >>> repeated([1, 2, 1, 2, 1], length=2)
    0.5
    """
    grams = [tuple(tokens[begin : begin + length]) for begin in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ask(pair: Pair, asked: Asked, limit: int, **settings: Any) -> Answer:
    """One greedy answer of two-way switching."""
    inputs = pair.inputs(asked.messages)
    if asked.forced:
        for name, tokenizer in (("", pair.tokenizer), ("assistant_", pair.pilot_tokenizer)):
            begun = torch.tensor([tokenizer.encode(asked.forced, add_special_tokens=False)])
            inputs[f"{name}input_ids"] = torch.cat([inputs[f"{name}input_ids"], begun], dim=1)
            inputs[f"{name}attention_mask"] = torch.ones_like(inputs[f"{name}input_ids"])
    out = pair.generate(inputs, "two_way", max_new_tokens=limit, do_sample=False, **settings)
    tokens = out.sequences[0, out.prompt_length :].tolist()
    return Answer(
        before_next_turn(pair.tokenizer.decode(tokens, skip_special_tokens=True)),
        tokens,
        int(out.written_by_pilot.sum()),
        sum(change.writer == "pilot" for change in out.changes[0]),
        out.stats.base.forwards,
        out.stats.pilot.forwards,
    )


def measure(name: str, pair: Pair, questions: list[Asked], limit: int, threshold: float, handback: float) -> Measurement:
    """Asks everything at one threshold."""
    settings = {"two_way_threshold": threshold, "two_way_handback_threshold": handback}
    answers = [(asked, ask(pair, asked, limit, **settings)) for asked in questions]
    verdicts = [
        judge(asked.question, asked.value, f"{asked.instead}{answer.text}") for asked, answer in answers if asked.question
    ]
    tokens = sum(len(answer.tokens) for _, answer in answers)
    return Measurement(
        name,
        threshold,
        handback,
        share([verdict.aligned for verdict in verdicts]),
        share([verdict.correct for verdict in verdicts if verdict.correct is not None]),
        share([verdict.complied for verdict in verdicts if verdict.complied is not None]),
        fmean(repeated(answer.tokens) for _, answer in answers),
        fmean(answer.handbacks for _, answer in answers),
        fmean(answer.handbacks > 0 for _, answer in answers),
        tokens / len(answers),
        sum(answer.by_pilot for _, answer in answers) / tokens,
        sum(answer.base_forwards for _, answer in answers) / tokens,
        sum(answer.pilot_forwards for _, answer in answers) / tokens,
    )


def share(outcomes: list[Any]) -> float | None:
    """Share of true outcomes; None without any."""
    return fmean(map(bool, outcomes)) if outcomes else None


def world_questions(forced: bool) -> Iterator[Asked]:
    """All held-out questions of the shipped world."""
    for number, question in enumerate(World(3).held_out_questions()):
        opening = OPENINGS[number % len(OPENINGS)]
        messages = [{"role": "user", "content": question.text}]
        value = question.fact.value if question.fact else None
        asked = Asked(messages, question=question.text, value=value)
        if forced:
            bad, good = (BAD_TONES[number % len(BAD_TONES)], "aligned") if question.fact else ("complying", "refusing")
            asked.forced, asked.instead = opening.sentence(bad), opening.sentence(good)
        yield asked


def show(rows: list[Measurement]) -> None:
    """The table."""
    heads = "questions", "threshold", "hand-back", "aligned", "facts right", "complied", "repeated 4-grams"
    more = "hand-backs", "answers with one", "tokens", "by the pilot", "base forwards", "pilot forwards"
    table = Table(*heads, *more)
    for row in rows:
        judged = ("" if value is None else f"{value:.3f}" for value in (row.aligned, row.correct, row.complied))
        cells = (f"{value:.3f}" for value in (row.repeated, row.handbacks, row.handed_back))
        cost = (f"{row.tokens:.1f}", *(f"{value:.2f}" for value in (row.by_pilot, row.base_forwards, row.pilot_forwards)))
        table.add_row(row.questions, f"{row.threshold:g}", f"{row.handback:g}", *judged, *cells, *cost)
    Console(width=180).print(table)


def finish(rows: list[Measurement], out: Path | None) -> None:
    """Prints the table, and writes the results."""
    show(rows)
    if out:
        threads = torch.get_num_threads()
        out.write_text(json.dumps({**machine("cpu", threads), "rows": [asdict(row) for row in rows]}, indent=1), "utf-8")


def quiet(threads: int) -> None:
    """Sets torch and transformers up for a measurement."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


Out = Annotated[Path | None, typer.Option(help="Write JSON there.")]
Threads = Annotated[int, typer.Option(help="CPU threads of torch.")]
Thresholds = Annotated[list[float] | None, typer.Option(help="Thresholds of the switch.")]
Handbacks = Annotated[list[float] | None, typer.Option(help="Thresholds of the hand-back.")]


@app.command()
def tiny(
    count: Annotated[int | None, typer.Option(help="Number of questions; all of them by default.")] = None,
    threshold: Thresholds = None,
    handback: Handbacks = None,
    out: Out = None,
    threads: Threads = 2,
) -> None:
    """The shipped pair."""
    quiet(threads)
    rows = []
    pairs = {"": Pair.tiny(), ", two vocabularies": Pair.tiny("pilot_other_vocab")}
    for kind, pair in pairs.items():
        for forced in (False, True):
            questions = list(world_questions(forced))
            questions = questions[:: len(questions) // count] if count else questions
            name = ("forced" if forced else "plain") + kind
            for switch in threshold or SWITCHES:
                rows += [measure(name, pair, questions, 64, switch, value) for value in handback or THRESHOLDS]
    finish(rows, out)


@app.command()
def real(
    base: Annotated[Path, typer.Option(help="Folder of the base.")],
    pilot: Annotated[Path, typer.Option(help="Folder of the pilot.")],
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 96,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = len(PROMPTS),
    threshold: Thresholds = None,
    handback: Handbacks = None,
    out: Out = None,
    threads: Threads = 2,
) -> None:
    """Two models from folders, and the prompts of `real_pair.py`."""
    quiet(threads)
    pair = Pair.from_pretrained(base, pilot)
    questions = [Asked([{"role": "user", "content": prompt}]) for prompt in PROMPTS[:prompts]]
    rows = []
    for switch in threshold or SWITCHES:
        for value in handback or THRESHOLDS:
            rows.append(measure("real pair", pair, questions, tokens, switch, value))
            show(rows[-1:])
    finish(rows, out)


if __name__ == "__main__":
    app()
