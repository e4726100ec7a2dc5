"""Responses side by side, on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..pages.document import document, table
from ..text.visible import html_text
from .prompts import Record
from .replies import Answer
from .table import Row, score_headings, shown

SCRIPT = """
const search = document.querySelector("#search");
const methods = [...document.querySelectorAll("#methods input")];
const prompts = [...document.querySelectorAll("article")];
function show() {
  for (const method of methods)
    for (const answer of document.querySelectorAll(`[data-method="${method.value}"]`)) answer.hidden = !method.checked;
  const wanted = search.value.trim().toLowerCase();
  for (const prompt of prompts) {
    const texts = [...prompt.querySelectorAll(".label, header p, section:not([hidden]) p")];
    prompt.hidden = !texts.some(text => text.textContent.toLowerCase().includes(wanted));
  }
  const found = prompts.filter(prompt => !prompt.hidden).length;
  document.querySelector("#found").textContent = `${found} of ${prompts.length} prompts`;
}
document.querySelector("#controls").hidden = false;
document.querySelector("#controls").addEventListener("input", show);
show();
"""
"""Shows the prompts that hold the searched text, in themselves or in a shown answer, and the answers of the ticked methods."""


def page(
    records: Sequence[Record],
    strategies: Sequence[str],
    answers: Mapping[tuple[int, str], Sequence[Answer]],
    rows: Sequence[Row],
) -> str:
    """The table of numbers, and each prompt that all methods have answered, with the methods' answers side by side.

    Args:
        records: the prompts.
        strategies: names of the variants.
        answers: by number of the prompt and name of the variant.
        rows: of the table.
    """
    headings, lines = shown(rows)
    articles = [
        _article(number, record, {name: answers[number, name] for name in strategies})
        for number, record in enumerate(records)
        if all((number, name) in answers for name in strategies)
    ]
    costs = table("Costs and scores of each method", headings, [(name, cells) for name, *cells in lines])
    body = [costs, "<h2>Answers</h2>\n", _controls(strategies), *articles]
    return document("wsd-hf compare", "".join(body), SCRIPT)


def _controls(strategies: Sequence[str]) -> str:
    """Search and choice of methods, hidden unless the script runs."""
    boxes = "".join(
        f'<label><input type="checkbox" value="{number}" checked="checked"/> {html_text(name)}</label>\n'
        for number, name in enumerate(strategies)
    )
    return (
        '<div id="controls" class="controls" role="search" hidden="hidden">\n'
        '<input type="search" id="search" placeholder="Search" aria-label="Search prompts and answers"/>\n'
        f'<fieldset id="methods"><legend>Show</legend>\n{boxes}</fieldset>\n'
        '<output id="found" class="muted"></output>\n</div>\n'
    )


def _article(number: int, record: Record, answers: Mapping[str, Sequence[Answer]]) -> str:
    kind = record.get("kind")
    label = f' <b class="label">{html_text(kind)}</b>' if isinstance(kind, str) else ""
    chat = "".join(
        f'<div class="muted">{html_text(message["role"])}</div><p class="text">{html_text(message["content"])}</p>\n'
        for message in record["messages"]
    )
    columns = "".join(
        f'<section data-method="{column}"><h4>{html_text(name)}</h4>{"".join(map(_response, given))}</section>\n'
        for column, (name, given) in enumerate(answers.items())
    )
    return (
        f"<article>\n<header>\n<h3>Prompt {number + 1}{label}</h3>\n{chat}</header>\n"
        f'<div class="columns" role="region" aria-label="Answers to prompt {number + 1}" tabindex="0">\n{columns}</div>\n'
        "</article>\n"
    )


def _response(answer: Answer) -> str:
    headings = score_headings(answer.scores)
    scores = "".join(
        f'<div class="muted">{html_text(headings[judge])} {score:g}</div>'
        for judge, score in answer.scores.items()
        if score is not None
    )
    text = answer.html or f'<p class="text">{html_text(answer.response)}</p>'
    return f'<div class="answer">{text}{scores}</div>'
