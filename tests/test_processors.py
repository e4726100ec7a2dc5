"""Processors and criteria: every class of transformers, called in and out of order; and what each strategy serves."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import ConfidenceCriteria

import wsd_hf
from every_strategy import CASES, Case, counting, each, every_case
from families import VOCABULARY, tiny_model
from oracle import left_padded, ones, plain_tokens, random_prompt
from tokenizers_for_tests import letter_tokenizer
from wsd_hf.engine.cancelled import Cancelled
from wsd_hf.engine.supported import PREFIX_ONLY, unsupported_items
from wsd_hf.text.stop_strings import StopStrings

ROWS, PROMPT, STEPS = 4, 5, 5

# The audit

DEFINITION = re.compile(r"^class \w+\([^)]*(?:LogitsProcessor|Criteria)\b", re.MULTILINE)


@functools.cache
def classes() -> dict[str, type]:
    """Every processor and criterion in the installed transformers, and ours, by name."""
    root = Path(transformers.__file__).parent
    for file in sorted([*root.glob("generation/*.py"), *root.glob("models/*/*.py")]):
        if DEFINITION.search(file.read_text("utf-8")):
            importlib.import_module(".".join(["transformers", *file.relative_to(root).with_suffix("").parts]))

    def below(kind: type) -> list[type]:
        return [kind, *(deeper for sub in kind.__subclasses__() for deeper in below(sub))]

    found = {*below(LogitsProcessor), *below(StoppingCriteria)} - {LogitsProcessor, StoppingCriteria}
    ours = {"Cancelled": Cancelled, "StopStrings": StopStrings}
    return {kind.__name__: kind for kind in found if kind.__module__.startswith("transformers.")} | ours


def remembering() -> Any:
    """A function of the caller's that is another one in every call."""
    return lambda row, prefix, calls=itertools.count(): [3 + next(calls) % 50, 7]  # noqa: B008


WHISPER = GenerationConfig(no_timestamps_token_id=40, eos_token_id=39, bos_token_id=39, max_initial_timestamp_index=10)
HIGGS = {"audio_bos_token_id": 60, "audio_eos_token_id": 61, "audio_stream_bos_id": 5, "audio_stream_eos_id": 6}
IDS = torch.randint(3, 20, (ROWS, PROMPT), generator=torch.Generator().manual_seed(3))

CANCELLED = [threading.Event() for _ in range(ROWS)]
CANCELLED[1].set()

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AlternatingCodebooksLogitsProcessor": {"input_start_len": PROMPT, "semantic_vocab_size": 20, "codebook_size": 30},
    "BarkEosPrioritizerLogitsProcessor": {"eos_token_id": 1, "min_eos_p": 0.02},
    "Cancelled": {"events": CANCELLED},
    "ClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.5},
    "ConfidenceCriteria": {"assistant_confidence_threshold": 0.02},
    "DiaClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.5},
    "DiaEOSChannelFilterLogitsProcessor": {"num_channels": 2, "eos_token_id": 30},
    "DiaEOSDelayPatternLogitsProcessor": {"delay_pattern": [0, 2], "eos_token_id": 30, "max_generation_len": 10},
    "EncoderExhaustedCriteria": {"model": type("", (), {"_encoder_finished": None})},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_ngram_size": 2, "encoder_input_ids": IDS},
    "EncoderRepetitionPenaltyLogitsProcessor": {"penalty": 1.5, "encoder_input_ids": IDS},
    "EosTokenCriteria": {"eos_token_id": [4, 5, 6]},
    "EpsilonLogitsWarper": {"epsilon": 0.02},
    "EtaLogitsWarper": {"epsilon": 0.02},
    "ExponentialDecayLengthPenalty": {
        "exponential_decay_length_penalty": (1, 1.5),
        "eos_token_id": 1,
        "input_ids_seq_length": PROMPT,
    },
    "ForcedBOSTokenLogitsProcessor": {"bos_token_id": 5},
    "ForcedEOSTokenLogitsProcessor": {"max_length": PROMPT + 3, "eos_token_id": 1},
    "HiggsAudioV2DelayPatternLogitsProcessor": {"delay_pattern": [0, 1], **HIGGS, "num_codebooks": 2, "codebook_size": 32},
    "InfNanRemoveLogitsProcessor": {},
    "LinearTemperatureScheduleLogitsProcessor": {"t_min": 0.5, "t_max": 1.0, "max_denoising_steps": 5},
    "LogitNormalization": {},
    "MaxLengthCriteria": {"max_length": PROMPT + 2},
    "MaxTimeCriteria": {"max_time": 1e9},
    "MinLengthLogitsProcessor": {"min_length": PROMPT + 2, "eos_token_id": 1},
    "MinNewTokensLengthLogitsProcessor": {"prompt_length_to_skip": PROMPT, "min_new_tokens": 2, "eos_token_id": 1},
    "MinPLogitsWarper": {"min_p": 0.1},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[4], [5, 6]], "eos_token_id": 1},
    "NoRepeatNGramLogitsProcessor": {"ngram_size": 2},
    "PocketTTSEosThresholdCriteria": {"eos_threshold": 0.0, "frames_after_eos": 2},
    "PrefixConstrainedLogitsProcessor": {"num_beams": 1},
    "RepetitionPenaltyLogitsProcessor": {"penalty": 1.5},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[4], 2.0], [[5, 6], 3.0]]},
    "StopStrings": {"tokenizer": letter_tokenizer(VOCABULARY), "stop_strings": ["g", "de"]},
    "StopStringCriteria": {"tokenizer": letter_tokenizer(VOCABULARY), "stop_strings": ["g", "de"]},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [4, 5], "begin_index": PROMPT + 1},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [4, 5]},
    "SynthIDTextWatermarkLogitsProcessor": {
        "ngram_len": 3,
        "keys": [1, 2, 3],
        "sampling_table_size": 64,
        "sampling_table_seed": 0,
        "context_history_size": 16,
        "device": torch.device("cpu"),
    },
    "TemperatureLogitsWarper": {"temperature": 0.7},
    "TopHLogitsWarper": {"top_h": 0.5},
    "TopKLogitsWarper": {"top_k": 9},
    "TopPLogitsWarper": {"top_p": 0.7},
    "TypicalLogitsWarper": {"mass": 0.7},
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.5, "model": tiny_model("llama")},
    "UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor": {"ngram_size": 2, "window_size": 4},
    "VibeVoiceTokenConstraintProcessor": {"valid_token_ids": [4, 5], "vocab_size": VOCABULARY},
    "WatermarkLogitsProcessor": {"vocab_size": VOCABULARY, "device": "cpu", "seeding_scheme": "selfhash", "context_width": 2},
    "WhisperNoSpeechDetection": {"no_speech_token": 5, "begin_index": 1},
    "WhisperTimeStampLogitsProcessor": {"generate_config": WHISPER, "begin_index": PROMPT},
}
"""What each is made with, such that it changes something in the calls below."""

FRESH: dict[str, Any] = {
    "PrefixConstrainedLogitsProcessor": lambda: {"prefix_allowed_tokens_fn": remembering()},
}
"""Arguments that one object may not share with another."""


def make(name: str) -> Any:
    return classes()[name](**ARGUMENTS[name], **FRESH.get(name, dict)())


def shown(item: Any, step: int, spoilt: list[int] | None = None) -> torch.Tensor:
    """The answer for a batch whose rows have grown by `step` tokens; some of them, `spoilt`, have grown otherwise."""
    random = torch.Generator().manual_seed(11)
    tokens = torch.cat([IDS, torch.randint(3, 20, (ROWS, STEPS), generator=random)], dim=1)[:, : PROMPT + step].clone()
    logits = 2 * torch.randn(STEPS, ROWS, VOCABULARY, generator=random)[step]
    for row in spoilt or []:
        tokens[row], logits[row] = tokens[row].flip(0) + 20, -logits[row]
    answer = item(tokens, logits.clone() if isinstance(item, LogitsProcessor) else None)
    assert isinstance(answer, torch.Tensor)
    assert len(answer) == ROWS
    return answer


def depends_on_prefix_only(name: str) -> bool:
    """What a class is, going by its answers: in order, and then in another order, twice, with other rows beside them."""
    try:
        item = make(name)
        in_order = [shown(item, step) for step in range(STEPS)]
        item = make(name)
        for step, spoilt in [(2, []), (4, [0, 2]), (0, []), (4, [1, 3]), (4, []), (1, [1]), (2, [2]), (2, []), (3, [0, 1, 2])]:
            rows = [row for row in range(ROWS) if row not in spoilt]
            if not torch.equal(shown(item, step, spoilt)[rows], in_order[step][rows]):
                return False
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # what cannot be called as a language model's loop calls it
    return True


def test_every_class_of_transformers_is_what_it_is_taken_for(tried: Any) -> None:
    if unknown := set(classes()) - set(ARGUMENTS):
        pytest.fail(f"new in transformers {transformers.__version__}: give them a line in ARGUMENTS: {sorted(unknown)}")
    found = set()
    for name in classes():
        make(name)
        found |= {name} if depends_on_prefix_only(name) else set()
        tried("processors and criteria of transformers, audited")
    exported = {name for name in found if hasattr(transformers, name)} | {"Cancelled", "StopStrings"}
    assert {kind.__name__ for kind in PREFIX_ONLY} == exported
    caller = {"PrefixConstrainedLogitsProcessor"}
    refused = {name for name in classes() if unsupported_items([make(name)])}
    assert refused == set(classes()) - exported - caller
    assert "StopStrings" in found
    assert {"SynthIDTextWatermarkLogitsProcessor", "ConfidenceCriteria"} <= refused - found


@pytest.mark.parametrize("name", sorted(kind.__name__ for kind in PREFIX_ONLY))
def test_what_the_audit_calls_is_in_effect(name: str) -> None:
    """A processor that changed nothing would pass for anything."""
    item, never = make(name), {"ForcedBOSTokenLogitsProcessor", "MaxTimeCriteria"}
    random = torch.Generator().manual_seed(11)
    torch.randint(3, 20, (ROWS, STEPS), generator=random)
    logits = 2 * torch.randn(STEPS, ROWS, VOCABULARY, generator=random)
    if issubclass(classes()[name], LogitsProcessor):
        logits[:, 0, 0] = torch.nan if name == "InfNanRemoveLogitsProcessor" else 0.0
        changed = any(not torch.equal(item(IDS, logits[step].clone()), logits[step]) for step in range(STEPS))
        changed |= any(not torch.equal(shown(item, step), logits[step]) for step in range(STEPS))
    else:
        changed = any(bool(shown(item, step).any()) for step in range(STEPS))
    assert changed or name in never


# Those that keep a state


class Cycling(LogitsProcessor):
    """Of the caller's own: every call forbids other tokens, and so does what is made from it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 4 :: 4] = -torch.inf
        return scores


class CyclingNGrams(NoRepeatNGramLogitsProcessor):
    """Derived from a class that keeps nothing."""

    def __init__(self) -> None:
        super().__init__(2)
        self.cycling = Cycling()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.cycling(input_ids, super().__call__(input_ids, scores))


class CyclingTemperature(transformers.TemperatureLogitsWarper):
    """Derived from a warper."""

    def __init__(self) -> None:
        super().__init__(0.7)
        self.cycling = Cycling()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids is not None
        return self.cycling(input_ids, super().__call__(input_ids, scores))


class EveryFifthCall(StoppingCriteria):
    """A criterion that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 5)


def synth_id() -> Any:
    return SynthIDTextWatermarkLogitsProcessor(3, [1, 2, 3], 64, 0, 16, torch.device("cpu"))


def guidance() -> Any:
    return UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, copy.deepcopy(tiny_model("llama")).double(), random_prompt(5, 3))


def derived() -> Any:
    return type("Mine", (SynthIDTextWatermarkLogitsProcessor,), {})(3, [1, 2, 3], 64, 0, 16, torch.device("cpu"))


OF_TRANSFORMERS = {"synth id": synth_id, "guidance": guidance, "derived": derived}
OF_THE_CALLER = {"cycling": Cycling, "n-grams": CyclingNGrams, "temperature": CyclingTemperature}


def of(way: str) -> Case:
    return next(case for case in CASES if case.way == way and case.vocabularies == "one")


STEPWISE = [case for case in CASES if case.engine == "step" and case.vocabularies == "one"]


@each(STEPWISE)
@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, *OF_THE_CALLER])
def test_a_processor_that_keeps_a_state_gives_the_same_on_the_engine_that_is_chosen(case: Case, name: str, tried: Any) -> None:
    maker = (OF_TRANSFORMERS | OF_THE_CALLER)[name]
    if case.is_target and name == "guidance":
        return  # refused, since it would run the base alone
    for seed in range(3):
        ids = random_prompt(seed, 4)
        auto, step = (
            case.generate(ids, logits_processor=LogitsProcessorList([maker()]), **{case.keyword("engine"): engine})
            for engine in ("auto", "step")
        )
        assert auto.sequences.tolist() == step.sequences.tolist()
        assert auto.stats == step.stats
        tried("calls with a processor that keeps state")


@each(STEPWISE)
def test_a_criterion_that_keeps_a_state_goes_step_by_step(case: Case) -> None:
    out = case.generate(random_prompt(0, 4), stopping_criteria=[EveryFifthCall()], **{case.keyword("engine"): "auto"})
    assert out.sequences.shape[1] == 4 + 5


def refused_by_name(case: Case, item: Any) -> None:
    kwargs = {"logits_processor": LogitsProcessorList([item])}
    if isinstance(item, StoppingCriteria):
        kwargs = {"stopping_criteria": [item]}
    with counting(case.world.base) as base, counting(case.world.pilot) as pilot:
        with pytest.raises(wsd_hf.WSDValueError, match=type(item).__name__):
            case.generate(case.prompt(0), **kwargs)
        assert not base + pilot


@every_case
@pytest.mark.parametrize("name", [*OF_TRANSFORMERS, "confidence"])
def test_those_of_transformers_are_refused_where_calls_are_out_of_order(case: Case, name: str) -> None:
    if case.engine != "step" and not (case.is_target and name == "guidance"):
        refused_by_name(case, {**OF_TRANSFORMERS, "confidence": lambda: ConfidenceCriteria(0.0)}[name]())


@each(case for case in CASES if case.is_target)
def test_guidance_is_refused_where_it_would_run_the_base_alone(case: Case) -> None:
    for item in (guidance(), type("Mine", (UnbatchedClassifierFreeGuidanceLogitsProcessor,), {})(1.5, tiny_model("llama"))):
        with counting(case.world.base) as runs, pytest.raises(wsd_hf.WSDValueError, match="guidance_scale is not supported"):
            case.generate(case.prompt(0), logits_processor=[item])
        assert not runs


# The caller's own, which depend on the prefix alone


def by_prefix(row: int, prefix: torch.Tensor) -> list[int]:
    """Tokens allowed in a row after a prefix."""
    return [3 + (7 * row + 3 * len(prefix) + int(prefix[-1])) % 60, 4 + row, 9]


@each(case for case in CASES if case.vocabularies == "one" and case.engine != "step")
def test_a_function_of_the_callers_is_shown_each_row_in_its_place(case: Case) -> None:
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], 0)
    kwargs = {"prefix_allowed_tokens_fn": by_prefix, "eos_token_id": None, **case.by_the_base}
    out = case.generate(ids, attention_mask=mask, **kwargs).sequences
    for row, sequence in enumerate(out):
        for end in range(ids.shape[1] + case.switches, len(sequence)):  # the first token of a draft is the pilot's
            assert int(sequence[end]) in by_prefix(row, sequence[:end])


@pytest.mark.parametrize("copies", [1, 2])
def test_the_search_serves_processors_that_hold_something_of_each_row(copies: int) -> None:
    ids, mask = left_padded([random_prompt(seed, 6 + seed) for seed in range(2)], 0)
    out = of("search").generate(
        ids, attention_mask=mask, encoder_no_repeat_ngram_size=1, eos_token_id=None, num_return_sequences=copies
    )
    for row, sequence in enumerate(out.sequences):
        prompt = ids[row // copies].tolist()
        assert not set(sequence[ids.shape[1] :].tolist()) & set(prompt)
    assert len(out.sequences) == 2 * copies


# Criteria that read scores


class Confident(StoppingCriteria):
    """Ends a row whose last token was chosen with a large score; remembers what it was shown."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.shown: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.shown.append(scores)
        if scores is None:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        assert isinstance(scores, tuple)
        assert len(scores) > 0
        return scores[-1].gather(1, input_ids[:, -1:]).squeeze(1) > self.limit


@pytest.mark.parametrize("engine", ["fast", "step", "auto"])
def test_a_criterion_is_shown_the_scores_that_are_kept(engine: str) -> None:
    case = of("wsd fast")
    ids, mask = left_padded([random_prompt(seed, 3 + seed) for seed in range(3)], 0)
    recorded = {
        "output_scores": True,
        "attention_mask": mask,
        "eos_token_id": None,
        "wsd_threshold": 0.02,
    }
    free = case.generate(ids, **recorded, wsd_engine=engine)
    answers = free.sequences[:, ids.shape[1] :]
    chosen = torch.stack([scores.gather(1, answers[:, at, None])[:, 0] for at, scores in enumerate(free.scores)])
    limit = float(chosen[chosen != 0].median())  # a drafted token's score is 0
    assert limit > 0
    criterion = Confident(limit)
    out = case.generate(ids, **recorded, wsd_engine=engine, stopping_criteria=[criterion], pad_token_id=0)
    lengths = []
    for row in range(3):
        ends = (chosen[:, row] > limit).nonzero().flatten().tolist()
        lengths.append(1 + ends[0] if ends else len(chosen))
        assert out.sequences[row, ids.shape[1] :][: lengths[row]].tolist() == answers[row, : lengths[row]].tolist()
    assert out.sequences.shape[1] - ids.shape[1] == max(lengths) > min(lengths)
    assert all(isinstance(scores, tuple) for scores in criterion.shown)


@every_case
def test_a_criterion_is_shown_none_where_no_scores_are_kept_as_in_plain_generate(case: Case) -> None:
    criterion = Confident(1e9)
    case.generate(case.prompt(0), stopping_criteria=[criterion])
    assert {*criterion.shown} == {None}


@each(STEPWISE)
def test_the_confidence_of_transformers_goes_step_by_step(case: Case) -> None:
    ids, settings = random_prompt(0, 4), {"output_scores": True, "stopping_criteria": [ConfidenceCriteria(0.3)]}
    auto, step = (case.generate(ids, **settings, **{case.keyword("engine"): engine}) for engine in ("auto", "step"))
    assert auto.sequences.tolist() == step.sequences.tolist()
    assert auto.stats == step.stats


@each(case for case in CASES if case.engine == "fast" and case.vocabularies == "one")
def test_scores_of_a_call_that_returns_tokens_alone_cost_nothing(case: Case) -> None:
    ids = random_prompt(0, 4)
    tokens = case.generate(ids, output_scores=True, return_dict_in_generate=False)
    assert torch.equal(tokens, case.generate(ids).sequences)


def test_plain_generate_serves_them_all_as_before() -> None:
    base, ids = of("wsd step").world.base, random_prompt(0, 4)
    want = plain_tokens(base, ids, 6)
    assert want == base.generate(ids, attention_mask=ones(ids), max_new_tokens=6)[0, 4:].tolist()
    assert PrefixConstrainedLogitsProcessor not in PREFIX_ONLY
