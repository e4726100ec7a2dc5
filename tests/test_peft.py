"""Models wrapped by PEFT decode as the models that they wrap, adapters included."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

import wsd_hf
from families import tiny_model, tiny_pilot
from oracle import ones, plain_tokens, random_prompt

PROMPT = random_prompt(1, 6)


def adapted(model: PreTrainedModel, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), config).eval()


def merged(model: PeftModel) -> PreTrainedModel:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("wrapped", ["base", "pilot", "both"])
def test_adapters_take_part(wrapped: str, engine: str) -> None:
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama"))), tiny_pilot("llama", noise=0.15)
    base = adapted(base, 1) if wrapped != "pilot" else base
    pilot = adapted(pilot, 2) if wrapped != "base" else pilot
    out = base.generate(
        input_ids=PROMPT,
        attention_mask=ones(PROMPT),
        assistant_model=pilot,
        strategy="wsd",
        wsd_engine=engine,
        wsd_threshold=0.15,
        wsd_window_size=2,
        max_new_tokens=12,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    alone = [merged(model) if isinstance(model, PeftModel) else model for model in (base, pilot)]
    drafted = int(out.draft_length)
    draft = plain_tokens(alone[1], PROMPT, drafted)
    begun = torch.cat([PROMPT, torch.tensor([draft])], dim=1)
    assert out.sequences[0, 6:].tolist() == draft + plain_tokens(alone[0], begun, 12 - drafted, eos_token_id=None)


def prompt_tuned(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


@pytest.mark.parametrize("tuned", ["the model", "assistant_model"])
def test_tuned_prompts_are_refused_by_name(tuned: str) -> None:
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama"))), tiny_pilot("llama")
    base = prompt_tuned(base) if tuned == "the model" else base
    pilot = prompt_tuned(pilot) if tuned == "assistant_model" else pilot
    with pytest.raises(wsd_hf.WSDValueError, match=f"{tuned} has tuned prompts"):
        base.generate(input_ids=PROMPT, attention_mask=ones(PROMPT), assistant_model=pilot, strategy="wsd")
