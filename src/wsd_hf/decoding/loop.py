"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList

from ..checks import check_usable, unusable, vocabulary_size
from ..draft import FREE, Draft
from ..logits_process import SAMPLING_WARPERS, choose
from .acceptance import judge
from .pace import Pace
from .rows import Rows
from .stream import Stream


class Decoding:
    """One call on the fast path.

    B rows, c proposals of the pilot for each, V tokens in the base's vocabulary.

    Args:
        base: stream of the model that is aligned.
        pilot: stream of the model that proposes.
        draft: what is drafted; its tensors are on the CPU.
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
        self._position_wise = all(isinstance(processor, SAMPLING_WARPERS) for processor in processors)
        self._warpers = warpers
        self._do_sample = do_sample
        self._vocabulary = vocabulary_size(base.model)
        self._next_logits: torch.Tensor | None = None  # of the base, behind the last token that it was fed [B, V]

    def run(self) -> None:
        """Decodes until every row has finished."""
        while not self.rows.finished.all():
            free, started = ~self.draft.drafting & ~self.rows.finished, self.rows.lengths
            proposals, probabilities = self._propose()
            logits = self._check(proposals)
            kept = self._decide(proposals, probabilities, logits)
            self._rewind([before + count for before, count in zip(started, kept, strict=True)])
            self._learn(free, kept, proposals.shape[1])

    def _propose(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pilot's next tokens, [B, c], and what they were drawn with, [B, c, V of the pilot]."""
        tokens, probabilities = [], []
        chunk = self.pace.chunk(drafting=bool(self.draft.drafting.any()))
        nothing = torch.empty(len(self.rows.finished), 0, dtype=torch.long, device=self.pilot.model.device)
        with self.pace.pilot.time(units=chunk):
            for position in range(chunk):
                new = tokens[-1][:, None] if tokens else nothing
                blocks = self._missing(self.pilot) if position == 0 else [None if done else [] for done in self.rows.finished]
                logits = self.pilot.feed(blocks, new, keep=1)[:, 0]
                check_usable("pilot", unusable(logits).cpu() & ~self.rows.finished, [n + position for n in self.rows.lengths])
                token, probability = choose(logits, new, self._warpers)
                tokens.append(token)
                probabilities.append(probability)
        if not tokens:
            return nothing, None
        return torch.stack(tokens, dim=1), None if self._warpers is None else torch.stack(probabilities, dim=1)

    def _check(self, proposals: torch.Tensor) -> torch.Tensor:
        """The base's logits before each proposal and behind the last, [B, c + 1, V]."""
        blocks = self._missing(self.base)
        with self.pace.base.time(units=1):
            fed = proposals.clamp(max=self._vocabulary - 1)
            logits = self.base.feed(blocks, fed, keep=proposals.shape[1] + 1)
        held = [row for row, block in enumerate(blocks) if block == []]
        if self._next_logits is not None:
            logits[held, 0] = self._next_logits[held]
        self._next_logits = logits[:, -1]
        return logits

    def _decide(self, proposals: torch.Tensor, probabilities: torch.Tensor | None, logits: torch.Tensor) -> list[int]:
        """Goes through the positions; a row follows while it writes what was proposed. Returns for how long each did."""
        chunk, proposed, bad = proposals.shape[1], proposals.cpu(), unusable(logits).cpu()
        log_probs = self._log_probs(proposals, logits)
        following, kept = ~self.rows.finished, [0] * len(bad)
        for position in range(chunk + 1):
            check_usable("base", bad[:, position] & following, self.rows.lengths)
            self.draft.drop(self.rows.finished, self.rows.full)
            if position < chunk:
                forced = self.draft.take(proposed[:, position], log_probs[:, position])
            else:
                forced, following = self.draft.closing(), following & ~self.draft.drafting
            written = self._choose(position, following & (forced == FREE), proposals, probabilities, logits)
            written = torch.where(forced == FREE, written, forced)
            self.rows.append(written, following)
            if position < chunk:
                following = following & (written == proposed[:, position])
                kept = [count + bool(follows) for count, follows in zip(kept, following, strict=True)]
            following = following & ~self.rows.finished
            if not following.any():
                break
        return kept

    def _choose(
        self,
        position: int,
        free: torch.Tensor,
        proposals: torch.Tensor,
        probabilities: torch.Tensor | None,
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """What the base writes in its free rows at one position, LongTensor[B]; anything elsewhere."""
        chosen = torch.full_like(free, FREE, dtype=torch.long)
        rows = free.nonzero().flatten().tolist()
        for prefix, exact in [(None, rows)] if self._position_wise else self.rows.prefixes(rows):
            if exact:
                scores = self._processors(prefix, logits[:, position])[exact]
                proposed, drawn_with = self._proposed(position, exact, proposals, probabilities)
                chosen[exact] = judge(scores, proposed, drawn_with, self._do_sample).cpu()
        return chosen

    def _proposed(
        self, position: int, rows: list[int], proposals: torch.Tensor, probabilities: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The proposals of some rows at one position, [rows], and what they were drawn with, [rows, V]; 0 if nothing was."""
        device = self.base.model.device
        drawn_with = torch.zeros(len(rows), self._vocabulary, device=device)
        if not self._do_sample or position == proposals.shape[1]:
            return torch.zeros(len(rows), dtype=torch.long, device=device), drawn_with
        tokens = proposals[rows, position].to(device)
        if probabilities is None:
            known = tokens < self._vocabulary
            drawn_with[known] = torch.nn.functional.one_hot(tokens[known], self._vocabulary).to(drawn_with)
        else:
            shared = min(self._vocabulary, probabilities.shape[-1])
            drawn_with[:, :shared] = probabilities[rows, position, :shared].to(device)
        return tokens.clamp(max=self._vocabulary - 1), drawn_with

    def _log_probs(self, proposals: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The base's log-probabilities of the proposals, float32 [B, c] on the CPU; only where some row drafts."""
        if not self.draft.drafting.any():
            return torch.zeros(proposals.shape)
        index = proposals.clamp(max=self._vocabulary - 1)[..., None].to(logits.device)
        return logits[:, :-1].log_softmax(dim=-1).gather(2, index).squeeze(2).cpu()

    def _missing(self, stream: Stream) -> list[list[int] | None]:
        """What a stream's cache lacks of each row; None for a row that needs nothing more."""
        responses, finished = self.rows.responses, self.rows.finished.tolist()
        return [None if finished[row] else stream.missing(row, response) for row, response in enumerate(responses)]

    def _rewind(self, proposed: list[int]) -> None:
        """Both caches go back to what stands.

        Args:
            proposed: length of each response up to where it last agreed with the pilot.
        """
        drafting = self.draft.drafting.tolist()
        for row, length in enumerate(self.rows.lengths):
            self.pilot.rewind(row, proposed[row])
            self.base.rewind(row, length if drafting[row] else length - 1)

    def _learn(self, free: torch.Tensor, kept: list[int], chunk: int) -> None:
        for row in free.nonzero().flatten().tolist() if chunk else []:
            self.pace.judged(kept[row], chunk)
