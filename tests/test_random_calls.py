"""Whatever is asked of a strategy, its responses are those of its slow oracle, and sampled ones have its distribution."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria

import slow_decoding as slow
import wsd_hf
from every_strategy import SWEPT, WAYS, some
from families import EOS, PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import left_padded, random_prompt
from slow_decoding import Reader, Rule
from test_acceptance import chi_squared
from test_fast_path import Ends, tiny
from test_nudging import spaced_tokenizer
from wsd_hf.strategies import STRATEGIES

FAMILIES = {
    "llama": "llama",
    "gpt2": "gpt2",  # learned positions
    "mistral": "mistral",  # sliding windows
    "qwen3": "qwen3",
    "gemma3_text": "gemma3_text",
    "bamba": "bamba",  # a state that can't be rewound to any length
    "qwen3_5_text": "mamba",
}
"""Families of the base, and of its small models."""

UNPADDED = ("bamba", "qwen3_5_text")
"""Families whose own kernels see padding."""

CALLS = 10
"""Calls of one test."""


class Models(NamedTuple):
    """Models with one vocabulary; no test changes them."""

    base: PreTrainedModel
    assistant: PreTrainedModel
    reference: PreTrainedModel

    def small(self, strategy: str) -> dict[str, PreTrainedModel]:
        """The small models that a strategy takes, by the names of their arguments."""
        return {f"{role}_model": getattr(self, role) for role in STRATEGIES[strategy].partners}


@functools.cache
def in_float64(family: str, noise: float) -> Models:
    """A base that takes `strategy=`, a pilot that disagrees with it more or less, and a reference."""
    small = FAMILIES[family]
    parts = tiny_model(family), tiny_pilot(small, noise=noise), tiny_pilot(small, noise=0.3)
    base, pilot, reference = (copy.deepcopy(model).double() for model in parts)
    return Models(wsd_hf.enable_wsd(base), pilot, reference)


class Row(NamedTuple):
    """One row of a call: its readers, the keywords of the strategy, and the base's EOS ids."""

    readers: list[Reader]
    """Of the base and of the small models that the strategy takes."""
    own: dict[str, Any]
    eos: set[int]

    @property
    def ends(self) -> set[int]:
        """Tokens at which the pilot ends."""
        return self.eos | {EOS}


class Oracle(NamedTuple):
    own: Callable[[random.Random], dict[str, Any]]
    """Random keywords of the strategy."""
    rule: Callable[[Row], Rule]
    sampled: dict[str, Any] | None
    """Keywords under which models of five tokens do all that they can do in three tokens; None: tokens are no plain draws."""


def of_formula(own: Callable[[random.Random], dict[str, Any]], formula: Callable[..., slow.Formula]) -> Oracle:
    """The oracle of a strategy that is a formula with one parameter."""
    return Oracle(own, lambda row: slow.OfFormula(formula(*row.own.values()), *row.readers), own(random.Random(1)))


SWITCH_THRESHOLDS = {
    "confidence": (0.05, 0.6),
    "relative_confidence": (0.1, 0.8),
    "entropy": (1.0, 3.5),
    "agreement": (0.2, 1.0),
}
"""Bounds of the thresholds of switch rules."""


def wsd_settings(rng: random.Random, prefix: str = "wsd_") -> dict[str, Any]:
    rule = rng.choice(list(SWITCH_THRESHOLDS))
    settings = {
        "threshold": rng.uniform(*SWITCH_THRESHOLDS[rule]),
        "window_size": rng.randint(1, 5),
        "ignore_repeats": rng.random() < 0.5,
        "max_draft_tokens": rng.choice([5, 9, 512]),
        "draft_end": rng.choice(["continue", "stop"]),
    }
    return {"switch_criteria": rule, **{prefix + name: value for name, value in settings.items()}}


def two_way_settings(rng: random.Random) -> dict[str, Any]:
    return {**wsd_settings(rng, "two_way_"), "two_way_handback_threshold": 10 ** rng.uniform(-3, 0)}


def drafting(row: Row) -> Rule:
    prefix = "two_way_" if "two_way_handback_threshold" in row.own else "wsd_"
    own = {name.removeprefix(prefix): value for name, value in row.own.items()}

    def switch_after(response: list[int]) -> slow.Switch:
        prompt = [*row.readers[0].prompt, *response] if own["ignore_repeats"] else None
        return slow.switch_rule(own["switch_criteria"], own["threshold"], own["window_size"], prompt)

    closing = min(row.eos, default=None) if own["draft_end"] == "stop" else None
    arguments = (*row.readers, row.ends, switch_after([]), own["max_draft_tokens"], closing)
    if "handback_threshold" not in own:
        return slow.Drafting(*arguments)
    handback = {"handback": own["handback_threshold"], "window": own["window_size"]}
    return slow.TwoWay(*arguments, **handback, switch_after=switch_after)


ORACLES: dict[str, Oracle] = {
    "wsd": Oracle(
        wsd_settings,
        drafting,
        {
            "switch_criteria": "confidence",
            "wsd_threshold": 0.22,
            "wsd_window_size": 1,
            "wsd_ignore_repeats": False,
            "wsd_max_draft_tokens": 2,
            "wsd_draft_end": "continue",
        },
    ),
    "two_way": Oracle(
        two_way_settings,
        drafting,
        {
            "switch_criteria": "confidence",
            "two_way_threshold": 0.22,
            "two_way_window_size": 1,
            "two_way_ignore_repeats": False,
            "two_way_max_draft_tokens": 1,
            "two_way_draft_end": "continue",
            "two_way_handback_threshold": 0.2,
        },
    ),
    "nudging": Oracle(
        lambda rng: {"nudging_threshold": rng.uniform(0.2, 0.9)},
        lambda row: slow.Nudging(*row.readers, row.ends, row.eos, row.own["nudging_threshold"], spaced_tokenizer()),
        None,  # the token that shows a word's end is drawn, and then written only if the pilot goes on
    ),
    "emulated_fine_tuning": of_formula(lambda rng: {"beta": rng.uniform(-1, 2)}, slow.emulated_fine_tuning),
    "product": of_formula(lambda rng: {"product_alpha": rng.uniform(0, 2)}, slow.product),
    "ensemble": of_formula(lambda rng: {"ensemble_weight": rng.uniform(0.1, 0.9)}, slow.ensemble),
    "blend": of_formula(lambda rng: {"blend_threshold": rng.uniform(0.1, 0.9)}, slow.blend),
}
"""By the name of the strategy. Search draws its samples, and steps are judged as a whole: their tests have slow oracles of
their own."""


def strategy_of(way: str) -> str:
    return str(WAYS[way]["strategy"])


WAYS_WITH_ORACLES = [way for way in WAYS if strategy_of(way) in ORACLES]


# Greedy


class RandomCall:
    """Arguments of a call, drawn at random, and what its rows should be.

    Attributes:
        shared: keywords of plain `generate`.
        own: keywords of the strategy.
        copies: rows for each prompt.
    """

    def __init__(self, way: str, family: str, rng: random.Random) -> None:
        self.strategy = strategy_of(way)
        self.shared = shared_settings(rng)
        self.own = ORACLES[self.strategy].own(rng)
        for name in self.own:
            if self.shared["eos_token_id"] is None and name.endswith("draft_end"):
                self.own[name] = "continue"
        self.copies = rng.choice([1, 1, 1, 2])
        self._engine = engine_settings(rng, way)
        self._models = in_float64(family, rng.choice([0.05, 0.2, 0.4]))
        self._prompts = random_prompts(rng, padded=family not in UNPADDED)
        self._ids, self._mask = left_padded(self._prompts["base"], PAD)

    def run(self) -> Any:
        """The strategy's output."""
        prompts: dict[str, torch.Tensor] = {}
        for role in STRATEGIES[self.strategy].partners:
            prompts[f"{role}_input_ids"], prompts[f"{role}_attention_mask"] = left_padded(self._prompts[role], PAD)
        one_candidate = {"do_sample": True, "top_k": 1, "num_return_sequences": self.copies}
        choice = one_candidate if self.copies > 1 else {"do_sample": False}
        settings = {"tokenizer": spaced_tokenizer(), "return_dict_in_generate": True, **choice, **self._engine}
        return self._models.base.generate(
            self._ids,
            attention_mask=self._mask,
            strategy=self.strategy,
            **self._models.small(self.strategy),
            **prompts,
            **self.shared,
            **self.own,
            **settings,
        )

    def expected(self, row: int, ahead: list[int]) -> tuple[list[int], list[bool] | None]:
        """A row's response and its writers; `ahead` is a response that it probably is."""
        at = row // self.copies
        readers = [
            Reader(getattr(self._models, role), self._prompts[role][at][0].tolist(), ahead)
            for role in ("base", *STRATEGIES[self.strategy].partners)
        ]
        rule = ORACLES[self.strategy].rule(Row(readers, self.own, set(self.shared["eos_token_id"] or ())))
        ids, mask = self._ids[at : at + 1], self._mask[at : at + 1]
        return slow.slow_response(self._models.base, ids, mask, rule, **with_criteria(self.shared)), rule.by_pilot


def random_prompts(rng: random.Random, padded: bool) -> dict[str, list[torch.Tensor]]:
    """Prompts of each model, each [1, prompt]; often those of the base for all of them."""
    count = rng.randint(1, 3)

    def rows() -> list[torch.Tensor]:
        length = rng.randint(1, 12)
        return [random_prompt(rng.randrange(10**6), rng.randint(1, 12) if padded else length) for _ in range(count)]

    prompts = {"base": rows()}
    for role in ("assistant", "reference"):
        prompts[role] = rows() if rng.random() < 0.3 else prompts["base"]
    return prompts


def shared_settings(rng: random.Random) -> dict[str, Any]:
    budget = rng.randint(1, 16)
    eos = rng.choice([None, [EOS], rng.sample(range(3, VOCABULARY), 5), rng.sample(range(3, VOCABULARY), 12)])
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[token] for token in range(20, 30)] + [[31, 32]]},
        {"suppress_tokens": [7, 8, 9]},
    ]
    if eos is not None:  # else transformers lets a row that has ended write on until the others have
        texts = spaced_tokenizer().convert_ids_to_tokens(rng.sample(range(3, VOCABULARY), 8))
        options += [{"stop_strings": [*texts[:5], "".join(texts[5:7])]}]
        options += [{"stopping_criteria": [Ends(*rng.sample(range(3, VOCABULARY), 6))]}]
        options += [{"min_new_tokens": min(4, budget)}]
    settings: dict[str, Any] = {"max_new_tokens": budget, "eos_token_id": eos, "pad_token_id": PAD}
    for option in options:
        if rng.random() < 0.25:
            settings |= option
    return settings


def engine_settings(rng: random.Random, way: str) -> dict[str, Any]:
    """The engine of a way, and how much it proposes at a time."""
    known = {name: value for name, value in WAYS[way].items() if name.endswith("_engine")}
    if "fast" not in known.values():
        return known
    prefix = next(iter(known)).removesuffix("engine")
    chunk, speculate = rng.choice([None, *range(1, 8)]), rng.choice(["auto", "auto", "pilot", "ngram", False])
    return known | {f"{prefix}chunk": chunk, f"{prefix}speculate": speculate}


class Completes(StoppingCriteria):
    """Ends a row whose last token completes a text; transformers' own criterion needs a vocabulary with plain letters."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([self.completes(spaced_tokenizer().convert_ids_to_tokens(row)) for row in input_ids.tolist()])

    def completes(self, tokens: list[str]) -> bool:
        before = "".join(tokens[:-1])
        return any(text in before[max(0, len(before) - len(text) + 1) :] + tokens[-1] for text in self.texts)


def with_criteria(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a criterion in the place of stop strings."""
    settings = dict(settings)
    if texts := settings.pop("stop_strings", None):
        settings["stopping_criteria"] = [*settings.get("stopping_criteria", []), Completes(texts)]
    return settings


@pytest.mark.parametrize("way", WAYS_WITH_ORACLES)
@pytest.mark.parametrize("part", some(1, 32))
def test_random_calls_give_what_their_oracle_writes(way: str, part: int, tried: Any) -> None:
    rng, family = random.Random(f"{way} {part}"), list(FAMILIES)[part % len(FAMILIES)]
    writers: set[bool] = set()
    for _ in range(CALLS):
        call = RandomCall(way, family, rng)
        out = call.run()
        for row, got in enumerate(out.sequences[:, out.prompt_length :].tolist()):
            want, by_pilot = call.expected(row, ahead=got)
            padding = len(got) - len(want)
            assert got == want + [PAD] * padding, (family, row, call.shared, call.own)
            if by_pilot is not None:
                assert out.written_by_pilot[row].tolist() == by_pilot + [False] * padding
                writers |= set(by_pilot)
        tried("random calls, each against a slow oracle")
    assert writers in (set(), {True, False})


# Sampled


SAMPLING: dict[str, dict[str, Any]] = {
    "warped and penalised": {"temperature": 0.7, "repetition_penalty": 1.4},
    "a greedy pilot": {"assistant_do_sample": False},
    "of few tokens": {"top_k": 3},
}
PROPOSED: dict[str, dict[str, Any]] = {
    "at its own pace": {"chunk": None, "speculate": "auto"},
    "by n-grams": {"chunk": 2, "speculate": "ngram"},
    "by the pilot": {"chunk": 2, "speculate": "pilot"},
}
LENGTH = 3
REPEATS = [1, 3, 2, 4, 1, 3, 2, 4, 1, 3]
"""A prompt whose n-grams propose tokens."""


def sampled_ways() -> list[Any]:
    """Ways, names of settings, numbers of draws: outside of the sweep few, of each way whose tokens are checked in chunks."""
    ways = []
    for way in WAYS_WITH_ORACLES:
        if ORACLES[strategy_of(way)].sampled:
            fast = "fast" in WAYS[way].values()
            for number, name in enumerate([*SAMPLING, *(PROPOSED if fast else [])]):
                ways.append(pytest.param(way, name, 10_000, marks=pytest.mark.sweep))
                if fast and not number and way not in SWEPT:
                    ways.append((way, name, 3_000))
    return ways


@pytest.mark.parametrize(("way", "sampling", "draws"), sampled_ways())
def test_sampled_responses_have_the_distribution_of_the_oracle(way: str, sampling: str, draws: int, tried: Any) -> None:
    strategy, prompt = strategy_of(way), REPEATS
    models = Models(wsd_hf.enable_wsd(tiny(5, 0)), tiny(5, 7), tiny(5, 9))
    own, settings = ORACLES[strategy].sampled, {"top_k": 0, "pad_token_id": 0, **SAMPLING.get(sampling, {})}
    proposed = {f"{STRATEGIES[strategy].prefix}{name}": value for name, value in PROPOSED.get(sampling, {}).items()}
    engine = {name: value for name, value in WAYS[way].items() if name.endswith(("_engine", "_chunk", "_speculate"))}
    torch.manual_seed(0)
    drawn = models.base.generate(
        torch.tensor([prompt]),
        strategy=strategy,
        do_sample=True,
        max_new_tokens=LENGTH,
        num_return_sequences=draws,
        **models.small(strategy),
        **settings,
        **own,
        **engine | proposed,
    )[:, len(prompt) :]

    def rule() -> Rule:
        readers = [Reader(model, prompt) for model in (models.base, *models.small(strategy).values())]
        return ORACLES[strategy].rule(Row(readers, own, set()))

    pilot_samples = settings.pop("assistant_do_sample", True)
    want = slow.slow_distribution(models.base, prompt, rule, LENGTH, pilot_samples, **settings)
    cells = (drawn * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want.flatten()) > 1e-3
    tried("sampled responses, against their exact distribution", draws)
