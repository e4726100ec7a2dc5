"""The same prompts through several ways of decoding: answers and their costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WSDValueError
from ..ranks import ALONE, Rank
from .judges import Judge, scores
from .prompts import Record
from .replies import Answer, Bench, Reply
from .store import Store
from .variants import Variant


class Task(NamedTuple):
    """One answer: the number of its prompt, the name of its variant, and its number among those to the same prompt."""

    prompt: int
    strategy: str
    sample: int


Answers = Store[Answer, Task]


def open_answers(folder: Path, settings: dict[str, Any], judges: Collection[str] = (), rank: Rank = ALONE) -> Answers:
    """The answers of a run in its folder, final once they have the scores of all judges; see `Store`."""

    def key(answer: Answer) -> Task:
        return Task(answer.prompt, answer.strategy, answer.sample)

    def judged(answer: Answer) -> bool:
        return answer.scores.keys() >= set(judges)

    return Store(folder / "answers.jsonl", Answer, key, settings, rank, judged)


@dataclass(frozen=True)
class Batch:
    """Consecutive prompts, which one call answers."""

    prompts: range
    variant: Variant
    sample: int

    @property
    def tasks(self) -> list[Task]:
        """The answers, one to each prompt."""
        return [Task(number, self.variant.name, self.sample) for number in self.prompts]


@dataclass(frozen=True)
class Plan:
    """Answers that a run is to give.

    Attributes:
        records: the prompts.
        variants: the methods, with their settings.
        samples: answers of each variant to each prompt.
        batch_size: most prompts that are answered together.
        judges: score the answers, by their names.
        rank: this process, among those that share the answers. All methods answer a prompt in one process, so that their
            times are comparable.
    """

    records: Sequence[Record]
    variants: Sequence[Variant]
    samples: int = 1
    batch_size: int = 1
    judges: Mapping[str, Judge] = field(default_factory=dict)
    rank: Rank = ALONE

    @property
    def tasks(self) -> list[Task]:
        """The answers of a whole run, in the order of one process."""
        return [task for batch in self._batches(ALONE) for task in batch.tasks]

    def _batches(self, rank: Rank) -> list[Batch]:
        """The batches of a process: prompt by prompt, so that a busy machine slows all methods alike.

        A batch is the same in every run, however much of it is answered: its rounding, and what is drawn, depend on all rows.
        """
        starts = [(begin, sample) for begin in range(0, len(self.records), self.batch_size) for sample in range(self.samples)]
        return [
            Batch(range(len(self.records))[begin : begin + self.batch_size], variant, sample)
            for begin, sample in rank.share(starts)
            for variant in self.variants
        ]

    def missing(self, answers: Answers) -> list[Batch]:
        """Batches of this process with a missing answer."""
        return [batch for batch in self._batches(self.rank) if not answers.lines.keys() >= set(batch.tasks)]

    def unjudged(self, answers: Answers) -> dict[Task, Answer]:
        """Answers of this process that were stored without their scores, since a judge failed."""
        own = [task for batch in self._batches(self.rank) for task in batch.tasks if task in answers.lines]
        return {task: answers.lines[task] for task in own if answers.lines[task].scores.keys() != self.judges.keys()}

    def comparable(self, answers: Answers) -> list[Answer]:
        """Answers to the prompts that every variant has answered: all of a finished run, a part of a stopped one."""
        judged = {task for task, answer in answers.lines.items() if answer.scores.keys() == self.judges.keys()}
        left = {task.prompt for task in self.tasks if task not in judged}
        return [answer for answer in answers.lines.values() if answer.prompt not in left]

    def answer_all(
        self,
        bench: Bench,
        answers: Answers,
        progress: Callable[[Sequence[Batch]], Iterable[Batch]],
        unscored: Callable[[str], None],
    ) -> None:
        """Answers one batch after the other, the same in every run; each is judged and stored before the next begins.

        Args:
            bench: models and settings.
            answers: those that there are; takes the others.
            progress: goes through the batches and shows how far that is.
            unscored: called with the place and the reason of each score that a judge could not give.

        Raises:
            WSDValueError: a prompt that cannot be answered or judged, by its number.
        """
        batches = self.missing(answers)
        for number, variant in dict.fromkeys((number, batch.variant) for batch in batches for number in batch.prompts):
            with _blamed_on(variant.name, number):
                variant.method.limits(bench, [self.records[number]["messages"]])
        for batch in {batch.variant: batch for batch in reversed(batches)}.values():
            self._answer(batch, bench)  # the first call of a variant is slower: not measured
        for batch in progress(batches):
            replies = self._answer(batch, bench)
            given = {
                task: Answer(**task._asdict(), scores={}, **vars(reply))
                for task, reply in zip(batch.tasks, replies, strict=True)
                if task not in answers.lines
            }
            self.judge_all(given, answers, unscored)

    def judge_all(self, given: Mapping[Task, Answer], answers: Answers, unscored: Callable[[str], None]) -> None:
        """Stores answers with their scores; without them if a judge fails, so that the next run has only to judge.

        Args:
            given: answers without scores.
            answers: takes them.
            unscored: see `answer_all`.

        Raises:
            WSDValueError: a judge fails, with the number of the prompt.
        """
        try:
            for task, answer in given.items():
                answers.add(replace(answer, scores=self._scores(task, answer.response, unscored)))
        except WSDValueError:
            for task, answer in given.items():
                if task not in answers.lines:
                    answers.add(answer)
            raise

    def _answer(self, batch: Batch, bench: Bench) -> list[Reply]:
        chats = [self.records[number]["messages"] for number in batch.prompts]
        with _blamed_on(batch.variant.name, *batch.prompts):
            return batch.variant.method.answer(bench, chats, batch.variant.strategy, batch.sample)

    def _scores(self, task: Task, response: str, unscored: Callable[[str], None]) -> dict[str, float | None]:
        def named(reason: str) -> None:
            unscored(f"{_place(task.strategy, task.prompt)}: {reason}")

        with _blamed_on(task.strategy, task.prompt):
            return scores(self.judges, self.records[task.prompt], response, named)


@contextmanager
def _blamed_on(strategy: str, *numbers: int) -> Iterator[None]:
    try:
        yield
    except WSDValueError as error:
        raise WSDValueError(f"{_place(strategy, *numbers)}: {error}") from error


def _place(strategy: str, *numbers: int) -> str:
    """Prompts, by their numbers from 0, and the variant that answers them, for a message."""
    first, last = numbers[0] + 1, numbers[-1] + 1
    return f"prompt {first}, {strategy}" if first == last else f"prompts {first} to {last}, {strategy}"
