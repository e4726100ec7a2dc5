"""Switch rules on a real pair: where they let the base take over, and the answers that follow.

    python benchmarks/switch_rules.py --base DIR --pilot DIR

The pilot drafts one greedy answer to each prompt, which the base reads once; each rule's switch follows from that reading. A
rule's answer is the draft up to its switch, and the base's greedy text after it.

The table has the median switch index, the share of drafts without a switch, and of switches whose window was in the draft
before, word for word. Of the answers it has the share of the pilot's tokens, of answers that ended by themselves, of 4-grams
that occurred in the same answer before, and the number of right answers to the prompts that have a pattern for them.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from turns import machine

from wsd_hf import AgreementCriteria, EntropyCriteria, Pair, RelativeConfidenceCriteria, SwitchCriteria, SwitchRule
from wsd_hf.comparison.prompts import Record, read_prompts
from wsd_hf.diagnosis.reading import Reading, read
from wsd_hf.diagnosis.switches import repeats, switch_index
from wsd_hf.engine.checks import eos_token_ids
from wsd_hf.engine.small_model import left_padded
from wsd_hf.text.bridge import before_end
from wsd_hf.text.next_turn import before_next_turn

PROMPTS = Path(__file__).parents[1] / "examples" / "real_pair" / "prompts.jsonl"

RULES: dict[str, SwitchRule] = {
    "confidence": SwitchCriteria(),
    "confidence, repeats ignored": SwitchCriteria(ignore_repeats=True),
    "relative_confidence": RelativeConfidenceCriteria(),
    "relative_confidence, repeats ignored": RelativeConfidenceCriteria(ignore_repeats=True),
    "relative_confidence, window 6": RelativeConfidenceCriteria(window_size=6),
    "relative_confidence, threshold 0.7": RelativeConfidenceCriteria(0.7),
    "entropy": EntropyCriteria(),
    "entropy, threshold 1": EntropyCriteria(1.0),
    "agreement": AgreementCriteria(),
    "agreement, window 12": AgreementCriteria(window_size=12),
}


@dataclass(frozen=True)
class Answer:
    """A text in tokens of the base, of which the pilot wrote the first."""

    tokens: list[int]
    by_pilot: int
    ended: bool
    """Whether it ended before the budget did."""


@dataclass
class Measurement:
    """One way of answering all prompts; shares lie between 0 and 1, and are None where there is no switch."""

    way: str
    by_pilot: float
    ended: float
    repeated: float
    right: int
    switch_index: float | None = None
    never: float | None = None
    on_repeats: float | None = None


def answers(pair: Pair, record: Record, draft: Reading, kept: list[int], most: int) -> dict[int, Answer]:
    """The base's greedy answers that begin with so many tokens of the draft, all from one batch."""
    inputs = pair.inputs(record["messages"])
    criteria = {"stopping_criteria": inputs["stopping_criteria"]} if "stopping_criteria" in inputs else {}
    prompts = [inputs["input_ids"][0].tolist() + draft.tokens[:length] for length in kept]
    ids, mask = left_padded(prompts, pair.base.device)
    budget = most - min(kept)
    sequences = pair.base.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(1, budget), **criteria)
    ends = eos_token_ids(pair.base.generation_config) | {pair.tokenizer.pad_token_id}
    found = {}
    for row, length in zip(sequences[:, ids.shape[1] :].tolist(), kept, strict=True):
        whole = draft.tokens[:length] + before_end(row[: most - length], ends)
        text = pair.tokenizer.decode(whole)
        answer = pair.tokenizer.encode(before_next_turn(text), add_special_tokens=False)
        found[length] = Answer(answer, min(length, len(answer)), len(whole) < most or before_next_turn(text) != text)
    return found


def repeated(tokens: list[int]) -> tuple[int, int]:
    """Numbers of 4-grams that occurred before, and of all."""
    ngrams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def measurement(pair: Pair, way: str, records: list[Record], given: list[Answer]) -> Measurement:
    """The numbers of some answers, one to each prompt."""
    texts = [pair.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in given]
    before, every = (sum(counts) for counts in zip(*(repeated(answer.tokens) for answer in given), strict=True))
    return Measurement(
        way,
        by_pilot=sum(answer.by_pilot for answer in given) / max(1, sum(len(answer.tokens) for answer in given)),
        ended=statistics.fmean(answer.ended for answer in given),
        repeated=before / max(1, every),
        right=sum(
            bool(re.search(record["check"], text)) for record, text in zip(records, texts, strict=True) if "check" in record
        ),
    )


def with_switches(row: Measurement, rule: SwitchRule, drafts: list[Reading], switches: list[int | None]) -> Measurement:
    """The same with the places at which a rule has fired."""
    fired = [(draft, end) for draft, end in zip(drafts, switches, strict=True) if end is not None]
    row.never = 1 - len(fired) / len(drafts)
    if fired:
        row.switch_index = statistics.median(end for _, end in fired)
        row.on_repeats = statistics.fmean(repeats(draft, end, rule.window_size) for draft, end in fired)
    return row


def show(rows: list[Measurement], console: Console) -> None:
    """The table."""
    table = Table("", "switch index", "never", "on repeats", "by the pilot", "ended", "repeated 4-grams", "right")
    for row in rows:
        index = "-" if row.switch_index is None else f"{row.switch_index:g}"
        never, on_repeats = ("-" if share is None else f"{share:.0%}" for share in (row.never, row.on_repeats))
        table.add_row(
            row.way, index, never, on_repeats, f"{row.by_pilot:.0%}", f"{row.ended:.0%}", f"{row.repeated:.0%}", str(row.right)
        )
    console.print(table)


def main(
    base: Annotated[Path, typer.Option(help="Folder of the base.")],
    pilot: Annotated[Path, typer.Option(help="Folder of the pilot.")],
    prompts: Annotated[
        Path, typer.Option(help='Lines of {"prompt": ...}, with a pattern for right answers as "check".')
    ] = PROMPTS,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 96,
    out: Annotated[Path | None, typer.Option(help="Write JSON there.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
) -> None:
    """Drafts, reads every rule's switch, and lets the base finish."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pair = Pair.from_pretrained(base, pilot)
    records = read_prompts(prompts)[:limit]
    drafts: list[Reading] = []
    switches: dict[str, list[int | None]] = {name: [] for name in RULES}
    given: dict[str, list[Answer]] = {name: [] for name in ("base", "pilot", *RULES)}
    for record in tqdm(records, "prompts"):
        [draft] = read(pair, [record["messages"]], ("pilot", [0]), tokens)
        drafts.append(draft)
        whole = len(draft.tokens)
        for name, rule in RULES.items():
            switches[name].append(switch_index(draft, rule))
        kept = {name: switches[name][-1] or whole for name in RULES}
        found = answers(pair, record, draft, sorted({0, *kept.values()}), tokens)
        given["base"].append(found[0])
        given["pilot"].append(Answer(draft.tokens, whole, whole < tokens))
        for name, length in kept.items():
            given[name].append(found[length])
    rows = [measurement(pair, name, records, answers) for name, answers in given.items()]
    for row in rows[2:]:
        with_switches(row, RULES[row.way], drafts, switches[row.way])
    show(rows, Console(width=140))
    if out:
        models = {"base": pair.base.config.model_type, "pilot": pair.pilot.config.model_type}
        results = {**machine("cpu", threads), "models": models, "prompts": len(records), "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
