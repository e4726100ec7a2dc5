"""`wsd-hf diagnose`: from its options to the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..comparison.store import Store
from ..diagnosis.diagnosis import of_readings
from ..diagnosis.forwards import Prediction
from ..diagnosis.predictions import Continuations, continued, predictable, predictions
from ..diagnosis.reading import Reading, Writer, check_prompts, read, reading_tasks
from ..diagnosis.suggestion import compare_command
from ..diagnosis.suggestion import suggest as suggestions
from ..diagnosis.summary import summary
from ..errors import WSDValueError
from ..files import write_whole
from ..pair import Pair
from ..ranks import Rank
from ..strategies.wsd.switch_rules import SwitchRule
from ..text.chat import Messages
from .inputs import add_padding, described, place_of, prompt_records
from .models import Loading, load_models, takes_loading
from .options import Base, IgnoreRepeats, Pilot, SwitchCriteria, Threshold, WindowSize, one_line_errors, switch_rule
from .runs import ends, progress, resumable, status
from .terminal import say


@takes_loading
def diagnose(
    out: Annotated[Path, typer.Option(help="Folder for readings, numbers and page; a run that was stopped is resumed there.")],
    base: Base = None,
    pilot: Pilot = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Lines of {"prompt": ...} or {"messages": [...]}. Default: the shipped questions.')
    ] = None,
    max_draft_tokens: Annotated[
        int, typer.Option(help="Most tokens of a draft and of an own answer, in the base's vocabulary.", min=1)
    ] = 96,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered together.", min=1)] = 1,
    own_answers: Annotated[
        bool, typer.Option("--own-answers/--no-own-answers", help="Whether the base answers too, which takes most of the time.")
    ] = True,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Predict the costs of every method; the base continues each draft at some places.")
    ] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Print a wsd-hf compare of settings that differ in what they do here.")
    ] = False,
    *,
    loading: Loading,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed prompts out.")] = False,
) -> None:
    """Whether Weak-to-Strong Decoding suits a pair: where the base would take over the pilot's drafts, and why.

    The pilot drafts, and the base reads every draft once. The options of the switch rule choose which one the verdict is about;
    they take effect on readings that are there already.
    """
    with one_line_errors():
        rule = switch_rule(switch_criteria, threshold=threshold, window_size=window_size, ignore_repeats=ignore_repeats)
        records = prompt_records(prompts, shipped=base is None and pilot is None, skip_bad=skip_bad)
        settings = {
            "--base": place_of(base),
            "--pilot": place_of(pilot),
            "--prompts": described(records),
            "--max-draft-tokens": max_draft_tokens,
            "--batch-size": batch_size,
        } | loading.options()
        if predict and not own_answers:
            raise WSDValueError("--predict needs the base's own answers, whose time is the measure: leave --no-own-answers out")
        chats = [record["messages"] for record in records]
        rank = Rank.from_environment()
        with Store(out / "readings.jsonl", Reading, _key, settings, rank) as store:
            tasks = reading_tasks(len(chats), store.lines, batch_size, own_answers, rank)
            costs: list[Prediction] = []
            try:
                with resumable(out):
                    if tasks or predict:
                        pair = _pair(base, pilot, loading, chats, batch_size)
                    for task in progress(tasks, "reading"):
                        for reading in read(pair, chats, task, max_draft_tokens):
                            if _key(reading) not in store.lines:
                                store.add(reading)
                    whole = reading_tasks(len(chats), (), batch_size, own_answers)
                    last = store.finish([(number, writer) for writer, numbers in whole for number in numbers])
                    if predict:
                        last, costs = _predictions(out, settings, pair, chats, store, rule, rank)
            except (KeyboardInterrupt, SystemExit):
                if rank.first:
                    store.refresh()
                    _show(out, settings, [*store.lines.values()], rule, costs)
                raise
            if not ends(last):
                return
            _show(out, settings, [*store.lines.values()], rule, costs)
        if suggest:
            found = of_readings(store.lines.values(), max_draft_tokens, rule)
            given = {name: value for name, value in loading.options().items() if value != Loading().options()[name]}
            options: dict[str, str | int | None] = {
                "--base": base,
                "--pilot": pilot,
                "--prompts": str(prompts) if prompts else None,
                "--max-new-tokens": max_draft_tokens,
                "--batch-size": batch_size if batch_size > 1 else None,
                "--out": str(out / "compare"),
                **given,
            }
            say(compare_command(suggestions(found), options))


def _key(reading: Reading) -> tuple[int, Writer]:
    return reading.prompt, reading.writer


def _pair(base: str | None, pilot: str | None, loading: Loading, chats: Sequence[Messages], batch_size: int) -> Pair:
    """The models, which can read all prompts, and in batches if they must."""
    with status("loading the models"):
        pair = load_models(base, pilot, loading=loading)
    if batch_size > 1:
        add_padding(pair)
    check_prompts(pair, chats)
    return pair


def _predictions(
    folder: Path,
    settings: dict[str, Any],
    pair: Pair,
    chats: Sequence[Messages],
    readings: Store[Reading, tuple[int, Writer]],
    rule: SwitchRule,
    rank: Rank,
) -> tuple[bool, list[Prediction]]:
    """Whether this process ends the run, and if so the costs of methods; their texts are kept beside the readings."""
    most, methods = settings["--max-draft-tokens"], predictable(pair, rule)
    with Store(folder / "continuations.jsonl", Continuations, lambda line: line.prompt, settings, rank) as store:
        tasks = reading_tasks(len(chats), (), settings["--batch-size"], own_answers=False, rank=rank)
        left = [number for _, numbers in tasks for number in numbers if number not in store.lines]
        for number in progress(left, "continuing drafts"):
            store.add(continued(pair, chats[number], readings.lines[number, "pilot"], methods, most))
        if not store.finish(range(len(chats))):
            return False, []
    readings.refresh()
    numbers = range(len(chats))
    drafts = [readings.lines[number, "pilot"] for number in numbers]
    own = [readings.lines[number, "base"] for number in numbers]
    return True, predictions(pair, drafts, own, methods, [store.lines[number] for number in numbers], most)


def _show(
    folder: Path, settings: dict[str, Any], readings: Sequence[Reading], rule: SwitchRule, costs: Sequence[Prediction]
) -> None:
    """Writes numbers and page, and prints a summary; of a stopped run, of the texts that have been read."""
    if not any(reading.writer == "pilot" for reading in readings):
        return
    diagnosis = replace(of_readings(readings, settings["--max-draft-tokens"], rule), predictions=costs)
    data = {"settings": settings, **diagnosis.to_dict()}
    write_whole(folder / "diagnosis.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    Console().print(*summary(diagnosis), sep="\n")
    try:
        write_whole(folder / "diagnosis.html", diagnosis.to_html())
    except WSDValueError as error:  # the plots need a package
        say(f"no page: {error}", err=True)
    else:
        say(f"The page: {folder / 'diagnosis.html'}", err=True)
