"""`wsd-hf compare`: from its options to the files that it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..comparison import answer_all, comparable, missing
from ..comparison.judges import find_judge
from ..comparison.methods import ALIASES, METHODS
from ..comparison.page import page
from ..comparison.prompts import Record, read_prompts
from ..comparison.replies import Bench
from ..comparison.store import Store
from ..comparison.table import Row, as_csv, markdown, table_rows, terminal
from ..engine.numbers import check_probability
from ..engine.strategy import StrategyConfig
from ..errors import WSDValueError
from ..files import write_whole
from ..strategies import STRATEGIES
from ..strategies.nudging.config import NudgingConfig
from ..strategies.wsd.config import WSDConfig
from ..text.urial import URIAL_PROMPT
from ..tiny import demo_questions, polite_examples
from .models import DType, load_models
from .runs import progress, resumable
from .terminal import say


@dataclass(frozen=True)
class Comparison:
    """The options of the command; `run` carries them out."""

    base: str | None
    pilot: str | None
    reference: str | None
    prompts: Path | None
    strategies: str
    judge: str | None
    threshold: float
    window_size: int
    nudging_threshold: float
    max_new_tokens: int
    device: str
    dtype: DType
    skip_bad: bool

    def run(self, folder: Path) -> None:
        """Gives the answers that the folder lacks, then shows and writes the table and the page of all; also when stopped."""
        config = WSDConfig(threshold=self.threshold, window_size=self.window_size)
        nudging = NudgingConfig(threshold=check_probability("nudging_threshold", self.nudging_threshold))
        strategies = self._strategies()
        judge = find_judge(self.judge) if self.judge else None
        records = self._records()
        settings = self._settings(strategies, records)
        with Store(folder, settings) as store:
            try:
                if tasks := missing(records, strategies, store):
                    with resumable(folder):
                        bench = self._bench(strategies, config, nudging)
                        answer_all(tasks, records, bench, judge, store, lambda tasks: progress(tasks, "answering"))
            except (KeyboardInterrupt, SystemExit):
                _show(folder, records, strategies, settings, store)
                raise
            _show(folder, records, strategies, settings, store)

    def _strategies(self) -> list[str]:
        """The chosen methods, after the base, whose times are the measure of the others'."""
        asked = [name.strip() for name in self.strategies.split(",")]
        names = list(dict.fromkeys(["base", *(ALIASES.get(name, name) for name in asked)]))
        for name in names:
            if name not in METHODS:
                raise WSDValueError(f"--strategies: {name!r} is unknown; known are {', '.join(METHODS)}")
            if METHODS[name].needs_reference and self.reference is None:
                raise WSDValueError(f"--strategies: {name} needs --reference, the pilot as it was before its alignment")
        return names

    def _records(self) -> list[Record]:
        if self.prompts is not None:
            return read_prompts(self.prompts, skipped=_warn if self.skip_bad else None)
        if self.base is None and self.pilot is None:
            return demo_questions()
        raise WSDValueError("--prompts is missing: the shipped questions are for the shipped pair only")

    def _settings(self, strategies: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
        return {
            "--base": _model(self.base),
            "--pilot": _model(self.pilot),
            "--reference": _model(self.reference),
            "--prompts": f"{len(records)} prompts, SHA-256 {digest[:16]}",
            "--strategies": ",".join(strategies),
            "--judge": self.judge,
            "--threshold": self.threshold,
            "--window-size": self.window_size,
            "--nudging-threshold": self.nudging_threshold,
            "--max-new-tokens": self.max_new_tokens,
            "--device": self.device,
            "--dtype": self.dtype.value,
        }

    def _bench(self, names: Sequence[str], *given: StrategyConfig) -> Bench:
        needed = any(METHODS[name].needs_reference for name in names)
        with Console(stderr=True).status("loading the models"):
            pair = load_models(self.base, self.pilot, self.reference if needed else None, self.device, self.dtype)
        strategies = {one.name: one for one in given}
        strategies |= {name: STRATEGIES[name]() for name in names if name in STRATEGIES and name not in strategies}
        return Bench(pair, URIAL_PROMPT if self.base else polite_examples(), strategies, self.max_new_tokens)


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
