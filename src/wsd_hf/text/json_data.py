"""JSON files of users, read with errors that name file and line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from .chat import check_text

DEEPEST = 64
"""Most lists and objects within each other; at some hundreds, Python's repr and deepcopy run out of stack."""


def parse_json(content: bytes, place: str) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark; errors name its place, a file and a line."""
    deep = WSDValueError(f"{place}: lists and objects are nested more than {DEEPEST} deep")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise deep from None
    except ValueError as error:
        raise WSDValueError(f"{place}: not JSON in UTF-8 ({error})") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        lists = (outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, dict | list))
        level = [inner for outer in lists for inner in outer]
    if level:
        raise deep
    return value


def json_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a file that aren't blank, each with its place for `parse_json`; a byte order mark is left out."""
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", line


def check_texts(value: Any, place: str) -> None:
    """Raises unless every text in JSON data can be written in UTF-8."""
    check_text(place, json.dumps(value, ensure_ascii=False))
