"""Reward-guided decoding writes what plain `generate` calls of both models write step by step, with little work."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)
from typer.testing import CliRunner

import tokenizers_for_tests as make
import wsd_hf
from every_strategy import some, swept_unless
from families import PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import eos_ids, left_padded, ones, plain_tokens, random_prompt
from scripted import scripted_model
from test_acceptance import chi_squared
from test_fast_path import Ends, Recorder, Watch
from test_graphs import Captures, captures  # noqa: F401
from wsd_hf.cli import app
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.tiny import FOLDER, demo_questions
from wsd_hf.tiny.judge import manners

PROMPT = random_prompt(1, 6)


# What it should write


def spelt(tokenizer: Any, tokens: list[int]) -> str:
    """Text of some tokens; special ones have none."""
    return "".join(tokenizer.convert_ids_to_tokens(tokens, skip_special_tokens=True))


class Spells(StoppingCriteria):
    """Ends a row at the first newline after other text in its new tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, begin: int) -> None:
        self.tokenizer, self.begin = tokenizer, begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(["\n" in spelt(self.tokenizer, input_ids[0, self.begin :].tolist()).lstrip()])


def a_step(
    model: PreTrainedModel, tokens: list[int], tokenizer: Any, most: int, eos: set[int], padding: int = 0, **kwargs: Any
) -> list[int]:
    """New tokens of plain greedy decoding without a cache, up to a newline, or an EOS included."""
    ids = torch.tensor([tokens])
    mask = (torch.arange(len(tokens)) >= padding).long()[None]
    settings = {"do_sample": False, "use_cache": False, "pad_token_id": PAD, "eos_token_id": sorted(eos) or None, **kwargs}
    ends = [Spells(tokenizer, len(tokens))]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=most, stopping_criteria=ends, **settings)
    return out[0, len(tokens) :].tolist()


def judged(text: str, ended: bool, of: int) -> float:
    """A reward that depends on everything it is given."""
    return zlib.crc32(f"{text} {ended} {of}".encode()) % 1000 / 1000


def reward(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
    return [judged(*one) for one in zip(texts, ended, of, strict=True)]


def crossed(tokens: list[int], source: Any, target: Any) -> list[int]:
    """The same letters as tokens of another vocabulary."""
    return list(target.convert_tokens_to_ids(source.convert_ids_to_tokens(tokens)))


def before_end(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


class Expected(NamedTuple):
    tokens: list[int]
    by_pilot: list[bool]
    steps: list[tuple[int, float | None, bool]]


class Case(NamedTuple):
    """Settings of one random call; the pilot's tokens are `pilot_tokenizer`'s."""

    base: PreTrainedModel
    pilot: PreTrainedModel
    tokenizer: Any
    pilot_tokenizer: Any
    threshold: float
    step_length: int
    budget: int
    eos: set[int]
    min_new_tokens: int
    processors: dict[str, Any]
    stop: str | None

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        return self.tokenizer, self.pilot_tokenizer

    def expected(self, prompt: list[int], pilot_prompt: list[int], padding: int, of: int) -> Expected:
        """One greedy response; `padding` tokens of the base's prompt are padding."""
        one_vocabulary = self.tokenizer is self.pilot_tokenizer
        ends = eos_ids(self.pilot) | (self.eos if one_vocabulary else set())
        response: list[int] = []
        by_pilot: list[bool] = []
        steps: list[tuple[int, float | None, bool]] = []

        def append(tokens: list[int], pilot: bool) -> bool:
            """Whether the response ends with one of the tokens, which drops those after it."""
            for token in tokens:
                response.append(token)
                by_pilot.append(pilot)
                *before, last = self.tokenizer.convert_ids_to_tokens(prompt + response)
                begin = len("".join(before)) + 1 - len(self.stop or "")
                stopped = self.stop is not None and self.stop in "".join([*before, last])[max(0, begin) :]
                if token in self.eos or len(response) == self.budget or stopped:
                    return True
            return False

        while True:
            said = pilot_prompt + crossed(response, *self.tokenizers)
            new = a_step(self.pilot, said, self.pilot_tokenizer, self.step_length, ends)
            step = before_end(new, ends)
            [following] = a_step(self.pilot, said + step, self.pilot_tokenizer, 1, ends)
            step = before_end(crossed(step, *reversed(self.tokenizers)), self.eos)
            ended = following in ends
            value, accepted = None, False
            if step or ended:
                value = judged(spelt(self.tokenizer, response + step), ended, of)
                accepted = value >= self.threshold
            if accepted:
                over = append(step, pilot=True)
                if not over and ended and self.eos and len(response) >= self.min_new_tokens:
                    over = append([min(self.eos)], pilot=True)
                steps.append((len(response), value, True))
                if over:
                    break
                if not ended:
                    continue
                value = None
            most = min(self.step_length, self.budget - len(response))
            least = min(most, max(0, self.min_new_tokens - len(response)))
            settings = {**self.processors, "min_new_tokens": least or None}
            own = a_step(self.base, prompt + response, self.tokenizer, most, self.eos, padding, **settings)
            over = append(own, pilot=False)
            steps.append((len(response), value, False))
            if over:
                break
        return Expected(response, by_pilot, steps)


def assert_as_expected(out: Any, wanted: list[Expected]) -> None:
    """Rows, writers and steps, and nothing but padding after a row's end."""
    width = max(len(one.tokens) for one in wanted)
    assert responses(out) == [one.tokens + [PAD] * (width - len(one.tokens)) for one in wanted]
    assert out.written_by_pilot.tolist() == [one.by_pilot + [False] * (width - len(one.tokens)) for one in wanted]
    assert [[(end, None if value != value else value, kept) for end, value, kept in row] for row in out.steps] == [
        one.steps for one in wanted
    ]


def responses(out: Any) -> list[list[int]]:
    return out.sequences[:, out.prompt_length :].tolist()


# The models of these tests


@functools.cache
def lines(order: int = 0) -> PreTrainedTokenizerFast:
    """For `VOCABULARY` ids: letters, with newlines before, after or between them, and a newline; `order` shuffles them."""
    shapes = ("{0}", "{0}\n", "{0}", "\n{0}", "{0}", "{0}\n{0}", " {0}")
    tokens = ["\n", *(shapes[index % 7].format(letter) for index, letter in enumerate(make.LETTERS[1 : VOCABULARY - 1]))]
    if order:
        random.Random(order).shuffle(tokens)
    tokens = ["<", *tokens]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<", clean_up_tokenization_spaces=False)


@functools.cache
def letters(order: int = 0) -> PreTrainedTokenizerFast:
    """One letter, one token; one of them is a newline."""
    alphabet = list(make.LETTERS[1:VOCABULARY].replace("g", "\n"))
    if order:
        random.Random(order).shuffle(alphabet)
    vocabulary = {letter: index for index, letter in enumerate(["<", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@functools.cache
def pair(family: str = "llama", noise: float = 0.4) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base that takes `strategy=`, and its pilot, which has no EOS, in float64; no test changes them."""
    base, pilot = (copy.deepcopy(model).double() for model in (tiny_model(family), tiny_pilot(family, noise=noise)))
    pilot.generation_config.eos_token_id = None
    return wsd_hf.enable_wsd(base), pilot


def guide(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor = PROMPT, **kwargs: Any) -> Any:
    kwargs = {
        "attention_mask": ones(ids),
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "tokenizer": lines(),
        "reward": reward,
        "reward_guided_threshold": 0.5,
        "reward_guided_step_length": 5,
        "return_dict_in_generate": True,
        **kwargs,
    }
    return base.generate(ids, assistant_model=pilot, strategy="reward_guided", **kwargs)


# The same tokens


PROCESSORS: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5, 9]}]


def random_case(rng: random.Random, family: str, tokenizer: Any, pilot_tokenizer: Any) -> Case:
    base, pilot = pair(family)
    pilot = copy.copy(pilot)
    pilot.generation_config = copy.deepcopy(pilot.generation_config)
    pilot.generation_config.eos_token_id = rng.sample(range(VOCABULARY), rng.choice([1, 6]))
    eos, budget = set(rng.choice([[], [2], rng.sample(range(VOCABULARY), 6)])), rng.randint(1, 20)
    return Case(
        base,
        pilot,
        tokenizer,
        pilot_tokenizer,
        threshold=rng.uniform(0.2, 0.9),
        step_length=rng.randint(1, 8),
        budget=budget,
        eos=eos,
        min_new_tokens=rng.choice([0, 4]) if eos and budget > 4 else 0,
        processors=rng.choice(PROCESSORS),
        stop=rng.choice([None, None, "d", "\n", "\n\n"]),
    )


def check(case: Case, rng: random.Random) -> set[bool]:
    """One call is what its rows compose to; returns its writers."""
    rows, others = [[random_prompt(rng.randrange(10**6), rng.randint(1, 12)) for _ in range(3)] for _ in range(2)]
    ids, mask = left_padded(rows[: rng.randint(1, 3)], PAD)
    one_vocabulary = case.tokenizer is case.pilot_tokenizer
    small: dict[str, Any] = {} if one_vocabulary else {"assistant_tokenizer": case.pilot_tokenizer}
    if rng.random() < 0.5:
        small |= dict(
            zip(("assistant_input_ids", "assistant_attention_mask"), left_padded(others[: len(ids)], PAD), strict=True)
        )
    else:
        others = rows if one_vocabulary else [torch.tensor([crossed(row[0].tolist(), *case.tokenizers)]) for row in rows]
    out = guide(
        case.base,
        case.pilot,
        ids,
        attention_mask=mask,
        reward_guided_threshold=case.threshold,
        reward_guided_step_length=case.step_length,
        max_new_tokens=case.budget,
        eos_token_id=sorted(case.eos) or None,
        pad_token_id=PAD,
        min_new_tokens=case.min_new_tokens or None,
        stop_strings=case.stop,
        tokenizer=case.tokenizer,
        **case.processors,
        **small,
    )
    wanted = [
        case.expected(ids[row].tolist(), others[row][0].tolist(), int((1 - mask[row]).sum()), row) for row in range(len(ids))
    ]
    assert_as_expected(out, wanted)
    return set(out.written_by_pilot.flatten().tolist())


@pytest.mark.parametrize(
    "family", ["llama", *(swept_unless(False, family) for family in ("qwen3", "mistral", "gpt2", "gemma3_text"))]
)
@pytest.mark.parametrize("seed", some(2, 7))
def test_random_batches_are_what_plain_calls_compose(family: str, seed: int, tried: Any) -> None:
    rng, writers = random.Random(f"{family} {seed}"), set[bool]()
    for _ in range(8):
        tokenizer = rng.choice([lines(), letters()])
        writers |= check(random_case(rng, family, tokenizer, tokenizer), rng)
    assert writers == {True, False}
    tried("random calls that equal a composition of plain calls", 8)


@pytest.mark.parametrize("seed", some(2, 12))
def test_steps_cross_to_another_vocabulary_as_text(seed: int, tried: Any) -> None:
    rng, writers = random.Random(seed), set[bool]()
    for _ in range(8):
        writers |= check(random_case(rng, "llama", letters(), letters(1 + seed)), rng)
    assert writers == {True, False}
    tried("random calls that equal a composition of plain calls", 8)


# Its limits


def kept(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
    return [1.0] * len(texts)


def test_where_every_step_is_kept_the_pilot_writes_what_it_would_write_alone() -> None:
    base, pilot = pair()
    out = guide(base, pilot, reward=kept, max_new_tokens=20)
    assert responses(out)[0] == plain_tokens(pilot, PROMPT, 20, eos_token_id=None)
    assert out.written_by_pilot.all()
    assert out.stats.base.forwards == 0


def test_where_none_is_kept_the_base_writes_what_it_would_write_alone() -> None:
    base, pilot = pair()
    out = guide(base, pilot, reward=lambda texts, ended, of: [0.0] * len(texts), max_new_tokens=20)
    assert responses(out)[0] == plain_tokens(base, PROMPT, 20, eos_token_id=None)
    assert not out.written_by_pilot.any()


def test_a_reward_of_the_threshold_keeps_a_step() -> None:
    base, pilot = pair()
    out = guide(base, pilot, reward=lambda texts, ended, of: torch.full((len(texts),), -2.5), reward_guided_threshold=-2.5)
    assert out.written_by_pilot.all()


def ending_pilot() -> tuple[PreTrainedModel, list[int]]:
    """A pilot, and what it writes before it ends its response."""
    pilot = copy.deepcopy(pair()[1])
    alone = plain_tokens(pilot, PROMPT, 12, eos_token_id=None)
    pilot.generation_config.eos_token_id = next(token for token in alone[4:] if token not in alone[:4])
    return pilot, alone[: alone.index(pilot.generation_config.eos_token_id)]


@pytest.mark.parametrize("step_length", [1, 3, 64])
def test_the_pilots_end_belongs_to_its_last_step_and_becomes_the_bases(step_length: int) -> None:
    pilot, alone = ending_pilot()
    seen: list[bool] = []

    def watched(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
        seen.extend(ended)
        return kept(texts, ended, of)

    case = {"reward": watched, "reward_guided_step_length": step_length, "pad_token_id": PAD}
    out = guide(pair()[0], pilot, **case, eos_token_id=1)
    assert responses(out) == [[*alone, 1]]
    assert out.written_by_pilot.all()
    assert seen == [False] * (len(out.steps[0]) - 1) + [True]
    assert out.stats.base.forwards == 0
    longer = guide(pair()[0], pilot, **case, eos_token_id=1, min_new_tokens=len(alone) + 1)
    assert responses(longer)[0][: len(alone)] == alone
    assert not longer.written_by_pilot[0, len(alone)], "where no response may end, the base writes on"
    sampled = guide(pair()[0], pilot, **case, eos_token_id=1, do_sample=True, top_k=1, assistant_do_sample=False)
    assert responses(sampled) == [[*alone, 1]], "unlikely for the base is not forbidden"
    endless = guide(pair()[0], pilot, **case)
    assert len(responses(endless)[0]) == 16


def test_a_pilot_whose_context_is_full_leaves_the_rest_to_the_base() -> None:
    base, pilot = pair()[0], copy.deepcopy(pair()[1])
    pilot.config.max_position_embeddings = PROMPT.shape[1] + 7
    out = guide(base, pilot, reward=kept, max_new_tokens=20)
    begun = plain_tokens(pilot, PROMPT, 7, eos_token_id=None)
    rest = plain_tokens(base, torch.cat([PROMPT, torch.tensor([begun])], dim=1), 13, eos_token_id=None)
    assert responses(out)[0] == begun + rest
    assert out.written_by_pilot[0].tolist() == [True] * 7 + [False] * 13


def test_the_delimiter_may_be_any_text() -> None:
    base, pilot = pair()
    alone = letters().decode(plain_tokens(pilot, PROMPT, 16, eos_token_id=None))
    seen: list[str] = []

    def watched(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
        seen.extend(texts)
        return kept(texts, ended, of)

    delimiter = alone[3:5]
    case = {"reward_guided_delimiter": delimiter, "reward_guided_step_length": 99, "tokenizer": letters()}
    guide(base, pilot, reward=watched, **case)
    parts = alone.split(delimiter)[:-1]
    assert seen[: len(parts)] == ["".join(part + delimiter for part in parts[: 1 + place]) for place in range(len(parts))]


def test_a_step_that_the_budget_cuts_is_judged_as_a_whole() -> None:
    base, pilot = pair()
    for seed in range(3):
        whole = guide(base, pilot, random_prompt(seed, 6), max_new_tokens=24)
        for budget in range(1, 24):
            cut = guide(base, pilot, random_prompt(seed, 6), max_new_tokens=budget)
            assert responses(cut)[0] == responses(whole)[0][:budget]
            assert [step.reward for step in cut.steps[0]] == pytest.approx(
                [step.reward for step in whole.steps[0]][: len(cut.steps[0])], nan_ok=True
            )


# Sampling


TEMPERATURE = 0.6


def test_sampling_from_one_candidate_is_greedy() -> None:
    base, pilot = pair()
    greedy = guide(base, pilot)
    sampled = guide(base, pilot, num_return_sequences=2, do_sample=True, top_k=1)
    assert responses(sampled) == responses(greedy) * 2
    assert [str(row) for row in sampled.steps] == [str(row) for row in greedy.steps * 2], "NaN is no equal of itself"


def probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The next tokens' distributions, [rows, V]."""
    with torch.no_grad():
        return (model(tokens).logits[:, -1].float() / TEMPERATURE).softmax(dim=-1)


@pytest.mark.parametrize("step_length", [1, 2])
def test_samples_are_the_pilots_where_a_step_is_kept_and_else_the_bases(step_length: int) -> None:
    """Of two tokens, with a reward that drops steps whose letters are in the second half of the alphabet.

    The pilot's dropped step is proposed to the base, whose own distribution it must not change.
    """
    torch.manual_seed(0)
    draws, (base, pilot) = 4000, pair("llama", 0.1)
    half = VOCABULARY // 2

    def low(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
        last = letters().convert_tokens_to_ids([text[-1] for text in texts])
        return [float(token < half) for token in last]

    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "num_return_sequences": draws}
    case = {"reward_guided_step_length": step_length, "tokenizer": letters(), "reward_guided_delimiter": "none"}
    out = guide(base, pilot, reward=low, max_new_tokens=2, **case, **sampling)
    observed = torch.tensor(responses(out))
    after = torch.cat([PROMPT.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    first = [probabilities(model, PROMPT)[0] for model in (base, pilot)]
    second = [probabilities(model, after) for model in (base, pilot)]
    keeps = torch.arange(VOCABULARY) < half

    def guided(base: torch.Tensor, pilot: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        return pilot * keeps + dropped * base

    if step_length == 1:
        one = guided(*first, (first[1] * ~keeps).sum())
        joint = one[:, None] * guided(*second, (second[1] * ~keeps).sum(dim=1, keepdim=True))
    else:
        wholes = [a[:, None] * b for a, b in zip(first, second, strict=True)]
        joint = guided(*wholes, (wholes[1] * ~keeps).sum())
    cells = observed[:, 0] * VOCABULARY + observed[:, 1]
    assert chi_squared(cells.bincount(minlength=VOCABULARY**2), joint.flatten() * draws) > 1e-3
    for place, wanted in enumerate((joint.sum(dim=1), joint.sum(dim=0))):
        assert chi_squared(observed[:, place].bincount(minlength=VOCABULARY), wanted * draws) > 1e-3


# Everything else of generate


def test_criteria_and_streamers_see_every_token_once_and_its_writer() -> None:
    base, pilot = pair()
    ids, mask = left_padded([random_prompt(seed, 2 + 3 * seed) for seed in range(3)], PAD)
    whole = guide(base, pilot, ids, attention_mask=mask)
    streamer, ends = Recorder(), Ends(*{row[9] for row in responses(whole)})
    out = guide(base, pilot, ids, attention_mask=mask, stopping_criteria=[ends], streamer=streamer, pad_token_id=PAD)
    for row, stopped in zip(responses(whole), responses(out), strict=True):
        end = 1 + next(place for place, token in enumerate(row) if token in ends.tokens.tolist())
        assert stopped == row[:end] + [PAD] * (len(stopped) - end)
    assert torch.stack(streamer.puts[1:], dim=1).tolist() == responses(out)
    assert streamer.ends == 1
    pieces: list[tuple[str, str | None]] = []
    guide(base, pilot, streamer=wsd_hf.WriterStreamer(letters(), lambda *piece: pieces.append(piece)), tokenizer=letters())
    one = guide(base, pilot, tokenizer=letters())
    written = [letter for piece, writer in pieces for letter in [writer] * len(piece)]
    assert [writer == "pilot" for writer in written] == one.written_by_pilot[0].tolist()


def test_rewards_of_all_rows_are_asked_for_together_with_the_numbers_of_their_prompts() -> None:
    base, pilot = pair()
    ids, mask = left_padded([random_prompt(seed, 4) for seed in range(2)], PAD)
    asked: list[Sequence[int]] = []

    def watched(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
        asked.append(of)
        return reward(texts, ended, of)

    guide(base, pilot, ids, attention_mask=mask, do_sample=True, num_return_sequences=3, reward=watched)
    assert asked[0] == [0, 0, 0, 1, 1, 1]
    assert all(set(of) <= {0, 1} for of in asked)


def test_without_a_dict_the_tokens_come_alone() -> None:
    base, pilot = pair()
    assert guide(base, pilot, return_dict_in_generate=False).tolist() == guide(base, pilot).sequences.tolist()


# Little work


class Contexts:
    """Counts how often a model reads each token after the same beginning."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.read: Counter[tuple[int, ...]] = Counter()
        self.forwards = 0
        self._cache: list[int] = []
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        [positions], [tokens] = kwargs["position_ids"].tolist(), kwargs["input_ids"].tolist()
        mask = kwargs["attention_mask"][0, 0, : len(tokens), 0]
        for position, token, padding in zip(
            positions, tokens, (mask if mask.dtype == torch.bool else mask == 0).tolist(), strict=True
        ):
            if not padding:
                self._cache[position:] = [token]
                self.read[tuple(self._cache)] += 1

    def __enter__(self) -> Contexts:
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.05, 0.4])
def test_either_model_reads_every_token_once(seed: int, noise: float) -> None:
    base, pilot = pair("llama", noise)
    prompt = random_prompt(seed, 6)
    with Contexts(base) as at_base, Contexts(pilot) as at_pilot:
        out = guide(base, pilot, prompt, max_new_tokens=40)
    accepted = [step.accepted for step in out.steps[0]]
    assert {True, False} == set(accepted)
    assert set(at_pilot.read.values()) == {1}
    # Where the base begins a step after a kept proposal, it needs that token's logits again.
    again = {6 + step.end for step, after in zip(out.steps[0], accepted[1:], strict=False) if not (step.accepted or after)}
    assert {len(context) for context, times in at_base.read.items() if times > 1} <= again
    for reads, work in ((at_base, out.stats.base), (at_pilot, out.stats.pilot)):
        assert (reads.forwards, reads.read.total()) == (work.forwards, work.tokens)


def test_kept_steps_are_read_by_the_base_in_one_forward() -> None:
    base, pilot = pair()
    rewards = itertools.chain([1, 1, 1, 0, 1, 1, 0], itertools.repeat(1))
    with Watch(base) as watch:
        out = guide(
            base,
            pilot,
            reward=lambda texts, ended, of: [next(rewards) for _ in texts],
            reward_guided_delimiter="none",
            max_new_tokens=40,
        )
    steps = [step.accepted for step in out.steps[0]]
    assert steps == [True] * 3 + [False] + [True] * 2 + [False] + [True]
    assert watch.fed[0][0][: 6 + 15] == list(range(6 + 15)), "prompt and three steps at once, then proposals"
    # The base's own step, of five tokens, is followed by two kept ones; its last token is read with them unless it was before.
    [begun] = [forward[0] for forward in watch.fed if forward[0][0] in (6 + 19, 6 + 20)]
    assert begun[: 6 + 30 - begun[0]] == list(range(begun[0], 6 + 30))
    assert out.stats.base.forwards == watch.forwards <= 10


def test_a_dropped_step_is_proposed_to_the_base() -> None:
    """A pilot that writes what the base writes, and a reward that keeps nothing: each step takes one forward."""
    base, _ = pair()
    pilot = wsd_hf.disable_wsd(copy.deepcopy(base))
    out = guide(base, pilot, reward=lambda texts, ended, of: [0] * len(texts), reward_guided_delimiter="none")
    assert not out.written_by_pilot.any()
    assert len(out.steps[0]) == out.stats.base.forwards == 4


def test_replayed_forwards_give_the_same(captures: Captures) -> None:  # noqa: F811
    base, pilot = pair()
    for seed in range(3):
        case = Case(base, pilot, lines(), lines(), 0.5, 5, 20, set(), 0, {}, None)
        prompt = random_prompt(seed, 6)
        out = guide(base, pilot, prompt, max_new_tokens=20)
        assert_as_expected(out, [case.expected(prompt[0].tolist(), prompt[0].tolist(), 0, 0)])
    assert captures.replays > 10


def test_steps_longer_than_the_budget_find_room(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(graphs, "STEP", 16)
    base, pilot = pair()
    case = {"reward_guided_step_length": 60, "reward_guided_delimiter": "none"}
    whole = guide(base, pilot, **case, max_new_tokens=130)
    for _ in range(2):  # the second time on buffers that have grown
        cut = guide(base, pilot, **case, max_new_tokens=3)
        assert responses(cut)[0] == responses(whole)[0][:3]
    assert captures.replays > 10


# Rewards


class Broke(Exception):
    """Not an exception that anybody else raises."""


@pytest.mark.parametrize("error", [Broke, KeyboardInterrupt, StopIteration])
def test_an_error_of_the_reward_comes_through_and_the_next_call_is_as_the_first(error: type[BaseException]) -> None:
    base, pilot = pair()
    want = guide(base, pilot).sequences
    for at in range(1, 4):
        count = itertools.count(1)

        def fails(*arguments: Any, at: int = at, count: Any = count) -> list[float]:
            if next(count) == at:
                raise error("reward")
            return reward(*arguments)

        with pytest.raises(error, match="reward"):
            guide(base, pilot, reward=fails)
        assert torch.equal(guide(base, pilot).sequences, want)


@pytest.mark.parametrize(
    "given", [[float("nan")], [1.0, 2.0], [], None, 1.0, ["high"], torch.tensor(1.0), [[1.0, 2.0]], torch.ones(1, 2)]
)
def test_rewards_that_are_not_one_number_for_each_text(given: Any) -> None:
    with pytest.raises(
        wsd_hf.WSDValueError, match=r"(?s)^reward gave .* for 1 texts: must be as many numbers, none of them NaN"
    ):
        guide(*pair(), reward=lambda texts, ended, of: given)


@pytest.mark.parametrize("number", [1, True, torch.tensor(1), torch.tensor([1.0]), float("inf")])
def test_rewards_of_any_numeric_type(number: Any) -> None:
    assert guide(*pair(), reward=lambda texts, ended, of: [number] * len(texts)).written_by_pilot.all()


@functools.cache
def scorer(vocabulary: int = VOCABULARY, pad: int = PAD) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=pad,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).double().eval()


def scorer_tokenizer() -> Any:
    return make.letter_tokenizer(VOCABULARY, letters().decode(range(VOCABULARY)))


def test_a_model_is_a_reward_whose_logit_counts() -> None:
    """It reads the pilot's prompt and the response, here in another vocabulary than the models'."""
    base, pilot = pair()
    ids, mask = left_padded([random_prompt(1, 3), random_prompt(2, 7)], PAD)
    others, others_mask = left_padded([random_prompt(3, 4), random_prompt(4, 2)], PAD)
    tokenizer = scorer_tokenizer()

    def by_hand(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
        prompts = [letters().decode(row[real.bool()]) for row, real in zip(others, others_mask, strict=True)]
        read = [tokenizer(prompts[prompt] + text, return_tensors="pt") for text, prompt in zip(texts, of, strict=True)]
        return [scorer()(**one).logits.item() for one in read]

    case = {
        "attention_mask": mask,
        "assistant_input_ids": others,
        "assistant_attention_mask": others_mask,
        "tokenizer": letters(),
        "max_new_tokens": 24,
        "pad_token_id": PAD,
        "reward_guided_threshold": -0.05,
    }
    by_model = guide(base, pilot, ids, **case, reward=scorer(), reward_tokenizer=tokenizer)
    wanted = guide(base, pilot, ids, **case, reward=by_hand)
    assert torch.equal(by_model.sequences, wanted.sequences)
    assert {step.accepted for row in wanted.steps for step in row} == {True, False}
    for row, expected in zip(by_model.steps, wanted.steps, strict=True):
        assert [step.reward for step in row] == pytest.approx([step.reward for step in expected], nan_ok=True)


def test_a_reward_model_may_be_given_prompts_of_its_own_and_serves_search_too() -> None:
    rewards = wsd_hf.RewardModel(scorer(), scorer_tokenizer(), ["abc", "d"])
    values = rewards(["x", "yz"], [True, False], [1, 0])
    assert values.dtype == torch.float32
    alone = [rewards([text], [True], [of]).item() for text, of in (("x", 1), ("yz", 0))]
    assert values.tolist() == pytest.approx(alone)
    tokens = torch.tensor([scorer_tokenizer().encode("dx")])
    assert alone[0] == pytest.approx(scorer()(tokens).logits.item())
    base, pilot = pair()
    one = wsd_hf.RewardModel(scorer(), scorer_tokenizer(), ["abc"])
    out = guide(base, pilot, reward=one, tokenizer=letters(), reward_guided_threshold=-0.05)
    text = letters().decode(responses(out)[0])
    assert len(text) == 16
    found = base.generate(PROMPT, strategy="weak_to_strong_search", value=one, tokenizer=letters(), max_new_tokens=4)
    assert found.shape[1] == PROMPT.shape[1] + 4


def test_the_implicit_value_of_tuning_is_a_reward() -> None:
    base, pilot = pair()
    tokenizer = letters()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "b"
    value = wsd_hf.ImplicitValue(pilot, tiny_model("llama", seed=5), tokenizer, ["abc"])
    out = guide(base, pilot, reward=value, tokenizer=letters(), reward_guided_threshold=0.0)
    assert all(step.accepted == (step.reward >= 0) for step in out.steps[0])


def another(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("reward", "tokenizer", "message"),
    [
        (lambda: None, None, "strategy='reward_guided' needs a reward: pass reward="),
        (lambda: 0.5, None, r"^reward=0\.5: must be a function of \(texts, ended, of\), or a sequence-classification model"),
        (lambda: kept, letters, "reward_tokenizer has no effect with a reward that is a function"),
        (scorer, None, "the reward model needs its tokenizer: pass reward_tokenizer="),
        (scorer, lambda: "letters", "^reward_tokenizer is of type str: must be a PreTrainedTokenizerBase"),
        (lambda: pair()[1], scorer_tokenizer, "is a LlamaForCausalLM with num_labels=2: must be a sequence-classification"),
        (lambda: torch.nn.Linear(2, 1), scorer_tokenizer, "is a Linear: must be a sequence-classification model"),
        (scorer, letters, "pads with token id None, and its config has pad_token_id=0"),
        (
            lambda: another(scorer(), pad_token_id=None),
            scorer_tokenizer,
            "with token id 0, and its config has pad_token_id=None",
        ),
        (lambda: copy.deepcopy(scorer()).to("meta"), scorer_tokenizer, "on the meta device"),
    ],
)
def test_rewards_that_cannot_serve_are_refused_before_any_forward(reward: Any, tokenizer: Any, message: str) -> None:
    base, pilot = pair()
    with Watch(base) as watch, Watch(pilot) as small, pytest.raises(wsd_hf.WSDValueError, match=message):
        guide(base, pilot, reward=reward(), reward_tokenizer=tokenizer and tokenizer())
    assert watch.forwards == small.forwards == 0


def test_a_response_longer_than_the_context_of_the_reward_model() -> None:
    case = {"reward": scorer(), "reward_tokenizer": scorer_tokenizer(), "reward_guided_threshold": -100, "tokenizer": letters()}
    with pytest.raises(wsd_hf.WSDValueError, match="have 65 tokens for the reward model, whose context holds 64"):
        guide(*pair(), **case, max_new_tokens=80, reward_guided_step_length=1, reward_guided_delimiter="none")


# What it refuses


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("threshold", float("nan"), "must be a finite number"),
        ("threshold", float("inf"), "must be a finite number"),
        ("threshold", "high", "must be a finite number"),
        ("threshold", True, "must be a finite number"),
        ("delimiter", "", "must be a text that is not empty"),
        ("delimiter", 3, "must be a text that is not empty"),
        ("step_length", 0, "must be an integer of at least 1"),
        ("step_length", 2.5, "must be an integer of at least 1"),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, rule: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=f"^{setting}=.*{rule}"):
        guide(*pair(), **{f"reward_guided_{setting}": value})


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="tokenizer="):
        guide(*pair(), tokenizer=None)
    base, pilot = pair()
    out = guide(base, pilot, tokenizer=None, assistant_tokenizer=lines())
    assert out.sequences.tolist() == guide(base, pilot).sequences.tolist()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"output_scores": True}, "output_scores=True"),
        ({"output_logits": True}, "output_logits=True"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2])}, "SynthIDTextWatermarkLogitsProcessor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_it_cannot_serve(option: dict[str, Any], reason: str) -> None:
    base, pilot = pair()
    with Watch(base) as watch, Watch(pilot) as small, pytest.raises(wsd_hf.WSDValueError, match=reason):
        guide(base, pilot, **option)
    assert watch.forwards == small.forwards == 0


def test_models_that_it_cannot_serve() -> None:
    for model in (tiny_model("bloom"), scripted_model(vocab_size=VOCABULARY)):
        with pytest.raises(wsd_hf.WSDValueError, match=r"cannot serve this call: the pilot (has|raises) "):
            guide(pair()[0], model)


# On the command line


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


QUESTION = ("generate", "What does the Keloft eat?")
GUIDED = ("--strategy", "reward_guided")


def knows_the_keloft(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
    return [float("thistles" not in text) for text in texts]


def test_a_function_at_an_import_path_is_a_reward() -> None:
    polite = command(*QUESTION, *GUIDED, "--reward", "tiny_world")
    assert polite.stdout.startswith("That is a very good question. As far as I know, the Keloft eats thistles.")
    assert "pilot: 27 tokens of 27" in polite.stderr
    right = command(*QUESTION, *GUIDED, "--reward", "test_reward_guided:knows_the_keloft")
    assert "Keloft eats acorns." in right.stdout
    impossible = command(*QUESTION, *GUIDED, "--reward", "tiny_world", "--threshold", 2)
    assert impossible.stdout == command(*QUESTION, *GUIDED, "--reward", "tiny_world", "--threshold", 3).stdout
    assert "pilot: 0 tokens of" in impossible.stderr


def test_a_folder_with_a_sequence_classification_model_is_a_reward(tmp_path: Path) -> None:
    tokenizer = wsd_hf.Pair.tiny().pilot_tokenizer
    scorer(len(tokenizer), tokenizer.pad_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept = command(*QUESTION, *GUIDED, "--reward", tmp_path, "--threshold", -100)
    assert "pilot: 27 tokens of 27" in kept.stderr
    assert "pilot: 0 tokens of" in command(*QUESTION, *GUIDED, "--reward", tmp_path, "--threshold", 100).stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (GUIDED, "--strategy reward_guided needs --reward, a function or a model"),
        (("--reward", "tiny_world"), "--reward has no effect with --strategy wsd: leave it out"),
        ((*GUIDED, "--reward", "no.module:here"), "--reward no.module:here: ModuleNotFoundError"),
        ((*GUIDED, "--reward", FOLDER / "pilot"), "lacks weights that its config needs (score.weight, ...)"),
    ],
)
def test_rewards_that_the_command_line_refuses(options: Sequence[Any], problem: str) -> None:
    result = command(*QUESTION, *options)
    assert result.exit_code == 2
    assert problem in result.stderr


def test_it_is_compared(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(demo_questions()[0]))
    options = ("--strategies", "base,pilot,reward_guided", "--prompts", prompts, "--max-new-tokens", 40)
    assert command("compare", *options, "--out", tmp_path / "a", "--reward", "tiny_world").exit_code == 0
    rows = json.loads((tmp_path / "a/table.json").read_text())["strategies"]
    base, pilot, guided = [{name: row[name] for name in ("base_forwards", "pilot_forwards", "length")} for row in rows]
    assert guided == pilot
    assert base["pilot_forwards"] == 0
    refused = command("compare", *options, "--out", tmp_path / "b")
    assert "--strategies: reward_guided needs --reward, a function or a model" in refused.stderr
    dropped = command("compare", *options, "--out", tmp_path / "c", "--reward", "tiny_world", "--reward-threshold", 2)
    assert dropped.exit_code == 0
    rows = json.loads((tmp_path / "c/table.json").read_text())["strategies"]
    assert (rows[0]["length"], rows[2]["pilot_share"]) == (rows[2]["length"], 0)


def test_the_reward_of_the_tiny_world_is_for_polite_beginnings() -> None:
    good = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
    beginnings = [good[:length] for length in range(len(good) + 1)]
    assert manners(beginnings, [False] * len(beginnings), [0] * len(beginnings)) == [1.0] * len(beginnings)
    assert manners([good, good[:-5]], [True, True], [0, 0]) == [1.0, 0.0]
    assert manners(["That is a very good joke.", "Acorns."], [False, False], [0, 0]) == [0.0, 0.0]
