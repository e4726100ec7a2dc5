"""`wsd-hf diagnose`: files, summary, runs that are stopped and resumed, and wrong options."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from wsd_hf import Pair
from wsd_hf.cli import app
from wsd_hf.comparison.store import Store
from wsd_hf.diagnosis.diagnosis import diagnose
from wsd_hf.tiny import demo_questions

QUESTIONS = demo_questions()[:3]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


@pytest.fixture
def loads(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shipped pair is the module's; a list that grows with each time that it is loaded."""
    calls: list[str] = []

    def tiny(**_settings: Any) -> Pair:
        calls.append("shipped pair")
        return pair

    monkeypatch.setattr(Pair, "tiny", tiny)
    return calls


@pytest.fixture
def run(loads: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs the command on three questions and few tokens, unless other options are given."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), "utf-8")

    def command(*words: str, **options: Any) -> Any:
        options = {"prompts": prompts, "max_draft_tokens": 24, "out": tmp_path / "out", **options}
        given = [[f"--{name.replace('_', '-')}", str(value)] for name, value in options.items() if value is not None]
        return CliRunner().invoke(app, ["diagnose", *(word for option in given for word in option), *words])

    return command


def readings(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, by writer and prompt, without the times that depend on the machine."""
    lines = [json.loads(line) for line in (folder / "readings.jsonl").read_text("utf-8").splitlines()]
    lines.sort(key=lambda line: (line["writer"], line["prompt"]))
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_numbers_page_and_summary_are_those_of_the_function(run: Callable[..., Any], pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run()
    assert result.exit_code == 0, result.stderr
    found = diagnose(pair, QUESTIONS, max_draft_tokens=24)
    data = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))
    settings = data.pop("settings")
    assert data == found.to_dict()
    assert settings["--max-draft-tokens"] == 24
    assert settings["--prompts"].startswith("3 prompts, SHA-256 ")
    assert " ".join(found.verdict()) in " ".join(result.stdout.split())
    for words in ("Texts as the base reads them", "never [on repeats]", "relative_confidence   ignored", "As far as I"):
        assert words in result.stdout
    assert (tmp_path / "out" / "diagnosis.html").read_text("utf-8") == found.to_html()
    assert "reading: 6 of 6" in result.stderr
    assert f"The page: {tmp_path / 'out' / 'diagnosis.html'}" in result.stderr


def test_batches_read_the_same(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run().exit_code == run(out=tmp_path / "batches", batch_size=2).exit_code == 0
    for one, other in zip(readings(tmp_path / "out"), readings(tmp_path / "batches"), strict=True):
        assert [one[name] for name in ("prompt", "writer", "tokens", "texts", "ended")] == [
            other[name] for name in ("prompt", "writer", "tokens", "texts", "ended")
        ]


def test_without_matplotlib_all_but_the_page_is_written(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run("--no-own-answers")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == 'no page: the plots need matplotlib: pip install "wsd_hf[diagnose]"'
    assert not (tmp_path / "out" / "diagnosis.html").exists()
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))["prompts"] == 3


# Stopped and resumed


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_shows_what_it_has_and_goes_on(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: BaseException
) -> None:
    add, added = Store.add, list[Any]()

    def stopping(store: Any, line: Any) -> None:
        if len(added) == 2:
            raise end
        added.append(line)
        add(store, line)

    monkeypatch.setattr(Store, "add", stopping)
    stopped = run("--no-own-answers")
    assert stopped.exit_code != 0
    assert f"stopped; the same command goes on from what is in {tmp_path / 'out'}" in stopped.stderr
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))["prompts"] == 2
    assert "The paper's rule" in stopped.stdout
    monkeypatch.setattr(Store, "add", add)
    result = run()
    assert "reading: 4 of 4" in result.stderr  # a draft and three own answers
    monkeypatch.undo()
    run(out=tmp_path / "whole")
    assert readings(tmp_path / "out") == readings(tmp_path / "whole")


def test_another_rule_is_read_off_what_is_there(run: Callable[..., Any], loads: list[str], tmp_path: Path) -> None:
    assert run("--no-own-answers").exit_code == 0
    loads.clear()
    result = run("--no-own-answers", switch_criteria="relative_confidence", threshold=0.5, window_size=3)
    assert not loads
    assert "The rule fires (relative_confidence of 0.5 over 3 tokens)" in " ".join(result.stdout.split())
    rule = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))["rule"]
    assert (rule["rule"], rule["threshold"], rule["window_size"]) == ("relative_confidence", 0.5, 3)


def test_costs_are_predicted_from_texts_that_are_kept(
    run: Callable[..., Any], loads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run().exit_code == 0
    first = run("--predict")
    assert "continuing drafts: 3 of 3" in first.stderr
    data = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))
    monkeypatch.setattr("wsd_hf.cli.diagnosis.continued", None)  # is not called again
    second = run("--predict", threshold=0.5)
    assert second.exit_code == 0, second.stderr
    other = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))
    costs, others = ({one["method"]: one for one in found["predictions"]} for found in (data, other))
    assert costs["nudging"] == others["nudging"]
    assert costs["wsd"]["pilot_share"] > others["wsd"]["pilot_share"]


def test_a_comparison_is_suggested(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("--no-own-answers", "--suggest", dtype="float32")
    line = result.stdout.splitlines()[-1]
    program, command, *words = shlex.split(line)
    assert (program, command) == ("wsd-hf", "compare")
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--prompts"] == str(tmp_path / "prompts.jsonl")
    assert options["--max-new-tokens"] == "24"
    assert options["--dtype"] == "float32"
    assert options["--out"] == str(tmp_path / "out" / "compare")
    assert options["--strategies"].startswith("base,pilot,wsd:threshold=")
    assert CliRunner().invoke(app, [command, *words]).exit_code == 0


# Wrong options


def test_the_folder_of_another_run_is_left_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("--no-own-answers").exit_code == 0
    before = readings(tmp_path / "out")
    result = run(max_draft_tokens=25)
    assert result.exit_code == 2
    assert "holds results of other settings: --max-draft-tokens was 24 and is 25" in result.stderr
    assert readings(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draft_tokens": 0}, "'--max-draft-tokens'"),
        ({"batch_size": 0}, "'--batch-size'"),
        ({"switch_criteria": "sure"}, "switch_criteria='sure': must be 'confidence'"),
        ({"threshold": 0}, "threshold=0.0: must be a number above 0"),
        ({"window_size": 0}, "window_size=0: must be an integer of at least 1"),
        ({"base": "somewhere", "prompts": None}, "--prompts is missing: the shipped questions are for the shipped pair only"),
        ({"base": "somewhere"}, "--pilot is missing"),
    ],
)
def test_wrong_options_are_refused_before_models_are_loaded(
    run: Callable[..., Any], loads: list[str], options: dict[str, Any], message: str
) -> None:
    result = run(**options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not loads


def test_predictions_need_own_answers(run: Callable[..., Any], loads: list[str]) -> None:
    result = run("--predict", "--no-own-answers")
    assert result.exit_code == 2
    assert "wsd-hf: --predict needs the base's own answers" in result.stderr
    assert not loads


def test_a_prompt_that_is_too_long_is_named_before_any_is_read(run: Callable[..., Any], tmp_path: Path) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text('{"prompt": "Who?"}\n' + json.dumps({"prompt": "Who? " * 5000}) + "\n", "utf-8")
    result = run(prompts=prompts)
    assert result.exit_code == 2
    assert "wsd-hf: prompt 2: the prompt of the base has" in result.stderr
    assert not (tmp_path / "out" / "readings.jsonl").exists()
