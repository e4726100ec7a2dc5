"""Cache of a recurrent or hybrid model whose rows can be rewound one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


@dataclass
class Snapshot:
    """Recurrent states of all live rows at one time."""

    lengths: dict[int, int]
    """Number of tokens in the states of each row that can still return to them."""
    states: list[torch.Tensor]
    """Copies of the cache's recurrent states; none if no token had been read."""


class RecurrentCache:
    """Recurrent states that are rewound to a snapshot, and keys and values that are rewound by length.

    Keys and values are padded on the left, and end together, as in a batch of `generate`.

    Args:
        config: config of the model that fills the cache.
        rows: number of rows.

    Attributes:
        layers: the cache that the model gets, in which a row of the batch is a live row.
        live: those rows, in order.
        lengths: number of valid tokens of each row.
        attends: True if some layers have keys and values.
        memory: peak size of cache and snapshots, in bytes.
    """

    def __init__(self, config: PretrainedConfig, rows: int) -> None:
        self.layers: Cache = DynamicCache(config=config)
        self.live = list(range(rows))
        self.lengths = [0] * rows
        self.attends = any(isinstance(layer, DynamicLayer) for layer in self.layers.layers)
        self.memory = 0
        self._written = [0] * rows  # tokens up to the end of each row's states and keys, rejected ones and padding included
        self._snapshots: list[Snapshot] = []
        self._before = 0  # number of snapshots from before the current block

    def begin(self) -> None:
        """Drops the snapshots from before the last block: rewinds seldom go back further than to its beginning."""
        self.restore()
        self._snapshots = self._snapshots[self._before :][:1]
        self._before = len(self._snapshots)

    def take_snapshot(self) -> None:
        """Makes the present lengths some that rows can return to."""
        lengths = {row: self.lengths[row] for row in self.live}
        self._snapshots.append(Snapshot(lengths, [states.clone() for states in self._states()]))

    def advance(self, width: int, advancing: list[int]) -> None:
        """Accounts for a forward over `width` positions; of the rows that do not advance, some were padding."""
        for row in self.live:
            self._written[row] = self.lengths[row] + width
        for row in advancing:
            self.lengths[row] += width
        tensors = [*self._states(), *(part for layer in self._attention() for part in (layer.keys, layer.values))]
        tensors += [states for snapshot in self._snapshots for states in snapshot.states]
        self.memory = max(self.memory, sum(tensor.nbytes for tensor in tensors))

    def rewind(self, row: int, length: int) -> None:
        """Shortens a row to the latest snapshot of at most `length` tokens."""
        if self.lengths[row] <= length:
            return
        known = [snapshot.lengths[row] for snapshot in self._snapshots if row in snapshot.lengths]
        self.lengths[row] = max((one for one in known if one <= length), default=0)
        for snapshot in self._snapshots:
            if snapshot.lengths.get(row, 0) > self.lengths[row]:
                del snapshot.lengths[row]

    def restore(self) -> None:
        """Takes states, keys and values of all live rows back to their lengths."""
        surplus = [self._written[row] - self.lengths[row] for row in self.live]
        if not any(surplus):
            return
        returning = [place for place, tokens in enumerate(surplus) if tokens]
        for snapshot in self._snapshots:
            places = [one for one in returning if snapshot.lengths.get(self.live[one]) == self.lengths[self.live[one]]]
            returning = [one for one in returning if one not in places]
            self._copy(places, snapshot.states)
        self._copy(returning, [])
        self._align(surplus)
        for row in self.live:
            self._written[row] = self.lengths[row]

    def select(self, live: list[int]) -> None:
        """Drops all live rows but these."""
        self.restore()
        places = torch.tensor([self.live.index(row) for row in live], device="cpu")
        self.layers.reorder_cache(places)
        for snapshot in self._snapshots:
            snapshot.states = [states[places.to(states.device)] for states in snapshot.states]
        self.live = live
        self._align([0] * len(live))

    def _copy(self, places: list[int], states: list[torch.Tensor]) -> None:
        """Overwrites recurrent states at some places of the batch; zeros where no token has been read."""
        if not places:
            return
        at = torch.tensor(places, device="cpu")
        for index, state in enumerate(self._states()):
            at = at.to(state.device)
            state[at] = states[index][at] if states else torch.zeros_like(state[at])

    def _align(self, surplus: list[int]) -> None:
        """Drops some of the last keys and values of each live row; the others end together again."""
        longest = max(self.lengths[row] for row in self.live)
        ends = -torch.tensor(surplus, device="cpu")[:, None, None, None]
        for layer in self._attention():
            ends = ends.to(layer.keys.device)
            columns = torch.arange(-longest, 0, device=ends.device)[:, None] + layer.keys.shape[2] + ends
            layer.keys, layer.values = (
                states.gather(2, columns.clamp(min=0).expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )

    def _attention(self) -> Iterator[DynamicLayer]:
        return (layer for layer in self.layers.layers if isinstance(layer, DynamicLayer) and layer.is_initialized)

    def _states(self) -> Iterator[torch.Tensor]:
        for layer in self.layers.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (*layer.conv_states.values(), *layer.recurrent_states.values()):
                    if states is not None:
                        yield states
