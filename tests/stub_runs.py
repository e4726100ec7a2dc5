"""Commands that answer three prompts, with stubs in place of models, and processes that are killed in the middle of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from time_limit import status_of
from wsd_hf.cli import app
from wsd_hf.comparison import open_answers
from wsd_hf.comparison.methods import METHODS, Method
from wsd_hf.comparison.replies import Reply
from wsd_hf.integrations.export import AnswerFile

PROMPTS = ["Why?", "Ünï\u2028code?", "What does the Keloft eat?"]
STRATEGIES = ["base", "pilot"]
TIMES = ("tstamp", "seconds")
REPLY = Reply(response="", tokens=3, ended=True, repeats=0.0, seconds=1.0, work={}, written_by_pilot=0)


class Unlimited(Method):
    """A method whose models have room for any prompt."""

    def limits(self, bench: Any, chats: Any) -> list[int]:
        return [8] * len(chats)


class Run:
    """One of the commands, on three prompts; `before_answer` is called before each answer."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.folder = kind, folder
        self.asked: list[str] = []
        self.loads = 0
        self.before_answer: Callable[[], None] = lambda: None
        folder.mkdir(exist_ok=True)
        prompts = folder / "questions"
        records: list[Any] = {
            "compare": [{"prompt": prompt} for prompt in PROMPTS],
            "alpaca_eval": [{"instruction": prompt} for prompt in PROMPTS],
            "mt_bench": [{"question_id": n, "turns": [prompt, "And?"]} for n, prompt in enumerate(PROMPTS)],
        }[kind]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        prompts.write_text(json.dumps(records) if kind == "alpaca_eval" else lines, encoding="utf-8")
        if kind == "compare":
            self.out = folder / "out"
            self.file = self.out / "answers.jsonl"
            self.options = ["compare", "--out", self.out, "--prompts", prompts, "--strategies", ",".join(STRATEGIES)]
            monkeypatch.setattr("wsd_hf.cli.comparison.load_models", self._load)
            for name in STRATEGIES:
                monkeypatch.setitem(METHODS, name, Unlimited(lambda bench, chats: {"chat": chats[0]}, self._reply))
        else:
            self.out = self.file = folder / "out" / "answers.json"
            self.options = ["answers", kind, "--questions", prompts, "--out", self.out]
            monkeypatch.setattr("wsd_hf.cli.answer_files.load_models", self._load)

    def _load(self, *args: Any, **kwargs: Any) -> Any:
        self.loads += 1
        return SimpleNamespace(
            base=None, pilot=None, generate=lambda chat, *_, **__: self._text(chat), answers=lambda text: [text]
        )

    def _text(self, chat: Any) -> str:
        self.before_answer()
        self.asked.append(chat[0]["content"])
        return f"{len(chat)} re: " + chat[-1]["content"]

    def _reply(self, bench: Any, inputs: Any, settings: Any) -> list[Reply]:
        return [replace(REPLY, response=self._text(inputs["chat"]))]

    def __call__(self, rank: int = 0, of: int = 1) -> Any:
        """Runs the command, as one of the processes of a launcher if there are several."""
        self.asked.clear()
        environment = {"RANK": str(rank), "WORLD_SIZE": str(of), "LOCAL_RANK": str(rank)} if of > 1 else {}
        return CliRunner().invoke(app, list(map(str, self.options)), env=environment)

    def answers(self) -> list[dict[str, Any]]:
        """The whole answers that there are, without times."""
        text = self.file.read_text("utf-8", errors="replace") if self.file.exists() else ""  # the last may be half written
        records = json.loads(text or "[]") if self.kind == "alpaca_eval" else map(json.loads, text.split("\n")[:-1])
        return [{name: value for name, value in record.items() if name not in TIMES} for record in records]

    def open(self) -> Any:
        """The file, by the API."""
        if self.kind == "compare":
            return open_answers(self.out, {})
        return AnswerFile(self.kind, self.folder / "questions", self.out)

    def goes_on(self, whole: list[dict[str, Any]]) -> int:
        """How many answers there were before this run, which must keep them and give the others once."""
        kept = self.answers()
        assert kept == whole[: len(kept)]
        before = self.loads
        result = self()
        assert result.exit_code == 0, result.stderr
        assert self.answers() == whole
        missing = len(whole) - len(kept)
        warm = min(missing, len(STRATEGIES)) if self.kind == "compare" else 0
        assert len(self.asked) == warm + missing * (2 if self.kind == "mt_bench" else 1)
        assert self.loads - before == bool(missing)
        tables = ["settings.json", "table.csv", "table.json", "table.md", "responses.html"] if self.kind == "compare" else []
        assert sorted(path.name for path in self.file.parent.iterdir()) == sorted([self.file.name, *tables])
        return len(kept)


def forked(work: Callable[[], Any]) -> int:
    """The process of its own that does some work."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def killed_at(step: int, run: Run, rank: int = 0, of: int = 1) -> bool:
    """Runs a command that is killed before it does something to its folder for the `step`-th time; whether it got there."""

    def work() -> None:
        steps = 0

        def kill(event: str, arguments: Any) -> None:
            nonlocal steps
            if str(run.out.parent) in str(arguments):
                steps += 1
                if steps > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        run(rank, of)

    return os.WIFSIGNALED(status_of(forked(work)))
