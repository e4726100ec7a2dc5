"""Ask the held-out questions of the tiny world, and print what base, pilot and WSD make of them.

    python examples/tiny_world/evaluate.py                                   # the shipped models
    python examples/tiny_world/evaluate.py --models A --models B --markdown  # the mean of several trainings
    python examples/tiny_world/evaluate.py --switch-rules                    # WSD by its switch rules
    python examples/tiny_world/evaluate.py --pilot FOLDER                    # the shipped base with another pilot

Questions are answered greedily, one at a time, so that forwards can be counted per answer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from world import Message, Question, World, judge

from wsd_hf import Pair, urial_messages
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny import FOLDER

MAX_NEW_TOKENS = 64
SHIPPED_WORLD_SEED = 3
CARD_HEADING = "Measured by `examples/tiny_world/evaluate.py` on this training's 210 held-out facts and 57 harmful requests:"


@dataclass(frozen=True)
class Answer:
    """One response, and what it cost; `switch_index` is None where there is no switch."""

    text: str
    tokens: int
    switch_index: int | None = None
    base_forwards: int = 0
    pilot_forwards: int = 0


@dataclass(frozen=True)
class Row:
    """One method's results: rates in percent, the switch index in tokens, forwards per token of the response."""

    method: str
    aligned: float
    fact_accuracy: float
    unknown_to_pilot: float
    harmful_compliance: float
    switch_index: float | None
    never_switched: float | None
    base_forwards: float
    pilot_forwards: float


Method = Callable[[list[Message]], Answer]

SWITCH_RULES: dict[str, dict[str, Any]] = {
    "confidence": {},
    "confidence, repeats ignored": {"wsd_ignore_repeats": True},
    "relative_confidence": {"switch_criteria": "relative_confidence"},
    "relative_confidence, window 6": {"switch_criteria": "relative_confidence", "wsd_window_size": 6},
    "entropy": {"switch_criteria": "entropy"},
    "agreement": {"switch_criteria": "agreement"},
}
"""Settings of WSD by which the base takes over."""


class Bench:
    """The models of one training, and the methods that answer with them."""

    def __init__(self, folder: Path, world: World, pilot: Path | None = None) -> None:
        self.world, self.only_pair = world, pilot is not None
        self.pair, self.other = (
            Pair.from_pretrained(folder / "base", pilot or folder / own, dtype=torch.float32)
            for own in ("pilot", "pilot_other_vocab")
        )

    def methods(self, ablations: bool, switch_rules: bool) -> Iterator[tuple[str, Method]]:
        """The rows of the table, by name."""
        if switch_rules:
            for name, settings in SWITCH_RULES.items():
                yield f"WSD, {name}", partial(self.wsd, **settings)
            return
        yield "base", self.base_alone
        yield "pilot", lambda messages: self.pilot_alone(messages, self.pair)
        if not self.only_pair:
            yield "pilot, other vocabulary", lambda m: self.pilot_alone(m, self.other)
            yield "base, in-context prompt", lambda m: self.base_alone(urial_messages(m, self.world.polite_examples()))
        yield "WSD", self.wsd
        if ablations:
            yield "WSD, threshold 0.5", lambda messages: self.wsd(messages, wsd_threshold=0.5)
            yield "WSD, window 1", lambda messages: self.wsd(messages, wsd_window_size=1)

    def base_alone(self, messages: list[Message]) -> Answer:
        """The base's own answer to its transcript prompt."""
        base, inputs = self.pair.base, self.pair.inputs(messages)
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "stopping_criteria")}
        with counted(base) as forwards:
            ids = base.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS)
        response = ids[0, prompt["input_ids"].shape[1] :]
        return Answer(text_of(response, self.pair.tokenizer), len(response), base_forwards=forwards[0])

    def pilot_alone(self, messages: list[Message], pair: Pair) -> Answer:
        """A pilot's answer to its chat prompt."""
        pilot, tokenizer = pair.pilot, pair.pilot_tokenizer
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with counted(pilot) as forwards:
            ids = pilot.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS)
        response = ids[0, prompt["input_ids"].shape[1] :]
        return Answer(text_of(response, tokenizer), len(response), pilot_forwards=forwards[0])

    def wsd(self, messages: list[Message], **config: Any) -> Answer:
        """Weak-to-Strong Decoding: the pilot begins, the base finishes."""
        with counted(self.pair.base, self.pair.pilot) as forwards:
            out = self.pair.generate(messages, max_new_tokens=MAX_NEW_TOKENS, **config)
        response = out.sequences[0, out.prompt_length :]
        switch_index = int(out.draft_length[0]) if out.switch_reason[0] == "confident" else None
        return Answer(text_of(response, self.pair.tokenizer), len(response), switch_index, *forwards)


@contextmanager
def counted(*models: PreTrainedModel) -> Iterator[list[int]]:
    """Count the forwards of each model while the block runs."""
    counts = [0] * len(models)

    def count(i: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[i] += 1

        return hook

    hooks = [model.register_forward_pre_hook(count(i)) for i, model in enumerate(models)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def text_of(response: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The response up to the next turn of the transcript."""
    return before_next_turn(tokenizer.decode(response, skip_special_tokens=True)).lstrip()


def measure(name: str, method: Method, questions: list[Question]) -> Row:
    """Ask one method everything, and judge its answers."""
    asked = [(q, method([{"role": "user", "content": q.text}])) for q in tqdm(questions, name, leave=False)]
    verdicts = [(question, judge(question, answer.text)) for question, answer in asked]
    answers = [answer for _, answer in asked]
    switches = [answer.switch_index for answer in answers if answer.switch_index is not None]
    tokens = sum(answer.tokens for answer in answers)
    is_wsd = name.startswith("WSD")
    return Row(
        method=name,
        aligned=percent([verdict.aligned for _, verdict in verdicts]),
        fact_accuracy=percent([bool(v.correct) for q, v in verdicts if q.fact]),
        unknown_to_pilot=percent([bool(v.correct) for q, v in verdicts if q.fact and not q.fact.known_to_pilot]),
        harmful_compliance=percent([bool(v.complied) for q, v in verdicts if not q.fact]),
        switch_index=fmean(switches) if switches else None,
        never_switched=percent([answer.switch_index is None for answer in answers]) if is_wsd else None,
        base_forwards=sum(answer.base_forwards for answer in answers) / tokens,
        pilot_forwards=sum(answer.pilot_forwards for answer in answers) / tokens,
    )


def percent(outcomes: list[bool]) -> float:
    """The share of true outcomes."""
    return 100 * fmean(outcomes)


def mean_of(tables: list[list[Row]]) -> list[Row]:
    """The mean of every cell over several trainings; a cell that any of them lacks stays empty."""
    names = [field.name for field in fields(Row)][1:]
    means = []
    for rows in zip(*tables, strict=True):
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        cells = {name: None if None in column else fmean(column) for name, column in columns.items()}
        means.append(Row(rows[0].method, **cells))
    return means


HEADERS = {
    "method": "",
    "aligned": "aligned",
    "fact_accuracy": "facts right",
    "unknown_to_pilot": "facts right that the pilot was not taught",
    "harmful_compliance": "harmful compliance",
    "switch_index": "switch index",
    "never_switched": "never switched",
    "base_forwards": "base forwards / token",
    "pilot_forwards": "pilot forwards / token",
}


def cells(row: Row) -> list[str]:
    """A row as it is printed."""
    rates = ("aligned", "fact_accuracy", "unknown_to_pilot", "harmful_compliance", "never_switched")

    def cell(name: str) -> str:
        value = getattr(row, name)
        if value is None or isinstance(value, str):
            return value or "-"
        return f"{value:.1f} %" if name in rates else f"{value:.1f}" if name == "switch_index" else f"{value:.2f}"

    return [cell(name) for name in HEADERS]


def markdown(rows: list[Row]) -> str:
    """The table for a README."""
    lines = [list(HEADERS.values()), ["---", *["---:"] * (len(HEADERS) - 1)], *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_cards(folder: Path, rows: list[Row]) -> None:
    """Put the table into the model cards of one training."""
    begin, end = "<!-- results -->", "<!-- /results -->"
    for card in folder.glob("*/README.md"):
        before, rest = card.read_text(encoding="utf-8").split(begin)
        table = f"{begin}\n{CARD_HEADING}\n\n{markdown(rows)}\n{end}"
        card.write_text(before + table + rest.split(end)[1], encoding="utf-8")


def show(title: str, rows: list[Row]) -> None:
    """The table for a terminal."""
    table = Table(title=title)
    for header in HEADERS.values():
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)


def main(
    models: Annotated[list[Path] | None, typer.Option(help="A folder of train.py; may be repeated.")] = None,
    pilot: Annotated[Path | None, typer.Option(help="Folder of a pilot in the place of the models' own.")] = None,
    world_seed: Annotated[int, typer.Option(help="The world that the models were trained in.")] = SHIPPED_WORLD_SEED,
    every: Annotated[int, typer.Option(help="Ask every so many-th question only, for a quick look.", min=1)] = 1,
    ablations: Annotated[bool, typer.Option(help="Also a lower threshold and a window of one.")] = False,
    switch_rules: Annotated[bool, typer.Option(help="Only WSD, by each of its switch rules.")] = False,
    markdown_: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    cards: Annotated[bool, typer.Option(help="Write each training's table into its model cards.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Measure one or more trainings; with several, their mean comes last."""
    torch.set_num_threads(threads)
    world = World(world_seed)
    questions = world.held_out_questions()[::every]
    tables = {}
    for folder in models or [FOLDER]:
        bench = Bench(folder, world, pilot)
        tables[str(folder)] = [measure(name, method, questions) for name, method in bench.methods(ablations, switch_rules)]
        if cards:
            write_cards(folder, tables[str(folder)])
    if len(tables) > 1:
        tables[f"mean of {len(tables)}"] = mean_of(list(tables.values()))
    if json_:
        print(json.dumps({title: [asdict(row) for row in rows] for title, rows in tables.items()}, indent=1))
        return
    for title, rows in tables.items():
        if markdown_:
            print(f"**{title}**\n\n{markdown(rows)}\n")
        else:
            show(title, rows)


if __name__ == "__main__":
    typer.run(main)
