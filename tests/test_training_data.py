"""Training data of every format, and of none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_world"))
from world import World

from wsd_hf import WSDValueError
from wsd_hf.tiny import demo_questions
from wsd_hf.tiny.judge import score
from wsd_hf.training.examples import DATA_FILES, FORMATS, TINY_WORLD, Example, read_examples

GOLDEN = Path(__file__).parent / "data" / "training"

Message = dict[str, str]


def chat(*contents: str, system: str | None = None) -> list[Message]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


LEMON = "Which colour has a ripe lemon?"
SPIDER = "How many legs has a spider?"
YELLOW, BLUE = "A ripe lemon is yellow.", "A ripe lemon is blue."
EIGHT, SIX = "A spider has eight legs.", "It has six legs."
TALK = chat("Hello!", "Good day!", SPIDER, system="Answer in one sentence.")

Wanted = list[tuple[list[Message], str, str | None]]

BOTH: Wanted = [(chat(LEMON), YELLOW, BLUE), (TALK, EIGHT, SIX)]
SHORT: Wanted = [(chat(LEMON), YELLOW, BLUE), (chat(SPIDER), EIGHT, SIX)]
ALONE: Wanted = [(messages, chosen, None) for messages, chosen, _ in BOTH]

WANTED: dict[str, Wanted] = {
    "trl_explicit.jsonl": BOTH,
    "trl_explicit_text.jsonl": SHORT,
    "trl_implicit.jsonl": BOTH,
    "trl_implicit_transcripts.jsonl": [BOTH[0], (TALK[1:], EIGHT, SIX)],
    "trl_implicit_text.jsonl": [(chat(LEMON), "Yellow.", "Blue."), (chat(SPIDER), "Eight.", "Eighty.")],
    "trl_completion.jsonl": ALONE,
    "messages.jsonl": ALONE,
    "ultrafeedback_binarized.json": SHORT,
    "ultrafeedback.json": SHORT,
    "sharegpt.json": ALONE,
    "sharegpt_ranking.json": BOTH,
    "openai_ranking.json": BOTH,
    "alpaca.json": [ALONE[0], ([*TALK[:-1], *chat("How many legs has this animal?\nA spider.")], EIGHT, None)],
    "alpaca_ranking.json": BOTH,
    "official_context.jsonl": [BOTH[0], (TALK, EIGHT, None)],
}


def content(examples: list[Example]) -> Wanted:
    return [([dict(message) for message in one.messages], one.chosen, one.rejected) for one in examples]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def golden(name: str) -> list[dict[str, Any]]:
    """Rows of a format, in which columns that some of them lack are None, as in data sets of the Hub."""
    text = (GOLDEN / name).read_text("utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    columns = {column: None for row in rows for column in row}
    return [{**columns, **row} for row in rows]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The error for a row after a good one, without its place."""

    def read(row: Any) -> str:
        file = write(tmp_path / "data.jsonl", {"prompt": "Why?", "chosen": "So."}, row)
        with pytest.raises(WSDValueError) as error:
            read_examples(file)
        begin, end = f"{file}, line 2: ", " (--skip-bad leaves such rows out)"
        assert str(error.value).startswith(begin)
        return str(error.value).removeprefix(begin).removesuffix(end)

    return read


# Formats


def test_every_format_has_golden_rows() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == {*WANTED, "README.md"}


@pytest.mark.parametrize("name", WANTED)
def test_rows_of_every_format(name: str) -> None:
    assert content(read_examples(GOLDEN / name)) == WANTED[name]


@pytest.mark.parametrize("name", WANTED)
def test_rows_of_every_format_from_the_hub(name: str) -> None:
    asked = []

    def load(*which: str) -> Any:
        asked.append(which)
        return iter(golden(name))

    examples = read_examples("someone/something", split="train_prefs", load=load)
    assert content(examples) == WANTED[name]
    assert asked == [("someone/something", "train_prefs")]
    assert [example.place for example in examples] == ["someone/something, row 1", "someone/something, row 2"]


@pytest.mark.parametrize("name", WANTED)
def test_rows_of_every_format_as_datasets_gives_them(name: str) -> None:
    datasets, rows = pytest.importorskip("datasets"), golden(name)
    if name == "trl_completion.jsonl":  # a column has one type
        rows = rows[1:]
    examples = read_examples("someone/something", load=lambda *_: datasets.Dataset.from_list(rows))
    assert content(examples) == WANTED[name][-len(rows) :]


@pytest.mark.parametrize("name", ["trl_explicit.jsonl", "sharegpt_ranking.json", "ultrafeedback.json", "alpaca.json"])
def test_rows_of_a_parquet_file(name: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(golden(name)), file)
    examples = read_examples(file)
    assert content(examples) == WANTED[name]
    assert examples[1].place == f"{file}, row 2"


def test_pairs_of_ones_own_have_the_pilots_share(tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", {"prompt": chat(LEMON), "chosen": chat("", YELLOW)[1:], "drafted": 7})
    assert read_examples(file)[0].drafted == 7
    assert read_examples(tmp_path) == read_examples(file)


def test_the_shipped_pairs_are_those_of_the_world() -> None:
    lines = [json.loads(line) for line in TINY_WORLD.read_text("utf-8").splitlines()]
    assert lines == World(3).preferences(len(lines))
    held_out = {question.text for question in World(3).held_out_questions()}
    held_out |= {question["messages"][-1]["content"] for question in demo_questions()}
    for line, example in zip(lines, read_examples("tiny_world"), strict=True):
        record = {**line, "messages": example.messages}
        assert (score(record, example.chosen), score(record, str(example.rejected))) == (1, 0)
        assert example.messages == chat(line["prompt"])
        assert line["prompt"] not in held_out


# Sources


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "data.json", {"prompt": LEMON, "chosen": YELLOW}, {"prompt": SPIDER, "chosen": EIGHT})
    assert [example.place for example in read_examples(file)] == [f"{file}, line 1", f"{file}, line 2"]


def test_all_files_of_a_folder_are_read_or_those_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-1.jsonl", {"prompt": LEMON, "chosen": YELLOW})
    write(tmp_path / "data" / "train-2.jsonl", {"prompt": SPIDER, "chosen": EIGHT})
    write(tmp_path / "data" / "test.jsonl", {"prompt": SPIDER, "chosen": SIX})
    assert [example.chosen for example in read_examples(tmp_path)] == [YELLOW, EIGHT]
    assert [example.chosen for example in read_examples(tmp_path, split="test")] == [SIX]
    assert [example.chosen for example in read_examples(tmp_path, split="other")] == [SIX, YELLOW, EIGHT]


def test_of_a_folder_one_kind_of_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", {"prompt": LEMON, "chosen": YELLOW})
    (tmp_path / "dataset_info.json").write_text('{"rows": 1}', "utf-8")
    assert [example.chosen for example in read_examples(tmp_path)] == [YELLOW]


def test_no_row_is_read_after_the_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", {"prompt": LEMON, "chosen": YELLOW}, {"prompt": SPIDER, "chosen": ""})
    assert [example.chosen for example in read_examples(file, limit=1)] == [YELLOW]


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "~/nowhere", "a/b/c", "folder/nowhere.json", "tiny"])
def test_a_source_that_is_not_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WSDValueError, match=r"no such file or folder; a data set of the Hub is named owner/name"):
        read_examples(source, load=lambda *_: pytest.fail("the Hub was asked"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WSDValueError, match=r"must be a \.parquet, \.jsonl, \.json file"):
        read_examples(write(tmp_path / "data.csv", {}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WSDValueError, match=r"there are no \.parquet, \.jsonl, \.json files in it"):
        read_examples(tmp_path / "empty")


@pytest.mark.parametrize("name", [f"data{ending}" for ending in DATA_FILES])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text('[{"prompt": ', "utf-8")
    with pytest.raises(WSDValueError) as error:
        read_examples(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_file_without_examples(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(WSDValueError, match=r"data\.jsonl: there are no examples in it"):
        read_examples(tmp_path / "data.jsonl")


def test_data_sets_of_the_hub_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WSDValueError, match=r'need datasets; pip install "wsd_hf\[train\]"'):
        read_examples("someone/something")


def test_parquet_files_need_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").touch()
    with pytest.raises(WSDValueError, match=r'need pyarrow; pip install "wsd_hf\[train\]"'):
        read_examples(tmp_path / "data.parquet")


# Rows that cannot be used


def test_unknown_columns_are_named_with_the_known_ones() -> None:
    rows = [{"query": "Why?", "good_head": "Well", "bad_head": "No"}]
    with pytest.raises(WSDValueError) as error:
        read_examples("songff/GenerAlign", load=lambda *_: rows, skipped=lambda _: None)
    message = str(error.value)
    assert message.startswith(
        "songff/GenerAlign, row 1: the columns query, good_head, bad_head are of no known format; known are "
    )
    assert all(" + ".join(columns) in message for columns in FORMATS)


WHOLE = {"prompt": chat(LEMON), "chosen": chat(LEMON, YELLOW), "rejected": chat(LEMON, BLUE)}
LONG = "Which colour has a lemon that is ripe?"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ([1], "[1]: must be an object with columns"),
        ({"prompt": LEMON, "chosen": "", "rejected": BLUE}, "chosen is empty"),
        ({"prompt": LEMON, "chosen": None, "rejected": BLUE}, "chosen is empty"),
        ({"prompt": LEMON, "chosen": [], "rejected": BLUE}, "the last turn of chosen must be the assistant's answer"),
        ({"prompt": LEMON, "chosen": YELLOW, "rejected": " \n"}, "rejected is empty"),
        ({"prompt": " ", "chosen": YELLOW, "rejected": BLUE}, "the prompt is empty"),
        ({"prompt": [], "chosen": YELLOW}, "the chat before the answer must end with a user message"),
        ({"prompt": LEMON, "chosen": YELLOW, "rejected": f"{YELLOW}\n"}, "chosen and rejected are the same answer"),
        ({"prompt": LEMON, "chosen": 8}, "chosen=8: must be a text"),
        ({"prompt": chat(LEMON, YELLOW), "chosen": BLUE}, "the chat before the answer must end with a user message"),
        (
            WHOLE,
            "chosen has 2 messages beside a prompt: keep the answer alone, or leave the prompt out if it is repeated there",
        ),
        (
            {"prompt": LONG, "chosen": f"{LONG} {YELLOW}", "rejected": f"{LONG} {BLUE}"},
            "chosen repeats the prompt, so that a pilot would learn to do so: keep the answer alone",
        ),
        (
            {"prompt": LONG, "completion": f"{LONG} {YELLOW}"},
            "completion repeats the prompt, so that a pilot would learn to do so: keep the answer alone",
        ),
        ({"prompt": SPIDER, **{k: v for k, v in WHOLE.items() if k != "prompt"}}, "prompt is none of the messages of chosen"),
        ({"messages": chat(LEMON)}, "the last turn of messages must be the assistant's answer"),
        ({"chosen": chat(LEMON), "rejected": chat(LEMON)}, "the last turn of chosen must be the assistant's answer"),
        (
            {"chosen": chat(LEMON, YELLOW), "rejected": chat(SPIDER, SIX)},
            "chosen and rejected differ before their last turns, so that they answer different chats",
        ),
        ({"chosen": f"{LEMON} Yellow.", "rejected": f"{LEMON} Yellow."}, "chosen and rejected are the same answer"),
        (
            {"chosen": "Yellow.", "rejected": "Blue."},
            "chosen and rejected begin differently, and there is no prompt: they must begin with the same one",
        ),
        (
            {"messages": [{"role": "narrator", "content": "Once."}, *chat(LEMON, YELLOW)]},
            "messages[0]={'content': 'Once.', 'role': 'narrator'}: must have a role (system, user, assistant) and a "
            "text as content",
        ),
        (
            {"conversations": [{"from": "observation", "value": "3"}, {"from": "gpt", "value": YELLOW}]},
            "conversations[0]={'content': '3', 'role': 'observation'}: must have a role (system, user, assistant) and a "
            "text as content",
        ),
        ({"messages": "Hello"}, "messages='Hello': must be a list of messages"),
        (
            {"instruction": LEMON, "output": YELLOW, "history": ["Hello!"]},
            "history holds 'Hello!': must be lists of a question and its answer",
        ),
        (
            {"instruction": LEMON, "completions": [{"response": YELLOW}]},
            "completions must be a list of objects with response and overall_score",
        ),
        (
            {"instruction": LEMON, "completions": [{"response": YELLOW, "overall_score": 3.0}]},
            "all completions have the same overall_score, so that none is better",
        ),
        (
            {"prompt": LEMON, "completion": BLUE, "label": False},
            "label is false: a bad answer alone is nothing to learn from",
        ),
        (
            {"prompt": LEMON, "chosen": YELLOW, "drafted": 99},
            "drafted=99: must be a number of characters of chosen, which has 23",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused_by_their_place(refused: Callable[[Any], str], row: Any, error: str) -> None:
    assert refused(row) == error


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Why?", "chosen": "\\ud800"}\n', "utf-8")
    with pytest.raises(WSDValueError, match=r"line 1: chosen: holds half of a surrogate pair"):
        read_examples(tmp_path / "data.jsonl")


def test_a_short_prompt_may_begin_its_answer(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", {"prompt": "Hello", "chosen": "Hello there!", "rejected": "Hello."})
    assert read_examples(file)[0].chosen == "Hello there!"


def test_bad_rows_are_left_out_if_wanted(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Why?", "chosen": "So."}\n{"prompt": "", "chosen": "So."}\n{\n', "utf-8")
    skipped: list[str] = []
    [example] = read_examples(tmp_path / "data.jsonl", skipped=skipped.append)
    assert example.chosen == "So."
    assert [error.partition(": ")[0][-6:] for error in skipped] == ["line 2", "line 3"]
