"""Stream of a model's logits over a static cache, in which each row is fed and rewound alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .attention import heads_per_key, twin
from .cache import NO_SLOT, Masks, attention_masks, attention_spans
from .checks import context_size, rotary, vocabulary_size
from .cuda_graphs import Workspace
from .stream import Stream


class Block(NamedTuple):
    """Tokens for one forward, q for each live row."""

    tokens: torch.Tensor
    """LongTensor[rows, q]."""
    slots: torch.Tensor
    """Slot of the cache for each token; `NO_SLOT` for padding. LongTensor[rows, q]."""
    fed: dict[int, int]
    """Number of tokens of each row that gets any."""
    begins: bool = False
    """True if its rows begin with it, from its left end on, so that attention is causal."""

    def then(self, tokens: torch.Tensor) -> Block:
        """Block of one more token, LongTensor[rows], for each row that is fed by this block."""
        last = self.slots[:, -1:]
        return Block(tokens[:, None], torch.where(last == NO_SLOT, NO_SLOT, last + 1), dict.fromkeys(self.fed, 1))


class RaggedStream(Stream):
    """A stream over a static cache, whose rows are fed and rewound alone by overwriting.

    Tokens that the model lacks are fed as its last one. That changes no response: the pilot reads such tokens of the base only
    after the switch, when it proposes, and the base rejects such proposals.

    Args:
        model: a model without an `unsupported_model` reason.
        prompts: token ids of each row's prompt.
        workspace: buffers for each row's prompt and the tokens after it.
    """

    long = 64
    """Most positions of a block with masks; longer beginnings of rows are read causally, other longer blocks piece by piece."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], workspace: Workspace) -> None:
        super().__init__(model, prompts)
        self.renew()
        self.workspace = workspace
        # Learned positions end with the context; only proposals that will be rejected lie beyond. Captured forwards outlive
        # this stream, so they must read nothing of its own.
        self._last_position = None if rotary(model) else context_size(model) - 1

    def renew(self) -> None:
        """Takes up changes of the model since the stream was made: its modules' modes, hooks and forwards."""
        self._twin = twin(self.model)
        self._heads_per_key = heads_per_key(self.model) if self._twin is not self.model else 1

    def block(
        self,
        missing: list[list[int] | None],
        proposals: torch.Tensor | None = None,
        counts: list[int] | None = None,
        keep: int = 1,
    ) -> Block:
        """As every stream; the beginnings of long texts are read at once, but for their last `keep` tokens."""
        proposals = torch.empty(len(self.live), 0, dtype=torch.long, device="cpu") if proposals is None else proposals
        counts = counts or [0] * len(self.live)
        if self._twin is not self.model:
            if self._alike(missing, counts, proposals.shape[1]):
                return self._block(missing, proposals, counts, begins=True)
            missing = self._read_ahead(missing, keep)
        return self._block(missing, proposals, counts)

    def _alike(self, missing: list[list[int] | None], counts: list[int], chunk: int) -> bool:
        """True if all rows begin here with equally many tokens, and have equally many proposals."""
        lengths = {len(new or ()) for new in missing}
        begin = not any(self.lengths[row] for row in self.live)
        return begin and len(lengths) == 1 and lengths.pop() > self.long and set(counts) == {chunk}

    def _read_ahead(self, missing: list[list[int] | None], keep: int) -> list[list[int] | None]:
        """Reads long beginnings of rows causally, but for the last `keep` tokens; returns the tokens that are left."""
        beginnings = {
            row: new[: len(new) - keep]
            for row, new in zip(self.live, missing, strict=True)
            if new is not None and len(new) - keep > self.long and not self.lengths[row]
        }
        if beginnings:
            self.logits(self._beginnings(beginnings), keep=1)
        return [new and new[len(beginnings.get(row, ())) :] for row, new in zip(self.live, missing, strict=True)]

    def _beginnings(self, texts: dict[int, list[int]]) -> Block:
        """Block of beginnings, padded on the right, which no token sees."""
        width, nothing = max(map(len, texts.values())), list[int]()
        values = [
            [*tokens, *[0] * (width - len(tokens)), *range(1, 1 + len(tokens)), *[NO_SLOT] * (width - len(tokens))]
            for tokens in (texts.get(row, nothing) for row in self.live)
        ]
        uploaded = self.upload(values)
        return Block(uploaded[:, :width], uploaded[:, width:], {row: len(tokens) for row, tokens in texts.items()}, begins=True)

    def _block(
        self,
        missing: list[list[int] | None],
        proposals: torch.Tensor | None = None,
        counts: list[int] | None = None,
        begins: bool = False,
    ) -> Block:
        proposals = torch.empty(len(self.live), 0, dtype=torch.long, device="cpu") if proposals is None else proposals
        chunk = proposals.shape[1]
        width = max(1, *(len(new or ()) for new in missing))
        width = width if begins else self.workspace.padded(width)
        values: list[list[int]] = []
        fed: dict[int, int] = {}
        for row, new, count in zip(self.live, missing, counts or [0] * len(self.live), strict=True):
            known = new or []
            fed |= {} if new is None else {row: len(known) + count}
            slots = range(self.lengths[row] + 1, self.lengths[row] + 1 + fed.get(row, 0))
            padding = [NO_SLOT] * (width - len(known))
            values.append([0] * len(padding) + known + padding + [*slots] + [NO_SLOT] * (len(known) + chunk - len(slots)))
        uploaded = self.upload(values)
        return Block(torch.cat([uploaded[:, :width], proposals.to(self.device)], dim=1), uploaded[:, width:], fed, begins)

    def run(self, name: str, function: Callable[..., Any], block: Block, keep: int, *inputs: torch.Tensor) -> Any:
        for row, count in block.fed.items():
            self.lengths[row] += count
            self.tokens += count
        self.forwards += 1
        self.workspace.reserve(max(self.lengths))
        width = self.workspace.width(1 + max(self.lengths))

        def forward(tokens: torch.Tensor, slots: torch.Tensor, *inputs: torch.Tensor) -> Any:
            return function(self._forward(tokens, slots, keep, width, block.begins), *inputs)

        return self.workspace.run((name, keep, width, block.begins), forward, block.tokens, block.slots, *inputs)

    def rewind(self, row: int, response: int) -> None:
        self.lengths[row] = min(self.lengths[row], len(self.prompts[row]) + response)

    def select(self, live: list[int]) -> None:
        if live != self.live:
            self.workspace.cache.select(torch.tensor([self.live.index(row) for row in live], device="cpu"))
            self.live = live

    def gather(self, rows: list[int]) -> None:
        """Replaces all rows by copies of some of them."""
        self.workspace.cache.select(torch.tensor(rows, device="cpu"))
        self.prompts, self.lengths = [self.prompts[row] for row in rows], [self.lengths[row] for row in rows]
        self.live = list(range(len(rows)))

    def _forward(self, tokens: torch.Tensor, slots: torch.Tensor, keep: int, width: int, begins: bool) -> torch.Tensor:
        self.workspace.cache.place(slots, width, begins)
        outputs = self._twin(
            input_ids=tokens.clamp(0, vocabulary_size(self.model) - 1),
            attention_mask=self._masks(slots, width, begins),
            position_ids=(slots - 1).clamp(min=0, max=self._last_position),
            past_key_values=self.workspace.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = outputs.logits[:, -keep:].float()
        return logits

    def _masks(self, slots: torch.Tensor, width: int, begins: bool) -> Masks:
        positions = slots.shape[1]
        if begins:
            return attention_spans(self._twin, torch.arange(1, 1 + positions, device="cpu")[None], begins)
        if positions > self.long and self._twin is not self.model:
            return attention_spans(self._twin, slots)
        return attention_masks(self._twin, slots, width, self._heads_per_key if positions > 1 else 1)


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Token ids of each row without its padding."""
    ids = input_ids.cpu()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
