"""The parts that pages are made of; each is well-formed as HTML and as XML."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Any

from ..text.visible import html_text
from .style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy: nothing from elsewhere, no form, and no script."""


def document(title: str, body: str, script: str = "", style: str = "") -> str:
    """A whole page, which needs no other file.

    Args:
        title: as text; the heading of the page, too.
        body: as HTML.
        script: of this page, without `<` and `&`; the page's policy allows no other.
        style: CSS of this page, after that of all pages.
    """
    policy, code = POLICY, ""
    if script:
        digest = b64encode(sha256(script.encode()).digest()).decode()
        policy, code = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html_text(policy)}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{html_text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html_text(title)}</h1>\n{body}</main>\n{code}</body>\n</html>\n"
    )


def box(label: str, content: str) -> str:
    """A frame around wide HTML, which scrolls in it by touch, mouse or arrow keys; its label is for screen readers."""
    return f'<div class="box" role="region" aria-label="{html_text(label)}" tabindex="0">\n{content}</div>\n'


def text_cell(text: str) -> str:
    """A cell of a table that shows a text."""
    return f"<td>{html_text(text)}</td>"


def table(
    label: str,
    headings: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Any]]],
    cell: Callable[[Any], str] = text_cell,
) -> str:
    """A table of numbers in a box.

    Args:
        label: see `box`.
        headings: of all columns, as texts.
        rows: each with its heading, which is a text in the first column, and the cells of the others.
        cell: makes the HTML of a cell.
    """
    head = "".join(f'<th scope="col">{html_text(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{html_text(heading)}</th>{"".join(map(cell, cells))}</tr>\n' for heading, cells in rows
    )
    return box(label, f'<table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n')
