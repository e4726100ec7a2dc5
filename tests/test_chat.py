from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from wsd_hf import BASE_STOP_STRINGS, WSDValueError, build_inputs

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def load(name: str):
    return AutoTokenizer.from_pretrained(TOKENIZERS / name)


@pytest.fixture
def base():
    return load("A_base")


@pytest.fixture
def pilot():
    return load("A_pilot_llama3")


def test_a_base_without_template_gets_a_transcript_and_its_stop_strings(base, pilot):
    inputs = build_inputs(QUESTION, base, pilot)
    prompt = base.decode(inputs["input_ids"][0])
    assert prompt == "<s>\n\n[User]\nWhat is the capital of France?\n\n[Assistant]\n"
    (criterion,) = inputs["stopping_criteria"]
    assert set(criterion.stop_strings) == set(BASE_STOP_STRINGS)


def test_a_base_with_a_template_of_its_own_follows_it(base, pilot):
    base.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    inputs = build_inputs(QUESTION, base, pilot)
    assert inputs["input_ids"].tolist() == [base.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]]
    assert base.decode(inputs["input_ids"][0]) == "<user>What is the capital of France?"
    assert "stopping_criteria" not in inputs


@pytest.mark.parametrize("name", ["tokenizer", "assistant_tokenizer"])
def test_messages_that_a_template_refuses_are_told_with_its_words(base, pilot, name):
    refusing = {"tokenizer": base, "assistant_tokenizer": pilot}[name]
    refusing.chat_template = "{{ raise_exception('No system messages here') }}"
    with pytest.raises(WSDValueError, match=f"the chat template of {name} refuses these messages: No system messages here"):
        build_inputs([{"role": "system", "content": "Be kind."}, *QUESTION], base, pilot)


def test_a_batch_is_padded_on_the_left(base, pilot):
    short = [{"role": "user", "content": "Say ok."}]
    inputs = build_inputs([short, QUESTION], base, pilot)
    for prefix in ("", "assistant_"):
        ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
        assert ids.shape == mask.shape
        assert mask[0].tolist() == sorted(mask[0].tolist())
        assert mask[1].all()
        alone = build_inputs(short, base, pilot)[f"{prefix}input_ids"][0]
        assert torch.equal(ids[0][mask[0].bool()], alone)


def test_the_beginning_of_an_answer_belongs_to_both_prompts(base, pilot):
    inputs = build_inputs([*QUESTION, {"role": "assistant", "content": " Sure! "}], base, pilot)
    assert base.decode(inputs["input_ids"][0]).endswith("[Assistant]\nSure!")
    assert pilot.decode(inputs["assistant_input_ids"][0]).endswith("\n\nSure!")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "must end with a user message"),
        ([{"role": "assistant", "content": "Hi"}], "must end with a user message"),
        ([*QUESTION, {"role": "system", "content": "Be kind."}], "must end with a user message"),
        ([{"role": "tool", "content": "42"}], r"messages\[0\]=.*must have a role \(system, user, assistant\)"),
        ([{"role": "user", "content": None}], "text as content"),
        ([{"content": "Hi"}], "must have a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text as content"),
    ],
)
def test_other_messages_are_refused(base, pilot, messages, problem):
    with pytest.raises(WSDValueError, match=problem):
        build_inputs(messages, base, pilot)


def test_a_pilot_without_template_is_refused_by_name(base):
    with pytest.raises(WSDValueError, match="assistant_tokenizer has no chat template"):
        build_inputs(QUESTION, base, base)


def test_a_batch_needs_a_pad_token_and_a_single_chat_does_not(base, pilot):
    base.pad_token = None
    assert build_inputs(QUESTION, base, pilot)["attention_mask"].all()
    with pytest.raises(WSDValueError, match="tokenizer has no pad token"):
        build_inputs([QUESTION, [{"role": "user", "content": "Say ok."}]], base, pilot)


def test_tokenizers_and_messages_are_left_as_they_were(base, pilot):
    messages = [dict(QUESTION[0])]
    build_inputs(messages, base, pilot)
    assert messages == QUESTION
    assert base.chat_template is None
    assert base.padding_side == load("A_base").padding_side
