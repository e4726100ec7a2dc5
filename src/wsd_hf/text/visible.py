"""Text made safe to show on a terminal, and in XML and HTML."""

from __future__ import annotations

import html
import re

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters but tab and newline, which a terminal obeys; bidirectional embeddings, overrides and isolates, which
reorder the text after them; surrogates and noncharacters, which UTF-8 or XML can't hold."""


def visible(text: str) -> str:
    """Replaces each character in `UNSAFE` by a visible form: a control picture, or else a backslash escape.

    >>> print(visible("red: \\x1b[31m, CSI: \\x9b"))
    red: ␛[31m, CSI: \\x9b
    """
    return UNSAFE.sub(_form, text)


def html_text(text: str) -> str:
    """Visible and escaped form of a text, for HTML and XML: as content, or in a quoted attribute."""
    return html.escape(visible(text))


def _form(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else found[0].encode("ascii", "backslashreplace").decode()
