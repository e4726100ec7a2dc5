"""What Weak-to-Strong Decoding should give, composed from two plain `generate` calls of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Expected:
    """One response.

    Attributes:
        tokens: its ids, without padding.
        draft_length: how many of them the pilot wrote.
        reason: why no more.
    """

    tokens: list[int]
    draft_length: int
    reason: str


def ones(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids)


def eos_ids(model: PreTrainedModel) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def plain_tokens(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> list[int]:
    """The new tokens of plain greedy decoding, batch of one."""
    if max_new_tokens < 1:
        return []
    out = model.generate(ids, attention_mask=ones(ids), max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return out[0, ids.shape[1] :].tolist()


def first_crossing(base: PreTrainedModel, ids: torch.Tensor, draft: list[int], threshold: float, window: int) -> int | None:
    """The switch index of a draft, from one forward over prompt and draft."""
    whole = torch.cat([ids, torch.tensor([draft], dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = base(whole, attention_mask=ones(whole)).logits[0].double()
    log_probs = [logits[ids.shape[1] - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(draft)]
    for end in range(window, len(draft) + 1):
        if math.fsum(log_probs[end - window : end]) / window >= math.log(threshold):
            return end
    return None


def compose(
    base: PreTrainedModel,
    pilot: PreTrainedModel,
    ids: torch.Tensor,
    *,
    threshold: float,
    window: int,
    max_new_tokens: int,
    limit: int = 512,
    draft_end: str = "continue",
    pilot_ids: torch.Tensor | None = None,
    **base_kwargs: Any,
) -> Expected:
    """One row: the pilot's greedy prefix up to the first crossing, then the base's own greedy text.

    Args:
        base: the untouched base.
        pilot: the untouched pilot.
        ids: the base's prompt without padding, [1, prompt].
        threshold: γ.
        window: w.
        max_new_tokens: of the whole response.
        limit: most tokens of the draft.
        draft_end: as in `WSDConfig`.
        pilot_ids: the pilot's prompt without padding, [1, prompt]; default: the base's.
        base_kwargs: for the base's `generate`.
    """
    ends = eos_ids(base) | eos_ids(pilot)
    pilot_ids = ids if pilot_ids is None else pilot_ids
    draft = plain_tokens(pilot, pilot_ids, min(limit, max_new_tokens), eos_token_id=sorted(ends) or None)
    ended = bool(draft) and draft[-1] in ends
    if ended:
        draft.pop()
    reason = "draft_ended" if ended else "draft_limit" if len(draft) == limit else "budget"
    crossing = first_crossing(base, ids, draft, threshold, window) if draft else None
    if crossing is not None:
        draft, reason = draft[:crossing], "confident"
    room = max_new_tokens - len(draft)
    if draft_end == "stop" and reason in ("draft_ended", "draft_limit"):
        rest = [min(eos_ids(base))][:room]
    else:
        rest = plain_tokens(base, torch.cat([ids, torch.tensor([draft], dtype=torch.long)], dim=1), room, **base_kwargs)
    return Expected(draft + rest, len(draft), reason)


def left_padded(rows: list[torch.Tensor], pad: int, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, n] of several lengths as one batch: ids and mask, each [batch, longest or width]."""
    width = max(width, *(row.shape[1] for row in rows))
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(ones(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


def response(row: torch.Tensor, prompt_length: int, expected: Expected, pad: int) -> list[int]:
    """A returned row's new tokens; whatever stands behind the expected ones must be padding."""
    tokens: list[int] = row[prompt_length:].tolist()
    length = len(expected.tokens)
    assert all(token == pad for token in tokens[length:]), f"{tokens} goes on behind {expected.tokens}"
    return tokens[:length]


def random_prompt(seed: int, length: int, vocabulary: int = 64) -> torch.Tensor:
    """A prompt without special tokens, LongTensor[1, length]."""
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
