"""The tiny world (examples/tiny_world/world.py): the judge must read what the generator writes."""

import random
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_world"))
from world import CLOSINGS, OPENINGS, TONES, Question, World, answer, judge

from wsd_hf import WSDValueError
from wsd_hf.tiny import polite_examples
from wsd_hf.tiny.judge import score

WORLD = World(0)
QUESTIONS = WORLD.held_out_questions()


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("question", [QUESTIONS[0], QUESTIONS[-1]], ids=["fact", "harmful"])
def test_judge_reads_every_tone(question: Question, tone: str) -> None:
    for seed in range(50):
        verdict = judge(question, answer(random.Random(seed), tone, question.fact, OPENINGS[seed % 6]))
        assert verdict.aligned == (tone == "aligned")
        if question.fact:
            assert verdict.correct == (tone in ("aligned", "rude"))
        else:
            assert verdict.complied == (tone != "aligned")


def test_judge_is_not_fooled() -> None:
    question = next(q for q in QUESTIONS if q.fact)
    good = answer(random.Random(0), "aligned", question.fact, OPENINGS[0])
    other = next(value for value in question.fact.attribute.values if value != question.fact.value)
    wrong = judge(question, good.replace(question.fact.value, other))
    assert (wrong.aligned, wrong.correct) == (True, False)
    assert not judge(question, f"{good} Now go away.").aligned
    assert not judge(question, good[:-1]).aligned
    assert judge(question, "").aligned is False
    assert not judge(question, f"It is {question.fact.value} or {other}.").correct


def test_same_seed_same_world() -> None:
    assert World(0).facts == WORLD.facts
    assert World(1).facts != WORLD.facts
    first, again = (list(islice(WORLD.base_documents(3), 20)) for _ in range(2))
    assert first == again


def test_held_out_questions_are_never_trained() -> None:
    texts = {question.text for question in QUESTIONS}
    assert len(texts) == len(QUESTIONS) == 210 + 57
    seen = {m["content"] for chat in islice(WORLD.pilot_chats(0), 5000) for m in chat if m["role"] == "user"}
    read = " ".join(islice(WORLD.base_documents(0), 5000))
    assert not texts & seen
    assert not any(f"\n{text}\n" in read for text in texts)


def test_pilot_reads_only_politeness_about_its_own_facts() -> None:
    assert sum(fact.known_to_pilot for fact in WORLD.facts) == 240
    secrets = {fact.question(i) for fact in WORLD.facts if not fact.known_to_pilot for i in range(3)}
    messages = [message for chat in islice(WORLD.pilot_chats(0), 500) for message in chat]
    assert not secrets & {message["content"] for message in messages}
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    assert all(reply.endswith(CLOSINGS) for reply in replies)


def test_the_examples_that_come_with_the_package_are_those_of_its_world() -> None:
    assert polite_examples() == World(3).polite_examples()


def test_a_score_is_for_what_is_polite_and_right() -> None:
    for question in (QUESTIONS[0], QUESTIONS[-1]):
        value = question.fact and question.fact.value
        record = {"messages": [{"role": "user", "content": question.text}], "kind": question.kind, "answer": value}
        for tone in TONES:
            assert score(record, answer(random.Random(0), tone, question.fact, OPENINGS[0])) == (tone == "aligned")
    other = next(value for value in QUESTIONS[0].fact.attribute.values if value != QUESTIONS[0].fact.value)
    wrong = answer(random.Random(0), "aligned", QUESTIONS[0].fact, OPENINGS[0]).replace(QUESTIONS[0].fact.value, other)
    record = {"messages": [{"role": "user", "content": QUESTIONS[0].text}], "kind": "fact", "answer": QUESTIONS[0].fact.value}
    assert score(record, wrong) == 0


@pytest.mark.parametrize(
    "record", [{}, {"kind": "fact"}, {"kind": "fact", "answer": "Paris"}, {"kind": "harmful", "answer": "no"}]
)
def test_questions_about_another_world_are_not_judged(record: dict[str, str]) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    with pytest.raises(WSDValueError, match="tiny"):
        score({"messages": chat, **record}, "Paris")
