"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ...engine.acceptance import keep_or_redraw
from ...engine.cache import NO_SLOT
from ...engine.call import Call
from ...engine.checks import check_finite, not_finite, vocabulary_size
from ...engine.ragged_stream import RaggedStream, open_stream, real_tokens
from ...engine.rows import Rows
from ...engine.sampling import FREE, SAMPLING_WARPERS, draw, force
from ...engine.scores import Record
from ...engine.stats import Stats, peak_memory, work
from ...text.bridge import Offer, OneVocabulary
from .draft import Draft, DraftSetup
from .pace import CHUNKS, Pace, Price
from .proposer import Proposals, Proposer


class Verdict(NamedTuple):
    """One step on the CPU: every row of the batch, c proposals to each, and the position after them; all [B, c + 1]."""

    proposed: torch.Tensor
    """Token ids; `FREE` at the end."""
    log_probs: torch.Tensor
    """The base's log-probabilities of them, float32; read only where a row drafts."""
    pilot_not_finite: torch.Tensor
    base_not_finite: torch.Tensor
    own: torch.Tensor
    """Token ids: the base's own."""
    afresh: torch.Tensor
    """Token ids: the base's own, drawn without regard to the proposal."""


class Decoding:
    """One call on the fast path.

    B rows, up to c proposals of the pilot for each, V tokens in the base's vocabulary. Rows that have not finished are live:
    tensors on the device have those only, and the host knows them all.

    Attributes:
        rows: prompts and responses.
        record: scores and logits of every token, if the call returns them.
        proposed, kept: tokens of the pilot, in the base's vocabulary.
    """

    def __init__(self, call: Call, base: RaggedStream, proposer: Proposer, draft: Draft, pace: Pace) -> None:
        settings = call.generation_config
        records = settings.return_dict_in_generate and (settings.output_scores or settings.output_logits)
        self.base, self.proposer, self.draft, self.pace = base, proposer, draft, pace
        self.record = Record(len(call.input_ids)) if records else None
        self.rows = Rows(call, self.record if settings.output_scores else None)
        self.proposed = self.kept = 0
        self._processors, self._do_sample = call.processors, settings.do_sample
        self._vocabulary = vocabulary_size(base.model)
        # Warpers look at one position's scores only, so that all positions can be chosen for at once; any other processor
        # is shown the exact prefix of each row.
        self._at_once = self.record is None and all(type(one) in SAMPLING_WARPERS for one in call.processors)
        self._shrinks = not (base.workspace.captures or proposer.stream.workspace.captures)
        # The base's logits after the last token that it was fed, [rows, V].
        self._last_logits = torch.empty(0, dtype=torch.float32, device=self.rows.device)

    def run(self) -> None:
        """Decodes until every row has finished."""
        while not self.rows.finished.all():
            self._shrink()
            free = [row for row in self.base.live if not self.draft.drafting[row] and not self.rows.finished[row]]
            chunk = self.pace.chunk(drafting=int((self.draft.drafting & ~self.rows.finished).sum()), free=len(free))
            proposals = self.proposer.propose(chunk, self.rows, self.draft.drafting)
            logits = self._check(proposals)
            kept = self._decide(proposals, logits)
            self._rewind()
            counts = dict(zip(self.base.live, proposals.counts, strict=True))
            self.proposed += sum(proposals.counts)
            self.kept += sum(kept)
            self.pace.judged([(kept[row], counts[row]) for row in free])
        self.draft.drop(self.rows.finished, self.rows.full)

    def _shrink(self) -> None:
        """Drops finished rows from the streams; where forwards are captured they stay, since shapes must."""
        live = (~self.rows.finished).nonzero().flatten().tolist()
        if self._shrinks and live != self.base.live:
            self._last_logits = self._last_logits[[self.base.live.index(row) for row in live]]
            self.base.select(live)
            self.proposer.stream.select(live)

    def _check(self, proposals: Proposals) -> torch.Tensor:
        """The base's logits before each proposal and after the last, [rows, c + 1, V]."""
        responses, finished = self.rows.responses, self.rows.finished
        missing = [None if finished[row] else self.base.missing(row, responses[row]) for row in self.base.live]
        if not any(missing) and not any(proposals.counts):  # drafts that wait for the pilot's next word
            return self._last_logits[:, None]
        block = self.base.block(missing, proposals.tokens[:, :-1], proposals.counts)
        logits = self.base.logits(block, keep=proposals.chunk + 1).to(self.rows.device)
        if [] in missing:  # these rows were fed their last token before
            held = (block.slots[:, -proposals.chunk - 1] == NO_SLOT).to(self.rows.device)
            logits[:, 0] = torch.where(held[:, None], self._last_logits, logits[:, 0])
        last = (proposals.tokens != FREE).sum(dim=1)[:, None, None].expand(-1, 1, self._vocabulary)
        self._last_logits = logits.gather(1, last).squeeze(1)
        return logits

    def _decide(self, proposals: Proposals, logits: torch.Tensor) -> list[int]:
        """Goes through the positions; a row follows while its tokens are the proposed ones. Returns the kept ones' counts."""
        verdict, draft, rows = self._judge(proposals, logits), self.draft, self.rows
        offers = self.proposer.offers(proposals, verdict.proposed, draft.drafting & ~rows.finished)
        counts = [len(offers[row].tokens) if row in offers else 0 for row in range(len(rows.responses))]
        offered_counts = torch.tensor(counts, device="cpu")
        following, kept = ~rows.finished, torch.zeros_like(offered_counts)
        for position in range(proposals.chunk + 1):
            draft.drop(rows.finished, rows.full)
            check_finite("pilot", verdict.pilot_not_finite[:, position] & following & draft.drafting, rows.lengths)
            check_finite("base", verdict.base_not_finite[:, position] & following, rows.lengths)
            offered = following & draft.drafting & (position < offered_counts)
            ended = following & draft.drafting & ~offered
            self._stop_drafts(offers, ended)
            following = following & ~(draft.drafting & ~offered)
            forced = draft.take(verdict.proposed[:, position], verdict.log_probs[:, position], offered)
            if self.proposer.bridge.token_by_token:
                self._stop_drafts(offers, offered & (position + 1 == offered_counts), at_limit=True)
            own = self._own(position, verdict, proposals, logits, forced, following, ended)
            written = torch.where(forced == FREE, own, forced)
            rows.append(written, following, by_pilot=offered)
            following = following & (written == verdict.proposed[:, position])
            kept += following
            following = following & ~rows.finished
            if not following.any():
                break
        return kept.tolist()

    def _stop_drafts(self, offers: dict[int, Offer], ended: torch.Tensor, at_limit: bool = False) -> None:
        """Stops drafts without further tokens, BoolTensor[B]; a limit shows with the last token, another end only after it."""
        for row in ended.nonzero().flatten().tolist():
            reason = offers[row].over
            if reason is not None and (reason == "draft_limit" or not at_limit):
                self.draft.stop(torch.arange(len(ended), device="cpu") == row, reason)

    def _judge(self, proposals: Proposals, logits: torch.Tensor) -> Verdict:
        """Everything from the device that the decision needs, in one transfer."""
        own = afresh = proposals.tokens
        drafting = bool(self.draft.drafting.any())
        if self._at_once:
            scores = self._processors(None, logits.flatten(0, 1).clone()).view_as(logits)
            if self._do_sample:
                at = [proposals.drawn_with(position, self._vocabulary) for position in range(proposals.chunk + 1)]
                drawn_with = torch.stack(at, dim=1)
                own = keep_or_redraw(scores, proposals.tokens.clamp(min=0), drawn_with)
                afresh = draw(scores.softmax(dim=-1)) if drafting else own
            else:
                own = afresh = scores.argmax(dim=-1)
        log_probs = torch.zeros_like(own, dtype=torch.float32)
        if drafting:
            index = proposals.tokens.clamp(0, self._vocabulary - 1)[..., None]
            log_probs = logits.log_softmax(dim=-1).gather(2, index).squeeze(2)
        bits = log_probs.view(torch.int32)  # so that all of it travels as one tensor of integers
        parts = [proposals.tokens, bits, proposals.not_finite, not_finite(logits), own, afresh]
        packed = torch.stack([part.long() for part in parts]).cpu()
        whole = packed.new_zeros(len(parts), len(self.rows.responses), proposals.chunk + 1)
        whole[:, self.base.live] = packed
        tokens, bits, pilot_not_finite, base_not_finite, own, afresh = whole
        return Verdict(tokens, bits.int().view(torch.float32), pilot_not_finite.bool(), base_not_finite.bool(), own, afresh)

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
        """The base's own tokens at one position, LongTensor[B]; read only where a row follows and nothing is forced.

        Where a proposal has just ended a draft, BoolTensor[B], the base draws without it: the row is here because of that
        proposal, which therefore no longer is a draw from the pilot's distribution.
        """
        if self._at_once:
            return torch.where(ended, verdict.afresh[:, position], verdict.own[:, position])
        chosen = torch.full_like(forced, FREE)
        asked = following if self.record else following & (forced == FREE)
        raw, tokens, drawn_with = logits[:, position], proposals.tokens[:, position].clamp(min=0), None
        raw, tokens = self.rows.whole(self.base.live, raw), self.rows.whole(self.base.live, tokens)
        if self._do_sample:
            drawn_with = self.rows.whole(self.base.live, proposals.drawn_with(position, self._vocabulary))
        for prefix, exact in self.rows.prefixes(asked.nonzero().flatten().tolist(), raw.device):
            scores = self._processors(prefix, raw.clone())
            if self.record is not None:
                self.record.add(exact, raw, force(scores, forced.to(scores.device)))
            if drawn_with is None:
                choice = scores.argmax(dim=-1)
            else:
                choice = keep_or_redraw(scores, tokens, drawn_with * ~ended.to(scores.device)[:, None])
            chosen[exact] = choice[exact].cpu()
        return chosen

    def _rewind(self) -> None:
        """Drops rejected tokens from the base's cache, and of free rows the last token, which is fed again for its logits."""
        drafting = self.draft.drafting.tolist()
        for row, length in enumerate(self.rows.lengths):
            self.base.rewind(row, length if drafting[row] else length - 1)


def decode(
    call: Call, setup: DraftSetup, chunk: int | None, speculate: bool, cuda_graphs: bool
) -> tuple[GenerateDecoderOnlyOutput, Stats]:
    """Decodes a call that `unsupported_reason` allows; the settings are those of `WSDConfig`."""
    settings, side = call.generation_config, setup.side
    room = call.budget + max(*CHUNKS, chunk or 0)
    # The pilot may need more tokens of another vocabulary for the same text: a long draft still fits, if not all proposals.
    pilot_room = room if isinstance(setup.bridge, OneVocabulary) else room + setup.longest
    with (
        open_stream(call.base, real_tokens(*call.prompt), room, cuda_graphs) as base,
        open_stream(side.model, real_tokens(*side.prompt), pilot_room, cuda_graphs) as pilot,
    ):
        prices = [Price.of(stream.model, stream.workspace.captures) for stream in (base, pilot)]
        pace = Pace(prices[0], prices[1], chunk, speculate)
        decoding = Decoding(call, base, Proposer(pilot, setup, pilot_room), setup.draft, pace)
        decoding.run()
        stats = Stats(
            work(base),
            work(pilot),
            proposed=decoding.proposed,
            kept=decoding.kept,
            cache_memory=base.workspace.cache.memory + pilot.workspace.cache.memory,
            peak_memory=peak_memory(call.base, side.model),
        )
    record = decoding.record
    return GenerateDecoderOnlyOutput(
        sequences=decoding.rows.sequences,
        scores=record.columns("scores") if record and settings.output_scores else None,
        logits=record.columns("logits") if record and settings.output_logits else None,
    ), stats
