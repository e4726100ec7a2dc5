"""The pilot's side of the fast path: its next tokens, in the base's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..engine.checks import logits_error
from ..engine.rows import Rows
from ..engine.sampling import FREE, choice
from ..engine.stream import Stream
from ..text.bridge import Offer, OneVocabulary
from .rule import Rule
from .setup import Setup


class Proposals(NamedTuple):
    """Up to c tokens for each live row."""

    tokens: torch.Tensor
    """`FREE` after a row's last. LongTensor[rows, c + 1]."""
    not_finite: torch.Tensor
    """Positions of NaN and the like in the pilot's logits, BoolTensor[rows, c + 1]."""
    probabilities: Sequence[torch.Tensor | None]
    """Probabilities that each position was drawn from, [rows, V of the pilot]; None if the proposal was deterministic."""
    counts: list[int]
    """Tokens for each row."""
    offers: dict[int, Offer] | None
    """Next tokens of each drafting row's draft, if they are known before the check."""

    @property
    def chunk(self) -> int:
        """c."""
        return len(self.probabilities)

    def drawn_with(self, position: int, vocabulary: int) -> torch.Tensor:
        """A position's probabilities over the base's vocabulary, 0 where nothing usable was proposed: [rows, vocabulary]."""
        drawn_with = torch.zeros(len(self.tokens), vocabulary, dtype=torch.float32, device=self.tokens.device)
        probabilities = self.probabilities[position] if position < self.chunk else None
        if probabilities is None:
            tokens = self.tokens[:, position, None]
            known = ((tokens >= 0) & (tokens < vocabulary)).float()
            return drawn_with.scatter_(1, tokens.clamp(0, vocabulary - 1), known)
        shared = min(vocabulary, probabilities.shape[-1])
        drawn_with[:, :shared] = probabilities[:, :shared].nan_to_num()
        return drawn_with


class Proposer:
    """The pilot, and the bridge that its tokens take to the base; its cache has room for so many tokens of a response."""

    def __init__(self, stream: Stream, setup: Setup[Rule], room: int) -> None:
        self.stream, self.bridge = stream, setup.bridge
        self._choice = choice(setup.side.warpers)
        self._room = room
        self._written: list[list[int]] = [[] for _ in stream.prompts]  # the pilot's tokens that followed each prompt last

    def propose(self, chunk: int, rows: Rows, drafting: list[bool]) -> Proposals:
        """The pilot's next `chunk` tokens in every live row; `drafting`: for each row, whether its draft goes on."""
        live, device = self.stream.live, rows.device
        missing = [self._missing(row, rows, drafting[row], chunk) if chunk else None for row in live]
        if all(new is None for new in missing):
            nothing = torch.full((len(live), 1), FREE, device=device)
            return Proposals(nothing, nothing > FREE, [], [0] * len(live), None)
        block = self.stream.block(missing)
        tokens, bad, probabilities = [], [], []
        for _ in range(chunk):
            token, no_number, probability = self._choice(self.stream, block)
            tokens.append(token)
            bad.append(no_number)
            probabilities.append(None if probability is None else probability.to(device))
            block = block.then(token)
        end = torch.full_like(token, FREE)
        proposals = Proposals(
            torch.stack([*tokens, end], dim=1).to(device),
            torch.stack([*bad, end > FREE], dim=1).to(device),
            probabilities,
            [0 if new is None else chunk for new in missing],
            None,
        )
        return proposals if isinstance(self.bridge, OneVocabulary) else self._cross(proposals, rows, drafting)

    def offers(self, proposals: Proposals, proposed: Mapping[int, list[int]], drafting: list[bool]) -> dict[int, Offer]:
        """Next tokens of each drafting row's draft; `proposed`: each row's tokens of the proposals on the host."""
        if proposals.offers is not None:
            return proposals.offers
        offers = {}
        for row in self.stream.live:
            tokens = proposed[row][: proposals.chunk]
            self._written[row] += tokens
            if drafting[row]:
                offers[row] = self.bridge.offer(row, tokens)
        return offers

    def _missing(self, row: int, rows: Rows, drafting: bool, chunk: int) -> list[int] | None:
        """Tokens of a row that the pilot has yet to read; None if the row has finished, or the pilot has no room for more."""
        if rows.finished[row]:
            return None
        written = self.bridge.pilot_tokens(row, None if drafting else rows.responses[row])
        if len(written) + chunk > self._room:
            return None
        missing = self.stream.resume(row, self._written[row], written)
        self._written[row] = written
        return missing

    def _cross(self, proposals: Proposals, rows: Rows, drafting: list[bool]) -> Proposals:
        """The proposals in the base's tokens; they count as deterministic, since their probabilities don't cross.

        That is exact too: the rejection rule only requires proposals that are independent of the base's own draw.
        """
        not_finite = proposals.not_finite.any(dim=1, keepdim=True).long()
        host, left = torch.cat([not_finite, proposals.tokens[:, :-1]], dim=1).tolist(), rows.left
        crossed: list[list[int]] = []
        offers: dict[int, Offer] = {}
        for (bad, *tokens), count, row in zip(host, proposals.counts, self.stream.live, strict=True):
            if not count:
                crossed.append([])
                continue
            if bad and drafting[row]:
                raise logits_error("pilot", rows.lengths[row], row)
            self._written[row] = self._written[row] + tokens
            if drafting[row]:
                new, over = self.bridge.offer(row, tokens)
                offers[row] = Offer(new[: left[row]], over if len(new) <= left[row] else None)
                crossed.append(offers[row].tokens)
            else:
                crossed.append(self.bridge.guess(row, tokens)[: left[row]])
        width = self.stream.workspace.padded(max(map(len, crossed)))
        values = [new + [FREE] * (1 + width - len(new)) for new in crossed]
        padded = torch.tensor(values, device="cpu").to(rows.device, non_blocking=True)
        return Proposals(padded, torch.zeros_like(padded, dtype=torch.bool), [None] * width, [*map(len, crossed)], offers)
