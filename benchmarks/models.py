"""Pairs of random weights in real shapes, which agree as often as asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria

import wsd_hf


@dataclass(frozen=True)
class Shape:
    """Sizes that both models share, the number of layers of each, and the length of responses."""

    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int
    pilot_layers: int
    base_layers: int
    dtype: torch.dtype
    device: str
    new_tokens: int
    official_draft: int


CPU = Shape(512, 1408, 8, 8192, 2, 20, torch.float32, "cpu", 96, 512)
GPU = Shape(4096, 14336, 32, 32000, 1, 16, torch.bfloat16, "cuda", 128, 512)

PRESETS = {
    "cpu": CPU,
    "gpu": GPU,
    "gpu-tiny": replace(GPU, hidden=64, feed_forward=128, heads=4, vocabulary=256, base_layers=4, device="cpu", new_tokens=32),
}
"""`gpu-tiny` runs the plan of `gpu` anywhere, to see that it works."""


LOUD = 30.0
"""Size of embeddings beside which layers of random weights add nothing that a head would notice."""


class After(StoppingCriteria):
    """Lets the base take over after a fixed number of drafted tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


class Pair:
    """A base and a pilot of random weights: the base is the pilot's layers and then more.

    One object serves all agreements, so that nothing that was compiled or captured for it is lost.

    Attributes:
        measured: for each agreement that was dialled, the share of positions at which both would write the same next token.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.pilot = build(shape, shape.pilot_layers, seed=0)
        self.base = wsd_hf.enable_wsd(build(shape, shape.base_layers, seed=1))
        self._contexts = torch.randint(3, shape.vocabulary, (8, 32), device=shape.device)
        own = dict(self.pilot.named_parameters())
        for name, weight in self.base.named_parameters():
            if name in own:
                weight.data.copy_(own[name].data)
        extra = self.base.model.layers[shape.pilot_layers :]
        self._weights = [weight for layer in extra for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]
        self._original = [weight.data.clone() for weight in self._weights]
        self._scales: dict[float, float] = {}
        self.measured: dict[float, float] = {}

    def dial(self, agreement: float) -> None:
        """Makes the pair agree about so often, in place: by the scale of the extra layers' output projections.

        A larger one moves the base away from the pilot. For 0 the pilot becomes a stranger, by a head of its own.
        """
        head = self.pilot.lm_head.weight.data
        head.copy_(self.base.lm_head.weight.data)
        if agreement:
            self._scale(self._scales.get(agreement) or self._bisect(agreement))
        else:
            head.copy_(head.roll(1, dims=0))
        self.measured[agreement] = self._measure()

    def write(self, tokens: torch.Tensor, successors: torch.Tensor) -> None:
        """Makes the base write a successor after each of some even tokens and after the token next to it, LongTensor[tokens].

        The pilot writes the token next to the successor: it never agrees. Both models' weights are changed for good.
        """
        self._scale(0.0)
        for model, offset in ((self.base, 0), (self.pilot, 1)):
            embeddings, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
            embeddings.mul_(LOUD / embeddings.std())
            head.zero_()
            head[successors + offset] = (embeddings[tokens] + embeddings[tokens + 1]) / LOUD

    def _bisect(self, agreement: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(10):
            scale = (low + high) / 2
            self._scale(scale)
            low, high = (scale, high) if self._measure() > agreement else (low, scale)
        self._scales[agreement] = scale
        return scale

    def _scale(self, scale: float) -> None:
        for weight, original in zip(self._weights, self._original, strict=True):
            torch.mul(original, scale, out=weight.data)

    @torch.no_grad()
    def _measure(self) -> float:
        """Share of positions, after a few tokens of context, at which both would write the same next token."""
        same = self.base(self._contexts).logits.argmax(-1) == self.pilot(self._contexts).logits.argmax(-1)
        return float(same[:, 8:].float().mean())


def build(shape: Shape, layers: int, seed: int) -> PreTrainedModel:
    """A Llama of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 4,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.05,
    )
    with torch.device(shape.device):
        return LlamaForCausalLM(config).to(shape.dtype).eval()
