"""Every architecture gives the composition, whatever it keeps of the past."""

from __future__ import annotations

import copy
from collections import Counter

import pytest

import wsd_hf
from families import FAMILIES, PAD, tiny_model, tiny_pilot
from oracle import compose, left_padded, random_prompt, response

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
