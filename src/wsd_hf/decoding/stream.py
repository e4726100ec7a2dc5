"""A model as a stream: its tokens row by row, and a cache that holds a prefix of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..checks import vocabulary_size
from .cache import NO_SLOT, RaggedCache, attention_masks


class Stream:
    """One model's side of a call: each row is its prompt and the response so far; the cache holds a prefix of that.

    Tokens that the model does not know are fed as its last one: the pilot may see such of the base behind the switch, and the
    base proposals that it cannot keep.

    Args:
        model: any that `support.why_not_model` has nothing against.
        prompts: token ids of each row's prompt.
        room: most tokens, beyond the longest prompt, that are ever fed.
        last_position: highest position id to hand to the model; only proposals that can't be kept lie beyond it.
        device: where logits are returned to.

    Attributes:
        lengths: tokens of each row that the cache holds and that still stand.
        forwards: forwards run.
        tokens: token positions fed, padding not counted.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], room: int, last_position: int, device: torch.device
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.lengths = [0] * len(prompts)
        self.forwards = 0
        self.tokens = 0
        self._last_position = last_position
        self._device = device
        self._cache = RaggedCache(model.config, max(map(len, prompts)) + room)

    def missing(self, row: int, response: list[int]) -> list[int]:
        """What the cache does not hold of a row."""
        ahead = self.lengths[row] - len(self.prompts[row])
        return self.prompts[row][ahead:] + response if ahead < 0 else response[ahead:]

    def feed(self, blocks: list[list[int] | None], proposals: torch.Tensor, keep: int) -> torch.Tensor:
        """Appends a block of tokens, and then proposals, to each row.

        Args:
            blocks: tokens that the cache lacks; rows may differ in length. None: this row gets nothing at all.
            proposals: LongTensor[batch, chunk].
            keep: how many positions to return, counted from the end.

        Returns:
            float32 logits of the last `keep` positions, [batch, keep, vocabulary]; meaningless where a row has fewer.
        """
        chunk = proposals.shape[1]
        width = max(keep - chunk, *(len(block or ()) for block in blocks))
        tokens, slots = [], []
        for row, block in enumerate(blocks):
            new = [] if block is None else block
            fed = 0 if block is None else len(new) + chunk
            start = self.lengths[row] + 1
            tokens.append([0] * (width - len(new)) + new)
            slots.append([NO_SLOT] * (width + chunk - fed) + list(range(start, start + fed)))
            self.lengths[row] += fed
            self.tokens += fed
        device = self.model.device
        known = torch.tensor(tokens, dtype=torch.long, device=device).view(len(blocks), width)
        fed_tokens = torch.cat([known, proposals.to(device)], dim=1).clamp(max=vocabulary_size(self.model) - 1)
        return self._forward(fed_tokens, torch.tensor(slots, device=device), keep)

    def rewind(self, row: int, response: int) -> None:
        """Forgets what a row holds beyond its prompt and `response` tokens."""
        self.lengths[row] = min(self.lengths[row], len(self.prompts[row]) + response)

    def _forward(self, tokens: torch.Tensor, slots: torch.Tensor, keep: int) -> torch.Tensor:
        self.forwards += 1
        width = self._cache.place(slots)
        outputs = self.model(
            input_ids=tokens,
            attention_mask=attention_masks(self.model, slots, width),
            position_ids=(slots - 1).clamp(min=0, max=self._last_position),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = outputs.logits[:, -keep:].to(self._device, torch.float32)
        return logits
