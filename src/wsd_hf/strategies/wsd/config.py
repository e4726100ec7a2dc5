"""What decides a Weak-to-Strong Decoding run: threshold, window, draft limit, and what happens when a draft runs out."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import GenerationConfig

from ... import _compat
from ...engine.numbers import check_positive_integer, check_probability
from ...errors import WSDValueError

PREFIX = "wsd_"

MOST_PROPOSALS = 64
"""Most tokens that a pilot may be set to propose at a time: all of them are held, and forwards run, before any is checked."""


DraftEnd = Literal["continue", "stop"]
Engine = Literal["auto", "fast", "step"]


@dataclass(frozen=True)
class WSDConfig:
    """Settings of Weak-to-Strong Decoding; the defaults are the paper's (arXiv 2506.07434).

    Args:
        threshold: γ in (0, 1]. The base takes over at the first drafted token where its confidence reaches γ.
        window_size: w >= 1. Confidence is the geometric mean of the base's probabilities of the last w drafted tokens.
        max_draft_tokens: most tokens the pilot may write, >= 1. A limit below the window is legal, can never switch,
            and warns.
        draft_end: when the draft ends unconfirmed (by the pilot's EOS or the limit), `"continue"` lets the base write
            on, as the paper does; `"stop"` ends the response there with the base's EOS.
        engine: `"auto"` takes the fast path wherever it is known to be exact, else the step-by-step path; `"fast"` and
            `"step"` force one. Greedy responses are the same. Forcing `"fast"` vouches for processors and criteria of your own:
            they must depend on the prefix that they are shown, and not on earlier calls.
        speculate: on the fast path, let the pilot go on proposing after the switch; the base keeps what it would have
            written itself, so responses (when sampling: their distribution) are the same, in fewer forwards.
        chunk: on the fast path, how many tokens the pilot proposes at a time, 1 to 64; None adapts to how often it is right.
        cuda_graphs: on the fast path, capture forwards as CUDA graphs where models allow it. They and their caches are kept
            for later calls, in at most an eighth of the device's memory.

    Raises:
        WSDValueError: naming the field, the value and the rule.

    >>> WSDConfig(threshold=0.9).threshold
    0.9
    >>> WSDConfig(window_size=0)
    Traceback (most recent call last):
    wsd_hf.errors.WSDValueError: window_size=0: must be an integer of at least 1
    """

    threshold: float = 0.8
    window_size: int = 6
    max_draft_tokens: int = 512
    draft_end: DraftEnd = "continue"
    engine: Engine = "auto"
    speculate: bool = True
    chunk: int | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_probability("threshold", self.threshold))
        for name in ("window_size", "max_draft_tokens"):
            object.__setattr__(self, name, check_positive_integer(name, getattr(self, name)))
        switches = {"speculate": (True, False), "cuda_graphs": (True, False)}
        for name, choices in {"draft_end": get_args(DraftEnd), "engine": get_args(Engine), **switches}.items():
            if getattr(self, name) not in choices:
                raise WSDValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(map(repr, choices))}")
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_positive_integer("chunk", self.chunk, MOST_PROPOSALS))
        if self.window_size > self.max_draft_tokens:
            warnings.warn(
                f"window_size={self.window_size} is larger than max_draft_tokens={self.max_draft_tokens}: "
                "the base can never become confident, so every draft runs to its end",
                UserWarning,
                stacklevel=3,
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings under their `GenerationConfig` keys (`wsd_threshold`, ...).

        >>> WSDConfig().to_dict()["wsd_window_size"]
        6
        """
        return {PREFIX + name: value for name, value in asdict(self).items()}

    def to_generation_config(self, generation_config: GenerationConfig) -> GenerationConfig:
        """A copy of `generation_config` that carries these settings, also through `save_pretrained`.

        >>> saved = WSDConfig(threshold=0.7).to_generation_config(GenerationConfig())
        >>> WSDConfig.resolve({}, None, saved).threshold
        0.7
        """
        return _compat.with_custom_entries(generation_config, self.to_dict())

    @classmethod
    def resolve(
        cls, keywords: Mapping[str, Any], wsd_config: WSDConfig | None, *generation_configs: GenerationConfig | None
    ) -> WSDConfig:
        """The settings of one call: `wsd_*` keyword > `wsd_config` > generation configs in the order given > default.

        Args:
            keywords: `wsd_*` keywords of the call; None counts as not given.
            wsd_config: settings passed as one object, or None.
            generation_configs: the call's and then the model's.
        """
        known = {PREFIX + field.name: field.name for field in fields(cls)}
        if wsd_config is not None and not isinstance(wsd_config, cls):
            raise WSDValueError(f"wsd_config={wsd_config!r}: must be a WSDConfig")
        sources = [keywords]
        sources += [wsd_config.to_dict()] if wsd_config else [vars(config) for config in generation_configs if config]
        for source in sources:
            for key in sorted(key for key in source if key.startswith(PREFIX) and key not in known):
                kind = "keyword" if source is keywords else "key of a generation config"
                near = difflib.get_close_matches(key, known, n=1)
                raise WSDValueError(
                    f"{key}: unknown {kind}; known are {', '.join(known)}" + (f"; {near[0]} is near" if near else "")
                )
        values: dict[str, Any] = {}
        for source in reversed(sources):
            values |= {name: source[key] for key, name in known.items() if source.get(key) is not None}
        return cls(**values)
