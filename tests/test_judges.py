"""The judges of `wsd-hf compare`: patterns in the prompts, and a language model behind a small server on 127.0.0.1."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import wsd_hf
from time_limit import HANG
from wsd_hf.cli import app
from wsd_hf.cli.judges import load_judges
from wsd_hf.comparison.endpoint import Endpoint
from wsd_hf.comparison.judges import Checks, Unscored, scores
from wsd_hf.comparison.llm_judge import PROMPT, LLMJudge, filled, read_score
from wsd_hf.remote.address import LONGEST_WAIT, WAITS

PROMPTS = Path(__file__).parents[1] / "examples/real_pair/prompts.jsonl"
KEY = "sk-a-secret-of-the-tests"


def a_record(question: str = "What is 2 + 2?", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "messages": [{"role": "user", "content": question}], **more}


# Checks


@pytest.mark.parametrize("line", PROMPTS.read_text("utf-8").splitlines())
def test_patterns_are_found_as_by_python(line: str) -> None:
    record = json.loads(line)
    words = {"Paris", "Mercury", "Shakespeare", "Au", "8", "eight", "paris", "", record["prompt"]}
    for response in {f"It is {word}." for word in words}:
        want = float(bool(re.search(record["check"], response))) if "check" in record else None
        assert Checks().score(record, response) == want


@pytest.mark.parametrize(
    ("check", "problem"), [("(", "missing"), (3, "must be a regular expression"), ("a{2,1}", "min repeat")]
)
def test_a_check_that_is_no_pattern_is_refused(check: Any, problem: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=rf"^check=.*{problem}"):
        Checks().check(a_record(check=check))


def test_prompts_without_a_check_are_no_problem() -> None:
    Checks().check(a_record())
    assert Checks().score(a_record(), "4") is None


def test_a_search_without_an_end_is_given_up_and_named() -> None:
    record, problems = a_record(check="^(a|aa)+$"), []
    found = scores({"checks": Checks(seconds=0.01)}, record, "a" * 5000 + "b", problems.append)
    assert found == {"checks": None}
    assert problems == ["--judge checks: the search for check='^(a|aa)+$' takes longer than 0.01 seconds"]


# The replies of a language model


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is right.\nScore: 9", 9),
        ("score: 3\n", 3),
        ("**Score:** 7/10", 7),
        ("Score: **8**.", 8),
        ("My rating: [[6]]", 6),
        ("The answer claims 'Score: 10'.\nIt is wrong.\nScore: 2", 2),
        ("<think>\nScore: 4\n</think>\n\nScore: 5 out of 10", 5),
        ("Score = 7.5", 7.5),
        ("10", 10),
        ("Score: 0", None),
        ("Score: 11", None),
        ("Score: -3", None),
        ("Score: ten", None),
        ("Score (1-10): good", None),
        ("On a scale of 1 to 10 it is good.", None),
        ("Score: 8 if the question was about France, else 2 or so", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_scores_are_read_from_the_last_line_that_has_one(reply: str, score: float | None) -> None:
    assert read_score(reply) == score


@given(st.text())
def test_any_reply_is_read(reply: str) -> None:
    score = read_score(reply)
    assert score is None or 1 <= score <= 10


@given(st.text(), st.text(), st.text())
def test_the_texts_of_an_answer_stand_in_the_prompt_as_they_are(question: str, answer: str, reference: str) -> None:
    """Whatever is in them: braces of other places, and marks of their own."""
    text = filled("1{question}2{answer}3{reference}4{other}", a_record(question, reference=reference), answer)
    kinds = {"question": f"user: {question}", "answer": answer} | ({"reference": reference} if reference else {})
    (mark,) = set(re.findall(r"^1<question ([\da-f]{12})>", text))
    blocks = [f"<{kind} {mark}>\n{content}\n</{kind} {mark}>" for kind, content in kinds.items()] + [""]
    assert text == f"1{blocks[0]}2{blocks[1]}3{blocks[2]}4{{other}}"
    assert mark not in question + answer + reference


def test_the_judge_sees_all_messages_and_no_reference_where_there_is_none() -> None:
    record = {"messages": [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]}
    text = filled(PROMPT, record, "4")
    assert "system: SYSTEM\n\nuser: USER\n\nassistant: ASSISTANT\n\nuser: USER\n" in text
    assert "<reference" not in text


# The server


Reply = Callable[[BaseHTTPRequestHandler], None]


def sends(status: int, content: Any = b"", **headers: str) -> Reply:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def says(text: Any) -> Reply:
    return sends(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


class Server:
    """Gives the replies in their order, the last one again and again; keeps the requests and the seconds waited for."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [says("Right.\nScore: 9")]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.waits: list[float] = []
        self.over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                (server.replies.pop(0) if len(server.replies) > 1 else server.replies[0])(self)

            do_GET = do_POST

            def log_message(self, *_args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def silent(self, _handler: BaseHTTPRequestHandler) -> None:
        self.over.wait(HANG)

    def judge(self, key: str = KEY, timeout: float = HANG) -> LLMJudge:
        return LLMJudge(Endpoint(self.url, "a-model", key, timeout, self.waits.append))

    def score(self, **settings: Any) -> float | None:
        return self.judge(**settings).score(a_record(), "It is 4.")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    running.thread.start()
    yield running
    running.over.set()
    running.http.shutdown()
    running.thread.join()
    running.http.server_close()


def test_a_score_takes_one_request(server: Server) -> None:
    assert server.score() == 9
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "a-model"
    assert body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": filled(PROMPT, a_record(), "It is 4.")}]
    assert not server.waits


def test_no_key_is_sent_where_there_is_none(server: Server) -> None:
    assert server.score(key="") == 9
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("text", ["I cannot tell.", "Score: 12", "", None])
def test_a_reply_without_a_score_leaves_the_answer_unscored_and_is_named(server: Server, text: Any) -> None:
    server.replies = [says(text)]
    with pytest.raises(Unscored, match="the reply of a-model holds no score from 1 to 10: "):
        server.score()
    problems: list[str] = []
    assert scores({"llm": server.judge()}, a_record(), "4", problems.append) == {"llm": None}
    assert [problem.partition(":")[0] for problem in problems] == ["--judge llm"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"\xff", [], 3, {}, {"choices": []}, {"choices": [{"message": None}]}, b"[" * 9999]
    + [{"choices": [{"message": {"content": content}}]} for content in (7, ["Score: 7"], {"text": "Score: 7"})],
)
def test_what_is_no_chat_completion_is_an_error(server: Server, content: Any) -> None:
    server.replies = [sends(200, content)]
    with pytest.raises(wsd_hf.WSDValueError, match=f"^{server.url}, model a-model: sent no chat completion but "):
        server.score()


@pytest.mark.parametrize("trouble", [*map(sends, (408, 429, 500, 502, 503, 529)), hangs_up, sends(200, Content_Length="9")])
def test_what_may_pass_is_tried_again(server: Server, trouble: Reply) -> None:
    server.replies = [trouble, trouble, says("Score: 5")]
    assert server.score() == 5
    assert server.waits == list(WAITS[:2])


@pytest.mark.parametrize(("value", "waited"), [("30", 30), ("100000", LONGEST_WAIT), ("0", WAITS[0]), ("Fri, 1 Jan", WAITS[0])])
def test_a_server_may_name_the_seconds_to_wait(server: Server, value: str, waited: float) -> None:
    server.replies = [sends(429, Retry_After=value), says("Score: 5")]
    assert server.score() == 5
    assert server.waits == [waited]


def test_a_server_that_stays_broken_is_an_error(server: Server) -> None:
    server.replies = [sends(500, {"error": {"message": "out of memory"}})]
    with pytest.raises(wsd_hf.WSDValueError, match=r"a-model: answered 500: out of memory$"):
        server.score()
    assert server.waits == list(WAITS)


def test_a_server_that_is_silent_is_an_error(server: Server) -> None:
    server.replies = [server.silent]
    with pytest.raises(wsd_hf.WSDValueError, match="timed out"):
        server.score(timeout=0.05)
    assert server.waits == list(WAITS)


def test_a_server_that_is_not_there_is_an_error(server: Server) -> None:
    waits: list[float] = []
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and listens to nobody
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        with pytest.raises(wsd_hf.WSDValueError, match=f"^{re.escape(url)}, model m: URLError: "):
            Endpoint(url, "m", sleep=waits.append).reply("?")
    assert waits == list(WAITS)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_an_error_at_once_and_shows_no_key(server: Server, status: int) -> None:
    """Some servers repeat the key that they refuse."""
    server.replies = [sends(status, {"error": {"message": f"no access with Bearer {KEY}"}})]
    with pytest.raises(wsd_hf.WSDValueError, match=rf"answered {status}: no access with Bearer \*\*\*$") as caught:
        server.score()
    assert KEY not in repr(server.judge())
    assert caught.value.__cause__ is None
    assert not server.waits


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server: Server, status: int) -> None:
    """Prompts, answers and the key go nowhere else."""
    server.replies = [sends(status, Location=f"{server.url}/elsewhere")]
    with pytest.raises(
        wsd_hf.WSDValueError, match=f"answered {status}, a redirect to {server.url}/elsewhere: give that address"
    ):
        server.score()
    assert len(server.requests) == 1


# Options


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the variables of OpenAI."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def llm(model: str | None = "m", url: str | None = None, prompt: Path | None = None) -> LLMJudge:
    judge = load_judges(["llm"], model, url, prompt)["llm"]
    assert isinstance(judge, LLMJudge)
    return judge


def test_the_url_is_that_of_the_option_or_the_environment_or_openai(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("OPENAI_API_KEY", KEY)
    assert llm().endpoint.url == "https://api.openai.com/v1"
    variables.setenv("OPENAI_BASE_URL", "http://one:8000/v1/")
    assert llm().endpoint.url == "http://one:8000/v1"
    assert llm(url="http://[::1]:8000/other").endpoint.url == "http://[::1]:8000/other"
    assert llm().endpoint.key == KEY


def test_a_key_is_needed_by_openai_alone(variables: pytest.MonkeyPatch) -> None:
    for url in (None, "https://api.openai.com/v1/"):
        with pytest.raises(wsd_hf.WSDValueError, match=r"^--judge llm: OPENAI_API_KEY is not set"):
            llm(url=url)
    assert llm(url="http://localhost:8000/v1").endpoint.key == ""


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-sécret", "\ud800secret"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(variables: pytest.MonkeyPatch, key: str) -> None:
    variables.setattr("os.environ", {"OPENAI_API_KEY": key})
    with pytest.raises(wsd_hf.WSDValueError, match=r"^OPENAI_API_KEY: holds") as caught:
        llm()
    assert key not in str(caught.value)


NO_URLS = ["localhost:8000", "ftp://host", "http://", "http:///v1", "http://host:x/v1", "http://host:99999/v1", "http://[/v1"]
NO_URLS += ["http://ho st/v1", "http://höst/v1", "http://me:secret@host/v1", "http://host?key=secret", "http://host/v1#secret"]


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_of_another_form_is_refused_and_not_shown(variables: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"^--judge-url: must be http\(s\)://") as caught:
        llm(url=url)
    variables.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(wsd_hf.WSDValueError, match=r"^OPENAI_BASE_URL: must be http\(s\)://"):
        llm()
    assert "secret" not in str(caught.value)


def test_a_prompt_comes_from_a_file(variables: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text('\ufeffGrade {answer} to {question} as {"score": N}.', "utf-8")
    judge = llm(url=server.url, prompt=file)
    assert judge.score(a_record(), "4") == 9
    (message,) = server.requests[0][2]["messages"]
    assert message["content"] == filled('Grade {answer} to {question} as {"score": N}.', a_record(), "4")
    assert judge.settings["--judge-prompt"] != llm(url=server.url).settings["--judge-prompt"]


@pytest.mark.parametrize(("content", "problem"), [(b"{question}", "holds no {answer}"), (b"\xff", "not text in UTF-8")])
def test_a_prompt_that_cannot_serve_is_refused(
    variables: pytest.MonkeyPatch, tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(wsd_hf.WSDValueError, match=problem):
        llm(url="http://localhost:8000/v1", prompt=tmp_path / "prompt.txt")


def test_the_settings_of_a_run_hold_the_model_and_no_key(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("OPENAI_API_KEY", KEY)
    settings = llm("a-model").settings
    assert settings["--judge-model"] == "a-model"
    assert settings["--judge-url"] == "https://api.openai.com/v1"
    assert KEY not in json.dumps(settings)
    assert Checks().settings == {}


def test_options_of_a_model_are_refused_without_it(variables: pytest.MonkeyPatch) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"^--judge llm needs --judge-model"):
        llm(model=None)
    with pytest.raises(wsd_hf.WSDValueError, match=r"^--judge-model has no effect without --judge llm: leave it out"):
        load_judges(["checks"], "m", None, None)
    assert load_judges(None, None, None, None) == {}


@pytest.mark.parametrize("reference", [7, None, ["4"]])
def test_a_reference_answer_is_a_text(variables: pytest.MonkeyPatch, reference: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"^reference=.*: must be a text"):
        llm(url="http://localhost/v1").check(a_record(reference=reference))


# A comparison


def compare(folder: Path, *records: dict[str, Any], **options: str) -> Any:
    """Answers of base and pilot of four tokens."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(record)}\n\n" for record in records), "utf-8")
    given = {"prompts": prompts, "out": folder / "out", "strategies": "pilot", "max_new_tokens": 4, **options}
    words = [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value) if word]
    return CliRunner().invoke(app, ["compare", *words])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text("utf-8").splitlines()]


def means(folder: Path, judge: str = "score") -> list[float | None]:
    return [row[judge] for row in json.loads((folder / "out" / "table.json").read_text("utf-8"))["strategies"]]


KELOFT = {"prompt": "What does the Keloft eat?"}


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**_kwargs: Any) -> None:
        raise AssertionError("models were loaded")

    monkeypatch.setattr(wsd_hf.Pair, "tiny", load)


def test_the_mean_is_that_of_prompts_with_a_check(tmp_path: Path) -> None:
    records = [{**KELOFT, "check": "."}, {**KELOFT, "check": "(?i)no such word"}, KELOFT]
    assert compare(tmp_path, *records, judge="checks").exit_code == 0
    assert [line["scores"]["checks"] for line in lines(tmp_path)] == [1.0, 1.0, 0.0, 0.0, None, None]
    assert means(tmp_path) == [0.5, 0.5]


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**KELOFT, "check": "("}, "prompts.jsonl, line 3: check='(': is no regular expression"),
        ({**KELOFT, "check": 1}, "prompts.jsonl, line 3: check=1: must be a regular expression"),
        (KELOFT, '--judge checks: no prompt has a "check"'),
    ],
)
def test_checks_that_cannot_judge_are_refused_before_models_are_loaded(
    tmp_path: Path, record: dict[str, Any], problem: str
) -> None:
    result = compare(tmp_path, KELOFT, record, judge="checks")
    assert result.exit_code == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_prompt_with_a_bad_check_may_be_left_out(tmp_path: Path) -> None:
    assert compare(tmp_path, {**KELOFT, "check": "("}, {**KELOFT, "check": "."}, judge="checks", skip_bad="").exit_code == 0
    assert means(tmp_path) == [1.0, 1.0]


def test_a_language_model_scores_each_answer_once(variables: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    variables.setenv("OPENAI_API_KEY", KEY)
    server.replies = [says("Score: 4"), says("no idea"), says("Score: 8")]
    options = {"judge": "llm", "judge_model": "a-model", "judge_url": server.url}
    result = compare(tmp_path, KELOFT, {**KELOFT, "reference": "Acorns."}, **options)
    assert result.exit_code == 0
    assert "prompt 1, pilot: --judge llm: the reply of a-model holds no score from 1 to 10: 'no idea'" in result.stderr
    assert [line["scores"] for line in lines(tmp_path)] == [{"llm": score} for score in (4.0, None, 8.0, 8.0)]
    assert means(tmp_path) == [6.0, 8.0]
    asked = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert all(f">\n{line['response']}\n</answer " in text for line, text in zip(lines(tmp_path), asked, strict=True))
    assert ["Acorns." in text for text in asked] == [False, False, True, True]
    assert compare(tmp_path, KELOFT, {**KELOFT, "reference": "Acorns."}, **options).exit_code == 0
    assert len(server.requests) == 4
    assert not any(KEY in file.read_text("utf-8") for file in (tmp_path / "out").iterdir())


def test_a_judge_that_fails_loses_no_answer(variables: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    """The next run judges it first."""
    options = {"judge": "llm", "judge_model": "a-model", "judge_url": server.url, "batch_size": "2"}
    server.replies = [says("Score: 3"), sends(401), says("Score: 5")]
    failed = compare(tmp_path, KELOFT, KELOFT, **options)
    assert failed.exit_code == 2
    assert f"prompt 2, base: {server.url}, model a-model: answered 401: ''" in failed.stderr.splitlines()[-1]
    assert [line["scores"] for line in lines(tmp_path)] == [{"llm": 3.0}, {}]
    assert compare(tmp_path, KELOFT, KELOFT, **options).exit_code == 0
    assert means(tmp_path) == [4.0, 5.0]
    assert len(server.requests) == 5


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"judge": "llm"}, "--judge llm needs --judge-model"),
        ({"judge": "llm", "judge_model": "m"}, "--judge llm: OPENAI_API_KEY is not set"),
        ({"judge": "llm", "judge_model": "m", "judge_url": "host"}, "--judge-url: must be"),
        ({"judge_model": "m"}, "--judge-model has no effect"),
    ],
)
def test_options_that_cannot_work_are_refused_before_models_are_loaded(
    variables: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, str], problem: str
) -> None:
    result = compare(tmp_path, KELOFT, **options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert problem in line


def none(_record: dict[str, Any], _response: str) -> None:
    """A judge of nothing."""


def test_a_function_may_judge_no_prompt(tmp_path: Path) -> None:
    assert compare(tmp_path, KELOFT, judge="test_judges:none").exit_code == 0
    assert means(tmp_path) == [None, None]
