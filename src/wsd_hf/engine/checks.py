"""Checks of prompts, models and logits."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from .. import _compat
from ..errors import WSDLogitsError, WSDValueError

INTEGERS = (torch.long, torch.int, torch.short, torch.int8, torch.uint8)
"""Types of token ids; torch hardly computes with its other unsigned ones."""


def eos_token_ids(holder: GenerationConfig | PreTrainedTokenizerBase | None) -> set[int]:
    """End-of-sequence ids of a generation config or tokenizer, which may hold none, one or several."""
    eos = getattr(holder, "eos_token_id", None)
    if eos is None:
        return set()
    return {int(token) for token in torch.as_tensor(eos, device="cpu").flatten()}


def closing_token_id(eos: set[int], vocabulary: int) -> int | None:
    """The EOS id to end a response with: the smallest below the vocabulary size; None if there is none."""
    return min((token for token in eos if 0 <= token < vocabulary), default=None)


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Raises unless a value is None or of one of some types."""
    if value is not None and not isinstance(value, kinds):
        raise WSDValueError(f"{name} is of type {type(value).__name__}: must be a {kinds[0].__name__}")


def check_causal(name: str, model: object) -> PreTrainedModel:
    """A loaded decoder-only language model, taken out of `torch.compile` and PEFT; raises for anything else."""
    rule = "must be a causal language model, already loaded with from_pretrained"
    if not isinstance(model, torch.nn.Module):
        raise WSDValueError(f"{name}={model!r}: {rule}")
    if isinstance(getattr(model, "module", None), torch.nn.Module):
        raise WSDValueError(f"{name} is wrapped in {type(model).__name__}: pass the model inside, which is its .module")
    inner: PreTrainedModel | None = _compat.unwrapped(model)
    if inner is None:
        raise WSDValueError(f"{name} has tuned prompts (PEFT), which are no part of the model: use adapters such as LoRA")
    if not isinstance(inner, GenerationMixin):
        raise WSDValueError(f"{name} is a {type(inner).__name__}: {rule}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise WSDValueError(f"{name} is an encoder-decoder ({type(inner).__name__}): must be a decoder-only model")
    return inner


def check_models(models: Mapping[str, object]) -> dict[str, PreTrainedModel]:
    """All models of a call, by argument, each as `check_causal` returns it; raises if they can't run, or share adapters."""
    inner = {name: check_causal(name, model) for name, model in models.items()}
    for name, model in inner.items():
        if _compat.lacks_weights(model):
            raise WSDValueError(f"{name} has weights on the meta device, which holds no data: load it with from_pretrained")
        if _compat.checkpoints_gradients(model):
            raise WSDValueError(
                f"{name} is in training mode with gradient checkpointing, under which layers ignore their cache: "
                "call its eval() or gradient_checkpointing_disable() before it generates"
            )
    adapters = {name: _compat.adapter_layers(model) for name, model in inner.items()}
    for (name, layers), (other, others) in combinations(adapters.items(), 2):
        if layers & others:
            raise WSDValueError(
                f"{name} and {other} share layers that have adapters (PEFT), so each would run with the other's: load the "
                "weights a second time for one of them, or merge the adapters into a copy (merge_and_unload)"
            )
    return inner


def check_data(arguments: Mapping[str, object]) -> None:
    """Raises if an argument is a tensor without data; `inputs.to(model.device)` makes such for an offloaded model."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise WSDValueError(
                f"{name} is on the meta device, which holds no data: leave it on the CPU if models are offloaded"
            )


def check_token_ids(name: str, input_ids: object) -> None:
    """Raises unless a prompt is None or a tensor of integers, [batch, tokens], with at least one row."""
    check_kind(name, input_ids, torch.Tensor)
    if not isinstance(input_ids, torch.Tensor):
        return
    if input_ids.dtype not in INTEGERS:
        raise WSDValueError(f"{name} is of {input_ids.dtype}: must be token ids, torch.long")
    if input_ids.ndim != 2:
        raise WSDValueError(f"{name} has shape {tuple(input_ids.shape)}: must be [batch, tokens]")
    if not len(input_ids):
        raise WSDValueError(f"{name} has shape {tuple(input_ids.shape)}, an empty batch: must have at least one row")


def known_ids(
    name: str, input_ids: torch.Tensor, attention_mask: torch.Tensor, owner: str, model: PreTrainedModel
) -> torch.Tensor:
    """The prompt, LongTensor[batch, prompt], with 0 for padding that the model lacks; raises if it lacks another id."""
    size, input_ids = vocabulary_size(model), input_ids.long()  # a size may be more than int16 holds
    lacking = (input_ids < 0) | (input_ids >= size)
    unknown = input_ids[lacking & attention_mask.bool().to(input_ids.device)]
    if len(unknown):
        raise WSDValueError(
            f"{name} contains token id {int(unknown[0])}, but the vocabulary of {owner} has {size} tokens: "
            "pass ids made with that model's tokenizer, and of tokens that have an embedding"
        )
    return input_ids.masked_fill(lacking, 0)


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, owner: str, model: PreTrainedModel) -> None:
    """Raises if a tokenizer has more tokens than its model; added tokens do not count, they may lack an embedding."""
    if tokenizer.vocab_size > vocabulary_size(model):
        raise WSDValueError(
            f"{name} has {tokenizer.vocab_size} tokens, and {owner} {vocabulary_size(model)}: pass each model's own tokenizer"
        )


def check_prompt(name: str, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: int) -> None:
    """Raises unless prompt and mask, both [batch, prompt], have `rows` rows, none empty, padded on the left."""
    if input_ids.ndim != 2 or len(input_ids) != rows:
        raise WSDValueError(f"{name} has shape {tuple(input_ids.shape)}: must be [batch, tokens] with {rows} rows")
    if attention_mask.shape != input_ids.shape:
        raise WSDValueError(
            f"the attention mask of {name} has shape {tuple(attention_mask.shape)}: must be {tuple(input_ids.shape)} "
            "(pass the whole prompt, also where past_key_values holds its beginning)"
        )
    if not bool(attention_mask.any(dim=1).all()):
        raise WSDValueError(f"{name} has an empty prompt: every row needs at least one token")
    if not bool(attention_mask[:, -1].all()):
        raise WSDValueError(f"{name} is padded on the right: generation needs padding_side='left'")


def context_size(model: PreTrainedModel) -> int:
    """Number of positions in the model's context; `sys.maxsize` without a limit."""
    stated = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(int(stated), sys.maxsize) if stated and stated > 0 else sys.maxsize  # XLNet's is -1


def rotary(model: PreTrainedModel) -> bool:
    """True if positions are rotations, which reach beyond the context; False if they are a learned table."""
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) is not None


def check_room(name: str, model: PreTrainedModel, attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of tokens that the model's context takes after each prompt, LongTensor[batch]; raises if it takes none."""
    context = context_size(model)
    lengths = attention_mask.sum(dim=1)
    if (longest := int(lengths.max())) >= context:
        raise WSDValueError(
            f"the prompt of the {name} has {longest} tokens and its context holds {context}: shorten the prompt"
        )
    return context - lengths


def vocabulary_size(model: PreTrainedModel) -> int:
    """Width of the model's logits."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def check_shared(token: int, vocabulary: int) -> None:
    """Raises if a token of the pilot is outside of the base's vocabulary, whose size is given."""
    if token >= vocabulary:
        raise WSDValueError(
            f"the pilot drafted token id {token}, but the base's vocabulary has {vocabulary} tokens: "
            "pass a pilot that never writes that token, or a base with an embedding for it"
        )


def check_readable(name: str, tokens: Iterable[int], model: PreTrainedModel) -> None:
    """Raises if a model lacks a token of the response that it is to read; `name` refers to the model."""
    size = vocabulary_size(model)
    if unknown := [token for token in tokens if token >= size]:
        raise WSDValueError(
            f"the {name} is to read token id {unknown[0]} in the response, and its vocabulary has {size} tokens: "
            "forbid the base that text, or that token with suppress_tokens="
        )


def not_finite(logits: torch.Tensor) -> torch.Tensor:
    """Mask of logits with NaN or +inf anywhere, or -inf everywhere; [..., vocabulary] -> BoolTensor[...]."""
    return ~logits.amax(dim=-1).isfinite()


def check_finite(model: str, bad: torch.Tensor, written: list[int]) -> None:
    """Raises if a row is bad, BoolTensor[batch]; `written` are the lengths of the responses before the bad logits."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise logits_error(model, written[row], row)


def logits_error(model: str, written: int, row: int) -> WSDLogitsError:
    """The error for logits that are not finite, after `written` response tokens of a row."""
    return WSDLogitsError(
        f"the {model} returned NaN or infinite logits at response token {written + 1} of row {row}: "
        "check its weights and dtype (float16 overflows where bfloat16 does not), and when sampling the temperature"
    )


def check_drawn(token: int, written: int, row: int) -> None:
    """Raises if a row's token is -1 (see `draw`); `written` is the length of its response before the draw."""
    if token < 0:
        raise WSDLogitsError(
            f"no token can be drawn at response token {written + 1} of row {row}: the call's processors left NaN, "
            "+inf, or -inf for every token; check them, and the temperature"
        )
