"""The fast path writes what the step-by-step path writes, with less work, and fails as cleanly."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
)
from transformers.generation import BaseStreamer

import wsd_hf
from families import PAD, VOCABULARY, tiny_model, tiny_pilot
from oracle import left_padded, ones, plain_tokens, random_prompt
from test_acceptance import chi_squared
from test_concurrency import together
from test_faults import PilotBroke, failing, state
from time_limit import HANG
from tokenizers_for_tests import letter_tokenizer

EXACT = ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "gemma3_text"]
ROUNDED = ["mixtral"]  # its experts refuse float64
UNPADDED = ["gemma2"]  # transformers' own float64 is NaN behind padding
PROMPT = random_prompt(1, 6)


@functools.cache
def pair(family: str, noise: float = 0.15) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base that takes `strategy=`, and its pilot, in float64 where they can; no test changes them."""
    models = copy.deepcopy(tiny_model(family)), copy.deepcopy(tiny_pilot(family, noise=noise))
    base, pilot = models if family in ROUNDED else [model.double() for model in models]
    return wsd_hf.enable_wsd(base), pilot


class FiresAt(StoppingCriteria):
    """Switches at an index of its own in every row, wherever the base is confident."""

    def __init__(self, *indices: int) -> None:
        self.indices = torch.tensor(indices)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.indices.to(input_ids.device).expand(len(input_ids))


class Ends(StoppingCriteria):
    """Ends a row at some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens.to(input_ids.device))


class Overwrites(LogitsProcessor):
    """Writes into the scores that it is given, so a second pass over them would show."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] *= -1
        return scores


def decode(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor = PROMPT, **kwargs: Any) -> Any:
    """On the fast path, which must not refuse; several proposals at a time, also behind the switch."""
    kwargs = {
        "attention_mask": ones(ids),
        "max_new_tokens": 14,
        "wsd_engine": "fast",
        "wsd_chunk": 3,
        "wsd_threshold": 0.15,
        "wsd_window_size": 2,
        "return_dict_in_generate": True,
        **kwargs,
    }
    return base.generate(ids, assistant_model=pilot, strategy="wsd", **kwargs)


def both(base: PreTrainedModel, pilot: PreTrainedModel, ids: torch.Tensor = PROMPT, **kwargs: Any) -> tuple[Any, Any]:
    """The fast path's output and the step-by-step path's, which must say the same."""
    fast, step = (decode(base, pilot, ids, **kwargs, wsd_engine=engine) for engine in ("fast", "step"))
    assert fast.sequences.tolist() == step.sequences.tolist()
    assert fast.draft_length.tolist() == step.draft_length.tolist()
    assert fast.switch_reason == step.switch_reason
    torch.testing.assert_close(fast.draft_log_probs, step.draft_log_probs, equal_nan=True, atol=1e-4, rtol=1e-4)
    return fast, step


# The same tokens


def random_rows(rng: random.Random, count: int, longest: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = rng.randint(1, longest)
    lengths = [rng.randint(1, longest) if padded else length for _ in range(count)]
    return left_padded([torch.tensor([[rng.randrange(3, VOCABULARY) for _ in range(length)]]) for length in lengths], PAD)


def random_case(rng: random.Random, padded: bool) -> dict[str, Any]:
    """Arguments of a call."""
    rows = rng.randint(1, 8)
    ids, mask = random_rows(rng, rows, 20, padded)
    case: dict[str, Any] = {
        "ids": ids,
        "attention_mask": mask,
        "max_new_tokens": rng.randint(1, 24),
        "eos_token_id": rng.choice([None, 2, [2, 5, 9, 11, 40, 41], rng.sample(range(VOCABULARY), 12)]),
        "wsd_threshold": rng.uniform(0.05, 0.95),
        "wsd_window_size": rng.randint(1, 12),
        "wsd_max_draft_tokens": rng.choice([12, 17, 512]),
        "wsd_chunk": rng.choice([None, 1, 2, 3, 5, 16]),
        "wsd_speculate": rng.choice(["auto", "auto", "pilot", "ngram", False]),
    }
    if case["eos_token_id"] is not None:
        case["wsd_draft_end"] = rng.choice(["continue", "stop"])
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": min(5, case["max_new_tokens"])},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[n] for n in range(20, 30)] + [[31, 32]]},
        {"logits_processor": LogitsProcessorList([Overwrites()])},
        {"switch_criteria": FiresAt(*(rng.randint(1, 9) for _ in range(rows)))},
    ]
    if case["eos_token_id"] is not None:  # else transformers lets a row that has ended write on until the others have
        letters = letter_tokenizer(VOCABULARY).convert_ids_to_tokens(rng.sample(range(3, VOCABULARY), 8))
        options += [{"tokenizer": letter_tokenizer(VOCABULARY), "stop_strings": [*letters[:4], "".join(letters[4:6])]}]
        options += [{"stopping_criteria": [Ends(*rng.sample(range(VOCABULARY), 6))]}]
    for option in options:
        if rng.random() < 0.2:
            case |= option
    if rng.random() < 0.3:
        case["assistant_input_ids"], case["assistant_attention_mask"] = random_rows(rng, rows, 24, padded)
    return case


@pytest.mark.parametrize(("part", "calls"), [(0, 5), *(pytest.param(part, 15, marks=pytest.mark.sweep) for part in range(4))])
@pytest.mark.parametrize("family", EXACT + ROUNDED + UNPADDED)
def test_random_calls_give_what_they_give_step_by_step(family: str, part: int, calls: int) -> None:
    rng = random.Random(f"{family} {part}")
    for _ in range(calls):
        both(*pair(family, rng.choice([0.05, 0.15, 0.4])), **random_case(rng, padded=family not in UNPADDED))


def test_the_random_calls_switch_for_every_reason() -> None:
    rng = random.Random("llama 0")
    outputs = []
    for _ in range(15):
        base, pilot = pair("llama", rng.choice([0.05, 0.15, 0.4]))
        outputs.append(decode(base, pilot, **random_case(rng, padded=True)))
    assert {reason for out in outputs for reason in out.switch_reason} == {
        "confident",
        "draft_ended",
        "draft_limit",
        "budget",
        "stopped",
    }


@pytest.mark.parametrize("budget", range(1, 9))
@pytest.mark.parametrize("switch", [1, 3, 4, 5, 8])
def test_a_budget_may_end_anywhere_around_the_switch_and_the_chunks(budget: int, switch: int) -> None:
    ids, mask = left_padded([random_prompt(1, 6), random_prompt(2, 9)], PAD)
    criterion = FiresAt(switch, max(1, switch - 2))
    both(*pair("llama", 0.05), ids, attention_mask=mask, max_new_tokens=budget, switch_criteria=criterion, wsd_chunk=4)


@pytest.mark.parametrize("eos", [2, [46, 27, 11, 2, 7]])
def test_without_a_pad_token_rows_that_have_ended_are_filled_as_transformers_fills_them(eos: Any) -> None:
    base, pilot = pair("llama")
    base = copy.copy(base)
    base.generation_config = copy.deepcopy(base.generation_config)
    base.generation_config.pad_token_id = None
    both(base, pilot, torch.cat([random_prompt(seed, 6) for seed in range(4)]), eos_token_id=eos, max_new_tokens=20)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.sweep) for part in (1, 2))])
def test_a_row_that_stops_as_another_becomes_full_is_called_stopped(part: int) -> None:
    base, pilot = pair("llama", 0.05)
    ids = torch.cat([random_prompt(1, 6), random_prompt(3, 6)])
    reasons = set()
    for budget in range(2 + part, 12, 3):
        for token in set(plain_tokens(pilot, ids[1:], budget - 1)):
            kwargs = {"max_new_tokens": budget, "switch_criteria": FiresAt(1, 99), "stopping_criteria": [Ends(token)]}
            reasons.add(both(base, pilot, ids, wsd_chunk=2, **kwargs)[0].switch_reason[1])
    assert reasons == {"stopped"}


def resized(model: PreTrainedModel, size: int) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("size", [40, 80])
def test_the_pilots_vocabulary_may_be_narrower_or_wider(size: int) -> None:
    base, pilot = pair("llama")
    tokenizer = letter_tokenizer(40)
    pilot = resized(pilot, size)
    pilot.generation_config.eos_token_id = [2, *range(64, size)]
    for seed in range(8):
        prompt = random_prompt(seed, 6, 40)
        both(base, pilot, prompt, tokenizer=tokenizer, assistant_tokenizer=tokenizer, switch_criteria=FiresAt(1))


def test_the_pilots_context_may_end_before_the_response() -> None:
    base, _ = pair("gpt2")
    pilot = copy.deepcopy(tiny_model("gpt2", seed=3, n_positions=12)).double()
    ids, mask = left_padded([random_prompt(0, 10), random_prompt(1, 4)], PAD)
    for chunk in (1, 4, 16):
        both(base, pilot, ids, attention_mask=mask, wsd_threshold=1.0, wsd_chunk=chunk, max_new_tokens=30)


def test_a_response_may_fill_the_bases_context() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2", n_positions=20)).double())
    for chunk in (1, 4, 16):
        both(base, pair("gpt2")[1], wsd_chunk=chunk, max_new_tokens=14, eos_token_id=None)


def test_several_return_sequences_are_as_many_rows() -> None:
    base, pilot = pair("llama")
    ids = torch.cat([random_prompt(1, 6), random_prompt(3, 6)])
    one, two = random_prompt(4, 8), random_prompt(5, 8)
    kwargs = {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "assistant_input_ids": torch.cat([one, two])}
    both(base, pilot, ids, **kwargs)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": [2, 5, 9, 46]}])
def test_scores_and_logits_are_those_of_the_other_path(options: dict[str, Any], chunk: int | None) -> None:
    base, pilot = pair("llama")
    ids, mask = left_padded([random_prompt(seed, 3 + 2 * seed) for seed in range(3)], PAD)
    kwargs = {"attention_mask": mask, "output_scores": True, "output_logits": True, "wsd_chunk": chunk, **options}
    fast, step = both(base, pilot, ids, **kwargs)
    assert len(fast.scores) == len(fast.logits) == fast.sequences.shape[1] - ids.shape[1]
    for row, answer in enumerate(answers(fast)):
        for place, token in enumerate(answer):
            for ours, theirs in ((fast.scores, step.scores), (fast.logits, step.logits)):
                torch.testing.assert_close(ours[place][row], theirs[place][row], atol=1e-4, rtol=1e-4)
            assert int(fast.scores[place][row].argmax()) == token


def test_a_function_of_the_callers_that_allows_tokens_goes_step_by_step() -> None:
    base, pilot = pair("llama")
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], PAD)
    seen: list[int] = []

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        seen.append(len(prefix))
        return list(range(3, VOCABULARY, 1 + row))

    kwargs = {"attention_mask": mask, "prefix_allowed_tokens_fn": allowed, "eos_token_id": None}
    auto = decode(base, pilot, ids, **kwargs, wsd_engine="auto")
    assert seen == sorted(seen)
    assert auto.stats.base.forwards == 14


def test_what_is_returned_owns_its_memory() -> None:
    out = decode(*pair("llama"), eos_token_id=[2, 46], max_new_tokens=50)
    assert out.sequences.is_contiguous()
    assert out.sequences.untyped_storage().nbytes() == out.sequences.nbytes


def test_scores_alone_are_returned_alone() -> None:
    base, pilot = pair("llama")
    out = decode(base, pilot, output_scores=True)
    assert (len(out.scores), out.logits) == (14, None)
    assert decode(base, pilot).scores is None


# Less work


class Watch:
    """Reads off a model's forwards what each of them is fed, padding left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.fed: list[list[list[int]]] = []
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # Padding lies in the slot that no token may attend to; the mask is repeated for heads that share keys.
        positions = kwargs["position_ids"]
        first = kwargs["attention_mask"][:, 0, : positions.shape[1], 0]
        real = ~first if first.dtype == torch.bool else first < 0
        self.fed.append([row[mask].tolist() for row, mask in zip(positions, real, strict=True)])

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    @property
    def forwards(self) -> int:
        return len(self.fed)

    @property
    def tokens(self) -> int:
        return sum(len(row) for forward in self.fed for row in forward)

    @property
    def rows(self) -> list[int]:
        """Rows of each forward; those that have finished are left out."""
        return [len(forward) for forward in self.fed]


@pytest.mark.parametrize("chunk", [None, 1, 5, 16])
def test_the_base_sees_every_prompt_token_once(chunk: int | None) -> None:
    base, pilot = pair("llama")
    lengths = (4, 11, 7, 1)
    ids, mask = left_padded([random_prompt(seed, length) for seed, length in enumerate(lengths)], PAD)
    with Watch(base) as watch:
        decode(base, pilot, ids, attention_mask=mask, wsd_chunk=chunk, switch_criteria=FiresAt(1, 3, 8, 14))
    for length, positions in zip(lengths, watch.fed[0], strict=True):
        assert positions[:length] == list(range(length))
    for forward in watch.fed[1:]:
        assert all(position >= min(lengths) for positions in forward for position in positions)
        if len(forward) == len(lengths):
            assert all(min(positions, default=length) >= length for positions, length in zip(forward, lengths, strict=True))


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_rows_that_have_finished_leave_the_batch(chunk: int | None) -> None:
    base, pilot = pair("llama")
    ids, mask = left_padded([random_prompt(seed, length) for seed, length in enumerate((4, 11, 7, 1))], PAD)
    kwargs = {"attention_mask": mask, "max_new_tokens": 24, "eos_token_id": [2, 5, 9, 11, 27, 40, 46], "wsd_chunk": chunk}
    both(base, pilot, ids, **kwargs)
    with Watch(base) as watch, Watch(pilot) as proposing:
        out = decode(base, pilot, ids, **kwargs)
    assert len({len(row) for row in answers(out)}) > 2
    assert watch.rows[0] == 4 > watch.rows[-1]
    for rows in watch.rows, proposing.rows:
        assert rows == sorted(rows, reverse=True)


def answers(out: Any) -> list[list[int]]:
    """The responses without their padding."""
    ended = [row.index(PAD) if PAD in row else len(row) for row in out.sequences[:, out.prompt_length :].tolist()]
    return [row[:end] for row, end in zip(out.sequences[:, out.prompt_length :].tolist(), ended, strict=True)]


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
@pytest.mark.parametrize("switch", [1, 4, 5, 6, 13])
def test_a_draft_is_checked_chunk_by_chunk_and_less_than_a_chunk_is_thrown_away(chunk: int, switch: int) -> None:
    base, pilot = pair("llama")
    kwargs = {"max_new_tokens": switch + 1, "eos_token_id": None, "switch_criteria": FiresAt(switch)}
    with Watch(base) as watch:
        out = decode(base, pilot, wsd_chunk=chunk, wsd_speculate=False, **kwargs)
    assert int(out.draft_length) == switch
    assert watch.forwards <= -(-switch // chunk) + 1
    assert watch.tokens <= 6 + switch + chunk - 1


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_the_base_is_fed_the_response_and_rejected_proposals_only(chunk: int | None) -> None:
    base, pilot = pair("llama")
    ids, mask = left_padded([random_prompt(0, 4), random_prompt(1, 9)], PAD)
    with Watch(base) as watch, Watch(pilot) as proposing:
        out = decode(base, pilot, ids, attention_mask=mask, wsd_chunk=chunk, eos_token_id=None)
    fed = watch.tokens
    assert fed <= 4 + 9 + 2 * 14 + 2 * proposing.forwards
    assert (watch.forwards, fed) == (out.stats.base.forwards, out.stats.base.tokens)
    assert proposing.forwards == out.stats.pilot.forwards
    assert proposing.tokens == out.stats.pilot.tokens


def test_a_pilot_that_is_always_right_saves_three_forwards_of_four() -> None:
    base, _ = pair("llama")
    with Watch(base) as watch:
        out = decode(base, copy.deepcopy(base), wsd_chunk=5, max_new_tokens=80, eos_token_id=None)
    drafted = int(out.draft_length)
    assert out.sequences.shape[1] == 86
    assert watch.forwards <= -(-drafted // 5) + 1 + 0.25 * (80 - drafted)


@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
def test_a_ragged_batch_takes_no_more_forwards_than_its_slowest_row(chunk: int) -> None:
    base, pilot = pair("llama", 0.05)
    rows = [random_prompt(seed, 3 + 2 * seed) for seed in range(8)]
    ids, mask = left_padded(rows, PAD)
    kwargs = {"wsd_chunk": chunk, "max_new_tokens": 24}
    alone = [decode(base, pilot, row, **kwargs).stats.base.forwards for row in rows]
    assert decode(base, pilot, ids, attention_mask=mask, **kwargs).stats.base.forwards <= max(alone) + 2


def test_caches_are_sized_to_the_call() -> None:
    base, pilot = pair("llama")
    sizes = base.config
    slot = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * 8  # keys and values in float64
    for rows, budget in ((1, 4), (3, 30)):
        stats = decode(base, pilot, PROMPT.repeat(rows, 1), max_new_tokens=budget).stats
        assert 2 * rows * slot * (6 + budget) <= stats.cache_memory <= 2 * rows * slot * (6 + budget + 17)
        assert stats.peak_memory is None


# Sampling


def tiny(vocabulary: int, seed: int, *loud: int) -> PreTrainedModel:
    """A model of a few tokens, some of them likely."""
    model = copy.deepcopy(tiny_model("llama", seed=seed, vocab_size=vocabulary, initializer_range=0.15))
    model.generation_config.eos_token_id = None
    hook = torch.zeros(vocabulary)
    hook[list(loud)] = 1.5
    model.lm_head.bias = torch.nn.Parameter(hook, requires_grad=False)
    return model


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "a greedy pilot": {"assistant_do_sample": False},
    "warped": {"temperature": 0.7, "top_k": 3},
    "penalised": {"repetition_penalty": 1.4},
    "without speculation": {"wsd_speculate": False},
    "at its own pace": {"wsd_chunk": None},
}


def exact(
    base: PreTrainedModel, first: torch.Tensor, length: int, vocabulary: int, prompt: Any = ((1, 3),), **options: Any
) -> torch.Tensor:
    """Probabilities of all responses: `first` are those of a first token from elsewhere; the rest is the base's."""
    responses = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    prompt = torch.as_tensor(prompt)
    whole = torch.cat([prompt.expand(len(responses), -1), responses], dim=1)
    with torch.no_grad():
        logits = base(whole).logits.float()
    probability = first[responses[:, 0]].double()
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
            TemperatureLogitsWarper(options.get("temperature", 1.0)),
            TopKLogitsWarper(options.get("top_k") or vocabulary),
        ]
    )
    for place in range(1, length):
        begun = prompt.shape[1] + place
        scores = processors(whole[:, :begun], logits[:, begun - 1])
        probability = probability * scores.double().softmax(-1).gather(1, responses[:, place, None])[:, 0]
    return probability


SWEPT = {"plain", "a greedy pilot", "warped", "penalised", "without speculation"}
"""Those that test_random_calls.py draws, warped and penalised and from the same loop, or test_two_vocabularies.py."""


@pytest.mark.parametrize("sampling", [pytest.param(n, marks=[pytest.mark.sweep] if n in SWEPT else []) for n in SAMPLING])
@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_continuations_are_distributed_as_the_bases(sampling: str, draws: int) -> None:
    options = {"do_sample": True, "top_k": 0, "wsd_chunk": 2, **SAMPLING[sampling]}
    base, pilot = wsd_hf.enable_wsd(tiny(5, 0)), tiny(5, 7)
    prompt = torch.tensor([[1, 3]])
    options |= {"max_new_tokens": 4, "switch_criteria": FiresAt(1), "num_return_sequences": draws // 4, "pad_token_id": 0}
    torch.manual_seed(0)
    drawn = torch.cat([decode(base, pilot, prompt, **options).sequences[:, 2:] for _ in range(4)])
    with torch.no_grad():
        logits = pilot(prompt).logits[0, -1].float() / options.get("temperature", 1.0)
    if options.get("assistant_do_sample") is False:
        first = torch.nn.functional.one_hot(logits.argmax(), 5).float()
    else:
        kept = logits.topk(options["top_k"] or 5)
        first = torch.zeros(5).scatter(0, kept.indices, kept.values.softmax(-1))
    want = exact(base, first, 4, 5, **options)
    cells = (drawn * torch.tensor([125, 25, 5, 1])).sum(dim=1).bincount(minlength=625)
    assert chi_squared(cells, draws * want) > 1e-3


@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_an_eos_that_a_pilot_draws_tells_the_base_nothing(draws: int) -> None:
    base, pilot = wsd_hf.enable_wsd(tiny(5, 0)), tiny(5, 7, 4)
    pilot.generation_config.eos_token_id = 4
    prompt = torch.tensor([[1, 3]])
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": draws, "max_new_tokens": 3}
    out = decode(base, pilot, prompt, switch_criteria=FiresAt(1), **kwargs)
    with torch.no_grad():
        drafted = pilot(prompt).logits[0, -1].float().softmax(-1)
        own = base(prompt).logits[0, -1].float().softmax(-1)
    ended = float(drafted[4])
    assert ended > 0.1
    drafted[4] = 0.0
    want = exact(base, drafted + ended * own, 3, 5)
    cells = (out.sequences[:, 2:] * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want) > 1e-3


@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_proposals_outside_the_bases_vocabulary_leave_its_distribution_alone(draws: int) -> None:
    base, pilot = wsd_hf.enable_wsd(tiny(5, 0)), tiny(7, 7, 5, 6)
    pilot.generation_config.eos_token_id = [5, 6]
    tokenizer = letter_tokenizer(5)
    prompt = torch.tensor([[1, 3]])
    torch.manual_seed(0)
    out = decode(
        base,
        pilot,
        prompt,
        tokenizer=tokenizer,
        assistant_tokenizer=tokenizer,
        do_sample=True,
        top_k=0,
        num_return_sequences=draws,
        max_new_tokens=3,
        switch_criteria=FiresAt(1),
    )
    with torch.no_grad():
        drafted = pilot(prompt).logits[0, -1].float().softmax(-1)
        own = base(prompt).logits[0, -1].float().softmax(-1)
    assert float(drafted[5:].sum()) > 0.3
    want = exact(base, drafted[:5] + drafted[5:].sum() * own, 3, 5)
    cells = (out.sequences[:, 2:] * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want) > 1e-3


@pytest.mark.parametrize("assistant_do_sample", [None, True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 5}, {"repetition_penalty": 1.3}])
def test_a_seed_repeats_sampling(assistant_do_sample: bool | None, options: dict[str, Any]) -> None:
    ids, mask = left_padded([random_prompt(0, 4), random_prompt(1, 9)], PAD)

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        kwargs = {"attention_mask": mask, "do_sample": True, "assistant_do_sample": assistant_do_sample, **options}
        return decode(*pair("llama"), ids, **kwargs).sequences.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_a_pilot_that_samples_leaves_a_greedy_base_its_choice() -> None:
    base, pilot = pair("llama")
    for seed in range(6):
        torch.manual_seed(seed)
        out = decode(base, pilot, assistant_do_sample=True, switch_criteria=FiresAt(3))
        drafted = int(out.draft_length)
        assert out.sequences[0, 6 + drafted :].tolist() == plain_tokens(base, out.sequences[:, : 6 + drafted], 14 - drafted)


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.sweep)])
def test_a_greedy_call_leaves_the_random_state_alone_every_time(times: int) -> None:
    before = torch.random.get_rng_state()
    first = decode(*pair("llama"))
    for _ in range(times):
        again = decode(*pair("llama"))
        assert torch.equal(again.sequences, first.sequences)
        assert torch.equal(again.draft_log_probs, first.draft_log_probs)
    assert torch.equal(torch.random.get_rng_state(), before)


# Streaming


class Recorder(BaseStreamer):
    """Keeps the columns that it is given."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0
        self._fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.clone())
        if len(self.puts) == self._fails_at:
            raise BrokenPipeError("reader has gone")

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
def test_a_batch_is_streamed_column_by_column_as_it_is_returned(chunk: int | None) -> None:
    ids, mask = left_padded([random_prompt(seed, 3 + 2 * seed) for seed in range(4)], PAD)
    streamer, reference = Recorder(), Recorder()
    kwargs = {"attention_mask": mask, "eos_token_id": [2, 46, 63], "wsd_chunk": chunk}
    out = decode(*pair("llama"), ids, streamer=streamer, **kwargs)
    decode(*pair("llama"), ids, streamer=reference, **(kwargs | {"wsd_engine": "step"}))
    assert torch.equal(torch.cat([streamer.puts[0], torch.stack(streamer.puts[1:], dim=1)], dim=1), out.sequences)
    assert [put.tolist() for put in streamer.puts] == [put.tolist() for put in reference.puts]
    assert streamer.ends == 1


def test_what_is_streamed_is_never_taken_back() -> None:
    base, pilot = pair("llama")
    want = decode(base, pilot, wsd_engine="step", max_new_tokens=24).sequences[0].tolist()
    for at in range(1, 8):
        streamer = Recorder()
        with failing(base, at, RuntimeError("injected")), pytest.raises(RuntimeError, match="injected"):
            decode(base, pilot, streamer=streamer, max_new_tokens=24, wsd_chunk=2)
        streamed = [token for put in streamer.puts for token in put.flatten().tolist()]
        assert streamed == want[: len(streamed)]
        assert streamer.ends == 1


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_a_reader_is_released_when_a_model_fails(role: str) -> None:
    base, pilot = pair("llama")
    streamer = TextIteratorStreamer(letter_tokenizer(VOCABULARY), skip_prompt=True, timeout=HANG)

    def run() -> None:
        with pytest.raises(PilotBroke):
            decode(base, pilot, streamer=streamer)

    with failing({"base": base, "pilot": pilot}[role], 2, PilotBroke()):
        thread = threading.Thread(target=run)
        thread.start()
        list(streamer)
        thread.join(HANG)
    assert not thread.is_alive()


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_streamer_that_raises_ends_generation_with_its_exception(at: int) -> None:
    streamer = Recorder(fails_at=at)
    with pytest.raises(BrokenPipeError, match="reader has gone"):
        decode(*pair("llama"), streamer=streamer)
    assert (len(streamer.puts), streamer.ends) == (at, 1)


# The choice of the path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states=True"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale"),
    "positions": ({"position_ids": torch.arange(6)[None] + 5}, "position_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fast_path_cannot_serve_is_refused_by_name_and_goes_step_by_step(case: str) -> None:
    base, pilot = pair("gpt2")
    kwargs, name = REFUSED[case]
    with pytest.raises(wsd_hf.WSDValueError, match=f"wsd_engine='fast' cannot serve this call: .*{name}"):
        decode(base, pilot, **kwargs)
    step, auto = (decode(base, pilot, **kwargs, wsd_engine=engine) for engine in ("step", "auto"))
    assert torch.equal(auto.sequences, step.sequences)
    assert auto.stats == step.stats
    assert (auto.scores is None) == (step.scores is None)


def test_a_cache_that_the_caller_passes_holds_the_tokens_afterwards() -> None:
    base, pilot = pair("llama")
    cache = DynamicCache(config=base.config)
    out = decode(base, pilot, wsd_engine="auto", past_key_values=cache)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    with pytest.raises(wsd_hf.WSDValueError, match="past_key_values was given"):
        decode(base, pilot, past_key_values=DynamicCache(config=base.config))


def test_inputs_that_only_the_bases_forward_knows_are_not_dropped() -> None:
    base, pilot = pair("gpt2")
    kwargs = {"token_type_ids": torch.full((1, 6), 9), "wsd_threshold": 0.01}
    with pytest.raises(wsd_hf.WSDValueError, match="token_type_ids was given"):
        decode(base, pilot, **kwargs)
    step, auto, without = (
        decode(base, pilot, **kwargs, wsd_engine="step").sequences,
        decode(base, pilot, **kwargs, wsd_engine="auto").sequences,
        decode(base, pilot, wsd_threshold=0.01).sequences,
    )
    assert auto.tolist() == step.tolist() != without.tolist()


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_a_family_that_cannot_rewind_is_refused_by_name_and_goes_step_by_step(
    role: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"base": pair("llama")[0], "pilot": pair("llama")[1], role: copy.deepcopy(tiny_model("bloom"))}
    base, pilot = wsd_hf.enable_wsd(models["base"]), models["pilot"]
    with pytest.raises(wsd_hf.WSDValueError, match=f"the {role} raises ValueError on a cache with rows"):
        decode(base, pilot)
    step = decode(base, pilot, wsd_engine="step")
    logger = wsd_hf.speculation.config.logger
    logger.warning_once.cache_clear()
    monkeypatch.setattr(logger.parent, "propagate", True)
    for _ in range(3):
        assert torch.equal(decode(base, pilot, wsd_engine="auto").sequences, step.sequences)
    assert sum("goes step by step" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
    ],
    ids=["dynamic", "longrope"],
)
def test_positions_that_stretch_as_the_text_grows_are_left_to_the_other_path(family: str, rope: dict[str, Any]) -> None:
    sizes = {"max_position_embeddings": 24} if family == "llama" else {"original_max_position_embeddings": 24}
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model.__wrapped__(family, rope_parameters=rope, **sizes)))
    with pytest.raises(wsd_hf.WSDValueError, match="the base stretches its rotary positions"):
        decode(base, tiny_pilot(family))


def test_learned_positions_are_not_exceeded_by_proposals() -> None:
    base = wsd_hf.enable_wsd(copy.deepcopy(tiny_model("gpt2", n_positions=20)).double())
    kwargs = {"max_new_tokens": 40, "wsd_chunk": 16, "eos_token_id": list(range(2, VOCABULARY, 4))}
    step, auto = (decode(base, pair("gpt2")[1], **kwargs, wsd_engine=engine) for engine in ("step", "auto"))
    assert torch.equal(auto.sequences, step.sequences)


# Faults


@contextmanager
def spoiled(model: PreTrainedModel, at: int) -> Iterator[None]:
    """NaN in the last logits of the `at`-th forward, counted from 1."""
    count = itertools.count(1)

    def spoil(module: Any, args: Any, output: Any) -> None:
        if next(count) == at:
            output.logits[:, -1, 7] = torch.nan

    hook = model.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(("role", "at", "token"), [("pilot", 1, 1), ("pilot", 3, 3), ("base", 1, 4), ("base", 2, 7)])
def test_logits_that_are_no_numbers_raise_naming_model_and_token(role: str, at: int, token: int) -> None:
    base, pilot = pair("llama")
    with (
        spoiled({"base": base, "pilot": pilot}[role], at),
        pytest.raises(wsd_hf.WSDLogitsError, match=f"the {role} returned .* at response token {token} of row 0"),
    ):
        decode(base, pilot, switch_criteria=FiresAt(3 if at == 1 else 6))


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_pilot_that_fails_behind_the_switch_no_longer_matters(do_sample: bool) -> None:
    base, pilot = pair("llama")
    kwargs = {"switch_criteria": FiresAt(2), "eos_token_id": None, "do_sample": do_sample, "wsd_chunk": 2, "top_k": 1}
    with spoiled(pilot, 4):
        fast = decode(base, pilot, **kwargs)
    assert fast.sequences.tolist() == decode(base, pilot, **kwargs, wsd_engine="step").sequences.tolist()


@pytest.mark.parametrize("role", ["base", "pilot"])
@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), PilotBroke("injected"), pytest.param(torch.OutOfMemoryError("injected"), marks=pytest.mark.sweep)],
)
def test_an_error_at_any_forward_comes_through_and_leaves_nothing_changed(role: str, error: BaseException) -> None:
    base, pilot = pair("llama")
    model = {"base": base, "pilot": pilot}[role]
    want = decode(base, pilot)
    before = state(base), state(pilot), torch.is_grad_enabled()
    forwards = want.stats.base.forwards if role == "base" else want.stats.pilot.forwards
    assert forwards >= 4
    for at in range(1, forwards + 1):
        with failing(model, at, error), pytest.raises(type(error)) as caught:
            decode(base, pilot)
        assert caught.value is error
        assert (state(base), state(pilot), torch.is_grad_enabled()) == before
        assert torch.equal(decode(base, pilot).sequences, want.sequences)


def live_tensors() -> tuple[int, int]:
    """How many there are, and their bytes; what torch.compile traces with has none."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.sweep)])
def test_many_calls_leave_nothing_behind(count: int) -> None:
    base, pilot = pair("llama")

    def call(index: int) -> None:
        if index % 10:
            decode(base, pilot, max_new_tokens=4, do_sample=bool(index % 2))
        else:
            with failing(base if index % 20 else pilot, 1 + index % 2, PilotBroke()), pytest.raises(PilotBroke):
                decode(base, pilot, max_new_tokens=4)

    for index in range(20):
        call(index)
    before = live_tensors()
    for index in range(count):
        call(index)
    assert all(now <= then for now, then in zip(live_tensors(), before, strict=True))


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.sweep)])
def test_in_bfloat16_the_paths_part_only_where_two_tokens_are_about_as_likely(count: int) -> None:
    base, pilot = (copy.deepcopy(model).bfloat16() for model in pair("llama"))
    parted = 0
    for seed in range(count):
        kwargs = {"max_new_tokens": 40, "eos_token_id": None, "switch_criteria": FiresAt(3), "output_logits": True}
        fast, step = (decode(base, pilot, random_prompt(seed, 6), **kwargs, wsd_engine=engine) for engine in ("fast", "step"))
        differ = (fast.sequences != step.sequences)[0].nonzero().flatten()
        if len(differ):
            place = int(differ[0]) - 6
            logits = step.logits[place][0]
            gap = logits[step.sequences[0, 6 + place]] - logits[fast.sequences[0, 6 + place]]
            assert abs(float(gap)) <= 2**-6 * float(logits.abs().max())
            parted += 1
    assert parted < count / 2


def test_eight_threads_on_one_pair_equal_serial_calls() -> None:
    base, pilot = pair("llama")

    def task(index: int) -> Any:
        kwargs = {
            "wsd_threshold": (0.1, 0.15, 0.3, 0.5)[index % 4],
            "wsd_window_size": 1 + index % 3,
            "wsd_chunk": 1 + index % 5,
        }

        def run() -> Any:
            out = decode(base, pilot, random_prompt(index, 4 + index), **kwargs)
            return out.sequences.tolist(), out.draft_length.tolist(), out.switch_reason, out.stats

        return run

    tasks = [task(index) for index in range(8)]
    serial = [run() for run in tasks]
    for _ in range(3):
        assert together(tasks) == serial


def test_a_subclass_with_a_forward_of_its_own_goes_step_by_step() -> None:
    class Own(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    base, pilot = pair("llama")
    own = Own(base.config).to(base.dtype).eval()
    own.load_state_dict(base.state_dict())
    out, expected = (decode(wsd_hf.enable_wsd(model), pilot, wsd_engine="auto") for model in (own, base))
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.stats.base.forwards > expected.stats.base.forwards
    with pytest.raises(wsd_hf.WSDValueError, match=r"the base has a forward of its own \(Own\)"):
        decode(own, pilot, wsd_engine="fast")
