"""`wsd-hf diagnose`: from its options to the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..comparison.store import Store
from ..diagnosis.diagnosis import of_readings
from ..diagnosis.reading import Reading, Writer, check_prompts, read, reading_tasks
from ..diagnosis.summary import summary
from ..errors import WSDValueError
from ..files import write_whole
from ..strategies.wsd.switch_rules import SwitchRule
from .inputs import add_padding, described, place_of, prompt_records
from .models import Loading, load_models, takes_loading
from .options import Base, IgnoreRepeats, Pilot, SwitchCriteria, Threshold, WindowSize, one_line_errors, switch_rule
from .runs import progress, resumable
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
        chats = [record["messages"] for record in records]
        with Store(out / "readings.jsonl", Reading, _key, settings) as store:
            try:
                if tasks := reading_tasks(len(chats), store.lines, batch_size, own_answers):
                    with resumable(out):
                        with Console(stderr=True).status("loading the models"):
                            pair = load_models(base, pilot, loading=loading)
                        if batch_size > 1:
                            add_padding(pair)
                        check_prompts(pair, chats)
                        for task in progress(tasks, "reading"):
                            for reading in read(pair, chats, task, max_draft_tokens):
                                store.add(reading)
            except (KeyboardInterrupt, SystemExit):
                _show(out, settings, store.lines.values(), max_draft_tokens, rule)
                raise
            _show(out, settings, store.lines.values(), max_draft_tokens, rule)


def _key(reading: Reading) -> tuple[int, Writer]:
    return reading.prompt, reading.writer


def _show(folder: Path, settings: dict[str, Any], readings: Iterable[Reading], most: int, rule: SwitchRule) -> None:
    """Writes numbers and page, and prints a summary; of a stopped run, of the texts that have been read."""
    found = list(readings)
    if not any(reading.writer == "pilot" for reading in found):
        return
    diagnosis = of_readings(found, most, rule)
    data = {"settings": settings, **diagnosis.to_dict()}
    write_whole(folder / "diagnosis.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    Console().print(*summary(diagnosis), sep="\n")
    try:
        write_whole(folder / "diagnosis.html", diagnosis.to_html())
    except WSDValueError as error:  # the plots need a package
        say(f"no page: {error}", err=True)
    else:
        say(f"The page: {folder / 'diagnosis.html'}", err=True)
