"""Chats with a good answer and maybe a worse one, read from the formats in which such data is published.

Each row's columns decide its format; further columns are ignored.

| format | columns |
|---|---|
| preferences of TRL, explicit prompt; lines of `wsd-hf make-pairs` | `prompt`, `chosen`, maybe `rejected`: texts or messages |
| the same, implicit prompt | `chosen`, `rejected`: whole chats, as messages or as text |
| UltraFeedback, binarized | `prompt`: a text; `chosen`, `rejected`: whole chats that begin with it |
| UltraFeedback | `instruction`, `completions` with `response` and `overall_score`: the best and the worst are taken |
| prompts and completions of TRL | `prompt`, `completion`: texts or messages |
| chats | `messages`: the last one is the answer, or `chosen` and maybe `rejected` are |
| ShareGPT (LLaMA-Factory) | `conversations`, maybe `system`; the answer as for chats |
| Alpaca (LLaMA-Factory) | `instruction`, maybe `input`, `system` and `history`; `output`, or `chosen` and maybe `rejected` |
| samples of the official code of Weak-to-Strong Decoding | `context`: messages; the answer as for chats |
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WSDValueError
from ..text.chat import Messages, check_text, check_turns
from ..text.json_data import json_lines, parse_json
from ..tiny import FOLDER

Row = Mapping[str, Any]
Load = Callable[[str, str], Iterable[Row]]
"""A function from a data set's Hub id and the name of a split to the rows of that split."""

DEMO = "tiny_world"
"""Name of the shipped pairs."""

TINY_WORLD = FOLDER / "preferences.jsonl"
"""Questions of the shipped world with a polite and another answer, as `examples/tiny_world/train.py` writes them."""

DATA_FILES = (".parquet", ".jsonl", ".json")
"""Endings of data files; of a folder, those of the first kind that there is are read."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT and their usual names."""

COPIED_WORDS = 4
"""Least number of words of a prompt that an answer copies by mistake; it may begin with a shorter one by chance."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A chat and its answers, which have no space around them.

    Attributes:
        messages: the chat before the answer; its last message is the user's.
        chosen: the good answer.
        rejected: a worse one; None if there is none.
        drafted: number of characters of `chosen` that the pilot wrote, in pairs of `wsd-hf make-pairs`; None: not recorded.
        place: file and line, for errors.
    """

    messages: Messages
    chosen: str
    rejected: str | None = None
    drafted: int | None = None
    place: str = ""


class _Answered(NamedTuple):
    messages: list[Any]
    chosen: Any
    rejected: Any = None


def read_examples(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    skipped: Callable[[str], None] | None = None,
    load: Load | None = None,
) -> list[Example]:
    """Reads examples, in any of the formats that this module lists.

    Args:
        source: a .parquet, .jsonl or .json file; a folder of such files; `"tiny_world"`, the shipped pairs; or the Hub id of a
            data set, `owner/name`.
        split: part of a data set; of a folder, the files whose names begin with it, if there are any.
        limit: most examples; no row is read after them.
        skipped: called with the error of each row that cannot be used, which is left out; without it such a row is an error.
        load: loads a data set of the Hub; default: `datasets.load_dataset`.

    Raises:
        WSDValueError: a source that cannot be read, unknown columns, or a row that cannot be used, by its place: an answer is
            empty, both are the same, one repeats the prompt, or a chat has other roles or another order.
    """
    examples = list(islice(_examples(source, split, skipped, load or _load_dataset), limit))
    if not examples:
        raise WSDValueError(f"{source}: there are no examples in it")
    return examples


def _examples(source: str | Path, split: str, skipped: Callable[[str], None] | None, load: Load) -> Iterator[Example]:
    for place, row in _rows(source, split, load):
        try:
            yield _example(row, place)
        except _UnknownColumns:
            raise
        except WSDValueError as error:
            if skipped is None:
                raise WSDValueError(f"{error} (--skip-bad leaves such rows out)") from None
            skipped(str(error))


class _UnknownColumns(WSDValueError):
    """No row of the data can be read."""


def _rows(source: str | Path, split: str, load: Load) -> Iterator[tuple[str, Any]]:
    """Rows with their places, as JSON in bytes or as objects."""
    path = TINY_WORLD if str(source) == DEMO else Path(source).expanduser()
    if path.is_dir():
        for file in _files(path, split):
            yield from _rows_of_file(file)
    elif path.exists():
        yield from _rows_of_file(path)
    elif isinstance(source, Path) or not _is_hub_id(source):
        raise WSDValueError(f"{source}: no such file or folder; a data set of the Hub is named owner/name")
    else:
        for number, row in enumerate(load(source, split), start=1):
            yield f"{source}, row {number}", row


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and source[0] not in "/.~" and not source.endswith(DATA_FILES)


def _files(folder: Path, split: str) -> list[Path]:
    """The pairs of `wsd-hf make-pairs`; or files of the first kind that there is, those of the split if any are named so."""
    if (pairs := folder / "pairs.jsonl").exists():
        return [pairs]
    for ending in DATA_FILES:
        if files := sorted(folder.rglob(f"*{ending}")):
            return [file for file in files if file.name.startswith(split)] or files
    raise WSDValueError(f"{folder}: there are no {', '.join(DATA_FILES)} files in it")


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix not in DATA_FILES:
        raise WSDValueError(f"{file}: must be a {', '.join(DATA_FILES)} file")
    if file.suffix == ".parquet":
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(_parquet(file), start=1))
    elif file.suffix == ".json" and file.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(parse_json(file.read_bytes(), str(file)), 1))
    else:
        yield from json_lines(file)


def _parquet(file: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise WSDValueError(f'{file}: .parquet files need pyarrow; pip install "wsd_hf[train]"') from None
    try:
        rows: list[Row] = parquet.read_table(file).to_pylist()
    except Exception as error:  # the reader raises what it likes over a damaged file
        raise WSDValueError(f"{file}: {error}") from error
    return rows


def _load_dataset(name: str, split: str) -> Iterable[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise WSDValueError(
            f'{name}: no such file or folder, and data sets of the Hub need datasets; pip install "wsd_hf[train]"'
        ) from None
    try:
        rows: Iterable[Row] = load_dataset(name, split=split)
    except Exception as error:  # a connection, a repository and its files may fail in any way
        raise WSDValueError(f"{name}, split {split}: cannot be loaded: {error}") from error
    return rows


def _example(row: Any, place: str) -> Example:
    row = parse_json(row, place) if isinstance(row, bytes) else row
    if not isinstance(row, Mapping):
        raise WSDValueError(f"{place}: {reprlib.repr(row)}: must be an object with columns")
    given = {name: value for name, value in row.items() if value is not None}
    columns = _format(given) or _format(row)
    if columns is None:
        raise _UnknownColumns(
            f"{place}: the columns {', '.join(map(str, row)) or '(none)'} are of no known format; known are "
            f"{'; '.join(' + '.join(known) for known in FORMATS)}"
        )
    try:
        for name in columns:
            if name not in given:
                raise WSDValueError(f"{name} is empty")
        for label in ("label", "kto_tag"):
            if given.get(label) is False:
                raise WSDValueError(f"{label} is false: a bad answer alone is nothing to learn from")
        return _checked(FORMATS[columns](given), given.get("drafted"), place)
    except WSDValueError as error:
        raise WSDValueError(f"{place}: {error}") from None


def _format(row: Row) -> tuple[str, ...] | None:
    return next((columns for columns in FORMATS if row.keys() >= set(columns)), None)


def _checked(answered: _Answered, drafted: Any, place: str) -> Example:
    check_turns("messages", answered.messages)
    if not answered.messages or answered.messages[-1]["role"] != "user":
        raise WSDValueError("the chat before the answer must end with a user message")
    if not answered.messages[-1]["content"].strip():
        raise WSDValueError("the prompt is empty")
    chosen = _text("chosen", answered.chosen)
    rejected = None if answered.rejected is None else _text("rejected", answered.rejected)
    if chosen == rejected:
        raise WSDValueError("chosen and rejected are the same answer")
    if drafted is not None and not (type(drafted) is int and 0 <= drafted <= len(chosen)):
        raise WSDValueError(f"drafted={drafted!r}: must be a number of characters of chosen, which has {len(chosen)}")
    return Example(messages=answered.messages, chosen=chosen, rejected=rejected, drafted=drafted, place=place)


def _text(name: str, answer: Any) -> str:
    if not isinstance(answer, str):
        raise WSDValueError(f"{name}={reprlib.repr(answer)}: must be a text")
    check_text(name, answer)
    if not answer.strip():
        raise WSDValueError(f"{name} is empty")
    return answer.strip()


# Messages


def _turns(name: str, chat: Any) -> list[Any]:
    """Messages with the usual keys and roles; what is none is left for `check_turns` to refuse."""
    if not isinstance(chat, list):
        raise WSDValueError(f"{name}={reprlib.repr(chat)}: must be a list of messages")
    return [_turn(message) for message in chat]


def _turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    role, content = (
        message.get(other) if message.get(usual) is None else message[usual]
        for usual, other in (("role", "from"), ("content", "value"))
    )
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _whole(name: str, turns: list[Any]) -> tuple[list[Any], Any]:
    """A chat before its answer, and the answer."""
    check_turns(name, turns)
    if not turns or turns[-1]["role"] != "assistant":
        raise WSDValueError(f"the last turn of {name} must be the assistant's answer")
    return turns[:-1], turns[-1]["content"]


def _answer(name: str, value: Any) -> Any:
    """The text of an answer beside its prompt: a text, or an assistant's message, alone or in a list."""
    if not isinstance(value, list | Mapping):
        return value
    turns = _turns(name, value if isinstance(value, list) else [value])
    before, answer = _whole(name, turns)
    if before:
        raise WSDValueError(
            f"{name} has {len(turns)} messages beside a prompt: "
            "keep the answer alone, or leave the prompt out if it is repeated there"
        )
    return answer


def _asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def _system(row: Row) -> list[Any]:
    """The system message in a column of its own."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


# Formats


def _explicit(row: Row) -> _Answered:
    prompt, chosen = row["prompt"], row["chosen"]
    if isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1:
        answered = _implicit(row)
        if not any(message["content"] == prompt for message in answered.messages):
            raise WSDValueError("prompt is none of the messages of chosen")
        return answered
    return _beside(_prompt(prompt), row)


def _prompt(prompt: Any) -> list[Any]:
    return _asked(prompt) if isinstance(prompt, str) else _turns("prompt", prompt)


def _beside(messages: list[Any], row: Row, answer: str = "chosen") -> _Answered:
    """A chat and the answers in columns beside it, none of which repeats the chat as text."""
    chosen, rejected = _answer(answer, row[answer]), _answer("rejected", row.get("rejected"))
    last = messages[-1].get("content") if messages and isinstance(messages[-1], Mapping) else None
    if isinstance(last, str) and len(last.split()) >= COPIED_WORDS:
        for name, text in ((answer, chosen), ("rejected", rejected)):
            if isinstance(text, str) and text.lstrip().startswith(last.strip()):
                raise WSDValueError(f"{name} repeats the prompt, so that a pilot would learn to do so: keep the answer alone")
    return _Answered(messages, chosen, rejected)


def _implicit(row: Row) -> _Answered:
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        return _implicit_text(row["chosen"], row["rejected"])
    before, chosen = _whole("chosen", _turns("chosen", row["chosen"]))
    if row.get("rejected") is None:
        return _Answered(before, chosen)
    other, rejected = _whole("rejected", _turns("rejected", row["rejected"]))
    if before != other:
        raise WSDValueError("chosen and rejected differ before their last turns, so that they answer different chats")
    return _Answered(before, chosen, rejected)


def _implicit_text(chosen: str, rejected: str) -> _Answered:
    """Transcripts of "Human:" and "Assistant:"; of other texts, the words that both begin with are the prompt, as in TRL."""
    if "\n\nAssistant:" in chosen and "\n\nAssistant:" in rejected:
        return _implicit({"chosen": _transcript(chosen), "rejected": _transcript(rejected)})
    length = min(len(chosen), len(rejected))
    length = next((place for place in range(length) if chosen[place] != rejected[place]), length)
    prompt = chosen[: max((place for place in range(length) if chosen[place].isspace()), default=0)]
    if not prompt.strip():
        raise WSDValueError("chosen and rejected begin differently, and there is no prompt: they must begin with the same one")
    return _Answered(_asked(prompt.strip()), chosen[len(prompt) :], rejected[len(prompt) :])


def _transcript(text: str) -> list[Any]:
    turns = []
    for part in f"\n\n{text.strip()}".split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns += [{"role": "user", "content": question.strip()}]
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def _completion(row: Row) -> _Answered:
    return _beside(_prompt(row["prompt"]), row, answer="completion")


def _chat(row: Row) -> _Answered:
    column = next(name for name in ("conversations", "context", "messages") if name in row)
    turns = _system(row) + _turns(column, row[column])
    return _beside(turns, row) if "chosen" in row else _Answered(*_whole(column, turns))


def _alpaca(row: Row) -> _Answered:
    turns = _system(row)
    for exchange in row.get("history", []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise WSDValueError(f"history holds {reprlib.repr(exchange)}: must be lists of a question and its answer")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    return _beside(turns + _asked("\n".join(map(str, parts))), row, answer="chosen" if "chosen" in row else "output")


def _scored(row: Row) -> _Answered:
    completions = row["completions"]
    try:
        ranked = sorted(completions, key=lambda completion: completion["overall_score"], reverse=True)
        best, worst = ranked[0], ranked[-1]
        if best["overall_score"] == worst["overall_score"]:
            raise WSDValueError("all completions have the same overall_score, so that none is better")
        return _Answered(_asked(row["instruction"]), best["response"], worst["response"])
    except (KeyError, IndexError, TypeError):
        raise WSDValueError("completions must be a list of objects with response and overall_score") from None


FORMATS: Mapping[tuple[str, ...], Callable[[Row], _Answered]] = {
    ("prompt", "chosen"): _explicit,
    ("prompt", "completion"): _completion,
    ("conversations",): _chat,
    ("context",): _chat,
    ("instruction", "completions"): _scored,
    ("instruction", "chosen"): _alpaca,
    ("instruction", "output"): _alpaca,
    ("messages",): _chat,
    ("chosen", "rejected"): _implicit,
}
"""Readers by the columns that they need; the first one whose columns a row has reads it."""
