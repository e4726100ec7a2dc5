"""`strategy="two_way"`: Weak-to-Strong Decoding in which the pilot takes over again where the base leaves its path.

As WSD until the base takes over. From then on the pilot reads what the base writes, and gives each of these tokens a
probability: a float32 softmax of its raw logits, after its own prompt and the response so far. Where the geometric mean over
the last w of them is below `handback_threshold`, the pilot drafts again from the next token on, until the base takes over by
the same rule as before. Windows cover the tokens of one stretch only, so that each model has written w tokens before the other
takes over, unless a draft ends before. They begin anew after a token in whose place the pilot would rather have ended the
response: what the base writes there is an ending of its own, such as the header of a next turn, and no departure.

With two vocabularies the pilot gives probabilities to its own tokens of the base's text since the base took over, as far as no
later text can change them, and w counts those. A draft then begins after a complete character.

The rule is this package's own; arXiv 2508.17739 and 2606.19755 are relatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.call import Call
from ...engine.checks import vocabulary_size
from ...engine.likelihoods import log_probs
from ...engine.numbers import as_number
from ...engine.pilot_side import PilotSide
from ...engine.recurrent_support import reads_single_tokens
from ...engine.stats import Stats
from ...engine.strategy import StrategyOutput
from ...engine.supported import unsupported_reason
from ...errors import WSDValueError
from ...speculation.rule import Drafted, SwitchReason, Text
from ...speculation.setup import Setup
from ...text.bridge import Bridge, TwoVocabularies
from .config import WSDConfig
from .draft import Draft
from .switch import window_mean


@dataclass(frozen=True)
class WriterChange:
    """A change of the writer within a response.

    Attributes:
        position: number of response tokens before it.
        writer: "pilot" or "base", of the tokens after it.
        reason: "left_path" where the pilot drafts again; else as in `WSDOutput.switch_reason`.
    """

    position: int
    writer: Literal["pilot", "base"]
    reason: SwitchReason | Literal["left_path"]


@dataclass
class TwoWayOutput(StrategyOutput):
    """`StrategyOutput`, plus the changes of the writer in each row, and what they were decided by.

    Attributes:
        changes: of each row, in order. The pilot writes first.
        log_probs: natural-log probability of each response token for the model that did not write it, float32
            [batch, response]: the base's of a drafted token, the pilot's of a token of the base. Of the latter those are NaN
            that do not count: where the pilot would have ended the response or could read no more, at the end of a response,
            and all of them with two vocabularies or `handback_threshold=0`.

    `past_key_values` is None on the fast path, whose cache has another form than transformers'.
    """

    changes: list[list[WriterChange]] = None  # type: ignore[assignment]
    log_probs: torch.Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class TwoWayConfig(WSDConfig):
    """Settings of WSD whose pilot drafts again where the base leaves its path; with `handback_threshold=0` it is WSD.

    `max_draft_tokens`, `draft_end` and `switch_criteria` hold for every draft of a response alike. A pilot whose context is
    full, or that lacks a token which the base has written, drafts no more.

    Args:
        handback_threshold: in [0, 1]. The pilot drafts again where the geometric mean of its probabilities of the base's last
            `window_size` tokens is below this.

    The other settings are those of `WSDConfig`.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

    handback_threshold: float = 0.1

    name: ClassVar[str] = "two_way"
    prefix: ClassVar[str] = "two_way_"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = as_number(self.handback_threshold)
        if number is None or not 0 <= number <= 1:
            raise WSDValueError(f"handback_threshold={self.handback_threshold!r}: must be a number from 0 to 1")
        object.__setattr__(self, "handback_threshold", float(number))

    def draft_setup(self, call: Call) -> Setup[Draft]:
        """As for WSD; the pilot may read a whole response."""
        setup = super().draft_setup(call)
        return replace(setup, longest=int(setup.side.room.max())) if self.handback_threshold else setup

    def _draft(self, side: PilotSide, bridge: Bridge, *arguments: Any) -> TwoWayDraft:
        return TwoWayDraft(self.handback_threshold, self.window_size, side, bridge, *arguments)

    def _goes_step_by_step(self, call: Call, setup: Setup[Draft]) -> bool:
        """As for WSD; raises if two vocabularies are to go step by step. Processors of the caller's are trusted with them."""
        if not setup.rule.one_by_one:
            return super()._goes_step_by_step(call, setup)
        reason = unsupported_reason(call, {"pilot": setup.side.model}) or reads_single_tokens("base", call.base)
        if self.engine == "step":
            reason = f"{self.prefix}engine='step' was given"
        if reason:
            raise WSDValueError(
                f"strategy={self.name!r} with two vocabularies takes the fast path, which cannot serve this call: {reason}; "
                f"without hand-back ({self.prefix}handback_threshold=0) it may go step by step"
            )
        return False

    def _output(self, call: Call, draft: Draft, output: GenerateDecoderOnlyOutput, stats: Stats) -> TwoWayOutput:
        rule, device = cast("TwoWayDraft", draft), call.input_ids.device
        width = output.sequences.shape[1] - call.input_ids.shape[1]
        return TwoWayOutput(
            **output,
            stats=stats,
            written_by_pilot=_table(rule.by_pilot, width, False, torch.bool).to(device),
            changes=rule.changes,
            log_probs=_table(rule.other_log_probs, width, math.nan, torch.float32).to(device),
        )


class TwoWayDraft(Draft):
    """The drafts of one call, and between them the pilot's probabilities of the base's text.

    Attributes:
        responses: token ids of each row.
        by_pilot: for each of them, whether the pilot wrote it.
        other_log_probs: of each of them, as in `TwoWayOutput.log_probs`.
        changes: of the writer, in each row.
    """

    def __init__(
        self,
        handback_threshold: float,
        window_size: int,
        side: PilotSide,
        bridge: Bridge,
        switch_criteria: Any,
        prompts: Sequence[Sequence[int]],
        *draft: Any,
    ) -> None:
        super().__init__(switch_criteria, prompts, *draft)
        rows, self._prompts = len(prompts), prompts
        self.responses: list[list[int]] = [[] for _ in range(rows)]
        self.by_pilot: list[list[bool]] = [[] for _ in range(rows)]
        self.other_log_probs: list[list[float]] = [[] for _ in range(rows)]
        self.changes: list[list[WriterChange]] = [[] for _ in range(rows)]
        self.reads_pilot = self.weighs_written = handback_threshold > 0 and bridge.token_by_token
        self.one_by_one = handback_threshold > 0 and not bridge.token_by_token  # what is settled is known before the next token
        self._least = math.log(handback_threshold) if handback_threshold else -math.inf
        self._window_size = window_size
        self._room, self._pilot_vocabulary = side.room.tolist(), vocabulary_size(side.model)
        self._bridge = bridge
        self._ends = torch.tensor(sorted(bridge.end_token_ids), dtype=torch.long, device="cpu")
        self._path: list[list[float]] = [[] for _ in range(rows)]  # the last w weights since the base took over
        self._settled: dict[int, list[int]] = {}  # the pilot's tokens that it has yet to weigh
        self._lost: set[int] = set()  # rows that the pilot can read no more

    def take(self, offered: Mapping[int, Drafted]) -> dict[int, int]:
        for row, drafted in offered.items():
            self._append(row, drafted.token, drafted.log_prob, by_pilot=True)
        return super().take(offered)

    def stop(self, row: int, reason: SwitchReason) -> None:
        if self.drafting[row] and reason not in ("budget", "stopped"):
            self.changes[row].append(WriterChange(len(self.responses[row]), "base", reason))
        super().stop(row, reason)

    def weigh(self, pilot: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities; NaN where the pilot's likeliest token would have ended the response."""
        self._ends = self._ends.to(pilot.device)
        return log_probs(pilot, tokens).masked_fill(torch.isin(pilot.argmax(dim=-1), self._ends), math.nan)

    def written(self, row: int, token: int, weight: float) -> None:
        if self.reads_pilot and self._readable(row, [token], len(self.responses[row]) + 1):
            self._append(row, token, weight)
            self._judge(row, [weight])
            return
        self._append(row, token, math.nan)
        if self.one_by_one and isinstance(self._bridge, TwoVocabularies) and row not in self._lost:
            settled = self._bridge.settle(row, self.responses[row])
            if not settled:
                self._judge(row, [])
            elif self._readable(row, settled, len(self._bridge.pilot_tokens(row))):
                self._settled[row] = settled

    def unweighed(self) -> dict[int, Text]:
        return {row: Text(self._bridge.pilot_tokens(row), len(settled)) for row, settled in self._settled.items()}

    def weighed(self, row: int, weights: list[float]) -> None:
        del self._settled[row]
        self._judge(row, weights)

    def _append(self, row: int, token: int, log_prob: float, by_pilot: bool = False) -> None:
        self.responses[row].append(token)
        self.by_pilot[row].append(by_pilot)
        self.other_log_probs[row].append(log_prob)

    def _readable(self, row: int, tokens: list[int], length: int) -> bool:
        """Whether the pilot has these tokens, and room for a response of so many tokens."""
        if length > self._room[row] or max(tokens) >= self._pilot_vocabulary:
            self._lost.add(row)
        return row not in self._lost

    def _judge(self, row: int, weights: list[float]) -> None:
        """Lets the pilot draft again where the base has left its path."""
        for weight in weights:
            self._path[row] = [] if math.isnan(weight) else [*self._path[row], weight][-self._window_size :]
        window = self._path[row]
        if len(window) < self._window_size or window_mean(window) >= self._least or not self._bridge.complete(row):
            return
        if not self._bridge.begin(row, self.responses[row], self._room[row]):
            self._lost.add(row)
            return
        self.changes[row].append(WriterChange(len(self.responses[row]), "pilot", "left_path"))
        self._path[row] = []
        self.begin(row, [*self._prompts[row], *self.responses[row]])


def _table(rows: Sequence[Sequence[float]], width: int, fill: float, dtype: torch.dtype) -> torch.Tensor:
    """Lists of numbers as one tensor, [rows, width]."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device="cpu")
