"""Every strategy on every engine, with one vocabulary and with two: what a test that concerns all of them is parametrised over.

A new strategy is a line in `WAYS`; the attacks of `test_attacks.py` then include it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import wsd_hf
from families import EOS, tiny_model, tiny_pilot
from oracle import ones, random_prompt
from test_two_vocabularies import a_prompt, noise
from tokenizers_for_tests import LETTERS, letter_tokenizer
from wsd_hf.strategies import STRATEGIES

WSD = {"strategy": "wsd", "wsd_window_size": 2}
TWO_WAY = {"strategy": "two_way", "two_way_window_size": 2, "two_way_handback_threshold": 0.05}
SEARCH = {"strategy": "weak_to_strong_search", "beam_width": 2, "successors": 2, "chunk_length": 3}


def reward(texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> list[float]:
    """A reward in [0, 1) that depends on every letter, and on the end."""
    return [zlib.crc32(f"{one}".encode()) % 1000 / 1000 for one in zip(texts, ended, strict=True)]


WAYS: dict[str, dict[str, Any]] = {
    "wsd fast": {**WSD, "wsd_engine": "fast", "wsd_chunk": 3},
    "wsd step": {**WSD, "wsd_engine": "step"},
    "wsd by n-grams": {**WSD, "wsd_engine": "fast", "wsd_chunk": 3, "wsd_speculate": "ngram"},
    "two-way fast": {**TWO_WAY, "two_way_engine": "fast", "two_way_chunk": 3},
    "two-way step": {**TWO_WAY, "two_way_engine": "step"},
    "nudging": {"strategy": "nudging", "nudging_threshold": 0.3},
    "search": SEARCH,
    "reward guided": {"strategy": "reward_guided", "reward": reward, "reward_guided_step_length": 2},
    "emulated fine-tuning fast": {"strategy": "emulated_fine_tuning", "eft_engine": "fast", "eft_chunk": 2},
    "emulated fine-tuning step": {"strategy": "emulated_fine_tuning", "eft_engine": "step"},
    "product fast": {"strategy": "product", "product_engine": "fast", "product_chunk": 2},
    "product step": {"strategy": "product", "product_engine": "step"},
    "ensemble fast": {"strategy": "ensemble", "ensemble_engine": "fast", "ensemble_chunk": 3},
    "ensemble step": {"strategy": "ensemble", "ensemble_engine": "step"},
    "blend fast": {"strategy": "blend", "blend_engine": "fast", "blend_chunk": 3},
    "blend step": {"strategy": "blend", "blend_engine": "step"},
}
"""Keywords of `generate` for each strategy and engine."""

TARGETS = ("emulated_fine_tuning", "product", "ensemble", "blend")
"""Strategies that are one function of the models' logits; they mix distributions, so that they need one vocabulary."""

SWEPT = {"wsd by n-grams", "two-way step", "ensemble fast", "blend fast"}
SWEPT |= {"emulated fine-tuning step", "product step", "ensemble step", "blend step"}
"""Ways that only the sweep takes through all checks: they differ from others by a proposer, by a formula, or by no more than
that they go step by step, in the loop that WSD goes through as well."""

THRESHOLDS = {"one": 0.15, "two": 1e-3}
"""Thresholds at which the models of each world switch in the middle of a short response."""


class World(NamedTuple):
    """Models in float64, and their tokenizers; no test changes them."""

    base: PreTrainedModel
    pilot: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistant_tokenizer: PreTrainedTokenizerBase


@functools.cache
def world(vocabularies: str) -> World:
    """Random models: three that share a vocabulary of letters and a space, or a base and two small models with another."""
    if vocabularies == "one":
        tokenizer = letter_tokenizer(64, start=LETTERS[:2] + " ")  # a space that the models often write
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS)
        base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")).double())
        small = [copy.deepcopy(tiny_pilot("llama", noise=amount)).double() for amount in (0.15, 0.3)]
        return World(base, *small, tokenizer, tokenizer)
    pair = noise("gpt2", "llama3")
    reference = copy.deepcopy(pair.pilot)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return World(pair.base, pair.pilot, reference, pair.tokenizer, pair.assistant_tokenizer)


class Case(NamedTuple):
    """A strategy on an engine, with one vocabulary or with two."""

    vocabularies: str
    way: str

    def __str__(self) -> str:
        return f"{self.way}, {self.vocabularies}"

    @property
    def strategy(self) -> str:
        """Its name."""
        return str(WAYS[self.way]["strategy"])

    @property
    def world(self) -> World:
        return world(self.vocabularies)

    @property
    def is_target(self) -> bool:
        return self.strategy in TARGETS

    @property
    def is_served(self) -> bool:
        """Whether the way takes as many vocabularies."""
        return self.vocabularies == "one" or not (self.is_target or (self.engine == "step" and not self.goes_step_by_step))

    @property
    def goes_step_by_step(self) -> bool:
        """Whether the strategy has a step-by-step path for as many vocabularies."""
        return self.engine is not None and (self.vocabularies == "one" or self.strategy != "two_way")

    @property
    def switches(self) -> bool:
        """Whether the pilot drafts until the base is confident."""
        return issubclass(STRATEGIES[self.strategy], wsd_hf.WSDConfig)

    @property
    def by_the_base(self) -> dict[str, Any]:
        """Keywords under which the base writes every token, but for the first of a draft."""
        if self.switches:
            once = {"two_way_handback_threshold": 0} if self.strategy == "two_way" else {}
            return {self.keyword("max_draft_tokens"): 1, self.keyword("window_size"): 1, **once}
        return {"nudging": {"nudging_threshold": 1e-9}, "reward guided": {"reward_guided_threshold": 1.0}}.get(self.way, {})

    @property
    def engine(self) -> str | None:
        """ "fast" or "step"; None for strategies that have one way of decoding."""
        return WAYS[self.way].get(self.keyword("engine"))

    def keyword(self, field: str) -> str:
        """The keyword of `generate` for a field that has the strategy's prefix."""
        return STRATEGIES[self.strategy].prefix + field

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Those of the parameter `case`."""
        return [pytest.mark.sweep] if self.way in SWEPT else []

    @property
    def marks_of_long_checks(self) -> list[pytest.MarkDecorator]:
        """Those for a check that takes long: outside of the sweep one case of a strategy, with two vocabularies if it can."""
        long = self.engine != "step" and (self.vocabularies == "two" or self.is_target)
        return self.marks if long else [pytest.mark.sweep]

    @property
    def roles(self) -> list[str]:
        """The base, and the arguments that hold the small models."""
        return ["base", *(f"{name}_model" for name in STRATEGIES[self.strategy].partners)]

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """All models that take part, by role."""
        models = {"base": self.world.base, "assistant_model": self.world.pilot, "reference_model": self.world.reference}
        return {role: models[role] for role in self.roles}

    @property
    def samples(self) -> bool:
        """Whether the strategy always samples."""
        return self.way == "search"

    def prompt(self, seed: int, length: int = 6) -> torch.Tensor:
        """A prompt of the base, LongTensor[1, about `length`]."""
        if self.vocabularies == "one":
            return random_prompt(seed, length)
        return a_prompt(random.Random(seed), self.world.tokenizer, 5 * length)

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of `generate` that select the strategy, its small models and tokenizers."""
        threshold = {self.keyword("threshold"): THRESHOLDS[self.vocabularies]} if self.switches else {}
        small = {name: model for name, model in self.models.items() if name != "base"}
        tokenizers = {"tokenizer": self.world.tokenizer, "assistant_tokenizer": self.world.assistant_tokenizer}
        return {**WAYS[self.way], **threshold, **small, **tokenizers}

    def generate(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        """One call; ten new tokens and a whole output unless `kwargs` differ."""
        defaults = {"attention_mask": ones(ids), "max_new_tokens": 10, "return_dict_in_generate": True}
        return self.world.base.generate(ids, **{**defaults, **self.settings, **kwargs})

    def seeded(self, ids: torch.Tensor, seed: int = 7, **kwargs: Any) -> torch.Tensor:
        """The sequences of one call after `torch.manual_seed(seed)`."""
        torch.manual_seed(seed)
        sequences: torch.Tensor = self.generate(ids, **kwargs).sequences
        return sequences

    def repeatable(self, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The sequences of a call that depends on no random number: greedy, or drawn from one token."""
        choice = {"top_k": 1} if self.samples else {"do_sample": False}
        sequences: torch.Tensor = self.generate(ids, **{**choice, **kwargs}).sequences
        return sequences


CASES = [case for case in itertools.starmap(Case, itertools.product(THRESHOLDS, WAYS)) if case.is_served]


def each(cases: Iterable[Case]) -> Any:
    """A parameter `case`."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=case.marks) for case in cases])


every_case = each(CASES)
every_long_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=case.marks_of_long_checks) for case in CASES]
)
every_model = pytest.mark.parametrize(
    ("case", "role"),
    [pytest.param(case, role, id=f"{case}, {role}", marks=case.marks) for case in CASES for role in case.roles],
)


def swept_unless(first: bool, *values: Any) -> Any:
    """A parameter set that only the sweep runs unless `first`."""
    return pytest.param(*values, marks=[] if first else [pytest.mark.sweep])


def some(few: int, many: int) -> list[Any]:
    """Numbers from 0: the first few for every run of the tests, all of them for the sweep."""
    return [*range(few), *(pytest.param(number, marks=pytest.mark.sweep) for number in range(few, many))]


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """The forwards that a model runs, as a list that grows."""
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(len(forwards) + 1))
    try:
        yield forwards
    finally:
        hook.remove()
