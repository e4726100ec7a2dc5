"""Options that commands share, and the line that they print for an error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any

import typer

from ..comparison.methods import ALIASES
from ..engine.numbers import check_probability
from ..engine.strategy import check_choice
from ..errors import WSDError, WSDValueError
from ..strategies import STRATEGIES
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch_rules import SWITCH_RULES, SwitchRule
from ..text.visible import visible
from .terminal import by_rank, say

MODEL = "a path or Hub id, as NAME@REVISION, FILE.gguf or MODEL+ADAPTER too"
"""Help for an option that names a model."""

Base = Annotated[str | None, typer.Option(help=f"Base model, {MODEL}. Default: the shipped pair.")]
Pilot = Annotated[str | None, typer.Option(help=f"Pilot, {MODEL}.")]
Reference = Annotated[str | None, typer.Option(help="The pilot before its alignment, for strategies that need it.")]
Strategy = Annotated[str, typer.Option(help=f"{', '.join(STRATEGIES)}.")]
Threshold = Annotated[
    float | None,
    typer.Option(help="Threshold of the switch rule: confidence at which the base takes over. Default: the rule's own."),
]
WindowSize = Annotated[
    int | None, typer.Option(help="Drafted tokens that the switch rule is measured over. Default: the rule's own.")
]
SwitchCriteria = Annotated[
    str | None,
    typer.Option(
        help=f"Switch rule, by which the base takes over: {', '.join(SWITCH_RULES)}. Default: the first, the paper's."
    ),
]
IgnoreRepeats = Annotated[
    bool | None,
    typer.Option("--ignore-repeats", help="Leave out of the window what repeats the prompt or the draft.", show_default=False),
]
AnyThreshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="wsd: threshold of the switch rule, confidence at which the base takes over. nudging: certainty below which the "
        "pilot writes a word, in (0, 1]. reward_guided: least reward of a step that is kept.",
    ),
]
AnyWindowSize = Annotated[
    int | None, typer.Option("--window-size", help="wsd: drafted tokens that the switch rule is measured over.")
]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy. Default: as the base does.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that have this probability together.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.", min=0, max=2**32 - 1)]
System = Annotated[str | None, typer.Option(help="A system message.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens in an answer, the draft included.", min=1)]


def decoding(
    strategy: str,
    reference: str | None,
    reward: str | None,
    temperature: float | None,
    top_p: float | None,
    **settings: Any,
) -> dict[str, Any]:
    """Keywords of `generate` for a strategy and its sampling, checked before any model is loaded.

    Args:
        strategy: its name.
        reference, reward: as the command's options.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        **settings: of the strategy; None counts as not given.

    Raises:
        WSDValueError: naming the option, its value and the rule.
    """
    name = ALIASES.get(strategy, strategy)
    if name not in STRATEGIES:
        raise WSDValueError(f"--strategy {strategy}: unknown; known are {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    if ("reference" in kind.partners) != (reference is not None):
        if reference is None:
            raise WSDValueError(f"--strategy {strategy} needs --reference, the pilot as it was before its alignment")
        raise WSDValueError(f"--reference has no effect with --strategy {strategy}: leave it out")
    if ("reward" in kind.keywords()) != (reward is not None):
        if reward is None:
            raise WSDValueError(f"--strategy {strategy} needs --reward, a function or a model")
        raise WSDValueError(f"--reward has no effect with --strategy {strategy}: leave it out")
    if kind.always_samples and temperature == 0:
        raise WSDValueError(f"--temperature 0: --strategy {strategy} chooses among samples; leave it out")
    given = _given(settings)
    for setting in given.keys() - {known.name for known in fields(kind)}:
        raise WSDValueError(f"--{setting.replace('_', '-')} has no effect with --strategy {strategy}: leave it out")
    return {"strategy": kind(**given), **sampling(temperature, top_p)}


def wsd_config(**settings: Any) -> WSDConfig:
    """Settings of Weak-to-Strong Decoding; None counts as not given."""
    return WSDConfig(**_given(settings))


def switch_rule(name: str | None, **settings: Any) -> SwitchRule:
    """A switch rule by its name, the paper's by default; None counts as not given."""
    name = "confidence" if name is None else name
    check_choice("switch_criteria", name, tuple(SWITCH_RULES))
    return SWITCH_RULES[name](**_given(settings))


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {setting: value for setting, value in settings.items() if value is not None}


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Keywords of `generate`: either option samples, unless the temperature is 0."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise WSDValueError(f"--temperature {temperature}: must be a number of at least 0, which is greedy")
    if top_p is not None:
        check_probability("--top-p", top_p)
    if temperature == 0:
        if top_p is not None:
            raise WSDValueError("--top-p has no effect with --temperature 0, which is greedy: leave one out")
        return {"do_sample": False}
    given = _given({"temperature": temperature, "top_p": top_p})
    return {"do_sample": True, **given} if given else {}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints an error that a user can put right in one line, with exit status 2; typer ends quietly at a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, WSDError) as error:
        say(by_rank(one_line(error)), err=True)
        raise typer.Exit(2) from None


def one_line(error: Exception) -> str:
    """The line that a command prints for an error."""
    return f"wsd-hf: {' '.join(visible(str(error)).split())}"
