"""One call's draft: the pilot's tokens, the base's probabilities of them, and the rows that the base has taken over."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from transformers import StoppingCriteria

from ...engine.checks import check_shared
from ...engine.pilot_side import PilotSide
from ...engine.sampling import FREE
from ...text.bridge import Bridge

SwitchReason = Literal["confident", "draft_ended", "draft_limit", "budget", "stopped"]


class Draft:
    """The draft of one call of `generate`, one token at a time in each row; on the CPU, and without any model.

    `closing_token_id` ends the response where a draft ended unconfirmed; None: the base writes on.

    Attributes:
        token_ids: drafted tokens, LongTensor[batch, longest draft].
        log_probs: the base's natural-log probabilities of them, [batch, longest draft]; NaN after a row's draft.
        drafting: rows whose next token is the pilot's, BoolTensor[batch].
        reasons: why each row's draft is over.
    """

    def __init__(self, switch_criteria: StoppingCriteria, rows: int, vocabulary: int, closing_token_id: int | None) -> None:
        self.reasons: list[SwitchReason] = ["budget"] * rows
        self.token_ids = torch.empty(rows, 0, dtype=torch.long, device="cpu")
        self.log_probs = torch.empty(rows, 0, dtype=torch.float32, device="cpu")
        self.drafting = torch.ones(rows, dtype=torch.bool, device="cpu")
        self._closing = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self._switch_criteria = switch_criteria
        self._vocabulary = vocabulary
        self._closing_token_id = closing_token_id

    @property
    def length(self) -> torch.Tensor:
        """Tokens drafted so far, LongTensor[batch]."""
        return (~self.log_probs.isnan()).sum(dim=1)

    def drop(self, finished: torch.Tensor, full: torch.Tensor | None = None) -> None:
        """Stops the drafts of rows that a criterion has ended, BoolTensor[batch]; some of these rows may be full."""
        if full is not None:
            self.stop(finished & full, "budget")
        self.stop(finished, "stopped")
        self._closing &= ~finished

    def take(self, tokens: torch.Tensor, log_probs: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        """Appends a token, LongTensor[batch], with the base's log-probabilities of it, to each draft that is offered one.

        Returns the token that each row must take now, LongTensor[batch]; `FREE` where the base chooses.
        """
        forced = torch.where(offered, tokens, self.closing())
        if offered.any():
            check_shared(int(tokens[offered].max()), self._vocabulary)
            self._record(tokens, log_probs, offered)
            self.stop(offered & self._fired(offered), "confident")
        return forced

    def closing(self) -> torch.Tensor:
        """The token that each row must take after its draft, LongTensor[batch]; `FREE` where the base chooses."""
        token = FREE if self._closing_token_id is None else self._closing_token_id
        return torch.where(self._closing, token, FREE)

    def stop(self, rows: torch.Tensor, reason: SwitchReason) -> None:
        """Ends the drafts of some rows, BoolTensor[batch], unless they have ended."""
        rows = rows & self.drafting
        for row in rows.nonzero().flatten().tolist():
            self.reasons[row] = reason
        self.drafting = self.drafting & ~rows
        if self._closing_token_id is not None and reason in ("draft_ended", "draft_limit"):
            self._closing |= rows

    def _record(self, tokens: torch.Tensor, log_probs: torch.Tensor, offered: torch.Tensor) -> None:
        rows, ends = offered.nonzero().flatten(), self.length[offered]
        if int(ends.max()) == self.token_ids.shape[1]:
            self.token_ids = torch.nn.functional.pad(self.token_ids, (0, 1), value=0)
            self.log_probs = torch.nn.functional.pad(self.log_probs, (0, 1), value=torch.nan)
        self.token_ids[rows, ends] = tokens[rows]
        self.log_probs[rows, ends] = log_probs[rows]

    def _fired(self, offered: torch.Tensor) -> torch.Tensor:
        """Rows where the criteria fire at the newest token; they get drafts of one length at a time."""
        fired, lengths = torch.zeros_like(offered), self.length
        for length in sorted(set(lengths[offered].tolist())):
            found = self._switch_criteria(self.token_ids[:, :length], self.log_probs[:, :length])
            fired |= torch.as_tensor(found, device="cpu") & (lengths == length) & offered
        return fired


class DraftSetup(NamedTuple):
    """Everything that one call drafts with."""

    side: PilotSide
    longest: int
    """Most tokens that any row may draft."""
    draft: Draft
    bridge: Bridge
