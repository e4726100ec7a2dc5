"""The responses of a batch whose rows grow at their own speed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .call import Call
from .checks import check_drawn
from .scores import Record
from .supported import depends_on_prefix_only


class Rows:
    """Prompt and response of each row, laid out as `generate` does: prompts end where responses begin.

    Args:
        input_ids: prompts, padded on the left, LongTensor[batch, prompt].
        max_length: of prompt and response.
        pad_token_id: stands behind a response that has ended.
        criteria: asked after every token, with the exact prefix.
        streamer: gets the tokens column by column, as from `generate`.
        record: holds the scores that criteria are shown; None: they are shown none.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        pad_token_id: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        record: Record | None = None,
    ) -> None:
        self.device = input_ids.device
        self.prompt_width = input_ids.shape[1]
        self.responses: list[list[int]] = [[] for _ in input_ids]
        self.finished = torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")
        # On the host, where the decision is made. transformers' own criteria follow their input there without waiting.
        self._tokens = input_ids.to("cpu", torch.long, copy=True)
        self._max_length, self._pad_token_id = max_length, pad_token_id
        self._criteria_device = torch.device("cpu") if all(map(depends_on_prefix_only, criteria)) else input_ids.device
        self._criteria = criteria
        self._streamer = streamer
        self._record = record
        self._streamed = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens in each response."""
        return [len(response) for response in self.responses]

    @property
    def left(self) -> list[int]:
        """Tokens that each response still has room for."""
        return [self._max_length - self.prompt_width - length for length in self.lengths]

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

    def append(self, tokens: torch.Tensor, growing: torch.Tensor) -> None:
        """Appends a token to the growing rows, LongTensor[batch] and BoolTensor[batch]; ends those whose criteria are met."""
        rows = growing.nonzero().flatten().tolist()
        check_drawn(tokens, self.lengths, rows)
        columns = [self.prompt_width + len(self.responses[row]) for row in rows]
        width = self._tokens.shape[1]
        if max(columns, default=0) >= width:  # as much again, so that the time for copying is in proportion to the text
            self._tokens = torch.nn.functional.pad(self._tokens, (0, width), value=self._pad_token_id)
        self._tokens[rows, columns] = tokens[rows]
        for row in rows:
            self.responses[row].append(int(tokens[row]))
        for prefix, exact in self.prefixes(rows, self._criteria_device):
            scores = self._record.columns("scores", prefix.shape[1] - self.prompt_width) if self._record else None
            self.finished[exact] = self._criteria(prefix, scores)[exact].cpu()
        self._stream()

    def _stream(self) -> None:
        if self._streamer is None:
            return
        growing = [length for length, done in zip(self.lengths, self.finished, strict=True) if not done]
        settled = min(growing, default=max(self.lengths))
        for column in range(self._streamed, settled):
            self._streamer.put(self._tokens[:, self.prompt_width + column].clone())
        self._streamed = max(self._streamed, settled)


def rows_of(call: Call, record: Record | None = None) -> Rows:
    """The rows that a call is to fill, and the scores that its criteria are shown."""
    return Rows(call.input_ids, call.generation_config.max_length, call.pad_token_id, call.criteria, call.streamer, record)
