"""`wsd-hf train-pilot`: from its options to a tuned pilot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..comparison.judges import JUDGES
from ..comparison.table import terminal
from ..errors import WSDValueError
from ..training.inputs import DEMO
from ..training.recipe import LEARNING_RATES, Recipe
from ..training.run import TunedPilot, train_pilot
from .models import known_device
from .options import (
    IgnoreRepeats,
    MaxNewTokens,
    SwitchCriteria,
    Threshold,
    WindowSize,
    one_line_errors,
    wsd_config,
)
from .runs import LINES, progress, resumable
from .terminal import say


def train_pilot_command(
    pilot: Annotated[str, typer.Option(help="Pilot to train, a path or Hub id; it is left as it is.")],
    data: Annotated[str, typer.Option(help=f"Examples: a file, a folder, a Hub id, or {DEMO}, the shipped ones.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped is resumed there.")],
    base: Annotated[
        str | None, typer.Option(help="Base, a path or Hub id: where it takes over, the trained part ends.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help=f"Held-out prompts for the table: a file, as for compare, or {DEMO}, the shipped questions."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help=f"Judge of the answers to them: {', '.join(JUDGES)}, or package.module:function.")
    ] = None,
    part: Annotated[str, typer.Option(help="Trained part of each chosen answer: drafted, whole, or a number of tokens.")] = str(
        Recipe.part
    ),
    objective: Annotated[str, typer.Option(help="sft, or dpo+sft, which needs rejected answers.")] = Recipe.objective,
    lora_rank: Annotated[int, typer.Option(help="Rank of a LoRA adapter; 0 trains all weights.", min=0)] = Recipe.lora_rank,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.", min=1)] = Recipe.epochs,
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Default: {LEARNING_RATES[True]:g} for LoRA, {LEARNING_RATES[False]:g} for all weights."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all processes.", min=1)] = Recipe.batch_size,
    device_batch_size: Annotated[
        int, typer.Option(help="Most examples in one forward of a process.", min=1)
    ] = Recipe.device_batch_size,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and answer.", min=1)] = Recipe.max_length,
    beta: Annotated[float, typer.Option(help="Of DPO.")] = Recipe.beta,
    seed: Annotated[int, typer.Option(help="Of the order of examples and of new adapters.", min=0)] = Recipe.seed,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.", min=1)] = Recipe.checkpoint_every,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unusable examples out.")] = False,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    max_new_tokens: MaxNewTokens = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda; a launcher gives each process a GPU of its own.")] = "cpu",
) -> None:
    """Trains a pilot on the beginnings of good answers, and compares it with the untuned one on held-out prompts."""
    with one_line_errors():
        recipe = Recipe(
            part=int(part) if part.isdecimal() else part,  # type: ignore[arg-type]  # it checks
            objective=objective,  # type: ignore[arg-type]  # it checks
            lora_rank=lora_rank,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            device_batch_size=device_batch_size,
            max_length=max_length,
            beta=beta,
            seed=seed,
            checkpoint_every=checkpoint_every,
        )
        rule = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        if device not in ("cpu", "cuda"):
            raise WSDValueError(f"--device {device}: must be cpu or cuda")
        known_device(device)
        with resumable(out):
            tuned = train_pilot(
                pilot,
                data,
                out,
                base=base,
                prompts=prompts,
                judge=judge,
                split=split,
                skipped=_warn if skip_bad else None,
                recipe=recipe,
                wsd_config=rule,
                max_new_tokens=max_new_tokens,
                device=device,
                report=_report,
                progress=lambda tasks: progress(tasks, "answering"),
            )
        if tuned is not None:
            _show(tuned)


def _warn(problem: str) -> None:
    say(f"skipped: {problem}", err=True)


def _report(step: int, steps: int, loss: float) -> None:
    if step == 1 or step == steps or step % -(-steps // LINES) == 0:
        say(f"training: {step} of {steps}, loss {loss:.3f}", err=True)


def _show(tuned: TunedPilot) -> None:
    if tuned.table:
        Console().print(terminal(tuned.table))
    say(
        f"Mean log-probability of a trained token: {tuned.log_prob_before:.2f} before, {tuned.log_prob_after:.2f} after "
        f"({tuned.trained_tokens:,} tokens)"
    )
    for warning in tuned.warnings:
        say(f"Warning: {warning}", err=True)
    say(f"The tuned pilot: {tuned.folder}", err=True)
