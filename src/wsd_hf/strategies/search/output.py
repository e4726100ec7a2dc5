"""What weak-to-strong search returns beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...engine.stats import GuidedGenerateOutput
from .beam import Selection


@dataclass
class SearchGenerateOutput(GuidedGenerateOutput):
    """`GuidedGenerateOutput`, plus what the responses are worth and how they were found.

    Attributes:
        values: of the returned responses, float32 [rows].
        tree: for each prompt what was kept of what, one selection after the other; a hypothesis knows its parent.
    """

    values: torch.Tensor = None  # type: ignore[assignment]
    tree: list[list[Selection]] = None  # type: ignore[assignment]
