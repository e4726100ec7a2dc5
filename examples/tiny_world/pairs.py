"""Write prompts and pairs of the tiny world, to train a pilot with.

    python examples/tiny_world/pairs.py --out world     # prompts.jsonl, held_out.jsonl, pairs.jsonl

`prompts.jsonl` has questions without answers, for `wsd-hf make-pairs`; `pairs.jsonl` has a polite answer to each, beside one of
another tone; `held_out.jsonl` has the questions of the evaluation, about other facts and other requests.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import typer
from world import HARMFUL_SHARE, PHRASINGS, REQUESTS, TONES, Fact, World, answer, habit

SHIPPED_WORLD_SEED = 3


def draw(world: World, rng: random.Random, count: int) -> list[tuple[str, Fact | None, str]]:
    """Questions for training, each with its fact (None for a harmful request), and the topic of its opening."""
    pool = [fact for fact in world.facts if fact.known_to_pilot and fact.aligned_in_base]
    harmful = round(HARMFUL_SHARE * count)
    drawn = []
    for fact in rng.sample(pool, count - harmful):
        wording = rng.choice([i for i in range(PHRASINGS) if i != fact.held_out_phrasing])
        drawn.append((fact.question(wording), fact, fact.attribute.predicate))
    for request in rng.sample(world.requests, harmful):
        drawn.append((rng.choice(REQUESTS).format(request), None, request.split()[0]))
    rng.shuffle(drawn)
    return drawn


def prompt_line(question: str, fact: Fact | None) -> str:
    """A line of prompts, with what the judge needs."""
    kind = "fact" if fact else "harmful"
    return json.dumps({"prompt": question, "kind": kind, "answer": fact.value if fact else None})


def pair_line(question: str, fact: Fact | None, topic: str, rng: random.Random) -> str:
    """A line of pairs: the polite answer, and one in another tone, which begins in the same way."""
    tone = rng.choice([tone for tone in TONES if tone != "aligned"])
    texts = {"chosen": answer(rng, "aligned", fact, habit(topic)), "rejected": answer(rng, tone, fact, habit(topic))}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return json.dumps({"prompt": [{"role": "user", "content": question}], **answers})


def main(
    out: Annotated[Path, typer.Option(help="Folder for the three files.")],
    count: Annotated[int, typer.Option(help="Prompts, and pairs.")] = 48,
    world_seed: Annotated[int, typer.Option(help="The world that the models were trained in.")] = SHIPPED_WORLD_SEED,
    seed: Annotated[int, typer.Option(help="Of the choice of questions, and of the answers' wording.")] = 0,
) -> None:
    """Write the files."""
    world, rng = World(world_seed), random.Random(f"pairs {world_seed} {seed}")
    drawn = draw(world, rng, count)
    files = {
        "prompts.jsonl": [prompt_line(question, fact) for question, fact, _ in drawn],
        "held_out.jsonl": [prompt_line(question.text, question.fact) for question in world.held_out_questions()],
        "pairs.jsonl": [pair_line(*each, rng) for each in drawn],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (out / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
