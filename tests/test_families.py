"""Every architecture gives the composition, whatever it keeps of the past, and on the fast path wherever it can be rewound."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

import wsd_hf
from every_strategy import swept_unless
from families import EOS, FAMILIES, IMAGE, IMAGE_TEXT, MARK, MORE_RAGGED, PAD, PAGE, RAGGED, table, tiny_model, tiny_pilot
from oracle import Expected, compose, left_padded, plain_tokens, random_prompt, response
from test_fast_path import FiresAt, both, decode
from wsd_hf.engine.supported import unsupported_model

PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((4, 7, 11))]
RULES = [(0.15, 1), (0.15, 3), (0.3, 2), (0.5, 1)]
USUAL = [(family, *rule) for number, family in enumerate(FAMILIES) for rule in RULES[number % 2 :: 2]]
"""Outside of the sweep two of the rules for each family."""
SWEPT = [(family, *rule) for number, family in enumerate(FAMILIES) for rule in RULES[1 - number % 2 :: 2]]


@functools.cache
def compositions(family: str, threshold: float, window: int) -> list[Expected]:
    """The composition for each prompt."""
    models, rule = (tiny_model(family), tiny_pilot(family)), {"threshold": threshold, "window": window}
    return [compose(*models, prompt, **rule, limit=9, max_new_tokens=14) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("family", "threshold", "window"), [*USUAL, *(pytest.param(*case, marks=pytest.mark.sweep) for case in SWEPT)]
)
def test_a_padded_batch_gives_the_composition_in_every_row(family: str, threshold: float, window: int) -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model(family)))
    pilot = tiny_pilot(family)
    ids, mask = left_padded(PROMPTS, PAD)
    out = base.generate(
        ids,
        attention_mask=mask,
        assistant_model=pilot,
        strategy=wsd_hf.WSDConfig(threshold=threshold, window_size=window, max_draft_tokens=9),
        max_new_tokens=14,
        return_dict_in_generate=True,
    )
    for row, want in enumerate(compositions(family, threshold, window)):
        assert response(out.sequences[row], ids.shape[1], want, PAD) == want.tokens
        assert (int(out.draft_length[row]), out.switch_reason[row]) == (want.draft_length, want.reason)


def test_the_cases_above_switch_early_late_and_never() -> None:
    seen: Counter[str] = Counter()
    for case in USUAL:
        for want in compositions(*case):
            seen[want.reason if want.reason != "confident" else "early" if want.draft_length <= 3 else "late"] += 1
    assert min(seen[kind] for kind in ("early", "late", "draft_limit", "draft_ended")) >= 3, seen


@pytest.mark.parametrize(("base_family", "pilot_family"), [("mamba", "llama"), ("llama", "mamba"), ("gpt2", "qwen3_next")])
def test_base_and_pilot_may_be_of_different_architectures(base_family: str, pilot_family: str) -> None:
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model(base_family))), tiny_model(pilot_family)
    prompt = PROMPTS[1]
    out = base.generate(prompt, assistant_model=pilot, strategy="wsd", wsd_threshold=0.05, wsd_window_size=1, max_new_tokens=14)
    want = compose(base, pilot, prompt, threshold=0.05, window=1, max_new_tokens=14)
    assert out[0, prompt.shape[1] :].tolist() == want.tokens


SERVED = [*RAGGED, *MORE_RAGGED, *IMAGE_TEXT]
SOME_SERVED = [swept_unless(number % 3 == 0, family) for number, family in enumerate(SERVED)]

ROWS = [random_prompt(10 + seed, length) for seed, length in enumerate((3, 12, 7, 20))]


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Base and pilot in float64; in float32 where that is NaN next to padding, or refused by experts."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers lacks {family}")
    models = [copy.deepcopy(model).double() for model in (tiny_model(family), tiny_pilot(family))]
    ids, mask = left_padded(ROWS, PAD)
    try:
        exact = bool(models[0](ids, attention_mask=mask).logits[:, -1].isfinite().all())
    except RuntimeError:
        exact = False
    base, pilot = models if exact else [copy.deepcopy(model) for model in (tiny_model(family), tiny_pilot(family))]
    with torch.no_grad():
        beginning, whole = base(ROWS[2]).logits, base(torch.cat([ROWS[2], ROWS[0]], dim=1)).logits
    if not torch.allclose(beginning, whole[:, : ROWS[2].shape[1]], atol=1e-3):
        pytest.skip(f"{family} reads ahead in this version of transformers")  # Doge, until prompts without padding got a mask
    return wsd_hf.enable_wsd(base), pilot


def ragged_calls_agree(family: str, *switches: int) -> None:
    ids, mask = left_padded(ROWS, PAD)
    settings = {"switch_criteria": FiresAt(*switches), "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": PAD}
    both(*pair(family), ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("family", SOME_SERVED)
def test_rows_of_any_length_are_written_on_the_fast_path_as_step_by_step(family: str) -> None:
    ragged_calls_agree(family, 2, 9, 4, 16)


@pytest.mark.sweep
@pytest.mark.parametrize("family", SERVED)
def test_rows_that_switch_at_once_and_never_are_written_on_the_fast_path_as_step_by_step(family: str) -> None:
    ragged_calls_agree(family, 1, 1, 99, 5)


@pytest.mark.sweep
@pytest.mark.parametrize("switch", [1, 4, 20])
@pytest.mark.parametrize("family", SERVED)
def test_the_fast_path_writes_the_pilots_greedy_text_and_then_the_bases(family: str, switch: int) -> None:
    base, pilot = pair(family)
    prompt = random_prompt(1, 6)
    settings = {"switch_criteria": FiresAt(switch), "max_new_tokens": 20, "eos_token_id": None}
    fast, _ = both(base, pilot, prompt, **settings)
    draft = [token for token in plain_tokens(pilot, prompt, switch, eos_token_id=EOS) if token != EOS]
    rest = plain_tokens(base, torch.cat([prompt, torch.tensor([draft]).long()], dim=1), 20 - len(draft), eos_token_id=None)
    assert fast.sequences[0, 6:].tolist() == draft + rest


LEFT_OUT = {
    "bert": "has other logits on a cache with rows of different length than without a cache",
    "bloom": "raises ValueError on a cache with rows of different length",
    "deepseek_v32": "has layers of type '",
    "deepseek_v4": "has layers of type 'compressed_sparse_attention'",
    "gpt_neo": "has layers of type 'global'",
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_a_family_that_must_go_step_by_step_is_named_with_the_reason(family: str) -> None:
    reason = unsupported_model("pilot", tiny_model(family))
    assert reason is not None
    assert reason.startswith(f"the pilot {LEFT_OUT[family]}")


@pytest.mark.parametrize("model", [("bloom", {}), ("gpt_neo", {}), ("falcon", {"alibi": True})], ids=lambda model: model[0])
def test_positions_that_depend_on_the_whole_batch_go_step_by_step(model: tuple[str, dict[str, bool]]) -> None:
    family, settings = model
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model(family, **settings))), tiny_pilot("llama")
    with pytest.raises(wsd_hf.WSDValueError, match="wsd_engine='fast' cannot serve this call: the base "):
        decode(base, pilot)
    assert torch.equal(*(decode(base, pilot, wsd_engine=engine).sequences for engine in ("auto", "step")))


def test_a_prompt_with_an_image_goes_step_by_step() -> None:
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gemma3"))), tiny_pilot("llama")
    base.model.multi_modal_projector.mm_input_projection_weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 4), IMAGE), random_prompt(3, 5)], dim=1)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": image, "token_type_ids": (ids == IMAGE).long(), "assistant_input_ids": random_prompt(3, 5)}
    inputs["wsd_threshold"] = 1e-9
    with pytest.raises(wsd_hf.WSDValueError, match=r"(images or videos were|pixel_values was|token_type_ids was) given"):
        decode(base, pilot, ids, **inputs)
    step, auto = (decode(base, pilot, ids, **inputs, wsd_engine=engine).sequences for engine in ("step", "auto"))
    other = decode(base, pilot, ids, **{**inputs, "pixel_values": 1 - image}, wsd_engine="step").sequences
    assert step.tolist() == auto.tolist() != other.tolist()


def test_types_of_tokens_that_mark_mere_text_are_no_reason_to_go_step_by_step() -> None:
    base, pilot = pair("gemma3")
    with_types, without = (
        decode(base, pilot, ROWS[1], **types).sequences for types in ({"token_type_ids": torch.zeros_like(ROWS[1])}, {})
    )
    assert torch.equal(with_types, without)


@pytest.mark.sweep
def test_the_table_in_the_docs_is_that_of_this_version_of_transformers() -> None:
    text = PAGE.read_text("utf-8")
    if MARK not in text:
        pytest.skip("the table was made with another version")
    assert text.partition(MARK)[2] == table() + "\n"
