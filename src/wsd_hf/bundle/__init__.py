"""Model folders that decode with a pilot: `pack` writes one, and the code in it calls `generate`."""

from .decoding import generate
from .packing import Packed, pack

__all__ = ["Packed", "generate", "pack"]
