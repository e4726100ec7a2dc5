"""`strategy="product"`: the base's probabilities times a power of the pilot's.

The form of the Residual Alignment Model with its small autoregressive module (arXiv 2505.19700).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.numbers import check_number
from ..speculation.rule import Logits
from ..speculation.target import TargetConfig


@dataclass(frozen=True, kw_only=True)
class ProductConfig(TargetConfig):
    """Settings of the product: log p + α log q, of the base's probabilities p and the pilot's q, token by token.

    Args:
        alpha: α >= 0; 0 is the base alone.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "product"
    prefix: ClassVar[str] = "product_"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha, least=0))

    def target(self, logits: Logits) -> torch.Tensor:
        """log p + α log q."""
        if not self.alpha:  # 0 times the -inf of a token that the pilot never writes would be NaN
            return logits.base
        return logits.base.log_softmax(dim=-1) + self.alpha * logits.pilot.log_softmax(dim=-1)
