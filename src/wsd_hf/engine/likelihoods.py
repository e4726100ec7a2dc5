"""Tokens in a model's distributions, which follow from its raw logits."""

from __future__ import annotations

import torch

from ..text.streaming import Likelihood


def of_tokens(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Values of some tokens, [...], among those of a whole vocabulary, [..., V]; for tokens outside of V they mean nothing."""
    return values.gather(-1, tokens.clamp(0, values.shape[-1] - 1)[..., None]).squeeze(-1)


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, [...], by raw logits, [..., V]; those of tokens outside of V mean nothing."""
    return of_tokens(logits.log_softmax(dim=-1), tokens)


def ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Ranks of some tokens, LongTensor[...], by raw logits, [..., V], from 1; those of tokens outside of V mean nothing."""
    return 1 + (logits > of_tokens(logits, tokens)[..., None]).count_nonzero(dim=-1)


def likelihoods_of(logits: torch.Tensor, tokens: torch.Tensor) -> list[Likelihood]:
    """Of one token in every row, LongTensor[rows], by raw logits, [rows, V]."""
    return list(map(Likelihood, log_probs(logits, tokens).tolist(), ranks(logits, tokens).tolist()))
