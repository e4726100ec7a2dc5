"""The trace of a response: who wrote which token, and why the base took over."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .errors import WSDValueError
from .strategies.wsd.draft import SwitchReason
from .strategies.wsd.output import WSDGenerateOutput
from .strategies.wsd.switch import confidence
from .text.visible import html_text, visible

PILOT_COLOURS = ("#f4a582", "#f7b799", "#fac8af", "#fcd9c7", "#feeae0")
"""A drafted token, from one that the base found unlikely to one that it would have written too."""

BASE_COLOUR = "#92c5de"


@dataclass(frozen=True)
class TracedToken:
    """One token of a response.

    Attributes:
        id: the token.
        text: what it adds to the response's text.
        writer: "pilot" or "base".
        probability: the base's probability of it; None where it was not recorded (after the switch it is, if the call had
            `output_logits=True`).
        confidence: geometric mean over the window that ends here, drafted tokens only; None before the first full window.
    """

    id: int
    text: str
    writer: str
    probability: float | None
    confidence: float | None


@dataclass(frozen=True)
class Trace:
    """Who wrote which token of one response, and why the base took over. Made by `explain`.

    `print(trace)` gives plain text, `trace.print()` colours on a terminal. What is printed or exported as a picture or page is
    well-formed and safe to show, whatever the text: control characters have a visible form there, as ␛. `tokens` and
    `to_dict()` hold the text as it is.
    """

    tokens: tuple[TracedToken, ...]
    switch_index: int
    switch_reason: SwitchReason
    threshold: float
    window_size: int

    def __rich__(self) -> Text:
        text = Text()
        for position, token in enumerate(self.tokens):
            if position == self.switch_index and position:
                text.append("│", style="bold white")
            text.append(visible(token.text), style=f"#101010 on {_colour(token)}")
        return text + Text(f"\n{self.summary()}", style="dim italic")

    def __str__(self) -> str:
        drafted = "".join(token.text for token in self.tokens[: self.switch_index])
        written = "".join(token.text for token in self.tokens[self.switch_index :])
        return f"{visible(drafted)}│{visible(written)}\n{self.summary()}"

    def summary(self) -> str:
        """One line: the switch and its reason."""
        reasons = {
            "confident": f"there {self._trigger()}",
            "draft_ended": "there the pilot was done, before the base became confident",
            "draft_limit": "there the draft limit was reached, before the base became confident",
            "budget": "that is the whole response: the base never became confident",
            "stopped": "there a stop criterion ended the response",
        }
        drafted = f"{self.switch_index} token{'' if self.switch_index == 1 else 's'}"
        return f"pilot: {drafted} of {len(self.tokens)}; {reasons[self.switch_reason]}"

    def _trigger(self) -> str:
        reached = self.tokens[self.switch_index - 1].confidence if self.tokens else None
        if reached is None or reached < self.threshold * (1 - 1e-9):
            return "the caller's switch criteria fired"
        return f"the base's confidence reached {self.threshold:g} over {self.window_size} tokens"

    def print(self, console: Console | None = None) -> None:
        """Prints the trace; in colour where the console (default: standard output) can."""
        (console or Console()).print(self)

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain data, ready for JSON.

        >>> Trace((), 0, "draft_ended", 0.8, 6).to_dict()["switch_reason"]
        'draft_ended'
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
            f'<span title="{html_text(_tooltip(token))}" style="background:{_colour(token)}">{html_text(token.text)}</span>'
            for token in self.tokens
        )
        return f'<p style="white-space:pre-wrap">{spans}<br/><small>{html_text(self.summary())}</small></p>'


def explain(
    output: WSDGenerateOutput, tokenizer: PreTrainedTokenizerBase, row: int = 0, stop_strings: Sequence[str] = ()
) -> Trace:
    """Who wrote which token of a response, and how confident the base was while the pilot wrote.

    Args:
        output: what `generate(..., strategy="wsd", return_dict_in_generate=True)` returned. With `output_logits=True` the
            base's probabilities of its own tokens are traced too.
        tokenizer: the base's.
        row: which response of the batch.
        stop_strings: the trace ends before the first of them; a response that was stopped contains its stop string.

    Raises:
        WSDValueError: the output of another call, or a row that it does not have.
    """
    if not isinstance(output, WSDGenerateOutput):
        raise WSDValueError(
            "explain needs the output of generate(..., strategy='wsd', return_dict_in_generate=True), "
            f"not {type(output).__name__}"
        )
    if not 0 <= row < len(output.sequences):
        raise WSDValueError(f"row={row}: the output has {len(output.sequences)} rows, counted from 0")
    drafted = int(output.switch_index[row])
    log_probs = output.draft_log_probs[row, :drafted].tolist()
    confidences = confidence(log_probs, output.wsd_config.window_size).tolist()
    ids = _response(output.sequences[row, output.prompt_length :].tolist(), tokenizer)
    for position in range(drafted, len(ids) if output.logits else 0):
        log_probs.append(float(output.logits[position][row].log_softmax(dim=-1)[ids[position]]))
    tokens = tuple(
        TracedToken(
            id=token,
            text=text,
            writer="pilot" if position < drafted else "base",
            probability=math.exp(log_probs[position]) if position < len(log_probs) else None,
            confidence=confidences[position] if output.wsd_config.window_size <= position + 1 <= drafted else None,
        )
        for position, (token, text) in enumerate(zip(ids, _pieces(ids, tokenizer), strict=True))
    )
    tokens = _before(stop_strings, tokens)
    return Trace(
        tokens,
        switch_index=min(drafted, len(tokens)),
        switch_reason=output.switch_reason[row] if drafted <= len(tokens) else "stopped",
        threshold=output.wsd_config.threshold,
        window_size=output.wsd_config.window_size,
    )


def _before(stop_strings: Sequence[str], tokens: tuple[TracedToken, ...]) -> tuple[TracedToken, ...]:
    """The tokens up to the first stop string; one that it begins within keeps the text in front of it."""
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
    """The ids without the padding behind a finished row; a pad id that is the EOS too stands there once."""
    end = len(ids)
    while end and ids[end - 1] == tokenizer.pad_token_id:
        end -= 1
    if end < len(ids) and tokenizer.pad_token_id == tokenizer.eos_token_id:
        end += 1
    return ids[:end]


def _pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each token adds to the text; a character cut across tokens is shown by the token that completes it."""
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
