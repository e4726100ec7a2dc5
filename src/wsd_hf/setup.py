"""What a call drafts with: the arguments of `generate` that concern the pilot, checked and ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .checks import check_kind, check_prompt, check_room, eos_token_ids, vocabulary_size
from .config import WSDConfig
from .draft import Draft
from .errors import WSDValueError
from .sampling import SAMPLING_WARPERS
from .small_model import Prompt, SmallModel
from .switch import SwitchCriteria
from .text.bridge import Bridge, OneVocabulary, TwoVocabularies
from .text.vocabulary import same_vocabulary


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
class PilotArguments:
    """The arguments of `generate` that concern the pilot; `WSDGenerationMixin.generate` documents them.

    Raises:
        WSDValueError: arguments of another type.
    """

    pilot: SmallModel
    wsd_config: WSDConfig | None = None
    switch_criteria: StoppingCriteria | None = None
    assistant_do_sample: bool | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        check_kind("switch_criteria", self.switch_criteria, StoppingCriteria, StoppingCriteriaList)
        check_kind("tokenizer", self.tokenizer, PreTrainedTokenizerBase)

    def prepare(
        self,
        base: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> DraftSetup:
        """What one call of `generate` drafts with, checked and ready; runs no forward.

        Args:
            base: the model that generates.
            input_ids: its prompt, [batch, prompt].
            attention_mask: [batch, prompt].
            generation_config: the call's, complete.
            processors: the call's; their sampling warpers shape the pilot's sampling too.
        """
        pilot, assistant_tokenizer = self.pilot.model, self.pilot.tokenizer
        one = same_vocabulary(vocabulary_size(base), vocabulary_size(pilot), self.tokenizer, assistant_tokenizer)
        check_prompt("input_ids", input_ids, attention_mask, rows=len(input_ids))
        check_room("base", base, attention_mask)
        config = self.wsd_config or WSDConfig.resolve({}, None, generation_config)
        copies = generation_config.num_return_sequences or 1
        pilot_ids, pilot_mask = self.pilot.prompt(Prompt(input_ids, attention_mask), copies, self.tokenizer, one)
        limits = check_room("pilot", pilot, pilot_mask).clamp(max=config.max_draft_tokens).cpu()
        base_eos = eos_token_ids(generation_config)
        if config.draft_end == "stop" and not base_eos:
            raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id")
        do_sample = generation_config.do_sample if self.assistant_do_sample is None else self.assistant_do_sample
        return DraftSetup(
            pilot,
            pilot_ids,
            pilot_mask,
            LogitsProcessorList(p for p in processors if isinstance(p, SAMPLING_WARPERS)) if do_sample else None,
            int(limits.max()),
            Draft(
                self.switch_criteria or SwitchCriteria(config.threshold, config.window_size),
                len(input_ids),
                vocabulary_size(base),
                closing_token_id=min(base_eos) if config.draft_end == "stop" else None,
            ),
            self._bridge(vocabulary_size(base), base_eos, limits.tolist(), one),
        )

    def _bridge(self, base_size: int, base_eos: set[int], limits: list[int], one: bool) -> Bridge:
        pilot, assistant_tokenizer = self.pilot.model, self.pilot.tokenizer
        ends = eos_token_ids(pilot.generation_config) | eos_token_ids(assistant_tokenizer)
        if one or self.tokenizer is None or assistant_tokenizer is None:
            return OneVocabulary(base_eos | ends, limits)
        for name, holder, size in (
            ("tokenizer", self.tokenizer, base_size),
            ("assistant_tokenizer", assistant_tokenizer, vocabulary_size(pilot)),
        ):
            if len(holder) > size:
                raise WSDValueError(f"{name} has {len(holder)} tokens, and its model {size}: pass each model's own tokenizer")
        return TwoVocabularies(self.tokenizer, assistant_tokenizer, ends, limits, base_eos)
