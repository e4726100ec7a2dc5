"""Random cases: whatever the settings, the composition, the caches and the budget hold."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, PreTrainedModel

import wsd_hf
from families import PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import compose, left_padded, ones
from scripted import PILOT_EOS, believe, scripted_model, write
from test_bridge import examples

thresholds = st.floats(0.01, 0.95)
windows = st.integers(1, 5)
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12).map(lambda row: torch.tensor([row]))
batches = st.lists(prompts, min_size=1, max_size=4)


@functools.cache
def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose rounding decides no random case."""
    return copy.deepcopy(model).double()


def ending_with(model: PreTrainedModel, eos: list[int]) -> PreTrainedModel:
    """The model with other EOS ids; weights are shared."""
    model = copy.copy(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = eos or None
    return model


def rounding(model: PreTrainedModel) -> float:
    """By how much logits differ that were computed in another order: Mamba keeps its state in float32, whatever its dtype."""
    return 1e-4 if model.config.model_type == "mamba" else 1e-5


def on_the_edge(log_probs: torch.Tensor, threshold: float, window: int, tolerance: float) -> bool:
    """Whether rounding could decide the switch of one row."""
    values = [value for value in log_probs.tolist() if not math.isnan(value)]
    means = [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    return any(abs(mean - math.log(threshold)) < tolerance for mean in means)


def check_logits(base: PreTrainedModel, tokens: torch.Tensor, prompt_length: int, logits: list[torch.Tensor]) -> None:
    """The logits of every step are those of one forward over the tokens, without a cache."""
    with torch.no_grad():
        whole = base(tokens, attention_mask=ones(tokens), use_cache=False).logits[0, prompt_length - 1 : -1].float()
    for step, row in enumerate(whole):
        torch.testing.assert_close(logits[step], row, atol=rounding(base), rtol=rounding(base))


@examples(
    60,
    360,
    family=st.sampled_from(["llama", "mistral", "mamba"]),
    rows=batches,
    threshold=thresholds,
    window=windows,
    limit=st.integers(1, 12),
    budget=st.integers(1, 14),
    base_eos=st.lists(st.integers(0, VOCABULARY - 1), max_size=6, unique=True),
    pilot_eos=st.lists(st.integers(0, VOCABULARY - 1), max_size=6, unique=True),
    draft_end=st.sampled_from(["continue", "stop"]),
)
def test_every_row_is_the_composition_within_its_budget(
    family: str,
    rows: list[torch.Tensor],
    threshold: float,
    window: int,
    limit: int,
    budget: int,
    base_eos: list[int],
    pilot_eos: list[int],
    draft_end: str,
) -> None:
    assume(window <= limit and (base_eos or draft_end == "continue"))
    base = wsd_hf.enable_wsd(ending_with(in_float64(tiny_model(family)), base_eos))
    pilot = ending_with(in_float64(tiny_pilot(family)), pilot_eos)
    ids, mask = left_padded(rows, PAD)
    out = base.generate(
        ids,
        attention_mask=mask,
        assistant_model=pilot,
        strategy=wsd_hf.WSDConfig(threshold=threshold, window_size=window, max_draft_tokens=limit, draft_end=draft_end),
        max_new_tokens=budget,
        return_dict_in_generate=True,
        output_logits=True,
    )
    width = ids.shape[1]
    assert out.sequences.shape[1] <= width + budget
    for row, prompt in enumerate(rows):
        assume(not on_the_edge(out.draft_log_probs[row], threshold, window, rounding(base)))
        want = compose(
            base, pilot, prompt, threshold=threshold, window=window, limit=limit, max_new_tokens=budget, draft_end=draft_end
        )
        length = len(want.tokens)
        assert out.sequences[row, width : width + length].tolist() == want.tokens
        assert set(out.sequences[row, width + length :].tolist()) <= {PAD}
        assert (int(out.draft_length[row]), out.switch_reason[row]) == (want.draft_length, want.reason)
        assert not set(want.tokens[:-1]) & set(base_eos)
        tokens = torch.cat([prompt, torch.tensor([want.tokens])], dim=1)
        check_logits(base, tokens, prompt.shape[1], [logits[row] for logits in out.logits])


@settings(max_examples=40)
@given(
    rows=batches,
    threshold=thresholds,
    window=windows,
    seed=st.integers(0, 1000),
    do_sample=st.booleans(),
    penalty=st.sampled_from([1.0, 1.5]),
)
def test_the_processor_alone_gives_the_sequences_of_the_strategy(
    rows: list[torch.Tensor], threshold: float, window: int, seed: int, do_sample: bool, penalty: float
) -> None:
    config = wsd_hf.WSDConfig(threshold=threshold, window_size=window, max_draft_tokens=8)
    ids, mask = left_padded(rows, PAD)
    kwargs: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 10,
        "do_sample": do_sample,
        "repetition_penalty": penalty,
    }
    base, pilot = tiny_model("llama"), tiny_pilot("llama")
    torch.manual_seed(seed)
    alone = base.generate(ids, logits_processor=LogitsProcessorList([wsd_hf.WSDLogitsProcessor(pilot, config)]), **kwargs)
    torch.manual_seed(seed)
    kwargs |= {"assistant_model": pilot, "strategy": config, "wsd_engine": "step"}
    assert torch.equal(wsd_hf.enable_wsd(copy.copy(base)).generate(ids, **kwargs), alone)


@settings(max_examples=60)
@given(
    probabilities=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12),
    threshold=st.floats(0.01, 0.999),
    window=windows,
)
def test_the_switch_is_where_the_scripted_probabilities_say(probabilities: list[float], threshold: float, window: int) -> None:
    prompt = [5, 6, 7]
    draft = [8 + index % 8 for index in range(len(probabilities))]
    base = wsd_hf.enable_wsd(believe(scripted_model(seed=1), prompt, draft, probabilities))
    pilot = write(scripted_model(seed=2, eos=PILOT_EOS), prompt, [*draft, PILOT_EOS])
    logs = [math.log(probability) for probability in probabilities]
    means = {end: math.fsum(logs[end - window : end]) / window for end in range(window, len(logs) + 1)}
    assume(all(abs(mean - math.log(threshold)) > 1e-4 for mean in means.values()))
    ids = torch.tensor([prompt])
    out = base.generate(
        ids,
        attention_mask=ones(ids),
        assistant_model=pilot,
        strategy="wsd",
        wsd_threshold=threshold,
        wsd_window_size=window,
        max_new_tokens=16,
        return_dict_in_generate=True,
    )
    crossing = next((end for end, mean in means.items() if mean >= math.log(threshold)), None)
    assert int(out.draft_length) == (crossing or len(draft))
    assert out.switch_reason == ["confident" if crossing else "draft_ended"]
    torch.testing.assert_close(
        out.draft_log_probs[0], torch.tensor(logs[: crossing or len(logs)]), atol=2e-4, rtol=1e-4, check_dtype=False
    )
