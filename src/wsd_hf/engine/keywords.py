"""Keywords of `generate`: those that each strategy takes, and those that would have no effect; checked before any work."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .. import _compat
from ..errors import WSDValueError
from .checks import check_kind
from .strategy import StrategyConfig

Strategies = Mapping[str, type[StrategyConfig]]

SMALL_MODELS = {"assistant_model": "a pilot", "reference_model": "the small model before its tuning"}
"""Arguments of `generate` that hold the models beside the base, and what each is."""

ASSISTED = {"num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"}
ASSISTED |= {"assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind", "is_assistant", "speculation_type"}
ASSISTED |= {"prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp"}
"""Settings of transformers' assisted generation, in whose place a strategy decodes."""

HIDDEN = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
"""Keywords that transformers' `generate` takes, and its signature does not show."""

PLAIN = HIDDEN.union(inspect.signature(GenerationMixin.generate).parameters, vars(GenerationConfig()))
"""Every keyword that transformers' `generate` takes, inputs of the model excepted."""


def chosen(strategy: str | StrategyConfig, strategies: Strategies) -> type[StrategyConfig]:
    """The class of the strategy that a call chose by name or by a settings object."""
    if isinstance(strategy, StrategyConfig):
        return type(strategy)
    if not isinstance(strategy, str) or strategy not in strategies:
        known = ", ".join(map(repr, strategies))
        raise WSDValueError(f"strategy={strategy!r}: unknown; known are {known}, and settings objects such as WSDConfig()")
    return strategies[strategy]


def own_keywords(strategy: type[StrategyConfig]) -> list[str]:
    """The keywords that a strategy takes beside those of transformers' `generate`."""
    kinds = ("model", "input_ids", "attention_mask")
    partners = [f"{partner}_{kind}" for partner in strategy.partners for kind in kinds]
    return [*partners, *(["assistant_tokenizer", "tokenizer"] if partners else []), *strategy.keywords()]


def check_keywords(
    strategy: type[StrategyConfig],
    strategies: Strategies,
    generate: Callable[..., Any],
    model: PreTrainedModel,
    keywords: Mapping[str, Any],
) -> None:
    """Raises for keywords of other strategies, of transformers' assisted generation, and unknown ones; `generate` is its own.

    None counts as not given. transformers itself checks inputs of the model.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    own = own_keywords(strategy)
    config = given.get("generation_config")
    check_kind("generation_config", config, GenerationConfig)
    _check_assisted(strategy.name, given, config, model)
    legal = {*own, *_plain(strategies, generate)} - (SMALL_MODELS.keys() - own)
    for name, value in given.items():
        if name in legal or _compat.takes_input(model, name, value):
            continue
        if owners := _owners(name, strategies):
            raise WSDValueError(f"{name} belongs to {', '.join(owners)}, not to strategy={strategy.name!r}: leave it out")
        if name not in {**vars(model.generation_config), **(vars(config) if config else {})}:
            known = {*legal, *inspect.signature(model.forward).parameters}.union(*map(own_keywords, strategies.values()))
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise WSDValueError(
                f"{name}: unknown keyword; known are {', '.join(own)}, those of transformers' generate, and inputs of the model"
                + (f"; {near[0]} is near" if near else "")
            )


def check_partners(strategy: StrategyConfig, keywords: Mapping[str, Any]) -> None:
    """Raises if a call lacks a small model that its strategy needs."""
    for partner in strategy.needed:
        name = f"{partner}_model"
        if keywords.get(name) is None:
            raise WSDValueError(f"strategy={strategy.name!r} needs {SMALL_MODELS[name]}: pass {name}=")


def check_without_strategy(
    strategies: Strategies, generate: Callable[..., Any], model: PreTrainedModel, keywords: Mapping[str, Any]
) -> None:
    """Raises if a call without `strategy=` has a keyword that only strategies take."""
    if keywords.get("custom_generate") is not None:  # which may take anything
        return
    legal = _plain(strategies, generate)
    for name, value in keywords.items():
        owners = _owners(name, strategies)
        if value is not None and owners and name not in legal and not _compat.takes_input(model, name, value):
            raise WSDValueError(f"{name} belongs to {', '.join(owners)}: pass strategy={owners[0]}")


def check_batch_keywords(strategies: Strategies, keywords: Mapping[str, Any]) -> None:
    """Raises if a call of `generate_batch` has a keyword of a strategy; transformers ignores keywords that it lacks there."""
    for name, value in keywords.items():
        of_strategies = name == "strategy" or name in SMALL_MODELS or (name not in PLAIN and _owners(name, strategies))
        if value is not None and of_strategies:
            raise WSDValueError(
                f"{name} has no effect in generate_batch, where the model decodes alone: call generate(strategy=...), which "
                "takes several prompts, padded on the left"
            )


def _plain(strategies: Strategies, generate: Callable[..., Any]) -> set[str]:
    """Keywords of transformers' `generate`; that of an enabled model shows those of all strategies too."""
    of_strategies = {"strategy"}.union(*map(own_keywords, strategies.values()))
    return PLAIN | (inspect.signature(generate).parameters.keys() - of_strategies)


def _check_assisted(strategy: str, given: Mapping[str, Any], config: GenerationConfig | None, model: PreTrainedModel) -> None:
    """Raises if the caller set something of assisted generation; a passed config also holds what the model's own does."""
    for name in sorted(ASSISTED):
        usual = (None, _compat.default_setting(name), getattr(model.generation_config, name, None))
        inherited = getattr(config, name, None)
        for value in (given.get(name), None if inherited in usual else inherited):
            if value is not None and value is not False:
                raise WSDValueError(
                    f"{name}={value!r} is a setting of transformers' assisted generation, and has no effect under "
                    f"strategy={strategy!r}: leave it out"
                )


def _owners(name: str, strategies: Strategies) -> list[str]:
    """The strategies that take a keyword, in quotes."""
    return [repr(owner) for owner, strategy in strategies.items() if name in own_keywords(strategy)]
