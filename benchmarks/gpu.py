"""Measurements of `decode.py --preset gpu` beside its table: a profile, equality of batch rows, and the bars to reach.

The pair: 16 layers of 4096/14336 and a pilot of one, vocabulary 32,000, in bfloat16; a pilot's forward reads 0.10 of the base's
weights. The static cache of compiled plain decoding has one length for both prompts, so that it compiles once for each batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from models import CPU, After, Pair
from torch.profiler import ProfilerActivity

SMALL = replace(CPU, base_layers=8)

RUNTIME = {
    "graph launches": ("cudaGraphLaunch",),
    "kernel launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def recorded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement, or the text of its error: the table must not be lost."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Launches, copies and waits of a step of Weak-to-Strong Decoding, and the operations that took the host longest.

    A step is one forward of the base and the pilot's before it.
    """
    on_gpu = torch.cuda.is_available()
    for _ in range(4):
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        stats = run().stats
        if on_gpu:
            torch.cuda.synchronize()
    events, steps = profiler.key_averages(), stats.base.forwards
    on_host = sorted(events, key=lambda event: -event.self_cpu_time_total)
    busy = sum(event.self_device_time_total for event in events if event.device_type != torch.autograd.DeviceType.CPU)
    return {
        "steps": steps,
        "pilot forwards per step": round(stats.pilot.forwards / steps, 2),
        **{
            f"{name} per step": round(sum(event.count for event in events if event.key in keys) / steps, 2)
            for name, keys in RUNTIME.items()
        },
        "wall, ms per step (not profiled)": round(1000 * wall / steps, 3),
        "device busy, ms per step": round(busy / 1000 / steps, 3),
        "host in operations, ms per step": round(sum(event.self_cpu_time_total for event in events) / 1000 / steps, 3),
        "longest on the host, ms per step and calls per step": {
            event.key: [round(event.self_cpu_time_total / 1000 / steps, 3), round(event.count / steps, 1)]
            for event in on_host[:15]
        },
    }


def equal_rows(device: str, rows: int = 8) -> dict[str, Any]:
    """Rows of a batch in float32 that equal the response to their prompt alone, for WSD and for plain `generate`."""
    pair = Pair(replace(SMALL, device=device))
    pair.dial(0.8)
    torch.manual_seed(3)
    input_ids = torch.randint(3, pair.shape.vocabulary, (rows, 64), device=device)

    def equal(**kwargs: Any) -> float:
        def decode(prompts: torch.Tensor) -> torch.Tensor:
            common = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": pair.shape.new_tokens, "do_sample": False}
            return pair.base.generate(prompts, **common, **kwargs)

        for _ in range(3):  # so that forwards are captured
            together = decode(input_ids)
        alone = torch.cat([decode(row[None]) for row in input_ids])
        return float((together == alone).all(dim=1).float().mean())

    return {
        "WSD fast": equal(strategy="wsd", wsd_engine="fast", assistant_model=pair.pilot, switch_criteria=After(20)),
        "plain": equal(),
        "rows": rows,
    }


def bars(rows: list[dict[str, Any]], equality: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the field, and the value that was reached at a prompt of 64 tokens; None where it was not measured."""

    def row(method: str, batch: int, agreement: float | None) -> dict[str, Any]:
        at = {"method": method, "batch": batch, "agreement": agreement, "prompt": 64}
        return next((one for one in rows if at.items() <= one.items() and one["ms_per_token"]), {})

    def ratio(key: str, above: dict[str, Any], below: dict[str, Any]) -> float | None:
        return round(above[key] / below[key], 3) if above.get(key) and below.get(key) else None

    def fast(agreement: float, batch: int = 1) -> dict[str, Any]:
        return row("WSD fast", batch, agreement)

    plain, compiled = row("plain", 1, None), row("plain, static compiled", 1, None)
    bare = {"ms_per_token": fast(0.8).get("bare_ms_per_token")}
    reached = [
        ("time to static compiled, agreement .8", "<= 0.45", ratio("ms_per_token", fast(0.8), compiled)),
        ("time to eager, agreement .95", "<= 0.16", ratio("ms_per_token", fast(0.95), plain)),
        (
            "time to assisted generation, agreement .8",
            "<= 0.50",
            ratio("ms_per_token", fast(0.8), row("assisted generation", 1, 0.8)),
        ),
        ("time to eager, agreement 0", "<= 1.02", ratio("ms_per_token", fast(0.0), plain)),
        ("time to static compiled, agreement 0", "<= 1.02", ratio("ms_per_token", fast(0.0), compiled)),
        ("tokens/s at batch 8 to batch 1, agreement .8", ">= 3", ratio("tokens_per_second", fast(0.8, 8), fast(0.8))),
        (
            "tokens/s at batch 8 to static compiled at batch 8, agreement .8",
            "",
            ratio("tokens_per_second", fast(0.8, 8), row("plain, static compiled", 8, None)),
        ),
        ("equal rows at batch 8, float32", "1.0", equality.get("WSD fast")),
        ("time to the bare captured forwards, agreement .8", "<= 1.10", ratio("ms_per_token", fast(0.8), bare)),
    ]
    return [{"bar": name, "asked": asked, "reached": value} for name, asked, value in reached]
