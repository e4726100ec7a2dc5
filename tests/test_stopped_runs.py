"""Runs of `compare` and `eval --export` that end before they are done: killed, stopped, out of space, or two at once.

Stubs answer in place of models. What an undisturbed run writes is what all others must come to.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stub_runs import PROMPTS, REPLY, STRATEGIES, Run, forked, killed_at
from time_limit import time_limit
from wsd_hf import WSDValueError
from wsd_hf.cli import app
from wsd_hf.cli.runs import LINES, progress
from wsd_hf.comparison import open_answers
from wsd_hf.comparison.replies import Answer
from wsd_hf.tiny import FOLDER


@pytest.fixture(params=["compare", "alpaca_eval", "mt_bench"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """Runs of a command, each in a folder of its own."""
    return lambda name: Run(request.param, tmp_path / name, monkeypatch)


@pytest.fixture
def whole(make: Callable[[str], Run]) -> list[dict[str, Any]]:
    """The answers of an undisturbed run."""
    run = make("undisturbed")
    assert run().exit_code == 0
    assert len(run.answers()) == len(PROMPTS) * (len(STRATEGIES) if run.kind == "compare" else 1)
    return run.answers()


# Killed


def test_a_killed_run_goes_on_wherever_it_was_killed(make: Callable[[str], Run], whole: list[Any], tried: Any) -> None:
    kept = []
    while killed_at(len(kept), run := make(f"killed {len(kept)}")):
        kept.append(run.goes_on(whole))
    assert sorted(set(kept)) == list(range(len(whole) + 1))
    assert run.answers() == whole
    tried("runs killed", len(kept))


def test_a_write_of_an_answer_may_end_after_any_byte(tmp_path: Path, tried: Any) -> None:
    texts = ["Ünï\u2028code", "", "line\nline\r\n", '"{}"']
    answers = [
        Answer(prompt=n, strategy="base", sample=0, scores={}, **{**vars(REPLY), "response": text})
        for n, text in enumerate(texts)
    ]
    file, settings = tmp_path / "answers.jsonl", {"--base": "a base"}

    def add_missing() -> None:
        with open_answers(tmp_path, settings) as store:
            for answer in answers[len(store.lines) :]:
                store.add(answer)

    add_missing()
    data, of_settings = file.read_bytes(), (tmp_path / "settings.json").read_bytes()
    for size in range(len(data) + 1):
        file.write_bytes(data[:size])
        open_answers(tmp_path, settings).close()
        assert file.read_bytes() == data[: data.rfind(b"\n", 0, size) + 1]
        add_missing()
        assert file.read_bytes() == data
    for size in range(len(of_settings) + 1):
        file.unlink()
        (tmp_path / "settings.json").unlink()
        (tmp_path / "settings.json.unfinished").write_bytes(of_settings[:size])
        add_missing()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {file.name: data, "settings.json": of_settings}
    tried("writes cut off in the middle", len(data) + len(of_settings) + 2)


@pytest.mark.parametrize("kind", ["alpaca_eval", "mt_bench"])
def test_a_write_of_an_answer_file_may_end_anywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    run = Run(kind, tmp_path, monkeypatch)
    stop_after(run, len(PROMPTS) - 1, signal.SIGINT)
    run()
    before = run.file.read_bytes()
    run.before_answer = lambda: None
    run()
    whole, data = run.answers(), run.file.read_bytes()
    for size in range(0, len(data) + 1, 7):
        run.file.write_bytes(before)
        run.file.with_name("answers.json.unfinished").write_bytes(data[:size])
        run.goes_on(whole)
        tried("writes cut off in the middle")


# Out of space


@contextmanager
def files_end_after(size: int) -> Iterator[None]:
    """As on a full disk: a write stops after so many bytes of a file, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(result: Any) -> str:
    """The one line that tells what to put right."""
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("wsd-hf: ")
    return line


@pytest.mark.parametrize("step", [127, pytest.param(53, marks=pytest.mark.sweep)])
def test_a_full_disk_is_told_in_one_line_and_earlier_answers_stay(
    make: Callable[[str], Run], whole: list[Any], step: int, tried: Any
) -> None:
    kept = set()
    for size in range(0, 10_000, step):
        run = make(f"full {size}")
        with files_end_after(size):
            result = run()
        if result.exit_code == 0:
            break
        assert str(run.out.parent) in refusal(result)
        kept.add(run.goes_on(whole))
        tried("runs on a full disk")
    assert result.exit_code == 0
    assert len(kept) > 2


def test_a_folder_that_cannot_be_written_is_told_in_one_line(make: Callable[[str], Run], tmp_path: Path) -> None:
    run = make("below a file")
    (tmp_path / "file").write_text("")
    run.options[run.options.index(run.out)] = tmp_path / "file" / "answers"
    assert str(tmp_path / "file") in refusal(run())
    assert not run.loads


# Two at once


def test_a_second_run_is_refused_before_models_are_loaded(make: Callable[[str], Run], whole: list[Any]) -> None:
    first, second = make("same"), make("same")
    refused = []
    first.before_answer = second.before_answer = lambda: refused.append(second()) if not refused else None
    loads = second.loads
    first_asks = first()
    assert first_asks.exit_code == 0, first_asks.stderr
    line = refusal(refused[0])
    assert f"{second.file}: another run is writing it" in line
    assert second.loads == loads + 1  # that of the run which went on
    assert second.answers() == whole
    assert second.goes_on(whole) == len(whole)


def test_the_lock_of_a_killed_run_holds_nobody_up(make: Callable[[str], Run], whole: list[Any]) -> None:
    run = make("killed")
    here, there = os.pipe()

    def wait() -> None:
        os.write(there, b"!")
        signal.pause()

    run.before_answer = wait
    child = forked(run)
    with time_limit():
        os.read(here, 1)
    run.before_answer = lambda: None
    try:
        assert "another run is writing it" in refusal(run())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run.goes_on(whole) == 0


def test_what_holds_the_lock_is_one_object_until_it_is_closed(make: Callable[[str], Run]) -> None:
    run = make("api")
    held = run.open()
    with pytest.raises(WSDValueError, match="another run is writing it, or this one has it still open"):
        run.open()
    held.close()
    with run.open(), pytest.raises(WSDValueError, match="another run is writing it"):
        run.open()
    run.open()  # and goes at once
    run.open().close()


def test_what_cannot_be_gone_on_with_is_not_locked(make: Callable[[str], Run], whole: list[Any]) -> None:
    run = make("damaged")
    run()
    good = run.file.read_bytes()
    run.file.write_bytes(good + b"{}\n")
    with pytest.raises(WSDValueError) as refused:
        run.open()
    run.file.write_bytes(good)
    assert run.goes_on(whole) == len(whole)
    assert refused.traceback  # which still refers to what was opened


def test_a_file_system_without_locks_is_told_in_one_line(make: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = make("no locks")
    line = refusal(run())
    assert f"{run.file}: cannot be locked ([Errno {errno.ENOLCK}] " in line
    assert not run.loads


# Stopped


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handlers of this process that are not ours, which must be left as they were and must not be called."""
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    ours = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == ours
    signal.signal(signal.SIGTERM, before)
    assert calls == []


STOPS = [signal.SIGINT, signal.SIGTERM]


def stop_after(run: Run, done: int, number: int) -> None:
    """Sends the signal in the middle of an answer, after some others."""
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked > done:
            signal.raise_signal(number)

    run.before_answer = stop


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.usefixtures("handlers")
def test_a_stopped_run_tells_how_to_go_on(make: Callable[[str], Run], whole: list[Any], number: int, tried: Any) -> None:
    for done in range(len(PROMPTS)):
        run = make(f"stopped {done}")
        stop_after(run, done, number)
        result = run()
        assert result.exit_code == 128 + number
        assert f"stopped; the same command goes on from what is in {run.out}" in result.stderr.splitlines()
        assert "Traceback" not in result.stderr
        run.before_answer = lambda: None
        kept = {"compare": max(0, done - len(STRATEGIES)), "alpaca_eval": done, "mt_bench": done // 2}
        assert run.goes_on(whole) == kept[run.kind]
        tried("runs stopped by a signal")


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.usefixtures("handlers")
def test_a_stopped_comparison_shows_what_there_is(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answered in range(len(PROMPTS) * len(STRATEGIES)):
        run = Run("compare", tmp_path / str(answered), monkeypatch)
        stop_after(run, answered + len(STRATEGIES), number)  # the first call of each method is not kept
        result = run()
        assert result.exit_code == 128 + number
        assert len(run.answers()) == answered
        prompts = answered // len(STRATEGIES)
        names = ["table.csv", "table.json", "table.md", "responses.html"]
        assert [(run.out / name).exists() for name in names] == [prompts > 0] * 4
        if not prompts:
            assert result.stdout == ""
            continue
        with (run.out / "table.csv").open(encoding="utf-8", newline="") as file:
            rows = [(row["strategy"], int(row["answers"]), int(row["missing"])) for row in csv.DictReader(file)]
        assert rows == [(name, prompts, len(PROMPTS) - prompts) for name in STRATEGIES]
        for shown in (result.stdout, *((run.out / name).read_text("utf-8") for name in names[2:])):
            assert "prompts still to come" in shown
        responses = (run.out / "responses.html").read_text("utf-8")
        assert [f"re: {prompt}" in responses for prompt in PROMPTS] == [n < prompts for n in range(len(PROMPTS))]
        run.before_answer = lambda: None
        assert "prompts still to come" not in run().stdout


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.usefixtures("handlers")
def test_a_second_signal_ends_the_command_at_once(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("compare", tmp_path / "out", monkeypatch)
    stop_after(run, 4, number)
    with monkeypatch.context() as patch:
        patch.setattr("wsd_hf.cli.comparison.table_rows", lambda *args, **kwargs: signal.raise_signal(number))
        result = run()
    assert result.exit_code == 128 + number
    assert len(run.answers()) == 2
    assert not (run.out / "table.csv").exists()


@pytest.mark.usefixtures("handlers")
def test_sigterm_ends_the_other_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    models = ["--base", FOLDER / "base", "--pilot", FOLDER / "pilot"]
    harness = ["eval", "--harness", "lm-eval", "--tasks", "any", "--out", tmp_path / "results.json", *models]
    for within, options in {
        "wsd_hf.cli.Pair.tiny": ["demo"],
        "wsd_hf.pair.Pair.generate": ["generate", "Why?"],
        "wsd_hf.cli.conversation.WriterStreamer": ["chat"],
        "wsd_hf.cli.evaluation.run_lm_eval": harness,
        "wsd_hf.bundle.packing._write_code": ["pack", tmp_path / "packed", "--copy", *models],
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(within, stop)
            result = CliRunner().invoke(app, list(map(str, options)), input="Why?\nWhy not?\n")
        assert (result.exit_code, result.stdout) == (143, ""), options
    assert list(tmp_path.iterdir()) == []


def test_two_packs_into_one_folder_leave_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(folder: Path) -> Any:
        models = ["--base", FOLDER / "base", "--pilot", FOLDER / "pilot"]
        return CliRunner().invoke(app, ["pack", *map(str, [folder, *models])])

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert pack(tmp_path / "alone").exit_code == 0
    folder = tmp_path / "shared" / "packed"
    with monkeypatch.context() as patch:
        from wsd_hf.bundle.packing import _write_code

        def meanwhile(where: Path) -> None:
            patch.setattr("wsd_hf.bundle.packing._write_code", _write_code)
            assert pack(folder).exit_code == 0
            _write_code(where)

        patch.setattr("wsd_hf.bundle.packing._write_code", meanwhile)
        assert str(folder) in refusal(pack(folder))
    assert files(folder) == files(tmp_path / "alone")
    assert list(folder.parent.iterdir()) == [folder]


# Progress


@pytest.mark.parametrize("count", [1, 2, 7, LINES, LINES + 1, 805, 10_000])
@pytest.mark.parametrize("colour", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_log_gets_a_few_lines_of_progress(
    count: int, colour: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in colour.items():
        monkeypatch.setenv(name, value)
    assert list(progress(range(count), "asking")) == list(range(count))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"asking: 1 of {count}"
    assert lines[-1] == f"asking: {count} of {count}"
    assert min(count, LINES // 2) <= len(lines) <= LINES + 1


def test_a_line_of_progress_follows_what_is_done(capsys: Any) -> None:
    items = progress(range(3), "asking")
    for done in range(3):
        next(items)
        assert len(capsys.readouterr().err.splitlines()) == (done > 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(5), "asking")) == list(range(5))
    shown = sys.stderr.getvalue()
    assert "100%" in shown
    assert "5 of 5" not in shown


def test_both_commands_show_progress(make: Callable[[str], Run], whole: list[Any]) -> None:
    result = make("log")()
    doing = "answering" if len(whole) > len(PROMPTS) else "asking"
    assert [line for line in result.stderr.splitlines() if " of " in line] == [
        f"{doing}: {done} of {len(whole)}" for done in range(1, len(whole) + 1)
    ]
