"""Answer files for the judges of AlpacaEval, Arena-Hard and MT-Bench, from the question files of those projects.

| kind | questions | answers | as read and written by |
|---|---|---|---|
| alpaca_eval | one JSON list: `instruction` | one JSON list: `instruction`, `output`, `generator` | tatsu-lab/alpaca_eval: \
README.md and example/outputs.json; src/alpaca_eval/annotators/pairwise_evaluator.py merges on the instruction |
| arena_hard | a line each: `uid`, `prompt` | a line each: `uid`, `ans_id`, `model`, `messages`, `tstamp`; the answer is \
`messages[-1]["content"]["answer"]` | lmarena/arena-hard-auto: gen_answer.py writes, gen_judgment.py reads |
| mt_bench | a line each: `question_id`, `turns` | a line each: `question_id`, `answer_id`, `model_id`, `choices`, `tstamp`; \
the answers are `choices[0]["turns"]` | lm-sys/FastChat: fastchat/llm_judge/gen_model_answer.py writes, common.py reads |

Arena-Hard's style control needs counts of markdown too, which its own utils/add_markdown_info.py adds to a finished file.
AlpacaEval reads a file named NAME.json; Arena-Hard and MT-Bench read NAME.jsonl, where NAME is the model's.
"""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WSDValueError
from ..files import write_whole
from ..ranks import ALONE, Parts, Rank
from ..text.chat import Messages, check_text
from ..text.json_data import check_texts, json_lines, parse_json

Record = dict[str, Any]
Ask = Callable[[Messages], str]
"""A function from a chat that ends with the user's turn to the answer."""


def _alpaca_eval(question: Record, answers: list[str], model: str, _answer_id: str, _time: float) -> Record:
    return {"instruction": question["instruction"], "output": answers[0], "generator": model}


def _arena_hard(question: Record, answers: list[str], model: str, answer_id: str, time: float) -> Record:
    asked = {"role": "user", "content": question["prompt"]}
    answered = {"role": "assistant", "content": {"answer": answers[0]}}
    return {"uid": question["uid"], "ans_id": answer_id, "model": model, "messages": [asked, answered], "tstamp": time}


def _mt_bench(question: Record, answers: list[str], model: str, answer_id: str, time: float) -> Record:
    return {
        "question_id": question["question_id"],
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": 0, "turns": answers}],
        "tstamp": time,
    }


@dataclass(frozen=True)
class _Kind:
    """Layout of one project's files: keys of questions and answers, and the record of an answer."""

    record: Callable[[Record, list[str], str, str, float], Record]
    """From the question, the answer to each turn, the model's name, the answer's id, and the time."""
    id: str
    """Key that identifies a question, also in answers."""
    text: str
    """Key of the question's text, or list of turns."""
    model: str
    """Key of the model's name in answers."""
    turns: bool = False
    one_list: bool = False
    """True if a file is one JSON list; else each line is a record."""


KINDS = {
    "alpaca_eval": _Kind(_alpaca_eval, id="instruction", text="instruction", model="generator", one_list=True),
    "arena_hard": _Kind(_arena_hard, id="uid", text="prompt", model="model"),
    "mt_bench": _Kind(_mt_bench, id="question_id", text="turns", model="model_id", turns=True),
}
"""Layouts by the names that `AnswerFile` takes."""

WORDS = {str: "a text", int: "a whole number", list: "a list of texts"}


class AnswerFile:
    """Answers of one model to one project's questions; an existing file is continued.

    No other run can open the file until this one leaves it: use it in a `with` statement, or call `close`. `missing` holds the
    questions that had no answer when it was opened, in order. The processes of a launcher share the file: each has some of the
    missing questions and writes a part of its own, until `finish` puts the parts together.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "questions.json").write_text('[{"instruction": "Who eats acorns?"}]')
    >>> with AnswerFile("alpaca_eval", folder / "questions.json", folder / "answers.json", "my-model") as answers:
    ...     for question in answers.missing:
    ...         answers.add(question, ask=lambda chat: "The Keloft.")
    >>> json.loads((folder / "answers.json").read_text())
    [{'instruction': 'Who eats acorns?', 'output': 'The Keloft.', 'generator': 'my-model'}]

    Args:
        kind: "alpaca_eval", "arena_hard" or "mt_bench".
        questions: the project's question file.
        path: the answer file.
        model: the model's name in it; default: the file's name without its ending.
        rank: this process, among those that share the file.

    Raises:
        WSDValueError: another kind, no question, a malformed question or answer, answers of another model, or a model's
            name that is not a text; or another run has the file open.
    """

    def __init__(self, kind: str, questions: Path, path: Path, model: str | None = None, rank: Rank = ALONE) -> None:
        if kind not in KINDS:
            raise WSDValueError(f"kind={kind!r}: must be {' or '.join(map(repr, KINDS))}")
        self._kind = KINDS[kind]
        self.path = path
        self._model = model or path.stem
        check_text("model", self._model)
        id, text = self._kind.id, self._kind.text
        self._questions = _read(questions, self._kind, {id: (str, int), text: (list,) if self._kind.turns else (str,)})
        if not self._questions:
            raise WSDValueError(f"{questions}: there are no questions in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._parts = Parts(path, rank)
        with ExitStack() as held, self._parts.one_at_a_time():
            held.enter_context(self._parts.lock())
            given, _ = self._answers()
            own = self._parts.own
            self._records = self._read(own) if own.exists() else []
            self._held = held.pop_all()
        self.missing = [question for question, answer in rank.share(given) if answer is None]
        self._before = all(answer for _, answer in given)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the file to other runs."""
        self._held.close()

    def add(self, question: Record, ask: Ask, now: Callable[[], float] = time.time) -> None:
        """Answers one of the missing questions, and writes the whole file; an interruption leaves the file as it was.

        Each turn's chat for `ask` holds the earlier answers; a WSDValueError of `ask` gets the question's name.
        """
        turns = question[self._kind.text]
        chat: list[dict[str, str]] = []
        for turn in turns if self._kind.turns else [turns]:
            chat.append({"role": "user", "content": turn})
            try:
                chat.append({"role": "assistant", "content": ask(tuple(chat))})
            except WSDValueError as error:
                raise WSDValueError(f"{self._kind.id}={reprlib.repr(question[self._kind.id])}: {error}") from error
        answers = [message["content"] for message in chat[1::2]]
        # The same model's answer to the same question always has the same id.
        answer_id = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._model}/{question[self._kind.id]}").hex
        record = self._kind.record(question, answers, self._model, answer_id, now())
        records = [*self._records, record]
        write_whole(self._parts.own, self._text(records))
        self._parts.wrote = True
        self._records = records

    def finish(self) -> bool:
        """Puts the parts of all processes together, in the order of the questions, if every question has its answer.

        Returns:
            Whether this process is the one to go on with the whole: the last that had something to do, or the first if none
            had. True in one process.
        """
        with self._parts.one_at_a_time():
            given, others = self._answers()
            answers = [answer for _, answer in given if answer is not None]
            last = self._parts.last(self._before, len(answers) == len(given))
            if last:
                self._parts.merge(self._text([*answers, *others]))
            return last

    def _answers(self) -> tuple[list[tuple[Record, Record | None]], list[Record]]:
        """Each question with its answer in any part, and the answers to other questions."""
        id, left = self._kind.id, defaultdict[Any, list[Record]](list)
        for file in self._parts.existing():
            for record in self._read(file):
                left[record[id]].append(record)
        # A question that is asked twice needs two answers.
        given = [(question, left[question[id]].pop(0) if left[question[id]] else None) for question in self._questions]
        for question in self._questions:  # a process that was killed while it merged leaves answers twice
            left.pop(question[id], None)
        return given, [record for records in left.values() for record in records]

    def _read(self, file: Path) -> list[Record]:
        """Answers of this model; a WSDValueError if there are others."""
        records = _read(file, self._kind, {self._kind.id: (str, int), self._kind.model: (str,)})
        for record in records:
            if record[self._kind.model] != self._model:
                raise WSDValueError(
                    f"{file} holds answers of {record[self._kind.model]!r}, not of {self._model!r}: "
                    "give another file, or that name"
                )
        return records

    def _text(self, records: list[Record]) -> str:
        """The content of a file."""
        # ASCII, since FastChat reads with the system's encoding.
        lines = [json.dumps(records, indent=2)] if self._kind.one_list else map(json.dumps, records)
        return "".join(f"{line}\n" for line in lines)


def _read(path: Path, kind: _Kind, wanted: dict[str, tuple[type, ...]]) -> list[Record]:
    """Records of a file; a WSDValueError unless each has the wanted keys, with values of the wanted types."""
    if kind.one_list:
        records = parse_json(path.read_bytes(), str(path))
        if not isinstance(records, list):
            raise WSDValueError(f"{path}: must be one JSON list")
        named = [(f"{path}, item {number}", record) for number, record in enumerate(records, 1)]
    else:
        named = [(place, parse_json(line, place)) for place, line in json_lines(path)]
    for place, record in named:
        _check(record, place, wanted)
    return [record for _, record in named]


def _check(record: Any, place: str, wanted: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(record, dict):
        raise WSDValueError(f"{place}: must be a JSON object with {' and '.join(wanted)}")
    check_texts(record, place)
    for key, types in wanted.items():
        value = record.get(key)
        texts = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        if not isinstance(value, types) or (isinstance(value, list) and not texts):
            raise WSDValueError(f"{place}: {key}={reprlib.repr(value)} must be {' or '.join(WORDS[kind] for kind in types)}")
