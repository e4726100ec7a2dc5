"""Output of weak-to-strong search."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...engine.strategy import StrategyOutput
from .beam import Selection


@dataclass
class SearchOutput(StrategyOutput):
    """`StrategyOutput`, plus the values of the responses and the selections that led to them.

    Attributes:
        values: of the returned responses, float32 [rows].
        tree: selections of each prompt in their order; a hypothesis holds its parent.
    """

    values: torch.Tensor = None  # type: ignore[assignment]
    tree: list[list[Selection]] = None  # type: ignore[assignment]
