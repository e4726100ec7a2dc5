"""Which models the fast path knows to be exact for."""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from .. import _compat

FAMILIES = {"falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi3"}
FAMILIES |= {"qwen2", "qwen3"}
"""Model types whose exactness on a ragged cache is tested."""

ATTENTION = {"sdpa", "eager"}


def why_not_model(name: str, model: PreTrainedModel) -> str | None:
    """Why the fast path cannot serve this model; None where it can.

    Args:
        name: "base" or "pilot".
        model: either of a pair.
    """
    family, attention = model.config.model_type, _compat.attention_implementation(model)
    if family not in FAMILIES:
        return f"the {name} is of type {family!r}, which is not among those tested: {', '.join(sorted(FAMILIES))}"
    if attention not in ATTENTION:
        return f"the {name} uses {attention!r} attention: load it with attn_implementation='sdpa'"
    if getattr(model.config, "alibi", False):
        return f"the {name} uses ALiBi, whose positions come from a plain mask"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"the {name} cannot compute logits for the last positions only"
    return None
