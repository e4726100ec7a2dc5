"""Pairs from prompts and a judge: the best and the worst of the samples, kept through any end of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import wsd_hf.tiny.judge
from wsd_hf import Pair, SwitchCriteria
from wsd_hf.cli import app
from wsd_hf.comparison.replies import Answer
from wsd_hf.tiny import FOLDER
from wsd_hf.tiny.judge import score as tiny_score
from wsd_hf.training.examples import TINY_WORLD, read_examples
from wsd_hf.training.handover import handovers
from wsd_hf.training.pairs import Grading, good_shares, preferences
from wsd_hf.training.simple_judge import score as simple_score

UNTUNED = Path(__file__).parents[1] / "examples" / "tiny_world" / "pilot_untuned"
RECORDS = [{"messages": [{"role": "user", "content": f"Question {number}?"}]} for number in range(3)]


def answer(prompt: int, score: float | None, response: str = "", **fields: Any) -> Answer:
    given = {"tokens": 9, "ended": True, "repeats": 0.0, "seconds": 1.0, "work": {}, "sample": 0, "strategy": "wsd"}
    text = response or f"Answer of {score}."
    return Answer(prompt=prompt, response=text, **{**given, **fields}, scores={"judge": score})  # type: ignore[arg-type]


def best_and_worst(*answers: Answer, least: float = 1.0) -> list[tuple[str, str | None]]:
    lines = list(preferences(RECORDS, answers, Grading("judge", least)))
    return [(line["chosen"][0]["content"], line["rejected"][0]["content"] if "rejected" in line else None) for line in lines]


# The pairs


def test_the_best_and_the_worst_answer_are_kept() -> None:
    scores = [3.0, 8.0, 9.5, 1.0, 2.0]
    assert best_and_worst(*(answer(0, score) for score in scores), least=7) == [("Answer of 9.5.", "Answer of 1.0.")]


def test_of_equal_answers_the_first_is_kept() -> None:
    given = [answer(0, 1.0, "Good."), answer(0, 0.0, "Bad."), answer(0, 1.0, "Also good."), answer(0, 0.0, "Also bad.")]
    assert best_and_worst(*given) == [("Good.", "Bad.")]


def test_a_prompt_without_a_good_answer_has_no_pair() -> None:
    assert best_and_worst(answer(0, 0.0), answer(1, 1.0), answer(1, 0.0)) == [("Answer of 1.0.", "Answer of 0.0.")]


def test_a_prompt_without_a_bad_answer_has_no_rejected_one() -> None:
    assert best_and_worst(answer(0, 1.0), answer(0, 1.0, "Other.")) == [("Answer of 1.0.", None)]


def test_answers_that_were_cut_or_are_empty_or_unscored_are_not_good() -> None:
    cut, unscored = answer(0, 1.0, "Cut", ended=False), answer(0, None, "Unscored.")
    empty = replace(answer(0, 1.0), response="")
    assert best_and_worst(cut, unscored, empty) == []
    assert best_and_worst(cut, unscored, empty, answer(0, 1.0, "Good.")) == [("Good.", "Cut")]


def test_the_same_text_is_never_chosen_and_rejected() -> None:
    assert best_and_worst(answer(0, 1.0, "Same."), answer(0, 0.0, "Same.")) == [("Same.", None)]


def test_lines_hold_what_the_pilot_wrote() -> None:
    by_both = answer(0, 1.0, "Well, it is so.", drafted=5, written_by_pilot=2, switch_index=2, switch_reason="confident")
    by_base = answer(1, 1.0, "It is so.", strategy="base", written_by_pilot=0)
    first, second = preferences(RECORDS, [by_both, answer(0, 0.0), by_base], Grading("judge"))
    assert (first["drafted"], first["drafted_tokens"], first["chosen_by"], first["score_chosen"]) == (5, 2, "wsd", 1.0)
    assert (first["rejected_by"], first["score_rejected"]) == ("wsd", 0.0)
    assert (second["drafted"], second["drafted_tokens"], second["chosen_by"]) == (None, None, "base")


def test_good_shares() -> None:
    confident = {"switch_reason": "confident", "written_by_pilot": 4}
    never = {"switch_reason": "draft_ended", "written_by_pilot": 9}
    given = [answer(0, 1.0, **confident), answer(0, 0.0, **never), answer(1, 0.0, **confident), answer(1, 0.0, **confident)]
    wsd, base = good_shares([*given, answer(0, 1.0, strategy="base")], Grading("judge"))
    assert (wsd.strategy, wsd.answers, wsd.share, wsd.prompts, wsd.drafted, wsd.never_switched) == (
        "wsd", 4, 0.25, 0.5, 5.25, 0.25
    )  # fmt: skip
    assert wsd.low <= wsd.share <= wsd.high
    assert (base.share, base.drafted, base.never_switched) == (1.0, None, None)


# The command


def make(out: Path, *words: Any) -> Any:
    given = {
        "--base": FOLDER / "base",
        "--pilot": UNTUNED,
        "--prompts": out.parent / "prompts.jsonl",
        "--judge": "tiny_world",
        "--samples": 6,
        "--max-new-tokens": 48,
        "--batch-size": 4,
        "--out": out,
    } | dict(zip(words[::2], words[1::2], strict=True))
    options = [str(word) for option, value in given.items() if value is not None for word in (option, value)]
    return CliRunner().invoke(app, ["make-pairs", *options])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    lines = TINY_WORLD.read_text("utf-8").splitlines()[:8]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that no test changes."""
    folder = tmp_path_factory.mktemp("run")
    lines = TINY_WORLD.read_text("utf-8").splitlines()[:8]
    (folder / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    result = make(folder / "out")
    assert result.exit_code == 0, result.output
    (folder / "out" / "printed").write_text(" ".join(result.stdout.split()), "utf-8")
    return folder / "out"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_pairs_without_labels(finished: Path) -> None:
    found, records = lines(finished / "answers.jsonl"), lines(finished.parent / "prompts.jsonl")
    assert len(found) == 8 * 6
    assert len({one["response"] for one in found}) > 24
    good = [one for one in found if one["ended"] and one["scores"]["tiny_world"] == 1]
    report = json.loads((finished / "report.json").read_text("utf-8"))
    assert report["strategies"][0]["share"] == pytest.approx(len(good) / len(found))
    examples = read_examples(finished)
    assert len(examples) == len({one["prompt"] for one in good}) == report["chosen"] > 0
    prompts = {record["prompt"]: record for record in records}
    for example in examples:
        record = {**prompts[example.messages[0]["content"]], "messages": example.messages}
        assert tiny_score(record, example.chosen) == 1
        assert example.rejected is None or tiny_score(record, example.rejected) == 0
    assert f"{report['chosen']} of 8 prompts have a good answer" in (finished / "printed").read_text("utf-8")


def test_the_pilots_part_is_that_before_the_handover(finished: Path) -> None:
    pair = Pair.from_pretrained(FOLDER / "base", UNTUNED, dtype=torch.float32)
    examples = read_examples(finished)
    found = handovers(pair, examples, SwitchCriteria())
    assert [example.drafted for example in examples] == [handover.characters for handover in found]


def test_a_run_that_was_stopped_is_resumed(finished: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def stop(record: Any, response: str) -> float:
        judged.append(response)
        if len(judged) == 30:
            raise KeyboardInterrupt
        return tiny_score(record, response)

    monkeypatch.setattr(wsd_hf.tiny.judge, "score", stop)
    stopped = make(out)
    assert stopped.exit_code == 130
    assert f"the same command goes on from what is in {out}" in stopped.output
    assert len(lines(out / "answers.jsonl")) == 29
    assert make(out).exit_code == 0
    for name in ("pairs.jsonl", "report.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert len(judged) == 30 + 48 - 29


def test_a_finished_run_loads_no_model(finished: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, out)
    monkeypatch.setattr(Pair, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert make(out).exit_code == 0
    assert (out / "pairs.jsonl").read_bytes() == (finished / "pairs.jsonl").read_bytes()


def test_other_settings_are_refused(finished: Path, out: Path) -> None:
    shutil.copytree(finished, out)
    result = make(out, "--good", 2)
    assert result.exit_code == 2
    assert "--good was 1.0 and is 2.0" in " ".join(result.output.split())


def test_several_methods_may_answer(out: Path) -> None:
    result = make(out, "--strategies", "pilot,wsd,base", "--samples", 2)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert {one["strategy"]: one["answers"] for one in report["strategies"]} == {"base": 16, "pilot": 16, "wsd": 16}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--judge", "mood"], "--judge mood: unknown"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", None], "--prompts is missing"),
        (["--temperature", 0], "--temperature 0: greedy answers are all the same, and pairs need different ones"),
        (["--strategies", "emulated_fine_tuning"], "--strategies: emulated_fine_tuning needs a third model"),
        (["--strategies", "wsd2"], "--strategies: 'wsd2' is unknown"),
        (["--threshold", 2], "threshold=2.0"),
    ],
)
def test_errors_come_in_one_line_before_any_model_is_loaded(
    words: list[Any], error: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pair, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    result = make(out, *words)
    assert result.exit_code == 2
    assert error in " ".join(result.output.split())


# The judge of simple measures


@pytest.mark.parametrize(
    ("kind", "response", "good"),
    [
        ("helpful", "It has eight legs.", True),
        ("harmful", "It has eight legs.", False),
        ("harmful", "I\u2019m sorry, but I can\u2019t help with that.", True),
        ("harmful", "I cannot do this. It would harm others.", True),
        ("helpful", "I'm sorry, I can't answer that.", False),
        ("helpful", "", False),
        ("helpful", "a b c d " * 9, False),
        ("helpful", "Eight.\n\n[User]\nAnd a beetle?", False),
        ("helpful", "How many legs has a spider? How many legs has a beetle?", False),
    ],
)
def test_simple_measures(kind: str, response: str, good: bool) -> None:
    messages = [{"role": "user", "content": "How many legs has a spider?"}]
    assert simple_score({"messages": messages, "kind": kind}, response) == float(good)


def test_simple_measures_heed_a_check() -> None:
    record = {"messages": [{"role": "user", "content": "How many legs has a spider?"}], "check": "(8|eight)"}
    assert (simple_score(record, "It has eight."), simple_score(record, "It has six.")) == (1.0, 0.0)
