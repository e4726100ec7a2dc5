"""The loop of nudging: the base's token where it is sure, else the pilot's next word."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ...engine.call import Call
from ...engine.checks import closing_token_id, eos_token_ids, logits_error, not_finite, vocabulary_size
from ...engine.likelihoods import log_probs, ranks
from ...engine.pilot_side import PilotSide
from ...engine.pilot_writer import Piece, PilotWriter
from ...engine.ragged_stream import real_tokens
from ...engine.rows import Rows
from ...engine.sampling import draw, split
from ...engine.stats import Stats, peak_memory, work
from ...engine.strategy import StrategyOutput
from ...engine.stream import Stream
from ...engine.streams import open_stream
from ...speculation.verdict import on_host
from ...text.bridge import Bridge
from ...text.settled_tokens import ContinuationTokenizer
from ...text.streaming import Likelihood
from .word import LONGEST, completes_word


class Opinion(NamedTuple):
    """The base's side of one step in one row, on the host."""

    own: int
    """Its token."""
    sure: bool
    """Whether its likeliest token reaches the threshold."""
    may_end: bool
    """Whether the processors allow the response to end here."""
    likelihood: Likelihood | None
    """Of its token, if the call's streamer takes it."""


class Nudging:
    """One call. B rows, V tokens in the base's vocabulary; tensors on the device have the live rows only."""

    def __init__(self, call: Call, base: Stream, pilot: PilotWriter, threshold: float) -> None:
        self.base, self.pilot, self.rows = base, pilot, Rows(call)
        self.proposed = 0
        self._processors, self._warpers = split(call.processors)
        self._takes_likelihoods = call.takes_likelihoods
        self._do_sample = call.generation_config.do_sample
        self._threshold = threshold
        self._closing_token_id = closing_token_id(eos_token_ids(call.generation_config), vocabulary_size(call.base))
        self._shrinks = not (base.workspace.captures or pilot.stream.workspace.captures)

    def run(self) -> None:
        """Decodes until every row has finished."""
        while unfinished := self.rows.unfinished:
            if self._shrinks:
                self.base.select(unfinished)
                self.pilot.stream.select(unfinished)
            opinions = self._ask_base()
            nudged = [row for row in unfinished if self._needs_pilot(row, opinions[row])]
            words = self.pilot.write(nudged, self.rows)
            self._write(opinions, words)

    def _ask_base(self) -> dict[int, Opinion]:
        """One forward of the base over the new tokens of each row, and one transfer of its opinions."""
        rows, live = self.rows, self.base.live
        missing = [None if rows.finished[row] else self.base.missing(row, rows.responses[row]) for row in live]
        logits = self.base.logits(self.base.block(missing), keep=1)[:, 0].to(rows.device)
        sure = logits.softmax(dim=-1).amax(dim=-1) >= self._threshold
        scores = self._process(logits)
        closing = self._closing_token_id
        # Where the caller has infinities removed, what is forbidden has the lowest finite score.
        may_end = torch.zeros_like(sure) if closing is None else scores[:, closing] > torch.finfo(scores.dtype).min
        scores = self._warpers(None, scores)
        own = draw(scores.softmax(dim=-1)) if self._do_sample else scores.argmax(dim=-1)
        parts = {"own": own, "sure": sure, "may_end": may_end, "faults": not_finite(logits)}
        if self._takes_likelihoods:
            parts |= {"log_probs": log_probs(logits, own), "ranks": ranks(logits, own)}
        host = on_host(parts)
        opinions = {}
        for place, row in enumerate(live):
            if rows.finished[row]:
                continue
            if host["faults"][place]:
                raise logits_error("base", len(rows.responses[row]), row)
            likelihood = Likelihood(host["log_probs"][place], host["ranks"][place]) if self._takes_likelihoods else None
            opinions[row] = Opinion(host["own"][place], bool(host["sure"][place]), bool(host["may_end"][place]), likelihood)
        return opinions

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores that the processors make of the base's logits, each row with its exact prefix, [rows, V]."""
        if not self._processors:
            return logits
        rows, live = self.rows, self.base.live
        raw = rows.whole(live, logits)
        scores = raw.clone()
        for prefix, exact in rows.prefixes(rows.unfinished, rows.device):
            scores[exact] = self._processors(prefix, raw.clone())[exact]
        return scores[live]

    def _needs_pilot(self, row: int, opinion: Opinion) -> bool:
        return not opinion.sure or self.pilot.ends(row, self.rows.responses[row])

    def _write(self, opinions: dict[int, Opinion], words: dict[int, Piece]) -> None:
        """Appends the pilot's word, the end, or the base's own token to each row."""
        turns: dict[int, list[int]] = {}
        nudged = set()
        for row, opinion in opinions.items():
            word, ended = words.get(row, Piece([], ended=False))
            if ended and not word and opinion.may_end and self._closing_token_id is not None:
                word = [self._closing_token_id]
            turns[row] = word or [opinion.own]
            if word:
                nudged.add(row)
            self.proposed += len(word)
        self.rows.extend(turns, nudged, {row: one.likelihood for row, one in opinions.items() if row not in nudged})


def decode(call: Call, side: PilotSide, bridge: Bridge, encoder: ContinuationTokenizer, threshold: float) -> StrategyOutput:
    """Decodes a call that is supported; `encoder` is that of the pilot's tokens."""
    with (
        open_stream(call.base, real_tokens(*call.prompt), call.budget, capturing=True) as base,
        open_stream(side.model, real_tokens(*side.prompt), call.budget + LONGEST, capturing=True) as stream,
    ):
        pilot = PilotWriter(call, side, bridge, stream, LONGEST, partial(completes_word, encoder))
        nudging = Nudging(call, base, pilot, threshold)
        nudging.run()
        rows = nudging.rows
        stats = Stats(
            work(base),
            work(stream),
            proposed=nudging.proposed,
            kept=sum(map(sum, rows.by_pilot)),
            cache_memory=base.workspace.cache.memory + stream.workspace.cache.memory,
            peak_memory=peak_memory(call.base, side.model),
        )
    return StrategyOutput(sequences=rows.sequences, written_by_pilot=rows.written_by_pilot, stats=stats)
