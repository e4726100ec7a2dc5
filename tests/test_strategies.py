"""The shape that all strategies share: settings objects, outputs, traces."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

import wsd_hf
from every_strategy import CASES, WAYS, Case, each, every_case, reward
from wsd_hf.strategies import STRATEGIES

OBJECTS: dict[str, wsd_hf.StrategyConfig] = {
    "wsd": wsd_hf.WSDConfig(threshold=0.3, window_size=3, chunk=2, assistant_do_sample=False),
    "two_way": wsd_hf.TwoWayConfig(handback_threshold=0.2, threshold=0.3, chunk=2),
    "nudging": wsd_hf.NudgingConfig(threshold=0.7, assistant_do_sample=True),
    "emulated_fine_tuning": wsd_hf.EmulatedFineTuningConfig(beta=-0.5, chunk=3),
    "product": wsd_hf.ProductConfig(alpha=1.5, engine="step"),
    "ensemble": wsd_hf.EnsembleConfig(weight=0.2, chunk=3),
    "blend": wsd_hf.BlendConfig(threshold=0.9, cuda_graphs=False),
    "weak_to_strong_search": wsd_hf.SearchConfig(beam_width=3, successors=1, chunk_length=None, official_ties=True),
    "reward_guided": wsd_hf.RewardGuidedConfig(threshold=0.3, delimiter="\n\n", step_length=3),
}
"""Settings of each strategy that differ from its defaults."""

KEYWORDS: dict[str, dict[str, Any]] = {
    "wsd": {"wsd_threshold": 0.3, "wsd_window_size": 3, "wsd_chunk": 2, "assistant_do_sample": False},
    "two_way": {"two_way_handback_threshold": 0.2, "two_way_threshold": 0.3, "two_way_chunk": 2},
    "nudging": {"nudging_threshold": 0.7, "assistant_do_sample": True},
    "emulated_fine_tuning": {"beta": -0.5, "eft_chunk": 3},
    "product": {"product_alpha": 1.5, "product_engine": "step"},
    "ensemble": {"ensemble_weight": 0.2, "ensemble_chunk": 3},
    "blend": {"blend_threshold": 0.9, "blend_cuda_graphs": False},
    "weak_to_strong_search": {"beam_width": 3, "successors": 1, "chunk_length": None, "official_ties": True},
    "reward_guided": {"reward_guided_threshold": 0.3, "reward_guided_delimiter": "\n\n", "reward_guided_step_length": 3},
}
"""The same settings as keywords of `generate`."""

NEEDED: dict[str, dict[str, Any]] = {"reward_guided": {"reward": reward}}
"""Settings without a default that would serve, which no file can hold."""

every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def call(case: Case, strategy: Any, **kwargs: Any) -> Any:
    """One seeded call with no settings but those that are passed, and `NEEDED`."""
    own = {*WAYS[case.way], *STRATEGIES[case.strategy].keywords()}
    small = {name: value for name, value in case.settings.items() if name not in own}
    torch.manual_seed(3)
    ids = case.prompt(3)
    defaults = {"max_new_tokens": 10, "return_dict_in_generate": True, "do_sample": True}
    settings = {**defaults, **small, **NEEDED.get(case.strategy, {}), **kwargs}
    return case.world.base.generate(ids, attention_mask=torch.ones_like(ids), strategy=strategy, **settings)


def completed(settings: wsd_hf.StrategyConfig) -> wsd_hf.StrategyConfig:
    """Settings with those in `NEEDED`."""
    return replace(settings, **NEEDED.get(settings.name, {}))


@every_case
def test_a_settings_object_is_the_same_call_as_keywords(case: Case) -> None:
    name = case.strategy
    of_object, of_keywords = call(case, OBJECTS[name]), call(case, name, **KEYWORDS[name])
    assert torch.equal(of_object.sequences, of_keywords.sequences)
    assert of_object.strategy == of_keywords.strategy == completed(OBJECTS[name])
    default = call(case, name)
    assert default.strategy == completed(STRATEGIES[name]())


@every_strategy
def test_a_keyword_beats_the_object_beats_generation_configs(name: str) -> None:
    case = next(case for case in CASES if case.strategy == name)
    key, value = next(iter(KEYWORDS[name].items()))
    carried = OBJECTS[name].to_generation_config(GenerationConfig())
    assert call(case, name, generation_config=carried).strategy == completed(OBJECTS[name])
    default = completed(STRATEGIES[name]())
    assert call(case, STRATEGIES[name](), generation_config=carried).strategy == default
    mixed = call(case, STRATEGIES[name](), **{key: value}).strategy
    assert mixed == completed(STRATEGIES[name].resolve({key: value}, None))
    assert mixed != default


@every_strategy
def test_settings_travel_in_a_saved_generation_config(name: str, tmp_path: Any) -> None:
    original = GenerationConfig(max_new_tokens=7)
    OBJECTS[name].to_generation_config(original).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert STRATEGIES[name].resolve({}, None, loaded) == OBJECTS[name]
    assert loaded.max_new_tokens == 7
    assert not hasattr(original, next(iter(OBJECTS[name].to_dict())))


@pytest.mark.parametrize(
    "settings",
    [
        wsd_hf.WSDConfig(switch_criteria=StoppingCriteriaList()),
        wsd_hf.SearchConfig(value=lambda *_: [0.0]),
        wsd_hf.RewardGuidedConfig(reward=reward),
    ],
)
def test_an_object_cannot_travel(settings: wsd_hf.StrategyConfig) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match="an object can't be saved in a generation config; pass it to generate"):
        settings.to_generation_config(GenerationConfig())


@every_strategy
def test_settings_are_frozen_and_given_by_name(name: str) -> None:
    field = fields(STRATEGIES[name])[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(OBJECTS[name], field, None)
    with pytest.raises(TypeError):
        STRATEGIES[name](1)  # type: ignore[call-arg]


@every_case
def test_the_settings_of_another_strategy_are_refused(case: Case) -> None:
    for other, settings in KEYWORDS.items():
        for key in settings.keys() - STRATEGIES[case.strategy].keywords().keys():
            with pytest.raises(wsd_hf.WSDValueError, match=f"^{key} belongs to .*'{other}'"):
                call(case, OBJECTS[case.strategy], **{key: 1})


@pytest.mark.parametrize("strategy", ["wds", 3, wsd_hf.WSDConfig, {"threshold": 0.5}])
def test_what_is_no_strategy_is_refused(strategy: Any) -> None:
    known = ", ".join(map(repr, STRATEGIES))
    with pytest.raises(wsd_hf.WSDValueError, match=f"unknown; known are {known}, and settings objects"):
        call(CASES[0], strategy)


# Outputs


@every_case
def test_outputs_say_what_was_done_and_who_wrote_what(case: Case) -> None:
    ids = torch.cat([case.prompt(3), case.prompt(3)])
    out = case.generate(ids, max_new_tokens=12)
    width = out.sequences.shape[1] - out.prompt_length
    assert isinstance(out, wsd_hf.StrategyOutput)
    assert out.prompt_length == ids.shape[1]
    assert out.stats.base.forwards > 0 < out.stats.pilot.tokens
    assert (out.stats.reference is None) == ("reference_model" not in case.models)
    if case.is_target:
        assert out.written_by_pilot is None
        return
    assert out.written_by_pilot.shape == (2, width)
    assert out.written_by_pilot.dtype == torch.bool
    if case.way == "search":
        assert not out.written_by_pilot.any()
        assert out.stats.proposed == out.stats.kept == 0
        return
    assert 0 < int(out.written_by_pilot.sum()) <= out.stats.kept <= out.stats.proposed


@each(case for case in CASES if case.strategy == "wsd")
@pytest.mark.parametrize("threshold", [1e-3, 0.2, 1.0])
def test_the_switch_index_is_the_papers(case: Case, threshold: float) -> None:
    out = case.generate(case.prompt(3), wsd_threshold=threshold)
    drafted = int(out.draft_length[0])
    k = wsd_hf.switch_index(out.draft_log_probs[0, :drafted], threshold, window_size=2)
    assert int(out.switch_index[0]) == (-1 if k is None else k)
    assert drafted == (k or drafted)
    assert out.written_by_pilot[0].tolist() == [place < drafted for place in range(out.written_by_pilot.shape[1])]


# Traces


@every_case
def test_explain_serves_every_strategy_whose_tokens_have_one_writer(case: Case) -> None:
    out = case.generate(case.prompt(3), max_new_tokens=12)
    if out.written_by_pilot is None:
        with pytest.raises(wsd_hf.WSDValueError, match=f"'{case.strategy}' every token is the work of several models"):
            wsd_hf.explain(out, case.world.tokenizer)
        return
    trace = wsd_hf.explain(out, case.world.tokenizer)
    by_pilot = [token.writer == "pilot" for token in trace.tokens]
    assert by_pilot == out.written_by_pilot[0, : len(by_pilot)].tolist()
    assert (trace.switch is not None) == (case.strategy == "wsd")  # two_way has several, as changes of the writer
    assert f"{sum(by_pilot)} token" in trace.summary()
    changes = [now != then for then, now in zip([True, *by_pilot], by_pilot, strict=False)]
    assert str(trace).count("│") == sum(changes)
