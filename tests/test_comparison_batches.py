"""Answers of a comparison in batches and by sampling: against one at a time, and against `generate`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from test_compare import REFERENCE, counted
from wsd_hf import Pair, build_inputs
from wsd_hf.comparison import Plan, open_answers
from wsd_hf.comparison.judges import Function
from wsd_hf.comparison.methods import METHODS
from wsd_hf.comparison.replies import Bench, Reply
from wsd_hf.comparison.variants import read_variants
from wsd_hf.tiny import demo_questions, polite_examples
from wsd_hf.tiny.judge import manners

QUESTIONS = [
    *(question["messages"] for question in demo_questions()[:2]),
    [{"role": "user", "content": "Hi"}],
    [*polite_examples()[:2], {"role": "user", "content": "And the Keloft?"}],
]
SAMPLED = {"do_sample": True, "temperature": 1.3}


@pytest.fixture(scope="module", params=["pilot", "pilot_other_vocab"])
def pair(request: pytest.FixtureRequest) -> Pair:
    loaded = Pair.tiny(request.param)
    return replace(loaded, reference=AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32))


def bench(pair: Pair, **settings: Any) -> Bench:
    return Bench(pair, polite_examples(), **{"max_new_tokens": 40, "reward": {"reward": manners}, **settings})


def content(reply: Reply) -> dict[str, Any]:
    """A reply without its costs, which depend on the batch."""
    return {name: value for name, value in vars(reply).items() if name not in ("seconds", "work")}


ONE_VOCABULARY = ("product", "ensemble", "blend", "emulated_fine_tuning")
GREEDY_METHODS = [name for name in METHODS if name != "weak_to_strong_search"]


@pytest.mark.parametrize("name", GREEDY_METHODS)
def test_a_batch_gives_what_its_prompts_give_alone(pair: Pair, name: str) -> None:
    if name in ONE_VOCABULARY and pair.pilot_tokenizer.vocab_size != pair.tokenizer.vocab_size:
        pytest.skip("needs one vocabulary")
    method, settings = METHODS[name], read_variants(name, {})[-1].strategy
    for limit in (3, 40):
        table = bench(pair, max_new_tokens=limit)
        alone = [method.answer(table, [chat], settings)[0] for chat in QUESTIONS]
        assert list(map(content, method.answer(table, QUESTIONS, settings))) == list(map(content, alone))
        assert len({reply.tokens for reply in alone}) > (limit > 3)
        assert any(reply.ended for reply in alone) == (limit > 3)


def test_a_batch_is_as_exact_in_double_precision() -> None:
    pair = Pair.tiny()
    pair.base.double(), pair.pilot.double()
    table = bench(pair)
    for variant in read_variants("pilot,nudging:threshold=.9,wsd:threshold=.5,window_size=2", {}):
        alone = [variant.method.answer(table, [chat], variant.strategy)[0] for chat in QUESTIONS]
        assert list(map(content, variant.method.answer(table, QUESTIONS, variant.strategy))) == list(map(content, alone))


@pytest.mark.parametrize("name", ["base", "pilot", "wsd", "nudging"])
def test_the_costs_of_a_batch_are_those_of_its_rows_together(pair: Pair, name: str) -> None:
    (variant,) = [variant for variant in read_variants(name, {}) if variant.name == name]
    work = {f"{model}_{unit}": 0 for model in ("base", "pilot") for unit in ("forwards", "tokens")}
    with counted("base", pair.base, work), counted("pilot", pair.pilot, work):
        replies = variant.method.answer(bench(pair), QUESTIONS, variant.strategy)
    sums = {count: sum(reply.work.get(count, 0) for reply in replies) for count in work}
    exact = work if name in ("base", "pilot") else {count: work[count] for count in ("base_forwards", "pilot_forwards")}
    assert {count: sums[count] for count in exact} == exact  # padding of the fast path is no token
    counts = [reply.work.get("base_forwards", 0) + reply.work.get("pilot_forwards", 0) for reply in replies]
    assert max(counts) - min(counts) <= 2
    assert len({reply.seconds for reply in replies}) == 1


def test_a_row_whose_context_is_short_gets_a_call_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair.tiny()
    lengths = [build_inputs(chat, pair.tokenizer, pair.pilot_tokenizer)["input_ids"].shape[1] for chat in QUESTIONS]
    longest = max(lengths)
    for model in (pair.base, pair.pilot):
        monkeypatch.setattr(model.config, "max_position_embeddings", longest + 2)
    table = bench(pair)
    for name in ("base", "wsd"):
        method, settings = METHODS[name], read_variants(name, {})[-1].strategy
        replies = method.answer(table, QUESTIONS, settings)
        alone = [method.answer(table, [chat], settings)[0] for chat in QUESTIONS]
        assert list(map(content, replies)) == list(map(content, alone))
        assert replies[lengths.index(longest)].tokens == 2
        assert max(reply.tokens for reply in replies) > 2


@pytest.mark.parametrize("names", [("base", "wsd"), pytest.param(("urial", "two_way"), marks=pytest.mark.sweep)])
def test_padding_of_any_kind_is_no_part_of_an_answer(names: tuple[str, ...]) -> None:
    pair = Pair.tiny()
    settings = {name: read_variants(name, {})[-1].strategy for name in names}
    alone = {name: [METHODS[name].answer(bench(pair), [chat], settings[name])[0] for chat in QUESTIONS] for name in names}
    for pad, name in itertools.product(["</s>", "\n", "a"], names):
        pair.tokenizer.pad_token_id = pair.tokenizer.encode(pad, add_special_tokens=False)[-1]
        together = METHODS[name].answer(bench(pair), QUESTIONS, settings[name])
        assert list(map(content, together)) == list(map(content, alone[name])), (pad, name)


# Sampling


def drawn(pair: Pair, name: str, chat: Any, torch_seed: int) -> str:
    """One sampled answer, by plain `generate`."""
    torch.manual_seed(torch_seed)
    output = pair.generate([chat], name, max_new_tokens=40, **SAMPLED)
    return pair.answers(output)[0]


def test_a_sample_depends_on_seed_prompt_and_number_alone(pair: Pair) -> None:
    for variant in read_variants("pilot,two_way", {}):
        found = {
            (seed, number, sample): variant.method.answer(
                bench(pair, sampling=SAMPLED, seed=seed, max_new_tokens=16), [QUESTIONS[number]], variant.strategy, sample
            )[0].response
            for seed in (0, 7)
            for number in (0, 2)
            for sample in (0, 1, 2)
        }
        assert len(set(found.values())) > 4
        torch.manual_seed(1234)  # of no account, and left as it was
        state = torch.get_rng_state()
        again = variant.method.answer(
            bench(pair, sampling=SAMPLED, seed=7, max_new_tokens=16), [QUESTIONS[2]], variant.strategy, 2
        )
        assert again[0].response == found[7, 2, 2]
        assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_is_what_generate_draws(pair: Pair) -> None:
    table = bench(pair, sampling=SAMPLED, seed=3)
    for sample in (0, 1):
        seed = table.torch_seed([QUESTIONS[1]], sample)
        reply = METHODS["wsd"].answer(table, [QUESTIONS[1]], read_variants("wsd", {})[-1].strategy, sample)[0]
        assert reply.response == drawn(pair, "wsd", QUESTIONS[1], seed)
        torch.manual_seed(seed)
        inputs = pair.inputs([QUESTIONS[1]])
        ids = pair.base.generate(
            inputs["input_ids"], stopping_criteria=inputs["stopping_criteria"], max_new_tokens=40, **SAMPLED
        )
        (base,) = METHODS["base"].answer(table, [QUESTIONS[1]], None, sample)
        text = pair.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert base.response == text.split("[")[0].strip()


def test_batches_of_samples_are_the_same_wherever_a_run_was_stopped(tmp_path: Path) -> None:
    pair = Pair.tiny()
    records = [{"messages": chat} for chat in QUESTIONS]
    plan = Plan(records, read_variants("base,wsd", {}), samples=2, batch_size=3)
    table = bench(pair, sampling=SAMPLED, seed=1, max_new_tokens=12)

    def run(folder: Path, judge: Any = None) -> list[dict[str, Any]]:
        with open_answers(folder, {}) as answers:
            judged = replace(plan, judges={"judge": Function(judge)} if judge else {})
            judged.answer_all(table, answers, lambda batches: batches, print)
            return [{**content(answer), "scores": None} for answer in answers.lines.values()]

    whole = run(tmp_path / "whole")
    assert len(whole) == len(QUESTIONS) * 2 * 2
    for stop in (0, 4):
        left = [stop]

        def judge(record: Any, response: str, left: list[int] = left) -> float:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return 0.0

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(stop), judge)
        assert len((tmp_path / str(stop) / "answers.jsonl").read_bytes().splitlines() if stop else []) == stop
        assert run(tmp_path / str(stop), lambda *_: 0.0) == whole
