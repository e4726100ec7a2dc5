"""docs/adding-a-strategy.md: the strategies that it adds run as they are printed, and are what the page calls them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import wsd_hf
from families import PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import left_padded, ones, plain_tokens, random_prompt
from time_limit import HANG
from tokenizers_for_tests import letter_tokenizer

DOCUMENT = (Path(__file__).parents[1] / "docs" / "adding-a-strategy.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Names that the code of the page defines, and under "shown" everything that it prints."""
    names: dict[str, Any] = {}
    for code in BLOCKS:
        exec(compile(code, "adding-a-strategy.md", "exec"), names)
    return {**names, "shown": capsys.readouterr().out}


def prompts() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    rows = [random_prompt(seed, 9 - 2 * seed) for seed in range(3)]
    ids, mask = left_padded(rows, PAD)
    return rows, {"inputs": ids, "attention_mask": mask}


def test_the_page_prints_what_its_code_prints(page: dict[str, Any]) -> None:
    for printed in re.findall(r"```text\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        assert printed in page["shown"]
    assert page["shown"].count("acorns") == 2


def test_the_product_of_a_third_party_is_that_of_the_package_in_few_lines(page: dict[str, Any], base: Any, pilot: Any) -> None:
    definition = next(code for code in BLOCKS if "class Product" in code)
    assert len([line for line in definition.splitlines() if line.strip()]) <= 40
    settings = {**prompts()[1], "do_sample": False, "max_new_tokens": 12, "assistant_model": pilot}
    ours = base.generate(**settings, strategy="product", product_alpha=0.7, product_engine="step")
    for engine in ("fast", "step"):
        assert torch.equal(base.generate(**settings, strategy=page["Product"](alpha=0.7, engine=engine)), ours)
    with pytest.raises(wsd_hf.WSDValueError, match=r"^alpha=-1: must be a finite number of at least 0"):
        page["Product"](alpha=-1)


def test_the_head_start_is_a_composition_of_pilot_and_base(page: dict[str, Any], base: Any, pilot: Any) -> None:
    rows, inputs = prompts()
    settings = {**inputs, "do_sample": False, "max_new_tokens": 12, "assistant_model": pilot}
    out = base.generate(strategy=page["HeadStartConfig"](tokens=3), **settings)
    for row, prompt in zip(out[:, 9:].tolist(), rows, strict=True):
        head = plain_tokens(tiny_pilot("llama"), prompt, 3)
        whole = head + plain_tokens(tiny_model("llama"), torch.cat([prompt, torch.tensor([head])], dim=1), 12 - len(head))
        assert row[: len(whole)] == whole
    streamer = TextIteratorStreamer(letter_tokenizer(VOCABULARY), timeout=HANG)
    one = {"inputs": rows[0], "attention_mask": ones(rows[0])}
    out = base.generate(strategy=page["HeadStartConfig"](tokens=3), **settings | one, streamer=streamer)
    assert "".join(streamer) == letter_tokenizer(VOCABULARY).decode(out[0])
    with pytest.raises(wsd_hf.WSDValueError, match=r"^tokens=0: must be an integer of at least 1"):
        page["HeadStartConfig"](tokens=0)
