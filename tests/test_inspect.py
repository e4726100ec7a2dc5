"""Inspect asks a base and its pilot: what it gets, and what it is refused."""

from __future__ import annotations

import copy
import json
import re
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason='no Inspect: pip install "wsd_hf[inspect]"')

import anyio
from click.testing import CliRunner
from inspect_ai import Task, eval
from inspect_ai._cli.main import inspect
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

import wsd_hf
from families import tiny_parts
from time_limit import HANG
from wsd_hf import WSDValueError
from wsd_hf.tiny import FOLDER, demo_questions

QUESTIONS = [question["messages"][0]["content"] for question in demo_questions() if question["kind"] == "fact"]
KELOFT = "What does the Keloft eat?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."
DOCUMENT = (Path(__file__).parents[1] / "examples" / "inspect.md").read_text("utf-8")


@pytest.fixture(scope="module")
def model() -> Model:
    return get_model(f"wsd/{FOLDER / 'base'}", pilot=str(FOLDER / "pilot"))


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny_parts()


def direct(pair: Any, messages: list[dict[str, str]], **settings: Any) -> tuple[list[str], int, int]:
    """The answers of one call of `generate`, the tokens of the base's prompt, and the first answer's switch index."""
    base, pilot, tokenizer, pilot_tokenizer = pair
    inputs = wsd_hf.build_inputs(messages, tokenizer, pilot_tokenizer)
    settings = {"max_new_tokens": 64, "return_dict_in_generate": True, **settings}
    output = base.generate(**inputs, assistant_model=pilot, strategy="wsd", tokenizer=tokenizer, **settings)
    read = inputs["input_ids"].shape[1]
    texts = [tokenizer.decode(row[read:], skip_special_tokens=True) for row in output.sequences]
    return [text.split("\n\n[")[0].strip() for text in texts], read, int(output.draft_length[0])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def ask(model: Model, *chats: Any, **settings: Any) -> list[ModelOutput]:
    """The outputs of calls made at the same time."""
    outputs: dict[int, ModelOutput] = {}

    async def one(index: int) -> None:
        outputs[index] = await model.generate(chats[index], config=GenerateConfig(**{"max_tokens": 64, **settings}))

    async def together() -> None:
        with anyio.fail_after(HANG):
            async with anyio.create_task_group() as group:
                for index in range(len(chats)):
                    group.start_soon(one, index)

    anyio.run(together)
    return [outputs[index] for index in range(len(chats))]


def test_an_evaluation_gets_the_answers_of_direct_calls(model: Model, pair: Any, tmp_path: Path) -> None:
    facts = [question for question in demo_questions() if question["kind"] == "fact"]
    samples = [Sample(input=fact["messages"][0]["content"], target=fact["answer"]) for fact in facts]
    task = Task(dataset=samples, scorer=includes())
    (log,) = eval(task, model=model, max_tokens=64, max_connections=3, display="none", log_dir=str(tmp_path))
    assert log.status == "success"
    assert len(log.samples) == len(samples)
    for sample in log.samples:
        (answer,), read, draft_length = direct(pair, [user(sample.input)])
        assert sample.output.completion == answer
        assert sample.output.stop_reason == "stop"
        assert sample.output.message.metadata == {"draft_length": draft_length, "switch_reason": "confident"}
        assert sample.output.usage.input_tokens == read


def test_the_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    (tmp_path / "task.py").write_text(task.replace("What is the capital of France?", KELOFT).replace("Paris", "acorns"))
    local = {
        "inspect eval": "eval --log-format json --display plain --max-tokens 5",
        "meta-llama/Llama-3.1-70B": str(FOLDER / "base"),
        "songff/Pilot-3B": str(FOLDER / "pilot"),
        "threshold=0.8": "threshold=0.01",
        "window_size=6": "window_size=2",
        "-M device=auto": "-M dtype=float32",
    }
    for large, small in local.items():
        assert large in command
        command = command.replace(large, small)
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(inspect, shlex.split(command))
    assert run.exit_code == 0, run.output
    (log,) = (tmp_path / "logs").glob("*.json")
    (sample,) = json.loads(log.read_text("utf-8"))["samples"]
    (choice,) = sample["output"]["choices"]
    assert choice["message"]["metadata"] == {"draft_length": 2, "switch_reason": "confident"}
    assert choice["stop_reason"] == "max_tokens"


def test_calls_at_the_same_time_are_answered_together_and_each_with_its_own(model: Model, pair: Any, monkeypatch: Any) -> None:
    sizes = []

    def spy(chats: Any, *args: Any) -> Any:
        sizes.append(len(chats))
        return wsd_hf.build_inputs(chats, *args)

    monkeypatch.setattr("wsd_hf.pair.build_inputs", spy)
    outputs = ask(model, *QUESTIONS, max_connections=3)
    assert [output.completion for output in outputs] == [direct(pair, [user(question)])[0][0] for question in QUESTIONS]
    assert sum(sizes) == len(QUESTIONS)
    assert max(sizes) == 3


def test_the_event_loop_goes_on_while_an_answer_is_written(model: Model, monkeypatch: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(HANG), "the event loop is blocked"
        return wsd_hf.build_inputs(*args)

    monkeypatch.setattr("wsd_hf.pair.build_inputs", held)

    async def release() -> None:
        await anyio.to_thread.run_sync(begun.wait, HANG)
        go_on.set()

    async def both() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(release)
            output = await model.generate(KELOFT, config=GenerateConfig(max_tokens=64))
        assert output.completion == ANSWER

    anyio.run(both)


def test_one_chat_that_cannot_be_answered_leaves_the_others_alone(model: Model) -> None:
    outcomes: list[Any] = []

    async def one(question: str) -> None:
        try:
            outcomes.append((await model.generate(question, config=GenerateConfig(max_tokens=64))).completion)
        except WSDValueError as error:
            outcomes.append(error)

    async def together() -> None:
        async with anyio.create_task_group() as group:
            for question in (KELOFT, "What? " * 1000, KELOFT):
                group.start_soon(one, question)

    anyio.run(together)
    assert [outcome for outcome in outcomes if isinstance(outcome, str)] == [ANSWER, ANSWER]
    assert ["the prompt of the base has" in str(outcome) for outcome in outcomes].count(True) == 1


def test_a_call_that_is_cancelled_does_not_hold_up_the_next(model: Model) -> None:
    async def first_cancelled() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(model.generate, KELOFT)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        return (await model.generate(KELOFT, config=GenerateConfig(max_tokens=64))).completion

    assert anyio.run(first_cancelled) == ANSWER


def test_settings_reach_generate(model: Model, pair: Any) -> None:
    (short,) = ask(model, KELOFT, max_tokens=15)
    assert short.completion == direct(pair, [user(KELOFT)], max_new_tokens=15)[0][0]
    assert short.stop_reason == "max_tokens"
    assert short.usage.output_tokens == 15
    (stopped,) = ask(model, KELOFT, stop_seqs=["acorns", "Keloft"])
    assert stopped.completion == ANSWER.split(" Keloft")[0]
    assert stopped.stop_reason == "stop"


def test_a_seed_repeats_what_is_sampled_whoever_else_asks(model: Model, pair: Any) -> None:
    settings = {"temperature": 2.0, "top_p": 0.95, "top_k": 20}
    base, pilot, *tokenizers = copy.deepcopy(pair)  # samples depend on the dtype, and so does the pace of proposals
    torch.manual_seed(3)
    half = (base.bfloat16(), pilot.bfloat16(), *tokenizers)
    wanted = direct(half, [user(KELOFT)], do_sample=True, num_return_sequences=2, **settings)[0]
    for questions in ([KELOFT], [QUESTIONS[1], KELOFT]):
        output = ask(model, *questions, num_choices=2, seed=3, **settings)[-1]
        assert [choice.message.text for choice in output.choices] == wanted
    assert wanted[0] != wanted[1]


def test_a_chat_keeps_its_turns(model: Model, pair: Any) -> None:
    chat = [
        ChatMessageSystem(content="Be kind."),
        ChatMessageUser(content=[ContentText(text=KELOFT)]),
        ChatMessageAssistant(content=ANSWER),
        ChatMessageUser(content=QUESTIONS[1]),
    ]
    wanted = [{"role": message.role, "content": message.text} for message in chat]
    assert ask(model, chat)[0].completion == direct(pair, wanted)[0][0]


@pytest.mark.parametrize(
    ("chat", "settings", "tools", "problem"),
    [
        (KELOFT, {}, [ToolInfo(name="bash", description="A shell.")], r"tools=\['bash'\]"),
        (KELOFT, {"logprobs": True}, [], "logprobs=True"),
        (KELOFT, {"frequency_penalty": 0.5}, [], "frequency_penalty=0.5"),
        (KELOFT, {"extra_body": {"min_p": 0.1}}, [], "extra_body={'min_p': 0.1}"),
        ([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,")])], {}, [], "holds image"),
    ],
)
def test_what_it_cannot_do_is_refused(model: Model, chat: Any, settings: Any, tools: Any, problem: str) -> None:
    async def call() -> None:
        await model.generate(chat, tools=tools, config=GenerateConfig(**settings))

    with pytest.raises(WSDValueError, match=problem):
        anyio.run(call)


def test_a_model_without_its_pilot_is_refused() -> None:
    with pytest.raises(WSDValueError, match="add -M pilot=PATH_OR_ID"):
        get_model(f"wsd/{FOLDER / 'base'}", memoize=False)
    with pytest.raises(WSDValueError, match=r"threshold=1.5: must be"):
        get_model(f"wsd/{FOLDER / 'base'}", memoize=False, pilot=str(FOLDER / "pilot"), threshold=1.5)
