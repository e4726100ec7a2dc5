"""Strategies that are one function: from the logits of base, pilot and reference to the scores of the next token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine.call import Call
from ..engine.checks import check_finite, check_readable, context_size, not_finite, vocabulary_size
from ..engine.hf_loop import TokenStreamer, WatchedCriteria, base_tokens, run
from ..engine.lockstep_stream import LockstepStream
from ..engine.pilot_side import PilotSide, pilot_warpers
from ..engine.small_model import Prompt, SmallModel
from ..engine.stats import Stats, Work, peak_memory, work
from ..engine.strategy import StrategyOutput
from ..engine.supported import passes_context
from ..errors import WSDValueError
from ..text.bridge import OneVocabulary
from ..text.vocabulary import same_vocabulary
from . import loop
from .config import SpeculativeConfig
from .rule import Logits, Rule, over_vocabulary
from .setup import ReferenceSide, Setup

NAMES = {"assistant": "pilot", "reference": "reference"}
"""Small models, as arguments begin and as logits name them."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig(SpeculativeConfig):
    """Settings of a strategy whose next-token scores are a pure function of the models' raw logits.

    A subclass is its settings and `target`, nothing else. On the fast path the pilot proposes tokens; the base, and the
    reference if there is one, read all of them in one forward each; kept are those that the target would have written itself:
    its likeliest tokens, or when sampling draws from its distribution (rejection rule, arXiv 2211.17192). Step by step, the
    same function runs in transformers' own loop. The caller's processors and warpers shape the target. Each model has a prompt
    and a cache of its own.

    All models need one vocabulary: given both tokenizers, vocabularies are compared by what they do; without, equal widths of
    the logits count as one vocabulary. The pilot's EOS ends a response too, unless the call has an `eos_token_id` of its own:
    the end of a turn of a chat model is no EOS of most bases. `output_logits` gives the base's own, `output_scores` those that
    were chosen from.
    """

    ends_with_pilot: ClassVar[bool] = True

    def target(self, logits: Logits) -> torch.Tensor:
        """Scores of the next token at every position, float32 [rows, positions, V]; -inf for impossible tokens.

        It must depend on nothing but the logits at the same position, and leave them as they are.
        """
        raise NotImplementedError

    def decode(self, call: Call) -> StrategyOutput:
        """Decodes on the fast path or step by step; greedy sequences are the same."""
        prompts = self._prompts(call)
        models = {NAMES[name]: call.partners[name].model for name in prompts}
        if self.step_by_step(call, models):
            output, stats = self._stepwise(call, prompts)
        else:
            output, stats = loop.decode(call, self._setup(call, prompts), self, one_writer=False)
        return StrategyOutput(**output, stats=stats)

    def _prompts(self, call: Call) -> dict[str, Prompt]:
        """Prompt of each small model; raises if the call can't be served."""
        if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in call.processors):
            raise WSDValueError(
                f"guidance_scale is not supported by strategy={self.name!r}, nor its processor: it runs the base alone"
            )
        for name in self.partners:
            self._check_vocabulary(call, call.partners[name])
        _check_context("the base", call.base, call.prompt, call.budget)
        prompts = {}
        for name in self.partners:
            small = call.partners[name]
            prompts[name] = small.prompt(call.prompt, call.copies, tokenizer=None, one_vocabulary=True)
            _check_context(f"{name}_model", small.model, prompts[name], call.budget)
        return prompts

    def _check_vocabulary(self, call: Call, small: SmallModel) -> None:
        sizes = vocabulary_size(call.base), vocabulary_size(small.model)
        if None in (call.tokenizer, small.tokenizer) and sizes[0] != sizes[1]:
            raise WSDValueError(
                f"the base's vocabulary has {sizes[0]} entries and that of {small.name}_model {sizes[1]}: if they differ only "
                "in padding, pass tokenizer= and assistant_tokenizer=, which are then compared"
            )
        if not same_vocabulary(*sizes, call.tokenizer, small.tokenizer):
            raise WSDValueError(
                f"tokenizer and assistant_tokenizer are two vocabularies: strategy={self.name!r} joins logits token by "
                "token and needs one; 'wsd' and 'weak_to_strong_search' cross as text"
            )

    def _setup(self, call: Call, prompts: Mapping[str, Prompt]) -> Setup[Rule]:
        pilot, rows = call.pilot.model, len(call.input_ids)
        room = torch.full((rows,), min(call.budget, sys.maxsize), device="cpu")
        warpers = pilot_warpers(call, self.assistant_do_sample)
        reference = ReferenceSide(call.reference.model, prompts["reference"]) if "reference" in prompts else None
        return Setup(
            PilotSide(pilot, prompts["assistant"], warpers, room, end_token_ids=set(), one_vocabulary=True),
            OneVocabulary(set(), room.tolist()),
            TargetRule(call, self.partners, self.target),
            longest=0,
            reference=reference,
        )

    def _stepwise(self, call: Call, prompts: Mapping[str, Prompt]) -> tuple[GenerateDecoderOnlyOutput, Stats]:
        criteria, streamer = WatchedCriteria(call.criteria), TokenStreamer(call.streamer)
        streams = {NAMES[name]: LockstepStream(call.partners[name].model, *prompts[name], call.budget) for name in prompts}
        target = _TargetProcessor(streams, self.target, criteria, streamer)
        output = run(call, LogitsProcessorList([target, *call.processors]), criteria, streamer)
        stats = Stats(
            Work(target.taken, base_tokens(call, target.taken)),
            work(streams["pilot"]),
            work(streams["reference"]) if "reference" in streams else None,
            peak_memory=peak_memory(call.base, *(stream.model for stream in streams.values())),
        )
        return output, stats


class TargetRule(Rule):
    """The rule of a target: every row is free, and the small models must be able to read what is written."""

    reads_pilot = True

    def __init__(self, call: Call, partners: tuple[str, ...], target: Callable[[Logits], torch.Tensor]) -> None:
        super().__init__(len(call.input_ids))
        size = vocabulary_size(call.base)
        small = {f"{name}_model": call.partners[name].model for name in partners}
        self._narrower = {name: model for name, model in small.items() if vocabulary_size(model) < size}
        self._target = target

    def target(self, logits: Logits) -> torch.Tensor:
        return self._target(logits)

    def written(self, row: int, token: int, pilot_log_prob: float) -> None:
        for name, model in self._narrower.items():
            check_readable(name, [token], model)


class _TargetProcessor(LogitsProcessor):
    """The first processor of transformers' loop: from the base's raw logits to the target's scores."""

    def __init__(
        self,
        streams: Mapping[str, LockstepStream],
        target: Callable[[Logits], torch.Tensor],
        criteria: WatchedCriteria,
        streamer: TokenStreamer,
    ) -> None:
        self.taken = 0
        self._streams, self._target, self._criteria, self._streamer = streams, target, criteria, streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        size = scores.shape[-1]
        if self.taken:
            self._append(input_ids, size)
        small = {name: stream.next_logits().to(scores.device) for name, stream in self._streams.items()}
        logits = Logits(scores[:, None], **{name: over_vocabulary(one[:, None], size) for name, one in small.items()})
        target, ended = self._target(logits)[:, 0], self._criteria.ended(input_ids)
        for name, one in {"base": scores, **small, "target": target}.items():
            check_finite(name, not_finite(one) & ~ended, [self.taken] * len(scores))
        self._streamer.expect(scores, chosen=~ended)
        self.taken += 1
        return target

    def _append(self, input_ids: torch.Tensor, vocabulary: int) -> None:
        """Feeds the last token to the small models; in a row that has ended it may be padding."""
        for name, stream in self._streams.items():
            if vocabulary > vocabulary_size(stream.model):
                argument = next(f"{one}_model" for one, other in NAMES.items() if other == name)
                check_readable(argument, input_ids[~self._criteria.ended(input_ids), -1].tolist(), stream.model)
            stream.append(input_ids[:, -1])


def _check_context(name: str, model: PreTrainedModel, prompt: Prompt, budget: int) -> None:
    if passes_context(model, prompt.attention_mask, budget):
        raise WSDValueError(
            f"the response may pass the end of the context of {name}, {context_size(model)} tokens: "
            "shorten the prompt or max_new_tokens"
        )
