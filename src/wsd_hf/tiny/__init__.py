"""A base and a pilot of a few megabytes, trained on a made-up world, for demos and tests that need no download.

They know that world and nothing else; `questions.json` holds questions that they can be asked, and `judge.py` judges the
answers. How they were trained and measured is told in `examples/tiny_world/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from wsd_hf.generation import AutoModelForCausalLM

FOLDER = Path(__file__).parent

__all__ = ["FOLDER", "demo_questions", "load_tiny_pair", "polite_examples"]


def load_tiny_pair(
    folder: Path = FOLDER, pilot: str = "pilot"
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Base, pilot, and their tokenizers, in float32 and ready to generate.

    `pilot="pilot_other_vocab"` gives the pilot with a vocabulary of its own. `folder` may be any output folder of
    `examples/tiny_world/train.py`.
    """
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assistant = PlainAutoModelForCausalLM.from_pretrained(folder / pilot, dtype=torch.float32)
    tokenizer, assistant_tokenizer = (AutoTokenizer.from_pretrained(folder / name) for name in ("base", pilot))
    return base, assistant, tokenizer, assistant_tokenizer


def demo_questions() -> list[dict[str, Any]]:
    """Held-out questions: `messages`, `kind` ("fact" or "harmful") and, for a fact, the right `answer`."""
    questions: list[dict[str, Any]] = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    return questions


def polite_examples() -> list[dict[str, str]]:
    """Three polite exchanges of the world, as `examples` of `urial_messages`; the models were trained on such."""
    examples: list[dict[str, str]] = json.loads((FOLDER / "polite_examples.json").read_text(encoding="utf-8"))
    return examples
