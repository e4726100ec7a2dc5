"""Answer files for AlpacaEval, Arena-Hard and MT-Bench: what stands in them, and how they are gone on with."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import wsd_hf
from families import tiny_parts
from wsd_hf import WSDValueError
from wsd_hf.cli import app
from wsd_hf.integrations.export import AnswerFile
from wsd_hf.tiny import FOLDER

KELOFT, QUIBIME = "What does the Keloft eat?", "Which things fill the shelves of Quibime?"
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [
        {"instruction": KELOFT, "output": "Pears.", "generator": "text_davinci_003", "dataset": "helpful_base"},
        {"instruction": "Ünï\u2028code?"},
    ],
    "arena_hard": [
        {"uid": "328c149ed45a41c0", "category": "hard_prompt", "subcategory": "coding", "prompt": KELOFT},
        {"uid": "b43c07656ead4150", "category": "hard_prompt", "prompt": "Ünï\u2028code?"},
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": [KELOFT, "Say it again."]},
        {"question_id": 82, "category": "writing", "turns": ["Ünï\u2028code?"]},
    ],
}
ANSWERS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [
        {"instruction": KELOFT, "output": f"re: {KELOFT}", "generator": "ours"},
        {"instruction": "Ünï\u2028code?", "output": "re: Ünï\u2028code?", "generator": "ours"},
    ],
    "arena_hard": [
        {
            "uid": "328c149ed45a41c0",
            "model": "ours",
            "messages": [{"role": "user", "content": KELOFT}, {"role": "assistant", "content": {"answer": f"re: {KELOFT}"}}],
            "tstamp": 7.5,
        },
        {
            "uid": "b43c07656ead4150",
            "model": "ours",
            "messages": [
                {"role": "user", "content": "Ünï\u2028code?"},
                {"role": "assistant", "content": {"answer": "re: Ünï\u2028code?"}},
            ],
            "tstamp": 7.5,
        },
    ],
    "mt_bench": [
        {
            "question_id": 81,
            "model_id": "ours",
            "choices": [{"index": 0, "turns": [f"re: {KELOFT}", f"re: {KELOFT} re: {KELOFT} Say it again."]}],
            "tstamp": 7.5,
        },
        {"question_id": 82, "model_id": "ours", "choices": [{"index": 0, "turns": ["re: Ünï\u2028code?"]}], "tstamp": 7.5},
    ],
}


def questions(kind: str, folder: Path) -> Path:
    """The question file of a project, in characters as they are and with an empty line at the end."""
    folder.mkdir(exist_ok=True)
    path = folder / "questions"
    records = QUESTIONS[kind]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records) + "\n"
    path.write_text(json.dumps(records, ensure_ascii=False) if kind == "alpaca_eval" else lines, encoding="utf-8")
    return path


def read(kind: str, path: Path) -> list[dict[str, Any]]:
    """The records of an answer file, read as their projects read them: in whatever encoding the system has."""
    text = path.read_text("ascii")
    return json.loads(text) if kind == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]


def echo(chat: Any) -> str:
    return "re: " + " ".join(message["content"] for message in chat)


def write(kind: str, folder: Path, ask: Any = echo, model: str | None = "ours") -> Path:
    """Answers whatever is missing."""
    out = folder / "deep" / "answers.jsonl"
    with AnswerFile(kind, questions(kind, folder), out, model) as answers:
        for question in answers.missing:
            answers.add(question, ask, now=lambda: 7.5)
    return out


@pytest.mark.parametrize("kind", QUESTIONS)
def test_records_are_those_that_the_judges_read(kind: str, tmp_path: Path) -> None:
    records = read(kind, write(kind, tmp_path))
    ids = [record.pop(key) for record in records for key in ("ans_id", "answer_id") if key in record]
    assert records == ANSWERS[kind]
    assert len(set(ids)) == (0 if kind == "alpaca_eval" else 2)


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize("answered", [0, 1, 2])
def test_an_interruption_loses_no_answer_and_none_is_asked_for_again(kind: str, answered: int, tmp_path: Path) -> None:
    asked: list[str] = []

    def interrupted(chat: Any) -> str:
        if len(asked) == answered:
            raise KeyboardInterrupt
        asked.append(chat[-1]["content"])
        return echo(chat)

    def counted(chat: Any) -> str:
        asked.append(chat[0]["content"])
        return echo(chat)

    out = tmp_path / "deep" / "answers.jsonl"
    with contextlib.suppress(KeyboardInterrupt):
        write(kind, tmp_path, interrupted)
    kept = read(kind, out) if out.exists() else []
    assert len(kept) == (answered // 2 if kind == "mt_bench" else answered)  # its first question has two turns
    asked.clear()
    write(kind, tmp_path, counted)
    assert read(kind, out)[: len(kept)] == kept
    assert out.read_bytes() == write(kind, tmp_path / "in one go").read_bytes()
    firsts = [KELOFT, "Ünï\u2028code?"][len(kept) :]
    assert list(dict.fromkeys(asked)) == firsts


@pytest.mark.parametrize("kind", QUESTIONS)
def test_an_interrupted_write_leaves_the_file_as_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "answers.jsonl"
    answers = AnswerFile(kind, questions(kind, tmp_path), out, "ours")
    first, second = answers.missing
    answers.add(first, echo)
    before = out.read_bytes()

    def half(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        answers.add(second, echo)
    assert out.read_bytes() == before


def test_a_question_that_is_asked_twice_is_answered_twice(tmp_path: Path) -> None:
    path, out = tmp_path / "questions.json", tmp_path / "answers.json"
    path.write_text(json.dumps([{"instruction": "Why?"}] * 2))
    for left in (2, 1):
        with AnswerFile("alpaca_eval", path, out, "ours") as answers:
            assert len(answers.missing) == left
            answers.add(answers.missing[0], echo)
    assert AnswerFile("alpaca_eval", path, out, "ours").missing == []


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("mt_bench", b'{"question_id": 81, "turns": ["Hi"]}\n\n{"question_id": 82, "turns"', "line 3: not JSON"),
        (
            "mt_bench",
            b'{"question_id": 81, "turns": ["Hi"]}\n{"question_id": 82}\n',
            "line 2: turns=None must be a list",
        ),
        ("mt_bench", b'{"question_id": 81, "turns": []}', r"line 1: turns=\[\] must be a list of texts"),
        ("mt_bench", b'{"turns": ["Hi"]}', "line 1: question_id=None must be a text or a whole number"),
        ("arena_hard", b'{"question_id": "a", "turns": [{"content": "Hi"}]}', "line 1: uid=None must be"),
        ("arena_hard", b'{"uid": "a", "prompt": ["Hi"]}', r"line 1: prompt=\['Hi'\] must be a text"),
        ("arena_hard", b'["Hi"]', "line 1: must be a JSON object with uid and prompt"),
        ("arena_hard", b'{"uid": "a", "prompt": "\xff"}', "line 1: not JSON in UTF-8"),
        ("alpaca_eval", b'[{"instruction": "Hi"}, {"output": "Hi"}]', "item 2: instruction=None must be a text"),
        ("alpaca_eval", b'{"instruction": "Hi"}', "must be one JSON list"),
        ("alpaca_eval", b'[{"instruction": "Hi"},', "not JSON"),
        ("arena_hard", b'{"uid": "a", "prompt": "\\ud800"}', "line 1: holds half of a surrogate pair"),
        ("alpaca_eval", b"[]", "there are no questions in it"),
        ("alpaca", b"[]", "kind='alpaca': must be 'alpaca_eval' or"),
    ],
)
def test_a_malformed_question_is_named_by_its_place(kind: str, content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "questions"
    path.write_bytes(content)
    with pytest.raises(WSDValueError, match=problem):
        AnswerFile(kind, path, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


def test_a_malformed_answer_is_named_and_answers_of_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    out = write("mt_bench", tmp_path)
    with pytest.raises(WSDValueError, match=r"holds answers of 'ours', not of 'answers'"):
        write("mt_bench", tmp_path, model=None)
    out.write_text(out.read_text() + '{"question_id"')
    with pytest.raises(WSDValueError, match="line 3: not JSON"):
        write("mt_bench", tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("mt_bench", "question_id=81"), ("alpaca_eval", "instruction='What does")])
def test_a_question_that_cannot_be_answered_is_named(kind: str, name: str, tmp_path: Path) -> None:
    def refuse(chat: Any) -> str:
        raise WSDValueError("too long")

    with pytest.raises(WSDValueError, match=f"^{name}.*: too long$"):
        write(kind, tmp_path, refuse)


def test_the_command_asks_the_second_question_after_the_first_answer(tmp_path: Path) -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    chat, wanted = [], []
    for question in (KELOFT, QUIBIME):
        chat.append({"role": "user", "content": question})
        inputs = wsd_hf.build_inputs(chat, tokenizer, pilot_tokenizer)
        ids = base.generate(**inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=40, wsd_threshold=0.7)
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wanted.append(text.split("\n\n[")[0].strip())
        chat.append({"role": "assistant", "content": wanted[-1]})

    path, out = tmp_path / "question.jsonl", tmp_path / "wsd.jsonl"
    path.write_text(json.dumps({"question_id": 81, "category": "writing", "turns": [KELOFT, QUIBIME]}))
    options = ["mt_bench", "--questions", path, "--out", out, "--threshold", 0.7, "--max-new-tokens", 40]
    models = ["--base", FOLDER / "base", "--pilot", FOLDER / "pilot"]
    result = CliRunner().invoke(app, ["answers", *map(str, [*options, *models])])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    (record,) = read("mt_bench", out)
    assert record["choices"] == [{"index": 0, "turns": wanted}]
    assert record["model_id"] == "wsd"
    assert record["tstamp"] > 1e9

    again = CliRunner().invoke(app, ["answers", *map(str, [*options, "--base", "/no/such/base", "--pilot", "x"])])
    assert again.exit_code == 0
    assert "every question has its answer" in again.stderr
    assert read("mt_bench", out) == [record]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("alpaca",), "kind='alpaca': must be"),
        (("mt_bench", "--questions", "/no/such/file"), "No such file"),
        (("mt_bench", "--window-size", 0), "window_size=0: must be"),
        (("mt_bench", "--base", "x"), "--pilot is missing"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_status_2(options: tuple[Any, ...], problem: str, tmp_path: Path) -> None:
    given = ["--questions", questions("mt_bench", tmp_path), "--out", tmp_path / "out.jsonl", *options]
    check_refused(["answers", *given], problem)


@pytest.mark.parametrize("export", [("--export", "mt_bench"), ("--export=mt_bench",)])
def test_the_old_spelling_has_the_new_one_in_one_line(export: tuple[str, ...]) -> None:
    check_refused(["eval", *export, "--questions", "q", "--out", "a"], "wsd-hf answers KIND --questions FILE --out FILE")


def check_refused(arguments: list[Any], problem: str) -> None:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("wsd-hf: ")
    assert problem in last
