"""`wsd-hf ui`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..errors import WSDValueError
from ..tiny import demo_questions
from ..ui.settings import LIMITS, Settings, available
from .models import Loading, load_models, takes_loading
from .options import Base, Pilot, Reference, one_line_errors
from .serving import bound

TINY = (
    "The shipped pair: two tiny models, trained on one made-up world to show the effect. "
    "A question from outside of it gets nonsense."
)

EXAMPLES = ["How does a vaccine work?", "Why is the sky blue?", "How do I turn down an invitation politely?"]
"""Questions for models that know this world."""


@takes_loading
def ui(
    base: Base = None,
    pilot: Pilot = None,
    reference: Reference = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Most tokens in an answer, the draft included; a visitor may ask for fewer.",
            min=1,
            max=int(LIMITS["max_tokens"][1]),
        ),
    ] = 256,
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

        start = Settings(max_tokens=max_new_tokens, slow=base is None)
        bound(host, port or 0).close()  # refused before models are loaded, which takes long
        pair = load_models(base, pilot, reference, loading=loading)
        if base is None or pilot is None:
            about, examples = TINY, [question["messages"][-1]["content"] for question in demo_questions()[:3]]
        else:
            about, examples = f"{_name(base)} with the pilot {_name(pilot)}", EXAMPLES
        page = build(LocalAnswerer(pair), available(pair), start, about, examples)
        launch(page, host=host, port=port, share=share)


def _name(model: str) -> str:
    """The name of a model for readers of the page, who need no path of this machine."""
    return Path(model).resolve().name if Path(model).exists() else model
