import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import wsd_hf

DATA = Path(__file__).parent / "data"
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "How do you write café and 水?"}],
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "tokenizers/A_base")


@pytest.fixture(scope="module")
def base():
    return wsd_hf.AutoModelForCausalLM.from_pretrained(DATA / "models/T_base_A", dtype=torch.float32)


@pytest.fixture(scope="module")
def output(base, tokenizer):
    inputs = wsd_hf.build_inputs(CHATS, tokenizer, AutoTokenizer.from_pretrained(DATA / "tokenizers/A_pilot_llama3"))
    return base.generate(
        **inputs,
        assistant_model=wsd_hf.AutoModelForCausalLM.from_pretrained(DATA / "models/T_pilot", dtype=torch.float32),
        strategy="wsd",
        wsd_threshold=0.5,
        wsd_window_size=3,
        max_new_tokens=48,
        return_dict_in_generate=True,
        output_logits=True,
    )


def response_ids(output, tokenizer, row):
    ids = output.sequences[row, output.prompt_length :].tolist()
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


@pytest.mark.parametrize("row", [0, 1])
def test_the_trace_holds_the_response_token_by_token(output, tokenizer, row):
    trace = wsd_hf.explain(output, tokenizer, row)
    ids = response_ids(output, tokenizer, row)
    assert [token.id for token in trace.tokens] == ids
    assert "".join(token.text for token in trace.tokens) == tokenizer.decode(ids)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_the_trace_tells_who_wrote_each_token_and_how_sure_the_base_was(base, output, tokenizer, row):
    trace = wsd_hf.explain(output, tokenizer, row)
    k = trace.switch.index
    assert 3 <= k < len(trace.tokens)
    assert [token.writer for token in trace.tokens] == ["pilot"] * k + ["base"] * (len(trace.tokens) - k)

    prompt_and_response = output.sequences[row : row + 1]
    padding = (wsd_hf.build_inputs(CHATS, tokenizer, tokenizer_with_template())["attention_mask"][row] == 0).sum()
    logits = base(prompt_and_response[:, padding:]).logits[0].double().log_softmax(-1)
    start = output.prompt_length - int(padding)
    for i, token in enumerate(trace.tokens):
        assert token.probability == pytest.approx(math.exp(logits[start + i - 1, token.id]), abs=1e-5)
    for i, token in enumerate(trace.tokens):
        if 3 <= i + 1 <= k:
            window = [trace.tokens[j].probability for j in range(i - 2, i + 1)]
            assert token.confidence == pytest.approx(math.prod(window) ** (1 / 3))
        else:
            assert token.confidence is None
    assert trace.tokens[k - 1].confidence >= 0.5
    assert all(token.confidence < 0.5 for token in trace.tokens[2 : k - 1])


def tokenizer_with_template():
    return AutoTokenizer.from_pretrained(DATA / "tokenizers/A_pilot_llama3")


def test_plain_text_marks_the_switch(output, tokenizer):
    trace = wsd_hf.explain(output, tokenizer)
    drafted, written = str(trace).split("│", 1)
    ids = response_ids(output, tokenizer, 0)
    assert drafted == tokenizer.decode(ids[: trace.switch.index])
    assert written.startswith(tokenizer.decode(ids[trace.switch.index :]))
    assert f"pilot: {trace.switch.index} tokens of {len(ids)}" in written
    assert "confidence reached 0.5 over 3 tokens" in written


def test_a_terminal_gets_colours_and_a_file_does_not(output, tokenizer, tmp_path):
    trace = wsd_hf.explain(output, tokenizer)
    for terminal in (True, False):
        with (tmp_path / "out").open("w+") as file:
            trace.print(Console(file=file, force_terminal=terminal, color_system="truecolor" if terminal else None))
            file.seek(0)
            assert ("\x1b[" in file.read()) is terminal


def test_exports(output, tokenizer):
    trace = wsd_hf.explain(output, tokenizer)
    assert json.loads(json.dumps(trace.to_dict()))["tokens"][0]["writer"] == "pilot"
    picture = trace.to_svg(title="Example")
    assert picture.startswith("<svg")
    assert "Example" in picture
    page = trace.to_html()
    assert page.count("<span") == len(trace.tokens)
    assert "pilot; probability 0." in page


def test_html_escapes_the_text():
    token = wsd_hf.TracedToken(1, "<b>&", "base")
    assert "&lt;b&gt;&amp;" in wsd_hf.Trace((token,)).to_html()


def test_wrong_arguments_are_named(output, tokenizer):
    with pytest.raises(wsd_hf.WSDValueError, match="row=2: the output has 2 rows"):
        wsd_hf.explain(output, tokenizer, row=2)
    with pytest.raises(wsd_hf.WSDValueError, match="not Tensor"):
        wsd_hf.explain(output.sequences, tokenizer)


def test_a_character_cut_across_tokens_is_shown_once():
    tokenizer = tokenizer_with_template()
    ids = tokenizer.encode("é水😀", add_special_tokens=False)
    assert len(ids) > 3
    output = wsd_hf.WSDOutput(
        sequences=torch.tensor([ids]),
        draft_length=torch.tensor([len(ids)]),
        switch_index=torch.tensor([-1]),
        written_by_pilot=torch.ones(1, len(ids), dtype=torch.bool),
        draft_log_probs=torch.zeros(1, len(ids)),
        switch_reason=["budget"],
        strategy=wsd_hf.WSDConfig(),
        prompt_length=0,
    )
    trace = wsd_hf.explain(output, tokenizer)
    assert "".join(token.text for token in trace.tokens) == "é水😀"


def test_the_trace_can_end_before_a_stop_string(output, tokenizer):
    whole = wsd_hf.explain(output, tokenizer)
    text = "".join(token.text for token in whole.tokens)
    stop = text[-5:-2]
    shorter = wsd_hf.explain(output, tokenizer, stop_strings=["not in it", stop])
    assert "".join(token.text for token in shorter.tokens) == text[: text.find(stop)]
    assert [token.id for token in shorter.tokens] == [token.id for token in whole.tokens][: len(shorter.tokens)]


def test_a_draft_that_ends_at_a_stop_string_was_stopped(output, tokenizer):
    whole = wsd_hf.explain(output, tokenizer)
    assert whole.switch.reason == "confident"
    stop = whole.tokens[whole.switch.index - 1].text
    assert stop not in "".join(token.text for token in whole.tokens[: whole.switch.index - 1])
    trace = wsd_hf.explain(output, tokenizer, stop_strings=[stop])
    assert trace.switch.reason == "stopped"
    assert "a stop criterion ended the response" in trace.summary()


def test_a_switch_by_other_criteria_is_not_called_confidence():
    tokens = (wsd_hf.TracedToken(1, "Sure", "pilot", 0.1, None), wsd_hf.TracedToken(2, ".", "base", None, None))
    assert "the caller's switch criteria fired" in wsd_hf.Trace(tokens, wsd_hf.Switch(1, "confident", 0.8, 6)).summary()
