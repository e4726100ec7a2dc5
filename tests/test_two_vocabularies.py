"""Base and pilot with vocabularies of their own: the same words on both paths, as composed through text, and no wasted work."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import tokenizers_for_tests as make
import wsd_hf
import wsd_hf.tiny
from families import tiny_model, tiny_parts
from oracle import first_crossing, left_padded, plain_tokens
from test_acceptance import chi_squared
from test_concurrency import together
from test_fast_path import Ends, FiresAt, Overwrites, Recorder, Watch, exact, tiny
from test_fast_path import both as both_paths
from test_fast_path import decode as decode_on_a_path
from test_faults import PilotBroke, failing, state
from wsd_hf.text.settled_tokens import ContinuationTokenizer

DATA = Path(__file__).parent / "data"


class World(NamedTuple):
    """A base that takes `strategy=`, a pilot, and their tokenizers; no test changes them."""

    base: PreTrainedModel
    pilot: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistant_tokenizer: PreTrainedTokenizerBase

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "assistant_tokenizer": self.assistant_tokenizer}


def decode(world: World, ids: torch.Tensor, **kwargs: Any) -> Any:
    """On the fast path, which must not refuse."""
    return decode_on_a_path(world.base, world.pilot, ids, **world.tokenizers, **kwargs)


def both(world: World, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    """The fast path's output and the step-by-step path's, which must say the same."""
    return both_paths(world.base, world.pilot, ids, **world.tokenizers, **kwargs)


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": make.byte_level_tokenizer,
    "llama3": lambda: make.byte_level_tokenizer(make.LLAMA_3_SPLIT, size=420),
    "bytes": lambda: make.byte_level_tokenizer(size=257),
    "words across spaces": lambda: make.random_merges_tokenizer(0, "", False),
    "llama2": make.llama_2_tokenizer,
    "mistral": make.mistral_tokenizer,
    "gemma": make.gemma_tokenizer,
    "unigram": make.unigram_tokenizer,
    "wordpiece": make.wordpiece_tokenizer,
}
NOISE = [
    ("gpt2", "llama3"),
    ("llama3", "mistral"),
    ("mistral", "words across spaces"),
    ("gemma", "llama2"),
    ("bytes", "gpt2"),
    ("words across spaces", "bytes"),
    ("wordpiece", "gemma"),
]
GOLDEN = [("T_base_B", "B_base"), ("T_base_C", "C_base"), ("T_base_C", "C2_base")]


@functools.cache
def tokenizer_of(name: str) -> Any:
    return MAKERS[name]()


@functools.cache
def noise(base: str, pilot: str) -> World:
    """Models that were never trained: what they write is cut characters, special tokens and runs of white space."""
    models = []
    for name, seed in ((base, 0), (pilot, 3)):
        model = copy.deepcopy(tiny_model("llama", seed=seed, vocab_size=len(tokenizer_of(name)))).double()
        eos = tokenizer_of(name).eos_token_id
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = eos
        models.append(model)
    return World(wsd_hf.enable_wsd(models[0]), models[1], tokenizer_of(base), tokenizer_of(pilot))


@functools.cache
def golden(base: str, tokenizer: str) -> World:
    return World(
        wsd_hf.AutoModelForCausalLM.from_pretrained(DATA / "models" / base, dtype=torch.float64),
        AutoModelForCausalLM.from_pretrained(DATA / "models/T_pilot", dtype=torch.float64),
        AutoTokenizer.from_pretrained(DATA / "tokenizers" / tokenizer),
        AutoTokenizer.from_pretrained(DATA / "tokenizers/A_pilot_llama3"),
    )


def permuted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The same model and tokenizer with other ids: another vocabulary, and the same opinion of every text."""
    size = model.config.vocab_size
    new = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: int(new[index]) for token, index in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = int(new[token["id"]])
    state["added_tokens"].sort(key=lambda token: token["id"])
    model = copy.deepcopy(model)
    for weight in {model.get_input_embeddings().weight, *model.lm_head.parameters()}:
        weight.data = torch.empty_like(weight).index_copy_(0, new, weight.data)
    eos = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None if eos is None else int(new[eos])
    model.generation_config.pad_token_id = None
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


@functools.cache
def agreeing() -> World:
    """The shipped base, and as its pilot the same model with other ids."""
    base, _, tokenizer, _ = tiny_parts()
    base = base.double()
    pilot, assistant_tokenizer = permuted(wsd_hf.disable_wsd(copy.deepcopy(base)), tokenizer)
    return World(base, pilot, tokenizer, assistant_tokenizer)


@functools.cache
def shipped() -> World:
    base, pilot, *tokenizers = tiny_parts(pilot="pilot_other_vocab")
    return World(base.double(), pilot.double(), *tokenizers)


def chats(count: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of both shipped models for the first of the shipped questions."""
    _, _, *tokenizers = shipped()
    inputs = [wsd_hf.build_inputs(question["messages"], *tokenizers) for question in wsd_hf.tiny.demo_questions()[:count]]
    return [{name: value for name, value in prompt.items() if name != "stopping_criteria"} for prompt in inputs]


def a_world(name: tuple[str, str]) -> World:
    return golden(*name) if name in GOLDEN else noise(*name)


# What is to be expected


def said(tokenizer: Any, ids: list[int]) -> str:
    """A draft's text without an incomplete last character."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer.convert_ids_to_tokens([index for index in ids if index not in special])
    run = len(tokens)
    while run and re.fullmatch("<0x..>", tokens[run - 1]):
        run -= 1
    text = tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens[:run]), clean_up_tokenization_spaces=False) if run else ""
    spelled = bytes(int(token[3:5], 16) for token in tokens[run:])
    for end in range(len(spelled), max(-1, len(spelled) - 4), -1):
        try:
            return (text + spelled[:end].decode()).rstrip("\ufffd") if end else text.rstrip("\ufffd")
        except UnicodeDecodeError:
            pass
    return text.rstrip("\ufffd")


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A piece of text on its own, with no space put in front."""
    ids: list[int] = make.without_added_space(tokenizer).encode(text, add_special_tokens=False)
    return ids


def before(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def as_ids(eos: Any) -> set[int]:
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


class Expected(NamedTuple):
    tokens: list[int]
    draft_length: int
    reason: str


def composed(
    world: World,
    ids: torch.Tensor,
    pilot_ids: torch.Tensor,
    *,
    threshold: float,
    window: int,
    budget: int,
    limit: int,
    eos: Any = None,
) -> Expected:
    """One row: the pilot's greedy text in the base's tokens, up to the first crossing, then the base's own greedy text."""
    base, pilot, tokenizer, assistant_tokenizer = world
    ends = as_ids(pilot.generation_config.eos_token_id) | as_ids(assistant_tokenizer.eos_token_id)
    draft = plain_tokens(pilot, pilot_ids, limit, eos_token_id=sorted(ends))
    ended = len(before(draft, ends)) < len(draft)
    crossed = encoded(tokenizer, said(assistant_tokenizer, before(draft, ends)))
    eos = base.generation_config.eos_token_id if eos is None else eos
    ended |= len(before(crossed, as_ids(eos))) < len(crossed)
    crossed = before(crossed, as_ids(eos))
    reason = "budget" if len(crossed) >= budget else "draft_ended" if ended else "draft_limit"
    crossed = crossed[:budget]
    if crossed and (crossing := first_crossing(base, ids, crossed, threshold, window)):
        crossed, reason = crossed[:crossing], "confident"
    rest = torch.cat([ids, torch.tensor([crossed], dtype=torch.long)], dim=1)
    return Expected(crossed + plain_tokens(base, rest, budget - len(crossed), eos_token_id=eos), len(crossed), reason)


TEXT = make.ENGLISH + make.WORLD


def a_prompt(rng: random.Random, tokenizer: Any, longest: int = 60) -> torch.Tensor:
    start = rng.randrange(len(TEXT) - longest)
    return torch.tensor([tokenizer.encode("A" + TEXT[start : start + rng.randint(1, longest)], add_special_tokens=False)])


def a_pilot_prompt(world: World, ids: torch.Tensor) -> torch.Tensor:
    """The same text in the pilot's tokens."""
    return torch.tensor([world.assistant_tokenizer.encode(world.tokenizer.decode(ids[0], skip_special_tokens=True))])


def ending_at(world: World, *ends: int) -> World:
    """The same with a pilot that ends its drafts at these tokens too."""
    pilot = copy.copy(world.pilot)
    pilot.generation_config = copy.deepcopy(pilot.generation_config)
    pilot.generation_config.eos_token_id = sorted({*as_ids(pilot.generation_config.eos_token_id), *ends})
    return world._replace(pilot=pilot)


def some(rng: random.Random, tokenizer: Any, share: float) -> list[int]:
    return rng.sample(range(len(tokenizer)), max(1, int(share * len(tokenizer))))


# The same words


@pytest.mark.parametrize("calls", [4, pytest.param(9, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", NOISE + GOLDEN, ids=" ".join)
def test_random_calls_give_what_their_parts_compose_to(name: tuple[str, str], calls: int) -> None:
    rng, plain = random.Random(f"composed {name}"), a_world(name)
    seen: set[str] = set()
    for _ in range(calls):
        world = ending_at(plain, *some(rng, plain.assistant_tokenizer, 0.03))
        ids = a_prompt(rng, world.tokenizer)
        pilot_ids = a_pilot_prompt(world, ids) if rng.random() < 0.5 else a_prompt(rng, world.assistant_tokenizer)
        window, limit, budget = rng.randint(1, 5), rng.choice([1, 3, 9, 20, 40]), rng.randint(1, 30)
        limit = max(limit, window)
        threshold = 10 ** rng.uniform(-6, 0) if name in NOISE else 10 ** rng.uniform(-2, 0)
        eos = sorted({*as_ids(world.base.generation_config.eos_token_id), *some(rng, world.tokenizer, 0.02)})
        want = composed(world, ids, pilot_ids, threshold=threshold, window=window, budget=budget, limit=limit, eos=eos)
        seen.add(want.reason)
        kwargs = {
            "assistant_input_ids": pilot_ids,
            "max_new_tokens": budget,
            "eos_token_id": eos,
            "wsd_threshold": threshold,
            "wsd_window_size": window,
            "wsd_max_draft_tokens": limit,
            "wsd_chunk": rng.choice([None, 1, 2, 5, 16]),
            "wsd_speculate": rng.choice(["auto", "auto", "pilot", "ngram", False]),
        }
        for out in both(world, ids, **kwargs):
            assert out.sequences[0, ids.shape[1] :].tolist() == want.tokens
            assert out.draft_length.tolist() == [want.draft_length]
            assert out.switch_reason == [want.reason]
    assert len(seen) > calls / 4


def a_batch(rng: random.Random, tokenizer: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([a_prompt(rng, tokenizer) for _ in range(rows)], 0)


def a_call(rng: random.Random, world: World) -> dict[str, Any]:
    """Arguments of a call, for a batch of several rows."""
    rows = rng.randint(1, 6)
    ids, mask = a_batch(rng, world.tokenizer, rows)
    eos = as_ids(world.base.generation_config.eos_token_id)
    case: dict[str, Any] = {
        "ids": ids,
        "attention_mask": mask,
        "max_new_tokens": rng.randint(1, 24),
        "eos_token_id": sorted(eos | set(some(rng, world.tokenizer, rng.choice([0, 0.03])))),
        "wsd_threshold": min(1.0, 10 ** rng.uniform(-4, 0.1)),
        "wsd_window_size": rng.randint(1, 5),
        "wsd_max_draft_tokens": rng.choice([5, 9, 17, 512]),
        "wsd_chunk": rng.choice([None, 1, 2, 3, 5, 16]),
        "wsd_speculate": rng.choice(["auto", "auto", "pilot", "ngram", False]),
        "wsd_draft_end": rng.choice(["continue", "stop"]),
    }
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": min(5, case["max_new_tokens"])},
        {"logits_processor": LogitsProcessorList([Overwrites()])},
        {"switch_criteria": FiresAt(*(rng.randint(1, 9) for _ in range(rows)))},
        {"stopping_criteria": [Ends(*some(rng, world.tokenizer, 0.05))]},
        {"output_scores": True},
    ]
    if world.tokenizer is not tokenizer_of("wordpiece"):  # transformers' own criterion can't read such tokens
        options += [{"stop_strings": rng.sample(["a", "e", " ", "th", "o w", "\n", ". ", "本", "1"], 4)}]
    for option in options:
        if rng.random() < 0.2:
            case |= option
    if rng.random() < 0.5:
        case["assistant_input_ids"], case["assistant_attention_mask"] = a_batch(rng, world.assistant_tokenizer, rows)
    if rng.random() < 0.15:
        case |= {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
        for option in ("switch_criteria", "logits_processor"):  # for as many rows; infinite where a token is forbidden
            case.pop(option, None)
    return case


@pytest.mark.parametrize("calls", [3, pytest.param(7, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", NOISE + GOLDEN, ids=" ".join)
def test_random_batches_give_what_they_give_step_by_step(name: tuple[str, str], calls: int) -> None:
    rng, plain = random.Random(f"batches {name}"), a_world(name)
    for _ in range(calls):
        world = ending_at(plain, *some(rng, plain.assistant_tokenizer, rng.choice([0, 0.05])))
        both(world, **a_call(rng, world))


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_chunk_may_say_more_than_a_response_has_room_for(budget: int) -> None:
    world = noise("bytes", "gpt2")
    for seed in range(3):
        ids = a_prompt(random.Random(seed), world.tokenizer)
        both(world, ids, max_new_tokens=budget, wsd_chunk=16, wsd_threshold=1.0)
        both(world, ids, max_new_tokens=budget, wsd_chunk=16, switch_criteria=FiresAt(1))


def test_rows_may_be_proposed_unequally_many_tokens() -> None:
    world = noise("gpt2", "llama3")
    ids, mask = a_batch(random.Random(0), world.tokenizer, 4)
    fed: list[torch.Tensor] = []
    embeddings = world.base.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    try:
        decode(world, ids, attention_mask=mask, wsd_chunk=5)
    finally:
        hook.remove()
    assert all(int(tokens.min()) >= 0 and int(tokens.max()) < len(world.tokenizer) for tokens in fed)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_why_a_draft_that_fills_the_response_is_over_does_not_depend_on_the_pace(chunk: int) -> None:
    world = shipped()
    prompt = chats(1)[0]
    ids = prompt.pop("input_ids")
    for limit in range(2, 5):
        kwargs = {**prompt, "wsd_threshold": 1.0, "wsd_window_size": 1, "wsd_max_draft_tokens": limit}
        drafted = int(decode(world, ids, **kwargs, max_new_tokens=8).draft_length)
        out, _ = both(world, ids, **kwargs, max_new_tokens=drafted, wsd_chunk=chunk)
        assert out.switch_reason == ["budget"]


@pytest.mark.parametrize("name", [NOISE[0], NOISE[2], GOLDEN[1]], ids=" ".join)
def test_each_row_of_a_batch_is_what_it_is_alone(name: tuple[str, str]) -> None:
    rng, world = random.Random(f"alone {name}"), a_world(name)
    for _ in range(2):
        rows = [a_prompt(rng, world.tokenizer) for _ in range(5)]
        ids, mask = left_padded(rows, 0)
        kwargs = {
            "eos_token_id": sorted(some(rng, world.tokenizer, 0.02)),
            "pad_token_id": 0,
            "wsd_threshold": 10 ** rng.uniform(-4, -1),
            "wsd_max_draft_tokens": 9,
            "wsd_chunk": rng.choice([1, 3, 5]),
        }
        out = decode(world, ids, attention_mask=mask, **kwargs)
        for row, prompt in enumerate(rows):
            alone = decode(world, prompt, **kwargs)
            answer = alone.sequences[0, prompt.shape[1] :].tolist()
            together = out.sequences[row, ids.shape[1] :].tolist()
            assert together == answer + [0] * (len(together) - len(answer))
            assert out.draft_length[row] == alone.draft_length[0]
            assert out.switch_reason[row] == alone.switch_reason[0]


# The pilot's prompt


class Prompts:
    """What a model is fed first."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: list[list[int]] | None = None
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.rows is None:
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(kwargs["input_ids"]) if mask is None else mask
            first = mask.bool().logical_not() if mask.ndim == 2 else mask[:, 0, : kwargs["input_ids"].shape[1], 0]
            real = ~first if first.dtype == torch.bool else first < 0  # padding lies in the slot that no token may attend to
            self.rows = [row[kept].tolist() for row, kept in zip(kwargs["input_ids"], real, strict=True)]

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("name", [NOISE[0], NOISE[1], GOLDEN[0]], ids=" ".join)
def test_without_a_prompt_of_its_own_the_pilot_reads_the_text_of_the_bases(name: tuple[str, str], engine: str) -> None:
    world = a_world(name)
    rows = [a_prompt(random.Random(seed), world.tokenizer) for seed in range(3)]
    special = torch.tensor([[world.tokenizer.eos_token_id]])
    rows[1] = torch.cat([special, rows[1]], dim=1)
    ids, mask = left_padded(rows, 0)
    with Prompts(world.pilot) as prompts:
        decode(world, ids, attention_mask=mask, wsd_engine=engine, num_return_sequences=2, do_sample=True)
    want = [a_pilot_prompt(world, row)[0].tolist() for row in rows for _ in range(2)]
    assert [row[: len(text)] for row, text in zip(prompts.rows or [], want, strict=True)] == want


# Less work


def of_one_mind(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prompt of the base in the ids of the pilot that agrees with it."""
    world = agreeing()
    tokens = world.tokenizer.convert_ids_to_tokens(prompt["input_ids"][0].tolist())
    ids = world.assistant_tokenizer.convert_tokens_to_ids(tokens)
    return {"ids": prompt["input_ids"], "assistant_input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_each_prompt_is_read_once_and_what_stands_is_not_read_again(chunk: int | None) -> None:
    world, budget = shipped(), 60
    inputs = chats(5)
    ids, mask = left_padded([prompt["input_ids"] for prompt in inputs], 0)
    pilot_ids, pilot_mask = left_padded([prompt["assistant_input_ids"] for prompt in inputs], 0)
    kwargs = {"attention_mask": mask, "assistant_input_ids": pilot_ids, "assistant_attention_mask": pilot_mask}
    kwargs |= {"wsd_threshold": 0.8, "wsd_window_size": 6, "max_new_tokens": budget, "eos_token_id": None, "wsd_chunk": chunk}
    kwargs |= {"wsd_speculate": "pilot"}  # which reads what n-grams have proposed only once it proposes again
    with Watch(world.base) as watch, Watch(world.pilot) as proposing:
        out = decode(world, ids, **kwargs)
    texts = world.tokenizer.batch_decode(out.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    spoken = sum(len(world.assistant_tokenizer.encode(text)) for text in texts)
    for lengths, seen in ((mask.sum(dim=1).tolist(), watch), (pilot_mask.sum(dim=1).tolist(), proposing)):
        first, *later = seen.fed
        assert [row[:length] for row, length in zip(first, lengths, strict=True)] == [[*range(length)] for length in lengths]
        for forward in later:
            if len(forward) == len(lengths):
                assert all(min(row, default=999) >= length for row, length in zip(forward, lengths, strict=True))
            assert all(len(row) <= 8 + (chunk or 16) for row in forward)
    if chunk:  # else the pilot may be given up for a while, and has to catch up when it is tried again
        assert max(len(row) for forward in proposing.fed[1:] for row in forward) <= 8
    proposed = len(inputs) * proposing.forwards
    assert watch.tokens <= int(mask.sum()) + len(inputs) * budget + proposed
    assert proposing.tokens <= int(pilot_mask.sum()) + spoken + proposed
    assert (watch.forwards, watch.tokens) == (out.stats.base.forwards, out.stats.base.tokens)
    assert (proposing.forwards, proposing.tokens) == (out.stats.pilot.forwards, out.stats.pilot.tokens)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
@pytest.mark.parametrize("switch", [1, 4, 13, 30])
def test_a_draft_takes_a_forward_for_each_chunk_and_one_for_the_word_that_waits(chunk: int, switch: int) -> None:
    kwargs = {**of_one_mind(chats(1)[0]), "switch_criteria": FiresAt(switch), "eos_token_id": None}
    with Watch(agreeing().base) as watch:
        out = decode(agreeing(), **kwargs, max_new_tokens=switch, wsd_chunk=chunk)
    assert int(out.draft_length) == switch
    assert watch.forwards <= -(-switch // chunk) + 1 + (2 if chunk == 1 else 1)


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.sweep)])
def test_a_pilot_of_one_mind_saves_three_forwards_of_four(count: int) -> None:
    for prompt in chats(count):
        kwargs = {**of_one_mind(prompt), "switch_criteria": FiresAt(1), "eos_token_id": None, "wsd_chunk": 5}
        with Watch(agreeing().base) as watch:
            out = decode(agreeing(), **kwargs, max_new_tokens=60)
        alone = plain_tokens(agreeing().base, prompt["input_ids"], 60, eos_token_id=None)
        assert out.sequences[0, prompt["input_ids"].shape[1] :].tolist() == alone
        assert watch.forwards <= 2 + 0.25 * 59


@pytest.mark.parametrize("count", [3, pytest.param(6, marks=pytest.mark.sweep)])
def test_a_pilot_of_other_words_saves_forwards_too(count: int) -> None:
    world, forwards, written = shipped(), 0, 0
    for prompt in chats(count):
        ids = prompt.pop("input_ids")
        fast, step = both(world, ids, **prompt, wsd_threshold=0.8, wsd_window_size=6, max_new_tokens=60, wsd_chunk=4)
        forwards += fast.stats.base.forwards
        written += step.stats.base.forwards
    assert forwards <= 0.6 * written


# Sampling


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of rows say the same few things: what is known of a text is remembered."""

    def remembering(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        memory: dict[Any, Any] = {}

        def remembered(self: Any, text: Any) -> Any:
            key = id(self.tokenizer), tuple(text)
            if key not in memory:
                memory[key] = method(self, text)
            return copy.copy(memory[key])

        return remembered

    for name in ("encode", "decode", "settled"):
        monkeypatch.setattr(ContinuationTokenizer, name, remembering(getattr(ContinuationTokenizer, name)))


def letters(base_seed: int, pilot_seed: int, *loud: int) -> World:
    """Two models of the letters a to d; `<`, which says nothing, never comes up."""
    base, pilot = tiny(5, base_seed), tiny(5, pilot_seed, *loud)
    for model in (base, pilot):
        model.lm_head.bias[0] = -1e4
    pilot, assistant_tokenizer = permuted(pilot, make.letter_tokenizer(5))
    return World(wsd_hf.enable_wsd(base), pilot, make.letter_tokenizer(5), assistant_tokenizer)


def by_letter(world: World, logits: torch.Tensor) -> torch.Tensor:
    """The pilot's probabilities in the order of the base's ids."""
    return logits.float().softmax(-1)[world.assistant_tokenizer.convert_tokens_to_ids(list("<abcd"))]


SAMPLING: dict[str, dict[str, Any]] = {
    "a long chunk": {"wsd_chunk": 5},
    "warped and penalised, with a greedy pilot": {
        "temperature": 0.7,
        "repetition_penalty": 1.4,
        "assistant_do_sample": False,
    },
    "without speculation": {"wsd_speculate": False},
}


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("sampling", "pilot_seed", "draws"),
    [
        ("warped and penalised, with a greedy pilot", 7, 3_000),
        pytest.param("warped and penalised, with a greedy pilot", 7, 10_000, marks=pytest.mark.sweep),
        pytest.param("a long chunk", 7, 10_000, marks=pytest.mark.sweep),
        pytest.param("a long chunk", 0, 10_000, marks=pytest.mark.sweep),
        pytest.param("without speculation", 7, 10_000, marks=pytest.mark.sweep),
    ],
)
def test_thousands_of_continuations_are_distributed_as_the_bases(sampling: str, pilot_seed: int, draws: int) -> None:
    options = {"do_sample": True, "top_k": 0, "wsd_chunk": 2, **SAMPLING[sampling]}
    world, prompt = letters(0, pilot_seed), torch.tensor([[1, 3]])
    kwargs = {"max_new_tokens": 3, "switch_criteria": FiresAt(1), "num_return_sequences": draws, "pad_token_id": 0}
    torch.manual_seed(0)
    drawn = decode(world, prompt, **options, **kwargs).sequences[:, 2:]
    with torch.no_grad():
        logits = world.pilot(a_pilot_prompt(world, prompt)).logits[0, -1] / options.get("temperature", 1.0)
    first = by_letter(world, logits)
    if options.get("assistant_do_sample") is False:
        first = torch.nn.functional.one_hot(first.argmax(), 5).float()
    want = exact(world.base, first, 3, 5, **options)
    cells = (drawn * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want) > 1e-3


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("draws", [3_000, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_an_eos_that_a_pilot_draws_tells_the_base_nothing(draws: int) -> None:
    world, prompt = letters(0, 7, 4), torch.tensor([[1, 3]])
    world.pilot.generation_config.eos_token_id = world.assistant_tokenizer.convert_tokens_to_ids("d")
    kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": draws, "max_new_tokens": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    drawn = decode(world, prompt, switch_criteria=FiresAt(1), **kwargs).sequences[:, 2:]
    with torch.no_grad():
        drafted = by_letter(world, world.pilot(a_pilot_prompt(world, prompt)).logits[0, -1])
        own = world.base(prompt).logits[0, -1].float().softmax(-1)
    ended = float(drafted[4])
    assert ended > 0.1
    drafted[4] = 0.0
    want = exact(world.base, drafted + ended * own, 3, 5)
    cells = (drawn * torch.tensor([25, 5, 1])).sum(dim=1).bincount(minlength=125)
    assert chi_squared(cells, draws * want) > 1e-3


@pytest.mark.parametrize("assistant_do_sample", [None, False])
def test_a_seed_repeats_sampling(assistant_do_sample: bool | None) -> None:
    prompt = chats(1)[0]
    ids = prompt.pop("input_ids")

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        kwargs = {"do_sample": True, "temperature": 1.5, "assistant_do_sample": assistant_do_sample, "num_return_sequences": 3}
        return decode(shipped(), ids, **prompt, **kwargs, switch_criteria=FiresAt(4), max_new_tokens=24).sequences.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


# Streaming


@pytest.mark.parametrize("chunk", [None, 1, 16])
def test_what_is_streamed_is_what_is_returned(chunk: int | None) -> None:
    world = noise("llama3", "mistral")
    ids, mask = a_batch(random.Random(5), world.tokenizer, 4)
    streamer, reference = Recorder(), Recorder()
    kwargs = {"attention_mask": mask, "eos_token_id": some(random.Random(5), world.tokenizer, 0.05), "wsd_chunk": chunk}
    out = decode(world, ids, streamer=streamer, **kwargs)
    decode(world, ids, streamer=reference, **kwargs, wsd_engine="step")
    assert torch.equal(torch.cat([streamer.puts[0], torch.stack(streamer.puts[1:], dim=1)], dim=1), out.sequences)
    assert [put.tolist() for put in streamer.puts] == [put.tolist() for put in reference.puts]
    assert streamer.ends == 1


@pytest.mark.parametrize("role", ["base", "pilot"])
def test_what_is_streamed_is_never_taken_back(role: str) -> None:
    world = shipped()
    prompt = chats(1)[0]
    ids = prompt.pop("input_ids")
    want = decode(world, ids, **prompt, max_new_tokens=30).sequences[0].tolist()
    for at in range(1, 9):
        streamer = Recorder()
        with failing(getattr(world, role), at, PilotBroke()), pytest.raises(PilotBroke):
            decode(world, ids, **prompt, streamer=streamer, max_new_tokens=30)
        streamed = [token for put in streamer.puts for token in put.flatten().tolist()]
        assert streamed == want[: len(streamed)]
        assert streamer.ends == 1


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_streamer_that_raises_ends_generation_with_its_exception(at: int) -> None:
    streamer, world = Recorder(fails_at=at), noise("gpt2", "llama3")
    with pytest.raises(BrokenPipeError, match="reader has gone"):
        decode(world, a_prompt(random.Random(0), world.tokenizer), streamer=streamer)
    assert (len(streamer.puts), streamer.ends) == (at, 1)


# Faults, repetition, threads


@pytest.mark.parametrize("engine", ["fast", "step"])
@pytest.mark.parametrize("role", ["base", "pilot"])
def test_an_error_at_any_forward_comes_through_and_leaves_nothing_changed(role: str, engine: str) -> None:
    world = noise("gpt2", "llama3")
    ids, kwargs = a_prompt(random.Random(0), world.tokenizer), {"max_new_tokens": 10, "wsd_engine": engine, "wsd_chunk": 1}
    want = decode(world, ids, **kwargs)
    before = state(world.base), state(world.pilot)
    forwards = want.stats.base.forwards if role == "base" else want.stats.pilot.forwards
    assert forwards >= 3
    errors = itertools.cycle([PilotBroke(), KeyboardInterrupt(), torch.OutOfMemoryError()])
    for at, error in zip(range(1, forwards + 1), errors, strict=False):
        with failing(getattr(world, role), at, error), pytest.raises(type(error)) as caught:
            decode(world, ids, **kwargs)
        assert caught.value is error
        assert (state(world.base), state(world.pilot)) == before
        assert torch.equal(decode(world, ids, **kwargs).sequences, want.sequences)


def test_a_greedy_call_is_repeated_to_the_bit_and_draws_nothing() -> None:
    world = noise("gpt2", "llama3")
    ids, before = a_prompt(random.Random(0), world.tokenizer), torch.random.get_rng_state()
    first = decode(world, ids)
    for _ in range(20):
        again = decode(world, ids)
        assert torch.equal(again.sequences, first.sequences)
        assert torch.equal(again.draft_log_probs, first.draft_log_probs)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_eight_threads_on_one_pair_equal_serial_calls() -> None:
    world = noise("mistral", "words across spaces")

    def task(index: int) -> Callable[[], Any]:
        ids = a_prompt(random.Random(index), world.tokenizer)

        def run() -> Any:
            kwargs = {"wsd_threshold": 10 ** -(index % 4), "wsd_chunk": 1 + index % 5, "max_new_tokens": 8}
            out = decode(world, ids, **kwargs)
            return out.sequences.tolist(), out.draft_length.tolist(), out.switch_reason, out.stats

        return run

    tasks = [task(index) for index in range(8)]
    serial = [run() for run in tasks]
    for _ in range(2):
        assert together(tasks) == serial


# Edges


def loud(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """The model with one word to say."""
    model = copy.deepcopy(model)
    bias = torch.zeros(model.config.vocab_size, dtype=model.dtype)
    bias[token] = 1e4
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def test_of_an_empty_draft_the_base_knows_nothing() -> None:
    world = noise("gpt2", "llama3")
    world = world._replace(pilot=loud(world.pilot, world.assistant_tokenizer.eos_token_id))
    ids = a_prompt(random.Random(0), world.tokenizer)
    for out in both(world, ids):
        assert out.sequences[0, ids.shape[1] :].tolist() == plain_tokens(world.base, ids, 14)
        assert (out.draft_length.tolist(), out.switch_reason) == ([0], ["draft_ended"])


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_draft_of_special_tokens_says_nothing(chunk: int) -> None:
    world = noise("gpt2", "llama2")
    unknown = world.assistant_tokenizer.convert_tokens_to_ids("<unk>")
    world = world._replace(pilot=loud(world.pilot, unknown))
    ids = a_prompt(random.Random(0), world.tokenizer)
    for out in both(world, ids, wsd_max_draft_tokens=7, wsd_chunk=chunk):
        assert out.sequences[0, ids.shape[1] :].tolist() == plain_tokens(world.base, ids, 14)
        assert (out.draft_length.tolist(), out.switch_reason) == ([0], ["draft_limit"])


@pytest.mark.parametrize("draft_end", ["continue", "stop"])
def test_a_draft_that_spells_an_end_of_the_base_ends_before_it(draft_end: str) -> None:
    world = noise("gpt2", "llama3")
    ids = a_prompt(random.Random(3), world.tokenizer)
    drafted = decode(world, ids, wsd_threshold=1.0).sequences[0, ids.shape[1] :].tolist()
    place = next(place for place in range(2, 12) if drafted[place] not in drafted[:place])
    for out in both(world, ids, wsd_threshold=1.0, eos_token_id=drafted[place], wsd_draft_end=draft_end):
        assert (out.draft_length.tolist(), out.switch_reason) == ([place], ["draft_ended"])
        if draft_end == "stop":
            assert out.sequences[0, ids.shape[1] :].tolist() == drafted[: place + 1]


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pilots_context_may_end_before_the_response(family: str, chunk: int) -> None:
    world = noise("gpt2", "llama3")
    size = {"n_positions" if family == "gpt2" else "max_position_embeddings": 24}
    pilot = copy.deepcopy(tiny_model(family, seed=3, vocab_size=len(world.assistant_tokenizer), **size)).double()
    pilot.generation_config.eos_token_id = world.assistant_tokenizer.eos_token_id
    rows = [torch.tensor([world.tokenizer.encode(text)]) for text in ("The quick brown fox", "Hello hello")]
    ids, mask = left_padded(rows, 0)
    kwargs = {"max_new_tokens": 40, "wsd_threshold": 1.0, "wsd_chunk": chunk, "wsd_window_size": 1}
    out, _ = both(world._replace(pilot=pilot), ids, attention_mask=mask, **kwargs)
    for row, prompt in enumerate(rows):
        pilot_ids = a_pilot_prompt(world, prompt)
        limits = {"budget": 40, "limit": 24 - pilot_ids.shape[1]}
        want = composed(world._replace(pilot=pilot), prompt, pilot_ids, threshold=1.0, window=1, **limits)
        assert out.sequences[row, ids.shape[1] :].tolist() == want.tokens
        assert (int(out.draft_length[row]), out.switch_reason[row]) == (want.draft_length, want.reason)


def test_a_pilots_prompt_that_is_not_in_its_own_ids_is_refused() -> None:
    world = noise("gpt2", "llama3")
    prompt = torch.tensor([[5, len(world.assistant_tokenizer)]])
    with pytest.raises(
        wsd_hf.WSDValueError, match=r"assistant_input_ids contains token id \d+, but the vocabulary of assistant_model"
    ):
        decode(world, torch.tensor([[5]]), assistant_input_ids=prompt)


def test_a_prompt_that_says_nothing_to_the_pilot_is_refused_by_name() -> None:
    world = noise("gpt2", "llama3")
    with pytest.raises(wsd_hf.WSDValueError, match=r"the text of input_ids has an empty prompt"):
        decode(world, torch.tensor([[world.tokenizer.eos_token_id]]))


def test_the_pilot_reads_the_prompt_as_it_stands() -> None:
    world = noise("unigram", "llama3")
    tidy = copy.deepcopy(world.tokenizer)
    tidy.clean_up_tokenization_spaces = True
    ids = torch.tensor([tidy.encode("word , word .", add_special_tokens=False)])
    with Prompts(world.pilot) as prompts:
        decode(world._replace(tokenizer=tidy), ids, wsd_engine="step")
    assert prompts.rows == [world.assistant_tokenizer.encode("word , word .")]


@pytest.mark.parametrize("name", [NOISE[0], NOISE[1], GOLDEN[0]], ids=" ".join)
def test_the_processor_alone_gives_the_sequences_of_the_strategy(name: tuple[str, str]) -> None:
    rng, world = random.Random(f"processor {name}"), a_world(name)
    for _ in range(3):
        ids, mask = a_batch(rng, world.tokenizer, 3)
        config = wsd_hf.WSDConfig(threshold=10 ** rng.uniform(-4, -1), window_size=2)
        processor = wsd_hf.WSDLogitsProcessor(world.pilot, config, **world.tokenizers)
        kwargs = {"attention_mask": mask, "max_new_tokens": 14}
        alone = world.base.generate(ids, logits_processor=[processor], **kwargs)
        settings = {"wsd_threshold": config.threshold, "wsd_window_size": config.window_size}
        assert alone.tolist() == decode(world, ids, **kwargs, **settings).sequences.tolist()
