"""What a training changed: the likelihood of good beginnings, and answers to held-out prompts before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..comparison import Batch, Plan, open_answers
from ..comparison.judges import Judge
from ..comparison.methods import METHODS
from ..comparison.prompts import Record
from ..comparison.replies import Answer, Bench
from ..comparison.table import Row as TableRow
from ..comparison.table import table_rows
from ..comparison.variants import Variant
from ..strategies.wsd.config import WSDConfig
from .masking import Row

logger = logging.get_logger(__name__)

BEFORE, AFTER = "before", "after"
ASKED = {BEFORE: ("base", "pilot", "wsd"), AFTER: ("pilot", "wsd")}
"""Methods that answer with the untuned pilot, and with the tuned one."""

MOST_ROWS = 256
"""Examples by which the likelihood of beginnings is measured."""

Progress = Callable[[Sequence[Batch]], Iterable[Batch]]
"""Goes through answers to held-out prompts, and shows how far that is."""


def mean_log_prob(model: PreTrainedModel, rows: Sequence[Row]) -> float:
    """Mean log-probability of a token in the trained parts of the chosen answers, in nats, over the first rows."""
    total, count = 0.0, 0
    for row in rows[:MOST_ROWS]:
        ids = torch.tensor([row.prompt + row.chosen], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float()
        total += logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt) :, None]).sum().item()
        count += len(row.chosen)
    return total / count


def answer_held_out(
    when: str,
    bench: Bench,
    wsd_config: WSDConfig,
    records: Sequence[Record],
    judges: Mapping[str, Judge],
    folder: Path,
    settings: dict[str, Any],
    progress: Progress,
) -> list[Answer]:
    """Answers to the held-out prompts, kept in a folder, where a run that was stopped is resumed.

    Args:
        when: BEFORE or AFTER the training; methods other than the base are named so.
        bench: base and pilot.
        wsd_config: settings of WSD.
        records: the prompts.
        judges: score the answers.
        folder: of the answers.
        settings: of the training.
        progress: see `Progress`.
    """
    variants = [Variant(name, METHODS[name], wsd_config if name == "wsd" else None) for name in ASKED[when]]
    plan = Plan(records, variants, judges=judges)
    with open_answers(folder, settings) as answers:
        plan.answer_all(bench, answers, progress, unscored=logger.warning)
        return [replace(answer, strategy=_named(answer.strategy, when)) for answer in answers.lines.values()]


def _named(method: str, when: str) -> str:
    return method if method == "base" else f"{method} {when}"


def before_and_after(answers: Sequence[Answer]) -> list[TableRow]:
    """The table: the base, then pilot and WSD before and after the training."""
    names = ["base", *(_named(method, when) for method in ("pilot", "wsd") for when in (BEFORE, AFTER))]
    return table_rows(answers, names)


def warnings_of(log_probs: tuple[float, float], table: Sequence[TableRow]) -> list[str]:
    """Signs that a pilot got worse, in words.

    Args:
        log_probs: see `mean_log_prob`, before and after.
        table: see `before_and_after`; may be empty.
    """
    found = []
    before, after = log_probs
    if after < before:
        found.append(
            f"the trained beginnings became less likely (mean log-probability of a token: {before:.2f} before, {after:.2f} "
            "after), so the pilot will not write them; lower the learning rate, or take the objective sft"
        )
    never = {row.strategy: row.never_switched.value for row in table}
    before, after = never.get(_named("wsd", BEFORE)) or 0, never.get(_named("wsd", AFTER)) or 0
    if after > before:
        found.append(
            f"the base takes over less often: {100 * before:.1f} % of the answers had no switch before, {100 * after:.1f} % "
            "after"
        )
    return found
