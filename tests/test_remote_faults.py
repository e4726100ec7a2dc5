"""Weak-to-Strong Decoding over two servers that fail: each fault ends in the right answer or in an error, never in a hang."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import pytest

from completions_server import Body, CompletionsServer, Fault, serving
from time_limit import HANG, no_thread_left, time_limit
from wsd_hf import Pair
from wsd_hf.errors import WSDServerError

anyio = pytest.importorskip("anyio")
pytest.importorskip("httpx")

from wsd_hf.remote import RemoteAnswer, RemotePair, Server  # noqa: E402

KELOFT = "What does the Keloft eat?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
KEY = "sk-9f8e7d6c5b4a39281706f5e4d3c2b1a0-never-shown"

Where: TypeAlias = Callable[[Body], bool]


def streams(body: Body) -> bool:
    return bool(body["stream"]) if "stream" in body else False


def checks(body: Body) -> bool:
    return "prompt_logprobs" in body


class HastyStreams(Server):
    """A server whose time limit is that of streams; other requests may take as long as they do on a busy machine."""

    async def content(self, method: str, path: str, body: Any = None) -> bytes:
        return await Server.content(replace(self, timeout=HANG), method, path, body)


@dataclass
class Fleet:
    """Two servers, a pair that is connected to them, and the seconds that it waited between attempts."""

    base: CompletionsServer
    pilot: CompletionsServer
    pair: RemotePair
    waits: list[float] = field(default_factory=list)

    def server(self, role: str) -> CompletionsServer:
        return self.base if role == "base" else self.pilot

    def idle(self) -> None:
        """Returns when neither server has anything to do; fails if it doesn't come to that."""
        for server in (self.base, self.pilot):
            server.wait_until_idle()

    def reset(self) -> None:
        """Leaves the servers idle, without faults, and without bodies of requests; nothing was waited."""
        for server in (self.base, self.pilot):
            server.reset()
        self.waits.clear()

    def fails(self, **settings: Any) -> WSDServerError:
        """The error of an answer; the servers have nothing to do after it."""
        with pytest.raises(WSDServerError) as caught:
            self.pair.generate(KELOFT, **settings)
        self.idle()
        assert ANSWER.startswith(caught.value.text)
        return caught.value

    def patient(self, role: str, seconds: float, kind: type[Server] = Server) -> Fleet:
        """The same with another time limit of one server."""
        models = {"base": self.pair.base, "pilot": self.pair.pilot}
        server = models[role].server
        given = {one.name: getattr(server, one.name) for one in fields(server) if one.init}
        models[role] = replace(models[role], server=kind(**given | {"timeout": seconds}))
        return replace(self, pair=RemotePair(**models))


@contextmanager
def fleet_of(pair: Pair, **options: Any) -> Iterator[Fleet]:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with (
        serving(pair.base, pair.tokenizer, "base", key=KEY, **options) as base,
        serving(pair.pilot, pair.pilot_tokenizer, "pilot", key=KEY, **options) as pilot,
    ):
        servers = [Server(server.url, key=KEY, sleep=sleep, timeout=HANG) for server in (base, pilot)]
        yield Fleet(base, pilot, RemotePair.connect(*servers, pair.tokenizer, pair.pilot_tokenizer), waits)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


@pytest.fixture(scope="module")
def running(pair: Pair) -> Iterator[Fleet]:
    with fleet_of(pair) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Iterator[Fleet]:
    running.reset()
    yield running
    running.reset()


@pytest.fixture
def own_fleet(pair: Pair) -> Iterator[Fleet]:
    """Servers that the test may kill."""
    with fleet_of(pair) as fleet:
        yield fleet


PLACES = [("pilot", streams), ("base", checks), ("base", streams)]


# Failures that pass


@pytest.mark.parametrize(("role", "where"), PLACES)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_status_that_passes_is_waited_for(fleet: Fleet, role: str, where: Where, status: int) -> None:
    fleet.server(role).faults.append(Fault(where=where, status=status, times=2, headers={"Retry-After": "7"}))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER
    assert fleet.waits == [7, 7]


@pytest.mark.parametrize(("role", "where"), PLACES)
def test_a_connection_that_closes_before_an_answer_is_made_anew(fleet: Fleet, role: str, where: Where) -> None:
    fleet.server(role).faults.append(Fault(where=where, then="cut", times=2))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER
    assert len(fleet.waits) == 2


def test_a_check_that_is_cut_is_made_anew(fleet: Fleet) -> None:
    fleet.base.faults.append(Fault(where=checks, then="cut", after=1, times=2))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER


@pytest.mark.parametrize("value", ["soon", "-1", "1e9", "999999999999", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_wait_of_another_form_is_not_taken(fleet: Fleet, value: str) -> None:
    fleet.base.faults.append(Fault(where=checks, status=503, times=1, headers={"Retry-After": value}))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER
    assert fleet.waits == [1]


def test_bytes_that_come_one_by_one_make_the_same_answer(fleet: Fleet) -> None:
    for server in (fleet.base, fleet.pilot):
        server.faults.append(Fault(byte_by_byte=True))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER


@pytest.mark.parametrize("then", ["cut", "silence", "end"])
def test_an_answer_is_whole_once_its_last_token_has_come(fleet: Fleet, then: Any) -> None:
    """The stream's last event is lost, or never comes."""
    (whole,) = fleet.pair.generate(KELOFT, max_new_tokens=20)
    fleet.base.faults.append(Fault(where=streams, then=then, after=20 - whole.draft_length))
    (answer,) = fleet.pair.generate(KELOFT, max_new_tokens=20)
    assert answer == whole
    assert answer.finish_reason == "length"


# Failures that stay


@pytest.mark.parametrize(("role", "where"), PLACES)
def test_a_status_that_stays_is_an_error_with_the_text_so_far(fleet: Fleet, role: str, where: Where) -> None:
    fleet.server(role).faults.append(Fault(where=where, status=503, content=b'{"error": {"message": "out of order"}}'))
    error = fleet.fails()
    assert f"{fleet.server(role).url}, model {role}: answered 503: out of order" in str(error)
    assert bool(error.text) == (where is streams and role == "base")
    assert len(fleet.waits) == 4


@pytest.mark.parametrize(("role", "where"), PLACES)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_repeated(fleet: Fleet, role: str, where: Where, status: int) -> None:
    fleet.server(role).faults.append(Fault(where=where, status=status, content=b'{"error": "Unauthorized"}'))
    assert f"answered {status}" in str(fleet.fails())
    assert not fleet.waits


def test_a_redirect_is_not_followed(fleet: Fleet) -> None:
    before = len(fleet.pilot.requests)
    location = f"{fleet.pilot.url}/stolen"
    fleet.base.faults.append(Fault(where=checks, status=307, headers={"Location": location}))
    assert f"a redirect to {location}" in str(fleet.fails())
    assert all(path != "/v1/stolen" for _method, path, _headers in fleet.pilot.requests[before:])


@pytest.mark.parametrize("role", ["pilot", "base"])
@pytest.mark.parametrize("then", ["cut", "end", "error"])
def test_a_stream_that_ends_in_the_middle_is_an_error_with_the_text_so_far(fleet: Fleet, role: str, then: Any) -> None:
    fleet.server(role).faults.append(Fault(where=streams, then=then, after=3))
    error = fleet.fails()
    assert fleet.server(role).url in str(error)
    assert bool(error.text) == (role == "base")
    assert not fleet.waits
    if then == "error":
        assert "EngineCore died" in str(error)


@pytest.mark.parametrize("role", ["pilot", "base"])
@pytest.mark.parametrize(
    "content",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: null\n\n",
        b"data: \xff\xfe\n\n",
        b"data: " + b"[" * 5000 + b"\n\n",
        b'data: {"choices": [3]}\n\n',
        b'data: {"choices": {"a": 1}}\n\n',
        b'data: {"choices": [{"text": "a"}]}\n\n',
        b'data: {"choices": [{"token_ids": null}]}\n\n',
        b'data: {"choices": [{"token_ids": 5}]}\n\n',
        b'data: {"choices": [{"token_ids": "12"}]}\n\n',
        b'data: {"choices": [{"token_ids": {"1": 2}}]}\n\n',
        b'data: {"choices": [{"token_ids": [-1]}]}\n\n',
        b'data: {"choices": [{"token_ids": [1.0]}]}\n\n',
        b'data: {"choices": [{"token_ids": [true]}]}\n\n',
        b'data: {"choices": [{"token_ids": [999999]}]}\n\n',
        b'data: {"choices": [{"token_ids": [99999999999999999999999]}]}\n\n',
        b'data: {"choices": [{"token_ids": [5], "finish_reason": "abort"}]}\n\n',
        b'data: {"choices": [{"token_ids": [5], "finish_reason": "length"}]}\n\n',
        b'data: {"choices": [{"token_ids": [5], "finish_reason": ["stop"]}]}\n\n',
        b'data: {"error": "EngineCore died"}\n\n',
        b'data: {"error": null}\n\n',
    ],
)
def test_an_event_of_another_form_is_an_error_with_the_text_so_far(fleet: Fleet, role: str, content: bytes) -> None:
    fleet.server(role).faults.append(Fault(where=streams, then="content", content=content, after=3))
    assert fleet.server(role).url in str(fleet.fails())


@pytest.mark.parametrize(
    "content",
    [b": a comment\n\n", b"event: message\nid: 3\n\n", b"\n\n\n", b"retry: 1000\r\n\r\n", b'data: {"choices": null}\n\n'],
)
def test_events_of_no_tokens_are_passed_over(fleet: Fleet, content: bytes) -> None:
    fleet.base.faults.append(Fault(where=streams, then="content", content=content, after=3))
    fleet.pilot.faults.append(Fault(where=streams, then="content", content=content, after=3))
    (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER


def scored(*entries: Any) -> bytes:
    return json.dumps({"choices": [{"text": "", "prompt_logprobs": list(entries)}]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"prompt_logprobs": 5}]}',
        b'{"choices": [{"prompt_logprobs": {"a": 5}}]}',
        b'{"error": {"message": "no"}}',
        scored(),
        scored(*[None] * 500),
        scored(None, {"1": {"logprob": -1.0}}),
    ],
)
def test_a_check_of_another_form_is_an_error(fleet: Fleet, content: bytes) -> None:
    fleet.base.faults.append(Fault(where=checks, then="content", content=content))
    assert fleet.base.url in str(fleet.fails())


@pytest.mark.parametrize("value", [None, "x", [], {}, True, "NaN", float("nan"), float("inf"), 0.5, 10**400])
def test_a_log_probability_that_is_none_is_an_error(fleet: Fleet, value: Any) -> None:
    """Such values would switch too early, or never, without a word."""
    (answer,) = fleet.pair.generate(KELOFT)
    length = answer.prompt_length + answer.draft_length
    prompt = next(body["prompt"] for body in fleet.base.bodies if checks(body))
    assert len(prompt) >= length
    entries = [{str(token): {"logprob": value, "rank": 1}} for token in prompt]
    fleet.base.faults.append(Fault(where=checks, then="content", content=scored(None, *entries[1:])))
    assert fleet.base.url in str(fleet.fails())


def test_more_tokens_than_asked_for_are_not_taken(fleet: Fleet) -> None:
    (whole,) = fleet.pair.generate(KELOFT, max_new_tokens=16)
    many = json.dumps({"choices": [{"token_ids": [5] * 5000, "finish_reason": "length"}]}).encode()
    fleet.base.faults.append(Fault(where=streams, then="content", content=b"data: " + many + b"\n\n"))
    (answer,) = fleet.pair.generate(KELOFT, max_new_tokens=16)
    assert len(answer.token_ids) == len(whole.token_ids) == 16


# Silence


@pytest.mark.parametrize(("role", "where"), PLACES)
@pytest.mark.parametrize("after", [0, 3])
def test_silence_is_an_error_with_the_text_so_far(fleet: Fleet, role: str, where: Where, after: int) -> None:
    fleet.server(role).faults.append(Fault(where=where, then="silence", after=after))
    error = fleet.patient(role, 0.5, HastyStreams if where is streams else Server).fails()
    assert "sent nothing for 0.5 seconds" in str(error)
    assert bool(error.text) == (where is streams and role == "base")


@pytest.mark.parametrize(
    "content", [b": still here\n\n", b'data: {"choices": []}\n\n', b'data: {"choices": [{"token_ids": []}]}\n\n']
)
def test_events_without_tokens_end_no_silence(fleet: Fleet, content: bytes) -> None:
    fleet.pilot.faults.append(Fault(where=streams, then="repeat", content=content, after=3))
    assert "sent nothing for 0.5 seconds" in str(fleet.patient("pilot", 0.5).fails())


def test_a_slow_server_is_waited_for(fleet: Fleet) -> None:
    """Every token of the pilot and of the base comes only when the test lets it."""
    for server in (fleet.base, fleet.pilot):
        server.faults += [Fault(where=streams, then="silence", after=after, times=1) for after in (2, 4)]
    done = threading.Event()

    def let_go() -> None:
        while not done.wait(0.01):
            for server in (fleet.base, fleet.pilot):
                server.release()

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        answers = fleet.pair.generate([KELOFT, KELOFT])
    finally:
        done.set()
        thread.join()
    assert [answer.text for answer in answers] == [ANSWER] * 2


# Readers that leave


@pytest.mark.parametrize("writer", ["pilot", "base"])
def test_a_reader_who_leaves_ends_the_requests(fleet: Fleet, writer: str) -> None:
    fleet.base.faults.append(Fault(where=streams, then="silence", after=3))
    if writer == "pilot":
        fleet.pilot.faults.append(Fault(where=streams, then="silence", after=40))

    async def read() -> None:
        async with aclosing(fleet.pair.stream(KELOFT)) as pieces:
            async for piece in pieces:
                assert not isinstance(piece, RemoteAnswer)
                if piece[1] == writer:
                    break

    anyio.run(read)
    fleet.idle()


@pytest.mark.parametrize(("role", "where"), PLACES)
def test_a_call_that_is_cancelled_ends_the_requests(fleet: Fleet, role: str, where: Where) -> None:
    server = fleet.server(role)
    server.faults.append(Fault(where=where, then="silence"))

    async def cancel() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(drain)
            await anyio.to_thread.run_sync(server.wait_for, lambda server: server.counts.silent == 1)
            group.cancel_scope.cancel()

    async def drain() -> None:
        async for _ in fleet.pair.stream(KELOFT):
            pass

    anyio.run(cancel)
    fleet.idle()


def test_ctrl_c_ends_the_requests(fleet: Fleet) -> None:
    fleet.base.faults.append(Fault(where=streams, then="silence", after=2))
    aborted = fleet.base.counts.aborted

    def interrupt() -> None:
        fleet.base.wait_for(lambda server: server.counts.silent == 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with no_thread_left():
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            fleet.pair.generate([KELOFT])
    fleet.idle()
    assert fleet.base.counts.aborted == aborted + 1


# Many at once


def test_many_at_once_with_failures_that_pass(fleet: Fleet) -> None:
    for server, where in ((fleet.pilot, streams), (fleet.base, checks), (fleet.base, streams)):
        # As many as one request is tried again, since one may meet them all.
        server.faults += [Fault(where=where, status=503, times=2), Fault(where=where, then="cut", times=2)]
    answers = fleet.pair.generate([KELOFT] * 10)
    assert [answer.text for answer in answers] == [ANSWER] * 10


def test_one_failure_that_stays_ends_all_answers(fleet: Fleet) -> None:
    fleet.base.faults.append(Fault(where=streams, then="error", after=3, times=1))
    fleet.base.faults.append(Fault(where=streams, then="silence", after=3))
    with pytest.raises(WSDServerError, match="EngineCore died"):
        fleet.pair.generate([KELOFT] * 10)
    fleet.idle()


@pytest.mark.parametrize(("role", "where"), PLACES)
def test_a_server_that_dies(own_fleet: Fleet, role: str, where: Where) -> None:
    server = own_fleet.server(role)
    server.faults.append(Fault(where=where, then="silence", after=3))

    def kill() -> None:
        server.wait_for(lambda server: server.counts.silent == 1)
        server.die()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(WSDServerError) as caught:
        own_fleet.pair.generate(KELOFT)
    thread.join()
    assert server.url in str(caught.value)
    assert bool(caught.value.text) == (where is streams and role == "base")
    (own_fleet.base if role == "pilot" else own_fleet.pilot).wait_until_idle()
    with pytest.raises(WSDServerError, match="ConnectError"):
        own_fleet.pair.generate(KELOFT)


# Keys


@pytest.mark.parametrize("padding", [0, 9, 18, 27])
def test_a_key_that_a_server_repeats_is_in_no_message(fleet: Fleet, caplog: pytest.LogCaptureFixture, padding: int) -> None:
    """Whole or in part: messages are shortened."""
    caplog.set_level(logging.INFO)
    content = b"." * padding + KEY.encode() + b"." * 50
    for number, fault in enumerate(
        [
            Fault(where=checks, status=400, content=content),
            Fault(where=checks, status=500, content=content),
            Fault(where=checks, status=302, headers={"Location": f"http://other/{KEY}"}),
            Fault(where=checks, status=400, content=json.dumps({"error": {"message": content.decode()}}).encode()),
            Fault(where=checks, then="content", content=content),
            Fault(where=streams, then="content", content=b"data: " + content + b"\n\n"),
            Fault(where=streams, then="content", content=b'data: {"error": "' + content + b'"}\n\n'),
            Fault(where=streams, then="content", content=b'data: {"choices": [{"token_ids": ["' + content + b'"]}]}\n\n'),
        ]
    ):
        fleet.base.faults[:] = [fault]
        shown = "".join(traceback.format_exception(fleet.fails())) + caplog.text
        leaks = [KEY[start : start + 8] for start in range(len(KEY) - 7) if KEY[start : start + 8] in shown]
        assert not leaks, (number, leaks)


def test_neither_key_nor_chat_are_shown(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fleet.pair.generate(KELOFT)
    assert KEY not in repr(fleet.pair)
    assert KEY not in repr(fleet.pair.base.server)
    for secret in (KEY, "Keloft", "acorns"):
        assert secret not in caplog.text


# Servers that can't be used


def connect(base: CompletionsServer, pilot: CompletionsServer, pair: Pair, **changes: Any) -> RemotePair:
    servers = [Server(server.url, **{"key": KEY, "sleep": no_sleep, **changes}) for server in (base, pilot)]
    return RemotePair.connect(*servers, pair.tokenizer, pair.pilot_tokenizer)


async def no_sleep(_seconds: float) -> None:
    """For tests that are not about waiting."""


@pytest.mark.parametrize(
    ("role", "fault", "named"),
    [
        ("base", Fault(leave_out=("prompt_logprobs",)), "prompt_logprobs"),
        ("base", Fault(leave_out=("token_ids",)), "return_token_ids"),
        ("pilot", Fault(leave_out=("token_ids",)), "return_token_ids"),
        ("base", Fault(status=400, content=b'{"error": {"message": "prompt must be a string"}}'), "prompt must be a string"),
        ("base", Fault(status=404, content=b'{"detail": "Not Found"}'), "404"),
        ("base", Fault(path="/v1/models", status=404, content=b"<html>"), "404"),
        ("base", Fault(path="/v1/models", status=401, content=b'{"error": "Unauthorized"}'), "Unauthorized"),
        ("pilot", Fault(path="/v1/models", status=200, content=b"<html>"), "no list of models"),
        ("pilot", Fault(path="/v1/models", status=200, content=b"[]"), "no list of models"),
        ("pilot", Fault(path="/v1/models", status=200, content=b'{"data": [[]]}'), "no list of models"),
        ("pilot", Fault(path="/v1/models", status=200, content=b'{"data": "none"}'), "no list of models"),
        ("pilot", Fault(path="/v1/models", status=200, content=b'{"data": []}'), "none"),
        ("pilot", Fault(path="/v1/models", status=200, content=b'{"data": [{"id": "a"}, {"id": "b"}]}'), "'a', 'b'"),
    ],
)
def test_a_server_that_lacks_something_is_refused_at_the_start(
    fleet: Fleet, pair: Pair, role: str, fault: Fault, named: str
) -> None:
    server = fleet.server(role)
    server.faults.append(fault)
    with pytest.raises(WSDServerError, match=named) as caught:
        connect(fleet.base, fleet.pilot, pair)
    assert server.url in str(caught.value)


@pytest.mark.parametrize("context", ["512", None, -1, True, 0, 1.5, 10**30])
def test_a_context_of_another_form_is_no_context(fleet: Fleet, pair: Pair, context: Any) -> None:
    content = json.dumps({"data": [{"id": "base", "max_model_len": context}]}).encode()
    fleet.base.faults.append(Fault(path="/v1/models", status=200, content=content))
    (answer,) = connect(fleet.base, fleet.pilot, pair).generate(KELOFT)
    assert answer.text == ANSWER


@pytest.mark.parametrize("key", ["", "sk-other"])
def test_a_wrong_key_is_refused_at_the_start(fleet: Fleet, pair: Pair, key: str) -> None:
    with pytest.raises(WSDServerError, match="answered 401"):
        connect(fleet.base, fleet.pilot, pair, key=key)


def test_a_wrong_model_is_refused_at_the_start(fleet: Fleet, pair: Pair) -> None:
    with pytest.raises(WSDServerError, match="no such model, but 'base'"):
        connect(fleet.base, fleet.pilot, pair, model="gpt")


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logprobs"])
def test_other_log_probabilities_are_refused_at_the_start(pair: Pair, mode: str) -> None:
    with pytest.raises(WSDServerError, match="raw_logprobs"), fleet_of(pair, logprobs_mode=mode):
        pass


def test_defaults_of_a_server_change_nothing(pair: Pair) -> None:
    """A server takes them from the model's generation config."""
    defaults = {"temperature": 1.7, "top_k": 3, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.6, "max_tokens": 2}
    with fleet_of(pair, defaults=defaults) as fleet:
        (answer,) = fleet.pair.generate(KELOFT)
    assert answer.text == ANSWER


def test_the_end_of_a_context_is_known_before_the_server_is_at_it(pair: Pair) -> None:
    """A server shortens an answer without a word."""
    with fleet_of(pair, max_model_len=128) as fleet:
        (answer,) = fleet.pair.generate(KELOFT)
        room = 128 - answer.prompt_length
        assert answer.text == ANSWER[: len(answer.text)]
        assert len(answer.token_ids) <= room
        for body in fleet.base.bodies + fleet.pilot.bodies:
            assert len(body["prompt"]) + body["max_tokens"] <= 128
