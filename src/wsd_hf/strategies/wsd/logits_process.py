"""Weak-to-Strong Decoding as a logits processor: until the switch, the pilot's next token is the only one to choose."""

from __future__ import annotations

import weakref

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ... import _compat
from ...engine.call import Call
from ...engine.checks import check_kind, check_models, check_prompt
from ...engine.joint_calls import check_whole
from ...engine.sampling import force
from ...engine.small_model import SmallModel
from ...errors import WSDValueError
from .config import WSDConfig
from .stepwise import DraftSteps
from .switch_rules import SwitchRuleName


class WSDLogitsProcessor(LogitsProcessor):
    """Weak-to-Strong Decoding as a logits processor, for any causal base, also one that knows nothing of this package.

    `model.generate(..., logits_processor=[WSDLogitsProcessor(pilot)])` gives the sequences of
    `generate(..., strategy="wsd")`: the check reads the base's raw logits whatever other processors are configured, and
    the drafted token overrides them. One object may serve many calls and threads: each call has a state of
    its own, and starts afresh.

    Args:
        pilot: the small aligned model.
        wsd_config: threshold, window, draft limit; default: the generation config's `wsd_*` keys, then the paper's.
        switch_criteria: as in `WSDConfig`.
        assistant_input_ids: the pilot's prompt, [batch, prompt]; default: the base's, or its text.
        assistant_attention_mask: its mask, [batch, prompt]; padding on the left. Default: nothing is padded.
        assistant_do_sample: whether the pilot samples; default: as the base does. It samples with the call's warpers
            (temperature, top-k, ...).
        tokenizer: the base's; needed, together with the pilot's, where the two vocabularies differ.
        assistant_tokenizer: the pilot's. Its EOS ends a draft, beside those of the pilot's generation config.

    Raises:
        WSDValueError: at the first step, for models or prompts that do not go together, outside greedy decoding and sampling,
            or for a pilot whose weights are sharded over processes.
    """

    def __init__(
        self,
        pilot: PreTrainedModel,
        wsd_config: WSDConfig | None = None,
        *,
        switch_criteria: SwitchRuleName | StoppingCriteria | None = None,
        assistant_input_ids: torch.Tensor | None = None,
        assistant_attention_mask: torch.Tensor | None = None,
        assistant_do_sample: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase)
        self._pilot = SmallModel("assistant", pilot, assistant_input_ids, assistant_attention_mask, assistant_tokenizer)
        self._tokenizer, self._config = tokenizer, wsd_config
        self._keywords = {"switch_criteria": switch_criteria, "assistant_do_sample": assistant_do_sample}
        WSDConfig.resolve(self._keywords, wsd_config)
        self._steps: dict[int, DraftSteps] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores, with every drafting row's choice reduced to the pilot's token, [batch, vocabulary]."""
        if (loop := _compat.decoding_loop()) is None:
            raise WSDValueError(
                "WSDLogitsProcessor works inside generate() with greedy decoding or sampling; it was called from "
                "elsewhere (beam search, assisted generation, a loop of your own)"
            )
        return force(scores, self._steps_of(loop, input_ids).advance(input_ids, loop.logits, loop.finished))

    def _steps_of(self, loop: _compat.DecodingLoop, input_ids: torch.Tensor) -> DraftSteps:
        key = id(loop.processors)
        if key not in self._steps:
            criteria, settings = StoppingCriteriaList(), loop.generation_config
            partners = {"assistant": self._pilot}
            call = Call(
                loop.model, input_ids, loop.attention_mask, loop.processors, criteria, settings, partners, self._tokenizer
            )
            check_models({"the model": loop.model, "assistant_model": self._pilot.model})
            check_whole("the pilot of WSDLogitsProcessor", self._pilot.model)
            check_prompt("input_ids", *call.prompt, rows=len(input_ids))
            config = WSDConfig.resolve(self._keywords, self._config, settings)
            self._steps[key] = DraftSteps(config.draft_setup(call))
            weakref.finalize(loop.processors, self._steps.pop, key, None)
        return self._steps[key]
