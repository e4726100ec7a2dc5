"""The responses of a batch whose rows grow at their own speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from ..text.stop_strings import StopStrings
from ..text.streaming import Likelihood
from .call import Call
from .checks import check_drawn
from .scores import Record
from .supported import depends_on_prefix_only


class GrowingTensor:
    """Lists of numbers that grow, one for each row, as one tensor on the CPU; each number is copied once, when it is asked for.

    Args:
        start: columns before the lists, [rows, start]; gives the tensor its type.
        lists: numbers of each row.
        fill: number after a row's end.
    """

    def __init__(self, start: torch.Tensor, lists: Sequence[Sequence[float]], fill: float) -> None:
        self._tensor, self._start = start, start.shape[1]
        self._lists, self._fill = lists, fill
        self._copied = [0] * len(lists)

    def first(self, length: int) -> torch.Tensor:
        """A view of the start and the first `length` numbers of each row, [rows, start + length]."""
        rows: list[int] = []
        columns: list[int] = []
        numbers: list[float] = []
        for row, (copied, known) in enumerate(zip(self._copied, self._lists, strict=True)):
            if copied < len(known):
                rows += [row] * (len(known) - copied)
                columns += range(self._start + copied, self._start + len(known))
                numbers += known[copied:]
        width = self._start + max(map(len, self._lists))
        lacking = width - self._tensor.shape[1]
        if lacking > 0:  # as much again, so that the time for copying is in proportion to the text
            self._tensor = torch.nn.functional.pad(self._tensor, (0, width + lacking), value=self._fill)
        if rows:
            self._tensor[rows, columns] = torch.tensor(numbers, dtype=self._tensor.dtype, device="cpu")
            self._copied = [len(known) for known in self._lists]
        return self._tensor[:, : self._start + length]


class Rows:
    """Prompt and response of each row, laid out as `generate` does: prompts end where responses begin.

    Args:
        call: whose prompts are answered, and whose criteria and streamer see every token.
        record: holds the scores that criteria are shown; None: they are shown none.
        one_writer: whether each token is the pilot's or the base's; False where every token is the work of several models.

    Attributes:
        responses: token ids of each row's response.
        by_pilot: for each of them, whether the pilot wrote it.
        likelihoods: of them under the base, if the call's streamer takes them; None where they are not known.
        finished: for each row, whether its response has ended.
    """

    def __init__(self, call: Call, record: Record | None = None, one_writer: bool = True) -> None:
        self.device = call.input_ids.device
        self.responses: list[list[int]] = [[] for _ in call.input_ids]
        self.by_pilot: list[list[bool]] = [[] for _ in call.input_ids]
        self.likelihoods: list[list[Likelihood | None]] = [[] for _ in call.input_ids]
        self.finished = [False] * len(call.input_ids)
        self._prompts: list[list[int]] = call.input_ids.tolist()
        start = call.input_ids.to("cpu", torch.long, copy=True)
        self._tokens = GrowingTensor(start, self.responses, call.pad_token_id)
        rules = [(criterion, _on_lists(criterion)) for criterion in call.criteria]
        self._rules = [rule for _, rule in rules if rule]
        self._criteria = StoppingCriteriaList(criterion for criterion, rule in rules if rule is None)
        # transformers' own criteria follow their input to the host, where the decision is made.
        self._criteria_device = torch.device("cpu") if all(map(depends_on_prefix_only, self._criteria)) else self.device
        self._call, self._record, self._one_writer = call, record, one_writer
        self._streamed = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens in each response."""
        return [len(response) for response in self.responses]

    @property
    def left(self) -> list[int]:
        """Tokens that each response still has room for."""
        return [self._call.budget - length for length in self.lengths]

    def full(self, row: int) -> bool:
        """True if a response has no room left."""
        return len(self.responses[row]) >= self._call.budget

    @property
    def unfinished(self) -> list[int]:
        """Rows whose response goes on."""
        return [row for row, finished in enumerate(self.finished) if not finished]

    @property
    def sequences(self) -> torch.Tensor:
        """Prompts and responses, LongTensor[batch, longest]."""
        return self._tokens.first(max(self.lengths)).clone().to(self.device)

    def prefixes(self, rows: Collection[int], device: torch.device) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The exact prefixes of some rows: for each length, LongTensor[batch, prefix] and the rows it is exact for."""
        lengths = self.lengths
        for length in sorted({lengths[row] for row in rows}):
            yield self._tokens.first(length).to(device), [row for row in rows if lengths[row] == length]

    def whole(self, rows: list[int], values: torch.Tensor) -> torch.Tensor:
        """Some rows' values laid out for the whole batch, 0 for the other rows."""
        if len(rows) == len(self.responses):
            return values
        index = torch.tensor(rows, device="cpu").to(values.device, non_blocking=True)
        return values.new_zeros(len(self.responses), *values.shape[1:]).index_copy_(0, index, values)

    @property
    def written_by_pilot(self) -> torch.Tensor | None:
        """Response tokens that the pilot wrote, BoolTensor[batch, longest], False after a response's end; None without them."""
        if not self._one_writer:
            return None
        start = torch.empty(len(self.responses), 0, dtype=torch.bool, device="cpu")
        return GrowingTensor(start, self.by_pilot, False).first(max(self.lengths)).clone().to(self.device)

    def extend(
        self,
        tokens: Mapping[int, list[int]],
        by_pilot: Collection[int],
        likelihoods: Mapping[int, Likelihood | None] = MappingProxyType({}),
    ) -> None:
        """As `append`, of several tokens, until a row's criteria are met; `likelihoods` are of rows that get one token."""
        for position in range(max(map(len, tokens.values()), default=0)):
            growing = [row for row, new in tokens.items() if position < len(new) and not self.finished[row]]
            if growing:
                self.append({row: tokens[row][position] for row in growing}, by_pilot, likelihoods)

    def append(
        self,
        tokens: Mapping[int, int],
        by_pilot: Collection[int],
        likelihoods: Mapping[int, Likelihood | None] = MappingProxyType({}),
    ) -> None:
        """Appends a token to some rows, and ends those whose criteria are met.

        Args:
            tokens: of each row.
            by_pilot: rows whose token the pilot wrote.
            likelihoods: of the tokens as far as they are known, if the call's streamer takes them.
        """
        for row, token in tokens.items():
            check_drawn(token, len(self.responses[row]), row)
        for row, token in tokens.items():
            self.responses[row].append(token)
            self.by_pilot[row].append(row in by_pilot)
            self.likelihoods[row].append(likelihoods.get(row))
            self.finished[row] = any(ends(self._prompts[row], self.responses[row]) for ends in self._rules)
        if self._criteria:
            self._apply_criteria(tokens)
        if self._call.streamer is not None:
            self._stream()

    def _apply_criteria(self, rows: Collection[int]) -> None:
        for prefix, exact in self.prefixes(rows, self._criteria_device):
            length = len(self.responses[exact[0]])
            scores = self._record.columns("scores", length) if self._record else None
            ended = self._criteria(prefix, scores).tolist()
            for row in exact:
                self.finished[row] |= ended[row]

    def _stream(self) -> None:
        growing = [len(self.responses[row]) for row in self.unfinished]
        settled = min(growing, default=max(self.lengths))
        for column in range(self._streamed, settled):
            tokens = [row[column] if column < len(row) else self._call.pad_token_id for row in self.responses]
            by_pilot = None
            if self._one_writer:
                by_pilot = torch.tensor([column < len(row) and row[column] for row in self.by_pilot], device="cpu")
            likelihoods = [row[column] if column < len(row) else None for row in self.likelihoods]
            self._call.stream(torch.tensor(tokens, device="cpu"), by_pilot, likelihoods)
        self._streamed = max(self._streamed, settled)


def _on_lists(criterion: StoppingCriteria) -> Callable[[list[int], list[int]], bool] | None:
    """The same rule for one row's prompt and response as lists; None if the criterion must be called with tensors."""
    if type(criterion) is EosTokenCriteria:
        ends = set(criterion.eos_token_id.tolist())
        return lambda prompt, response: response[-1] in ends
    if type(criterion) is MaxLengthCriteria:
        warns_from = criterion.max_position_embeddings
        if warns_from is None or criterion.max_length <= warns_from + 1:  # else it warns as it is called
            return lambda prompt, response: len(prompt) + len(response) >= criterion.max_length
    if type(criterion) is MaxTimeCriteria:
        return lambda prompt, response: time.time() - criterion.initial_timestamp > criterion.max_time
    if type(criterion) is StopStrings:
        return criterion.ends
    return None
