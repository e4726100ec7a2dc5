"""`wsd-hf eval`: base and pilot on the tasks of a harness."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import WSDValueError
from ..ranks import Rank
from .models import Loading, load_models, takes_loading
from .options import MODEL, IgnoreRepeats, SwitchCriteria, Threshold, WindowSize, one_line_errors, wsd_config
from .terminal import say


class Harness(str, Enum):
    """Programs that run tasks."""

    lm_eval = "lm-eval"


def run_lm_eval(
    tasks: list[str],
    base: str,
    pilot: str,
    loading: Loading,
    rule: dict[str, Any],
    include_path: Path | None,
    gen_kwargs: str,
    **options: Any,
) -> str | None:
    """Runs the lm-evaluation-harness, and prints its table.

    Args:
        tasks: names of tasks, groups and tags, or patterns of them.
        base, pilot: names of the models.
        loading: of the models.
        rule: settings of `WSDHFLM`.
        include_path: folder with more tasks.
        gen_kwargs: settings of `generate`, as the harness reads them.
        **options: of `lm_eval.simple_evaluate`; and `max_gen_toks`, which beats the tasks'.

    Returns:
        Results and samples, as JSON; None in every process of a launcher but the first.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table, simple_parse_args_string

        from ..integrations import lm_eval as registered  # noqa: F401  (registers wsd-hf)
    except ImportError as error:
        raise WSDValueError(f'--harness lm-eval: not installed ({error}); pip install "wsd_hf[lm-eval]"') from None

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise WSDValueError(f"--tasks {task}: unknown to the harness; `lm_eval ls tasks` lists what it has")
    length = options.pop("max_gen_toks")
    settings = simple_parse_args_string(gen_kwargs) | ({} if length is None else {"max_gen_toks": length})
    pair = load_models(base, pilot, loading=loading)
    models = {"pretrained": pair.base, "pilot": pair.pilot}
    tokenizers = {"tokenizer": pair.tokenizer, "pilot_tokenizer": pair.pilot_tokenizer}
    results = simple_evaluate(
        "wsd-hf",
        model_args=models | tokenizers | rule,
        tasks=manager.match_tasks(tasks),
        task_manager=manager,
        gen_kwargs=settings,
        **options,
    )
    if not Rank.from_environment().first:
        return None
    results["config"]["model_args"] = {"pretrained": base, "pilot": pilot, **asdict(loading), **rule}
    say(make_table(results))
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)


@takes_loading
def evaluate(
    base: Annotated[str, typer.Option(help=f"Base model, {MODEL}.")],
    pilot: Annotated[str, typer.Option(help=f"Pilot, {MODEL}.")],
    tasks: Annotated[str, typer.Option(help="The harness's names of tasks, with commas between them.")],
    harness: Annotated[Harness, typer.Option(help="Program that runs the tasks.")] = Harness.lm_eval,
    out: Annotated[Path | None, typer.Option(help="JSON file for results and samples.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions of a task that are answered at a time.", min=1)] = 1,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask tasks in chats, each model's in its own layout, not in plain text."),
    ] = False,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before a question. Default: the task's.", min=0)] = None,
    gen_kwargs: Annotated[str, typer.Option(help="Settings of generate over those of the tasks: NAME=VALUE,...")] = "",
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens in an answer. Default: the task's.", min=1)] = None,
    *,
    loading: Loading,
) -> None:
    """Runs tasks of an evaluation harness on base and pilot together. Answer files for judges: wsd-hf answers."""
    with one_line_errors():
        config = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        _check(out, include_path, gen_kwargs)
        loading.keywords()  # refuses here, before the harness reads its tasks
        Rank.from_environment()
        results = run_lm_eval(
            [task.strip() for task in tasks.split(",")],
            base,
            pilot,
            loading,
            {
                "threshold": config.threshold,
                "window_size": config.window_size,
                "switch_criteria": config.switch_criteria,
                "ignore_repeats": config.ignore_repeats,
            },
            include_path,
            gen_kwargs,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            num_fewshot=num_fewshot,
            max_gen_toks=max_new_tokens,
            device=loading.device,
        )
        if out and results:
            out.write_text(f"{results}\n", encoding="utf-8")


def _check(out: Path | None, include_path: Path | None, gen_kwargs: str) -> None:
    """Raises for faults that the harness would find late, or not at all."""
    if out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise WSDValueError(f"--out {out}: must be a file in a folder that exists")
    for setting in filter(None, gen_kwargs.split(",")):
        if "=" not in setting:
            raise WSDValueError(f"--gen-kwargs {setting}: must be NAME=VALUE")
    if include_path and not include_path.is_dir():
        raise WSDValueError(f"--include-path {include_path}: no such folder")
