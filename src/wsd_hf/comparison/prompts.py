"""Prompts from a file with one JSON object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from ..text.chat import check_messages

Record = dict[str, Any]
"""A prompt: its `messages`, and whatever else its line says, for the judge."""


def read_prompts(file: Path, skipped: Callable[[str], None] | None = None) -> list[Record]:
    """The prompts of a file, whose lines are `{"prompt": text}` or `{"messages": [...]}` and may have further keys.

    Args:
        file: in UTF-8, with a byte order mark or without; empty lines count, and say nothing.
        skipped: is told of each malformed line, which is left out; without it such a line is an error.

    Raises:
        WSDValueError: a malformed line, by its number, or a file without prompts.
    """
    records = []
    for number, line in enumerate(file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(line.decode("utf-8")))
        except ValueError as error:
            problem = f"{file}, line {number}: {error}"
            if skipped is None:
                raise WSDValueError(f"{problem} (--skip-bad leaves such lines out)") from None
            skipped(problem)
    if not records:
        raise WSDValueError(f"{file}: there are no prompts in it")
    return records


def _record(line: str) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise WSDValueError('must be {"prompt": text} or {"messages": [...]}')
    json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text that a tokenizer takes
    if "messages" not in record:
        record = {**record, "messages": [{"role": "user", "content": record["prompt"]}]}
    if not isinstance(record["messages"], list):
        raise WSDValueError(f"messages={record['messages']!r}: must be a list")
    check_messages(record["messages"])
    return record
