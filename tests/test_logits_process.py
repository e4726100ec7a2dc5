"""`WSDLogitsProcessor` alone, on a model that knows nothing of this package."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

import wsd_hf
from families import EOS, PAD, tiny_model, tiny_pilot
from oracle import compose, left_padded, ones, random_prompt
from wsd_hf import WSDConfig, WSDLogitsProcessor

RULE = WSDConfig(threshold=0.15, window_size=2, max_draft_tokens=9)


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama"))
    assert not isinstance(model, wsd_hf.WSDGenerationMixin)
    return model


def with_processor(
    model: PreTrainedModel, ids: torch.Tensor, processor: LogitsProcessor, *others: LogitsProcessor, **kwargs: Any
) -> torch.Tensor:
    kwargs = {"attention_mask": ones(ids), "max_new_tokens": 14, **kwargs}
    return model.generate(ids, logits_processor=LogitsProcessorList([processor, *others]), **kwargs)


def with_strategy(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Step by step, as the processor goes, so that the two draw the same random numbers."""
    kwargs = {"attention_mask": ones(ids), "max_new_tokens": 14, "strategy": RULE, "wsd_engine": "step", **kwargs}
    return base.generate(ids, assistant_model=pilot, **kwargs)


CONFIGURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "bad words": {"bad_words_ids": [[n] for n in range(20, 40)]},
    "min new tokens": {"min_new_tokens": 12},
    "forced eos": {"forced_eos_token_id": EOS},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "several eos": {"eos_token_id": [EOS, 27, 46]},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "classifier-free guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_sequences_are_those_of_the_strategy(plain: Any, base: Any, pilot: Any, name: str, seed: int) -> None:
    prompt = random_prompt(seed, 6)
    want = with_strategy(base, pilot, prompt, **CONFIGURED[name])
    assert torch.equal(with_processor(plain, prompt, WSDLogitsProcessor(pilot, RULE), **CONFIGURED[name]), want)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_are_the_composition(plain: Any, pilot: Any, seed: int) -> None:
    prompt = random_prompt(seed, 6)
    want = compose(plain, pilot, prompt, threshold=0.15, window=2, limit=9, max_new_tokens=14)
    assert with_processor(plain, prompt, WSDLogitsProcessor(pilot, RULE))[0, 6:].tolist() == want.tokens


@pytest.mark.parametrize(
    "warpers",
    [{}, {"temperature": 0.5, "top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.8}, {"eta_cutoff": 0.02}],
    ids=lambda warpers: "+".join(warpers) or "plain",
)
def test_sampled_sequences_are_those_of_the_strategy(plain: Any, base: Any, pilot: Any, warpers: dict[str, Any]) -> None:
    prompt = random_prompt(1, 6)
    for seed in range(4):
        torch.manual_seed(seed)
        want = with_strategy(base, pilot, prompt, do_sample=True, **warpers)
        torch.manual_seed(seed)
        got = with_processor(plain, prompt, WSDLogitsProcessor(pilot, RULE), do_sample=True, **warpers)
        assert torch.equal(got, want)


def test_a_padded_batch_gives_the_sequences_of_the_strategy(plain: Any, base: Any, pilot: Any) -> None:
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(5)], PAD)
    want = with_strategy(base, pilot, ids, attention_mask=mask)
    assert torch.equal(with_processor(plain, ids, WSDLogitsProcessor(pilot, RULE), attention_mask=mask), want)


def test_several_samples_per_prompt_are_those_of_the_strategy(plain: Any, base: Any, pilot: Any) -> None:
    prompt, pilot_prompt = random_prompt(1, 6), random_prompt(4, 9)
    kwargs = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    want = with_strategy(base, pilot, prompt, assistant_input_ids=pilot_prompt, **kwargs)
    torch.manual_seed(0)
    processor = WSDLogitsProcessor(pilot, RULE, assistant_input_ids=pilot_prompt)
    assert torch.equal(with_processor(plain, prompt, processor, **kwargs), want)


@pytest.mark.parametrize("family", ["mamba", "gemma3_text", "gpt2"])
def test_other_architectures_give_the_sequences_of_the_strategy(family: str) -> None:
    model, pilot = tiny_model(family), tiny_pilot(family)
    ids, mask = left_padded([random_prompt(0, 4), random_prompt(1, 9)], PAD)
    want = with_strategy(wsd_hf.enable_wsd(copy.deepcopy(model)), pilot, ids, attention_mask=mask)
    assert torch.equal(with_processor(model, ids, WSDLogitsProcessor(pilot, RULE), attention_mask=mask), want)


@pytest.mark.parametrize("passed", [{}, {"generation_config": GenerationConfig(max_new_tokens=14, eos_token_id=EOS)}])
def test_settings_come_from_the_models_generation_config(plain: Any, base: Any, pilot: Any, passed: dict[str, Any]) -> None:
    prompt = random_prompt(1, 6)
    model = copy.deepcopy(plain)
    model.generation_config = RULE.to_generation_config(model.generation_config)
    model.generation_config.max_new_tokens = 14
    got = model.generate(prompt, attention_mask=ones(prompt), logits_processor=[WSDLogitsProcessor(pilot)], **passed)
    assert torch.equal(got, with_strategy(base, pilot, prompt))


def test_a_second_call_starts_afresh(plain: Any, pilot: Any) -> None:
    processor = WSDLogitsProcessor(pilot, RULE)
    prompt = random_prompt(1, 6)
    first = with_processor(plain, prompt, processor)
    with_processor(plain, random_prompt(2, 8), processor)
    assert torch.equal(with_processor(plain, prompt, processor), first)


def test_a_second_call_on_the_first_ones_output_starts_afresh(plain: Any, pilot: Any) -> None:
    processor = WSDLogitsProcessor(pilot, RULE)
    output = with_processor(plain, random_prompt(1, 6), processor, max_new_tokens=4)
    again = with_processor(plain, output, processor)
    assert torch.equal(again, with_processor(plain, output, WSDLogitsProcessor(pilot, RULE)))


def test_a_call_after_one_that_failed_starts_afresh(plain: Any, pilot: Any) -> None:
    processor = WSDLogitsProcessor(pilot, RULE)
    prompt = random_prompt(1, 6)
    want = with_processor(plain, prompt, processor)

    class FailsAtThird(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 8:
                raise OSError("disk full")
            return scores

    with pytest.raises(OSError, match="disk full"):
        with_processor(plain, prompt, processor, FailsAtThird())
    assert torch.equal(with_processor(plain, prompt, processor), want)


def test_a_processor_inside_a_composite_starts_afresh_too(plain: Any, pilot: Any) -> None:
    class Composite(LogitsProcessor):
        def __init__(self) -> None:
            self.parts = LogitsProcessorList([WSDLogitsProcessor(pilot, RULE)])

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return self.parts(input_ids, scores)

    composite = Composite()
    prompt = random_prompt(1, 6)
    first = with_processor(plain, prompt, composite)
    assert torch.equal(first, with_processor(plain, prompt, WSDLogitsProcessor(pilot, RULE)))
    assert torch.equal(with_processor(plain, prompt, composite), first)


def test_threads_may_share_one_processor(plain: Any, pilot: Any) -> None:
    processor = WSDLogitsProcessor(pilot, RULE)
    prompts = [random_prompt(seed, 5 + seed) for seed in range(2)]
    want = [with_processor(plain, prompt, processor) for prompt in prompts]
    got: list[Any] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts), timeout=60)

    def work(index: int) -> None:
        try:
            barrier.wait()
            got[index] = [with_processor(plain, prompts[index], processor) for _ in range(5)]
        except BaseException as error:
            got[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index, outputs in enumerate(got):
        if isinstance(outputs, BaseException):
            raise outputs
        assert all(torch.equal(output, want[index]) for output in outputs)


def test_nothing_of_a_call_stays_behind(plain: Any, pilot: Any) -> None:
    processor = WSDLogitsProcessor(pilot, RULE)
    caches: list[weakref.ref[Any]] = []
    hook = pilot.register_forward_hook(lambda *args: caches.append(weakref.ref(args[-1].past_key_values)))
    with_processor(plain, random_prompt(1, 6), processor)
    hook.remove()
    gc.collect()
    assert caches
    assert all(cache() is None for cache in caches)


def test_the_pilots_end_of_sequence_ends_the_draft(plain: Any, pilot: Any) -> None:
    prompt = random_prompt(1, 5)
    want = compose(plain, pilot, prompt, threshold=1.0, window=1, max_new_tokens=14)
    assert want.reason == "draft_ended"
    assert (
        with_processor(plain, prompt, WSDLogitsProcessor(pilot, WSDConfig(threshold=1.0, window_size=1)))[0, 5:].tolist()
        == want.tokens
    )


def test_beam_search_is_refused_by_name(plain: Any, pilot: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="beam search"):
        with_processor(plain, random_prompt(0, 5), WSDLogitsProcessor(pilot, RULE), num_beams=2)


@pytest.mark.parametrize("assistant", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model("llama")}])
def test_assisted_generation_is_refused_by_name(plain: Any, pilot: Any, assistant: dict[str, Any]) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="assisted generation"):
        with_processor(plain, random_prompt(0, 5), WSDLogitsProcessor(pilot, RULE), **assistant)


def test_a_loop_of_ones_own_is_refused(pilot: Any) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=r"inside generate\(\)"):
        WSDLogitsProcessor(pilot)(torch.tensor([[3, 4]]), torch.zeros(1, 64))


def test_a_pilot_is_needed() -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="assistant_model=None"):
        WSDLogitsProcessor(None)


class FirstRow(StoppingCriteria):
    """Fires for the first row from a length on, or for the others."""

    def __init__(self, length: int, others: bool = False) -> None:
        self.length, self.others = length, others

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        first = torch.arange(len(input_ids)) == 0
        return (first != self.others) & (input_ids.shape[1] >= self.length)


def test_the_pilot_rests_once_every_row_has_switched_or_ended(plain: Any, own_pilot: Any) -> None:
    forwards = []
    own_pilot.register_forward_pre_hook(lambda *_: forwards.append(1))
    own_pilot.generation_config.eos_token_id = None
    ids = torch.cat([random_prompt(0, 6), random_prompt(1, 6)])
    processor = WSDLogitsProcessor(own_pilot, switch_criteria=FirstRow(2, others=True))
    ends = StoppingCriteriaList([FirstRow(6 + 4)])
    with_processor(plain, ids, processor, stopping_criteria=ends, max_new_tokens=12, eos_token_id=EOS)
    assert len(forwards) == 4
