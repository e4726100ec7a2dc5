"""One module per strategy of `generate(..., strategy=...)`, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .nudging import nudging
from .wsd import weak_to_strong_decoding

STRATEGIES: dict[str, Callable[..., Any]] = {"wsd": weak_to_strong_decoding, "nudging": nudging}
