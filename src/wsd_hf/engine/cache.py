"""KV cache whose rows have lengths of their own, so that each row can be rewound alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .. import _compat
from .attention import additive

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

    def place(self, slots: torch.Tensor, width: int, begins: bool = False) -> None:
        """Sets the slots of the next forward's tokens, LongTensor[batch, q], and the number of slots that it attends to.

        If the rows begin with this block, they attend to its own keys and values, as they come.
        """
        for layer in self.layers:
            layer.slots, layer.width, layer.begins = slots, width, begins

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
        self.begins = False
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
        if self.begins:
            return key_states, value_states
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


LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of attention layers whose masks are known."""

Masks = torch.Tensor | dict[str, torch.Tensor]
"""One mask for all layers, or one for each type of layer that the config names."""


def attention_masks(model: PreTrainedModel, slots: torch.Tensor, width: int, repeats: int = 1) -> Masks:
    """Attention masks: a query sees its row's slots from 1 to its own, within the window or the chunk of its layer.

    `slots` are those of the queries, LongTensor[batch, q], `width` the number of slots attended to. A mask is
    [batch, 1, q, width], added to the scores (boolean for transformers' own sdpa on a CPU), and repeated along q for query
    heads that share keys.
    """
    last, key = slots[:, None, :, None], torch.arange(width, device=slots.device)

    def mask(first: torch.Tensor) -> torch.Tensor:
        seen = (key >= first[:, None, :, None]) & (key <= last)
        # A boolean mask is turned into numbers by a copy from the host, which no CUDA graph can hold.
        boolean = _compat.attention_implementation(model) == "sdpa" and not slots.is_cuda
        mask = seen if boolean else additive(seen, model.dtype)
        return mask if repeats == 1 else mask.repeat(1, 1, repeats, 1)

    return _by_type(model, slots, mask)


def attention_spans(model: PreTrainedModel, slots: torch.Tensor, begins: bool = False) -> Masks:
    """First and last key that each query sees, LongTensor[batch, 1, q, 2]: the same as `attention_masks`, without its size.

    If the rows begin with the block, keys are counted from its left end.
    """
    return _by_type(model, slots, lambda first: torch.stack([first, slots], dim=-1)[:, None] - int(begins))


def _by_type(model: PreTrainedModel, slots: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> Masks:
    """`mask` of the first slots that queries see, LongTensor[batch, q], for each type of layer that the config names."""
    config = model.config.get_text_config(decoder=True)
    start = slots.clamp(max=1)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)

    def of(layer_type: str) -> torch.Tensor:
        if layer_type == "sliding_attention" and window is not None:
            return mask(torch.maximum(slots - window + 1, start))
        if layer_type == "chunked_attention" and chunk is not None:
            return mask(torch.maximum((slots - 1) // chunk * chunk + 1, start))
        return mask(start)

    layer_types = getattr(config, "layer_types", None)
    return {name: of(name) for name in sorted(set(layer_types))} if layer_types else of("sliding_attention")
