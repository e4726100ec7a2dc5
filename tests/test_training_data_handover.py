"""Handovers of given answers: those of `generate` for a pilot that drafts exactly the answer."""

from __future__ import annotations

import copy
import functools
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_world"))
from world import OPENINGS, TONES, World, answer

from scripted import ScriptedModel, scripted_model
from wsd_hf import (
    AgreementCriteria,
    EntropyCriteria,
    Pair,
    RelativeConfidenceCriteria,
    SwitchCriteria,
    WSDConfig,
    WSDLogitsError,
    WSDValueError,
)
from wsd_hf.text.settled_tokens import ContinuationTokenizer
from wsd_hf.tiny import demo_questions
from wsd_hf.training.examples import Example, read_examples
from wsd_hf.training.handover import handovers

PILOTS = ("pilot", "pilot_other_vocab")
POSITIONS = 512

RULES = {
    "confidence": SwitchCriteria(),
    "confidence, threshold 0.5, window 3": SwitchCriteria(0.5, 3),
    "confidence, repeats ignored": SwitchCriteria(0.4, 2, ignore_repeats=True),
    "relative_confidence": RelativeConfidenceCriteria(),
    "entropy": EntropyCriteria(),
    "agreement": AgreementCriteria(0.7, 4),
}
WORLD = World(3)
PAIRS = read_examples("tiny_world")


@functools.cache
def pair(pilot: str) -> Pair:
    return Pair.tiny(pilot)


@functools.cache
def parrot(pilot: str) -> ScriptedModel:
    """A pilot that writes what `speak` has taught it."""
    size = pair(pilot).pilot.config.vocab_size
    model = scripted_model(vocab_size=3, max_position_embeddings=POSITIONS)
    model.config.vocab_size = size
    model.before = torch.nn.Parameter(torch.zeros(size, size), requires_grad=False)
    model.generation_config = pair(pilot).pilot.generation_config
    return model


def speak(pilot: str, prompt: int, tokens: list[int]) -> ScriptedModel:
    """The parrot, which writes these tokens after a prompt of that length, and then its EOS."""
    model = parrot(pilot)
    size, end = model.config.vocab_size, model.generation_config.eos_token_id
    logits = torch.zeros(POSITIONS, size)
    logits[torch.arange(len(tokens) + 1) + prompt - 1, torch.tensor([*tokens, end])] = 100.0
    model.table = torch.nn.Parameter(logits[:, None].expand(-1, size, -1), requires_grad=False)
    return model


def generated(pilot: str, example: Example, rule: Any, max_draft_tokens: int = 512) -> Any:
    """Output of `generate` for a pilot that drafts exactly the chosen answer."""
    own = pair(pilot)
    inputs = own.inputs(example.messages)
    inputs.pop("stopping_criteria", None)
    tokens = ContinuationTokenizer(own.pilot_tokenizer).encode(example.chosen)
    speaker = speak(pilot, inputs["assistant_input_ids"].shape[1], tokens)
    both = Pair(own.base, speaker, own.tokenizer, own.pilot_tokenizer)
    config = WSDConfig(switch_criteria=rule, max_draft_tokens=max_draft_tokens)
    room = 2 + len(ContinuationTokenizer(own.tokenizer).encode(example.chosen))
    return both.generate(inputs, config, max_new_tokens=room, do_sample=False)


def agree(pilot: str, example: Example, rule: Any, max_draft_tokens: int = 512) -> None:
    output = generated(pilot, example, rule, max_draft_tokens)
    [found] = handovers(pair(pilot), [example], rule, max_draft_tokens=max_draft_tokens)
    assert output.switch_reason[0] in ("confident", "draft_ended", "draft_limit")
    assert found.tokens == (int(output.switch_index[0]) if output.switch_reason[0] == "confident" else None)
    drafted = output.sequences[0, output.prompt_length :][: int(output.draft_length[0])]
    text = pair(pilot).tokenizer.decode(drafted, skip_special_tokens=True)
    whole = text.rstrip("\ufffd")
    if "</s>" in example.chosen and whole and not example.chosen.startswith(whole):  # the pilot drafts a token without text
        whole = text = example.chosen
    assert example.chosen.startswith(whole)
    assert found.characters == (len(text) if example.chosen.startswith(text) else len(whole) + 1)


def asked(chosen: str, number: int = 0) -> Example:
    return Example(messages=demo_questions()[number]["messages"], chosen=chosen, place="here")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pilot", PILOTS)
def test_handovers_of_answers_in_every_tone_are_those_of_generate(pilot: str, rule: str) -> None:
    rng = random.Random(rule)
    for number, tone in enumerate(TONES):
        fact = rng.choice(WORLD.facts)
        chosen = answer(rng, tone, fact if number % 2 else None, rng.choice(OPENINGS))
        agree(pilot, Example(messages=[{"role": "user", "content": fact.question(0)}], chosen=chosen), RULES[rule])


@pytest.mark.parametrize("pilot", PILOTS)
def test_the_pilots_own_drafts_are_handed_over_where_generate_switches(pilot: str) -> None:
    own, examples, switches = pair(pilot), [], []
    for question in demo_questions():
        inputs = own.inputs(question["messages"])
        output = own.generate(inputs, max_new_tokens=64, do_sample=False)
        prompt = inputs["assistant_input_ids"]
        draft = own.pilot.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :]
        text = own.pilot_tokenizer.decode(draft, skip_special_tokens=True)
        examples.append(Example(messages=question["messages"], chosen=text))
        switches.append(int(output.switch_index[0]))
    found = handovers(own, examples, SwitchCriteria(), batch_size=5)
    assert [handover.tokens for handover in found] == switches
    assert len(set(switches)) > 1


@pytest.mark.parametrize("pilot", PILOTS)
@settings(max_examples=25)
@given(
    chosen=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)
    .map(str.strip)
    .filter(bool),
    threshold=st.sampled_from([0.0001, 0.02, 0.3, 0.8]),
    window=st.sampled_from([1, 2, 6]),
)
def test_handovers_of_any_text_are_those_of_generate(pilot: str, chosen: str, threshold: float, window: int) -> None:
    agree(pilot, asked(chosen), SwitchCriteria(threshold, window))


@pytest.mark.parametrize("pilot", PILOTS)
def test_a_draft_is_as_long_as_that_of_generate(pilot: str) -> None:
    for longest in (6, 11, 12, 30):
        agree(pilot, PAIRS[0], SwitchCriteria(), max_draft_tokens=longest)


@pytest.mark.parametrize("pilot", PILOTS)
@pytest.mark.parametrize(
    "chosen",
    ["Well</s> done.", "</s>", "Fine.<|end|> So", "Cafe\u0301 \U0001f469\u200d\U0001f467.", "It is \ufffd so.", "[User]"],
)
def test_awkward_answers_are_handed_over_where_generate_switches(pilot: str, chosen: str) -> None:
    agree(pilot, asked(chosen), SwitchCriteria(0.001, 2))


def test_logits_that_are_none_are_an_error() -> None:
    own = pair("pilot")
    broken = copy.deepcopy(own.base)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(WSDLogitsError, match="the base returned NaN or infinite logits at response token 1"):
        handovers(replace(own, base=broken), PAIRS[:1], SwitchCriteria())


def test_any_batch_gives_the_same() -> None:
    examples = PAIRS[:12]
    alone = [handovers(pair("pilot"), [example], SwitchCriteria())[0] for example in examples]
    for size in (1, 5, 12):
        assert handovers(pair("pilot"), examples, SwitchCriteria(), batch_size=size) == alone


def test_one_forward_per_batch_and_none_of_the_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    own, forwards = pair("pilot"), []
    hooks = [
        model.register_forward_pre_hook(lambda *_, name=name: forwards.append(name))
        for name, model in (("base", own.base), ("pilot", own.pilot))
    ]
    handovers(own, PAIRS[:10], SwitchCriteria(), "rejected", batch_size=4)
    for hook in hooks:
        hook.remove()
    assert forwards == ["base"] * 3


def test_no_example_is_no_forward() -> None:
    assert handovers(pair("pilot"), [], SwitchCriteria()) == []


def test_a_missing_answer_is_named() -> None:
    with pytest.raises(WSDValueError, match="here: has no rejected answer"):
        handovers(pair("pilot"), [asked("Yes.")], SwitchCriteria(), "rejected")


def test_a_prompt_that_fills_the_context_is_named() -> None:
    example = Example(messages=[{"role": "user", "content": "Why? " * 3000}], chosen="Yes.", place="here")
    with pytest.raises(WSDValueError, match=r"here: the prompt of the base has .* shorten the prompt"):
        handovers(pair("pilot"), [example], SwitchCriteria())
