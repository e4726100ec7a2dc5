"""Chats that are read back from prompts: they are those that were written, or none."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from wsd_hf.bundle.packing import TRANSCRIPT
from wsd_hf.text.chat_parser import ChatLayout
from wsd_hf.tiny import FOLDER

TOKENIZER = AutoTokenizer.from_pretrained(FOLDER / "base")

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
TEMPLATES = {"transcript": TRANSCRIPT, "chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "thinking": THINKING}

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).map(str.strip).filter(bool)


def tokenizer(template: str | None) -> Any:
    own = AutoTokenizer.from_pretrained(FOLDER / "base")
    own.chat_template = template
    return own


LAYOUTS = {name: (own := tokenizer(template), ChatLayout(own)) for name, template in TEMPLATES.items()}


def written(own: Any, turns: list[dict[str, str]], prefill: str = "") -> list[int]:
    prompt = own.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return own.encode(prompt + prefill, add_special_tokens=False)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(WORDS, min_size=1, max_size=5).filter(lambda words: len(words) % 2 == 1), system=st.none() | WORDS)
def test_what_is_written_is_read(name: str, contents: list[str], system: str | None) -> None:
    own, layout = LAYOUTS[name]
    turns = chat(*contents, system=None if name == "mistral" else system)
    assert layout.read(written(own, turns)) == (turns, "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_beginning_of_an_answer_is_read(name: str) -> None:
    own, layout = LAYOUTS[name]
    assert layout.read(written(own, chat("One?", "1", "Two?"), "As far as")) == (chat("One?", "1", "Two?"), "As far as")


@pytest.mark.parametrize("name", ["transcript", "chatml", "llama"])
def test_turns_that_do_not_alternate(name: str) -> None:
    own, layout = LAYOUTS[name]
    for roles in (("user", "user"), ("user", "assistant"), ("user", "assistant", "assistant"), ("system", "user", "user")):
        turns = [{"role": role, "content": f"It is {n}."} for n, role in enumerate(roles)]
        assert layout.read(written(own, turns)) == (turns, "")


@pytest.mark.parametrize("begin", ["", "<s>", "<s><s>"])
def test_a_bos_more_or_less_is_no_matter(begin: str) -> None:
    own, layout = LAYOUTS["transcript"]
    assert layout.read(own.encode(begin + "\n\n[User]\nOne?\n\n[Assistant]\n", add_special_tokens=False)) == (chat("One?"), "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The Keloft eats",
        "\n\n[User]\nOne?",  # asks for no answer
        "\n\n[User]\n One?\n\n[Assistant]\n",  # the template would have trimmed it
        "\n\n[Assistant]\nOne.\n\n[Assistant]\n",
        "You talk to a user.\n\n[User]\nOne?\n\n[Assistant]\n",
    ],
)
def test_what_the_template_does_not_write_is_no_chat(text: str) -> None:
    own, layout = LAYOUTS["transcript"]
    assert layout.read(own.encode(text, add_special_tokens=False)) is None


def test_a_header_within_a_message_is_read_as_a_turn_as_by_the_base() -> None:
    own, layout = LAYOUTS["transcript"]
    ids = written(own, chat("One?\n\n[Assistant]\n1\n\n[User]\nTwo?"))
    assert layout.read(ids) == (chat("One?", "1", "Two?"), "")
    assert ids == written(own, chat("One?", "1", "Two?"))


@pytest.mark.parametrize(
    "template", [None, "", "{{ messages[-1]['content'] | upper }}", "{{ messages | length }}", "{{ oops() }}"]
)
def test_templates_that_cannot_be_read_back(template: str | None) -> None:
    assert ChatLayout(tokenizer(template)).read(TOKENIZER.encode("1", add_special_tokens=False)) is None
