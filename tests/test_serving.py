"""The web application: what clients of OpenAI's API get, what they are refused, and what is left when they go."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("openai", reason="no client: pip install openai")

import httpx
import openai

from serving_for_tests import (
    END,
    Scripted,
    asked,
    client,
    get,
    numbers,
    post,
    running,
    text,
    user,
    wait_until,
    wait_until_over,
)
from time_limit import HANG
from wsd_hf import WSDServerError, WSDValueError
from wsd_hf.serving.app import Limits
from wsd_hf.serving.requests import Piece

PIECES = [Piece("Yes", "pilot"), Piece(" indeed", "base")]
FAILED = WSDServerError("http://10.0.0.7:8001/v1, model x: answered 500: SECRET", reason="answered 500", role="base")


def refusal(response: httpx.Response) -> tuple[int, str, Any]:
    """Status, message and field of an error, which has all that OpenAI's errors have."""
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["param"]


def keep(stream: Iterable[Any], seen: list[Any]) -> None:
    """Keeps the chunks of a stream until it fails."""
    for chunk in stream:
        seen.append(chunk)


@pytest.fixture(scope="module")
def scripted() -> Any:
    return Scripted(*PIECES, END)


@pytest.fixture(scope="module")
def url(scripted: Scripted) -> Any:
    with running(scripted) as url:
        yield url


def test_the_form_of_a_whole_answer(url: str) -> None:
    answer = client(url).chat.completions.create(model="tiny", messages=user("Hello."))
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Yes indeed", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert choice.wsd == {"pilot_tokens": 1, "base_tokens": 1, "switch_index": 1, "switch_reason": "confident"}
    assert (answer.model, answer.object) == ("tiny", "chat.completion")


def test_the_form_of_a_stream(url: str) -> None:
    options = {"include_usage": True}
    chunks = list(client(url).chat.completions.create(model="tiny", messages=user("?"), stream=True, stream_options=options))
    first, *pieces, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [(piece.choices[0].delta.content, piece.choices[0].wsd["writer"]) for piece in pieces] == [
        ("Yes", "pilot"),
        (" indeed", "base"),
    ]
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].wsd["switch_index"] == 1
    assert (usage.choices, usage.usage.total_tokens) == ([], 5)
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(client(url).chat.completions.create(model="tiny", messages=user("?"), stream=True))
    assert len(without) == len(chunks) - 1


def test_models_and_health(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == ["tiny"]
    assert client(url).models.retrieve("tiny").owned_by == "wsd_hf"
    assert refusal(get(f"{url}/v1/models/other"))[0] == 404
    assert get(f"{url}/health").json() == {"status": "ok"}
    for path in ("", "/", "/v1", "/v1/completions", "/chat/completions"):
        status, message, _ = refusal(get(f"{url}{path}"))
        assert (status, "/v1/chat/completions" in message) == (404, True)
    assert refusal(get(f"{url}/v1/chat/completions"))[0] == 405


def test_settings_reach_the_answerer(url: str, scripted: Scripted) -> None:
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    chat = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": content, "name": None}]
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["a", "b"], "max_completion_tokens": 9}
    wsd = {"wsd_threshold": 0.5, "wsd_window_size": 2, "wsd_ignore_repeats": True}
    assert post(url, messages=chat, **sampling, **wsd).status_code == 200
    request = scripted.requests[-1]
    assert request.messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.5, 0.9, 7, 3)
    assert (request.stop, request.max_tokens) == (("a", "b"), 9)
    strategy = request.strategy
    assert (strategy.threshold, strategy.window_size, strategy.ignore_repeats) == (0.5, 2, True)
    assert post(url, switch_criteria="agreement", stop="c").status_code == 200
    assert scripted.requests[-1].strategy.switch_criteria == "agreement"
    assert (scripted.requests[-1].stop, scripted.requests[-1].max_tokens) == (("c",), 64)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "tool_choice": "auto"},
        {"tools": [], "n": 1, "frequency_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"}},
        {"tools": None, "n": None, "stop": None, "max_tokens": None, "anything": None, "logit_bias": {}},
    ],
)
def test_fields_that_change_nothing_are_accepted(url: str, fields: dict[str, Any]) -> None:
    assert post(url, **fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "no such setting"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no such setting"),
        ({"logprobs": True}, "logprobs", "no such setting"),
        ({"n": 2}, "n", "n=2"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "no such setting"),
        ({"temprature": 0.5}, "temprature", "no such setting"),
        ({"wsd_treshold": 0.5}, "wsd_treshold", "no such setting"),
        ({"max_tokens": 65}, "max_tokens", "at most 64"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "a finite number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 0}, "top_k", "at least 1"),
        ({"seed": 2**63}, "seed", "below"),
        ({"temperature": 1e-300}, "temperature", "must be 0, which is greedy"),
        ({"temperature": 3}, "temperature", "at most 2"),
        ({"stop": [""]}, "stop", "a list of at most 4"),
        ({"stop": list("abcde")}, "stop", "a list of at most 4"),
        ({"stop": "x" * 1001}, "stop", "1,000 characters"),
        ({"stream": "yes"}, "stream", "True or False"),
        ({"stream_options": {"x": 1}}, "stream_options", "include_usage"),
        ({"wsd_threshold": 1.5}, "wsd_threshold", "threshold=1.5"),
        ({"wsd_ignore_repeats": "no"}, "wsd_ignore_repeats", "ignore_repeats='no'"),
        ({"switch_criteria": "mood"}, "switch_criteria", "mood"),
        ({"switch_criteria": ["confidence"]}, "switch_criteria", "switch_criteria"),
        ({"wsd_threshold": 0.5, "switch_criteria": "mood"}, "switch_criteria", "mood"),
        ({"wsd_threshold": 0.5, "wsd_window_size": 0}, "wsd_window_size", "window_size=0"),
        ({"messages": []}, "messages", "must end with a user message"),
        ({"messages": "Hello."}, "messages", "a list of objects"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "x", "name": "Jo"}]}, "messages", "name"),
        ({"messages": None}, "messages", "missing"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(url: str, fields: dict[str, Any], param: str, problem: str) -> None:
    status, message, named = refusal(post(url, **fields))
    assert (status, named) == (400, param)
    assert problem in message


def test_another_model_is_not_found(url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
        client(url).chat.completions.create(model="gpt-4", messages=user("Hello."))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff", b'{"messages": "\\ud800"}', b"[" * 5000])
def test_a_body_that_is_no_object_of_json_is_refused(url: str, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert refusal(httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=HANG))[0] == 400


def test_a_page_of_another_site_cannot_ask(url: str) -> None:
    headers = {"Content-Type": "text/plain"}  # what a browser sends without asking the server first
    assert refusal(httpx.post(f"{url}/v1/chat/completions", content=b"{}", headers=headers, timeout=HANG))[0] == 415


def test_limits_of_a_body() -> None:
    with running(Scripted(*PIECES, END), limits=Limits(body_bytes=1000)) as url:
        assert post(url).status_code == 200
        for body in ("x" * 1000, "x" * 100_000):
            status, message, _ = refusal(post(url, messages=user(body)))
            assert (status, "1,000 bytes" in message) == (413, True)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with running(Scripted(*PIECES, END), limits=Limits(body_seconds=0.05)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG) as connection:
            connection.sendall(head.encode() + b'{"mess')
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        wait_until_over(url, refused=1)


def test_more_open_requests_than_the_limit_are_sent_away() -> None:
    go_on = threading.Event()
    with running(Scripted(go_on, *PIECES, END), limits=Limits(open_requests=2)) as url, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(post, url) for _ in range(2)]
        wait_until(lambda: numbers(url)["wsd_open_requests"] == 2)
        refused = post(url)
        assert (refusal(refused)[0], refused.headers["Retry-After"]) == (429, "1")
        go_on.set()
        assert [one.result().status_code for one in held] == [200, 200]
        wait_until_over(url, answered=2, refused=1)
        assert post(url).status_code == 200


def test_a_key_is_needed_where_there_is_one() -> None:
    with running(Scripted(*PIECES, END), key="secret-key") as url:
        answer = client(url, "secret-key").chat.completions.create(model="tiny", messages=user("?"))
        assert answer.choices[0].message.content == "Yes indeed"
        for wrong in ("Bearer", "Bearer secret-kez", "Bearer secret", "Bearer sécret-key", "Basic secret-key"):
            headers = {"Authorization": wrong.encode()}
            for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
                response = get(f"{url}{path}", headers=headers)
                assert (refusal(response)[0], response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert get(f"{url}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            client(url, "other").models.list()


def test_a_server_that_fails_before_the_first_piece_is_a_502() -> None:
    with running(Scripted(FAILED)) as url:
        for stream in (False, True):
            assert refusal(post(url, stream=stream)) == (502, "the base's server failed (answered 500)", None)
        wait_until_over(url, failed=2)


def test_a_server_that_fails_in_the_middle_leaves_the_text_so_far() -> None:
    with running(Scripted(*PIECES, FAILED)) as url:
        seen: list[Any] = []
        stream = client(url).chat.completions.create(model="tiny", messages=user("?"), stream=True)
        with pytest.raises(openai.APIError, match=r"the base's server failed \(answered 500\)"):
            keep(stream, seen)
        assert text(seen) == "Yes indeed"
        whole = post(url).json()["error"]
        assert (whole["code"], whole["text"]) == ("upstream_failed", "Yes indeed")


def test_a_request_that_the_models_refuse_is_a_400() -> None:
    with running(Scripted(WSDValueError("the prompt is too long"))) as url:
        assert [refusal(post(url, stream=stream))[:2] for stream in (False, True)] == [(400, "the prompt is too long")] * 2
        wait_until_over(url, refused=2)


def test_logs_have_no_text(caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    failures = [RuntimeError("SECRET"), FAILED, WSDValueError("SECRET")]
    for items in ([Piece("SECRET", "base"), END], *([failure] for failure in failures)):
        with running(Scripted(*items)) as url:
            post(url, messages=user("SECRET"), stream=True)
            post(url, messages=user("SECRET"), SECRET="SECRET")
            post(url, messages=[{"SECRET": 1}])
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    for kind in ("RuntimeError", "the base's server failed (answered 500)"):
        assert any(kind in record.getMessage() for record in ours)
    assert not [record for record in ours if "SECRET" in record.getMessage() + str(record.exc_info)]


def test_an_unexpected_failure_is_a_500_without_its_message() -> None:
    with running(Scripted(RuntimeError("internals"))) as url:
        status, message, _ = refusal(post(url))
        assert (status, "internals" in message) == (500, False)
    with running(Scripted(*PIECES, RuntimeError("internals"))) as url:
        last = post(url, stream=True).text.strip().rsplit("\n\n", 1)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert "internals" not in last


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_its_answer(stream: bool, begun: bool) -> None:
    go_on = threading.Event()
    answerer = Scripted(*PIECES[: int(begun)], go_on, END)
    with running(answerer) as url:
        connection = asked(url, stream=stream)
        wait_until(lambda: len(answerer.requests) == 1 and numbers(url)["wsd_first_token_seconds_count"] == begun)
        connection.close()
        wait_until_over(url, left=1)
        assert answerer.closed == 1


def test_answers_that_do_not_end_in_time_are_ended_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving_for_tests.GRACE", 0)
    answerer = Scripted(*PIECES, threading.Event(), END)
    with ThreadPoolExecutor(2) as pool:
        with running(answerer) as url:
            held = [pool.submit(post, url, stream=stream) for stream in (True, False)]
            wait_until(lambda: numbers(url)["wsd_first_token_seconds_count"] == 2)
        streamed, whole = (one.result() for one in held)
    assert json.loads(streamed.text.strip().rsplit("data: ", 1)[-1])["error"]["code"] == "stopping"
    assert (whole.status_code, whole.json()["error"]["text"], whole.headers["Retry-After"]) == (503, "Yes indeed", "1")
    assert answerer.closed == 2


@pytest.mark.parametrize("rest", [[Piece("x", "base"), END], [FAILED], [RuntimeError()]], ids=["text", "upstream", "failure"])
def test_a_client_that_reads_nothing_is_not_waited_for(rest: list[Any]) -> None:
    answerer = Scripted(Piece("x" * 20_000_000, "base"), *rest)
    with running(answerer, limits=Limits(reading_seconds=0.1)) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": user("?"), "stream": True}, timeout=HANG):
            wait_until_over(url, left=1)
        assert answerer.closed == 1


def test_metrics_have_the_numbers_of_the_answers(url: str) -> None:
    before = wait_until_over(url)
    posts = [post(url, stream=stream) for stream in (False, True, True)]
    assert [one.status_code for one in posts] == [200, 200, 200]
    post(url, n=2)
    counted = {outcome: before[f'wsd_requests_total{{outcome="{outcome}"}}'] for outcome in ("answered", "refused")}
    after = wait_until_over(url, answered=counted["answered"] + 3, refused=counted["refused"] + 1)
    grown = {name: value - before[name] for name, value in after.items() if value != before[name]}
    expected = {
        'wsd_requests_total{outcome="answered"}': 3,
        'wsd_requests_total{outcome="refused"}': 1,
        "wsd_prompt_tokens_total": 9,
        'wsd_tokens_total{writer="pilot"}': 3,
        'wsd_tokens_total{writer="base"}': 3,
        'wsd_switches_total{reason="confident"}': 3,
        "wsd_switch_index_count": 3,
        "wsd_switch_index_sum": 3,
        "wsd_first_token_seconds_count": 3,
        "wsd_answer_seconds_count": 3,
    }
    assert {name: grown[name] for name in expected} == expected


def test_stopping_the_server_lets_open_answers_end() -> None:
    go_on = threading.Event()

    def go_on_once_it_stops(url: str) -> None:
        wait_until(lambda: takes_no_connection(url))
        go_on.set()

    with ThreadPoolExecutor(2) as pool:
        with running(Scripted(PIECES[0], go_on, PIECES[1], END)) as url:
            held = pool.submit(
                lambda: text(list(client(url).chat.completions.create(model="tiny", messages=user("?"), stream=True)))
            )
            wait_until(lambda: numbers(url)["wsd_first_token_seconds_count"] == 1)
            pool.submit(go_on_once_it_stops, url)
        assert held.result() == "Yes indeed"


def takes_no_connection(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=HANG).close()
    except ConnectionError:
        return True
    return False


def test_requests_for_another_host_are_refused() -> None:
    with running(Scripted(*PIECES, END), names=["localhost", "[::1]"]) as url:
        port = urlsplit(url).port
        for path in ("health", "v1/models", "metrics"):
            for host in (f"localhost:{port}", "LocalHost", f"[::1]:{port}"):
                assert get(f"{url}/{path}", headers={"Host": host}).status_code == 200
            for host in (f"evil.example:{port}", "localhost.evil.example", "127.0.0.1", "", "localhost:x", "x" * 9999):
                status, message, _ = refusal(get(f"{url}/{path}", headers={"Host": host}))
                assert (status, "is no name of this server" in message, len(message) < 200) == (400, True, True)
        assert post(url).status_code == 400
