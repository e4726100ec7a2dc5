"""`wsd-hf compare`: from its options to the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..comparison import Answers, Plan, open_answers
from ..comparison.judges import Judge
from ..comparison.methods import METHODS
from ..comparison.page import page
from ..comparison.prompts import Record
from ..comparison.replies import GREEDY, Answer, Bench
from ..comparison.table import Row, as_csv, by_key, markdown, table_rows, terminal
from ..comparison.variants import Variant, read_variants
from ..engine.numbers import MOST_SAMPLES, check_probability
from ..errors import WSDValueError
from ..files import write_whole
from ..ranks import Rank
from ..strategies.nudging.config import NudgingConfig
from ..strategies.reward_guided.config import RewardGuidedConfig
from ..text.urial import URIAL_PROMPT
from ..tiny import polite_examples
from .inputs import add_padding, described, place_of, prompt_records
from .judges import JudgeModel, JudgePrompt, Judges, JudgeUrl, load_judges
from .models import Loading, load_models, takes_loading
from .options import (
    Base,
    IgnoreRepeats,
    MaxNewTokens,
    Pilot,
    Reference,
    Seed,
    SwitchCriteria,
    Threshold,
    TopP,
    WindowSize,
    one_line_errors,
    sampling,
    wsd_config,
)
from .rewards import Reward, load_reward
from .runs import ends, progress, resumable, status
from .terminal import by_rank, say


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
    strategies: Annotated[
        str,
        typer.Option(help=f"Some of {', '.join(METHODS)}; with settings of their own: wsd:threshold=0.6,window_size=6."),
    ] = "base,pilot,urial,nudging,wsd",
    judge: Judges = None,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    judge_prompt: JudgePrompt = None,
    by: Annotated[str | None, typer.Option(help="Key of the prompts' lines: a table for each of its values too.")] = None,
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
    temperature: Annotated[
        float | None, typer.Option(help="All methods sample at this temperature. Default: greedy, but for methods that sample.")
    ] = None,
    top_p: TopP = None,
    samples: Annotated[
        int, typer.Option(help="Answers of each method to each prompt, if they are sampled.", min=1, max=MOST_SAMPLES)
    ] = 1,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts that are answered together.", min=1)] = 1,
    *,
    loading: Loading,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed prompts out.")] = False,
) -> None:
    """Answers the same prompts in several ways: a table of costs and scores, and the answers side by side."""
    with one_line_errors():
        rule: dict[str, Any] = {
            "threshold": threshold,
            "window_size": window_size,
            "switch_criteria": switch_criteria,
            "ignore_repeats": ignore_repeats,
        }
        config = wsd_config(**rule)
        check_probability("nudging_threshold", nudging_threshold)
        defaults: dict[str, dict[str, Any]] = {
            "wsd": {name: value for name, value in rule.items() if value is not None},
            "nudging": {"threshold": nudging_threshold},
            "reward_guided": {"threshold": reward_threshold},
        }
        variants = _variants(strategies, defaults, reference, reward)
        drawing = _drawing(temperature, top_p, samples, seed, variants)
        judges = load_judges(judge, judge_model, judge_url, judge_prompt)
        records = _records(prompts, judges, shipped=base is None and pilot is None, skip_bad=skip_bad)
        _check_by(by, records)
        settings = {
            "--base": place_of(base),
            "--pilot": place_of(pilot),
            "--reference": place_of(reference),
            "--reward": place_of(reward),
            "--prompts": described(records),
            "--strategies": ",".join(variant.name for variant in variants),
            "--judge": ",".join(judges) or None,
            "--threshold": config.threshold,
            "--window-size": config.window_size,
            "--switch-criteria": switch_criteria,
            "--ignore-repeats": ignore_repeats,
            "--nudging-threshold": nudging_threshold,
            "--reward-threshold": reward_threshold,
            "--temperature": temperature,
            "--top-p": top_p,
            "--samples": samples,
            "--seed": drawing["seed"],
            "--max-new-tokens": max_new_tokens,
            "--batch-size": batch_size,
        }
        for part in (*(judge.settings for judge in judges.values()), loading.options()):
            settings |= part
        rank = Rank.from_environment()
        plan = Plan(records, variants, samples, batch_size, judges, rank)
        with open_answers(out, settings, judges, rank) as answers:
            try:
                with resumable(out):
                    plan.judge_all(plan.unjudged(answers), answers, _warn)
                if plan.missing(answers):
                    needed = reference if any(variant.method.needs_reference for variant in variants) else None
                    with resumable(out):
                        with status("loading the models"):
                            keywords = load_reward(reward, loading)
                            pair = load_models(base, pilot, needed, loading=loading)
                        if batch_size > 1:
                            add_padding(pair)
                        examples = URIAL_PROMPT if base else polite_examples()
                        bench = Bench(pair, examples, max_new_tokens, **drawing, reward=keywords)
                        doing = "answering" if batch_size == 1 else f"answering {batch_size} at a time"
                        plan.answer_all(bench, answers, lambda batches: progress(batches, doing), _warn)
            except (KeyboardInterrupt, SystemExit):
                if rank.first:
                    answers.refresh()
                    _show(out, plan, settings, answers, by)
                raise
            if ends(answers.finish(plan.tasks)):
                _show(out, plan, settings, answers, by)


def _variants(
    strategies: str, defaults: Mapping[str, Mapping[str, Any]], reference: str | None, reward: str | None
) -> list[Variant]:
    variants = read_variants(strategies, defaults)
    for variant in variants:
        if variant.method.needs_reference and reference is None:
            raise WSDValueError(f"--strategies: {variant.name} needs --reference, the pilot as it was before its alignment")
        if variant.method.needs_reward and reward is None:
            raise WSDValueError(f"--strategies: {variant.name} needs --reward, a function or a model")
    return variants


def _drawing(
    temperature: float | None, top_p: float | None, samples: int, seed: int | None, variants: Sequence[Variant]
) -> dict[str, Any]:
    """The sampling of a `Bench` and its seed."""
    keywords = sampling(temperature, top_p) or GREEDY
    if keywords["do_sample"]:
        return {"sampling": keywords, "seed": seed or 0}
    for variant in variants:
        if temperature is not None and variant.strategy is not None and variant.strategy.always_samples:
            raise WSDValueError(f"--temperature 0: {variant.name} chooses among samples; leave one of them out")
    for option, given in {f"--samples {samples}": samples > 1, f"--seed {seed}": seed is not None}.items():
        if given:
            raise WSDValueError(f"{option} has no effect on greedy answers: give --temperature or --top-p, or leave it out")
    return {"sampling": keywords, "seed": None}


def _records(prompts: Path | None, judges: Mapping[str, Judge], shipped: bool, skip_bad: bool) -> list[Record]:
    def check(record: Record) -> None:
        for judge in judges.values():
            judge.check(record)

    records = prompt_records(prompts, shipped, skip_bad, check)
    if "checks" in judges and not any("check" in record for record in records):
        raise WSDValueError('--judge checks: no prompt has a "check", the pattern of a right answer')
    return records


def _check_by(by: str | None, records: Sequence[Record]) -> None:
    for number, record in enumerate(records, start=1):
        if by is not None and by not in record:
            raise WSDValueError(f"--by {by}: prompt {number} has no such key; it has {', '.join(record)}")


def _warn(problem: str) -> None:
    say(by_rank(problem), err=True)


def _show(folder: Path, plan: Plan, settings: dict[str, Any], answers: Answers, by: str | None) -> None:
    """Writes and prints tables and page; of a stopped run, of the prompts that every variant has answered."""
    found = plan.comparable(answers)
    if not found:
        return
    names = [variant.name for variant in plan.variants]
    missing = len(plan.records) - len({answer.prompt for answer in found})
    rows = table_rows(found, names, missing)
    groups = by_key(found, plan.records, by) if by else {}
    tables = {value: table_rows(some, names) for value, some in groups.items()}
    side_by_side: dict[tuple[int, str], list[Answer]] = {}
    for answer in sorted(found, key=lambda answer: answer.sample):
        side_by_side.setdefault((answer.prompt, answer.strategy), []).append(answer)
    _write(folder, rows, by, tables, settings, page(plan.records, names, side_by_side, rows))
    Console().print(terminal(rows))
    for value, some in tables.items():
        Console().print(terminal(some, f"{by}: {value}"))
    say(f"The responses side by side: {folder / 'responses.html'}", err=True)


def _write(
    folder: Path,
    rows: Sequence[Row],
    by: str | None,
    tables: Mapping[str, Sequence[Row]],
    settings: dict[str, Any],
    responses: str,
) -> None:
    data: dict[str, Any] = {"settings": settings, "strategies": [row.to_dict() for row in rows]}
    if by:
        data["by"] = {by: {value: [row.to_dict() for row in some] for value, some in tables.items()}}
    sections = [f"\n## {by}: {value}\n\n{markdown(some)}" for value, some in tables.items()]
    files = {
        "table.csv": as_csv({"": rows, **tables}),
        "table.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
        "table.md": "".join([markdown(rows), *sections]),
        "responses.html": responses,
    }
    for name, text in files.items():
        write_whole(folder / name, text)
