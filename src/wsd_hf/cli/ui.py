"""`wsd-hf ui`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..errors import WSDValueError
from ..tiny import demo_questions
from ..ui.settings import Settings, available
from .models import Loading, load_models, takes_loading
from .options import Base, MaxNewTokens, Pilot, Reference, one_line_errors

TINY = (
    "The shipped pair: two tiny models, trained on one made-up world to show the effect. "
    "A question from outside of it gets nonsense."
)


@takes_loading
def ui(
    base: Base = None,
    pilot: Pilot = None,
    reference: Reference = None,
    max_new_tokens: MaxNewTokens = 256,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen at. Default: the first free one from 7860.", min=1, max=65535)
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public tunnel, by gradio's servers.")] = False,
    *,
    loading: Loading,
) -> None:
    """A page on which the pair answers while you watch: who writes, how sure the base is, and where it takes over."""
    with one_line_errors():
        if importlib.util.find_spec("gradio") is None:
            raise WSDValueError('the page needs gradio: pip install "wsd_hf[ui]"')
        from ..serving.local import LocalAnswerer
        from ..ui.app import build
        from ..ui.launch import launch

        pair = load_models(base, pilot, reference, loading=loading)
        if base is None or pilot is None:
            start, about = Settings(max_tokens=max_new_tokens, slow=True), TINY
            examples = [question["messages"][-1]["content"] for question in demo_questions()[:3]]
        else:
            start, about, examples = Settings(max_tokens=max_new_tokens), f"{_name(base)} with the pilot {_name(pilot)}", []
        page = build(LocalAnswerer(pair), available(pair), start, about, examples)
        launch(page, host=host, port=port, share=share)


def _name(model: str) -> str:
    """The name of a model for readers of the page, who need no path of this machine."""
    return Path(model).resolve().name if Path(model).exists() else model
