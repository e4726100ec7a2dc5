"""Responses side by side, on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..text.visible import html_text
from .prompts import Record
from .replies import Answer
from .table import Row, shown

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #101010; background: #ffffff; }
table { border-collapse: collapse; margin-bottom: 2em; }
th, td { border: 1px solid #d0d0d0; padding: .4em .7em; text-align: left; vertical-align: top; }
th { background: #f2f2f2; position: sticky; top: 0; }
.numbers td + td { text-align: right; }
.responses { table-layout: fixed; width: 100%; }
.responses td { overflow-wrap: anywhere; }
p { white-space: pre-wrap; margin: 0 0 .5em; }
.role, .score { color: #606060; font-size: 12px; }
"""


def page(
    records: Sequence[Record],
    strategies: Sequence[str],
    answers: Mapping[tuple[int, str], Sequence[Answer]],
    rows: Sequence[Row],
) -> str:
    """The table of numbers, and a line for each prompt that all methods have answered, with a column per method.

    Args:
        records: the prompts.
        strategies: names of the variants.
        answers: by number of the prompt and name of the variant.
        rows: of the table.
    """
    headings, cells = shown(rows)
    responses = [
        [_chat(record), *("".join(map(_response, answers[number, name])) for name in strategies)]
        for number, record in enumerate(records)
        if all((number, name) in answers for name in strategies)
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>wsd-hf compare</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + _table("numbers", headings, [[html_text(cell) for cell in row] for row in cells])
        + _table("responses", ["prompt", *strategies], responses)
        + "</body>\n</html>\n"
    )


def _table(kind: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html_text(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in cells)
    return f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n'


def _chat(record: Record) -> str:
    return "".join(
        f'<div class="role">{html_text(message["role"])}</div><p>{html_text(message["content"])}</p>'
        for message in record["messages"]
    )


def _response(answer: Answer) -> str:
    scores = "".join(f'<div class="score">{html_text(judge)} {score:g}</div>' for judge, score in answer.scores.items())
    return (answer.html or f"<p>{html_text(answer.response)}</p>") + scores
