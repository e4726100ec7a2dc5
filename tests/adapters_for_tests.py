"""LoRA adapters of the shipped models, written by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

peft = pytest.importorskip("peft", reason='no adapters: pip install "wsd_hf[adapters]"')


def adapter(base: Path, folder: Path, lora: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, PreTrainedModel]:
    """A folder with an adapter over a model, and the model with the adapter's products added to its float32 weights by hand.

    Args:
        base: folder of the model.
        folder: of the adapter, which is made.
        lora: settings of `peft.LoraConfig`.
        **changes: of `adapter_config.json`.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **lora or {})
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), encoding="utf-8")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in wrapped.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                plain.get_submodule(name).weight += product * (8 / 4)
    return folder, plain
