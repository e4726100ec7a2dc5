"""`strategy="emulated_fine_tuning"`: the base's logits, moved by what tuning did to a small model.

Emulated fine-tuning (arXiv 2310.12962), also known as proxy tuning (arXiv 2401.08565).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LogitsProcessor, PreTrainedModel, UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..engine.call import Call
from ..engine.checks import check_finite, check_readable, context_size, not_finite, vocabulary_size
from ..engine.hf_loop import WatchedCriteria, base_tokens, run
from ..engine.lockstep_stream import LockstepStream
from ..engine.numbers import as_number
from ..engine.small_model import Prompt, SmallModel
from ..engine.stats import Stats, Work, peak_memory, work
from ..engine.strategy import StrategyConfig, StrategyOutput
from ..engine.supported import passes_context
from ..errors import WSDValueError
from ..text.vocabulary import same_vocabulary


@dataclass(frozen=True, kw_only=True)
class EmulatedFineTuningConfig(StrategyConfig):
    """Settings of emulated fine-tuning: the base's raw logits plus β (tuned - reference).

    Each model has a prompt and a cache of its own. Greedy decoding, sampling, processors, criteria and streamers work as in
    ordinary generation, whose loop runs: one forward of each model for every token. `output_logits` gives the base's own,
    `output_scores` those that were chosen from. All models need one vocabulary: given both tokenizers, vocabularies are
    compared by what they do; without, equal widths of the logits count as one vocabulary.

    Args:
        beta: β, any finite number; 0 is the base alone.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    beta: float = 1.0

    name: ClassVar[str] = "emulated_fine_tuning"
    partners: ClassVar[tuple[str, ...]] = ("assistant", "reference")

    def __post_init__(self) -> None:
        number = as_number(self.beta)
        if number is None or not abs(number) <= sys.float_info.max:
            raise WSDValueError(f"beta={self.beta!r}: must be a finite number")
        object.__setattr__(self, "beta", float(number))

    def decode(self, call: Call) -> StrategyOutput:
        """Decodes in transformers' own loop."""
        for small in (call.pilot, call.reference):
            _check_vocabulary(call, small)
        if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in call.processors):
            raise WSDValueError(
                "guidance_scale is not supported by strategy='emulated_fine_tuning', nor its processor: it runs the base alone"
            )
        _check_context("the base", call.base, call.prompt, call.budget)
        criteria = WatchedCriteria(call.criteria)
        tuned, reference = _stream(call.pilot, call), _stream(call.reference, call)
        emulated = _Emulated(tuned, reference, self.beta, criteria)
        output = run(call, [emulated, *call.processors], criteria)
        stats = Stats(
            Work(emulated.taken, base_tokens(call, emulated.taken)),
            work(tuned),
            work(reference),
            peak_memory=peak_memory(call.base, tuned.model, reference.model),
        )
        return StrategyOutput(**output, stats=stats)


class _Emulated(LogitsProcessor):
    """The first processor of the loop: from the base's raw logits to those of an emulated tuned base."""

    def __init__(self, tuned: LockstepStream, reference: LockstepStream, beta: float, criteria: WatchedCriteria) -> None:
        self.tuned, self.reference = tuned, reference
        self.taken = 0
        self._beta = beta
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.taken:
            self._append(input_ids, scores.shape[-1])
        tuned, reference = [stream.next_logits().to(scores.device) for stream in (self.tuned, self.reference)]
        shared = min(scores.shape[-1], tuned.shape[-1], reference.shape[-1])
        before, after, moved = reference[:, :shared], tuned[:, :shared], scores.clone()
        moved[:, :shared] += self._beta * torch.where(after == before, 0.0, after - before)  # both may be -inf
        models = ("base", scores), ("assistant_model", tuned), ("reference_model", reference), ("emulated model", moved)
        for name, logits in models:
            check_finite(name, not_finite(logits) & ~self._criteria.ended(input_ids), [self.taken] * len(scores))
        self.taken += 1
        return moved

    def _append(self, input_ids: torch.Tensor, vocabulary: int) -> None:
        """Feeds the last token to the small models; in a row that has ended it may be padding."""
        for name, stream in (("assistant_model", self.tuned), ("reference_model", self.reference)):
            if vocabulary > vocabulary_size(stream.model):
                check_readable(name, input_ids[~self._criteria.ended(input_ids), -1].tolist(), stream.model)
            stream.append(input_ids[:, -1])


def _check_vocabulary(call: Call, small: SmallModel) -> None:
    sizes = vocabulary_size(call.base), vocabulary_size(small.model)
    if None in (call.tokenizer, small.tokenizer) and sizes[0] != sizes[1]:
        raise WSDValueError(
            f"the base's vocabulary has {sizes[0]} entries and that of {small.name}_model {sizes[1]}: if they differ only in "
            "padding, pass tokenizer= and assistant_tokenizer=, which are then compared"
        )
    if not same_vocabulary(*sizes, call.tokenizer, small.tokenizer):
        raise WSDValueError(
            "tokenizer and assistant_tokenizer are two vocabularies: strategy='emulated_fine_tuning' adds logits token by "
            "token and needs one; 'wsd' and 'weak_to_strong_search' cross as text"
        )


def _stream(small: SmallModel, call: Call) -> LockstepStream:
    """The small model's side of a call, checked; runs no forward."""
    prompt = small.prompt(call.prompt, call.copies, tokenizer=None, one_vocabulary=True)
    _check_context(f"{small.name}_model", small.model, prompt, call.budget)
    return LockstepStream(small.model, *prompt, call.budget)


def _check_context(name: str, model: PreTrainedModel, prompt: Prompt, budget: int) -> None:
    if passes_context(model, prompt.attention_mask, budget):
        raise WSDValueError(
            f"the response may pass the end of the context of {name}, {context_size(model)} tokens: "
            "shorten the prompt or max_new_tokens"
        )
