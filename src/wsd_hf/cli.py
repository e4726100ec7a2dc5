"""The command line: `wsd-hf demo` and `wsd-hf generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM as PlainAutoModelForCausalLM
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import WSDConfig
from .errors import WSDValueError
from .generation import AutoModelForCausalLM
from .outputs import WSDGenerateOutput, explain
from .text.chat import BASE_STOP_STRINGS, Messages, before_next_turn, build_inputs
from .tiny import demo_questions, load_tiny_pair

app = typer.Typer(
    help="Weak-to-Strong Decoding: a small aligned pilot begins the answer, a large base model finishes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerBase]


class DType(str, Enum):
    """Weights as stored, or converted."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def demo(
    svg: Annotated[Path | None, typer.Option(help="Also write what is shown as an SVG picture.")] = None,
) -> None:
    """Three questions to the shipped pair: the base alone, the pilot alone, and both together."""
    with _one_line_errors():
        console = Console(record=svg is not None, width=100 if svg else None, highlight=False)
        pair = load_tiny_pair()
        for question in demo_questions()[:3]:
            _show_question(console, pair, question)
        console.print(
            "[dim]Orange was written by the pilot (the darker, the less the base expected it), blue by the base.\n"
            "Both models are tiny. They were trained on one made-up world, to show this effect: a question\n"
            'from outside that world gets nonsense. Ask more: wsd-hf generate "QUESTION"[/dim]'
        )
        if svg:
            svg.write_text(console.export_svg(title="wsd-hf demo"), encoding="utf-8")


@app.command()
def generate(
    question: Annotated[str | None, typer.Argument(help="What to ask.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="Base model, a path or Hub id. Default: the shipped pair.")] = None,
    pilot: Annotated[str | None, typer.Option(help="Pilot, a path or Hub id.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON file with a list of chat messages, instead of a question.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer, the switch and the trace as JSON.")] = False,
    threshold: Annotated[float, typer.Option(help="Confidence at which the base takes over, in (0, 1].")] = WSDConfig.threshold,
    window: Annotated[int, typer.Option(help="Drafted tokens that confidence is measured over.")] = WSDConfig.window_size,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens in the answer, the draft included.", min=1)] = 256,
    device: Annotated[str, typer.Option(help="Where both models run: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Data type of both models.")] = DType.auto,
) -> None:
    """Answers one question, or goes on with a chat. The answer goes to standard output, all else to standard error."""
    with _one_line_errors():
        config = WSDConfig(threshold=threshold, window_size=window)
        chat = _chat(question, messages)
        status = Console(stderr=True)
        with status.status("loading both models"):
            models = _load_pair(base, pilot, _device(device), dtype)
        with status.status("writing"):
            output = _answer(models, chat, config, max_new_tokens)
        _print_answer(output, models[2], as_json)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can put right is told in one line, with exit status 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"wsd-hf: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _chat(question: str | None, file: Path | None) -> Messages:
    if (question is None) == (file is None):
        raise WSDValueError("give either a question or --messages FILE")
    if file is None:
        return [{"role": "user", "content": question}]
    try:
        chat = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WSDValueError(f"--messages {file}: not JSON in UTF-8 ({error})") from None
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise WSDValueError(f"--messages {file}: must hold a list of {{'role': ..., 'content': ...}} objects")
    return chat


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise WSDValueError(f"--device {name}: {error}") from None


def _load_pair(base: str | None, pilot: str | None, device: torch.device, dtype: DType) -> Pair:
    if base is None and pilot is None:
        model, assistant, tokenizer, assistant_tokenizer = load_tiny_pair()
    elif base is None or pilot is None:
        raise WSDValueError(
            f"--{'base' if base is None else 'pilot'} is missing: give both models, or neither for the shipped pair"
        )
    else:
        model, tokenizer = _load("--base", base, AutoModelForCausalLM, dtype)
        assistant, assistant_tokenizer = _load("--pilot", pilot, PlainAutoModelForCausalLM, dtype)
    target = {"device": device, "dtype": None if dtype is DType.auto else getattr(torch, dtype.value)}
    return model.to(**target), assistant.to(**target), tokenizer, assistant_tokenizer


def _load(option: str, source: str, auto: Any, dtype: DType) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise WSDValueError(f"{option} {source}: no such folder")
    try:
        return auto.from_pretrained(source, dtype=dtype.value), AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the readers of weights and tokenizers raise what they like over a damaged file
        raise WSDValueError(f"{option} {source}: {error}") from error


def _answer(pair: Pair, chat: Messages, config: WSDConfig, max_new_tokens: int) -> WSDGenerateOutput:
    base, pilot, tokenizer, assistant_tokenizer = pair
    output: WSDGenerateOutput = base.generate(
        **build_inputs(chat, tokenizer, assistant_tokenizer).to(base.device),
        assistant_model=pilot,
        strategy="wsd",
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        wsd_config=config,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    return output


def _print_answer(output: WSDGenerateOutput, tokenizer: PreTrainedTokenizerBase, as_json: bool) -> None:
    text = _response_text(output.sequences, output.prompt_length, tokenizer)
    trace = explain(output, tokenizer, stop_strings=BASE_STOP_STRINGS)
    if as_json:
        typer.echo(json.dumps({"response": text, **trace.to_dict(), "stats": asdict(output.stats)}, ensure_ascii=False))
    else:
        typer.echo(text)
        typer.echo(trace.summary(), err=True)


def _response_text(sequences: torch.Tensor, prompt_length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return before_next_turn(tokenizer.decode(sequences[0, prompt_length:], skip_special_tokens=True)).lstrip()


def _show_question(console: Console, pair: Pair, question: dict[str, Any]) -> None:
    base, pilot, tokenizer, assistant_tokenizer = pair
    inputs = build_inputs(question["messages"], tokenizer, assistant_tokenizer)
    prompt, pilot_prompt = inputs["input_ids"], inputs["assistant_input_ids"]
    alone = base.generate(
        prompt,
        attention_mask=inputs["attention_mask"],
        stopping_criteria=inputs["stopping_criteria"],
        max_new_tokens=64,
    )
    draft = pilot.generate(pilot_prompt, attention_mask=inputs["assistant_attention_mask"], max_new_tokens=64)
    both = _answer(pair, question["messages"], WSDConfig(), max_new_tokens=64)
    table = Table.grid(padding=(0, 2))
    table.add_row("base", Text(_response_text(alone, prompt.shape[1], tokenizer)))
    table.add_row("pilot", Text(_response_text(draft, pilot_prompt.shape[1], assistant_tokenizer)))
    table.add_row("[bold]both[/bold]", explain(both, tokenizer, stop_strings=BASE_STOP_STRINGS))
    expected = f"  (right: {question['answer']})" if question["kind"] == "fact" else "  (to be refused)"
    console.print(Text(question["messages"][-1]["content"], style="bold") + Text(expected, style="not bold dim"))
    console.print(table)
    console.print()
