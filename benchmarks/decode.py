"""Weak-to-Strong Decoding against other ways of decoding, as ratios to plain `generate` in the same run.

    python benchmarks/decode.py                 # CPU, ten minutes on two cores
    python benchmarks/decode.py --preset gpu    # larger layers in bfloat16, with static compiled plain decoding; see gpu.py

Models have random weights in real shapes (models.py). The switch is set by a criterion that fires after `--switch` tokens. All
ways of decoding with one batch and prompt take turns (turns.py), so that they meet the same machine: a ratio is a way's time in
the time of plain decoding in the same turn, and the table has its median, least and most.

The limit of a way is the time of its forwards alone: what no loop around the same calls could beat. On a CPU every setting
compares plain decoding and WSD; the other ways are run in some settings only. Results are written after every batch and prompt;
no further run is begun once `--budget` seconds are over, and the table says what was left out.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gpu
import torch
import transformers
import typer
from models import PRESETS, After, Pair
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig
from turns import Spread, Turns, Way, machine, ratios

from wsd_hf import WSDOutput

AGREEMENTS, PROMPTS = (0.8, 0.0, 0.95, 0.5), (64, 1024)
"""The most telling first: time may run out."""

BATCHES = {"cpu": (1, 4, 16), "gpu": (1, 8, 16), "gpu-tiny": (1, 8)}

PLAIN, COMPILED, ASSISTED, FAST, STEP = "plain", "plain, static compiled", "assisted generation", "WSD fast", "WSD step by step"


@dataclass
class Measurement:
    """One way of decoding in one setting; `agreement` is None for ways that need no pilot."""

    method: str
    agreement: float | None
    measured_agreement: float | None
    batch: int
    prompt: int
    error: str | None
    turns: int
    ms_per_token: float | None = None
    tokens_per_second: float | None = None
    to_plain: Spread | None = None
    to_compiled: Spread | None = None
    base_forwards: int = 0
    pilot_forwards: int = 0
    peak_mib: float | None = None
    """Above what the models take; on a CPU, of the whole process. None where the system does not tell."""
    base_ms_per_token: float | None = None
    pilot_ms_per_token: float | None = None
    """Time within forwards, for WSD fast; their sum is the limit."""
    bare_ms_per_token: float | None = None
    """Time of the same CUDA graphs, replayed without anything between them."""
    kept_share: float | None = None
    """Kept proposals in all proposals."""


class Settings:
    """The ways of decoding with one batch of prompts."""

    def __init__(self, pair: Pair, batch: int, prompt: int, switch: int) -> None:
        torch.manual_seed(2)
        self.pair, self.batch, self.prompt, self.switch = pair, batch, prompt, switch
        self.input_ids = torch.randint(3, pair.shape.vocabulary, (batch, prompt), device=pair.shape.device)
        self._common = {
            "attention_mask": torch.ones_like(self.input_ids),
            "max_new_tokens": pair.shape.new_tokens,
            "do_sample": False,
        }

    def plain(self, **kwargs: Any) -> Any:
        """The base alone."""
        return self.pair.base.generate(self.input_ids, **{**self._common, **kwargs})

    def static(self) -> torch.Tensor:
        """The base alone with a static cache."""
        return self.plain(cache_implementation="static")

    def compiled(self) -> torch.Tensor:
        """The same compiled: once for each batch, since the cache's length does not depend on the prompt."""
        longest = max(PROMPTS) + self.pair.shape.new_tokens
        return self.plain(cache_implementation="static", max_cache_len=longest, compile_config=CompileConfig(dynamic=False))

    def assisted(self, **kwargs: Any) -> torch.Tensor:
        """Assisted generation of transformers; one row only."""
        return self.plain(assistant_model=self.pair.pilot, **kwargs)

    def ensemble(self) -> torch.Tensor:
        """The same, keeping what a mixture of both models would (new in transformers)."""
        return self.assisted(assistant_ensemble_weight=0.5)

    def wsd(self, engine: str = "fast", **kwargs: Any) -> WSDOutput:
        """Weak-to-Strong Decoding."""
        settings = {"strategy": "wsd", "wsd_engine": engine, "switch_criteria": After(self.switch)}
        return self.plain(assistant_model=self.pair.pilot, return_dict_in_generate=True, **settings, **kwargs)

    def official(self) -> torch.Tensor:
        """The paper's procedure: draft all, score it in one forward, prefill again and continue."""
        base, shape = self.pair.base, self.pair.shape
        draft = self.pair.pilot.generate(self.input_ids, **{**self._common, "max_new_tokens": shape.official_draft})
        base(draft, logits_to_keep=shape.official_draft + 1)
        kept = draft[:, : self.prompt + self.switch]
        rest = {"attention_mask": torch.ones_like(kept), "max_new_tokens": shape.new_tokens - self.switch}
        return base.generate(kept, **{**self._common, **rest})


def cpu_ways(settings: Settings, turns: int) -> list[Way]:
    """Plain and WSD everywhere; all others, and a third turn, where that takes seconds."""
    small = settings.batch * settings.prompt <= 256
    turns = turns if small else min(turns, 2)
    ways = [Way(PLAIN, settings.plain, turns)]
    for agreement in AGREEMENTS:
        ways.append(Way(FAST, settings.wsd, turns, agreement=agreement, hooked=False))
        if agreement == 0.8 and small:
            others: dict[str, Callable[[], Any]] = {
                "official procedure": settings.official,
                STEP: lambda: settings.wsd("step"),
                "WSD fast, no speculation": lambda: settings.wsd(wsd_speculate=False),
                ASSISTED: settings.assisted,
            }
            ways += [Way(name, run, 1, agreement=agreement) for name, run in others.items()]
    return [*ways, Way("plain, static cache", settings.static, 1)] if small else ways


def gpu_ways(settings: Settings, turns: int) -> list[Way]:
    """Plain in both forms, WSD, and assisted generation for one row; slow ways take fewer turns, but all of them warm up."""

    def way(name: str, run: Callable[[], Any], turns: int, agreement: float | None = None, warm_up: int = 1) -> Way:
        return Way(name, run, turns, warm_up, agreement, hooked=False)

    short = settings.prompt == min(PROMPTS)
    ways = [way(COMPILED, settings.compiled, turns, warm_up=2), way(PLAIN, settings.plain, 2)]
    for agreement in AGREEMENTS:
        ways.append(way(FAST, settings.wsd, turns, agreement, warm_up=2))
        if settings.batch == 1 and (short or agreement == 0.8):
            ways.append(way(ASSISTED, settings.assisted, 2, agreement))
        if agreement == 0.8 and short:
            ways.append(way(STEP, lambda: settings.wsd("step"), 1, agreement))
            if settings.batch == 1 and hasattr(settings.pair.base.generation_config, "assistant_ensemble_weight"):
                ways.append(way("assisted, ensemble weight 0.5", settings.ensemble, 1, agreement))
    return ways


def measurements(settings: Settings, ways: list[Way]) -> list[Measurement]:
    """One for each way."""
    named = {way.name: way for way in ways}
    nothing = Way("", lambda: None, 0)
    return [measurement(settings, way, named[PLAIN], named.get(COMPILED, nothing)) for way in ways]


def measurement(settings: Settings, way: Way, plain: Way, compiled: Way) -> Measurement:
    """Medians over the turns."""
    row = Measurement(
        way.name,
        way.agreement,
        None if way.agreement is None else round(settings.pair.measured.get(way.agreement, float("nan")), 3),
        settings.batch,
        settings.prompt,
        way.error,
        len(way.seconds),
        peak_mib=way.peak_mib,
    )
    row.base_forwards, row.pilot_forwards = way.forwards
    if way.seconds:
        tokens, seconds = settings.pair.shape.new_tokens, statistics.median(way.seconds)
        row.ms_per_token = 1000 * seconds / tokens
        row.tokens_per_second = settings.batch * tokens / seconds
        row.to_plain, row.to_compiled = ratios(way, plain), ratios(way, compiled)
        if way.name == FAST:
            base, pilot = (statistics.median(spent[role] for spent in way.spent) for role in ("base", "pilot"))
            row.base_ms_per_token, row.pilot_ms_per_token = 1000 * base / tokens, 1000 * pilot / tokens
            row.bare_ms_per_token = None if way.bare is None else 1000 * way.bare / tokens
            stats = way.output.stats
            row.kept_share = stats.kept / stats.proposed if stats.proposed else None
    return row


def show(rows: list[Measurement], console: Console) -> None:
    """The table of one batch and prompt."""
    compiled = any(row.method == COMPILED for row in rows)
    name = f"batch {rows[0].batch}, prompt {rows[0].prompt}"
    columns = ["method", "agreement", "ms / token", "tokens / s", "to plain", *["to compiled"] * compiled]
    table = Table(*columns, "to limit", *["to bare"] * compiled, "forwards", "MiB", title=name)
    for row in rows:
        agreement = "" if row.agreement is None else f"{row.agreement:g} ({row.measured_agreement:.2f})"
        if row.ms_per_token is None:
            table.add_row(row.method, agreement, row.error)
            continue
        limit = None if row.base_ms_per_token is None else row.base_ms_per_token + (row.pilot_ms_per_token or 0.0)
        table.add_row(
            row.method + ("" if row.error is None else f"\n{row.error}"),
            agreement,
            f"{row.ms_per_token:.2f}",
            f"{row.tokens_per_second:.1f}",
            str(row.to_plain or ""),
            *[str(row.to_compiled or "")] * compiled,
            "" if limit is None else f"{row.ms_per_token / limit:.2f}",
            *["" if row.bare_ms_per_token is None else f"{row.ms_per_token / row.bare_ms_per_token:.2f}"] * compiled,
            f"{row.base_forwards}, {row.pilot_forwards}",
            "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        )
    console.print(table)


def main(
    preset: Annotated[str, typer.Option(help="cpu, gpu, or gpu-tiny (the plan of gpu on a CPU).")] = "cpu",
    switch: Annotated[int, typer.Option(help="Tokens after which the base takes over.")] = 20,
    turns: Annotated[int, typer.Option(help="Turns of each way; slow ones take fewer.")] = 3,
    budget: Annotated[int, typer.Option(help="Seconds after which no further run is begun.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write JSON there, after every batch and prompt.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Measures every setting."""
    deadline = time.monotonic() + (budget or (290 if preset.startswith("gpu") else 560))
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    console, on_gpu = Console(width=150), preset.startswith("gpu")
    shape = PRESETS[preset]
    pair = Pair(shape)
    taking = Turns(pair.base, pair.pilot, pair.dial, deadline)
    results: dict[str, Any] = {**machine(shape.device, threads), "shape": {**asdict(shape), "dtype": str(shape.dtype)}}
    rows: list[Measurement] = []

    def save(*now: Measurement) -> None:
        if out:
            out.write_text(json.dumps({**results, "rows": [asdict(row) for row in (*rows, *now)]}, indent=1), "utf-8")

    for batch, prompt in itertools.product(BATCHES[preset], PROMPTS):
        settings = Settings(pair, batch, prompt, switch)
        ways = gpu_ways(settings, turns) if on_gpu else cpu_ways(settings, turns)
        for _ in taking.take(ways):
            save(*measurements(settings, ways))
        if taking.cuda:
            taking.replay([way for way in ways if way.name == FAST])
        measured = measurements(settings, ways)
        rows += measured
        show(measured, console)
        save()
        if on_gpu and "profile" not in results:
            pair.dial(0.8)
            results["profile"] = gpu.recorded(lambda: gpu.profile(lambda: settings.wsd(max_new_tokens=2 * switch)))  # noqa: B023
            results["equal_rows"] = gpu.recorded(lambda: gpu.equal_rows(shape.device))
    if on_gpu:
        results["bars"] = gpu.bars([asdict(row) for row in rows], results["equal_rows"])
        console.print_json(data={name: results[name] for name in ("profile", "equal_rows", "bars")})
    save()


if __name__ == "__main__":
    typer.run(main)
