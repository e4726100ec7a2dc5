"""Training of a pilot on the beginnings of good answers: the part that a pilot writes before the base takes over."""

from __future__ import annotations

from .recipe import Recipe
from .run import TunedPilot, train_pilot

__all__ = ["Recipe", "TunedPilot", "train_pilot"]
