"""One module or folder per strategy of `generate(..., strategy=...)`, and the table of their names."""

from __future__ import annotations

from ..engine.strategy import StrategyConfig
from .blend import BlendConfig
from .emulated_fine_tuning import EmulatedFineTuningConfig
from .ensemble import EnsembleConfig
from .nudging.config import NudgingConfig
from .product import ProductConfig
from .reward_guided.config import RewardGuidedConfig
from .search.config import SearchConfig
from .wsd.config import WSDConfig
from .wsd.two_way import TwoWayConfig

STRATEGIES: dict[str, type[StrategyConfig]] = {
    strategy.name: strategy
    for strategy in (
        WSDConfig,
        TwoWayConfig,
        NudgingConfig,
        SearchConfig,
        EmulatedFineTuningConfig,
        ProductConfig,
        EnsembleConfig,
        BlendConfig,
        RewardGuidedConfig,
    )
}
"""The settings of every strategy that `generate(..., strategy=name)` knows."""
