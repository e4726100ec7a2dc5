"""The README's Python runs as it stands there, on the shipped pair in the place of the large one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_parts
from wsd_hf.tiny import FOLDER

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
LOCAL = {
    '"meta-llama/Llama-3.1-70B", device_map="auto"': repr(str(FOLDER / "base")),
    '"songff/Pilot-3B", device_map="auto"': repr(str(FOLDER / "pilot")),
}


@pytest.fixture
def names() -> dict[str, Any]:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    chats = {f"chat_{n}": [{"role": "user", "content": "What does the Keloft eat?"}] for n in (1, 2)}
    exec("import wsd_hf", chats)
    untuned = AutoModelForCausalLM.from_pretrained(REPOSITORY / "examples/tiny_world/pilot_untuned", dtype=torch.float32)
    return {
        **chats,
        "base": base,
        "model": base,
        "pilot": pilot,
        "untuned_pilot": untuned,
        "tokenizer": tokenizer,
        "pilot_tokenizer": pilot_tokenizer,
    }


def test_all_blocks_run_in_order(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for position, code in enumerate(BLOCKS):
        for large, small in LOCAL.items():
            code = code.replace(large, small)
        code = code.replace("How do I tell a neighbour that the music is too loud?", "What does the Keloft eat?")
        exec(compile(code, f"README block {position}", "exec"), names)
        if position == 0:
            assert "the Keloft eats acorns" in capsys.readouterr().out
