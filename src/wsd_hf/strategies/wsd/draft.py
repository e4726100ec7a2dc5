"""One call's draft: the pilot's tokens, the base's probabilities of them, and the rows that the base has taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...engine.checks import check_shared
from ...engine.rows import GrowingTensor
from ...speculation.rule import Drafted, Rule, SwitchReason
from .criteria import Criteria
from .switch_rules import DISTRIBUTIONS


class Draft(Rule):
    """The draft of one call of `generate`, one token at a time in each row; on the CPU, and without any model.

    Args:
        switch_criteria: end drafts.
        prompts: token ids of the base's prompts, without padding.
        vocabulary: size of the base's.
        closing_token_id: ends the response where a draft ended unconfirmed; None: the base writes on.

    Attributes:
        token_ids: drafted tokens of each row.
        log_probs: the base's natural-log probabilities of them, of float32 precision.
        drafting: for each row, whether its next token is the pilot's.
        reasons: why each row's draft is over.
        needs: arguments of `SwitchRule.__call__` that the criteria take, beside tokens and log-probabilities.
    """

    def __init__(
        self,
        switch_criteria: StoppingCriteria | StoppingCriteriaList,
        prompts: Sequence[Sequence[int]],
        vocabulary: int,
        closing_token_id: int | None,
    ) -> None:
        super().__init__(len(prompts))
        self.reasons: list[SwitchReason] = ["budget"] * len(prompts)
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.log_probs: list[list[float]] = [[] for _ in prompts]
        self.drafting = [True] * len(prompts)
        self._closing: set[int] = set()
        self._criteria = Criteria(switch_criteria, prompts)
        self.needs = self._criteria.needs
        self.reads_distributions = not self.needs.isdisjoint(DISTRIBUTIONS)
        self._vocabulary = vocabulary
        self._closing_token_id = closing_token_id

    def begin(self, row: int, prompt: Sequence[int]) -> None:
        """Begins another draft in a row, after the prompt and all of the response so far."""
        self.token_ids[row].clear()
        self.log_probs[row].clear()
        self.drafting[row] = True
        self._criteria.begin(row, prompt)

    @property
    def lengths(self) -> list[int]:
        """Tokens drafted so far in each row."""
        return [len(tokens) for tokens in self.token_ids]

    @property
    def all_log_probs(self) -> torch.Tensor:
        """`log_probs` as float32, [batch, longest draft]; NaN after a row's draft."""
        nothing = torch.empty(len(self.log_probs), 0, dtype=torch.float32, device="cpu")
        return GrowingTensor(nothing, self.log_probs, torch.nan).first(max(self.lengths))

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
        for row in self._criteria.fired(offered):
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
