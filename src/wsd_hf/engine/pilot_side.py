"""The pilot's side of a call, whatever a strategy asks it for: arguments of `generate`, checked and ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..text.bridge import Bridge, OneVocabulary, TwoVocabularies
from ..text.vocabulary import same_vocabulary
from .checks import check_kind, check_room, check_tokenizer, eos_token_ids, vocabulary_size
from .sampling import SAMPLING_WARPERS
from .small_model import Prompt, SmallModel


class PilotSetup(NamedTuple):
    """The pilot's side of one call, whatever it is asked for."""

    input_ids: torch.Tensor
    """Its prompt, [batch, prompt]."""
    attention_mask: torch.Tensor
    """Its mask, [batch, prompt]."""
    warpers: LogitsProcessorList | None
    """Shape its distribution for sampling; None: it is greedy."""
    room: torch.Tensor
    """Tokens that its context takes behind each prompt, LongTensor[batch]."""
    end_token_ids: set[int]
    """Its own tokens that end a response."""
    one_vocabulary: bool
    """Whether token ids mean the same to base and pilot."""


@dataclass(frozen=True)
class PilotArguments:
    """The arguments of `generate` that concern the pilot; `WSDGenerationMixin.generate` documents them.

    Raises:
        WSDValueError: arguments of another type.
    """

    pilot: SmallModel
    assistant_do_sample: bool | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        check_kind("tokenizer", self.tokenizer, PreTrainedTokenizerBase)

    def side(
        self,
        base: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> PilotSetup:
        """The pilot's side of one call of `generate`, checked and ready; runs no forward.

        Args:
            base: the model that generates.
            input_ids: its prompt, [batch, prompt].
            attention_mask: [batch, prompt].
            generation_config: the call's, complete.
            processors: the call's; their sampling warpers shape the pilot's sampling too.
        """
        pilot, assistant_tokenizer = self.pilot.model, self.pilot.tokenizer
        one = same_vocabulary(vocabulary_size(base), vocabulary_size(pilot), self.tokenizer, assistant_tokenizer)
        check_room("base", base, attention_mask)
        copies = generation_config.num_return_sequences or 1
        pilot_ids, pilot_mask = self.pilot.prompt(Prompt(input_ids, attention_mask), copies, self.tokenizer, one)
        do_sample = generation_config.do_sample if self.assistant_do_sample is None else self.assistant_do_sample
        return PilotSetup(
            pilot_ids,
            pilot_mask,
            LogitsProcessorList(p for p in processors if type(p) in SAMPLING_WARPERS) if do_sample else None,
            check_room("pilot", pilot, pilot_mask).cpu(),
            eos_token_ids(pilot.generation_config) | eos_token_ids(assistant_tokenizer),
            one,
        )

    def bridge(self, base: PreTrainedModel, base_eos: set[int], side: PilotSetup, limits: list[int]) -> Bridge:
        """From the pilot's tokens to the base's, and back.

        Args:
            base: the model that generates.
            base_eos: its tokens that end a response.
            side: the pilot's side of the call.
            limits: most tokens that the pilot may draft, for every row.
        """
        assistant_tokenizer = self.pilot.tokenizer
        if side.one_vocabulary or self.tokenizer is None or assistant_tokenizer is None:
            return OneVocabulary(base_eos | side.end_token_ids, limits)
        check_tokenizer("tokenizer", self.tokenizer, "its model", base)
        check_tokenizer("assistant_tokenizer", assistant_tokenizer, "its model", self.pilot.model)
        return TwoVocabularies(self.tokenizer, assistant_tokenizer, side.end_token_ids, limits, base_eos)
