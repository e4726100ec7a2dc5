"""The in-context prompt: what is put in front of a chat, and what comes of it in the transcript."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from wsd_hf import URIAL_PROMPT, WSDValueError, build_inputs, urial_messages

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
RUDE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}]
SYSTEM = {"role": "system", "content": "Answer in one word."}


def test_the_transcript_tells_preamble_examples_and_question_in_turn():
    base, pilot = (AutoTokenizer.from_pretrained(TOKENIZERS / name) for name in ("A_base", "A_pilot_llama3"))
    inputs = build_inputs(urial_messages([QUESTION]), base, pilot)
    turns = base.decode(inputs["input_ids"][0]).removeprefix("<s>\n\n[").split("\n\n[")
    roles, texts = zip(*(turn.split("]\n", 1) for turn in turns), strict=True)
    assert roles == ("System", *["User", "Assistant"] * 3, "User", "Assistant")
    assert texts == (*(message["content"] for message in URIAL_PROMPT), QUESTION["content"], "")


def test_own_examples_take_the_place_of_ours():
    assert urial_messages([QUESTION], examples=RUDE) == [*RUDE, QUESTION]


@pytest.mark.parametrize(
    ("examples", "system"),
    [(RUDE, "Answer in one word."), ([{"role": "system", "content": "Be rude."}, *RUDE], "Be rude.\n\nAnswer in one word.")],
)
def test_there_is_one_system_message_and_it_comes_first(examples, system):
    messages = urial_messages([SYSTEM, QUESTION], examples)
    assert messages == [{"role": "system", "content": system}, *RUDE, QUESTION]


def test_the_beginning_of_an_answer_stays_last():
    chat = [QUESTION, {"role": "assistant", "content": "That would be"}]
    assert urial_messages(chat)[-2:] == chat


def test_what_is_returned_is_new():
    chat = [dict(QUESTION)]
    for message in urial_messages(chat):
        message["content"] = "changed"
    assert chat == [QUESTION]
    assert "changed" not in str(URIAL_PROMPT)


@pytest.mark.parametrize(
    ("messages", "examples", "problem"),
    [
        ([], RUDE, "messages must end with a user message"),
        ([{"role": "king", "content": "Hi"}], RUDE, r"messages\[0\].*must have a role"),
        ([[QUESTION]], RUDE, r"messages\[0\].*must have a role"),
        ("Hi", RUDE, r"messages\[0\]='H': must have a role"),
        ([QUESTION], [], "examples must end with an assistant message"),
        ([QUESTION], [QUESTION], "examples must end with an assistant message"),
        ([QUESTION], [{"role": "user"}, RUDE[1]], r"examples\[0\].*must have a role"),
    ],
)
def test_what_is_no_chat_is_refused(messages, examples, problem):
    with pytest.raises(WSDValueError, match=problem):
        urial_messages(messages, examples)
