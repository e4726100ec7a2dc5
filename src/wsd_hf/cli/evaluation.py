"""`wsd-hf eval`: base and pilot on the tasks of a harness, or on the questions that another project judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import WSDValueError
from ..integrations.export import AnswerFile
from ..strategies.wsd.config import WSDConfig
from ..text.chat import Messages
from .models import DType, Pair, answer, known_device, load_pair, response_text
from .options import Device, DTypeOption, Pilot, Threshold, Window, one_line_errors
from .runs import progress, resumable
from .terminal import say


@dataclass(frozen=True)
class Evaluation:
    """What a harness is to do: the options of `wsd-hf eval`, checked."""

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

        from ..integrations import lm_eval as registered  # noqa: F401  (registers wsd-hf)
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
    say(make_table(results))
    if asked.out:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        asked.out.write_text(text + "\n", encoding="utf-8")


def write_answers(answers: AnswerFile, load: Callable[[], Pair], config: WSDConfig, max_new_tokens: int) -> None:
    """Asks what an answer file still lacks; greedily, where FastChat itself samples some categories of MT-Bench.

    Args:
        answers: the file.
        load: gives the models; called if there is anything to ask.
        config: settings of the decoding.
        max_new_tokens: of each answer.
    """
    console = Console(stderr=True)
    if not answers.missing:
        console.print("every question has its answer already")
        return
    with resumable(answers.path):
        with console.status("loading both models"):
            pair = load()

        def ask(chat: Messages) -> str:
            output = answer(pair, chat, config, max_new_tokens, do_sample=False)
            return response_text(output.sequences, output.prompt_length, pair[2])

        for question in progress(answers.missing, "asking"):
            answers.add(question, ask)


class Harness(str, Enum):
    """What runs tasks."""

    lm_eval = "lm-eval"


OF_HARNESS = ("tasks", "include_path", "limit", "batch_size", "apply_chat_template", "num_fewshot", "gen_kwargs")
OF_EXPORT = ("questions", "name")
"""Arguments of `evaluate` that the other way of measuring doesn't heed."""


def evaluate(
    context: typer.Context,
    harness: Annotated[Harness | None, typer.Option(help="Run this harness on --tasks.")] = None,
    export: Annotated[
        str | None, typer.Option(help="Or answer --questions for this judge: alpaca_eval, arena_hard, mt_bench.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, a path or Hub id. Default with --export: the shipped pair.")
    ] = None,
    pilot: Pilot = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for results; or the answer file, gone on with if it exists.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="The harness's names of tasks, with commas between them.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions of a task that are answered at a time.", min=1)] = 1,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask tasks in chats, each model's in its own layout, not in plain text."),
    ] = False,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in front of a question. Default: the task's.", min=0)
    ] = None,
    gen_kwargs: Annotated[str, typer.Option(help="Settings of generate over those of the tasks: NAME=VALUE,...")] = "",
    questions: Annotated[Path | None, typer.Option(help="The judge's question file.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the answer file. Default: the file's.")] = None,
    threshold: Threshold = WSDConfig.threshold,
    window: Window = WSDConfig.window_size,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in an answer. Default: the task's; 1024 in answer files.", min=1)
    ] = None,
    device: Device = "cpu",
    dtype: DTypeOption = DType.auto,
) -> None:
    """Measures base and pilot together: on the tasks of a harness, or by an answer file that another project judges."""
    with one_line_errors():
        config = WSDConfig(threshold=threshold, window_size=window)
        if (harness is None) == (export is None):
            raise WSDValueError("give either --harness with --tasks, or --export with --questions and --out")
        if export is not None:
            if questions is None or out is None:
                raise WSDValueError(f"--export {export} needs --questions and --out")
            _refuse(context, OF_HARNESS, "--export")
            with AnswerFile(export, questions, out, name) as answers:
                write_answers(answers, lambda: load_pair(base, pilot, device, dtype), config, max_new_tokens or 1024)
            return
        if tasks is None or base is None or pilot is None:
            raise WSDValueError("--harness lm-eval needs --tasks, --base and --pilot")
        _refuse(context, OF_EXPORT, "--harness")
        _check(out, include_path, gen_kwargs)
        run_lm_eval(
            Evaluation(
                tasks=[task.strip() for task in tasks.split(",")],
                base=base,
                pilot=pilot,
                config=config,
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
        )


def _refuse(context: typer.Context, names: Iterable[str], way: str) -> None:
    """Raises if an option was given that has no effect on this way of measuring."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise WSDValueError(f"--{name.replace('_', '-')} has no effect with {way}: leave it out")


def _check(out: Path | None, include_path: Path | None, gen_kwargs: str) -> None:
    """Raises for what the harness would find out late, or not at all."""
    if out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise WSDValueError(f"--out {out}: must be a file in a folder that exists")
    for setting in filter(None, gen_kwargs.split(",")):
        if "=" not in setting:
            raise WSDValueError(f"--gen-kwargs {setting}: must be NAME=VALUE")
    if include_path and not include_path.is_dir():
        raise WSDValueError(f"--include-path {include_path}: no such folder")
