"""The step-by-step path: until the switch, the pilot's next token is the only one the base may choose."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from . import _compat
from .checks import (
    check_adapted,
    check_causal,
    check_prompt,
    check_room,
    check_usable,
    eos_token_ids,
    unusable,
    vocabulary_size,
)
from .config import WSDConfig
from .decoding.acceptance import draw
from .draft import FREE, Draft, SwitchReason
from .errors import WSDValueError
from .pilot import PilotStream
from .switch import SwitchCriteria
from .text.bridge import Offer, OneVocabulary
from .text.vocabulary import check_vocabularies

SAMPLING_WARPERS = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


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
    bridge: OneVocabulary
    """From the pilot's tokens to the base's."""


class WSDLogitsProcessor(LogitsProcessor):
    """Weak-to-Strong Decoding as a logits processor, for any causal base, also one that knows nothing of this package.

    `model.generate(..., logits_processor=[WSDLogitsProcessor(pilot)])` gives the sequences of
    `generate(..., strategy="wsd")`: the check reads the base's raw logits whatever other processors are configured, and
    the drafted token has the last word over them. One object may serve many calls and threads: each call has a state of
    its own, and starts afresh.

    Args:
        pilot: the small aligned model; it shares the base's vocabulary.
        wsd_config: threshold, window, draft limit; default: the generation config's `wsd_*` keys, then the paper's.
        switch_criteria: takes the place of the paper's rule; see `SwitchCriteria` for what it is asked.
        assistant_input_ids: the pilot's prompt, [batch, prompt]; default: the base's.
        assistant_attention_mask: its mask, [batch, prompt]; padding on the left. Default: nothing is padded.
        assistant_do_sample: whether the pilot samples; default: as the base does. It samples with the call's warpers
            (temperature, top-k, ...).
        tokenizer: the base's; needed only where the widths of the two vocabularies differ.
        assistant_tokenizer: the pilot's; likewise. Its EOS ends a draft, beside those of the pilot's generation config.

    Raises:
        WSDValueError: at the first step, for models or prompts that do not go together, or outside greedy decoding and
            sampling.
    """

    def __init__(
        self,
        pilot: PreTrainedModel,
        wsd_config: WSDConfig | None = None,
        *,
        switch_criteria: StoppingCriteria | None = None,
        assistant_input_ids: torch.Tensor | None = None,
        assistant_attention_mask: torch.Tensor | None = None,
        assistant_do_sample: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_causal("assistant_model", pilot)
        if assistant_attention_mask is not None and assistant_input_ids is None:
            raise WSDValueError(
                "assistant_attention_mask belongs to assistant_input_ids, which is missing: pass both or neither"
            )
        self.pilot = check_adapted("assistant_model", pilot)
        self.wsd_config = wsd_config
        self.switch_criteria = switch_criteria
        self.assistant_input_ids = assistant_input_ids
        self.assistant_attention_mask = assistant_attention_mask
        self.assistant_do_sample = assistant_do_sample
        self.tokenizer = tokenizer
        self.assistant_tokenizer = assistant_tokenizer
        self._steps: dict[int, DraftSteps] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, with every drafting row's choice reduced to the pilot's token, [batch, vocabulary]."""
        loop = _compat.decoding_loop()
        if loop is None:
            raise WSDValueError(
                "WSDLogitsProcessor works inside generate() with greedy decoding or sampling; it was called from "
                "elsewhere (beam search, assisted generation, a loop of your own)"
            )
        return force(scores, self._steps_of(loop, input_ids).advance(input_ids, loop.logits, loop.finished))

    def _steps_of(self, loop: _compat.DecodingLoop, input_ids: torch.Tensor) -> DraftSteps:
        key = id(loop.processors)
        if key not in self._steps:
            setup = self.prepare(loop.model, input_ids, loop.attention_mask, loop.generation_config, loop.processors)
            self._steps[key] = DraftSteps(setup)
            weakref.finalize(loop.processors, self._steps.pop, key, None)
        return self._steps[key]

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
        check_vocabularies(vocabulary_size(base), vocabulary_size(self.pilot), self.tokenizer, self.assistant_tokenizer)
        if attention_mask is None:
            attention_mask = _compat.whole_mask(input_ids, generation_config)
        check_prompt("input_ids", input_ids, attention_mask, rows=len(input_ids))
        check_room("base", base, attention_mask)
        config = self.wsd_config or WSDConfig.resolve({}, None, generation_config)
        copies = generation_config.num_return_sequences or 1
        pilot_ids, pilot_mask = self._pilot_prompt(input_ids, attention_mask, copies)
        limits = check_room("pilot", self.pilot, pilot_mask).clamp(max=config.max_draft_tokens).cpu()
        base_eos = eos_token_ids(generation_config)
        if config.draft_end == "stop" and not base_eos:
            raise WSDValueError("draft_end='stop' ends a response with the base's EOS: set eos_token_id")
        do_sample = generation_config.do_sample if self.assistant_do_sample is None else self.assistant_do_sample
        return DraftSetup(
            self.pilot,
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
            OneVocabulary(
                base_eos | eos_token_ids(self.pilot.generation_config) | eos_token_ids(self.assistant_tokenizer),
                limits.tolist(),
            ),
        )

    def _pilot_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, copies: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, name = self.assistant_input_ids, self.assistant_attention_mask, "assistant_input_ids"
        if ids is None:
            ids, mask, name = input_ids, attention_mask, "input_ids"
        else:
            mask = torch.ones_like(ids) if mask is None else mask
            ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        check_prompt(name, ids, mask, rows=len(input_ids))
        if (largest := int(ids.max())) >= vocabulary_size(self.pilot):
            raise WSDValueError(
                f"{name} contains token id {largest}, but the pilot's vocabulary has {vocabulary_size(self.pilot)} tokens: "
                "pass assistant_input_ids= made with the pilot's tokenizer"
            )
        return ids, mask


class DraftSteps:
    """The draft of one call, token by token, with forwards of the pilot as they are needed.

    Attributes:
        taken: steps so far, one response token each.
    """

    def __init__(self, setup: DraftSetup) -> None:
        self.draft = setup.draft
        self.stream = PilotStream(setup.pilot, setup.input_ids, setup.attention_mask, setup.longest)
        self.taken = 0
        self._bridge = setup.bridge
        self._warpers = setup.warpers
        self._offers = [Offer([], None) for _ in setup.input_ids]

    def advance(self, input_ids: torch.Tensor, logits: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """One step of every row.

        Args:
            input_ids: prompt and response so far, [batch, length].
            logits: the base's raw logits at its last token, float32 [batch, vocabulary].
            finished: rows that need nothing more, BoolTensor[batch].

        Returns:
            The token that each row must take now, LongTensor[batch]; `FREE` where the base chooses.
        """
        check_usable("base", unusable(logits) & ~finished, [self.taken] * len(logits))
        self.taken += 1
        self.draft.drop(finished.cpu())
        tokens = self._next_tokens(input_ids.device)
        if not self.draft.drafting.any():
            return self.draft.closing().to(input_ids.device)
        index = tokens.clamp(max=logits.shape[-1] - 1)[:, None].to(logits.device)
        log_probs = logits.log_softmax(dim=-1).gather(1, index).squeeze(1).cpu()
        forced = self.draft.take(tokens, log_probs, self.draft.drafting).to(input_ids.device)
        self._stop_exhausted("draft_limit")
        return forced

    def _next_tokens(self, device: torch.device) -> torch.Tensor:
        """The next token of each draft, LongTensor[batch]; drafts that have none are stopped."""
        while any(self._offers[row] == Offer([], None) for row in self._drafting()):
            self._propose(device)
        self._stop_exhausted("draft_ended", "draft_limit")
        tokens = torch.zeros(len(self._offers), dtype=torch.long)
        for row in self._drafting():
            tokens[row] = self._offers[row].tokens.pop(0)
        return tokens

    def _propose(self, device: torch.device) -> None:
        """One more token of the pilot in every row, though some may have enough for now."""
        logits = self.stream.next_logits().to(device)
        check_usable("pilot", unusable(logits).cpu() & self.draft.drafting, [self.taken - 1] * len(logits))
        proposed = choose(logits, self._warpers)[0]
        self.stream.append(proposed)
        for row in self._drafting():
            tokens, over = self._offers[row]
            if over is None:
                offer = self._bridge.offer(row, [int(proposed[row])])
                self._offers[row] = Offer(tokens + offer.tokens, offer.over)

    def _drafting(self) -> list[int]:
        return self.draft.drafting.nonzero().flatten().tolist()

    def _stop_exhausted(self, *reasons: SwitchReason) -> None:
        """Stops the drafts that have nothing left, for one of some reasons."""
        for reason in reasons:
            exhausted = [offer == Offer([], reason) for offer in self._offers]
            self.draft.stop(torch.tensor(exhausted), reason)


def choose(logits: torch.Tensor, warpers: LogitsProcessorList | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pilot's choice: greedy without warpers, else drawn from the warped distribution, which is returned too.

    Args:
        logits: [batch, vocabulary].
        warpers: of the call; none of `SAMPLING_WARPERS` looks at the tokens before.
    """
    if warpers is None:
        return logits.argmax(dim=-1), None
    probabilities = warpers(None, logits).softmax(dim=-1)
    return draw(probabilities), probabilities


def force(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The scores with `tokens` as their rows' only choice; rows that are `FREE` keep theirs.

    Args:
        scores: [batch, vocabulary]; not changed.
        tokens: LongTensor[batch].
    """
    only = torch.full_like(scores, -torch.inf).scatter_(1, tokens.clamp(min=0)[:, None], 0.0)
    return torch.where((tokens != FREE)[:, None], only, scores)
