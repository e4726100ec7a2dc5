"""Reward-guided decoding writes what plain `generate` calls of both models write step by step, with little work."""

from __future__ import annotations

import copy
import functools
import random
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

import tokenizers_for_tests as make
import wsd_hf
from every_strategy import some
from families import PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import eos_ids, left_padded, ones, random_prompt

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
            """Whether the response ends with one of the tokens."""
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
            left = self.budget - len(response)
            most = min(self.step_length, left)
            said = pilot_prompt + crossed(response, *self.tokenizers)
            new = a_step(self.pilot, said, self.pilot_tokenizer, most, ends)
            step = before_end(new, ends)
            [following] = a_step(self.pilot, said + step, self.pilot_tokenizer, 1, ends)
            step = before_end(crossed(step, *reversed(self.tokenizers)), self.eos)
            ended = following in ends and len(step) < left
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
    """A base that takes `strategy=`, and its pilot, in float64; no test changes them."""
    base, pilot = (copy.deepcopy(model).double() for model in (tiny_model(family), tiny_pilot(family, noise=noise)))
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("seed", some(1, 7))
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
