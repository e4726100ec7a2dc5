"""`strategy="emulated_fine_tuning"`: the base's logits, moved by what tuning did to a small model.

Emulated fine-tuning (arXiv 2310.12962), also known as proxy tuning (arXiv 2401.08565).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from ..engine.call import Call, decode_within
from ..engine.checks import check_kind, check_readable, check_usable, context_size, unusable, vocabulary_size
from ..engine.hf_loop import WatchedCriteria, base_tokens, run
from ..engine.lockstep_stream import StepStream
from ..engine.numbers import as_number
from ..engine.small_model import Prompt, SmallModel, tuned_and_untuned
from ..engine.stats import GuidedGenerateOutput, GuidedStats, peak_memory
from ..engine.supported import passes_context
from ..errors import WSDValueError
from ..text.vocabulary import same_vocabulary


def emulated_fine_tuning(
    generate: Callable[..., Any],
    base: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel,
    assistant_input_ids: torch.Tensor | None = None,
    assistant_attention_mask: torch.Tensor | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    reference_model: PreTrainedModel,
    reference_input_ids: torch.Tensor | None = None,
    reference_attention_mask: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    beta: float = 1.0,
    **kwargs: Any,
) -> Any:
    """Decodes with the raw logits base + β (tuned - untuned), each model with a prompt and a cache of its own.

    Greedy decoding, sampling, processors, criteria and streamers then work as in ordinary generation, of whose loop this is a
    part: one forward of each model for every token. `output_logits` gives the base's own, `output_scores` what was chosen from.

    Args:
        generate: transformers' own `generate` of the base.
        base: the model that generates.
        assistant_model: the tuned small model.
        assistant_input_ids: its prompt, LongTensor[batch, prompt]; default: the base's.
        assistant_attention_mask: of that prompt, padded on the left; default: nothing is padded.
        assistant_tokenizer: of both small models.
        reference_model: the small model before tuning.
        reference_input_ids: its prompt; default: the tuned model's, if that was given, else the base's.
        reference_attention_mask: of that prompt.
        tokenizer: the base's. Given both tokenizers, the vocabularies are compared by what they do; without, equal widths of
            the logits are taken for one vocabulary.
        beta: how far to move, any finite number; 0 is the base alone.
        **kwargs: as transformers' `generate` takes them.

    Returns:
        LongTensor[batch, prompt + response], or a `GuidedGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        WSDValueError: a missing model, another vocabulary, prompts that do not fit; before any forward.
        WSDLogitsError: logits that are no numbers.
    """
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase)
    tuned, untuned = tuned_and_untuned(
        (assistant_model, assistant_input_ids, assistant_attention_mask),
        (reference_model, reference_input_ids, reference_attention_mask),
        assistant_tokenizer,
    )
    weight = _weight(beta)
    for small in (tuned, untuned):
        _check_vocabulary(base, tokenizer, small)

    def decode(call: Call) -> Any:
        if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in call.processors):
            raise WSDValueError(
                "guidance_scale is not supported by strategy='emulated_fine_tuning', nor its processor: it runs the base alone"
            )
        _check_context("the base", call.base, call.prompt, call.budget)
        criteria = WatchedCriteria(call.criteria)
        emulated = _Emulated(_stream(tuned, call), _stream(untuned, call), weight, criteria)
        output = run(call, [emulated, *call.processors], criteria)
        if not call.generation_config.return_dict_in_generate:
            return output
        return GuidedGenerateOutput(**output, stats=_stats(call, emulated), prompt_length=call.input_ids.shape[1])

    return decode_within("emulated_fine_tuning", generate, base, decode, tokenizer=tokenizer, **kwargs)


class _Emulated(LogitsProcessor):
    """The first processor of the loop: from the base's raw logits to those that the tuned base is thought to have."""

    def __init__(self, tuned: StepStream, untuned: StepStream, beta: float, criteria: WatchedCriteria) -> None:
        self.tuned, self.untuned = tuned, untuned
        self.taken = 0
        self._beta = beta
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.taken:
            self._append(input_ids, scores.shape[-1])
        tuned, untuned = [stream.next_logits().to(scores.device) for stream in (self.tuned, self.untuned)]
        shared = min(scores.shape[-1], tuned.shape[-1], untuned.shape[-1])
        moved = scores.clone()
        moved[:, :shared] += self._beta * _difference(tuned[:, :shared], untuned[:, :shared])
        models = ("base", scores), ("assistant_model", tuned), ("reference_model", untuned), ("emulated model", moved)
        for name, logits in models:
            check_usable(name, unusable(logits) & ~self._criteria.ended(input_ids), [self.taken] * len(scores))
        self.taken += 1
        return moved

    def _append(self, input_ids: torch.Tensor, vocabulary: int) -> None:
        """Gives the small models the token that was chosen last, of which a row that has ended may be padding."""
        for name, stream in (("assistant_model", self.tuned), ("reference_model", self.untuned)):
            if vocabulary > vocabulary_size(stream.model):
                check_readable(name, input_ids[~self._criteria.ended(input_ids), -1].tolist(), stream.model)
            stream.append(input_ids[:, -1])


def _difference(tuned: torch.Tensor, untuned: torch.Tensor) -> torch.Tensor:
    """What tuning changed; nothing where neither model ever says a token, whose logits are -inf."""
    return torch.where(tuned == untuned, 0.0, tuned - untuned)


def _weight(beta: Any) -> float:
    number = as_number(beta)
    if number is None or not abs(number) <= sys.float_info.max:
        raise WSDValueError(f"beta={beta!r}: must be a finite number")
    return float(number)


def _check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, small: SmallModel) -> None:
    sizes = vocabulary_size(base), vocabulary_size(small.model)
    if None in (tokenizer, small.tokenizer) and sizes[0] != sizes[1]:
        raise WSDValueError(
            f"the base's vocabulary has {sizes[0]} entries and that of {small.name}_model {sizes[1]}: if they differ only in "
            "padding, pass tokenizer= and assistant_tokenizer=, which are then compared"
        )
    if not same_vocabulary(*sizes, tokenizer, small.tokenizer):
        raise WSDValueError(
            "tokenizer and assistant_tokenizer are two vocabularies: strategy='emulated_fine_tuning' adds logits token by "
            "token and needs one; 'wsd' and 'weak_to_strong_search' cross as text"
        )


def _stream(small: SmallModel, call: Call) -> StepStream:
    """The small model's side of a call, checked; runs no forward."""
    prompt = small.prompt(call.prompt, call.copies, tokenizer=None, one_vocabulary=True)
    _check_context(f"{small.name}_model", small.model, prompt, call.budget)
    return StepStream(small.model, *prompt, call.budget)


def _check_context(name: str, model: PreTrainedModel, prompt: Prompt, budget: int) -> None:
    if passes_context(model, prompt.attention_mask, budget):
        raise WSDValueError(
            f"the response may pass the end of the context of {name}, {context_size(model)} tokens: "
            "shorten the prompt or max_new_tokens"
        )


def _stats(call: Call, emulated: _Emulated) -> GuidedStats:
    tuned, untuned = emulated.tuned, emulated.untuned
    return GuidedStats(
        base_forwards=emulated.taken,
        base_tokens=base_tokens(call, emulated.taken),
        pilot_forwards=tuned.forwards,
        pilot_tokens=tuned.tokens,
        reference_forwards=untuned.forwards,
        reference_tokens=untuned.tokens,
        cache_memory=None,
        peak_memory=peak_memory(call.base, tuned.model, untuned.model),
    )
