"""Prompts and models of a run, as its options name them and as its settings describe them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..comparison.prompts import Record, read_prompts
from ..engine.checks import vocabulary_size
from ..errors import WSDValueError
from ..pair import Pair
from ..ranks import Rank
from ..tiny import demo_questions
from .terminal import say


def prompt_records(
    prompts: Path | None, shipped: bool, skip_bad: bool, check: Callable[[Record], None] | None = None
) -> list[Record]:
    """Prompts of a file, each of which passes `check`; without one, and with the shipped pair, the shipped questions."""
    if prompts is not None:
        return read_prompts(prompts, _warn if skip_bad else None, check)
    if shipped:
        return demo_questions()
    raise WSDValueError("--prompts is missing: the shipped questions are for the shipped pair only")


def described(records: Sequence[Record]) -> str:
    """Number of some prompts, and a digest of them."""
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    return f"{len(records)} prompts, SHA-256 {digest[:16]}"


def place_of(source: str | None) -> str | None:
    """A model's path as it is valid in every folder, or its Hub id."""
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


def add_padding(pair: Pair) -> None:
    """Gives tokenizers whose pad token is none of the model's the EOS as such: which token it is makes no difference."""
    for model, tokenizer in ((pair.base, pair.tokenizer), (pair.pilot, pair.pilot_tokenizer)):
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary_size(model):
            tokenizer.pad_token = tokenizer.eos_token


def _warn(problem: str) -> None:
    if Rank.from_environment().first:
        say(f"skipped: {problem}", err=True)
