"""The examples run as they stand, and show what they say."""

import runpy
from pathlib import Path

import pytest

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
