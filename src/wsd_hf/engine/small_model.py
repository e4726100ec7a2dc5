"""The small models beside the base, as the arguments of `generate` describe them, and the prompts that they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import WSDValueError
from ..text.token_texts import plain_text
from .checks import check_causal, check_kind, check_prompt, check_token_ids, known_ids


class Prompt(NamedTuple):
    """The prompts of a batch for one model, padded on the left."""

    input_ids: torch.Tensor
    """[batch, prompt]."""
    attention_mask: torch.Tensor
    """[batch, prompt]."""


@dataclass(frozen=True)
class SmallModel:
    """A small model beside the base, as arguments of `generate` describe it: `*_model`, `*_input_ids`, `*_attention_mask`.

    Raises:
        WSDValueError: no causal model (`check_causal`), a mask without its prompt, tensors or tokenizers of another type.
    """

    name: str
    """How its arguments begin: "assistant" or "reference"."""
    model: PreTrainedModel
    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", check_causal(f"{self.name}_model", self.model))
        if self.attention_mask is not None and self.input_ids is None:
            ids, mask = f"{self.name}_input_ids", f"{self.name}_attention_mask"
            raise WSDValueError(f"{mask} belongs to {ids}, which is missing: pass both or neither")
        check_token_ids(f"{self.name}_input_ids", self.input_ids)
        check_kind(f"{self.name}_attention_mask", self.attention_mask, torch.Tensor)
        check_kind(f"{self.name}_tokenizer", self.tokenizer, PreTrainedTokenizerBase)

    def prompt(
        self, base_prompt: Prompt, copies: int, tokenizer: PreTrainedTokenizerBase | None, one_vocabulary: bool
    ) -> Prompt:
        """Prompt that was given, `copies` times, else the base's own, or the same text in the model's tokens; checked."""
        ids, mask, blamed = self.input_ids, self.attention_mask, f"{self.name}_input_ids"
        if ids is not None:
            mask = torch.ones_like(ids) if mask is None else mask
            prompt = Prompt(ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0))
        elif one_vocabulary or tokenizer is None or self.tokenizer is None:
            prompt, blamed = base_prompt, "input_ids"
        else:
            # Special tokens mean nothing to another model: they are left out, and its tokenizer adds its own.
            texts = [plain_text(tokenizer, row[real.bool()].tolist()) for row, real in zip(*base_prompt, strict=True)]
            rows: list[list[int]] = [self.tokenizer.encode(text) for text in texts]
            prompt, blamed = Prompt(*left_padded(rows, base_prompt.input_ids.device)), "the text of input_ids"
        check_prompt(blamed, prompt.input_ids, prompt.attention_mask, rows=len(base_prompt.input_ids))
        return Prompt(known_ids(blamed, *prompt, f"{self.name}_model", self.model), prompt.attention_mask)


def small_models(names: Iterable[str], keywords: Mapping[str, Any]) -> dict[str, SmallModel]:
    """The small models of a call, by name ("assistant", "reference"); one that was given no prompt reads that of the pilot."""
    models: dict[str, SmallModel] = {}
    for name in names:
        model = keywords.get(f"{name}_model")
        if model is None:
            continue
        given = any(keywords.get(f"{name}_{kind}") is not None for kind in ("input_ids", "attention_mask"))
        source = name if given else "assistant"
        input_ids, attention_mask = keywords.get(f"{source}_input_ids"), keywords.get(f"{source}_attention_mask")
        models[name] = SmallModel(name, model, input_ids, attention_mask, keywords.get("assistant_tokenizer"))
    return models


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one tensor and its mask, both [batch, prompt]; the padding may hold any token."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.long, device=device)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
