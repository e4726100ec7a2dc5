"""A training: from examples to a pilot, its model card, and a table of what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..comparison.replies import Bench
from ..comparison.store import keep_settings
from ..comparison.table import Row as TableRow
from ..comparison.table import markdown
from ..errors import WSDValueError
from ..files import only_writer, write_whole
from ..generation import enable_wsd
from ..hub.loading import Fetched, fetch_model, read_model
from ..pair import Pair
from ..strategies.wsd.config import WSDConfig
from ..strategies.wsd.switch_rules import SWITCH_RULES
from .card import tuned_card
from .examples import Example
from .folder import ADAPTER, CHECKPOINTS, HANDOVERS, LOSSES, PILOT
from .handover import handovers
from .inputs import Inputs, Source
from .masking import Row, cut
from .measures import AFTER, BEFORE, Progress, answer_held_out, before_and_after, mean_log_prob, warnings_of
from .recipe import Recipe, Report


@dataclass(frozen=True, kw_only=True)
class TunedPilot:
    """A tuned pilot, and what the training changed.

    Attributes:
        folder: the pilot's: weights, tokenizer and model card. `load_pilot` and `Pair.from_pretrained` take it.
        adapter: folder of the LoRA adapter alone; None if all weights were trained.
        trained_tokens: number of tokens in the trained parts of all examples.
        losses: of each step: `{"step": 1, "loss": 2.3}`.
        log_prob_before, log_prob_after: mean log-probability of a token in the trained parts of chosen answers, in nats.
        table: rows of the base, and of pilot and WSD before and after, over the held-out prompts; empty without prompts.
        warnings: signs that the pilot got worse.
    """

    folder: Path
    adapter: Path | None
    trained_tokens: int
    losses: list[dict[str, float]]
    log_prob_before: float
    log_prob_after: float
    table: list[TableRow]
    warnings: list[str]


def train_pilot(
    pilot: Source,
    data: Source,
    out: Source,
    *,
    base: Source | None = None,
    prompts: Source | None = None,
    judge: str | None = None,
    split: str = "train",
    skipped: Callable[[str], None] | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    wsd_config: WSDConfig = WSDConfig(),  # noqa: B008 (frozen)
    max_new_tokens: int = 256,
    device: str = "cpu",
    report: Report | None = None,
    progress: Progress = iter,
) -> TunedPilot | None:
    """Trains a pilot on the beginnings of good answers, and measures what that changed.

    A run that was stopped at any moment is resumed by the same call; on a CPU, the weights become those of a run that was
    never stopped.

    Args:
        pilot: folder or Hub id of the pilot to train; it is left as it is.
        data: examples: a file, a folder, a Hub id, or `"tiny_world"`, the shipped ones; see `read_examples`. The last alone
            means the shipped base, questions and judge too.
        out: folder of the run: the tuned `pilot`, its `adapter`, settings, losses, table, and answers `before` and `after`.
        base: folder or Hub id of the base, for the places where it takes over, and for the table.
        prompts: file of held-out prompts, as for `wsd-hf compare`, for the table; or `"tiny_world"`, the shipped questions.
        judge: of the answers to them, as for `wsd-hf compare`.
        split: of the examples; see `read_examples`.
        skipped: called with the error of each unusable example, which is left out; without it, such an example is an error.
        recipe: settings of the training.
        wsd_config: its switch rule is that by which the base takes over.
        max_new_tokens: most tokens of an answer to a held-out prompt.
        device: "cpu" or "cuda".
        report: called after each step with its number, the number of all steps, and its loss.
        progress: goes through the answers to held-out prompts.

    Returns:
        The tuned pilot; None in every process of a launcher but the first.

    Raises:
        WSDValueError: examples, prompts, a judge or settings that cannot work, before any weights are loaded; or `out` holds a
            run of other settings.
        WSDHubError: a model that cannot be had, or is damaged; see `load_pilot`.
    """
    try:
        from accelerate import PartialState

        from .trainer import train
    except ImportError as error:
        raise WSDValueError(f'training needs TRL, PEFT and datasets ({error}); pip install "wsd_hf[train]"') from None
    inputs = Inputs.read(pilot, data, base, prompts, judge, recipe, split, skipped)
    settings = {
        **inputs.settings,
        **asdict(recipe),
        "learning_rate": recipe.peak_learning_rate,
        **_rule(wsd_config),
        "max_new_tokens": max_new_tokens,
        "device": device,
    }
    folder, state = Path(out), PartialState(cpu=device == "cpu")
    recipe.forwards_per_step(state.num_processes)
    with ExitStack() as held:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_writer(folder / "settings.json"))
            started = any((folder / name).exists() for name in (HANDOVERS, CHECKPOINTS, PILOT))
            keep_settings(folder / "settings.json", settings, started=started)
        with state.main_process_first():
            rows = _trained_parts(inputs, recipe, wsd_config, folder, device)
        if not (folder / PILOT).exists():
            train(inputs.pilot, rows, recipe, folder, device, report)
        if not state.is_main_process:
            return None
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return _measured(inputs, rows, settings, wsd_config, folder, progress)


def _trained_parts(inputs: Inputs, recipe: Recipe, wsd_config: WSDConfig, folder: Path, device: str) -> list[Row]:
    """The trained part of each example; the base reads the answers whose drafted part is not known, once."""
    examples, file = inputs.examples, folder / HANDOVERS
    ends: list[int | None] = [_unless_whole(example, example.drafted) for example in examples]
    unknown = [number for number, example in enumerate(examples) if example.drafted is None]
    if recipe.part == "drafted" and unknown and inputs.base is not None:
        if not file.exists():
            pair = Pair(
                enable_wsd(_read(inputs.base, device)),
                _read(inputs.pilot, device),
                inputs.base.tokenizer,
                inputs.pilot.tokenizer,
            )
            found = handovers(pair, [examples[number] for number in unknown], wsd_config.switch_rule())
            write_whole(file, json.dumps([asdict(handover) for handover in found], indent=1) + "\n")
        for number, handover in zip(unknown, json.loads(file.read_text("utf-8")), strict=True):
            never = handover["tokens"] is None
            ends[number] = _unless_whole(examples[number], handover["characters"]) if never else handover["characters"]
    return cut(inputs.encoded, ends, recipe)


def _unless_whole(example: Example, characters: int | None) -> int | None:
    """None for a draft that is the whole answer, whose end the pilot writes too."""
    return None if characters == len(example.chosen) else characters


def _rule(config: WSDConfig) -> dict[str, Any]:
    """Settings of the switch rule; a WSDValueError if it has no name, by which the settings of a run are kept."""
    if not isinstance(config.switch_criteria, str):
        raise WSDValueError(
            f"switch_criteria={config.switch_criteria!r}: must be the name of a rule ({', '.join(SWITCH_RULES)})"
        )
    names = ("switch_criteria", "threshold", "window_size", "ignore_repeats")
    return {name: getattr(config, name) for name in names}


def _measured(
    inputs: Inputs,
    rows: Sequence[Row],
    settings: dict[str, Any],
    wsd_config: WSDConfig,
    folder: Path,
    progress: Progress,
) -> TunedPilot:
    """Measures the untuned and the tuned pilot, and writes table and model card."""
    device, answers, log_probs = settings["device"], [], []
    base = None if inputs.base is None or not inputs.records else _read(inputs.base, device)
    for when, pilot in ((BEFORE, inputs.pilot), (AFTER, fetch_model(str(folder / PILOT), "pilot"))):
        model = _read(pilot, device)
        log_probs.append(mean_log_prob(model, rows))
        if base is not None and inputs.base is not None:
            pair = Pair(enable_wsd(base), model, inputs.base.tokenizer, pilot.tokenizer)
            bench = Bench(pair, examples=[], max_new_tokens=settings["max_new_tokens"])
            answers += answer_held_out(
                when, bench, wsd_config, inputs.records, inputs.judges, folder / when, settings, progress
            )
    before, after = log_probs
    table = before_and_after(answers) if answers else []
    tuned = TunedPilot(
        folder=folder / PILOT,
        adapter=folder / ADAPTER if (folder / ADAPTER).exists() else None,
        trained_tokens=sum(len(row.chosen) for row in rows),
        losses=json.loads((folder / LOSSES).read_text("utf-8")),
        log_prob_before=before,
        log_prob_after=after,
        table=table,
        warnings=warnings_of((before, after), table),
    )
    card = tuned_card(folder.resolve().name, settings, (before, after), table, tuned.warnings)
    write_whole(folder / PILOT / "README.md", str(card))
    result = {
        "settings": settings,
        **{name: getattr(tuned, name) for name in ("trained_tokens", "log_prob_before", "log_prob_after", "warnings")},
        "table": [row.to_dict() for row in table],
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if table:
        write_whole(folder / "table.md", markdown(table))
    return tuned


def _read(fetched: Fetched, device: str) -> Any:
    """A model for answers: in float32 on a CPU, where half precision is slow."""
    return read_model(fetched, torch.float32 if device == "cpu" else "auto").to(device)
