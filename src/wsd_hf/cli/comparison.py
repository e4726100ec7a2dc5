"""`wsd-hf compare`: from its options to the files that it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..comparison import answer_all, comparable, missing
from ..comparison.judges import JUDGES, find_judge
from ..comparison.methods import ALIASES, METHODS
from ..comparison.page import page
from ..comparison.prompts import Record, read_prompts
from ..comparison.replies import Bench
from ..comparison.store import Store
from ..comparison.table import Row, as_csv, markdown, table_rows, terminal
from ..engine.numbers import check_probability
from ..errors import WSDValueError
from ..files import write_whole
from ..strategies import STRATEGIES
from ..strategies.nudging.config import NudgingConfig
from ..strategies.reward_guided.config import RewardGuidedConfig
from ..text.urial import URIAL_PROMPT
from ..tiny import demo_questions, polite_examples
from .models import Loading, load_models, takes_loading
from .options import (
    Base,
    IgnoreRepeats,
    MaxNewTokens,
    Pilot,
    Reference,
    SwitchCriteria,
    Threshold,
    WindowSize,
    one_line_errors,
    wsd_config,
)
from .rewards import Reward, load_reward
from .runs import progress, resumable
from .terminal import say


@takes_loading
def compare(
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and page; a run that was stopped is resumed there.")],
    base: Base = None,
    pilot: Pilot = None,
    reference: Reference = None,
    reward: Reward = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Lines of {"prompt": ...} or {"messages": [...]}. Default: the shipped questions.')
    ] = None,
    strategies: Annotated[str, typer.Option(help=f"Some of {', '.join(METHODS)}.")] = "base,pilot,urial,nudging,wsd",
    judge: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(JUDGES)}, or package.module:function, from a line's object and a response to a number."),
    ] = None,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    nudging_threshold: Annotated[
        float, typer.Option(help="Certainty below which the pilot writes the next word, in (0, 1].")
    ] = NudgingConfig.threshold,
    reward_threshold: Annotated[
        float, typer.Option(help="Least reward of a step that reward_guided keeps.")
    ] = RewardGuidedConfig.threshold,
    max_new_tokens: MaxNewTokens = 256,
    *,
    loading: Loading,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed prompts out.")] = False,
) -> None:
    """Answers the same prompts in several ways: a table of costs and scores, and the answers side by side."""
    with one_line_errors():
        config = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        nudging = NudgingConfig(threshold=check_probability("nudging_threshold", nudging_threshold))
        guided = RewardGuidedConfig(threshold=reward_threshold)
        names = _names(strategies, reference, reward)
        scorer = find_judge(judge) if judge else None
        records = _records(prompts, shipped=base is None and pilot is None, skip_bad=skip_bad)
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
        settings = {
            "--base": _model(base),
            "--pilot": _model(pilot),
            "--reference": _model(reference),
            "--reward": _model(reward),
            "--prompts": f"{len(records)} prompts, SHA-256 {digest[:16]}",
            "--strategies": ",".join(names),
            "--judge": judge,
            "--threshold": config.threshold,
            "--window-size": config.window_size,
            "--switch-criteria": switch_criteria,
            "--ignore-repeats": ignore_repeats,
            "--nudging-threshold": nudging_threshold,
            "--reward-threshold": reward_threshold,
            "--max-new-tokens": max_new_tokens,
        } | loading.options()
        with Store(out, settings) as store:
            try:
                if tasks := missing(records, names, store):
                    needed = reference if any(METHODS[name].needs_reference for name in names) else None
                    with resumable(out):
                        with Console(stderr=True).status("loading the models"):
                            guided = replace(guided, **load_reward(reward, loading))
                            pair = load_models(base, pilot, needed, loading=loading)
                        given = {kind.name: kind for kind in (config, nudging, guided)}
                        chosen = {name: kind() for name, kind in STRATEGIES.items()} | given
                        bench = Bench(pair, URIAL_PROMPT if base else polite_examples(), chosen, max_new_tokens)
                        answer_all(tasks, records, bench, scorer, store, lambda tasks: progress(tasks, "answering"))
            except (KeyboardInterrupt, SystemExit):
                _show(out, records, names, settings, store)
                raise
            _show(out, records, names, settings, store)


def _names(strategies: str, reference: str | None, reward: str | None) -> list[str]:
    """The chosen methods, after the base, whose times are the measure of the others'."""
    asked = [name.strip() for name in strategies.split(",")]
    names = list(dict.fromkeys(["base", *(ALIASES.get(name, name) for name in asked)]))
    for name in names:
        if name not in METHODS:
            raise WSDValueError(f"--strategies: {name!r} is unknown; known are {', '.join(METHODS)}")
        if METHODS[name].needs_reference and reference is None:
            raise WSDValueError(f"--strategies: {name} needs --reference, the pilot as it was before its alignment")
        if METHODS[name].needs_reward and reward is None:
            raise WSDValueError(f"--strategies: {name} needs --reward, a function or a model")
    return names


def _records(prompts: Path | None, shipped: bool, skip_bad: bool) -> list[Record]:
    if prompts is not None:
        return read_prompts(prompts, skipped=_warn if skip_bad else None)
    if shipped:
        return demo_questions()
    raise WSDValueError("--prompts is missing: the shipped questions are for the shipped pair only")


def _model(source: str | None) -> str | None:
    """A model's path as it is valid in every folder, or its Hub id."""
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


def _warn(problem: str) -> None:
    say(f"skipped: {problem}", err=True)


def _show(folder: Path, records: Sequence[Record], strategies: Sequence[str], settings: dict[str, Any], store: Store) -> None:
    """Writes and prints the table and the page; of a stopped run, of the prompts that every method has answered."""
    answers = comparable(records, strategies, store)
    if not answers:
        return
    rows = table_rows(answers.values(), strategies, missing=len(records) - len(answers) // len(strategies))
    _write(folder, rows, settings, page(records, strategies, answers, rows))
    Console().print(terminal(rows))
    say(f"The responses side by side: {folder / 'responses.html'}", err=True)


def _write(folder: Path, rows: Sequence[Row], settings: dict[str, Any], responses: str) -> None:
    data = {"settings": settings, "strategies": [asdict(row) for row in rows]}
    files = {
        "table.csv": as_csv(rows),
        "table.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
        "table.md": markdown(rows),
        "responses.html": responses,
    }
    for name, text in files.items():
        write_whole(folder / name, text)
