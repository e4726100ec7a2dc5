"""Weak-to-strong search: runs of the official code, plain sampling where that is a special case, a slow search."""

from __future__ import annotations

import copy
import functools
import json
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import wsd_hf
from every_strategy import some
from families import EOS, PAD, tiny_model, tiny_pilot
from oracle import left_padded, random_prompt
from slow_decoding import prepared_processors
from test_vectors import DATA
from tokenizers_for_tests import letter_tokenizer
from wsd_hf.strategies.search.beam import Beam, BeamSettings, Hypothesis

VECTORS = DATA / "weak_to_strong_search"
SCORER = json.loads((VECTORS / "scorer.json").read_text("utf-8"))
RUNS = json.loads((VECTORS / "cbs.json").read_text("utf-8"))["runs"]
STRATEGY = "weak_to_strong_search"
VOCABULARY = 64


@functools.cache
def golden(name: str) -> PreTrainedModel:
    return wsd_hf.AutoModelForCausalLM.from_pretrained(VECTORS / name, dtype=torch.float32)


@functools.cache
def golden_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(VECTORS / name)


def golden_value(case: dict[str, Any], prompt: str, add_special_tokens: bool = False) -> wsd_hf.ImplicitValue:
    tuned, untuned = (golden(f"small_{case['pair']}_{kind}") for kind in ("tuned", "untuned"))
    prompts = [case[f"{which}model_prompt_template"].replace("{raw_prompt}", prompt) for which in ("", "ref_")]
    tokenizer = golden_tokenizer(f"tok_{case['pair']}")
    return wsd_hf.ImplicitValue(tuned, untuned, tokenizer, *([p] for p in prompts), add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("case", SCORER["cases"], ids=lambda case: f"{case['pair']} {case['ref_model_prompt_template'][:8]}")
def test_official_scores(case: dict[str, Any]) -> None:
    value = golden_value(case, case["raw_prompt"], case["add_special_tokens"])
    expected = torch.tensor(case["scores"])
    torch.testing.assert_close(value(SCORER["responses"], SCORER["eos"]), expected, rtol=0, atol=1e-4)
    one_by_one = [value([text], [end]).item() for text, end in zip(SCORER["responses"], SCORER["eos"], strict=True)]
    torch.testing.assert_close(torch.tensor(one_by_one), expected, rtol=0, atol=1e-4)


def run_id(run: dict[str, Any]) -> str:
    return "{pair} {w} {k} {l} {seed}".format(**run)


@pytest.mark.parametrize("run", [run for run in RUNS if run["tie_free"]], ids=run_id)
def test_official_searches_from_their_seed(run: dict[str, Any]) -> None:
    prompt = run["prompt_ids"]
    torch.manual_seed(run["seed"])
    out = golden("base").generate(
        torch.tensor([prompt]),
        strategy=STRATEGY,
        value=golden_value(run, run["prompt"]),
        tokenizer=golden_tokenizer("tok_a"),
        beam_width=run["w"],
        successors=run["k"],
        chunk_length=run["l"],
        official_ties=True,
        eos_token_id=run["eos_token_id"],
        pad_token_id=run["pad_token_id"],
        return_dict_in_generate=True,
        **{"top_k": 50, **run["kwargs"]},
    )
    assert out.sequences[0].tolist() == run["best_ids"]
    assert len(out.tree[0]) == run["n_selections"]
    for selection, step in zip(out.tree[0], run["steps"], strict=True):
        rows = [prompt + candidate.tokens for candidate in selection.candidates]
        assert [
            row + [run["pad_token_id"]] * (len(ids) - len(row)) for row, ids in zip(rows, step["candidate_ids"], strict=True)
        ] == (step["candidate_ids"])
        assert [selection.candidates.index(one) for one in selection.kept] == step["selected"]
        torch.testing.assert_close([one.value for one in selection.kept], step["selected_scores"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_official_selections_step_by_step(run: dict[str, Any]) -> None:
    settings = BeamSettings(beam_width=run["w"], successors=run["k"], chunk_length=run["l"], official_ties=True)
    value, beam = golden_value(run, run["prompt"]), Beam(settings)
    for step in run["steps"]:
        values = value(step["responses"], step["eos"])
        torch.testing.assert_close(values, torch.tensor(step["scores"]), rtol=0, atol=2e-4)
        facts = zip(step["candidate_ids"], step["responses"], step["eos"], values.tolist(), strict=True)
        candidates = [Hypothesis(*fact, parent=None) for fact in facts]
        beam.select(candidates)
        if step["tie_free"]:
            assert [candidates.index(one) for one in beam.selections[-1].kept] == step["selected"]


@functools.cache
def letters(start: str = "") -> PreTrainedTokenizerBase:
    tokenizer = letter_tokenizer(VOCABULARY, start)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS)
    return tokenizer


def models(family: str = "llama", small: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    return triple(family, small)


@functools.cache
def triple(family: str, small: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """A base, and a tuned and an untuned small model, in float64."""
    chosen = tiny_model(family), tiny_pilot(small, noise=0.3), tiny_model(small, seed=5)
    base, tuned, untuned = (copy.deepcopy(model).double() for model in chosen)
    return wsd_hf.enable_wsd(base), tuned, untuned


def search(ids: torch.Tensor, family: str = "llama", small: str = "llama", seed: int = 0, **kwargs: Any) -> Any:
    base, tuned, untuned = models(family, small)
    settings = {"top_k": 0, "pad_token_id": PAD, "tokenizer": letters(), "return_dict_in_generate": True, **kwargs}
    torch.manual_seed(seed)
    return base.generate(ids, strategy=STRATEGY, assistant_model=tuned, reference_model=untuned, **settings)


def plain_value(prompt: torch.Tensor, response: list[int], small: str = "llama", tokenizer: Any = None) -> float:
    """The implicit value by two forwards over everything; special tokens say nothing, but EOS at the end counts."""
    tokenizer = letters() if tokenizer is None else tokenizer
    text = letters().decode(response, skip_special_tokens=True)
    start = tokenizer.encode(letters().decode(prompt[0], skip_special_tokens=tokenizer is not letters()))
    whole = torch.tensor([start + tokenizer.encode(text) + ([tokenizer.eos_token_id] if response[-1:] == [EOS] else [])])
    total = 0.0
    for model, sign in zip(models(small=small)[1:], (1, -1), strict=True):
        log_probs = model(whole).logits[0].float().log_softmax(-1)
        total += sign * sum(log_probs[place - 1, whole[0, place]].item() for place in range(len(start), whole.shape[1]))
    return total


def slow_search(
    prompts: list[torch.Tensor],
    width: int,
    successors: int,
    chunk: int,
    budget: int,
    seed: int,
    family: str,
    small: str,
    **settings: Any,
) -> list[list[tuple[list[int], float, bool]]]:
    """The search as it is described, with lists, and forwards over everything: what finished of each prompt, best first.

    `settings` shape the base's samples; they are keywords of plain `generate`.
    """
    base = models(family)[0]
    processors = prepared_processors(base, prompts[0], max_new_tokens=budget, top_k=0, **settings)
    torch.manual_seed(seed)
    stored: list[list[tuple[list[int], float]]] = [[] for _ in prompts]
    rows = [(index, []) for index in range(len(prompts)) for _ in range(width * successors)]
    while rows:
        done = [False] * len(rows)
        for _ in range(chunk):
            if all(done):
                break
            scores = torch.zeros(len(rows), VOCABULARY)
            for of, prompt in enumerate(prompts):
                writing = [place for place, (index, _) in enumerate(rows) if index == of and not done[place]]
                if writing:
                    whole = torch.tensor([prompt[0].tolist() + rows[place][1] for place in writing])
                    scores[writing] = processors(whole, base(whole).logits[:, -1].float())
            drawn = torch.multinomial(scores.softmax(-1), 1).flatten().tolist()
            rows = [(index, old if end else [*old, new]) for (index, old), new, end in zip(rows, drawn, done, strict=True)]
            done = [end or row[-1] == EOS or len(row) == budget for (_, row), end in zip(rows, done, strict=True)]
        following = []
        for index, prompt in enumerate(prompts):
            found = [(one, plain_value(prompt, one, small), True) for one, _ in stored[index]]
            found += [
                (row, plain_value(prompt, row, small), end) for (of, row), end in zip(rows, done, strict=True) if of == index
            ]
            best = distinct_first(sorted(found, key=lambda one: -one[1]))[:width]
            if not any(of == index for of, _ in rows):
                continue
            known = [id(one) for one, _ in stored[index]]
            stored[index] += [(row, value) for row, value, end in best if end and id(row) not in known]
            following += [(index, row) for row, _, end in best if not end] * successors
        rows = following
    return [distinct_first([(*pair, True) for pair in sorted(one, key=lambda pair: -pair[1])]) for one in stored]


def distinct_first(ranked: list[tuple[list[int], float, bool]]) -> list[tuple[list[int], float, bool]]:
    again = []
    for place, (response, _, end) in enumerate(ranked):
        if end and any(other == response and other_end for other, _, other_end in ranked[:place]):
            again.append(place)
    return [one for place, one in enumerate(ranked) if place not in again] + [ranked[place] for place in again]


@pytest.mark.parametrize(("width", "successors", "chunk"), [(2, 2, 3), (1, 4, 5), (3, 1, 4), (3, 2, 1)])
@pytest.mark.parametrize(("family", "small"), [("llama", "llama"), ("gpt2", "gpt2"), ("mamba", "mamba")])
def test_equals_a_slow_search(width: int, successors: int, chunk: int, family: str, small: str) -> None:
    lengths = (6, 6) if family == "mamba" else (7, 4)
    prompts = [random_prompt(seed, length, VOCABULARY) for seed, length in enumerate(lengths)]
    ids, mask = left_padded(prompts, PAD)
    settings = {"beam_width": width, "successors": successors, "chunk_length": chunk}
    out = search(ids, family, small, seed=3, attention_mask=mask, max_new_tokens=9, num_return_sequences=width, **settings)
    expected = slow_search(prompts, width, successors, chunk, 9, 3, family, small)
    rows = iter(zip(out.sequences[:, ids.shape[1] :].tolist(), out.values.tolist(), strict=True))
    for best in expected:
        for (response, value, _), (row, got) in zip(best[:width], rows, strict=False):
            assert row == response + [PAD] * (len(row) - len(response))
            assert got == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("part", some(1, 31))
def test_random_searches_equal_a_slow_one(part: int, tried: Any) -> None:
    rng, family = random.Random(part), ("llama", "gpt2", "mistral", "mamba")[part % 4]
    for seed in range(10):
        longest, count = rng.randint(1, 10), rng.randint(1, 3)
        lengths = [longest if family == "mamba" else rng.randint(1, longest) for _ in range(count)]
        prompts = [random_prompt(rng.randrange(10**6), length, VOCABULARY) for length in lengths]
        ids, mask = left_padded(prompts, PAD)
        width, successors, budget = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 10)
        chunk = rng.choice([None, 1, 2, 3, 5])
        options = {"temperature": 0.7}, {"suppress_tokens": [5, 9]}, {"bad_words_ids": [[12], [13, 14]]}, {"top_p": 0.9}
        settings = {key: value for option in options if rng.random() < 0.3 for key, value in option.items()}
        settings["sequence_bias"] = [[[EOS], rng.uniform(0, 3)]]
        size = {"beam_width": width, "successors": successors, "chunk_length": chunk, "max_new_tokens": budget}
        out = search(ids, family, family, seed, attention_mask=mask, num_return_sequences=width, **size, **settings)
        expected = slow_search(prompts, width, successors, chunk or budget, budget, seed, family, family, **settings)
        rows = list(zip(out.sequences[:, ids.shape[1] :].tolist(), out.values.tolist(), strict=True))
        for of, best in enumerate(expected):
            for (response, value, _), (row, got) in zip(best[:width], rows[of * width : (of + 1) * width], strict=True):
                assert row == response + [PAD] * (len(row) - len(response)), (family, size, settings)
                assert got == pytest.approx(value, abs=1e-3)
        tried("random calls, each against a slow oracle")


def test_the_best_of_n_is_the_best_of_n_plain_samples() -> None:
    base, ids = models()[0], random_prompt(5, 6, VOCABULARY)
    for seed in range(4):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_k": 0, "temperature": 0.8, "max_new_tokens": 10}
        samples = base.generate(ids, num_return_sequences=5, **settings)[:, 6:].tolist()
        samples = [row[: row.index(EOS) + 1] if EOS in row else row for row in samples]
        values = [plain_value(ids, row) for row in samples]
        settings |= {"beam_width": 1, "successors": 5, "chunk_length": None}
        out = search(ids, seed=seed, **settings)
        best = samples[values.index(max(values))]
        assert out.sequences[0, 6:].tolist() == best
        assert out.values.item() == pytest.approx(max(values), abs=1e-3)
        assert [len(selections) for selections in out.tree] == [1]


def test_one_beam_with_one_successor_is_plain_sampling() -> None:
    ids = random_prompt(2, 5, VOCABULARY)
    torch.manual_seed(9)
    expected = models()[0].generate(ids, do_sample=True, top_k=0, max_new_tokens=12)
    out = search(ids, seed=9, beam_width=1, successors=1, chunk_length=4, max_new_tokens=12)
    assert out.sequences.tolist() == expected.tolist()


def test_of_equals_the_first_is_kept() -> None:
    ids = random_prompt(2, 5, VOCABULARY)
    out = search(
        ids, value=lambda texts, ended, of: [1.0] * len(texts), beam_width=2, successors=3, chunk_length=2, max_new_tokens=7
    )
    for selection in out.tree[0]:
        unfinished = [one for one in selection.kept if not one.finished]
        assert unfinished == [one for one in selection.candidates if one in unfinished]
    first = out.tree[0][0]
    assert first.kept == first.candidates[:2]


def test_what_finished_is_kept_once_and_never_lost() -> None:
    """An ended response is worth most at first; later ones surpass it, then fall below it."""

    def value(texts: list[str], ended: list[bool], of: list[int]) -> list[float]:
        worth = [1.0 if len(text) <= 2 else 10.0 if len(text) < 8 else -10.0 for text in texts]
        return [5.0 if end else other for end, other in zip(ended, worth, strict=True)]

    settings = {"beam_width": 2, "successors": 8, "chunk_length": 2, "max_new_tokens": 12, "temperature": 3.0}
    came_back = False
    for seed in range(20):
        out = search(random_prompt(seed, 4, VOCABULARY), seed=seed, value=value, **settings)
        kept = [[one for one in selection.kept if one.finished] for selection in out.tree[0]]
        assert all(len(set(map(id, finished))) == len(finished) for finished in kept)
        assert (out.values.item() == 5.0) == any(one.value == 5.0 for finished in kept for one in finished)
        came_back |= any(one not in after for before, after in pairwise(kept) for one in before) and out.values.item() == 5.0
    assert came_back


def test_what_ended_in_the_same_words_is_returned_once_if_there_is_another() -> None:
    """A sharp distribution: many samples are equal."""
    settings = {"beam_width": 4, "successors": 4, "chunk_length": 3, "max_new_tokens": 8, "num_return_sequences": 4}
    crowded = False
    for seed in range(6):
        out = search(random_prompt(seed, 5, VOCABULARY), seed=seed, temperature=0.25, **settings)
        ended = {tuple(one.tokens) for selection in out.tree[0] for one in selection.kept if one.finished}
        returned = out.sequences[:, 5:].tolist()
        distinct = len(set(map(tuple, returned)))
        assert distinct == min(4, len(ended))
        sampled = [tuple(one.tokens) for one in out.tree[0][-1].candidates if one.finished]
        crowded |= len(set(sampled)) < len(sampled)
    assert crowded


def test_the_tree_tells_how_responses_were_found() -> None:
    out = search(
        random_prompt(4, 6, VOCABULARY), beam_width=3, successors=2, chunk_length=3, max_new_tokens=11, num_return_sequences=3
    )
    selections = out.tree[0]
    assert out.values.tolist() == sorted(out.values.tolist(), reverse=True)
    for one, row in zip(selections[-1].kept, out.sequences[:, 6:].tolist(), strict=True):
        assert row == one.tokens + [PAD] * (len(row) - len(one.tokens))
    for before, after in pairwise(selections):
        for one in after.candidates:
            assert one.parent in before.kept
            assert one.tokens[: len(one.parent.tokens)] == one.parent.tokens
            assert len(one.tokens) - len(one.parent.tokens) <= 3
    for one in selections[-1].candidates:
        assert one.value == pytest.approx(plain_value(random_prompt(4, 6, VOCABULARY), one.tokens), abs=1e-3)


class Recorded(BaseStreamer):
    """What came, and when it ended."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.puts = 0
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts > 1:  # behind the prompt
            self.came += value.tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_what_is_settled_as_soon_as_it_is() -> None:
    streamer = Recorded()
    before_the_end: list[int] = []

    def value(texts: list[str], ended: list[bool], of: list[int]) -> list[float]:
        before_the_end.append(len(streamer.came))
        return [float(sum(map(ord, text))) for text in texts]

    ids = random_prompt(1, 5, VOCABULARY)
    out = search(ids, value=value, beam_width=1, successors=4, chunk_length=3, max_new_tokens=15, streamer=streamer)
    assert streamer.came == out.sequences[0, 5:].tolist()
    assert streamer.ended
    assert before_the_end == [3 * chunk for chunk in range(len(before_the_end))]
    assert len(before_the_end) > 2


def test_streamed_text_is_the_responses() -> None:
    streamer = TextIteratorStreamer(letters(), skip_prompt=True)
    out = search(random_prompt(1, 5, VOCABULARY), beam_width=3, chunk_length=2, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == letters().decode(out.sequences[0, 5:])


def test_a_response_that_is_cut_has_not_ended_and_half_a_character_says_nothing() -> None:
    seen: list[tuple[str, bool]] = []

    def value(texts: list[str], ended: list[bool], of: list[int]) -> list[float]:
        seen.extend(zip(texts, ended, strict=True))
        return [0.0] * len(texts)

    settings = {"tokenizer": golden_tokenizer("tok_a"), "value": value, "chunk_length": 1, "max_new_tokens": 6}
    torch.manual_seed(0)
    golden("base").generate(torch.tensor([[278, 367, 355]]), strategy=STRATEGY, pad_token_id=3, **settings)
    assert len(seen) == 6 * 16
    assert not any(text.endswith("\ufffd") or ended for text, ended in seen)
    assert any("\ufffd" in text for text, _ in seen)  # in the middle it is what the base wrote


def fed(model: PreTrainedModel, counts: list[int]) -> Any:
    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].numel())

    return model.register_forward_pre_hook(count, with_kwargs=True)


def test_prompts_are_read_once_and_the_beginnings_of_responses_too() -> None:
    """In the official runs' setting, W, K, L = 2, 2, 30; what the official code reads is added up here."""
    ids, counts = random_prompt(0, 40, VOCABULARY), []
    hook = fed(models()[0], counts)
    settings = {"beam_width": 2, "successors": 2, "chunk_length": 30, "max_new_tokens": 120, "suppress_tokens": [EOS]}
    try:
        out = search(ids, **settings)
    finally:
        hook.remove()
    assert counts == [40] + [4] * 119
    assert (out.stats.base.forwards, out.stats.base.tokens) == (120, 40 + 4 * 119)
    official = sum(40 + len(one.tokens) for selection in out.tree[0] for one in selection.candidates)
    assert out.stats.pilot.tokens == out.stats.reference.tokens
    assert out.stats.pilot.tokens <= official / 2
    assert out.stats.pilot.forwards == 1 + len(out.tree[0])


def test_the_work_of_a_value_that_serves_many_calls_is_told_for_each() -> None:
    _, tuned, untuned = models()
    ids, counts = random_prompt(0, 5, VOCABULARY), []
    value = wsd_hf.ImplicitValue(tuned, untuned, letters(), [letters().decode(ids[0])])
    hook = fed(tuned, counts)
    try:
        for _ in range(2):
            counts.clear()
            out = search(ids, value=value, chunk_length=2, max_new_tokens=4)
            assert out.stats.pilot.forwards == out.stats.reference.forwards == len(counts)
    finally:
        hook.remove()


def test_base_and_small_models_meet_through_text() -> None:
    other, ids = letters("zyxw"), random_prompt(3, 6, VOCABULARY)
    out = search(ids, assistant_tokenizer=other, beam_width=2, successors=2, chunk_length=4, max_new_tokens=8)
    response = [token for token in out.sequences[0, 6:].tolist() if token != PAD]
    assert out.values.item() == pytest.approx(plain_value(ids, response, tokenizer=other), abs=1e-3)


def test_small_models_may_have_prompts_of_their_own() -> None:
    _, tuned, untuned = models()
    ids, own, other = (random_prompt(seed, 3 + seed, VOCABULARY) for seed in range(3))
    settings = {"beam_width": 1, "successors": 2, "chunk_length": None, "max_new_tokens": 5, "suppress_tokens": [EOS]}
    out = search(ids, assistant_input_ids=own, reference_input_ids=other, **settings)
    response = out.sequences[0, ids.shape[1] :].tolist()
    total = 0.0
    for model, prompt, sign in ((tuned, own, 1), (untuned, other, -1)):
        start = prompt.shape[1]
        log_probs = model(torch.cat([prompt, torch.tensor([response])], dim=1)).logits[0].float().log_softmax(-1)
        total += sign * sum(log_probs[start - 1 + place, token].item() for place, token in enumerate(response))
    assert out.values.item() == pytest.approx(total, abs=1e-3)


def test_models_whose_cache_cannot_be_rewound_give_the_same_values() -> None:
    ids = random_prompt(6, 6, VOCABULARY)
    out = search(ids, small="mamba", beam_width=2, successors=2, chunk_length=3, max_new_tokens=7)
    response = [token for token in out.sequences[0, 6:].tolist() if token != PAD]
    assert out.values.item() == pytest.approx(plain_value(ids, response, small="mamba"), abs=1e-3)


def test_a_response_may_say_what_another_prompt_does() -> None:
    """Then it goes on from where that prompt was read, of which nobody had asked how likely it is."""
    value = wsd_hf.ImplicitValue(*models()[1:], letters(), ["abc", "abcdef"])
    responses = [(0, "defgh"), (1, "gh"), (0, "d")]
    got = value([text for _, text in responses], [False] * 3, [of for of, _ in responses])
    for (of, text), one in zip(responses, got.tolist(), strict=True):
        prompt = torch.tensor([letters().encode(["abc", "abcdef"][of])])
        assert one == pytest.approx(plain_value(prompt, letters().encode(text)), abs=1e-3)


def test_a_value_forgets_what_an_interrupted_reading_left_behind() -> None:
    _, tuned, untuned = models()
    value = wsd_hf.ImplicitValue(tuned, untuned, letters(), ["hello"])
    expected = value(["abcd", "abce"], [False, True])
    forward, value.tuned.model.forward = tuned.forward, None
    with pytest.raises(TypeError):
        value(["abcdef", "xyz"], [False, False])
    value.tuned.model.forward = forward
    torch.testing.assert_close(value(["abcd", "abce"], [False, True]), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beam_width": 0}, "beam_width=0: must be an integer of at least 1"),
        ({"successors": 1.5}, "successors=1.5: must be an integer of at least 1"),
        ({"chunk_length": 0}, "chunk_length=0: must be an integer of at least 1"),
        ({"official_ties": "yes"}, "official_ties='yes': must be True or False"),
        ({"value": 3}, "value=3: must be a function of (texts, ended, of)"),
        ({"tokenizer": None}, "tokenizer=None: strategy='weak_to_strong_search' judges text"),
        ({"assistant_model": None}, "strategy='weak_to_strong_search' needs a pilot: pass assistant_model="),
        (
            {"reference_model": None},
            "needs the small model before its tuning: pass reference_model=",
        ),
        ({"do_sample": False}, "do_sample=False: strategy='weak_to_strong_search' chooses among samples"),
        ({"num_return_sequences": 5}, "num_return_sequences=5: must be at most beam_width=4"),
        ({"output_scores": True, "return_dict_in_generate": True}, "cannot serve this call: output_scores=True was given"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "value": len}, "input_ids is padded on the right"),
        ({"num_beams": 2}, "strategy='weak_to_strong_search' decodes greedily or samples"),
        ({"assistant_tokenizer": letter_tokenizer(70)}, "the tokenizer has 70 tokens, and the tuned model 64"),
        ({"assistant_tokenizer": letter_tokenizer(64)}, "has no EOS token"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2])}, "SynthIDTextWatermarkLogitsProcessor may keep"),
        ({"guidance_scale": 2.0}, "guidance_scale keeps a state of its own"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_is_refused_by_name_before_any_forward(kwargs: dict[str, Any], message: str) -> None:
    base, tuned, untuned = models()
    counts: list[int] = []
    hooks = [fed(model, counts) for model in (base, tuned, untuned)]
    call = {"assistant_model": tuned, "reference_model": untuned, "tokenizer": letters(), "max_new_tokens": 4, **kwargs}
    try:
        with pytest.raises(wsd_hf.WSDValueError) as caught:
            base.generate(random_prompt(0, 5), strategy=STRATEGY, pad_token_id=PAD, **call)
    finally:
        for hook in hooks:
            hook.remove()
    assert message in str(caught.value)
    assert not counts


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("rwkv", {"attention_hidden_size": 32, "num_hidden_layers": 2}),
        ("recurrent_gemma", {"num_attention_heads": 4, "intermediate_size": 48, "lru_width": 32, "num_hidden_layers": 1}),
    ],
)
def test_bases_whose_rows_cannot_be_reordered_are_refused(family: str, sizes: dict[str, int]) -> None:
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, hidden_size=32, eos_token_id=EOS, pad_token_id=PAD, **sizes)
    base, counts = wsd_hf.enable_wsd(AutoModelForCausalLM.from_config(config)), []
    fed(base, counts)
    with pytest.raises(wsd_hf.WSDValueError, match=f"what {type(base).__name__} remembers of a row cannot be reordered"):
        base.generate(random_prompt(0, 4), strategy=STRATEGY, value=lambda *_: [], tokenizer=letters(), max_new_tokens=3)
    assert not counts


def test_logits_and_values_that_are_no_numbers_are_told() -> None:
    _, tuned, untuned = models()
    broken = copy.deepcopy(tuned)
    broken.lm_head.weight.data[7] = float("nan")
    value = wsd_hf.ImplicitValue(broken, untuned, letters(), ["abc"])
    with pytest.raises(wsd_hf.WSDLogitsError, match="the tuned model returned NaN"):
        value(["def"], [True])
    with pytest.raises(wsd_hf.WSDValueError, match=r"^value gave .* for 16 texts: must be as many numbers, none of them NaN"):
        search(random_prompt(0, 4), value=lambda texts, ended, of: [float("nan")] * len(texts), max_new_tokens=3)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("hello", "prompts='hello': must be a list of prompts"),
        ([1, 2], r"prompts=\[1, 2\]: must be a list of prompts"),
        ([[1, 64]], "a prompt contains token id 64, but the vocabulary of the tuned model has 64 tokens"),
        ([[1, -1]], "a prompt contains token id -1"),
        ([""], "a prompt has no tokens"),
        ([], "must be in pairs"),
    ],
)
def test_prompts_that_a_value_cannot_take_are_told(prompts: Any, message: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        wsd_hf.ImplicitValue(*models()[1:], letters(), prompts)


def test_responses_that_belong_to_no_prompt_are_told() -> None:
    value = wsd_hf.ImplicitValue(*models()[1:], letters(), ["abc", "def"])
    for of in ([2], [-1]):
        with pytest.raises(wsd_hf.WSDValueError, match=f"of contains {of[0]}, and the prompts are counted from 0 to 1"):
            value(["a"], [False], of)
    with pytest.raises(wsd_hf.WSDValueError, match="texts, ended and of have 1, 2 and 1 entries"):
        value(["a"], [False, True])
