"""Weak-to-Strong Decoding against other ways of decoding, as ratios to plain `generate` in the same run.

    python benchmarks/decode.py                  # CPU, ten minutes
    python benchmarks/decode.py --preset h200    # a 27B-shaped base and a 3B-shaped pilot in bfloat16, on a GPU

Models have random weights in real shapes. The base is the pilot's layers and then more, whose output projections are scaled
down until the two agree as often as asked (0: the pilot is a stranger). The switch is set by a criterion that fires after
`--switch` tokens. All methods of one setting take turns, so that they meet the same machine.

The limit of a method is the time of its forwards alone: what no loop around the same calls could beat. On a CPU every
setting compares plain decoding and WSD; the other methods are run in some of them only.
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria

import wsd_hf
from wsd_hf.engine.ragged_stream import RaggedStream


@dataclass(frozen=True)
class Shape:
    """What both models have in common, and how many layers each has."""

    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int
    pilot_layers: int
    base_layers: int
    dtype: torch.dtype
    device: str
    new_tokens: int
    official_draft: int


PRESETS = {
    "cpu": Shape(512, 1408, 8, 8192, 2, 20, torch.float32, "cpu", 96, 512),
    "h200": Shape(4096, 14336, 32, 128256, 4, 110, torch.bfloat16, "cuda", 256, 512),
}

AGREEMENTS, BATCHES, PROMPTS = (0.0, 0.5, 0.8, 0.95), (1, 4, 16), (64, 1024)

PLAIN, FAST = "plain", "WSD fast"


class After(StoppingCriteria):
    """Lets the base take over after a fixed number of drafted tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


@dataclass
class Measurement:
    """One method in one setting."""

    method: str
    agreement: float
    measured_agreement: float
    batch: int
    prompt: int
    ms_per_token: float
    tokens_per_second: float
    ratio_to_plain: float
    base_forwards: int
    pilot_forwards: int
    peak_mib: float | None
    """Above what the models take; on a CPU, of the whole process. None where the system does not tell."""
    base_ms_per_token: float | None = None
    pilot_ms_per_token: float | None = None
    """Time within forwards, for WSD fast; their sum is the limit."""


class Pair:
    """A base and a pilot of random weights that agree about as often as asked."""

    def __init__(self, shape: Shape, agreement: float) -> None:
        self.shape = shape
        self.pilot = build(shape, shape.pilot_layers, seed=0)
        self.base = wsd_hf.enable_wsd(build(shape, shape.base_layers, seed=1))
        self.contexts = torch.randint(3, shape.vocabulary, (8, 32), device=shape.device)
        if agreement:
            own = dict(self.pilot.named_parameters())
            for name, weight in self.base.named_parameters():
                if name in own:
                    weight.data.copy_(own[name].data)
            self._dial(agreement)
        self.agreement = self._measure()

    def _dial(self, agreement: float) -> None:
        """Bisects the scale of the extra layers; a larger one moves the base away from the pilot."""
        extra = self.base.model.layers[self.shape.pilot_layers :]
        weights = [weight for layer in extra for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]
        original = [weight.data.clone() for weight in weights]
        low, high = 0.0, 1.0
        for _ in range(10):
            scale = (low + high) / 2
            for weight, value in zip(weights, original, strict=True):
                weight.data.copy_(value * scale)
            low, high = (scale, high) if self._measure() > agreement else (low, scale)

    @torch.no_grad()
    def _measure(self) -> float:
        """How often both would write the same next token."""
        same = self.base(self.contexts).logits.argmax(-1) == self.pilot(self.contexts).logits.argmax(-1)
        return float(same[:, 8:].float().mean())


def build(shape: Shape, layers: int, seed: int) -> PreTrainedModel:
    """A Llama of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 4,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.05,
    )
    with torch.device(shape.device):
        return LlamaForCausalLM(config).to(shape.dtype).eval()


def methods(pair: Pair, input_ids: torch.Tensor, switch: int) -> dict[str, Callable[[], Any]]:
    """Each way of decoding, ready to run; assisted generation takes one row only."""
    base, pilot, shape = pair.base, pair.pilot, pair.shape
    common = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": shape.new_tokens, "do_sample": False}
    wsd = {**common, "assistant_model": pilot, "strategy": "wsd", "switch_criteria": After(switch)}

    def official() -> torch.Tensor:
        draft = pilot.generate(input_ids, **{**common, "max_new_tokens": shape.official_draft})
        base(draft, logits_to_keep=shape.official_draft + 1)
        kept = draft[:, : input_ids.shape[1] + switch]
        rest = {"attention_mask": torch.ones_like(kept), "max_new_tokens": shape.new_tokens - switch}
        return base.generate(kept, **{**common, **rest})

    ways = {
        PLAIN: lambda: base.generate(input_ids, **common),
        "official procedure": official,
        "WSD step by step": lambda: base.generate(input_ids, wsd_engine="step", **wsd),
        FAST: lambda: base.generate(input_ids, wsd_engine="fast", **wsd),
        "WSD fast, no speculation": lambda: base.generate(input_ids, wsd_engine="fast", wsd_speculate=False, **wsd),
    }
    if len(input_ids) == 1:
        ways["assisted generation"] = lambda: base.generate(input_ids, assistant_model=pilot, **common)
    name = "plain, static cache" if shape.device == "cpu" else "plain, static compiled"
    ways[name] = lambda: base.generate(input_ids, cache_implementation="static", **common)
    return ways


def everything(shape: Shape, agreement: float, batch: int, prompt: int) -> bool:
    """Whether to run all methods in a setting; on a CPU the long ones would take an hour."""
    return shape.device != "cpu" or (prompt == 64 and batch == 1) or (agreement == 0.8 and batch * prompt <= 1024)


@torch.no_grad()
def measure(pair: Pair, asked: float, batch: int, prompt: int, switch: int, repeats: int) -> list[Measurement]:
    """The methods in one setting; medians over turns."""
    shape = pair.shape
    torch.manual_seed(2)
    input_ids = torch.randint(3, shape.vocabulary, (batch, prompt), device=shape.device)
    ways = methods(pair, input_ids, switch)
    if not everything(shape, asked, batch, prompt):
        ways = {name: ways[name] for name in (PLAIN, FAST)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent: list[dict[str, float]] = []

    def turn(name: str) -> None:
        with timed_forwards(pair) as spans:
            start = time.perf_counter()
            ways[name]()
            synchronize(shape)
            seconds[name].append(time.perf_counter() - start)
        if name == FAST:
            spent.append({role: value() for role, value in spans.items()})

    counted = {name: count_forwards(pair, lambda name=name: turn(name)) for name in ways}  # type: ignore[misc]
    if shape.device != "cpu":  # where the first turn compiles and captures
        for name in [*ways] * 3:
            turn(name)
        seconds = {name: [] for name in ways}
        spent.clear()
    while len(seconds[FAST]) < repeats:
        for name in ways:
            turn(name)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    limit = {
        f"{role}_ms_per_token": 1000 * statistics.median(run[role] for run in spent) / shape.new_tokens
        for role in ("base", "pilot")
    }
    return [
        Measurement(
            name,
            asked,
            round(pair.agreement, 3),
            batch,
            prompt,
            ms_per_token=1000 * median[name] / shape.new_tokens,
            tokens_per_second=batch * shape.new_tokens / median[name],
            ratio_to_plain=statistics.median(a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)),
            base_forwards=base_forwards,
            pilot_forwards=pilot_forwards,
            peak_mib=peak,
            **(limit if name == FAST else {}),
        )
        for name, (base_forwards, pilot_forwards, peak) in counted.items()
    ]


@contextmanager
def timed_forwards(pair: Pair) -> Iterator[dict[str, Callable[[], float]]]:
    """Seconds within the forwards of base and pilot on the fast path; to be asked for when the device is done."""
    spans: dict[str, list[Callable[[], float]]] = {"base": [], "pilot": []}
    run = RaggedStream.run

    def timed(stream: RaggedStream, *args: Any, **kwargs: Any) -> Any:
        clock = Clock(pair.shape)
        out = run(stream, *args, **kwargs)
        spans["base" if stream.model is pair.base else "pilot"].append(clock.stop())
        return out

    RaggedStream.run = timed  # type: ignore[method-assign]
    try:
        yield {role: lambda times=times: sum(span() for span in times) for role, times in spans.items()}  # type: ignore[misc]
    finally:
        RaggedStream.run = run  # type: ignore[method-assign]


class Clock:
    """Time on the device, or of the host where that is the device."""

    def __init__(self, shape: Shape) -> None:
        self._cuda = shape.device != "cpu"
        self._start: Any = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Callable[[], float]:
        """Stops; returns how to read the seconds."""
        end = self._now()
        return lambda: self._start.elapsed_time(end) / 1000 if self._cuda else end - self._start


def synchronize(shape: Shape) -> None:
    """Waits for the device."""
    if shape.device != "cpu":
        torch.cuda.synchronize()


def reset_peak(shape: Shape) -> float:
    """Forgets the memory's peak; returns MiB in use."""
    gc.collect()
    if shape.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak(shape) or 0.0


def peak(shape: Shape) -> float | None:
    """MiB in use at most since the last reset."""
    if shape.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def count_forwards(pair: Pair, way: Callable[[], Any]) -> tuple[int, int, float | None]:
    """Forwards of base and pilot in one run, and its peak memory above what was in use before."""
    counts = [0, 0]

    def counter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    before = reset_peak(pair.shape)
    hooks = [model.register_forward_pre_hook(counter(i)) for i, model in enumerate((pair.base, pair.pilot))]
    try:
        way()
    finally:
        for hook in hooks:
            hook.remove()
    highest = peak(pair.shape)
    return counts[0], counts[1], None if highest is None else round(highest - before, 1)


def show(rows: list[Measurement]) -> None:
    """The table."""
    table = Table(
        "agreement", "batch", "prompt", "method", "ms / token", "tokens / s", "to plain", "to limit", "forwards", "peak MiB"
    )
    for row in rows:
        limit = None if row.base_ms_per_token is None else row.base_ms_per_token + (row.pilot_ms_per_token or 0.0)
        table.add_row(
            f"{row.agreement:g} ({row.measured_agreement:.2f})",
            str(row.batch),
            str(row.prompt),
            row.method,
            f"{row.ms_per_token:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio_to_plain:.2f}",
            "" if limit is None else f"{row.ms_per_token / limit:.2f}",
            f"{row.base_forwards}, {row.pilot_forwards}",
            "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        )
    Console(width=120).print(table)


def main(
    preset: Annotated[str, typer.Option(help="cpu or h200.")] = "cpu",
    switch: Annotated[int, typer.Option(help="Tokens after which the base takes over.")] = 20,
    repeats: Annotated[int, typer.Option(help="Turns, of which medians are reported; one turn of long settings on a CPU.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write JSON there.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Measures every setting."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    shape = PRESETS[preset]
    rows: list[Measurement] = []
    for agreement in AGREEMENTS:
        pair = Pair(shape, agreement)
        for batch, prompt in itertools.product(BATCHES, PROMPTS):
            turns = repeats if shape.device != "cpu" or batch * prompt <= 256 else 1
            measured = measure(pair, agreement, batch, prompt, switch, turns)
            show(measured)
            rows += measured
    if out:
        where = {
            "machine": processor(),
            "device": torch.cuda.get_device_name() if shape.device == "cuda" else f"cpu, {threads} threads",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": " ".join(["python", *sys.argv]),
        }
        shapes = {**asdict(shape), "dtype": str(shape.dtype)}
        out.write_text(json.dumps({**where, "shape": shapes, "rows": [asdict(row) for row in rows]}, indent=1), "utf-8")


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    typer.run(main)
