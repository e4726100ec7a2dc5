"""One call of `generate`, prepared up to its decoding loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .. import _compat
from ..text.streaming import Likelihoods, put_tokens, takes_likelihoods
from .small_model import Prompt, SmallModel


@dataclass(frozen=True)
class Call:
    """One call of `generate`, checked and prepared by transformers up to its decoding loop.

    Attributes:
        base: the model that generates.
        input_ids: its prompts, padded on the left, [batch, prompt].
        attention_mask: [batch, prompt], or None if nothing is padded.
        processors: shape the base's choice, warpers included.
        criteria: end a response.
        generation_config: complete.
        partners: the small models, by how their arguments begin: "assistant", "reference".
        tokenizer: the base's, if it was passed.
        model_kwargs: further arguments of transformers' own loop.
        streamer: holds the prompt already; gets tokens through `stream`, and is ended by the caller.
        fills_cache: whether a cache was passed, which is to hold the tokens afterwards.
    """

    base: PreTrainedModel
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    partners: Mapping[str, SmallModel]
    tokenizer: PreTrainedTokenizerBase | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    streamer: BaseStreamer | None = None
    fills_cache: bool = False

    @property
    def pilot(self) -> SmallModel:
        """The small aligned model."""
        return self.partners["assistant"]

    @property
    def reference(self) -> SmallModel:
        """The pilot before its tuning."""
        return self.partners["reference"]

    @property
    def budget(self) -> int:
        """Most tokens of a response."""
        return int(self.generation_config.max_length) - self.input_ids.shape[1]

    @property
    def pad_token_id(self) -> int:
        """Fills a row after its response's end; any token where nothing is padded."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if pad is not None:
            return int(pad)
        return 0 if eos is None else int(torch.as_tensor(eos, device="cpu").flatten()[0])

    @property
    def copies(self) -> int:
        """Rows that are generated for each prompt of the caller."""
        return self.generation_config.num_return_sequences or 1

    @property
    def prompt(self) -> Prompt:
        """The prompts with a mask, also where nothing is padded."""
        mask = self.attention_mask
        return Prompt(self.input_ids, _compat.whole_mask(self.input_ids, self.generation_config) if mask is None else mask)

    @property
    def takes_likelihoods(self) -> bool:
        """True if the streamer takes the likelihoods of tokens."""
        return takes_likelihoods(self.streamer)

    def stream(self, tokens: torch.Tensor, by_pilot: torch.Tensor | None = None, likelihoods: Likelihoods = None) -> None:
        """Hands the next token of every row, LongTensor[batch] on the CPU, to the streamer; `put_tokens` has the arguments."""
        if self.streamer is not None:
            put_tokens(self.streamer, tokens, by_pilot, likelihoods)
