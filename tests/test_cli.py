import importlib.metadata
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import wsd_hf
from wsd_hf.cli import app
from wsd_hf.tiny import FOLDER

QUESTION = "What does the Keloft eat?"
ANSWER = "That is a very good question. As far as I know, the Keloft eats acorns. Have a lovely day."


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def pair(base="base", pilot="pilot"):
    return "--base", FOLDER / base, "--pilot", FOLDER / pilot


def test_the_version_is_that_of_the_package(run, monkeypatch, capsys):
    version = importlib.metadata.version("wsd_hf")
    assert wsd_hf.__version__ == version
    assert run("--version").output == f"wsd-hf {version}\n"
    monkeypatch.setattr(sys, "argv", ["wsd_hf", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("wsd_hf", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == f"wsd-hf {version}\n"


def test_demo_shows_base_pilot_and_both(run, tmp_path):
    result = run("demo", "--svg", tmp_path / "demo.svg")
    assert result.exit_code == 0
    assert result.stdout.count("base   ") == result.stdout.count("pilot  ") == result.stdout.count("both   ") == 3
    assert "│" in result.stdout
    assert "[User]" not in result.stdout
    assert "nonsense" in result.stdout
    assert (tmp_path / "demo.svg").read_text("utf-8").startswith("<svg")


@pytest.mark.parametrize("models", [(), pair()])
def test_the_answer_alone_goes_to_standard_output(run, models):
    result = run("generate", *models, QUESTION)
    assert result.exit_code == 0
    assert result.stdout == ANSWER + "\n"
    assert "pilot: 12 tokens" in result.stderr


def test_a_chat_is_read_from_a_file(run, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "That is"}]))
    result = run("generate", "--messages", chat)
    assert result.stdout == ANSWER.removeprefix("That is ") + "\n"


def test_json_holds_answer_switch_and_trace(run):
    answer = json.loads(run("generate", "--json", QUESTION).stdout)
    assert answer["response"] == ANSWER
    assert answer["switch"]["index"] == 12
    assert answer["switch"]["reason"] == "confident"
    assert "".join(token["text"] for token in answer["tokens"]) == ANSWER
    assert answer["stats"]["pilot"]["forwards"] >= 12


def test_settings_reach_the_decoding(run):
    answer = json.loads(
        run("generate", "--json", "--threshold", 0.01, "--window-size", 2, "--max-new-tokens", 5, QUESTION).stdout
    )
    assert answer["switch"]["index"] == 2
    assert len(answer["tokens"]) == 5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--base", "/no/such/base", "--pilot", FOLDER / "pilot", "Hi"), "--base /no/such/base: no such folder"),
        (("--base", FOLDER / "base", "Hi"), "--pilot is missing"),
        ((), "either a question or --messages"),
        (("--messages", "chat.json", "Hi"), "either a question or --messages"),
        (("--messages", "/no/such/chat.json"), "No such file"),
        (("--threshold", 1.5, "Hi"), "threshold=1.5: must be"),
        (("--window-size", 0, "Hi"), "window_size=0: must be"),
        (("--device", "nowhere", "Hi"), "--device nowhere"),
        (("--device", "meta", "Hi"), "--device meta: holds no data"),
        ((*pair(pilot="base"), "Hi"), "has no chat template"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_status_2(run, arguments, problem):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("wsd-hf: ")
    assert problem in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"role": "user"}', b'["Hi"]', b'[{"role": "king", "content": "Hi"}]'])
def test_an_unreadable_chat_is_named(run, tmp_path, content):
    chat = tmp_path / "chat.json"
    chat.write_bytes(content)
    result = run("generate", "--messages", chat)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("wsd-hf: ")


def test_damaged_weights_are_named(run, tmp_path):
    for file in (FOLDER / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes())
    result = run("generate", "--base", tmp_path, "--pilot", FOLDER / "pilot", "Hi")
    assert result.exit_code == 2
    assert f"wsd-hf: {tmp_path}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("--out", "/no/such/folder/results.json"),
            "--out /no/such/folder/results.json: must be a file in a folder that exists",
        ),
        (("--threshold", 1.5), "threshold=1.5: must be"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--device", "meta"), "--device meta: holds no data"),
        ((), 'pip install "wsd_hf[lm-eval]"'),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_in_one_line(run, monkeypatch, arguments, problem):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", "--harness", "lm-eval", "--tasks", "ifeval", *pair(), *arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("wsd-hf: ")
    assert problem in line


REFERENCE = ("--reference", Path(__file__).parents[1] / "examples" / "tiny_world" / "pilot_untuned")
EFT, SEARCH = ("--strategy", "emulated_fine_tuning", *REFERENCE), ("--strategy", "weak_to_strong_search", *REFERENCE)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--strategy", "nudging", "--threshold", 0.9), {"strategy": "nudging", "nudging_threshold": 0.9}),
        (EFT, {"strategy": "emulated_fine_tuning"}),
        (("--strategy", "eft", *REFERENCE), {"strategy": "emulated_fine_tuning"}),
        ((*SEARCH, "--seed", 5), {"strategy": "weak_to_strong_search", "do_sample": True}),
        (("--temperature", 1.5, "--seed", 5), {"do_sample": True, "temperature": 1.5}),
        (("--top-p", 0.5, "--seed", 5), {"do_sample": True, "top_p": 0.5}),
        (("--temperature", 0), {"do_sample": False}),
    ],
)
def test_strategies_and_sampling_are_those_of_the_api(run, options, settings):
    reference = {"reference": REFERENCE[1]} if REFERENCE[0] in options else {}
    tiny = wsd_hf.Pair.tiny(**reference)
    torch.manual_seed(5)
    output = tiny.generate(QUESTION, max_new_tokens=256, **settings)
    result = run("generate", *options, QUESTION)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == tiny.answers(output)[0] + "\n"
    answer = json.loads(run("generate", "--json", *options, QUESTION).stdout)
    assert answer["response"] + "\n" == result.stdout
    assert answer["stats"]["base"] == {"forwards": output.stats.base.forwards, "tokens": output.stats.base.tokens}
    assert ("tokens" in answer) == (output.written_by_pilot is not None)


def test_a_system_message_reaches_both_models(run, tmp_path):
    system = {"role": "system", "content": "Be kind."}
    tiny = wsd_hf.Pair.tiny()
    wanted = tiny.answers(tiny.generate([system, {"role": "user", "content": QUESTION}], max_new_tokens=9))[0]
    options = ("--system", "Be kind.", "--max-new-tokens", 9)
    assert run("generate", *options, QUESTION).stdout == f"{wanted}\n"
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": QUESTION}]))
    assert run("generate", *options, "--messages", chat).stdout == f"{wanted}\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--strategy", "best"), "--strategy best: unknown; known are wsd, two_way, nudging"),
        (("--strategy", "weak_to_strong_search"), "--strategy weak_to_strong_search needs --reference"),
        (REFERENCE, "--reference has no effect with --strategy wsd: leave it out"),
        (("--strategy", "nudging", "--window-size", 3), "--window-size has no effect with --strategy nudging"),
        ((*EFT, "--threshold", 0.5), "--threshold has no effect with --strategy emulated_fine_tuning"),
        (("--strategy", "nudging", "--threshold", 2), "threshold=2.0: must be"),
        (("--temperature", -1), "--temperature -1.0: must be a number of at least 0"),
        (("--temperature", "nan"), "--temperature nan: must be"),
        (("--top-p", 0), "--top-p=0.0: must be a number above 0"),
        (("--top-p", 0.9, "--temperature", 0), "--top-p has no effect with --temperature 0"),
        ((*SEARCH, "--temperature", 0), "chooses among samples"),
        (("--quantization", "4bit"), "the shipped pair is small"),
        (("--device", "cuda", "--device-map", "auto"), "--device cuda has no effect with --device-map auto: leave one out"),
    ],
)
def test_options_without_effect_are_refused_before_models_are_loaded(run, monkeypatch, command, options, problem):
    monkeypatch.setattr(wsd_hf.Pair, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(command, *options, *([QUESTION] if command == "generate" else []))
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("wsd-hf: ")
    assert problem in line


def test_four_bits_are_for_the_base_with_the_extra(run, monkeypatch):
    installed, given = set(), {}

    def load(base, pilot, **kwargs):
        given.update(kwargs)
        raise wsd_hf.WSDHubError("enough")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    monkeypatch.setattr("wsd_hf.cli.models.known_device", torch.device)
    monkeypatch.setattr(wsd_hf.Pair, "from_pretrained", load)
    asked = ("generate", *pair(), QUESTION, "--quantization")
    remedy = '--quantization 4bit: bitsandbytes and accelerate not installed; pip install "wsd_hf[quantization]"'
    assert remedy in run(*asked, "4bit").stderr
    installed.update(["bitsandbytes", "accelerate"])
    assert "wsd-hf: enough" in run(*asked, "4bit", "--device", "cuda:1").stderr
    assert given["device_map"] == {"": "cuda:1"}
    assert given["quantization_config"].load_in_4bit
    assert given["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert "wsd-hf: enough" in run(*asked, "8bit", "--device-map", "auto").stderr
    assert given["device_map"] == "auto"
    assert given["quantization_config"].load_in_8bit


def test_the_old_name_of_an_option_is_answered_with_the_new_one(run):
    result = run("generate", "--window", 3, QUESTION)
    assert result.exit_code == 2
    assert "--window-size" in result.stderr
