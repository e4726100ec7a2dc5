"""Every control character, and every kind of bytes and text that is none, through every door."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline
from typer.testing import CliRunner

import wsd_hf
from families import tiny_parts
from scripted import EOS, PAD, ScriptedModel, scripted_model
from wsd_hf import ImplicitValue, Pair, WSDValueError, build_inputs, urial_messages
from wsd_hf.bundle import decoding, packing
from wsd_hf.cli import app
from wsd_hf.cli.conversation import Conversation
from wsd_hf.comparison.prompts import read_prompts
from wsd_hf.integrations.export import AnswerFile
from wsd_hf.text.chat_parser import ChatLayout
from wsd_hf.text.json_data import parse_json
from wsd_hf.text.visible import visible
from wsd_hf.tiny import FOLDER

CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ANSWER = f"A{CONTROLS}{BIDIRECTIONAL}\ufffe\uffff│éß水🙂Z"
"""What the models below write: the controls, what else is not shown as it is, and what few encodings have."""

FORBIDDEN = (set(CONTROLS) - {"\n", "\t"}) | set(BIDIRECTIONAL) | {"\ufffe", "\uffff"}
SHOWN = (
    "A␀␁␂␃␄␅␆␇␈\t\n␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡"
    + "".join(f"\\x{code:02x}" for code in range(0x80, 0xA0))
    + "".join(f"\\u{ord(character):04x}" for character in BIDIRECTIONAL)
    + "\\ufffe\\uffff│éß水🙂Z"
)
ESCAPES = "\x1b]0;title\x07\x9b2J\r\u202e"
SHOWN_ESCAPES = "␛]0;title␇\\x9b2J␍\\u202e"
HALVES = ["\ud800", "\udfff", "a\udcffb"]
QUESTION = [{"role": "user", "content": "Hi"}]


def safe(shown: str) -> bool:
    """Whether a terminal obeys nothing in a text but its colours."""
    return not FORBIDDEN & set(re.sub(r"\x1b\[[0-9;]*m", "", shown))


@pytest.fixture(scope="module")
def pair() -> Any:
    """Base, pilot and tokenizers, one token a character: whatever they are asked, they write `ANSWER`."""
    start, end = "<", ">"
    vocabulary = dict.fromkeys(["<pad>", "<eos>", "<eot>", start, end, *ANSWER])
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(vocabulary)}, unk_token=start))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = f"{{{{ messages[-1]['content'] + '{end}' }}}}"
    assert (wrapped.pad_token_id, wrapped.eos_token_id) == (PAD, EOS)
    chain = [wrapped.convert_tokens_to_ids(character) for character in end + ANSWER] + [EOS]

    def model() -> ScriptedModel:
        written = scripted_model(vocab_size=len(vocabulary), max_position_embeddings=2 * len(chain))
        for last, token in pairwise(chain):
            written.table[:, last, token] += 400.0
        return written

    return wsd_hf.enable_wsd(model()), model(), wrapped, wrapped


@pytest.fixture
def hostile(pair: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pair, as the commands' shipped one."""
    shipped = Pair(*pair)
    monkeypatch.setattr(Pair, "tiny", lambda **_: shipped)
    return pair


def run(*arguments: Any, charset: str = "utf-8", stdin: bytes = b"", **env: str) -> Any:
    return CliRunner(charset=charset).invoke(app, [str(argument) for argument in arguments], input=stdin, env=env)


def refused(result: Any, problem: str = "") -> None:
    """The command ended with status 2 and a line that a terminal can show."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("wsd-hf: ")
    assert problem in last
    assert safe(last)


def trace(pair: Any) -> wsd_hf.Trace:
    base, pilot, tokenizer, pilot_tokenizer = pair
    inputs = build_inputs(QUESTION, tokenizer, pilot_tokenizer)
    output = base.generate(**inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=120, return_dict_in_generate=True)
    return wsd_hf.explain(output, tokenizer)


# Control characters: what is shown, and what stays as it is


def test_every_character_that_is_not_shown_as_it_is_has_a_visible_form() -> None:
    assert visible(ANSWER) == SHOWN
    for code in range(0x10000):
        character = chr(code)
        hidden = character in FORBIDDEN or 0xD800 <= code < 0xE000
        assert (visible(character) != character) is hidden


def test_generate_shows_pictures_and_its_json_holds_the_text(hostile: Any, tried: Any) -> None:
    result = run("generate", "Hi\x1b[2J")
    assert result.stdout == f"{SHOWN}\n"
    assert safe(result.stderr)
    result = run("generate", "--json", "Hi")
    assert json.loads(result.stdout)["response"] == ANSWER
    assert "".join(token["text"] for token in json.loads(result.stdout)["tokens"][:-1]) == ANSWER
    assert result.stdout.isascii()
    assert safe(result.stdout)
    tried("outputs with control characters", 2)


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}])
def test_chat_shows_pictures(hostile: Any, env: dict[str, str], tried: Any) -> None:
    result = run("chat", stdin=b"Hi \x1b]0;title\x07\nHi\n", **env)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    pictures = SHOWN.replace("\t", "        ")
    assert [answer.replace(" ", "") for answer in re.findall(r"A[^Z]*Z", shown)] == [
        (pictures if env else f"{pictures[:6]}│{pictures[6:]}").replace(" ", "")
    ] * 2
    assert safe(result.stdout)
    tried("outputs with control characters", 2)


def test_the_history_of_a_chat_holds_the_text(hostile: Any, capsys: pytest.CaptureFixture[str], tried: Any) -> None:
    conversation = Conversation(Pair(*hostile), max_new_tokens=120)
    conversation.ask("Hi\x1b")
    assert conversation.messages == [{"role": "user", "content": "Hi\x1b"}, {"role": "assistant", "content": ANSWER}]
    assert safe(capsys.readouterr().out)
    tried("outputs with control characters")


def test_demo_and_its_picture(hostile: Any, tmp_path: Path, tried: Any) -> None:
    result = run("demo", "--svg", tmp_path / "demo.svg")
    for shown in (result.stdout, run("demo", COLUMNS="10").stdout):
        assert safe(shown)
        assert shown.count("␛") == 9
    picture = (tmp_path / "demo.svg").read_text("utf-8")
    assert "".join(ElementTree.fromstring(picture).itertext()).count("␛") == 9
    assert safe(picture)
    tried("outputs with control characters", 3)


def test_compare_and_its_page(hostile: Any, tmp_path: Path, tried: Any) -> None:
    prompts = tmp_path / f"{ESCAPES}.jsonl"
    prompts.write_text(json.dumps({"prompt": f"{CONTROLS}Hi"}) + '\n{"role": "\\u001b[2J"}\n')
    folder = tmp_path / f"out {ESCAPES}"
    options = ("--strategies", "base,pilot,wsd", "--max-new-tokens", 120, "--prompts", prompts, "--skip-bad")
    result = run("compare", "--out", folder, *options)
    assert result.exit_code == 0, result.stderr
    assert safe(result.stdout)
    assert safe(result.stderr)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [answer["response"] for answer in answers] == [ANSWER] * 3
    page = (folder / "responses.html").read_text("utf-8")
    text = "".join(ElementTree.fromstring(page).itertext())
    assert text.count("␛") == 4
    assert SHOWN in text
    assert safe(page)
    tried("outputs with control characters", 3)


def test_traces(pair: Any, tmp_path: Path, tried: Any) -> None:
    traced = trace(pair)
    assert str(traced).startswith(f"{SHOWN[:6]}│{SHOWN[6:]}")
    for colours in (True, False):
        with (tmp_path / "out").open("w+", encoding="utf-8", newline="") as file:
            traced.print(Console(file=file, force_terminal=colours, width=200))
            file.seek(0)
            shown = file.read()
        assert safe(shown)
        assert "␛" in shown
    for exported in (traced.to_svg(title=ANSWER), traced.to_html()):
        assert safe(exported)
        assert "␛" in "".join(ElementTree.fromstring(exported).itertext())
    assert "".join(token["text"] for token in traced.to_dict()["tokens"][:-1]) == ANSWER
    tried("outputs with control characters", 5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--messages", f"/no/{ESCAPES}.json"),
        ("generate", "--base", f"/no/{ESCAPES}", "--pilot", FOLDER / "pilot", "Hi"),
        ("generate", "--base", FOLDER / "base", "--pilot", f"./{ESCAPES}", "Hi"),
        ("answers", "mt_bench", "--questions", f"/no/{ESCAPES}", "--out", "x"),
        ("compare", "--out", "x", "--prompts", f"/no/{ESCAPES}"),
    ],
)
def test_errors_that_quote_an_argument_are_safe_to_show(arguments: Any, tried: Any) -> None:
    result = run(*arguments)
    refused(result)
    assert SHOWN_ESCAPES in result.stderr or ascii(ESCAPES)[1:-1] in result.stderr
    tried("outputs with control characters")


def test_usage_errors_are_safe_to_show(tried: Any) -> None:
    for arguments in ([f"--{ESCAPES}"], ["generate", f"--{ESCAPES}"], ["generate", "Hi", ESCAPES], [ESCAPES]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert not (set(CONTROLS) - {"\n"}) & set(result.stderr)
    tried("outputs with control characters", 4)


# Text that is not text


@pytest.mark.parametrize("half", HALVES)
def test_messages_that_are_no_text_are_named(pair: Any, half: str, tried: Any) -> None:
    _, _, tokenizer, pilot_tokenizer = pair
    chats = {
        "messages[0]": [{"role": "user", "content": half}],
        "messages[1]": [{"role": "system", "content": "Hi"}, {"role": "user", "content": half}],
        "messages[2]": [*QUESTION, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": half}],
    }
    for name, chat in chats.items():
        for door in (
            lambda chat: build_inputs(chat, tokenizer, pilot_tokenizer),
            lambda chat: build_inputs([QUESTION, chat], tokenizer, pilot_tokenizer),
            urial_messages,
        ):
            with pytest.raises(WSDValueError, match=rf"^{re.escape(name)}: holds half of a surrogate pair \("):
                door(chat)
    examples = [{"role": "user", "content": half}, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(WSDValueError, match=r"^examples\[0\]: holds half of a surrogate pair"):
        urial_messages(QUESTION, examples)
    tried("prompts and arguments that are no text", 10)


def test_what_a_template_makes_of_other_keys_is_checked_too(pair: Any, tried: Any) -> None:
    _, _, tokenizer, pilot_tokenizer = pair
    naming = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    naming.chat_template = "{{ messages[0]['name'] }}"
    with pytest.raises(WSDValueError, match="the chat template of tokenizer refuses these messages: its output: holds half"):
        build_inputs([{"role": "user", "content": "Hi", "name": "\ud800"}], naming, pilot_tokenizer)
    tried("prompts and arguments that are no text")


@pytest.mark.parametrize("half", HALVES)
def test_the_pipeline(half: str, tried: Any) -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    models = {"model": base, "tokenizer": tokenizer, "assistant_model": pilot, "assistant_tokenizer": pilot_tokenizer}
    ask = pipeline("text-generation", **models, strategy="wsd", max_new_tokens=2)
    for prompt in (half, [half, "Hi"], [{"role": "user", "content": half}], [[{"role": "user", "content": half}], QUESTION]):
        with pytest.raises(WSDValueError, match="holds half of a surrogate pair"):
            ask(prompt)
    tried("prompts and arguments that are no text", 4)


@pytest.mark.parametrize("half", HALVES)
def test_the_harness(pair: Any, half: str, tried: Any) -> None:
    adapter = pytest.importorskip("wsd_hf.integrations.lm_eval", reason="no harness", exc_type=ImportError)
    model = adapter.WSDHFLM.__new__(adapter.WSDHFLM)  # what is asked is checked before any model is touched
    model.tokenizer, model.pair = pair[2], Pair(*pair)
    for prompt in (half, model.apply_chat_template([{"role": "user", "content": half}])):
        with pytest.raises(WSDValueError, match="holds half of a surrogate pair"):
            model._inputs([prompt])
    tried("prompts and arguments that are no text", 2)


@pytest.mark.parametrize("half", HALVES)
def test_a_value_is_of_texts(half: str, pair: Any, tried: Any) -> None:
    _, pilot, _, tokenizer = pair
    with pytest.raises(WSDValueError, match="a prompt: holds half of a surrogate pair"):
        ImplicitValue(pilot, pilot, tokenizer, [half])
    for prompt in ("Hi", [3, 4]):
        with pytest.raises(WSDValueError, match="a response: holds half of a surrogate pair"):
            ImplicitValue(pilot, pilot, tokenizer, [prompt])([half], [False])
    tried("prompts and arguments that are no text", 3)


@pytest.mark.parametrize("half", HALVES)
def test_prompts_questions_and_names(half: str, tmp_path: Path, tried: Any) -> None:
    file = tmp_path / "file"
    for record in ({"prompt": half}, {"messages": [{"role": "user", "content": half}]}, {"prompt": "Hi", "other": [half]}):
        file.write_text(f'{{"prompt": "Hi"}}\n\n{json.dumps(record)}')
        with pytest.raises(WSDValueError, match="file, line 3: holds half of a surrogate pair"):
            read_prompts(file)
        skipped: list[str] = []
        assert len(read_prompts(file, skipped.append)) == len(skipped) == 1
    for kind, question in {"arena_hard": {"uid": "a", "prompt": half}, "mt_bench": {"question_id": 1, "turns": [half]}}.items():
        file.write_text(json.dumps(question))
        with pytest.raises(WSDValueError, match="file, line 1: holds half of a surrogate pair"):
            AnswerFile(kind, file, tmp_path / "out")
    file.write_text('[{"instruction": "Hi"}]')
    with pytest.raises(WSDValueError, match="model: holds half of a surrogate pair"):
        AnswerFile("alpaca_eval", file, tmp_path / "out", half)
    tried("prompts and arguments that are no text", 9)


@pytest.mark.parametrize("half", ["a\udcffb"])  # the only kind that an argument can have
def test_arguments(hostile: Any, half: str, tmp_path: Path, tried: Any) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "turns": ["Hi"]}')
    pair = ("--base", FOLDER / "base", "--pilot", FOLDER / "pilot")
    export = ("answers", "mt_bench", "--questions", questions, "--out", tmp_path / "answers")
    harness = ("eval", "--harness", "lm-eval", "--tasks", "none", *pair)
    refused(run("generate", half), "messages[0]: holds half of a surrogate pair")
    refused(run("chat", "--system", half), "--system: holds half of a surrogate pair")
    refused(run(*export, "--name", half), "model: holds half of a surrogate pair")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}')
    for option in ("--base", "--pilot", "--reference", "--device"):
        result = run("compare", "--out", tmp_path / "out", *pair, "--prompts", prompts, option, half)
        refused(result, f"{option}: holds half of a surrogate pair")
    for option in ("--judge", "--strategies"):
        refused(run("compare", "--out", tmp_path / "out", *pair, "--prompts", prompts, option, half))
    for option in ("--base", "--pilot", "--device", "--messages"):
        refused(run("generate", *pair, option, half, *([] if option == "--messages" else ["Hi"])))
    refused(run("answers", half, *export[2:]))
    for option in ("--questions", "--device", "--base"):
        refused(run(*export, option, half))
    for option in ("--device", "--gen-kwargs", "--include-path"):
        refused(run(*harness, option, half))
    for option in ("--base", "--pilot"):
        refused(run("pack", *pair, option, half, tmp_path / "packed"))
    tried("prompts and arguments that are no text", 22)


def test_a_line_that_is_no_text_costs_a_chat_one_remark(hostile: Any, monkeypatch: pytest.MonkeyPatch, tried: Any) -> None:
    asked: list[Any] = []
    generate = Pair.generate
    monkeypatch.setattr(Pair, "generate", lambda pair, chat, **kwargs: asked.append(chat) or generate(pair, chat, **kwargs))
    for charset, bad in (("utf-8", b"caf\xe9"), ("utf-8", b"\xed\xa0\x80"), ("ascii", "é".encode()), ("cp1252", b"\x81")):
        asked.clear()
        result = run("chat", charset=charset, stdin=b"one\n" + bad + b"\ntwo\n")
        assert result.exit_code == 0
        remarks = [line for line in result.stderr.splitlines() if line.startswith("wsd-hf: ")]
        assert len(remarks) == 1
        assert "messages[2]: holds half of a surrogate pair" in remarks[0]
        said = [[message["content"] for message in chat if message["role"] == "user"] for chat in asked]
        assert (said[0], said[-1]) == (["one"], ["one", "two"])
        assert asked[-1][1]["content"] == ANSWER
    tried("prompts and arguments that are no text", 4)


# Chat templates that raise

RAISING = {
    "undefined": "{{ messages.nothing.at.all }}",
    "call": "{{ messages[0].content.nothing() }}",
    "type": "{{ 'a' + 1 }}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "security": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "memory": "{{ 'a' * 10 ** 15 }}",
    "range": "{% for number in range(10 ** 9) %}{% endfor %}",
    "value": "{{ 'a' | int(base=99) }}{{ [].index(1) }}",
    "format": "{{ '%d' | format('a') }}",
    "syntax": "{% if %}",
    "itself": "{{ raise_exception('No system\x1b[2J messages') }}",
    "half": "{{ '\\ud800' }}",
}


def templated(tokenizer: Any, template: str) -> Any:
    copied = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    copied.chat_template = template
    return copied


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING)
def test_a_chat_template_that_raises_anything_refuses(pair: Any, template: str, tried: Any) -> None:
    good = pair[2]
    bad = templated(good, template)
    for name, tokenizers in {"tokenizer": (bad, good), "assistant_tokenizer": (good, bad)}.items():
        with pytest.raises(WSDValueError, match=f"^the chat template of {name} refuses these messages: ") as caught:
            build_inputs(QUESTION, *tokenizers)
        assert caught.value.__cause__ is not None
    assert ChatLayout(bad).read([3, 4]) is None
    assert not packing._reads_chats(bad)
    tried("chat templates that raise", 4)


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING)
def test_the_pilot_of_a_bundle_gets_text_where_its_template_raises(
    pair: Any, template: str, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    told: list[str] = []
    monkeypatch.setattr(decoding, "logger", SimpleNamespace(warning_once=told.append))
    layout = SimpleNamespace(read=lambda row: SimpleNamespace(turns=QUESTION, prefill=""))
    partner = decoding._Partner(pair[1], pair[2], templated(pair[2], template), layout, None)
    assert partner._chat_prompt([3]) is None
    assert "the chat template of the pilot refuses" in told[0]
    assert safe(told[0])
    tried("chat templates that raise")


def test_commands_tell_of_such_a_template_in_a_line(pair: Any, monkeypatch: pytest.MonkeyPatch, tried: Any) -> None:
    broken = templated(pair[2], RAISING["itself"])
    shipped = Pair(*pair[:3], broken)
    monkeypatch.setattr(Pair, "tiny", lambda **_: shipped)
    refused(run("generate", "Hi"), "No system␛[2J messages")
    result = run("chat", stdin=b"Hi\nHi\n")
    assert result.exit_code == 0
    assert result.stderr.count("No system␛[2J messages (/reset starts anew)") == 2
    tried("chat templates that raise", 3)


# JSON

DEEP = {
    f"{depth} {kind}": opening * depth + closing * depth
    for depth in (66, 400, 980, 100_000)
    for kind, opening, closing in (("lists", "[", "]"), ("objects", '{"a":', "}"))
}
DEEP = {name: text.replace(":}", ":1}", 1) if "objects" in name else text.replace("[]", "[1]") for name, text in DEEP.items()}


def files(folder: Path, content: Callable[[dict[str, Any]], bytes]) -> Iterator[tuple[tuple[Any, ...], Path]]:
    """Every command that reads JSON, with the file that it reads; `content` writes a record."""
    folder.mkdir()
    messages, prompts, questions, settings = (folder / name for name in ("chat.json", "prompts.jsonl", "q.json", "q.jsonl"))
    messages.write_bytes(content(QUESTION))
    yield ("generate", "--messages", messages), messages
    prompts.write_bytes(content({"prompt": "Hi"}))
    yield ("compare", "--strategies", "base", "--out", folder / "first", "--prompts", prompts), prompts
    questions.write_bytes(content([{"instruction": "Hi"}]))
    yield ("answers", "alpaca_eval", "--questions", questions, "--out", folder / "a.json"), questions
    settings.write_bytes(content({"question_id": 1, "turns": ["Hi"]}))
    yield ("answers", "mt_bench", "--questions", settings, "--out", folder / "a.jsonl"), settings


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_json_that_is_nested_too_deep_is_named(hostile: Any, text: str, tmp_path: Path, tried: Any) -> None:
    for arguments, file in files(tmp_path / "inputs", lambda record: text.encode()):
        result = run(*arguments)
        refused(result, f"{file}")
        assert "nested more than 64 deep" in result.stderr
    with pytest.raises(WSDValueError, match="nested more than 64 deep"):
        parse_json(text.encode(), "file")
    for kind, name in (("alpaca_eval", "a.json"), ("mt_bench", "a.jsonl")):
        (tmp_path / name).write_text(text)
        question = tmp_path / "inputs" / f"{kind}.question"
        question.write_text('[{"instruction": "Hi"}]' if kind == "alpaca_eval" else '{"question_id": 1, "turns": ["Hi"]}')
        result = run("answers", kind, "--questions", question, "--out", tmp_path / name)
        refused(result, "nested more than 64 deep")
    tried("malformed JSON files", 7)


@pytest.mark.parametrize("text", [*DEEP.values(), "[]", "1", '"a"', "\ufeff", "[1,"])
def test_files_of_a_comparison_that_are_damaged_are_named(hostile: Any, text: str, tmp_path: Path, tried: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}')
    command = ("compare", "--strategies", "base", "--max-new-tokens", 2, "--out", tmp_path / "out", "--prompts", prompts)
    assert run(*command).exit_code == 0
    for name, problem in (("settings.json", "is missing or damaged"), ("answers.jsonl", "answers.jsonl, line 1: is damaged")):
        file = tmp_path / "out" / name
        kept = file.read_bytes()
        file.write_bytes(text.encode() + b"\n")
        refused(run(*command), problem)
        file.write_bytes(kept)
    assert run(*command).exit_code == 0
    tried("malformed JSON files", 2)


def test_json_may_be_nested_as_deep_as_anybody_writes_it() -> None:
    text = "[" * 64 + "1" + "]" * 64
    assert parse_json(text.encode(), "file") == json.loads(text)


def test_a_byte_order_mark_is_no_matter(hostile: Any, tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        folder = tmp_path / f"{len(mark)}"
        for arguments, _ in files(folder, lambda record, mark=mark: mark + b"\n" + json.dumps(record).encode()):
            result = run(*arguments)
            assert result.exit_code == 0, result.stderr
        (folder / "first" / "settings.json").write_bytes(mark + (folder / "first" / "settings.json").read_bytes())
        (folder / "first" / "answers.jsonl").write_bytes(mark + (folder / "first" / "answers.jsonl").read_bytes())
        (folder / "a.jsonl").write_bytes(mark + (folder / "a.jsonl").read_bytes())
        options = ("--strategies", "base", "--prompts", folder / "prompts.jsonl")
        assert run("compare", "--out", folder / "first", *options).exit_code == 0
        again = run("answers", "mt_bench", "--questions", folder / "q.jsonl", "--out", folder / "a.jsonl")
        assert "every question has its answer" in again.stderr


def test_a_byte_order_mark_is_no_part_of_a_question(hostile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Conversation, "ask", lambda self, question: asked.append(question))
    run("chat", stdin=b"\xef\xbb\xbf/reset\nHi\n\xef\xbb\xbfHi\n")
    assert asked == ["Hi", "\ufeffHi"]


@pytest.mark.parametrize("content", ['[{"role": "user", "content": "Hi"}]'.encode("utf-16"), b"\xff", b"", b"\xef\xbb\xbf"])
def test_files_in_other_encodings_are_named(hostile: Any, content: bytes, tmp_path: Path, tried: Any) -> None:
    for arguments, _ in files(tmp_path / "inputs", lambda record: content):
        refused(run(*arguments))
    tried("malformed JSON files", 4)


# Terminals


@pytest.mark.parametrize(
    ("charset", "env"),
    [
        *((charset, {}) for charset in ("ascii", "latin-1", "cp1252", "utf-8")),
        *(("ascii", env) for env in ({"COLUMNS": "10"}, {"NO_COLOR": "1"}, {"TERM": "dumb", "FORCE_COLOR": "1"})),
    ],
)
def test_a_command_never_fails_for_what_its_terminal_can_not_show(
    hostile: Any, charset: str, env: dict[str, str], tmp_path: Path, tried: Any
) -> None:
    def end(shown: str) -> bool:
        """Whether the answer's end is there, as far as this encoding has it."""
        return "".join("│éß水🙂Z".encode(charset, "backslashreplace").decode(charset).split()) in "".join(shown.split())

    def checked(*arguments: Any, **kwargs: Any) -> Any:
        result = run(*arguments, charset=charset, **kwargs, **env)
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert "\x1b]" not in result.stdout
        return result

    assert end(checked("generate", "Hi").stdout)
    assert json.loads(checked("generate", "--json", "Hi").stdout)["response"] == ANSWER
    assert end(checked("chat", stdin=b"Hi\n").stdout)
    assert "nonsense" in checked("demo").stdout
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    assert checked("compare", "--out", tmp_path / "水", "--prompts", prompts, "--strategies", "base,wsd").stdout
    for command in ("demo", "generate", "chat", "compare", "eval", "answers", "pack"):
        checked(command, "--help")
    checked("--help")
    tried("commands on terminals that lack characters", 12)


@contextmanager
def unread() -> Iterator[Any]:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    file = open(writer, "w", encoding="utf-8")  # noqa: SIM115 - its closing may fail
    try:
        yield file
    finally:
        with suppress(BrokenPipeError):
            file.close()


@pytest.mark.parametrize("arguments", [["generate", "Hi"], ["generate", "--json", "Hi"], ["demo"], ["chat"], ["--help"]])
def test_a_closed_pipe_ends_a_command_quietly(
    hostile: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tried: Any
) -> None:
    with unread() as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        with pytest.raises(SystemExit) as ended:
            app(arguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err == ""
    tried("commands with a closed pipe")


@pytest.mark.sweep
def test_a_closed_pipe_of_a_process(tried: Any) -> None:
    command = [sys.executable, "-c", "from wsd_hf.cli import app; app()"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "10"}
    process = subprocess.Popen([*command, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout.readline()
    process.stdout.close()
    _, told = process.communicate()
    assert process.returncode == 1
    assert [line for line in told.decode().splitlines() if line and "Loading weights" not in line] == []
    tried("commands with a closed pipe")


def test_chat_without_an_input(hostile: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        app(["chat"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == ""
