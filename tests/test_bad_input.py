"""What cannot work is refused, by name, before either model runs."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import wsd_hf
from families import EOS, PAD, tiny_model, tiny_parts, tiny_pilot
from oracle import compose, left_padded, ones, plain_tokens, random_prompt
from scripted import PILOT_EOS, believe, scripted_model, write
from tokenizers_for_tests import LETTERS, letter_tokenizer

PROMPT = random_prompt(1, 6)
STEP = {"wsd_engine": "step"}  # where a fault is placed at the k-th forward, which is the k-th token there


class Forwards:
    """Counts what runs; installed on both models."""

    count = 0

    def __call__(self, *args: Any) -> None:
        self.count += 1


@pytest.fixture
def forwards(base: PreTrainedModel, pilot: PreTrainedModel) -> Iterator[Forwards]:
    counter = Forwards()
    hooks = [model.register_forward_pre_hook(counter) for model in (base, pilot)]
    yield counter
    for hook in hooks:
        hook.remove()


def decode(base: PreTrainedModel, pilot: PreTrainedModel | None, ids: torch.Tensor = PROMPT, **kwargs: Any) -> Any:
    kwargs = {"attention_mask": ones(ids), "max_new_tokens": 8, "strategy": "wsd", **kwargs}
    return base.generate(ids, assistant_model=pilot, **kwargs)


TINY_T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "threshold nan": ({"wsd_threshold": float("nan")}, r"threshold=nan: must be a number above 0 and at most 1"),
    "threshold zero": ({"wsd_threshold": 0.0}, r"threshold=0\.0: must be"),
    "threshold negative": ({"wsd_threshold": -0.5}, r"threshold=-0\.5: must be"),
    "threshold above one": ({"wsd_threshold": 1.01}, r"threshold=1\.01: must be"),
    "threshold text": ({"wsd_threshold": "high"}, r"threshold='high': must be"),
    "threshold bool": ({"wsd_threshold": True}, r"threshold=True: must be"),
    "window zero": ({"wsd_window_size": 0}, r"window_size=0: must be an integer of at least 1"),
    "window negative": ({"wsd_window_size": -2}, r"window_size=-2: must be"),
    "window fraction": ({"wsd_window_size": 1.5}, r"window_size=1\.5: must be"),
    "draft limit zero": ({"wsd_max_draft_tokens": 0}, r"max_draft_tokens=0: must be an integer of at least 1"),
    "draft end": ({"wsd_draft_end": "halt"}, r"draft_end='halt': must be 'continue' or 'stop'"),
    "unknown setting": ({"wsd_gamma": 0.5}, r"wsd_gamma: unknown keyword; known are .*wsd_threshold"),
    "settings of another type": ({"strategy": {"threshold": 0.5}}, r"strategy=\{.*\}: unknown; known are 'wsd', "),
    "stop without eos": ({"wsd_draft_end": "stop", "eos_token_id": -1}, r"draft_end='stop'.*eos_token_id"),
    "stop with an eos that the base lacks": (
        {"wsd_draft_end": "stop", "eos_token_id": 1000},
        r"draft_end='stop'.*eos_token_id",
    ),
    "unknown strategy": ({"strategy": "best"}, r"strategy='best': unknown; known are 'wsd'"),
    "no pilot": ({"assistant_model": None}, r"strategy='wsd' needs a pilot: pass assistant_model="),
    "pilot by name": (
        {"assistant_model": "pilot"},
        r"assistant_model='pilot': must be a causal language model, already loaded",
    ),
    "beams": ({"num_beams": 4}, r"beam_search \(num_beams=4\)"),
    "sampling beams": ({"num_beams": 4, "do_sample": True}, r"beam_sample \(num_beams=4\)"),
    "prompt lookup": (
        {"prompt_lookup_num_tokens": 3},
        r"prompt_lookup_num_tokens=3 is a setting of transformers'",
    ),
    "custom generate": ({"custom_generate": print}, r"custom_generate cannot be combined with strategy='wsd'"),
    "synced gpus": ({"synced_gpus": True}, r"synced_gpus=True is not supported"),
    "token healing": ({"token_healing": True}, r"token_healing=True is not supported"),
    "stop strings without tokenizer": ({"stop_strings": ["ab"]}, r"stop_strings=\['ab'\] .*tokenizer="),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, r"input_ids is padded on the right"),
    "empty prompt": ({"attention_mask": torch.zeros(1, 6, dtype=torch.long)}, r"input_ids has an empty prompt"),
    "pilot prompt of other rows": (
        {"assistant_input_ids": torch.tensor([[5, 6], [7, 8]])},
        r"assistant_input_ids has shape \(2, 2\): must be \[batch, tokens\] with 1 rows",
    ),
    "pilot prompt without rows": ({"assistant_input_ids": torch.tensor([5, 6])}, r"assistant_input_ids has shape \(2,\)"),
    "empty pilot prompt": (
        {"assistant_input_ids": torch.zeros(1, 0, dtype=torch.long)},
        r"assistant_input_ids has an empty prompt",
    ),
    "pilot prompt padded right": (
        {"assistant_input_ids": torch.tensor([[5, 6]]), "assistant_attention_mask": torch.tensor([[1, 0]])},
        r"assistant_input_ids is padded on the right",
    ),
    "pilot mask of another shape": (
        {"assistant_input_ids": torch.tensor([[5, 6]]), "assistant_attention_mask": torch.tensor([[1, 1, 1]])},
        r"mask of assistant_input_ids has shape \(1, 3\): must be \(1, 2\)",
    ),
    "pilot mask without a prompt": (
        {"assistant_attention_mask": torch.ones(1, 6, dtype=torch.long)},
        r"assistant_attention_mask.*assistant_input_ids",
    ),
    "pilot prompt outside its vocabulary": (
        {"assistant_input_ids": torch.tensor([[5, 64]])},
        r"assistant_input_ids contains token id 64, but the vocabulary of assistant_model has 64 tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name_before_any_forward(base: Any, pilot: Any, forwards: Forwards, case: str) -> None:
    kwargs, message = REFUSED[case]
    kwargs = {"assistant_model": pilot, "attention_mask": ones(PROMPT), "max_new_tokens": 8, "strategy": "wsd", **kwargs}
    if kwargs.get("eos_token_id") == -1:
        base = copy.deepcopy(base)
        base.generation_config.eos_token_id = kwargs.pop("eos_token_id") and None
    with pytest.raises(wsd_hf.WSDValueError, match=message):
        base.generate(PROMPT, **kwargs)
    assert forwards.count == 0


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_an_encoder_decoder_is_refused_by_name(base: Any, pilot: Any, forwards: Forwards, role: str) -> None:
    t5 = T5ForConditionalGeneration(T5Config(**TINY_T5, decoder_start_token_id=0))
    with pytest.raises(wsd_hf.WSDValueError, match=r"encoder-decoder \(T5ForConditionalGeneration\)"):
        decode(wsd_hf.enable_wsd(t5), pilot) if role == "base" else decode(base, t5)
    assert forwards.count == 0


def test_embeddings_in_place_of_a_prompt_are_refused_by_name(base: Any, pilot: Any, forwards: Forwards) -> None:
    embeddings = base.get_input_embeddings()(PROMPT)
    with pytest.raises(wsd_hf.WSDValueError, match="inputs_embeds"):
        base.generate(inputs_embeds=embeddings, assistant_model=pilot, strategy="wsd", max_new_tokens=8)
    assert forwards.count == 0


@pytest.mark.parametrize("strategy", [True, False], ids=["strategy", "processor"])
def test_a_prompt_that_lacks_its_cached_beginning_is_refused(base: Any, pilot: Any, strategy: bool) -> None:
    with torch.no_grad():
        cache = base(PROMPT, use_cache=True).past_key_values
    door = (
        {"strategy": "wsd", "assistant_model": pilot} if strategy else {"logits_processor": [wsd_hf.WSDLogitsProcessor(pilot)]}
    )
    with pytest.raises(wsd_hf.WSDValueError, match=r"mask of input_ids has shape \(1, 8\): must be \(1, 2\).*past_key_values"):
        base.generate(
            random_prompt(9, 2),
            attention_mask=torch.ones(1, 8, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=8,
            **door,
        )


def test_a_window_that_no_draft_can_fill_warns_and_runs(base: Any, pilot: Any) -> None:
    with pytest.warns(UserWarning, match=r"window_size=6 is larger than max_draft_tokens=3"):
        out = decode(base, pilot, wsd_max_draft_tokens=3)
    drafted = plain_tokens(pilot, PROMPT, 3)
    assert out[0, 6:].tolist() == drafted + plain_tokens(base, torch.cat([PROMPT, torch.tensor([drafted])], 1), 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("switch_criteria", 0.8),
        ("assistant_input_ids", [[1, 2]]),
        ("tokenizer", "a name"),
        ("assistant_tokenizer", ["tokens"]),
    ],
)
def test_an_argument_of_another_type_is_named(base: Any, pilot: Any, forwards: Forwards, name: str, value: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=f"{name} is of type {type(value).__name__}: must be a "):
        decode(base, pilot, **{name: value})
    assert forwards.count == 0


# Vocabularies


def test_tokenizers_that_were_swapped_are_noticed_where_their_sizes_tell() -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts(pilot="pilot_other_vocab")
    messages = [{"role": "user", "content": "What does the Keloft eat?"}]
    inputs = wsd_hf.build_inputs(messages, tokenizer, pilot_tokenizer)
    with pytest.raises(wsd_hf.WSDValueError, match=r"tokenizer has \d+ tokens, and its model \d+: pass each model's own"):
        base.generate(**inputs, assistant_model=pilot, strategy="wsd", tokenizer=pilot_tokenizer, assistant_tokenizer=tokenizer)


def resized(model: PreTrainedModel, size: int) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("engine", ["fast", "step"])
def test_tokenizers_of_one_size_and_different_ids_are_told_apart(base: Any, pilot: Any, engine: str) -> None:
    tokenizer, other = letter_tokenizer(64), letter_tokenizer(64, start=LETTERS[20:60])
    kwargs = {"tokenizer": tokenizer, "assistant_tokenizer": other, "wsd_engine": engine}
    out = decode(base, pilot, **kwargs, wsd_threshold=1.0, wsd_max_draft_tokens=6)
    drafted = plain_tokens(pilot, torch.tensor([other.encode(tokenizer.decode(PROMPT[0]))]), 6, eos_token_id=EOS)
    crossed = tokenizer.encode(other.decode(drafted, skip_special_tokens=True))
    assert crossed != drafted
    rest = plain_tokens(base, torch.tensor([PROMPT[0].tolist() + crossed]), 8 - len(crossed))
    assert out[0, 6:].tolist() == crossed + rest


def test_one_vocabulary_padded_to_another_width_is_accepted(base: Any, pilot: Any) -> None:
    tokenizer = letter_tokenizer(60)
    wide = resized(pilot, 72)
    with torch.no_grad():
        wide.lm_head.weight[64:] = 0.0
    kwargs = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer, "wsd_threshold": 0.15, "wsd_window_size": 2}
    assert torch.equal(decode(base, wide, **kwargs), decode(base, pilot, **kwargs))


@pytest.mark.parametrize(("given", "missing"), [((), "tokenizer="), (("tokenizer",), "assistant_tokenizer=")])
def test_a_tokenizer_is_asked_for_where_only_it_can_tell(
    base: Any, pilot: Any, forwards: Forwards, given: tuple[str, ...], missing: str
) -> None:
    kwargs = {name: letter_tokenizer(60) for name in given}
    with pytest.raises(wsd_hf.WSDValueError, match=rf"has 64 entries and the pilot's 72: pass {missing}"):
        decode(base, resized(pilot, 72), **kwargs)
    assert forwards.count == 0


def test_a_drafted_id_outside_the_bases_vocabulary_is_refused(base: Any, pilot: Any) -> None:
    wide = resized(pilot, 72)
    with torch.no_grad():
        wide.lm_head.weight[70] = 50 * wide.lm_head.weight[plain_tokens(pilot, PROMPT, 1)[0]]
    tokenizer = letter_tokenizer(60)
    with pytest.raises(wsd_hf.WSDValueError, match=r"drafted token id 70, but the base's vocabulary has 64"):
        decode(base, wide, tokenizer=tokenizer, assistant_tokenizer=tokenizer)


def test_what_a_pilot_would_write_behind_a_rows_switch_is_nobodys_concern() -> None:
    switched, drafting = [5, 6, 7], [9, 5, 6, 7, 8]
    base = believe(scripted_model(seed=1), switched, [8], [0.9])
    wsd_hf.enable_wsd(believe(base, drafting, [14, 15, 3], [1e-4] * 3))
    pilot = write(scripted_model(seed=2, eos=PILOT_EOS, vocab_size=18), switched, [8, 17])
    write(pilot, drafting, [14, 15, 3, PILOT_EOS])
    tokenizer = letter_tokenizer(16)
    ids, mask = left_padded([torch.tensor([switched]), torch.tensor([drafting])], 0)
    kwargs = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer, "wsd_threshold": 0.8, "wsd_window_size": 1}
    out = decode(base, pilot, ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
    assert out.draft_length.tolist() == [1, 3]


def test_an_eos_of_the_pilot_may_lie_outside_the_bases_vocabulary(base: Any, pilot: Any) -> None:
    wide = resized(pilot, 72)
    wide.generation_config.eos_token_id = 70
    with torch.no_grad():
        wide.lm_head.weight[70] = 50 * wide.lm_head.weight[plain_tokens(pilot, PROMPT, 1)[0]]
    tokenizer = letter_tokenizer(60)
    out = decode(base, wide, tokenizer=tokenizer, assistant_tokenizer=tokenizer)
    assert out[0, 6:].tolist() == plain_tokens(base, PROMPT, 8)


def test_a_base_prompt_outside_the_pilots_vocabulary_is_refused(pilot: Any, forwards: Forwards) -> None:
    wide = wsd_hf.enable_wsd(resized(tiny_model("llama"), 72))
    tokenizer = letter_tokenizer(60)
    with pytest.raises(
        wsd_hf.WSDValueError, match=r"input_ids contains token id 70, but the vocabulary of assistant_model has 64"
    ):
        decode(wide, pilot, torch.tensor([[5, 70]]), tokenizer=tokenizer, assistant_tokenizer=tokenizer)
    assert forwards.count == 0


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("step", [1, 3])
def test_logits_that_are_no_numbers_raise_naming_model_and_step(
    base: Any, pilot: Any, role: str, step: int, value: float
) -> None:
    seen = 0

    def spoil(module: Any, args: Any, output: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            output.logits[:, -1, 7] = value

    hook = {"base": base, "pilot": pilot}[role].register_forward_hook(spoil)
    try:
        with pytest.raises(wsd_hf.WSDLogitsError, match=rf"the {role} returned .* at response token {step} of row 0"):
            decode(base, pilot, wsd_threshold=1.0, **STEP)
    finally:
        hook.remove()


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_logits_that_forbid_every_token_raise(base: Any, pilot: Any, role: str) -> None:
    def spoil(module: Any, args: Any, output: Any) -> None:
        output.logits.fill_(-torch.inf)

    hook = {"base": base, "pilot": pilot}[role].register_forward_hook(spoil)
    try:
        with pytest.raises(wsd_hf.WSDLogitsError, match=rf"the {role} returned"):
            decode(base, pilot)
    finally:
        hook.remove()


def test_a_base_that_fails_only_behind_the_switch_is_named_too(base: Any, pilot: Any) -> None:
    seen = 0

    def spoil(module: Any, args: Any, output: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:
            output.logits.fill_(torch.nan)

    hook = base.register_forward_hook(spoil)
    try:
        with pytest.raises(wsd_hf.WSDLogitsError, match=r"the base returned NaN .* at response token 6 of row 0"):
            decode(base, pilot, wsd_threshold=1e-9, wsd_window_size=1, **STEP)
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_pilot_of_another_dtype_drafts_what_it_would_write_alone(base: Any, pilot: Any, dtype: torch.dtype) -> None:
    other = copy.deepcopy(pilot).to(dtype)
    want = compose(base, other, PROMPT, threshold=0.15, window=2, max_new_tokens=12)
    got = decode(base, other, wsd_threshold=0.15, wsd_window_size=2, max_new_tokens=12)
    assert got[0, 6:].tolist() == want.tokens


# Padding


def warnings_of(caplog: pytest.LogCaptureFixture, model: PreTrainedModel, **kwargs: Any) -> list[str]:
    logger = logging.getLogger("transformers")
    caplog.clear()
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # of garbage that other tests left
            model.generate(PROMPT, attention_mask=ones(PROMPT), max_new_tokens=8, **kwargs)
    finally:
        logger.removeHandler(caplog.handler)
    records = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return records + [str(warning.message) for warning in caught]


@pytest.mark.parametrize("eos", [EOS, None])
def test_without_pad_tokens_one_row_runs_and_nothing_new_is_warned(
    own_base: Any, own_pilot: Any, caplog: pytest.LogCaptureFixture, eos: int | None
) -> None:
    for model in (own_base, own_pilot):
        model.generation_config = GenerationConfig(eos_token_id=eos)
    plain = warnings_of(caplog, own_base)
    assert warnings_of(caplog, own_base, assistant_model=own_pilot, strategy="wsd") == plain


def test_a_padded_batch_without_a_pad_token_is_refused_by_name(own_base: Any, pilot: Any, forwards: Forwards) -> None:
    own_base.generation_config = GenerationConfig(eos_token_id=EOS)
    ids, mask = left_padded([PROMPT, random_prompt(2, 4)], PAD)
    with pytest.raises(wsd_hf.WSDValueError, match="pad_token_id"):
        decode(own_base, pilot, ids, attention_mask=mask)
    assert forwards.count == 0


def test_the_pilot_needs_no_pad_token_of_its_own(base: Any, pilot: Any, own_pilot: Any) -> None:
    own_pilot.generation_config.pad_token_id = None
    ids, mask = left_padded([PROMPT, random_prompt(2, 4)], PAD)
    want = decode(base, pilot, ids, attention_mask=mask)
    assert torch.equal(decode(base, own_pilot, ids, attention_mask=mask), want)


# Contexts


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize("excess", [0, 1])
def test_a_prompt_that_fills_a_context_is_refused_naming_the_model(family: str, role: str, excess: int) -> None:
    size = {"n_positions" if family == "gpt2" else "max_position_embeddings": 12}
    models = {name: tiny_model(family, **(size if name == role else {})) for name in ("base", "pilot")}
    base = wsd_hf.enable_wsd(copy.deepcopy(models["base"]))
    length = 12 + excess
    with pytest.raises(wsd_hf.WSDValueError, match=rf"the prompt of the {role} has {length} tokens and its context holds 12"):
        decode(base, models["pilot"], random_prompt(0, length))


def test_one_token_below_its_context_the_pilot_drafts_one_token() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2")))
    pilot = tiny_model("gpt2", seed=3, n_positions=12)
    prompt = random_prompt(0, 11)
    out = decode(base, pilot, prompt, wsd_threshold=1.0, return_dict_in_generate=True)
    want = compose(base, pilot, prompt, threshold=1.0, window=1, limit=1, max_new_tokens=8)
    assert (out.draft_length.tolist(), out.switch_reason) == ([1], ["draft_limit"])
    assert out.sequences[0, 11:].tolist() == want.tokens


def test_one_token_below_its_context_the_base_writes_one_token() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2", n_positions=12)))
    pilot = tiny_model("gpt2", seed=3)
    prompt = random_prompt(0, 11)
    out = decode(base, pilot, prompt, wsd_threshold=1.0, max_new_tokens=1)
    assert out[0, 11:].tolist() == plain_tokens(pilot, prompt, 1)


def test_padding_takes_no_room_in_a_context() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2", n_positions=24)))
    ids, mask = left_padded([random_prompt(0, 9)], PAD, width=30)
    alone = decode(base, tiny_pilot("gpt2"), random_prompt(0, 9), wsd_threshold=0.15, wsd_window_size=2)
    got = decode(base, tiny_pilot("gpt2"), ids, attention_mask=mask, wsd_threshold=0.15, wsd_window_size=2)
    assert torch.equal(got[:, 30:], alone[:, 9:])


def test_a_pilots_context_that_one_row_has_used_up_binds_no_other_row() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2")))
    pilot = tiny_model("gpt2", seed=3, n_positions=12)
    rows = [random_prompt(0, 10), random_prompt(1, 4)]
    ids, mask = left_padded(rows, PAD)
    out = decode(base, pilot, ids, attention_mask=mask, wsd_threshold=1.0, return_dict_in_generate=True)
    for row, prompt in enumerate(rows):
        want = compose(base, pilot, prompt, threshold=1.0, window=1, limit=12 - prompt.shape[1], max_new_tokens=8)
        assert int(out.draft_length[row]) == want.draft_length
        assert out.sequences[row, 10 : 10 + len(want.tokens)].tolist() == want.tokens
