"""A model as a stream: its tokens row by row, and a cache that holds a prefix of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .cache import NO_SLOT, RaggedCache, attention_masks


class Stream:
    """One model's side of a call.

    Args:
        model: any that `support.why_not` has nothing against.
        capacity: most tokens that a row will hold.

    Attributes:
        lengths: tokens of each row that the cache holds and that still stand.
        forwards: forwards run.
        tokens: tokens fed, padding not counted.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.lengths = [0] * rows
        self.forwards = 0
        self.tokens = 0
        self._cache = RaggedCache(model.config, capacity)

    def feed(self, blocks: list[list[int]], keep: int) -> torch.Tensor:
        """Appends a block of tokens to each row.

        Args:
            blocks: new tokens of each row; rows may differ in length, and a row may get none.
            keep: how many positions to return, counted from the end of the blocks.

        Returns:
            float32 logits of the last `keep` positions, [batch, keep, vocabulary]; meaningless where a row has fewer.
        """
        width = max(keep, *map(len, blocks))
        tokens = [[0] * (width - len(block)) + block for block in blocks]
        slots = [
            [NO_SLOT] * (width - len(block)) + list(range(length + 1, length + 1 + len(block)))
            for block, length in zip(blocks, self.lengths, strict=True)
        ]
        self.lengths = [length + len(block) for block, length in zip(blocks, self.lengths, strict=True)]
        self.tokens += sum(map(len, blocks))
        device = self.model.device
        return self.forward(torch.tensor(tokens, device=device), torch.tensor(slots, device=device), keep)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, keep: int) -> torch.Tensor:
        """One forward over LongTensor[batch, q] tokens and their slots; float32 logits of the last `keep` positions."""
        self.forwards += 1
        self._cache.place(slots)
        outputs = self.model(
            input_ids=tokens,
            attention_mask=attention_masks(self.model.config, slots, self._cache.layers[0].width, self.model.dtype),
            position_ids=(slots - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = outputs.logits[:, -keep:].float()
        return logits
