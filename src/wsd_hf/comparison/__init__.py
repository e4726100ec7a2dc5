"""The same prompts through several ways of decoding: answers and their costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from .judges import Judge, score
from .methods import METHODS
from .prompts import Record
from .replies import Answer, Bench
from .store import Store

Task = tuple[int, str]
"""The number of a prompt, and the name of a method."""

Answers = Store[Answer, Task]


def open_answers(folder: Path, settings: dict[str, Any]) -> Answers:
    """The answers of a run in its folder; see `Store`."""
    return Store(folder / "answers.jsonl", Answer, lambda answer: (answer.prompt, answer.strategy), settings)


def missing(records: Sequence[Record], strategies: Sequence[str], store: Answers) -> list[Task]:
    """Tasks without an answer: prompt by prompt, so that a busy machine slows all methods alike."""
    tasks = [(number, name) for number in range(len(records)) for name in strategies]
    return [task for task in tasks if task not in store.lines]


def comparable(records: Sequence[Record], strategies: Sequence[str], store: Answers) -> dict[Task, Answer]:
    """Answers to the prompts that every method has answered: all of a finished run, a part of a stopped one."""
    left = {number for number, _ in missing(records, strategies, store)}
    return {task: answer for task, answer in store.lines.items() if task[0] not in left}


def answer_all(
    tasks: Sequence[Task],
    records: Sequence[Record],
    bench: Bench,
    judge: Judge | None,
    store: Answers,
    progress: Callable[[Sequence[Task]], Iterable[Task]],
) -> None:
    """Answers one task after the other, the same in every run; each answer is stored before the next begins.

    Args:
        tasks: see `missing`.
        records: the prompts.
        bench: models and settings.
        judge: scores the responses, if given.
        store: takes the answers.
        progress: goes through the tasks and shows how far that is.

    Raises:
        WSDValueError: a prompt that cannot be answered or judged, by its number.
    """
    for number, name in tasks:
        with _blamed_on(number, name):
            METHODS[name].check(bench, records[number]["messages"])
    for name, number in {name: number for number, name in reversed(tasks)}.items():
        with _blamed_on(number, name):
            METHODS[name].answer(bench, records[number]["messages"])  # the first call of a method is slower: not measured
    for number, name in progress(tasks):
        record = records[number]
        with _blamed_on(number, name):
            reply = METHODS[name].answer(bench, record["messages"])
            scored = score(judge, record, reply.response) if judge else None
        store.add(Answer(prompt=number, strategy=name, score=scored, **vars(reply)))


@contextmanager
def _blamed_on(number: int, name: str) -> Iterator[None]:
    try:
        yield
    except WSDValueError as error:
        raise WSDValueError(f"prompt {number + 1}, {name}: {error}") from error
