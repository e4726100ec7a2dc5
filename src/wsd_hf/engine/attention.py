"""Attention of ragged blocks without copies of keys and values, in a twin of the model whose config is the user's but for that.

transformers' own attention copies keys and values once for each query head that shares them as soon as a mask is given, and
flash attention takes no mask. A twin is made of shallow copies of the model's modules, over its weights, buffers and hooks;
nothing of the user's model or config is written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from .. import _compat

MASKED = {"sdpa", "eager"}
"""Attention of transformers that takes masks."""

NAME = "wsd_hf"
"""Name of this attention in a twin's config."""

WITHOUT_FORM = "wsd_hf_sdpa"
"""The same for models that are loaded with sdpa, which has neither bounded scores nor sinks."""

QUERIES = 256
"""Most queries of a long block whose mask, and whose scores if they have a form of their own, are held at a time."""

HARMLESS = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "logits_to_keep", "return_dict"}
HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits"}
"""Keywords of attention functions in transformers that change nothing here: the masks hold what they describe."""


class Form(NamedTuple):
    """Scores of one layer's attention."""

    scaling: float
    dropout: float
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def in_torch(self) -> bool:
        """True if torch's own function computes it."""
        return self.softcap is None and self.sinks is None


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in transformers' form.

    Args:
        query: [batch, heads, q, head_dim].
        key, value: [batch, shared heads, slots, head_dim].
        attention_mask: an additive mask from `attention_masks`, or integers from `attention_spans`.
        softcap: bound of the scores (Gemma 2).
        s_aux: score of an additional key without a value, for each head (gpt-oss).

    Returns:
        [batch, q, heads, head_dim], and None for the attention weights.

    Raises:
        NotImplementedError: a keyword that may change the scores in another way.
    """
    if unknown := [name for name, setting in kwargs.items() if setting is not None and name not in HARMLESS]:
        raise NotImplementedError(f"attention with {unknown[0]}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = Form(scaling, dropout, softcap, s_aux)
    if attention_mask.is_floating_point():
        output = _packed(query, key, value, attention_mask, form)
    elif form.in_torch and query.shape[2] == key.shape[2] and not attention_mask[..., 0].any():
        # All queries see the keys from the first to their own, so the rows begin with this block.
        output = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        output = torch.cat(
            [
                _packed(queries, key[:, :, low:high], value[:, :, low:high], _seen(spans, low, high, query), form)
                for queries, spans, low, high in _blocks(query, attention_mask, key.shape[2])
            ],
            dim=2,
        )
    return output.transpose(1, 2).contiguous(), None


def sdpa_attention(
    *args: Any, softcap: float | None = None, s_aux: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`ragged_attention` that leaves out what transformers' sdpa leaves out."""
    return ragged_attention(*args, **kwargs)


def _blocks(query: torch.Tensor, spans: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """Blocks of queries, their spans, and the range of keys that any of them sees, if that takes no wait for the device."""
    for begin in range(0, query.shape[2], QUERIES):
        queries, block = query[:, :, begin : begin + QUERIES], spans[:, :, begin : begin + QUERIES]
        within = block.device.type == "cpu"
        yield queries, block, int(block[..., 0].min()) if within else 0, 1 + int(block[..., 1].max()) if within else width


def _seen(spans: torch.Tensor, low: int, high: int, query: torch.Tensor) -> torch.Tensor:
    """Additive mask over the keys from `low` to `high`, for one block of queries."""
    first, last = spans.to(query.device)[..., None].unbind(dim=-2)
    keys = torch.arange(low, high, device=query.device)
    return additive((keys >= first) & (keys <= last), query.dtype)


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, form: Form) -> torch.Tensor:
    """Attention in which query heads that share keys are further positions of one head; [batch, heads, q, head_dim]."""
    batch, heads, positions, _ = query.shape
    shared, mask = key.shape[1], mask.to(query.dtype)
    if positions == 1 and query.is_cuda and form.in_torch:  # several positions are faster packed, one is not
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask[:, :, :1],
            dropout_p=form.dropout,
            scale=form.scaling,
            enable_gqa=heads != shared,
        )
    query = query.reshape(batch, shared, heads // shared * positions, query.shape[-1])
    mask = repeated(mask, positions, heads // shared)
    if form.in_torch:
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=form.dropout, scale=form.scaling)
    else:
        output = _own_scores(query, key, value, mask, form)
    return output.reshape(batch, heads, positions, value.shape[-1])


def _own_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, form: Form) -> torch.Tensor:
    """Attention with bounded scores or sinks, which no kernel of torch has, in the arithmetic of transformers' eager one."""
    scores = query @ key.transpose(2, 3) * form.scaling
    if form.softcap is not None:
        scores = (scores / form.softcap).tanh() * form.softcap
    scores = scores + mask
    if form.sinks is not None:
        positions = query.shape[2] * key.shape[1] // len(form.sinks)
        column = form.sinks.repeat_interleave(positions).view(1, key.shape[1], -1, 1).expand(len(scores), -1, -1, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype))[..., : key.shape[2]]
    return torch.dropout(weights.to(value.dtype), form.dropout, train=True) @ value


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as it is added to scores: 0 where `seen`, a BoolTensor, else the lowest finite number."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def repeated(mask: torch.Tensor, positions: int, heads: int) -> torch.Tensor:
    """A mask [.., q, slots] once for each of the heads that share keys, [.., heads · q, slots]; it may be repeated already."""
    if mask.shape[2] != heads * positions:
        mask = mask[:, :, :positions]
        mask = mask if positions == 1 else mask.repeat(1, 1, heads, 1)
    return mask


AttentionInterface.register(NAME, ragged_attention)
AttentionInterface.register(WITHOUT_FORM, sdpa_attention)


def heads_per_key(model: PreTrainedModel) -> int:
    """Number of query heads that share a key in most layers, by the config; `repeated` corrects it in others."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    return max(1, int(heads // (getattr(config, "num_key_value_heads", None) or heads)))


def has_twin(model: PreTrainedModel) -> bool:
    """True if a model's attention can be replaced, so that `twin` returns another object."""
    return _compat.routes_attention(model) and not any(
        "forward" in vars(module) or _compat.compiled(module) for module in model.modules()
    )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights and hooks whose attention is `ragged_attention`; the model itself where there is none."""
    if not has_twin(model):
        return model
    return _compat.with_attention(model, WITHOUT_FORM if _compat.attention_implementation(model) == "sdpa" else NAME)
