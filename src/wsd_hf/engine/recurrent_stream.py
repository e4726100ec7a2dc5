"""Stream of a model's logits over a recurrent state, which goes back to a snapshot where tokens are rejected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .. import _compat
from .checks import vocabulary_size
from .recurrent_cache import RecurrentCache
from .stream import Stream

LAG = 16
"""Most known tokens of a row that are fed together with proposals; more of them get a forward of their own."""


class RecurrentBlock(NamedTuple):
    """Tokens for each live row, q positions; a row is fed those of them that its state lacks."""

    tokens: torch.Tensor
    """LongTensor[rows, q]."""
    ends: dict[int, int]
    """Length of each row that is fed, after the block."""
    proposals: dict[int, int]
    """Number of tokens at the end of each such row that may be rejected."""
    padding: dict[int, int]
    """Number of positions after each such row's last token."""
    follows: bool = False
    """True for a block that was made by `then`."""

    def then(self, tokens: torch.Tensor) -> RecurrentBlock:
        """Block of one more token, LongTensor[rows], for each row that is fed by this block, which has no proposals."""
        return self._replace(
            tokens=torch.cat([self.tokens, tokens[:, None]], dim=1),
            ends={row: end + 1 for row, end in self.ends.items()},
            follows=True,
        )


@dataclass
class Uncaptured:
    """Buffers that are bound to no CUDA graphs; see `Workspace`."""

    cache: RecurrentCache
    captures = False

    def padded(self, tokens: int) -> int:
        """Number of positions of a block with `tokens` tokens in its fullest row."""
        return tokens


class RecurrentStream(Stream):
    """A stream whose rows go back to the latest snapshot before rejected tokens; kept tokens after it are missing again.

    All live rows share a forward, padded on the right. A state that has read padding is useless, so only the rows that are fed
    most advance; the others are fed the same tokens again before their next ones.

    Args:
        model: a recurrent model without an `unsupported_model` reason.
        prompts: token ids of each row's prompt.
        reads_blocks: True if the model continues from its state with several tokens at once, False if with one only.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], reads_blocks: bool = True) -> None:
        super().__init__(model, prompts)
        self._cache = RecurrentCache(model.config, len(prompts))
        self.workspace = Uncaptured(self._cache)
        self.lengths = self._cache.lengths
        self._reads_blocks = reads_blocks
        self._cache_keyword = _compat.cache_keyword(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def block(
        self, missing: list[list[int] | None], proposals: torch.Tensor | None = None, counts: list[int] | None = None
    ) -> RecurrentBlock:
        proposals = torch.empty(len(self.live), 0, dtype=torch.long, device="cpu") if proposals is None else proposals
        chunk = proposals.shape[1]
        width = max(1, *(len(new or ()) for new in missing))
        ends, proposed, padding = {}, {}, {}
        for row, new, count in zip(self.live, missing, counts or [0] * len(self.live), strict=True):
            if new is not None:
                ends[row] = self.lengths[row] + len(new) + count
                proposed[row], padding[row] = count, chunk - count
        known = self.upload([[0] * (width - len(new or ())) + (new or []) for new in missing])
        return RecurrentBlock(torch.cat([known, proposals.to(self.device)], dim=1), ends, proposed, padding)

    def run(self, name: str, function: Callable[..., Any], block: RecurrentBlock, keep: int, *inputs: torch.Tensor) -> Any:
        return function(self._logits(block, keep), *inputs)

    def rewind(self, row: int, response: int) -> None:
        self._cache.rewind(row, len(self.prompts[row]) + response)

    def select(self, live: list[int]) -> None:
        if live != self.live:
            self._cache.select(live)
            self.live = live

    def _logits(self, block: RecurrentBlock, keep: int) -> torch.Tensor:
        """float32 logits of the block's last positions, [rows, keep, vocabulary]; meaningless at padding."""
        if not block.follows:
            self._cache.begin()
        self._catch_up(block)
        lacking = self._lacking(block)
        width = max(lacking.values())
        if self._reads_blocks or width == 1:
            read = min(width, max(width - count for count in lacking.values()) + keep)
            logits = self._feed(block, lacking, read)
            first = dict.fromkeys(lacking, width - read)
        else:
            steps = [[row for row, count in lacking.items() if count > place] for place in reversed(range(width))]
            logits = torch.cat([self._feed(block, dict.fromkeys(rows, 1), 1) for rows in steps][-keep:], dim=1)
            first = {row: count - logits.shape[1] for row, count in lacking.items()}
        # Where each of the last `keep` positions is among these logits; any place for padding.
        places = [lacking[row] + block.padding[row] - keep - first[row] if row in lacking else 0 for row in self.live]
        index = [[min(max(0, place + more), logits.shape[1] - 1) for more in range(keep)] for place in places]
        return logits.gather(1, self.upload(index).to(logits.device)[..., None].expand(-1, -1, logits.shape[2])).float()

    def _lacking(self, block: RecurrentBlock) -> dict[int, int]:
        """Number of the block's tokens that each row lacks; without rows that lack none."""
        return {row: end - self.lengths[row] for row, end in block.ends.items() if end > self.lengths[row]}

    def _catch_up(self, block: RecurrentBlock) -> None:
        """Feeds known tokens in forwards of their own, up to the last, where a rejection would have them fed again."""
        while True:
            known = {row: count - block.proposals[row] for row, count in self._lacking(block).items()}
            if self._reads_blocks:
                rows = [row for row, count in known.items() if count > LAG // 2]
                if max(known.values()) <= LAG:
                    return
                width = min(known[row] for row in rows) - 1
            else:  # the beginning of a text can be read at once by any model
                width = max((count for row, count in known.items() if self.lengths[row] == 0), default=0) - 1
                rows = [row for row, count in known.items() if self.lengths[row] == 0 and count > width]
                if width < 1:
                    return
            self._feed(block, dict.fromkeys(rows, width), 1)

    def _feed(self, block: RecurrentBlock, counts: dict[int, int], keep: int) -> torch.Tensor:
        """One forward over the next tokens of some rows; returns logits of its last positions, [rows, keep, vocabulary]."""
        cache = self._cache
        cache.restore()
        cache.take_snapshot()
        width, longest = max(counts.values()), max(self.lengths[row] for row in self.live)
        values = []
        for row in self.live:
            count, begin = counts.get(row, 0), 0
            if count:
                begin = block.tokens.shape[1] - block.padding[row] - (block.ends[row] - self.lengths[row])
            values.append([self.lengths[row]] + [begin + place if place < count else 0 for place in range(width)])
        uploaded = self.upload(values)
        lengths, columns = uploaded[:, :1], uploaded[:, 1:]
        inputs: dict[str, Any] = {"logits_to_keep": keep, "use_cache": True, self._cache_keyword: cache.layers}
        if self._takes_positions:
            inputs["position_ids"] = lengths + torch.arange(width, device=self.device)
        if cache.attends and len({self.lengths[row] for row in self.live}) > 1:
            inputs["attention_mask"] = (torch.arange(longest + width, device=self.device) >= longest - lengths).long()
        tokens = block.tokens.gather(1, columns).clamp(0, vocabulary_size(self.model) - 1)
        logits: torch.Tensor = self.model(input_ids=tokens, **inputs).logits[:, -keep:]
        cache.advance(width, [row for row, count in counts.items() if count == width])
        self.forwards += 1
        self.tokens += sum(counts.values())
        return logits
