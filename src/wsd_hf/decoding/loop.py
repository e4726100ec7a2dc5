"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from ..checks import check_usable, unusable, vocabulary_size
from ..draft import FREE, Draft
from ..logits_process import SAMPLING_WARPERS, choose
from .acceptance import keep_or_redraw
from .pace import Pace
from .rows import Rows
from .stream import Stream


class Proposals(NamedTuple):
    """What the pilot would write next: c tokens for each of B rows."""

    tokens: torch.Tensor
    """LongTensor[B, c]."""
    probabilities: list[torch.Tensor | None]
    """What each position was drawn with, [B, V of the pilot]; None where the pilot was greedy."""

    @property
    def chunk(self) -> int:
        """c."""
        return self.tokens.shape[1]

    def at(self, position: int, rows: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Proposals of some rows, [rows], and what they were drawn with over the base's vocabulary, [rows, vocabulary].

        At position c nothing was proposed: the probabilities are 0.
        """
        drawn_with = torch.zeros(len(rows), vocabulary, device=self.tokens.device)
        if position == self.chunk:
            return self.tokens.new_zeros(len(rows)), drawn_with
        tokens, probabilities = self.tokens[rows, position], self.probabilities[position]
        if probabilities is None:
            known = tokens < vocabulary
            drawn_with[known, tokens[known]] = 1.0
        else:
            shared = min(vocabulary, probabilities.shape[-1])
            drawn_with[:, :shared] = probabilities[rows, :shared]
        return tokens, drawn_with


class Decoding:
    """One call on the fast path.

    B rows, c proposals of the pilot for each, V tokens in the base's vocabulary.

    Args:
        base: stream of the model that is aligned.
        pilot: stream of the model that proposes.
        draft: what is drafted.
        rows: prompts and responses.
        pace: how many tokens to propose.
        processors: shape the base's choice.
        warpers: shape the pilot's; None: the pilot is greedy.
        do_sample: whether the base samples.
    """

    def __init__(
        self,
        base: Stream,
        pilot: Stream,
        draft: Draft,
        rows: Rows,
        pace: Pace,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList | None,
        do_sample: bool,
    ) -> None:
        self.base, self.pilot, self.draft, self.rows, self.pace = base, pilot, draft, rows, pace
        self._processors = processors
        self._warpers_only = all(isinstance(processor, SAMPLING_WARPERS) for processor in processors)
        self._warpers = warpers
        self._do_sample = do_sample
        self._vocabulary = vocabulary_size(base.model)
        self._behind = torch.empty(0)  # the base's logits behind the last token that it was fed [B, V]

    def run(self) -> None:
        """Decodes until every row has finished."""
        while not self.rows.finished.all():
            free, before = ~self.draft.drafting & ~self.rows.finished, self.rows.lengths
            proposals = self._propose()
            logits = self._check(proposals)
            kept = self._decide(proposals, logits)
            self._rewind([length + count for length, count in zip(before, kept, strict=True)])
            if proposals.chunk:
                self.pace.judged([kept[row] for row in free.nonzero().flatten().tolist()], proposals.chunk)
        self.draft.drop(self.rows.finished, self.rows.full)

    def _propose(self) -> Proposals:
        """The pilot's next tokens for every row, whether they will be kept or judged."""
        new = self.rows.sequences.new_empty(len(self.rows.finished), 0)
        tokens: list[torch.Tensor] = [new]
        probabilities: list[torch.Tensor | None] = []
        for position in range(self.pace.chunk(drafting=bool(self.draft.drafting.any()))):
            blocks = self._missing(self.pilot) if position == 0 else [None if done else [] for done in self.rows.finished]
            logits = self.pilot.feed(blocks, new, keep=1)[:, 0]
            written = [length + position for length in self.rows.lengths]
            check_usable("pilot", unusable(logits).cpu() & ~self.rows.finished, written)
            token, probability = choose(logits, new, self._warpers)
            new = token[:, None]
            tokens.append(new)
            probabilities.append(probability)
        return Proposals(torch.cat(tokens, dim=1), probabilities)

    def _check(self, proposals: Proposals) -> torch.Tensor:
        """The base's logits before each proposal and behind the last, [B, c + 1, V]."""
        blocks = self._missing(self.base)
        logits = self.base.feed(blocks, proposals.tokens, keep=proposals.chunk + 1)
        held = [row for row, block in enumerate(blocks) if block == []]
        if held:
            logits[held, 0] = self._behind[held]
        self._behind = logits[:, -1]
        return logits

    def _decide(self, proposals: Proposals, logits: torch.Tensor) -> list[int]:
        """Goes through the positions; a row follows while it writes what was proposed. Returns for how long each did."""
        proposed, bad, log_probs = proposals.tokens.cpu(), unusable(logits).cpu(), self._log_probs(proposals, logits)
        following, kept = ~self.rows.finished, [0] * len(bad)
        for position in range(proposals.chunk + 1):
            check_usable("base", bad[:, position] & following, self.rows.lengths)
            self.draft.drop(self.rows.finished, self.rows.full)
            drafting = self.draft.drafting
            if position < proposals.chunk:
                forced = self.draft.take(proposed[:, position], log_probs[:, position])
            else:
                forced, following = self.draft.closing(), following & ~self.draft.drafting
            free = following & (forced == FREE)
            own = self._choose(free, free & drafting, position, proposals, logits)
            written = torch.where(forced == FREE, own, forced)
            self.rows.append(written, following)
            if position < proposals.chunk:
                following = following & (written == proposed[:, position])
                kept = [count + follows for count, follows in zip(kept, following.tolist(), strict=True)]
            following = following & ~self.rows.finished
            if not following.any():
                break
        return kept

    def _choose(
        self, free: torch.Tensor, ended: torch.Tensor, position: int, proposals: Proposals, logits: torch.Tensor
    ) -> torch.Tensor:
        """What the base writes in its free rows at one position, LongTensor[B]; `FREE` elsewhere.

        Where a proposal has just ended a draft, BoolTensor[B], the base draws without it: that row is here only because of
        what was proposed, so the proposal no longer is a draw from the pilot's distribution.
        """
        chosen = torch.full_like(free, FREE, dtype=torch.long)
        rows = free.nonzero().flatten().tolist()
        # Warpers look at one position's scores only; any other processor is shown the exact prefix of each row. They get
        # copies, because a processor may write into what it is given.
        for prefix, exact in [(None, rows)] if self._warpers_only else self.rows.prefixes(rows):
            if exact and self._do_sample:
                scores = self._processors(prefix, logits[:, position].clone())[exact]
                tokens, drawn_with = proposals.at(position, exact, self._vocabulary)
                drawn_with[ended[exact]] = 0.0
                chosen[exact] = keep_or_redraw(scores, tokens, drawn_with).cpu()
            elif exact:
                chosen[exact] = self._processors(prefix, logits[:, position].clone())[exact].argmax(dim=-1).cpu()
        return chosen

    def _log_probs(self, proposals: Proposals, logits: torch.Tensor) -> torch.Tensor:
        """The base's log-probabilities of the proposals, float32 [B, c] on the CPU; read only where a row drafts."""
        if not self.draft.drafting.any():
            return torch.zeros(proposals.tokens.shape)
        index = proposals.tokens.clamp(max=self._vocabulary - 1)[..., None]
        return logits[:, :-1].log_softmax(dim=-1).gather(2, index).squeeze(2).cpu()

    def _missing(self, stream: Stream) -> list[list[int] | None]:
        """What a stream's cache lacks of each row; None for a row that needs nothing more."""
        finished = self.rows.finished.tolist()
        return [None if finished[row] else stream.missing(row, text) for row, text in enumerate(self.rows.responses)]

    def _rewind(self, agreed: list[int]) -> None:
        """Both caches go back to what stands; the base's one token further where it has yet to say what follows.

        Args:
            agreed: tokens of each response up to where it last was what the pilot proposed.
        """
        drafting = self.draft.drafting.tolist()
        for row, length in enumerate(self.rows.lengths):
            self.pilot.rewind(row, agreed[row])
            self.base.rewind(row, length if drafting[row] else length - 1)
