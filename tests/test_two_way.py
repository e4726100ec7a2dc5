"""Two-way switching with two vocabularies against an oracle without caches, its output, its work, and WSD at threshold 0.

`test_random_calls.py` has its oracle with one vocabulary, and its distribution under sampling.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from dataclasses import astuple
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteria

import two_way_oracle as oracle
import wsd_hf
from every_strategy import counting, some
from families import PAD, tiny_model
from oracle import left_padded, ones, random_prompt
from test_fast_path import Ends, FiresAt, pair, random_case, resized
from test_graphs import Captures, captures  # noqa: F401
from test_two_vocabularies import GOLDEN, NOISE, World, a_batch, a_call, a_prompt, a_world, as_ids, ending_at, tokenizer_of
from test_two_vocabularies import some as some_tokens
from tokenizers_for_tests import letter_tokenizer
from wsd_hf import WriterChange

CLOSE = 1e-5
"""A mean so near to its threshold may fall on either side of it, as numbers are rounded."""


def decode(base: Any, pilot: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    settings = {"strategy": "two_way", "attention_mask": ones(ids), "return_dict_in_generate": True, "pad_token_id": PAD}
    return base.generate(ids, assistant_model=pilot, **{**settings, **kwargs})


def real(ids: torch.Tensor, mask: torch.Tensor, row: int) -> list[int]:
    return ids[row][mask[row].bool()].tolist()


# Two vocabularies


def two_vocabularies_case(rng: random.Random, world: Any, noise: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a call, and those of the oracle for all of its rows."""
    rows = rng.randint(1, 3)
    ids, mask = a_batch(rng, world.tokenizer, rows)
    eos = sorted(as_ids(world.base.generation_config.eos_token_id) | set(some_tokens(rng, world.tokenizer, 0.01)))
    low = -5 if noise else -2
    shared = {
        "threshold": min(1.0, 10 ** rng.uniform(low, 0)),
        "handback_threshold": min(1.0, 10 ** rng.uniform(low, 0)),
        "window_size": (window := rng.randint(1, 4)),
        "max_draft_tokens": max(window, rng.choice([1, 3, 6, 12])),
        "draft_end": rng.choice(["continue", "stop"]),
    }
    call: dict[str, Any] = {
        "ids": ids,
        "attention_mask": mask,
        "max_new_tokens": rng.randint(1, 24),
        "eos_token_id": eos,
        **{f"two_way_{name}": value for name, value in shared.items()},
        "two_way_chunk": rng.choice([None, 1, 2, 3, 5, 16]),
        "tokenizer": world.tokenizer,
        "assistant_tokenizer": world.assistant_tokenizer,
    }
    call["assistant_input_ids"], call["assistant_attention_mask"] = a_batch(rng, world.assistant_tokenizer, rows)
    settings: dict[str, Any] = {**shared, "budget": call["max_new_tokens"], "eos": frozenset(eos)}
    if rows == 1 and rng.random() < 0.5:
        call["repetition_penalty"] = 1.3
        settings["processors"] = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    if rng.random() < 0.2:
        ends = Ends(*some_tokens(rng, world.tokenizer, 0.03))
        call["stopping_criteria"] = [ends]
        settings["ended"] = functools.partial(met, ends)
    return call, settings


def met(criterion: StoppingCriteria, response: list[int]) -> bool:
    return bool(criterion(torch.tensor([response]), None))


def check(world: World, call: dict[str, Any], settings: dict[str, Any]) -> list[oracle.Expected]:
    """A call against the oracle; returns what the rows should be."""
    out = decode(world.base, world.pilot, **call)
    prompts = [(call["ids"], call["attention_mask"]), (call["assistant_input_ids"], call["assistant_attention_mask"])]
    rule = oracle.Rule(**settings, pilot_eos=oracle.pilot_eos(world.pilot, world.assistant_tokenizer))
    every = []
    for row, response in enumerate(out.sequences[:, out.prompt_length :].tolist()):
        want = oracle.two_way(world[:2], world[2:], [real(*prompt, row) for prompt in prompts], rule)
        every.append(want)
        if want.close < CLOSE:
            continue
        padding = len(response) - len(want.tokens)
        assert response == want.tokens + [PAD] * padding
        assert out.written_by_pilot[row].tolist() == want.by_pilot + [False] * padding
        assert [astuple(change) for change in out.changes[row]] == want.changes
        log_probs = torch.tensor(want.other + [math.nan] * padding)
        torch.testing.assert_close(out.log_probs[row], log_probs, equal_nan=True, atol=1e-4, rtol=1e-4)
    return every


@pytest.mark.parametrize("part", some(1, 18))
@pytest.mark.parametrize("name", NOISE + GOLDEN, ids=" ".join)
def test_random_calls_with_two_vocabularies_are_what_plain_forwards_give(name: tuple[str, str], part: int, tried: Any) -> None:
    rng, plain = random.Random(f"{name} {part}"), a_world(name)
    for _ in range(2):
        world = ending_at(plain, *some_tokens(rng, plain.assistant_tokenizer, rng.choice([0, 0.03])))
        check(world, *two_vocabularies_case(rng, world, noise=name in NOISE))
        tried("random calls, each against a slow oracle")


def test_the_random_calls_change_the_writer_for_every_reason() -> None:
    rng, world = random.Random(0), a_world(NOISE[0])
    reasons = set()
    for _ in range(12):
        world = ending_at(world, *some_tokens(rng, world.assistant_tokenizer, 0.01))
        call, settings = two_vocabularies_case(rng, world, noise=True)
        reasons |= {change[2] for want in check(world, call, settings) for change in want.changes}
    assert reasons == {"confident", "draft_ended", "draft_limit", "left_path"}


@pytest.mark.parametrize("name", [NOISE[0], NOISE[3], GOLDEN[1]], ids=" ".join)
def test_captured_forwards_give_the_same(name: tuple[str, str], captures: Captures) -> None:  # noqa: F811
    rng, world = random.Random(f"captured {name}"), a_world(name)
    for _ in range(3):
        check(world, *two_vocabularies_case(rng, world, noise=name in NOISE))
    assert captures.replays > 10


def test_a_pilot_with_a_recurrent_state_reads_the_bases_text_too() -> None:
    names = NOISE[0]
    tokenizers = [tokenizer_of(name) for name in names]
    pilot = copy.deepcopy(tiny_model("mamba", seed=3, vocab_size=len(tokenizers[1]))).double()
    pilot.generation_config.eos_token_id = tokenizers[1].eos_token_id
    world = World(a_world(names).base, pilot, *tokenizers)
    handed_back = 0
    for seed in range(6):
        call, settings = two_vocabularies_case(random.Random(seed), world, noise=True)
        handed_back += sum(len(want.changes) > 1 for want in check(world, call, settings))
    assert handed_back


def test_the_pilot_reads_each_token_of_the_bases_text_once() -> None:
    world = a_world(NOISE[0])
    ids = a_prompt(random.Random(1), world.tokenizer)
    # The base takes over after one token; the window never is full.
    settings = {"switch_criteria": FiresAt(1), "two_way_window_size": 400, "two_way_handback_threshold": 0.5}
    tokenizers = {"tokenizer": world.tokenizer, "assistant_tokenizer": world.assistant_tokenizer}
    out = decode(world.base, world.pilot, ids, max_new_tokens=40, two_way_chunk=1, eos_token_id=None, **settings, **tokenizers)
    text = world.tokenizer.decode(out.sequences[0, out.prompt_length :])
    own = len(world.assistant_tokenizer.encode(text, add_special_tokens=False))
    prompt = len(world.assistant_tokenizer.encode(world.tokenizer.decode(ids[0])))
    assert out.changes[0] == [WriterChange(1, "base", "confident")]
    assert out.stats.pilot.tokens <= prompt + own + 2


# One vocabulary


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_the_output_holds_what_each_change_was_decided_by(engine: str) -> None:
    base, pilot = pair("llama", 0.3)
    pilot = copy.copy(pilot)
    pilot.generation_config = GenerationConfig()  # without an EOS
    ids, mask = left_padded([random_prompt(seed, 3 + 2 * seed) for seed in range(4)], PAD)
    settings = wsd_hf.TwoWayConfig(threshold=0.05, handback_threshold=0.1, window_size=2, engine=engine)
    out = decode(base, pilot, ids, attention_mask=mask, strategy=settings, max_new_tokens=40, eos_token_id=None)
    assert isinstance(out, wsd_hf.TwoWayOutput)
    assert out.strategy == settings
    assert sum(map(len, out.changes)) > 8
    for row, changes in enumerate(out.changes):
        prompt, response = real(ids, mask, row), out.sequences[row, out.prompt_length :].tolist()
        whole = torch.tensor([prompt + response])
        with torch.no_grad():
            by = {model: model(whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (base, pilot)}
        writer, begun = "pilot", 0
        for position, token in enumerate(response):
            assert bool(out.written_by_pilot[row, position]) == (writer == "pilot")
            got = float(out.log_probs[row, position])
            if not math.isnan(got):
                assert got == pytest.approx(float(by[base if writer == "pilot" else pilot][position, token]), abs=1e-4)
            stretch = out.log_probs[row, begun : position + 1].tolist()
            mean = math.exp(math.fsum(stretch[-2:]) / 2) if len(stretch) > 1 else math.nan
            due = mean >= 0.05 if writer == "pilot" else mean < 0.1
            changed = [change for change in changes if change.position == position + 1]
            assert bool(changed) == (due and (writer == "pilot" or position + 1 < len(response)))
            if changed:
                writer, begun = changed[0].writer, position + 1
                assert changed[0].reason == ("confident" if writer == "base" else "left_path")
        assert not math.isnan(float(out.log_probs[row, -2]))


def with_prefix(case: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A call of `test_fast_path`, with the settings of another strategy."""
    return {name.replace("wsd_", prefix): value for name, value in case.items()}


def check_wsd(base: Any, pilot: Any, case: dict[str, Any], seed: int) -> None:
    """Without a threshold of the hand-back, a call gives what WSD gives, with the same random numbers and the same work."""
    outputs = []
    for strategy, more in (("wsd", {}), ("two_way", {"two_way_handback_threshold": 0})):
        torch.manual_seed(seed)
        outputs.append(decode(base, pilot, **with_prefix(case, f"{strategy}_"), strategy=strategy, **more))
    wsd, two_way = outputs
    assert torch.equal(two_way.sequences, wsd.sequences)
    assert torch.equal(two_way.written_by_pilot, wsd.written_by_pilot)
    assert two_way.stats == wsd.stats
    for row, changes in enumerate(two_way.changes):
        length, reason = int(wsd.draft_length[row]), wsd.switch_reason[row]
        assert changes == ([] if reason in ("budget", "stopped") else [WriterChange(length, "base", reason)])
        torch.testing.assert_close(two_way.log_probs[row, :length], wsd.draft_log_probs[row, :length])


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("part", some(2, 12))
def test_without_a_threshold_it_is_wsd(part: int, engine: str, tried: Any) -> None:
    rng = random.Random(part)
    for seed in range(6):
        case = random_case(rng, padded=True) | {"wsd_engine": engine}
        case["do_sample"] = rng.random() < 0.5 and "logits_processor" not in case  # which may leave nothing to draw
        case["switch_criteria"] = rng.choice(["confidence", "relative_confidence", FiresAt(*[3] * len(case["ids"]))])
        check_wsd(*pair("llama", rng.choice([0.05, 0.15, 0.4])), case, seed)
        tried("calls without a hand-back, each against WSD")


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("name", [*NOISE[:3], GOLDEN[0]], ids=" ".join)
def test_without_a_threshold_it_is_wsd_with_two_vocabularies_too(name: tuple[str, str], engine: str, tried: Any) -> None:
    rng, world = random.Random(f"wsd {name}"), a_world(name)
    for seed in range(4):
        case = a_call(rng, world) | {"wsd_engine": engine, **world.tokenizers}
        check_wsd(world.base, world.pilot, case, seed)
        tried("calls without a hand-back, each against WSD")


class Drafts(StoppingCriteria):
    """Ends every draft after two tokens, and holds what it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([input_ids.shape[1] >= 2])


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_criterion_of_the_callers_is_shown_each_draft_alone(engine: str) -> None:
    base, pilot = pair("llama", 0.3)
    criterion = Drafts()
    settings = {"two_way_window_size": 2, "two_way_handback_threshold": 1.0, "two_way_engine": engine, "eos_token_id": None}
    out = decode(base, pilot, random_prompt(1, 6), max_new_tokens=16, switch_criteria=criterion, **settings)
    response = out.sequences[0, out.prompt_length :].tolist()
    begins = [0, *(change.position for change in out.changes[0] if change.writer == "pilot")]
    assert len(begins) > 2
    assert criterion.seen == [response[begin : begin + length] for begin in begins for length in (1, 2)][: len(criterion.seen)]


def test_repeats_of_the_whole_response_do_not_count_in_a_later_draft() -> None:
    """A base and a pilot that repeat one token: only the first tokens of the first draft are no repetition."""
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")).double())
    with torch.no_grad():
        base.lm_head.weight.zero_()  # every token is as likely, and the first is chosen
    prompt = torch.full((1, 3), 9)
    settings = {"two_way_threshold": 0.01, "two_way_window_size": 2, "two_way_max_draft_tokens": 12, "eos_token_id": None}
    settings |= {"two_way_handback_threshold": 1.0, "max_new_tokens": 40}
    plain = decode(base, copy.deepcopy(base), prompt, **settings)
    assert [change.position for change in plain.changes[0]][:4] == [2, 4, 6, 8]
    out = decode(base, copy.deepcopy(base), prompt, two_way_ignore_repeats=True, **settings)
    want = (2, "base", "confident"), (4, "pilot", "left_path"), (16, "base", "draft_limit")
    assert out.changes[0][:3] == [WriterChange(*change) for change in want]


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_pilot_whose_context_is_full_drafts_no_more(engine: str) -> None:
    base, _ = pair("gpt2")
    pilot = copy.deepcopy(tiny_model("gpt2", seed=3, n_positions=20)).double()
    settings = {
        "two_way_window_size": 1,
        "two_way_handback_threshold": 1.0,
        "two_way_threshold": 1e-9,
        "two_way_engine": engine,
    }
    out = decode(base, pilot, random_prompt(0, 10), max_new_tokens=30, eos_token_id=None, **settings)
    # One token each, up to the end of the pilot's context, which holds ten tokens after its prompt.
    assert [(change.position, change.writer) for change in out.changes[0]] == [
        (place, "base" if place % 2 else "pilot") for place in range(1, 10)
    ]
    assert out.log_probs[0, :10].isfinite().all()
    assert not out.log_probs[0, 10:].isfinite().any()


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_pilot_that_lacks_a_token_drafts_no_more(engine: str) -> None:
    base, pilot = pair("llama")
    pilot, tokenizer = resized(pilot, 40), letter_tokenizer(40)
    settings = {
        "two_way_window_size": 1,
        "two_way_handback_threshold": 1.0,
        "switch_criteria": FiresAt(1),
        "eos_token_id": None,
    }
    settings |= {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer, "two_way_engine": engine}
    lacking = 0
    for seed in range(8):
        out = decode(base, pilot, random_prompt(seed, 6, 40), max_new_tokens=16, **settings)
        response = out.sequences[0, out.prompt_length :].tolist()
        first = next((place for place, token in enumerate(response) if token >= 40), None)
        if first is not None:
            lacking += 1
            assert all(change.position <= first for change in out.changes[0])
            assert not out.log_probs[0, first:].isfinite().any()
    assert lacking


@pytest.mark.parametrize("chunk", [1, 5])
def test_each_model_reads_its_prompt_once(chunk: int) -> None:
    base, pilot = pair("llama", 0.3)
    settings = {"two_way_window_size": 1, "two_way_handback_threshold": 1.0, "two_way_threshold": 1e-9, "eos_token_id": None}
    out = decode(base, pilot, random_prompt(1, 200), max_new_tokens=40, two_way_chunk=chunk, **settings)
    assert len(out.changes[0]) == 39
    for work in (out.stats.base, out.stats.pilot):
        assert work.tokens <= 200 + 40 * (2 + chunk)


# Refusals


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, "x", True, None])
def test_a_threshold_is_a_number_from_0_to_1(value: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="handback_threshold"):
        wsd_hf.TwoWayConfig(handback_threshold=value)


@pytest.mark.parametrize(
    ("more", "reason"), [({"two_way_engine": "step"}, "two_way_engine='step'"), ({"use_cache": False}, "use_cache=False")]
)
def test_two_vocabularies_step_by_step_are_refused_by_name(more: dict[str, Any], reason: str) -> None:
    world = a_world(NOISE[0])
    ids = a_prompt(random.Random(0), world.tokenizer)
    with (
        counting(world.base) as base,
        counting(world.pilot) as pilot,
        pytest.raises(wsd_hf.WSDValueError, match=f"two vocabularies.*{reason}.*two_way_handback_threshold=0"),
    ):
        decode(world.base, world.pilot, ids, max_new_tokens=4, **world.tokenizers, **more)
    assert not base + pilot
    decode(world.base, world.pilot, ids, max_new_tokens=4, two_way_handback_threshold=0, **world.tokenizers, **more)


# Traces


def test_a_trace_tells_each_change() -> None:
    pair_of_the_world = wsd_hf.Pair.tiny()
    settings = {"two_way_threshold": 0.5, "max_new_tokens": 64}
    for question in wsd_hf.tiny.demo_questions():
        out = pair_of_the_world.generate(question["messages"], "two_way", **settings)
        trace = pair_of_the_world.explain(out)
        assert [token.writer == "pilot" for token in trace.tokens] == out.written_by_pilot[0, : len(trace.tokens)].tolist()
        shown = [change for change in out.changes[0] if change.position <= len(trace.tokens)]
        assert trace.changes == tuple(shown)
        text = "".join(token.text for token in trace.tokens)
        assert str(trace).split("\n")[-1] == trace.summary()
        assert str(trace).count("│") == sum(a.writer != b.writer for a, b in itertools.pairwise(trace.tokens))
        assert text
        for change in shown:
            assert f"after {change.position} the " in trace.summary()
