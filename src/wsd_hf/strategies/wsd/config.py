"""`strategy="wsd"`: settings of Weak-to-Strong Decoding, and the engine that serves a call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.call import Call
from ...engine.checks import check_kind, closing_token_id, eos_token_ids, vocabulary_size
from ...engine.numbers import check_positive_integer
from ...engine.pilot_side import PilotSide, bridge_to_base, pilot_side
from ...engine.ragged_stream import real_tokens
from ...engine.stats import Stats
from ...engine.strategy import StrategyOutput, check_choice, keyword
from ...errors import WSDValueError
from ...speculation import loop
from ...speculation.config import SpeculativeConfig
from ...speculation.setup import Setup
from ...text.bridge import Bridge
from . import stepwise
from .draft import Draft
from .output import WSDOutput
from .switch_rules import SWITCH_RULES, SwitchCriteria, SwitchRule, SwitchRuleName

DraftEnd = Literal["continue", "stop"]


@dataclass(frozen=True, kw_only=True)
class WSDConfig(SpeculativeConfig):
    """Settings of Weak-to-Strong Decoding; the defaults are the paper's (arXiv 2506.07434).

    Args:
        threshold: γ in (0, 1]. The base takes over at the first drafted token where its confidence reaches γ. None: the
            switch rule's own; for the paper's, 0.8.
        window_size: w >= 1. Confidence is the geometric mean of the base's probabilities of the last w drafted tokens. None:
            the switch rule's own; for the paper's, 6.
        max_draft_tokens: most tokens the pilot may write, >= 1. A limit below the window is legal, can never switch,
            and warns.
        draft_end: when the draft ends unconfirmed (by the pilot's EOS or the limit), `"continue"` lets the base write
            on, as the paper does; `"stop"` ends the response there with the base's EOS.
        switch_criteria: name of the switch rule: `"confidence"`, the paper's; `"relative_confidence"`, `"entropy"`,
            `"agreement"`: see `RelativeConfidenceCriteria`, `EntropyCriteria`, `AgreementCriteria`. Or a `StoppingCriteria` in
            the place of a rule; see `SwitchRule`.
        ignore_repeats: let tokens that complete a 4-gram which the base's prompt or the draft holds already not count towards
            the window.

    The other settings are those of `SpeculativeConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.

    >>> WSDConfig(threshold=0.9).threshold
    0.9
    >>> WSDConfig(window_size=0)
    Traceback (most recent call last):
    wsd_hf.errors.WSDValueError: window_size=0: must be an integer of at least 1
    """

    threshold: float = None  # type: ignore[assignment]  # never None once the rule's own has been filled in
    window_size: int = None  # type: ignore[assignment]
    max_draft_tokens: int = 512
    draft_end: DraftEnd = "continue"
    switch_criteria: SwitchRuleName | StoppingCriteria | StoppingCriteriaList = field(
        default="confidence", metadata=keyword("switch_criteria")
    )
    ignore_repeats: bool = False

    name: ClassVar[str] = "wsd"
    prefix: ClassVar[str] = "wsd_"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.switch_criteria is None:
            object.__setattr__(self, "switch_criteria", "confidence")
        rule = self._named_rule()
        object.__setattr__(self, "threshold", rule.threshold)
        object.__setattr__(self, "window_size", rule.window_size)
        object.__setattr__(self, "max_draft_tokens", check_positive_integer("max_draft_tokens", self.max_draft_tokens))
        check_choice("draft_end", self.draft_end, get_args(DraftEnd))
        if self.window_size > self.max_draft_tokens:
            warnings.warn(
                f"window_size={self.window_size} is larger than max_draft_tokens={self.max_draft_tokens}: "
                "the base can never become confident, so every draft runs to its end",
                UserWarning,
                stacklevel=3,
            )

    @classmethod
    def override(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """As of every strategy; but threshold and window belong to the rule that they were given with, and leave with it."""
        name = given.get("switch_criteria")
        if isinstance(name, str) and name != values.get("switch_criteria", cls.switch_criteria):
            values = {field: value for field, value in values.items() if field not in ("threshold", "window_size")}
        return super().override(values, given)

    def switch_rule(self) -> SwitchRule:
        """The rule that ends a draft.

        Raises:
            WSDValueError: `switch_criteria` is a criterion that is no switch rule.
        """
        if not isinstance(criteria := self._criteria, SwitchRule):
            raise WSDValueError(f"switch_criteria={criteria!r}: must be a switch rule, or the name of one")
        return criteria

    @property
    def _criteria(self) -> StoppingCriteria | StoppingCriteriaList:
        """The rule, or other criteria in its place; an empty list takes no place."""
        named = isinstance(self.switch_criteria, str) or not self.switch_criteria
        return self._named_rule() if named else self.switch_criteria

    def _named_rule(self) -> SwitchRule:
        """The rule that has the settings' name, threshold and window, checked; the paper's beside an object."""
        if isinstance(self.switch_criteria, str):
            check_choice("switch_criteria", self.switch_criteria, get_args(SwitchRuleName))
            kind = SWITCH_RULES[self.switch_criteria]
        else:
            check_kind("switch_criteria", self.switch_criteria, StoppingCriteria, StoppingCriteriaList)
            kind = SwitchCriteria
            if self.ignore_repeats:
                raise WSDValueError(
                    "ignore_repeats=True belongs to a switch rule by name, and switch_criteria is an object: leave it out"
                )
        own = {name: getattr(self, name) for name in ("threshold", "window_size") if getattr(self, name) is not None}
        return kind(**own, ignore_repeats=self.ignore_repeats)

    def draft_setup(self, call: Call) -> Setup[Draft]:
        """The pilot's side of a call and its draft, checked; runs no forward."""
        side = pilot_side(call, self.assistant_do_sample)
        limits = side.room.clamp(max=min(self.max_draft_tokens, sys.maxsize)).tolist()
        arguments = self.draft_arguments(
            real_tokens(*call.prompt), vocabulary_size(call.base), eos_token_ids(call.generation_config)
        )
        bridge = bridge_to_base(call, side, limits)
        return Setup(side, bridge, self._draft(side, bridge, *arguments), max(limits))

    def draft_arguments(self, prompts: Sequence[Sequence[int]], vocabulary: int, eos: set[int]) -> tuple[Any, ...]:
        """The arguments of `Draft` for prompts of a base, whose size of vocabulary and EOS ids are given."""
        closing = closing_token_id(eos, vocabulary) if self.draft_end == "stop" else None
        if self.draft_end == "stop" and closing is None:
            raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id to a token that it has")
        return self._criteria, prompts, vocabulary, closing

    def _draft(self, side: PilotSide, bridge: Bridge, *arguments: Any) -> Draft:
        """The rule of a call, from the arguments of `Draft`."""
        return Draft(*arguments)

    def decode(self, call: Call) -> StrategyOutput:
        """Decodes on the fast path or step by step; the sequences are the same.

        A streamer with a method `take_draft` gets the call's `Draft`, which shows each row's switch as soon as it is decided.
        """
        setup = self.draft_setup(call)
        if (take_draft := getattr(call.streamer, "take_draft", None)) is not None:
            take_draft(setup.rule)
        if self._goes_step_by_step(call, setup):
            output, stats = stepwise.decode(call, setup)
        else:
            output, stats = loop.decode(call, setup, self)
        if output.sequences.shape[1] - call.input_ids.shape[1] < call.budget:
            for row in range(len(setup.rule.drafting)):
                setup.rule.stop(row, "stopped")
        return self._output(call, setup.rule, output, stats)

    def _goes_step_by_step(self, call: Call, setup: Setup[Draft]) -> bool:
        return self.step_by_step(call, {"pilot": setup.side.model})

    def _output(self, call: Call, draft: Draft, output: GenerateDecoderOnlyOutput, stats: Stats) -> StrategyOutput:
        """The output of an engine together with that of the rule."""
        width, device = output.sequences.shape[1] - call.input_ids.shape[1], call.input_ids.device
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
