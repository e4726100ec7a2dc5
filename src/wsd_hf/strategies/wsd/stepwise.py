"""The step-by-step engine: transformers' own loop, one token and one forward of the base at a time."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.call import Call
from ...engine.checks import check_finite, not_finite
from ...engine.hf_loop import TokenStreamer, WatchedCriteria, base_tokens, run
from ...engine.lockstep_stream import LockstepStream
from ...engine.sampling import FREE, choose, force
from ...engine.stats import Stats, Work, peak_memory, work
from ...speculation.rule import Drafted
from ...speculation.setup import Setup
from ...speculation.verdict import entropies
from ...text.bridge import DraftOver, Offer
from .draft import Draft


class DraftSteps:
    """The draft of one call, token by token, with forwards of the pilot as they are needed.

    Args:
        setup: the pilot's side of the call, and its draft.

    Attributes:
        taken: steps so far, one response token each.
        by_pilot: rows that took the pilot's token at the last step, BoolTensor[batch].
        proposed, kept: tokens that the pilot has proposed and drafted, in the base's vocabulary.
    """

    def __init__(self, setup: Setup[Draft]) -> None:
        self.draft = setup.rule
        self.stream = LockstepStream(setup.side.model, *setup.side.prompt, setup.longest)
        self.taken = self.proposed = self.kept = 0
        self.by_pilot = torch.tensor(setup.rule.drafting, device="cpu")
        self._bridge = setup.bridge
        self._warpers = setup.side.warpers
        self._offers = [Offer([], None) for _ in setup.side.prompt.input_ids]
        self._logits = torch.empty(0, dtype=torch.float32, device="cpu")  # the pilot's at the last step

    def advance(self, input_ids: torch.Tensor, logits: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """The token that each row must take now, LongTensor[batch]; `FREE` where the base chooses.

        Args:
            input_ids: prompt and response so far, [batch, length].
            logits: the base's raw logits at its last token, float32 [batch, vocabulary].
            finished: rows that need nothing more, BoolTensor[batch].
        """
        check_finite("base", not_finite(logits) & ~finished, [self.taken] * len(logits))
        self.taken += 1
        for row in finished.nonzero().flatten().tolist():
            self.draft.drop(row)
        if self.draft.reads_pilot and self.taken > 1:
            self._read(input_ids[:, -1], finished)
        tokens = self._next_tokens(finished)
        self.by_pilot = torch.tensor(self.draft.drafting, device="cpu")
        forced = self._take(tokens, logits) if tokens else self.draft.closing()
        return torch.tensor([forced.get(row, FREE) for row in range(len(input_ids))], device=input_ids.device)

    def _read(self, tokens: torch.Tensor, finished: torch.Tensor) -> None:
        """Has the rule note the newest token of each free row, LongTensor[batch], and the pilot read those of all rows."""
        weights = self.draft.weigh(self._logits, tokens).tolist()
        for row in (~self.by_pilot & ~finished.cpu()).nonzero().flatten().tolist():
            self.draft.written(row, int(tokens[row]), weights[row])
            if self.draft.drafting[row]:
                self._offers[row] = Offer([], None)
        self.stream.append(tokens)

    def _take(self, tokens: dict[int, int], logits: torch.Tensor) -> dict[int, int]:
        index = torch.tensor([tokens.get(row, 0) for row in range(len(logits))], device=logits.device)[:, None]
        log_probs = logits.log_softmax(dim=-1)
        columns = [log_probs.gather(1, index.clamp(max=logits.shape[-1] - 1)).squeeze(1).tolist()]
        if self.draft.reads_distributions:
            columns += [log_probs.amax(dim=-1).tolist(), entropies(log_probs).tolist()]
        self.kept += len(tokens)
        forced = self.draft.take({row: Drafted(token, *(column[row] for column in columns)) for row, token in tokens.items()})
        if self._bridge.token_by_token:
            self._stop_exhausted("draft_limit")
        return forced

    def _next_tokens(self, finished: torch.Tensor) -> dict[int, int]:
        """The next token of each draft; drafts that have none are stopped."""
        if self.draft.reads_pilot:
            self._propose(~finished)
        drafting = torch.tensor(self.draft.drafting, device=finished.device)
        while any(self._offers[row] == Offer([], None) for row in self._drafting()):
            self._propose(drafting)
        self._stop_exhausted("draft_ended", "draft_limit")
        return {row: self._offers[row].tokens.pop(0) for row in self._drafting()}

    def _propose(self, needed: torch.Tensor) -> None:
        """Gets one more token of the pilot in every row, though some, not `needed`, may have enough for now."""
        self._logits = logits = self.stream.next_logits().to(needed.device)
        proposed, bad, _ = choose(logits, self._warpers)
        check_finite("pilot", bad & needed, [self.taken - 1] * len(logits))
        if not self.draft.reads_pilot:
            self.stream.append(proposed)
        for row in self._drafting():
            tokens, over = self._offers[row]
            if over is None:
                offer = self._bridge.offer(row, [int(proposed[row])])
                self._offers[row] = Offer(tokens + offer.tokens, offer.over)
                self.proposed += len(offer.tokens)

    def _drafting(self) -> list[int]:
        return [row for row, drafting in enumerate(self.draft.drafting) if drafting]

    def _stop_exhausted(self, *reasons: DraftOver) -> None:
        """Stops the drafts that have no tokens left, for one of some reasons."""
        for row, (tokens, over) in enumerate(self._offers):
            if not tokens and over in reasons:
                self.draft.stop(row, over)


def decode(call: Call, setup: Setup[Draft]) -> tuple[GenerateDecoderOnlyOutput, Stats]:
    """Decodes with any causal base; returns the output of transformers' loop, and the work done."""
    criteria, steps, streamer = WatchedCriteria(call.criteria), DraftSteps(setup), TokenStreamer(call.streamer)
    output = run(call, [_DraftThenShape(call, steps, criteria, streamer)], criteria, streamer)
    return output, Stats(
        Work(steps.taken, base_tokens(call, steps.taken)),
        work(steps.stream),
        proposed=steps.proposed,
        kept=steps.kept,
        peak_memory=peak_memory(call.base, setup.side.model),
    )


class _DraftThenShape(LogitsProcessor):
    """The only processor of the loop, so that the draft gets raw logits and overrides the caller's processors."""

    def __init__(self, call: Call, steps: DraftSteps, criteria: WatchedCriteria, streamer: TokenStreamer) -> None:
        self._call, self._steps, self._criteria, self._streamer = call, steps, criteria, streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended = self._criteria.ended(input_ids)
        tokens = self._steps.advance(input_ids, scores, ended)
        by_pilot = self._steps.by_pilot
        self._streamer.expect(scores, ~ended & (by_pilot.to(ended.device) | (tokens == FREE)), by_pilot)
        return force(self._call.processors(input_ids, scores), tokens)
