"""`wsd_hf.serving` over two servers: answers of a local pair, servers that fail and die, clients that leave."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("starlette", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("openai", reason="no client: pip install openai")

import openai

from completions_server import CompletionsServer, Fault, serving
from serving_for_tests import asked, client, post, running, text, user, wait_until_over
from time_limit import HANG
from wsd_hf import Pair
from wsd_hf.remote import RemotePair, Server
from wsd_hf.serving.remote import RemoteAnswerer
from wsd_hf.tiny import FOLDER, demo_questions

KELOFT = user("What does the Keloft eat?")
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
CHATS = [question["messages"] for question in demo_questions()]


async def at_once(_seconds: float) -> None:
    """Waits before no further attempt."""


@dataclass
class Served:
    """An application over two servers."""

    url: str
    base: CompletionsServer
    pilot: CompletionsServer

    def wait_until_idle(self) -> None:
        """Returns as soon as the servers compute nothing, and have no open connection."""
        self.base.wait_until_idle()
        self.pilot.wait_until_idle()


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


@pytest.fixture
def served(pair: Pair) -> Iterator[Served]:
    with ExitStack() as stack:
        base = stack.enter_context(serving(pair.base, pair.tokenizer, "base"))
        pilot = stack.enter_context(serving(pair.pilot, pair.pilot_tokenizer, "pilot"))
        servers = [Server(server.url, timeout=HANG, sleep=at_once) for server in (base, pilot)]
        remote = RemotePair.connect(*servers, tokenizer=FOLDER / "base", pilot_tokenizer=FOLDER / "pilot")
        yield Served(stack.enter_context(running(RemoteAnswerer(remote))), base, pilot)


def test_answers_are_those_of_a_local_pair(pair: Pair, served: Served) -> None:
    for chat in CHATS[:2]:
        output = pair.generate(chat, max_new_tokens=64)
        choice = post(served.url, messages=chat).json()["choices"][0]
        chunks = list(client(served.url).chat.completions.create(model="tiny", messages=chat, stream=True))
        assert choice["message"]["content"] == text(chunks) == pair.answers(output)[0]
        work = {"switch_index": int(output.switch_index[0]), "switch_reason": output.switch_reason[0]}
        work["pilot_tokens"] = int(output.draft_length[0])
        for found in (choice["wsd"], chunks[-1].choices[0].wsd):
            assert {name: found[name] for name in work} == work
    assert post(served.url, messages=KELOFT, stop=[" Keloft"]).json()["choices"][0]["message"]["content"].endswith("the")


def test_requests_at_once_get_their_own_answers(pair: Pair, served: Served) -> None:
    chats = [CHATS[index % len(CHATS)] for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        posts = list(pool.map(lambda chat: post(served.url, messages=chat), chats))
    answers = [one.json()["choices"][0]["message"]["content"] for one in posts]
    assert answers == [pair.answers(pair.generate(chat, max_new_tokens=64))[0] for chat in chats]
    served.wait_until_idle()


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_gone_is_a_502(served: Served, role: str, stream: bool) -> None:
    getattr(served, role).die()
    error = post(served.url, messages=KELOFT, stream=stream)
    assert (error.status_code, error.json()["error"]["type"]) == (502, "server_error")
    wait_until_over(served.url, failed=1)


def kill_after(stream: Iterable[Any], seen: list[Any], ending: str, server: CompletionsServer) -> None:
    """Keeps the chunks of a stream; the server dies as soon as their text has an ending."""
    for chunk in stream:
        seen.append(chunk)
        if text(seen).endswith(ending):
            server.die()


def test_a_base_that_dies_in_the_middle_leaves_the_text_so_far(served: Served) -> None:
    served.base.faults.append(Fault(where=lambda body: bool(body.get("stream")), then="silence", after=3))
    seen: list[Any] = []
    stream = client(served.url).chat.completions.create(model="tiny", messages=KELOFT, stream=True)
    with pytest.raises(openai.APIError):
        kill_after(stream, seen, ", the Kel", served.base)
    assert ANSWER.startswith(text(seen))
    assert text(seen).startswith("That is a very good question. As far as I know, the")
    served.pilot.wait_until_idle()
    wait_until_over(served.url, failed=1)


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_a_client_that_leaves_ends_the_requests_of_both_servers(served: Served, role: str) -> None:
    server: CompletionsServer = getattr(served, role)
    server.faults.append(Fault(where=lambda body: bool(body.get("stream")), then="silence", after=2, times=1))
    connection = asked(served.url, messages=KELOFT, stream=True)
    server.wait_for(lambda server: server.counts.silent == 1)
    connection.close()
    wait_until_over(served.url, left=1)
    served.wait_until_idle()


def streams(body: dict[str, Any]) -> bool:
    return bool(body.get("stream"))


ECHO = json.dumps({"error": {"message": "no memory for 'What does the Keloft eat?' at 10.0.0.7"}}).encode()
FAULTS = {
    "answered 500": Fault(status=500, content=ECHO),
    "answered 400": Fault(status=400, content=ECHO),
    "answered 302": Fault(status=302, headers={"Location": "http://10.0.0.7/Keloft"}),
    "stopped in the middle": Fault(where=streams, then="error", after=2, content=ECHO),
    "sent no completion": Fault(where=streams, then="content", content=b"data: Keloft\n\n"),
    "RemoteProtocolError": Fault(where=streams, then="cut", after=2),
}


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("reason", FAULTS)
def test_the_kind_of_a_servers_failure_is_no_secret_and_all_else_is(
    served: Served, role: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Client and log get the kind: the address is the operator's affair, and the server's own words may repeat a chat."""
    caplog.set_level(logging.INFO, "wsd_hf")
    getattr(served, role).faults.append(FAULTS[reason])
    error = post(served.url, messages=KELOFT).json()["error"]
    assert (error["code"], error["message"]) == ("upstream_failed", f"the {role}'s server failed ({reason})")
    wait_until_over(served.url, failed=1)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("wsd_hf")]
    assert error["message"] in lines
    assert not [line for line in lines if "Keloft" in line or "127.0.0.1" in line or "10.0.0.7" in line]


def test_a_top_k_that_no_server_can_hold_is_its_own_largest(served: Served) -> None:
    for top_k in (10**30, 2**31):
        assert post(served.url, messages=KELOFT, temperature=1e-5, top_k=top_k).status_code == 200
    assert all(body["top_k"] < 2**31 for body in served.base.bodies)


def test_an_error_in_a_stream_is_its_last_event(served: Served) -> None:
    served.base.faults.append(Fault(where=lambda body: bool(body.get("stream")), then="cut", after=3))
    *_, last = post(served.url, messages=KELOFT, stream=True).text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_failed"
    whole = post(served.url, messages=KELOFT)
    assert whole.status_code == 502
    assert ANSWER.startswith(whole.json()["error"]["text"])
    served.wait_until_idle()
