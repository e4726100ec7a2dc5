"""`wsd-hf data-report` and `wsd-hf make-pairs`: data for the training of a pilot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..comparison import Answers, Plan, open_answers
from ..comparison.judges import JUDGES, Judge
from ..comparison.prompts import Record
from ..comparison.replies import Bench
from ..comparison.variants import Variant, read_variants
from ..engine.numbers import MOST_SAMPLES
from ..errors import WSDValueError
from ..files import write_whole
from ..ranks import Rank
from ..text.urial import URIAL_PROMPT
from ..tiny import polite_examples
from ..training.examples import DEMO, TINY_WORLD, read_examples
from ..training.pairs import Grading, as_lines, good_shares, preferences, terminal
from ..training.report import data_report
from .inputs import add_padding, described, place_of, prompt_records
from .judges import JudgeModel, JudgePrompt, JudgeUrl, load_judges
from .models import Loading, load_models, takes_loading
from .options import (
    Base,
    IgnoreRepeats,
    MaxNewTokens,
    Pilot,
    Seed,
    SwitchCriteria,
    Threshold,
    TopP,
    WindowSize,
    one_line_errors,
    sampling,
    wsd_config,
)
from .runs import ends, progress, resumable, status
from .terminal import by_rank, say

GOOD = {"llm": 7.0}
"""Default scores of a good answer, by the judge; 1 for all others."""


@takes_loading
def report_data(
    data: Annotated[
        str, typer.Option(help="Examples: a .parquet, .jsonl or .json file, a folder, tiny_world, or the Hub id of a data set.")
    ],
    base: Base = None,
    pilot: Pilot = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Read the first examples only.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers to this file, as JSON.")] = None,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    batch_size: Annotated[int, typer.Option(help="Most answers that the base reads together.", min=1)] = 8,
    *,
    loading: Loading,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave rows out that cannot be used.")] = False,
) -> None:
    """Reports where the base would take over the answers of training data, and so which parts of them teach a pilot."""
    with one_line_errors():
        rule = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        ).switch_rule()
        examples = read_examples(
            data, split=split, limit=limit, skipped=(lambda problem: _warn(f"skipped: {problem}")) if skip_bad else None
        )
        with Console(stderr=True).status("loading the models"):
            pair = load_models(base, pilot, loading=loading)
        report = data_report(pair, examples, rule, batch_size=batch_size, progress=lambda rows: progress(rows, "reading"))
        Console().print(report.table())
        say(report.summary())
        if out:
            write_whole(out, json.dumps(report.to_dict(), indent=1) + "\n")


@takes_loading
def make_pairs(
    out: Annotated[Path, typer.Option(help="Folder for samples and pairs; a run that was stopped is resumed there.")],
    judge: Annotated[
        str,
        typer.Option(help=f"{', '.join(JUDGES)}, or package.module:function, from a prompt's line and a response to a number."),
    ],
    base: Base = None,
    pilot: Pilot = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help='File with lines of {"prompt": ...} or {"messages": [...]}, or tiny_world, the questions of the shipped pairs.'
        ),
    ] = None,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePrompt = None,
    good: Annotated[
        float | None, typer.Option(help="Least score of a good answer. Default: 1; of --judge llm, which gives 1 to 10, 7.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Answers of each method to each prompt.", min=1, max=MOST_SAMPLES)] = 8,
    strategies: Annotated[str, typer.Option(help="Methods that answer, as for compare, such as base,pilot,wsd.")] = "wsd",
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    top_p: TopP = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered together.", min=1)] = 8,
    *,
    loading: Loading,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed prompts out.")] = False,
) -> None:
    """Makes training data from prompts and a judge alone: samples answers, and keeps the best and the worst of each prompt.

    An answer that was cut before it ended is never good.
    """
    with one_line_errors():
        rule = {
            "threshold": threshold,
            "window_size": window_size,
            "switch_criteria": switch_criteria,
            "ignore_repeats": ignore_repeats,
        }
        config = wsd_config(**rule)
        variants = _variants(strategies, {name: value for name, value in rule.items() if value is not None})
        drawing = sampling(temperature, top_p)
        if not drawing.get("do_sample"):
            raise WSDValueError("--temperature 0: greedy answers are all the same, and pairs need different ones")
        judges = load_judges([judge], judge_model, judge_url, judge_prompt)
        grading = Grading(judge, GOOD.get(judge, 1.0) if good is None else good)
        records = _records(prompts, judges[judge], base is None and pilot is None, skip_bad)
        settings: dict[str, Any] = {
            "--base": place_of(base),
            "--pilot": place_of(pilot),
            "--prompts": described(records),
            "--strategies": ",".join(variant.name for variant in variants),
            "--judge": judge,
            "--good": grading.least,
            "--samples": samples,
            "--threshold": config.threshold,
            "--window-size": config.window_size,
            "--switch-criteria": switch_criteria,
            "--ignore-repeats": ignore_repeats,
            "--temperature": temperature,
            "--top-p": top_p,
            "--seed": seed,
            "--max-new-tokens": max_new_tokens,
            "--batch-size": batch_size,
        }
        for part in (judges[judge].settings, loading.options()):
            settings |= part
        rank = Rank.from_environment()
        plan = Plan(records, variants, samples, batch_size, judges, rank)
        with open_answers(out, settings, judges, rank) as answers:
            try:
                with resumable(out):
                    plan.judge_all(plan.unjudged(answers), answers, _warn)
                    if plan.missing(answers):
                        with status("loading the models"):
                            pair = load_models(base, pilot, loading=loading)
                        add_padding(pair)
                        examples = URIAL_PROMPT if base else polite_examples()
                        bench = Bench(pair, examples, max_new_tokens, drawing, seed)
                        doing = f"answering {batch_size} at a time"
                        plan.answer_all(bench, answers, lambda batches: progress(batches, doing), _warn)
            except BaseException:
                if rank.first:
                    answers.refresh()
                    _write(out, plan, answers, grading)
                raise
            if ends(answers.finish(plan.tasks)):
                _write(out, plan, answers, grading)


def _variants(strategies: str, rule: Mapping[str, Any]) -> list[Variant]:
    """The methods that answer; the base is one of them only if it is named."""
    asked = [name.strip() for name in strategies.split(",")]
    variants = [variant for variant in read_variants(strategies, {"wsd": rule}) if variant.name != "base" or "base" in asked]
    for variant in variants:
        if variant.method.needs_reference or variant.method.needs_reward:
            raise WSDValueError(f"--strategies: {variant.name} needs a third model, which make-pairs does not take")
    return variants


def _records(prompts: str | None, judge: Judge, shipped: bool, skip_bad: bool) -> list[Record]:
    if prompts is None and not shipped:
        raise WSDValueError("--prompts is missing: the shipped questions, tiny_world, are for the shipped base only")
    file = TINY_WORLD if prompts in (None, DEMO) else Path(str(prompts))
    return prompt_records(file, shipped, skip_bad, judge.check)


def _write(folder: Path, plan: Plan, answers: Answers, grading: Grading) -> None:
    """Writes and prints what a run has found; of a stopped run, of the prompts that all methods have answered."""
    found = sorted(plan.comparable(answers), key=lambda answer: (answer.prompt, answer.sample))
    if not found:
        return
    preferred, shares = list(preferences(plan.records, found, grading)), good_shares(found, grading)
    pairs = sum("rejected" in line for line in preferred)
    numbers = {
        "prompts": len({answer.prompt for answer in found}),
        "chosen": len(preferred),
        "pairs": pairs,
        "strategies": [one.to_dict() for one in shares],
    }
    write_whole(folder / "pairs.jsonl", as_lines(preferred))
    write_whole(folder / "report.json", json.dumps(numbers, indent=1) + "\n")
    Console().print(terminal(shares))
    say(
        f"{len(preferred):,} of {numbers['prompts']:,} prompts have a good answer, {pairs:,} of them a bad one too: "
        f"{folder / 'pairs.jsonl'}"
    )


def _warn(problem: str) -> None:
    say(by_rank(problem), err=True)
