"""The trace of a response: the writer of each token, and the end of the draft."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, cast

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .engine.strategy import StrategyOutput
from .errors import WSDValueError
from .pages.style import BASE_COLOUR, INK, PILOT_COLOURS
from .speculation.rule import SwitchReason
from .strategies.wsd.config import WSDConfig
from .strategies.wsd.output import WSDOutput
from .strategies.wsd.switch import confidence
from .strategies.wsd.switch_rules import SWITCH_RULES
from .strategies.wsd.two_way import TwoWayConfig, TwoWayOutput, WriterChange
from .text.visible import html_text, visible


@dataclass(frozen=True)
class TracedToken:
    """One token of a response.

    Attributes:
        id: the token.
        text: its part of the response's text.
        writer: "pilot" or "base".
        probability: the base's probability of it; None where it was not recorded (after the switch it is, if the call had
            `output_logits=True`).
        confidence: geometric mean over the window that ends here, drafted tokens only; None before the first full window, and
            where the draft was ended by another rule than the paper's.
    """

    id: int
    text: str
    writer: str
    probability: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Switch:
    """The end of a draft of Weak-to-Strong Decoding.

    Attributes:
        index: the paper's k, or -1 where the base never became confident.
        reason: as in `WSDOutput.switch_reason`.
        threshold: of the switch rule.
        window_size: drafted tokens that it is measured over.
        rule: name of the switch rule; None for a criterion of the caller's.
        ignore_repeats: whether repetitions were left out of the window.
    """

    index: int
    reason: SwitchReason
    threshold: float
    window_size: int
    rule: str | None = None
    ignore_repeats: bool = False


@dataclass(frozen=True)
class Trace:
    """The writer of each token of one response, and of a draft the end. Made by `explain`.

    `print(trace)` gives plain text, `trace.print()` colours on a terminal. In plain text the pilot begins, and each `│` is a
    change of the writer. Printed text, pictures and pages are well-formed and safe to show, whatever the text: control
    characters have a visible form there, as ␛. `tokens` and `to_dict()` hold the text as it is.

    Attributes:
        tokens: of the response, without padding.
        switch: the end of the draft; None unless the strategy is "wsd".
        changes: of the writer, under "two_way"; None under any other strategy.
    """

    tokens: tuple[TracedToken, ...]
    switch: Switch | None = None
    changes: tuple[WriterChange, ...] | None = None

    def __rich__(self) -> Text:
        text = Text()
        for position, token in enumerate(self.tokens):
            if position and token.writer != self.tokens[position - 1].writer:
                text.append("│", style="bold white")
            text.append(visible(token.text), style=f"{INK} on {_colour(token)}")
        return text + Text(f"\n{self.summary()}", style="dim italic")

    def __str__(self) -> str:
        text, writer = "", "pilot"
        for token in self.tokens:
            text += ("" if token.writer == writer else "│") + token.text
            writer = token.writer
        return f"{visible(text)}\n{self.summary()}"

    def summary(self) -> str:
        """One line: the pilot's part of the response, and the end of its draft."""
        by_pilot = sum(token.writer == "pilot" for token in self.tokens)
        part = f"pilot: {by_pilot} token{'' if by_pilot == 1 else 's'} of {len(self.tokens)}"
        if self.changes is not None:
            return "; ".join([part, *map(_clause, self.changes)])
        if self.switch is None:
            return part
        reasons = {
            "confident": f"there {_trigger(self.switch)}",
            "draft_ended": "there the pilot was done, before the base became confident",
            "draft_limit": "there the draft limit was reached, before the base became confident",
            "budget": "that is the whole response: the base never became confident",
            "stopped": "there a stop criterion ended the response",
        }
        return f"{part}; {reasons[self.switch.reason]}"

    def print(self, console: Console | None = None) -> None:
        """Prints the trace; in colour where the console (default: standard output) can."""
        (console or Console()).print(self)

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain data, ready for JSON.

        >>> Trace((TracedToken(7, "Hi", "base"),)).to_dict()["tokens"][0]["writer"]
        'base'
        """
        return asdict(self)

    def to_svg(self, title: str = "Weak-to-Strong Decoding") -> str:
        """The coloured trace as an SVG picture of a terminal."""
        console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
        console.print(self)
        return str(console.export_svg(title=visible(title)))

    def to_html(self) -> str:
        """The trace as one HTML element; hovering over a token shows its writer, probability and confidence."""
        spans = "".join(
            f'<span title="{html_text(_tooltip(token))}" style="background:{_colour(token)};color:{INK}">'
            f"{html_text(token.text)}</span>"
            for token in self.tokens
        )
        return f'<p style="white-space:pre-wrap">{spans}<br/><small>{html_text(self.summary())}</small></p>'

    def _repr_html_(self) -> str:  # the last value of a notebook's cell
        return self.to_html()


def explain(
    output: StrategyOutput, tokenizer: PreTrainedTokenizerBase, row: int = 0, stop_strings: Sequence[str] = ()
) -> Trace:
    """The writer of each token of a response, and under the paper's switch rule the base's confidence while the pilot drafted.

    Args:
        output: of `generate(..., strategy=..., return_dict_in_generate=True)`, for a strategy whose tokens have one writer
            each. With `output_logits=True` the base's probabilities of its own tokens are traced too.
        tokenizer: the base's.
        row: of the batch.
        stop_strings: the trace ends before the first of them; a response that was stopped contains its stop string.

    Raises:
        WSDValueError: the output of another call, a strategy that mixes the models in every token, or a row that there is not.
    """
    if not isinstance(output, StrategyOutput):
        raise WSDValueError(
            "explain needs the output of generate(..., strategy=..., return_dict_in_generate=True), "
            f"not {type(output).__name__}"
        )
    if output.written_by_pilot is None:
        raise WSDValueError(f"explain: under strategy={output.strategy.name!r} every token is the work of several models")
    if not 0 <= row < len(output.sequences):
        raise WSDValueError(f"row={row}: the output has {len(output.sequences)} rows, counted from 0")
    ids = _response(output.sequences[row, output.prompt_length :].tolist(), tokenizer)
    writers = ["pilot" if by_pilot else "base" for by_pilot in output.written_by_pilot[row, : len(ids)].tolist()]
    tokens = _before(stop_strings, tuple(map(TracedToken, ids, added_texts(ids, tokenizer), writers)))
    if isinstance(output, TwoWayOutput):
        return _with_changes(tokens, output, row)
    return _with_draft(tokens, output, row) if isinstance(output, WSDOutput) else Trace(tokens)


def _with_draft(tokens: tuple[TracedToken, ...], output: WSDOutput, row: int) -> Trace:
    """The trace of a draft, which a stop string may have cut."""
    settings, index, reason = cast("WSDConfig", output.strategy), int(output.switch_index[row]), output.switch_reason[row]
    drafted, window = int(output.draft_length[row]), settings.window_size
    rule = settings.switch_criteria if isinstance(settings.switch_criteria, str) else None
    by_confidence = rule == "confidence" and not settings.ignore_repeats
    if drafted > len(tokens):
        index, reason = -1, "stopped"
    log_probs = output.draft_log_probs[row, :drafted].tolist()
    confidences = confidence(log_probs, window).tolist()
    for position in range(drafted, len(tokens) if output.logits else 0):
        log_probs.append(float(output.logits[position][row].log_softmax(dim=-1)[tokens[position].id]))
    traced = tuple(
        replace(
            token,
            probability=math.exp(log_probs[position]) if position < len(log_probs) else None,
            confidence=confidences[position] if by_confidence and window <= position + 1 <= drafted else None,
        )
        for position, token in enumerate(tokens)
    )
    return Trace(traced, Switch(index, reason, settings.threshold, window, rule, settings.ignore_repeats))


def _with_changes(tokens: tuple[TracedToken, ...], output: TwoWayOutput, row: int) -> Trace:
    """The trace of a response whose writer may have changed several times, and which a stop string may have cut."""
    settings = cast("TwoWayConfig", output.strategy)
    by_confidence = settings.switch_criteria == "confidence" and not settings.ignore_repeats
    changes = tuple(change for change in output.changes[row] if change.position <= len(tokens))
    traced: list[TracedToken] = []
    for begin, end in pairwise([0, *(change.position for change in changes), len(tokens)]):
        log_probs = output.log_probs[row, begin:end].tolist()
        for position, reached in enumerate(confidence(log_probs, settings.window_size).tolist(), start=begin):
            token, drafted = tokens[position], tokens[position].writer == "pilot"
            probability = math.exp(log_probs[position - begin]) if drafted else None
            if not drafted and output.logits:
                probability = float(output.logits[position][row].softmax(dim=-1)[token.id])
            shown = drafted and by_confidence and not math.isnan(reached)
            traced.append(replace(token, probability=probability, confidence=reached if shown else None))
    return Trace(tuple(traced), changes=changes)


def _clause(change: WriterChange) -> str:
    """Clause about a change of the writer."""
    reasons = {
        "confident": "the base took over",
        "draft_ended": "the pilot was done",
        "draft_limit": "the draft limit was reached",
        "left_path": "the base had left the pilot's path",
    }
    return f"after {change.position} {reasons[change.reason]}"


def _trigger(switch: Switch) -> str:
    """Clause about a rule that has fired."""
    if switch.rule is None:
        return "the caller's switch criteria fired"
    reached = f"the base's {SWITCH_RULES[switch.rule].reached} {switch.threshold:g} over {switch.window_size} tokens"
    return f"{reached} that repeat nothing" if switch.ignore_repeats else reached


def _before(stop_strings: Sequence[str], tokens: tuple[TracedToken, ...]) -> tuple[TracedToken, ...]:
    """The tokens up to the first stop string; a token that it begins within keeps the text before it."""
    text = "".join(token.text for token in tokens)
    left = min((text.find(stop) for stop in stop_strings if stop in text), default=None)
    if left is None:
        return tokens
    kept: list[TracedToken] = []
    for token in tokens:
        if left <= 0:
            break
        kept.append(replace(token, text=token.text[:left]))
        left -= len(token.text)
    return tuple(kept)


def _response(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids without the padding after a finished row; of a pad id that is also the EOS, one is kept."""
    end = len(ids)
    while end and ids[end - 1] == tokenizer.pad_token_id:
        end -= 1
    if end < len(ids) and tokenizer.pad_token_id == tokenizer.eos_token_id:
        end += 1
    return ids[:end]


def added_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text that each token adds; a character cut across tokens is shown by the token that completes it."""
    shown = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        complete = text if end == len(ids) else text.rstrip("\ufffd")
        yield complete[len(shown) :]
        shown = max(shown, complete, key=len)


def _colour(token: TracedToken) -> str:
    if token.writer == "base":
        return BASE_COLOUR
    return PILOT_COLOURS[min(int((token.probability or 0.0) * len(PILOT_COLOURS)), len(PILOT_COLOURS) - 1)]


def _tooltip(token: TracedToken) -> str:
    values = {"probability": token.probability, "confidence": token.confidence}
    return "; ".join([token.writer, *(f"{name} {value:.3f}" for name, value in values.items() if value is not None)])
