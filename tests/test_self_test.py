"""The self-test finds models that a ragged cache doesn't fit, passes all others, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

import wsd_hf
from families import IMAGE_TEXT, MORE_RAGGED, RAGGED, tiny_model, tiny_pilot
from test_fast_path import decode
from wsd_hf.engine.self_test import failed_self_test
from wsd_hf.engine.supported import unsupported_model


class Embeddings:
    """Counts the forwards of a model, hooked or not, by those of its embedding."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def embeddings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Embeddings]:
    counted, forward = Embeddings(), torch.nn.Embedding.forward

    def counting(module: Any, tokens: torch.Tensor) -> torch.Tensor:
        counted.count += 1
        return forward(module, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counting)
    return counted


def own(family: str = "llama") -> PreTrainedModel:
    return copy.deepcopy(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[] if (number + place) % 2 else [pytest.mark.sweep])
        for number, family in enumerate(RAGGED + MORE_RAGGED + IMAGE_TEXT)
        for place, dtype in enumerate((torch.bfloat16, torch.float16))
    ],
    ids=str,
)
def test_rounding_is_no_failure(family: str, dtype: torch.dtype) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers lacks {family}")
    assert unsupported_model("base", own(family).to(dtype)) is None


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_neither_autocast_nor_coarse_products_are_a_failure(family: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unsupported_model("base", own(family)) is None
    try:
        torch.set_float32_matmul_precision("medium")
        assert unsupported_model("base", own(family)) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_kernels_of_other_attention_are_not_run() -> None:
    for family in ("llama", "gemma2", "gpt_oss"):
        model = own(family)
        model.set_attn_implementation("flex_attention")
        assert failed_self_test(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_positions_that_a_model_counts_by_itself_are_found(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own(family).to(dtype)
    rotation = type(model.model.rotary_emb)
    forward = rotation.forward

    def from_zero(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(self, x, torch.arange(position_ids.shape[1])[None])

    monkeypatch.setattr(rotation, "forward", from_zero)
    assert unsupported_model("base", model) == (
        "the base has other logits on a cache with rows of different length than without a cache"
    )


def test_a_window_that_the_model_ignores_is_found_however_wide_it_is() -> None:
    ignoring = tiny_model("llama", sliding_window=100)
    assert "has other logits" in (unsupported_model("base", ignoring) or "")
    assert unsupported_model("base", tiny_model("mistral", sliding_window=100)) is None


def test_it_runs_four_forwards_once_for_a_model_until_its_dtype_or_attention_changes(embeddings: Embeddings) -> None:
    model = own()
    unsupported_model("base", model)
    assert embeddings.count == 4
    unsupported_model("pilot", model.train())
    assert embeddings.count == 4
    unsupported_model("base", model.double())
    assert embeddings.count == 8
    model.set_attn_implementation("eager")
    unsupported_model("base", model)
    assert embeddings.count == 12
    unsupported_model("base", copy.deepcopy(model))
    assert embeddings.count == 16


def test_a_model_that_is_refused_by_rule_is_not_tested(embeddings: Embeddings) -> None:
    assert unsupported_model("base", tiny_model("gpt_neo")) is not None
    assert embeddings.count == 0


def test_neither_hooks_nor_counts_nor_random_numbers_show_it() -> None:
    base, pilot = wsd_hf.enable_wsd(own("gpt2")), copy.deepcopy(tiny_pilot("gpt2"))
    base.train()  # with dropout
    calls = []
    for module in base.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    before, random = {name: dict(vars(module)) for name, module in base.named_modules()}, torch.get_rng_state()
    assert unsupported_model("base", base) is None
    assert not calls
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: dict(vars(module)) for name, module in base.named_modules()} == before
    assert base.training
    first, second = (decode(base.eval(), pilot).stats for _ in range(2))
    assert (first.base, first.pilot) == (second.base, second.pilot)


def test_a_model_without_finite_logits_is_left_to_the_call() -> None:
    base = wsd_hf.enable_wsd(own())
    weights = base.get_output_embeddings().weight
    kept = weights.detach().clone()
    torch.nn.init.constant_(weights, float("nan"))
    with pytest.raises(wsd_hf.WSDLogitsError, match="the base returned NaN"):
        decode(base, tiny_pilot())
    weights.data.copy_(kept)
    decode(base, tiny_pilot())


def test_threads_may_test_one_model_at_once() -> None:
    model = own("gpt2")
    with ThreadPoolExecutor(4) as threads:
        assert {*threads.map(lambda _: unsupported_model("base", model), range(8))} == {None}


def test_a_context_may_be_shorter_than_its_texts() -> None:
    for positions in (2, 5, 12):
        assert unsupported_model("base", tiny_model("gpt2", n_positions=positions)) is None
