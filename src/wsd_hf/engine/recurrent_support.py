"""Self-test of a recurrent model: whether it can be rewound to snapshots, and what it can be fed at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .. import _compat
from .checks import not_finite, vocabulary_size
from .recurrent_stream import RecurrentStream
from .self_test import bare_copy, close

PROMPT = 4
"""Tokens of a text that are fed first."""

TOKENS = 10
"""Tokens of a text."""


class Verdict(NamedTuple):
    """Result of a self-test."""

    reads_blocks: bool
    """True if the model continues from its state with several tokens at once."""
    failure: str | None
    """Reason against any stream, as the predicate of a sentence about the model."""


_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, Verdict]] = weakref.WeakKeyDictionary()
_verdicts_lock = threading.Lock()


def is_recurrent(model: PreTrainedModel) -> bool:
    """True if some layers keep a state instead of keys and values."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError):  # a config or type of layer for which transformers has no such cache
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def recurrent_self_test(model: PreTrainedModel) -> Verdict:
    """Compares logits of a stream with those of a forward without a cache; the verdict is kept while dtype and device last."""
    circumstances = (model.device, model.dtype, _compat.attention_implementation(model))
    with _verdicts_lock:
        known = _verdicts.get(model)
    if known is not None and known[0] == circumstances:
        return known[1]
    verdict = _test(model)
    with _verdicts_lock:
        _verdicts[model] = circumstances, verdict
    return verdict


def reads_single_tokens(name: str, model: PreTrainedModel) -> str | None:
    """The reason against checking proposals with a model, which `name` refers to, that reads them one by one; else None."""
    if is_recurrent(model) and not recurrent_self_test(model).reads_blocks:
        return f"the {name} continues from its state one token at a time, so that it can't check several proposals at once"
    return None


def _test(model: PreTrainedModel) -> Verdict:
    unknown = {type(layer) for layer in DynamicCache(config=model.config).layers} - _compat.REWINDABLE_LAYERS
    if unknown:
        return Verdict(False, f"keeps its past in a {min(layer.__name__ for layer in unknown)}, which can't be rewound")
    shape, random = (2, TOKENS), torch.Generator("cpu").manual_seed(0)
    texts = torch.randint(vocabulary_size(model), shape, generator=random, device="cpu")
    failure = "has other logits on a rewound cache than without a cache"
    bare = bare_copy(model, {})
    with torch.no_grad():
        try:
            wanted = bare(input_ids=texts.to(_compat.input_device(model)), use_cache=False).logits.float()
        except Exception as error:
            return Verdict(True, f"raises {type(error).__name__} without a cache")
        if not_finite(wanted).any():
            return Verdict(True, None)
        for reads_blocks in (True, False):
            stream = RecurrentStream(bare, texts[:, :PROMPT].tolist(), reads_blocks)
            try:
                if all(close(logits, reference, model) for logits, reference in _read(stream, texts, wanted)):
                    return Verdict(reads_blocks, None)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failure = f"raises {type(error).__name__} on a cache that is rewound"
    return Verdict(False, failure)


def _read(stream: RecurrentStream, texts: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of two texts, and those of the same tokens without a cache, [tokens, vocabulary] each.

    Both are fed their prompt and a token. Then the first is fed a block of three tokens, of which the second rejects all, and
    both read on from their different lengths.
    """
    (first, second), begin = texts.tolist(), PROMPT + 1
    block = stream.block(texts[:, :PROMPT].tolist())
    for logits, reference in zip(stream.logits(block, 1), wanted, strict=True):
        yield logits, reference[PROMPT - 1 : PROMPT]
    for logits, reference in zip(stream.logits(block.then(texts[:, PROMPT].to(stream.device)), 1), wanted, strict=True):
        yield logits, reference[PROMPT:begin]
    proposals = texts[:1, begin : begin + 3].expand(2, -1)
    yield stream.logits(stream.block([[], []], proposals, [3, 3]), 3)[0], wanted[0, begin : begin + 3]
    stream.rewind(1, 1)
    block = stream.block([first[begin + 3 : begin + 4], second[begin : begin + 3]])
    logits = stream.logits(block, 1)
    yield logits[0], wanted[0, begin + 3 : begin + 4]
    yield logits[1], wanted[1, begin + 2 : begin + 3]
    block = block.then(torch.tensor([first[begin + 4], second[begin + 3]], device=stream.device))
    logits = stream.logits(block, 1)
    yield logits[0], wanted[0, begin + 4 : begin + 5]
    yield logits[1], wanted[1, begin + 3 : begin + 4]
