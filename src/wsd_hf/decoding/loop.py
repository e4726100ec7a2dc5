"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from ..checks import check_usable, unusable, vocabulary_size
from ..draft import FREE, Draft
from ..logits_process import SAMPLING_WARPERS, choose, force
from ..text.bridge import Offer, OneVocabulary
from .acceptance import draw, keep_or_redraw
from .cache import NO_SLOT
from .pace import Pace
from .record import Record
from .rows import Rows
from .stream import Stream


class Proposals(NamedTuple):
    """What the pilot would write next: c tokens for each live row."""

    tokens: torch.Tensor
    """And `FREE` behind the last. LongTensor[rows, c + 1]."""
    unusable: torch.Tensor
    """Where the pilot's logits were no numbers, BoolTensor[rows, c + 1]."""
    probabilities: Sequence[torch.Tensor | None]
    """What each position was drawn with, [rows, V of the pilot]; None where the pilot was greedy."""

    @property
    def chunk(self) -> int:
        """c."""
        return len(self.probabilities)

    def drawn_with(self, vocabulary: int) -> torch.Tensor:
        """The same over the base's vocabulary, and 0 behind the last proposal: [rows, c + 1, vocabulary]."""
        drawn_with = torch.zeros(*self.tokens.shape, vocabulary, device=self.tokens.device)
        for position, probabilities in enumerate(self.probabilities):
            if probabilities is None:
                tokens = self.tokens[:, position, None]
                drawn_with[:, position].scatter_(1, tokens.clamp(max=vocabulary - 1), (tokens < vocabulary).float())
            else:
                shared = min(vocabulary, probabilities.shape[-1])
                drawn_with[:, position, :shared] = probabilities[:, :shared]
        return drawn_with


class Verdict(NamedTuple):
    """One step as the host sees it, all on the CPU: every row of the batch, c proposals to each, and the end behind them."""

    proposed: torch.Tensor
    """`FREE` at the end. LongTensor[B, c + 1]."""
    log_probs: torch.Tensor
    """The base's log-probabilities of them, float32 [B, c + 1]; read only where a row drafts."""
    pilot_unusable: torch.Tensor
    """Where the pilot's logits were no numbers, BoolTensor[B, c + 1]."""
    base_unusable: torch.Tensor
    """Where the base's were, BoolTensor[B, c + 1]."""
    own: torch.Tensor
    """What the base writes at each position where it may, LongTensor[B, c + 1]."""
    afresh: torch.Tensor
    """What it writes there if it doesn't know of the proposal, LongTensor[B, c + 1]."""


class Decoding:
    """One call on the fast path.

    B rows, c proposals of the pilot for each, V tokens in the base's vocabulary. Rows that have not finished are live:
    tensors on the device have those only, and the host knows them all.

    Args:
        base: stream of the model that is aligned.
        pilot: stream of the model that proposes.
        draft: what is drafted.
        bridge: makes the pilot's tokens the base's.
        rows: prompts and responses.
        record: takes the scores of every token; None: nobody wants them.
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
        bridge: OneVocabulary,
        rows: Rows,
        record: Record | None,
        pace: Pace,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList | None,
        do_sample: bool,
    ) -> None:
        self.base, self.pilot, self.draft, self.bridge, self.rows, self.pace = base, pilot, draft, bridge, rows, pace
        self.record = record
        self._processors = processors
        self._warpers = warpers
        self._do_sample = do_sample
        self._draft_key = f"draft {[(type(warper).__name__, vars(warper)) for warper in warpers or ()]} {warpers is None}"
        self._device = rows.sequences.device
        self._vocabulary = vocabulary_size(base.model)
        # Warpers look at one position's scores only, so that all positions can be chosen for at once; any other processor
        # is shown the exact prefix of each row.
        self._at_once = record is None and all(isinstance(processor, SAMPLING_WARPERS) for processor in processors)
        self._shrinks = not (base.workspace.captures or pilot.workspace.captures)
        self._live = list(range(len(rows.responses)))
        self._behind = torch.empty(0)  # the base's logits behind the last token that it was fed [rows, V]

    def run(self) -> None:
        """Decodes until every row has finished."""
        while not self.rows.finished.all():
            self._shrink()
            free, before = ~self.draft.drafting & ~self.rows.finished, self.rows.lengths
            proposals = self._propose()
            logits = self._check(proposals)
            kept = self._decide(proposals, logits)
            self._rewind([length + count for length, count in zip(before, kept, strict=True)])
            if proposals.chunk:
                self.pace.judged([kept[row] for row in free.nonzero().flatten().tolist()], proposals.chunk)
        self.draft.drop(self.rows.finished, self.rows.full)

    def _shrink(self) -> None:
        """Rows that have finished cost nothing more; where forwards are captured they stay, since shapes must."""
        live = (~self.rows.finished).nonzero().flatten().tolist()
        if self._shrinks and live != self._live:
            places = [self._live.index(row) for row in live]
            self._behind = self._behind[places]
            self.base.select(live)
            self.pilot.select(live)
            self._live = live

    def _propose(self) -> Proposals:
        """The pilot's next tokens for every live row, whether they will be kept or judged."""
        end = torch.full((len(self._live),), FREE, device=self._device)
        tokens, bad, probabilities = [], [], []
        if chunk := self.pace.chunk(drafting=bool(self.draft.drafting.any())):
            none = torch.empty(len(self._live), 0, dtype=torch.long)
            block = self.pilot.block(self._missing(self.pilot), none, [0] * len(self._live))
            for _ in range(chunk):
                token, no_number, probability = self.pilot.run(self._draft_key, self._draft, block, keep=1)
                tokens.append(token.to(self._device))
                bad.append(no_number.to(self._device))
                probabilities.append(None if probability is None else probability.to(self._device))
                block = block.then(token)
        return Proposals(torch.stack([*tokens, end], dim=1), torch.stack([*bad, end > FREE], dim=1), probabilities)

    def _draft(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        token, probability = choose(logits[:, 0], self._warpers)
        return token, unusable(logits[:, 0]), probability

    def _check(self, proposals: Proposals) -> torch.Tensor:
        """The base's logits before each proposal and behind the last, [rows, c + 1, V]."""
        missing, chunk = self._missing(self.base), proposals.chunk
        block = self.base.block(missing, proposals.tokens[:, :chunk], [chunk] * len(missing))
        logits = self.base.logits(block, keep=chunk + 1).to(self._device)
        if [] in missing:  # these rows were fed their last token before
            held = (block.slots[:, -chunk - 1] == NO_SLOT).to(self._device)
            logits[:, 0] = torch.where(held[:, None], self._behind, logits[:, 0])
        self._behind = logits[:, -1]
        return logits

    def _decide(self, proposals: Proposals, logits: torch.Tensor) -> list[int]:
        """Goes through the positions; a row follows while it writes what was proposed. Returns for how long each did."""
        verdict, draft, rows = self._judge(proposals, logits), self.draft, self.rows
        offers = self._offers(verdict.proposed[:, : proposals.chunk])
        offered_counts = torch.tensor([len(offer.tokens) for offer in offers])
        following, kept = ~rows.finished, [0] * len(offers)
        for position in range(proposals.chunk + 1):
            draft.drop(rows.finished, rows.full)
            check_usable("pilot", verdict.pilot_unusable[:, position] & following, rows.lengths)
            check_usable("base", verdict.base_unusable[:, position] & following, rows.lengths)
            offered = following & draft.drafting & (position < offered_counts)
            ended = following & draft.drafting & ~offered
            self._stop_drafts(offers, ended)
            following = following & ~(draft.drafting & ~offered)
            forced = draft.take(verdict.proposed[:, position], verdict.log_probs[:, position], offered)
            self._stop_drafts(offers, offered & (position + 1 == offered_counts), at_limit=True)
            own = self._own(position, verdict, proposals, logits, forced, following, ended)
            written = torch.where(forced == FREE, own, forced)
            rows.append(written, following)
            following = following & (written == verdict.proposed[:, position])
            kept = [count + follows for count, follows in zip(kept, following.tolist(), strict=True)]
            following = following & ~rows.finished
            if not following.any():
                break
        return kept

    def _offers(self, proposed: torch.Tensor) -> list[Offer]:
        """What each row's draft goes on with; nothing where none does."""
        drafting = (self.draft.drafting & ~self.rows.finished).tolist()
        return [
            self.bridge.offer(row, tokens) if drafts else Offer([], None)
            for row, (tokens, drafts) in enumerate(zip(proposed.tolist(), drafting, strict=True))
        ]

    def _stop_drafts(self, offers: list[Offer], ended: torch.Tensor, at_limit: bool = False) -> None:
        """Some drafts have nothing left, BoolTensor[B]; a limit is known with the last token, another end only behind it."""
        for row in ended.nonzero().flatten().tolist():
            reason = offers[row].over
            if reason is not None and (reason == "draft_limit" or not at_limit):
                self.draft.stop(torch.arange(len(offers)) == row, reason)

    def _judge(self, proposals: Proposals, logits: torch.Tensor) -> Verdict:
        """Everything that the decision needs of the device, in one transfer."""
        own = afresh = proposals.tokens
        drafting = bool(self.draft.drafting.any())
        if self._at_once:
            scores = self._processors(None, logits.flatten(0, 1).clone()).view_as(logits)
            if self._do_sample:
                own = keep_or_redraw(scores, proposals.tokens.clamp(min=0), proposals.drawn_with(self._vocabulary))
                afresh = draw(scores.softmax(dim=-1)) if drafting else own
            else:
                own = afresh = scores.argmax(dim=-1)
        log_probs = torch.zeros_like(own, dtype=torch.float32)
        if drafting:
            index = proposals.tokens.clamp(0, self._vocabulary - 1)[..., None]
            log_probs = logits.log_softmax(dim=-1).gather(2, index).squeeze(2)
        bits = log_probs.view(torch.int32)  # so that all of it travels as one tensor of integers
        parts = [proposals.tokens, bits, proposals.unusable, unusable(logits), own, afresh]
        packed = torch.stack([part.long() for part in parts]).cpu()
        whole = packed.new_zeros(len(parts), len(self.rows.responses), proposals.chunk + 1)
        whole[:, self._live] = packed
        tokens, bits, pilot_unusable, base_unusable, own, afresh = whole
        return Verdict(tokens, bits.int().view(torch.float32), pilot_unusable.bool(), base_unusable.bool(), own, afresh)

    def _own(
        self,
        position: int,
        verdict: Verdict,
        proposals: Proposals,
        logits: torch.Tensor,
        forced: torch.Tensor,
        following: torch.Tensor,
        ended: torch.Tensor,
    ) -> torch.Tensor:
        """What the base writes at one position, LongTensor[B]; read only where a row follows and nothing is forced.

        Where a proposal has just ended a draft, BoolTensor[B], the base draws without it: that row is here only because of
        what was proposed, so the proposal no longer is a draw from the pilot's distribution.
        """
        if self._at_once:
            return torch.where(ended, verdict.afresh[:, position], verdict.own[:, position])
        chosen = torch.full_like(forced, FREE)
        asked = following if self.record else following & (forced == FREE)
        raw, tokens = self._whole(logits[:, position]), self._whole(proposals.tokens[:, position]).clamp(min=0)
        drawn_with = self._whole(proposals.drawn_with(self._vocabulary)[:, position]) if self._do_sample else None
        for prefix, exact in self.rows.prefixes(asked.nonzero().flatten().tolist()):
            scores = self._processors(prefix, raw.clone())
            if self.record is not None:
                self.record.add(exact, raw, force(scores, forced.to(scores.device)))
            if drawn_with is None:
                choice = scores.argmax(dim=-1)
            else:
                choice = keep_or_redraw(scores, tokens, drawn_with * ~ended.to(scores.device)[:, None])
            chosen[exact] = choice[exact].cpu()
        return chosen

    def _whole(self, live: torch.Tensor) -> torch.Tensor:
        """The whole batch's, 0 where a row has finished."""
        if len(live) == len(self.rows.responses):
            return live
        index = torch.tensor(self._live, device=live.device)
        return live.new_zeros(len(self.rows.responses), *live.shape[1:]).index_copy_(0, index, live)

    def _missing(self, stream: Stream) -> list[list[int] | None]:
        """What a stream's cache lacks of each live row; None for a row that needs nothing more."""
        finished = self.rows.finished.tolist()
        return [None if finished[row] else stream.missing(row, self.rows.responses[row]) for row in self._live]

    def _rewind(self, agreed: list[int]) -> None:
        """Both caches go back to what stands; the base's one token further where it has yet to say what follows.

        Args:
            agreed: tokens of each response up to where it last was what the pilot proposed.
        """
        drafting = self.draft.drafting.tolist()
        for row, length in enumerate(self.rows.lengths):
            self.pilot.rewind(row, agreed[row])
            self.base.rewind(row, length if drafting[row] else length - 1)
