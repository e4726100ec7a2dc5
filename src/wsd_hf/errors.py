"""The errors this package raises: one root, and a class for each kind of remedy."""

from __future__ import annotations


class WSDError(Exception):
    """Root of every error that wsd_hf raises by itself; errors of the models and of transformers pass through unchanged."""


class WSDValueError(WSDError, ValueError):
    """An argument, a pair of models, or a mode of generation that cannot work; raised before any forward where possible."""


class WSDLogitsError(WSDError, ArithmeticError):
    """A model returned logits from which no token can be chosen (NaN, +inf, or -inf for every token)."""


class WSDHubError(WSDError, OSError):
    """A model that cannot be had from where it should be, is damaged there, or cannot serve; its `__cause__` tells more."""


class WSDServerError(WSDError, OSError):
    """A server that a call needs refuses, fails at every attempt, or stops in the middle.

    Attributes:
        text: of the answer so far; "" if there is none.
        reason: kind of the failure, without the server's address and its own words, which may repeat a prompt.
        role: "base" or "pilot", the server's model; "" before a pair is connected.
    """

    def __init__(self, message: str, text: str = "", reason: str = "", role: str = "") -> None:
        super().__init__(message)
        self.text, self.reason, self.role = text, reason, role
