"""`strategy="nudging"`: the small aligned model writes the next word wherever the base is unsure (arXiv 2410.09300).

Let p be the base's largest probability of a next token: a float32 softmax of its raw logits, before temperature and
processors. Where p >= γ the base writes its own token, chosen as in ordinary generation. Where p < γ the pilot reads the
response so far and writes the next word, and the base reads that word in the forward that gives its next p. A word is
optional spaces and the characters up to the next space (U+0020), in whole tokens of the pilot; 16 tokens without a space
count as a word too. It continues the response as it stands, so it may be the rest of a word that the base has begun.

The response ends with the base's EOS where the pilot writes its own, if it is to write a word or has just written one. The
base writes on where the caller's processors forbid an EOS (`min_new_tokens`), where there is none, and where the pilot can
write nothing: its context is full, or a character is incomplete that only the base's vocabulary cuts. An EOS of the base
always ends the response.

γ = 0.4 is the value in the README of the authors' repository (fywalter/nudging); docs/strategies/nudging.md lists the
deliberate differences from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...engine.call import Call
from ...engine.numbers import check_probability
from ...engine.pilot_side import bridge_to_base, pilot_side
from ...engine.strategy import StrategyConfig, StrategyOutput, check_choice, keyword
from ...engine.supported import unsupported_reason
from ...errors import WSDValueError
from ...text.settled_tokens import ContinuationTokenizer
from . import loop


@dataclass(frozen=True, kw_only=True)
class NudgingConfig(StrategyConfig):
    """Settings of nudging (arXiv 2410.09300); the default is that of the authors' repository.

    A tokenizer must be passed, the base's or the pilot's, since words end in text; both where the vocabularies differ. The
    pilot's EOS ends a response, beside those of its generation config. Processors and criteria of the caller's own must depend
    on nothing but the prefix that they are shown. `output_scores` and `output_logits` are refused.

    Args:
        threshold: γ in (0, 1]. The pilot writes the next word where the base's largest probability is below γ.
        assistant_do_sample: whether the pilot samples; None: as the base does.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    threshold: float = 0.4
    assistant_do_sample: bool | None = field(default=None, metadata=keyword("assistant_do_sample"))

    name: ClassVar[str] = "nudging"
    prefix: ClassVar[str] = "nudging_"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_probability("threshold", self.threshold))
        check_choice("assistant_do_sample", self.assistant_do_sample, (True, False, None))

    def decode(self, call: Call) -> StrategyOutput:
        """Decodes on ragged streams of both models."""
        tokenizer = call.pilot.tokenizer or call.tokenizer
        if tokenizer is None:
            raise WSDValueError("strategy='nudging' finds the ends of words in text: pass the base's tokenizer as tokenizer=")
        side = pilot_side(call, self.assistant_do_sample)
        bridge = bridge_to_base(call, side, side.room.tolist())
        reason = unsupported_reason(call, {"pilot": side.model})
        for name in ("output_scores", "output_logits"):
            if getattr(call.generation_config, name):
                reason = f"{name}=True was given, and the base does not score every token of the pilot"
        if reason:
            raise WSDValueError(f"strategy='nudging' cannot serve this call: {reason}")
        return loop.decode(call, side, bridge, ContinuationTokenizer(tokenizer), self.threshold)
