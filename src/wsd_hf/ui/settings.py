"""Settings of the page, which its address holds so that a link reproduces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from ..pair import Pair
from ..serving.requests import ChatRequest
from ..strategies import STRATEGIES
from ..strategies.wsd.config import WSDConfig
from ..text.chat import Messages

ALONE = {"base": "Base alone", "pilot": "Pilot alone"}
"""Methods that are no strategy, with their headings."""

HEADINGS = {
    **ALONE,
    "wsd": "Weak-to-strong",
    "two_way": "Two-way",
    "nudging": "Nudging",
    "emulated_fine_tuning": "Emulated fine-tuning",
    "product": "Product",
    "ensemble": "Ensemble",
    "blend": "Blend",
}
"""Methods that the page can show, with their headings; strategies have the names of `generate`."""

BESIDE = tuple(method for method in HEADINGS if method != "wsd")
"""Methods that can answer beside Weak-to-Strong Decoding."""

LIMITS: Mapping[str, tuple[float, float]] = {
    "threshold": (0.01, 1),
    "window_size": (1, 32),
    "max_tokens": (1, 4096),
    "temperature": (0, 2),
    "seed": (0, 2**32 - 1),
}
"""Least and greatest value of each number."""


@dataclass(frozen=True)
class Settings:
    """Settings of a question; the sliders move the first two.

    Attributes:
        threshold, window_size: of the paper's switch rule.
        methods: further methods that answer beside Weak-to-Strong Decoding, of `HEADINGS`.
        max_tokens: most tokens in an answer.
        temperature: of sampling; 0 is greedy.
        seed: of sampling; None: a new sample each time.
        system: a system message, if any.
        slow: whether the answers are shown in slow motion.
    """

    threshold: float = 0.8
    window_size: int = 6
    methods: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    system: str = ""
    slow: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise WSDValueError(f"{name}={value}: must be from {least} to {most}")
        _check_methods(self.methods, BESIDE)

    def check_tokens(self, most: int) -> None:
        """Refuses longer answers than a page allows."""
        if self.max_tokens > most:
            raise WSDValueError(f"max_tokens={self.max_tokens}: must be from 1 to {most}")

    @property
    def shown(self) -> list[str]:
        """All methods that answer, in the order of the page."""
        return [method for method in HEADINGS if method == "wsd" or method in self.methods]

    def texts(self) -> dict[str, str]:
        """All settings, as parameters of an address."""
        return {field.name: _text(getattr(self, field.name)) for field in fields(self)}

    def with_query(self, query: Mapping[str, str], methods: Sequence[str] = BESIDE) -> tuple[Settings, list[str]]:
        """These settings with those of an address, and a message for each that is none; other parameters are left alone.

        An address may ask for fewer tokens, not for more.

        Args:
            query: the address's parameters.
            methods: that the address may name.
        """
        settings, faults = self, []
        for field in fields(self):
            if field.name in query:
                try:
                    value = _parsed(field.name, query[field.name])
                    if field.name == "methods":
                        _check_methods(value, methods)
                    changed = replace(settings, **{field.name: value})
                    changed.check_tokens(self.max_tokens)
                    settings = changed
                except (KeyError, ValueError) as error:
                    fault = error if isinstance(error, WSDValueError) else f"{field.name}={query[field.name]}: no such value"
                    faults.append(f"{fault}; the page's own is used")
        return settings, faults

    def strategy(self, method: str) -> StrategyConfig | None:
        """The strategy of a method; None for the base alone.

        The pilot alone is a draft that the base reads to its end, so that each of its tokens has a probability.
        """
        if method == "base":
            return None
        if method == "pilot":
            most = self.max_tokens
            return WSDConfig(threshold=1.0, window_size=most, max_draft_tokens=most, draft_end="stop")
        kind = STRATEGIES[method]
        if issubclass(kind, WSDConfig):
            return kind(threshold=self.threshold, window_size=self.window_size)
        return kind()

    def request(self, method: str, messages: Messages) -> ChatRequest:
        """The request for a method's answer to a chat."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return ChatRequest(
            [*system, *messages],
            self.strategy(method),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            likelihoods=True,
        )


def available(pair: Pair) -> list[str]:
    """The methods that a pair can answer by beside Weak-to-Strong Decoding."""
    return [method for method in BESIDE if method in ALONE or "reference" not in STRATEGIES[method].partners or pair.reference]


def _check_methods(methods: Sequence[str], known: Sequence[str]) -> None:
    for method in methods:
        if method not in known:
            raise WSDValueError(f"methods={method}: unknown; known are {', '.join(known)}")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _parsed(name: str, text: str) -> Any:
    if name == "methods":
        return tuple(filter(None, text.split(",")))
    if name == "system":
        return text
    if name == "slow":
        return {"true": True, "false": False}[text]
    if name == "seed" and not text:
        return None
    return float(text) if name in ("threshold", "temperature") else int(text)
