"""Stop strings, kept ready: transformers goes through the whole vocabulary for them, in every call."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, StopStringCriteria

KEPT = 8
"""Most sets of stop strings that are kept for a tokenizer."""

Key = tuple[int, tuple[str, ...]]
_kept: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[Key, StopStringCriteria]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def stop_criterion(tokenizer: PreTrainedTokenizerBase, stop_strings: str | Sequence[str]) -> StopStringCriteria:
    """transformers' criterion for some stop strings: slow to make for a large vocabulary, then kept until that grows.

    transformers has a cache of its own, but asks it for the tokens in an order that is another one every time.
    """
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    key = (len(tokenizer), strings)
    with _lock:
        kept = _kept.setdefault(tokenizer, {})
        if key not in kept:
            kept[key] = StopStringCriteria(tokenizer, list(strings))
            while len(kept) > KEPT:
                del kept[next(iter(kept))]
        return copy.copy(kept[key])  # it moves its tensors to the device that asks
