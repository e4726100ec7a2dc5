"""The three ways to a model that takes `strategy=`."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

import wsd_hf
from families import tiny_model
from oracle import compose, ones, random_prompt

PROMPT = random_prompt(1, 6)


class OwnLlama(wsd_hf.WSDGenerationMixin, LlamaForCausalLM):
    """The door for people who write model classes."""


def check_decodes(model: PreTrainedModel, pilot: PreTrainedModel) -> None:
    out = model.generate(
        PROMPT,
        attention_mask=ones(PROMPT),
        assistant_model=pilot,
        strategy="wsd",
        wsd_threshold=0.15,
        wsd_window_size=2,
        max_new_tokens=12,
    )
    want = compose(tiny_model("llama"), pilot, PROMPT, threshold=0.15, window=2, max_new_tokens=12)
    assert out[0, PROMPT.shape[1] :].tolist() == want.tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


def test_a_subclass_decodes(saved: Path, pilot: Any) -> None:
    check_decodes(OwnLlama.from_pretrained(saved), pilot)


def test_the_auto_class_decodes(saved: Path, pilot: Any) -> None:
    model = wsd_hf.AutoModelForCausalLM.from_pretrained(saved)
    assert type(model).__name__ == "LlamaForCausalLM"
    check_decodes(model, pilot)


def test_the_auto_class_reports_how_loading_went(saved: Path, pilot: Any) -> None:
    model, info = wsd_hf.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    check_decodes(model, pilot)


def test_the_auto_class_builds_from_a_config(pilot: Any) -> None:
    model = wsd_hf.AutoModelForCausalLM.from_config(tiny_model("llama").config)
    model.load_state_dict(tiny_model("llama").state_dict())
    check_decodes(model.eval(), pilot)


def test_the_auto_class_leaves_transformers_own_alone(saved: Path) -> None:
    wsd_hf.AutoModelForCausalLM.from_pretrained(saved)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is LlamaForCausalLM


def test_enabling_keeps_the_object_its_class_name_and_its_weights(own_base: Any, pilot: Any) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    weight = model.lm_head.weight
    assert wsd_hf.enable_wsd(model) is model
    assert model.lm_head.weight is weight
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, wsd_hf.WSDGenerationMixin)
    assert (type(model).__name__, type(model).__module__) == (LlamaForCausalLM.__name__, LlamaForCausalLM.__module__)
    check_decodes(model, pilot)


def test_enabling_twice_is_enabling_once(own_base: Any) -> None:
    enabled = type(own_base)
    assert type(wsd_hf.enable_wsd(own_base)) is enabled


def test_two_models_of_one_class_share_the_enabled_class(own_base: Any, base: Any) -> None:
    assert type(own_base) is type(base)


def test_disabling_restores_the_class(own_base: Any) -> None:
    assert wsd_hf.disable_wsd(own_base) is own_base
    assert type(own_base) is LlamaForCausalLM
    with pytest.raises(ValueError, match="strategy"):
        own_base.generate(PROMPT, attention_mask=ones(PROMPT), strategy="wsd")


def test_disabling_a_model_that_was_never_enabled_does_nothing() -> None:
    assert type(wsd_hf.disable_wsd(tiny_model("llama"))) is LlamaForCausalLM


def test_a_subclass_cannot_be_disabled() -> None:
    model = OwnLlama(tiny_model("llama").config)
    with pytest.raises(wsd_hf.WSDValueError, match="OwnLlama"):
        wsd_hf.disable_wsd(model)


def test_an_enabled_subclass_stays_as_it_is(saved: Path) -> None:
    model = OwnLlama.from_pretrained(saved)
    assert type(wsd_hf.enable_wsd(model)) is OwnLlama


def test_an_enabled_model_saves_as_its_own_class(own_base: Any, tmp_path: Path, pilot: Any) -> None:
    own_base.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM
    assert again.config.architectures == ["LlamaForCausalLM"]
    check_decodes(wsd_hf.enable_wsd(again), pilot)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_enabled_model_pickles(own_base: Any, pilot: Any, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(own_base, protocol))
    assert type(again) is type(own_base)
    check_decodes(again, pilot)


def test_a_whole_enabled_model_goes_through_torch_save(own_base: Any, pilot: Any) -> None:
    buffer = io.BytesIO()
    torch.save(own_base, buffer)
    buffer.seek(0)
    check_decodes(torch.load(buffer, weights_only=False), pilot)


def test_a_copy_of_an_enabled_model_is_enabled_and_its_own(own_base: Any, pilot: Any) -> None:
    again = copy.deepcopy(own_base)
    assert type(again) is type(own_base)
    assert again.lm_head.weight is not own_base.lm_head.weight
    check_decodes(again, pilot)
    wsd_hf.disable_wsd(again)
    assert isinstance(own_base, wsd_hf.WSDGenerationMixin)


def test_a_shallow_copy_shares_its_weights(own_base: Any, pilot: Any) -> None:
    again = copy.copy(own_base)
    assert again.lm_head.weight is own_base.lm_head.weight
    check_decodes(again, pilot)


def test_only_generating_models_can_be_enabled() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="Linear"):
        wsd_hf.enable_wsd(torch.nn.Linear(1, 1))


def test_the_generation_config_keeps_wsd_settings_when_saved(own_base: Any, tmp_path: Path) -> None:
    config = wsd_hf.WSDConfig(threshold=0.4, window_size=3, max_draft_tokens=33, draft_end="stop")
    own_base.generation_config = config.to_generation_config(own_base.generation_config)
    own_base.save_pretrained(tmp_path)
    again = wsd_hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert wsd_hf.WSDConfig.resolve({}, None, again.generation_config) == config


def test_settings_may_be_given_in_any_place_generate_reads(own_base: Any, pilot: Any) -> None:
    check_decodes(own_base, pilot)
    config = wsd_hf.WSDConfig(threshold=0.15, window_size=2)
    own_base.generation_config = config.to_generation_config(own_base.generation_config)
    own_base.generation_config.max_new_tokens = 12
    out = own_base.generate(PROMPT, None, None, attention_mask=ones(PROMPT), assistant_model=pilot, strategy="wsd")
    want = compose(tiny_model("llama"), pilot, PROMPT, threshold=0.15, window=2, max_new_tokens=12)
    assert out[0, PROMPT.shape[1] :].tolist() == want.tokens
