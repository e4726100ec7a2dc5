"""Prompts from a file with one JSON object per line."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from ..text.chat import check_messages
from ..text.json_data import check_texts, json_lines, parse_json

Record = dict[str, Any]
"""A prompt: its `messages`, and all further keys of its line, for the judge."""


def read_prompts(
    file: Path, skipped: Callable[[str], None] | None = None, check: Callable[[Record], None] | None = None
) -> list[Record]:
    """Reads prompts from lines `{"prompt": text}` or `{"messages": [...]}`, which may have further keys.

    Args:
        file: in UTF-8, with or without a byte order mark; empty lines are skipped.
        skipped: called with the error of each malformed line, which is left out; without it such a line is an error.
        check: called with each prompt; raises a WSDValueError for one that is malformed too.

    Raises:
        WSDValueError: a malformed line, by its number, or a file without prompts.
    """
    records = []
    for place, line in json_lines(file):
        try:
            records.append(_record(line, place, check))
        except WSDValueError as error:
            if skipped is None:
                raise WSDValueError(f"{error} (--skip-bad leaves such lines out)") from None
            skipped(str(error))
    if not records:
        raise WSDValueError(f"{file}: there are no prompts in it")
    return records


def _record(line: bytes, place: str, check: Callable[[Record], None] | None) -> Record:
    record = parse_json(line, place)
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise WSDValueError(f'{place}: must be {{"prompt": text}} or {{"messages": [...]}}')
    check_texts(record, place)
    if "messages" not in record:
        record = {**record, "messages": [{"role": "user", "content": record["prompt"]}]}
    if not isinstance(record["messages"], list):
        raise WSDValueError(f"{place}: messages={reprlib.repr(record['messages'])}: must be a list")
    try:
        check_messages(record["messages"])
        if check:
            check(record)
    except WSDValueError as error:
        raise WSDValueError(f"{place}: {error}") from None
    return record
