"""The responses of a batch whose rows grow at their own speed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .call import Call
from .checks import check_drawn
from .scores import Record
from .supported import depends_on_prefix_only


class Rows:
    """Prompt and response of each row, laid out as `generate` does: prompts end where responses begin.

    Args:
        call: whose prompts are answered, and whose criteria and streamer see every token.
        record: holds the scores that criteria are shown; None: they are shown none.

    Attributes:
        responses: token ids of each row's response.
        by_pilot: for each of them, whether the pilot wrote it.
        finished: rows whose response has ended, BoolTensor[batch].
    """

    def __init__(self, call: Call, record: Record | None = None) -> None:
        self.device = call.input_ids.device
        self.prompt_width = call.input_ids.shape[1]
        self.responses: list[list[int]] = [[] for _ in call.input_ids]
        self.by_pilot: list[list[bool]] = [[] for _ in call.input_ids]
        self.finished = torch.zeros(len(call.input_ids), dtype=torch.bool, device="cpu")
        # On the host, where the decision is made. transformers' own criteria follow their input there without waiting.
        self._tokens = call.input_ids.to("cpu", torch.long, copy=True)
        self._criteria_device = torch.device("cpu") if all(map(depends_on_prefix_only, call.criteria)) else self.device
        self._call, self._record = call, record
        self._streamed = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens in each response."""
        return [len(response) for response in self.responses]

    @property
    def left(self) -> list[int]:
        """Tokens that each response still has room for."""
        return [self._call.budget - length for length in self.lengths]

    @property
    def full(self) -> torch.Tensor:
        """Rows that have no room left, BoolTensor[batch]."""
        return torch.tensor([left <= 0 for left in self.left], device="cpu")

    @property
    def sequences(self) -> torch.Tensor:
        """Prompts and responses, LongTensor[batch, longest]."""
        return self._tokens[:, : self.prompt_width + max(self.lengths)].clone().to(self.device)

    def prefixes(self, rows: list[int], device: torch.device) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The exact prefixes of some rows: for each length, LongTensor[batch, prefix] and the rows it is exact for."""
        lengths = self.lengths
        for length in sorted({lengths[row] for row in rows}):
            prefix = self._tokens[:, : self.prompt_width + length].to(device)
            yield prefix, [row for row in rows if lengths[row] == length]

    def whole(self, rows: list[int], values: torch.Tensor) -> torch.Tensor:
        """Some rows' values laid out for the whole batch, 0 for the other rows."""
        if len(rows) == len(self.responses):
            return values
        index = torch.tensor(rows, device=values.device)
        return values.new_zeros(len(self.responses), *values.shape[1:]).index_copy_(0, index, values)

    @property
    def written_by_pilot(self) -> torch.Tensor:
        """Response tokens that the pilot wrote, BoolTensor[batch, longest]; False after a response's end."""
        flags = torch.zeros(len(self.responses), max(self.lengths), dtype=torch.bool, device="cpu")
        for row, by_pilot in enumerate(self.by_pilot):
            flags[row, : len(by_pilot)] = torch.tensor(by_pilot, dtype=torch.bool, device="cpu")
        return flags.to(self.device)

    def append(self, tokens: torch.Tensor, growing: torch.Tensor, by_pilot: torch.Tensor) -> None:
        """Appends a token, LongTensor[batch], to the growing rows, BoolTensor[batch], and ends those whose criteria are met."""
        rows = growing.nonzero().flatten().tolist()
        check_drawn(tokens, self.lengths, rows)
        columns = [self.prompt_width + len(self.responses[row]) for row in rows]
        width = self._tokens.shape[1]
        if max(columns, default=0) >= width:  # as much again, so that the time for copying is in proportion to the text
            self._tokens = torch.nn.functional.pad(self._tokens, (0, width), value=self._call.pad_token_id)
        self._tokens[rows, columns] = tokens[rows]
        for row in rows:
            self.responses[row].append(int(tokens[row]))
            self.by_pilot[row].append(bool(by_pilot[row]))
        for prefix, exact in self.prefixes(rows, self._criteria_device):
            scores = self._record.columns("scores", prefix.shape[1] - self.prompt_width) if self._record else None
            self.finished[exact] = self._call.criteria(prefix, scores)[exact].cpu()
        self._stream()

    def _stream(self) -> None:
        if self._call.streamer is None:
            return
        growing = [length for length, done in zip(self.lengths, self.finished, strict=True) if not done]
        settled = min(growing, default=max(self.lengths))
        for column in range(self._streamed, settled):
            by_pilot = [column < len(flags) and flags[column] for flags in self.by_pilot]
            self._call.stream(self._tokens[:, self.prompt_width + column].clone(), torch.tensor(by_pilot, device="cpu"))
        self._streamed = max(self._streamed, settled)
