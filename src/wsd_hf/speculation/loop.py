"""The loop of the fast path: draft, check, decide, keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ..engine.acceptance import keep_or_redraw
from ..engine.call import Call
from ..engine.checks import logits_error, not_finite, vocabulary_size
from ..engine.likelihoods import likelihoods_of, of_tokens, ranks
from ..engine.ragged_stream import real_tokens
from ..engine.rows import Rows
from ..engine.sampling import FREE, SAMPLING_WARPERS, draw, force
from ..engine.scores import Record
from ..engine.stats import Stats, peak_memory, work
from ..engine.stream import Stream
from ..engine.streams import open_stream
from ..text.bridge import Offer, OneVocabulary
from .config import SpeculativeConfig
from .ngrams import NGrams
from .pace import CHUNKS, NOTHING, Pace, Price
from .proposer import Proposals, Proposer
from .rule import Logits, Rule, over_vocabulary
from .setup import Setup
from .sureness import Sureness
from .verdict import FAULTS, Own, Scored, Verdict, entropies, on_host


class Decoding:
    """One call on the fast path.

    B rows, up to c proposals for each, V tokens in the base's vocabulary. Rows that have not finished are live: tensors on
    the device have those only, and the host knows them all.

    Args:
        call: whose prompts are answered.
        base: its stream.
        proposer: the pilot's side.
        rule: of the strategy.
        pace: chooses c.
        reference: stream of the reference model, for rules that read it.
        one_writer: as for `Rows`.
        ngrams: whether the n-grams of free rows propose too.

    Attributes:
        rows: prompts and responses.
        record: scores and logits of every token, if the call returns them.
        proposed, kept: tokens proposed, in the base's vocabulary.
    """

    def __init__(
        self,
        call: Call,
        base: Stream,
        proposer: Proposer,
        rule: Rule,
        pace: Pace,
        reference: Stream | None = None,
        one_writer: bool = True,
        ngrams: bool = False,
    ) -> None:
        settings = call.generation_config
        records = settings.return_dict_in_generate and (settings.output_scores or settings.output_logits)
        self.base, self.proposer, self.rule, self.pace, self.reference = base, proposer, rule, pace, reference
        self.record = Record(len(call.input_ids)) if records else None
        self.rows = Rows(call, self.record if settings.output_scores else None, one_writer)
        self.proposed = self.kept = 0
        self._ngrams = [NGrams(prompt) for prompt in base.prompts] if ngrams else []
        self._processors, self._settings = call.processors, settings
        self._takes_likelihoods = call.takes_likelihoods
        self._vocabulary = vocabulary_size(base.model)
        # Warpers look at one position's scores only, so that all positions can be chosen for at once; any other processor
        # is shown the exact prefix of each row.
        self._at_once = self.record is None and all(type(one) in SAMPLING_WARPERS for one in call.processors)
        self._streams = [base, proposer.stream, *([reference] if reference else [])]
        self._shrinks = not any(stream.workspace.captures for stream in self._streams)
        # The base's logits after the last token that it was fed, [rows, V].
        self._last_logits = torch.empty(0, dtype=torch.float32, device=self.rows.device)
        # Rows that have begun to draft or to wait in this step, after a token that the base has yet to read.
        self._unread: set[int] = set()

    def run(self) -> None:
        """Decodes until every row has finished."""
        while self.rows.unfinished:
            self.step()

    def output(self) -> GenerateDecoderOnlyOutput:
        """Sequences, and the scores and logits that the call returns."""
        record, settings = self.record, self._settings
        return GenerateDecoderOnlyOutput(
            sequences=self.rows.sequences,
            scores=record.columns("scores") if record and settings.output_scores else None,
            logits=record.columns("logits") if record and settings.output_logits else None,
        )

    def stats(self) -> Stats:
        """Work done so far."""
        return Stats(
            work(self.base),
            work(self.proposer.stream),
            work(self.reference) if self.reference else None,
            proposed=self.proposed,
            kept=self.kept,
            cache_memory=sum(stream.workspace.cache.memory for stream in self._streams),
            peak_memory=peak_memory(*(stream.model for stream in self._streams)),
        )

    def step(self, given: Mapping[int, list[int]] = MappingProxyType({})) -> None:
        """Drafts, checks, decides and keeps, once for each row that has not finished and does not wait.

        `given` are proposals for some free rows, in tokens of the base, in place of the pilot's.
        """
        self.shrink()
        for row, weights in self.proposer.weigh(self.rule.unweighed(), self.rows).items():
            self.rule.weighed(row, weights)
        active = [row for row in self.rows.unfinished if not self.rule.waiting[row]]
        if self.rule.one_by_one:
            given = {row: [] for row in active if not self.rule.drafting[row]}
        drafting = sum(self.rule.drafting[row] for row in active)
        free = [row for row in active if not self.rule.drafting[row] and row not in given]
        plan = self.pace.plan(drafting, {row: self._guessed(row) for row in free}) if drafting or free else NOTHING
        given = {**given, **{row: self._ngrams[row].guess(plan.chunk) for row in plan.ngrams}}
        proposals = self.proposer.propose(plan, self.rows, active, given)
        kept = self._decide(proposals, self._score(proposals, active), active)
        self._rewind()
        counts = dict(zip(self.base.live, proposals.counts, strict=True))
        self.proposed += sum(proposals.counts)
        self.kept += sum(kept.values())
        if free:
            self.pace.judged([(kept[row], counts[row]) for row in free if row not in given], proposals.sure)

    def _guessed(self, row: int) -> Sequence[float]:
        """Expected number of the tokens kept of the first 0, 1, ... that a free row's n-grams would propose."""
        if not self._ngrams:
            return [0.0] * (self.pace.most + 1)
        self._ngrams[row].read(self.rows.responses[row])
        return self._ngrams[row].kept(self.pace.most)

    def shrink(self) -> None:
        """Drops finished rows from the streams; where forwards are captured they stay, since shapes must."""
        live = self.rows.unfinished
        if self._shrinks and live != self.base.live:
            if len(self._last_logits) == len(self.base.live):
                self._last_logits = self._last_logits[[self.base.live.index(row) for row in live]]
            for stream in self._streams:
                stream.select(live)

    def _score(self, proposals: Proposals, active: list[int]) -> Scored:
        """The models' logits before each proposal and after the last, and the target's scores."""
        base = self._check(proposals, active)
        faults = FAULTS["base"] * not_finite(base) + FAULTS["pilot"] * proposals.not_finite
        logits = Logits(base)
        if proposals.logits is not None:
            logits = logits._replace(pilot=over_vocabulary(proposals.logits, self._vocabulary))
        if self.reference is not None:
            reference = self._read(self.reference, proposals, active).to(base.device)
            faults += FAULTS["reference"] * not_finite(reference)
            logits = logits._replace(reference=over_vocabulary(reference, self._vocabulary))
        target = self.rule.target(logits)
        if target is not base:
            faults += FAULTS["target"] * not_finite(target)
        return Scored(logits, target, faults)

    def _read(self, stream: Stream, proposals: Proposals, active: list[int]) -> torch.Tensor:
        """A model's logits before each proposal and after the last, from one forward, [rows, c + 1, V]."""
        missing = [stream.missing(row, self.rows.responses[row]) if row in active else None for row in stream.live]
        return stream.logits(stream.block(missing, proposals.tokens[:, :-1], proposals.counts), keep=proposals.chunk + 1)

    def _check(self, proposals: Proposals, active: list[int]) -> torch.Tensor:
        """The base's logits."""
        unread = {row: self.base.missing(row, self.rows.responses[row]) for row in active}
        if not any(unread.values()) and not any(proposals.counts):  # drafts that wait for the pilot's next word
            return self._last_logits[:, None]
        logits = self._read(self.base, proposals, active).to(self.rows.device)
        if any(self.rule.drafting):
            self._keep_last(logits, [unread.get(row) == [] for row in self.base.live], proposals.counts)
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

    def _decide(self, proposals: Proposals, scored: Scored, active: list[int]) -> dict[int, int]:
        """Goes through the positions; a row follows while its tokens are the proposed ones. Returns the kept ones' counts."""
        verdict, rule, rows = self._judge(proposals, scored), self.rule, self.rows
        offers = self.proposer.offers(proposals, verdict.proposed)
        following = active
        kept = dict.fromkeys(self.base.live, 0)
        for position in range(proposals.chunk + 1):
            self._check_finite(verdict, position, following)
            drafting = [row for row in following if rule.drafting[row]]
            offered = {row: verdict.drafted(row, position) for row in drafting if position < len(offers[row].tokens)}
            ended = [row for row in drafting if row not in offered]
            self._stop_drafts(offers, ended)
            following = [row for row in following if row in offered or not rule.drafting[row]]
            forced = rule.take(offered)
            if self.proposer.bridge.token_by_token:
                self._stop_drafts(offers, [row for row in offered if position + 1 == len(offers[row].tokens)], at_limit=True)
            own = self._own(position, verdict, proposals, scored, forced, following, ended)
            written = {row: forced[row] if row in forced else own[row].token for row in following}
            likelihoods = verdict.likelihoods(offered, position) | {row: one.likelihood for row, one in own.items()}
            rows.append(written, by_pilot=offered, likelihoods=likelihoods)
            following = [row for row in following if written[row] == verdict.proposed[row][position]]
            for row in following:
                kept[row] += 1
            for row in written:
                if rows.finished[row]:
                    rule.drop(row, rows.full(row))
                elif row in own:
                    rule.written(row, own[row].token, own[row].weight)
            stopped = [row for row in own if rule.drafting[row] or rule.waiting[row] or rule.one_by_one]
            self._unread.update(row for row in stopped if rule.drafting[row] or row not in following)
            following = [row for row in following if not rows.finished[row] and row not in stopped]
            if not following:
                break
        return kept

    def _check_finite(self, verdict: Verdict, position: int, following: list[int]) -> None:
        for row in following:
            faults = verdict.faults[row][position]
            if not (self.rule.drafting[row] or self.rule.reads_pilot):
                faults &= ~FAULTS["pilot"]  # of a proposal
            for model in FAULTS:
                if faults & FAULTS[model]:
                    raise logits_error(model, len(self.rows.responses[row]), row)

    def _stop_drafts(self, offers: dict[int, Offer], ended: list[int], at_limit: bool = False) -> None:
        """Stops drafts without further tokens; a limit shows with the last token, another end only after it."""
        for row in ended:
            reason = offers[row].over
            if reason is not None and (reason == "draft_limit" or not at_limit):
                self.rule.stop(row, reason)

    def _judge(self, proposals: Proposals, scored: Scored) -> Verdict:
        """Everything from the device that the decision needs, in one transfer."""
        drafting, base, pilot = any(self.rule.drafting), scored.logits.base, scored.logits.pilot
        choices = self._choices(proposals, scored.target, drafting)
        parts = {"proposed": proposals.tokens, "faults": scored.faults, **choices}
        if self.rule.weighs_written and pilot is not None:
            parts |= {f"{name}_weights": self.rule.weigh(pilot, tokens) for name, tokens in choices.items()}
        judged = choices if self._takes_likelihoods else {}
        if drafting:
            judged = judged | {"proposed": proposals.tokens}
        if judged:
            distributions = base.log_softmax(dim=-1)
            parts |= {f"{name}_log_probs": of_tokens(distributions, tokens) for name, tokens in judged.items()}
            if drafting and self.rule.reads_distributions:
                parts |= {"best_log_probs": distributions.amax(dim=-1), "entropies": entropies(distributions)}
        if self._takes_likelihoods:
            parts |= {f"{name}_ranks": ranks(base, tokens) for name, tokens in judged.items()}
        lists = on_host(parts)
        return Verdict(**{name: dict(zip(self.base.live, rows, strict=True)) for name, rows in lists.items()})

    def _choices(self, proposals: Proposals, target: torch.Tensor, drafting: bool) -> dict[str, torch.Tensor]:
        """The target's tokens at all positions, by their names in `Verdict`, [rows, c + 1], if they can be chosen at once."""
        if not self._at_once:
            return {}
        scores = self._processors(None, target.flatten(0, 1).clone()).view_as(target) if self._processors else target
        if not self._settings.do_sample:
            return {"own": scores.argmax(dim=-1)}
        at = [proposals.drawn_with(position, self._vocabulary) for position in range(proposals.chunk + 1)]
        own = {"own": keep_or_redraw(scores, proposals.tokens.clamp(min=0), torch.stack(at, dim=1))}
        return own | {"afresh": draw(scores.softmax(dim=-1))} if drafting else own

    def _own(
        self,
        position: int,
        verdict: Verdict,
        proposals: Proposals,
        scored: Scored,
        forced: dict[int, int],
        following: list[int],
        ended: list[int],
    ) -> dict[int, Own]:
        """The target's own tokens at one position in rows that follow and where nothing is forced.

        Where a proposal has just ended a draft, they are drawn without it: the row is here because of that proposal, which
        therefore no longer is a draw from the pilot's distribution.
        """
        free = [row for row in following if row not in forced]
        if self._at_once:
            return {row: verdict.choice(row, position, afresh=row in ended) for row in free}
        asked = following if self.record else free
        chosen = self._one_by_one(position, proposals, scored, forced, asked, ended) if asked else {}
        return {row: chosen[row] for row in free}

    def _one_by_one(
        self,
        position: int,
        proposals: Proposals,
        scored: Scored,
        forced: dict[int, int],
        asked: list[int],
        ended: list[int],
    ) -> dict[int, Own]:
        """As `_own`, of the scores that processors make of each row's exact prefix."""
        live, every, device = self.base.live, range(len(self.rows.responses)), self.rows.device
        at_position = (scored.logits.base[:, position], scored.target[:, position], proposals.tokens[:, position])
        raw, target, tokens = (self.rows.whole(live, values) for values in at_position)
        drawn_with = pilot = None
        if self._settings.do_sample:
            here = torch.tensor([row not in ended for row in every], device="cpu").to(device, non_blocking=True)
            drawn_with = self.rows.whole(live, proposals.drawn_with(position, self._vocabulary)) * here[:, None]
        if self.rule.weighs_written and scored.logits.pilot is not None:
            pilot = self.rows.whole(live, scored.logits.pilot[:, position])
        chosen: dict[int, Own] = {}
        for prefix, exact in self.rows.prefixes(asked, device):
            scores = self._processors(prefix, target.clone())
            if self.record is not None:
                only = torch.tensor([forced.get(row, FREE) for row in every], device=device)
                self.record.add(exact, raw, force(scores, only))
            choice = scores.argmax(dim=-1) if drawn_with is None else keep_or_redraw(scores, tokens.clamp(min=0), drawn_with)
            weights = [math.nan] * len(every) if pilot is None else self.rule.weigh(pilot, choice).tolist()
            found = likelihoods_of(raw, choice) if self._takes_likelihoods else [None] * len(every)
            choices = choice.tolist()
            chosen |= {row: Own(choices[row], weights[row], found[row]) for row in exact}
        return chosen

    def _rewind(self) -> None:
        """Drops rejected tokens from the caches, and of rows that are free next the last, which is fed again for its logits."""
        for row, (length, drafting) in enumerate(zip(self.rows.lengths, self.rule.drafting, strict=True)):
            read = (drafting or self.rule.waiting[row]) and row not in self._unread
            self.base.rewind(row, length if read else length - 1)
            if self.reference is not None:
                self.reference.rewind(row, length - 1)
        self._unread.clear()


def decode(
    call: Call, setup: Setup[Rule], settings: SpeculativeConfig, one_writer: bool = True
) -> tuple[GenerateDecoderOnlyOutput, Stats]:
    """Decodes a call that the fast path serves."""
    with open_decoding(call, setup, settings, one_writer) as decoding:
        decoding.run()
        return decoding.output(), decoding.stats()


@contextmanager
def open_decoding(call: Call, setup: Setup[Rule], settings: SpeculativeConfig, one_writer: bool = True) -> Iterator[Decoding]:
    """The decoding of a call that the fast path serves, over streams that are open as long."""
    room = call.budget + max(*CHUNKS, settings.chunk or 0)
    # The pilot may need more tokens of another vocabulary for the same text: a long draft still fits, if not all proposals.
    pilot_room = room if isinstance(setup.bridge, OneVocabulary) else room + setup.longest
    sides = [(call.base, call.prompt, room), (setup.side.model, setup.side.prompt, pilot_room)]
    if setup.reference:
        sides.append((*setup.reference, room))
    with ExitStack() as stack:
        streams = [
            stack.enter_context(open_stream(model, real_tokens(*prompt), size, settings.cuda_graphs))
            for model, prompt, size in sides
        ]
        base, pilot, *others = streams
        prices = [Price.of(stream.model, stream.workspace.captures) for stream in streams]
        stops = settings.chunk is None and pilot.device.type == "cpu" and not pilot.workspace.captures
        sureness = Sureness() if stops and isinstance(setup.bridge, OneVocabulary) else None
        pace = Pace(prices, settings.chunk, settings.speculate in ("auto", "pilot"), setup.rule.reads_pilot, sureness)
        reference, ngrams = others[0] if others else None, settings.speculate in ("auto", "ngram")
        proposer = Proposer(pilot, setup, pilot_room, sureness)
        yield Decoding(call, base, proposer, setup.rule, pace, reference, one_writer, ngrams)
