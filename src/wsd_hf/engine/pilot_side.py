"""The pilot's side of a call: its prompt, its choice, and the bridge from its tokens to the base's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ..text.bridge import Bridge, OneVocabulary, TwoVocabularies
from ..text.vocabulary import same_vocabulary
from .call import Call
from .checks import check_room, check_tokenizer, eos_token_ids, vocabulary_size
from .sampling import SAMPLING_WARPERS
from .small_model import Prompt


class PilotSide(NamedTuple):
    """The pilot's side of one call."""

    model: PreTrainedModel
    prompt: Prompt
    warpers: LogitsProcessorList | None
    """Shape its distribution for sampling; None: it is greedy."""
    room: torch.Tensor
    """Tokens that its context holds after each prompt, LongTensor[batch]."""
    end_token_ids: set[int]
    """Its own tokens that end a response."""
    one_vocabulary: bool
    """Whether token ids mean the same to base and pilot."""


def pilot_side(call: Call, do_sample: bool | None) -> PilotSide:
    """The pilot's side of a call; raises if a model can't read its prompt. Runs no forward.

    The pilot samples as the base does unless `do_sample` is set, and with the call's warpers.
    """
    pilot = call.pilot
    sizes = vocabulary_size(call.base), vocabulary_size(pilot.model)
    one = same_vocabulary(*sizes, call.tokenizer, pilot.tokenizer)
    check_room("base", call.base, call.prompt.attention_mask)
    prompt = pilot.prompt(call.prompt, call.copies, call.tokenizer, one)
    return PilotSide(
        pilot.model,
        prompt,
        pilot_warpers(call, do_sample),
        check_room("pilot", pilot.model, prompt.attention_mask).cpu(),
        eos_token_ids(pilot.model.generation_config) | eos_token_ids(pilot.tokenizer),
        one,
    )


def pilot_warpers(call: Call, do_sample: bool | None) -> LogitsProcessorList | None:
    """The call's warpers, with which the pilot samples; None if it is greedy. It samples as the base does unless told."""
    samples = call.generation_config.do_sample if do_sample is None else do_sample
    return LogitsProcessorList(p for p in call.processors if type(p) in SAMPLING_WARPERS) if samples else None


def bridge_to_base(call: Call, side: PilotSide, limits: list[int]) -> Bridge:
    """The bridge from the pilot's tokens to the base's, and back; the pilot writes at most `limits` tokens in each row."""
    base_eos, tokenizer = eos_token_ids(call.generation_config), call.pilot.tokenizer
    if side.one_vocabulary or call.tokenizer is None or tokenizer is None:
        return OneVocabulary(base_eos | side.end_token_ids, limits)
    check_tokenizer("tokenizer", call.tokenizer, "its model", call.base)
    check_tokenizer("assistant_tokenizer", tokenizer, "its model", side.model)
    return TwoVocabularies(call.tokenizer, tokenizer, side.end_token_ids, limits, base_eos)
