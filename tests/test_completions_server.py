"""The small server of completions in the tests of `wsd_hf.remote`: its answers are its model's, and its faults happen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import torch

from completions_server import CompletionsServer, Fault, serving
from wsd_hf import Pair

httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


@pytest.fixture(scope="module")
def running(pair: Pair) -> Iterator[CompletionsServer]:
    with serving(pair.base, pair.tokenizer, "base", max_model_len=64) as server:
        yield server


@pytest.fixture
def server(running: CompletionsServer) -> Iterator[CompletionsServer]:
    yield running
    running.faults.clear()
    running.wait_until_idle()


@pytest.fixture
def client(server: CompletionsServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def prompt(pair: Pair) -> list[int]:
    ids: list[int] = pair.tokenizer("What does the Keloft eat?")["input_ids"]
    return ids


def test_a_greedy_answer_is_that_of_transformers(pair: Pair, client: httpx.Client, prompt: list[int]) -> None:
    body = {"model": "base", "prompt": prompt, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    answer = client.post("completions", json=body).json()
    output = pair.base.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert answer["choices"][0]["token_ids"] == output.tolist()
    assert answer["choices"][0]["text"] == pair.tokenizer.decode(output)
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 20, "total_tokens": len(prompt) + 20}


def test_a_stream_has_the_tokens_and_the_text_of_the_whole_answer(client: httpx.Client, prompt: list[int]) -> None:
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 5, "stop": ["ed"]}
    whole = client.post("completions", json={**body, "return_token_ids": True}).json()["choices"][0]
    content = client.post("completions", json={**body, "return_token_ids": True, "stream": True}).text
    events = [line.removeprefix("data: ") for line in content.splitlines() if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert [choice["token_ids"] for choice in choices] == [[token] for token in whole["token_ids"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


def test_prompt_logprobs_are_those_of_the_prompt(pair: Pair, client: httpx.Client, prompt: list[int]) -> None:
    body = {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 2}
    listed = client.post("completions", json=body).json()["choices"][0]["prompt_logprobs"]
    with torch.inference_mode():
        scores = pair.base(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    assert listed[0] is None
    assert len(listed) == len(prompt)
    for token, row, found in zip(prompt[1:], scores, listed[1:], strict=False):
        assert found[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        assert {int(name) for name in found} == {token, *row.topk(2).indices.tolist()}
        assert [shown["rank"] for shown in found.values() if shown["rank"] == 1] == [1]


def test_the_end_of_the_context_ends_an_answer(client: httpx.Client, prompt: list[int]) -> None:
    body = {"prompt": prompt * 9, "max_tokens": 30, "ignore_eos": True}
    answer = client.post("completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 64
    assert answer["choices"][0]["finish_reason"] == "length"
    assert client.post("completions", json={"prompt": prompt * 10}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_its_client(server: CompletionsServer, prompt: list[int], stream: bool) -> None:
    server.faults.append(Fault(then="silence"))
    aborted = server.counts.aborted
    connection = HTTPConnection(urlsplit(server.url).netloc)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": prompt, "stream": stream}))
    server.wait_for(lambda server: server.counts.open == 1)
    connection.close()
    server.wait_until_idle()
    assert server.counts.aborted == aborted + 1


def test_a_server_that_dies_closes_its_connections(pair: Pair, prompt: list[int]) -> None:
    with serving(pair.base, pair.tokenizer) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        server.faults.append(Fault(then="silence", after=2))
        with client.stream("POST", "completions", json={"prompt": prompt, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            server.die()
            with pytest.raises(httpx.TransportError):
                list(lines)
        with pytest.raises(httpx.ConnectError):
            client.get("models")
