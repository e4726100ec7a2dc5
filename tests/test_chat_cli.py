"""`wsd-hf chat`: what a user sees, and what the models are told."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

import wsd_hf
from families import tiny_parts
from wsd_hf import Pair, WSDConfig
from wsd_hf.cli import app
from wsd_hf.cli.conversation import Conversation
from wsd_hf.text.next_turn import before_next_turn, settled

KELOFT, QUIBIME = "What does the Keloft eat?", "Which things fill the shelves of Quibime?"
PILOTS, BASES = "That is a very good question. As far as I know", ", the Keloft eats acorns. Have a lovely day."
ANSWER = f"{PILOTS}│{BASES}"
HANG = 60  # seconds until a test that hangs fails


def chat(*lines: str, options: tuple[Any, ...] = (), **env: str) -> Any:
    return CliRunner().invoke(app, ["chat", *map(str, options)], input="\n".join(lines), env=env)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def marked(messages: list[dict[str, str]], **settings: Any) -> str:
    """The answer of a direct call, with its mark, from the trace of the finished response."""
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    inputs = wsd_hf.build_inputs(messages, tokenizer, pilot_tokenizer)
    settings = {"strategy": "wsd", "max_new_tokens": 256, "return_dict_in_generate": True, **settings}
    output = base.generate(**inputs, assistant_model=pilot, **settings)
    trace = wsd_hf.explain(output, tokenizer, stop_strings=wsd_hf.BASE_STOP_STRINGS)
    return str(trace).removesuffix(f"\n{trace.summary()}").rstrip().removesuffix("│")


@pytest.fixture
def shared_pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pair that the next chat will load."""
    pair = Pair.tiny()
    monkeypatch.setattr(Pair, "tiny", lambda **_: pair)
    return pair


def test_piped_lines_get_one_answer_each() -> None:
    result = chat(KELOFT, "", "/reset", QUIBIME)
    assert result.exit_code == 0
    assert result.stdout == f"{ANSWER}\n{marked([user(QUIBIME)])}\n"
    assert result.stderr.splitlines()[-2].startswith("pilot: 12 tokens of 27; there the base's confidence")


def test_the_history_is_kept_until_reset() -> None:
    result = chat(KELOFT, QUIBIME, "/reset", KELOFT)
    history = [user(KELOFT), assistant(PILOTS + BASES), user(QUIBIME)]
    assert result.stdout == f"{ANSWER}\n{marked(history)}\n{ANSWER}\n"


@pytest.mark.parametrize("settings", [{"engine": "step"}, {"engine": "fast", "chunk": 1}, {"engine": "fast", "chunk": 9}])
def test_the_mark_does_not_depend_on_the_way_of_decoding(
    shared_pair: Any, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    Conversation(shared_pair, strategy=WSDConfig(**settings), max_new_tokens=256).ask(KELOFT)
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_exit_leaves() -> None:
    assert chat("/exit", KELOFT).stdout == ""
    assert chat("").exit_code == 0


def test_options_reach_both_models() -> None:
    options = ("--threshold", 0.01, "--window-size", 2, "--max-new-tokens", 7, "--system", "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, user(KELOFT)]
    wanted = marked(messages, wsd_threshold=0.01, wsd_window_size=2, max_new_tokens=7)
    assert chat(KELOFT, "/reset", KELOFT, options=options).stdout == f"{wanted}\n{wanted}\n"
    assert wanted != marked([user(KELOFT)], wsd_threshold=0.01, wsd_window_size=2, max_new_tokens=7)


@pytest.mark.parametrize(
    "budget",
    [
        *(1, 3, 12, *range(27, 40, 2)),
        *(pytest.param(budget, marks=pytest.mark.sweep) for budget in (2, 11, 13, *range(26, 40, 2))),
    ],
)
def test_the_header_of_the_next_turn_is_never_shown(shared_pair: Any, budget: int) -> None:
    shared_pair.base.generation_config.eos_token_id = None
    output = shared_pair.generate(KELOFT, max_new_tokens=budget)
    text = shared_pair.tokenizer.decode(output.sequences[0, output.prompt_length :], skip_special_tokens=True)
    shown = chat(KELOFT, options=("--max-new-tokens", budget)).stdout
    assert shown.replace("│", "") == before_next_turn(text) + "\n"
    if budget == 39:
        assert "[User]" in text


@pytest.mark.parametrize(
    "text", ["Paris.\n\n[User]\nWhy", "a[b]\n\n[System]", "x [[Us]\n [User", "\n\n[Assistant]\n", "one\n two "]
)
def test_what_is_shown_early_is_never_taken_back(text: str) -> None:
    for end in range(len(text) + 1):
        assert before_next_turn(text).startswith(settled(text[:end]))
    assert settled("[plain] text") == "[plain] text"


def test_a_base_with_a_template_may_write_what_ends_a_transcript(shared_pair: Any) -> None:
    shared_pair.tokenizer.chat_template = wsd_hf.BASE_CHAT_TEMPLATE
    result = chat(KELOFT, options=("--max-new-tokens", 40))
    assert result.stdout.startswith(f"{ANSWER}\n\n[User]\n")


def test_a_character_that_is_not_complete_is_withheld() -> None:
    assert settled("caf\ufffd") == "caf"


@pytest.mark.parametrize("forward", [1, 2, 4])
def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(shared_pair: Any, forward: int) -> None:
    forwards = 0

    def press(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == forward:
            signal.raise_signal(signal.SIGINT)

    shared_pair.base.register_forward_pre_hook(press)
    result = chat(KELOFT, QUIBIME, "/reset", KELOFT)
    partial, second, third = result.stdout.splitlines()
    assert result.exit_code == 0
    assert "stopped by Ctrl-C" in result.stderr
    assert ANSWER.startswith(partial)
    assert len(partial) < len(ANSWER)
    history = [user(KELOFT), assistant(partial.replace("│", ""))] if partial else []
    assert bool(partial) == (forward > 1)
    assert second == marked([*history, user(QUIBIME)])
    assert third == ANSWER


@pytest.mark.parametrize("flush", [1, 5, 14])
def test_ctrl_c_while_text_is_printed_prints_nothing_twice(
    shared_pair: Any, monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    class Terminal(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1
            if self.flushes == flush:
                signal.raise_signal(signal.SIGINT)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    conversation = Conversation(shared_pair, strategy=WSDConfig(chunk=1), max_new_tokens=256)
    conversation.ask(KELOFT)
    partial = terminal.getvalue().removesuffix("\n")
    assert ANSWER.startswith(partial)
    assert 0 < len(partial) < len(ANSWER)
    assert conversation.messages == [user(KELOFT), assistant(partial.replace("│", ""))]


def test_a_question_that_cannot_be_asked_does_not_end_the_chat() -> None:
    result = chat("What? " * 1000, KELOFT)
    assert result.exit_code == 0
    assert result.stdout == f"\n{ANSWER}\n"
    assert "wsd-hf: the prompt of the base has" in result.stderr
    assert "/reset starts anew" in result.stderr


@pytest.mark.parametrize(
    ("options", "problem"), [(("--threshold", 2), "threshold=2.0"), (("--base", "x"), "--pilot is missing")]
)
def test_what_a_user_can_put_right_is_one_line_and_status_2(options: tuple[Any, ...], problem: str) -> None:
    result = chat(KELOFT, options=options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"wsd-hf: {problem}")


def colours(text: str) -> tuple[str, str]:
    """The orange text and the blue, as the escape sequences of a terminal in true colour say."""
    parts = {"244;165;130": "", "146;197;222": ""}
    for run in text.split("\x1b[38;2;16;16;16;48;2;")[1:]:
        colour, _, rest = run.partition("m")
        parts[colour] += rest.partition("\x1b[0m")[0]
    orange, blue = parts.values()
    return orange, blue


def test_pilot_and_base_have_their_colours() -> None:
    result = chat(KELOFT, FORCE_COLOR="1", TERM="xterm-256color", COLORTERM="truecolor")
    assert colours(result.stdout) == (PILOTS, BASES)
    assert "│" not in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal() -> None:
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-c", "from wsd_hf.cli import app; app()", "chat"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env)
    os.close(theirs)
    watchdog = threading.Timer(HANG, process.kill)
    watchdog.start()

    def until_prompt() -> str:
        shown = b""
        while not shown.endswith(b"> "):
            shown += os.read(ours, 1000)
        return shown.decode()

    until_prompt()
    os.write(ours, f"{KELOFT}\n".encode())
    assert colours(until_prompt()) == (PILOTS, BASES)
    os.write(ours, b"\x04")
    _, told = process.communicate()
    watchdog.cancel()
    os.close(ours)
    assert process.returncode == 0
    assert b"/exit or Ctrl-D leaves" in told
