"""Arguments as users have them, in every strategy: ids and padding, tokenizers with tokens that have no row, numbers, keys."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, pipeline

import wsd_hf
from every_strategy import CASES, TARGETS, Case, counting, every_case, every_long_case
from families import tiny_parts
from oracle import left_padded, ones, plain_tokens, random_prompt
from wsd_hf.bundle import pack
from wsd_hf.engine import preparation
from wsd_hf.engine.checks import known_ids
from wsd_hf.tiny import FOLDER

CHATS = [[{"role": "user", "content": text}] for text in ("What does the Keloft eat?", "Why?")]


def refused(case: Case, message: str, *prompt: Any, **kwargs: Any) -> None:
    """Checks that a call is refused with a message, and before any forward."""
    with counting(case.world.base) as base, counting(case.world.pilot) as pilot:
        with pytest.raises(wsd_hf.WSDValueError, match=message):
            case.world.base.generate(*prompt, **{"max_new_tokens": 4, **case.settings, **kwargs})
        assert not base + pilot


@functools.cache
def plain(case: Case, seed: int) -> torch.Tensor:
    """The sequences of a call without any of the arguments that are tested."""
    return case.repeatable(case.prompt(seed))


# Ids and padding


def padded(case: Case, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of the base; the shorter is padded with `token`."""
    return left_padded([case.prompt(3, 3)[:, :3], case.prompt(4, 6)], token)


@every_case
@pytest.mark.parametrize("argument", ["input_ids", "assistant_input_ids", "reference_input_ids"])
def test_ids_in_the_padding_are_read_by_no_model(case: Case, argument: str, tried: Any) -> None:
    role = {"input_ids": "base"}.get(argument, argument.replace("input_ids", "model"))
    if role not in case.models:
        return
    size = case.models[role].config.vocab_size
    ids, mask = padded(case, 5)
    small = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    small_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    other = {"assistant_input_ids": small, "assistant_attention_mask": small_mask} if argument == "reference_input_ids" else {}

    def call(token: int) -> torch.Tensor:
        prompt, prompt_mask = (ids, mask) if argument == "input_ids" else (small, small_mask)
        prompt = prompt.masked_fill(prompt_mask == 0, token)
        given = {"input_ids": ids, "attention_mask": mask, **other}
        given |= {argument: prompt, argument.replace("input_ids", "attention_mask"): prompt_mask}
        before = prompt.clone()
        out = case.repeatable(given.pop("input_ids"), **given, pad_token_id=1)
        assert torch.equal(prompt, before)
        if argument == "input_ids":
            assert torch.equal(out[:, : prompt.shape[1]], prompt)
        return out[:, ids.shape[1] :]

    want = call(5)
    for token in (size, 10**6, -1):
        assert torch.equal(call(token), want)
        tried("prompts padded with an id outside the vocabulary")


@every_case
@pytest.mark.parametrize("pad", [10**6, -1])
def test_a_pad_token_that_the_base_lacks_is_replaced_by_its_eos(
    case: Case, pad: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation.logger.warning_once.cache_clear()
    monkeypatch.setattr(preparation.logger.parent, "propagate", True)
    eos = list(range(1, case.world.base.config.vocab_size, 4))
    ids, mask = padded(case, pad)
    out = case.repeatable(ids, attention_mask=mask, pad_token_id=pad, eos_token_id=eos)
    assert f"pad_token_id={pad} is no token of the base" in caplog.text
    ids, mask = padded(case, 5)
    want = case.repeatable(ids, attention_mask=mask, pad_token_id=1, eos_token_id=eos)
    assert torch.equal(out[:, ids.shape[1] :], want[:, ids.shape[1] :])


def test_rows_that_end_early_are_padded_somewhere() -> None:
    """So that the test before shows something."""
    case = Case("one", "wsd step")
    ids, mask = padded(case, 5)
    out = case.generate(ids, attention_mask=mask, pad_token_id=1, eos_token_id=[*range(1, 64, 4)]).sequences
    assert out[:, -1].tolist().count(1) == 1


@every_case
def test_the_mask_is_made_from_a_pad_token_that_the_base_lacks(case: Case) -> None:
    ids, mask = padded(case, 10**6)
    with_mask = case.repeatable(ids, attention_mask=mask, pad_token_id=10**6)
    assert torch.equal(case.repeatable(ids, attention_mask=None, pad_token_id=10**6), with_mask)


@every_case
def test_a_prompt_is_a_tensor_of_integers_with_a_row(case: Case) -> None:
    ids = case.prompt(2, 5)
    want = case.repeatable(ids)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        if int(ids.max()) <= torch.iinfo(dtype).max:
            assert torch.equal(case.repeatable(ids.to(dtype)), want)
    for wrong, message in (
        (ids.float(), "input_ids is of torch.float32: must be token ids"),
        (ids.bool(), "input_ids is of torch.bool: must be token ids"),
        (ids.tolist(), "input_ids is of type list: must be a Tensor"),
        (ids[:0], r"input_ids has shape \(0, \d+\), an empty batch"),
        (ids[0], r"input_ids has shape \(\d+,\): must be \[batch, tokens\]"),
        (ids[None], r"input_ids has shape \(1, 1, \d+\): must be \[batch, tokens\]"),
        (ids[0, 0], r"input_ids has shape \(\): must be \[batch, tokens\]"),
        (ids.to(torch.uint16), "input_ids is of torch.uint16: must be token ids"),
    ):
        refused(case, f"^{message}", wrong)
        refused(case, f"^{message}", input_ids=wrong)
        refused(case, f"^assistant_{message}", ids, assistant_input_ids=wrong)
    base = case.world.base
    settings = {"max_new_tokens": 10, "attention_mask": ones(ids), **case.settings}
    settings |= {"top_k": 1} if case.samples else {"do_sample": False}
    for call in (functools.partial(base.generate, inputs=ids), functools.partial(base.generate, input_ids=ids)):
        assert torch.equal(call(**settings), want)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("size", [200, 256, 768, 65536, 98304, 131072])
def test_a_small_type_of_ids_is_no_reason_to_find_an_id_unknown(dtype: torch.dtype, size: int) -> None:
    ids = torch.tensor([[0, 1, 126]], dtype=dtype)
    model = SimpleNamespace(config=PreTrainedConfig(vocab_size=size))
    assert known_ids("input_ids", ids, torch.ones_like(ids), "the base", model).tolist() == [[0, 1, 126]]


def test_the_processor_serves_a_prompt_of_the_pilot_with_strange_padding() -> None:
    case = Case("one", "wsd step")
    ids, mask = padded(case, 5)
    small = torch.tensor([[64, 6, 7], [8, 9, 10]])
    settings = {"assistant_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}

    def call(prompt: torch.Tensor) -> torch.Tensor:
        processor = wsd_hf.WSDLogitsProcessor(case.world.pilot, assistant_input_ids=prompt, **settings)
        return case.world.base.generate(ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=6)

    assert torch.equal(call(small), call(small.clamp(max=5).where(settings["assistant_attention_mask"] == 0, small)))
    with pytest.raises(wsd_hf.WSDValueError, match="assistant_input_ids contains token id 64"):
        call(small.flip(0).flip(1))


@pytest.mark.parametrize(("token", "message"), [(1.5, "contains 1.5"), (True, "contains True"), (64, "contains token id 64")])
def test_a_value_takes_prompts_of_known_ids(token: Any, message: str) -> None:
    world = Case("one", "search").world
    value = wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, [[3, 4]])
    for prompt in ([np.int64(3), np.int32(4)], list(torch.tensor([3, 4]))):
        same = wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, [prompt])
        assert torch.equal(same(["ab"], [False]), value(["ab"], [False]))
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        wsd_hf.ImplicitValue(world.pilot, world.reference, world.tokenizer, [[3, token]])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(FOLDER / "base", FOLDER / "pilot", tmp_path_factory.mktemp("packed") / "model").folder


def test_a_packed_model_refuses_the_same_prompts(packed: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True),
        AutoTokenizer.from_pretrained(packed),
    )
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    for wrong in (10**6, 768, -1):
        bad = ids.clone()
        bad[0, 3] = wrong
        with pytest.raises(wsd_hf.WSDValueError, match=f"input_ids contains token id {wrong}"):
            model.generate(bad, attention_mask=ones(ids), max_new_tokens=4)
    for wrong, message in ((ids.float(), "is of torch.float32"), (ids[:0], "an empty batch"), (ids.tolist(), "of type list")):
        with pytest.raises(wsd_hf.WSDValueError, match=f"input_ids .*{message}"):
            model.generate(wrong, max_new_tokens=4)


# Tokenizers with more tokens than their model has rows


def longer(tokenizer: Any, *tokens: str, pad: str | None = None) -> Any:
    """A copy with added tokens that no model of these tests has a row for."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)} if tokens else {"pad_token": pad})
    return tokenizer


@every_case
@pytest.mark.parametrize("whose", ["tokenizer", "assistant_tokenizer", "both"])
def test_added_tokens_without_a_row_change_nothing(case: Case, whose: str, tried: Any) -> None:
    names = ["tokenizer", "assistant_tokenizer"] if whose == "both" else [whose]
    given = {name: longer(case.settings[name], f"<{name}>") for name in names}
    for seed in range(2):
        assert torch.equal(case.repeatable(case.prompt(seed), **given), plain(case, seed))
        tried("calls with a tokenizer that is longer than its model's vocabulary")


def test_a_text_that_has_to_be_read_as_a_token_without_a_row_is_refused_by_name() -> None:
    world = Case("one", "search").world
    value = wsd_hf.ImplicitValue(world.pilot, world.reference, longer(world.tokenizer, "<image>"), ["ab"])
    with counting(world.pilot) as runs, pytest.raises(wsd_hf.WSDValueError, match="a response contains token id 64, but the"):
        value(["c<image>"], [False])
    assert len(runs) <= 1
    with pytest.raises(wsd_hf.WSDValueError, match="a prompt contains token id 64"):
        wsd_hf.ImplicitValue(world.pilot, world.reference, longer(world.tokenizer, "<image>"), ["a<image>b"])
    ends = longer(world.tokenizer, "<end>")
    ends.eos_token = "<end>"
    with pytest.raises(wsd_hf.WSDValueError, match="the end of a response contains token id 64"):
        wsd_hf.ImplicitValue(world.pilot, world.reference, ends, ["ab"])


def wider(case: Case) -> Any:
    """A copy of the base with eight more tokens, one of which it likes best."""
    base, last = copy.deepcopy(case.world.base), case.world.base.config.vocab_size
    base.resize_token_embeddings(last + 8)
    liked = plain_tokens(case.world.base, case.prompt(1), 1)[0]
    with torch.no_grad():
        base.lm_head.weight[last:] = 0.0
        base.lm_head.weight[last + 3] = 5 * base.lm_head.weight[liked]
    return base


@pytest.mark.parametrize("case", [case for case in CASES if case.way.startswith("product")], ids=lambda case: case.way)
def test_a_token_that_the_pilot_lacks_is_impossible_in_a_product(case: Case) -> None:
    base, ids = wider(case), case.prompt(1)
    settings = {"attention_mask": ones(ids), "max_new_tokens": 6, **case.settings}
    out = base.generate(ids, **settings)
    assert int(out.max()) < 64
    assert torch.equal(out, base.generate(ids, **settings, suppress_tokens=[*range(64, 72)]))


READING = [case.way for case in CASES if case.is_target and not case.way.startswith("product")]
"""Ways that may write what a small model lacks, and has to read then."""


@pytest.mark.parametrize("way", ["nudging", *READING])
def test_a_token_that_the_small_model_cannot_read_is_refused_where_it_has_to(way: str) -> None:
    case = Case("one", way)
    base, ids = wider(case), case.prompt(1)
    settings = {"attention_mask": ones(ids), "max_new_tokens": 6, **case.settings}
    if way == "nudging":
        base.generate(ids, **{**settings, "nudging_threshold": 1e-9})  # the pilot is never asked, and has nothing to read
        settings["nudging_threshold"] = 0.9999
    with pytest.raises(wsd_hf.WSDValueError, match=r"the (pilot|assistant_model) is to read token id 67 in the response"):
        base.generate(ids, **settings)
    out = base.generate(ids, **settings, suppress_tokens=[67])
    assert int(out.max()) < 64


SHIPPED = {
    "wsd fast": {"strategy": "wsd", "wsd_engine": "fast"},
    "wsd step": {"strategy": "wsd", "wsd_engine": "step"},
    "nudging": {"strategy": "nudging"},
    "search": {"strategy": "weak_to_strong_search", "beam_width": 2, "successors": 2, "top_k": 1},
    **{strategy: {"strategy": strategy} for strategy in TARGETS},
}


@functools.cache
def shipped(pilot: str) -> tuple[Any, Any, Any, Any]:
    return tiny_parts(pilot=pilot)


@pytest.mark.parametrize("pilot", ["pilot", "pilot_other_vocab"])
@pytest.mark.parametrize("way", SHIPPED)
def test_chats_padded_with_a_token_without_a_row_are_answered_as_others(way: str, pilot: str) -> None:
    if SHIPPED[way]["strategy"] in TARGETS and pilot == "pilot_other_vocab":
        return
    base, small, tokenizer, small_tokenizer = shipped(pilot)
    reference = {"reference_model": small} if way in ("search", "emulated_fine_tuning") else {}

    def answers(tokenizer: Any, small_tokenizer: Any) -> list[list[int]]:
        inputs = wsd_hf.build_inputs(CHATS, tokenizer, small_tokenizer)
        tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": small_tokenizer}
        out = base.generate(**inputs, **tokenizers, **SHIPPED[way], **reference, assistant_model=small, max_new_tokens=12)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    strange = longer(tokenizer, pad="<no row>"), longer(small_tokenizer, pad="<nor this>")
    assert strange[0].pad_token_id == 768
    assert answers(*strange) == answers(tokenizer, small_tokenizer)


def test_a_pipeline_pads_with_a_token_without_a_row() -> None:
    base, small, tokenizer, small_tokenizer = shipped("pilot")

    def answers(tokenizer: Any, small_tokenizer: Any) -> Any:
        models = {"model": copy.deepcopy(base), "assistant_model": small}
        models["model"].generation_config.pad_token_id = None
        tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": small_tokenizer}
        ask = pipeline("text-generation", **models, **tokenizers, strategy="wsd", batch_size=2)
        return ask(CHATS, do_sample=False, max_new_tokens=40.0, return_full_text=False)

    strange = longer(tokenizer, pad="<no row>"), longer(small_tokenizer, pad="<nor this>")
    assert answers(*strange) == answers(tokenizer, small_tokenizer)


def test_a_packed_model_has_a_tokenizer_with_a_token_without_a_row(packed: Path, tmp_path: Path) -> None:
    base, _, tokenizer, _ = shipped("pilot")
    base.save_pretrained(tmp_path / "base")
    longer(tokenizer, pad="<no row>").save_pretrained(tmp_path / "base")
    folder = pack(tmp_path / "base", FOLDER / "pilot", tmp_path / "model").folder

    def answers(folder: Path) -> list[str]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(CHATS, **options)
        out = model.generate(**inputs, max_new_tokens=np.float64(20))
        return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert answers(folder) == answers(packed)


# Numbers

FIVE = {
    "float": 5.0,
    "numpy int": np.int32(5),
    "numpy float": np.float32(5),
    "numpy array": np.array(5),
    "tensor": torch.tensor(5),
    "float tensor": torch.tensor(5.0),
}
NO_INTEGERS = [12.5, "12", float("nan"), float("inf"), True, np.float64(0.5), torch.tensor([3, 4]), np.bool_(True), 1 + 0j]


@every_long_case
def test_integers_come_as_numbers_of_any_kind(case: Case, tried: Any) -> None:
    ids = case.prompt(1)
    settings = {"eos_token_id": [1, 5, 9], "pad_token_id": 1, "min_new_tokens": 3, "max_new_tokens": 5}
    want = case.repeatable(ids, **settings)
    for kind, five in FIVE.items():
        assert torch.equal(case.repeatable(ids, **{**settings, "max_new_tokens": five}), want), kind
        model_config = GenerationConfig(**{**settings, "max_new_tokens": None})
        model_config.max_new_tokens = five
        got = case.repeatable(ids, generation_config=model_config, max_new_tokens=None)
        assert torch.equal(got, want), kind
        assert model_config.max_new_tokens is five
        tried("integers given as floats or as numbers of numpy or torch")
    strange = {"eos_token_id": np.array([1, 5, 9]), "pad_token_id": np.int64(1), "min_new_tokens": 3.0}
    assert torch.equal(case.repeatable(ids, **{**settings, **strange}), want)
    strange = {"eos_token_id": torch.tensor([1, 5, 9]), "pad_token_id": torch.tensor(1), "min_new_tokens": np.int64(3)}
    assert torch.equal(case.repeatable(ids, **{**settings, **strange}), want)
    strange = {"no_repeat_ngram_size": 2.0, "forced_eos_token_id": np.array([9]), "bos_token_id": torch.tensor(2)}
    ngrams = {"no_repeat_ngram_size": 2, "forced_eos_token_id": [9], "bos_token_id": 2}
    assert torch.equal(case.repeatable(ids, **{**settings, **strange}), case.repeatable(ids, **{**settings, **ngrams}))
    longest = {**settings, "max_new_tokens": None, "max_length": float(ids.shape[1] + 5)}
    assert torch.equal(case.repeatable(ids, **longest), want)
    sampled = {**settings, "do_sample": True, "top_k": 1}
    twice = case.repeatable(ids, **sampled, num_return_sequences=2)
    assert torch.equal(case.repeatable(ids, **{**sampled, "top_k": 1.0}, num_return_sequences=2.0), twice)


@every_case
def test_what_is_no_integer_is_refused_by_name(case: Case) -> None:
    ids = case.prompt(1)
    for value in NO_INTEGERS:
        for name in ("max_new_tokens", "min_new_tokens", "num_return_sequences", "pad_token_id"):
            refused(case, f"^{name}=.*: must be an integer", ids, **{name: value})
    refused(case, "^eos_token_id=1.5: must be an integer", ids, eos_token_id=[1, 1.5])
    for name in ("no_repeat_ngram_size", "prefill_chunk_size", "forced_bos_token_id", "forced_eos_token_id"):
        refused(case, f"^{name}=2.5: must be an integer", ids, **{name: 2.5})


@every_case
@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id"])
def test_a_token_id_beyond_64_bits_is_refused_by_name(case: Case, name: str) -> None:
    for token in (10**30, -(10**30), 2**63, [1, 10**30] if name in preparation.ENDS else 1e30):
        refused(case, f"^{name}=.*: must be a token id", case.prompt(1), **{name: token})
        config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        setattr(config, name, token)
        refused(case, f"^{name}=.*: must be a token id", case.prompt(1), generation_config=config)


OWN = {
    "wsd": ("wsd_window_size", "wsd_max_draft_tokens"),
    "weak_to_strong_search": ("beam_width", "successors", "chunk_length"),
}


@every_case
def test_settings_of_a_strategy_come_as_numbers_of_any_kind(case: Case) -> None:
    ids = case.prompt(1)
    for name in (*OWN.get(case.strategy, ()), *([case.keyword("chunk")] if case.engine == "fast" else [])):
        want = case.repeatable(ids, **{name: 2})
        for two in (2.0, np.int64(2), torch.tensor(2)):
            assert torch.equal(case.repeatable(ids, **{name: two}), want)
        for value in NO_INTEGERS:
            refused(case, f"{name.removeprefix(case.keyword(''))}=.*: must be an integer of at least 1", ids, **{name: value})


def test_a_weight_comes_as_a_number_of_any_kind() -> None:
    case, ids = Case("one", "emulated fine-tuning fast"), random_prompt(1, 6)
    want = case.repeatable(ids, beta=0.5)
    for half in (np.float32(0.5), torch.tensor(0.5), np.float64(0.5)):
        assert torch.equal(case.repeatable(ids, beta=half), want)
    for wrong in (np.bool_(True), float("inf"), torch.ones(2)):
        refused(case, "beta=.*: must be a finite number", ids, beta=wrong)


# Keys


def with_key(key: str, value: Any = 0.5) -> GenerationConfig:
    config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("key", "near"),
    [("wsd_treshold", "wsd_threshold"), ("wsd_window", "wsd_window_size"), ("wsd_speculation", "wsd_speculate")],
)
@pytest.mark.parametrize("place", ["keyword", "passed config", "model's config", "processor"])
def test_a_misspelt_setting_is_named_with_the_one_that_is_near(key: str, near: str, place: str) -> None:
    case, ids = Case("one", "wsd fast"), random_prompt(1, 6)
    base = copy.deepcopy(case.world.base)
    kwargs: dict[str, Any] = {"attention_mask": ones(ids), "max_new_tokens": 4, **case.settings}
    if place == "keyword":
        kwargs[key] = 0.5
    elif place == "passed config":
        kwargs["generation_config"] = with_key(key)
    else:
        base.generation_config = with_key(key)
    if place == "processor":
        kwargs = {"attention_mask": ones(ids), "max_new_tokens": 4}
        kwargs["logits_processor"] = [wsd_hf.WSDLogitsProcessor(case.world.pilot)]
    kind = "keyword" if place == "keyword" else "key of a generation config"
    with pytest.raises(wsd_hf.WSDValueError, match=f"^{key}: unknown {kind}; known are .*wsd_threshold, .*; {near} is near$"):
        base.generate(ids, **kwargs)


def test_a_setting_like_no_other_is_named_alone() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"^wsd_zzzzz: unknown key .* known are .*assistant_do_sample$"):
        wsd_hf.WSDConfig.resolve({}, None, with_key("wsd_zzzzz"))


def test_a_misspelt_setting_disturbs_no_call_that_reads_none() -> None:
    case, ids = Case("one", "nudging"), random_prompt(1, 6)
    base = copy.deepcopy(case.world.base)
    want = plain_tokens(base, ids, 5), case.generate(ids).sequences
    base.generation_config.wsd_treshold = 0.5
    assert plain_tokens(base, ids, 5) == want[0]
    settings = {"attention_mask": ones(ids), "max_new_tokens": 10}
    assert torch.equal(base.generate(ids, **settings, **case.settings), want[1])


def test_a_packed_model_names_a_misspelt_setting(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    model.generation_config.wsd_treshold = 0.5
    with pytest.raises(wsd_hf.WSDValueError, match="wsd_treshold: unknown key of a generation config"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4)
