"""A base and a pilot behind vLLM servers: equality to one process, the servers' work, and throughput beside the base's alone.

    vllm serve BASE --port 8101 --served-model-name base --dtype float32      # and one for the pilot
    python benchmarks/vllm_pair.py equality --base DIR --pilot DIR --prompts FILE.jsonl --out FILE.json
    python benchmarks/vllm_pair.py throughput --base DIR --pilot DIR --prompts FILE.jsonl --out FILE.json
    python benchmarks/vllm_pair.py show FILE.json

Answers are greedy. For equality the step engine of one process answers every prompt, then both servers, one prompt at a time:
differences of the servers' own counters are their work. For throughput the base's server alone and both servers together
answer all prompts, some requests at once, in turns of alternating order; a ratio is of tokens per second in one turn.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import torch
import transformers
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from turns import Spread, machine

from wsd_hf import BASE_STOP_STRINGS, Pair, WSDConfig
from wsd_hf.comparison.prompts import read_prompts
from wsd_hf.comparison.variants import read_variants
from wsd_hf.remote import RemotePair, Server
from wsd_hf.text.chat import Messages, base_prompts

COUNTERS: dict[str, tuple[str, dict[str, str]]] = {
    "forwards": ("vllm:iteration_tokens_total_count", {}),
    "prompt_tokens": ("vllm:prompt_tokens_by_source_total", {"source": "local_compute"}),
    "tokens": ("vllm:generation_tokens_total", {}),
    "requests": ("http_requests_total", {"handler": "/v1/completions"}),
}
"""Samples of a server's /metrics, by their names and labels; prompt tokens found in a cache are not counted."""

SETTLED = 0.3
"""Seconds after an answer in which a server ends requests that were closed, and counts its last step."""

HEADERS = [text for text in BASE_STOP_STRINGS if text.startswith("[")]
"""Headers of a next turn without the line breaks before them: vLLM takes at most four stop strings."""

Answering = Callable[[Messages], Awaitable[int]]
"""Answers a chat; returns the number of the answer's tokens."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Answer:
    """A greedy answer, and the draft that began it."""

    tokens: list[int]
    switch_index: int
    reason: str
    log_probs: list[float]


@dataclass
class Equality:
    """Answers of two servers beside those of one process; numbers of prompts, and totals over all of them."""

    method: str
    prompts: int
    equal_tokens: int
    equal_switches: int
    equal_reasons: int
    log_prob_difference: float
    """Largest, in nats."""
    switched: int
    answer_tokens: int
    by_pilot: int
    base: dict[str, int]
    """Work of the server, by the names of `COUNTERS`."""
    pilot: dict[str, int]


@dataclass
class Alone:
    """The base's own answers, and the work of its server."""

    answer_tokens: int
    base: dict[str, int]


@dataclass
class Throughput:
    """Both servers beside the base's alone, at a number of requests at once."""

    method: str
    at_once: int
    tokens_per_second: float
    """Median over turns, as the base's."""
    base_tokens_per_second: float
    to_base: Spread
    load: float
    """Largest load average of the machine before a turn, of one minute."""


@dataclass
class Servers:
    """A connected pair, and its servers' counters; `limit` is the most tokens of an answer."""

    pair: RemotePair
    http: httpx.AsyncClient
    limit: int

    async def work(self, server: Server) -> dict[str, int]:
        """A server's counters since its start."""
        response = await self.http.get(f"{root(server)}/metrics")
        families = text_string_to_metric_families(response.raise_for_status().text)
        samples = [sample for family in families for sample in family.samples]
        return {
            key: round(sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items()))
            for key, (name, labels) in COUNTERS.items()
        }

    async def worked(self, run: Callable[[], Awaitable[Any]]) -> tuple[Any, dict[str, int], dict[str, int]]:
        """The result of a run, and the work of base and pilot in it."""
        servers = self.pair.base.server, self.pair.pilot.server
        before = [await self.work(server) for server in servers]
        result = await run()
        await anyio.sleep(SETTLED)
        after = [await self.work(server) for server in servers]
        base, pilot = ({key: new[key] - old[key] for key in new} for old, new in zip(before, after, strict=True))
        return result, base, pilot

    async def together(self, chat: Messages, strategy: WSDConfig) -> Answer:
        """Weak-to-Strong Decoding."""
        *_, answer = [piece async for piece in self.pair.stream(chat, strategy, max_new_tokens=self.limit)]
        return Answer(answer.token_ids, answer.switch_index, answer.switch_reason, answer.draft_log_probs)

    async def alone(self, chat: Messages) -> int:
        """The base's own answer, which its server ends at the header of a next turn."""
        server, prompt = self.pair.base.server, base_prompts([chat], self.pair.tokenizer)["input_ids"][0].tolist()
        body = {"model": server.model, "prompt": prompt, "max_tokens": self.limit, "temperature": 0, "stream": True}
        body |= {"stop": HEADERS, "return_token_ids": True}
        tokens = 0
        async with self.http.stream("POST", f"{server.url}/completions", json=body) as response:
            async for line in response.raise_for_status().aiter_lines():
                if line.startswith("data: {"):
                    tokens += sum(len(choice["token_ids"]) for choice in json.loads(line.removeprefix("data: "))["choices"])
        return tokens


def root(server: Server) -> str:
    """A server's URL without that of its API."""
    return server.url.removesuffix("/v1")


def in_one_process(pair: Pair, chat: Messages, strategy: WSDConfig, limit: int) -> Answer:
    """The step engine's answer."""
    with torch.no_grad():
        out = pair.generate([chat], strategy, max_new_tokens=limit, do_sample=False, wsd_engine="step")
    length, draft = out.prompt_length, int(out.draft_length[0])
    tokens, log_probs = out.sequences[0, length:].tolist(), out.draft_log_probs[0, :draft].tolist()
    return Answer(tokens, int(out.switch_index[0]), out.switch_reason[0], log_probs)


async def alone(servers: Servers, chats: list[Messages]) -> Alone:
    """The base's own answers to every prompt, one after the other."""

    async def answer_all() -> int:
        return sum([await servers.alone(chat) for chat in chats])

    tokens, base, _ = await servers.worked(answer_all)
    return Alone(tokens, base)


async def equality(servers: Servers, method: str, strategy: WSDConfig, chats: list[Messages], own: list[Answer]) -> Equality:
    """Answers every prompt over the servers, one after the other."""

    async def answer_all() -> list[Answer]:
        return [await servers.together(chat, strategy) for chat in chats]

    found, base, pilot = await servers.worked(answer_all)
    both = list(zip(found, own, strict=True))
    return Equality(
        method,
        len(chats),
        sum(one.tokens == other.tokens for one, other in both),
        sum(one.switch_index == other.switch_index for one, other in both),
        sum(one.reason == other.reason for one, other in both),
        max(difference(one.log_probs, other.log_probs) for one, other in both),
        sum(one.switch_index >= 0 for one in found),
        sum(len(one.tokens) for one in found),
        sum(len(one.log_probs) for one in found),
        base,
        pilot,
    )


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two lists of log-probabilities, infinite for lists of unequal lengths."""
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0) if len(one) == len(other) else float("inf")


async def speed(answer: Answering, chats: Sequence[Messages], at_once: int) -> float:
    """Tokens per second of all answers, with some requests at once."""
    waiting, lengths = iter(chats), list[int]()

    async def work() -> None:
        for chat in waiting:
            lengths.append(await answer(chat))

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(at_once):
            group.start_soon(work)
    return sum(lengths) / (time.perf_counter() - begin)


async def throughput(
    servers: Servers, method: str, strategy: WSDConfig, chats: Sequence[Messages], at_once: int, turns: int
) -> Throughput:
    """Turns of both servers and of the base's alone, whose order alternates."""

    async def together(chat: Messages) -> int:
        return len((await servers.together(chat, strategy)).tokens)

    ways: dict[str, Answering] = {"wsd": together, "base": servers.alone}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    loads = []
    for turn in range(turns):
        loads.append(os.getloadavg()[0])
        for name in sorted(ways, reverse=bool(turn % 2)):
            speeds[name].append(await speed(ways[name], chats, at_once))
    found = [one / other for one, other in zip(speeds["wsd"], speeds["base"], strict=True)]
    medians = [statistics.median(speeds[name]) for name in ("wsd", "base")]
    return Throughput(method, at_once, *medians, Spread(statistics.median(found), min(found), max(found)), max(loads))


def equality_table(results: dict[str, Any]) -> Iterator[Table]:
    """Equal answers, and the work of the servers."""
    prompts, alone = results["prompts"], results["base_alone"]
    equal = Table(f"{prompts} prompts", "tokens", "switch index", "reason", "log-probabilities within", "switched")
    work = Table("", "tokens", "by the pilot", "base forwards", "base prompt tokens computed", "base requests")
    work.add_column("pilot forwards")
    work.add_column("pilot requests")
    work.add_row("base alone", *map(str, [alone["answer_tokens"], 0, *spent(alone["base"]), 0, 0]))
    for row in results["equality"]:
        counts = (f"{row[f'equal_{name}']} of {prompts}" for name in ("tokens", "switches", "reasons"))
        equal.add_row(row["method"], *counts, f"{row['log_prob_difference']:.1e}", str(row["switched"]))
        both = [*spent(row["base"]), row["pilot"]["forwards"], row["pilot"]["requests"]]
        work.add_row(row["method"], *map(str, [row["answer_tokens"], row["by_pilot"], *both]))
    yield from (equal, work)


def spent(work: dict[str, int]) -> list[int]:
    """The columns of a server's work."""
    return [work["forwards"], work["prompt_tokens"], work["requests"]]


def throughput_table(results: dict[str, Any]) -> Iterator[Table]:
    """Tokens per second."""
    table = Table(f"{results['prompts']} prompts", "at once", "tokens / s", "of the base alone", "ratio", "load")
    for row in results["throughput"]:
        numbers = (f"{row[key]:.1f}" for key in ("tokens_per_second", "base_tokens_per_second"))
        table.add_row(row["method"], str(row["at_once"]), *numbers, str(Spread(**row["to_base"])), f"{row['load']:.1f}")
    yield table


TABLES = {"equality": equality_table, "throughput": throughput_table}


def show_tables(results: dict[str, Any]) -> None:
    """Prints the tables that results have."""
    for name, tables in TABLES.items():
        for table in tables(results) if name in results else ():
            Console(width=150).print(table)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="Results of equality or throughput.")]) -> None:
    """Prints the tables of results."""
    show_tables(json.loads(file.read_text("utf-8")))


Base = Annotated[Path, typer.Option(help="Folder of the base.")]
Pilot = Annotated[Path, typer.Option(help="Folder of the pilot.")]
Prompts = Annotated[Path, typer.Option(help='Lines of {"prompt": ...}.')]
BaseUrl = Annotated[str, typer.Option(help="Of the base's server.")]
PilotUrl = Annotated[str, typer.Option(help="Of the pilot's server.")]
Limit = Annotated[int | None, typer.Option(help="Only the first prompts.")]
MostTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Strategies = Annotated[str, typer.Option(help="As for wsd-hf compare.")]
Out = Annotated[Path | None, typer.Option(help="Write JSON there.")]

BASE_URL, PILOT_URL, STRATEGIES = "http://127.0.0.1:8101/v1", "http://127.0.0.1:8102/v1", "wsd,wsd:threshold=.6"


@app.command("equality")
def measure_equality(
    base: Base,
    pilot: Pilot,
    prompts: Prompts,
    base_url: BaseUrl = BASE_URL,
    pilot_url: PilotUrl = PILOT_URL,
    limit: Limit = None,
    tokens: MostTokens = 64,
    strategies: Strategies = STRATEGIES,
    out: Out = None,
) -> None:
    """Answers of two servers beside those of one process, and the work of each server."""
    quiet()
    chats, methods = read(prompts, limit, strategies)
    pair = Pair.from_pretrained(base, pilot, dtype=torch.float32)
    own = {
        name: [in_one_process(pair, chat, strategy, tokens) for chat in tqdm(chats, name)] for name, strategy in methods.items()
    }
    remote = RemotePair.connect(base_url, pilot_url, base, pilot)

    async def run(servers: Servers) -> dict[str, Any]:
        found = [asdict(await equality(servers, *item, chats, own[item[0]])) for item in methods.items()]
        return {"base_alone": asdict(await alone(servers, chats)), "equality": found}

    report(remote, tokens, len(chats), run, out)


@app.command("throughput")
def measure_throughput(
    base: Base,
    pilot: Pilot,
    prompts: Prompts,
    base_url: BaseUrl = BASE_URL,
    pilot_url: PilotUrl = PILOT_URL,
    limit: Limit = None,
    tokens: MostTokens = 64,
    strategies: Strategies = STRATEGIES,
    at_once: Annotated[str, typer.Option(help="Numbers of requests at once.")] = "1,4,8",
    turns: Annotated[int, typer.Option(help="Turns of each.")] = 4,
    out: Out = None,
) -> None:
    """Tokens per second of both servers beside those of the base's alone."""
    quiet()
    chats, methods = read(prompts, limit, strategies)
    settings = [(*item, chats, int(number), turns) for item in methods.items() for number in at_once.split(",")]
    remote = RemotePair.connect(base_url, pilot_url, base, pilot)

    async def run(servers: Servers) -> dict[str, Any]:
        return {"throughput": [asdict(await throughput(servers, *setting)) for setting in settings]}

    report(remote, tokens, len(chats), run, out)


def quiet() -> None:
    """One thread and no messages of this process."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def read(prompts: Path, limit: int | None, strategies: str) -> tuple[list[Messages], dict[str, WSDConfig]]:
    """The chats of a file, and settings by their names."""
    chats = [record["messages"] for record in read_prompts(prompts)][:limit]
    return chats, {one.name: one.strategy for one in read_variants(strategies, {}) if isinstance(one.strategy, WSDConfig)}


def report(
    pair: RemotePair, tokens: int, prompts: int, run: Callable[[Servers], Awaitable[dict[str, Any]]], out: Path | None
) -> None:
    """Runs a measurement; prints and writes its results."""

    async def measured() -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=600) as http:
            version = (await http.get(f"{root(pair.base.server)}/version")).json()["version"]
            return {"vllm": version, "prompts": prompts, "tokens": tokens, **await run(Servers(pair, http, tokens))}

    results = {**machine("cpu", 1), **anyio.run(measured)}
    show_tables(results)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    app()
