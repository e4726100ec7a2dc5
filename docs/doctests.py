"""Shows the doctests of docstrings as code in the reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

BLOCK = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)
"""A doctest: from its first prompt to an empty line."""


class Doctests(Extension):
    """Puts each doctest in a block of code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Changes the docstring of an object that was read."""
        if obj.docstring:
            obj.docstring.value = BLOCK.sub(lambda block: f"```pycon\n{block[0]}\n```", obj.docstring.value)
