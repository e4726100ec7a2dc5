"""Preference pairs from the samples of a pair of models: the best and the worst answer to each prompt, by a judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ..comparison.prompts import Record
from ..comparison.replies import Answer
from ..comparison.statistics import interval


@dataclass(frozen=True)
class Grading:
    """Good answers, by a judge.

    Attributes:
        judge: its name.
        least: score of a good answer. An answer that is empty, or was cut before it ended, is never good.
    """

    judge: str
    least: float = 1.0

    def score(self, answer: Answer) -> float | None:
        """The judge's score; None where it gave none."""
        return answer.scores.get(self.judge)

    def good(self, answer: Answer) -> bool:
        """True for a good answer."""
        score = self.score(answer)
        return score is not None and score >= self.least and answer.ended and bool(answer.response)


def preferences(records: Sequence[Record], answers: Sequence[Answer], grading: Grading) -> Iterator[dict[str, Any]]:
    """A preference for each prompt with a good answer: conversational, with an explicit prompt, as TRL names it.

    A line has `prompt`, `chosen` and `rejected`, lists of messages; `drafted` and `drafted_tokens`, numbers of characters and
    tokens of the chosen answer that the pilot wrote before the base took over, both None if one model alone wrote it;
    `chosen_by` and `rejected_by`, the methods that wrote the answers; `score_chosen` and `score_rejected`. Of answers with the
    same score, the first is taken. Without a bad answer to its prompt, a line has no `rejected`.

    Args:
        records: the prompts.
        answers: to them.
        grading: of the answers.
    """
    for number, record in enumerate(records):
        judged = [answer for answer in answers if answer.prompt == number and grading.score(answer) is not None]
        good = [answer for answer in judged if grading.good(answer)]
        if good:
            texts = {answer.response for answer in good}
            bad = [answer for answer in judged if answer.response and answer.response not in texts and not grading.good(answer)]
            yield _preference(record, _extreme(good, grading, 1), _extreme(bad, grading, -1) if bad else None, grading)


def _extreme(answers: Sequence[Answer], grading: Grading, sign: int) -> Answer:
    return max(answers, key=lambda answer: sign * (grading.score(answer) or 0.0))


def _preference(record: Record, chosen: Answer, rejected: Answer | None, grading: Grading) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": record["messages"], "chosen": _message(chosen)}
    if rejected is not None:
        line["rejected"] = _message(rejected)
    line |= {
        "drafted": None if chosen.drafted is None else min(chosen.drafted, len(chosen.response)),
        "drafted_tokens": None if chosen.drafted is None else chosen.written_by_pilot,
        "chosen_by": chosen.strategy,
        "score_chosen": grading.score(chosen),
    }
    if rejected is not None:
        line |= {"rejected_by": rejected.strategy, "score_rejected": grading.score(rejected)}
    return line


def _message(answer: Answer) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.response}]


def as_lines(preferred: Sequence[Mapping[str, Any]]) -> str:
    """Preferences as lines of JSON."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in preferred)


@dataclass(frozen=True, kw_only=True)
class GoodShare:
    """Good answers among the samples of one method.

    Attributes:
        strategy: the method.
        answers: number of its answers.
        share: of them that are good.
        low, high: confidence interval of the share at 95 %, over prompts.
        prompts: share of the prompts with a good answer.
        drafted: mean number of tokens that the pilot wrote; None where one model alone answers.
        never_switched: share of answers in which the base never took over; None where one model alone answers.
    """

    strategy: str
    answers: int
    share: float
    low: float
    high: float
    prompts: float
    drafted: float | None
    never_switched: float | None

    @classmethod
    def of(cls, strategy: str, answers: Sequence[Answer], grading: Grading) -> GoodShare:
        """The numbers of a method's answers, of which there is at least one."""
        good = [float(grading.good(answer)) for answer in answers]
        prompts = [answer.prompt for answer in answers]
        low, high = interval(good, prompts)
        drafts = [answer for answer in answers if answer.switch_reason is not None]
        return cls(
            strategy=strategy,
            answers=len(answers),
            share=fmean(good),
            low=low,
            high=high,
            prompts=len({prompt for prompt, one in zip(prompts, good, strict=True) if one}) / len(set(prompts)),
            drafted=fmean(answer.written_by_pilot or 0 for answer in drafts) if drafts else None,
            never_switched=fmean(answer.switch_reason != "confident" for answer in drafts) if drafts else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, which JSON can hold."""
        return asdict(self)


def good_shares(answers: Sequence[Answer], grading: Grading) -> list[GoodShare]:
    """The good share of each method that has answered."""
    names = dict.fromkeys(answer.strategy for answer in answers)
    return [GoodShare.of(name, [one for one in answers if one.strategy == name], grading) for name in names]


def terminal(shares: Sequence[GoodShare]) -> Table:
    """The table of good shares for a terminal, which is seldom wide: a column for each method."""
    table = Table("", *(Column(one.strategy, justify="right", overflow="fold") for one in shares), box=SIMPLE_HEAD)
    for heading, show in ROWS.items():
        table.add_row(heading, *map(show, shares))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


ROWS: dict[str, Callable[[GoodShare], str]] = {
    "answers": lambda one: f"{one.answers:,}",
    "good": lambda one: _percent(one.share),
    "good, 95 % interval": lambda one: f"{100 * one.low:.1f} to {_percent(one.high)}",
    "prompts with a good one": lambda one: _percent(one.prompts),
    "tokens by the pilot": lambda one: "-" if one.drafted is None else f"{one.drafted:.1f}",
    "never switched": lambda one: _percent(one.never_switched),
}
"""Lines of the table, from a heading to the text of a cell."""
