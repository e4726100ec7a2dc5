"""`--strategies`: methods with settings of their own, and every text that spells none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsd_hf import WSDValueError
from wsd_hf.comparison.methods import METHODS
from wsd_hf.comparison.variants import Variant, read_variants
from wsd_hf.strategies import STRATEGIES
from wsd_hf.strategies.search.config import SearchConfig
from wsd_hf.strategies.wsd.config import WSDConfig
from wsd_hf.strategies.wsd.two_way import TwoWayConfig


def read(text: str, **defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings of each variant by its name."""
    return {variant.name: variant.strategy for variant in read_variants(text, defaults)}


def test_settings_belong_to_the_method_before_them() -> None:
    text = "base,pilot,wsd,wsd:threshold=.6,window_size=6,two_way:handback_threshold=.3"
    assert read(text) == {
        "base": None,
        "pilot": None,
        "wsd": WSDConfig(),
        "wsd:threshold=0.6,window_size=6": WSDConfig(threshold=0.6, window_size=6),
        "two_way:handback_threshold=0.3": TwoWayConfig(handback_threshold=0.3),
    }
    assert all(variant.method is METHODS[variant.name.split(":")[0]] for variant in read_variants(text, {}))


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        (" wsd : threshold = 1e-1 ", "wsd:threshold=0.1", WSDConfig(threshold=0.1)),
        ("wsd:threshold=1", "wsd:threshold=1.0", WSDConfig(threshold=1)),
        ("wsd:window_size=2,threshold=.5", "wsd:threshold=0.5,window_size=2", WSDConfig(threshold=0.5, window_size=2)),
        ("wsd:ignore_repeats=True", "wsd:ignore_repeats=true", WSDConfig(ignore_repeats=True)),
        ("wsd:speculate=false", "wsd:speculate=false", WSDConfig(speculate=False)),
        ("wsd:switch_criteria=entropy", "wsd:switch_criteria=entropy", WSDConfig(switch_criteria="entropy")),
        ("wsd:chunk=none", "wsd:chunk=none", WSDConfig()),
        ("wsd:threshold=none", "wsd:threshold=0.8", WSDConfig()),
        ("wss:beam_width=2", "weak_to_strong_search:beam_width=2", SearchConfig(beam_width=2)),
    ],
)
def test_a_variant_has_one_spelling(text: str, name: str, settings: Any) -> None:
    assert read(text) == {"base": None, name: settings}
    assert read(name) == read(text)


def test_a_variant_that_is_given_twice_is_there_once() -> None:
    assert list(read("wsd:threshold=.6,wsd:threshold=0.60,base,wsd,wsd")) == ["base", "wsd:threshold=0.6", "wsd"]


def test_options_of_all_variants_are_defaults() -> None:
    rule = {"switch_criteria": "entropy", "threshold": 0.4}
    found = read("wsd,wsd:threshold=.2,wsd:window_size=3,wsd:switch_criteria=agreement,two_way", wsd=rule)
    assert found == {
        "base": None,
        "wsd": WSDConfig(**rule),
        "wsd:threshold=0.2": WSDConfig(switch_criteria="entropy", threshold=0.2),
        "wsd:window_size=3": WSDConfig(**rule, window_size=3),
        "wsd:switch_criteria=agreement": WSDConfig(switch_criteria="agreement"),  # a threshold belongs to its rule
        "two_way": TwoWayConfig(),
    }


def test_every_setting_that_is_no_object_can_be_given() -> None:
    for name, kind in STRATEGIES.items():
        for field in kind.keywords().values():
            value = getattr(kind(), field.name)
            spelt = {None: "none", True: "true", False: "false"}.get(value, value) if value != 1 and value != 0 else value
            text = f"{name}:{field.name}={spelt}"
            if field.metadata.get("travels", True) and str(spelt).strip():
                assert next(iter(list(read(text).values())[1:])) == kind(), text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is unknown; known are base, pilot, urial"),
        ("base,,wsd", "'' is unknown"),
        ("magic", "'magic' is unknown"),
        ("magic:threshold=1", "'magic' is unknown"),
        ("wsd:threshold=.6,ignore_repeats", "'ignore_repeats' is unknown; .* a setting needs a value, as in wsd:threshold=0.6"),
        ("threshold=.6", "'threshold=.6' is a setting of no method; write it as METHOD:threshold=.6"),
        ("wsd,threshold=.6", "'threshold=.6' is a setting of no method; write it as wsd:threshold=.6"),
        ("wsd:threshold=.6,base,window_size=3", "'window_size=3' is a setting of no method; write it as base:window_size=3"),
        ("wsd:", "wsd:: after the colon must be NAME=VALUE"),
        ("wsd:threshold", "wsd:threshold: after the colon must be NAME=VALUE"),
        ("wsd:treshold=.6", "wsd has no setting 'treshold'; it has threshold, .*; threshold is near"),
        ("wsd:handback_threshold=.6", "wsd has no setting 'handback_threshold'; it has"),
        ("wsd:=.6", "wsd has no setting ''"),
        ("reward_guided:reward=x", "reward_guided has no setting 'reward'"),
        ("base:threshold=.6", "base has no settings; leave threshold=.6 out"),
        ("wsd:threshold=.6,threshold=.7", "threshold is given twice for one wsd"),
        ("wsd:threshold=2", "wsd: threshold=2: must be a number above 0 and at most 1"),
        ("wsd:threshold=", "wsd: threshold='': must be"),
        ("wsd:threshold=nan", "wsd: threshold=nan: must be"),
        ("wsd:threshold=true", "wsd: threshold=True: must be"),
        ("wsd:window_size=1.5", "wsd: window_size=1.5: must be an integer"),
        ("wsd:ignore_repeats=yes", "wsd: ignore_repeats='yes': must be"),
        ("wsd:switch_criteria=sure", "wsd: switch_criteria='sure': must be"),
        ("wss:beam_width=0", "weak_to_strong_search: beam_width=0: must be"),
    ],
)
def test_what_spells_no_variant_is_refused(text: str, problem: str) -> None:
    with pytest.raises(WSDValueError, match=f"^--strategies: {problem}"):
        read(text)


@given(st.text(st.sampled_from("wsd:threshold=.6,base \n")) | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(WSDValueError):
        assert all(isinstance(variant, Variant) for variant in read_variants(text, {}))
