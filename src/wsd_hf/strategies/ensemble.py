"""`strategy="ensemble"`: the average of the base's and the pilot's probabilities.

The mixture of transformers' `assistant_ensemble_weight`, which draws the token after the kept proposals from the base alone.
Here every token is drawn from the mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.numbers import as_number
from ..errors import WSDValueError
from ..speculation.rule import Logits
from ..speculation.target import TargetConfig


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig(TargetConfig):
    """Settings of the ensemble: w p + (1 - w) q, of the base's probabilities p and the pilot's q, token by token.

    Args:
        weight: w, of the base, above 0 and below 1.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    weight: float = 0.5

    name: ClassVar[str] = "ensemble"
    prefix: ClassVar[str] = "ensemble_"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = as_number(self.weight)
        if number is None or not 0 < number < 1:
            raise WSDValueError(f"weight={self.weight!r}: must be a number above 0 and below 1")
        object.__setattr__(self, "weight", float(number))

    def target(self, logits: Logits) -> torch.Tensor:
        """log(w p + (1 - w) q)."""
        p, q = logits.base.log_softmax(dim=-1), logits.pilot.log_softmax(dim=-1)
        return torch.logaddexp(p + math.log(self.weight), q + math.log1p(-self.weight))
