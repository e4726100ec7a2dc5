"""`wsd-hf serve` in the hands of strangers: whatever they send, it answers, refuses with the right status, and stays up."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("prometheus_client", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("openai", reason="no client: pip install openai")

import httpx

from serving_for_tests import END, Scripted, get, numbers, post, running, user, wait_until, wait_until_over
from time_limit import HANG, time_limit
from wsd_hf.serving.app import Limits
from wsd_hf.serving.body import Defaults, Refused, read_order
from wsd_hf.serving.requests import Piece
from wsd_hf.tiny import FOLDER

PIECES = [Piece("Yes", "pilot"), Piece(" indeed", "base")]
KELOFT = "What does the Keloft eat?"
START = 180.0  # seconds that a process may take to start, on a busy machine
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    with time_limit(4 * HANG):
        yield


@pytest.fixture(scope="module")
def scripted() -> Scripted:
    return Scripted(*PIECES, END)


@pytest.fixture(scope="module")
def url(scripted: Scripted) -> Iterator[str]:
    with running(scripted, key="") as url:
        yield url


def connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=HANG)


def exchange(url: str, *parts: bytes) -> bytes:
    """The bytes that a server sends for others until it closes the connection."""
    received = b""
    with connected(url) as connection, suppress(ConnectionError):  # a server that refuses need not read the rest
        connection.sendall(b"".join(parts))
        while part := connection.recv(65536):
            received += part
    return received


def read_until(connection: socket.socket, ending: bytes) -> bytes:
    """The bytes that come up to some, or to the end."""
    received = b""
    with suppress(ConnectionError):
        while ending not in received and (part := connection.recv(65536)):
            received += part
    return received


def head(*lines: str, target: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *lines, "", ""]).encode("latin-1")


# Bodies

NUMBERS = "0 -1 1 -0.0 0.5 1e308 1e999 NaN -Infinity 1e-320 123456789012345678901234567890"
TEXTS = r'"" "x" "\u0000" [] [1] ["a"] [""] [[]] {} {"a":1} {"include_usage":1}'
VALUES = [*NUMBERS.split(), *TEXTS.split(), "null", "true", "false", "[" * 50 + "]" * 50]
FIELDS = """
    model messages stream stream_options max_tokens max_completion_tokens temperature top_p top_k seed stop n user logprobs
    top_logprobs logit_bias tools tool_choice functions function_call response_format frequency_penalty presence_penalty
    metadata store modalities audio reasoning_effort verbosity web_search_options wsd_threshold wsd_window_size switch_criteria
    wsd_ignore_repeats wsd_max_draft_tokens wsd_chunk wsd_engine assistant_do_sample __class__ messages.0 echo
"""


@pytest.mark.filterwarnings("ignore:window_size")
def test_no_value_of_any_field_is_a_failure_of_the_server() -> None:
    defaults = Defaults("tiny", max_tokens=64)
    for name, value in itertools.product(FIELDS.split(), VALUES):
        rest = "" if name == "messages" else f', "messages": {json.dumps(user("Hello."))}'
        body = f"{{{json.dumps(name)}: {value}{rest}}}"
        try:
            chat = read_order(body.encode(), defaults).chat
        except Refused as refused:
            found = (refused.status, refused.param)
        else:
            found = None
            assert type(chat.max_tokens) is int
            assert 1 <= chat.max_tokens <= 64
            assert chat.temperature == 0 or 1e-6 <= chat.temperature <= 2, body
            assert chat.seed is None or type(chat.seed) is int
            assert all(isinstance(stop, str) for stop in chat.stop)
        assert found in (None, (400, name), (404, "model")), body


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": ["x" * 10_000]},
        {"max_tokens": "x" * 10_000},
        {"switch_criteria": "x" * 10_000},
        {"x" * 10_000: 1},
        {"messages": [{"role": "user", "content": "Hello.", "x" * 10_000: 1}]},
    ],
)
def test_a_refusal_does_not_repeat_long_texts(url: str, fields: dict[str, Any]) -> None:
    response = post(url, **fields)
    assert response.status_code == 400
    assert len(response.content) < 2000


def test_thousands_of_messages(url: str) -> None:
    chat = [{"role": role, "content": ""} for role in ("user", "assistant")] * 5_000 + user("Hello.")
    assert post(url, messages=chat).status_code == 200
    assert post(url, messages=[{}] * 10_000).status_code == 400


@pytest.mark.parametrize("depth", [65, 1000, 400_000])
def test_a_body_that_is_nested_deep_is_refused(url: str, depth: int) -> None:
    for value in (b"[" * depth + b"]" * depth, b'{"a":' * (depth // 3) + b"1" + b"}" * (depth // 3)):
        response = sent(url, b'{"metadata": %b, "messages": []}' % value)
        assert response.status_code == 400
        assert len(response.content) < 500


@pytest.mark.parametrize("digits", [4_000, 100_000])
def test_a_number_of_many_digits_is_refused(url: str, digits: int) -> None:
    for name in ("max_tokens", "seed", "n", "temperature", "top_k"):
        response = sent(url, b'{"%b": -%b, "messages": [{"role": "user", "content": "?"}]}' % (name.encode(), b"9" * digits))
        assert response.status_code == 400
        assert len(response.content) < 1000


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_compressed_body_is_not_unpacked(url: str, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = httpx.post(f"{url}/v1/chat/completions", content=b"\x1f\x8b" * 50, headers=headers, timeout=HANG)
    assert answer.status_code in (400, 415)


def sent(url: str, content: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=HANG)


# HTTP

LAST = head(target="/health", method="GET")
BODY = json.dumps({"messages": user("Hello.")}).encode()
JSON = "Content-Type: application/json"


def test_a_body_in_chunks_of_one_byte(url: str) -> None:
    chunks = b"".join(b"1\r\n" + BODY[place : place + 1] + b"\r\n" for place in range(len(BODY)))
    assert b"Yes indeed" in exchange(url, head(JSON, "Transfer-Encoding: chunked"), chunks, b"0\r\n\r\n")


def test_many_answers_on_one_connection_come_in_the_order_of_their_requests(url: str) -> None:
    """Sent at once: an answer, a stream, an error, and an answer."""
    stream = json.dumps({"messages": user("Hello."), "stream": True}).encode()
    requests = [head(JSON, f"Content-Length: {len(body)}") + body for body in (BODY, stream, b"{}", BODY)]
    received = exchange(url, *(request.replace(b"Connection: close\r\n", b"") for request in requests), LAST)
    found = received.split(b"HTTP/1.1 ")[1:]
    expected = [b"Yes indeed", b"[DONE]", b"messages is missing", b"Yes indeed", b'"ok"']
    assert [one[:3] for one in found] == [b"200", b"200", b"400", b"200", b"200"]
    assert all(text in one for one, text in zip(found, expected, strict=True))


def test_requests_of_http_1_0(url: str) -> None:
    """Their connection is closed after the answer, which has no chunks."""
    for stream in (False, True):
        body = json.dumps({"messages": user("Hello."), "stream": stream}).encode()
        request = f"POST /v1/chat/completions HTTP/1.0\r\n{JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        answer_head, _, answer = exchange(url, request.encode(), body).partition(b"\r\n\r\n")
        assert answer_head.startswith(b"HTTP/1.1 200 ")
        assert b"chunked" not in answer_head.lower()
        assert (b"[DONE]" if stream else b"Yes indeed") in answer
    assert exchange(url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    with running(Scripted(*PIECES, END), names=["localhost"]) as named:
        assert exchange(named, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_request_for_the_head_alone(url: str) -> None:
    for target in ("/health", "/metrics", "/v1/models"):
        answer_head, _, body = exchange(url, head(target=target, method="HEAD")).partition(b"\r\n\r\n")
        assert answer_head.startswith(b"HTTP/1.1 200 ")
        assert body == b""


def test_a_head_that_does_not_end_is_refused(url: str) -> None:
    """Else one connection could fill the memory."""
    assert not exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"y" * 2**24).startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", f"Content-Length: {len(BODY)}"],
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x10"],
        ["Content-Length: 99999999999999999999999999"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding : chunked"],
        ["Content-Length: 5\n", "X: y"],
        ["X\0: y"],
        [" folded: y"],
        [f"X: {'y' * 100_000}"],
        [f"X{number}: y" for number in range(10_000)],
    ],
)
def test_heads_that_mean_two_things_are_refused(url: str, lines: list[str]) -> None:
    """A proxy may read another request out of them: no bytes after them are taken for one."""
    second = head(target="/v1/models", method="GET")
    answer = exchange(url, head(JSON, *lines).replace(b"Connection: close\r\n", b""), BODY, second)
    assert b'"object": "list"' not in answer
    assert b"Yes indeed" not in answer
    assert post(url).status_code == 200


def test_a_length_beside_chunks_smuggles_nothing(url: str) -> None:
    smuggled = head(target="/v1/models", method="GET")
    lines = head(JSON, "Transfer-Encoding: chunked", "Content-Length: 5").replace(b"Connection: close\r\n", b"")
    answer = exchange(url, lines, b"0\r\n\r\n", smuggled)
    assert answer.count(b"HTTP/1.1 ") <= 1 or b"HTTP/1.1 400" in answer
    assert b"Yes indeed" not in answer


@pytest.mark.parametrize(
    "content", [b"\x16\x03\x01\x02\x00\x01", b"\0" * 100, b"GET /\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 99]
)
def test_bytes_that_are_no_http(url: str, content: bytes) -> None:
    assert not exchange(url, content).startswith(b"HTTP/1.1 2")
    assert post(url).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_refused(url: str, method: str) -> None:
    answer = exchange(url, head("Content-Length: 0", method=method))
    assert re.match(rb"HTTP/1.1 (405|400|404)", answer), answer[:200]
    assert b"access-control-allow" not in answer.lower()


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/health/../v1/models",
        "/health/",
        "/health;/v1/models",
        "/health%2f..%2fv1/models",
        "/V1/models",
        "/v1/models?a=/health",
        "http://x/v1/models",
        "/v1//chat/completions",
        "*",
        "/metrics/",
        "/openapi.json",
        "/docs",
        "/static/../../etc/passwd",
    ],
)
def test_no_other_path_passes_by_the_key(target: str) -> None:
    with running(Scripted(*PIECES, END), key="secret-key") as url:
        for line in (
            "X: y",
            "Authorization: Bearer",
            "Authorization: Bearer secret-ke",
            "Authorization: Basic c2VjcmV0LWtleQ==",
        ):
            answer = exchange(url, head(line, target=target, method="GET"))
            assert re.match(rb"HTTP/1.1 (401|404|400|307) ", answer), answer[:300]
            assert b'"list"' not in answer
        upgrade = head(
            "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13", target=target, method="GET"
        )
        answer = exchange(url, upgrade.replace(b"Connection: close", b"Connection: Upgrade"), LAST)
        assert not re.match(rb"HTTP/1.1 (101|200)", answer)


# Connections


def closed(connection: socket.socket) -> bool:
    """Waits until the server closes a connection; True if it has sent nothing."""
    with suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


@pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_on_which_no_request_comes_is_closed(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsd_hf.serving.connections.IDLE", 0.05)
    with running(Scripted(*PIECES, END)) as url, connected(url) as connection:
        connection.sendall(begun)
        assert closed(connection)


def test_a_second_request_that_comes_too_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsd_hf.serving.connections.IDLE", 0.1)
    with running(Scripted(*PIECES, END)) as url:
        wait_until(lambda: exchange(url, LAST.replace(b"Connection: close\r\n", b""), b"GET /hea").count(b"HTTP/1.1 ") == 1)


def test_an_answer_takes_as_long_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection isn't idle, however often the time for a request passes meanwhile."""
    monkeypatch.setattr("wsd_hf.serving.connections.IDLE", 0.1)
    go_on = threading.Event()
    with running(Scripted(PIECES[0], go_on, PIECES[1], END)) as url, ExitStack() as stack:
        connection = stack.enter_context(streaming(url))
        while b"Yes" not in read_until(connection, b"Yes"):  # this machine was too busy to send the request in time
            connection = stack.enter_context(streaming(url))
        for _ in range(3):
            with connected(url) as other:
                assert closed(other)
        go_on.set()
        assert b"indeed" in read_until(connection, b"[DONE]")


def test_connections_above_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsd_hf.serving.connections.SPARE", 3)
    with running(Scripted(*PIECES, END), limits=Limits(open_requests=2)) as url, ExitStack() as stack:
        connections = [stack.enter_context(connected(url)) for _ in range(4)]
        for _ in range(5):
            with connected(url) as further:
                assert closed(further)
        connections.pop().close()
        wait_until(lambda: exchange(url, LAST).startswith(b"HTTP/1.1 200 "))
        assert b"Yes indeed" in exchange(url, head(JSON, f"Content-Length: {len(BODY)}"), BODY)


# Clients that leave, and clients that don't read


def streaming(url: str) -> socket.socket:
    """A connection on which a stream was asked for."""
    body = json.dumps({"messages": user("Hello."), "stream": True}).encode()
    connection = connected(url)
    connection.sendall(head(JSON, f"Content-Length: {len(body)}") + body)
    return connection


def test_fifty_streams_half_of_which_are_left_in_the_middle() -> None:
    go_on = threading.Event()
    answerer = Scripted(PIECES[0], go_on, PIECES[1], END)
    with running(answerer) as url:
        connections = [streaming(url) for _ in range(50)]
        wait_until(lambda: numbers(url)["wsd_first_token_seconds_count"] == 50)
        for connection in connections[::2]:
            connection.close()
        wait_until(lambda: numbers(url)["wsd_open_requests"] == 25)
        assert answerer.closed == 25
        go_on.set()
        for connection in connections[1::2]:
            with connection:
                content = b"".join(iter(lambda: connection.recv(65536), b""))  # noqa: B023
            assert content.count(b"indeed") == 1
            assert b"[DONE]" in content
        wait_until_over(url, left=25, answered=25)
        assert answerer.closed == 50


def test_connections_that_close_before_the_body_is_there(url: str) -> None:
    for part in (b"POST", head(JSON), head(JSON, "Content-Length: 500"), head(JSON, "Content-Length: 500") + BODY):
        for _ in range(10):
            with connected(url) as connection:
                connection.sendall(part)
    wait_until_over(url)
    assert post(url).status_code == 200


class Endless(Scripted):
    """An answerer that never ends by itself."""

    written = 0

    async def answer(self, request: Any) -> Any:
        try:
            while True:
                self.written += 1
                yield Piece("y" * 10_000, "base")
                await asyncio.sleep(0)
        finally:
            self.closed += 1


def test_a_client_that_does_not_read_is_not_written_for() -> None:
    """Its answer waits; those of others don't; when it leaves, nothing of it is left."""
    answerer = Endless()
    with running(answerer) as url, streaming(url):
        with streaming(url) as reader:
            for _ in range(20):
                assert reader.recv(65536)
        seen = -1
        while seen != answerer.written:  # until the buffers of the connection are full
            seen = answerer.written
            assert seen < 100_000
            assert numbers(url)["wsd_open_requests"] >= 1
        wait_until(lambda: answerer.closed == 1)
    wait_until(lambda: answerer.closed == 2)


# The command


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WSD_HF_BASE_API_KEY": "", "WSD_HF_PILOT_API_KEY": ""}


class Command:
    """A process and the lines that it has written to standard error."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | variables,
        )
        self.lines: list[str] = []
        self._announced = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line)
                if "http://127" in line:
                    self._announced.set()
        self._announced.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def url(self) -> str:
        """The address that it announces."""
        assert self._announced.wait(START)
        found = re.search(r"http://127[\d.:]+", self.output)
        assert found, self.output
        return found[0]

    def ended(self) -> int:
        """Waits for its end; its exit status."""
        status = self.process.wait(HANG)
        self._reader.join(HANG)
        return status


@contextmanager
def command(*arguments: str, **variables: str) -> Iterator[Command]:
    started = Command(*arguments, **variables)
    try:
        yield started
    finally:
        started.process.kill()
        started.ended()


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with command("-m", "wsd_hf", "serve", "--port", "0", "--max-new-tokens", "200") as started:
        yield started.url()


def content(response: httpx.Response) -> str:
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_fifty_requests_at_once_of_which_some_leave(tiny: str) -> None:
    def ask(number: int) -> str:
        if number % 5 == 0:
            with streaming(tiny) as connection:
                return connection.recv(20).decode()
        response = post(tiny, messages=user(KELOFT), temperature=[0, 1][number % 2] and 1e-5)
        assert response.status_code == 200, response.text
        return content(response)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {answer for number, answer in enumerate(answers) if number % 5} == {ANSWER}
    wait_until_over(tiny)
    assert content(post(tiny, messages=user(KELOFT))) == ANSWER


def test_samples_without_a_seed_do_not_follow_from_the_request_before(tiny: str) -> None:
    samples = set()
    for _ in range(3):
        fixed = content(post(tiny, messages=user(KELOFT), temperature=2.0, seed=7))
        samples.add(content(post(tiny, messages=user(KELOFT), temperature=2.0)))
    assert len(samples) == 3
    assert fixed not in samples
    assert content(post(tiny, messages=user(KELOFT), temperature=2.0, seed=7)) == fixed


@pytest.mark.parametrize(
    "setting",
    [
        *({"temperature": temperature} for temperature in (1e-5, 1e-6, 2)),
        {"temperature": 1, "top_p": 1e-300},
        {"temperature": 1, "top_k": 10**30},
        {"temperature": 1, "seed": 2**63 - 1},
        {"wsd_threshold": 1e-300},
        {"wsd_window_size": 10**30},
    ],
)
def test_extreme_settings(tiny: str, setting: dict[str, Any]) -> None:
    assert post(tiny, messages=user(KELOFT), max_tokens=20, **setting).status_code == 200


@pytest.mark.parametrize(
    "stops", [["x" * 1000], ["".join(map(chr, range(0x4E00, 0x4E00 + 1000)))] * 4, ["\n" * 1000], ["\ufffd", "\0"]]
)
def test_stop_strings_up_to_the_longest(tiny: str, stops: list[str]) -> None:
    response = post(tiny, messages=user(KELOFT), stop=stops)
    assert content(response) == ANSWER
    longer = post(tiny, messages=user(KELOFT), stop=["x" * 1001, *stops[:3]])
    assert (longer.status_code, longer.json()["error"]["param"]) == (400, "stop")


def test_a_chat_beyond_the_context_is_refused(tiny: str) -> None:
    for chat in (user("a b " * 100_000), [*user("a"), {"role": "assistant", "content": "b"}] * 5000 + user("c")):
        response = post(tiny, messages=chat)
        assert response.status_code == 400
        assert "context" in response.json()["error"]["message"]


@pytest.mark.sweep
def test_no_text_of_a_request_is_in_the_output_of_the_command() -> None:
    secret = "Zanzibar"
    with command("-m", "wsd_hf", "serve", "--port", "0", WSD_HF_API_KEY="sk-Zanzibar") as started:
        url = started.url()
        key = {"Authorization": "Bearer sk-Zanzibar"}
        with httpx.Client(base_url=url, timeout=HANG, headers=key) as http:
            path = "/v1/chat/completions"
            assert http.post(path, json={"messages": user(secret), "max_tokens": 3}).status_code == 200
            assert http.post(f"{path}?{secret}=1", json={"messages": user(secret), secret: 1}).status_code == 400
            assert http.post(path, json={"messages": user(secret * 9999)}).status_code == 400
            assert http.post(path, json=secret).status_code == 400
            assert http.get(f"/{secret}").status_code == 404
            assert http.get(f"/v1/models/{secret}", headers={"X": secret}).status_code == 404
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 401
            exchange(url, secret.encode() + b"\r\n\r\n")
            exchange(url, head(JSON, f"Content-Length: {secret}"))
            assert "sk-" not in http.get("/metrics").text
        started.process.send_signal(signal.SIGTERM)
        started.ended()
        assert secret not in started.output
        assert "answered" in started.output


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_streams_end(number: int) -> None:
    with command("-m", "wsd_hf", "serve", "--port", "0") as started:
        url = started.url()
        body = {"messages": user(KELOFT), "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=HANG) as response:
            lines = response.iter_lines()
            next(lines)
            started.process.send_signal(number)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert started.ended() in (0, -number, 128 + number)
    assert "Traceback" not in started.output


@pytest.mark.sweep
def test_a_client_that_does_not_read_delays_no_end() -> None:
    with command("-m", "wsd_hf", "serve", "--port", "0", "--grace", "0") as started, streaming(started.url()):
        started.process.send_signal(signal.SIGTERM)
        assert started.ended() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


# Servers behind it

SERVER = str(Path(__file__).parent / "completions_server.py")


@contextmanager
def behind(*silent: str) -> Iterator[tuple[str, dict[str, Command]]]:
    """The address of the command over two servers in processes of their own, whose streams become silent if so said."""
    with ExitStack() as stack:
        servers, options = {}, list[str]()
        for name in ("base", "pilot"):
            arguments = [str(FOLDER / name), *(["3"] if name in silent else [])]
            servers[name] = stack.enter_context(command(SERVER, *arguments))
        for name, server in servers.items():
            options += [f"--{name}-url", f"{server.url()}/v1", f"--{name}", str(FOLDER / name)]
        yield stack.enter_context(command("-m", "wsd_hf", "serve", "--port", "0", *options)).url(), servers


@pytest.mark.sweep
@pytest.mark.parametrize("killed", ["base", "pilot"])
def test_a_server_that_is_killed_in_the_middle_of_a_stream(killed: str) -> None:
    """An error with the text so far, and no hang; the command goes on."""
    body = {"messages": user(KELOFT), "stream": True}
    with behind(killed) as (url, servers), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=HANG)
        wait_until(lambda: "silent" in servers[killed].output)
        servers[killed].process.kill()
        response = asked.result()
        error = json.loads(response.text.strip().rpartition("\n")[2].removeprefix("data: "))["error"]
        assert (response.status_code, error["code"]) == (200 if killed == "base" else 502, "upstream_failed")
        assert error["message"].startswith(f"the {killed}'s server failed (")
        assert ('"writer": "base"' in response.text) == (killed == "base")
        wait_until_over(url, failed=1)
        assert get(f"{url}/health").status_code == 200
