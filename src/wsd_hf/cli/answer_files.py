"""`wsd-hf answers`: answers of base and pilot to the questions that another project judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..integrations.export import KINDS, AnswerFile
from ..ranks import Rank
from ..text.chat import Messages
from .models import Loading, load_models, takes_loading
from .options import (
    Base,
    IgnoreRepeats,
    MaxNewTokens,
    Pilot,
    SwitchCriteria,
    Threshold,
    WindowSize,
    one_line_errors,
    wsd_config,
)
from .runs import ends, progress, resumable, status
from .terminal import say


@takes_loading
def answers(
    kind: Annotated[str, typer.Argument(help=f"The judge: {', '.join(KINDS)}.", show_default=False)],
    questions: Annotated[Path, typer.Option(help="The judge's question file.")],
    out: Annotated[Path, typer.Option(help="The answer file; a run that was stopped is resumed there.")],
    name: Annotated[str | None, typer.Option(help="The model's name in the answer file. Default: the file's.")] = None,
    base: Base = None,
    pilot: Pilot = None,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    max_new_tokens: MaxNewTokens = 1024,
    *,
    loading: Loading,
) -> None:
    """Answers a judge's questions, greedily, in a file that the judge reads."""
    with one_line_errors():
        config = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        with AnswerFile(kind, questions, out, name, Rank.from_environment()) as file:
            if file.missing:
                with resumable(file.path):
                    with status("loading both models"):
                        pair = load_models(base, pilot, loading=loading)

                    def ask(chat: Messages) -> str:
                        return pair.answers(pair.generate(chat, config, max_new_tokens=max_new_tokens, do_sample=False))[0]

                    for question in progress(file.missing, "asking"):
                        file.add(question, ask)
            if ends(file.finish()) and not file.missing:
                say("every question has its answer already", err=True)
