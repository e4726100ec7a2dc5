"""One module per strategy of `generate(..., strategy=...)`, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .emulated_fine_tuning import emulated_fine_tuning
from .wsd import weak_to_strong_decoding

STRATEGIES: dict[str, Callable[..., Any]] = {
    "wsd": weak_to_strong_decoding,
    "emulated_fine_tuning": emulated_fine_tuning,
}
"""What `generate(..., strategy=name)` runs: a function of transformers' own `generate`, the base, and all other arguments."""
