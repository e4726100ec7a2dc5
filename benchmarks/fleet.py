"""Simulates base and pilot servers under a load of requests: pilots per base, latency of a switch, and where requests wait.

python benchmarks/fleet.py --out benchmarks/results/fleet.json
python benchmarks/plot_fleet.py benchmarks/results/fleet.json docs/images/fleet.svg

Times of forwards were measured on an H100 (`decode.py --preset gpu`), drafts and lengths of answers on the real pair (`wsd-hf
compare`); the rest is assumed, and listed in the results. The same seed gives the same numbers on every machine.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from servers import Clock, Price, Server, Wait, quietest
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
FORWARDS = ROOT / "benchmarks/results/h100-batch-8-prompt-1024.json"
ANSWERS = ROOT / "examples/real_pair/results/sampled-answers.jsonl"

RULES = {"confidence": "wsd", "relative confidence": "wsd:threshold=0.7,switch_criteria=relative_confidence"}
"""Strategies of the stored answers, by the name of their rule."""

MOST = 64
"""Most tokens of the stored answers, and of a draft that nothing ends."""

BLOCK = 16
"""Tokens of a block of a prefix cache: the last, incomplete one is read again."""

LOADS = {64: (1, 5, 10, 20, 40, 60, 80, 100, 120, 140, 160), 1024: (1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30)}
"""Requests per second for each base, by the length of prompts."""

CURVES: dict[str, dict[str, Any]] = {
    "base alone": {},
    "1 pilot for 8 bases": {"pilots": 1},
    "the same, first chunk of 64": {"pilots": 1, "chunk": 64},
    "1 pilot of half the base's price for 8 bases": {"pilots": 1, "pilot_price": 0.5},
    "4 of them": {"pilots": 4, "pilot_price": 0.5},
}


@dataclass(frozen=True)
class Settings:
    """Servers, load and requests of one simulation.

    Attributes:
        bases: number of base servers.
        pilots: number of pilot servers; with none, the bases answer alone.
        load: requests per second for each base.
        prompt: tokens of each prompt.
        rule: a key of `RULES`.
        longer: factor of the number of tokens that the base writes after the draft.
        pilot_price: forward of a pilot, in forwards of a base; None: as measured.
        requests: number of requests.
        rows: most rows of a server.
        budget: most prompt tokens of a step.
        chunk: tokens of a draft's first chunk; each further one is twice as long.
        cached: checks read the prefix cache.
        trip: seconds of a message and its answer.
        seed: of arrivals, and of the choice of answers.
    """

    bases: int = 8
    pilots: int = 0
    load: float = 1.0
    prompt: int = 64
    rule: str = "relative confidence"
    longer: int = 1
    pilot_price: float | None = None
    requests: int = 4000
    rows: int = 256
    budget: int = 2048
    chunk: int = 16
    cached: bool = False
    trip: float = 0.001
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Tokens of a draft, tokens of the whole response, and whether the base ended the draft; else the pilot did."""

    draft: int
    tokens: int
    switched: bool


@dataclass(frozen=True)
class Served:
    """Times at which a request came, its first token was there, and its last; and the tokens of its response."""

    came: float
    first: float
    done: float
    tokens: int


class Fleet:
    """Base and pilot servers, and the requests that they have served."""

    def __init__(self, settings: Settings, base: Price, pilot: Price) -> None:
        self.settings = settings
        self.clock = Clock()
        self.bases = [Server(self.clock, base, settings.rows, settings.budget) for _ in range(settings.bases)]
        self.pilots = [Server(self.clock, pilot, settings.rows, settings.budget) for _ in range(settings.pilots)]
        self.served: list[Served] = []

    def alone(self, answer: Answer) -> Iterator[Wait]:
        """A request to a base alone."""
        came, way = self.clock.now, self.settings.trip / 2
        with quietest(self.bases) as base:
            yield way
            job = base.submit(self.settings.prompt, answer.tokens)
            yield job, 1
            first = self.clock.now + way
            yield job, job.tokens
            yield way
        self.served.append(Served(came, first, self.clock.now, answer.tokens))

    def drafted(self, answer: Answer) -> Iterator[Wait]:
        """A request to a pilot and a base: the draft and its checks, then what the base writes after it."""
        came, way = self.clock.now, self.settings.trip / 2
        with quietest(self.bases) as base:
            first, cached = yield from self._draft(base, answer)
            if answer.draft < answer.tokens:
                yield way
                rest = base.submit(unread(self.settings.prompt + answer.draft, cached), answer.tokens - answer.draft)
                yield rest, rest.tokens
                yield way
        self.served.append(Served(came, first, self.clock.now, answer.tokens))

    def _draft(self, base: Server, answer: Answer) -> Generator[Wait, None, tuple[float, int]]:
        """Chunks of a draft and their checks; returns the time after the first one, and the tokens that the base has read."""
        way, chunk = self.settings.trip / 2, self.settings.chunk
        checked, read, first = 0, 0, 0.0
        with quietest(self.pilots) as pilot:
            yield way
            draft = pilot.submit(self.settings.prompt, MOST if answer.switched else answer.draft)
            while checked < answer.draft:
                checked, chunk = min(checked + chunk, draft.tokens), 2 * chunk
                yield draft, checked
                yield 2 * way
                text = self.settings.prompt + checked
                check = base.submit(unread(text, read) if self.settings.cached else text, 1)
                yield check, 1
                yield way
                read = text
                first = first or self.clock.now
        self.clock.after(way, partial(pilot.close, draft))
        return first, read


def unread(text: int, cached: int) -> int:
    """Tokens of a text that a server reads if its prefix cache holds some; at least one is."""
    return text - min(cached, text - 1) // BLOCK * BLOCK


def simulate(settings: Settings, answers: Sequence[Answer], base: Price, pilot: Price) -> Fleet:
    """A fleet that has served all requests."""
    fleet = Fleet(settings, base, pilot)
    chance = random.Random(settings.seed)
    time = 0.0
    for _ in range(settings.requests):
        time += chance.expovariate(settings.load * settings.bases)
        answer = chance.choice(answers)
        fleet.clock.after(time, partial(arrive, fleet, answer))
    fleet.clock.run()
    return fleet


def arrive(fleet: Fleet, answer: Answer) -> None:
    """Begins a request."""
    fleet.clock.follow(fleet.drafted(answer) if fleet.pilots else fleet.alone(answer))


def measures(fleet: Fleet) -> dict[str, float]:
    """Latencies in milliseconds, and the work of the servers.

    The first tenth of the requests is left out of the latencies. Busy (a share of time), rows that write and jobs that wait are
    means over time for each server; prompt tokens read and tokens written are means over requests.
    """
    served = sorted(fleet.served, key=lambda one: one.came)
    seconds = max(one.done for one in served) - served[0].came
    warm = served[len(served) // 10 :]
    latencies = {"first token": [one.first - one.came for one in warm], "answer": [one.done - one.came for one in warm]}
    found = {
        f"{name}, {percent} %": 1000 * float(np.percentile(values, percent))
        for name, values in latencies.items()
        for percent in (50, 95)
    }
    for role, servers in {"base": fleet.bases, "pilot": fleet.pilots}.items():
        for name, count, per in (
            ("busy", "busy", seconds * len(servers)),
            ("rows", "row_seconds", seconds * len(servers)),
            ("waiting", "waited", seconds * len(servers)),
            ("read", "read", len(served)),
            ("written", "written", len(served)),
        ):
            found[f"{role}, {name}"] = sum(getattr(server, count) for server in servers) / per if servers else 0.0
    return {name: round(value, 4) for name, value in found.items()}


def fit(results: dict[str, Any], role: str) -> Price:
    """Least squares over settings of batch and prompt, of the forwards of Weak-to-Strong Decoding where the models never agree.

    Args:
        results: written by `decode.py`.
        role: "base" or "pilot".
    """
    rows = [row for row in results["rows"] if row["method"] == "WSD fast" and row["agreement"] == 0 and row["ms_per_token"]]
    parts = [(count := row[f"{role}_forwards"], count * row["batch"], row["batch"] * row["prompt"]) for row in rows]
    seconds = [row[f"{role}_ms_per_token"] * results["shape"]["new_tokens"] / 1000 for row in rows]
    return Price(*np.linalg.lstsq(np.array(parts, float), np.array(seconds), rcond=None)[0].tolist())


def read_answers(rule: str, longer: int) -> list[Answer]:
    """The stored answers of a rule; what the base wrote of them is made longer."""
    stored = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    return [
        Answer(draft, draft + longer * (answer["tokens"] - draft), answer["switch_index"] >= 0)
        for answer in stored
        if answer["strategy"] == RULES[rule] and (draft := answer["written_by_pilot"])
    ]


def read_prices() -> tuple[Price, Price]:
    """Prices of base and pilot."""
    results = json.loads(FORWARDS.read_text("utf-8"))
    return fit(results, "base"), fit(results, "pilot")


def run(settings: Settings) -> dict[str, float]:
    """The measures of one simulation."""
    base, pilot = read_prices()
    if settings.pilot_price is not None:
        pilot = base.times(settings.pilot_price)
    return measures(simulate(settings, read_answers(settings.rule, settings.longer), base, pilot))


def capacity(settings: Settings) -> float:
    """Highest load, to 4 %, at which 95 % of the answers take at most twice as long as those of an idle base alone."""
    idle = run(replace(settings, pilots=0, load=0.1))["answer, 95 %"]
    low, high = 0, 128
    while high - low > 1:
        middle = (low + high) // 2
        slow = run(replace(settings, load=2 ** (middle / 16)))["answer, 95 %"] > 2 * idle
        low, high = (low, middle) if slow else (middle, high)
    return round(2 ** (low / 16), 1)


def fleets() -> list[Settings]:
    """The fleets whose capacities are listed: by the number and price of pilots, by the first chunk, and by rule."""
    found = []
    for prompt in LOADS:
        alone = Settings(prompt=prompt)
        one_each = replace(alone, pilots=alone.bases)
        found += [alone, *[replace(alone, pilots=n, pilot_price=price) for price in (None, 0.25, 0.5) for n in (1, 2, 4, 8)]]
        for longer in (1, 8):
            chunks = [replace(one_each, longer=longer, chunk=chunk) for chunk in (8, 16, 32, 64)]
            found += [replace(alone, longer=longer), *chunks, replace(one_each, longer=longer, cached=True)]
        found += [replace(fleet, rule="confidence") for fleet in (alone, one_each)]
    return [*dict.fromkeys(found)]


def assumptions(settings: Settings) -> list[str]:
    """Everything that was not measured."""
    return [
        "A forward takes a time of its own, one per row and one per prompt token: fitted to 1 and 8 rows of 64 and 1,024 "
        "prompt tokens on an H100 (base: 16 layers of 4096/14336, pilot: one such layer), continued in a straight line.",
        f"Drafts and lengths are those of the real pair, at most {MOST} tokens; a base alone writes as many.",
        "Requests come at random (Poisson). Each takes the base and the pilot with the fewest requests, and keeps them.",
        f"A step of a server writes a token in each of at most {settings.rows} rows, and reads at most {settings.budget:,} "
        "prompt tokens, in order of arrival.",
        "A check reads the prompt and the draft so far, without a prefix cache; the continuation finds both in it.",
        f"The first chunk has {settings.chunk} tokens, each further one twice as many. The pilot writes on during checks.",
        f"A message and its answer take {1000 * settings.trip:g} ms, the client no time. No server fails or lacks memory.",
    ]


def main(out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("fleet.json")) -> None:
    """Prints how many requests fleets carry; writes that and the curves."""
    print("prompt  longer  rule                 pilots  price     first chunk  requests/s per base")
    capacities = []
    for fleet in fleets():
        capacities.append({**asdict(fleet), "load": capacity(fleet)})
        price = fleet.pilot_price or "measured"
        chunk = f"{fleet.chunk}{', cached' * fleet.cached}"
        pilots = f"{fleet.pilots} for 8  {price:8}  {chunk:11}" if fleet.pilots else f"{'base alone':31}"
        print(f"{fleet.prompt:6}  {fleet.longer:6}  {fleet.rule:19}  {pilots}  {capacities[-1]['load']:6}", flush=True)
    curves = [
        {"fleet": name, **asdict(settings), **run(settings)}
        for name, prompt in tqdm([*itertools.product(CURVES, LOADS)], "curves")
        for load in LOADS[prompt]
        for settings in [Settings(prompt=prompt, load=load, **CURVES[name])]
    ]
    print("\nprompt  requests/s  first token, ms  answer, 95 %  at a base  at a pilot  fleet")
    for row in curves:
        first, answer, *waiting = (
            row[name] for name in ("first token, 50 %", "answer, 95 %", "base, waiting", "pilot, waiting")
        )
        waits = "  ".join(f"{count:9.2f}" for count in waiting)
        print(f"{row['prompt']:6}  {row['load']:10}  {first:15.1f}  {answer:12.1f}  {waits}  {row['fleet']}")
    prices = {role: asdict(price.times(1e6)) for role, price in zip(("base", "pilot"), read_prices(), strict=True)}
    results = {
        "command": " ".join(["python", *sys.argv]),
        "assumptions": assumptions(Settings()),
        "microseconds": prices,
        "capacities": capacities,
        "curves": curves,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
