"""Folders and names that the world outside holds since 0.1.0, as they were then: they must go on working."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsd_hf.tiny import FOLDER

GENERATE = '''"""Weak-to-Strong Decoding, whenever this model generates; the pilot is in pilot/."""

try:
    from wsd_hf import bundle
except ImportError as error:
    raise ImportError("this model generates with wsd_hf>=0.1.0: install it (in a clone of it, `pip install .`)") from error


def generate(*args, model, **kwargs):
    return bundle.generate(*args, model=model, **kwargs)
'''

GENERATION_CONFIG = """{
  "bos_token_id": 1,
  "do_sample": false,
  "eos_token_id": 2,
  "pad_token_id": 0,
  "transformers_version": "5.23.0",
  "wsd_threshold": 0.8,
  "wsd_window_size": 6,
  "wsd_max_draft_tokens": 512,
  "wsd_draft_end": "continue",
  "wsd_engine": "auto",
  "wsd_speculate": true,
  "wsd_chunk": null,
  "wsd_cuda_graphs": true
}
"""

CHAT_TEMPLATE = (
    r"{{ bos_token }}{% for message in messages %}"
    r"{{ '\n\n[' + message['role'] | capitalize + ']\n' + message['content'] | trim }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '\n\n[Assistant]\n' }}{% endif %}"
)

ENTRY_POINTS = {
    "console_scripts": {"wsd-hf": "wsd_hf.cli:app"},
    "lm_eval.models": {"wsd-hf": "wsd_hf.integrations.lm_eval:WSDHFLM"},
    "inspect_ai": {"wsd_hf": "wsd_hf.integrations.inspect_ai"},
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder as `wsd-hf pack` of 0.1.0 wrote it for the shipped pair."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "base", folder)
    shutil.copytree(FOLDER / "pilot", folder / "pilot")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "requirements.txt").write_text("wsd_hf>=0.1.0\n", encoding="utf-8")
    (folder / "custom_generate" / "generate.py").write_text(GENERATE, encoding="utf-8")
    (folder / "generation_config.json").write_text(GENERATION_CONFIG, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


POLITE = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."


def answer(model: Any, tokenizer: Any, **kwargs: Any) -> str:
    chat = [{"role": "user", "content": "What does the Keloft eat?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=64, **kwargs)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_packed_folder_decodes_with_its_pilot(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    assert answer(model, AutoTokenizer.from_pretrained(packed)) == POLITE


def test_its_settings_are_in_effect(packed: Path) -> None:
    changed = GENERATION_CONFIG.replace('"wsd_window_size": 6', '"wsd_window_size": 1')
    (packed / "generation_config.json").write_text(changed, encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    assert answer(model, AutoTokenizer.from_pretrained(packed)) != POLITE


def test_it_serves_models_loaded_from_elsewhere(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    assert answer(model, tokenizer, custom_generate=str(packed), trust_remote_code=True) == POLITE


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_entry_points_lead_where_they_led(group: str) -> None:
    [(name, value)] = ENTRY_POINTS[group].items()
    assert (name, value) in [
        (point.name, point.value) for point in importlib.metadata.distribution("wsd_hf").entry_points if point.group == group
    ]
    if group == "lm_eval.models":
        pytest.importorskip("lm_eval")
    if group == "inspect_ai":
        pytest.importorskip("inspect_ai")
    assert pkgutil.resolve_name(value)
