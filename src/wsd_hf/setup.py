"""What a call drafts with: the arguments of `generate` that concern the pilot, checked and ready."""

from __future__ import annotations

from collections.abc import Sequence
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

from . import _compat
from .checks import check_adapted, check_causal, check_prompt, check_room, eos_token_ids, vocabulary_size
from .config import WSDConfig
from .draft import Draft
from .errors import WSDValueError
from .sampling import SAMPLING_WARPERS
from .switch import SwitchCriteria
from .text.bridge import Bridge, OneVocabulary, TwoVocabularies
from .text.pieces import plain_text
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


KINDS: dict[str, tuple[type, ...]] = {
    "switch_criteria": (StoppingCriteria, StoppingCriteriaList),
    "assistant_input_ids": (torch.Tensor,),
    "assistant_attention_mask": (torch.Tensor,),
    "tokenizer": (PreTrainedTokenizerBase,),
    "assistant_tokenizer": (PreTrainedTokenizerBase,),
}
"""What each argument may be, beside None."""


@dataclass(frozen=True)
class PilotArguments:
    """The arguments of `generate` that concern the pilot; `WSDGenerationMixin.generate` documents them.

    Raises:
        WSDValueError: no causal model, a mask without its prompt.
    """

    assistant_model: PreTrainedModel
    wsd_config: WSDConfig | None = None
    switch_criteria: StoppingCriteria | None = None
    assistant_input_ids: torch.Tensor | None = None
    assistant_attention_mask: torch.Tensor | None = None
    assistant_do_sample: bool | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    assistant_tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        check_causal("assistant_model", self.assistant_model)
        if self.assistant_attention_mask is not None and self.assistant_input_ids is None:
            raise WSDValueError(
                "assistant_attention_mask belongs to assistant_input_ids, which is missing: pass both or neither"
            )
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise WSDValueError(f"{name} is of type {type(value).__name__}: must be a {kinds[0].__name__}")
        object.__setattr__(self, "assistant_model", check_adapted("assistant_model", self.assistant_model))

    def prepare(
        self,
        base: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> DraftSetup:
        """What one call of `generate` drafts with, checked and ready; runs no forward.

        Args:
            base: the model that generates.
            input_ids: its prompt, [batch, prompt].
            attention_mask: [batch, prompt], or None if nothing is padded.
            generation_config: the call's, complete.
            processors: the call's; their sampling warpers shape the pilot's sampling too.
        """
        pilot = self.assistant_model
        one = same_vocabulary(vocabulary_size(base), vocabulary_size(pilot), self.tokenizer, self.assistant_tokenizer)
        if attention_mask is None:
            attention_mask = _compat.whole_mask(input_ids, generation_config)
        check_prompt("input_ids", input_ids, attention_mask, rows=len(input_ids))
        check_room("base", base, attention_mask)
        config = self.wsd_config or WSDConfig.resolve({}, None, generation_config)
        copies = generation_config.num_return_sequences or 1
        pilot_ids, pilot_mask = self._prompt(input_ids, attention_mask, copies, one)
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
        ends = eos_token_ids(self.assistant_model.generation_config) | eos_token_ids(self.assistant_tokenizer)
        if one or self.tokenizer is None or self.assistant_tokenizer is None:
            return OneVocabulary(base_eos | ends, limits)
        for name, holder, size in (
            ("tokenizer", self.tokenizer, base_size),
            ("assistant_tokenizer", self.assistant_tokenizer, vocabulary_size(self.assistant_model)),
        ):
            if len(holder) > size:
                raise WSDValueError(f"{name} has {len(holder)} tokens, and its model {size}: pass each model's own tokenizer")
        return TwoVocabularies(self.tokenizer, self.assistant_tokenizer, ends, limits, base_eos)

    def _prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, copies: int, one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pilot's prompt and its mask, [batch, prompt]; the base's own, or the same text, where none was given."""
        ids, mask, name = self.assistant_input_ids, self.assistant_attention_mask, "assistant_input_ids"
        if ids is not None:
            mask = torch.ones_like(ids) if mask is None else mask
            ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        elif one or self.tokenizer is None or self.assistant_tokenizer is None:
            ids, mask, name = input_ids, attention_mask, "input_ids"
        else:
            ids, mask = translated(input_ids, attention_mask, self.tokenizer, self.assistant_tokenizer)
            name = "the text of input_ids"
        check_prompt(name, ids, mask, rows=len(input_ids))
        size = vocabulary_size(self.assistant_model)
        if (largest := int(ids.max())) >= size:
            raise WSDValueError(
                f"{name} contains token id {largest}, but the pilot's vocabulary has {size} tokens: "
                "pass assistant_input_ids= made with the pilot's tokenizer"
            )
        return ids, mask


def translated(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text of some prompts in the pilot's tokens, with its mask; both [batch, prompt] and padded on the left.

    Special tokens say nothing to another model: they are left out, and the pilot's tokenizer adds its own.
    """
    texts = [plain_text(tokenizer, row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
    rows: list[list[int]] = [assistant_tokenizer.encode(text) for text in texts]
    return left_padded(rows, input_ids.device)


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one tensor and its mask, both [batch, prompt]; what stands in the padding is looked at by nobody."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.long, device=device)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
