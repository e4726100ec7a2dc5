"""One call's draft: what the pilot wrote, how sure the base was, and which rows the base has taken over."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteria

from .errors import WSDLogitsError, WSDValueError
from .pilot import PilotStream

SwitchReason = Literal["confident", "draft_ended", "draft_limit", "budget", "stopped"]

FREE = -1
"""In a tensor of forced tokens: this row chooses for itself."""


class Draft:
    """The drafting of one call of `generate`, row by row, one token a step.

    Args:
        stream: the pilot at its prompt.
        switch_criteria: asked after every drafted token; fires where the base takes over.
        rows: batch size.
        device: where the base's logits are.
        limits: most tokens the pilot may write, LongTensor[batch].
        end_token_ids: tokens that end a draft instead of entering it: every EOS of pilot and base.
        closing_token_id: token that ends the response where a draft ended unconfirmed; None: the base writes on.
        warpers: shape the pilot's distribution for sampling; None: the pilot is greedy.
    """

    def __init__(
        self,
        stream: PilotStream,
        switch_criteria: StoppingCriteria,
        *,
        rows: int,
        device: torch.device,
        limits: torch.Tensor,
        end_token_ids: set[int],
        closing_token_id: int | None,
        warpers: LogitsProcessorList | None,
    ) -> None:
        self.stream = stream
        self.steps = 0
        self.reasons: list[SwitchReason] = ["budget"] * rows
        self.token_ids = torch.empty(rows, 0, dtype=torch.long, device=device)
        self.log_probs = torch.empty(rows, 0, device=device)
        self._switch_criteria = switch_criteria
        self._limits = limits
        self._end_token_ids = torch.tensor(sorted(end_token_ids), dtype=torch.long, device=device)
        self._closing_token_id = closing_token_id
        self._warpers = warpers
        self._drafting = torch.ones(rows, dtype=torch.bool, device=device)
        self._closing = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def switch_index(self) -> torch.Tensor:
        """Tokens drafted so far, LongTensor[batch]."""
        return (~self.log_probs.isnan()).sum(dim=1)

    def advance(self, input_ids: torch.Tensor, logits: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """One step of every row.

        Args:
            input_ids: prompt and response so far, [batch, length].
            logits: the base's raw logits at its last token, float32 [batch, vocabulary].
            finished: rows that need nothing more, BoolTensor[batch].

        Returns:
            The token that each row must take now, LongTensor[batch]; `FREE` where the base chooses.
        """
        self.steps += 1
        self._check_logits("base", logits, ~finished)
        self._stop(finished, "stopped")
        self._closing &= ~finished
        forced = torch.full_like(finished, FREE, dtype=torch.long)
        if self._drafting.any():
            proposals = self._propose(input_ids)
            self._stop(torch.isin(proposals, self._end_token_ids), "draft_ended")
        if self._closing_token_id is not None:
            forced[self._closing] = self._closing_token_id
        if self._drafting.any():
            forced = torch.where(self._drafting, proposals, forced)
            self._record(proposals, logits)
            self._hand_over()
        return forced

    def end(self, full: bool) -> None:
        """The response is over: rows that the pilot was still writing are full, or were stopped at their last token."""
        if not full:
            self._stop(self._drafting, "stopped")

    def _hand_over(self) -> None:
        fired = torch.as_tensor(self._switch_criteria(self.token_ids, self.log_probs), device=self._drafting.device)
        self._stop(fired, "confident")
        self._stop(self._limits <= self.token_ids.shape[1], "draft_limit")

    def _stop(self, rows: torch.Tensor, reason: SwitchReason) -> None:
        rows = rows & self._drafting
        for row in rows.nonzero().flatten().tolist():
            self.reasons[row] = reason
        self._drafting &= ~rows
        if self._closing_token_id is not None and reason in ("draft_ended", "draft_limit"):
            self._closing |= rows

    def _propose(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.token_ids.shape[1]:
            self.stream.append(self.token_ids[:, -1])
        logits = self.stream.next_logits().to(input_ids.device)
        self._check_logits("pilot", logits, self._drafting)
        if self._warpers is None:
            return logits.argmax(dim=-1)
        probs = self._warpers(input_ids, logits).softmax(dim=-1)
        return torch.multinomial(probs, num_samples=1).squeeze(1)

    def _record(self, proposals: torch.Tensor, logits: torch.Tensor) -> None:
        proposals = torch.where(self._drafting, proposals, 0)
        if (largest := int(proposals.max())) >= logits.shape[-1]:
            raise WSDValueError(
                f"the pilot drafted token id {largest}, but the base's vocabulary has {logits.shape[-1]} tokens: "
                "the two models do not share a vocabulary"
            )
        log_probs = logits.log_softmax(dim=-1).gather(1, proposals[:, None])
        log_probs = log_probs.masked_fill(~self._drafting[:, None], torch.nan)
        self.token_ids = torch.cat([self.token_ids, proposals[:, None]], dim=1)
        self.log_probs = torch.cat([self.log_probs, log_probs], dim=1)

    def _check_logits(self, model: str, logits: torch.Tensor, rows: torch.Tensor) -> None:
        bad = ~logits.amax(dim=-1).isfinite() & rows
        if bad.any():
            row = int(bad.nonzero()[0])
            raise WSDLogitsError(
                f"the {model} returned NaN or infinite logits at response token {self.steps} of row {row}: "
                "check its weights and dtype (float16 overflows where bfloat16 does not)"
            )
