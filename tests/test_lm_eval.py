"""The lm-evaluation-harness on the shipped pair: examples/lm_eval.md, its task, and what direct calls answer to it."""

import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import wsd_hf
from families import tiny_parts
from wsd_hf.cli import app
from wsd_hf.text.next_turn import before_next_turn
from wsd_hf.tiny import FOLDER, demo_questions

adapter = pytest.importorskip(
    "wsd_hf.integrations.lm_eval", reason='no harness: pip install "wsd_hf[lm-eval]"', exc_type=ImportError
)
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

DOCUMENT = (Path(__file__).parents[1] / "examples" / "lm_eval.md").read_text("utf-8")
BASE, PILOT, OTHER_PILOT = (str(FOLDER / name) for name in ("base", "pilot", "pilot_other_vocab"))
FACTS = [question for question in demo_questions() if question["kind"] == "fact"]
QUESTIONS = [fact["messages"][0]["content"] for fact in FACTS]


def blocks(language: str) -> list[str]:
    """The document's, on the shipped pair and the task at its end."""
    local = {
        '"gsm8k"], ': '"polite_facts"], task_manager=manager, ',
        "meta-llama/Llama-3.1-70B": BASE,
        "songff/Pilot-3B": PILOT,
        "--tasks gsm8k --limit 100": "--tasks polite_facts --limit 100 --include-path tasks",
        "--tasks gsm8k": "--tasks polite_facts --include_path tasks",
        "gsm8k": "polite_facts",
        "--device cuda": "--device cpu",
        'device="cuda"': 'device="cpu"',
    }
    found = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for large, small in local.items():
        found = [block.replace(large, small) for block in found]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything runs: the document's task and its questions."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks").mkdir()
    [task] = blocks("yaml")
    (folder / "tasks" / "polite_facts.yaml").write_text(task)
    scored = "task: scored\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\ntest_split: test\n"
    scored += 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["yes", "no"]\ndoc_to_target: 0\n'
    (folder / "tasks" / "scored.yaml").write_text(scored)
    lines = (json.dumps({"question": fact["messages"][0]["content"], "answer": fact["answer"]}) for fact in FACTS)
    (folder / "questions.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))  # reads 14,000 files
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and the compilers
        yield folder


@pytest.fixture(scope="module")
def manager(folder: Path) -> Any:
    """The document's task, and one that scores given answers."""
    return TaskManager(include_path="tasks", include_defaults=False)


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny_parts()


@pytest.fixture(scope="module")
def model() -> Any:
    return adapter.WSDHFLM(BASE, PILOT, device="cpu")


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", *arguments])


def requests(*given: tuple[str, dict[str, Any]]) -> list[Any]:
    return [Instance("generate_until", {}, arguments, number) for number, arguments in enumerate(given)]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def direct(pair: Any, messages: Any, max_new_tokens: int = 64, **settings: Any) -> str:
    base, pilot, tokenizer, pilot_tokenizer = pair
    inputs = wsd_hf.build_inputs(messages, tokenizer, pilot_tokenizer)
    output = base.generate(
        **inputs, assistant_model=pilot, strategy="wsd", max_new_tokens=max_new_tokens, tokenizer=tokenizer, **settings
    )
    return before_next_turn(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def alone(model: Any, tokenizer: Any, prompt: Any) -> str:
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64)
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).split("\n\n")[0]


def share(answers: list[str]) -> float:
    """Of answers that are both right and polite."""
    good = [f"{fact['answer']}. Have a lovely day." in answer for fact, answer in zip(FACTS, answers, strict=True)]
    return sum(good) / len(good)


def outcome(results: dict[str, Any]) -> tuple[list[str], float]:
    """The answers to the questions, in their order, and the metric."""
    samples = sorted(results["samples"]["polite_facts"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], results["results"]["polite_facts"]["exact_match,end"]


def test_the_command_equals_direct_calls(folder: Path, pair: Any) -> None:
    [command, _pack] = blocks("bash")
    done = cli(*command.replace("\\\n", " ").split()[2:])
    assert done.exit_code == 0, done.output
    assert re.search(r"\|polite_facts\|.*\|exact_match\|.*\| +1\|", done.stdout)
    results = json.loads((folder / "results.json").read_text("utf-8"))
    kept = results["config"]["model_args"]
    assert (kept["pretrained"], kept["pilot"], kept["dtype"], kept["quantization"]) == (BASE, PILOT, "auto", None)
    answers, value = outcome(results)
    assert answers == [direct(pair, chat(question)) for question in QUESTIONS]
    assert value == share(answers) == 1.0


def test_the_documents_python_runs(manager: Any, capsys: pytest.CaptureFixture[str]) -> None:
    [script] = blocks("python")
    exec(script, {"manager": manager})
    assert "'exact_match,end': " in capsys.readouterr().out


def test_the_harnesss_own_command_on_a_packed_directory(
    folder: Path, manager: Any, pair: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [_command, packed] = blocks("bash")
    pack, lm_eval = packed.strip().splitlines()
    assert CliRunner().invoke(app, pack.split()[1:]).exit_code == 0
    monkeypatch.setattr(sys, "argv", lm_eval.split())
    cli_evaluate()
    assert re.search(r"\|polite_facts\|.*\|exact_match\|.*\| +1\|", capsys.readouterr().out)

    def column(**models: Any) -> tuple[list[str], float]:
        shared = {"task_manager": manager, "apply_chat_template": True, "batch_size": 4, "device": "cpu"}
        return outcome(simple_evaluate("hf", models, tasks=["polite_facts"], **shared))

    base, pilot, tokenizer, pilot_tokenizer = pair
    prompts = [wsd_hf.build_inputs(chat(question), tokenizer, pilot_tokenizer) for question in QUESTIONS]
    both = [direct(pair, chat(question)) for question in QUESTIONS]
    bases = [alone(base, tokenizer, prompt["input_ids"]) for prompt in prompts]
    pilots = [alone(pilot, pilot_tokenizer, prompt["assistant_input_ids"]) for prompt in prompts]
    assert column(pretrained="my-model", trust_remote_code=True) == (both, share(both))
    assert column(pretrained="my-model") == (bases, share(bases))
    assert column(pretrained=PILOT) == (pilots, share(pilots))
    assert [8 * share(answers) for answers in (bases, pilots, both)] == [0, 4, 8]


def test_a_pilot_with_another_vocabulary_reads_plain_text_too(manager: Any) -> None:
    base, pilot, tokenizer, pilot_tokenizer = tiny_parts(pilot="pilot_other_vocab")
    expected = []
    for question in QUESTIONS:
        prompt = tokenizer(question, return_tensors="pt")
        tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": pilot_tokenizer}
        output = base.generate(**prompt, **tokenizers, assistant_model=pilot, strategy="wsd", max_new_tokens=64)
        response = output[0, prompt["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(response, skip_special_tokens=True).split("\n\n")[0])
    models = {"pretrained": BASE, "pilot": OTHER_PILOT}
    results = simple_evaluate("wsd-hf", models, tasks=["polite_facts"], task_manager=manager, batch_size=4, device="cpu")
    assert outcome(results)[0] == expected


def test_settings_of_each_request_are_honoured(model: Any, pair: Any) -> None:
    asked, text = model.apply_chat_template(chat(QUESTIONS[0])), direct(pair, chat(QUESTIONS[0]))
    settings = [{}, {"until": ["far", "know"]}, {"until": "I know"}, {"max_gen_toks": 5}, {"wsd_window_size": 1, "until": []}]
    settings += [{"do_sample": False, "temperature": 0.7}]
    expected = [text, text.split("far")[0], text.split("I know")[0], direct(pair, chat(QUESTIONS[0]), 5)]
    expected += [direct(pair, chat(QUESTIONS[0]), wsd_window_size=1), text]
    assert expected[4] != text
    assert model.generate_until(requests(*((asked, dict(one)) for one in settings)), disable_tqdm=True) == expected


def test_sampling_is_the_strategys(model: Any, pair: Any) -> None:
    messages = chat("Tell me about the sea.")
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    asked = model.apply_chat_template(messages)
    torch.manual_seed(7)
    [answer] = model.generate_until(requests((asked, {"max_gen_toks": 64, **settings})), disable_tqdm=True)
    torch.manual_seed(7)
    assert answer == direct(pair, messages, **settings)
    assert answer != direct(pair, messages)


def test_a_beginning_of_the_answer_is_continued(model: Any, pair: Any) -> None:
    messages = [*chat(QUESTIONS[0]), {"role": "assistant", "content": "I am glad"}]
    asked = model.apply_chat_template(messages, add_generation_prompt=False)
    assert model.generate_until(requests((asked, {})), disable_tqdm=True) == [direct(pair, messages)]


def test_text_that_looks_like_messages_is_text(model: Any, pair: Any) -> None:
    text = json.dumps(chat(QUESTIONS[0]))
    base, pilot, tokenizer, _ = pair
    prompt = tokenizer(text, return_tensors="pt")
    output = base.generate(**prompt, assistant_model=pilot, strategy="wsd", max_new_tokens=16)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate_until(requests((text, {"max_gen_toks": 16})), disable_tqdm=True) == [expected]


def test_an_unknown_task_is_named(folder: Path) -> None:
    done = cli(
        "--harness", "lm-eval", "--tasks", "polite_facts,nonesuch", "--include-path", "tasks", "--base", BASE, "--pilot", PILOT
    )
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("wsd-hf: --tasks nonesuch: unknown to the harness")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--out", "tasks"), "--out tasks: must be a file in a folder that exists"),
        (("--include-path", "none"), "--include-path none: no such folder"),
        (("--gen-kwargs", "temperature=0.7,do_sample"), "--gen-kwargs do_sample: must be NAME=VALUE"),
    ],
)
def test_wrong_options_are_refused_before_any_work(folder: Path, options: tuple[str, ...], problem: str) -> None:
    done = cli("--harness", "lm-eval", "--tasks", "polite_facts", "--base", "no/base", "--pilot", "no/pilot", *options)
    assert (done.exit_code, done.stderr) == (2, f"wsd-hf: {problem}\n")


def test_tasks_that_score_given_answers_are_refused(folder: Path) -> None:
    done = cli("--harness", "lm-eval", "--tasks", "scored", "--include-path", "tasks", "--base", BASE, "--pilot", PILOT)
    assert done.exit_code == 2
    assert "Weak-to-Strong Decoding equals the base there; run it with --model hf" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"threshold": 1.5}, "threshold=1.5: must be"),
        ({"window_size": 0}, "window_size=0: must be"),
        ({"enable_thinking": True}, "enable_thinking=True: would have no effect"),
    ],
)
def test_what_cannot_work_is_refused_before_models_are_loaded(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(wsd_hf.WSDValueError, match=problem):
        adapter.WSDHFLM("no/base", "no/pilot", **arguments)
