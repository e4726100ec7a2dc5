"""Chunk-level beam search (Zhou et al., arXiv 2405.19262): a base writes, and a value decides what it goes on with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from typing import Any, Protocol

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ...engine.checks import check_finite, not_finite
from ...engine.lockstep_stream import LockstepStream
from ...engine.numbers import MOST_SAMPLES, check_positive_integer
from ...engine.sampling import split
from ...errors import WSDValueError
from ...text.token_texts import INCOMPLETE


class Value(Protocol):
    """What responses are worth; `ImplicitValue` is one."""

    def __call__(self, texts: Sequence[str], ended: Sequence[bool], of: Sequence[int]) -> Any:
        """One number for each response: what it says, whether that is its end, and which prompt it belongs to."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """Settings of a chunk-level beam search.

    Args:
        beam_width: hypotheses that are kept of each prompt, W >= 1.
        successors: samples that each is gone on with, K >= 1; W·K is at most 16,384.
        chunk_length: tokens between two selections, L >= 1; None: one selection, at the end. With W=1 that is best-of-K.
        official_ties: do as the official code does where it is not of this mind: a finished hypothesis that is kept becomes K
            copies, and copies may crowd out others; one that was cut by its length counts as ended; half a character is scored.

    Raises:
        WSDValueError: naming the field, the value and the rule.
    """

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
        tokens: of the base, padding not included.
        text: what they say.
        finished: whether nothing can follow.
        value: what it is worth.
        parent: what it goes on from; None for the first chunk.
    """

    tokens: list[int]
    text: str
    finished: bool
    value: float
    parent: Hypothesis | None = field(repr=False)


@dataclass(frozen=True)
class Selection:
    """What happened at the end of a chunk, for one prompt.

    Attributes:
        candidates: what was sampled, in the order of the rows.
        kept: the best of them and of those that had finished before, best first.
    """

    candidates: list[Hypothesis]
    kept: list[Hypothesis]


class Beam:
    """The search of one prompt.

    Attributes:
        selections: so far.
        parents: what each row of the next chunk goes on from; empty when the search has ended.
    """

    def __init__(self, settings: BeamSettings) -> None:
        self.selections: list[Selection] = []
        self.parents: list[Hypothesis | None] = [None] * (settings.beam_width * settings.successors)
        self._settings = settings
        self._finished: list[Hypothesis] = []

    def select(self, candidates: list[Hypothesis]) -> None:
        """Keeps the best, the first of equals, and decides what the next chunk goes on from."""
        kept = self._ranked(self._finished + candidates)[: self._settings.beam_width]
        self.selections.append(Selection(candidates, kept))
        going_on = [hypothesis for hypothesis in kept if not hypothesis.finished]
        if self._settings.official_ties:
            going_on = kept if going_on else []
        else:
            self._finished += [one for one in kept if one.finished and one not in self._finished]
        self.parents = [*going_on * self._settings.successors]  # row r goes on from r % W

    def best(self, count: int) -> list[Hypothesis]:
        """The best that may still be returned, best first; final when the search has ended."""
        kept = self.selections[-1].kept
        return self._ranked(self._finished + [one for one in kept if one not in self._finished])[:count]

    @property
    def settled(self) -> list[int]:
        """The tokens that whatever is returned begins with."""
        possible = [one.tokens for one in (*self.selections[-1].kept, *self._finished)]
        return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*possible, strict=False))]

    def _ranked(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Best first, of equals the first; samples that ended in the same words as another come last."""
        ranked = sorted(hypotheses, key=lambda hypothesis: -hypothesis.value)
        if self._settings.official_ties:
            return ranked
        ended: set[tuple[int, ...]] = set()
        again: list[Hypothesis] = []
        for hypothesis in ranked:
            if hypothesis.finished and tuple(hypothesis.tokens) in ended:
                again.append(hypothesis)
            elif hypothesis.finished:
                ended.add(tuple(hypothesis.tokens))
        return [one for one in ranked if one not in again] + again


class ChunkBeamSearch:
    """Searches responses to some prompts, chunk by chunk, in one batch whose rows are all samples of all beams.

    Args:
        stream: of the base, one row for each prompt.
        processors: shape the base's choice, warpers included; made for `copies` rows of each prompt.
        copies: rows of the call for each prompt.
        criteria: end a response.
        text: what some tokens say.
        value: what responses are worth.
        settings: of the search.
        eos_token_ids: tokens by which a response ends itself.
        pad_token_id: what rows that have finished are fed.
    """

    def __init__(
        self,
        stream: LockstepStream,
        processors: LogitsProcessorList,
        copies: int,
        criteria: StoppingCriteriaList,
        text: Callable[[list[int]], str],
        value: Value,
        settings: BeamSettings,
        eos_token_ids: set[int],
        pad_token_id: int,
    ) -> None:
        self.beams = [Beam(settings) for _ in stream.input_ids]
        self._stream, self._copies, self._criteria = stream, copies, criteria
        self._processors, self._warpers = split(processors)
        self._text, self._value, self._settings = text, value, settings
        self._eos_token_ids, self._pad_token_id = eos_token_ids, pad_token_id
        self._prompt = stream.input_ids.shape[1]
        samples = settings.beam_width * settings.successors
        self._source = torch.arange(len(self.beams), device="cpu").repeat_interleave(samples)  # row that each row goes on from

    @property
    def ended(self) -> bool:
        """Whether every response has finished."""
        return not len(self._source)

    def advance(self) -> None:
        """Writes one chunk and selects; no generator, in which a `StopIteration` of a model would become another error."""
        logits = None
        if not self._stream.forwards:
            logits = self._stream.next_logits()[self._source]  # each prompt once
        self._stream.select(self._source)
        self._source = self._select(self._write_chunk(logits))

    def _write_chunk(self, logits: torch.Tensor | None) -> list[tuple[int, bool]]:
        """Writes a chunk; returns how many tokens each row has then, and whether it has finished.

        Args:
            logits: of the next token, where they are known.
        """
        stream, parents = self._stream, [parent for beam in self.beams for parent in beam.parents]
        lengths = torch.tensor([len(parent.tokens) if parent else 0 for parent in parents], device="cpu")
        finished = torch.tensor([parent is not None and parent.finished for parent in parents], device="cpu")
        written = stream.input_ids.shape[1] - self._prompt
        limit = math.inf if self._settings.chunk_length is None else written + self._settings.chunk_length
        while written < limit and not finished.all():
            logits = stream.next_logits() if logits is None else logits
            check_finite("base", not_finite(logits).cpu() & ~finished, [written] * len(logits))
            probabilities = self._warpers(stream.input_ids, self._process(logits)).softmax(dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
            stream.append(torch.where(finished.to(tokens.device), self._pad_token_id, tokens))
            lengths += ~finished
            finished |= self._criteria(stream.input_ids, None).cpu()
            written, logits = written + 1, None
        return list(zip(lengths.tolist(), finished.tolist(), strict=True))

    def _prompts(self) -> list[int]:
        """The number of each row's prompt."""
        return [index for index, beam in enumerate(self.beams) for _ in beam.parents]

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores that the processors make of the base's logits, [rows, vocabulary].

        They may hold something of each row of the call, the width of its padding for example. So each time they get one sample
        of every prompt, in the rows that the call has for it.
        """
        if not self._processors:
            return logits
        of = self._prompts()
        samples = [[row for row, owner in enumerate(of) if owner == index] for index in range(len(self.beams))]
        scores = torch.empty_like(logits)
        for rows in zip_longest(*samples):
            shown = torch.tensor([row or 0 for row in rows], device=logits.device).repeat_interleave(self._copies)
            processed = self._processors(self._stream.input_ids[shown], logits[shown])[:: self._copies]
            for row, prompt in zip(rows, processed, strict=True):
                if row is not None:
                    scores[row] = prompt
        return scores

    def _select(self, rows: list[tuple[int, bool]]) -> torch.Tensor:
        """Has every beam keep its best; returns which row each row of the next chunk goes on from, LongTensor[rows]."""
        of = self._prompts()
        parents = [parent for beam in self.beams for parent in beam.parents]
        responses = [
            row[self._prompt : self._prompt + length].tolist()
            for row, (length, _) in zip(self._stream.input_ids, rows, strict=True)
        ]
        finished = [done for _, done in rows]
        ended = [self._has_ended(response, done) for response, done in zip(responses, finished, strict=True)]
        texts = [self._says(response, end) for response, end in zip(responses, ended, strict=True)]
        values = [float(value) for value in self._value(texts, ended, of)]
        if any(map(math.isnan, values)) or len(values) != len(texts):
            raise WSDValueError(f"value gave {values}: must be {len(texts)} numbers")
        found = list(map(Hypothesis, responses, texts, finished, values, parents))
        row_of = {id(hypothesis): row for row, hypothesis in enumerate(found)}
        for index, beam in enumerate(self.beams):
            if beam.parents:
                beam.select([hypothesis for hypothesis, owner in zip(found, of, strict=True) if owner == index])
        sources = [row_of[id(parent)] for beam in self.beams for parent in beam.parents]
        return torch.tensor(sources, dtype=torch.long, device="cpu")

    def _has_ended(self, response: list[int], finished: bool) -> bool:
        return finished and (self._settings.official_ties or response[-1] in self._eos_token_ids)

    def _says(self, response: list[int], ended: bool) -> str:
        text = self._text(response)
        return text if ended or self._settings.official_ties else text.rstrip(INCOMPLETE)
