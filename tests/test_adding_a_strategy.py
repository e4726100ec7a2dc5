"""docs/adding-a-strategy.md: the strategy that it adds runs as it stands there, and is what it says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wsd_hf
from families import PAD, tiny_model, tiny_pilot
from oracle import left_padded, plain_tokens, random_prompt
from wsd_hf.strategies import STRATEGIES

DOCUMENT = (Path(__file__).parents[1] / "docs" / "adding-a-strategy.md").read_text("utf-8")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    names: dict[str, Any] = {}
    try:
        for code in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL):
            exec(compile(code, "adding-a-strategy.md", "exec"), names)
        yield capsys.readouterr().out
    finally:
        STRATEGIES.pop("head_start", None)


def test_the_new_strategy_is_a_composition_of_pilot_and_base(shown: str, base: Any, pilot: Any) -> None:
    assert "acorns" in shown
    prompts = [random_prompt(seed, 9 - 2 * seed) for seed in range(3)]
    ids, mask = left_padded(prompts, PAD)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "assistant_model": pilot}
    out = base.generate(ids, strategy="head_start", head_start_tokens=3, **settings)
    for row, prompt in zip(out[:, 9:].tolist(), prompts, strict=True):
        head = plain_tokens(tiny_pilot("llama"), prompt, 3)
        whole = head + plain_tokens(tiny_model("llama"), torch.cat([prompt, torch.tensor([head])], dim=1), 12 - len(head))
        assert row[: len(whole)] == whole
    with pytest.raises(wsd_hf.WSDValueError, match=r"^tokens=0: must be an integer of at least 1"):
        base.generate(ids, strategy="head_start", head_start_tokens=0, **settings)
