"""Settings of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ..engine.numbers import check_integer, check_number, check_positive_integer
from ..engine.strategy import check_choice
from ..errors import WSDValueError

Part = Literal["drafted", "whole"]
Objective = Literal["sft", "dpo+sft"]

Report = Callable[[int, int, float], None]
"""Called after each step with its number, the number of all steps, and its loss."""

LEARNING_RATES = {True: 2e-4, False: 2e-5}
"""Default learning rates, of LoRA adapters and of all weights."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training; all of them are kept beside its results.

    Args:
        part: tokens of each chosen answer that are trained. `"drafted"`: those before the base takes over; `"whole"`: all, with
            the end of the turn; a number: so many at the beginning.
        objective: `"sft"` raises the likelihood of these tokens. `"dpo+sft"` also prefers them to the beginning, of as many
            tokens, of the rejected answer (Rafailov et al., arXiv 2305.18290). DPO alone is not offered: it makes both
            less likely, and a pilot has to write the beginning by itself.
        lora_rank: rank of a LoRA adapter on all linear layers (Hu et al., arXiv 2106.09685); 0 trains all weights.
        epochs: passes over the examples.
        learning_rate: its peak, after a warm-up over a tenth of the steps; it falls linearly to 0. None: 2e-4 for LoRA, and
            2e-5 for all weights.
        batch_size: examples per step, over all processes.
        device_batch_size: most examples in one forward; gradients of several forwards are added to make up a batch.
        max_length: most tokens of prompt and answer; longer answers are cut.
        beta: of DPO.
        seed: of the order of the examples and of new adapters.
        checkpoint_every: steps between two checkpoints, from which a stopped training is resumed.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    part: Part | int = "drafted"
    objective: Objective = "sft"
    lora_rank: int = 16
    epochs: int = 3
    learning_rate: float | None = None
    batch_size: int = 16
    device_batch_size: int = 8
    max_length: int = 1024
    beta: float = 0.1
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            if isinstance(self.part, str):
                raise WSDValueError(f"part={self.part!r}: must be one of {', '.join(get_args(Part))}, or a number of tokens")
            check_positive_integer("part", self.part)
        check_choice("objective", self.objective, get_args(Objective))
        for name in ("epochs", "batch_size", "device_batch_size", "max_length", "checkpoint_every"):
            check_positive_integer(name, getattr(self, name))
        for name in ("lora_rank", "seed"):
            if check_integer(name, getattr(self, name)) < 0:
                raise WSDValueError(f"{name}={getattr(self, name)!r}: must be an integer of at least 0")
        for name in ("learning_rate", "beta"):
            value = getattr(self, name)
            if value is not None and check_number(name, value) <= 0:
                raise WSDValueError(f"{name}={value!r}: must be a number above 0")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or its default."""
        return self.learning_rate or LEARNING_RATES[self.lora_rank > 0]

    def forwards_per_step(self, processes: int) -> int:
        """Forwards of each process whose gradients make up a batch; a WSDValueError if the batch cannot be split evenly."""
        share, rest = divmod(self.batch_size, processes)
        if rest or share == 0:
            raise WSDValueError(f"batch_size={self.batch_size}: must be a multiple of the {processes} processes")
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= self.device_batch_size)
