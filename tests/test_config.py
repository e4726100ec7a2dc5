import dataclasses
import math
import warnings

import pytest
from transformers import GenerationConfig

from wsd_hf import WSDConfig, WSDError, WSDValueError


def test_defaults_are_the_papers():
    assert WSDConfig() == WSDConfig(threshold=0.8, window_size=6, max_draft_tokens=512, draft_end="continue")


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WSDConfig().threshold = 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("threshold", value) for value in (math.nan, 0, -0.1, 1.0001, math.inf, "high", True)],
        *[("window_size", value) for value in (0, -1, 1.5, "6", True)],
        *[("max_draft_tokens", value) for value in (0, -5, 0.5, None)],
        *[("draft_end", value) for value in ("halt", None, 1)],
    ],
)
def test_illegal_values_name_field_value_and_rule(field, value):
    with pytest.raises(WSDValueError) as error:
        WSDConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r}: must be ")
    assert isinstance(error.value, WSDError)


def test_legal_edges():
    config = WSDConfig(threshold=1, window_size=1, max_draft_tokens=1, draft_end="stop")
    assert config.threshold == 1.0


def test_a_window_that_no_draft_can_fill_warns():
    with pytest.warns(UserWarning, match="window_size=6 is larger than max_draft_tokens=5"):
        WSDConfig(max_draft_tokens=5)


def test_settings_survive_a_saved_generation_config(tmp_path):
    config = WSDConfig(threshold=0.7, window_size=3, max_draft_tokens=40, draft_end="stop")
    config.to_generation_config(GenerationConfig(max_new_tokens=9)).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.max_new_tokens == 9
    assert WSDConfig.resolve({}, None, loaded) == config


def test_to_generation_config_leaves_its_argument_alone():
    original = GenerationConfig(top_k=7)
    copy = WSDConfig().to_generation_config(original)
    assert not hasattr(original, "wsd_threshold")
    assert copy.top_k == 7


def test_precedence_is_keyword_then_object_then_configs_in_order():
    model, call = GenerationConfig(wsd_threshold=0.1, wsd_window_size=2), GenerationConfig(wsd_threshold=0.2)
    assert WSDConfig.resolve({}, None, call, model) == WSDConfig(threshold=0.2, window_size=2)
    assert WSDConfig.resolve({}, WSDConfig(threshold=0.3), call, model) == WSDConfig(threshold=0.3)
    resolved = WSDConfig.resolve({"wsd_threshold": 0.4, "wsd_window_size": None}, WSDConfig(window_size=5), call, model)
    assert resolved == WSDConfig(threshold=0.4, window_size=5)
    assert WSDConfig.resolve({}, None, None) == WSDConfig()


def test_an_illegal_saved_value_is_refused():
    with pytest.raises(WSDValueError, match=r"window_size=0"):
        WSDConfig.resolve({}, None, GenerationConfig(wsd_window_size=0))


def test_a_misspelt_keyword_lists_the_known_ones():
    with pytest.raises(WSDValueError, match=r"wsd_treshold: unknown keyword; known are wsd_threshold, wsd_window_size"):
        WSDConfig.resolve({"wsd_treshold": 0.5}, None)


def test_a_dict_is_not_a_config():
    with pytest.raises(WSDValueError, match="must be a WSDConfig"):
        WSDConfig.resolve({}, {"threshold": 0.5})


def test_legal_settings_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WSDConfig(window_size=6, max_draft_tokens=6)
