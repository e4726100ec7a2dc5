"""`strategy="emulated_fine_tuning"`: the base's logits, moved by what tuning did to a small model.

Emulated fine-tuning (arXiv 2310.12962), also known as proxy tuning (arXiv 2401.08565).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..engine.numbers import check_number
from ..engine.strategy import keyword
from ..speculation.rule import Logits
from ..speculation.target import TargetConfig


@dataclass(frozen=True, kw_only=True)
class EmulatedFineTuningConfig(TargetConfig):
    """Settings of emulated fine-tuning: the base's raw logits plus β (tuned - reference), token by token.

    Args:
        beta: β, any finite number; 0 is the base alone.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    beta: float = field(default=1.0, metadata=keyword("beta"))

    name: ClassVar[str] = "emulated_fine_tuning"
    prefix: ClassVar[str] = "eft_"
    partners: ClassVar[tuple[str, ...]] = ("assistant", "reference")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", check_number("beta", self.beta))

    def target(self, logits: Logits) -> torch.Tensor:
        """base + β (tuned - reference); tokens that neither small model has keep the base's logits."""
        base, tuned, reference = logits
        return base + self.beta * torch.where(tuned == reference, 0.0, tuned - reference)  # both may be -inf
