"""A model as a stream: its tokens row by row, and a cache that holds a prefix of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .. import _compat
from ..text.settled_tokens import common_prefix
from .cache import NO_SLOT, attention_masks
from .checks import context_size, vocabulary_size
from .cuda_graphs import Workspace, workspace
from .supported import rotary


class Block(NamedTuple):
    """Tokens on their way into a model, q for each live row."""

    tokens: torch.Tensor
    """LongTensor[rows, q]."""
    slots: torch.Tensor
    """Where in the cache each belongs; `NO_SLOT` for padding. LongTensor[rows, q]."""
    fed: dict[int, int]
    """Rows that get something, and how many tokens."""

    def then(self, tokens: torch.Tensor) -> Block:
        """One token more, LongTensor[rows], for each row that this block had something for."""
        last = self.slots[:, -1:]
        return Block(tokens[:, None], torch.where(last == NO_SLOT, NO_SLOT, last + 1), dict.fromkeys(self.fed, 1))


class RaggedStream:
    """One model's side of a call: each row is its prompt and the response so far; the cache holds a prefix of that.

    Tokens that the model lacks are fed as its last one, where that changes no response: the pilot may see such of the base
    after the switch, when it only proposes, and the base proposals that it cannot keep.

    Args:
        model: any that `supported.unsupported_model` has nothing against.
        prompts: token ids of each row's prompt.
        workspace: buffers for each row's prompt and all that is fed beyond it.

    Attributes:
        device: of what the model is fed.
        live: rows that tensors have a row for, in their order.
        lengths: tokens of each row that the cache holds and that still stand.
        forwards: forwards run.
        tokens: token positions fed, padding not counted.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], workspace: Workspace) -> None:
        self.model = model
        self.device = _compat.input_device(model)
        self.prompts = prompts
        self.workspace = workspace
        self.live = list(range(len(prompts)))
        self.lengths = [0] * len(prompts)
        self.forwards = 0
        self.tokens = 0
        # Positions that are learned end with the context; only proposals that can't be kept lie beyond. Captured forwards
        # outlive this stream, so nothing that they read may be its own.
        self._last_position = None if rotary(model) else context_size(model) - 1

    def missing(self, row: int, response: list[int]) -> list[int]:
        """What the cache does not hold of a row."""
        ahead = self.lengths[row] - len(self.prompts[row])
        return self.prompts[row][ahead:] + response if ahead < 0 else response[ahead:]

    def resume(self, row: int, fed: list[int], response: list[int]) -> list[int]:
        """What a row is to be fed so that its next token can be told: what its cache lacks, or else its last token again.

        Args:
            row: rewound to what it shares with `fed`.
            fed: the response that it was last fed.
            response: what the next token is to follow.
        """
        self.rewind(row, min(len(common_prefix(fed, response)), len(response) - 1))
        return self.missing(row, response)

    def block(
        self, missing: list[list[int] | None], proposals: torch.Tensor | None = None, counts: list[int] | None = None
    ) -> Block:
        """What is to be fed next: tokens that the cache lacks, padded on the left, and then proposals.

        Args:
            missing: for each live row; None: this row gets nothing at all.
            proposals: LongTensor[rows, chunk]; default: none.
            counts: how many of them each row gets.
        """
        proposals = torch.empty(len(self.live), 0, dtype=torch.long, device="cpu") if proposals is None else proposals
        counts = counts or [0] * len(self.live)
        chunk = proposals.shape[1]
        width = self.workspace.padded(max(1, *(len(new or ()) for new in missing)))
        values: list[list[int]] = []
        fed: dict[int, int] = {}
        for row, new, count in zip(self.live, missing, counts, strict=True):
            known = new or []
            fed |= {} if new is None else {row: len(known) + count}
            slots = range(self.lengths[row] + 1, self.lengths[row] + 1 + fed.get(row, 0))
            padding = [NO_SLOT] * (width - len(known))
            values.append([0] * len(padding) + known + padding + [*slots] + [NO_SLOT] * (len(known) + chunk - len(slots)))
        uploaded = torch.tensor(values, device="cpu", pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        return Block(torch.cat([uploaded[:, :width], proposals.to(self.device)], dim=1), uploaded[:, width:], fed)

    def logits(self, block: Block, keep: int) -> torch.Tensor:
        """float32 logits of a block's last positions, [rows, keep, vocabulary]; meaningless at padding."""
        logits: torch.Tensor = self.run("logits", lambda logits: logits, block, keep)
        return logits

    def run(self, name: str, function: Callable[[torch.Tensor], Any], block: Block, keep: int) -> Any:
        """What a function makes of such logits; captured together with the forward where that pays.

        Args:
            name: tells the function from others on this model.
            function: of float32 [rows, keep, vocabulary]; waits for nothing on the device.
            block: what is fed.
            keep: how many positions to return.
        """
        for row, count in block.fed.items():
            self.lengths[row] += count
            self.tokens += count
        self.forwards += 1
        self.workspace.reserve(max(self.lengths))
        width = self.workspace.width(1 + max(self.lengths))

        def forward(tokens: torch.Tensor, slots: torch.Tensor) -> Any:
            return function(self._forward(tokens, slots, keep, width))

        return self.workspace.graphs.run((name, keep, width), forward, block.tokens, block.slots)

    def rewind(self, row: int, response: int) -> None:
        """Forgets what a row holds beyond its prompt and `response` tokens."""
        self.lengths[row] = min(self.lengths[row], len(self.prompts[row]) + response)

    def select(self, live: list[int]) -> None:
        """Goes on with some of the live rows only."""
        if live != self.live:
            self.workspace.cache.select(torch.tensor([self.live.index(row) for row in live], device="cpu"))
            self.live = live

    def gather(self, rows: list[int]) -> None:
        """Goes on with copies of some rows, which are all its rows from then on."""
        self.workspace.cache.select(torch.tensor(rows, device="cpu"))
        self.prompts, self.lengths = [self.prompts[row] for row in rows], [self.lengths[row] for row in rows]
        self.live = list(range(len(rows)))

    def _forward(self, tokens: torch.Tensor, slots: torch.Tensor, keep: int, width: int) -> torch.Tensor:
        self.workspace.cache.place(slots, width)
        outputs = self.model(
            input_ids=tokens.clamp(0, vocabulary_size(self.model) - 1),
            attention_mask=attention_masks(self.model, slots, width),
            position_ids=(slots - 1).clamp(min=0, max=self._last_position),
            past_key_values=self.workspace.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = outputs.logits[:, -keep:].float()
        return logits


@contextmanager
def open_stream(model: PreTrainedModel, prompts: list[list[int]], room: int, capturing: bool) -> Iterator[RaggedStream]:
    """A model as a stream for one call.

    Args:
        model: any that `unsupported_model` has nothing against.
        prompts: token ids of each row's prompt.
        room: most tokens that a row is fed behind its prompt.
        capturing: whether to capture CUDA graphs where the model allows it.
    """
    with workspace(model, len(prompts), max(map(len, prompts)), room, capturing) as buffers:
        yield RaggedStream(model, prompts, buffers)


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The rows without their padding."""
    rows = input_ids.tolist()
    if attention_mask is None:
        return rows
    return [
        [token for token, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, attention_mask.tolist(), strict=True)
    ]
