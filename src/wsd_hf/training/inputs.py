"""What a training is made from, read and checked before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..comparison.judges import Judge, find_judge
from ..comparison.prompts import Record, read_prompts
from ..engine.checks import eos_token_ids
from ..errors import WSDValueError
from ..hub.loading import Fetched, fetch_model
from ..tiny import FOLDER, demo_questions
from .examples import Example, read_examples
from .masking import EncodedExample, encode_examples
from .recipe import Recipe

Source = str | os.PathLike[str]

DEMO = "tiny_world"
"""Name of the shipped examples, and of the shipped questions and their judge."""


@dataclass(frozen=True)
class Inputs:
    """Models whose files are on this machine, the examples, and the held-out prompts.

    Attributes:
        pilot: the pilot to train.
        base: the base; None if nothing needs it.
        examples: chats with their answers.
        encoded: the same in the pilot's token ids.
        records: the held-out prompts; empty if nothing is compared.
        judges: of their answers, by name: one or none.
        settings: the names of all these, as plain JSON data.
    """

    pilot: Fetched
    base: Fetched | None
    examples: Sequence[Example]
    encoded: Sequence[EncodedExample]
    records: Sequence[Record]
    judges: Mapping[str, Judge]
    settings: dict[str, Any]

    @classmethod
    def read(
        cls,
        pilot: Source,
        data: Source,
        base: Source | None,
        prompts: Source | None,
        judge: str | None,
        recipe: Recipe,
        split: str,
        skipped: Callable[[str], None] | None,
    ) -> Inputs:
        """Reads everything that `train_pilot` was given; it documents arguments and errors."""
        if os.fspath(data) == DEMO and base is prompts is judge is None:
            base, prompts, judge = FOLDER / "base", DEMO, DEMO
        if prompts is not None and base is None:
            raise WSDValueError("prompts without base: base, pilot and both together are compared; give the base too")
        if judge is not None and prompts is None:
            raise WSDValueError(f"judge={judge!r} without prompts: there are no answers to judge; give held-out prompts too")
        judges = {judge: find_judge(judge)} if judge else {}
        records = [] if prompts is None else demo_questions() if prompts == DEMO else read_prompts(Path(prompts))
        _check_judged(records, judges)
        examples = read_examples(os.fspath(data), split=split, skipped=skipped)
        if base is None and recipe.part == "drafted" and any(example.drafted is None for example in examples):
            raise WSDValueError(
                "part='drafted' without base: the examples have no key drafted, so the base has to read them; give base, or "
                "another part"
            )
        small = fetch_model(os.fspath(pilot), "pilot")
        if small.adapter:
            raise WSDValueError(
                f"{pilot} is a model and an adapter: merge them (merge_and_unload), save the result, and train it"
            )
        encoded = encode_examples(examples, small.tokenizer, _ends(small), recipe)
        large = None if base is None else fetch_model(os.fspath(base), "base", use_safetensors=None)
        settings = {
            "pilot": _place(pilot),
            "data": f"{len(examples)} examples, SHA-256 {_digest([{**asdict(one), 'place': ''} for one in examples])}",
            "base": None if base is None else _place(base),
            "prompts": f"{len(records)} prompts, SHA-256 {_digest(records)}" if records else None,
            "judge": judge,
        }
        return cls(small, large, examples, encoded, records, judges, settings)


def _check_judged(records: Sequence[Record], judges: Mapping[str, Judge]) -> None:
    """Raises a WSDValueError for a prompt that cannot be judged."""
    for name, judge in judges.items():
        for number, record in enumerate(records, start=1):
            try:
                judge.check(record)
            except WSDValueError as error:
                raise WSDValueError(f"judge={name!r}: prompt {number}: {error}") from None


def _ends(pilot: Fetched) -> set[int]:
    """Token ids that end an answer of the pilot."""
    try:
        config = GenerationConfig.from_pretrained(pilot.folder)
    except OSError:
        return eos_token_ids(pilot.tokenizer)
    return eos_token_ids(config) | eos_token_ids(pilot.tokenizer)


def _place(source: Source) -> str:
    """A model's path as it is valid in every folder, or its Hub id."""
    return str(Path(source).resolve()) if Path(source).is_dir() else os.fspath(source)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
