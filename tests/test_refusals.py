"""Keywords that would have no effect: refused by name before any forward, under every strategy and through every door.

Also goes through all settings that the installed transformers knows, so that a new one is looked at before it is ignored.
"""

from __future__ import annotations

import copy
import inspect
import pydoc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, pipeline

import wsd_hf
from every_strategy import CASES, Case, counting, every_case
from families import tiny_model, tiny_parts
from oracle import ones, plain_tokens, random_prompt
from wsd_hf.bundle import pack
from wsd_hf.engine.call import Call
from wsd_hf.engine.keywords import ASSISTED
from wsd_hf.engine.strategy import StrategyConfig, StrategyOutput
from wsd_hf.strategies import STRATEGIES
from wsd_hf.tiny import FOLDER

OWN: dict[str, dict[str, Any]] = {
    "wsd": {"wsd_threshold": 0.5, "wsd_chunk": 2},
    "nudging": {"nudging_threshold": 0.5},
    "emulated_fine_tuning": {"beta": 1.0, "eft_engine": "step"},
    "product": {"product_alpha": 1.0, "product_chunk": 2},
    "ensemble": {"ensemble_weight": 0.3},
    "blend": {"blend_threshold": 0.3},
    "weak_to_strong_search": {"beam_width": 2, "successors": 2, "chunk_length": 3, "official_ties": True, "value": max},
}
"""Settings of each strategy that no other has."""

TYPOS = {"wsd_treshold": "wsd_threshold", "max_new_token": "max_new_tokens", "asistant_model": "assistant_model"}
TYPOS |= {"atention_mask": "attention_mask", "temprature": "temperature"}


def refused(case: Case, message: str, **kwargs: Any) -> None:
    """Checks that a call is refused with a message, and before any forward of any model."""
    with ExitStack() as stack:
        forwards = [stack.enter_context(counting(model)) for model in case.models.values()]
        with pytest.raises(wsd_hf.WSDValueError, match=message):
            case.generate(case.prompt(3), **kwargs)
        assert not any(forwards)


@every_case
def test_a_setting_of_another_strategy_is_named_with_its_owner(case: Case) -> None:
    for owner, settings in OWN.items():
        for name, value in settings.items():
            if owner != case.strategy:
                refused(case, f"^{name} belongs to '{owner}', not to strategy='{case.strategy}'", **{name: value})


@every_case
@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_answered_with_what_is_near(case: Case, typo: str) -> None:
    refused(case, f"^{typo}: unknown keyword; .*; {TYPOS[typo]} is near$", **{typo: 3})


@every_case
def test_an_unknown_keyword_is_refused_where_nothing_is_near(case: Case) -> None:
    refused(case, "^zzqqx: unknown keyword; known are .* and inputs of the model$", zzqqx=1)


@every_case
def test_a_small_model_that_is_missing_is_named(case: Case) -> None:
    for name in case.models.keys() - {"base"}:
        what = {"assistant_model": "a pilot", "reference_model": "the small model before its tuning"}[name]
        refused(case, f"^strategy='{case.strategy}' needs {what}: pass {name}=$", **{name: None})


@every_case
def test_a_small_model_that_is_not_taken_is_refused(case: Case) -> None:
    if "reference_model" not in case.models:
        owners = "'weak_to_strong_search', 'emulated_fine_tuning'"
        message = f"belongs to {owners}, not to strategy='{case.strategy}'"
        refused(case, f"^reference_model {message}", reference_model=case.world.reference)
        refused(case, f"^reference_input_ids {message}", reference_input_ids=case.prompt(3))


def test_a_strategy_without_a_pilot_refuses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Alone(StrategyConfig):
        name = "alone"
        partners = ()
        depth: int

        def decode(self, call: Call) -> StrategyOutput:
            return StrategyOutput(sequences=call.input_ids[:, [*range(6), *[0] * self.depth]])

    monkeypatch.setitem(STRATEGIES, "alone", Alone)
    world, ids = CASES[0].world, CASES[0].prompt(3)
    assert world.base.generate(ids, strategy="alone", depth=3).tolist() == ids[:, [*range(6), 0, 0, 0]].tolist()
    assert world.base.generate(ids, strategy=Alone(depth=3)).tolist() == ids[:, [*range(6), 0, 0, 0]].tolist()
    with pytest.raises(wsd_hf.WSDValueError, match=r"assistant_model belongs to .*, not to strategy='alone'"):
        world.base.generate(ids, strategy="alone", depth=3, assistant_model=world.pilot)
    with pytest.raises(wsd_hf.WSDValueError, match="strategy='alone' needs depth: pass depth="):
        world.base.generate(ids, strategy="alone")
    with pytest.raises(wsd_hf.WSDValueError, match="depth belongs to 'alone': pass strategy='alone'"):
        world.base.generate(ids, depth=3)


@pytest.mark.parametrize("name", [*(name for settings in OWN.values() for name in settings), "reference_model"])
def test_what_only_strategies_take_is_refused_without_one(name: str) -> None:
    base, ids = CASES[0].world.base, CASES[0].prompt(3)
    with counting(base) as forwards, pytest.raises(wsd_hf.WSDValueError, match=f"^{name} belongs to '.*: pass strategy='"):
        base.generate(ids, **{name: 1})
    assert not forwards


def test_the_pilots_prompt_is_refused_without_a_strategy() -> None:
    case = CASES[0]
    with pytest.raises(wsd_hf.WSDValueError, match=r"^assistant_input_ids belongs to 'wsd', .*: pass strategy='wsd'$"):
        case.world.base.generate(case.prompt(3), assistant_model=case.world.pilot, assistant_input_ids=case.prompt(3))


def test_assisted_generation_of_transformers_goes_on_working() -> None:
    world, ids = CASES[0].world, random_prompt(3, 6)
    settings = {"attention_mask": ones(ids), "do_sample": False, "max_new_tokens": 6, "num_assistant_tokens": 3}
    with counting(world.pilot) as forwards:
        out = world.base.generate(ids, assistant_model=world.pilot, **settings)
    assert forwards
    want = plain_tokens(world.base, ids, 6)
    assert out[0, ids.shape[1] :].tolist()[: len(want)] == want


# transformers' own settings

REFUSED: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.5,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "is_assistant": True,
    "speculation_type": "dflash",
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 2,
    "use_mtp": True,
    "token_healing": True,
    "synced_gpus": True,
    "custom_generate": max,
    "cache_implementation": "paged",
    "num_beams": 2,
}
"""Keywords of transformers that every strategy refuses by name, and a value."""

OTHER_MODES: dict[str, Any] = {"dola_layers": "low", "constraints": [1], "force_words_ids": [[5]]}
OTHER_MODES |= {"penalty_alpha": 0.6}
"""Settings of transformers that select another mode of decoding, which is refused."""

NOTHING_TO_IGNORE = {
    "early_stopping": "of beam search; without it transformers warns and ignores it as well",
    "length_penalty": "of beam search; without it transformers warns and ignores it as well",
    "num_beam_groups": "of beam search, which num_beams selects",
    "diversity_penalty": "of beam search, which num_beams selects",
    "low_memory": "of contrastive search, which penalty_alpha selects",
    "decoder_start_token_id": "of encoder-decoders, which are refused",
    "encoder_no_repeat_ngram_size": "of the encoder's input; transformers reads the prompt instead, as under no strategy",
    "encoder_repetition_penalty": "likewise",
    "max_cache_len": "of static caches, which cache_implementation selects",
    "cache_config": "of the cache that cache_implementation selects",
    "compile_config": "how forwards are compiled, which changes no token",
    "disable_compile": "likewise",
    "prefill_chunk_size": "how much of a prompt is read at a time, which changes no token",
    "continuous_batching_config": "of cache_implementation='paged', which is refused",
    "transformers_version": "who wrote the file",
    "kwargs": "everything else",
}

HONOURED = {"inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
HONOURED |= {"assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "guidance_scale"}
HONOURED |= {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample"}
HONOURED |= {"use_cache", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
HONOURED |= {"repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id"}
HONOURED |= {"forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"}
HONOURED |= {"begin_suppress_tokens", "sequence_bias", "watermarking_config", "num_return_sequences", "output_attentions"}
HONOURED |= {"output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id"}
HONOURED |= {"bos_token_id", "eos_token_id"}
"""Served, by transformers' preparation of the call or the strategy, or refused by name by a strategy that can't."""


def test_every_setting_of_transformers_is_looked_at() -> None:
    known = {*vars(GenerationConfig()), *list(inspect.signature(GenerationMixin.generate).parameters)[1:]}
    known = {name for name in known if not name.startswith("_")}
    for names in (REFUSED, OTHER_MODES, NOTHING_TO_IGNORE, HONOURED):
        assert set(names) <= known | {"cache_implementation"}
        known -= set(names)
    assert not known, "new in transformers: serve it, refuse it, or give the reason why there is nothing to ignore"
    assert set(ASSISTED) <= REFUSED.keys()


@every_case
def test_settings_of_other_modes_are_refused(case: Case) -> None:
    for name, value in REFUSED.items():
        refused(case, name, **{name: value})
        if name in vars(GenerationConfig()) and name != "num_assistant_tokens":
            refused(case, name, generation_config=GenerationConfig(**{name: value}))
    greedy = {} if case.samples else {"do_sample": False}
    for name, value in OTHER_MODES.items():
        if name != "penalty_alpha" or greedy:  # contrastive search never samples
            refused(case, "decodes greedily or samples", **greedy, **{name: value})


@every_case
def test_what_nobody_chose_is_no_reason_to_refuse(case: Case) -> None:
    ids = case.prompt(3)
    want = case.repeatable(ids)
    defaults = GenerationConfig._get_default_generation_params()
    inherited = {name: value for name, value in defaults.items() if name in ASSISTED}
    config = GenerationConfig(**inherited, max_new_tokens=10)
    assert torch.equal(case.repeatable(ids, generation_config=config), want)
    assert torch.equal(case.repeatable(ids, is_assistant=False, use_mtp=False, num_assistant_tokens=None), want)
    base = case.world.base
    plain = base.generation_config
    try:
        base.generation_config = copy.deepcopy(plain)
        base.generation_config.update(num_assistant_tokens=5, assistant_lookbehind=2)
        assert torch.equal(case.repeatable(ids), want)
        copied = copy.deepcopy(base.generation_config)
        assert torch.equal(case.repeatable(ids, generation_config=copied), want)
        copied.num_assistant_tokens = 6
        refused(case, "num_assistant_tokens=6 is a setting of transformers' assisted generation", generation_config=copied)
    finally:
        base.generation_config = plain


@every_case
def test_inputs_and_entries_of_the_models_own_are_no_unknown_keywords(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = case.prompt(3)
    positions = torch.arange(ids.shape[1])[None]
    want = case.repeatable(ids)
    assert torch.equal(case.repeatable(ids, position_ids=positions), want)
    monkeypatch.setattr(case.world.base, "generation_config", copy.deepcopy(case.world.base.generation_config))
    case.world.base.generation_config.my_entry = 3
    assert torch.equal(case.repeatable(ids, my_entry=4), want)


def test_the_signature_shows_the_parameters_of_transformers_and_of_all_strategies() -> None:
    base, plain = CASES[0].world.base, inspect.signature(GenerationMixin.generate).parameters
    shown = inspect.signature(base.generate).parameters
    ours = {"strategy", "assistant_input_ids", "reference_model", "wsd_window_size", "switch_criteria", "assistant_do_sample"}
    assert shown.keys() >= plain.keys() - {"self"} | ours.union(*OWN.values())
    assert [name for name in shown if name in plain] == [name for name in plain if name != "self"]
    assert list(shown)[-1] == "kwargs"
    text = pydoc.plain(pydoc.render_doc(base.generate))
    assert "wsd_threshold" in text
    assert "assistant_model: the pilot" in text


# Other doors

WRONG = {
    "num_assistant_tokens=7": {"num_assistant_tokens": 7},
    "reference_model belongs to": {"reference_model": tiny_model("llama")},
    "beta belongs to 'emulated_fine_tuning'": {"beta": 2.0},
    "temprature: unknown keyword; .*; temperature is near": {"temprature": 0.5},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_pipeline_refuses_likewise(message: str) -> None:
    pair = tiny_parts()
    names = ("model", "assistant_model", "tokenizer", "assistant_tokenizer")
    pipe = pipeline("text-generation", **dict(zip(names, pair, strict=True)))
    settings = {"strategy": "wsd", "max_new_tokens": 4, "do_sample": False}
    with counting(pair[0]) as base, counting(pair[1]) as pilot:
        with pytest.raises(wsd_hf.WSDValueError, match=f"^{message}"):
            pipe("The Keloft", **settings, **WRONG[message])
        if "belongs" in message:
            wsd_hf.disable_wsd(pair[0])
            with pytest.raises(wsd_hf.WSDValueError, match=f"^{message}.*: pass strategy="):
                pipe("The Keloft", max_new_tokens=4, **WRONG[message])
    assert not base + pilot
    assert pipe("The Keloft", **settings)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packed") / "pair"
    pack(FOLDER / "base", FOLDER / "pilot", folder)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("message", WRONG)
def test_a_packed_folder_refuses_likewise(packed: Any, message: str) -> None:
    with counting(packed) as forwards, pytest.raises(wsd_hf.WSDValueError, match=f"^{message}"):
        packed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, **WRONG[message])
    assert not forwards
