"""The parts of the page that show answers, as HTML; plain functions of what there is to show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from ..pages.style import PILOT_COLOURS
from ..serving.requests import Piece
from ..strategies.wsd.switch import confidence
from ..text.visible import html_text
from .answers import Answer, Turn
from .curve import curve
from .replay import Recording, counted, recording, verdict
from .settings import HEADINGS, Settings

REASONS = {
    "draft_ended": "the pilot was done before the base became confident",
    "draft_limit": "the draft limit was reached before the base became confident",
    "budget": "the base never became confident",
    "stopped": "the base never became confident",
}
"""Ends of drafts other than a switch, in words."""


BEFORE, AFTER = 16, 8
"""Drafted tokens that the panel shows before the switch and after it."""


class Shown(NamedTuple):
    """A piece of an answer as the page shows it."""

    text: str
    look: str
    """Its class in the stylesheet."""
    writer: str
    probability: float | None
    """The base's of its tokens together; None where it is not known."""
    ranks: tuple[int, ...]
    """Of its tokens in the base's distributions; none where they are not known."""
    confidence: float | None
    """After its last drafted token; None before the first full window of its draft."""


def shown(answer: Answer, window_size: int) -> Iterator[Shown]:
    """The pieces of an answer; each stretch of the pilot's is a draft."""
    for _, stretch in groupby(answer.pieces, key=attrgetter("writer")):
        pieces = list(stretch)
        draft = [likelihood.log_prob for piece in pieces for likelihood in piece.drafted]
        confidences, drafted = confidence(draft, window_size).tolist(), 0
        for piece in pieces:
            likelihoods = piece.likelihoods
            drafted += len(piece.drafted)
            probability = math.exp(sum(likelihood.log_prob for likelihood in likelihoods)) if likelihoods else None
            ranks = tuple(likelihood.rank for likelihood in likelihoods)
            reached = confidences[drafted - 1] if piece.drafted else math.nan
            look, writer = _look(piece, answer.method, probability)
            yield Shown(piece.text, look, writer, probability, ranks, None if math.isnan(reached) else reached)


def _look(piece: Piece, method: str, probability: float | None) -> tuple[str, str]:
    if piece.writer == "base" or method == "base":
        return "base-0", "base"
    if piece.writer is None:
        return "both-0", "both models"
    shades = len(PILOT_COLOURS)
    return f"pilot-{shades // 2 if probability is None else min(int(probability * shades), shades - 1)}", "pilot"


def conversation(turns: Sequence[Turn]) -> str:
    """Questions with their answers."""
    return "".join(_turn(turn) for turn in turns)


def _turn(turn: Turn) -> str:
    cards = "".join(_card(answer, turn.settings) for answer in turn.answers)
    question = f'<p class="question">{html_text(turn.question)}</p>'
    return f'<section class="turn">{question}<div class="answers">{cards}</div></section>'


def _card(answer: Answer, settings: Settings) -> str:
    heading = HEADINGS[answer.method]
    # An end of the base, which shows no text, is no part of the page.
    pieces = [piece for piece in shown(answer, settings.window_size) if piece.text or piece.confidence is not None]
    text = "".join(_span(piece) for piece in pieces)
    caret = "" if answer.over else '<span class="caret" aria-hidden="true"></span>'
    fault = f'<p class="fault" role="alert">{html_text(answer.error)}</p>' if answer.error else ""
    words = f'<p class="note">{html_text(note(answer, settings))}</p>'
    trace = _trace(pieces) if answer.over and pieces else ""
    return (
        f'<article class="answer" aria-label="{heading}"><h3>{heading}</h3>'
        f'<p class="text">{text}{caret}</p>{fault}{words}{trace}</article>'
    )


def _span(piece: Shown) -> str:
    return f'<span class="token {piece.look}" data-trace="{_tooltip(piece)}">{html_text(piece.text)}</span>'


def _tooltip(piece: Shown) -> str:
    lines = [piece.writer]
    if piece.probability is not None:
        lines += [f"probability {piece.probability:.2f}", f"rank {_ranks(piece)}"]
    if piece.confidence is not None:
        lines += [f"confidence {piece.confidence:.2f}"]
    return "&#10;".join(lines)


def _trace(pieces: Sequence[Shown]) -> str:
    """The same numbers as a table, for keyboards and screen readers."""
    lines = "".join(
        f"<tr><td>{number}</td><td><code>{html_text(piece.text)}</code></td><td>{piece.writer}</td>"
        f"<td>{_number(piece.probability)}</td><td>{_ranks(piece)}</td><td>{_number(piece.confidence)}</td></tr>"
        for number, piece in enumerate(pieces, start=1)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "text", "writer", "probability", "rank", "confidence"))
    return f"<details><summary>Trace</summary><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></details>"


def _ranks(piece: Shown) -> str:
    """One number, but for a character that is cut across tokens."""
    return ", ".join(map(str, piece.ranks))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def note(answer: Answer, settings: Settings) -> str:
    """One line under an answer: its state, or its tokens by writer and the reason of the switch."""
    if answer.error:
        return ""
    if answer.stopped:
        return "stopped"
    end = answer.end
    if end is None:
        if not answer.pieces:
            return "waiting"
        return "the pilot is writing" if answer.pieces[-1].writer == "pilot" else "the base is writing"
    total, cut = end.pilot_tokens + end.base_tokens, ", cut at the limit" if end.finish_reason == "length" else ""
    if answer.method in ("base", "pilot") or (answer.pieces and answer.pieces[-1].writer is None):
        return f"{counted(total)}{cut}"
    part = f"{end.pilot_tokens} of {counted(total)} by the pilot{cut}"
    if answer.method != "wsd":
        return part
    if end.switch_reason == "confident":
        return f"{part}; there confidence reached {settings.threshold:g} over {counted(settings.window_size)}"
    return f"{part}; {REASONS[str(end.switch_reason)]}"


def status(turn: Turn) -> str:
    """One sentence for screen readers about the answer of Weak-to-Strong Decoding, while it grows."""
    answer = turn.answer("wsd")
    return "" if answer is None else f"{HEADINGS['wsd']}: {answer.error or note(answer, turn.settings)}"


def panel(turn: Turn | None, threshold: float, window_size: int) -> str:
    """The curve of the last draft, and where the base takes over at some settings."""
    found = None if turn is None else recording(turn)
    if found is None or not found.log_probs:
        words = "There is no draft yet." if turn else "Ask something, and the base's confidence in the draft is drawn here."
        return f'{curve([], [], threshold, window_size, None, words)}<p class="verdict">{words}</p>'
    words, switch = verdict(found, threshold, window_size), found.switch(threshold, window_size)
    drawn = curve(found.log_probs, found.confidences(window_size), threshold, window_size, switch, words)
    return f'{drawn}<p class="verdict">{words}</p>{_draft(found, window_size, switch)}'


def _draft(found: Recording, window_size: int, switch: int | None) -> str:
    """The recorded draft around the place where the base takes over, or its end."""
    pieces: list[tuple[int, Shown]] = []  # with the number of drafted tokens before each
    drafted = 0
    for piece, look in zip(found.answer.pieces, shown(found.answer, window_size), strict=True):
        if drafted < len(found.log_probs):
            pieces.append((drafted, look))
        drafted += len(piece.drafted)
    end = len(found.log_probs) if switch is None else switch
    kept = [look for before, look in pieces if max(end - BEFORE, 0) <= before < end]
    rest = [look for before, look in pieces if end <= before < end + AFTER]
    bar = '<b class="bar" role="img" aria-label="The base takes over."></b>' if switch is not None else ""
    return (
        f'<p class="draft text">{"… " if end > BEFORE else ""}{"".join(map(_span, kept))}{bar}'
        f'<span class="rest">{html_text("".join(look.text for look in rest))}{" …" if drafted > end + AFTER else ""}</span></p>'
    )
