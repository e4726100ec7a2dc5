"""`wsd-hf eval`: base and pilot in an evaluation harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..config import WSDConfig
from ..errors import WSDValueError
from .models import DType, known_device
from .options import Device, DTypeOption, Threshold, Window, one_line_errors


@dataclass(frozen=True)
class Evaluation:
    """What `wsd-hf eval` was asked to do; its options, checked."""

    tasks: list[str]
    base: str
    pilot: str
    config: WSDConfig
    include_path: Path | None
    limit: int | None
    batch_size: int
    apply_chat_template: bool
    num_fewshot: int | None
    gen_kwargs: str
    max_new_tokens: int | None
    device: str
    dtype: str
    out: Path | None


def run_lm_eval(asked: Evaluation) -> None:
    """Runs the lm-evaluation-harness; prints its table, and writes its results and samples as JSON."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table, simple_parse_args_string

        from ..evaluation import lm_eval as registered  # noqa: F401  (registers wsd-hf)
    except ImportError as error:
        raise WSDValueError(f'--harness lm-eval: not installed ({error}); pip install "wsd_hf[lm-eval]"') from None

    manager = TaskManager(include_path=None if asked.include_path is None else str(asked.include_path))
    for task in asked.tasks:
        if not manager.match_tasks([task]):
            raise WSDValueError(f"--tasks {task}: unknown to the harness; `lm_eval ls tasks` lists what it has")
    length = {} if asked.max_new_tokens is None else {"max_gen_toks": asked.max_new_tokens}
    models = {"pretrained": asked.base, "pilot": asked.pilot, "dtype": asked.dtype}
    results = simple_evaluate(
        "wsd-hf",
        model_args={**models, "threshold": asked.config.threshold, "window": asked.config.window_size},
        tasks=manager.match_tasks(asked.tasks),
        task_manager=manager,
        limit=asked.limit,
        batch_size=asked.batch_size,
        apply_chat_template=asked.apply_chat_template,
        num_fewshot=asked.num_fewshot,
        gen_kwargs=simple_parse_args_string(asked.gen_kwargs) | length,
        device=asked.device,
    )
    typer.echo(make_table(results))
    if asked.out:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        asked.out.write_text(text + "\n", encoding="utf-8")


class Harness(str, Enum):
    """The harnesses of `HARNESSES`, for the command line."""

    lm_eval = "lm-eval"


HARNESSES: dict[Harness, Callable[[Evaluation], None]] = {Harness.lm_eval: run_lm_eval}


def evaluate(
    tasks: Annotated[str, typer.Option(help="The harness's names of tasks, with commas between them.")],
    base: Annotated[str, typer.Option(help="Base model, a path or Hub id.")],
    pilot: Annotated[str, typer.Option(help="Pilot, a path or Hub id.")],
    harness: Annotated[Harness, typer.Option(help="Which harness to run.")] = Harness.lm_eval,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered at a time.", min=1)] = 1,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in chats, each model's in its own layout, instead of plain text.")
    ] = False,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in front of a question. Default: the task's.", min=0)
    ] = None,
    gen_kwargs: Annotated[str, typer.Option(help="Settings of generate over those of the tasks: NAME=VALUE,...")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file for results, prompts and answers.")] = None,
    threshold: Threshold = WSDConfig.threshold,
    window: Window = WSDConfig.window_size,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens in an answer. Default: the task's.", min=1)] = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.auto,
) -> None:
    """Measures base and pilot together on the tasks of an evaluation harness."""
    with one_line_errors():
        if out and not out.absolute().parent.is_dir():
            raise WSDValueError(f"--out {out}: its folder is missing; make it first")
        asked = Evaluation(
            tasks=tasks.split(","),
            base=base,
            pilot=pilot,
            config=WSDConfig(threshold=threshold, window_size=window),
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            num_fewshot=num_fewshot,
            gen_kwargs=gen_kwargs,
            max_new_tokens=max_new_tokens,
            device=str(known_device(device)),
            dtype=dtype.value,
            out=out,
        )
        HARNESSES[harness](asked)
