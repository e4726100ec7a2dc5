"""The report on training data: its numbers against counts of our own, and the command that prints it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from wsd_hf import Pair, SwitchCriteria
from wsd_hf.cli import app
from wsd_hf.tiny import demo_questions
from wsd_hf.training.examples import Example, read_examples
from wsd_hf.training.handover import handovers
from wsd_hf.training.report import Spread, data_report

EXAMPLES = read_examples("tiny_world")[:10]


@functools.cache
def pair() -> Pair:
    return Pair.tiny()


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, ["data-report", *map(str, words)])


def test_the_numbers_are_those_of_the_handovers() -> None:
    rule = SwitchCriteria(0.95)
    report = data_report(pair(), EXAMPLES, rule)
    for which, answers in (("chosen", report.chosen), ("rejected", report.rejected)):
        found = handovers(pair(), EXAMPLES, rule, which)  # type: ignore[arg-type]
        switches = sorted(one.tokens for one in found if one.tokens is not None)
        assert answers is not None
        assert answers.answers == 10
        assert answers.never == 10 - len(switches)
        assert answers.handover is not None
        assert answers.handover.mean == pytest.approx(sum(switches) / len(switches))
        assert (answers.handover.most, answers.handover.median) == (switches[-1], switches[(len(switches) - 1) // 2])
        lengths = [one.length for one in found]
        assert answers.drafted == pytest.approx(sum(one.tokens or one.length for one in found) / sum(lengths))
    assert report.pairs == 10
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_spreads() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3]) == Spread(3, 3, 3, 3, 3)
    assert Spread.of(range(20, 0, -1)) == Spread(10.5, 2, 10, 18, 20)


def test_pairs_that_differ_after_the_handover_are_counted() -> None:
    messages = demo_questions()[0]["messages"]
    begin = "That is a very good question. As far as I know, the Keloft eats"
    same = Example(messages=messages, chosen=f"{begin} acorns.", rejected=f"{begin} honey.")
    other = Example(messages=messages, chosen=f"{begin} acorns.", rejected="That is a very good joke. The Keloft eats acorns.")
    alone = Example(messages=messages, chosen=f"{begin} acorns.")
    report = data_report(pair(), [same, other, alone], SwitchCriteria())
    assert (report.pairs, report.without_signal) == (2, 1)
    assert report.rejected is not None
    assert (report.chosen.answers, report.rejected.answers) == (3, 2)
    never = data_report(pair(), [same], SwitchCriteria(1.0, 60))
    assert (never.pairs, never.without_signal, never.chosen.never, never.chosen.handover) == (1, 0, 1, None)


def test_without_rejected_answers_there_is_one_column() -> None:
    examples = [Example(messages=one.messages, chosen=one.chosen) for one in EXAMPLES[:2]]
    report = data_report(pair(), examples, SwitchCriteria())
    assert report.rejected is None
    assert report.to_dict()["rejected"] is None
    assert len(report.table().columns) == 2
    assert "pairs" not in report.summary()


def test_the_command_prints_and_writes_the_report(tmp_path: Path) -> None:
    result = command("--data", "tiny_world", "--limit", 10, "--threshold", 0.95, "--out", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = data_report(pair(), EXAMPLES, SwitchCriteria(0.95))
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report.to_dict()
    words = " ".join(result.stdout.split())
    assert report.summary() in words
    assert "handover after: median" in words


def test_the_commands_rule_is_that_of_its_options(tmp_path: Path) -> None:
    for options in (["--switch-criteria", "entropy"], ["--window-size", "3", "--ignore-repeats"]):
        result = command("--data", "tiny_world", "--limit", 4, *options, "--out", tmp_path / "report.json")
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rule = SwitchCriteria(window_size=3, ignore_repeats=True)
    assert found == data_report(pair(), EXAMPLES[:4], rule).to_dict()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--data", "tiny_world", "--threshold", "2"], "threshold=2.0"),
        (["--data", "tiny_world", "--switch-criteria", "mood"], "switch_criteria='mood'"),
        (["--data", "bad.jsonl"], "line 1: chosen and rejected are the same answer (--skip-bad leaves such rows out)"),
        (["--data", "bad.jsonl", "--skip-bad"], "bad.jsonl: there are no examples in it"),
    ],
)
def test_errors_come_in_one_line_before_any_model_is_loaded(
    words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "So."}\n', "utf-8")
    monkeypatch.setattr(Pair, "tiny", lambda *_, **__: pytest.fail("a model was loaded"))
    result = command(*words)
    assert result.exit_code == 2
    assert error in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("wsd-hf: ")]) == 1
