"""Every architecture gives the composition, whatever it keeps of the past, and on the fast path wherever it can be rewound."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

import wsd_hf
from families import FAMILIES, MORE_RAGGED, PAD, RAGGED, tiny_model, tiny_pilot
from oracle import compose, left_padded, plain_tokens, random_prompt, response
from test_fast_path import FiresAt, both

PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((4, 7, 11))]
RULES = [(0.15, 1), (0.15, 3), (0.3, 2), (0.5, 1)]


@pytest.mark.parametrize(("threshold", "window"), RULES)
@pytest.mark.parametrize("family", FAMILIES)
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
    for row, prompt in enumerate(PROMPTS):
        want = compose(base, pilot, prompt, threshold=threshold, window=window, limit=9, max_new_tokens=14)
        assert response(out.sequences[row], ids.shape[1], want, PAD) == want.tokens
        assert (int(out.draft_length[row]), out.switch_reason[row]) == (want.draft_length, want.reason)


def test_the_cases_above_switch_early_late_and_never() -> None:
    seen: Counter[str] = Counter()
    for family in FAMILIES:
        for threshold, window in RULES:
            for prompt in PROMPTS:
                want = compose(
                    tiny_model(family),
                    tiny_pilot(family),
                    prompt,
                    threshold=threshold,
                    window=window,
                    limit=9,
                    max_new_tokens=9,
                )
                seen[want.reason if want.reason != "confident" else "early" if want.draft_length <= 3 else "late"] += 1
    assert min(seen[kind] for kind in ("early", "late", "draft_limit", "draft_ended")) >= 3, seen


@pytest.mark.parametrize(("base_family", "pilot_family"), [("mamba", "llama"), ("llama", "mamba"), ("gpt2", "qwen3_next")])
def test_base_and_pilot_may_be_of_different_architectures(base_family: str, pilot_family: str) -> None:
    base, pilot = wsd_hf.enable_wsd(copy.deepcopy(tiny_model(base_family))), tiny_model(pilot_family)
    prompt = PROMPTS[1]
    out = base.generate(prompt, assistant_model=pilot, strategy="wsd", wsd_threshold=0.05, wsd_window_size=1, max_new_tokens=14)
    want = compose(base, pilot, prompt, threshold=0.05, window=1, max_new_tokens=14)
    assert out[0, prompt.shape[1] :].tolist() == want.tokens


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
    return wsd_hf.enable_wsd(base), pilot


def ragged_calls_agree(family: str, *switches: int) -> None:
    ids, mask = left_padded(ROWS, PAD)
    settings = {"switch_criteria": FiresAt(*switches), "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": PAD}
    both(*pair(family), ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("family", RAGGED + MORE_RAGGED)
def test_rows_of_any_length_are_written_on_the_fast_path_as_step_by_step(family: str) -> None:
    ragged_calls_agree(family, 2, 9, 4, 16)


@pytest.mark.sweep
@pytest.mark.parametrize("family", RAGGED + MORE_RAGGED)
def test_rows_that_switch_at_once_and_never_are_written_on_the_fast_path_as_step_by_step(family: str) -> None:
    ragged_calls_agree(family, 1, 1, 99, 5)


@pytest.mark.sweep
@pytest.mark.parametrize("switch", [1, 4, 20])
@pytest.mark.parametrize("family", RAGGED + MORE_RAGGED)
def test_the_fast_path_writes_the_pilots_greedy_text_and_then_the_bases(family: str, switch: int) -> None:
    base, pilot = pair(family)
    prompt = random_prompt(1, 6)
    settings = {"switch_criteria": FiresAt(switch), "max_new_tokens": 20, "eos_token_id": None}
    fast, _ = both(base, pilot, prompt, **settings)
    draft = plain_tokens(pilot, prompt, switch, eos_token_id=None)
    rest = plain_tokens(base, torch.cat([prompt, torch.tensor([draft])], dim=1), 20 - switch, eos_token_id=None)
    assert fast.sequences[0, 6:].tolist() == draft + rest
