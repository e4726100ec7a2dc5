"""Models with a recurrent state go back to snapshots, and write what the step-by-step path writes of each row alone."""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

import tokenizers_for_tests as make
import wsd_hf
from every_strategy import swept_unless
from families import PAD, RECURRENT, SINGLE_TOKENS, VOCABULARY, tiny_model, tiny_pilot
from oracle import left_padded, ones, random_prompt
from test_fast_path import FiresAt
from test_nudging import expected
from wsd_hf.engine.recurrent_support import recurrent_self_test
from wsd_hf.engine.stream import Stream
from wsd_hf.engine.streams import open_stream
from wsd_hf.engine.supported import unsupported_model

BASES = [family for family in RECURRENT if family not in SINGLE_TOKENS and family in CONFIG_MAPPING]
PILOTS = [family for family in RECURRENT if family in CONFIG_MAPPING]
SOME = ["bamba", "mamba2", "qwen3_next"]

PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((4, 21, 11))]
SWITCHES = {"early": FiresAt(1), "late": FiresAt(11), "each at its own time": FiresAt(2, 13, 7), "never": FiresAt(10**6)}


@functools.cache
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base that takes `strategy=`, and its pilot, in float64 where they can; no test changes them."""
    models = [copy.deepcopy(model) for model in (tiny_model(family), tiny_pilot(family))]
    for model in models:
        try:
            model.double()(torch.tensor([[2, 3]]))
        except RuntimeError:  # experts refuse float64
            model.float()
    base, pilot = models
    return wsd_hf.enable_wsd(base), pilot


@functools.cache
def attention() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base without a recurrent state, and its pilot."""
    return wsd_hf.enable_wsd(copy.deepcopy(tiny_model("llama")).double()), copy.deepcopy(tiny_pilot("llama")).double()


def decode(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> Any:
    kwargs = {
        "attention_mask": ones(ids),
        "max_new_tokens": 18,
        "wsd_engine": "fast",
        "wsd_chunk": 3,
        "return_dict_in_generate": True,
        **kwargs,
    }
    return base.generate(ids, assistant_model=pilot, strategy="wsd", **kwargs)


def check_rows(base: PreTrainedModel, pilot: PreTrainedModel, **kwargs: Any) -> Any:
    """Every row of a ragged batch on the fast path is that of a call of its own, step by step."""
    ids, mask = left_padded(PROMPTS, PAD)
    fast = decode(base, pilot, ids, **kwargs, attention_mask=mask)
    for row in range(len(ids)):
        alone = left_padded(PROMPTS[row : row + 1], PAD, width=ids.shape[1])
        own = {**kwargs, "wsd_engine": "step", "attention_mask": alone[1]}
        if isinstance(criterion := kwargs.get("switch_criteria"), FiresAt):
            own["switch_criteria"] = FiresAt(*criterion.indices.expand(len(ids))[row : row + 1].tolist())
        step = decode(base, pilot, alone[0], **own)
        response = step.sequences[0].tolist()
        assert fast.sequences[row, : len(response)].tolist() == response
        assert set(fast.sequences[row, len(response) :].tolist()) <= {PAD}
        assert (fast.draft_length[row], fast.switch_reason[row]) == (step.draft_length[0], step.switch_reason[0])
    return fast


# A stream


def without_cache(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def some_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, VOCABULARY) for _ in range(count)]


def feed(stream: Stream, missing: list[list[int] | None], proposals: list[list[int]], counts: list[int]) -> torch.Tensor:
    chunk = max(map(len, proposals))
    padded = torch.tensor([row + [0] * (chunk - len(row)) for row in proposals], dtype=torch.long).view(len(proposals), chunk)
    with torch.no_grad():
        return stream.logits(stream.block(missing, padded, counts), keep=1 + chunk)


@pytest.mark.parametrize("family", PILOTS)
def test_ragged_feeds_and_rewinds_leave_every_logit_that_of_a_forward_without_cache(family: str) -> None:
    model, rng = pair(family)[0], random.Random(family)
    prompts = [some_tokens(rng, length) for length in (5, 12, 30)]
    responses: list[list[int]] = [[] for _ in prompts]
    with open_stream(model, prompts, 60, False) as stream:
        for _ in range(10):
            chunk = rng.randint(0, 4)
            proposals = [some_tokens(rng, rng.randint(chunk // 2, chunk)) for _ in prompts]
            for response in responses:
                response += some_tokens(rng, rng.choice([0, 1, 1, 3]))
            missing = [stream.missing(row, responses[row]) if rng.random() < 0.8 else None for row in range(3)]
            if not any(missing):
                continue
            counts = [0 if new is None else len(proposed) for new, proposed in zip(missing, proposals, strict=True)]
            logits = feed(stream, missing, proposals, counts)
            for row, count in enumerate(counts):
                if missing[row] is None:
                    continue
                whole = prompts[row] + responses[row] + proposals[row]
                wanted = without_cache(model, whole)[-1 - count :] if missing[row] else without_cache(model, whole)[-count:]
                got = logits[row, : 1 + count][-len(wanted) :] if missing[row] or count else wanted
                torch.testing.assert_close(got, wanted, atol=5e-3, rtol=5e-3)
                responses[row] += proposals[row][: rng.randint(0, count)]
                stream.rewind(row, len(responses[row]) - rng.choice([0, 0, 1, min(3, len(responses[row]))]))


@pytest.mark.parametrize("family", SOME)
def test_rows_that_leave_take_nothing_of_the_others_with_them(family: str) -> None:
    model = pair(family)[0]
    with open_stream(model, [[5, 6, 7], [8], [9, 10, 11, 12]], 20, False) as stream:
        feed(stream, [[5, 6, 7], [8], [9, 10, 11, 12]], [[13], [14], [15]], [1, 1, 1])
        stream.rewind(2, 0)
        stream.select([0, 2])
        feed(stream, [stream.missing(0, [13]) or [16], stream.missing(2, [17])], [[], []], [0, 0])
        stream.select([2])
        logits = feed(stream, [stream.missing(2, [17, 18])], [[19]], [1])
    torch.testing.assert_close(logits[0], without_cache(model, [9, 10, 11, 12, 17, 18, 19])[-2:], atol=1e-4, rtol=1e-4)


def test_rows_of_unequal_length_share_forwards() -> None:
    with open_stream(pair("bamba")[0], [[5, 6, 7], [8]], 20, False) as stream:
        feed(stream, [[5, 6, 7], [8]], [[9, 9], [9]], [2, 1])
        feed(stream, [stream.missing(0, [9, 9]), stream.missing(1, [9])], [[9], [9]], [1, 1])
        assert (stream.forwards, stream.tokens) == (2, 5 + 2 + 1 + 3)


@pytest.mark.parametrize("family", SOME)
def test_rejections_do_not_make_what_is_fed_again_grow(family: str) -> None:
    with open_stream(pair(family)[0], [[5, 6, 7]], 300, False) as stream:
        response: list[int] = []
        for token in range(10, 60):
            response.append(token)
            feed(stream, [stream.missing(0, response)], [[9, 9, 9]], [3])
            stream.rewind(0, len(response) - 1)
        assert stream.forwards <= 50 + 50 // 15
        assert stream.tokens <= 50 * (16 + 3)


def test_snapshots_that_are_out_of_reach_are_dropped() -> None:
    def memory(tokens: int) -> int:
        out = decode(*pair("mamba2"), PROMPTS[0], max_new_tokens=tokens, wsd_threshold=0.3, eos_token_id=None)
        return int(out.stats.cache_memory)

    assert memory(60) == memory(30)


# The same tokens


@pytest.mark.parametrize(
    ("family", "switch"),
    [
        swept_unless(family in SOME or switch == "each at its own time", family, switch)
        for family in BASES
        for switch in SWITCHES
    ],
)
def test_base_and_pilot_are_recurrent(family: str, switch: str) -> None:
    check_rows(*pair(family), switch_criteria=SWITCHES[switch], eos_token_id=None)


@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("family", SOME)
def test_chunks_of_any_length_change_nothing(family: str, chunk: int | None) -> None:
    out = check_rows(*pair(family), wsd_chunk=chunk, wsd_threshold=0.15, wsd_window_size=2, max_new_tokens=24)
    assert out.stats.base.forwards > 0


@pytest.mark.parametrize("family", [swept_unless(family in {*SOME, "mamba"}, family) for family in PILOTS])
def test_a_recurrent_pilot_of_an_attention_model(family: str) -> None:
    check_rows(attention()[0], pair(family)[1], wsd_threshold=0.02, wsd_window_size=2)


@pytest.mark.parametrize("family", [swept_unless(family in SOME, family) for family in BASES])
def test_an_attention_pilot_of_a_recurrent_model(family: str) -> None:
    check_rows(pair(family)[0], attention()[1], wsd_threshold=0.02, wsd_window_size=2)


@pytest.mark.parametrize("family", SOME)
def test_rows_end_where_they_end_alone(family: str) -> None:
    ends = list(range(2, 10))
    out = check_rows(*pair(family), wsd_threshold=0.2, eos_token_id=ends, max_new_tokens=30)
    assert any(token in ends for token in out.sequences[:, 21:].flatten().tolist())


def test_a_pilot_of_the_mamba_kind_reads_single_tokens_only() -> None:
    assert not recurrent_self_test(pair("mamba")[1]).reads_blocks
    assert all(recurrent_self_test(pair(family)[0]).reads_blocks for family in BASES)


@pytest.mark.parametrize("family", SOME)
def test_a_seed_repeats_a_sampled_response(family: str) -> None:
    ids, mask = left_padded(PROMPTS, PAD)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(decode(*pair(family), ids, attention_mask=mask, do_sample=True, wsd_threshold=0.3).sequences.tolist())
    assert outs[0] == outs[1] != outs[2]


# Work


@pytest.mark.parametrize(
    ("family", "length", "chunk"),
    [
        swept_unless(family in SOME or (length, chunk) == (21, 8), family, length, chunk)
        for family in BASES
        for length in (4, 21)
        for chunk in (3, 8)
    ],
)
def test_drafts_are_checked_in_blocks(family: str, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pilot = pair(family)
    monkeypatch.setattr(pilot.generation_config, "eos_token_id", None)
    prompts = torch.cat([random_prompt(seed, length) for seed in range(3)])
    recurrent_self_test(base)
    forwards: list[None] = []
    with base.register_forward_pre_hook(lambda *_: forwards.append(None)):
        out = decode(base, pilot, prompts, wsd_chunk=chunk, switch_criteria=SWITCHES["never"], eos_token_id=None)
    assert out.draft_length.tolist() == [18] * 3
    assert len(forwards) == out.stats.base.forwards <= math.ceil(18 / chunk) + 2


# Nudging


@pytest.mark.parametrize(
    ("base_family", "pilot_family"),
    [("bamba", "bamba"), ("mamba", "mamba"), ("llama", "qwen3_next"), ("llama", "mamba"), ("mamba2", "llama")],
)
def test_nudging(base_family: str, pilot_family: str) -> None:
    base = attention()[0] if base_family == "llama" else pair(base_family)[0]
    pilot = attention()[1] if pilot_family == "llama" else pair(pilot_family)[1]
    tokenizer = make.letter_tokenizer(VOCABULARY)
    ids, mask = left_padded(PROMPTS, PAD)
    out = base.generate(
        ids,
        attention_mask=mask,
        assistant_model=pilot,
        strategy="nudging",
        nudging_threshold=0.5,
        tokenizer=tokenizer,
        max_new_tokens=16,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(PROMPTS):
        want = expected(base, pilot, prompt, threshold=0.5, max_new_tokens=16, tokenizer=tokenizer)
        assert out.sequences[row, ids.shape[1] :].tolist() == want[0]


# Refusals


def test_a_base_that_reads_single_tokens_goes_step_by_step() -> None:
    base, pilot = pair("mamba")
    with pytest.raises(wsd_hf.WSDValueError, match="the base continues from its state one token at a time"):
        decode(base, pilot, PROMPTS[0])
    step, auto = (decode(base, pilot, PROMPTS[0], wsd_engine=engine).sequences for engine in ("step", "auto"))
    assert torch.equal(step, auto)


class KeepsCount(torch.nn.Module):
    """Adds the number of its calls so far: a state outside of the cache."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.inner(*args, **kwargs) * self.calls
        return out


def test_a_state_outside_of_the_cache_is_found() -> None:
    model = copy.deepcopy(pair("mamba2")[1])
    model.backbone.layers[0].mixer = KeepsCount(model.backbone.layers[0].mixer)
    assert unsupported_model("pilot", model) == "the pilot has other logits on a rewound cache than without a cache"


def test_a_cache_of_its_own_is_named() -> None:
    reason = unsupported_model("base", tiny_model("minimax"))
    assert reason == "the base raises ValueError on a cache that is rewound"
