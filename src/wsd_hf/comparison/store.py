"""Results of a run on disk, where they survive any end of the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..errors import WSDValueError
from ..files import named_errors, write_whole
from ..ranks import ALONE, Parts, Rank
from ..text.json_data import check_texts, parse_json


class Dataclass(Protocol):
    """An object of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Line = TypeVar("Line", bound=Dataclass)
Key = TypeVar("Key", bound=Hashable)


class Store(Generic[Line, Key]):
    """Results of a run, each a line of one file, beside the run's `settings.json`; a run that was stopped is resumed there.

    No other run can open the file until this one leaves it: use it in a `with` statement, or call `close`. The processes of a
    launcher share it; each writes a part of its own, until `finish` puts the parts together.

    Args:
        file: of the lines, such as `answers.jsonl`; its folder is created if missing.
        kind: dataclass of a line, with fields that JSON can hold.
        key: identifies a line.
        settings: of this run, as plain JSON data.
        rank: this process, among those that share the file.
        final: False for a line that is still to be replaced by another one of its key.

    Attributes:
        lines: the results by their keys; of other processes, those that there were when the file was opened.

    Raises:
        WSDValueError: the results are of other settings, or damaged; a setting is not a text; or another run has the file open.
    """

    def __init__(
        self,
        file: Path,
        kind: type[Line],
        key: Callable[[Line], Key],
        settings: dict[str, Any],
        rank: Rank = ALONE,
        final: Callable[[Line], bool] = lambda _: True,
    ) -> None:
        for name, value in settings.items():
            check_texts(value, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._parts, self._kind, self._key, self._final = Parts(file, rank), kind, key, final
        with ExitStack() as held, self._parts.one_at_a_time():
            held.enter_context(self._parts.lock())
            _drop_unfinished(self._parts.own)
            self.lines = self._read()
            started = bool(self.lines) or self._parts.others_at_work()
            keep_settings(file.with_name("settings.json"), settings, started=started)
            self._held = held.pop_all()
        self._before = {key for key, line in self.lines.items() if final(line)}

    def __enter__(self) -> Store[Line, Key]:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the file to other runs."""
        self._held.close()

    def add(self, line: Line) -> None:
        """Writes a result to the disk."""
        own = self._parts.own
        with named_errors(own), own.open("a", encoding="utf-8", newline="\n") as file:
            file.write(_as_line(line))
        self._parts.wrote = True
        self.lines[self._key(line)] = line

    def refresh(self) -> None:
        """Reads the lines that other processes have written meanwhile."""
        with self._parts.one_at_a_time():
            self.lines = self._read()

    def finish(self, keys: Sequence[Key]) -> bool:
        """Puts the parts of all processes together if every line is there, and reads them.

        Args:
            keys: of all lines of a whole run, in the order of one process.

        Returns:
            Whether this process is the one to go on with the whole: the last that had something to do, or the first if none
            had. True in one process.
        """
        with self._parts.one_at_a_time():
            self.lines = self._read()
            whole = all(key in self.lines and self._final(self.lines[key]) for key in keys)
            last = self._parts.last(self._before >= set(keys), whole)
            if last:
                self.lines = {key: self.lines[key] for key in keys if key in self.lines} | self.lines
                self._parts.merge("".join(map(_as_line, self.lines.values())))
            return last

    def _read(self) -> dict[Key, Line]:
        """The lines of all parts; of those with one key the last that is final."""
        lines: dict[Key, Line] = {}
        for file in self._parts.existing():
            for line in _read(file, self._kind):
                key = self._key(line)
                if key not in lines or self._final(line):
                    lines[key] = line
        return lines


def _as_line(line: Dataclass) -> str:
    return json.dumps(asdict(line), ensure_ascii=False) + "\n"


def _drop_unfinished(file: Path) -> None:
    """Removes a last line without an end: the run ended while it was written."""
    if file.exists():
        data = file.read_bytes()
        if rest := len(data) - (data.rfind(b"\n") + 1):
            with file.open("r+b") as open_file:
                open_file.truncate(len(data) - rest)


def _read(file: Path, kind: type[Line]) -> list[Line]:
    """Lines of a file, but for a last one without an end, which is still being written or never was."""
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
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
