"""A model's next logits are those of its tokens, however its cache was filled and rewound."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import PreTrainedModel

from families import RAGGED, VOCABULARY, tiny_model
from test_graphs import Captures, captures  # noqa: F401
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.engine.cache import RaggedCache
from wsd_hf.engine.cuda_graphs import Workspace
from wsd_hf.engine.ragged_stream import RaggedStream

PROMPTS = (5, 12, 9)  # two of them longer than the sliding window of the families that have one
ROOM = 60
KINDS = [(family, attention) for family in RAGGED for attention in ("eager", "sdpa")]
KINDS.remove(("gemma2", "sdpa"))  # not in every version of transformers: its logits are capped


def without_cache(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def streaming(model: PreTrainedModel, prompts: list[list[int]], room: int) -> RaggedStream:
    workspace = Workspace(RaggedCache(model.config, max(map(len, prompts)) + room))
    return RaggedStream(model, prompts, workspace)


@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_ragged_feeds_and_rewinds_leave_every_logit_that_of_a_forward_without_cache(family: str, attention: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    model = model if family == "mixtral" else model.double()  # experts refuse float64
    model.set_attn_implementation(attention)
    rng = random.Random(family)
    prompts = [tokens(rng, length) for length in PROMPTS]
    responses: list[list[int]] = [[] for _ in prompts]
    stream = streaming(model, prompts, ROOM)
    for _ in range(12):
        chunk = rng.randint(0, 4)
        proposals = torch.tensor([tokens(rng, chunk) for _ in prompts], dtype=torch.long).view(len(prompts), chunk)
        for response in responses:
            response += tokens(rng, rng.choice([0, 1, 1, 3]))
        blocks = [stream.missing(row, response) if rng.random() < 0.8 else None for row, response in enumerate(responses)]
        with torch.no_grad():
            logits = stream.logits(stream.block(blocks, proposals, [chunk] * len(prompts)), keep=chunk + 1)
        for row, block in enumerate(blocks):
            if block is None:
                continue
            whole = prompts[row] + responses[row] + proposals[row].tolist()
            fed = min(len(block) + chunk, chunk + 1)
            torch.testing.assert_close(
                logits[row, chunk + 1 - fed :], without_cache(model, whole)[len(whole) - fed :], atol=3e-5, rtol=1e-5
            )
            responses[row] += proposals[row, : rng.randint(0, chunk)].tolist()
            responses[row] = responses[row][: ROOM - 8]
            stream.rewind(row, len(responses[row]) - rng.choice([0, 0, 1, min(3, len(responses[row]))]))


def feed(stream: RaggedStream, blocks: list[list[int] | None], proposals: list[list[int]], counts: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return stream.logits(stream.block(blocks, torch.tensor(proposals), counts), keep=1 + len(proposals[0]))


def test_tokens_are_counted_without_padding() -> None:
    stream = streaming(tiny_model("llama"), [[5, 6, 7], [8]], 8)
    feed(stream, [[5, 6, 7], [8]], [[9, 9], [9, 9]], [2, 1])
    feed(stream, [[], None], [[9], [9]], [1, 1])
    assert (stream.forwards, stream.tokens, stream.lengths) == (2, 8, [6, 2])


def test_rows_may_get_unequal_numbers_of_proposals() -> None:
    model = tiny_model("llama")
    stream = streaming(model, [[5, 6, 7], [8]], 8)
    logits = feed(stream, [[5, 6, 7], [8]], [[9, 10], [11, 0]], [2, 1])
    torch.testing.assert_close(logits[0], without_cache(model, [5, 6, 7, 9, 10])[-3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, :2], without_cache(model, [8, 11]), atol=1e-5, rtol=1e-5)
    logits = feed(stream, [[12], [12]], [[13], [13]], [1, 1])
    torch.testing.assert_close(logits[1], without_cache(model, [8, 11, 12, 13])[-2:], atol=1e-5, rtol=1e-5)


def test_rows_that_leave_take_nothing_of_the_others_with_them() -> None:
    model = tiny_model("llama")
    stream = streaming(model, [[5, 6, 7], [8], [9, 10]], 8)
    feed(stream, [[5, 6, 7], [8], [9, 10]], [[11], [12], [13]], [1, 1, 1])
    stream.select([0, 2])
    feed(stream, [[14], [14]], [[15], [16]], [1, 1])
    stream.select([2])
    logits = feed(stream, [[17]], [[18]], [1])
    torch.testing.assert_close(logits[0], without_cache(model, [9, 10, 13, 14, 16, 17, 18])[-2:], atol=1e-5, rtol=1e-5)


def test_what_the_cache_lacks_begins_where_it_was_rewound_to() -> None:
    stream = streaming(tiny_model("llama"), [[5, 6, 7]], 8)
    assert stream.missing(0, [8, 9]) == [5, 6, 7, 8, 9]
    feed(stream, [[5, 6, 7, 8, 9]], [[10]], [1])
    stream.rewind(0, 1)
    assert stream.missing(0, [8, 11]) == [11]


def test_buffers_that_grow_keep_what_they_hold(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """And forwards that were captured before write to the new ones."""
    monkeypatch.setattr(graphs, "STEP", 16)
    model = tiny_model("llama")
    with graphs.workspace(model, rows=1, prompt=3, room=12, capturing=True) as workspace:
        stream = RaggedStream(model, [[5, 6, 7]], workspace)
        for response in ([], [8], [8, 9], [8, 9, 10]):
            feed_all(stream, response)
        assert captures.replays
        memory = workspace.memory
        workspace.reserve(40)
        assert workspace.memory > memory
        torch.testing.assert_close(
            feed_all(stream, [8, 9, 10, 11]), without_cache(model, [5, 6, 7, 8, 9, 10, 11])[-1], atol=1e-5, rtol=1e-5
        )
        stream.rewind(0, 0)
        response = []
        for token in range(20, 45):
            response.append(token)
            logits = feed_all(stream, response)
        torch.testing.assert_close(logits, without_cache(model, [5, 6, 7, *response])[-1], atol=1e-5, rtol=1e-5)


def feed_all(stream: RaggedStream, response: list[int]) -> torch.Tensor:
    """The logits behind a response of a single row."""
    with torch.no_grad():
        return stream.logits(stream.block([stream.missing(0, response)]), keep=1)[0, -1]
