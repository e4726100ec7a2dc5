"""Predicted costs of methods on a pair, from its readings and the base's continuations of the drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.checks import vocabulary_size
from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from ..pair import Pair
from ..strategies.blend import BlendConfig
from ..strategies.ensemble import EnsembleConfig
from ..strategies.nudging.config import NudgingConfig
from ..strategies.product import ProductConfig
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch_rules import SWITCH_RULES, SwitchRule
from ..strategies.wsd.two_way import TwoWayConfig
from ..text.chat import Messages
from ..text.vocabulary import same_vocabulary
from .forwards import Prediction, costs, predict
from .measures import THRESHOLDS, WINDOWS
from .paths import Agreement, Path, find_paths
from .reading import Reading

Methods = Mapping[str, StrategyConfig | None]
"""Settings by name; None for a single model."""


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """The texts of one prompt that predictions are made from; see `find_paths`. May be made from JSON data."""

    prompt: int
    paths: list[Path]

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", [path if isinstance(path, Path) else _path(path) for path in self.paths])


def _path(data: dict[str, Any]) -> Path:
    return Path(**{**data, "targets": {name: Agreement(*agreement) for name, agreement in data["targets"].items()}})


def predictable(pair: Pair, rule: SwitchRule) -> Methods:
    """The methods that need no model beside the pair; WSD with a rule, and all others at their defaults."""
    strategies: list[StrategyConfig] = [NudgingConfig(), WSDConfig(switch_criteria=rule), TwoWayConfig()]
    sizes = vocabulary_size(pair.base), vocabulary_size(pair.pilot)
    if same_vocabulary(*sizes, pair.tokenizer, pair.pilot_tokenizer):
        strategies += [ProductConfig(), EnsembleConfig(), BlendConfig()]
    return {"base": None, "pilot": None, **{strategy.name: strategy for strategy in strategies}}


def _grid() -> Methods:
    """WSD at every cell of the grid, and with every named rule: a later command may choose another of them."""
    cells = [WSDConfig(threshold=threshold, window_size=window) for threshold in THRESHOLDS for window in WINDOWS]
    named: Any = SWITCH_RULES
    cells += [WSDConfig(switch_criteria=rule, ignore_repeats=ignored) for rule in named for ignored in (False, True)]
    return {f"cell {number}": cell for number, cell in enumerate(cells)}


def continued(pair: Pair, chat: Messages, draft: Reading, methods: Methods, most: int) -> Continuations:
    """The base's continuations of a draft where the methods switch, and every rule of the grid, in one batch."""
    [paths] = find_paths(pair, [chat], [draft], most, {**methods, **_grid()})
    return Continuations(prompt=draft.prompt, paths=paths)


def predictions(
    pair: Pair,
    drafts: Sequence[Reading],
    own: Sequence[Reading],
    methods: Methods,
    continuations: Sequence[Continuations],
    most: int,
) -> list[Prediction]:
    """Costs of methods for each token of their answers.

    Args:
        pair: the models.
        drafts: the pilot's.
        own: the base's own answers.
        methods: see `predictable`.
        continuations: of each draft, in their order.
        most: tokens of an answer.

    Raises:
        WSDValueError: there are no own answers, whose time is the measure.
    """
    if not own:
        raise WSDValueError("costs are predicted as multiples of the base's own time: its own answers are needed")
    return predict(methods, drafts, [one.paths for one in continuations], costs(pair, drafts, own), most)
