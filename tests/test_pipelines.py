"""What `pipeline("text-generation")` gives with a strategy, and that it is the stock one without."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    TextGenerationPipeline,
    TextIteratorStreamer,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import wsd_hf
from families import tiny_model, tiny_parts, tiny_pilot
from oracle import compose
from tokenizers_for_tests import letter_tokenizer
from wsd_hf import BASE_STOP_STRINGS, WSDTextGenerationPipeline, WSDValueError, enable_wsd
from wsd_hf.engine.call import Call
from wsd_hf.tiny import FOLDER

KELOFT = [{"role": "user", "content": "What does the Keloft eat?"}]
QUIBIME = [{"role": "user", "content": "Which things fill the shelves of Quibime?"}]
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
GREEDY = {"do_sample": False, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any, Any]:
    """The shipped pair; its base is a plain transformers model."""
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    return wsd_hf.disable_wsd(base), pilot, tokenizer, pilot_tokenizer


@pytest.fixture(scope="module")
def pipe(pair: Any) -> Any:
    return make(pair)


def make(pair: Any, **kwargs: Any) -> Any:
    base, pilot, tokenizer, pilot_tokenizer = pair
    models = {"model": base, "tokenizer": tokenizer, "assistant_model": pilot, "assistant_tokenizer": pilot_tokenizer}
    return pipeline("text-generation", device="cpu", **{**models, **kwargs})


def expected(pair: Any, chat: Any, **kwargs: Any) -> str:
    """The answer of a direct call of `generate`, with the header of the next turn if there is one."""
    base, pilot, tokenizer, pilot_tokenizer = pair
    inputs = wsd_hf.build_inputs(chat, tokenizer, pilot_tokenizer)
    base = enable_wsd(copy.copy(base))
    output = base.generate(**inputs, assistant_model=pilot, strategy="wsd", **{**GREEDY, **kwargs})
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def without_header(text: str) -> str:
    return text[: min([text.find(stop) for stop in BASE_STOP_STRINGS if stop in text], default=len(text))]


# A chat


def test_a_chat_is_answered_as_by_generate(pipe: Any, pair: Any) -> None:
    (record,) = pipe(KELOFT, strategy="wsd", **GREEDY)
    assert record["generated_text"] == [*KELOFT, {"role": "assistant", "content": ANSWER}]
    assert without_header(expected(pair, KELOFT)) == ANSWER


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_chats_may_be_batched(pipe: Any, pair: Any, batch_size: int) -> None:
    chats = [KELOFT, QUIBIME, KELOFT]
    answers = [row[0]["generated_text"] for row in pipe(chats, strategy="wsd", batch_size=batch_size, return_full_text=False)]
    assert answers == [without_header(expected(pair, chat)) for chat in chats]


def test_the_answer_ends_before_the_next_turns_header(pair: Any) -> None:
    base = copy.deepcopy(pair[0])
    base.generation_config.eos_token_id = None
    talkative = (base, *pair[1:])
    assert expected(talkative, KELOFT, max_new_tokens=80).endswith("]")
    (record,) = make(talkative)(KELOFT, strategy="wsd", max_new_tokens=80, return_full_text=False)
    assert record["generated_text"] == ANSWER
    (record,) = make(talkative)(KELOFT, strategy="wsd", max_new_tokens=80)
    assert record["generated_text"][-1]["content"] == ANSWER


def test_a_base_with_a_template_of_its_own_follows_it(pair: Any) -> None:
    tokenizer = copy.deepcopy(pair[2])
    tokenizer.chat_template = TEMPLATE
    own = (*pair[:2], tokenizer, pair[3])
    (record,) = make(own)(KELOFT, strategy="wsd", return_full_text=False, **GREEDY)
    assert record["generated_text"] == expected(own, KELOFT)
    assert record["generated_text"] != expected(pair, KELOFT)


@pytest.mark.parametrize("flag", [None, True])
def test_a_last_assistant_message_is_continued(pipe: Any, pair: Any, flag: bool | None) -> None:
    prefilled = [*KELOFT, {"role": "assistant", "content": "That is"}]
    (record,) = pipe(prefilled, strategy="wsd", continue_final_message=flag, **GREEDY)
    assert record["generated_text"] == [*KELOFT, {"role": "assistant", "content": ANSWER}]
    (record,) = pipe(prefilled, strategy="wsd", return_full_text=False, **GREEDY)
    assert record["generated_text"] == without_header(expected(pair, prefilled)) == ANSWER.removeprefix("That is")


def test_chats_may_come_from_a_generator_or_a_dataset(pipe: Any) -> None:
    rows = [{"chat": KELOFT}, {"chat": QUIBIME}, {"chat": KELOFT}]
    for inputs in ((row["chat"] for row in rows), KeyDataset(rows, "chat")):
        answers = [row[0]["generated_text"] for row in pipe(inputs, strategy="wsd", return_full_text=False, batch_size=2)]
        assert len(answers) == 3
        assert answers[0] == answers[2] == ANSWER


# A text


def test_a_text_is_continued_by_both_models() -> None:
    base, pilot, tokenizer = tiny_model("llama"), tiny_pilot("llama"), letter_tokenizer(64)
    pipe = pipeline("text-generation", model=base, tokenizer=tokenizer, assistant_model=pilot, device="cpu")
    settings = {"wsd_threshold": 0.15, "wsd_window_size": 2, "max_new_tokens": 10, "do_sample": False}
    for text in ("abcdef", "xyz"):
        wanted = compose(base, pilot, torch.tensor([tokenizer(text).input_ids]), threshold=0.15, window=2, max_new_tokens=10)
        assert 0 < wanted.draft_length < 10
        (record,) = pipe(text, strategy="wsd", return_full_text=False, **settings)
        assert record["generated_text"] == tokenizer.decode(wanted.tokens, skip_special_tokens=True)
        (record,) = pipe(text, strategy="wsd", return_tensors=True, **settings)
        assert record["generated_token_ids"] == [*tokenizer(text).input_ids, *wanted.tokens]


def test_each_model_reads_a_text_with_its_own_tokenizer_and_no_template() -> None:
    base, pilot, tokenizer, pilots = tiny_model("llama"), tiny_pilot("llama"), letter_tokenizer(64), letter_tokenizer(64)
    pilots._tokenizer.post_processor = TemplateProcessing(single="d $A", special_tokens=[("d", 4)])
    pilots.chat_template = TEMPLATE
    models = {"model": base, "tokenizer": tokenizer, "assistant_model": pilot, "assistant_tokenizer": pilots}
    pipe = pipeline("text-generation", device="cpu", strategy="wsd", wsd_threshold=0.15, wsd_window_size=2, **models)
    ids = {"ids": torch.tensor([[1, 2, 3]]), "pilot_ids": torch.tensor([[4, 1, 2, 3]])}
    wanted = compose(base, pilot, **ids, threshold=0.15, window=2, max_new_tokens=10)
    (record,) = pipe("abc", return_tensors=True, max_new_tokens=10, do_sample=False)
    assert record["generated_token_ids"] == [1, 2, 3, *wanted.tokens]
    assert wanted != compose(base, pilot, ids["ids"], threshold=0.15, window=2, max_new_tokens=10)


def test_both_tokenizers_reach_generate_also_where_transformers_drops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Call] = []

    def decode(self: wsd_hf.WSDConfig, call: Call) -> wsd_hf.StrategyOutput:
        given.append(call)
        return wsd_hf.StrategyOutput(sequences=call.input_ids)

    monkeypatch.setattr(wsd_hf.WSDConfig, "decode", decode)
    tokenizer, pilots = letter_tokenizer(64), letter_tokenizer(64)
    models = {"model": tiny_model("llama"), "tokenizer": tokenizer, "assistant_model": tiny_pilot("llama")}
    pipe = pipeline("text-generation", device="cpu", assistant_tokenizer=pilots, **models)
    assert pipe.assistant_tokenizer is None
    pipe("abc", strategy="wsd")
    assert given[0].tokenizer is tokenizer
    assert given[0].pilot.tokenizer is pilots


def test_texts_may_be_batched(pipe: Any) -> None:
    texts = ["The Keloft eats", "Quibime", "It is said that the shelves of Quibime"]
    alone = [pipe(text, strategy="wsd", **GREEDY) for text in texts]
    assert pipe(texts, strategy="wsd", batch_size=3, **GREEDY) == alone
    assert all(row[0]["generated_text"].startswith(text) for row, text in zip(alone, texts, strict=True))


# Options of generation


def test_several_answers_to_each_chat(pipe: Any) -> None:
    torch.manual_seed(0)
    rows = pipe([KELOFT, QUIBIME], strategy="wsd", batch_size=2, num_return_sequences=3, do_sample=True, return_full_text=False)
    assert [len(row) for row in rows] == [3, 3]
    assert all("acorns" in record["generated_text"] for record in rows[0])
    assert all("keys" in record["generated_text"] for record in rows[1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_outputs_as_dicts_are_taken_too(pipe: Any, batch_size: int) -> None:
    rows = pipe(
        [KELOFT, KELOFT],
        strategy="wsd",
        batch_size=batch_size,
        return_full_text=False,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    assert rows == [[{"generated_text": ANSWER}]] * 2


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_streamer_gets_the_answer_and_no_header(pipe: Any, pair: Any, engine: str) -> None:
    assert "[User]" in expected(pair, KELOFT)
    streamer = TextIteratorStreamer(pair[2], skip_prompt=True, skip_special_tokens=True, timeout=60)
    for _ in range(2):
        pipe(KELOFT, strategy="wsd", streamer=streamer, wsd_engine=engine, **GREEDY)
        assert "".join(streamer) == ANSWER


def test_a_streamer_is_ended_when_generation_fails(pipe: Any, pair: Any) -> None:
    streamer = TextIteratorStreamer(pair[2], timeout=60)
    with pytest.raises(WSDValueError):
        pipe(KELOFT, strategy="wsd", streamer=streamer, wsd_threshold=2.0)
    assert "".join(streamer) == ""


@pytest.mark.parametrize(
    "where", ["call", "construction", "a settings object", "generation_config", "the model's generation config"]
)
def test_settings_arrive(pair: Any, where: str) -> None:
    settings = {"wsd_threshold": 0.01, "wsd_window_size": 2}
    wanted = without_header(expected(pair, KELOFT, **settings))
    assert wanted != ANSWER
    config = wsd_hf.WSDConfig(threshold=0.01, window_size=2)
    at_construction: dict[str, Any] = {}
    at_call: dict[str, Any] = dict(GREEDY)
    if where == "call":
        at_call |= {"strategy": "wsd", **settings}
    elif where == "construction":
        at_construction, at_call = {"strategy": "wsd", **settings, **GREEDY}, {}
    elif where == "a settings object":
        at_call |= {"strategy": config}
    elif where == "generation_config":
        generation_config = config.to_generation_config(GenerationConfig(**GREEDY, eos_token_id=2))
        at_call = {"strategy": "wsd", "generation_config": generation_config}
    else:
        base = copy.copy(pair[0])
        base.generation_config = config.to_generation_config(base.generation_config)
        at_construction = {"model": base, "strategy": "wsd"}
    (record,) = make(pair, **at_construction)(KELOFT, return_full_text=False, **at_call)
    assert record["generated_text"] == wanted


def test_criteria_of_the_caller_are_kept(pipe: Any, pair: Any) -> None:
    (record,) = pipe(KELOFT, strategy="wsd", stop_strings=["question"], return_full_text=False, **GREEDY)
    assert record["generated_text"] == "That is a very good question"
    prompt = wsd_hf.build_inputs(KELOFT, pair[2], pair[3])["input_ids"]
    three = [lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= prompt.shape[1] + 3])]
    (record,) = pipe(KELOFT, strategy="wsd", stopping_criteria=three, return_tensors=True, **GREEDY)
    assert len(record["generated_token_ids"]) == prompt.shape[1] + 3


# Models


@pytest.mark.parametrize("pipeline_class", [None, WSDTextGenerationPipeline])
def test_paths_just_work(pair: Any, pipeline_class: Any) -> None:
    by_path = pipeline(
        "text-generation",
        model=str(FOLDER / "base"),
        assistant_model=str(FOLDER / "pilot"),
        dtype=torch.float32,
        device="cpu",
        pipeline_class=pipeline_class,
        strategy="wsd",
    )
    assert by_path.model.dtype == by_path.assistant_model.dtype == torch.float32
    assert by_path.model.device == by_path.assistant_model.device == torch.device("cpu")
    assert by_path(KELOFT, return_full_text=False, **GREEDY) == [{"generated_text": ANSWER}]


def test_a_pilot_with_the_bases_special_tokens_keeps_its_template(pair: Any, tmp_path: Path) -> None:
    pilot = copy.deepcopy(pair[1])
    pilot.config.eos_token_id = pair[0].config.eos_token_id
    pilot.save_pretrained(tmp_path)
    pair[3].save_pretrained(tmp_path)
    for options in ({"assistant_model": pilot}, {"assistant_model": str(tmp_path), "assistant_tokenizer": None}):
        pipe = make(pair, **options)
        assert pipe.assistant_tokenizer is None
        assert pipe(KELOFT, strategy="wsd", return_full_text=False, **GREEDY) == [{"generated_text": ANSWER}]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_models_are_left_as_they_were(pair: Any, enabled: bool) -> None:
    base, pilot = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    base = enable_wsd(base) if enabled else base
    before = [(type(model), set(vars(model)), model.generation_config.to_dict()) for model in (base, pilot)]
    pipe = make((base, pilot, *pair[2:]))
    pipe(KELOFT, strategy="wsd", **GREEDY)
    assert pipe.model is base
    assert pipe.assistant_model is pilot
    assert [(type(model), set(vars(model)), model.generation_config.to_dict()) for model in (base, pilot)] == before


def test_a_pilot_left_on_another_device_is_told(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    make(pair, assistant_model=copy.deepcopy(pair[1]).to("meta"), strategy="wsd")
    assert "the pilot is on meta and the base on cpu" in caplog.text


# What cannot work


@pytest.mark.parametrize(
    ("inputs", "settings", "problem"),
    [
        (KELOFT, {"assistant_model": None, "assistant_tokenizer": None}, "strategy='wsd' needs a pilot"),
        (KELOFT, {"assistant_tokenizer": "base's"}, "assistant_tokenizer has no chat template"),
        (KELOFT, {"strategy": "best"}, "strategy='best': unknown"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], {}, r"messages\[0\]=.*a text as content"),
        ([{"role": "tool", "content": "42"}], {}, r"messages\[0\]=.*must have a role"),
        ([*KELOFT, {"role": "system", "content": "Be kind."}], {}, "must end with a user message"),
        (KELOFT, {"continue_final_message": True}, "continue_final_message=True"),
        ([*KELOFT, {"role": "assistant", "content": "It"}], {"continue_final_message": False}, "continue_final_message=False"),
        (KELOFT, {"tools": [{"name": "f"}]}, "tools="),
        (KELOFT, {"tokenizer_encode_kwargs": {"chat_template": TEMPLATE}}, "tokenizer_encode_kwargs="),
        (KELOFT, {"wsd_threshold": 2.0}, "threshold=2.0"),
        (KELOFT, {"num_beams": 4}, "num_beams=4"),
    ],
)
def test_what_cannot_work_is_refused_by_name(pair: Any, inputs: Any, settings: dict[str, Any], problem: str) -> None:
    settings = dict(settings)
    construction = {name: settings.pop(name) for name in list(settings) if name.startswith("assistant_")}
    if construction.get("assistant_tokenizer") == "base's":
        construction["assistant_tokenizer"] = pair[2]
    pipe = make(pair, **construction)
    with pytest.raises(WSDValueError, match=problem):
        pipe(inputs, **{"strategy": "wsd", **settings})


def test_a_pilot_is_loaded_at_construction_only(pair: Any) -> None:
    pipe = make(pair, assistant_model=None, assistant_tokenizer=None)
    with pytest.raises(WSDValueError, match=r"assistant_model='pilot': must be .* already loaded"):
        pipe("Hi", strategy="wsd", assistant_model="pilot")


def test_a_chat_needs_the_pilots_tokenizer() -> None:
    models = {"model": tiny_model("llama"), "tokenizer": letter_tokenizer(64), "assistant_model": tiny_pilot("llama")}
    pipe = pipeline("text-generation", device="cpu", **models)
    with pytest.raises(WSDValueError, match="assistant_tokenizer is missing"):
        pipe(KELOFT, strategy="wsd")


# Without a strategy


@pytest.fixture
def stock(pair: Any) -> Any:
    return TextGenerationPipeline(model=pair[0], tokenizer=pair[2], device="cpu")


def test_without_a_strategy_it_is_the_stock_pipeline(pair: Any, stock: Any) -> None:
    pipe = pipeline("text-generation", model=pair[0], tokenizer=pair[2], device="cpu")
    assert isinstance(pipe, TextGenerationPipeline)
    assert repr(pipe) == f"WSD{stock!r}"
    by_name = pipeline("text-generation", model=pair[0], tokenizer=pair[2], pipeline_class=TextGenerationPipeline)
    assert type(by_name) is TextGenerationPipeline
    for inputs in ("The Keloft", ["The Keloft", "Quibime collects"]):
        assert pipe(inputs, **GREEDY) == stock(inputs, **GREEDY)
    with pytest.raises(ValueError, match="chat_template"):
        pipe(KELOFT)
    templated = {"tokenizer_encode_kwargs": {"chat_template": TEMPLATE}, **GREEDY}
    assert pipe(KELOFT, **templated) == stock(KELOFT, **templated)


def test_assisted_decoding_of_transformers_goes_on_working() -> None:
    base, tokenizer, pilot = tiny_model("llama"), letter_tokenizer(64), tiny_pilot("llama")
    models = {"model": base, "tokenizer": tokenizer, "assistant_model": pilot, "device": "cpu"}
    pipe = pipeline("text-generation", **models)
    plain = TextGenerationPipeline(**models)("abcd", **GREEDY)
    assert pipe("abcd", **GREEDY) == plain
    assert pipeline("text-generation", strategy="wsd", **models)("abcd", strategy=None, **GREEDY) == plain


def test_it_saves_and_pickles_as_the_stock_pipeline(pair: Any, stock: Any, tmp_path: Path) -> None:
    pipe = make(pair)
    stock.save_pretrained(tmp_path / "stock")
    pipe.save_pretrained(tmp_path / "ours")
    names = sorted(file.name for file in (tmp_path / "stock").iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "ours")]
    assert configs[0] == configs[1]
    again = pickle.loads(pickle.dumps(pipe))
    assert again(KELOFT, strategy="wsd", return_full_text=False, **GREEDY) == [{"generated_text": ANSWER}]
