"""Proposals of one step: the pilot's next tokens in the base's vocabulary, beside tokens that come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch

from ..engine.checks import logits_error, not_finite
from ..engine.rows import Rows
from ..engine.sampling import FREE, choice
from ..engine.stream import Stream
from ..text.bridge import Offer, OneVocabulary
from .pace import Plan
from .rule import Rule, Text
from .setup import Setup
from .sureness import Sureness
from .verdict import on_host


class Proposals(NamedTuple):
    """Up to c tokens for each live row."""

    tokens: torch.Tensor
    """`FREE` after a row's last. LongTensor[rows, c + 1]."""
    not_finite: torch.Tensor
    """Positions of NaN and the like in the pilot's logits, BoolTensor[rows, c + 1]."""
    counts: list[int]
    """Tokens for each row."""
    probabilities: Sequence[torch.Tensor | None] = ()
    """Probabilities that each position was drawn from, [rows, V of the pilot]; None if the proposals were deterministic."""
    certain: torch.Tensor | None = None
    """Rows whose proposals are deterministic at all positions, BoolTensor[rows]; None: no others than `probabilities` shows."""
    offers: dict[int, Offer] | None = None
    """Next tokens of each drafting row's draft, if they are known before the check."""
    logits: torch.Tensor | None = None
    """The pilot's raw logits, float32 [rows, c + 1, V of the pilot], for rules that read them."""
    read: frozenset[int] = frozenset()
    """Rows whose proposals the pilot has chosen or read."""
    sure: Sequence[float] = ()
    """The pilot's probabilities of a single row's proposals, where it may stop."""

    @property
    def chunk(self) -> int:
        """c."""
        return self.tokens.shape[1] - 1

    def drawn_with(self, position: int, vocabulary: int) -> torch.Tensor:
        """A position's probabilities over the base's vocabulary, 0 where nothing usable was proposed: [rows, vocabulary]."""
        tokens = self.tokens[:, position, None]
        known = ((tokens >= 0) & (tokens < vocabulary)).float()
        certain = torch.zeros(len(tokens), vocabulary, dtype=torch.float32, device=tokens.device)
        certain.scatter_(1, tokens.clamp(0, vocabulary - 1), known)
        probabilities = self.probabilities[position] if position < len(self.probabilities) else None
        if probabilities is None:
            return certain
        shared = min(vocabulary, probabilities.shape[-1])
        drawn_with = torch.zeros_like(certain)
        drawn_with[:, :shared] = probabilities[:, :shared].nan_to_num()
        return drawn_with if self.certain is None else torch.where(self.certain[:, None], certain, drawn_with)

    def to(self, device: torch.device) -> Proposals:
        """The same on a device."""
        return self._replace(
            tokens=self.tokens.to(device),
            not_finite=self.not_finite.to(device),
            probabilities=[None if one is None else one.to(device) for one in self.probabilities],
            certain=None if self.certain is None else self.certain.to(device),
            logits=None if self.logits is None else self.logits.to(device),
        )


class Proposer:
    """The pilot, and the bridge that its tokens take to the base.

    Args:
        stream: of the pilot.
        setup: of the call.
        room: tokens of a response that its cache has room for.
        sureness: lets it stop where it is unsure, if it proposes to a single free row; None where values should not be waited
            for, or tokens don't cross one by one.
    """

    def __init__(self, stream: Stream, setup: Setup[Rule], room: int, sureness: Sureness | None = None) -> None:
        self.stream, self.bridge, self.rule = stream, setup.bridge, setup.rule
        self._choice = choice(setup.side.warpers, with_logits=setup.rule.reads_pilot or sureness is not None)
        self._room, self._sureness = room, sureness

    def propose(self, plan: Plan, rows: Rows, active: list[int], given: Mapping[int, list[int]]) -> Proposals:
        """Proposals for all live rows.

        Args:
            plan: of the step.
            rows: the responses.
            active: rows that write now.
            given: for some of these rows, tokens of the base that are proposed in place of the pilot's.
        """
        chunk = plan.chunk
        if self._may_stop:
            chunk = min(chunk, max(1, rows.left[self.stream.live[0]] - 1))
        asked = {row for row in active if row not in given} if plan.by_pilot else set()
        longest = max(map(len, given.values()), default=0)
        longest = longest if longest == chunk else self.stream.workspace.padded(longest)
        width = chunk if asked else longest
        missing = {row: self._missing(row, rows, width) for row in (active if self.rule.reads_pilot else asked)}
        fed = frozenset(row for row, new in missing.items() if new is not None)
        width = width if fed & asked else longest
        counts = [width if row in fed & asked else len(given.get(row, ())[:width]) for row in self.stream.live]
        tokens = self._given(given, width)
        proposals = Proposals(tokens, tokens < FREE, counts)
        if fed & asked:
            proposals = self._chain(missing, proposals, others={*active} - (fed & asked))
        elif fed:
            proposals = self._read(missing, proposals)
        proposals = proposals._replace(read=fed)
        if fed and not isinstance(self.bridge, OneVocabulary):
            proposals = self._cross(proposals, rows, given)
        return proposals.to(rows.device)

    def weigh(self, texts: Mapping[int, Text], rows: Rows) -> dict[int, list[float]]:
        """Weights of the last tokens of some rows' texts, from one forward of the pilot."""
        if not texts:
            return {}
        stream, widest = self.stream, max(text.last for text in texts.values())
        missing, last = list[list[int] | None](), list[list[int]]()
        for row in stream.live:
            tokens, count = texts.get(row, Text([], 0))
            before = tokens[:-1]
            missing.append(stream.resume(row, before, last=count) if count else None)
            last.append([0] * (widest - count) + tokens[len(tokens) - count :])
        logits = stream.logits(stream.block(missing), keep=widest)
        lists = on_host({"weights": self.rule.weigh(logits, stream.upload(last)), "faults": not_finite(logits)})
        found = {}
        for row, text in texts.items():
            weights, faults = (lists[name][stream.live.index(row)][widest - text.last :] for name in ("weights", "faults"))
            if any(faults):
                raise logits_error("pilot", rows.lengths[row], row)
            found[row] = weights
        return found

    def offers(self, proposals: Proposals, proposed: Mapping[int, list[int]]) -> dict[int, Offer]:
        """Next tokens of each drafting row's draft; `proposed`: each row's tokens of the proposals on the host."""
        if proposals.offers is not None:
            return proposals.offers
        offers = {}
        for row, count in zip(self.stream.live, proposals.counts, strict=True):
            tokens = proposed[row][:count]
            if row in proposals.read:
                self.stream.responses[row] += tokens
            if self.rule.drafting[row]:
                offers[row] = self.bridge.offer(row, tokens)
        return offers

    @property
    def _may_stop(self) -> bool:
        """Whether proposals are for a single free row, and end where the pilot is unsure."""
        live = self.stream.live
        return self._sureness is not None and len(live) == 1 and not self.rule.drafting[live[0]]

    def _given(self, given: Mapping[int, list[int]], chunk: int) -> torch.Tensor:
        """Given tokens of each live row, `FREE` after its last: LongTensor[rows, chunk + 1]."""
        if not given:
            return torch.full((len(self.stream.live), chunk + 1), FREE, device=self.stream.device)
        tokens = [given.get(row, [])[:chunk] for row in self.stream.live]
        return self.stream.upload([known + [FREE] * (chunk + 1 - len(known)) for known in tokens])

    def _chain(self, missing: Mapping[int, list[int] | None], given: Proposals, others: Set[int]) -> Proposals:
        """The pilot's next tokens, one forward each; in some other rows the given ones take their place."""
        reads, chunk, live = self.rule.reads_pilot, given.chunk, self.stream.live
        stops = self._sureness if self._may_stop else None
        certain = self.stream.upload([[int(row in others) for row in live]])[0].bool() if others else None
        block = self.stream.block([missing.get(row) for row in live])
        steps: list[tuple[Any, ...]] = []
        sure: list[float] = []
        while len(steps) < chunk + reads:
            token, *rest = self._choice(self.stream, block)
            token = token if certain is None else torch.where(certain, given.tokens[:, len(steps)], token)
            block = block.then(token)
            steps.append((token, *rest))
            if stops and len(steps) <= chunk:
                sure.append(_probability(token, *rest))
                chunk = chunk if stops.goes_on(sure) else len(steps)
        tokens, bad, probabilities, logits = zip(*steps, strict=True)
        end = given.tokens[:, -1]
        return given._replace(
            counts=[min(count, chunk) for count in given.counts],
            sure=sure,
            tokens=torch.stack([*tokens[:chunk], end], dim=1),
            not_finite=torch.stack([*bad, *([] if reads else [end != FREE])], dim=1),
            probabilities=probabilities[:chunk],
            certain=certain,
            logits=torch.stack(logits, dim=1) if reads else None,
        )

    def _read(self, missing: Mapping[int, list[int] | None], given: Proposals) -> Proposals:
        """The given tokens, which the pilot reads in one forward."""
        new = [missing.get(row) for row in self.stream.live]
        logits = self.stream.logits(self.stream.block(new, given.tokens[:, :-1], given.counts), keep=given.chunk + 1)
        return given._replace(not_finite=not_finite(logits), logits=logits)

    def _missing(self, row: int, rows: Rows, chunk: int) -> list[int] | None:
        """Tokens of a row that the pilot has yet to read; None if it has no room for more."""
        written = self.bridge.pilot_tokens(row, None if self.rule.drafting[row] else rows.responses[row])
        if len(written) + chunk > self._room:
            return None
        return self.stream.resume(row, written)

    def _cross(self, proposals: Proposals, rows: Rows, given: Mapping[int, list[int]]) -> Proposals:
        """The proposals in the base's tokens; they count as deterministic, since their probabilities don't cross.

        That is exact too: the rejection rule only requires proposals that are independent of the base's own draw.
        """
        bad_somewhere = proposals.not_finite.any(dim=1, keepdim=True).long()
        host, left = torch.cat([bad_somewhere, proposals.tokens[:, :-1]], dim=1).tolist(), rows.left
        crossed: list[list[int]] = []
        offers: dict[int, Offer] = {}
        for (bad, *tokens), count, row in zip(host, proposals.counts, self.stream.live, strict=True):
            if row in given or not count:
                crossed.append(given.get(row, [])[: left[row]])
                continue
            if bad and self.rule.drafting[row]:
                raise logits_error("pilot", rows.lengths[row], row)
            self.stream.responses[row] += tokens
            if self.rule.drafting[row]:
                new, over = self.bridge.offer(row, tokens)
                offers[row] = Offer(new[: left[row]], over if len(new) <= left[row] else None)
                crossed.append(offers[row].tokens)
            else:
                crossed.append(self.bridge.guess(row, tokens)[: left[row]])
        width = self.stream.workspace.padded(max(map(len, crossed)))
        values = [new + [FREE] * (1 + width - len(new)) for new in crossed]
        padded = torch.tensor(values, device="cpu").to(rows.device, non_blocking=True)
        return Proposals(padded, torch.zeros_like(padded, dtype=torch.bool), [*map(len, crossed)], offers=offers)


def _probability(token: torch.Tensor, _: torch.Tensor, probabilities: torch.Tensor | None, logits: torch.Tensor) -> float:
    """The pilot's probability of a single row's token."""
    distribution = logits.softmax(dim=-1) if probabilities is None else probabilities
    return float(distribution[0, token[0]])
