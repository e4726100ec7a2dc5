"""Answers of a comparison on disk, where they survive any end of the run."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from ..files import named_errors, only_writer, write_whole
from ..text.json_data import check_texts, parse_json
from .replies import Reply


@dataclass(frozen=True, kw_only=True)
class Answer(Reply):
    """A reply with its prompt (counted from 0), its method, and the judge's score."""

    prompt: int
    strategy: str
    score: float | None


class Store:
    """Answers in a folder, each a line of `answers.jsonl`, beside the run's `settings.json`.

    No other run can open the folder until this one leaves it: use it in a `with` statement, or call `close`.

    Args:
        folder: created if missing.
        settings: of this run, as plain JSON data.

    Attributes:
        answers: by number of the prompt and name of the method.

    Raises:
        WSDValueError: the folder's answers were given under other settings, or are damaged; a setting is not a text; or
            another run has the folder open.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            check_texts(value, name)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "answers.jsonl"
        with ExitStack() as held:
            held.enter_context(only_writer(self._file))
            self.answers = {(answer.prompt, answer.strategy): answer for answer in _read(self._file)}
            if self.answers:
                _check_same(folder / "settings.json", settings)
            else:
                write_whole(folder / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            self._held = held.pop_all()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the folder to other runs."""
        self._held.close()

    def add(self, answer: Answer) -> None:
        """Writes an answer to the disk."""
        with named_errors(self._file), self._file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        self.answers[answer.prompt, answer.strategy] = answer


def _read(file: Path) -> list[Answer]:
    """Answers in a file, from which a last line without an end is removed: the run ended while it was written."""
    if not file.exists():
        return []
    data = file.read_bytes()
    *lines, rest = data.split(b"\n")
    if rest:
        with file.open("r+b") as open_file:
            open_file.truncate(len(data) - len(rest))
    answers = []
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        try:
            answers.append(Answer(**parse_json(line, place)))
        except (ValueError, TypeError):
            raise WSDValueError(f"{place}: is damaged; remove that line, and its prompt will be answered again") from None
    return answers


def _check_same(file: Path, settings: dict[str, Any]) -> None:
    before = None
    with suppress(OSError, ValueError):
        before = parse_json(file.read_bytes(), str(file))
    if not isinstance(before, dict):
        raise WSDValueError(
            f"{file}: is missing or damaged, so the settings of the answers beside it are unknown; choose another folder"
        )
    different = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    if different:
        raise WSDValueError(
            f"{file.parent} holds answers that were given under other settings: {', '.join(different)}; "
            "continue with those, or choose another folder"
        )
