"""One call's draft: the pilot's tokens, the base's probabilities of them, and the rows that the base has taken over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import StoppingCriteria

from ...engine.checks import check_shared
from ...engine.rows import GrowingTensor
from ...speculation.rule import Drafted, Rule, SwitchReason
from .switch import SwitchCriteria


class Draft(Rule):
    """The draft of one call of `generate`, one token at a time in each row; on the CPU, and without any model.

    `closing_token_id` ends the response where a draft ended unconfirmed; None: the base writes on.

    Attributes:
        token_ids: drafted tokens of each row.
        log_probs: the base's natural-log probabilities of them, of float32 precision.
        drafting: for each row, whether its next token is the pilot's.
        reasons: why each row's draft is over.
    """

    def __init__(self, switch_criteria: StoppingCriteria, rows: int, vocabulary: int, closing_token_id: int | None) -> None:
        super().__init__(rows)
        self.reasons: list[SwitchReason] = ["budget"] * rows
        self.token_ids: list[list[int]] = [[] for _ in range(rows)]
        self.log_probs: list[list[float]] = [[] for _ in range(rows)]
        self.drafting = [True] * rows
        nothing = torch.empty(rows, 0, dtype=torch.float32, device="cpu")
        self._all_token_ids = GrowingTensor(nothing.long(), self.token_ids, 0)
        self._all_log_probs = GrowingTensor(nothing, self.log_probs, torch.nan)
        self._closing: set[int] = set()
        self._switch_criteria = switch_criteria
        self._vocabulary = vocabulary
        self._closing_token_id = closing_token_id

    @property
    def lengths(self) -> list[int]:
        """Tokens drafted so far in each row."""
        return [len(tokens) for tokens in self.token_ids]

    @property
    def all_log_probs(self) -> torch.Tensor:
        """`log_probs` as float32, [batch, longest draft]; NaN after a row's draft."""
        return self._all_log_probs.first(max(self.lengths)).clone()

    def drop(self, row: int, full: bool = False) -> None:
        """Stops the draft of a row that a criterion has ended; if the row is full, the budget has."""
        self.stop(row, "budget" if full else "stopped")
        self._closing.discard(row)

    def take(self, offered: Mapping[int, Drafted]) -> dict[int, int]:
        """As every rule; the base chooses for all rows that are not returned."""
        forced = self.closing() | {row: drafted.token for row, drafted in offered.items()}
        check_shared(max((drafted.token for drafted in offered.values()), default=0), self._vocabulary)
        for row, drafted in offered.items():
            self.token_ids[row].append(drafted.token)
            self.log_probs[row].append(drafted.log_prob)
        for row in self._fired(offered):
            self.stop(row, "confident")
        return forced

    def closing(self) -> dict[int, int]:
        """The tokens that rows must take after their drafts; the base chooses for all other rows."""
        return {} if self._closing_token_id is None else dict.fromkeys(self._closing, self._closing_token_id)

    def stop(self, row: int, reason: SwitchReason) -> None:
        """Ends a row's draft, unless it has ended."""
        if not self.drafting[row]:
            return
        self.drafting[row], self.reasons[row] = False, reason
        if reason in ("draft_ended", "draft_limit"):
            self._closing.add(row)

    def _fired(self, rows: Iterable[int]) -> list[int]:
        """Those rows where the criteria fire at the newest token; the caller's get drafts of one length at a time."""
        criteria, lengths = self._switch_criteria, self.lengths
        if type(criteria) is SwitchCriteria:
            return [row for row in rows if criteria.fires(self.log_probs[row])]
        fired: list[int] = []
        for length in sorted({lengths[row] for row in rows}):
            found = criteria(self._all_token_ids.first(length), self._all_log_probs.first(length))
            in_all = torch.as_tensor(found, device="cpu").expand(len(lengths)).tolist()
            fired += [row for row in rows if lengths[row] == length and in_all[row]]
        return fired
