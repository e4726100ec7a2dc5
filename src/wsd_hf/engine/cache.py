"""A KV cache whose rows have lengths of their own, so that rows can be rewound one by one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .. import _compat

NO_SLOT = 0
"""Slot that takes what belongs to no token; tokens lie from slot 1 on, each at 1 + its position."""


class RaggedCache(Cache):
    """Buffers that grow with their longest row. Rewinding a row is writing over what lies behind its length.

    Args:
        config: of the model that fills it.
        capacity: most tokens that a row is expected to hold; growth stops there where it can.
    """

    def __init__(self, config: PretrainedConfig, capacity: int = sys.maxsize) -> None:
        text = config.get_text_config(decoder=True)
        super().__init__(layers=[RaggedLayer() for _ in range(text.num_hidden_layers)])
        self._most = 1 + capacity
        self._first = 0  # slots that the buffers were made with

    def place(self, slots: torch.Tensor, width: int) -> None:
        """Where the next forward's keys and values go, LongTensor[batch, q], and how many slots it looks at.

        `NO_SLOT` is for padding; `width` is more than any other slot.
        """
        for layer in self.layers:
            layer.slots, layer.width = slots, width

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows only, LongTensor[rows left]."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (states[rows.to(states.device)] for states in (layer.keys, layer.values))

    def grow(self, slots: int) -> bool:
        """Makes room for so many slots; returns whether there was too little.

        Buffers are made as large as they must be, and then grow by as much again as lies beyond that: n tokens after the
        prompt take room for 2n at most, and log n copies.
        """
        layers = self.layers
        if slots <= layers[0].capacity:
            return False
        if layers[0].is_initialized:
            grown = 2 * slots - self._first
            slots = self._most if slots <= self._most < grown else grown
        else:
            self._first = slots
        for layer in layers:
            layer.grow(slots)
        return True

    @property
    def memory(self) -> int:
        """Most bytes that all buffers have taken."""
        return sum(layer.memory for layer in self.layers)


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [batch, heads, slots, head_dim]."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 0
        self.slots: torch.Tensor = torch.empty(0, dtype=torch.long, device="cpu")
        self.width = 0
        self.memory = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the buffers; zeros, because what is masked must still be finite."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.capacity, states.shape[3]) for states in (key_states, value_states)
        )
        self.memory = _bytes(self.keys) + _bytes(self.values)
        self.is_initialized = True

    def grow(self, slots: int) -> None:
        """Goes on with longer buffers that begin with what these hold."""
        if self.is_initialized:
            room = (0, 0, 0, slots - self.capacity)
            self.keys, self.values = (torch.nn.functional.pad(states, room) for states in (self.keys, self.values))
            self.memory = max(self.memory, _bytes(self.keys) + _bytes(self.values))
        self.capacity = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [batch, heads, q, head_dim] to the placed slots; returns all that a query may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, self.slots[:, None, :, None].to(states.device).expand_as(states), states)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_seq_length(self, *args: Any) -> int:
        """Slots that the current forward sees."""
        return self.width

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        """Length and offset of what the current forward sees."""
        return self.width, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """Slots of a row."""
        return self.capacity


def _bytes(states: torch.Tensor) -> int:
    return states.numel() * states.itemsize  # `nbytes` can't be traced by torch.compile where shapes are symbols


def attention_masks(model: PreTrainedModel, slots: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """What each query may look at: its row's slots from 1 to its own, within the window of sliding layers.

    Args:
        model: whose layers and attention the masks are for.
        slots: of the queries, LongTensor[batch, q].
        width: slots that are looked at.

    Returns:
        [batch, 1, q, width], or such a mask for each type of layer that the config names.
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
