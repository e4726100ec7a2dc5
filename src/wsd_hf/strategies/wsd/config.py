"""`strategy="wsd"`: settings of Weak-to-Strong Decoding, and the engine that serves a call."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...engine.call import Call
from ...engine.checks import check_kind, closing_token_id, eos_token_ids, vocabulary_size
from ...engine.numbers import check_positive_integer, check_probability
from ...engine.pilot_side import bridge_to_base, pilot_side
from ...engine.strategy import check_choice, keyword
from ...errors import WSDValueError
from ...speculation import loop
from ...speculation.config import SpeculativeConfig
from ...speculation.setup import Setup
from . import stepwise
from .draft import Draft
from .output import WSDOutput
from .switch import SwitchCriteria

DraftEnd = Literal["continue", "stop"]


@dataclass(frozen=True, kw_only=True)
class WSDConfig(SpeculativeConfig):
    """Settings of Weak-to-Strong Decoding; the defaults are the paper's (arXiv 2506.07434).

    Args:
        threshold: γ in (0, 1]. The base takes over at the first drafted token where its confidence reaches γ.
        window_size: w >= 1. Confidence is the geometric mean of the base's probabilities of the last w drafted tokens.
        max_draft_tokens: most tokens the pilot may write, >= 1. A limit below the window is legal, can never switch,
            and warns.
        draft_end: when the draft ends unconfirmed (by the pilot's EOS or the limit), `"continue"` lets the base write
            on, as the paper does; `"stop"` ends the response there with the base's EOS.
        switch_criteria: a `StoppingCriteria` in the place of the paper's rule; see `SwitchCriteria`.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.

    >>> WSDConfig(threshold=0.9).threshold
    0.9
    >>> WSDConfig(window_size=0)
    Traceback (most recent call last):
    wsd_hf.errors.WSDValueError: window_size=0: must be an integer of at least 1
    """

    threshold: float = 0.8
    window_size: int = 6
    max_draft_tokens: int = 512
    draft_end: DraftEnd = "continue"
    switch_criteria: StoppingCriteria | None = field(default=None, metadata=keyword("switch_criteria", travels=False))

    name: ClassVar[str] = "wsd"
    prefix: ClassVar[str] = "wsd_"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", check_probability("threshold", self.threshold))
        for name in ("window_size", "max_draft_tokens"):
            object.__setattr__(self, name, check_positive_integer(name, getattr(self, name)))
        check_choice("draft_end", self.draft_end, get_args(DraftEnd))
        check_kind("switch_criteria", self.switch_criteria, StoppingCriteria, StoppingCriteriaList)
        if self.window_size > self.max_draft_tokens:
            warnings.warn(
                f"window_size={self.window_size} is larger than max_draft_tokens={self.max_draft_tokens}: "
                "the base can never become confident, so every draft runs to its end",
                UserWarning,
                stacklevel=3,
            )

    def draft_setup(self, call: Call) -> Setup[Draft]:
        """The pilot's side of a call and its draft, checked; runs no forward."""
        side, vocabulary = pilot_side(call, self.assistant_do_sample), vocabulary_size(call.base)
        limits = side.room.clamp(max=min(self.max_draft_tokens, sys.maxsize)).tolist()
        closing = closing_token_id(eos_token_ids(call.generation_config), vocabulary) if self.draft_end == "stop" else None
        if self.draft_end == "stop" and closing is None:
            raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id to a token that it has")
        criteria = self.switch_criteria or SwitchCriteria(self.threshold, self.window_size)
        draft = Draft(criteria, len(call.input_ids), vocabulary, closing)
        return Setup(side, bridge_to_base(call, side, limits), draft, max(limits))

    def decode(self, call: Call) -> WSDOutput:
        """Decodes on the fast path or step by step; the sequences are the same."""
        setup = self.draft_setup(call)
        if self.step_by_step(call, {"pilot": setup.side.model}):
            output, stats = stepwise.decode(call, setup)
        else:
            output, stats = loop.decode(call, setup, self)
        draft, device = setup.rule, call.input_ids.device
        width = output.sequences.shape[1] - call.input_ids.shape[1]
        if width < call.budget:
            for row in range(len(draft.drafting)):
                draft.stop(row, "stopped")
        length = torch.tensor(draft.lengths, device="cpu")
        confident = torch.tensor([reason == "confident" for reason in draft.reasons], device="cpu")
        return WSDOutput(
            **output,
            stats=stats,
            written_by_pilot=(torch.arange(width, device="cpu") < length[:, None]).to(device),
            draft_length=length.to(device),
            switch_index=length.where(confident, -1).to(device),
            draft_log_probs=draft.all_log_probs.to(device),
            switch_reason=draft.reasons,
        )
