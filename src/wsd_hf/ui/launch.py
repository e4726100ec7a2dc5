"""The page as a web server of its own."""

from __future__ import annotations

import gradio as gr
from starlette.middleware import Middleware

from ..serving.hosts import NameRequired, own_names
from .app import REQUESTS
from .style import PAGE

SESSIONS = 1000
"""Most tabs whose conversations are kept in memory; the one that was used last the longest ago is forgotten first."""

REST = 16
"""Threads for all that is no answer, such as opening the page, while `REQUESTS` questions are open."""

COLOURS = {
    "body_background_fill": "page",
    "body_text_color": "text",
    "body_text_color_subdued": "muted",
    "background_fill_primary": "page",
    "background_fill_secondary": "surface",
    "block_background_fill": "page",
    "block_label_text_color": "muted",
    "block_title_text_color": "text",
    "block_info_text_color": "muted",
    "border_color_primary": "line",
    "border_color_accent": "accent",
    "color_accent": "accent",
    "color_accent_soft": "surface",
    "input_background_fill": "page",
    "input_border_color": "muted",
    "input_border_color_focus": "accent",
    "input_placeholder_color": "muted",
    "slider_color": "accent",
    "checkbox_label_background_fill": "surface",
    "checkbox_label_background_fill_selected": "surface",
    "checkbox_label_text_color": "text",
    "checkbox_label_text_color_selected": "text",
    "checkbox_background_color_selected": "accent",
    "checkbox_border_color": "muted",
    "checkbox_border_color_selected": "accent",
    "button_secondary_background_fill": "surface",
    "button_secondary_background_fill_hover": "line",
    "button_secondary_text_color": "text",
    "button_primary_background_fill": "accent",
    "button_primary_background_fill_hover": "accent",
    "button_primary_text_color": "page",
    "link_text_color": "accent",
}
"""Names of gradio's colours, and of those of `pages` that take their place."""

LOADED = """() => {
  const status = document.getElementById("status"), turns = document.getElementById("turns");
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
  let shown = 0;
  new MutationObserver(() => {
    const all = turns.querySelectorAll(".turn");
    if (all.length > shown) all[all.length - 1].scrollIntoView({block: "nearest"});
    shown = all.length;
  }).observe(turns, {childList: true, subtree: true});
}"""
"""Lets screen readers hear the state of an answer, and brings each new turn into view."""


def launch(
    page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, wait: bool = True
) -> None:
    """Serves a page; nothing is loaded from elsewhere, and nothing is reported.

    Args:
        page: made by `build`.
        host: address to listen at.
        port: to listen at; None: the first free one from 7860.
        share: whether to open a public tunnel.
        wait: whether to serve until Ctrl-C; else in the background, until `page.close()`.
    """
    names = [] if share else own_names(host)
    page.launch(
        app_kwargs={"middleware": [Middleware(NameRequired, names=names)] if names else []},
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=not wait,
        theme=_theme(),
        css=PAGE,
        js=LOADED,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=0,  # the page takes no files
        max_threads=REQUESTS + REST,
        state_session_capacity=SESSIONS,
        quiet=not wait,
    )


def _theme() -> gr.themes.Base:
    """gradio's plainest theme in the colours of all pages, and in the fonts of the reader's system."""
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size=gr.themes.sizes.radius_md
    )
    names = {f"{name}{dark}": f"var(--{colour})" for name, colour in COLOURS.items() for dark in ("", "_dark")}
    colours = {name: colour for name, colour in names.items() if hasattr(theme, name)}
    flat = {"block_border_width": "0px", "block_shadow": "none", "block_padding": "0px", "input_border_width": "1px"}
    return theme.set(**colours, **flat)
