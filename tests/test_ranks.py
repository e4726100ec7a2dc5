"""Commands whose work the processes of a launcher share: what all write together is what one process writes.

Stubs answer in place of models, but for the last part; ranks run one after the other, or at once in forked processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stub_runs import PROMPTS, STRATEGIES, Run, forked, killed_at
from test_stopped_runs import files_end_after
from time_limit import output_of, status_of
from wsd_hf import WSDValueError
from wsd_hf.cli import app
from wsd_hf.cli.models import Loading
from wsd_hf.comparison import Task, open_answers
from wsd_hf.integrations.export import AnswerFile
from wsd_hf.ranks import Rank
from wsd_hf.tiny import FOLDER, demo_questions

DONE = "its share is done; the process that ends last writes the results"


@pytest.fixture(params=["compare", "alpaca_eval", "mt_bench"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """Runs of a command, each in a folder of its own."""
    return lambda name: Run(request.param, tmp_path / name, monkeypatch)


@pytest.fixture
def whole(make: Callable[[str], Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """The answers of one process, and the names of its files."""
    run = make("one process")
    assert run().exit_code == 0
    return run.answers(), sorted(path.name for path in run.file.parent.iterdir())


def all_ranks(run: Run, order: list[int]) -> list[Any]:
    """The results of all processes of a launcher, one after the other."""
    return [run(rank, len(order)) for rank in order]


def check(run: Run, whole: tuple[list[dict[str, Any]], list[str]]) -> None:
    """The folder holds what one process writes, and nothing else but empty locks of killed processes."""
    assert run.answers() == whole[0]
    assert sorted(path.name for path in run.file.parent.iterdir() if path.suffix != ".lock" or path.stat().st_size) == whole[1]


def check_ends(results: list[Any]) -> None:
    """All processes succeed, and all but one leave the results to it."""
    assert [result.exit_code for result in results] == [0] * len(results), results[0].stderr
    left = [f"{DONE}" in result.stderr for result in results]
    assert left.count(False) == 1
    assert [bool(result.stdout) for result, leaves in zip(results, left, strict=True) if leaves] == [False] * left.count(True)


# One after the other


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [2, 0, 1], [4, 3, 2, 1, 0]])
def test_ranks_write_what_one_process_writes(make: Callable[[str], Run], whole: Any, order: list[int]) -> None:
    run = make("ranks")
    asked, results = [], []
    for rank in order:
        results.append(run(rank, len(order)))
        asked.append(len(run.asked))
    check_ends(results)
    check(run, whole)
    alone = make("again")
    alone()
    warm = sum(len(STRATEGIES) for count in asked if count) - len(STRATEGIES) if run.kind == "compare" else 0
    assert sum(asked) == len(alone.asked) + warm  # nothing is answered twice, but for the first call of each method
    assert run.loads == sum(map(bool, asked))


def test_a_share_is_told_by_the_first_process_alone(make: Callable[[str], Run]) -> None:
    run = make("log")
    results = all_ranks(run, [0, 1])
    shown = [[line for line in result.stderr.splitlines() if " of " in line] for result in results]
    assert shown[0][0].startswith("rank 0: a")
    assert shown[1] == []


def test_a_finished_run_is_shown_once_more_by_the_first(make: Callable[[str], Run], whole: Any) -> None:
    run = make("finished")
    run()
    for order in ([0, 1, 2], [2, 1, 0]):
        results = dict(zip(order, all_ranks(run, order), strict=True))
        check_ends([*results.values()])
        assert DONE not in results[0].stderr
        assert not run.asked
        check(run, whole)


@pytest.mark.parametrize("first", [(1, 2), (0, 3), (2, 3), (0, 1)])
@pytest.mark.parametrize("order", [[0], [1, 0], [2, 0, 1], [0, 3, 1, 2]])
def test_a_run_goes_on_with_any_number_of_processes(
    make: Callable[[str], Run], whole: Any, first: tuple[int, int], order: list[int]
) -> None:
    run = make("stopped")
    stopped = iter([None] * 3)

    def stop() -> None:
        if next(stopped, "now") == "now":
            signal.raise_signal(signal.SIGINT)

    run.before_answer = stop
    result = run(*first)
    if result.exit_code:
        assert result.exit_code == 130
        assert "stopped; the same command goes on from what is in" in result.stderr
    run.before_answer = lambda: None
    check_ends(all_ranks(run, order))
    check(run, whole)


def test_a_part_that_is_damaged_is_named(make: Callable[[str], Run]) -> None:
    run = make("damaged")
    run(1, 2)
    [part] = run.file.parent.glob("answers.rank-1.*")
    part.write_bytes(part.read_bytes()[:-4] + b"\n")
    for rank, of in [(0, 2), (1, 2), (0, 1)]:
        result = run(rank, of)
        assert result.exit_code == 2
        assert str(part) in result.stderr.splitlines()[-1]


def test_errors_have_the_rank(make: Callable[[str], Run]) -> None:
    run = make("errors")
    (run.folder / "questions").write_text("{")
    assert run(1, 2).stderr.startswith("rank 1: wsd-hf: ")
    assert run().stderr.startswith("wsd-hf: ")


# Killed, and at once


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.sweep)])
def test_a_killed_rank_is_made_up_for(make: Callable[[str], Run], whole: Any, stride: int, tried: Any) -> None:
    launches = [[0, 1], [0], [0, 2, 1], [0, 1, 3, 2]]
    for before in ([], [0]):  # the last process merges, so it is killed there too
        step = 0
        while True:
            run = make(f"killed {before} {step}")
            for rank in before:
                run(rank, 2)
            if not killed_at(step, run, 1, 2):
                break
            order = launches[(step // stride) % len(launches)]
            results = all_ranks(run, order)
            assert not any(result.exit_code for result in results)
            assert sum(DONE not in result.stderr for result in results) == 1
            check(run, whole)
            tried("ranks killed")
            step += stride
        assert step >= 2 * stride


@pytest.mark.parametrize("of", [2, 4])
def test_ranks_at_once(make: Callable[[str], Run], whole: Any, of: int, tmp_path: Path, tried: Any) -> None:
    for turn in range(2):
        run = make(f"at once {turn}")

        def work(rank: int, run: Run = run, turn: int = turn) -> None:
            result = run(rank, of)
            (tmp_path / f"{turn}.{rank}").write_text(json.dumps([result.exit_code, DONE in result.stderr, result.stderr]))

        children = [forked(lambda rank=rank: work(rank)) for rank in range(of)]  # type: ignore[misc]
        for child in children:
            status_of(child)
        ends = [json.loads((tmp_path / f"{turn}.{rank}").read_text()) for rank in range(of)]
        assert [code for code, *_ in ends] == [0] * of, ends
        assert [left for _, left, _ in ends].count(False) == 1
        check(run, whole)
        tried("launches with all ranks at once")


def test_other_runs_are_refused_while_a_rank_works(make: Callable[[str], Run]) -> None:
    run = make("held")
    results: list[Any] = []

    def others() -> None:
        run.before_answer = lambda: None
        results.extend(run(*place) for place in [(1, 2), (0, 1), (0, 3)])

    run.before_answer = others
    assert run(0, 2).exit_code == 0
    assert results[0].exit_code == 0  # the other process of the same launch
    for result in results[1:]:
        assert result.exit_code == 2
        assert f"{run.file}: another run is writing it" in result.stderr


@pytest.mark.parametrize("stride", [499, pytest.param(149, marks=pytest.mark.sweep)])
def test_a_full_disk_loses_and_repeats_no_answer(make: Callable[[str], Run], whole: Any, stride: int, tried: Any) -> None:
    for size in range(0, 10_000, stride):
        run = make(f"full {size}")
        with files_end_after(size):
            failed = {rank: result for rank, result in zip((1, 0), all_ranks(run, [1, 0]), strict=True) if result.exit_code}
        for rank, result in failed.items():
            assert result.stderr.splitlines()[-1].startswith(f"rank {rank}: wsd-hf: ")
            assert str(run.out.parent) in result.stderr.splitlines()[-1]
        check_ends(all_ranks(run, [1, 0]))
        check(run, whole)
        if not failed:
            break
        tried("launches on a full disk")
    assert not failed


def test_parts_of_machines_without_a_shared_folder_are_merged_once_they_are_together(
    make: Callable[[str], Run], whole: Any
) -> None:
    here, there = make("here"), make("there")
    for machine, rank in ((here, 0), (there, 1)):
        assert f"rank {rank}: {DONE}" in machine(rank, 2).stderr
    [part] = there.file.parent.glob("*.rank-1.*")
    part.rename(here.file.with_name(part.name))
    assert here().exit_code == 0
    assert not here.asked
    check(here, whole)


# Settings and judges


def test_settings_are_the_same_for_all_ranks(tmp_path: Path) -> None:
    with open_answers(tmp_path, {"--seed": 1}, rank=Rank(0, 2)):
        with pytest.raises(WSDValueError, match="--seed was 1 and is 2"):
            open_answers(tmp_path, {"--seed": 2}, rank=Rank(1, 2))
        open_answers(tmp_path, {"--seed": 1}, rank=Rank(1, 2)).close()
    with open_answers(tmp_path, {"--seed": 2}, rank=Rank(1, 2)):  # nothing was answered, and nobody is at work
        pass
    assert json.loads((tmp_path / "settings.json").read_text()) == {"--seed": 2}


def test_answers_without_a_score_are_judged_by_whom_they_belong_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("compare", tmp_path / "judged", monkeypatch)
    (tmp_path / "my_judge.py").write_text("def score(record, response):\n    raise RuntimeError('out of order')\n")
    monkeypatch.syspath_prepend(tmp_path)
    run.options += ["--judge", "my_judge:score"]
    assert run(1, 2).exit_code == 2
    assert [line["scores"] for line in lines(run.out / "answers.rank-1.jsonl")] == [{}]
    monkeypatch.setattr("my_judge.score", lambda record, response: 0.5)
    check_ends(all_ranks(run, [2, 1, 0]))
    answers = run.answers()
    assert [Task(line["prompt"], line["strategy"], line["sample"]) for line in answers] == [
        Task(prompt, strategy, 0) for prompt in range(len(PROMPTS)) for strategy in STRATEGIES
    ]
    assert [line["scores"] for line in answers] == [{"my_judge:score": 0.5}] * len(answers)
    assert not [*run.out.glob("*rank*")]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]


def test_a_question_that_is_asked_twice_gets_two_answers_of_ranks(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    asked = ["a", "b", "a", "c"]
    questions.write_text(json.dumps([{"instruction": text} for text in asked]))
    for number in (1, 0):
        with AnswerFile("alpaca_eval", questions, tmp_path / "answers.json", rank=Rank(number, 2)) as file:
            assert [question["instruction"] for question in file.missing] == asked[number::2]
            for question in file.missing:
                file.add(question, lambda chat: chat[0]["content"].upper())
            assert file.finish() == (number == 0)
    records = json.loads((tmp_path / "answers.json").read_text())
    assert [(record["instruction"], record["output"]) for record in records] == [(text, text.upper()) for text in asked]


# The environment of a launcher


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one': must be a whole number of at least 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be a whole number of at least 0"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='': must be a whole number of at least 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0: must be below WORLD_SIZE=0"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "diagnose", "make-pairs", "answers", "eval"])
def test_an_environment_that_no_launcher_makes_is_refused(
    command: str, environment: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "questions").write_text('[{"instruction": "Why?"}]')
    options = {
        "compare": ["--out", tmp_path / "out"],
        "diagnose": ["--out", tmp_path / "out"],
        "make-pairs": ["--out", tmp_path / "out", "--judge", "tiny_world"],
        "answers": ["alpaca_eval", "--questions", tmp_path / "questions", "--out", tmp_path / "out" / "answers.json"],
        "eval": ["--harness", "lm-eval", "--tasks", "gsm8k", "--base", "no/base", "--pilot", "no/pilot"],
    }[command]
    result = CliRunner().invoke(app, [command, *map(str, options)], env=environment)
    assert result.exit_code == 2
    assert f"wsd-hf: {problem}" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_cuda_is_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Loading(device="cuda").own_device == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [Loading(device=name).own_device for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert Loading(device="cuda").options()["--device"] == "cuda"  # the settings of all processes are the same
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(WSDValueError, match="LOCAL_RANK='x'"):
        Loading(device="cuda").keywords()


# The shipped pair


TIMES = ("seconds", "tstamp", "verdict")


def without_times(data: Any) -> Any:
    """JSON data without the times that were measured, and the texts that name them."""
    if isinstance(data, list):
        return [without_times(item) for item in data]
    if isinstance(data, dict):
        kept = {name: value for name, value in data.items() if name not in TIMES and "time" not in name}
        return {name: without_times(value) for name, value in kept.items()}
    return data


def content(folder: Path) -> dict[str, Any]:
    """The JSON files of a folder, without times; names alone of the others."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".jsonl":
            found[file.name] = without_times(lines(file))
        else:
            found[file.name] = without_times(json.loads(file.read_text("utf-8"))) if file.suffix == ".json" else None
    return found


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions to the shipped pair."""
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in demo_questions()[:5]))
    return file


COMMANDS = {
    "compare": ["--strategies", "base,wsd", "--temperature", "0.9", "--samples", "2", "--judge", "tiny_world"],
    "make-pairs": ["--judge", "tiny_world", "--samples", "2", "--seed", "3"],
    "diagnose": ["--max-draft-tokens", "16", "--predict"],
    "answers": [],
}


def command(name: str, questions: Path, out: Path) -> list[str]:
    if name == "answers":
        asked = out.parent / "asked.jsonl"
        rows = ({"uid": str(number), "prompt": line["messages"][-1]["content"]} for number, line in enumerate(lines(questions)))
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = ["arena_hard", "--questions", str(asked), "--out", str(out / "answers.jsonl"), "--name", "pair"]
    else:
        own = ["--prompts", str(questions), "--out", str(out), "--batch-size", "2"]
    length = [] if name == "diagnose" else ["--max-new-tokens", "16"]
    return [name, *own, *length, *COMMANDS[name]]


@pytest.mark.parametrize("name", ["make-pairs", "diagnose", "answers"])  # that is the launcher's, below
def test_ranks_of_the_shipped_pair_write_what_one_process_writes(name: str, questions: Path, tmp_path: Path) -> None:
    def run(out: str, rank: int, of: int) -> Any:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(of)} if of > 1 else {}
        result = CliRunner().invoke(app, command(name, questions, tmp_path / out), env=environment)
        assert result.exit_code == 0, result.stderr
        return result

    run("one", 0, 1)
    assert DONE in run("two", 1, 2).stderr
    assert DONE not in run("two", 0, 2).stderr
    one, two = (content(tmp_path / out) for out in ("one", "two"))
    assert one.keys() == two.keys()
    for file, expected in one.items():
        assert two[file] == expected, file


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"],
}


def launched(processes: int, *arguments: str, launcher: str = "torchrun") -> tuple[str, str]:
    """Standard output and error of a launcher's processes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return output_of([sys.executable, "-m", *LAUNCHERS[launcher], str(processes), *arguments], env=environment)


@pytest.mark.sweep
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_starts_the_ranks(launcher: str, questions: Path, tmp_path: Path) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate", reason='no accelerate: pip install "wsd_hf[quantization]"')
    out, err = launched(2, "-m", "wsd_hf", *command("compare", questions, tmp_path / "two"), launcher=launcher)
    assert out.count("base forwards") == 1
    assert err.count(DONE) == 1
    assert "rank 0: answering 2 at a time: 1 of" in err
    one = CliRunner().invoke(app, command("compare", questions, tmp_path / "one"))
    assert one.exit_code == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")


TASK = """
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{messages[0]['content']}}"
doc_to_target: "nothing"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""

EVALUATE = """
import functools, lm_eval.evaluator, lm_eval.tasks, wsd_hf.cli
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # reads 14,000 files
lm_eval.evaluator.add_env_info = lambda results: None  # asks pip and the compilers
wsd_hf.cli.app()
"""


def evaluation(questions: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that runs the task on some questions in a folder, which becomes the working directory."""
    pytest.importorskip("lm_eval", reason='no harness: pip install "wsd_hf[lm-eval]"')
    (folder / "tasks").mkdir()
    (folder / "tasks" / "facts.yaml").write_text(TASK)
    (folder / "evaluate.py").write_text(EVALUATE)
    (folder / "questions.jsonl").write_text(questions)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    models = ["--base", str(FOLDER / "base"), "--pilot", str(FOLDER / "pilot")]
    tasks = ["--harness", "lm-eval", "--tasks", "facts", "--include-path", "tasks", "--apply-chat-template"]
    return ["evaluate.py", "eval", *tasks, *models]


@pytest.mark.sweep
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize(
    ("processes", "drawn"), [(4, []), (2, ["--gen-kwargs", "do_sample=true,temperature=1.2"])], ids=["greedy", "sampled"]
)
def test_eval_in_several_processes_is_that_of_one(
    processes: int, drawn: list[str], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*evaluation(questions.read_text(), tmp_path, monkeypatch), *drawn]
    results = {}
    for number in (1, processes):  # of 4 processes, one has no batch
        out, _ = launched(number, *options, "--batch-size", "2", "--out", f"{number}.json")
        assert out.count("exact_match") == 1
        results[number] = json.loads((tmp_path / f"{number}.json").read_text("utf-8"))
    assert len(results[1]["samples"]["facts"]) == 5
    assert results[processes]["samples"] == results[1]["samples"]
    assert results[processes]["results"] == results[1]["results"]


@pytest.mark.sweep
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_an_eval_of_which_one_process_fails_ends(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = json.dumps({"messages": [{"role": "user", "content": "Why? " * 2000}]}) + "\n"
    options = evaluation(long + questions.read_text(), tmp_path, monkeypatch)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(10_000 + os.getpid() % 20_000)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [  # no launcher, which would end the second
        subprocess.Popen(
            [sys.executable, *options, "--out", "results.json"],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 0: wsd-hf: the prompt of the base has" in errors[0]  # beside the harness's bars
    assert "rank 1: wsd-hf: another process of this launch has ended" in errors[1]
    assert not (tmp_path / "results.json").exists()
