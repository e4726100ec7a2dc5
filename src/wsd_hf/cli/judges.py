"""The judges of a command, from its options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..comparison.endpoint import Endpoint
from ..comparison.judges import JUDGES, Judge, find_judge
from ..comparison.llm_judge import PROMPT, LLMJudge, read_prompt
from ..errors import WSDValueError
from ..remote.address import check_key, check_url

OPENAI_URL = "https://api.openai.com/v1"

Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help=f"{', '.join(JUDGES)}, or package.module:function, from a line's object and a response to a number. "
        "May be given several times.",
    ),
]
JudgeModel = Annotated[str | None, typer.Option(help="Model that --judge llm asks.")]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        help=f"OpenAI-compatible API of that model. Default: OPENAI_BASE_URL, or {OPENAI_URL}; its key is OPENAI_API_KEY."
    ),
]
JudgePrompt = Annotated[
    Path | None,
    typer.Option(help="File with the prompt of --judge llm, in which {question}, {answer} and {reference} are filled."),
]


def load_judges(names: Sequence[str] | None, model: str | None, url: str | None, prompt: Path | None) -> dict[str, Judge]:
    """The judges that options name, by their names; the key of an API comes from the environment alone.

    Raises:
        WSDValueError: naming the option and the rule.
    """
    given = {"--judge-model": model, "--judge-url": url, "--judge-prompt": prompt}
    for option, value in given.items():
        if value is not None and "llm" not in (names or ()):
            raise WSDValueError(f"{option} has no effect without --judge llm: leave it out")
    return {name: _llm_judge(model, url, prompt) if name == "llm" else find_judge(name) for name in names or ()}


def _llm_judge(model: str | None, url: str | None, prompt: Path | None) -> LLMJudge:
    if not model:
        raise WSDValueError("--judge llm needs --judge-model, the name of a model at --judge-url")
    if url is None:
        place = check_url("OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    else:
        place = check_url("--judge-url", url)
    key = check_key("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", ""))
    if not key and place == OPENAI_URL:
        raise WSDValueError(
            f"--judge llm: OPENAI_API_KEY is not set, which {OPENAI_URL} needs; --judge-url names another server"
        )
    text = PROMPT if prompt is None else read_prompt(prompt)
    return LLMJudge(Endpoint(place, model, key), text)
