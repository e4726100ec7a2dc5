"""Nudging: the base goes on where it is certain, and where it is not, the pilot says the next word."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ...engine.call import Call
from ...engine.checks import check_usable, closing_token_id, eos_token_ids, unusable, vocabulary_size
from ...engine.pilot_side import PilotSetup
from ...engine.ragged_stream import Stream, open_stream, real_tokens
from ...engine.rows import Rows, rows_of
from ...engine.sampling import draw, split
from ...engine.stats import WSDStats, work_of
from ...engine.supported import unsupported_reason
from ...text.bridge import Bridge
from ...text.settled_tokens import ContinuationTokenizer
from .next_word import LONGEST, Word, Words


class Opinion(NamedTuple):
    """What the base makes of the next token of every row, all on the CPU; meaningless where a row has finished."""

    own: torch.Tensor
    """The token that it would write, LongTensor[B]."""
    sure: torch.Tensor
    """Whether the likeliest token reaches the threshold, BoolTensor[B]."""
    may_end: torch.Tensor
    """Whether the processors allow the response to end here, BoolTensor[B]."""


class Nudging:
    """One call. B rows, V tokens in the base's vocabulary; tensors on the device have the live rows only.

    Args:
        base: stream of the model that is nudged.
        words: the pilot's side.
        rows: prompts and responses.
        processors: shape the base's choice.
        do_sample: whether the base samples.
        threshold: γ.
        closing_token_id: token that ends a response where the pilot wants it to end; None: the base writes on.
    """

    def __init__(
        self,
        base: Stream,
        words: Words,
        rows: Rows,
        processors: LogitsProcessorList,
        do_sample: bool,
        threshold: float,
        closing_token_id: int | None,
    ) -> None:
        self.base, self.words, self.rows = base, words, rows
        self._processors, self._warpers = split(processors)
        self._do_sample = do_sample
        self._threshold = threshold
        self._closing_token_id = closing_token_id
        self._by_pilot: list[list[bool]] = [[] for _ in rows.responses]
        self._shrinks = not (base.workspace.captures or words.stream.workspace.captures)

    def run(self) -> torch.Tensor:
        """Decodes until every row has finished; returns which tokens are the pilot's, BoolTensor[B, longest response]."""
        while unfinished := (~self.rows.finished).nonzero().flatten().tolist():
            if self._shrinks:
                self.base.select(unfinished)
                self.words.stream.select(unfinished)
            opinion = self._ask_base()
            said = self.words.say([row for row in unfinished if self._needs_pilot(row, opinion)], self.rows)
            self._write(unfinished, opinion, said)
        by_pilot = torch.zeros(len(self._by_pilot), max(self.rows.lengths), dtype=torch.bool, device="cpu")
        for row, flags in enumerate(self._by_pilot):
            by_pilot[row, : len(flags)] = torch.tensor(flags, dtype=torch.bool, device="cpu")
        return by_pilot

    def _ask_base(self) -> Opinion:
        """One forward over what the base lacks of each row, and one transfer of what it says."""
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
        said = torch.stack([own, sure.long(), may_end.long(), unusable(logits).long()], dim=1).cpu()
        own, sure, may_end, bad = rows.whole(live, said).T
        check_usable("base", bad.bool() & ~rows.finished, rows.lengths)
        return Opinion(own, sure.bool(), may_end.bool())

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """What the processors make of the base's logits, each row shown its exact prefix, [rows, V]."""
        if not self._processors:
            return logits
        rows, live = self.rows, self.base.live
        raw = rows.whole(live, logits)
        scores = raw.clone()
        for prefix, exact in rows.prefixes([row for row in live if not rows.finished[row]], rows.device):
            scores[exact] = self._processors(prefix, raw.clone())[exact]
        return scores[live]

    def _needs_pilot(self, row: int, opinion: Opinion) -> bool:
        return not opinion.sure[row] or self.words.ends(row, self.rows.responses[row])

    def _write(self, unfinished: list[int], opinion: Opinion, said: dict[int, Word]) -> None:
        """Each row goes on with the pilot's word, its end, or the base's own token; token by token, for the criteria."""
        turns: dict[int, list[int]] = {}
        for row in unfinished:
            word = said.get(row, Word([], over=False))
            if word.over and opinion.may_end[row] and self._closing_token_id is not None:
                word = Word([self._closing_token_id], over=True)
            turns[row] = word.tokens or [int(opinion.own[row])]
            self._by_pilot[row] += [bool(word.tokens)] * len(turns[row])
        for position in range(max(map(len, turns.values()))):
            tokens = torch.zeros(len(self.rows.responses), dtype=torch.long, device="cpu")
            growing = torch.zeros_like(tokens, dtype=torch.bool)
            for row, turn in turns.items():
                if position < len(turn) and not self.rows.finished[row]:
                    tokens[row], growing[row] = turn[position], True
            if growing.any():
                self.rows.append(tokens, growing)
        for row in unfinished:
            del self._by_pilot[row][len(self.rows.responses[row]) :]


def decode(
    call: Call, pilot: PreTrainedModel, side: PilotSetup, bridge: Bridge, encoder: ContinuationTokenizer, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, WSDStats]:
    """Decodes a call that `unsupported` has nothing against.

    Args:
        call: checked and prepared.
        pilot: the model that nudges.
        side: its prompt and choice.
        bridge: from its tokens to the base's, and back.
        encoder: of its tokenizer.
        threshold: γ.

    Returns:
        Prompts and responses, which tokens of the responses are the pilot's, and the work done.
    """
    settings = call.generation_config
    base_eos, vocabulary = eos_token_ids(settings), vocabulary_size(call.base)
    ends = side.end_token_ids | base_eos if side.one_vocabulary else side.end_token_ids
    pilot_prompts = real_tokens(side.input_ids, side.attention_mask)
    with (
        open_stream(call.base, real_tokens(call.input_ids, call.attention_mask), call.budget, capturing=True) as base,
        open_stream(pilot, pilot_prompts, call.budget + LONGEST, capturing=True) as stream,
    ):
        rows = rows_of(call)
        words = Words(stream, bridge, encoder, side.warpers, ends, side.room.tolist(), vocabulary)
        closing = closing_token_id(base_eos, vocabulary)
        by_pilot = Nudging(base, words, rows, call.processors, settings.do_sample, threshold, closing).run()
        stats = work_of(base, stream)
    if call.streamer is not None:
        call.streamer.end()
    return rows.sequences, by_pilot.to(call.input_ids.device), stats


def unsupported(call: Call, pilot: PreTrainedModel) -> str | None:
    """Why a call cannot be served; None where it can."""
    for name in ("output_scores", "output_logits"):
        if getattr(call.generation_config, name):
            return f"{name}=True was given, and the base does not score every token of the pilot"
    return unsupported_reason(call, pilot)
