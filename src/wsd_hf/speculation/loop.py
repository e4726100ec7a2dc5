"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine.acceptance import keep_or_redraw
from ..engine.call import Call
from ..engine.checks import logits_error, not_finite, vocabulary_size
from ..engine.ragged_stream import real_tokens
from ..engine.rows import Rows
from ..engine.sampling import FREE, SAMPLING_WARPERS, draw, force
from ..engine.scores import Record
from ..engine.stats import Stats, peak_memory, work
from ..engine.stream import Stream
from ..engine.streams import open_stream
from ..text.bridge import Offer, OneVocabulary
from .pace import CHUNKS, Pace, Price
from .proposer import Proposals, Proposer
from .rule import Drafted, Rule
from .setup import Setup


class Verdict(NamedTuple):
    """One step on the host: for each live row, c proposals and the position after them, in lists of c + 1."""

    proposed: dict[int, list[int]]
    """Token ids; `FREE` at the end."""
    pilot_not_finite: dict[int, list[int]]
    base_not_finite: dict[int, list[int]]
    own: dict[int, list[int]]
    """Token ids: the base's own, if all positions can be chosen for at once."""
    afresh: Mapping[int, list[int]] = MappingProxyType({})
    """Token ids: the base's own, drawn without regard to the proposal; only where some row drafts."""
    log_probs: Mapping[int, list[float]] = MappingProxyType({})
    """The base's log-probabilities of the proposals, of float32 precision; only where some row drafts."""


class Decoding:
    """One call on the fast path.

    B rows, up to c proposals of the pilot for each, V tokens in the base's vocabulary. Rows that have not finished are live:
    tensors on the device have those only, and the host knows them all.

    Attributes:
        rows: prompts and responses.
        record: scores and logits of every token, if the call returns them.
        proposed, kept: tokens of the pilot, in the base's vocabulary.
    """

    def __init__(self, call: Call, base: Stream, proposer: Proposer, draft: Rule, pace: Pace) -> None:
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
        while self.rows.unfinished:
            self._shrink()
            free = [row for row in self.rows.unfinished if not self.draft.drafting[row]]
            drafting = sum(self.draft.drafting[row] for row in self.rows.unfinished)
            chunk = self.pace.chunk(drafting, free=len(free))
            proposals = self.proposer.propose(chunk, self.rows, self.draft.drafting)
            kept = self._decide(proposals, self._check(proposals))
            self._rewind()
            counts = dict(zip(self.base.live, proposals.counts, strict=True))
            self.proposed += sum(proposals.counts)
            self.kept += sum(kept.values())
            self.pace.judged([(kept[row], counts[row]) for row in free])

    def _shrink(self) -> None:
        """Drops finished rows from the streams; where forwards are captured they stay, since shapes must."""
        live = self.rows.unfinished
        if self._shrinks and live != self.base.live:
            if any(self.draft.drafting):
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
        if any(self.draft.drafting):
            self._keep_last(logits, [new == [] for new in missing], proposals.counts)
        return logits

    def _keep_last(self, logits: torch.Tensor, fed: list[bool], counts: list[int]) -> None:
        """Keeps the logits after each row's last proposal; rows without unfed tokens begin with those of the step before."""
        if all(fed):
            logits[:, 0] = self._last_logits
        elif any(fed):
            mask = torch.tensor(fed, device="cpu").to(logits.device, non_blocking=True)
            logits[:, 0] = torch.where(mask[:, None], self._last_logits, logits[:, 0])
        if min(counts) == max(counts):
            self._last_logits = logits[:, counts[0]].clone()
        else:
            last = torch.tensor(counts, device="cpu").to(logits.device, non_blocking=True)
            self._last_logits = logits.gather(1, last[:, None, None].expand(-1, 1, self._vocabulary)).squeeze(1)

    def _decide(self, proposals: Proposals, logits: torch.Tensor) -> dict[int, int]:
        """Goes through the positions; a row follows while its tokens are the proposed ones. Returns the kept ones' counts."""
        verdict, draft, rows = self._judge(proposals, logits), self.draft, self.rows
        offers = self.proposer.offers(proposals, verdict.proposed, draft.drafting)
        following = rows.unfinished
        kept = dict.fromkeys(self.base.live, 0)
        for position in range(proposals.chunk + 1):
            self._check_finite(verdict, position, following)
            drafting = [row for row in following if draft.drafting[row]]
            offered = {
                row: Drafted(verdict.proposed[row][position], verdict.log_probs[row][position])
                for row in drafting
                if position < len(offers[row].tokens)
            }
            ended = [row for row in drafting if row not in offered]
            self._stop_drafts(offers, ended)
            following = [row for row in following if row in offered or not draft.drafting[row]]
            forced = draft.take(offered)
            if self.proposer.bridge.token_by_token:
                self._stop_drafts(offers, [row for row in offered if position + 1 == len(offers[row].tokens)], at_limit=True)
            own = self._own(position, verdict, proposals, logits, forced, following, ended)
            written = {row: forced[row] if row in forced else own[row] for row in following}
            rows.append(written, by_pilot=offered)
            following = [row for row in following if written[row] == verdict.proposed[row][position]]
            for row in following:
                kept[row] += 1
            for row in written:
                if rows.finished[row]:
                    draft.drop(row, rows.full(row))
            following = [row for row in following if not rows.finished[row]]
            if not following:
                break
        return kept

    def _check_finite(self, verdict: Verdict, position: int, following: list[int]) -> None:
        for row in following:
            if verdict.pilot_not_finite[row][position] and self.draft.drafting[row]:
                raise logits_error("pilot", len(self.rows.responses[row]), row)
            if verdict.base_not_finite[row][position]:
                raise logits_error("base", len(self.rows.responses[row]), row)

    def _stop_drafts(self, offers: dict[int, Offer], ended: list[int], at_limit: bool = False) -> None:
        """Stops drafts without further tokens; a limit shows with the last token, another end only after it."""
        for row in ended:
            reason = offers[row].over
            if reason is not None and (reason == "draft_limit" or not at_limit):
                self.draft.stop(row, reason)

    def _judge(self, proposals: Proposals, logits: torch.Tensor) -> Verdict:
        """Everything from the device that the decision needs, in one transfer."""
        drafting = any(self.draft.drafting)
        own = afresh = proposals.tokens
        if self._at_once and not self._do_sample and not self._processors:
            highest, own = logits.max(dim=-1)  # one pass over the vocabulary for both
            bad, afresh = ~highest.isfinite(), own
        else:
            bad = not_finite(logits)
            if self._at_once:
                own, afresh = self._choices(proposals, logits, drafting)
        parts = {"proposed": proposals.tokens, "pilot_not_finite": proposals.not_finite, "base_not_finite": bad, "own": own}
        if drafting:
            index = proposals.tokens.clamp(0, self._vocabulary - 1)[..., None]
            log_probs = logits.log_softmax(dim=-1).gather(2, index).squeeze(2)
            parts |= {"afresh": afresh, "log_probs": log_probs.view(torch.int32)}  # all travels as one tensor of integers
        packed = torch.stack([part.long() for part in parts.values()]).cpu()
        lists: dict[str, Any] = dict(zip(parts, packed.tolist(), strict=True))
        if drafting:
            lists["log_probs"] = packed[-1].int().view(torch.float32).tolist()
        return Verdict(**{name: dict(zip(self.base.live, rows, strict=True)) for name, rows in lists.items()})

    def _choices(self, proposals: Proposals, logits: torch.Tensor, drafting: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's own tokens at all positions, and those drawn without regard to the proposals, each [rows, c + 1]."""
        scores = self._processors(None, logits.flatten(0, 1).clone()).view_as(logits) if self._processors else logits
        if not self._do_sample:
            own = scores.argmax(dim=-1)
            return own, own
        at = [proposals.drawn_with(position, self._vocabulary) for position in range(proposals.chunk + 1)]
        own = keep_or_redraw(scores, proposals.tokens.clamp(min=0), torch.stack(at, dim=1))
        return own, draw(scores.softmax(dim=-1)) if drafting else own

    def _own(
        self,
        position: int,
        verdict: Verdict,
        proposals: Proposals,
        logits: torch.Tensor,
        forced: dict[int, int],
        following: list[int],
        ended: list[int],
    ) -> dict[int, int]:
        """The base's own tokens at one position in rows that follow and where nothing is forced.

        Where a proposal has just ended a draft, the base draws without it: the row is here because of that proposal, which
        therefore no longer is a draw from the pilot's distribution.
        """
        free = [row for row in following if row not in forced]
        if self._at_once:
            return {row: (verdict.afresh if row in ended else verdict.own)[row][position] for row in free}
        asked = following if self.record else free
        return self._one_by_one(position, proposals, logits, forced, asked, ended) if asked else {}

    def _one_by_one(
        self,
        position: int,
        proposals: Proposals,
        logits: torch.Tensor,
        forced: dict[int, int],
        asked: list[int],
        ended: list[int],
    ) -> dict[int, int]:
        """As `_own`, of the scores that processors make of each row's exact prefix."""
        live, every, device = self.base.live, range(len(self.rows.responses)), logits.device
        raw, tokens = self.rows.whole(live, logits[:, position]), self.rows.whole(live, proposals.tokens[:, position])
        drawn_with = None
        if self._do_sample:
            here = torch.tensor([row not in ended for row in every], device="cpu").to(device, non_blocking=True)
            drawn_with = self.rows.whole(live, proposals.drawn_with(position, self._vocabulary)) * here[:, None]
        chosen: dict[int, int] = {}
        for prefix, exact in self.rows.prefixes(asked, device):
            scores = self._processors(prefix, raw.clone())
            if self.record is not None:
                only = torch.tensor([forced.get(row, FREE) for row in every], device=device)
                self.record.add(exact, raw, force(scores, only))
            choice = scores.argmax(dim=-1) if drawn_with is None else keep_or_redraw(scores, tokens.clamp(min=0), drawn_with)
            choices = choice.tolist()
            chosen |= {row: choices[row] for row in exact}
        return chosen

    def _rewind(self) -> None:
        """Drops rejected tokens from the base's cache, and of free rows the last token, which is fed again for its logits."""
        for row, (length, drafting) in enumerate(zip(self.rows.lengths, self.draft.drafting, strict=True)):
            self.base.rewind(row, length if drafting else length - 1)


def decode(
    call: Call, setup: Setup[Rule], chunk: int | None, speculate: bool, cuda_graphs: bool
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
        decoding = Decoding(call, base, Proposer(pilot, setup, pilot_room), setup.rule, pace)
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
