"""The golden data of the paper's official code: the same decisions, prompts and tokens.

`tests/data/README.md` says where the data come from.
"""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import wsd_hf

DATA = Path(__file__).parent / "data"
ON_THE_THRESHOLD = {"equal_threshold", "one_ulp_above", "one_ulp_below"}


def cases(name: str) -> list:
    return [pytest.param(case, id=case["id"]) for case in json.loads((DATA / f"{name}_open.json").read_text("utf-8"))]


@functools.cache
def model(path: str):
    return wsd_hf.AutoModelForCausalLM.from_pretrained(DATA / path, dtype=torch.float32)


@functools.cache
def tokenizer(path: str):
    return AutoTokenizer.from_pretrained(DATA / path)


@pytest.mark.parametrize("case", cases("switch_rule"))
def test_switch_rule(case):
    log_probs = [math.log(p) if p else -math.inf for p in case["probs"]]
    if not 0 < case["threshold"] <= 1:
        with pytest.raises(wsd_hf.WSDValueError, match=re.escape(f"threshold={case['threshold']}")):
            wsd_hf.switch_index(log_probs, case["threshold"], case["window"])
        return
    kept = wsd_hf.switch_index(log_probs, case["threshold"], case["window"])
    expected = {case["n_accepted"] if case["crossed"] else None}
    if case["knife_edge"] or case["category"] in ON_THE_THRESHOLD:
        # Up to rounding these sit on the threshold, so a neighbour's answer is right too; but only where a window that
        # agrees with the threshold to 12 digits explains it.
        means = wsd_hf.confidence(log_probs, case["window"])
        edges = (means / case["threshold"] - 1).abs() < 1e-12
        if case["threshold"] < 1e-300:
            edges |= means < 1e-300
        expected |= {int(i) + 1 for i in edges.nonzero()} | {None if edges.any() else case["n_accepted"]}
    assert kept in expected


def answer(case, **kwargs):
    """The response to a case's chat: its token ids, and all that `generate` returned."""
    pair, config = case["pair"], case["config"]
    inputs = wsd_hf.build_inputs(case["context"], tokenizer(pair["base_tokenizer"]), tokenizer(pair["pilot_tokenizer"]))
    # The official pilot also stops at some strings; ours does not, so such a draft is limited to the same tokens.
    ended_by_string = case["pilot"]["ended"] == "stop_string"
    output = model(pair["base"]).generate(
        **{**inputs, **kwargs},
        tokenizer=tokenizer(pair["base_tokenizer"]),
        assistant_tokenizer=tokenizer(pair["pilot_tokenizer"]),
        assistant_model=model(pair["pilot"]),
        strategy="wsd",
        wsd_threshold=config["threshold"],
        wsd_window_size=config["window"],
        wsd_max_draft_tokens=len(case["pilot"]["output_ids"]) if ended_by_string else config["max_draft_tokens"],
        max_new_tokens=config["max_response_tokens"],
        return_dict_in_generate=True,
    )
    return output.sequences[0, output.prompt_length :].tolist(), output


@pytest.mark.filterwarnings("ignore:window_size")
@pytest.mark.parametrize("case", cases("same_tokenizer"))
def test_responses(case):
    expected = case["token_level"]
    response, output = answer(case, stopping_criteria=None)
    assert output.sequences[0, : output.prompt_length].tolist() == expected["base_prompt_ids"]
    assert response == expected["final_ids"]
    drafted = min(expected["n_accepted"], case["config"]["max_response_tokens"])
    assert output.draft_length.tolist() == [drafted]
    probabilities = torch.tensor(expected["probs"])[:drafted]
    assert torch.allclose(output.draft_log_probs[0, :drafted].exp(), probabilities, rtol=0, atol=1e-5)
    if expected["crossed"] and expected["n_accepted"] <= drafted:
        assert output.switch_reason == ["confident"]


@pytest.mark.filterwarnings("ignore:window_size")
@pytest.mark.parametrize("case", [case for case in cases("same_tokenizer") if "T_pilot" in case.values[0]["pair"]["pilot"]])
def test_responses_end_where_a_stop_string_is_complete(case):
    full = case["token_level"]["final_ids"]
    decode = tokenizer(case["pair"]["base_tokenizer"]).decode
    texts = [decode(full[: end + 1]) for end in range(len(full))]
    end = next((i + 1 for i, text in enumerate(texts) if any(tag in text for tag in wsd_hf.BASE_STOP_STRINGS)), None)
    assert answer(case)[0] == full[:end]


@pytest.mark.filterwarnings("ignore:window_size")
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(*case.values, engine, id=f"{case.id}-{engine}", marks=[pytest.mark.sweep] if swept else [])
        for number, case in enumerate(cases("cross_tokenizer"))
        for engine, swept in (("fast", False), ("step", number % 3))
    ],
)
def test_responses_across_vocabularies(case, engine):
    expected = case["separate"]
    response, output = answer(case, stopping_criteria=None, wsd_engine=engine)
    assert output.sequences[0, : output.prompt_length].tolist() == expected["base_prompt_ids"]
    if case["category"] == "utf8_cut":  # a draft never says half a character
        text = tokenizer(case["pair"]["base_tokenizer"]).decode(response[: int(output.draft_length)])
        assert text == case["pilot"]["draft_text"].rstrip("\ufffd")[: len(text)]
        assert "\ufffd" not in text
        return
    drafted = min(expected["n_accepted"], case["config"]["max_response_tokens"])
    assert output.draft_length.tolist() == [drafted]
    assert response == expected["final_ids"]
    probabilities = torch.tensor(expected["probs"])[:drafted]
    assert torch.allclose(output.draft_log_probs[0, :drafted].exp(), probabilities, rtol=0, atol=1e-5)
    if expected["crossed"] and expected["n_accepted"] <= drafted:
        assert output.switch_reason == ["confident"]


@pytest.mark.parametrize("case", cases("messages"))
@pytest.mark.parametrize("pilot", ["A_pilot_llama3", "A_pilot_chatml"])
@pytest.mark.parametrize("base", ["A_base", "B_base", "C_base"])
def test_prompts(case, base, pilot):
    tokenizers = tokenizer(f"tokenizers/{base}"), tokenizer(f"tokenizers/{pilot}")
    if "error" in case["base"][base]:
        with pytest.raises(wsd_hf.WSDValueError, match="messages must end with a user message"):
            wsd_hf.build_inputs(case["context"], *tokenizers)
        return
    inputs = wsd_hf.build_inputs(case["context"], *tokenizers)
    assert inputs["input_ids"].tolist() == [case["base"][base]["ids"]]
    assert inputs["assistant_input_ids"].tolist() == [case["pilot"][pilot]["ids"]]
