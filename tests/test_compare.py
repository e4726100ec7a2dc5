"""`wsd-hf compare`: its numbers against counts of our own, and whatever may go wrong in between."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import wsd_hf
from families import tiny_parts
from wsd_hf import Pair
from wsd_hf.cli import app
from wsd_hf.comparison.judges import Checks
from wsd_hf.comparison.methods import METHODS
from wsd_hf.comparison.page import page
from wsd_hf.comparison.replies import Answer
from wsd_hf.comparison.table import markdown, table_rows, terminal
from wsd_hf.tiny import FOLDER, demo_questions, polite_examples

STRATEGIES = ["base", "pilot", "urial", "wsd"]
NEVER = ["draft_ended", "draft_limit", "budget", "stopped"]
QUESTIONS = demo_questions()[:3]
REFERENCE = Path(__file__).parents[1] / "examples" / "tiny_world" / "pilot_untuned"
FILES = ["answers.jsonl", "responses.html", "settings.json", "table.csv", "table.json", "table.md"]


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny_parts()


@pytest.fixture
def loads(pair: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shipped pair is the module's; tells how often it was loaded."""
    calls: list[str] = []
    load, shipped = Pair.tiny, Pair(*pair)

    def tiny(reference: Any = None, **_: Any) -> Pair:
        calls.append("shipped pair")
        return shipped if reference is None else load(reference=reference)

    monkeypatch.setattr(Pair, "tiny", tiny)
    return calls


@pytest.fixture
def compare(loads: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs the command on the three questions, unless other options are given."""
    prompts = lines(tmp_path / "prompts.jsonl", *QUESTIONS)

    def run(out: str = "out", **options: Any) -> Any:
        options = {"prompts": prompts, "strategies": ",".join(STRATEGIES), "max_new_tokens": 8, **options}
        several = {name: value if isinstance(value, list) else [value] for name, value in options.items() if value is not None}
        given = [[f"--{name.replace('_', '-')}", str(value)] for name, values in several.items() for value in values]
        bare = [[option] if value == "True" else [option, value] for option, value in given]
        return CliRunner().invoke(app, ["compare", "--out", str(tmp_path / out), *(word for words in bare for word in words)])

    return run


def lines(file: Path, *records: Any) -> Path:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return file


def answers(folder: Path) -> list[dict[str, Any]]:
    """What a run answered, without the time that it took."""
    found = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in answer.items() if name != "seconds"} for answer in found]


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table, without the times."""
    return rows_of(json.loads((folder / "table.json").read_text("utf-8"))["strategies"])


def rows_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    times = ("time", "time_per_token", "seconds")
    return {row["strategy"]: {n: v for n, v in row.items() if n not in times} for row in rows}


def repeated(tokens: list[int]) -> float:
    """Share of 4-grams that are in the text before, by looking for each."""
    grams = [tokens[start : start + 4] for start in range(len(tokens) - 3)]
    return sum(gram in grams[:place] for place, gram in enumerate(grams)) / max(1, len(grams))


# The table


@contextmanager
def counted(name: str, model: Any, work: dict[str, int]) -> Iterator[None]:
    """Adds up what really goes through a model."""

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        work[f"{name}_forwards"] += 1
        work[f"{name}_tokens"] += (args[0] if args else kwargs["input_ids"]).numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def expected(pair: Any, strategy: str, limit: int) -> dict[str, Any]:
    """One row of the table, from calls of `generate` that are counted from outside."""
    base, pilot, tokenizer, pilot_tokenizer = pair
    work = {f"{name}_{unit}": 0 for name in ("base", "pilot", "reference") for unit in ("forwards", "tokens")}
    lengths, ended, repeats, drafts, reasons = [], [], [], [], []
    for question in QUESTIONS:
        chat = [*polite_examples(), *question["messages"]] if strategy == "urial" else question["messages"]
        inputs = wsd_hf.build_inputs(chat, tokenizer, pilot_tokenizer)
        own = {name.removeprefix("assistant_"): inputs.pop(name) for name in list(inputs) if name.startswith("assistant_")}
        tokens = {name: work[name] for name in ("base_tokens", "pilot_tokens")}
        with counted("base", base, work), counted("pilot", pilot, work):
            if strategy == "wsd":
                both = {**inputs, "assistant_input_ids": own["input_ids"], "assistant_model": pilot, "strategy": "wsd"}
                output = base.generate(**both, max_new_tokens=limit, return_dict_in_generate=True)
                ids = output.sequences
                work |= {"base_tokens": output.stats.base.tokens + tokens["base_tokens"]}
                work |= {"pilot_tokens": output.stats.pilot.tokens + tokens["pilot_tokens"]}  # without padding, unlike ours
                drafts += output.draft_length.tolist()
                reasons += output.switch_reason
            else:
                model, prompt = (pilot, own) if strategy == "pilot" else (base, inputs)
                ids = model.generate(**prompt, max_new_tokens=limit)
        response = ids[0, (own if strategy == "pilot" else inputs)["input_ids"].shape[1] :].tolist()
        lengths.append(len(response))
        ended.append(response[-1] == tokenizer.eos_token_id or "[User]" in tokenizer.decode(response))
        repeats.append(repeated(response))
    confident = [draft for draft, reason in zip(drafts, reasons, strict=True) if reason == "confident"]
    return {
        "strategy": strategy,
        "answers": len(QUESTIONS),
        "missing": 0,
        **work,
        "length": fmean(lengths),
        "ended": fmean(ended),
        "repeats": fmean(repeats),
        "pilot_share": sum(drafts) / sum(lengths) if drafts else float(strategy == "pilot"),
        "switch_index": fmean(confident) if confident else None,
        "never_switched": 1 - len(confident) / len(reasons) if reasons else None,
        **{why: reasons.count(why) / len(reasons) if reasons else None for why in NEVER},
        **dict.fromkeys(("distinct", "similarity", "score")),
    }


def test_the_table_tells_what_was_done(compare, pair, tmp_path):
    limit = 12  # enough for one of the three to switch
    result = compare(max_new_tokens=limit)
    assert result.exit_code == 0
    rows = table(tmp_path / "out")
    assert list(rows) == STRATEGIES
    for strategy in STRATEGIES:
        means = {name: value for name, value in rows[strategy].items() if not name.endswith(("_low", "_high", "_count"))}
        assert means == pytest.approx(expected(pair, strategy, limit)), strategy
        for name in (name for name in means if f"{name}_low" in rows[strategy]):
            low, high = rows[strategy][f"{name}_low"], rows[strategy][f"{name}_high"]
            assert low is high is None if means[name] is None else low <= means[name] <= high
    assert 0 < rows["wsd"]["never_switched"] < 1


def test_all_methods_give_what_generate_gives(compare, pair, tmp_path):
    eft, wss = "emulated_fine_tuning", "weak_to_strong_search"
    targets = ["product", "ensemble", "blend"]
    chosen = {
        "nudging": {"nudging_threshold": 0.8},
        eft: {},
        wss: {"temperature": 0.7},
        "two_way": {},
        **{name: {} for name in targets},
    }
    questions = QUESTIONS[:2]
    settings = {"reference": REFERENCE, "judge": "tiny_world", "nudging_threshold": 0.8, "max_new_tokens": 64}
    settings["prompts"] = lines(tmp_path / "two.jsonl", *questions)
    names = ["base", "pilot", "urial", "nudging", eft, wss, *targets, "two_way", "wsd"]
    result = compare(strategies=",".join("eft" if name == eft else name for name in names), **settings)
    assert result.exit_code == 0, result.stderr
    base, pilot, tokenizer, assistant_tokenizer = pair
    models = {"assistant_model": pilot, "tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    reference = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    said = {}
    for line in (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines():
        answer = json.loads(line)
        said[answer["prompt"], answer["strategy"]] = answer["response"]
    for number, question in enumerate(questions):
        inputs = wsd_hf.build_inputs(question["messages"], tokenizer, assistant_tokenizer)
        for method, options in chosen.items():
            torch.manual_seed(0)
            options = {**options, **models, **({"reference_model": reference} if method in (eft, wss) else {})}
            ids = base.generate(**inputs, strategy=method, max_new_tokens=64, **options)
            text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert said[number, method] == text.split("\n\n[")[0].strip()
    rows = table(tmp_path / "out")
    assert list(rows) == names
    assert rows[eft]["reference_forwards"] == rows[eft]["base_forwards"] > 0
    for name in (eft, "product", "ensemble"):  # drafted by the pilot
        assert 0 < rows[name]["base_forwards"] < 0.4 * rows[name]["length"] * len(questions)
    assert 0 < rows["nudging"]["pilot_share"] < 1


def test_times_are_multiples_of_the_bases_own(compare, tmp_path):
    result = compare(strategies="wsd", max_new_tokens=64)
    rows = json.loads((tmp_path / "out" / "table.json").read_text("utf-8"))["strategies"]
    seconds, tokens = {"base": 0.0, "wsd": 0.0}, {"base": 0, "wsd": 0}
    for line in (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines():
        answer = json.loads(line)
        assert answer["seconds"] > 0
        seconds[answer["strategy"]] += answer["seconds"]
        tokens[answer["strategy"]] += answer["tokens"]
    ratio = seconds["wsd"] / seconds["base"]
    assert [(row["strategy"], row["time"]) for row in rows] == [("base", 1), ("wsd", ratio)]
    assert tokens["base"] != tokens["wsd"]
    per_token = ratio * tokens["base"] / tokens["wsd"]
    assert [row["time_per_token"] for row in rows] == pytest.approx([1, per_token])
    (shown,) = (line.split()[-2:] for line in result.stdout.splitlines() if "time per token / base" in line)
    assert shown == ["1.00", f"{per_token:.2f}"]


def test_reasons_for_not_switching_are_told_apart():
    reasons = ["confident", "draft_ended", "draft_ended", "stopped"]
    of_wsd = [replace(plain_answer(n, "wsd"), switch_index=3, switch_reason=reason) for n, reason in enumerate(reasons)]
    by_base = [plain_answer(n, "base") for n in range(4)]
    base, wsd = table_rows([*by_base, *of_wsd], ["base", "wsd"])
    assert [getattr(wsd, why).value for why in ("never_switched", *NEVER)] == [0.75, 0.5, 0.0, 0.0, 0.25]
    assert {getattr(base, why).value for why in ("never_switched", *NEVER)} == {None}
    headings, *_ = markdown([base, wsd]).splitlines()
    assert "never switched | never switched: draft ended | never switched: stopped |" in headings
    confident = [replace(answer, switch_reason="confident") for answer in of_wsd]
    assert "never switched:" not in markdown(table_rows([*by_base, *confident], ["base", "wsd"]))


def plain_answer(number: int, strategy: str, response: str = "") -> Answer:
    of = {"prompt": number, "strategy": strategy, "sample": 0, "scores": {"judge": 0.5}}
    costs = {"tokens": 1, "ended": True, "repeats": 0.0, "seconds": 1.0, "work": {}, "written_by_pilot": 0}
    return Answer(response=response, **of, **costs)


def test_the_files_and_the_terminal_tell_the_same(compare, tmp_path):
    result = compare(judge="tiny_world", max_new_tokens=64)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES
    rows = table(tmp_path / "out")
    with (tmp_path / "out" / "table.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in rows[row["strategy"]].items():
                assert row[name] == ("" if value is None else str(value))
    heading, _, *shown = (tmp_path / "out" / "table.md").read_text("utf-8").splitlines()
    assert "reference" not in heading
    assert [line.split(" | ")[-1].split()[0] for line in shown] == [f"{rows[name]['score']:.2f}" for name in STRATEGIES]
    assert rows["base"]["score"] == 0
    assert rows["wsd"]["score"] == 1
    for number in ("base_forwards", "pilot_tokens"):
        assert f"{rows['wsd'][number]:,}" in result.stdout


def test_variants_of_a_strategy_have_rows_of_their_own(compare, pair, tmp_path):
    result = compare(strategies="wsd,wsd:threshold=.4,window_size=1,pilot", threshold=0.9, max_new_tokens=48)
    rows = table(tmp_path / "out")
    assert list(rows) == ["base", "wsd", "wsd:threshold=0.4,window_size=1", "pilot"]
    for name, rule in {"wsd": (0.9, 6), "wsd:threshold=0.4,window_size=1": (0.4, 1)}.items():
        config = wsd_hf.WSDConfig(threshold=rule[0], window_size=rule[1])
        outputs = [Pair(*pair).generate(question["messages"], config, max_new_tokens=48) for question in QUESTIONS]
        switches = [int(output.switch_index[0]) for output in outputs if output.switch_index[0] >= 0]
        assert rows[name]["switch_index"] == (fmean(switches) if switches else None)
        assert rows[name]["base_forwards"] == sum(output.stats.base.forwards for output in outputs)
    assert rows["wsd"]["switch_index"] != rows["wsd:threshold=0.4,window_size=1"]["switch_index"]
    assert "window_size=1" in result.stdout
    assert "--strategies was 'base,wsd,wsd:threshold=0.4,window_size=1,pilot' and is 'base,wsd'" in refusal(
        compare(strategies="wsd", threshold=0.9, max_new_tokens=48)
    )


def test_an_interval_is_drawn_over_prompts(compare, tmp_path):
    folder = tmp_path / "out"
    compare(prompts=None, strategies="pilot", judge="tiny_world", max_new_tokens=64)
    row = json.loads((folder / "table.json").read_text("utf-8"))["strategies"][1]
    scores = [answer["scores"]["tiny_world"] for answer in answers(folder) if answer["strategy"] == "pilot"]
    draw = random.Random(5)
    means = sorted(fmean(draw.choices(scores, k=len(scores))) for _ in range(4000))
    assert row["score_low"] == pytest.approx(means[100], abs=0.09)
    assert row["score_high"] == pytest.approx(means[-100], abs=0.09)
    assert (row["score_count"], row["missing"]) == (len(scores), 0)
    cell = f"{row['score']:.2f} ({row['score_low']:.2f}-{row['score_high']:.2f}) |"
    assert (folder / "table.md").read_text("utf-8").splitlines()[-1].endswith(cell)
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        assert float(list(csv.DictReader(file))[1]["score_low"]) == row["score_low"]


def test_answers_of_a_repeated_text_are_told_by_their_column():
    told = [replace(plain_answer(n, "base"), repeats=share, ended=share < 0.5) for n, share in enumerate((0.0, 0.5, 0.75))]
    (row,) = table_rows(told, ["base"])
    assert (row.repeats.value, row.ended.value) == pytest.approx((1.25 / 3, 1 / 3))
    heading, _, line = markdown([row]).splitlines()
    cells = dict(zip(heading.split(" | "), line.split(" | "), strict=True))
    assert cells["repeated 4-grams"] == "41.7 % (0-75)"
    assert cells["ended by itself"] == "33.3 % (0-100)"


def test_a_name_in_a_table_is_text():
    answer = plain_answer(0, "base")
    name = "reward_guided:delimiter=[red]|\x1b"
    rows = table_rows([answer, replace(answer, strategy=name)], ["base", name])
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(terminal(rows, "[red] \x1b"))
    assert "[red] ␛" in console.export_text(clear=False)
    assert "delimiter=[red]|␛" in console.export_text()
    assert len({line.replace("\\|", "").count("|") for line in markdown(rows).splitlines()}) == 1


# Parts of the prompts


def test_a_key_of_the_prompts_gives_each_value_a_table(compare, tmp_path):
    folder = tmp_path / "out"
    topics = ["fact", 2, "fact"]
    prompts = lines(tmp_path / "topics.jsonl", *({**q, "topic": topic} for q, topic in zip(QUESTIONS, topics, strict=True)))
    options = {"prompts": prompts, "judge": "tiny_world", "max_new_tokens": 24}
    result = compare(**options, by="topic")
    data = json.loads((folder / "table.json").read_text("utf-8"))
    assert list(data["by"]) == ["topic"]
    assert list(data["by"]["topic"]) == ["fact", "2"]
    for value, numbers in {"fact": [0, 2], "2": [1]}.items():
        part = lines(tmp_path / f"{value}.jsonl", *({**QUESTIONS[number], "topic": topics[number]} for number in numbers))
        compare(value, **options | {"prompts": part})
        assert rows_of(data["by"]["topic"][value]) == table(tmp_path / value)
        assert f"topic: {value}" in result.stdout
        assert f"## topic: {value}\n" in (folder / "table.md").read_text("utf-8")
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        found = [(row["group"], row["strategy"], row["score"]) for row in csv.DictReader(file)]
    tables = {"": data["strategies"], **data["by"]["topic"]}
    assert found == [(value, row["strategy"], str(row["score"])) for value, rows in tables.items() for row in rows]
    answered = (folder / "answers.jsonl").read_bytes()
    assert "topic: fact" not in compare(**options).stdout  # shown again in another way, nothing is answered again
    assert (folder / "answers.jsonl").read_bytes() == answered
    assert "by" not in json.loads((folder / "table.json").read_text("utf-8"))


# Several prompts at a time, several answers to a prompt


def test_batches_change_no_answer_and_need_no_pad_token(compare, pair, monkeypatch, tmp_path):
    options = {"strategies": "pilot,nudging,wsd:threshold=.5", "max_new_tokens": 24, "judge": "tiny_world"}
    compare("alone", **options)
    tokenizers = [copy.deepcopy(tokenizer) for tokenizer in pair[2:]]
    for tokenizer in tokenizers:
        tokenizer.pad_token = None
    monkeypatch.setattr(Pair, "tiny", lambda **_: Pair(*pair[:2], *tokenizers))
    result = compare("batches", **options, batch_size=2)
    assert result.exit_code == 0, result.stderr
    costs = {"seconds", "work"}
    alone, batches = (
        {(a["prompt"], a["strategy"]): {name: value for name, value in a.items() if name not in costs} for a in answers(folder)}
        for folder in (tmp_path / "alone", tmp_path / "batches")
    )
    assert alone == batches
    assert "answering 2 at a time: 8 of 8" in result.stderr
    alone, batches = table(tmp_path / "alone"), table(tmp_path / "batches")
    for name, row in batches.items():
        assert row["base_forwards"] < alone[name]["base_forwards"] or name == "pilot"
    assert "--batch-size was 2 and is 3" in refusal(compare("batches", **options, batch_size=3))


def test_samples_are_drawn_with_a_seed(compare, tmp_path):
    options = {"strategies": "wsd", "max_new_tokens": 12, "temperature": 1.5, "samples": 3, "judge": "tiny_world"}
    first = lines(tmp_path / "first.jsonl", QUESTIONS[1])
    compare("one", **options, seed=1)
    compare("alone", **options, seed=1, prompts=first)
    compare("other", **options, seed=2, prompts=first)
    one, alone, other = (answers(tmp_path / name) for name in ("one", "alone", "other"))
    assert alone == [{**answer, "prompt": 0} for answer in one if answer["prompt"] == 1]
    assert alone != other
    assert [answer["sample"] for answer in one] == [number for _ in QUESTIONS for number in (0, 1, 2) for _ in range(2)]
    row = table(tmp_path / "one")["base"]
    texts = [[a["response"] for a in one if a["prompt"] == n and a["strategy"] == "base"] for n in range(len(QUESTIONS))]
    assert row["answers"] == row["length_count"] == 3 * len(QUESTIONS)
    assert row["distinct"] == pytest.approx(fmean(distinct_pairs(some) for some in texts))
    assert row["distinct_count"] == row["similarity_count"] == len(QUESTIONS)
    assert 0 < row["similarity"] < 1
    page = (tmp_path / "one" / "responses.html").read_text("utf-8")
    assert page.count("<small>pilot: ") == 3 * len(QUESTIONS)


def distinct_pairs(texts: list[str]) -> float:
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs)


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"temperature": 1.2, "samples": 2}])
def test_a_run_of_any_kind_goes_on_where_it_was(compare, tmp_path, options):
    options = {**options, "strategies": "wsd", "judge": "test_compare:judge"}
    compare("whole", **options)
    whole = answers(tmp_path / "whole")
    for done in (1, len(whole) - 1):
        TROUBLE[:] = [interrupt, *[lambda: None] * done]
        assert compare(str(done), **options).exit_code == 130
        assert compare(str(done), **options).exit_code == 0
        assert answers(tmp_path / str(done)) == whole


def test_without_prompts_the_shipped_questions_are_asked(compare, tmp_path):
    compare(prompts=None, strategies="base", max_new_tokens=1)
    assert table(tmp_path / "out")["base"]["answers"] == len(demo_questions())


# The judge


def judge(record: dict[str, Any], response: str) -> float:
    """The length of a response that fits the record; ends the run when its time has come."""
    if TROUBLE:
        TROUBLE.pop()()
    return len(response) / record.get("weight", 1)


TROUBLE: list[Callable[[], None]] = []


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_judge_gets_what_else_the_prompt_says(compare, tmp_path):
    prompts = lines(tmp_path / "weights.jsonl", {"prompt": "What does the Keloft eat?", "weight": 4})
    compare(prompts=prompts, strategies="base", judge="test_compare:judge")
    (answer,) = answers(tmp_path / "out")
    assert answer["scores"] == {"test_compare:judge": len(answer["response"]) / 4}
    assert answer["response"]


def says_nothing(record: dict[str, Any], response: str) -> str:
    """A judge that is none."""
    return "good"


def fails(record: dict[str, Any], response: str) -> float:
    """Another one."""
    return record["no such key"]


def says_too_much(record: dict[str, Any], response: str) -> int:
    """And one whose number no float holds."""
    return 10**400


def goes_on_with_the_chat(record: dict[str, Any], response: str) -> int:
    """A judge that works on the object that it was given."""
    record["messages"].append({"role": "assistant", "content": response})
    return len(record["messages"])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nobody", "--judge nobody: unknown; known are checks, llm, tiny_world"),
        ("no.such.module:judge", "--judge no.such.module:judge: ModuleNotFoundError"),
        ("test_compare:no_such_judge", "no_such_judge"),
        ("test_compare:FILES", "is not a function"),
        ("test_compare:says_nothing", "prompt 1, base: the judge returned 'good': must return a finite number"),
        ("test_compare:says_too_much", ": must return a finite number"),
        ("test_compare:fails", "prompt 1, base: the judge raised KeyError: 'no such key'"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(compare, name, problem):
    assert problem in refusal(compare(judge=name))


def test_what_a_judge_does_to_the_prompt_stays_its_own(compare, tmp_path):
    compare("judged", strategies="base,pilot", judge="test_compare:goes_on_with_the_chat")
    compare("plain", strategies="base,pilot")
    judged, plain = answers(tmp_path / "judged"), answers(tmp_path / "plain")
    assert [answer["response"] for answer in judged] == [answer["response"] for answer in plain]
    assert [answer["scores"] for answer in judged] == [{"test_compare:goes_on_with_the_chat": 2}] * len(judged)


def grades(record: dict[str, Any], response: str) -> float | None:
    """Grades the first question alone."""
    return len(response) if record == {**record, **QUESTIONS[0]} else None


def abstains(record: dict[str, Any], response: str) -> None:
    """Grades no answer."""


def test_each_judge_has_a_column(compare, tmp_path):
    judges = ["tiny_world", "test_compare:grades", "test_compare:abstains"]
    result = compare(strategies="wsd", judge=judges, max_new_tokens=64)
    rows = table(tmp_path / "out")
    found = [answer for answer in answers(tmp_path / "out") if answer["strategy"] == "wsd"]
    assert [list(answer["scores"]) for answer in found] == [judges] * len(QUESTIONS)
    assert [answer["scores"]["test_compare:abstains"] for answer in found] == [None] * len(QUESTIONS)
    assert rows["wsd"]["score: tiny_world"] == 1
    assert rows["wsd"]["score: test_compare:grades"] == len(found[0]["response"])
    assert [rows["wsd"][f"score: {judge}_count"] for judge in judges] == [3, 1, 0]
    assert "score" not in rows["wsd"]
    assert "score: test_compare:abstains" in (tmp_path / "out" / "table.md").read_text("utf-8").splitlines()[0]
    assert "score: tiny_world" in " ".join(result.stdout.split())
    assert "score: tiny_world 1" in (tmp_path / "out" / "responses.html").read_text("utf-8")
    assert f"--judge was '{','.join(judges)}' and is 'tiny_world'" in refusal(
        compare(strategies="wsd", judge="tiny_world", max_new_tokens=64)
    )


def test_checks_of_the_prompts_are_a_judge(compare, loads, tmp_path):
    asked = [{**question, "check": check} for question, check in zip(QUESTIONS, ("(?i)THE", "zzz", "."), strict=True)]
    assert compare(prompts=lines(tmp_path / "a.jsonl", *asked), strategies="base", judge="checks").exit_code == 0
    assert [answer["scores"]["checks"] for answer in answers(tmp_path / "out")] == [1, 0, 1]
    loads.clear()
    asked[1]["check"] = "("
    wrong = lines(tmp_path / "b.jsonl", *asked)
    assert "b.jsonl, line 2: check='(': is no regular" in refusal(compare(prompts=wrong, judge="checks"))
    assert loads == []


def test_a_score_that_cannot_be_given_is_named(compare, tmp_path, monkeypatch):
    monkeypatch.setattr("wsd_hf.comparison.judges.Checks.seconds", 0)
    monkeypatch.setattr("wsd_hf.cli.judges.find_judge", lambda name: Checks(seconds=1e-9))
    prompts = lines(tmp_path / "slow.jsonl", {**QUESTIONS[0], "check": "(.|..)+$^"})
    result = compare(prompts=prompts, strategies="pilot", judge="checks")
    assert result.exit_code == 0
    assert "prompt 1, pilot: --judge checks: the search for check=" in result.stderr
    assert {answer["scores"]["checks"] for answer in answers(tmp_path / "out")} == {None}


# A run that ends early


@pytest.fixture(scope="module")
def whole(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The answers of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = lines(folder / "prompts.jsonl", *QUESTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pair, "tiny", lambda **_: Pair(*pair))
        options = ["--prompts", prompts, "--strategies", ",".join(STRATEGIES), "--max-new-tokens", 8]
        result = CliRunner().invoke(
            app, ["compare", *map(str, options), "--judge", "test_compare:judge", "--out", str(folder / "out")]
        )
    assert result.exit_code == 0
    return answers(folder / "out")


@pytest.mark.parametrize(
    "done",
    [pytest.param(done, marks=[pytest.mark.sweep] if done % 4 else []) for done in range(len(QUESTIONS) * len(STRATEGIES))],
)
def test_an_interrupted_run_goes_on_where_it_was(compare, whole, tmp_path, done):
    TROUBLE[:] = [interrupt, *[lambda: None] * done]
    result = compare(judge="test_compare:judge")
    assert result.exit_code == 130
    assert not TROUBLE
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes() if done else b""
    assert kept.count(b"\n") == done
    assert compare(judge="test_compare:judge").exit_code == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().startswith(kept)
    assert answers(tmp_path / "out") == whole


def test_a_half_written_answer_is_given_again(compare, whole, tmp_path):
    compare(judge="test_compare:judge")
    file = tmp_path / "out" / "answers.jsonl"
    rows, data = table(tmp_path / "out"), file.read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    for missing in (1, last // 2, last - 1):
        file.write_bytes(data[:-missing])
        assert compare(judge="test_compare:judge").exit_code == 0
        assert file.read_bytes().startswith(data[:-last])
        assert answers(tmp_path / "out") == whole
        assert table(tmp_path / "out") == rows


def test_a_finished_run_is_shown_again_without_models(compare, loads, tmp_path):
    first = compare()
    files = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    loads.clear()
    again = compare()
    assert loads == []
    assert again.stdout == first.stdout
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == files


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"threshold": 0.5}, "--threshold was 0.8 and is 0.5"),
        ({"max_new_tokens": 9, "window_size": 3}, "--window-size was 6 and is 3, --max-new-tokens was 8 and is 9"),
        ({"strategies": "base"}, "--strategies was 'base,pilot' and is 'base'"),
        ({"judge": "tiny_world"}, "--judge was None and is 'tiny_world'"),
        ({"prompts": None}, "--prompts was '3 prompts"),
    ],
)
def test_a_run_with_other_settings_is_refused(compare, loads, tmp_path, changed, problem):
    compare(strategies="base,pilot")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    loads.clear()
    assert problem in refusal(compare(**{"strategies": "base,pilot", **changed}))
    assert loads == []
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_folder_without_answers_may_be_used_for_anything(compare, tmp_path):
    TROUBLE[:] = [interrupt]
    compare(judge="test_compare:judge")
    assert compare(strategies="base", threshold=0.5).exit_code == 0


def test_a_damaged_answer_is_named(compare, tmp_path):
    compare(strategies="base")
    file = tmp_path / "out" / "answers.jsonl"
    first, *rest = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join([first, "{}\n", *rest]), encoding="utf-8")
    assert "answers.jsonl, line 2: is damaged" in refusal(compare(strategies="base"))


def test_answers_without_their_settings_are_not_gone_on_with(compare, tmp_path):
    compare(strategies="base")
    settings = tmp_path / "out" / "settings.json"
    settings.write_text("{")
    assert "settings.json: is missing or damaged" in refusal(compare(strategies="base"))
    settings.unlink()
    assert "settings.json: is missing or damaged" in refusal(compare(strategies="base"))


# What is refused before any work


def refusal(result: Any) -> str:
    """The one line that tells a user what to put right."""
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("wsd-hf: ")
    return line


MALFORMED = [
    b"{",
    b"\xff",
    b"[]",
    b"{}",
    b'{"prompt": 1}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "Hi", "messages": []}',
    b'{"messages": "Hi"}',
    b'{"messages": []}',
    b'{"messages": ["Hi"]}',
    b'{"messages": [{"role": "king", "content": "Hi"}]}',
]


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_prompt_is_named_by_its_line(compare, loads, tmp_path, line):
    prompts = tmp_path / "bad.jsonl"
    prompts.write_bytes(b'{"prompt": "Hi"}\n\n' + line + b"\n")
    assert "bad.jsonl, line 3: " in refusal(compare(prompts=prompts))
    assert loads == []


def test_prompts_may_begin_with_a_byte_order_mark_and_end_lines_as_on_windows(compare, tmp_path):
    prompts = tmp_path / "windows.jsonl"
    prompts.write_bytes(b'\xef\xbb\xbf{"prompt": "Hi"}\r\n{"prompt": "Ho"}\r\n')
    assert compare(prompts=prompts, strategies="base", max_new_tokens=1).exit_code == 0
    assert table(tmp_path / "out")["base"]["answers"] == 2


def test_a_tilde_is_the_home_folder(compare, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(FOLDER))
    prompts = lines(tmp_path / "one.jsonl", {"prompt": "Hi"})
    models = {"base": "~/base", "pilot": "~/pilot"}
    assert compare(prompts=prompts, strategies="base", max_new_tokens=1, **models).exit_code == 0


def test_skip_bad_leaves_malformed_prompts_out(compare, tmp_path):
    prompts = tmp_path / "bad.jsonl"
    prompts.write_bytes(b'{"prompt": "Hi"}\n' + b"\n".join(MALFORMED) + b'\n{"prompt": "Ho"}')
    result = compare(prompts=prompts, strategies="base", skip_bad=True, max_new_tokens=1)
    assert result.exit_code == 0
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert [line.split("line ")[1].split(":")[0] for line in skipped] == [str(n + 2) for n in range(len(MALFORMED))]
    assert table(tmp_path / "out")["base"]["answers"] == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"strategies": "base,magic"}, "'magic' is unknown; known are base, pilot, urial"),
        ({"strategies": "base,oracle"}, "oracle needs --reference"),
        ({"threshold": 2}, "threshold=2.0: must be"),
        ({"prompts": "/no/such/file"}, "No such file"),
        ({"prompts": None, "base": FOLDER / "base", "pilot": FOLDER / "pilot"}, "--prompts is missing"),
        ({"strategies": "wsd:treshold=.6"}, "wsd has no setting 'treshold'"),
        ({"strategies": "wsd:threshold=2"}, "--strategies: wsd: threshold=2: must be"),
        ({"strategies": "eft:base_weight=1"}, "emulated_fine_tuning has no setting"),
        ({"strategies": "wss"}, "weak_to_strong_search needs --reference"),
        ({"strategies": "reward_guided:threshold=.1"}, "reward_guided:threshold=0.1 needs --reward"),
        ({"by": "kin"}, "--by kin: prompt 1 has no such key; it has "),
        ({"by": "kin", "prompts": None}, "wsd-hf: --by kin: prompt 1 has no such key; it has "),
        ({"samples": 2}, "--samples 2 has no effect on greedy answers: give --temperature or --top-p"),
        ({"seed": 0}, "--seed 0 has no effect on greedy answers"),
        ({"seed": 5, "temperature": 0}, "--seed 5 has no effect on greedy answers"),
        ({"temperature": -1}, "--temperature -1.0: must be"),
        ({"temperature": "nan"}, "--temperature nan: must be"),
        ({"top_p": 2}, "--top-p=2.0: must be"),
        ({"top_p": 0.5, "temperature": 0}, "--top-p has no effect with --temperature 0"),
        ({"strategies": "wss", "reference": REFERENCE, "temperature": 0}, "--temperature 0: weak_to_strong_search chooses"),
        ({"judge": ["tiny_world", "nobody"]}, "--judge nobody: unknown"),
        ({"judge_model": "m"}, "--judge-model has no effect without --judge llm"),
        ({"judge": "llm"}, "--judge llm needs --judge-model"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_models_are_loaded(compare, loads, monkeypatch, tmp_path, options, problem):
    wsd = METHODS["wsd"]
    monkeypatch.setitem(METHODS, "oracle", replace(wsd, needs_reference=True))
    assert problem in refusal(compare(**options))
    assert loads == []
    assert not (tmp_path / "out").exists()


def test_the_reference_is_loaded_for_a_method_that_asks_it(compare, pair, monkeypatch):
    wsd, asked = METHODS["wsd"], []

    def reply(bench: Any, *inputs: Any) -> Any:
        asked.append(bench.pair.reference)
        return wsd.reply(bench, *inputs)

    monkeypatch.setitem(METHODS, "oracle", replace(wsd, reply=reply, needs_reference=True))
    options = {"reference": FOLDER / "pilot", "max_new_tokens": 1}
    assert compare("without", strategies="wsd", **options).exit_code == 0
    assert compare("with", strategies="oracle", **options).exit_code == 0
    assert torch.equal(asked[0].get_input_embeddings().weight, pair[1].get_input_embeddings().weight.to(asked[0].dtype))
    assert "--reference /no/such/model: no such folder" in refusal(
        compare("none", strategies="oracle", reference="/no/such/model")
    )


@pytest.mark.parametrize("option", [{"samples": 0}, {"samples": 20_000}, {"batch_size": 0}, {"seed": -1}, {"batch_size": "x"}])
def test_numbers_out_of_range_are_refused(compare, loads, tmp_path, option):
    assert compare(temperature=1, **option).exit_code == 2
    assert loads == []
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_too_long_is_named_before_any_answer(compare, tmp_path):
    prompts = lines(tmp_path / "long.jsonl", QUESTIONS[0], {"prompt": "a b c d" * 300})
    assert "prompt 2, base: the prompt of the base has" in refusal(compare(prompts=prompts))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_what_a_transcript_ends_at_is_text_to_a_base_with_a_template(compare, pair, monkeypatch, tmp_path):
    tokenizer = pair[2]
    monkeypatch.setattr(tokenizer, "decode", lambda *args, **kwargs: "He wrote [User] into it.")
    asked = lines(tmp_path / "one.jsonl", QUESTIONS[0])
    for template, expected in ((None, "He wrote"), ("{{ messages[-1].content }}", "He wrote [User] into it.")):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        compare(expected, prompts=asked, strategies="base", max_new_tokens=4)
        assert [answer["response"] for answer in answers(tmp_path / expected)] == [expected]


def test_an_answer_ends_where_the_context_does(compare, pair, monkeypatch, tmp_path):
    base, pilot, tokenizer, pilot_tokenizer = pair
    for model in (base, pilot):
        monkeypatch.setattr(model.config, "max_position_embeddings", 30)
    prompt = wsd_hf.build_inputs(QUESTIONS[0]["messages"], tokenizer, pilot_tokenizer)
    room = {"base": 30 - prompt["input_ids"].shape[1], "pilot": 30 - prompt["assistant_input_ids"].shape[1]}
    asked = lines(tmp_path / "one.jsonl", QUESTIONS[0])
    assert compare(prompts=asked, strategies="base,pilot,wsd", max_new_tokens=64).exit_code == 0
    written = {answer["strategy"]: answer["tokens"] for answer in answers(tmp_path / "out")}
    assert written == {**room, "wsd": room["base"]}


# The page


class Reader(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[Any]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_text_as_text_and_needs_nothing_else():
    nasty = "<script>alert('1 & 2')</script>"
    answer = plain_answer(0, "base", nasty)
    records = [{"messages": [{"role": "user", "content": nasty.upper()}]}]
    read = Reader(page(records, ["base"], {(0, "base"): [answer]}, table_rows([answer], ["base"])))
    assert nasty in read.texts
    assert nasty.upper() in read.texts
    assert "score 0.5" in read.texts
    assert [attrs for tag, attrs in read.tags if tag == "script"] == [[]]  # the page's own
    assert not {tag for tag, _ in read.tags} & {"link", "img", "iframe"}
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in read.tags for name, _ in attrs)


def test_the_page_has_all_responses_side_by_side(compare, tmp_path):
    compare(max_new_tokens=16)
    read = Reader((tmp_path / "out" / "responses.html").read_text("utf-8"))
    found = answers(tmp_path / "out")
    for answer in found:
        if answer["strategy"] != "wsd":
            assert answer["response"] in read.texts
    assert {attrs[0][1].split()[0] for tag, attrs in read.tags if tag == "span"} == {"pilot;", "base"}
    assert "".join(read.texts).count("pilot: ") == len(QUESTIONS)
