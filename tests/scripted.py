"""A language model whose next-token logits are looked up, so that a test can place the switch where it wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCABULARY = 16
POSITIONS = 96
PAD, EOS, PILOT_EOS = 0, 1, 2


class ScriptedConfig(PreTrainedConfig):
    model_type = "wsd_scripted"

    def __init__(self, vocab_size: int = VOCABULARY, max_position_embeddings: int = POSITIONS, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 1
        self.num_attention_heads = 1
        self.hidden_size = 1
        super().__init__(**kwargs)


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """Logits at a position depend on the position and on the last two tokens; the cache holds the token ids themselves.

    The token before last is read from the cache, so a cache that lost or gained a token changes the text.
    """

    config_class = ScriptedConfig
    _supports_sdpa = True

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__(config)
        vocabulary, positions = config.vocab_size, config.max_position_embeddings
        self.table = torch.nn.Parameter(torch.zeros(positions, vocabulary, vocabulary), requires_grad=False)
        self.before = torch.nn.Parameter(torch.zeros(vocabulary, vocabulary), requires_grad=False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        tokens = input_ids
        if past_key_values is not None:
            state = input_ids[:, None, :, None].to(self.table.dtype)
            tokens = past_key_values.update(state, state, 0)[0][:, 0, :, 0].long()
        if position_ids is None:
            mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
            position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        previous = torch.nn.functional.pad(tokens, (1, 0))[:, -input_ids.shape[1] - 1 : -1]
        previous = torch.where(position_ids == 0, 0, previous)
        logits = self.table[position_ids, input_ids] + self.before[previous]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def scripted_model(seed: int = 0, *, spread: float = 2.0, eos: int | None = EOS, **config: Any) -> ScriptedModel:
    """A table of random logits; pad and the EOS ids come up only where a script puts them."""
    model = ScriptedModel(ScriptedConfig(**config)).eval()
    random = torch.Generator().manual_seed(seed)
    model.table.copy_(spread * torch.randn(model.table.shape, generator=random))
    model.before.copy_(0.1 * spread * torch.randn(model.before.shape, generator=random))
    model.table[:, :, [PAD, EOS, PILOT_EOS]] -= 60.0
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=PAD, bos_token_id=None)
    return model


def write(model: ScriptedModel, prompt: Sequence[int], tokens: Sequence[int]) -> ScriptedModel:
    """Makes the model write exactly `tokens` after `prompt` when it decodes greedily."""
    for position, (last, token) in enumerate(_steps(prompt, tokens), start=len(prompt) - 1):
        model.table[position, last, token] += 200.0
    return model


def believe(
    model: ScriptedModel, prompt: Sequence[int], tokens: Sequence[int], probabilities: Sequence[float]
) -> ScriptedModel:
    """Makes the model give `tokens`, written after `prompt`, these probabilities.

    Args:
        model: changed in place.
        prompt: its length places the tokens.
        tokens: of the draft.
        probabilities: of the first tokens; the others keep what they have.
    """
    for index, ((last, token), probability) in enumerate(zip(_steps(prompt, tokens), probabilities, strict=False)):
        position = len(prompt) - 1 + index
        before = prompt[-2] if index == 0 else (prompt[-1] if index == 1 else tokens[index - 2])
        logits = model.table[position, last] + model.before[before]
        others = torch.cat([logits[:token], logits[token + 1 :]]).double().logsumexp(dim=0)
        wanted = torch.logit(torch.tensor(probability, dtype=torch.float64)) + others
        model.table[position, last, token] = wanted - model.before[before, token]
    return model


def _steps(prompt: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([prompt[-1], *tokens], tokens, strict=False))
