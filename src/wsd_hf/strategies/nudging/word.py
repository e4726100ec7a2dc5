"""A word, as the pilot's tokens spell it."""

from __future__ import annotations

import re

from ...text.settled_tokens import ContinuationTokenizer

LONGEST = 16
"""Tokens of the pilot after which a word counts as complete, for scripts without spaces."""

FIRST_WORD = re.compile(r" *[^ ]+(?= )")


def completes_word(encoder: ContinuationTokenizer, word: list[int], following: int) -> bool:
    """True if the token after a word begins the next one; `encoder` is that of the pilot's tokens."""
    first = FIRST_WORD.match(encoder.decode([*word, following]))
    return first is not None and first.end() <= len(encoder.decode(word))
