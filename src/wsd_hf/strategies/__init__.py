"""One module or folder per strategy of `generate(..., strategy=...)`, and the table of their names."""

from __future__ import annotations

from ..engine.strategy import StrategyConfig
from .emulated_fine_tuning import EmulatedFineTuningConfig
from .nudging.config import NudgingConfig
from .search.config import SearchConfig
from .wsd.config import WSDConfig

STRATEGIES: dict[str, type[StrategyConfig]] = {
    strategy.name: strategy for strategy in (WSDConfig, NudgingConfig, SearchConfig, EmulatedFineTuningConfig)
}
"""The settings of every strategy that `generate(..., strategy=name)` knows."""
