"""The examples run as they stand, and show what they say."""

import runpy
from pathlib import Path

import pytest
import typer
import yaml

from wsd_hf.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_pipeline_chat(shown) -> None:
    text = shown("pipeline_chat.py")
    assert text.count("the Keloft eats acorns") == 3
    assert "Quibime collects keys" in text
    assert "\nThank you" in text
    assert "[User]" not in text


def test_cross_tokenizer(shown) -> None:
    text = shown("cross_tokenizer.py")
    assert "the Keloft eats acorns" in text
    assert text.count("pilot: ") == 4


def test_the_compose_file_puts_each_server_on_a_gpu_and_names_both_to_wsd_hf() -> None:
    services = yaml.safe_load((EXAMPLES / "vllm/compose.yaml").read_text("utf-8"))["services"]
    gpus = [services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for name in ("base", "pilot")]
    assert gpus == [["0"], ["1"]]
    _program, name, *words = services["wsd"]["command"]
    known = {option for parameter in typer.main.get_command(app).commands[name].params for option in parameter.opts}
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() <= known
    assert [options["--base-url"], options["--pilot-url"]] == ["http://base:8000/v1", "http://pilot:8000/v1"]
    assert services["wsd"]["ports"] == ["127.0.0.1:8000:8000"]
    assert not any("ports" in services[name] for name in ("base", "pilot"))
