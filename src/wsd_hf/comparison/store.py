"""Results of a run on disk, where they survive any end of the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..errors import WSDValueError
from ..files import named_errors, only_writer, write_whole
from ..text.json_data import check_texts, parse_json


class Dataclass(Protocol):
    """An object of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Line = TypeVar("Line", bound=Dataclass)
Key = TypeVar("Key", bound=Hashable)


class Store(Generic[Line, Key]):
    """Results of a run, each a line of one file, beside the run's `settings.json`; a run that was stopped is resumed there.

    No other run can open the file until this one leaves it: use it in a `with` statement, or call `close`.

    Args:
        file: of the lines, such as `answers.jsonl`; its folder is created if missing.
        kind: dataclass of a line, with fields that JSON can hold.
        key: identifies a line.
        settings: of this run, as plain JSON data.

    Attributes:
        lines: the results by their keys.

    Raises:
        WSDValueError: the results are of other settings, or damaged; a setting is not a text; or another run has the file open.
    """

    def __init__(self, file: Path, kind: type[Line], key: Callable[[Line], Key], settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            check_texts(value, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._key = file, key
        with ExitStack() as held:
            held.enter_context(only_writer(file))
            self.lines = {key(line): line for line in _read(file, kind)}
            keep_settings(file.with_name("settings.json"), settings, started=bool(self.lines))
            self._held = held.pop_all()

    def __enter__(self) -> Store[Line, Key]:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the file to other runs."""
        self._held.close()

    def add(self, line: Line) -> None:
        """Writes a result to the disk."""
        with named_errors(self._file), self._file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
        self.lines[self._key(line)] = line


def _read(file: Path, kind: type[Line]) -> list[Line]:
    """Lines of a file, from which a last one without an end is removed: the run ended while it was written."""
    if not file.exists():
        return []
    data = file.read_bytes()
    *lines, rest = data.split(b"\n")
    if rest:
        with file.open("r+b") as open_file:
            open_file.truncate(len(data) - len(rest))
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        try:
            found.append(kind(**parse_json(line, place)))
        except (ValueError, TypeError):
            raise WSDValueError(f"{place}: is damaged; remove that line, and the next run makes it again") from None
    return found


def keep_settings(file: Path, settings: dict[str, Any], *, started: bool) -> None:
    """Writes the settings of a run; a WSDValueError if it was started with others."""
    if not started:
        write_whole(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    before = None
    with suppress(OSError, ValueError):
        before = parse_json(file.read_bytes(), str(file))
    if not isinstance(before, dict):
        raise WSDValueError(
            f"{file}: is missing or damaged, so the settings of the results beside it are unknown; choose another folder"
        )
    different = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    if different:
        raise WSDValueError(
            f"{file.parent} holds results of other settings: {', '.join(different)}; "
            "continue with those, or choose another folder"
        )
