"""`strategy="blend"`: where the base is unsure, its probabilities mixed with the pilot's (BlendIn, arXiv 2606.11201)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..engine.numbers import check_probability
from ..speculation.rule import Logits
from ..speculation.target import TargetConfig


@dataclass(frozen=True, kw_only=True)
class BlendConfig(TargetConfig):
    """Settings of the blend of the base's probabilities p and the pilot's q.

    Where the largest p is below a threshold, the next token is chosen from (1 - a) p + a q, with
    a = max q / (max p + max q) + 0.1 p[argmax q], at most 1; elsewhere from p (BlendIn, arXiv 2606.11201).

    Args:
        threshold: in (0, 1]. The default is the paper's.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    threshold: float = 0.4

    name: ClassVar[str] = "blend"
    prefix: ClassVar[str] = "blend_"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", check_probability("threshold", self.threshold))

    def target(self, logits: Logits) -> torch.Tensor:
        """Log-probabilities of the blend."""
        p, q = logits.base.softmax(dim=-1), logits.pilot.softmax(dim=-1)
        surest, (pilot_surest, choice) = p.amax(dim=-1, keepdim=True), q.max(dim=-1, keepdim=True)
        share = (pilot_surest / (surest + pilot_surest) + 0.1 * p.gather(-1, choice)).clamp(max=1)
        return torch.where(surest < self.threshold, (1 - share) * p + share * q, p).log()
