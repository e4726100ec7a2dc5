"""Pair: the same answers as calls written out, from models that were checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, TextIteratorStreamer

import wsd_hf
from every_strategy import TARGETS, WAYS, Case
from wsd_hf import Pair, WSDHubError, WSDValueError
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny import FOLDER

UNTUNED = Path(__file__).parent.parent / "examples" / "tiny_world" / "pilot_untuned"
KELOFT = "What does the Keloft eat?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
QUIBIME = [{"role": "user", "content": "Which things fill the shelves of Quibime?"}]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.from_pretrained(FOLDER / "base", str(FOLDER / "pilot"), reference=UNTUNED, dtype=torch.float32)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """The same models and tokenizers, loaded by transformers alone."""
    folders = {"base": FOLDER / "base", "pilot": FOLDER / "pilot", "reference": UNTUNED}
    models = {name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for name, folder in folders.items()}
    tokenizers = [AutoTokenizer.from_pretrained(FOLDER / name) for name in ("base", "pilot")]
    return {**models, "base": wsd_hf.enable_wsd(models["base"]), "tokenizers": tokenizers}


def test_four_lines_answer_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair.tiny()
    output = pair.generate(KELOFT, max_new_tokens=64)
    print(pair.answers(output)[0])
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("way", WAYS)
def test_a_call_is_that_of_the_base_written_out(pair: Pair, parts: dict[str, Any], way: str) -> None:
    settings = {**WAYS[way], "max_new_tokens": 24, "return_dict_in_generate": True}
    tokenizer, pilot_tokenizer = parts["tokenizers"]
    inputs = wsd_hf.build_inputs([[{"role": "user", "content": KELOFT}], QUIBIME], tokenizer, pilot_tokenizer)
    reference = {"reference_model": parts["reference"]} if "reference_model" in Case("one", way).roles else {}
    both = {"tokenizer": tokenizer, "assistant_model": parts["pilot"], "assistant_tokenizer": pilot_tokenizer}
    torch.manual_seed(3)
    wanted = parts["base"].generate(**inputs, **both, **reference, **settings)
    torch.manual_seed(3)
    output = pair.generate([KELOFT, QUIBIME], **settings)
    assert torch.equal(output.sequences, wanted.sequences)
    texts = tokenizer.batch_decode(wanted.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pair.answers(output) == [before_next_turn(text).strip() for text in texts]


def test_a_question_is_a_chat_of_one_message(pair: Pair) -> None:
    chat = [{"role": "user", "content": KELOFT}]
    wanted = wsd_hf.build_inputs(chat, pair.tokenizer, pair.pilot_tokenizer)
    for chats in (KELOFT, [KELOFT], chat, [chat], tuple(chat)):
        inputs = pair.inputs(chats)
        assert isinstance(inputs, BatchEncoding)
        assert inputs.keys() == wanted.keys()
        assert all(torch.equal(inputs[name], wanted[name]) for name in wanted if name != "stopping_criteria")


def test_inputs_made_before_are_taken_as_they_are(pair: Pair) -> None:
    inputs = pair.inputs(KELOFT)
    assert pair.answers(pair.generate(inputs, max_new_tokens=64)) == [ANSWER]
    ids = pair.generate(inputs, max_new_tokens=64, return_dict_in_generate=False)
    assert torch.equal(ids, pair.generate(KELOFT, max_new_tokens=64).sequences)


def test_an_answer_ends_before_the_next_turn(pair: Pair) -> None:
    output = pair.generate(KELOFT, max_new_tokens=64, eos_token_id=-1)
    assert "[User]" in pair.tokenizer.decode(output.sequences[0])
    assert pair.answers(output) == [ANSWER]


def test_a_pilot_with_another_vocabulary() -> None:
    pair = Pair.tiny(pilot="pilot_other_vocab")
    assert pair.pilot.config.vocab_size != pair.base.config.vocab_size
    [answer] = pair.answers(pair.generate(KELOFT, max_new_tokens=64))
    assert "the Keloft eats acorns" in answer
    for strategy in TARGETS:
        with pytest.raises(WSDValueError, match=r"reference_model|two vocabularies"):
            pair.generate(KELOFT, strategy)


@pytest.mark.parametrize("chats", [{"role": "user", "content": KELOFT}, [], [[]], [*QUIBIME, KELOFT], [{"role": "user"}]])
def test_chats_of_another_form_are_refused(pair: Pair, chats: Any) -> None:
    with pytest.raises(WSDValueError, match=r"chats|messages"):
        pair.generate(chats)


def test_a_strategy_that_needs_a_reference_refuses_a_pair_without() -> None:
    pair = Pair.tiny()
    for strategy in ("emulated_fine_tuning", "weak_to_strong_search"):
        with pytest.raises(WSDValueError, match="reference_model"):
            pair.generate(KELOFT, strategy)
    with pytest.raises(WSDValueError, match="strategy='best': unknown"):
        pair.generate(KELOFT, "best")


def test_a_base_that_is_not_enabled_is_refused(pair: Pair) -> None:
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    with pytest.raises(WSDValueError, match=r"base is a LlamaForCausalLM that takes no strategy=: pass wsd_hf\.enable_wsd"):
        Pair(plain, pair.pilot, pair.tokenizer, pair.pilot_tokenizer)


@pytest.mark.parametrize("argument", ["revision", "subfolder", "use_safetensors"])
def test_arguments_of_one_model_are_refused(argument: str) -> None:
    with pytest.raises(WSDValueError, match=f"{argument}=.*one model only"):
        Pair.from_pretrained(FOLDER / "base", FOLDER / "pilot", **{argument: "x"})


def test_models_are_checked(tmp_path: Path) -> None:
    with pytest.raises(WSDHubError, match="no chat template"):
        Pair.from_pretrained(FOLDER / "base", FOLDER / "base")
    with pytest.raises(WSDHubError, match="nowhere"):
        Pair.from_pretrained(FOLDER / "base", FOLDER / "pilot", reference=tmp_path / "nowhere", local_files_only=True)
    shutil.copytree(FOLDER / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(WSDHubError, match=r"no model\.safetensors or pytorch_model.bin"):
        Pair.from_pretrained(tmp_path / "base", FOLDER / "pilot")


def test_settings_of_the_loader_reach_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair.from_pretrained(
        FOLDER / "base", FOLDER / "pilot", reference=UNTUNED, dtype=torch.bfloat16, attn_implementation="eager"
    )
    for model in (pair.base, pair.pilot, pair.reference):
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"

    given: dict[str, Any] = {}

    def read(fetched: Any, **kwargs: Any) -> Any:
        given[Path(fetched.folder).name] = kwargs.get("quantization_config")
        return AutoModelForCausalLM.from_pretrained(fetched.folder)

    monkeypatch.setattr("wsd_hf.pair.read_model", read)
    Pair.from_pretrained(FOLDER / "base", FOLDER / "pilot", reference=UNTUNED, quantization_config="four bits")
    assert given == {"base": "four bits", "pilot": None, "pilot_untuned": None}


def test_the_reader_of_a_stream_is_released_by_a_refusal(pair: Pair) -> None:
    for refused in ({"chats": []}, {"chats": KELOFT, "strategy": "best"}, {"chats": KELOFT, "wsd_threshold": 2}):
        streamer = TextIteratorStreamer(pair.tokenizer, timeout=60)
        with pytest.raises(WSDValueError):
            pair.generate(**refused, streamer=streamer, max_new_tokens=4)
        assert list(streamer) in ([], [""])


def test_a_settings_object_is_a_strategy(pair: Pair) -> None:
    output = pair.generate(KELOFT, wsd_hf.NudgingConfig(threshold=0.9), max_new_tokens=64)
    assert output.strategy == wsd_hf.NudgingConfig(threshold=0.9)
    assert torch.equal(output.sequences, pair.generate(KELOFT, "nudging", nudging_threshold=0.9, max_new_tokens=64).sequences)


def test_a_trace_ends_before_the_next_turn(pair: Pair) -> None:
    output = pair.generate([QUIBIME, KELOFT], max_new_tokens=64, eos_token_id=-1)
    trace = pair.explain(output, row=1)
    assert "".join(token.text for token in trace.tokens).strip() == ANSWER
    assert trace.switch.index == output.switch_index[1]


def test_writers_are_streamed_under_every_strategy(pair: Pair) -> None:
    for way in WAYS.values():
        pieces: list[tuple[str, str | None]] = []
        streamer = wsd_hf.WriterStreamer(pair.tokenizer, lambda *piece, pieces=pieces: pieces.append(piece))
        output = pair.generate(KELOFT, streamer=streamer, max_new_tokens=64, **way)
        assert "".join(text for text, _ in pieces).strip() == pair.answers(output)[0]
        if output.written_by_pilot is None:
            assert {writer for _, writer in pieces} == {None}
            continue
        for writer in ("pilot", "base"):
            traced = "".join(token.text for token in pair.explain(output).tokens if token.writer == writer)
            assert (
                "".join(text for text, who in pieces if who == writer).strip()
                == traced.replace(pair.tokenizer.eos_token, "").strip()
            )


@pytest.mark.parametrize("chats", [None, 3, [1], {"role": "user", "content": "Hi"}])
def test_what_is_no_chat_is_refused_by_name(chats: Any) -> None:
    with pytest.raises(WSDValueError, match=r"^chats=.*: must be a question, a list of messages, or a list of either$"):
        Pair.tiny().inputs(chats)
