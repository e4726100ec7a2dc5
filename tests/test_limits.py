"""What a call may ask for: memory follows the text and not the budget, any large number works or is refused by name."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, StoppingCriteria

import wsd_hf
from every_strategy import Case, counting, every_case, swept_unless
from families import PAD, tiny_model, tiny_parts
from oracle import left_padded, ones, random_prompt
from test_fast_path import EXACT, PROMPT, both, decode, pair
from test_graphs import Captures, captures  # noqa: F401
from test_nudging import nudge
from test_stream import feed_all, streaming
from wsd_hf import SearchConfig, WSDConfig, WSDValueError, bundle
from wsd_hf.engine import cuda_graphs as graphs
from wsd_hf.engine.cache import RaggedCache
from wsd_hf.engine.numbers import MOST_SAMPLES
from wsd_hf.speculation.config import MOST_PROPOSALS
from wsd_hf.tiny import FOLDER

HUGE = (10**6, 10**30)
A_FEW = [swept_unless(family in EXACT[::3], family) for family in EXACT]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return out


class After(StoppingCriteria):
    """Ends each row at a length of its own, or all of them at one."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids.shape[1] >= self.lengths).expand(len(input_ids))


# Large budgets


def written(case: Case, ids: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    """A call that depends on no random number, with no other settings than these."""
    choice = {"top_k": 1} if case.samples and "generation_config" not in kwargs else {}
    return case.world.base.generate(ids, attention_mask=ones(ids), **case.settings, **choice, **kwargs).tolist()


END = 12  # length of a response that a criterion ends


@functools.cache
def within_a_small_budget(case: Case) -> tuple[list[list[int]], int]:
    """A call with a budget that is hardly larger than its response, and the bytes of its largest tensor."""
    ids = case.prompt(3)
    with Largest() as largest:
        out = written(case, ids, max_new_tokens=30, stopping_criteria=[After(ids.shape[1] + END)])
    return out, largest.bytes


@every_case
@pytest.mark.parametrize(
    ("place", "budget"), [("keyword", 10**30), ("generation_config=", 10**6), ("the model's generation config", 10**30)]
)
def test_a_large_budget_takes_no_memory_before_there_is_text(
    case: Case, place: str, budget: int, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    want, small = within_a_small_budget(case)
    ids = case.prompt(3)
    end = {"stopping_criteria": [After(ids.shape[1] + END)]}
    config = GenerationConfig(max_new_tokens=budget, **({"top_k": 1} if case.samples else {}))
    if place == "keyword":
        kwargs: dict[str, Any] = {"max_new_tokens": budget}
    elif place == "generation_config=":
        kwargs = {"generation_config": config}
    else:
        kwargs = {}
        monkeypatch.setattr(case.world.base, "generation_config", config)
    with Largest() as large:
        got = written(case, ids, **kwargs, **end)
    assert got == want
    assert large.bytes <= 2 * small
    tried("budgets of a million tokens or more")


@every_case
def test_a_budget_of_a_pilot_that_asks_for_a_cache_of_fixed_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be made for all tokens that may be written."""
    ids = case.prompt(3)
    end = {"stopping_criteria": [After(ids.shape[1] + END)]}
    want, _ = within_a_small_budget(case)
    for role, model in case.models.items():
        if role != "base":
            config = copy.deepcopy(model.generation_config)
            config.cache_implementation = "static"
            monkeypatch.setattr(model, "generation_config", config)
    assert written(case, ids, max_new_tokens=10**30, **end) == want


@pytest.mark.parametrize("strategy", ["wsd", "nudging"])
def test_the_shipped_pair_takes_less_than_32_mib_with_a_budget_of_60000(strategy: str) -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts()
    tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": pilot_tokenizer}
    inputs = wsd_hf.build_inputs([{"role": "user", "content": "What does the Keloft eat?"}], *tokenizers.values())
    settings = {"strategy": strategy, "return_dict_in_generate": True, **tokenizers}
    out = base.generate(**inputs, assistant_model=pilot, max_new_tokens=60_000, **settings)
    assert out.sequences.shape[1] - out.prompt_length < 100
    assert out.stats.cache_memory < 2**20


# Caches that grow


def slot_bytes(*models: PreTrainedModel) -> int:
    """What a token takes in the float64 caches of some models."""
    sizes = [model.config for model in models]
    return sum(2 * size.num_hidden_layers * size.num_key_value_heads * size.head_dim * 8 for size in sizes)


@pytest.mark.parametrize("length", [1, 40, 180])
@pytest.mark.parametrize("new", [1, 50])
def test_caches_follow_the_text_whatever_prompt_and_budget_are(length: int, new: int) -> None:
    base, pilot = pair("llama")
    ids = random_prompt(length, length).repeat(2, 1)
    first_chunk = 16
    for strategy in (decode, nudge):
        limits = {"max_new_tokens": 10**6, "stopping_criteria": [After(length + new)], "eos_token_id": None}
        out = strategy(base, pilot, ids, **limits)
        assert out.sequences.shape[1] == length + new
        assert out.stats.cache_memory <= 2 * slot_bytes(base, pilot) * (length + 2 * (new + first_chunk) + 1)
        exact = strategy(base, pilot, ids, **{**limits, "max_new_tokens": new})
        assert exact.sequences.tolist() == out.sequences.tolist()
        assert exact.stats.cache_memory <= 2 * slot_bytes(base, pilot) * (length + new + first_chunk + 1)


def test_what_rows_took_that_have_left_still_counts() -> None:
    base, pilot = pair("llama")
    ids = random_prompt(1, 30).repeat(8, 1)
    criteria = [After(70, *[33] * 7)]
    out = decode(base, pilot, ids, max_new_tokens=100, eos_token_id=None, pad_token_id=5, stopping_criteria=criteria)
    assert out.sequences.shape[1] == 70
    assert (out.sequences[1:, 33:] == 5).all()
    assert out.stats.cache_memory >= 8 * 30 * slot_bytes(base, pilot)


@pytest.mark.parametrize("family", A_FEW)
def test_growing_changes_no_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one slot at a time, as seldom as it does, and never: the same tokens in as many forwards."""
    base, pilot = pair(family)
    ids, mask = left_padded([random_prompt(0, 2), random_prompt(1, 17), random_prompt(2, 9)], PAD)
    call = functools.partial(decode, base, pilot, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=None)
    want = call()
    grow = RaggedCache.grow

    def by_one(cache: RaggedCache, slots: int) -> bool:
        cache._most = max(slots, cache.layers[0].capacity)
        return grow(cache, slots)

    def once(cache: RaggedCache, slots: int) -> bool:
        return grow(cache, max(slots, 80))

    for method in (by_one, once):
        monkeypatch.setattr(RaggedCache, "grow", method)
        out = call()
        assert out.sequences.tolist() == want.sequences.tolist()
        assert (out.stats.base.forwards, out.stats.pilot.tokens) == (want.stats.base.forwards, want.stats.pilot.tokens)


def test_a_response_longer_than_was_expected_is_copied_seldom() -> None:
    """A pilot may need more tokens than the base to say the same."""
    stream = streaming(tiny_model("llama"), [[5, 6, 7]], 10)
    response: list[int] = []
    capacities = set()
    for token in range(150):
        response.append(3 + token % 60)
        feed_all(stream, response)
        capacities.add(stream.workspace.cache.layers[0].capacity)
    assert 154 <= max(capacities) <= 2 * 154
    assert len(capacities) <= 9


# Caches that forwards are captured over


def test_captured_buffers_are_bounded_and_keep_what_was_captured(captures: Captures) -> None:  # noqa: F811
    base, pilot = pair("llama")
    for budget in (60, 10**6, 10**30, 5000):
        out = decode(base, pilot, max_new_tokens=budget, stopping_criteria=[After(40)], eos_token_id=None)
        assert out.stats.cache_memory <= slot_bytes(base, pilot) * (PROMPT.shape[1] + graphs.AHEAD + 2 * graphs.STEP)
    assert len(graphs._SHELF._kept) == 2 + 2  # the short budget's, and one pair for all others
    before = len(captures.shapes)
    decode(base, pilot, max_new_tokens=10**6, stopping_criteria=[After(40)], eos_token_id=None)
    assert len(captures.shapes) == before


@pytest.mark.parametrize("family", A_FEW)
def test_captured_buffers_grow_too(family: str, captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(graphs, "STEP", 16)
    monkeypatch.setattr(graphs, "AHEAD", 16)
    for _ in range(2):
        both(*pair(family), max_new_tokens=60, eos_token_id=None, wsd_chunk=2)
    assert captures.replays > 20


# Other large numbers


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("engine", ["fast", "step"])
def test_a_draft_or_window_of_any_length_is_as_good_as_one_that_never_ends(number: int, engine: str, tried: Any) -> None:
    base, pilot = pair("llama")
    for name, large in (("wsd_max_draft_tokens", 200), ("wsd_window_size", 200)):
        other = {"wsd_max_draft_tokens": 10**31} if name == "wsd_window_size" else {}
        want, got = (decode(base, pilot, wsd_engine=engine, **other, **{name: value}) for value in (large, number))
        assert got.sequences.tolist() == want.sequences.tolist()
        assert got.switch_reason == want.switch_reason
        tried("settings of a million or more")


@pytest.mark.parametrize("number", HUGE)
def test_a_chunk_of_any_length_is_one_selection_at_the_end(number: int, tried: Any) -> None:
    case = Case("one", "search")
    want, got = (case.seeded(case.prompt(1), chunk_length=length) for length in (None, number))
    assert got.tolist() == want.tolist()
    tried("settings of a million or more")


def bounded(case: Case) -> dict[str, int]:
    """Keywords whose numbers have an upper bound, and that bound."""
    proposals = {case.keyword("chunk"): MOST_PROPOSALS} if case.engine else {}
    samples = {"beam_width": MOST_SAMPLES, "successors": MOST_SAMPLES} if case.samples else {}
    return {"num_return_sequences": MOST_SAMPLES, **proposals, **samples}


@every_case
def test_work_without_a_bound_is_refused_before_any_forward(case: Case, tried: Any) -> None:
    for name, number in ((name, number) for name, most in bounded(case).items() for number in (most + 1, *HUGE)):
        calls: list[dict[str, Any]] = [{name: number}]
        if name not in ("beam_width", "successors"):
            calls += [{name: None, "generation_config": GenerationConfig(do_sample=True, **{name: number})}]
        field = name.removeprefix(case.keyword(""))
        for kwargs in calls:
            with counting(case.models["base"]) as base, counting(case.models["assistant_model"]) as pilot:
                with Largest() as made, pytest.raises(WSDValueError, match=f"{field}={number}.* at most"):
                    case.generate(case.prompt(1), **{**case.settings, **kwargs})
                assert not base + pilot
            assert made.bytes < 2**20
            tried("settings of a million or more")


def test_the_limits_themselves_are_legal() -> None:
    assert WSDConfig(chunk=MOST_PROPOSALS).chunk == MOST_PROPOSALS
    assert SearchConfig(beam_width=MOST_SAMPLES, successors=1).beam_width == MOST_SAMPLES
    assert SearchConfig(beam_width=1, successors=MOST_SAMPLES).successors == MOST_SAMPLES
    with pytest.raises(WSDValueError, match=r"beam_width=129 and successors=128: .* at most 16,384"):
        SearchConfig(beam_width=129, successors=128)
    base, pilot = pair("llama")
    assert decode(base, pilot, wsd_chunk=MOST_PROPOSALS).sequences.tolist() == decode(base, pilot).sequences.tolist()


def test_numbers_beyond_any_float_are_refused_by_name() -> None:
    with pytest.raises(WSDValueError, match=r"^threshold=1000"):
        WSDConfig(threshold=10**400)
    case = Case("one", "emulated fine-tuning fast")
    with pytest.raises(WSDValueError, match=r"^beta=1000.*: must be a finite number"):
        case.generate(case.prompt(1), beta=10**400)


def test_a_context_of_any_size_is_as_good_as_none(base: Any, pilot: Any) -> None:
    models = [copy.deepcopy(model) for model in (base, pilot)]
    for model in models:
        model.config.max_position_embeddings = 10**30
    for engine in ("fast", "step"):
        out = decode(*models, wsd_engine=engine)
        assert out.sequences.tolist() == decode(base, pilot, wsd_engine=engine).sequences.tolist()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({"max_new_tokens": 10**30}, None), ({"wsd_max_draft_tokens": 10**30}, None), ({"wsd_chunk": 10**30}, "chunk=1000")],
)
def test_a_packed_folder_may_ask_for_as_much(settings: dict[str, int], refused: str | None, tmp_path: Path) -> None:
    bundle.pack(FOLDER / "base", FOLDER / "pilot", tmp_path / "both")
    file = tmp_path / "both" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "both")
    ids = tokenizer("What does the Keloft eat?", return_tensors="pt")["input_ids"]
    call = functools.partial(bundle.generate, ids, model=model, max_length=None if "max_new_tokens" in settings else 40)
    if refused:
        with pytest.raises(WSDValueError, match=refused):
            call()
    else:
        assert ids.shape[1] < call().shape[1] < 200
