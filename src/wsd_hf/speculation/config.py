"""Settings that all strategies share whose tokens are drafted and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers import PreTrainedModel
from transformers.utils import logging

from ..engine.call import Call
from ..engine.numbers import check_positive_integer
from ..engine.recurrent_support import reads_single_tokens
from ..engine.strategy import StrategyConfig, check_choice, keyword
from ..engine.supported import stateful_reason, unsupported_reason
from ..errors import WSDValueError

logger = logging.get_logger(__name__)

MOST_PROPOSALS = 64
"""Most tokens that may be proposed at a time: all of them are held, and forwards run, before any is checked."""

Engine = Literal["auto", "fast", "step"]
Speculate = Literal["auto", "pilot", "ngram", True, False]


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(StrategyConfig):
    """Settings of the fast path: small models propose tokens, and one forward of the base checks them.

    Args:
        engine: `"auto"` takes the fast path wherever it is known to be exact, else the step-by-step path; `"fast"` and
            `"step"` force one. Greedy responses are the same. Forcing `"fast"` vouches for processors and criteria of your own:
            they must depend on the prefix that they are shown, and not on earlier calls.
        speculate: proposers, on the fast path, of tokens that the base is to write itself: `"pilot"`, `"ngram"` (n-grams of
            prompt and response), `"auto"` for the better of both in each row and step, False for none. Kept are tokens that it
            would have written, so responses (when sampling: their distribution) are the same, in fewer forwards. True, as saved
            by earlier versions, is `"auto"`.
        chunk: on the fast path, how many tokens are proposed at a time, 1 to 64; None adapts to how often they are kept.
        assistant_do_sample: whether the pilot samples; None: as the base does.
        cuda_graphs: on the fast path, capture forwards as CUDA graphs where models allow it. They and their caches are kept
            for later calls, in at most an eighth of the device's memory.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    engine: Engine = "auto"
    speculate: Speculate = "auto"
    chunk: int | None = None
    cuda_graphs: bool = True
    assistant_do_sample: bool | None = field(default=None, metadata=keyword("assistant_do_sample"))

    def __post_init__(self) -> None:
        choices = {"engine": get_args(Engine), "speculate": get_args(Speculate)}
        switches = {"cuda_graphs": (True, False), "assistant_do_sample": (True, False, None)}
        for name, allowed in {**choices, **switches}.items():
            check_choice(name, getattr(self, name), allowed)
        if self.speculate and not isinstance(self.speculate, str):
            object.__setattr__(self, "speculate", "auto")
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_positive_integer("chunk", self.chunk, MOST_PROPOSALS))

    def step_by_step(self, call: Call, small: Mapping[str, PreTrainedModel]) -> bool:
        """True if a call, its small models by name, goes step by step; raises if the engine that was forced can't serve it."""
        if self.engine == "step":
            return True
        reason = unsupported_reason(call, small) or reads_single_tokens("base", call.base)
        if reason and self.engine == "fast":
            raise WSDValueError(f"{self.prefix}engine='fast' cannot serve this call: {reason}")
        if self.engine == "auto":
            reason = reason or stateful_reason(call, f"{self.prefix}engine")
        if reason:
            logger.warning_once(f"strategy={self.name!r} goes step by step, since {reason}")
        return reason is not None
