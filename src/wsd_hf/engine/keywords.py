"""Keywords of `generate`: which strategy takes them, and which would have no effect; checked before anything is prepared."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .. import _compat
from ..errors import WSDValueError
from .checks import check_kind

Strategies = Mapping[str, Callable[..., Any]]
Strategy = TypeVar("Strategy", bound=Callable[..., Any])

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


def with_settings(names: Iterable[str]) -> Callable[[Strategy], Strategy]:
    """Shows settings that a strategy takes as `**kwargs` in its signature, which is where `check_keywords` looks for them."""

    def show(strategy: Strategy) -> Strategy:
        signature = inspect.signature(strategy)
        *named, rest = signature.parameters.values()
        shown = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        vars(strategy)["__signature__"] = signature.replace(parameters=[*named, *shown, rest])
        return strategy

    return show


def needed(strategy: str, name: str) -> WSDValueError:
    """The error for a call that lacks a keyword."""
    return WSDValueError(f"strategy={strategy!r} needs {SMALL_MODELS.get(name, name)}: pass {name}=")


def check_keywords(
    strategy: str, strategies: Strategies, generate: Callable[..., Any], model: PreTrainedModel, keywords: Mapping[str, Any]
) -> None:
    """Raises unless every keyword of a call has a meaning under its strategy, and none that it needs is missing.

    None counts as not given. Whether a keyword is an input of the model is left to transformers.

    Args:
        strategy: the name of the call's strategy.
        strategies: all of them, by name.
        generate: transformers' own `generate` of the model.
        model: the base.
        keywords: what the call was given.

    Raises:
        WSDValueError: a keyword of another strategy, of transformers' assisted generation, of nobody, or a missing one.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    own = _own(strategies[strategy])
    for name, parameter in own.items():
        if parameter.default is parameter.empty and name not in given:
            raise needed(strategy, name)
    config = given.get("generation_config")
    check_kind("generation_config", config, GenerationConfig)
    _check_assisted(strategy, given, config, model)
    legal = {*own, *PLAIN, *inspect.signature(generate).parameters} - (SMALL_MODELS.keys() - own)
    for name, value in given.items():
        if name in legal or _compat.takes_input(model, name, value):
            continue
        if owners := _owners(name, strategies):
            raise WSDValueError(f"{name} belongs to {_named(owners)}, not to strategy={strategy!r}: leave it out")
        if name not in {**vars(model.generation_config), **(vars(config) if config else {})}:
            known = {*legal, *inspect.signature(model.forward).parameters}.union(*map(_own, strategies.values()))
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise WSDValueError(
                f"{name}: unknown keyword; known are {', '.join(own)}, those of transformers' generate, and inputs of the model"
                + (f"; {near[0]} is near" if near else "")
            )


def check_without_strategy(
    strategies: Strategies, generate: Callable[..., Any], model: PreTrainedModel, keywords: Mapping[str, Any]
) -> None:
    """Raises if a call without `strategy=` has a keyword that only strategies take; arguments as for `check_keywords`."""
    if keywords.get("custom_generate") is not None:  # which may take anything
        return
    legal = PLAIN.union(inspect.signature(generate).parameters)
    for name, value in keywords.items():
        owners = _owners(name, strategies)
        if value is not None and owners and name not in legal and not _compat.takes_input(model, name, value):
            raise WSDValueError(f"{name} belongs to {_named(owners)}: pass strategy={owners[0]!r}")


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


def _own(strategy: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords that a strategy names: its parameters after `generate` and the base."""
    _generate, _base, *named = inspect.signature(strategy).parameters.items()
    return {name: parameter for name, parameter in named if parameter.kind is not inspect.Parameter.VAR_KEYWORD}


def _owners(name: str, strategies: Strategies) -> list[str]:
    return [owner for owner, function in strategies.items() if name in _own(function)]


def _named(strategies: list[str]) -> str:
    return ", ".join(map(repr, strategies))
