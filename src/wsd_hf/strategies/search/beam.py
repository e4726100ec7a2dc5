"""Chunk-level beam search (Zhou et al., arXiv 2405.19262): the base samples chunks, and those of the highest value go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest

import torch

from ...engine.call import Call
from ...engine.checks import check_finite, eos_token_ids, not_finite
from ...engine.lockstep_stream import LockstepStream
from ...engine.numbers import MOST_SAMPLES, check_positive_integer
from ...engine.sampling import split
from ...engine.text_scores import TextScore, text_scores
from ...errors import WSDValueError
from ...text.token_texts import INCOMPLETE


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """Settings of a chunk-level beam search; `SearchConfig` documents them."""

    beam_width: int = 4
    successors: int = 4
    chunk_length: int | None = field(default=10, metadata={"takes_none": True})
    official_ties: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_width", "successors", "chunk_length"):
            if name != "chunk_length" or self.chunk_length is not None:
                object.__setattr__(self, name, check_positive_integer(name, getattr(self, name)))
        if self.beam_width * self.successors > MOST_SAMPLES:
            raise WSDValueError(
                f"beam_width={self.beam_width} and successors={self.successors}: their product, the samples of a prompt that "
                f"are written at a time, must be at most {MOST_SAMPLES:,}"
            )
        if self.official_ties not in (True, False):
            raise WSDValueError(f"official_ties={self.official_ties!r}: must be True or False")


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A response, or the beginning of one.

    Attributes:
        tokens: of the base, without padding.
        text: of these tokens.
        finished: whether nothing can follow.
        value: of the text.
        parent: the hypothesis that it continues; None for the first chunk.
    """

    tokens: list[int]
    text: str
    finished: bool
    value: float
    parent: Hypothesis | None = field(repr=False)


@dataclass(frozen=True)
class Selection:
    """The end of a chunk, for one prompt.

    Attributes:
        candidates: samples in the order of the rows.
        kept: the best of them and of those that had finished before, best first.
    """

    candidates: list[Hypothesis]
    kept: list[Hypothesis]


class Beam:
    """The search of one prompt.

    Attributes:
        selections: so far.
        parents: the hypothesis that each row of the next chunk continues; empty when the search has ended.
    """

    def __init__(self, settings: BeamSettings) -> None:
        self.selections: list[Selection] = []
        self.parents: list[Hypothesis | None] = [None] * (settings.beam_width * settings.successors)
        self._settings = settings
        self._finished: list[Hypothesis] = []

    def select(self, candidates: list[Hypothesis]) -> None:
        """Keeps the best, the first of equals, and sets the parents of the next chunk."""
        kept = self._ranked(self._finished + candidates)[: self._settings.beam_width]
        self.selections.append(Selection(candidates, kept))
        going_on = [hypothesis for hypothesis in kept if not hypothesis.finished]
        if self._settings.official_ties:
            going_on = kept if going_on else []
        else:
            self._finished += [one for one in kept if one.finished and one not in self._finished]
        self.parents = [*going_on * self._settings.successors]  # row r continues r % W

    def best(self, count: int) -> list[Hypothesis]:
        """The best that may still be returned, best first; final when the search has ended."""
        kept = self.selections[-1].kept
        return self._ranked(self._finished + [one for one in kept if one not in self._finished])[:count]

    @property
    def settled(self) -> list[int]:
        """Common first tokens of all hypotheses that may be returned."""
        possible = [one.tokens for one in (*self.selections[-1].kept, *self._finished)]
        return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*possible, strict=False))]

    def _ranked(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Best first, of equals the first; samples that ended in the same words as another come last."""
        ranked = sorted(hypotheses, key=lambda hypothesis: -hypothesis.value)
        if self._settings.official_ties:
            return ranked
        first = {tuple(hypothesis.tokens): hypothesis for hypothesis in reversed(ranked) if hypothesis.finished}
        return sorted(ranked, key=lambda one: one.finished and one is not first[tuple(one.tokens)])


class ChunkBeamSearch:
    """Searches responses to the prompts of a call, chunk by chunk, in one batch whose rows are all samples of all beams."""

    def __init__(self, call: Call, value: TextScore, text: Callable[[list[int]], str], settings: BeamSettings) -> None:
        prompts, mask = (tensor[:: call.copies] for tensor in call.prompt)
        self.stream = LockstepStream(call.base, prompts, mask, call.budget)
        self.beams = [Beam(settings) for _ in prompts]
        self._call, self._value, self._text, self._settings = call, value, text, settings
        self._processors, self._warpers = split(call.processors)
        self._eos_token_ids = eos_token_ids(call.generation_config)
        self._prompt = prompts.shape[1]
        samples = settings.beam_width * settings.successors
        self._source = torch.arange(len(self.beams), device="cpu").repeat_interleave(samples)  # row that each row continues

    @property
    def ended(self) -> bool:
        """Whether every response has finished."""
        return not len(self._source)

    def advance(self) -> None:
        """Writes one chunk and selects. This is no generator: in one, a model's `StopIteration` would become another error."""
        logits = None
        if not self.stream.forwards:
            logits = self.stream.next_logits()[self._source]  # each prompt once
        self.stream.select(self._source)
        self._source = self._select(self._write_chunk(logits))

    def _write_chunk(self, logits: torch.Tensor | None) -> list[tuple[int, bool]]:
        """Writes a chunk; returns each row's length in tokens after it, and whether the row has finished."""
        stream, parents = self.stream, [parent for beam in self.beams for parent in beam.parents]
        lengths = torch.tensor([len(parent.tokens) if parent else 0 for parent in parents], device="cpu")
        finished = torch.tensor([parent is not None and parent.finished for parent in parents], device="cpu")
        written = stream.input_ids.shape[1] - self._prompt
        limit = math.inf if self._settings.chunk_length is None else written + self._settings.chunk_length
        while written < limit and not finished.all():
            logits = stream.next_logits() if logits is None else logits
            check_finite("base", not_finite(logits).cpu() & ~finished, [written] * len(logits))
            probabilities = self._warpers(stream.input_ids, self._process(logits)).softmax(dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
            stream.append(torch.where(finished.to(tokens.device), self._call.pad_token_id, tokens))
            lengths += ~finished
            finished |= self._call.criteria(stream.input_ids, None).cpu()
            written, logits = written + 1, None
        return list(zip(lengths.tolist(), finished.tolist(), strict=True))

    def _prompts(self) -> list[int]:
        """Number of each row's prompt."""
        return [index for index, beam in enumerate(self.beams) for _ in beam.parents]

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores that the processors make of the base's logits, [rows, vocabulary].

        Processors may hold something of each row of the call, such as the width of its padding. So each time they get one
        sample of every prompt, in the rows that the call has for it.
        """
        if not self._processors:
            return logits
        of = self._prompts()
        samples = [[row for row, owner in enumerate(of) if owner == index] for index in range(len(self.beams))]
        scores = torch.empty_like(logits)
        for rows in zip_longest(*samples):
            shown = torch.tensor([row or 0 for row in rows], device=logits.device).repeat_interleave(self._call.copies)
            processed = self._processors(self.stream.input_ids[shown], logits[shown])[:: self._call.copies]
            for row, prompt in zip(rows, processed, strict=True):
                if row is not None:
                    scores[row] = prompt
        return scores

    def _select(self, rows: list[tuple[int, bool]]) -> torch.Tensor:
        """Selects in every beam; returns the row that each row of the next chunk continues, LongTensor[rows]."""
        of = self._prompts()
        parents = [parent for beam in self.beams for parent in beam.parents]
        responses = [
            row[self._prompt : self._prompt + length].tolist()
            for row, (length, _) in zip(self.stream.input_ids, rows, strict=True)
        ]
        finished = [done for _, done in rows]
        ended = [self._has_ended(response, done) for response, done in zip(responses, finished, strict=True)]
        texts = [self._settled_text(response, end) for response, end in zip(responses, ended, strict=True)]
        values = text_scores("value", self._value, texts, ended, of)
        found = list(map(Hypothesis, responses, texts, finished, values, parents))
        row_of = {id(hypothesis): row for row, hypothesis in enumerate(found)}
        for index, beam in enumerate(self.beams):
            if beam.parents:
                beam.select([hypothesis for hypothesis, owner in zip(found, of, strict=True) if owner == index])
        sources = [row_of[id(parent)] for beam in self.beams for parent in beam.parents]
        return torch.tensor(sources, dtype=torch.long, device="cpu")

    def _has_ended(self, response: list[int], finished: bool) -> bool:
        return finished and (self._settings.official_ties or response[-1] in self._eos_token_ids)

    def _settled_text(self, response: list[int], ended: bool) -> str:
        text = self._text(response)
        return text if ended or self._settings.official_ties else text.rstrip(INCOMPLETE)
