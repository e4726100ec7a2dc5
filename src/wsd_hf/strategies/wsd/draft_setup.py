"""What a call drafts with: the arguments of `generate` that concern the pilot, checked and ready."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ...engine.checks import check_kind, closing_token_id, eos_token_ids, vocabulary_size
from ...engine.pilot_side import PilotArguments
from ...errors import WSDValueError
from ...text.bridge import Bridge
from .config import WSDConfig
from .draft import Draft
from .switch import SwitchCriteria


class DraftSetup(NamedTuple):
    """What one call drafts with."""

    pilot: PreTrainedModel
    input_ids: torch.Tensor
    """The pilot's prompt, [batch, prompt]."""
    attention_mask: torch.Tensor
    """Its mask, [batch, prompt]."""
    warpers: LogitsProcessorList | None
    """Shape the pilot's distribution for sampling; None: the pilot is greedy."""
    longest: int
    """Most tokens that any row may draft."""
    draft: Draft
    bridge: Bridge
    """From the pilot's tokens to the base's, and back."""


@dataclass(frozen=True)
class DraftArguments(PilotArguments):
    """The arguments of `generate` that decide what is drafted.

    Raises:
        WSDValueError: arguments of another type.
    """

    wsd_config: WSDConfig | None = None
    switch_criteria: StoppingCriteria | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("switch_criteria", self.switch_criteria, StoppingCriteria, StoppingCriteriaList)

    def prepare(
        self,
        base: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> DraftSetup:
        """What one call of `generate` drafts with, checked and ready; runs no forward. Arguments as for `side`."""
        side = self.side(base, input_ids, attention_mask, generation_config, processors)
        config = self.wsd_config or WSDConfig.resolve({}, None, generation_config)
        limits = side.room.clamp(max=min(config.max_draft_tokens, sys.maxsize))
        base_eos = eos_token_ids(generation_config)
        closing = closing_token_id(base_eos, vocabulary_size(base))
        if config.draft_end == "stop" and closing is None:
            raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id to a token that it has")
        return DraftSetup(
            self.pilot.model,
            side.input_ids,
            side.attention_mask,
            side.warpers,
            int(limits.max()),
            Draft(
                self.switch_criteria or SwitchCriteria(config.threshold, config.window_size),
                len(input_ids),
                vocabulary_size(base),
                closing_token_id=closing if config.draft_end == "stop" else None,
            ),
            self.bridge(base, base_eos, side, limits.tolist()),
        )
