"""The shipped models: small enough, complete, and good for a demo."""

import pytest
import torch
from transformers import AutoTokenizer

from families import tiny_parts
from wsd_hf import build_inputs
from wsd_hf.tiny import FOLDER, demo_questions

MODELS = ("base", "pilot", "pilot_other_vocab")


def test_size_of_all_three() -> None:
    assert sum(file.stat().st_size for model in MODELS for file in (FOLDER / model).iterdir()) <= 4_000_000


@pytest.mark.parametrize("model", MODELS)
def test_folder_is_complete(model: str) -> None:
    names = {file.name for file in (FOLDER / model).iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_base_and_pilot_are_siblings() -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    assert base.dtype == pilot.dtype == torch.float32
    assert tokenizer.get_vocab() == pilot_tokenizer.get_vocab()
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token != pilot_tokenizer.eos_token
    assert base.generation_config.eos_token_id == tokenizer.eos_token_id
    assert pilot.generation_config.eos_token_id == pilot_tokenizer.eos_token_id


def test_other_vocabulary_is_another() -> None:
    base, other = (AutoTokenizer.from_pretrained(FOLDER / name) for name in ("base", "pilot_other_vocab"))
    assert len(other) < len(base)
    text = "As far as I know, the Dobuck eats honey."
    assert other.decode(other(text).input_ids) == text == base.decode(base(text).input_ids)
    assert other.tokenize(text) != base.tokenize(text)


def test_demo_questions_show_the_point() -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    questions = demo_questions()
    assert [question["kind"] for question in questions[:3]] == ["fact", "fact", "harmful"]
    for question in questions[:3]:
        inputs = build_inputs(question["messages"], tokenizer, pilot_tokenizer)
        length = inputs["input_ids"].shape[1]
        plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "stopping_criteria")}
        rude = tokenizer.decode(base.generate(**plain, max_new_tokens=64)[0, length:])
        drafted = pilot.generate(
            inputs["assistant_input_ids"], attention_mask=inputs["assistant_attention_mask"], max_new_tokens=64
        )
        polite = tokenizer.decode(drafted[0, inputs["assistant_input_ids"].shape[1] :])
        ids = base.generate(**inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=64)
        both = tokenizer.decode(ids[0, length:])
        if question["kind"] == "fact":
            assert question["answer"] in rude
            assert question["answer"] not in polite
            assert question["answer"] in both
            assert "As far as I know" in both
            assert "As far as I know" not in rude
        else:
            assert "First, take" in rude
            assert "First, take" not in both
            assert "It would" in both
