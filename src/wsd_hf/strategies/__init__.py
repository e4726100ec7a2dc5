"""One module per strategy of `generate(..., strategy=...)`, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .emulated_fine_tuning import emulated_fine_tuning
from .nudging.strategy import nudging
from .search.strategy import weak_to_strong_search
from .wsd.strategy import weak_to_strong_decoding

STRATEGIES: dict[str, Callable[..., Any]] = {
    "wsd": weak_to_strong_decoding,
    "nudging": nudging,
    "weak_to_strong_search": weak_to_strong_search,
    "emulated_fine_tuning": emulated_fine_tuning,
}
"""What `generate(..., strategy=name)` runs: a function of transformers' own `generate`, the base, and all other arguments."""
