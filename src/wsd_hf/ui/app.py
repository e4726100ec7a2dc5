"""The page, made of gradio's components: a chat on the left, the curve and its sliders on the right."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from ..errors import WSDValueError
from ..serving.requests import Answerer
from ..text.visible import html_text
from .answers import Conversation
from .download import as_html, as_json
from .settings import HEADINGS, LIMITS, Settings
from .view import conversation, panel, status

REQUESTS = 64
"""Most questions that are answered or wait at a time; further ones queue."""

LOST = "This conversation is gone: its connection was cut. Ask again."

LEGEND = """<ul class="legend"><li><i class="l-bar"></i>probability of a drafted token</li>
<li><i class="l-line"></i>confidence</li><li><i class="l-dash"></i>threshold</li></ul>"""

HINT = '<p class="note">No model runs while you move these. Retry answers again with them.</p>'

ADDRESS = """(...values) => {
  const query = new URLSearchParams(location.search);
  Object.entries(START).forEach(([name, start], place) => {
    const text = String(values[place] ?? "");
    if (text === start) query.delete(name); else query.set(name, text);
  });
  history.replaceState(null, "", query.size ? "?" + query : location.pathname);
}"""
"""Keeps the settings that differ from the start in the page's address."""

WITHIN = """(talk, ...values) => [talk, ...values.map((value, place) => {
  const [least, most] = RANGES[place];
  return Math.min(Math.max(value, least), most);
})]"""
"""Sends numbers of sliders within their ranges: one that is being typed may not be there yet, which gradio's server refuses."""

SAVE = """(file) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([file.text], {type: file.type}));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
"""Saves a file that the server has made; it is stored nowhere else."""

TO_CLIPBOARD = """(text => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
})"""
"""Copies a text; over plain http from another machine, browsers have the older way alone."""

COPY = """async () => {
  const last = [...document.querySelectorAll("#turns .turn")].at(-1);
  const texts = [...last.querySelectorAll(".answer > .text")].map(text => text.innerText);
  await TO_CLIPBOARD(texts.join("\\n\\n"));
}""".replace("TO_CLIPBOARD", TO_CLIPBOARD)

LINK = """async () => {
  const link = new URL(location.href), asked = document.querySelectorAll("#turns .question");
  link.searchParams.set("question", asked[asked.length - 1].innerText);
  await TO_CLIPBOARD(link.href);
}""".replace("TO_CLIPBOARD", TO_CLIPBOARD)


@dataclass(frozen=True)
class Parts:
    """The components that handlers read or change."""

    past: gr.HTML
    now: gr.HTML
    status: gr.HTML
    suggestions: gr.Row
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    tools: gr.Row
    curve: gr.HTML
    settings: list[Any]
    """In the order of the fields of `Settings`; the first two are the sliders of the curve."""


def build(answerer: Answerer, methods: Sequence[str], start: Settings, about: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page.

    Args:
        answerer: answers all visitors.
        methods: that may answer beside Weak-to-Strong Decoding, of `HEADINGS`; an address may name no others.
        start: settings at the beginning; visitors may ask for fewer tokens, not for more.
        about: one line on the models, under the heading and in saved data.
        examples: questions to begin with.
    """
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(title="Weak-to-Strong Decoding", analytics_enabled=False) as page:
        talk, file = gr.State(Conversation(start.threshold, start.window_size)), gr.JSON(visible=False)
        gr.HTML(_head(about), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                with gr.Column(elem_id="turns"):
                    past, now = gr.HTML(), gr.HTML()
                state = gr.HTML(elem_id="status")
                with gr.Row(visible=bool(examples), elem_classes="quiet") as suggestions:
                    suggested = [gr.Button(example, size="sm") for example in examples]
                with gr.Row(elem_id="composer"):
                    question = gr.Textbox(
                        label="Question",
                        show_label=False,
                        placeholder="Ask something",
                        lines=1,
                        max_lines=6,
                        autofocus=True,
                    )
                    ask = gr.Button("Ask", variant="primary", scale=0, min_width=88)
                    stop = gr.Button("Stop", scale=0, min_width=88, visible=False)
                with gr.Row(visible=False, elem_classes="quiet") as tools:
                    names = ("Retry", "Copy", "Copy link", "Save as JSON", "Save as HTML", "New chat")
                    retry, copy, link, data, html, clear = (gr.Button(name, size="sm") for name in names)
                choices = [(HEADINGS[method], method) for method in methods]
                beside = gr.CheckboxGroup(choices, value=list(start.methods), label="Side by side with", elem_id="beside")
                with gr.Accordion("Settings", open=False):
                    controls = [beside, *_controls(start)]
            with gr.Column(scale=2, min_width=300, elem_id="panel"):
                gr.HTML("<h2>Where the base takes over</h2>")
                curve = gr.HTML(panel(None, start.threshold, start.window_size))
                gr.HTML(LEGEND)
                threshold = gr.Slider(*LIMITS["threshold"], start.threshold, step=0.01, label="Threshold")
                window = gr.Slider(*LIMITS["window_size"], start.window_size, step=1, label="Window, in tokens")
                gr.HTML(HINT)

        settings = [threshold, window, *controls]
        parts = Parts(past, now, state, suggestions, question, ask, stop, tools, curve, settings)
        handlers = Handlers(answerer, parts, start.max_tokens, about)
        growing = quiet | {"outputs": handlers.growing, "concurrency_id": "answers", "concurrency_limit": REQUESTS}
        asked = {"fn": handlers.ask, "inputs": [talk, question, *settings], **growing}
        gr.on([question.submit, ask.click], **asked)
        for button in suggested:
            button.click(None, None, question, js=f"() => {json.dumps(button.value)}").then(**asked)
        retry.click(handlers.ask_again, [talk, *settings], **growing)
        stop.click(handlers.stop, talk, None, queue=False, **quiet)
        clear.click(handlers.clear, talk, handlers.growing, **quiet)
        copy.click(None, None, None, js=COPY)
        link.click(None, None, None, js=LINK)
        for button, save in ((data, handlers.json_file), (html, handlers.html_file)):
            button.click(save, talk, file, **quiet).then(None, file, None, js=SAVE)
        within = WITHIN.replace("RANGES", json.dumps([LIMITS["threshold"], LIMITS["window_size"]]))
        moved = [threshold.change, window.change]
        gr.on(moved, handlers.look, [talk, threshold, window], curve, queue=False, js=within, **quiet)
        gr.on([part.change for part in settings], None, settings, None, js=ADDRESS.replace("START", json.dumps(start.texts())))
        page.load(handlers.from_address(start, methods), None, [*settings, question, state], **quiet)

        async def leave(request: gr.Request) -> None:
            session = page.state_holder.session_data.pop(request.session_hash, None)
            if session is not None:
                session[talk._id].stop()

        page.unload(leave)
    return page.queue(api_open=False)


def _head(about: str) -> str:
    keys = (
        'A small model, the pilot, begins each answer in <span class="key pilot-1">orange</span>, the darker the less the '
        'large base expected it. Once the base is confident in the draft, it goes on in <span class="key base-0">blue</span>.'
    )
    return f"<h1>Weak-to-Strong Decoding</h1><p>{html_text(about)}</p><p>{keys}</p>"


def _controls(start: Settings) -> list[Any]:
    """Components of the settings after the methods, in the order of the fields."""
    return [
        gr.Slider(1, start.max_tokens, start.max_tokens, step=1, label="Most tokens in an answer"),
        gr.Slider(*LIMITS["temperature"], start.temperature, step=0.05, label="Temperature (0: greedy)"),
        gr.Textbox("" if start.seed is None else str(start.seed), label="Seed (empty: a new sample each time)"),
        gr.Textbox(start.system, label="System message", lines=1, max_lines=6),
        gr.Checkbox(start.slow, label="Slow motion"),
    ]


class Handlers:
    """Reactions to events of the page.

    Args:
        answerer: of all visitors.
        parts: of the page.
        most_tokens: that a visitor may ask for.
        about: the models, for saved data.

    Attributes:
        growing: the components that change while answers grow.
    """

    def __init__(self, answerer: Answerer, parts: Parts, most_tokens: int, about: str) -> None:
        self._answerer, self._parts, self._most_tokens, self._about = answerer, parts, most_tokens, about
        self.growing = [
            getattr(parts, name)
            for name in ("past", "now", "status", "suggestions", "question", "ask", "stop", "tools", "curve")
        ]

    async def ask(self, talk: Conversation, question: str, *given: Any) -> AsyncGenerator[dict[Any, Any], None]:
        """Answers a question; changes of the page."""
        parts = self._parts
        if talk.busy or not question.strip():
            yield {parts.question: gr.skip()}
            return
        settings = _settings(given, self._most_tokens)
        talk.threshold, talk.window_size = settings.threshold, settings.window_size
        past = conversation(talk.turns)
        async with aclosing(talk.ask(question, settings, self._answerer)) as turns:
            await anext(turns)  # before anything else can run: from here on the conversation is busy
            yield {
                parts.past: past,
                parts.now: "",
                parts.suggestions: gr.Row(visible=False),
                parts.question: "",
                parts.ask: gr.Button(visible=False),
                parts.stop: gr.Button(visible=True),
                parts.tools: gr.Row(visible=False),
            }
            async for turn in turns:
                yield {
                    parts.now: conversation([turn]),
                    parts.status: html_text(status(turn)),
                    parts.curve: panel(turn, talk.threshold, talk.window_size),
                }
        yield {parts.ask: gr.Button(visible=True), parts.stop: gr.Button(visible=False), parts.tools: gr.Row(visible=True)}

    async def ask_again(self, talk: Conversation, *given: Any) -> AsyncGenerator[dict[Any, Any], None]:
        """Answers the last question anew."""
        _check(talk)
        _settings(given, self._most_tokens)  # refused ones leave the turn where it is
        question = "" if talk.busy else talk.retract()
        async with aclosing(self.ask(talk, question, *given)) as changes:
            async for changed in changes:
                yield changed

    async def stop(self, talk: Conversation) -> None:
        """Stops the answers that are being written."""
        talk.stop()

    async def clear(self, talk: Conversation) -> dict[Any, Any]:
        """Forgets all turns."""
        talk.stop()
        talk.turns.clear()
        parts = self._parts
        empty = {parts.past: "", parts.now: "", parts.status: "", parts.curve: panel(None, talk.threshold, talk.window_size)}
        return {**empty, parts.suggestions: gr.Row(visible=True), parts.tools: gr.Row(visible=False)}

    async def look(self, talk: Conversation, threshold: float, window_size: float) -> str:
        """The last draft at other settings of the switch; in the event loop, where the draft may be growing."""
        talk.threshold, talk.window_size = threshold, int(window_size)
        return panel(talk.turns[-1] if talk.turns else None, talk.threshold, talk.window_size)

    async def json_file(self, talk: Conversation) -> dict[str, str]:
        """The conversation as data."""
        _check(talk)
        return {"name": "wsd.json", "type": "application/json", "text": as_json(talk.turns, self._about)}

    async def html_file(self, talk: Conversation) -> dict[str, str]:
        """The conversation as a page."""
        _check(talk)
        page = as_html(talk.turns, talk.threshold, talk.window_size, self._about)
        return {"name": "wsd.html", "type": "text/html", "text": page}

    def from_address(self, start: Settings, methods: Sequence[str]) -> Callable[[gr.Request], dict[Any, Any]]:
        """Handler that takes the settings and a question from the page's address, and leaves the rest as it is by then."""

        def load(request: gr.Request) -> dict[Any, Any]:
            settings, faults = start.with_query(request.query_params, methods)
            for fault in faults:
                gr.Warning(html_text(fault))
            changed: dict[Any, Any] = {self._parts.status: "Ready."}
            for field, part in zip(fields(settings), self._parts.settings, strict=True):
                value = getattr(settings, field.name)
                if value != getattr(start, field.name):
                    changed[part] = list(value) if isinstance(value, tuple) else str(value) if field.name == "seed" else value
            if "question" in request.query_params:
                changed[self._parts.question] = request.query_params["question"]
            return changed

        return load


def _check(talk: Conversation) -> None:
    """Refuses to go on with a conversation that this server has no more."""
    if not talk.turns:
        raise gr.Error(LOST, print_exception=False)


def _settings(given: Sequence[Any], most_tokens: int) -> Settings:
    """Settings of the values of their components; refused ones are a message on the page."""
    values = dict(zip((field.name for field in fields(Settings)), given, strict=True))
    try:
        if values["seed"] and not values["seed"].isdecimal():
            raise WSDValueError(f"seed={values['seed']}: must be a whole number, or empty")
        whole = {name: int(values[name]) if values[name] else None for name in ("window_size", "max_tokens", "seed")}
        settings = Settings(**values | whole | {"methods": tuple(values["methods"])})
        settings.check_tokens(most_tokens)
    except WSDValueError as error:
        raise gr.Error(html_text(str(error)), print_exception=False) from None
    return settings
