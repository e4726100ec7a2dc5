"""One call's draft: what the pilot wrote, how sure the base was, and which rows the base has taken over."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import StoppingCriteria

from .errors import WSDValueError

SwitchReason = Literal["confident", "draft_ended", "draft_limit", "budget", "stopped"]

FREE = -1
"""In a tensor of forced tokens: this row chooses for itself."""


class Draft:
    """The draft of one call of `generate`, row by row, one token at a time. It knows of no model, and lives on the CPU.

    Args:
        switch_criteria: asked after every drafted token; fires where the base takes over.
        limits: most tokens that the pilot may write, LongTensor[batch].
        vocabulary: size of the base's.
        end_token_ids: tokens that end a draft instead of entering it: every EOS of pilot and base.
        closing_token_id: token that ends the response where a draft ended unconfirmed; None: the base writes on.

    Attributes:
        token_ids: drafted tokens, LongTensor[batch, longest draft].
        log_probs: the base's natural-log probabilities of them, [batch, longest draft]; NaN behind a row's draft.
        drafting: rows whose next token is the pilot's, BoolTensor[batch].
        reasons: why each row's draft is over.
    """

    def __init__(
        self,
        switch_criteria: StoppingCriteria,
        limits: torch.Tensor,
        vocabulary: int,
        end_token_ids: set[int],
        closing_token_id: int | None,
    ) -> None:
        rows = len(limits)
        self.reasons: list[SwitchReason] = ["budget"] * rows
        self.token_ids = torch.empty(rows, 0, dtype=torch.long)
        self.log_probs = torch.empty(rows, 0)
        self.drafting = torch.ones(rows, dtype=torch.bool)
        self._closing = torch.zeros(rows, dtype=torch.bool)
        self._switch_criteria = switch_criteria
        self._limits = limits
        self._vocabulary = vocabulary
        self._end_token_ids = torch.tensor(sorted(end_token_ids), dtype=torch.long)
        self._closing_token_id = closing_token_id

    @property
    def switch_index(self) -> torch.Tensor:
        """Tokens drafted so far, LongTensor[batch]."""
        return (~self.log_probs.isnan()).sum(dim=1)

    def drop(self, finished: torch.Tensor, full: torch.Tensor | None = None) -> None:
        """Takes out the rows that a criterion has ended, BoolTensor[batch], some of them because they are full."""
        if full is not None:
            self._stop(finished & full, "budget")
        self._stop(finished, "stopped")
        self._closing &= ~finished

    def take(self, proposals: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """One proposal of the pilot for every row.

        Args:
            proposals: LongTensor[batch]; not read where a row no longer drafts.
            log_probs: the base's log-probabilities of them, [batch].

        Returns:
            The token that each row must take now, LongTensor[batch]; `FREE` where the base chooses.
        """
        self._stop(torch.isin(proposals, self._end_token_ids), "draft_ended")
        forced = torch.where(self.drafting, proposals, self.closing())
        if self.drafting.any():
            self._record(proposals, log_probs)
            fired = torch.as_tensor(self._switch_criteria(self.token_ids, self.log_probs)).cpu()
            self._stop(fired, "confident")
            self._stop(self._limits <= self.token_ids.shape[1], "draft_limit")
        return forced

    def closing(self) -> torch.Tensor:
        """The token that each row must take where no proposal is left, LongTensor[batch]; `FREE` where the base chooses."""
        token = FREE if self._closing_token_id is None else self._closing_token_id
        return torch.where(self._closing, token, FREE)

    def end(self, full: bool) -> None:
        """The response is over: rows that the pilot was still writing are full, or were stopped at their last token."""
        if not full:
            self._stop(self.drafting, "stopped")

    def _stop(self, rows: torch.Tensor, reason: SwitchReason) -> None:
        rows = rows & self.drafting
        for row in rows.nonzero().flatten().tolist():
            self.reasons[row] = reason
        self.drafting = self.drafting & ~rows
        if self._closing_token_id is not None and reason in ("draft_ended", "draft_limit"):
            self._closing |= rows

    def _record(self, proposals: torch.Tensor, log_probs: torch.Tensor) -> None:
        proposals = torch.where(self.drafting, proposals, 0)
        if (largest := int(proposals.max())) >= self._vocabulary:
            raise WSDValueError(
                f"the pilot drafted token id {largest}, but the base's vocabulary has {self._vocabulary} tokens: "
                "the two models do not share a vocabulary"
            )
        log_probs = torch.where(self.drafting, log_probs, torch.nan)
        self.token_ids = torch.cat([self.token_ids, proposals[:, None]], dim=1)
        self.log_probs = torch.cat([self.log_probs, log_probs[:, None]], dim=1)
