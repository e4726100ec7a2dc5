"""A local pair as an answerer: answers of direct calls, batches, readers that leave, failures in the middle."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason='no server: pip install "wsd_hf[serve]"')
pytest.importorskip("openai", reason="no client: pip install openai")

import anyio

from serving_for_tests import client, post, running, text, user, wait_until, wait_until_over
from time_limit import HANG
from wsd_hf import Pair, WSDConfig
from wsd_hf.serving import local
from wsd_hf.serving.local import LocalAnswerer
from wsd_hf.serving.requests import ChatRequest, End, Piece
from wsd_hf.tiny import demo_questions

KELOFT = user("What does the Keloft eat?")
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
CHATS = [question["messages"] for question in demo_questions()]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.tiny()


@pytest.fixture(scope="module")
def url(pair: Pair) -> Iterator[str]:
    with running(LocalAnswerer(pair)) as url:
        yield url


class Held:
    """Holds the thread that writes a batch after so many tokens of each row.

    Attributes:
        begun: set once it is held.
        go_on: lets it go on.
        sizes: rows of each batch so far.
        responses: response tokens of each call so far, without padding.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        self.responses: list[list[list[int]]] = []
        put, generate = local._BatchStreamer.put, Pair.generate
        tokens = 0

        def held(streamer: Any, value: Any, *written: Any) -> None:
            nonlocal tokens
            put(streamer, value, *written)
            tokens += bool(written)
            if tokens == after:
                self.begun.set()
                assert self.go_on.wait(HANG)

        def spied(pair: Pair, inputs: Any, **settings: Any) -> Any:
            self.sizes.append(len(inputs["input_ids"]))
            output = generate(pair, inputs, **settings)
            rows = output.sequences[:, output.prompt_length :].tolist()
            self.responses.append([[token for token in row if token != settings["pad_token_id"]] for row in rows])
            return output

        monkeypatch.setattr(local._BatchStreamer, "put", held)
        monkeypatch.setattr(Pair, "generate", spied)


def request(messages: Any, **settings: Any) -> ChatRequest:
    return ChatRequest(messages, **{"strategy": WSDConfig(), "max_tokens": 64, **settings})


async def whole(answerer: LocalAnswerer, request: ChatRequest) -> tuple[str, End]:
    *pieces, end = [item async for item in answerer.answer(request)]
    assert isinstance(end, End)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), end


async def settled(answerer: LocalAnswerer) -> None:
    """Returns as soon as nothing is left of any request."""
    with anyio.fail_after(HANG):
        while answerer._tasks or answerer._batcher._waiting:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("strategy", [None, WSDConfig(), WSDConfig(engine="step")], ids=["base alone", "fast", "step"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_likelihoods_come_where_they_are_asked_for_and_change_no_text(pair: Pair, strategy: Any, temperature: float) -> None:
    async def pieces(**settings: Any) -> tuple[list[Piece], End]:
        asked = request(KELOFT, strategy=strategy, temperature=temperature, seed=1, **settings)
        *found, end = [item async for item in LocalAnswerer(pair).answer(asked)]
        assert isinstance(end, End)
        return [piece for piece in found if isinstance(piece, Piece)], end

    (without, end), (having, same) = asyncio.run(pieces()), asyncio.run(pieces(likelihoods=True))
    assert end == same
    assert all(piece.text and not piece.likelihoods for piece in without)
    assert [(piece.text, piece.writer) for piece in having if piece.text] == [(one.text, one.writer) for one in without]
    assert sum(len(piece.likelihoods) for piece in having) == end.pilot_tokens + end.base_tokens
    assert sum(len(piece.drafted) for piece in having) == end.pilot_tokens


@pytest.mark.parametrize("pilot", ["pilot", "pilot_other_vocab"])
@pytest.mark.parametrize("engine", ["fast", "step"])
def test_pieces_and_ends_are_those_of_direct_calls(pair: Pair, pilot: str, engine: Any) -> None:
    pair = pair if pilot == "pilot" else Pair.tiny(pilot)
    config = WSDConfig(engine=engine)

    async def together() -> list[tuple[str, End]]:
        answerer = LocalAnswerer(pair)
        return await asyncio.gather(*(whole(answerer, request(chat, strategy=config)) for chat in CHATS[:6]))

    for chat, (answer, end) in zip(CHATS[:6], asyncio.run(together()), strict=True):
        output = pair.generate(chat, config, max_new_tokens=64)
        assert answer == pair.answers(output)[0]
        assert (end.switch_index, end.switch_reason) == (int(output.switch_index[0]), output.switch_reason[0])
        assert end.pilot_tokens == int(output.draft_length[0])
        assert end.pilot_tokens + end.base_tokens == output.sequences.shape[1] - output.prompt_length
        assert (end.prompt_tokens, end.finish_reason) == (output.prompt_length, "stop")


@pytest.mark.parametrize("max_tokens", [1, 12, 32])
def test_answers_that_are_cut(pair: Pair, max_tokens: int) -> None:
    for config in (WSDConfig(), WSDConfig(engine="step"), WSDConfig(max_draft_tokens=6), WSDConfig(threshold=1.0)):
        answer, end = asyncio.run(whole(LocalAnswerer(pair), request(KELOFT, strategy=config, max_tokens=max_tokens)))
        output = pair.generate(KELOFT, config, max_new_tokens=max_tokens)
        assert answer == pair.answers(output)[0]
        assert (end.switch_index, end.switch_reason) == (int(output.switch_index[0]), output.switch_reason[0])
        assert end.pilot_tokens + end.base_tokens == output.sequences.shape[1] - output.prompt_length
        assert end.finish_reason == (
            "length" if answer != pair.answers(pair.generate(KELOFT, config, max_new_tokens=64))[0] else "stop"
        )


def test_the_openai_client_gets_the_answer_whole_or_streamed(url: str) -> None:
    completions = client(url).chat.completions
    answer = completions.create(model="tiny", messages=KELOFT)
    chunks = list(completions.create(model="tiny", messages=KELOFT, stream=True))
    assert answer.choices[0].message.content == text(chunks) == ANSWER
    writers = [chunk.choices[0].wsd["writer"] for chunk in chunks[1:-1]]
    written = answer.choices[0].wsd["pilot_tokens"]
    assert writers == ["pilot"] * written + ["base"] * (len(writers) - written)
    assert answer.usage.completion_tokens == answer.choices[0].wsd["pilot_tokens"] + answer.choices[0].wsd["base_tokens"]


def test_fifty_requests_at_once_get_their_own_answers(pair: Pair, url: str) -> None:
    chats = [CHATS[index % len(CHATS)] for index in range(50)]
    expected = {str(chat): pair.answers(pair.generate(chat, max_new_tokens=64))[0] for chat in CHATS}
    answered = wait_until_over(url)['wsd_requests_total{outcome="answered"}']

    def ask(index: int) -> str:
        completions = client(url).chat.completions
        if index % 2:
            return text(list(completions.create(model="tiny", messages=chats[index], stream=True)))
        return completions.create(model="tiny", messages=chats[index]).choices[0].message.content

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert answers == [expected[str(chat)] for chat in chats]
    wait_until_over(url, answered=answered + 50)


def test_waiting_requests_with_equal_settings_share_a_batch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, after=1)

    async def together() -> None:
        answerer = LocalAnswerer(pair, batch_size=3)
        first = asyncio.create_task(whole(answerer, request(KELOFT)))
        await asyncio.to_thread(held.begun.wait, HANG)
        others = [request(KELOFT)] * 4 + [request(KELOFT, max_tokens=5)] * 2 + [request(KELOFT, temperature=1.0, seed=1)] * 2
        tasks = [asyncio.create_task(whole(answerer, one)) for one in others]
        await asyncio.sleep(0)
        held.go_on.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(together())
    assert sorted(held.sizes) == [1, 1, 1, 1, 2, 3]


def test_a_short_answer_does_not_wait_for_a_long_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [pair.generate(chat, max_new_tokens=64) for chat in (KELOFT, CHATS[2])]
    long_length, short_length = [output.sequences.shape[1] - output.prompt_length for output in outputs]
    assert short_length + 3 < long_length
    held = Held(monkeypatch, after=short_length + 1)

    async def together() -> None:
        answerer = LocalAnswerer(pair)
        long = asyncio.create_task(whole(answerer, request(KELOFT)))
        short = asyncio.create_task(whole(answerer, request(CHATS[2])))
        _, end = await short
        assert (end.finish_reason, end.switch_reason) == ("stop", "confident")
        assert not long.done()
        held.go_on.set()
        assert (await long)[0] == ANSWER

    asyncio.run(together())


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_reader_that_leaves_ends_its_row_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    held = Held(monkeypatch, after=3)
    config = WSDConfig(engine=engine, chunk=2)

    async def together() -> None:
        answerer = LocalAnswerer(pair)
        leaving = answerer.answer(request(CHATS[1], strategy=config))
        first = asyncio.create_task(anext(leaving))
        staying = asyncio.create_task(whole(answerer, request(KELOFT, strategy=config)))
        await first
        await asyncio.to_thread(held.begun.wait, HANG)
        await leaving.aclose()
        held.go_on.set()
        assert (await staying)[0] == ANSWER
        await settled(answerer)

    asyncio.run(together())
    ((left, stayed),) = held.responses
    assert len(left) < 8 < len(stayed)


def test_a_batch_ends_when_all_its_readers_have_left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, after=2)

    async def together() -> None:
        answerer = LocalAnswerer(pair)
        answers = [answerer.answer(request(KELOFT)) for _ in range(2)]
        await asyncio.gather(*map(anext, answers))
        for answer in answers:
            await answer.aclose()
        held.go_on.set()
        assert (await whole(answerer, request(KELOFT)))[0] == ANSWER
        await settled(answerer)

    asyncio.run(together())
    assert max(map(len, held.responses[0])) < 20 < len(held.responses[1][0])


def test_a_reader_that_leaves_before_its_turn_is_not_answered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, after=1)

    async def together() -> None:
        answerer = LocalAnswerer(pair)
        first = asyncio.create_task(whole(answerer, request(KELOFT)))
        await asyncio.to_thread(held.begun.wait, HANG)
        waiting = asyncio.create_task(whole(answerer, request(CHATS[1])))
        await asyncio.sleep(0)
        waiting.cancel()
        held.go_on.set()
        await first
        await settled(answerer)

    asyncio.run(together())
    assert held.sizes == [1]


def test_a_client_that_leaves_in_the_middle_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, after=2)
    answerer = LocalAnswerer(pair)
    with running(answerer) as url:
        stream = client(url).chat.completions.create(model="tiny", messages=KELOFT, stream=True)
        next(iter(stream))
        stream.close()
        wait_until_over(url, left=1)
        held.go_on.set()
        wait_until(lambda: not answerer._tasks)
        assert post(url, messages=KELOFT).json()["choices"][0]["message"]["content"] == ANSWER
        wait_until_over(url, left=1, answered=1)


def test_a_seed_repeats_what_is_sampled_whoever_else_asks(pair: Pair, url: str) -> None:
    sampling = {"temperature": 2.0, "top_p": 0.95, "top_k": 20}
    torch.manual_seed(3)
    expected = pair.answers(pair.generate(KELOFT, max_new_tokens=64, do_sample=True, **sampling))[0]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, url, messages=KELOFT, seed=seed, **sampling) for seed in (3, None, 3, 4)]
        answers = [one.result().json()["choices"][0]["message"]["content"] for one in asked]
    assert answers[0] == answers[2] == expected
    assert answers[3] != expected


def test_stop_strings_end_an_answer_and_are_no_part_of_it(url: str) -> None:
    for stream in (False, True):
        completions = client(url).chat.completions
        answer: Any = completions.create(model="tiny", messages=KELOFT, stop=["acorns", " Keloft"], stream=stream)
        chunks = list(answer) if stream else []
        shown = text(chunks) if stream else answer.choices[0].message.content
        assert shown == ANSWER.split(" Keloft")[0]
        assert (chunks[-1] if stream else answer).choices[0].finish_reason == "stop"


def test_settings_of_the_decoding_hold_for_one_request(pair: Pair, url: str) -> None:
    answer = post(url, messages=KELOFT, wsd_threshold=0.01, wsd_window_size=2).json()["choices"][0]
    assert answer["wsd"]["switch_index"] == 2
    assert post(url, messages=KELOFT).json()["choices"][0]["wsd"]["switch_index"] == 12


def test_a_request_that_cannot_be_answered_leaves_the_others_alone(url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        posts = list(pool.map(lambda chat: post(url, messages=chat), [KELOFT, user("What? " * 1000), KELOFT]))
    assert [one.status_code for one in posts] == [200, 400, 200]
    assert "the prompt of the base has" in posts[1].json()["error"]["message"]


def test_a_batch_that_fails_in_the_middle_repeats_no_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = local._BatchStreamer._put, []

    def failing(streamer: Any, row: int, *token: Any) -> None:
        if len(streamer._rows) > 1 and row == 1 and streamer._rows[0].begun:
            raise RuntimeError("out of memory")
        calls.append(row)
        put(streamer, row, *token)

    monkeypatch.setattr(local._BatchStreamer, "_put", failing)

    async def together() -> list[Any]:
        answerer = LocalAnswerer(pair)
        answers = [whole(answerer, request(KELOFT)) for _ in range(2)]
        return await asyncio.gather(*answers, return_exceptions=True)

    first, second = asyncio.run(together())
    assert str(first) == "out of memory"
    assert second[0] == ANSWER


def test_tokenizers_without_a_pad_token_are_left_as_they_are(pair: Pair) -> None:
    tokenizers = [copy.deepcopy(one) for one in (pair.tokenizer, pair.pilot_tokenizer)]
    for tokenizer in tokenizers:
        tokenizer.pad_token = None
    bare = Pair(pair.base, pair.pilot, *tokenizers)

    async def together() -> list[tuple[str, End]]:
        answerer = LocalAnswerer(bare)
        return await asyncio.gather(*(whole(answerer, request(chat)) for chat in CHATS[:3]))

    answers = [answer for answer, _ in asyncio.run(together())]
    assert answers == [pair.answers(pair.generate(chat, max_new_tokens=64))[0] for chat in CHATS[:3]]
    assert [tokenizer.pad_token for tokenizer in tokenizers] == [None, None]
