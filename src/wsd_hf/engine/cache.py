"""KV cache whose rows have lengths of their own, so that each row can be rewound alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .. import _compat

NO_SLOT = 0
"""Slot for padding. A token at position p of its row lies in slot 1 + p."""


class RaggedCache(Cache):
    """Buffers that grow with their longest row. A row is rewound by overwriting the slots after its new end.

    Args:
        config: config of the model that fills the cache.
        capacity: most tokens that a row is expected to hold; growth stops there if it can.
    """

    def __init__(self, config: PretrainedConfig, capacity: int = sys.maxsize) -> None:
        text = config.get_text_config(decoder=True)
        super().__init__(layers=[RaggedLayer() for _ in range(text.num_hidden_layers)])
        self._most_slots = 1 + capacity
        self._first_slots = 0

    def place(self, slots: torch.Tensor, width: int) -> None:
        """Sets the slots of the next forward's tokens, LongTensor[batch, q], and the number of slots that it attends to."""
        for layer in self.layers:
            layer.slots, layer.width = slots, width

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows, LongTensor[rows left]."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (states[rows.to(states.device)] for states in (layer.keys, layer.values))

    def grow(self, slots: int) -> bool:
        """Makes room for `slots` slots; returns True if there were fewer.

        Buffers begin as small as possible, and each growth doubles the part beyond that: n tokens after the prompt take room
        for at most 2n, and log n copies.
        """
        layers = self.layers
        if slots <= layers[0].capacity:
            return False
        if layers[0].is_initialized:
            grown = 2 * slots - self._first_slots
            slots = self._most_slots if slots <= self._most_slots < grown else grown
        else:
            self._first_slots = slots
        for layer in layers:
            layer.grow(slots)
        return True

    @property
    def memory(self) -> int:
        """Peak size of all buffers, in bytes."""
        return sum(layer.memory for layer in self.layers)


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [batch, heads, slots, head_dim]."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 0  # slots of a row
        self.slots: torch.Tensor = torch.empty(0, dtype=torch.long, device="cpu")
        self.width = 0
        self.memory = 0  # peak, in bytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the buffers; zeros, because masked values must be finite too."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True
        self._measure()

    def grow(self, slots: int) -> None:
        """Lengthens the buffers to `slots` slots."""
        if self.is_initialized:
            room = (0, 0, 0, slots - self.capacity)
            self.keys, self.values = (torch.nn.functional.pad(states, room) for states in (self.keys, self.values))
            self._measure()
        self.capacity = slots

    def _measure(self) -> None:
        # `nbytes` can't be traced by torch.compile where shapes are symbols.
        self.memory = max(self.memory, sum(states.numel() * states.itemsize for states in (self.keys, self.values)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [batch, heads, q, head_dim] to the placed slots; returns the slots that queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, self.slots[:, None, :, None].to(states.device).expand_as(states), states)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_seq_length(self, *args: Any) -> int:
        """Number of slots that the current forward attends to."""
        return self.width

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        """Length and offset of the slots that the current forward attends to."""
        return self.width, 0

    def get_max_length(self) -> int:
        """Number of slots of a row."""
        return self.capacity


def attention_masks(model: PreTrainedModel, slots: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """Attention masks: a query sees its row's slots from 1 to its own, within the window of sliding layers.

    `slots` are those of the queries, LongTensor[batch, q], `width` the number of slots attended to. A mask is
    [batch, 1, q, width]; there is one for each type of layer that the config names.
    """
    config = model.config.get_text_config(decoder=True)
    query, key = slots[:, None, :, None], torch.arange(width, device=slots.device)
    full = (key <= query) & (key >= query.clamp(max=1))
    window = getattr(config, "sliding_window", None)
    masks = {"full_attention": full, "sliding_attention": full if window is None else full & (key > query - window)}
    if _compat.attention_implementation(model) == "eager":
        dtype, floor = model.dtype, torch.finfo(model.dtype).min
        masks = {name: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, floor) for name, mask in masks.items()}
    layer_types = getattr(config, "layer_types", None)
    return {name: masks[name] for name in set(layer_types)} if layer_types else masks["sliding_attention"]
