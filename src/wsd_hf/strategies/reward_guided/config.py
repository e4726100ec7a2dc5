"""`strategy="reward_guided"`: the pilot writes step by step, and the base writes those of low reward (arXiv 2501.19324).

The pilot writes a step, and a reward judges the response with it. At or above δ the step is kept as it is. Below, it is
dropped, and the base writes a step in its place, which is not judged. Then the pilot writes the next step. A step that the
budget cuts is judged as a whole, so that a smaller budget changes no token before it.

A step is optional white space and the text after it up to the first newline, in whole tokens of the model that writes it;
`step_length` tokens without a newline count as a step too. If the pilot ends the response right after a step, the end belongs
to the step: the reward is told so, and an accepted one ends the response with the base's EOS. The base writes a step instead
where the caller's processors forbid an EOS (`min_new_tokens`), where there is none, and where the pilot can write nothing: its
context is full, or a character is incomplete that only the base's vocabulary cuts.

δ = 0.7 is the paper's; it belongs to rewards in [0, 1]. docs/strategies/reward-guided.md lists the deliberate differences from
the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...engine.call import Call
from ...engine.checks import check_kind
from ...engine.numbers import check_number, check_positive_integer
from ...engine.pilot_side import PilotSide, bridge_to_base, pilot_side
from ...engine.ragged_stream import real_tokens
from ...engine.recurrent_support import reads_single_tokens
from ...engine.strategy import StrategyConfig, check_choice, keyword
from ...engine.supported import unsupported_reason
from ...engine.text_scores import TextScore
from ...errors import WSDValueError
from ...speculation.setup import Setup
from . import loop
from .output import RewardGuidedOutput
from .reward_model import RewardModel
from .steps import Steps, StepText


@dataclass(frozen=True, kw_only=True)
class RewardGuidedConfig(StrategyConfig):
    """Settings of reward-guided decoding (Liao et al., arXiv 2501.19324); `threshold` defaults to the paper's.

    A tokenizer must be passed, the base's or the pilot's, since steps end in text and rewards are of text; both where the
    vocabularies differ. The pilot's EOS ends a response, beside those of its generation config. Processors and criteria of the
    caller's own must depend on nothing but the prefix that they are shown. `output_scores` and `output_logits` are refused.

    Args:
        threshold: δ, any finite number. A step of the pilot is kept if its reward is at least δ.
        delimiter: text that ends a step.
        step_length: most tokens of a step, of the model that writes it.
        reward: needed. A function of (texts, ended, of) to one number for each text: responses so far, the step to be judged
            included; whether each ends there; and the number of its prompt. Or a sequence-classification model with
            `num_labels=1`, whose logit is the reward of the pilot's prompt and the text; see `RewardModel`.
        reward_tokenizer: of a reward that is a model.
        assistant_do_sample: whether the pilot samples; None: as the base does.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    threshold: float = 0.7
    delimiter: str = "\n"
    step_length: int = 64
    reward: TextScore | PreTrainedModel | None = field(default=None, metadata=keyword("reward", travels=False))
    reward_tokenizer: PreTrainedTokenizerBase | None = field(default=None, metadata=keyword("reward_tokenizer", travels=False))
    assistant_do_sample: bool | None = field(default=None, metadata=keyword("assistant_do_sample"))

    name: ClassVar[str] = "reward_guided"
    prefix: ClassVar[str] = "reward_guided_"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_number("threshold", self.threshold))
        if not isinstance(self.delimiter, str) or not self.delimiter:
            raise WSDValueError(f"delimiter={self.delimiter!r}: must be a text that is not empty")
        object.__setattr__(self, "step_length", check_positive_integer("step_length", self.step_length))
        if self.reward is not None and not callable(self.reward):
            raise WSDValueError(
                f"reward={self.reward!r}: must be a function of (texts, ended, of), or a sequence-classification model"
            )
        check_kind("reward_tokenizer", self.reward_tokenizer, PreTrainedTokenizerBase)
        check_choice("assistant_do_sample", self.assistant_do_sample, (True, False, None))

    def decode(self, call: Call) -> RewardGuidedOutput:
        """Decodes on ragged streams of both models."""
        base_tokenizer, tokenizer = call.tokenizer or call.pilot.tokenizer, call.pilot.tokenizer or call.tokenizer
        if base_tokenizer is None or tokenizer is None:
            raise WSDValueError("strategy='reward_guided' judges text: pass the base's tokenizer as tokenizer=")
        side = pilot_side(call, self.assistant_do_sample)
        bridge = bridge_to_base(call, side, side.room.tolist())
        reason = unsupported_reason(call, {"pilot": side.model}) or reads_single_tokens("base", call.base)
        for name in ("output_scores", "output_logits"):
            if getattr(call.generation_config, name):
                reason = f"{name}=True was given, and the base does not score the pilot's steps"
        if reason:
            raise WSDValueError(f"strategy='reward_guided' cannot serve this call: {reason}")
        text = StepText(base_tokenizer, self.delimiter)
        judge = loop.Judge(self._reward(call, side, tokenizer), self.threshold, text, call.copies)
        setup = Setup(side, bridge, Steps(len(call.input_ids), self.step_length, text), self.step_length)
        return loop.decode(call, setup, judge, StepText(tokenizer, self.delimiter))

    def _reward(self, call: Call, side: PilotSide, tokenizer: PreTrainedTokenizerBase) -> TextScore:
        """The reward as a function; `tokenizer` is that of the pilot's prompts."""
        if self.reward is None:
            raise WSDValueError("strategy='reward_guided' needs a reward: pass reward=, a function or a model")
        if isinstance(self.reward, torch.nn.Module):
            prompts = real_tokens(*side.prompt)[:: call.copies]
            texts = [tokenizer.decode(prompt, clean_up_tokenization_spaces=False) for prompt in prompts]
            return RewardModel(self.reward, self.reward_tokenizer, texts)
        if self.reward_tokenizer is not None:
            raise WSDValueError("reward_tokenizer has no effect with a reward that is a function: leave it out")
        return self.reward
