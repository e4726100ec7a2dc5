"""Attention of a call: no copies of keys and values, no mask of prompt times prompt, and the user's model as it was."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AttentionInterface, PreTrainedModel

import wsd_hf
from every_strategy import swept_unless
from families import MORE_RAGGED, PAD, RAGGED, tiny_model, tiny_pilot
from oracle import left_padded, random_prompt
from test_fast_path import FiresAt, both, decode
from test_faults import state
from test_stream import streaming, tokens, without_cache
from wsd_hf.engine import attention
from wsd_hf.engine.attention import ragged_attention
from wsd_hf.engine.ragged_stream import RaggedStream
from wsd_hf.engine.supported import unsupported_model

LONG = ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "falcon", "phi3", "gpt_oss", "llama4_text", "mimo_v2_flash"]
LONG += ["gemma3", "llama4", "qwen2_vl"]
"""Full, sliding and chunked attention, bounded scores, sinks, learned positions; wrappers; Falcon keeps its own attention."""

WIDE = {"max_position_embeddings": 20_000}

RAGGED_LENGTHS = (3, 150, 90)


def a_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A model of its own, in float64 if it runs in that."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers lacks {family}")
    model = copy.deepcopy(tiny_model(family, **overrides)).double()
    try:
        without_cache(model, [5, 6])
    except RuntimeError:
        return model.float()
    return model


def a_pair(family: str, **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    pilot = copy.deepcopy(tiny_pilot(family)) if not overrides else a_model(family, seed=1, **overrides)
    base = a_model(family, **overrides)
    return wsd_hf.enable_wsd(base), pilot.to(base.dtype)


def rows(*lengths: int) -> dict[str, torch.Tensor]:
    ids, mask = left_padded([random_prompt(seed, length) for seed, length in enumerate(lengths)], PAD)
    return {"ids": ids, "attention_mask": mask}


# The same tokens


@pytest.mark.parametrize("lengths", [RAGGED_LENGTHS, pytest.param((120, 120), marks=pytest.mark.sweep), (170,)])
@pytest.mark.parametrize("family", LONG)
def test_long_prompts_give_what_they_give_step_by_step(family: str, lengths: tuple[int, ...]) -> None:
    if family == "gemma2" and len(lengths) == 3:
        lengths = (90,)  # transformers' own float64 is NaN next to padding
    both(*a_pair(family), **rows(*lengths), switch_criteria=FiresAt(5), max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize("window", [9, 70, 300])
@pytest.mark.parametrize("family", ["mistral", "llama4_text"])
def test_prompts_longer_than_a_block_of_queries_give_what_they_give_step_by_step(family: str, window: int) -> None:
    sizes = {"sliding_window": window} if family == "mistral" else {"attention_chunk_size": window}
    both(*a_pair(family, **sizes, max_position_embeddings=1024), **rows(700, 290), max_new_tokens=8, eos_token_id=None)


@pytest.mark.parametrize(
    "family", [swept_unless(number % 2 == 0, family) for number, family in enumerate(sorted({*RAGGED, *MORE_RAGGED, *LONG}))]
)
def test_texts_read_in_pieces_leave_every_logit_that_of_a_forward_without_cache(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long beginnings causally, long continuations under masks of a few queries, in batches of rows of any lengths."""
    monkeypatch.setattr(RaggedStream, "long", 4)
    monkeypatch.setattr(attention, "QUERIES", 5)
    model, rng = a_model(family), random.Random(family)
    for lengths in ((3, 17, 24), (18, 18, 18)):
        texts = [tokens(rng, 40) for _ in lengths]
        wanted = [without_cache(model, text) for text in texts]
        stream = streaming(model, [text[:length] for text, length in zip(texts, lengths, strict=True)], room=40)
        for more in ((2, 2, 2), (9, 1, 6), (1, 1, 1), (7, 7, 7)):
            with torch.no_grad():
                ends = [length + step for length, step in zip(stream.lengths, more, strict=True)]
                ends = [max(end, length + 2) for end, length in zip(ends, lengths, strict=True)]
                missing = [text[begun : end - 1] for text, begun, end in zip(texts, stream.lengths, ends, strict=True)]
                proposals = torch.tensor([[text[end - 1]] for text, end in zip(texts, ends, strict=True)])
                logits = stream.logits(stream.block([*missing], proposals, [1, 1, 1]), keep=1)
            for row, end in enumerate(ends):
                torch.testing.assert_close(logits[row, 0], wanted[row][end - 1], atol=3e-4, rtol=1e-4)
            stream.rewind(0, 1)


# The work


def test_a_prompt_is_read_by_one_forward_and_rows_of_different_length_by_one_more() -> None:
    base, pilot = a_pair("llama")
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "wsd_chunk": 4, "wsd_threshold": 1.0}
    alike, ragged, short = (
        decode(base, pilot, **rows(*lengths), **settings).stats.base for lengths in ((100, 100), (100, 80), (40, 20))
    )
    assert alike.forwards == short.forwards == ragged.forwards - 1
    assert alike.tokens - 200 == ragged.tokens - 180 == short.tokens - 60


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "phi3", "mistral"])
def test_no_keys_or_values_are_copied_for_the_heads_that_share_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pilot = a_pair(family)
    assert not any(unsupported_model("base", model) for model in (base, pilot))  # by a forward of transformers' own
    copies = []
    for module in [module for name, module in sys.modules.items() if name.startswith("transformers.")]:
        if "repeat_kv" in vars(module):
            monkeypatch.setattr(module, "repeat_kv", counted(vars(module)["repeat_kv"], copies))
    for lengths in ((150, 150), (150,), (30, 20)):
        if family != "gemma2" or len(set(lengths)) == 1:
            decode(base, pilot, **rows(*lengths))
    assert not copies
    base(random_prompt(0, 9), attention_mask=torch.ones(1, 1, 9, 9, dtype=base.dtype).tril())
    assert copies  # by transformers' own attention under a mask


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return function(*args, **kwargs)

    return count


class Largest(TorchDispatchMode):
    """The largest tensor that any operation of this thread makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        pytest.param("llama", 16_384, marks=pytest.mark.sweep),
        ("llama", 4_096),
        ("mistral", 16_384),
        ("gemma2", 4_096),
        ("gpt_oss", 4_096),
        ("llama4_text", 4_096),
    ],
)
def test_a_long_prompt_makes_no_tensor_of_its_length_squared(family: str, prompt: int) -> None:
    model = copy.deepcopy(tiny_model(family, **WIDE))
    for lengths in ((prompt,), (prompt // 2, prompt // 3)):
        texts = [random_prompt(seed, length)[0].tolist() for seed, length in enumerate(lengths)]
        stream = streaming(model, texts, room=8)
        with torch.no_grad(), Largest() as largest:
            stream.logits(stream.block([*texts]), keep=1)
            stream.logits(stream.block([text[: prompt // 8] for text in texts]), keep=1)
        assert largest.elements <= prompt**2 / 3


# The user's model


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_models_of_every_attention_are_served_and_left_as_they_were(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose packages are missing here are played by causal attention that takes no mask."""
    base, pilot = a_pair("llama")
    wanted = decode(base, pilot, **rows(*RAGGED_LENGTHS)).sequences.tolist()
    if implementation not in ("sdpa", "eager"):
        monkeypatch.setitem(AttentionInterface._global_mapping, implementation, without_mask)
    for model in (base, pilot):
        model.config._attn_implementation = implementation
    before = [(state(model), [dict(vars(module)) for module in model.modules()]) for model in (base, pilot)]
    assert decode(base, pilot, **rows(*RAGGED_LENGTHS)).sequences.tolist() == wanted
    assert [(state(model), [dict(vars(module)) for module in model.modules()]) for model in (base, pilot)] == before
    assert base.config._attn_implementation == pilot.config._attn_implementation == implementation


def without_mask(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> tuple[Any, None]:
    assert mask is None or not isinstance(mask, torch.Tensor) or mask.dim() == 2
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def test_hooks_on_inner_modules_run_as_often_as_the_model() -> None:
    base, pilot = a_pair("llama")
    seen: list[int] = []
    hook = base.model.layers[1].self_attn.register_forward_hook(lambda *args: seen.append(1))
    out = decode(base, pilot, **rows(*RAGGED_LENGTHS))
    hook.remove()
    assert len(seen) == out.stats.base.forwards


def test_threads_that_share_a_model_write_what_each_would_alone() -> None:
    base, pilot = a_pair("gemma3_text")
    calls = [rows(*RAGGED_LENGTHS), rows(100, 100), rows(30, 150)]
    wanted = [decode(base, pilot, **call).sequences.tolist() for call in calls]
    got: dict[int, Any] = {}

    def work(number: int) -> None:
        got[number] = decode(base, pilot, **calls[number]).sequences.tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(calls))] == wanted


def test_a_keyword_that_may_change_attention_is_refused_by_name() -> None:
    states = torch.zeros(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="attention with sinks"):
        ragged_attention(torch.nn.Module(), states, states, states, torch.zeros(1, 1, 1, 1), sinks=torch.zeros(2))


def test_layers_of_an_unknown_kind_are_refused_by_name() -> None:
    model = a_model("llama")
    model.config.layer_types = ["dilated_attention"] * 2
    assert "layers of type 'dilated_attention'" in (unsupported_model("base", model) or "")
