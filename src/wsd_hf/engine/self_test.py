"""Self-test of a model: rows of different length on a rewound cache must have the logits of a forward without a cache."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .. import _compat
from .attention import MASKED
from .cache import RaggedCache
from .checks import context_size, not_finite, vocabulary_size
from .cuda_graphs import Workspace
from .joint_calls import joint_forwards
from .ragged_stream import RaggedStream

LONGEST = 20
"""Tokens of a text."""

WINDOW = 8
"""Width of the test's sliding windows and chunks of attention, so that they show in such a text."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Names of these widths in configs and layers."""

REJECTED = 2
"""Tokens that every row is fed, and that its rewind drops."""

ADVANCES = (3, 5, 4)
"""Tokens that each row is fed after its rewind."""

MOST_MASKED = 5
"""Positions of a block with masks; the first block is longer, the second is not, and longer texts are begun causally."""

COMPARED = 9
"""Last tokens of a prompt whose logits are compared."""

SHARDING = ("torch.distributed.", "deepspeed.", joint_forwards.__module__)
"""Modules of the hooks by which ranks gather sharded weights."""

_Circumstances = tuple[torch.device, torch.dtype, str]

_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, tuple[_Circumstances, str | None]] = weakref.WeakKeyDictionary()
_verdicts_lock = threading.Lock()


def failed_self_test(model: PreTrainedModel) -> str | None:
    """The model's failure, as the predicate of a sentence about it; None if it passes.

    Runs four forwards of a copy of the modules without dropout and the caller's hooks, over the same weights, in which
    windows of attention are narrow enough to show. The verdict is kept with the model until its device, dtype or attention
    changes; a model that raises or returns NaN without a cache gets none.
    """
    circumstances = (model.device, model.dtype, _compat.attention_implementation(model))
    with _verdicts_lock:
        known = _verdicts.get(model)
    if known is not None and known[0] == circumstances:
        return known[1]
    bare = bare_copy(model, {})
    plain = bare if circumstances[2] in MASKED else _compat.with_attention(bare, "eager")
    texts = _texts(bare)
    with torch.no_grad():
        try:
            wanted = plain(input_ids=texts.to(_compat.input_device(model)), use_cache=False).logits.float()
        except Exception as error:
            return f"raises {type(error).__name__} without a cache"
        if not_finite(wanted).any():
            return None
        try:
            passed = all(close(logits, reference, model) for logits, reference in _ragged(bare, texts.tolist(), wanted))
            failure = None if passed else "has other logits on a cache with rows of different length than without a cache"
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            failure = f"raises {type(error).__name__} on a cache with rows of different length"
    with _verdicts_lock:
        _verdicts[model] = circumstances, failure
    return failure


def _texts(model: PreTrainedModel) -> torch.Tensor:
    """Two texts of random tokens, [2, tokens]."""
    shape = (2, min(LONGEST, context_size(model)))
    return torch.randint(vocabulary_size(model), shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _ragged(
    model: PreTrainedModel, texts: list[list[int]], wanted: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of each row of two blocks, and those of the same tokens without a cache, [tokens, vocabulary] each.

    After the first block each row is rewound to its prompt, a beginning of a text, and the second continues that text.
    """
    longest = len(texts[0])
    rows = [(0, max(1, longest // 4)), (1, max(1, longest // 2)), (0, max(1, longest * 3 // 4))]
    prompts = [texts[text][:length] for text, length in rows]
    others = [texts[1 - text][:REJECTED] for text, _ in rows]
    stream = RaggedStream(model, prompts, Workspace(RaggedCache(model.config)))
    stream.long = MOST_MASKED
    block = stream.block([*prompts], torch.tensor(others, device="cpu"), [REJECTED] * len(rows), COMPARED)
    logits = stream.logits(block, keep=block.tokens.shape[1])[:, :-REJECTED]
    for row, (text, length) in enumerate(rows):
        count = min(length, COMPARED)
        yield logits[row, -count:], wanted[text, length - count : length]
        stream.rewind(row, 0)
    advances = [texts[text][length : length + more] for (text, length), more in zip(rows, ADVANCES, strict=True)]
    block = stream.block([*advances])
    logits = stream.logits(block, keep=block.tokens.shape[1])
    for row, (text, length) in enumerate(rows):
        count = len(advances[row])
        yield logits[row, logits.shape[1] - count :], wanted[text, length : length + count]


def close(logits: torch.Tensor, wanted: torch.Tensor, model: PreTrainedModel) -> bool:
    """True if most tokens' logits, [tokens, vocabulary], differ by no more than rounding.

    Differences are measured against the spread of a token's logits. Medians, over the vocabulary and over tokens, pass over
    masked entries, and over single tokens that rounding sends to another expert.
    """
    floor = torch.finfo(torch.float32).min
    logits, wanted = (tensor.clamp(min=floor) for tensor in (logits.to(wanted.device), wanted))
    spread = (wanted - wanted.median(dim=-1, keepdim=True).values).abs().median(dim=-1).values
    difference = (logits - wanted).abs().median(dim=-1).values
    return bool((difference <= _tolerance(model) * spread).float().mean() > 0.5)


def _tolerance(model: PreTrainedModel) -> float:
    """Largest difference of a model's logits that rounding explains, as a share of their spread."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if torch.is_autocast_enabled(_compat.input_device(model).type):
        dtypes.add(torch.get_autocast_dtype(_compat.input_device(model).type))
    if torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.bfloat16)
    return min(0.25, max(1e-4, 32 * max(torch.finfo(dtype).eps for dtype in dtypes)))


def bare_copy(module: torch.nn.Module, made: dict[int, Any]) -> Any:
    """A copy of a module over the same weights, in evaluation mode, with narrow windows, without hooks and compiled code.

    Hooks that gather sharded weights stay.
    """
    if id(module) not in made:
        made[id(module)] = bare = object.__new__(type(module))
        state = _narrowed(vars(module), made)
        if _compat.compiled(module):
            state.pop("forward", None)
        state |= {"training": False, "_compiled_call_impl": None}
        state |= {name: _of_ranks(state[name]) for name in ("_forward_hooks", "_forward_pre_hooks")}
        state["_modules"] = {name: child and bare_copy(child, made) for name, child in module._modules.items()}
        vars(bare).update(state)
    return made[id(module)]


def _of_ranks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks without which a model whose weights are sharded over ranks can't run."""
    owners = {key: getattr(getattr(hook, "func", hook), "__module__", None) or "" for key, hook in hooks.items()}
    return OrderedDict((key, hook) for key, hook in hooks.items() if owners[key].startswith(SHARDING))


def _narrowed(attributes: Mapping[str, Any], made: dict[int, Any]) -> dict[str, Any]:
    """Attributes of a module or config with narrow windows, also in the configs among them."""
    narrowed = dict(attributes)
    for name, value in attributes.items():
        if name in WINDOWS and isinstance(value, int):
            narrowed[name] = min(value, WINDOW)
        elif isinstance(value, PretrainedConfig):
            if id(value) not in made:
                made[id(value)] = config = copy.copy(value)
                vars(config).update(_narrowed(vars(value), made))
            narrowed[name] = made[id(value)]
    return narrowed
