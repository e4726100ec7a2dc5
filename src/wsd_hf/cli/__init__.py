"""The command line: `wsd-hf` and its commands."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..bundle import pack as write_bundle
from ..comparison.methods import METHODS
from ..comparison.replies import Bench
from ..engine.strategy import StrategyOutput
from ..errors import WSDValueError
from ..pair import Pair
from ..text.chat import Messages, check_messages, check_text
from ..text.json_data import parse_json
from ..text.visible import visible
from ..tiny import demo_questions
from .answer_files import answers
from .comparison import compare
from .conversation import Conversation, summary
from .diagnosis import diagnose
from .evaluation import evaluate
from .models import Loading, load_models, takes_loading
from .options import (
    AnyThreshold,
    AnyWindowSize,
    Base,
    IgnoreRepeats,
    MaxNewTokens,
    Pilot,
    Reference,
    Seed,
    Strategy,
    SwitchCriteria,
    System,
    Temperature,
    Threshold,
    TopP,
    WindowSize,
    decoding,
    one_line_errors,
    wsd_config,
)
from .rewards import Reward, load_reward
from .runs import exit_on_sigterm
from .serving import serve
from .terminal import Commands, say, say_json
from .train_pilot import train_pilot_command
from .training import make_pairs, report_data
from .ui import ui

app = typer.Typer(
    cls=Commands,
    help="Weak-to-Strong Decoding: a small aligned pilot begins the answer, a large base model finishes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"wsd-hf {version('wsd_hf')}")
        raise typer.Exit


@app.callback()
def around_each_command(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs before a command; what it opens is closed after it."""
    context.with_resource(exit_on_sigterm())


@app.command()
def demo(
    svg: Annotated[Path | None, typer.Option(help="Also write an SVG picture.")] = None,
) -> None:
    """Three questions to the shipped pair: the base alone, the pilot alone, and both together."""
    with one_line_errors():
        console = Console(record=svg is not None, width=100 if svg else None, highlight=False)
        pair = Pair.tiny()
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
@takes_loading
def generate(
    question: Annotated[str | None, typer.Argument(help="Question to answer.", show_default=False)] = None,
    base: Base = None,
    pilot: Pilot = None,
    reference: Reference = None,
    reward: Reward = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON file with a list of chat messages, instead of a question.")
    ] = None,
    system: System = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer, its work and the writers of its tokens as JSON.")
    ] = False,
    strategy: Strategy = "wsd",
    threshold: AnyThreshold = None,
    window_size: AnyWindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    *,
    loading: Loading,
) -> None:
    """Answers one question, or the last message of a chat. The answer goes to standard output, all else to standard error.

    Control characters in an answer are printed as pictures, ␛ for example, into a pipe too; --json has the text itself.
    """
    with one_line_errors():
        rule = {"switch_criteria": switch_criteria, "ignore_repeats": ignore_repeats}
        settings = decoding(
            strategy, reference, reward, temperature, top_p, threshold=threshold, window_size=window_size, **rule
        )
        chat = _messages(question, messages, system)
        check_messages(chat)
        status = Console(stderr=True)
        with status.status("loading the models"):
            settings |= load_reward(reward, loading)
            pair = load_models(base, pilot, reference, loading=loading)
        with status.status("writing"):
            _seed(seed)
            output = pair.generate(chat, max_new_tokens=max_new_tokens, **settings)
        _print_answer(output, pair, as_json)


@app.command()
@takes_loading
def chat(
    base: Base = None,
    pilot: Pilot = None,
    reference: Reference = None,
    reward: Reward = None,
    system: System = None,
    strategy: Strategy = "wsd",
    threshold: AnyThreshold = None,
    window_size: AnyWindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 256,
    *,
    loading: Loading,
) -> None:
    """A chat: the answer is shown while it is written, the pilot's part in orange and the base's in blue, or after a │.

    Ctrl-C stops an answer, /reset starts anew, /exit or Ctrl-D leaves. The shipped pair knows single questions only.
    """
    with one_line_errors():
        rule = {"switch_criteria": switch_criteria, "ignore_repeats": ignore_repeats}
        settings = decoding(
            strategy, reference, reward, temperature, top_p, threshold=threshold, window_size=window_size, **rule
        )
        check_text("--system", system or "")
        with Console(stderr=True).status("loading the models"):
            settings |= load_reward(reward, loading)
            pair = load_models(base, pilot, reference, loading=loading)
        _seed(seed)
        Conversation(pair, system, max_new_tokens=max_new_tokens, **settings).run()


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The directory to write; missing or empty.")],
    base: Annotated[str, typer.Option(help="Base model, a path or Hub id.")],
    pilot: Annotated[str, typer.Option(help="Pilot, a path or Hub id.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy the weights instead of linking to them.")] = False,
    threshold: Threshold = None,
    window_size: WindowSize = None,
    switch_criteria: SwitchCriteria = None,
    ignore_repeats: IgnoreRepeats = None,
) -> None:
    """Writes a model directory whose `generate` decodes with base and pilot, whoever calls it (trust_remote_code=True)."""
    with one_line_errors():
        config = wsd_config(
            threshold=threshold, window_size=window_size, switch_criteria=switch_criteria, ignore_repeats=ignore_repeats
        )
        packed = write_bundle(base, pilot, folder, wsd_config=config, copy=copy)
        for name, source in packed.weights.items():
            say(f"{folder / name}: {'copied from' if copy else 'a link to'} {source}")
        if not packed.reads_chats:
            say("The base's chat template cannot be read back: the pilot will get chats in the base's layout", err=True)


app.command()(serve)
app.command()(ui)
app.command()(compare)
app.command()(diagnose)
app.command("eval")(evaluate)
app.command()(answers)
app.command("data-report")(report_data)
app.command("make-pairs")(make_pairs)
app.command("train-pilot")(train_pilot_command)


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def _messages(question: str | None, file: Path | None, system: str | None) -> Messages:
    if (question is None) == (file is None):
        raise WSDValueError("give either a question or --messages FILE")
    beginning = [{"role": "system", "content": system}] if system else []
    if file is None:
        return [*beginning, {"role": "user", "content": question}]
    chat = parse_json(file.read_bytes(), f"--messages {file}")
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise WSDValueError(f"--messages {file}: must hold a list of {{'role': ..., 'content': ...}} objects")
    return [*beginning, *chat]


def _print_answer(output: StrategyOutput, pair: Pair, as_json: bool) -> None:
    text = pair.answers(output)[0]
    if as_json:
        trace = {} if output.written_by_pilot is None else pair.explain(output).to_dict()
        say_json({"response": text, **trace, "stats": asdict(output.stats)})
    else:
        say(text)
        say(summary(pair, output), err=True)


def _show_question(console: Console, pair: Pair, question: dict[str, Any]) -> None:
    messages = question["messages"]
    bench = Bench(pair, examples=[], max_new_tokens=64)
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name in ("base", "pilot"):
        table.add_row(name, Text(visible(METHODS[name].answer(bench, [messages])[0].response)))
    table.add_row("[bold]both[/bold]", pair.explain(pair.generate(messages, max_new_tokens=64)))
    expected = f"  (right: {question['answer']})" if question["kind"] == "fact" else "  (to be refused)"
    console.print(Text(messages[-1]["content"], style="bold") + Text(expected, style="not bold dim"))
    console.print(table)
    console.print()
