"""A report on training data, before anything is trained: the parts of the answers that a pilot would write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ..pair import Pair
from ..strategies.wsd.switch_rules import SwitchRule
from .examples import Example
from .handover import Handover, handovers


@dataclass(frozen=True)
class Spread:
    """The distribution of some numbers: their mean, and the least number that a share of them does not exceed."""

    mean: float
    tenth: int
    median: int
    nine_tenths: int
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread | None:
        """The distribution; None without numbers."""
        if not numbers:
            return None
        ranked = sorted(numbers)
        tenth, median, nine_tenths = (ranked[-(-len(ranked) * tenths // 10) - 1] for tenths in (1, 5, 9))
        return cls(fmean(ranked), tenth, median, nine_tenths, ranked[-1])


@dataclass(frozen=True)
class Answers:
    """The chosen answers of the examples, or the rejected ones. Numbers of tokens are in the base's vocabulary.

    Attributes:
        answers: their number.
        never: number of answers in which the base never takes over.
        handover: tokens up to the handover, of the other answers.
        length: tokens of the answers, as far as a draft may reach.
        drafted: share of all these tokens that the pilot would write.
    """

    answers: int
    never: int
    handover: Spread | None
    length: Spread | None
    drafted: float

    @classmethod
    def of(cls, found: Sequence[Handover]) -> Answers:
        """The numbers of some answers."""
        switches = [handover.tokens for handover in found if handover.tokens is not None]
        lengths = [handover.length for handover in found]
        never = [handover.length for handover in found if handover.tokens is None]
        return cls(
            answers=len(found),
            never=len(never),
            handover=Spread.of(switches),
            length=Spread.of(lengths),
            drafted=(sum(switches) + sum(never)) / max(1, sum(lengths)),
        )


@dataclass(frozen=True)
class DataReport:
    """The parts of the answers that a pilot would write, and those that it would not.

    Attributes:
        chosen: the good answers.
        rejected: the others; None if there are none.
        pairs: number of examples with both.
        without_signal: number of pairs whose answers are the same up to the handover, so that a pilot cannot learn from the
            rejected one.
    """

    chosen: Answers
    rejected: Answers | None
    pairs: int
    without_signal: int

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, which JSON can hold."""
        return asdict(self)

    def table(self) -> Table:
        """The report for a terminal."""
        columns = [self.chosen] if self.rejected is None else [self.chosen, self.rejected]
        names = ("chosen", "rejected")[: len(columns)]
        table = Table("", *(Column(name, justify="right") for name in names), box=SIMPLE_HEAD)
        for heading, show in ROWS.items():
            table.add_row(heading, *map(show, columns))
        return table

    def summary(self) -> str:
        """The report's findings in a sentence or two."""
        chosen = self.chosen
        lines = [f"A pilot would write {_percent(chosen.drafted)} of the tokens of the chosen answers."]
        if chosen.never:
            lines.append(f"The base would never take over in {_share(chosen.never, chosen.answers)} of them.")
        if self.without_signal:
            lines.append(
                f"{_share(self.without_signal, self.pairs)} of the pairs differ only after the handover, so that their "
                "rejected answers teach a pilot nothing."
            )
        return " ".join(lines)


def data_report(
    pair: Pair,
    examples: Sequence[Example],
    rule: SwitchRule,
    *,
    batch_size: int = 8,
    progress: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> DataReport:
    """Reads all answers with the base; see `handovers` for arguments and errors."""

    def read(some: Sequence[Example], which: Any) -> list[Handover]:
        return handovers(pair, some, rule, which, batch_size=batch_size, progress=progress)

    chosen = read(examples, "chosen")
    rejected = read([example for example in examples if example.rejected is not None], "rejected")
    signals = [
        _differ_before(handover, example.chosen, example.rejected)
        for example, handover in zip(examples, chosen, strict=True)
        if example.rejected is not None
    ]
    return DataReport(Answers.of(chosen), Answers.of(rejected) if rejected else None, len(signals), signals.count(False))


def _differ_before(handover: Handover, chosen: str, rejected: str) -> bool:
    """True if the answers differ within the part of the chosen one that a pilot would write."""
    return handover.tokens is None or chosen[: handover.characters] != rejected[: handover.characters]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(some: int, every: int) -> str:
    return f"{some:,} of {every:,} ({_percent(some / every)})"


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median}"


def _range(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.tenth} to {spread.nine_tenths}"


ROWS: dict[str, Callable[[Answers], str]] = {
    "answers": lambda answers: f"{answers.answers:,}",
    "tokens: median": lambda answers: _median(answers.length),
    "tokens: 10 to 90 %": lambda answers: _range(answers.length),
    "handover after: median": lambda answers: _median(answers.handover),
    "handover after: 10 to 90 %": lambda answers: _range(answers.handover),
    "never handed over": lambda answers: _share(answers.never, answers.answers),
    "tokens before the handover": lambda answers: _percent(answers.drafted),
}
"""Lines of the table, from a heading to the text of a cell."""
